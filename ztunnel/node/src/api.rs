//! What is told to humans and tools: views that can be serialised, in the shape of Istio's `config_dump`.
//!
//! Nothing else derives `Serialize`, so that what tools read does not freeze the model. A view borrows from what it
//! shows and is made where it is written. `istioctl ztunnel-config` reads these keys; the types it trips over are a
//! list or a text that is null, a port as a key that is no text, and a capacity that is no number.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Serialize;

/// An address beyond which a peer is: a waypoint or the gateway of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Gateway {
    /// `<network>/<ip>` or `<namespace>/<hostname>`.
    pub destination: String,
    /// Its HBONE port.
    pub hbone_mtls_port: u16,
}

/// One workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload<'a> {
    /// Its addresses.
    pub workload_ips: Vec<String>,
    /// Its waypoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<Gateway>,
    /// The gateway of its network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_gateway: Option<Gateway>,
    /// `HBONE` or `TCP`.
    pub protocol: &'static str,
    /// `Standard` or `HostNetwork`.
    pub network_mode: &'static str,
    /// Unique in the mesh.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub uid: &'a str,
    /// The pod's name.
    pub name: &'a str,
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The trust domain of its identity.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub trust_domain: &'a str,
    /// The service account of its identity.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub service_account: &'a str,
    /// Its network.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub network: &'a str,
    /// The name of the object that owns it.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub workload_name: &'a str,
    /// The kind of that object.
    #[serde(skip_serializing_if = "is_deployment")]
    pub workload_type: &'static str,
    /// The canonical service.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub canonical_name: &'a str,
    /// Its revision.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub canonical_revision: &'a str,
    /// A name to be resolved instead of addresses.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub hostname: &'a str,
    /// The node it runs on.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub node: &'a str,
    /// Whether it terminates tunnels itself.
    #[serde(skip_serializing_if = "is_false")]
    pub native_tunnel: bool,
    /// What the application is told of its client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application_tunnel: Option<ApplicationTunnel>,
    /// The policies that select it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub authorization_policies: Vec<String>,
    /// `Healthy` or `Unhealthy`.
    pub status: &'static str,
    /// Its cluster.
    pub cluster_id: &'a str,
    /// Where it runs.
    #[serde(skip_serializing_if = "Locality::is_unknown")]
    pub locality: Locality<'a>,
    /// The services it is behind: `<namespace>/<hostname>`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<&'a str>,
    /// How much it counts in balancing.
    pub capacity: u32,
}

/// How an application that terminates tunnels is spoken to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ApplicationTunnel {
    /// `NONE` or `PROXY`.
    pub protocol: &'static str,
    /// Its port, where it is not the one dialled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// Where a workload runs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Locality<'a> {
    /// Region.
    pub region: &'a str,
    /// Zone.
    pub zone: &'a str,
    /// Part of the zone.
    pub subzone: &'a str,
}

impl Locality<'_> {
    fn is_unknown(&self) -> bool {
        *self == Self::default()
    }
}

fn is_false(flag: &bool) -> bool {
    !flag
}

fn is_deployment(kind: &&'static str) -> bool {
    *kind == "deployment"
}

/// One service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service<'a, E> {
    /// Its name.
    pub name: &'a str,
    /// Its namespace.
    pub namespace: &'a str,
    /// Its full DNS name.
    pub hostname: &'a str,
    /// Its virtual addresses: `<network>/<ip>`.
    pub vips: Vec<String>,
    /// Its virtual networks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cidr_vips: Vec<CidrVip<'a>>,
    /// Service port → port of the endpoints, where they have no other.
    pub ports: BTreeMap<u16, u16>,
    /// The workloads behind it, by their unique names: a map of [`Endpoint`]s.
    pub endpoints: E,
    /// Names that its endpoints' certificates may have.
    pub subject_alt_names: Vec<&'a str>,
    /// Its waypoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<Gateway>,
    /// Its waypoints, where there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// How an endpoint is chosen, where not just any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_balancer: Option<LoadBalancer>,
    /// `Dual`, `IPv4` or `IPv6`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_families: Option<&'static str>,
    /// Whether it is the service of its name, and not one that somebody else declared.
    pub canonical: bool,
    /// `Public` or `Namespace`.
    pub visibility: &'static str,
}

/// A network of virtual addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CidrVip<'a> {
    /// The network's identifier.
    pub network: &'a str,
    /// `<ip>/<prefix length>`
    pub cidr: String,
}

/// One workload behind a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint<'a> {
    /// Its unique name.
    pub workload_uid: &'a str,
    /// Service port → its port.
    pub port: BTreeMap<u16, u16>,
    /// `Healthy` or `Unhealthy`.
    pub status: &'static str,
}

