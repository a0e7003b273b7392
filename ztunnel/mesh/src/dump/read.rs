//! What was read: entries of a dump as the model.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::dump::Gateway;
use crate::dump::LoadBalancer;
use crate::dump::Match;
use crate::dump::Memberships;
use crate::dump::Policy;
use crate::dump::Port;
use crate::dump::Service;
use crate::dump::ServiceAccount;
use crate::dump::StringMatch;
use crate::dump::Text;
use crate::dump::Workload;
use crate::dump::words::NetworkMode;
use crate::dump::words::Status;
use crate::dump::words::Word;
use crate::model;
use crate::model::addr::HBONE_PORT;
use crate::model::addr::NetworkAddress;
use crate::model::addr::NetworkCidr;
use crate::model::addr::canonical_ip;
use crate::model::addr::lower;
use crate::model::identity::SpiffeId;
use crate::model::identity::TrustDomain;
use crate::model::policy::PolicyKey;
use crate::model::service::GatewayAddress;
use crate::model::service::GatewayDestination;
use crate::model::service::ServiceKey;

/// What of an entry does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misfit {
    /// The way there, innermost last: fields, keys of maps, and `[0]` in lists. Empty where it is the entry itself.
    pub path: Vec<String>,
    /// The key at the end of the way that does not fit, where it is one.
    pub key: Option<String>,
    message: String,
}

impl Misfit {
    fn new(message: impl fmt::Display) -> Self {
        Self { path: Vec::new(), key: None, message: message.to_string() }
    }

    fn within(mut self, segment: impl Into<String>) -> Self {
        self.path.insert(0, segment.into());
        self
    }

    /// That an entry as a whole does not fit.
    pub fn of_entry(message: impl fmt::Display) -> Self {
        Self::new(message)
    }

    /// That a field does not fit.
    pub fn of_field(field: &'static str, message: impl fmt::Display) -> Self {
        Self::new(message).within(field)
    }
}

impl std::error::Error for Misfit {}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// What is written as a text.
trait Parsed: Sized {
    /// What it is to whoever got it wrong.
    const KIND: &'static str;

    fn parse(text: &str) -> Option<Self>;

    fn of(text: &str) -> Result<Self, Misfit> {
        Self::parse(text).ok_or_else(|| Misfit::new(format_args!("{text:?} is not {}", Self::KIND)))
    }
}

impl Parsed for IpAddr {
    const KIND: &'static str = "an IP address";

    fn parse(text: &str) -> Option<Self> {
        text.parse().ok().map(canonical_ip)
    }
}

impl Parsed for IpNet {
    const KIND: &'static str = "a range of IP addresses such as 10.0.0.0/8";

    fn parse(text: &str) -> Option<Self> {
        text.parse().ok().or_else(|| Some(Self::from(<IpAddr as Parsed>::parse(text)?)))
    }
}

impl Parsed for NetworkAddress {
    const KIND: &'static str = "<network>/<IP address>";

    fn parse(text: &str) -> Option<Self> {
        // A network may have no name.
        let (network, ip) = text.split_once('/').unwrap_or(("", text));
        Some(Self { network: Arc::from(network), ip: <IpAddr as Parsed>::parse(ip)? })
    }
}

impl Parsed for GatewayDestination {
    const KIND: &'static str = "<network>/<IP address> or <namespace>/<hostname>";

    fn parse(text: &str) -> Option<Self> {
        let address = text.contains('/').then(|| NetworkAddress::parse(text)).flatten().map(Self::Address);
        // As a control plane names them, which may leave the namespace out.
        address.or_else(|| ServiceKey::parse_gateway(Arc::from(text)).map(Self::Hostname))
    }
}

impl Parsed for ServiceKey {
    const KIND: &'static str = "<namespace>/<hostname>";

    fn parse(text: &str) -> Option<Self> {
        Self::parse(Arc::from(text))
    }
}

