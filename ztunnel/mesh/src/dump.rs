//! The schema of `config_dump`: what the admin port writes, what the command line prints, and how a mesh is written by
//! hand. In the shape of Istio's, whose `istioctl ztunnel-config` reads these keys; the types it trips over are a list or
//! a text that is null, a port as a key that is no text, and a capacity that is no number.
//!
//! One type for both directions. Words of a closed list stay texts here, as a dump may be another release's: they, like
//! addresses and names, are read when an entry becomes one of the [model](crate::model), and what does not fit is named
//! by its path then ([`Misfit`]). What is written borrows from the model, and lists and endpoints of a mesh are made one
//! at a time: the dump of a big mesh is never in memory as a whole.
//!
//! Nothing of the model is serialised itself, so that what tools read does not freeze it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Deserialize;
use serde::Serialize;

pub use list::Endpoints;
pub use list::List;
pub use list::Memberships;
pub use list::Part;
pub use list::Port;
pub use list::Staged;
pub use read::Misfit;

mod list;
mod read;
mod words;
mod write;

/// A text that is borrowed where it is written and owned where it was read.
pub type Text<'a> = Cow<'a, str>;

/// Everything that a daemon shows.
#[derive(Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Dump<'a> {
    /// The workloads of the mesh.
    pub workloads: List<'a, Workload<'a>>,
    /// Its services.
    pub services: List<'a, Service<'a>>,
    /// Its policies.
    pub policies: List<'a, Policy<'a>>,
    /// The endpoints of services that are not known (yet).
    pub staged_services: Staged<'a>,
    /// What could not be understood. Istio's has no such key: it is there only when there is something to say.
    #[serde(skip_serializing_if = "List::has_no_refusals")]
    pub refused_resources: List<'a, RefusedResource<'a>>,
    /// The mesh that was given by hand.
    pub static_config: Given<'a>,
    /// What sources of pods and mesh said last, where that is not in force.
    pub refused: Vec<Refused>,
    /// Which build this is.
    pub version: Version,
    /// The settings in force.
    pub config: BTreeMap<String, Text<'a>>,
    /// Where each of them comes from.
    pub config_origins: BTreeMap<String, Text<'a>>,
    /// What this node shows to others.
    pub certificates: Vec<Certificates>,
    /// This node's pods by their uids.
    pub workload_state: BTreeMap<String, WorkloadState>,
}

/// A mesh that is given by hand.
#[derive(Default, Serialize, Deserialize)]
#[serde(rename = "the mesh", default, rename_all = "camelCase")]
pub struct Given<'a> {
    /// Its workloads.
    pub workloads: List<'a, Workload<'a>>,
    /// Its policies.
    pub policies: List<'a, Policy<'a>>,
    /// Its services.
    pub services: List<'a, Service<'a>>,
}

/// An address beyond which a peer is: a waypoint or the gateway of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "a gateway", rename_all = "camelCase")]
pub struct Gateway<'a> {
    /// `<network>/<ip>` or `<namespace>/<hostname>`.
    pub destination: Text<'a>,
    /// Its HBONE port; 0 is the usual one.
    #[serde(default)]
    pub hbone_mtls_port: u16,
}

