//! Istio's environment → settings, each with where it came from.
//!
//! What a node proxy of Istio is told, it is told by the variables of its pod, by the YAML in `PROXY_CONFIG`, and by
//! the mesh configuration file, in this order of precedence. Pure: the environment and the file are arguments, so a
//! case is a table. Knows what each variable means and not who heeds it; [`Settings`] is plain data to make the
//! modules' own configurations of.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_node::net::socket::Keepalive;
use ztunnel_node::proxy;
use ztunnel_node::telemetry::line::Format;
use ztunnel_node::telemetry::logging::Filter;
use ztunnel_tls::provider::Compliance;

use crate::config::env::proxy_config::ProxyConfig;
use crate::config::env::reader::Problems;
use crate::config::env::reader::Reader;
use crate::config::origin::Origin;
use crate::config::origin::Shown;
use crate::config::raw::ACCESS_LOG_RATE;

pub mod control_plane;
pub mod memory;
pub mod proxy_config;
pub mod reader;
pub mod threads;

#[cfg(test)]
mod tests;

/// What is read besides the variables.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// The text of the mesh configuration file ([`proxy_config::MESH_CONFIG_PATH`]), if it is there.
    pub mesh_config: Option<&'a str>,
    /// How many processor cores the process may use.
    pub cores: usize,
}

/// Who and where this proxy is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    /// The node's name; empty if unknown.
    pub node: String,
    /// The cluster's identifier.
    pub cluster: String,
    /// The DNS suffix of the cluster's services.
    pub cluster_domain: String,
    /// The network's identifier, or empty.
    pub network: String,
    /// The trust domain of this proxy's own identity.
    pub trust_domain: TrustDomain,
    /// The proxy's pod's address; empty if unknown.
    pub instance_ip: String,
    /// The proxy's pod's name; empty if unknown.
    pub pod: String,
    /// The proxy's pod's namespace; empty if unknown.
    pub namespace: String,
    /// The proxy's pod's service account; empty if unknown.
    pub service_account: String,
    /// The metadata of the node as the control plane is told it.
    pub metadata: BTreeMap<String, Value>,
}

/// The one workload that is proxied (`PROXY_MODE=dedicated`), in the network namespace of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dedicated {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its service account.
    pub service_account: String,
}

/// How names are resolved for pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dns {
    /// Whether pods' DNS is answered at all.
    pub enabled: bool,
    /// Where it is answered instead of port 15053 of each pod.
    pub address: Option<SocketAddr>,
    /// The namespace whose service is preferred where several have the name asked for.
    pub preferred_namespace: Option<String>,
}

/// How pods come to this proxy from Istio's node agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InPod {
    /// The socket of the node agent.
    pub socket: PathBuf,
    /// Whether the ports in a pod may be shared with another proxy while one replaces the other.
    pub port_reuse: bool,
    /// The mark of every socket of the proxy in a pod; 0: they have none.
    pub packet_mark: u32,
    /// Whether applications see the client's address: required, never, or wherever it is possible.
    pub original_source: Option<bool>,
    /// Whether IPv6 is served.
    pub ipv6: bool,
    /// Where a daemon and its successor meet, which are two pods: a directory of the host.
    pub run_dir: PathBuf,
}

/// What is demanded of peers and their certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demands {
    /// The file of revocation lists, where they are to be looked in.
    pub crl: Option<PathBuf>,
    /// What cryptography has to comply with.
    pub compliance: Compliance,
}

/// Everything a node proxy of Istio is told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Who and where it is.
    pub own: Own,
    /// The one workload that is proxied; `None`: all pods of a node that its agent names (`PROXY_MODE=shared`).
    pub dedicated: Option<Dedicated>,
    /// Whether pods' TCP is proxied.
    pub proxy_enabled: bool,
    /// Pods' DNS.
    pub dns: Dns,
    /// The control plane: where the mesh and the certificates come from.
    pub control_plane: control_plane::ControlPlane,
    /// The node agent.
    pub in_pod: InPod,
    /// Peers.
    pub demands: Demands,
    /// Where the mesh is kept for a start without a control plane; `None` keeps it nowhere.
    pub mesh_cache: Option<PathBuf>,
    /// Where keys and certificates are kept for a start without an authority; `None` keeps them nowhere.
    pub cert_cache: Option<PathBuf>,
    /// The data plane.
    pub data_plane: proxy::Config,
    /// How long open connections may go on once the proxy is told to end.
    pub drain_deadline: Duration,
    /// The port of the admin server on the loopback.
    pub admin_port: u16,
    /// The port of the metrics server.
    pub stats_port: u16,
    /// How log lines look.
    pub log_format: Format,
    /// Which there are.
    pub log_filter: Filter,
    /// Lines of the access log a second about what one source does; 0: all.
    pub access_log_rate: u32,
    /// What is in force, and why, in alphabetical order.
    pub shown: Vec<Shown>,
    /// What was said and has no effect.
    pub warnings: Vec<Ineffective>,
}

