//! A mesh written as Istio's `config_dump` shows it: workloads, services and policies, in YAML or JSON.
//!
//! ```yaml
//! workloads:
//! - uid: cluster1//Pod/shop/cart-1
//!   name: cart-1
//!   namespace: shop
//!   serviceAccount: cart
//!   workloadIps: [10.0.0.1]
//!   protocol: HBONE
//!   node: node-1
//!   services: {shop/cart.shop.svc.cluster.local: {80: 8080}}
//! services:
//! - name: cart
//!   namespace: shop
//!   hostname: cart.shop.svc.cluster.local
//!   vips: [/10.96.0.1]
//!   ports: {80: 8080}
//! policies:
//! - {name: viewers, namespace: shop, scope: Namespace, action: Allow, rules: [[[{principals: [{Exact: td/ns/a/sa/b}]}]]]}
//! ```
//!
//! What is left out is as in the dump, which leaves out the same. One thing is written in another place than there:
//! which ports a workload serves a service at is said at the workload. Every value that does not fit is an error with
//! its line, as is every field that is not known: a policy with a misspelt one would let in whom it does not.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;
use serde::Deserializer;
use serde::de::Error;
use serde::de::Visitor;
use ztunnel_mesh::model::addr::HBONE_PORT;
use ztunnel_mesh::model::addr::NetworkAddress;
use ztunnel_mesh::model::addr::NetworkCidr;
use ztunnel_mesh::model::addr::canonical_ip;
use ztunnel_mesh::model::addr::lower;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_mesh::model::policy;
use ztunnel_mesh::model::policy::Clause;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::policy::PolicyKey;
use ztunnel_mesh::model::policy::Rule;
use ztunnel_mesh::model::policy::ServiceAccountMatch;
use ztunnel_mesh::model::policy::StringMatch;
use ztunnel_mesh::model::service;
use ztunnel_mesh::model::service::BalanceScope;
use ztunnel_mesh::model::service::GatewayAddress;
use ztunnel_mesh::model::service::GatewayDestination;
use ztunnel_mesh::model::service::IpFamilies;
use ztunnel_mesh::model::service::LoadBalancing;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::service::ServiceKey;
use ztunnel_mesh::model::service::ServicePort;
use ztunnel_mesh::model::service::WeightedWaypoint;
use ztunnel_mesh::model::workload::ApplicationProtocol;
use ztunnel_mesh::model::workload::ApplicationTunnel;
use ztunnel_mesh::model::workload::Membership;
use ztunnel_mesh::model::workload::Reach;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::model::workload::WorkloadKind;
use ztunnel_mesh::store::index::Mesh;

use crate::decode::HINTS_MAX;
use crate::diagnostic::Diagnostic;
use crate::diagnostic::nearest;
use crate::file::BYTES_MAX;
use crate::file::display;
use crate::file::read_text;
use crate::yaml;
use crate::yaml::Node;
use crate::yaml::decoder::decode;

#[cfg(test)]
mod tests;

/// Where such a mesh is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In this file.
    File(PathBuf),
    /// In a variable of this name, which holds this text.
    Variable(&'static str, String),
}

/// Reads the mesh at `place`, all of it or nothing. Blocks.
pub fn load(place: &Place) -> Result<Mesh, Vec<Diagnostic>> {
    match place {
        Place::File(path) => {
            let name = display(path);
            let text = read_text(path, BYTES_MAX);
            let unread = |error| vec![Diagnostic::error(&name, 0, format!("cannot be read: {error}"))];
            read(&name, &text.map_err(unread)?)
        }
        Place::Variable(name, text) => read(&Arc::from(*name), text),
    }
}

