//! From what was typed to what each module is given.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::num::NonZero;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;
use http::HeaderValue;
use ztunnel_mesh::dump::Setting;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::model::identity::InvalidSpiffeId;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::workload::Named;
use ztunnel_node::capture;
use ztunnel_node::dns;
use ztunnel_node::identity::istiod;
use ztunnel_node::net::redirected;
use ztunnel_node::net::redirected::ClientAddress;
use ztunnel_node::net::socket::Keepalive;
use ztunnel_node::proxy;
use ztunnel_node::telemetry::line::Format;
use ztunnel_node::telemetry::logging::Filter;
use ztunnel_node::telemetry::logging::InvalidFilter;
use ztunnel_node::xds;
use ztunnel_objects::local;
use ztunnel_tls::grpc;
use ztunnel_tls::grpc::InvalidAddress;
use ztunnel_tls::provider::Compliance;

use crate::config::env;
use crate::config::env::Settings;
use crate::config::env::Surroundings;
use crate::config::env::memory;
use crate::config::env::proxy_config::MESH_CONFIG_PATH;
use crate::config::env::reader::Problems;
use crate::config::origin::Origin;
use crate::config::origin::Shown;
use crate::config::raw;

/// Why what was typed cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    /// No cgroup v2 hierarchy is mounted.
    #[error(
        "no cgroup v2 hierarchy is mounted: mount one (`mount -t cgroup2 none /sys/fs/cgroup`) or name it with --cgroup-root"
    )]
    NoCgroup2,
    /// They are hidden.
    #[error(
        "`ip netns exec` hides /sys/fs/cgroup and /sys/fs/bpf of this machine: enter the network namespace another way, \
         `nsenter --net=/run/netns/{0} ztunnel ...`"
    )]
    HiddenSys(String),
    /// The kernel does not have this congestion control.
    #[error(
        "--tunnel-congestion {name:?} is not known to this kernel: it has {known}, and `system` is its default"
    )]
    Congestion {
        /// What was named.
        name: String,
        /// What there is.
        known: String,
    },
    /// A path that was named is not there.
    #[error("{flag} {path:?}")]
    Path {
        /// The flag that named it.
        flag: &'static str,
        /// What it named.
        path: PathBuf,
        /// Why it cannot be used.
        source: std::io::Error,
    },
    /// A node's name is part of file names.
    #[error("{0:?} is not a node name: use letters, digits, '.', '-' and '_' (--node)")]
    NodeName(String),
    /// RUST_LOG.
    #[error("RUST_LOG cannot be used")]
    Log(#[from] InvalidFilter),
    /// The mesh configuration is there and cannot be read.
    #[error("the mesh configuration {path:?} cannot be read")]
    MeshConfig {
        /// Where it is.
        path: PathBuf,
        /// Why it cannot be read.
        source: std::io::Error,
    },
    /// Istio's environment.
    #[error(transparent)]
    Environment(#[from] Problems),
    /// Who this proxy is.
    #[error("POD_NAMESPACE and SERVICE_ACCOUNT name no identity")]
    Own(#[source] InvalidSpiffeId),
    /// Where the certificate authority is.
    #[error("CA_ADDRESS (--ca-address)")]
    Authority(#[from] InvalidAddress),
    /// Where the control plane is.
    #[error("XDS_ADDRESS")]
    Discovery(#[source] InvalidAddress),
    /// The validity of certificates.
    #[error("SECRET_TTL (--secret-ttl) {0:?}: certificates are to be valid for a minute at least")]
    SecretTtl(Duration),
    /// A header for the certificate authority.
    #[error("{0} cannot be sent as a header: use CA_HEADER_<name>=<value>")]
    Header(String),
    /// What to comply with.
    #[error("COMPLIANCE_POLICY {0:?} is not known: the one there is is pqc")]
    Compliance(String),
    /// No threads, no traffic.
    #[error("--threads 0: the data plane needs at least one thread")]
    NoThreads,
}

/// The node's name, as typed or as the host is called.
pub fn node_name(typed: Option<&str>) -> Result<Arc<str>, Invalid> {
    let host = || nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let name = typed.map(str::to_owned).or_else(host).unwrap_or_default();
    let valid = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    if name.is_empty() || name.len() > 253 || name.starts_with('.') || !name.chars().all(valid) {
        return Err(Invalid::NodeName(name));
    }
    Ok(Arc::from(name))
}

/// Where things of one node are.
#[derive(Debug, Clone)]
pub struct Places {
    /// The node's name.
    pub node: Arc<str>,
    /// Where its daemons meet.
    pub run_dir: PathBuf,
    /// What capture is given.
    pub capture: capture::Config,
}

/// Completes `kernel` by what this machine has.
pub fn places(kernel: &raw::Kernel) -> Result<Places, Invalid> {
    places_with(kernel, None)
}

/// [`places`] where nothing is captured by programs, so that what those need may be missing.
pub(super) fn places_without_capture(kernel: &raw::Kernel) -> Result<Places, Invalid> {
    places_with(kernel, Some(Path::new("/")))
}

/// Nothing of the kernel but the node's name, and where its daemons meet.
pub(super) fn unused_kernel(node: Option<String>, run_dir: PathBuf) -> raw::Kernel {
    raw::Kernel {
        pin_dir: None,
        cgroup_root: None,
        kubepods_cgroup: None,
        host_netns: PathBuf::from("/proc/self/ns/net"),
        node,
        run_dir: Some(run_dir),
    }
}

/// [`places`], with a cgroup to name where no hierarchy is mounted.
fn places_with(kernel: &raw::Kernel, instead: Option<&Path>) -> Result<Places, Invalid> {
    let node = node_name(kernel.node.as_deref())?;
    let named = |flag: &'static str, path: &Option<PathBuf>| match path {
        Some(path) => match std::fs::metadata(path) {
            Ok(_) => Ok(Some(path.clone())),
            Err(source) => Err(Invalid::Path { flag, path: path.clone(), source }),
        },
        None => Ok(None),
    };
    let cgroup_root = match named("--cgroup-root", &kernel.cgroup_root)? {
        Some(path) => path,
        None => cgroup2_mount(&std::fs::read_to_string("/proc/self/mounts").unwrap_or_default())
            .or_else(|| instead.map(Path::to_owned))
            .ok_or_else(no_cgroup2)?,
    };
    let kubepods = match named("--kubepods-cgroup", &kernel.kubepods_cgroup)? {
        Some(path) => Some(path),
        // The two names kubelet uses, by its cgroup driver.
        None => ["kubepods.slice", "kubepods"]
            .into_iter()
            .map(|name| cgroup_root.join(name))
            .find(|path| path.is_dir()),
    };
    named("--host-netns", &Some(kernel.host_netns.clone()))?;
    Ok(Places {
        run_dir: kernel.run_dir.clone().unwrap_or_else(|| Path::new("/run/ztunnel").join(&*node)),
        capture: capture::Config {
            pin_dir: kernel
                .pin_dir
                .clone()
                // The bpf file system has no dots in its names.
                .unwrap_or_else(|| Path::new("/sys/fs/bpf/ztunnel").join(node.replace('.', "_"))),
            cgroup_root,
            kubepods,
            host_netns: kernel.host_netns.clone(),
        },
        node,
    })
}

/// Enrolment by a node agent.
#[derive(Debug, Clone)]
pub struct Zds {
    /// Where it listens.
    pub socket: PathBuf,
    /// How to listen in the pods.
    pub listeners: capture::rules::Config,
    /// The cluster whose pods they are; empty where the mesh does not say which is whose.
    pub cluster: String,
    /// How pods' names are resolved; `None` where the agent does not redirect what they ask.
    pub dns: Option<dns::server::Config>,
}

fn zds(typed: &raw::Zds) -> Option<Zds> {
    let settings = redirected::Settings {
        mark: typed.packet_mark,
        client_address: match typed.orig_src {
            None => ClientAddress::Preferred,
            Some(true) => ClientAddress::Required,
            Some(false) => ClientAddress::Hidden,
        },
        keepalive: Keepalive {
            enabled: typed.keepalive,
            time: typed.keepalive_time,
            interval: typed.keepalive_interval,
            retries: typed.keepalive_retries,
            user_timeout: typed.user_timeout,
        },
    };
    let listeners = capture::rules::Config { share_ports: typed.port_reuse, ipv6: typed.ipv6, settings };
    let names = || dns::answer::Config::new(&typed.cluster_domain, None, typed.ipv6);
    let dns = typed.dns_capture.then(|| dns_in_pods(names(), &listeners));
    Some(Zds { socket: typed.zds.clone()?, listeners, cluster: String::new(), dns })
}

/// Listens for DNS as for everything else in the pods.
pub(super) fn dns_in_pods(
    names: dns::answer::Config,
    listeners: &capture::rules::Config,
) -> dns::server::Config {
    dns::server::Config {
        ipv6: listeners.ipv6,
        share_ports: listeners.share_ports,
        mark: listeners.settings.mark,
        ..dns::server::Config::new(names)
    }
}

/// One workload, in the network namespace of this process.
#[derive(Debug, Clone)]
pub struct Dedicated {
    /// What it is called here.
    pub uid: PodUid,
    /// Which workload of the mesh it is.
    pub workload: Named,
    /// How to listen for it.
    pub listeners: capture::rules::Config,
}

/// This proxy's own pod, as a server of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelfPod {
    /// What it is called here: a node agent does not say its own name for it.
    pub uid: PodUid,
    /// Its name, its namespace, its service account and its node.
    pub workload: Named,
    /// Who it is.
    pub identity: SpiffeId,
}

/// Where the mesh comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// Kubernetes' objects.
    File {
        /// A file or directory.
        path: PathBuf,
        /// Warnings count as errors.
        strict: bool,
    },
    /// A control plane.
    Istiod {
        /// Where and who.
        client: Box<xds::client::Config>,
        /// Whether only what is dialled is asked for, instead of everything.
        on_demand: bool,
    },
    /// Nowhere: it is empty.
    Nothing,
}

/// Everything the daemon needs.
#[derive(Debug, Clone)]
pub struct Run {
    /// Where things of this node are.
    pub places: Places,
    /// Where the mesh comes from.
    pub mesh: Source,
    /// A mesh that is there besides, from the start on.
    pub local: Option<local::Place>,
    /// Where the embedded authority keeps its root.
    pub state_dir: PathBuf,
    /// The authority to ask instead of the embedded one.
    pub authority: Option<istiod::Config>,
    /// The file of revocation lists, where they are to be looked in.
    pub crl: Option<PathBuf>,
    /// The file in which keys and certificates are kept, if they are.
    pub cert_cache: Option<PathBuf>,
    /// What cryptography has to comply with.
    pub compliance: Compliance,
    /// How long open connections may go on once the daemon is to end.
    pub drain_deadline: Duration,
    /// Where metrics are served.
    pub metrics_addr: SocketAddr,
    /// Where readiness is served.
    pub ready_addr: SocketAddr,
    /// Enrolment by a node agent; `None` where the mesh says which pods are captured.
    pub zds: Option<Zds>,
    /// The one workload that is served instead, where this process is.
    pub dedicated: Option<Dedicated>,
    /// The network this proxy is told that its pods are in; empty: it is not told.
    pub network: String,
    /// This proxy's own pod, if its metrics are to be had through a tunnel.
    pub self_pod: Option<SelfPod>,
    /// The port of the loopback where operators ask.
    pub admin_port: u16,
    /// What was typed, and what was completed.
    pub settings: Vec<Setting>,
    /// Whether what ends is started again, so that a daemon which has handed over stays until it is told to stop.
    pub kept_running: bool,
    /// What was said and has no effect, for the log.
    pub warnings: Vec<String>,
    /// What the data plane is given.
    pub proxy: proxy::Config,
    /// Lines of the access log a second about what one source does; 0: all.
    pub access_log_rate: u32,
    /// How log lines look.
    pub log_format: Format,
    /// Which there are.
    pub log_filter: Filter,
}

/// Completes `typed` by what this machine has. `shown` is what was typed, for those who ask.
pub fn run(typed: &raw::Run, mut shown: Vec<Shown>) -> Result<Run, Invalid> {
    let zds = zds(&typed.zds);
    let places = match zds {
        Some(_) => places_without_capture(&typed.kernel)?,
        None => places(&typed.kernel)?,
    };
    let mut proxy = proxy::Config { same_node: !typed.encrypt_same_node, ..proxy::Config::default() };
    proxy.threads = typed.threads.unwrap_or(proxy.threads);
    proxy.buffer_memory = typed.buffer_memory.unwrap_or_else(memory::default);
    proxy.hbone.congestion = Some(typed.tunnel_congestion.clone()).filter(|name| name != "system");
    if let Some(name) = &proxy.hbone.congestion {
        check_congestion(name)?;
    }
    if proxy.threads == 0 {
        return Err(Invalid::NoThreads);
    }
    let mut completed = vec![
        ("--node", places.node.to_string()),
        ("--run-dir", places.run_dir.display().to_string()),
        ("--threads", proxy.threads.to_string()),
        ("--buffer-memory", proxy.buffer_memory.to_string()),
    ];
    if zds.is_none() {
        completed.push(("--pin-dir", places.capture.pin_dir.display().to_string()));
        completed.push(("--cgroup-root", places.capture.cgroup_root.display().to_string()));
        let kubepods = places.capture.kubepods.iter();
        completed.extend(kubepods.map(|path| ("--kubepods-cgroup", path.display().to_string())));
    }
    for (name, value) in completed {
        if shown.iter().all(|setting| setting.name != name) {
            shown.push(Shown { name: name.to_owned(), value, origin: Origin::Machine });
        }
    }
    let log_filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => text.parse()?,
        _ => Filter::default(),
    };
    let mut warnings = tls12();
    warnings.extend(unknown_targets(&log_filter));
    let is_set = std::env::var_os("RUST_LOG").is_some();
    let origin = if is_set { Origin::Environment } else { Origin::Default };
    shown.push(Shown { name: "RUST_LOG".to_owned(), value: log_filter.to_string(), origin });
    Ok(Run {
        places,
        mesh: Source::File { path: typed.mesh.path(), strict: typed.strict },
        local: None,
        state_dir: typed.state_dir.clone(),
        authority: authority(&typed.certificates, std::env::vars())?,
        crl: typed.certificates.crl.clone(),
        cert_cache: typed.certificates.cert_cache.clone().filter(|path| !path.as_os_str().is_empty()),
        compliance: match typed.certificates.compliance_policy.as_deref() {
            None | Some("") => Compliance::None,
            Some("pqc") => Compliance::Pqc,
            Some(other) => return Err(Invalid::Compliance(other.to_owned())),
        },
        drain_deadline: typed.drain_deadline,
        metrics_addr: typed.metrics_addr,
        ready_addr: typed.ready_addr,
        zds,
        dedicated: None,
        network: String::new(),
        self_pod: None,
        proxy,
        log_format: match typed.log_format {
            raw::LogFormat::Plain => Format::Plain,
            raw::LogFormat::Json => Format::Json,
        },
        access_log_rate: typed.access_log_rate,
        log_filter,
        admin_port: typed.admin_port,
        settings: shown.iter().map(Setting::from).collect(),
        kept_running: false,
        warnings,
    })
}