/// A variable that was set and has no effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}={value} has no effect: {why}")]
pub struct Ineffective {
    /// The variable.
    pub name: &'static str,
    /// What it says.
    pub value: String,
    /// Why that changes nothing.
    pub why: &'static str,
}

/// Variables that change nothing, the value at which that is what was asked for, and why it is not otherwise.
const INEFFECTIVE: &[(&str, &str, &str)] = &[
    ("INPOD_ENABLED", "true", "every pod is served inside of its own network namespace"),
    ("UNSTABLE_ENABLE_SOCKS5", "false", "there is no SOCKS5 listener"),
    ("TLS12_ENABLED", "false", "TLS 1.3 is the only version spoken"),
    ("AUTHZ_POLICY_INFO_LOGGING", "false", "the access log names the policy that refused a connection"),
];

/// Reads the environment.
pub fn resolve(env: &BTreeMap<String, String>, around: Surroundings<'_>) -> Result<Settings, Problems> {
    let mut reader = Reader::new(env, around.mesh_config);
    let dedicated = dedicated(&mut reader);
    let in_pod = in_pod(&mut reader, dedicated.is_some());
    let mut settings = Settings {
        own: own(&mut reader),
        proxy_enabled: reader.flag("ENABLE_PROXY", true),
        dns: Dns {
            enabled: metadata_flag(&mut reader, "DNS_CAPTURE", true),
            address: dns_address(&mut reader),
            preferred_namespace: reader.optional("PREFERED_SERVICE_NAMESPACE"),
        },
        control_plane: control_plane::read(&mut reader),
        demands: Demands {
            crl: reader.optional("CRL_PATH").map(PathBuf::from),
            compliance: compliance(&mut reader),
        },
        mesh_cache: mesh_cache(&mut reader, &in_pod.run_dir, dedicated.is_some()),
        cert_cache: reader.optional("ZTUNNEL_CERT_CACHE").map(PathBuf::from),
        in_pod,
        dedicated,
        drain_deadline: drain_deadline(&mut reader),
        data_plane: data_plane(&mut reader, around.cores),
        admin_port: port(&mut reader, "proxyAdminPort", 15000, |proxy| proxy.admin_port),
        stats_port: port(&mut reader, "statsPort", 15020, |proxy| proxy.stats_port),
        log_format: log_format(&mut reader),
        log_filter: log_filter(&mut reader),
        access_log_rate: reader
            .number("ZTUNNEL_ACCESS_LOG_RATE", Some(ACCESS_LOG_RATE))
            .unwrap_or(ACCESS_LOG_RATE),
        shown: Vec::new(),
        warnings: Vec::new(),
    };
    combinations(&settings, &mut reader);
    settings.warnings = ineffective(&settings, &mut reader);
    if !reader.problems.is_empty() {
        return Err(Problems(reader.problems));
    }
    settings.shown = reader.shown;
    settings.shown.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(settings)
}

fn own(reader: &mut Reader<'_>) -> Own {
    let metadata = metadata(reader);
    let cluster = match metadata.get("CLUSTER_ID").and_then(Value::as_str).filter(|id| !id.is_empty()) {
        Some(id) => {
            reader.show("CLUSTER_ID", id, Origin::Variable("ISTIO_META_CLUSTER_ID"));
            id.to_owned()
        }
        None => reader.text("CLUSTER_ID", "Kubernetes"),
    };
    let name = "TRUST_DOMAIN";
    let text = reader.text(name, "cluster.local");
    let trust_domain = TrustDomain::new(&text).unwrap_or_else(|error| {
        reader.refuse(name, &text, error.to_string());
        TrustDomain::default()
    });
    Own {
        node: reader.text("NODE_NAME", ""),
        cluster,
        cluster_domain: reader.text("CLUSTER_DOMAIN", "cluster.local"),
        network: reader.text("NETWORK", ""),
        trust_domain,
        instance_ip: reader.text("INSTANCE_IP", ""),
        pod: reader.text("POD_NAME", ""),
        namespace: reader.text("POD_NAMESPACE", ""),
        service_account: reader.text("SERVICE_ACCOUNT", ""),
        metadata,
    }
}