/// One workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "a workload", rename_all = "camelCase")]
pub struct Workload<'a> {
    /// Its addresses.
    #[serde(default)]
    pub workload_ips: Vec<Text<'a>>,
    /// Its waypoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<Gateway<'a>>,
    /// The gateway of its network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_gateway: Option<Gateway<'a>>,
    /// `HBONE` or `TCP`.
    #[serde(default = "words::tcp")]
    pub protocol: Text<'a>,
    /// `Standard` or `HostNetwork`.
    #[serde(default = "words::standard")]
    pub network_mode: Text<'a>,
    /// Unique in the mesh.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub uid: Text<'a>,
    /// The pod's name.
    pub name: Text<'a>,
    /// The pod's namespace.
    pub namespace: Text<'a>,
    /// The trust domain of its identity.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub trust_domain: Text<'a>,
    /// The service account of its identity.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub service_account: Text<'a>,
    /// Its network.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub network: Text<'a>,
    /// The name of the object that owns it.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub workload_name: Text<'a>,
    /// The kind of that object.
    #[serde(default = "words::deployment", skip_serializing_if = "words::is_deployment")]
    pub workload_type: Text<'a>,
    /// The canonical service.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub canonical_name: Text<'a>,
    /// Its revision.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub canonical_revision: Text<'a>,
    /// A name to be resolved instead of addresses.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub hostname: Text<'a>,
    /// The node it runs on.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub node: Text<'a>,
    /// Whether it terminates tunnels itself.
    #[serde(default, skip_serializing_if = "is_false")]
    pub native_tunnel: bool,
    /// What the application is told of its client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application_tunnel: Option<ApplicationTunnel<'a>>,
    /// The policies that select it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub authorization_policies: Vec<Text<'a>>,
    /// `Healthy` or `Unhealthy`.
    #[serde(default = "words::healthy")]
    pub status: Text<'a>,
    /// Its cluster.
    #[serde(default)]
    pub cluster_id: Text<'a>,
    /// Where it runs.
    #[serde(default, skip_serializing_if = "Locality::is_unknown")]
    pub locality: Locality<'a>,
    /// The services it is behind: `<namespace>/<hostname>`.
    #[serde(default, skip_serializing_if = "Memberships::is_empty")]
    pub services: Memberships<'a>,
    /// How much it counts in balancing.
    #[serde(default = "words::one")]
    pub capacity: u32,
}

/// How an application that terminates tunnels is spoken to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "an application tunnel")]
pub struct ApplicationTunnel<'a> {
    /// `NONE` or `PROXY`.
    pub protocol: Text<'a>,
    /// Its port, where it is not the one dialled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// Where a workload runs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename = "a locality", default)]
pub struct Locality<'a> {
    /// Region.
    pub region: Text<'a>,
    /// Zone.
    pub zone: Text<'a>,
    /// Part of the zone.
    pub subzone: Text<'a>,
}

impl Locality<'_> {
    fn is_unknown(&self) -> bool {
        *self == Self::default()
    }
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// One service.
#[derive(Serialize, Deserialize)]
#[serde(rename = "a service", rename_all = "camelCase")]
pub struct Service<'a> {
    /// Its name.
    pub name: Text<'a>,
    /// Its namespace.
    pub namespace: Text<'a>,
    /// Its full DNS name.
    pub hostname: Text<'a>,
    /// Its virtual addresses: `<network>/<ip>`.
    #[serde(default)]
    pub vips: Vec<Text<'a>>,
    /// Its virtual networks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cidr_vips: Vec<CidrVip<'a>>,
    /// Service port → port of the endpoints, where they have no other.
    #[serde(default)]
    pub ports: BTreeMap<Port, u16>,
    /// The workloads behind it, by their unique names.
    #[serde(default)]
    pub endpoints: Endpoints<'a>,
    /// Names that its endpoints' certificates may have.
    #[serde(default)]
    pub subject_alt_names: Vec<Text<'a>>,
    /// Its waypoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<Gateway<'a>>,
    /// Its waypoints, where there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weighted_waypoints: Vec<WeightedWaypoint<'a>>,
    /// How an endpoint is chosen, where not just any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_balancer: Option<LoadBalancer<'a>>,
    /// `Dual`, `IPv4` or `IPv6`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_families: Option<Text<'a>>,
    /// Whether it is the service of its name, and not one that somebody else declared.
    #[serde(default)]
    pub canonical: bool,
    /// `Public` or `Namespace`.
    #[serde(default = "words::public")]
    pub visibility: Text<'a>,
}