/// Reads a mesh; `name` is what its text is called.
fn read(name: &Arc<str>, text: &str) -> Result<Mesh, Vec<Diagnostic>> {
    let said = |line, message: String| vec![Diagnostic::error(name, line, message)];
    let documents = yaml::documents(text).map_err(|(line, error)| said(line, error.to_string()))?;
    let root = match &documents[..] {
        [] => return Ok(Mesh::default()),
        [root] => root,
        [_, second, ..] => return Err(said(second.line, "a second document: write all in one".to_owned())),
    };
    let unknown = RefCell::default();
    let written: Written = decode(root, &unknown)
        .map_err(|error| vec![Diagnostic::error(name, error.line, error.to_string()).hint(error.hint)])?;
    let mut wrong = Vec::new();
    for field in unknown.into_inner() {
        let near =
            (wrong.len() < HINTS_MAX).then(|| nearest(&field.field, field.known.iter().copied())).flatten();
        let hint = near.map_or(String::new(), |known| format!("write {known} instead"));
        let message = format!("{} is not a field of {}", field.field, field.within);
        wrong.push(Diagnostic::error(name, field.line, message).hint(hint));
    }
    let mut reading = Reading { name, root, wrong };
    let workloads = reading.all("workloads", written.workloads, workload, |known| Arc::clone(&known.uid));
    let services = reading.all("services", written.services, service, |known| known.key.clone());
    let policies = reading.all("policies", written.policies, policy, |known| known.key.clone());
    match reading.wrong.is_empty() {
        true => Ok(Mesh::new(TrustDomain::default(), workloads, services, policies)),
        false => Err(reading.wrong),
    }
}

/// What is wrong so far.
struct Reading<'a> {
    name: &'a Arc<str>,
    root: &'a Node,
    wrong: Vec<Diagnostic>,
}

impl Reading<'_> {
    /// Makes what a list holds, each of which has a name of its own.
    fn all<F, T, K: Hash + Eq + fmt::Display>(
        &mut self,
        list: &str,
        from: Option<Vec<F>>,
        make: fn(F) -> Result<T, String>,
        key: fn(&T) -> K,
    ) -> Vec<Arc<T>> {
        let (mut all, mut seen) = (Vec::new(), HashSet::new());
        for (index, one) in from.into_iter().flatten().enumerate() {
            let made = make(one).and_then(|made| match seen.insert(key(&made)) {
                true => Ok(made),
                false => Err(format!("{} is there twice", key(&made))),
            });
            match made {
                Ok(made) => all.push(Arc::new(made)),
                Err(error) => {
                    let line = self.root.line_of(&[list, &index.to_string()]);
                    self.wrong.push(Diagnostic::error(self.name, line, format!("{list}[{index}]: {error}")));
                }
            }
        }
        all
    }
}

#[derive(Deserialize)]
#[serde(rename = "the mesh", rename_all = "camelCase")]
struct Written {
    workloads: Option<Vec<WorkloadEntry>>,
    services: Option<Vec<ServiceEntry>>,
    policies: Option<Vec<PolicyEntry>>,
}

/// The default of every text is the empty one, which is what it means.
#[derive(Deserialize)]
#[serde(rename = "a workload", rename_all = "camelCase")]
struct WorkloadEntry {
    #[serde(default)]
    workload_ips: Vec<Parsed<IpAddr>>,
    waypoint: Option<GatewayEntry>,
    network_gateway: Option<GatewayEntry>,
    #[serde(default)]
    protocol: Protocol,
    #[serde(default)]
    network_mode: NetworkMode,
    #[serde(default)]
    uid: String,
    name: String,
    namespace: String,
    #[serde(default)]
    trust_domain: String,
    #[serde(default)]
    service_account: String,
    #[serde(default)]
    network: String,
    #[serde(default)]
    workload_name: String,
    #[serde(default)]
    workload_type: WorkloadType,
    #[serde(default)]
    canonical_name: String,
    #[serde(default)]
    canonical_revision: String,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    node: String,
    #[serde(default)]
    native_tunnel: bool,
    application_tunnel: Option<TunnelEntry>,
    #[serde(default)]
    authorization_policies: Vec<Parsed<PolicyKey>>,
    #[serde(default)]
    status: Status,
    #[serde(default)]
    cluster_id: String,
    #[serde(default)]
    locality: LocalityEntry,
    #[serde(default)]
    services: BTreeMap<Parsed<ServiceKey>, BTreeMap<Parsed<NonZero<u16>>, u16>>,
    #[serde(default = "one")]
    capacity: u32,
}

fn one() -> u32 {
    1
}

