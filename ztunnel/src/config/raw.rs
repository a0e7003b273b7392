//! The command line, as typed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::ArgAction;
use clap::ArgMatches;
use clap::Args;
use clap::CommandFactory;
use clap::FromArgMatches;
use clap::Parser;
use clap::Subcommand;
use clap::ValueEnum;
use clap::parser::ValueSource;

use crate::config::env::memory;
use crate::config::origin::Origin;
use crate::config::origin::Shown;

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
    /// Say what a daemon that starts here would use, and where each setting came from
    ///
    /// `ztunnel config run --mesh PATH ...` shows the settings of `ztunnel run` with the same flags. `ztunnel config`
    /// alone, or `ztunnel config proxy`, shows what Istio's environment variables, PROXY_CONFIG and the mesh
    /// configuration file amount to. Exit status 1 when one of them cannot be used.
    Config(Config),
    /// Show what a running daemon knows: its workloads, services, policies, certificates and open connections
    ///
    /// The tables of `istioctl ztunnel-config`, without Kubernetes: asks the admin port of the daemon in this network
    /// namespace, or reads a dump that was saved. In a pod: `kubectl exec POD -- ztunnel show connections`.
    Show(Show),
    /// Show the log's levels of a running daemon, or set them
    Log(Log),
    /// Have a running daemon read its mesh files now, and say what came of it
    ///
    /// Changes are read by themselves. One that looks as if everything were gone (most pods are named no more, a file is
    /// cut off) is held: the mesh before it stays in force. With --force what is held is carried out. Exit status 1 when
    /// the files are not in force as they are.
    Reload(Reload),
    /// Serve the pods of this node in the place of Istio's own ztunnel
    ///
    /// Everything is read from the environment that Istio's chart sets: the mesh comes from istiod, and so do
    /// certificates; istio-cni says which pods there are, and redirects their traffic. `ztunnel config` shows what
    /// the environment amounts to. Arguments are accepted and mean nothing, as Istio's image is given one.
    Proxy {
        /// Not used
        #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
        ignored: Vec<String>,
    },
    /// Say which build this is
    Version,
}

/// `ztunnel show`
#[derive(Debug, Args)]
pub struct Show {
    /// Which part of it
    #[arg(value_enum, default_value = "all")]
    pub part: Part,
    /// Only what has this name: of workloads and connections the pod's; of certificates a part of the identity
    pub name: Option<String>,
    /// Only what is in this namespace
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Only workloads on this node
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// The daemon's admin port
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15000")]
    pub admin: SocketAddr,
    /// A saved `/config_dump` instead
    #[arg(short, long, value_name = "FILE", conflicts_with = "admin")]
    pub file: Option<PathBuf>,
    /// Addresses of connections as they are, without names in their place
    #[arg(long)]
    pub raw: bool,
    /// How it is shown; JSON has every key of the dump
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Output,
}

/// A part of what a daemon knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// All of the following.
    All,
    /// The workloads of the mesh.
    #[value(alias = "workloads")]
    Workload,
    /// Its services.
    #[value(alias = "services")]
    Service,
    /// Its policies.
    #[value(alias = "policies")]
    Policy,
    /// The certificates of this node's identities.
    #[value(alias = "certificates")]
    Certificate,
    /// The open connections of this node's pods.
    #[value(alias = "connection")]
    Connections,
}

/// `ztunnel log`
#[derive(Debug, Args)]
pub struct Log {
    /// A level for everything, or MODULE:LEVEL, several with commas: `info,access:debug`
    pub level: Option<String>,
    /// Go back to the levels of the start first
    #[arg(long)]
    pub reset: bool,
    /// The daemon's admin port
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15000")]
    pub admin: SocketAddr,
}

/// `ztunnel reload`
#[derive(Debug, Args)]
pub struct Reload {
    /// What the files take away is meant
    #[arg(long)]
    pub force: bool,
    /// The daemon's admin port
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15000")]
    pub admin: SocketAddr,
}