impl Parsed for PolicyKey {
    const KIND: &'static str = "<namespace>/<name>";

    fn parse(text: &str) -> Option<Self> {
        let (namespace, name) = text.split_once('/')?;
        let whole = !namespace.is_empty() && !name.is_empty();
        whole.then(|| Self { namespace: Arc::from(namespace), name: Arc::from(name) })
    }
}

fn shared(text: &str) -> Arc<str> {
    Arc::from(text)
}

fn each<F, T>(
    field: &'static str,
    from: &[F],
    make: impl Fn(&F) -> Result<T, Misfit>,
) -> Result<Vec<T>, Misfit> {
    let one = |(index, one)| make(one).map_err(|misfit| misfit.within(format!("[{index}]")).within(field));
    from.iter().enumerate().map(one).collect()
}

fn parsed<T: Parsed>(field: &'static str, from: &[Text<'_>]) -> Result<Vec<T>, Misfit> {
    each(field, from, |text| T::of(text))
}

/// What a word means. That something is not known is written and read, but nobody is told to write it.
fn word<T: Word>(text: &str) -> Result<T, Misfit> {
    T::ALL.iter().copied().find(|known| known.word() == text).ok_or_else(|| {
        let known = T::ALL.iter().map(|known| known.word());
        let known: Vec<_> = known.filter(|word| !word.eq_ignore_ascii_case("unknown")).collect();
        let (one, between) = if known.len() == 2 { ("", " or ") } else { ("one of ", ", ") };
        let known: Vec<_> = known.into_iter().map(|word| format!("`{word}`")).collect();
        Misfit::new(format_args!("unknown variant `{text}`, expected {one}{}", known.join(between)))
    })
}

fn field<T>(field: &'static str, read: Result<T, Misfit>) -> Result<T, Misfit> {
    read.map_err(|misfit| misfit.within(field))
}

fn gateway(name: &'static str, from: Option<&Gateway<'_>>) -> Result<Option<Arc<GatewayAddress>>, Misfit> {
    from.map(|from| field(name, from.read())).transpose()
}

impl Gateway<'_> {
    fn read(&self) -> Result<Arc<GatewayAddress>, Misfit> {
        let destination = field("destination", GatewayDestination::of(&self.destination))?;
        let hbone_port = if self.hbone_mtls_port == 0 { HBONE_PORT } else { self.hbone_mtls_port };
        Ok(Arc::new(GatewayAddress { destination, hbone_port }))
    }
}

impl Workload<'_> {
    /// As the mesh knows it. What is left out has no value, but for the trust domain and the service account.
    pub fn read(&self) -> Result<model::workload::Workload, Misfit> {
        let or = |text: &str, default| if text.is_empty() { default } else { text }.to_owned();
        let trust_domain = TrustDomain::new(&or(&self.trust_domain, "cluster.local"));
        let account = or(&self.service_account, "default");
        let identity = trust_domain.and_then(|domain| SpiffeId::new(&domain, &self.namespace, &account));
        let tunnel = self.application_tunnel.as_ref().map(|tunnel| {
            let protocol = field("applicationTunnel", field("protocol", word(&tunnel.protocol)))?;
            let port = tunnel.port.filter(|port| *port != 0);
            Ok(model::workload::ApplicationTunnel { protocol, port })
        });
        Ok(model::workload::Workload {
            uid: shared(&self.uid),
            name: shared(&self.name),
            namespace: shared(&self.namespace),
            node: shared(&self.node),
            cluster: shared(&self.cluster_id),
            network: shared(&self.network),
            addresses: parsed("workloadIps", &self.workload_ips)?,
            hostname: Arc::from(lower(&self.hostname)),
            workload_name: shared(&self.workload_name),
            kind: field("workloadType", word(&self.workload_type))?,
            canonical_name: shared(&self.canonical_name),
            canonical_revision: shared(&self.canonical_revision),
            region: shared(&self.locality.region),
            zone: shared(&self.locality.zone),
            subzone: shared(&self.locality.subzone),
            reach: field("protocol", word(&self.protocol))?,
            native_tunnel: self.native_tunnel,
            application_tunnel: tunnel.transpose()?,
            healthy: field("status", word::<Status>(&self.status))? == Status::Healthy,
            capacity: self.capacity,
            host_network: field("networkMode", word::<NetworkMode>(&self.network_mode))?
                == NetworkMode::HostNetwork,
            waypoint: gateway("waypoint", self.waypoint.as_ref())?,
            network_gateway: gateway("networkGateway", self.network_gateway.as_ref())?,
            services: field("services", self.services.read())?,
            policies: parsed("authorizationPolicies", &self.authorization_policies)?,
            identity: identity.map_err(Misfit::new)?,
        })
    }
}