#[derive(Deserialize)]
#[serde(rename = "a gateway", rename_all = "camelCase")]
struct GatewayEntry {
    destination: Parsed<GatewayDestination>,
    #[serde(default)]
    hbone_mtls_port: u16,
}

#[derive(Deserialize, Default)]
enum Protocol {
    #[serde(rename = "HBONE")]
    Hbone,
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
}

#[derive(Deserialize, Default, PartialEq)]
enum NetworkMode {
    #[default]
    Standard,
    HostNetwork,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "lowercase")]
enum WorkloadType {
    #[default]
    Deployment,
    CronJob,
    Pod,
    Job,
}

#[derive(Deserialize)]
#[serde(rename = "an application tunnel")]
struct TunnelEntry {
    protocol: TunnelProtocol,
    port: Option<u16>,
}

#[derive(Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum TunnelProtocol {
    None,
    Proxy,
}

#[derive(Deserialize, Default, PartialEq)]
enum Status {
    #[default]
    Healthy,
    Unhealthy,
}

#[derive(Deserialize, Default)]
#[serde(rename = "a locality", default)]
struct LocalityEntry {
    region: String,
    zone: String,
    subzone: String,
}

#[derive(Deserialize)]
#[serde(rename = "a service", rename_all = "camelCase")]
struct ServiceEntry {
    name: String,
    namespace: String,
    hostname: String,
    #[serde(default)]
    vips: Vec<Parsed<NetworkAddress>>,
    #[serde(default)]
    cidr_vips: Vec<CidrEntry>,
    #[serde(default)]
    ports: BTreeMap<Parsed<NonZero<u16>>, u16>,
    #[serde(default)]
    endpoints: BTreeMap<String, serde_json::Value>,
    #[serde(default)]
    subject_alt_names: Vec<String>,
    waypoint: Option<GatewayEntry>,
    #[serde(default)]
    weighted_waypoints: Vec<WeightedEntry>,
    load_balancer: Option<BalancerEntry>,
    ip_families: Option<Families>,
    #[serde(default)]
    canonical: bool,
    #[serde(default)]
    visibility: Visibility,
}

#[derive(Deserialize)]
#[serde(rename = "a network of virtual addresses")]
struct CidrEntry {
    network: String,
    cidr: Parsed<IpNet>,
}

#[derive(Deserialize)]
#[serde(rename = "a weighted waypoint")]
struct WeightedEntry {
    destination: GatewayEntry,
    weight: u32,
}

#[derive(Deserialize)]
#[serde(rename = "a load balancer", rename_all = "camelCase")]
struct BalancerEntry {
    #[serde(default)]
    routing_preferences: Vec<Scope>,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    health_policy: HealthPolicy,
}

#[derive(Deserialize)]
enum Scope {
    Network,
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
}

#[derive(Deserialize, Default)]
enum Mode {
    #[default]
    Standard,
    Strict,
    Failover,
    Passthrough,
}

#[derive(Deserialize, Default)]
enum HealthPolicy {
    #[default]
    OnlyHealthy,
    AllowAll,
}

#[derive(Deserialize)]
enum Families {
    Dual,
    IPv4,
    IPv6,
}

#[derive(Deserialize, Default)]
enum Visibility {
    #[default]
    Public,
    Namespace,
}

#[derive(Deserialize)]
#[serde(rename = "a policy", rename_all = "camelCase")]
struct PolicyEntry {
    name: String,
    namespace: String,
    scope: PolicyScope,
    action: Action,
    #[serde(default)]
    rules: Vec<Vec<Vec<MatchEntry>>>,
    #[serde(default)]
    dry_run: bool,
}

#[derive(Deserialize)]
enum PolicyScope {
    Global,
    Namespace,
    WorkloadSelector,
}

#[derive(Deserialize)]
enum Action {
    Allow,
    Deny,
}

#[derive(Deserialize, Default)]
#[serde(rename = "a match", rename_all = "camelCase", default)]
struct MatchEntry {
    namespaces: Vec<TextEntry>,
    not_namespaces: Vec<TextEntry>,
    service_accounts: Vec<AccountEntry>,
    not_service_accounts: Vec<AccountEntry>,
    principals: Vec<TextEntry>,
    not_principals: Vec<TextEntry>,
    source_ips: Vec<Parsed<IpNet>>,
    not_source_ips: Vec<Parsed<IpNet>>,
    destination_ips: Vec<Parsed<IpNet>>,
    not_destination_ips: Vec<Parsed<IpNet>>,
    destination_ports: Vec<u16>,
    not_destination_ports: Vec<u16>,
}