/// A network of virtual addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "a network of virtual addresses")]
pub struct CidrVip<'a> {
    /// The network's identifier.
    pub network: Text<'a>,
    /// `<ip>/<prefix length>`
    pub cidr: Text<'a>,
}

/// One workload behind a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "an endpoint", rename_all = "camelCase")]
pub struct Endpoint<'a> {
    /// Its unique name.
    #[serde(default)]
    pub workload_uid: Text<'a>,
    /// Service port → its port.
    #[serde(default)]
    pub port: BTreeMap<Port, u16>,
    /// `Healthy` or `Unhealthy`.
    #[serde(default = "words::healthy")]
    pub status: Text<'a>,
}

/// One of several waypoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "a weighted waypoint")]
pub struct WeightedWaypoint<'a> {
    /// The waypoint.
    pub destination: Gateway<'a>,
    /// Its share.
    pub weight: u32,
}

/// How endpoints are chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "a load balancer", rename_all = "camelCase")]
pub struct LoadBalancer<'a> {
    /// What is to be the same, the most important first: `Network`, `Region`, `Zone`, `Subzone`, `Node`, `Cluster`.
    #[serde(default)]
    pub routing_preferences: Vec<Text<'a>>,
    /// `Standard`, `Strict`, `Failover` or `Passthrough`.
    #[serde(default = "words::standard")]
    pub mode: Text<'a>,
    /// `OnlyHealthy` or `AllowAll`.
    #[serde(default = "words::only_healthy")]
    pub health_policy: Text<'a>,
}

/// A workload or service that the control plane speaks of and that could not be understood: it is not dialled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusedResource<'a> {
    /// Its unique name.
    pub name: Text<'a>,
    /// `<network>/<ip>`, and `<network>/<ip>/<bits>` of a range.
    #[serde(default)]
    pub addresses: Vec<Text<'a>>,
    /// What is wrong with it.
    #[serde(default)]
    pub reason: Text<'a>,
}

/// One authorization policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "a policy", rename_all = "camelCase")]
pub struct Policy<'a> {
    /// Its name.
    pub name: Text<'a>,
    /// Its namespace.
    pub namespace: Text<'a>,
    /// `Global`, `Namespace` or `WorkloadSelector`.
    pub scope: Text<'a>,
    /// `Allow` or `Deny`.
    pub action: Text<'a>,
    /// Rules of clauses of matches.
    #[serde(default)]
    pub rules: Vec<Vec<Vec<Match<'a>>>>,
    /// Whether it is only tried out.
    #[serde(default)]
    pub dry_run: bool,
}

/// What a policy looks at. What it does not look at is left out.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename = "a match", rename_all = "camelCase", default)]
pub struct Match<'a> {
    /// The client's namespace.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<StringMatch<'a>>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_namespaces: Vec<StringMatch<'a>>,
    /// The client's service account.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<ServiceAccount<'a>>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_service_accounts: Vec<ServiceAccount<'a>>,
    /// The client's identity.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<StringMatch<'a>>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_principals: Vec<StringMatch<'a>>,
    /// The client's address.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source_ips: Vec<Text<'a>>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_source_ips: Vec<Text<'a>>,
    /// The server's address.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ips: Vec<Text<'a>>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ips: Vec<Text<'a>>,
    /// The server's port.
    #[serde(skip_serializing_if = "<[u16]>::is_empty")]
    pub destination_ports: Cow<'a, [u16]>,
    /// None of these.
    #[serde(skip_serializing_if = "<[u16]>::is_empty")]
    pub not_destination_ports: Cow<'a, [u16]>,
}

/// How a text is compared: in exactly one of these ways.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename = "a match of a text", rename_all = "PascalCase", default)]
pub struct StringMatch<'a> {
    /// `{"Exact":"x"}`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact: Option<Text<'a>>,
    /// `{"Prefix":"x"}`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<Text<'a>>,
    /// `{"Suffix":"x"}`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suffix: Option<Text<'a>>,
    /// `{"Presence":[]}`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence: Option<Vec<Text<'a>>>,
}

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "a service account", rename_all = "camelCase")]
pub struct ServiceAccount<'a> {
    /// Its namespace.
    pub namespace: Text<'a>,
    /// Its name.
    pub service_account: Text<'a>,
}

