//! The command line, as typed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::Parser;
use clap::Subcommand;
use clap::ValueEnum;

/// The node proxy of an ambient mesh: pods' TCP, captured with eBPF, carried over mutual TLS.
///
/// One daemon serves all enrolled pods of a node. It needs root (CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN,
/// CAP_NET_RAW), Linux 6.6 or later and a cgroup v2 hierarchy.
#[derive(Debug, Parser)]
#[command(name = "ztunnel", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the pods of this node until told to stop
    ///
    /// If a daemon already serves the node, this one takes over from it without losing a connection
    /// attempt, and the old one finishes its open connections and exits. SIGTERM and SIGINT stop taking new
    /// connections, finish open ones up to --drain-deadline and exit; captured pods then stay closed until
    /// a daemon is back. `ztunnel uninstall` opens them.
    Run(Box<Run>),
    /// Read a mesh file or directory, say what is wrong with it, and what it would do
    ///
    /// Exit status 1 when something in it is an error.
    Check(Check),
    /// Show in a throw-away network namespace that capture works on this kernel
    Selftest(Kernel),
    /// Undo everything in the kernel: pods are then outside the mesh
    ///
    /// Removes programs, pins, rules, routes and addresses. Refuses while a daemon serves the node.
    Uninstall(Uninstall),
}

/// Where things are in the kernel and the file system.
#[derive(Debug, Clone, Args)]
pub struct Kernel {
    /// Where programs and maps are pinned, so that they outlive the daemon [default: /sys/fs/bpf/ztunnel/NODE]
    #[arg(long, value_name = "DIR")]
    pub pin_dir: Option<PathBuf>,
    /// The cgroup v2 directory whose processes are captured [default: the root of the mounted hierarchy]
    #[arg(long, value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// The cgroup of all pods; processes in the node's network namespace that are in it get no probe exemption [default: kubepods.slice or kubepods under the cgroup root, if there]
    #[arg(long, value_name = "DIR")]
    pub kubepods_cgroup: Option<PathBuf>,
    /// The network namespace of the node, where kubelet's probes come from
    #[arg(long, value_name = "FILE", default_value = "/proc/self/ns/net")]
    pub host_netns: PathBuf,
    /// This node's name, as in the pods' spec.nodeName [default: the host name]
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: Option<String>,
    /// Where daemons of this node meet to hand over [default: /run/ztunnel/NODE]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}

/// `ztunnel run`
#[derive(Debug, Args)]
pub struct Run {
    /// The mesh: a directory of Kubernetes and Istio YAML, or one file. Watched: changes apply within a second
    #[arg(long, value_name = "PATH")]
    pub mesh: PathBuf,
    /// Where the embedded certificate authority keeps its root. Nodes of one mesh share its content
    #[arg(long, value_name = "DIR", default_value = "/var/lib/ztunnel")]
    pub state_dir: PathBuf,
    /// Certificates.
    #[command(flatten)]
    pub certificates: Certificates,
    /// Kernel and file system.
    #[command(flatten)]
    pub kernel: Kernel,
    /// How long open connections may go on after SIGTERM or a hand-over
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE", value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub drain_deadline: Duration,
    /// Data-plane threads [default: half the cores, at least one]
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Where /metrics is served
    #[arg(long, value_name = "ADDR", default_value = "[::]:15020")]
    pub metrics_addr: SocketAddr,
    /// Where /healthz/ready is served
    #[arg(long, value_name = "ADDR", default_value = "[::]:15021")]
    pub ready_addr: SocketAddr,
    /// How log lines look. RUST_LOG chooses which there are (e.g. RUST_LOG=info,access=off)
    #[arg(long, env = "LOG_FORMAT", value_name = "FORMAT", default_value = "plain")]
    pub log_format: LogFormat,
}

/// Where certificates come from, and what is demanded of peers'.
#[derive(Debug, Clone, Default, Args)]
pub struct Certificates {
    /// The certificate authority, istiod's or one that speaks its protocol: https://HOST:PORT, several separated by commas [default: the embedded one]
    #[arg(long, env = "CA_ADDRESS", value_name = "ADDRESS")]
    pub ca_address: Option<String>,
    /// Who vouches for the authority: a PEM file, which is read again when it changes, PEM itself, or SYSTEM
    #[arg(
        long,
        env = "CA_ROOT_CA",
        value_name = "ROOTS",
        default_value = "./var/run/secrets/istio/root-cert.pem"
    )]
    pub ca_root: String,
    /// A name the authority's certificate may have instead of the one in its address
    #[arg(long, env = "ALT_CA_HOSTNAME", value_name = "NAME")]
    pub ca_alt_hostname: Option<String>,
    /// The token by which this node proves who it is: a file (with a slash), or the token itself
    #[arg(
        long,
        env = "AUTH_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true,
        default_value = "./var/run/secrets/tokens/istio-token"
    )]
    pub ca_token: String,
    /// How long certificates are to be valid
    #[arg(long, env = "SECRET_TTL", value_name = "TIME", default_value = "24h", value_parser = humantime::parse_duration)]
    pub secret_ttl: Duration,
    /// The cluster this node is of, as the control plane calls it
    #[arg(long, env = "CLUSTER_ID", value_name = "NAME", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Certificate revocation lists, PEM or DER. Watched. Without a good one no peer is accepted
    #[arg(long, env = "CRL_PATH", value_name = "FILE")]
    pub crl: Option<PathBuf>,
    /// What cryptography has to comply with: pqc leaves X25519MLKEM768 as the only key exchange
    #[arg(long, env = "COMPLIANCE_POLICY", value_name = "POLICY")]
    pub compliance_policy: Option<String>,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Istio's tab separated lines.
    Plain,
    /// One JSON object a line.
    Json,
}

/// `ztunnel check`
#[derive(Debug, Args)]
pub struct Check {
    /// The mesh: a directory of Kubernetes and Istio YAML, or one file
    #[arg(long, value_name = "PATH")]
    pub mesh: PathBuf,
    /// The node to look from [default: the host name]
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: Option<String>,
}

/// `ztunnel uninstall`
#[derive(Debug, Args)]
pub struct Uninstall {
    /// Kernel and file system.
    #[command(flatten)]
    pub kernel: Kernel,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_needs_only_the_mesh() {
        let cli = Cli::try_parse_from(["ztunnel", "run", "--mesh", "mesh.yaml"]).unwrap();
        let Command::Run(run) = cli.command else { panic!("{cli:?}") };
        assert_eq!(run.drain_deadline, Duration::from_secs(30));
        assert_eq!(run.log_format, LogFormat::Plain);
    }
}
