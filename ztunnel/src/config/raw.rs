//! The command line, as typed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::ArgAction;
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
    /// Kernel and file system.
    #[command(flatten)]
    pub kernel: Kernel,
    /// How long open connections may go on after SIGTERM or a hand-over
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE", value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub drain_deadline: Duration,
    /// Data-plane threads [default: half the cores, two at least if there are two cores]
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Carry connections between two pods of this node over mutual TLS too
    ///
    /// Otherwise they never leave the daemon: it hands their bytes over from one pod's socket to the other's,
    /// under the same policies, identities and reports. No packet leaves a pod then, so no NetworkPolicy of the CNI
    /// applies between two pods of the mesh on this node; an AuthorizationPolicy does. With this flag every byte is
    /// encrypted and goes through the CNI, to port 15008 of the other pod.
    #[arg(long, env = "ZTUNNEL_ENCRYPT_SAME_NODE", value_parser = clap::builder::BoolishValueParser::new())]
    pub encrypt_same_node: bool,
    /// The TCP congestion control of tunnels; `system`: whatever the kernel uses by default
    #[arg(long, env = "ZTUNNEL_TUNNEL_CONGESTION", value_name = "NAME", default_value = "cubic")]
    pub tunnel_congestion: String,
    /// Where /metrics is served
    #[arg(long, value_name = "ADDR", default_value = "[::]:15020")]
    pub metrics_addr: SocketAddr,
    /// Where /healthz/ready is served
    #[arg(long, value_name = "ADDR", default_value = "[::]:15021")]
    pub ready_addr: SocketAddr,
    /// Pods that a node agent enrols.
    #[command(flatten)]
    pub zds: Zds,
    /// How log lines look. RUST_LOG chooses which there are (e.g. RUST_LOG=info,access=off)
    #[arg(long, env = "LOG_FORMAT", value_name = "FORMAT", default_value = "plain")]
    pub log_format: LogFormat,
}

/// Enrolment by a node agent, and the sockets in pods whose traffic its rules redirect.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Enrolment by a node agent")]
pub struct Zds {
    /// Let a node agent (istio-cni, cilium-agent) enrol the pods, over this socket [default path: /var/run/ztunnel/ztunnel.sock]
    ///
    /// The agent's own rules in each pod then redirect its traffic to ports 15001, 15006 and 15008: nothing is
    /// loaded into the kernel, and neither eBPF nor a cgroup is needed. The mesh directory still says who is who;
    /// its annotations ztunnel.io/netns are not used.
    #[arg(long, env = "INPOD_UDS", value_name = "SOCKET", num_args = 0..=1, default_missing_value = "/var/run/ztunnel/ztunnel.sock")]
    pub zds: Option<PathBuf>,
    /// The mark (SO_MARK) by which the rules know the daemon's own packets
    #[arg(long, env = "PACKET_MARK", value_name = "N", default_value = "1337")]
    pub packet_mark: u32,
    /// Whether applications see their clients' addresses: true fails where that is not permitted [default: where permitted]
    #[arg(long, env = "ENABLE_ORIG_SRC", value_name = "BOOL")]
    pub orig_src: Option<bool>,
    /// Whether another daemon may listen in the same pods, so that one can replace the other
    #[arg(long, env = "INPOD_PORT_REUSE", value_name = "BOOL", default_value = "true", action = ArgAction::Set)]
    pub port_reuse: bool,
    /// Whether to listen on IPv6 in the pods
    #[arg(long, env = "IPV6_ENABLED", value_name = "BOOL", default_value = "true", action = ArgAction::Set)]
    pub ipv6: bool,
    /// Whether idle connections are probed (TCP keepalive)
    #[arg(long, env = "KEEPALIVE_ENABLED", value_name = "BOOL", default_value = "true", action = ArgAction::Set)]
    pub keepalive: bool,
    /// How long a connection is idle before it is probed
    #[arg(long, env = "KEEPALIVE_TIME", value_name = "TIME", default_value = "180s", value_parser = humantime::parse_duration)]
    pub keepalive_time: Duration,
    /// Between two probes
    #[arg(long, env = "KEEPALIVE_INTERVAL", value_name = "TIME", default_value = "180s", value_parser = humantime::parse_duration)]
    pub keepalive_interval: Duration,
    /// How many unanswered probes end a connection
    #[arg(long, env = "KEEPALIVE_RETRIES", value_name = "N", default_value = "9")]
    pub keepalive_retries: u32,
    /// Whether what was sent must be acknowledged in the time that the probes would take (TCP_USER_TIMEOUT)
    #[arg(long, env = "USER_TIMEOUT_ENABLED", value_name = "BOOL", default_value = "false", action = ArgAction::Set)]
    pub user_timeout: bool,
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