/// The certificates of one identity.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Certificates {
    /// Whose.
    pub identity: String,
    /// `Available`, `Initializing` or `Unavailable: <why>`.
    pub state: String,
    /// The leaf and what leads from it to a root.
    pub cert_chain: Vec<Certificate>,
    /// The roots.
    pub root_certs: Vec<Certificate>,
}

/// One certificate.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Certificate {
    /// The base64 of its PEM.
    pub pem: String,
    /// In decimal.
    pub serial_number: String,
    /// RFC 3339, in seconds.
    pub valid_from: String,
    /// RFC 3339, in seconds.
    pub expiration_time: String,
}

/// What a source of pods and mesh said last, where that is not in force.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Refused {
    /// What it is.
    pub what: Text<'static>,
    /// Why it is not in force, in a word: `rejected`, `waiting` or `held`.
    pub state: Text<'static>,
    /// Since when something else is; RFC 3339, in seconds.
    pub since: String,
    /// Why, for a person, with what to do about it.
    pub said: String,
    /// Why, line by line.
    pub reasons: Vec<String>,
}

/// One pod of this node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkloadState {
    /// `Up` or `Pending`.
    pub state: Text<'static>,
    /// What is open.
    pub connections: Connections,
    /// Which workload it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub info: Option<WorkloadInfo>,
}

/// Which workload a pod is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct WorkloadInfo {
    /// The pod's name.
    pub name: String,
    /// The pod's namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
}

/// The open connections of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Connections {
    /// To it.
    pub inbound: Vec<Connection>,
    /// From it.
    pub outbound: Vec<Connection>,
}

/// One open connection.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    /// Where it came from.
    pub src: SocketAddr,
    /// What was dialled; for one to the pod the hostname of a service, or nothing.
    pub original_dst: Option<String>,
    /// Where it goes.
    pub actual_dst: SocketAddr,
    /// `HBONE`, `DOUBLEHBONE` or `TCP`.
    pub protocol: Text<'static>,
}

/// Which build this is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Version {
    /// The release.
    pub version: Text<'static>,
    /// The commit it was built from, or `unknown`.
    pub git_revision: Text<'static>,
    /// The compiler.
    pub rust_version: Text<'static>,
    /// `release` or `debug`.
    pub build_profile: Text<'static>,
    /// Whether the sources were changed: `Clean`, `Modified` or `unknown`.
    pub build_status: Text<'static>,
    /// The release of Istio it was installed with, or `unknown`.
    pub istio_version: String,
    /// Who encrypts.
    pub crypto_provider: Text<'static>,
}

/// One setting: what is in force, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The flag or variable it is known by.
    pub name: String,
    /// Its value.
    pub value: String,
    /// Where that came from.
    pub origin: String,
}

impl Setting {
    /// The name as a key of JSON: `KEEPALIVE_TIME` and `--keepalive-time` are `keepaliveTime`.
    pub fn key(&self) -> String {
        // A name without a separator may be written in this way already.
        if !self.name.contains(['_', '-']) && self.name.chars().any(|c| c.is_ascii_lowercase()) {
            return self.name.clone();
        }
        let mut key = String::with_capacity(self.name.len());
        for word in self.name.split(['_', '-']).filter(|word| !word.is_empty()) {
            let word = word.to_ascii_lowercase();
            let mut letters = word.chars();
            match letters.next() {
                Some(first) if !key.is_empty() => key.push(first.to_ascii_uppercase()),
                Some(first) => key.push(first),
                None => {}
            }
            key.push_str(letters.as_str());
        }
        key
    }
}

#[cfg(test)]
mod tests;