impl Memberships<'_> {
    /// In the order of the services' names.
    fn read(&self) -> Result<Box<[model::workload::Membership]>, Misfit> {
        let mut services = BTreeMap::new();
        match self {
            Self::Names(names) => {
                for (index, name) in names.iter().enumerate() {
                    let service = ServiceKey::of(name);
                    services
                        .insert(service.map_err(|misfit| misfit.within(format!("[{index}]")))?, Vec::new());
                }
            }
            Self::Ports(known) => {
                for (name, ports) in known {
                    let at_key = |misfit: Misfit| Misfit { key: Some(name.to_string()), ..misfit };
                    let service = ServiceKey::of(name).map_err(at_key)?;
                    services.insert(service, self::ports(ports).map_err(|misfit| misfit.within(&**name))?);
                }
            }
        }
        let membership = |(service, ports)| model::workload::Membership { service, ports: Arc::from(ports) };
        Ok(services.into_iter().map(membership).collect())
    }
}

/// Port → port, none of which is 0 where it is a key.
fn ports(from: &BTreeMap<Port, u16>) -> Result<Vec<(u16, u16)>, Misfit> {
    let port = |(&Port(port), &target): (&Port, &u16)| match port {
        0 => Err(Misfit { key: Some("0".to_owned()), ..Misfit::new("\"0\" is not a port") }),
        _ => Ok((port, target)),
    };
    from.iter().map(port).collect()
}

impl Service<'_> {
    /// As the mesh knows it; its endpoints are those workloads that name it.
    pub fn read(&self) -> Result<model::service::Service, Misfit> {
        let key = ServiceKey::of(&format!("{}/{}", self.namespace, self.hostname))?;
        let weighted = each("weightedWaypoints", &self.weighted_waypoints, |known| {
            let gateway = field("destination", known.destination.read())?;
            Ok(model::service::WeightedWaypoint { gateway, weight: known.weight })
        })?;
        let cidr_vips = each("cidrVips", &self.cidr_vips, |known| {
            let range = field("cidr", IpNet::of(&known.cidr))?;
            Ok(NetworkCidr { network: shared(&known.network), range: range.trunc() })
        })?;
        let port = |(port, target)| model::service::ServicePort { port, target };
        let names = self.subject_alt_names.iter();
        let balancing = self.load_balancer.as_ref().map(|from| field("loadBalancer", from.read()));
        let families = self.ip_families.as_deref().map(|families| field("ipFamilies", word(families)));
        Ok(model::service::Service {
            hostname: Arc::from(key.hostname()),
            key,
            name: shared(&self.name),
            namespace: shared(&self.namespace),
            vips: parsed("vips", &self.vips)?,
            cidr_vips,
            ports: field("ports", ports(&self.ports))?.into_iter().map(port).collect(),
            identities: names.clone().filter_map(|name| name.parse().ok()).collect(),
            subject_alt_names: names.map(|name| shared(name)).collect(),
            waypoint: gateway("waypoint", self.waypoint.as_ref())?,
            weighted_waypoints: weighted,
            balancing: balancing.transpose()?,
            ip_families: families.transpose()?,
            canonical: self.canonical,
            visibility: field("visibility", word(&self.visibility))?,
        })
    }
}