/// What the log's filter names in vain. No error: it may be written for another proxy's log.
pub(super) fn unknown_targets(filter: &Filter) -> Option<String> {
    let unknown: Vec<&str> = filter.unknown().collect();
    (!unknown.is_empty()).then(|| format!("RUST_LOG: nothing here logs as {}", unknown.join(", ")))
}

fn tls12() -> Vec<String> {
    let asked = std::env::var("TLS12_ENABLED").is_ok_and(|value| value == "true");
    let said =
        "TLS12_ENABLED has no effect: TLS is 1.3 only, as peers of a mesh and its control plane speak it";
    asked.then(|| said.to_owned()).into_iter().collect()
}

/// What Istio's environment says on this machine.
pub fn istio() -> Result<Settings, Invalid> {
    let text = |value: std::ffi::OsString| value.to_string_lossy().into_owned();
    let variables = std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect();
    let path = Path::new(MESH_CONFIG_PATH);
    let mesh_config = match std::fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(source) => return Err(Invalid::MeshConfig { path: path.to_owned(), source }),
    };
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    Ok(env::resolve(&variables, Surroundings { mesh_config: mesh_config.as_deref(), cores })?)
}

/// The prefix of variables that are headers of each request to the authority.
const CA_HEADER: &str = "CA_HEADER_";

