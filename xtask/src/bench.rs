//! Measures the daemon beside bare TCP and Envoy, all in one run on this machine.
//!
//! In each round every column gets nodes, pods and proxies of its own, runs every load, and is taken down: the columns
//! stand as close together in time as they can. The loads, the servers and the proxies share the machine's cores, so
//! a throughput is that of the whole; the CPU time of the proxies alone stands beside it.

mod column;
mod envoy;
mod load;
mod measure;
mod peer;
mod picture;
mod results;
mod rows;
mod scale;
mod site;
mod table;
mod usage;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use ztunnel_tests::run::end_here_if_interrupted;
use ztunnel_tests::{binaries, enclosure};

use crate::run::{cargo, visibly};
use crate::setup;
use column::{Column, Running};
use results::Results;
use rows::{ROWS, Row, Work};

/// The longest failure in a report, in characters.
const FAILURE_LIMIT: usize = 800;

const NO_ENCLOSURE: &str = "cannot make a world of its own for the benchmark";

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
#[derive(Debug, clap::Args)]
#[command(after_long_help = CONDITIONS)]
pub(crate) struct Arguments {
    /// Fewer rows, two rounds of two seconds: under three minutes
    #[arg(long)]
    quick: bool,
    /// How often each column is measured
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// How long each load runs
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// What to measure beside each other
    #[arg(long, value_delimiter = ',', value_name = "COLUMN,...")]
    columns: Vec<Column>,
    /// Rows to measure; `open_*` means all that start so
    #[arg(long, value_delimiter = ',', value_name = "ROW,...")]
    rows: Vec<String>,
    /// Another ztunnel-compatible program (one that knows FAKE_CA), as the column `peer`; needs iptables
    #[arg(long, value_name = "PATH")]
    peer_binary: Option<PathBuf>,
    /// Instead: what one node can hold, in pods and in connections; about three minutes
    #[arg(long, conflicts_with_all = ["quick", "columns", "rows", "peer_binary", "json", "svg", "rounds"])]
    scale: bool,
    /// Write the results for programs
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw throughput, latency and CPU
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// The command.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the benchmark makes network namespaces: run it as root (sudo -E cargo xtask bench)");
    }
    let mut results = arguments.plan()?;
    setup::ensure()?;
    if arguments.scale {
        build(std::env::var_os(binaries::DAEMON_VARIABLE).is_none())?;
        enclosure::enter().context(NO_ENCLOSURE)?;
        raise_file_limit();
        facts()?.iter().take(1).for_each(|fact| println!("{fact}"));
        print!("{}", scale::measure(arguments.seconds.unwrap_or(4).max(1))?);
        return Ok(ExitCode::SUCCESS);
    }
    let own = results.columns.contains(&Column::Ztunnel);
    build(own && std::env::var_os(binaries::DAEMON_VARIABLE).is_none())?;
    enclosure::enter().context(NO_ENCLOSURE)?;
    raise_file_limit();
    results.facts = facts()?;
    let start = Instant::now();
    for round in 0..results.rounds {
        // No column always has the machine that another has left.
        let shift = round % results.columns.len();
        let order: Vec<Column> =
            results.columns.iter().cycle().skip(shift).take(results.columns.len()).copied().collect();
        for column in order {
            eprintln!("round {} of {}: {}", round + 1, results.rounds, column.name());
            if let Err(error) = visit(&mut results, column, round, arguments.peer_binary.as_deref()) {
                fail(&mut results, format!("round {}: {}: {error:#}", round + 1, column.name()));
            }
        }
    }
    results.facts.push(format!("Took {} s.", start.elapsed().as_secs()));
    print!("{}", table::table(&results));
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&results.to_json())?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &arguments.svg {
        std::fs::write(path, picture::draw(&results))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(if results.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Arguments {
    fn plan(&self) -> Result<Results> {
        let rows: Vec<Row> = match (self.rows.is_empty(), self.quick) {
            (false, _) => match rows::select(&self.rows) {
                Ok(rows) => rows,
                Err(unknown) => {
                    let known: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
                    bail!("there is no row {unknown}; there are {}", known.join(" "));
                }
            },
            (true, true) => ROWS.into_iter().filter(|row| row.quick).collect(),
            (true, false) => ROWS.to_vec(),
        };
        let asked = |column: &Column| match (self.columns.is_empty(), column) {
            (true, Column::Peer) => self.peer_binary.is_some(),
            (true, _) => true,
            (false, _) => self.columns.contains(column),
        };
        let columns = Column::ALL.into_iter().filter(asked).collect();
        let (rounds, seconds) = if self.quick { (2, 2) } else { (5, 4) };
        let rounds = self.rounds.unwrap_or(rounds).max(1);
        Ok(Results::new(rows, columns, rounds, self.seconds.unwrap_or(seconds).max(1)))
    }
}

/// One column in one round.
fn visit(results: &mut Results, column: Column, round: usize, peer: Option<&Path>) -> Result<()> {
    let mut running = column.start(peer).context("cannot start")?;
    for work in rows::works(&results.rows) {
        if !column.carries(work) {
            continue;
        }
        match measured(&mut running, work, results.seconds) {
            Ok(values) => {
                for (name, value) in values {
                    eprintln!("  {name} {}", table::number(value));
                    results.add(&name, column, round, value);
                }
            }
            Err(error) => {
                fail(results, format!("round {}: {}: {work:?}: {error:#}", round + 1, column.name()));
            }
        }
    }
    end_here_if_interrupted();
    running.remove().context("cannot remove everything")
}

fn measured(running: &mut Running, work: Work, seconds: u64) -> Result<Vec<measure::Value>> {
    let values = measure::measure(running, work, seconds)?;
    running.must_run()?;
    Ok(values)
}

fn fail(results: &mut Results, failure: String) {
    // What fails while everything is being taken down is no result.
    end_here_if_interrupted();
    // A daemon may have said pages.
    let failure: String = failure.chars().take(FAILURE_LIMIT).collect();
    eprintln!("  FAILED: {failure}");
    results.failures.push(failure);
}

/// Builds what is measured, and with what, as it is shipped.
fn build(daemon: bool) -> Result<()> {
    let mut command = cargo();
    command.args(["build", "--release", "--package", "ztunnel-tests", "--bin", "ztunnel-peer"]);
    if daemon {
        command.args(["--package", "ztunnel", "--bin", "ztunnel"]);
    }
    // Standard output is the report's.
    visibly(command.stdout(std::io::stderr()))?;
    if daemon {
        binaries::use_daemon(binaries::target().join("release/ztunnel"));
    }
    Ok(())
}

/// Thousands of connections need as many files, in the proxies and in nginx, which inherit this limit.
fn raise_file_limit() {
    const WANTED: u64 = 65_536;
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    for limit in [WANTED.max(hard), hard] {
        if setrlimit(Resource::RLIMIT_NOFILE, limit, limit).is_ok() {
            return;
        }
    }
}

/// What the machine is.
fn facts() -> Result<Vec<String>> {
    let cpus = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let cores = std::thread::available_parallelism()?;
    Ok(vec![
        format!(
            "{cores} cores ({}) for loads, servers and proxies together; Linux {}; load average before: {}.",
            model.trim_start_matches(['\t', ' ', ':']),
            kernel.trim(),
            load.split(' ').next().unwrap_or_default(),
        ),
        "ztunnel: access log on, real capture. Envoy: no access log, dialled directly; --concurrency 2."
            .to_owned(),
    ])
}