impl LoadBalancer<'_> {
    fn read(&self) -> Result<model::service::LoadBalancing, Misfit> {
        let scopes = each("routingPreferences", &self.routing_preferences, |scope| word(scope))?;
        Ok(model::service::LoadBalancing {
            mode: field("mode", word(&self.mode))?,
            scopes: scopes.into_boxed_slice(),
            health: field("healthPolicy", word(&self.health_policy))?,
        })
    }
}

impl Policy<'_> {
    /// As the mesh knows it.
    pub fn read(&self) -> Result<model::policy::Policy, Misfit> {
        let mut rules = Vec::with_capacity(self.rules.len());
        for (rule, from) in self.rules.iter().enumerate() {
            let mut clauses = Vec::with_capacity(from.len());
            for (clause, from) in from.iter().enumerate() {
                let all = from.iter().enumerate().map(|(index, from)| {
                    let place = |misfit: Misfit| {
                        let misfit = misfit.within(format!("[{index}]")).within(format!("[{clause}]"));
                        misfit.within(format!("[{rule}]")).within("rules")
                    };
                    from.read().map_err(place)
                });
                clauses.push(model::policy::Clause { matches: all.collect::<Result<_, _>>()? });
            }
            rules.push(model::policy::Rule { clauses });
        }
        Ok(model::policy::Policy {
            key: PolicyKey::of(&format!("{}/{}", self.namespace, self.name))?,
            scope: field("scope", word(&self.scope))?,
            action: field("action", word(&self.action))?,
            dry_run: self.dry_run,
            rules,
        })
    }
}

impl Match<'_> {
    fn read(&self) -> Result<model::policy::Match, Misfit> {
        let account = |known: &ServiceAccount<'_>| {
            let (namespace, name) = (shared(&known.namespace), shared(&known.service_account));
            Ok(model::policy::ServiceAccountMatch { namespace, name })
        };
        Ok(model::policy::Match {
            namespaces: each("namespaces", &self.namespaces, StringMatch::read)?,
            not_namespaces: each("notNamespaces", &self.not_namespaces, StringMatch::read)?,
            principals: each("principals", &self.principals, StringMatch::read)?,
            not_principals: each("notPrincipals", &self.not_principals, StringMatch::read)?,
            service_accounts: each("serviceAccounts", &self.service_accounts, account)?,
            not_service_accounts: each("notServiceAccounts", &self.not_service_accounts, account)?,
            source_ips: parsed("sourceIps", &self.source_ips)?,
            not_source_ips: parsed("notSourceIps", &self.not_source_ips)?,
            destination_ips: parsed("destinationIps", &self.destination_ips)?,
            not_destination_ips: parsed("notDestinationIps", &self.not_destination_ips)?,
            destination_ports: self.destination_ports.to_vec(),
            not_destination_ports: self.not_destination_ports.to_vec(),
        })
    }
}

impl StringMatch<'_> {
    fn read(&self) -> Result<model::policy::StringMatch, Misfit> {
        match self {
            Self { exact: Some(text), prefix: None, suffix: None, presence: None } => {
                Ok(model::policy::StringMatch::Exact(shared(text)))
            }
            Self { exact: None, prefix: Some(text), suffix: None, presence: None } => {
                Ok(model::policy::StringMatch::Prefix(shared(text)))
            }
            Self { exact: None, prefix: None, suffix: Some(text), presence: None } => {
                Ok(model::policy::StringMatch::Suffix(shared(text)))
            }
            Self { exact: None, prefix: None, suffix: None, presence: Some(_) } => {
                Ok(model::policy::StringMatch::Presence)
            }
            _ => Err(Misfit::new("expected one of {Exact: x}, {Prefix: x}, {Suffix: x} and {Presence: []}")),
        }
    }
}