#[derive(Deserialize)]
#[serde(rename = "a service account", rename_all = "camelCase")]
struct AccountEntry {
    namespace: String,
    service_account: String,
}

/// `{Exact: x}` and the like.
#[derive(Deserialize)]
#[serde(try_from = "AnyText")]
struct TextEntry(StringMatch);

#[derive(Deserialize)]
#[serde(rename = "a match of a text", rename_all = "PascalCase")]
struct AnyText {
    exact: Option<String>,
    prefix: Option<String>,
    suffix: Option<String>,
    presence: Option<Vec<String>>,
}

impl TryFrom<AnyText> for TextEntry {
    type Error = &'static str;

    fn try_from(from: AnyText) -> Result<Self, Self::Error> {
        Ok(Self(match from {
            AnyText { exact: Some(text), prefix: None, suffix: None, presence: None } => {
                StringMatch::Exact(shared(text))
            }
            AnyText { exact: None, prefix: Some(text), suffix: None, presence: None } => {
                StringMatch::Prefix(shared(text))
            }
            AnyText { exact: None, prefix: None, suffix: Some(text), presence: None } => {
                StringMatch::Suffix(shared(text))
            }
            AnyText { exact: None, prefix: None, suffix: None, presence: Some(_) } => StringMatch::Presence,
            _ => return Err("expected one of {Exact: x}, {Prefix: x}, {Suffix: x} and {Presence: []}"),
        }))
    }
}

/// A value that is written as a text.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Parsed<T>(T);

/// How such a value is written.
trait Text: Sized {
    /// What it is to whoever got it wrong.
    const KIND: &'static str;

    fn parse(text: &str) -> Option<Self>;
}

impl<'de, T: Text> Deserialize<'de> for Parsed<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader<T>(PhantomData<T>);

        impl<T: Text> Visitor<'_> for Reader<T> {
            type Value = Parsed<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(T::KIND)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                let wrong = || E::custom(format_args!("{text:?} is not {}", T::KIND));
                T::parse(text).map(Parsed).ok_or_else(wrong)
            }
        }

        deserializer.deserialize_str(Reader(PhantomData))
    }
}

impl Text for IpAddr {
    const KIND: &'static str = "an IP address";

    fn parse(text: &str) -> Option<Self> {
        text.parse().ok().map(canonical_ip)
    }
}

impl Text for IpNet {
    const KIND: &'static str = "a range of IP addresses such as 10.0.0.0/8";

    fn parse(text: &str) -> Option<Self> {
        text.parse().ok().or_else(|| Some(Self::from(<IpAddr as Text>::parse(text)?)))
    }
}

impl Text for NetworkAddress {
    const KIND: &'static str = "<network>/<IP address>";

    fn parse(text: &str) -> Option<Self> {
        // A network may have no name.
        let (network, ip) = text.split_once('/').unwrap_or(("", text));
        Some(Self { network: Arc::from(network), ip: <IpAddr as Text>::parse(ip)? })
    }
}

impl Text for GatewayDestination {
    const KIND: &'static str = "<network>/<IP address> or <namespace>/<hostname>";

    fn parse(text: &str) -> Option<Self> {
        let address = text.contains('/').then(|| NetworkAddress::parse(text)).flatten().map(Self::Address);
        address.or_else(|| <ServiceKey as Text>::parse(text).map(Self::Hostname))
    }
}

impl Text for ServiceKey {
    const KIND: &'static str = "<namespace>/<hostname>";

    fn parse(text: &str) -> Option<Self> {
        Self::parse(Arc::from(text))
    }
}

impl Text for PolicyKey {
    const KIND: &'static str = "<namespace>/<name>";

    fn parse(text: &str) -> Option<Self> {
        let (namespace, name) = text.split_once('/')?;
        let whole = !namespace.is_empty() && !name.is_empty();
        whole.then(|| Self { namespace: Arc::from(namespace), name: Arc::from(name) })
    }
}