const META: &str = "ISTIO_META_";
const META_JSON: &str = "ISTIO_METAJSON_";

/// The node's metadata: `proxyMetadata`, and over it the variables made for it.
fn metadata(reader: &mut Reader<'_>) -> BTreeMap<String, Value> {
    let mut said: BTreeMap<String, (String, Origin)> = reader.proxy.metadata.clone();
    for prefix in [META, META_JSON] {
        for (name, value) in reader.prefixed(prefix) {
            said.insert(format!("{prefix}{name}"), (value.to_owned(), Origin::Environment));
        }
    }
    let mut metadata = BTreeMap::new();
    for (name, (value, origin)) in said {
        reader.show(&name, &value, origin);
        if let Some(key) = name.strip_prefix(META_JSON) {
            match serde_json::from_str(&value) {
                Ok(json) => metadata.insert(key.to_owned(), json),
                Err(error) => {
                    reader.refuse(&name, &value, format!("use JSON: {error}"));
                    None
                }
            };
        } else {
            metadata.insert(name.strip_prefix(META).unwrap_or(&name).to_owned(), Value::from(value));
        }
    }
    metadata
}

/// A switch that is a variable for the node's metadata at the same time.
fn metadata_flag(reader: &mut Reader<'_>, key: &str, default: bool) -> bool {
    let name = format!("{META}{key}");
    let said = reader.raw(&name).map(str::to_owned);
    let said = said.or_else(|| reader.proxy.metadata.get(&name).map(|(text, _)| text.clone()));
    match said.filter(|text| !text.is_empty()) {
        // It is shown with the rest of the metadata.
        Some(text) => reader::flag(&text).unwrap_or_else(|| {
            reader.refuse(&name, &text, "use true or false");
            default
        }),
        None => {
            reader.show(&name, default, Origin::Default);
            default
        }
    }
}

fn dns_address(reader: &mut Reader<'_>) -> Option<SocketAddr> {
    let (metadata, own) = ("ISTIO_META_DNS_PROXY_ADDR", "DNS_PROXY_ADDR");
    let from_proxy = reader.proxy.metadata.get(metadata).map(|(text, _)| text.clone());
    let (name, text) = match (reader.set(metadata).map(str::to_owned).or(from_proxy), reader.set(own)) {
        // It is shown with the rest of the metadata.
        (Some(text), _) => (metadata, text),
        (None, Some(text)) => {
            reader.show(own, text, Origin::Environment);
            (own, text.to_owned())
        }
        (None, None) => {
            reader.show(own, "127.0.0.1:15053 [::1]:15053", Origin::Default);
            return None;
        }
    };
    match text.parse::<SocketAddr>() {
        // Answers come from where questions were sent, which of a wildcard is not known.
        Ok(address) if !address.ip().is_unspecified() && address.port() != 0 => Some(address),
        _ => {
            let accepted = "use an address with its port, such as 127.0.0.1:15053 or [::1]:15053";
            reader.refuse(name, &text, accepted);
            None
        }
    }
}

/// The workload that is meant, where it is one.
fn dedicated(reader: &mut Reader<'_>) -> Option<Dedicated> {
    let mode = "PROXY_MODE";
    match &*reader.text(mode, "shared") {
        "shared" => return None,
        "dedicated" => {}
        other => {
            reader.refuse(mode, other, "use shared or dedicated");
            return None;
        }
    }
    let name = "PROXY_WORKLOAD_INFO";
    let text = reader.text(name, "");
    let workload = match text.split('/').collect::<Vec<_>>()[..] {
        [namespace, name, account] => [namespace, name, account].map(str::to_owned),
        _ => Default::default(),
    };
    if workload.iter().any(String::is_empty) {
        let why =
            "use <namespace>/<name>/<service account>: the workload that is proxied (PROXY_MODE=dedicated)";
        reader.refuse(name, &text, why);
    }
    let [namespace, name, service_account] = workload;
    Some(Dedicated { namespace, name, service_account })
}

