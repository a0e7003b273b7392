//! Services: virtual addresses, and how the workloads behind them are chosen.

use std::borrow::Borrow;
use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::addr::NetworkAddress;
use crate::model::addr::NetworkCidr;
use crate::model::addr::lower;
use crate::model::identity::SpiffeId;

/// The unique name of a service, as `namespace/hostname`. The hostname is in lower case, however it was written: names
/// of hosts are compared without case (RFC 4343).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey(Arc<str>);

impl ServiceKey {
    /// Composes a name.
    pub fn new(namespace: &str, hostname: &str) -> Self {
        Self(Arc::from(format!("{namespace}/{}", lower(hostname))))
    }

    /// Reads the name of a gateway, whose namespace may be left out: any service or workload of that name is meant
    /// then.
    pub fn parse_gateway(text: Arc<str>) -> Option<Self> {
        let (namespace, hostname) = text.split_once('/')?;
        let valid = !hostname.is_empty() && !hostname.contains('/');
        valid.then(|| match lower(hostname) {
            Cow::Borrowed(_) => Self(Arc::clone(&text)),
            Cow::Owned(hostname) => Self(Arc::from(format!("{namespace}/{hostname}"))),
        })
    }

    /// Reads `namespace/hostname`; `None` if it is not of that form.
    pub fn parse(text: Arc<str>) -> Option<Self> {
        Self::parse_gateway(text).filter(|key| !key.namespace().is_empty())
    }

    /// The whole name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        self.0.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    /// The full DNS name.
    pub fn hostname(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, hostname)| hostname)
    }
}

impl Borrow<str> for ServiceKey {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A port of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServicePort {
    /// The port clients dial.
    pub port: u16,
    /// The port of the endpoints, unless an endpoint has its own; 0 when only endpoints know.
    pub target: u16,
}

/// Where a waypoint or a network's gateway is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// A service, or a workload with that hostname.
    Hostname(ServiceKey),
    /// A service or workload with that address.
    Address(NetworkAddress),
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hostname(key) => key.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// A waypoint, or the gateway of a network.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GatewayAddress {
    /// Where it is.
    pub destination: GatewayDestination,
    /// The port at which it terminates HBONE.
    pub hbone_port: u16,
}

/// One of several waypoints that share a service's connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightedWaypoint {
    /// Which.
    pub gateway: Arc<GatewayAddress>,
    /// Its share is this in the sum of all.
    pub weight: u32,
}

/// What a client and an endpoint may have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BalanceScope {
    /// The region.
    Region,
    /// The zone.
    Zone,
    /// The part of a zone.
    Subzone,
    /// The node.
    Node,
    /// The cluster.
    Cluster,
    /// The network.
    Network,
    /// Something this version does not know: nobody has it in common.
    Unknown,
}

/// How the scopes of [`LoadBalancing`] are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BalanceMode {
    /// Not at all: every endpoint is as good.
    Any,
    /// Only endpoints that have all of them in common with the client.
    Strict,
    /// The endpoints that have the most of them in common with the client, counted from the first on.
    Failover,
    /// There is no balancing: the address that was dialled is used as it is.
    Passthrough,
}

/// Which endpoints may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HealthPolicy {
    /// The healthy ones.
    OnlyHealthy,
    /// All.
    AllowAll,
}

/// How one of the endpoints is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadBalancing {
    /// How the scopes are used.
    pub mode: BalanceMode,
    /// What a client and an endpoint should have in common, the most important first.
    pub scopes: Box<[BalanceScope]>,
    /// Which endpoints may be chosen.
    pub health: HealthPolicy,
}

/// Which addresses of its endpoints a service uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IpFamilies {
    /// IPv4 alone.
    V4Only,
    /// IPv6 alone.
    V6Only,
    /// Both.
    Dual,
}

impl IpFamilies {
    /// Whether the service uses `ip`.
    pub fn allows(self, ip: IpAddr) -> bool {
        match self {
            Self::V4Only => ip.is_ipv4(),
            Self::V6Only => ip.is_ipv6(),
            Self::Dual => true,
        }
    }
}