/// `ztunnel config`
#[derive(Debug, Args)]
pub struct Config {
    /// The way to start.
    #[command(subcommand)]
    pub start: Option<Start>,
    /// How it is shown
    #[arg(short, long, value_name = "FORMAT", default_value = "text", global = true)]
    pub output: Output,
}

/// A way to start a daemon.
#[derive(Debug, Subcommand)]
pub enum Start {
    /// What `ztunnel run` would use
    Run(Box<Run>),
    /// What `ztunnel proxy` would use (this is what is shown without a command)
    Proxy {
        /// Not used
        #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
        ignored: Vec<String>,
    },
}

/// How answers are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table.
    Text,
    /// JSON.
    Json,
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

/// The mesh, named by a flag or without one.
#[derive(Debug, Clone, Args)]
#[group(id = "the-mesh", required = true, multiple = false)]
pub struct Mesh {
    /// The mesh: a directory of Kubernetes and Istio YAML, or one file. Watched: changes apply within seconds
    #[arg(long, value_name = "PATH")]
    pub mesh: Option<PathBuf>,
    /// The same without the flag
    #[arg(value_name = "MESH")]
    pub path: Option<PathBuf>,
}

impl Mesh {
    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.mesh.clone().or_else(|| self.path.clone()).unwrap_or_default()
    }
}

/// `ztunnel run`
#[derive(Debug, Args)]
pub struct Run {
    /// The mesh.
    #[command(flatten)]
    pub mesh: Mesh,
    /// Whether warnings count as errors: a mesh with one is not applied
    #[arg(long)]
    pub strict: bool,
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
    /// Data-plane threads [default: half the cores, two at least if there are two cores]
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// How much memory connections and tunnels may hold, such as 256Mi
    ///
    /// What applications and peers do not take is held for them, up to this for all pods together and half of it for
    /// one; beyond, those who hold most are closed. By default half of the memory limit of the control group, or
    /// without one a quarter of the machine's memory, 1Gi at most.
    #[arg(long, env = "ZTUNNEL_BUFFER_MEMORY", value_name = "SIZE", value_parser = memory::flag)]
    pub buffer_memory: Option<usize>,
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
    /// The port of the loopback where dumps, profiles and the log's levels are served
    #[arg(long, value_name = "PORT", default_value_t = 15000)]
    pub admin_port: u16,
    /// Lines of the access log a second about what one source does; those beyond are counted and left out. 0: all
    #[arg(long, env = "ZTUNNEL_ACCESS_LOG_RATE", value_name = "N", default_value_t = ACCESS_LOG_RATE)]
    pub access_log_rate: u32,
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
    /// Whether names that pods ask for are answered at port 15053 of their loopback, where the agent redirects them
    #[arg(long, env = "ISTIO_META_DNS_CAPTURE", value_name = "BOOL", default_value = "true", action = ArgAction::Set)]
    pub dns_capture: bool,
    /// The DNS suffix of the cluster's services
    #[arg(long, env = "CLUSTER_DOMAIN", value_name = "DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
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
    /// Keep keys and certificates in this file, so that a daemon that starts after a crash while the authority is away has them: they are on a disk then, for the owner alone [default: they are in memory only]
    #[arg(long, env = "ZTUNNEL_CERT_CACHE", value_name = "FILE")]
    pub cert_cache: Option<PathBuf>,
    /// What cryptography has to comply with: pqc leaves X25519MLKEM768 as the only key exchange
    #[arg(long, env = "COMPLIANCE_POLICY", value_name = "POLICY")]
    pub compliance_policy: Option<String>,
}

/// Lines of the access log a second about what one source does.
pub const ACCESS_LOG_RATE: u32 = 1000;

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
    /// The mesh.
    #[command(flatten)]
    pub mesh: Mesh,
    /// Whether warnings count as errors
    #[arg(long)]
    pub strict: bool,
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
    /// The file of kept keys and certificates, which is removed
    #[arg(long, env = "ZTUNNEL_CERT_CACHE", value_name = "FILE")]
    pub cert_cache: Option<PathBuf>,
}