fn in_pod(reader: &mut Reader<'_>, dedicated: bool) -> InPod {
    let socket = reader.path("INPOD_UDS", "/var/run/ztunnel/ztunnel.sock");
    // The chart mounts it from the host, into the pod of the next daemon as well.
    let beside = socket.parent().unwrap_or_else(|| Path::new("/")).display().to_string();
    InPod {
        run_dir: reader.path("ZTUNNEL_RUN_DIR", &beside),
        socket,
        port_reuse: reader.flag("INPOD_PORT_REUSE", true),
        packet_mark: reader.number("PACKET_MARK", (!dedicated).then_some(1337)).unwrap_or(0),
        original_source: original_source(reader, dedicated),
        ipv6: reader.flag("IPV6_ENABLED", true),
    }
}

/// What nothing marks, no route leads back to this proxy: an application that saw its client would answer past it.
fn original_source(reader: &mut Reader<'_>, dedicated: bool) -> Option<bool> {
    let name = "ENABLE_ORIG_SRC";
    if dedicated && reader.set(name).is_none() && reader.set("PACKET_MARK").is_none() {
        reader.show(name, false, Origin::Variable("PROXY_MODE"));
        return Some(false);
    }
    reader.tristate(name)
}

/// An empty variable switches it off. A proxy of one workload may share its file system with others, so it keeps none
/// unless it is told where.
fn mesh_cache(reader: &mut Reader<'_>, run_dir: &Path, dedicated: bool) -> Option<PathBuf> {
    let name = "ZTUNNEL_MESH_CACHE";
    match reader.raw(name) {
        Some("") => {
            reader.show(name, "", Origin::Environment);
            return None;
        }
        None if dedicated => {
            reader.show(name, "", Origin::Variable("PROXY_MODE"));
            return None;
        }
        Some(_) | None => {}
    }
    Some(reader.path(name, &run_dir.join("mesh.cache").display().to_string()))
}

fn compliance(reader: &mut Reader<'_>) -> Compliance {
    let name = "COMPLIANCE_POLICY";
    match reader.optional(name).as_deref() {
        None => Compliance::None,
        Some("pqc") => Compliance::Pqc,
        Some(other) => {
            reader.refuse(name, other, "use pqc");
            Compliance::None
        }
    }
}

/// Kubernetes kills what has not ended after the grace period: the deadline is earlier.
fn drain_deadline(reader: &mut Reader<'_>) -> Duration {
    let name = "CONNECTION_TERMINATION_DEADLINE";
    if reader.set(name).is_some() {
        return reader.duration(name, DRAIN_DEADLINE);
    }
    let period = "TERMINATION_GRACE_PERIOD_SECONDS";
    let Some(seconds) = reader.number(period, None) else {
        reader.show(name, humantime::format_duration(DRAIN_DEADLINE), Origin::Default);
        return DRAIN_DEADLINE;
    };
    let deadline = if seconds > 10 { seconds - 5 } else { seconds.saturating_sub(1).max(1) };
    let deadline = Duration::from_secs(deadline.into());
    reader.show(name, humantime::format_duration(deadline), Origin::Variable(period));
    deadline
}

const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

fn data_plane(reader: &mut Reader<'_>, cores: usize) -> proxy::Config {
    let mut config = proxy::Config { threads: threads::read(reader, cores), ..proxy::Config::default() };
    config.buffer_memory = memory::read(reader);
    let probes = Keepalive::default();
    config.keepalive = Keepalive {
        enabled: reader.flag("KEEPALIVE_ENABLED", probes.enabled),
        time: reader.duration("KEEPALIVE_TIME", probes.time),
        interval: reader.duration("KEEPALIVE_INTERVAL", probes.interval),
        retries: reader.count("KEEPALIVE_RETRIES", probes.retries),
        user_timeout: reader.flag("USER_TIMEOUT_ENABLED", probes.user_timeout),
    };
    config.response_baggage = reader.flag("ENABLE_RESPONSE_BAGGAGE", config.response_baggage);
    config.localhost_app_tunnel = reader.flag("LOCALHOST_APP_TUNNEL", config.localhost_app_tunnel);
    config.same_node = !reader.flag("ZTUNNEL_ENCRYPT_SAME_NODE", !config.same_node);
    let hbone = &mut config.hbone;
    let congestion =
        reader.text("ZTUNNEL_TUNNEL_CONGESTION", hbone.congestion.as_deref().unwrap_or("system"));
    hbone.congestion = Some(congestion).filter(|name| name != "system");
    // HTTP/2 allows windows up to 2^31-1, and frames from 2^14 to 2^24-1 (RFC 9113 §6.5.2).
    hbone.stream_window =
        bounded(reader, "HTTP2_STREAM_WINDOW_SIZE", hbone.stream_window, 65_535..=0x7fff_ffff);
    hbone.connection_window =
        bounded(reader, "HTTP2_CONNECTION_WINDOW_SIZE", hbone.connection_window, 65_535..=0x7fff_ffff);
    hbone.frame_max = bounded(reader, "HTTP2_FRAME_SIZE", hbone.frame_max, 16_384..=0xff_ffff);
    let streams = u32::try_from(hbone.client_streams_max).unwrap_or(u32::MAX);
    hbone.client_streams_max = reader.count("POOL_MAX_STREAMS_PER_CONNECTION", streams) as usize;
    hbone.idle_timeout = reader.duration("POOL_UNUSED_RELEASE_TIMEOUT", hbone.idle_timeout);
    config
}

