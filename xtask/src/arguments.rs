//! The command lines of the programs that `cargo xtask` builds and then becomes.
//!
//! `cargo xtask` reads them before it builds anything, so that help and mistakes take no time; the program reads the
//! same words again.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};

use crate::rows::{self, ROWS, Row};

/// `cargo xtask demo`
#[derive(Debug, Parser)]
pub struct Demo {
    /// Leave everything standing, and say what to try next
    #[arg(long)]
    pub keep: bool,
    /// Print the report as one JSON object
    #[arg(long)]
    pub json: bool,
    /// Take down what `--keep` left standing
    #[arg(long, conflicts_with_all = ["keep", "json"])]
    pub down: bool,
    /// Use an unoptimised daemon: faster to build
    #[arg(long)]
    pub dev: bool,
}

/// What a reader of the numbers has to know.
const CONDITIONS: &str = "\
Load, servers and proxies share this machine's cores: a throughput is what the whole of it carries, and the CPU rows
count the proxies alone (user and system time of all their threads). Pods have namespaces of their own on two nodes, one
link between them. The same wrk, iperf3, nginx and fixed-rate client (its times count from when a request was due) run
through every column; in each round every column gets a new site and new proxies, and a ratio is taken within a round.

ztunnel     the release build (or ZTUNNEL_BIN) with its defaults: capture, STRICT policy, metrics, access log
envoy_tcp   Envoy as sidecars with its defaults: one mutual TLS connection for each connection
envoy_http  Envoy as sidecars with its defaults: HTTP/1.1, pooled HTTP/2 over mutual TLS, HTTP/1.1; no streams
peer        as a node agent starts it: iptables in the pods, ZDS, a local mesh file, FAKE_CA

All use TLS 1.3 with P-256 certificates and AES-GCM; Envoy's library takes 128 bit, ours 256. The client dials Envoy's
listener itself, so Envoy pays nothing for redirection; it writes no access log. Memory is VmRSS, the mean of the two
proxies. Results on a busy machine are worth little: the report says how busy it was.";

/// `cargo xtask bench`
#[derive(Debug, Parser)]
#[command(after_long_help = CONDITIONS)]
pub struct Bench {
    /// Fewer rows, two rounds of two seconds: under three minutes
    #[arg(long)]
    pub quick: bool,
    /// How often each column is measured
    #[arg(long, value_name = "N")]
    pub rounds: Option<usize>,
    /// How long each load runs
    #[arg(long, value_name = "S")]
    pub seconds: Option<u64>,
    /// What to measure beside each other
    #[arg(long, value_delimiter = ',', value_name = "COLUMN,...")]
    pub columns: Vec<Column>,
    /// Rows to measure; `open_*` means all that start so
    #[arg(long, value_delimiter = ',', value_name = "ROW,...")]
    pub rows: Vec<String>,
    /// Another ztunnel-compatible program (one that knows FAKE_CA), as the column `peer`; needs iptables
    #[arg(long, value_name = "PATH")]
    pub peer_binary: Option<PathBuf>,
    /// Instead: what one node can hold, in pods and in connections; about three minutes
    #[arg(long, conflicts_with_all = ["quick", "columns", "rows", "peer_binary", "json", "svg", "rounds"])]
    pub scale: bool,
    /// Write the results for programs
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw throughput, latency and CPU
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

impl Bench {
    /// The rows that are asked for; an unknown one is the error.
    pub fn chosen_rows(&self) -> Result<Vec<Row>> {
        match (self.rows.is_empty(), self.quick) {
            (false, _) => match rows::select(&self.rows) {
                Ok(rows) => Ok(rows),
                Err(unknown) => {
                    let known: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
                    bail!("there is no row {unknown}; there are {}", known.join(" "));
                }
            },
            (true, true) => Ok(ROWS.into_iter().filter(|row| row.quick).collect()),
            (true, false) => Ok(ROWS.to_vec()),
        }
    }

    /// The columns that are asked for, in the order of the report.
    pub fn chosen_columns(&self) -> Vec<Column> {
        let asked = |column: &Column| match (self.columns.is_empty(), column) {
            (true, Column::Peer) => self.peer_binary.is_some(),
            (true, _) => true,
            (false, _) => self.columns.contains(column),
        };
        Column::ALL.into_iter().filter(asked).collect()
    }

    /// Whether our daemon is measured.
    pub fn needs_daemon(&self) -> bool {
        self.scale || self.chosen_columns().contains(&Column::Ztunnel)
    }
}

/// What is measured beside each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Column {
    /// Nothing in between
    Bare,
    /// Our daemon on each node
    Ztunnel,
    /// Envoy as sidecars, one mutual TLS connection for each connection
    EnvoyTcp,
    /// Envoy as sidecars that proxy HTTP
    EnvoyHttp,
    /// The program of --peer-binary on each node
    Peer,
}

impl Column {
    /// All of them, in the order of the report.
    pub const ALL: [Self; 5] = [Self::Bare, Self::Ztunnel, Self::Peer, Self::EnvoyTcp, Self::EnvoyHttp];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Ztunnel => "ztunnel",
            Self::EnvoyTcp => "envoy_tcp",
            Self::EnvoyHttp => "envoy_http",
            Self::Peer => "peer",
        }
    }
}