/// The command line, and each flag that is in force with its value and where that came from.
pub fn parse() -> (Cli, Vec<Shown>) {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    (cli, settings(&matches))
}

/// The flags of the innermost command: those of `config run` are those of `run`.
fn settings(matches: &ArgMatches) -> Vec<Shown> {
    let root = Cli::command();
    let (mut command, mut typed) = (&root, matches);
    while let Some((name, below)) = typed.subcommand() {
        let Some(known) = command.find_subcommand(name) else { return Vec::new() };
        (command, typed) = (known, below);
    }
    let setting = |flag: &clap::Arg| {
        let origin = match typed.value_source(flag.get_id().as_str())? {
            ValueSource::DefaultValue => Origin::Default,
            ValueSource::EnvVariable => Origin::Environment,
            _ => Origin::CommandLine,
        };
        let values = typed.get_raw(flag.get_id().as_str())?.map(|value| value.to_string_lossy().into_owned());
        let (name, mut value) = (format!("--{}", flag.get_long()?), values.collect::<Vec<_>>().join(" "));
        // A token, unless it is a file with one.
        if flag.is_hide_env_values_set() && !value.contains('/') {
            value = "(not shown)".to_owned();
        }
        Some(Shown { name, value, origin })
    };
    // How answers are shown is no setting of a daemon.
    command.get_arguments().filter(|flag| !flag.is_global_set()).filter_map(setting).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_told_with_where_they_came_from() {
        let line = ["ztunnel", "run", "--mesh", "m.yaml", "--admin-port", "1", "--ca-token", "a.b.c"];
        let matches = Cli::command().try_get_matches_from(line).unwrap();
        let settings = settings(&matches);
        let told = |name: &str| settings.iter().find(|setting| setting.name == name).unwrap();
        assert_eq!(told("--ca-token").value, "(not shown)");
        assert_eq!((&*told("--admin-port").value, told("--admin-port").origin), ("1", Origin::CommandLine));
        assert_eq!(
            (&*told("--metrics-addr").value, told("--metrics-addr").origin),
            ("[::]:15020", Origin::Default)
        );
    }

    #[test]
    fn the_flags_of_config_run_are_those_of_run() {
        let flags = ["run", "--mesh", "m.yaml", "--admin-port", "1"];
        let told = |before: &[&str]| {
            let line = before.iter().chain(&flags);
            settings(&Cli::command().try_get_matches_from(line).unwrap())
        };
        let run = told(&["ztunnel"]);
        assert!(run.iter().any(|shown| shown.name == "--admin-port" && shown.value == "1"), "{run:?}");
        assert_eq!(told(&["ztunnel", "config"]), run);
        let output = Cli::try_parse_from(["ztunnel", "config", "run", "m.yaml", "-o", "json"]).unwrap();
        let Command::Config(Config { start: Some(Start::Run(run)), output: Output::Json }) = output.command
        else {
            panic!("another command")
        };
        assert_eq!(run.mesh.path(), PathBuf::from("m.yaml"));
        let Command::Config(alone) = Cli::try_parse_from(["ztunnel", "config"]).unwrap().command else {
            panic!("another command")
        };
        assert!(alone.start.is_none() && alone.output == Output::Text);
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_needs_only_the_mesh() {
        let parse = |line: &[&str]| Cli::try_parse_from(["ztunnel", "run"].iter().chain(line));
        for line in [&["--mesh", "mesh.yaml"][..], &["mesh.yaml"]] {
            let Command::Run(run) = parse(line).unwrap().command else { panic!("{line:?}") };
            assert_eq!(run.mesh.path(), PathBuf::from("mesh.yaml"));
        }
        assert!(parse(&[]).is_err() && parse(&["--mesh", "a", "b"]).is_err());
        let Command::Run(run) = parse(&["mesh.yaml"]).unwrap().command else { panic!("another command") };
        assert_eq!(run.drain_deadline, Duration::from_secs(30));
        assert_eq!(run.log_format, LogFormat::Plain);
    }
}