fn bounded(
    reader: &mut Reader<'_>,
    name: &'static str,
    default: u32,
    range: std::ops::RangeInclusive<u32>,
) -> u32 {
    let value = reader.number(name, Some(default)).unwrap_or(default);
    if range.contains(&value) {
        return value;
    }
    let accepted = format!("use a whole number from {} to {}", range.start(), range.end());
    reader.refuse(name, &value.to_string(), accepted);
    default
}

fn port(
    reader: &mut Reader<'_>,
    name: &str,
    default: u16,
    said: fn(&ProxyConfig) -> Option<(u16, Origin)>,
) -> u16 {
    let (port, origin) = said(&reader.proxy).unwrap_or((default, Origin::Default));
    reader.show(name, port, origin);
    port
}

fn log_format(reader: &mut Reader<'_>) -> Format {
    let text = reader.text("LOG_FORMAT", "plain");
    text.parse().unwrap_or_else(|_| {
        reader.refuse("LOG_FORMAT", &text, "use plain or json");
        Format::Plain
    })
}

fn log_filter(reader: &mut Reader<'_>) -> Filter {
    let default = Filter::default();
    let text = reader.text("RUST_LOG", &default.to_string());
    text.parse().unwrap_or_else(|_| {
        let accepted = "use a list of <level> and <target>=<level>, such as info,access=off";
        reader.refuse("RUST_LOG", &text, accepted);
        default
    })
}

/// What makes no sense together, and what this proxy is not.
fn combinations(settings: &Settings, reader: &mut Reader<'_>) {
    if !settings.proxy_enabled {
        reader.refuse("ENABLE_PROXY", "false", "pods' TCP is always proxied: leave it out");
    }
    if settings.dns.enabled && settings.control_plane.on_demand && settings.dedicated.is_none() {
        let why = "names are answered from the whole mesh: set ISTIO_META_DNS_CAPTURE=false as well, and \
                   ambient.dnsCapture=false for istio-cni";
        reader.refuse("XDS_ON_DEMAND", "true", why);
    }
    if reader.flag("FAKE_CA", false) {
        reader.refuse("FAKE_CA", "true", "certificates nobody vouches for are for tests: leave it out");
    }
}

fn ineffective(settings: &Settings, reader: &mut Reader<'_>) -> Vec<Ineffective> {
    let mut warnings = Vec::new();
    if !settings.dns.enabled {
        for name in ["PREFERED_SERVICE_NAMESPACE", "ISTIO_META_DNS_PROXY_ADDR", "DNS_PROXY_ADDR"] {
            if let Some(value) = reader.set(name).map(str::to_owned) {
                let why = "pods' DNS is not answered: ISTIO_META_DNS_CAPTURE is false";
                warnings.push(Ineffective { name, value, why });
            }
        }
    }
    let of_the_mode: &[_] = match settings.dedicated {
        None => &[("PROXY_WORKLOAD_INFO", "", "PROXY_MODE=shared serves the pods that the node agent names")],
        Some(_) => &[("INPOD_UDS", "", "PROXY_MODE=dedicated serves one workload, and asks no node agent")],
    };
    for (name, agreed, why) in INEFFECTIVE.iter().chain(of_the_mode) {
        // Whatever is said, this holds.
        if reader.shown.iter().all(|shown| shown.name != *name) {
            reader.show(name, agreed, Origin::Default);
        }
        let Some(value) = reader.set(name).map(str::to_owned) else { continue };
        if matches!(*agreed, "true" | "false") && reader::flag(&value).is_none() {
            reader.refuse(name, &value, "use true or false");
        } else if value != *agreed {
            warnings.push(Ineffective { name, value, why });
        }
    }
    warnings
}