/// How the certificate authority is asked, if one is named; `environment` is the process's.
fn authority(
    typed: &raw::Certificates,
    environment: impl Iterator<Item = (String, String)>,
) -> Result<Option<istiod::Config>, Invalid> {
    let Some(addresses) = typed.ca_address.as_deref().filter(|text| !text.trim().is_empty()) else {
        return Ok(None);
    };
    if typed.secret_ttl < Duration::from_secs(60) {
        return Err(Invalid::SecretTtl(typed.secret_ttl));
    }
    let mut headers = Vec::new();
    let mut impersonate = true;
    let mut cluster = typed.cluster_id.clone();
    for (name, value) in environment {
        match name.as_str() {
            "PROXY_MODE" => impersonate = value != "dedicated",
            "ISTIO_META_CLUSTER_ID" => cluster = value,
            _ => {
                let Some(header) = name.strip_prefix(CA_HEADER) else { continue };
                let invalid = || Invalid::Header(name.clone());
                headers.push((
                    header.parse::<HeaderName>().map_err(|_| invalid())?,
                    value.parse::<HeaderValue>().map_err(|_| invalid())?,
                ));
            }
        }
    }
    let plane = |address: &str| {
        Ok(grpc::Config {
            address: address.parse()?,
            roots: typed.ca_root.as_str().into(),
            alternate: typed.ca_alt_hostname.clone().filter(|name| !name.is_empty()),
            token: typed.ca_token.as_str().into(),
            cluster: cluster.clone(),
            headers: headers.clone(),
        })
    };
    let planes: Result<Vec<_>, Invalid> = addresses.split(',').map(plane).collect();
    Ok(Some(istiod::Config { planes: planes?, life: typed.secret_ttl, impersonate }))
}