/// Who finds a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Visibility {
    /// Everybody.
    Public,
    /// Clients of its own namespace.
    Namespace,
}

/// A service as the mesh knows it, without the workloads behind it: those come and go without it. Who keeps one (a
/// connection does) keeps none of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its unique name: of its namespace and hostname.
    pub key: ServiceKey,
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its full DNS name, in lower case: `<name>.<namespace>.svc.<cluster domain>` for one of Kubernetes.
    pub hostname: Arc<str>,
    /// Its virtual addresses. Empty for a headless service.
    pub vips: Vec<NetworkAddress>,
    /// Its virtual address ranges.
    pub cidr_vips: Vec<NetworkCidr>,
    /// Its TCP ports.
    pub ports: Vec<ServicePort>,
    /// What its endpoints may present besides their own identity, as given.
    pub subject_alt_names: Vec<Arc<str>>,
    /// Those of [`Self::subject_alt_names`] that are identities of workloads; others cannot be presented.
    pub identities: Vec<SpiffeId>,
    /// The waypoint in front of it.
    pub waypoint: Option<Arc<GatewayAddress>>,
    /// The waypoints in front of it, where they are several: if these have any weight they come before `waypoint`.
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// How an endpoint is chosen; `None` is any healthy one.
    pub balancing: Option<LoadBalancing>,
    /// Which addresses of the endpoints are used; `None` leaves it open.
    pub ip_families: Option<IpFamilies>,
    /// Preferred over others with the same address or hostname.
    pub canonical: bool,
    /// Who finds it.
    pub visibility: Visibility,
}

impl Service {
    /// The port with this number.
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|known| known.port == port)
    }

    /// How the scopes of its balancing are used.
    pub fn balance_mode(&self) -> BalanceMode {
        self.balancing.as_ref().map_or(BalanceMode::Any, |balancing| balancing.mode)
    }

    /// Which endpoints may be chosen.
    pub fn health_policy(&self) -> HealthPolicy {
        self.balancing.as_ref().map_or(HealthPolicy::OnlyHealthy, |balancing| balancing.health)
    }

    /// Whether a client of `namespace` finds it; one of no namespace finds all.
    pub fn is_visible_to(&self, namespace: Option<&str>) -> bool {
        match self.visibility {
            Visibility::Public => true,
            Visibility::Namespace => namespace.is_none_or(|namespace| *namespace == *self.namespace),
        }
    }
}

#[cfg(any(test, feature = "testing"))]
impl Service {
    /// A headless service without ports, for tests, which change what they are about.
    pub fn sample(namespace: &str, name: &str) -> Self {
        let hostname = format!("{name}.{namespace}");
        Self {
            key: ServiceKey::new(namespace, &hostname),
            name: Arc::from(name),
            namespace: Arc::from(namespace),
            hostname: Arc::from(hostname),
            vips: Vec::new(),
            cidr_vips: Vec::new(),
            ports: Vec::new(),
            subject_alt_names: Vec::new(),
            identities: Vec::new(),
            waypoint: None,
            weighted_waypoints: Vec::new(),
            balancing: None,
            ip_families: None,
            canonical: false,
            visibility: Visibility::Public,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_service_has_two_parts() {
        let parse = |text: &str| ServiceKey::parse(Arc::from(text));
        let key = parse("shop/cart.shop.svc.cluster.local").unwrap();
        assert_eq!((key.namespace(), key.hostname()), ("shop", "cart.shop.svc.cluster.local"));
        assert_eq!(key, ServiceKey::new("shop", "cart.shop.svc.cluster.local"));
        for key in [parse("shop/API.Example.com").unwrap(), ServiceKey::new("shop", "api.EXAMPLE.com")] {
            assert_eq!(key.as_str(), "shop/api.example.com");
        }
        for text in ["", "/", "shop", "shop/", "/cart", "shop/a/b"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}