impl Text for NonZero<u16> {
    const KIND: &'static str = "a port";

    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

fn shared(text: String) -> Arc<str> {
    Arc::from(text)
}

fn or(text: String, default: &str) -> String {
    if text.is_empty() { default.to_owned() } else { text }
}

fn parsed<T>(from: Vec<Parsed<T>>) -> Vec<T> {
    from.into_iter().map(|Parsed(value)| value).collect()
}

fn workload(from: WorkloadEntry) -> Result<Workload, String> {
    let cluster = or(from.cluster_id, "Kubernetes");
    let uid = or(from.uid, &format!("{cluster}//Pod/{}/{}", from.namespace, from.name));
    let trust_domain = TrustDomain::new(&or(from.trust_domain, "cluster.local"));
    let account = or(from.service_account, "default");
    let identity = trust_domain.and_then(|domain| SpiffeId::new(&domain, &from.namespace, &account));
    let membership = |(Parsed(service), ports): (_, BTreeMap<Parsed<NonZero<u16>>, u16>)| Membership {
        service,
        ports: ports.into_iter().map(|(Parsed(port), target)| (port.get(), target)).collect(),
    };
    Ok(Workload {
        uid: shared(uid),
        identity: identity.map_err(|error| error.to_string())?,
        name: shared(from.name),
        namespace: shared(from.namespace),
        node: shared(from.node),
        cluster: shared(cluster),
        network: shared(from.network),
        addresses: parsed(from.workload_ips),
        hostname: Arc::from(lower(&from.hostname)),
        workload_name: shared(from.workload_name),
        kind: match from.workload_type {
            WorkloadType::Deployment => WorkloadKind::Deployment,
            WorkloadType::CronJob => WorkloadKind::CronJob,
            WorkloadType::Pod => WorkloadKind::Pod,
            WorkloadType::Job => WorkloadKind::Job,
        },
        canonical_name: shared(from.canonical_name),
        canonical_revision: shared(from.canonical_revision),
        region: shared(from.locality.region),
        zone: shared(from.locality.zone),
        subzone: shared(from.locality.subzone),
        reach: match from.protocol {
            Protocol::Hbone => Reach::Hbone,
            Protocol::Tcp => Reach::Plain,
        },
        native_tunnel: from.native_tunnel,
        application_tunnel: from.application_tunnel.map(|tunnel| ApplicationTunnel {
            protocol: match tunnel.protocol {
                TunnelProtocol::None => ApplicationProtocol::None,
                TunnelProtocol::Proxy => ApplicationProtocol::Proxy,
            },
            port: tunnel.port.filter(|port| *port != 0),
        }),
        healthy: from.status == Status::Healthy,
        capacity: from.capacity,
        host_network: from.network_mode == NetworkMode::HostNetwork,
        waypoint: from.waypoint.map(gateway),
        network_gateway: from.network_gateway.map(gateway),
        // They come in the order of their names.
        services: from.services.into_iter().map(membership).collect(),
        policies: parsed(from.authorization_policies),
    })
}

fn gateway(from: GatewayEntry) -> Arc<GatewayAddress> {
    let hbone_port = if from.hbone_mtls_port == 0 { HBONE_PORT } else { from.hbone_mtls_port };
    Arc::new(GatewayAddress { destination: from.destination.0, hbone_port })
}

fn service(from: ServiceEntry) -> Result<Service, String> {
    if !from.endpoints.is_empty() {
        return Err("endpoints are not written here: name the service at its workloads (services)".to_owned());
    }
    let name = format!("{}/{}", from.namespace, from.hostname);
    let key = <ServiceKey as Text>::parse(&name);
    let weighted =
        |known: WeightedEntry| WeightedWaypoint { gateway: gateway(known.destination), weight: known.weight };
    let port = |(Parsed(port), target): (Parsed<NonZero<u16>>, u16)| ServicePort { port: port.get(), target };
    let key = key.ok_or_else(|| format!("{name:?} is not {}", ServiceKey::KIND))?;
    Ok(Service {
        hostname: Arc::from(key.hostname()),
        key,
        name: shared(from.name),
        namespace: shared(from.namespace),
        vips: parsed(from.vips),
        cidr_vips: from
            .cidr_vips
            .into_iter()
            .map(|known| NetworkCidr { network: shared(known.network), range: known.cidr.0.trunc() })
            .collect(),
        ports: from.ports.into_iter().map(port).collect(),
        identities: from.subject_alt_names.iter().filter_map(|name| name.parse().ok()).collect(),
        subject_alt_names: from.subject_alt_names.into_iter().map(shared).collect(),
        waypoint: from.waypoint.map(gateway),
        weighted_waypoints: from.weighted_waypoints.into_iter().map(weighted).collect(),
        balancing: from.load_balancer.map(balancing),
        ip_families: from.ip_families.map(|families| match families {
            Families::Dual => IpFamilies::Dual,
            Families::IPv4 => IpFamilies::V4Only,
            Families::IPv6 => IpFamilies::V6Only,
        }),
        canonical: from.canonical,
        visibility: match from.visibility {
            Visibility::Public => service::Visibility::Public,
            Visibility::Namespace => service::Visibility::Namespace,
        },
    })
}

fn balancing(from: BalancerEntry) -> LoadBalancing {
    LoadBalancing {
        mode: match from.mode {
            Mode::Standard => service::BalanceMode::Any,
            Mode::Strict => service::BalanceMode::Strict,
            Mode::Failover => service::BalanceMode::Failover,
            Mode::Passthrough => service::BalanceMode::Passthrough,
        },
        scopes: from
            .routing_preferences
            .into_iter()
            .map(|scope| match scope {
                Scope::Network => BalanceScope::Network,
                Scope::Region => BalanceScope::Region,
                Scope::Zone => BalanceScope::Zone,
                Scope::Subzone => BalanceScope::Subzone,
                Scope::Node => BalanceScope::Node,
                Scope::Cluster => BalanceScope::Cluster,
            })
            .collect(),
        health: match from.health_policy {
            HealthPolicy::OnlyHealthy => service::HealthPolicy::OnlyHealthy,
            HealthPolicy::AllowAll => service::HealthPolicy::AllowAll,
        },
    }
}

fn policy(from: PolicyEntry) -> Result<Policy, String> {
    let name = format!("{}/{}", from.namespace, from.name);
    let key = <PolicyKey as Text>::parse(&name);
    let clause = |matches: Vec<MatchEntry>| Clause { matches: matches.into_iter().map(one_match).collect() };
    let rule = |clauses: Vec<_>| Rule { clauses: clauses.into_iter().map(clause).collect() };
    Ok(Policy {
        key: key.ok_or_else(|| format!("{name:?} is not {}", PolicyKey::KIND))?,
        scope: match from.scope {
            PolicyScope::Global => policy::Scope::Global,
            PolicyScope::Namespace => policy::Scope::Namespace,
            PolicyScope::WorkloadSelector => policy::Scope::WorkloadSelector,
        },
        action: match from.action {
            Action::Allow => policy::Action::Allow,
            Action::Deny => policy::Action::Deny,
        },
        dry_run: from.dry_run,
        rules: from.rules.into_iter().map(rule).collect(),
    })
}

fn one_match(from: MatchEntry) -> policy::Match {
    let texts = |from: Vec<TextEntry>| from.into_iter().map(|TextEntry(text)| text).collect();
    let accounts = |from: Vec<AccountEntry>| {
        let account = |known: AccountEntry| ServiceAccountMatch {
            namespace: Arc::from(known.namespace),
            name: Arc::from(known.service_account),
        };
        from.into_iter().map(account).collect()
    };
    policy::Match {
        namespaces: texts(from.namespaces),
        not_namespaces: texts(from.not_namespaces),
        principals: texts(from.principals),
        not_principals: texts(from.not_principals),
        service_accounts: accounts(from.service_accounts),
        not_service_accounts: accounts(from.not_service_accounts),
        source_ips: parsed(from.source_ips),
        not_source_ips: parsed(from.not_source_ips),
        destination_ips: parsed(from.destination_ips),
        not_destination_ips: parsed(from.not_destination_ips),
        destination_ports: from.destination_ports,
        not_destination_ports: from.not_destination_ports,
    }
}