fn no_cgroup2() -> Invalid {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    hidden_sys(&mounts).map_or(Invalid::NoCgroup2, |name| Invalid::HiddenSys(name.to_owned()))
}

/// The network namespace whose name `ip netns exec` gave to the /sys that it mounts anew, without what is below it.
fn hidden_sys(mounts: &str) -> Option<&str> {
    let mut last = mounts.lines().rev().filter_map(|line| {
        let mut fields = line.split(' ');
        let (device, dir, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (dir == "/sys" && kind == "sysfs").then_some(device)
    });
    last.next().filter(|device| !matches!(*device, "sysfs" | "none" | "sys"))
}

/// That the kernel takes this congestion control; it may have to load a module for it.
pub(super) fn check_congestion(name: &str) -> Result<(), Invalid> {
    let refused = || {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.set_tcp_congestion(name.as_bytes())
    };
    match refused() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let known = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control");
            let known = known.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(", ");
            Err(Invalid::Congestion { name: name.to_owned(), known })
        }
        // Whatever else it is, it is not the name.
        _ => Ok(()),
    }
}

/// The first cgroup v2 mount point in the text of `/proc/self/mounts` (proc(5)).
fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_device, dir, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(dir))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hybrid_hierarchy_is_found() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_mount(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup2_mount("tmpfs /tmp tmpfs rw 0 0\n"), None);
    }

    #[test]
    fn what_ip_netns_exec_hides_is_recognised() {
        let plain = "sysfs /sys sysfs rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n";
        assert_eq!(hidden_sys(plain), None);
        assert_eq!(hidden_sys(&format!("{plain}cart /sys sysfs rw,relatime 0 0\n")), Some("cart"));
        assert_eq!(hidden_sys(""), None);
        let said = Invalid::HiddenSys("cart".to_owned()).to_string();
        assert!(said.contains("nsenter --net=/run/netns/cart"), "{said}");
    }

    #[test]
    fn a_congestion_control_that_the_kernel_does_not_have_is_refused() {
        check_congestion("reno").unwrap();
        let error = check_congestion("no-such").unwrap_err().to_string();
        assert!(error.contains("no-such") && error.contains("reno"), "{error}");
    }

    fn certificates(address: &str) -> raw::Certificates {
        raw::Certificates {
            ca_address: Some(address.to_owned()),
            ca_root: "SYSTEM".to_owned(),
            secret_ttl: Duration::from_secs(3600),
            cluster_id: "Kubernetes".to_owned(),
            ..raw::Certificates::default()
        }
    }

    fn variables(pairs: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect::<Vec<_>>()
            .into_iter()
    }

    #[test]
    fn an_authority_is_asked_if_one_is_named() {
        assert_eq!(authority(&raw::Certificates::default(), variables(&[])).unwrap(), None);
        assert_eq!(authority(&certificates(""), variables(&[])).unwrap(), None);
        let set = [("CA_HEADER_x-team", "mesh"), ("PATH", "/"), ("ISTIO_META_CLUSTER_ID", "c2")];
        let config = authority(&certificates("istiod-1:15012, https://istiod-2:15012"), variables(&set));
        let config = config.unwrap().unwrap();
        let addresses: Vec<_> = config.planes.iter().map(|plane| plane.address.to_string()).collect();
        assert_eq!(addresses, ["https://istiod-1:15012", "https://istiod-2:15012"]);
        assert!(config.impersonate);
        for plane in &config.planes {
            assert_eq!(plane.cluster, "c2");
            assert_eq!(plane.headers, [("x-team".parse().unwrap(), "mesh".parse().unwrap())]);
        }
        let dedicated = authority(&certificates("istiod:15012"), variables(&[("PROXY_MODE", "dedicated")]));
        assert!(!dedicated.unwrap().unwrap().impersonate);
    }

    #[test]
    fn an_authority_that_cannot_be_asked_is_an_error_at_start() {
        for address in ["istiod", "a:1,,b:1", "http://istiod:15010"] {
            let error = authority(&certificates(address), variables(&[])).unwrap_err();
            assert!(matches!(error, Invalid::Authority(_)), "{address:?}");
        }
        let header = authority(&certificates("a:1"), variables(&[("CA_HEADER_a b", "c")])).unwrap_err();
        assert!(matches!(header, Invalid::Header(_)), "{header}");
        let short = raw::Certificates { secret_ttl: Duration::from_secs(59), ..certificates("a:1") };
        assert!(matches!(authority(&short, variables(&[])), Err(Invalid::SecretTtl(_))));
    }

    #[test]
    fn a_node_name_is_part_of_paths() {
        assert!(node_name(Some("node-1.example")).is_ok());
        for name in ["", "..", "a/b", "a b", ".hidden"] {
            assert!(node_name(Some(name)).is_err(), "{name:?} was accepted");
        }
    }
}