/// One of several waypoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub destination: Gateway,
    /// Its share.
    pub weight: u32,
}

/// How endpoints are chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancer {
    /// What is to be the same, the most important first: `Network`, `Region`, `Zone`, `Subzone`, `Node`, `Cluster`.
    pub routing_preferences: Vec<&'static str>,
    /// `Standard`, `Strict`, `Failover` or `Passthrough`.
    pub mode: &'static str,
    /// `OnlyHealthy` or `AllowAll`.
    pub health_policy: &'static str,
}

/// A workload or service that the control plane speaks of and that could not be understood: it is not dialled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusedResource<'a> {
    /// Its unique name.
    pub name: &'a str,
    /// `<network>/<ip>`, and `<network>/<ip>/<bits>` of a range.
    pub addresses: Vec<String>,
    /// What is wrong with it.
    pub reason: &'a str,
}

/// One authorization policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its namespace.
    pub namespace: &'a str,
    /// `Global`, `Namespace` or `WorkloadSelector`.
    pub scope: &'static str,
    /// `Allow` or `Deny`.
    pub action: &'static str,
    /// Rules of clauses of matches.
    pub rules: Vec<Vec<Vec<Match<'a>>>>,
    /// Whether it is only tried out.
    pub dry_run: bool,
}

/// What a policy looks at. What it does not look at is left out.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
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
    pub source_ips: Vec<String>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_source_ips: Vec<String>,
    /// The server's address.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ips: Vec<String>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ips: Vec<String>,
    /// The server's port.
    #[serde(skip_serializing_if = "<[u16]>::is_empty")]
    pub destination_ports: &'a [u16],
    /// None of these.
    #[serde(skip_serializing_if = "<[u16]>::is_empty")]
    pub not_destination_ports: &'a [u16],
}

/// How a text is compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum StringMatch<'a> {
    /// `{"Exact":"x"}`
    Exact(&'a str),
    /// `{"Prefix":"x"}`
    Prefix(&'a str),
    /// `{"Suffix":"x"}`
    Suffix(&'a str),
    /// `{"Presence":[]}`
    Presence([(); 0]),
}

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceAccount<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub service_account: &'a str,
}

/// The certificates of one identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// What it is.
    pub what: &'static str,
    /// Why it is not in force, in a word: `rejected`, `waiting` or `held`.
    pub state: &'static str,
    /// Since when something else is; RFC 3339, in seconds.
    pub since: String,
    /// Why, for a person, with what to do about it.
    pub said: String,
    /// Why, line by line.
    pub reasons: Vec<String>,
}

/// One pod of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WorkloadState {
    /// `Up` or `Pending`.
    pub state: &'static str,
    /// What is open.
    pub connections: Connections,
    /// Which workload it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub info: Option<WorkloadInfo>,
}

/// Which workload a pod is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadInfo {
    /// The pod's name.
    pub name: String,
    /// The pod's namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
}

/// The open connections of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Connections {
    /// To it.
    pub inbound: Vec<Connection>,
    /// From it.
    pub outbound: Vec<Connection>,
}

/// One open connection.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    /// Where it came from.
    pub src: SocketAddr,
    /// What was dialled; for one to the pod the hostname of a service, or nothing.
    pub original_dst: Option<String>,
    /// Where it goes.
    pub actual_dst: SocketAddr,
    /// `HBONE`, `DOUBLEHBONE` or `TCP`.
    pub protocol: &'static str,
}

/// Which build this is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Version {
    /// The release.
    pub version: &'static str,
    /// The commit it was built from, or `unknown`.
    pub git_revision: &'static str,
    /// The compiler.
    pub rust_version: &'static str,
    /// `release` or `debug`.
    pub build_profile: &'static str,
    /// Whether the sources were changed: `Clean`, `Modified` or `unknown`.
    pub build_status: &'static str,
    /// The release of Istio it was installed with, or `unknown`.
    pub istio_version: String,
    /// Who encrypts.
    pub crypto_provider: &'static str,
}

/// One setting: what is in force, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
mod tests {
    use super::*;

    #[test]
    fn settings_are_keys_in_camel_case() {
        for (name, key) in [
            ("KEEPALIVE_TIME", "keepaliveTime"),
            ("--drain-deadline", "drainDeadline"),
            ("NETWORK", "network"),
            ("proxyAdminPort", "proxyAdminPort"),
        ] {
            let (name, value, origin) = (name.to_owned(), String::new(), String::new());
            assert_eq!(Setting { name, value, origin }.key(), key);
        }
    }
}
