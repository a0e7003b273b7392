//! Workloads, services and policies as views, in the order of their unique names.

use serde::Serialize;
use serde::Serializer;
use serde::ser::SerializeMap;
use ztunnel_mesh::model::policy::Action;
use ztunnel_mesh::model::policy::Match;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::policy::Scope;
use ztunnel_mesh::model::policy::ServiceAccountMatch;
use ztunnel_mesh::model::policy::StringMatch;
use ztunnel_mesh::model::service::BalanceMode;
use ztunnel_mesh::model::service::BalanceScope;
use ztunnel_mesh::model::service::GatewayAddress;
use ztunnel_mesh::model::service::HealthPolicy;
use ztunnel_mesh::model::service::IpFamilies;
use ztunnel_mesh::model::service::LoadBalancing;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::service::Visibility;
use ztunnel_mesh::model::workload::ApplicationProtocol;
use ztunnel_mesh::model::workload::ApplicationTunnel;
use ztunnel_mesh::model::workload::Reach;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::store::endpoints::Endpoint;
use ztunnel_mesh::store::endpoints::Endpoints;
use ztunnel_mesh::store::index::Mesh;

use crate::api;

/// All workloads of a mesh, one view at a time.
pub struct Workloads<'a>(pub &'a Mesh);

impl Serialize for Workloads<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut all: Vec<_> = self.0.workloads().collect();
        all.sort_unstable_by(|one, other| one.uid.cmp(&other.uid));
        serializer.collect_seq(all.into_iter().map(|known| workload(known)))
    }
}

/// All services of a mesh, one view at a time.
pub struct Services<'a>(pub &'a Mesh);

impl Serialize for Services<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut all: Vec<_> = self.0.services().collect();
        all.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        serializer.collect_seq(all.into_iter().map(|known| service(known, self.0.endpoints(&known.key))))
    }
}

/// The endpoints of services that are not known (yet).
pub struct Staged<'a>(pub &'a Mesh);

impl Serialize for Staged<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut all: Vec<_> = self.0.staged().collect();
        all.sort_unstable_by_key(|(key, _)| *key);
        let mut map = serializer.serialize_map(Some(all.len()))?;
        for (key, endpoints) in all {
            map.serialize_entry(key.as_str(), &ByName(None, endpoints))?;
        }
        map.end()
    }
}

/// All that could not be understood.
pub struct Refusals<'a>(pub &'a Mesh);

impl Serialize for Refusals<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut all: Vec<_> = self.0.refused().collect();
        all.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        serializer.collect_seq(all.into_iter().map(|refused| {
            let addresses = refused.addresses.iter().map(ToString::to_string);
            let ranges = refused.ranges.iter().map(|cidr| format!("{}/{}", cidr.network, cidr.range));
            api::RefusedResource {
                name: &refused.name,
                addresses: addresses.chain(ranges).collect(),
                reason: &refused.reason,
            }
        }))
    }
}

/// All policies of a mesh, one view at a time.
pub struct Policies<'a>(pub &'a Mesh);

impl Serialize for Policies<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut all: Vec<_> = self.0.policies().collect();
        all.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        serializer.collect_seq(all.into_iter().map(|known| policy(known)))
    }
}

/// Endpoints under the unique names of their workloads, in whose order they are kept.
struct ByName<'a>(Option<&'a Service>, &'a Endpoints);

impl Serialize for ByName<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(service, endpoints) = self;
        serializer
            .collect_map(endpoints.iter().map(|known| (&*known.workload().uid, endpoint(*service, known))))
    }
}

fn workload(workload: &Workload) -> api::Workload<'_> {
    api::Workload {
        workload_ips: workload.addresses.iter().map(ToString::to_string).collect(),
        waypoint: workload.waypoint.as_deref().map(gateway),
        network_gateway: workload.network_gateway.as_deref().map(gateway),
        protocol: match workload.reach {
            Reach::Hbone => "HBONE",
            Reach::Plain => "TCP",
            Reach::Unknown => "Unknown",
        },
        network_mode: if workload.host_network { "HostNetwork" } else { "Standard" },
        uid: &workload.uid,
        name: &workload.name,
        namespace: &workload.namespace,
        trust_domain: workload.identity.trust_domain(),
        service_account: workload.service_account(),
        network: &workload.network,
        workload_name: &workload.workload_name,
        workload_type: workload.kind.as_str(),
        canonical_name: &workload.canonical_name,
        canonical_revision: &workload.canonical_revision,
        hostname: &workload.hostname,
        node: &workload.node,
        native_tunnel: workload.native_tunnel,
        application_tunnel: workload.application_tunnel.map(application_tunnel),
        authorization_policies: workload.policies.iter().map(ToString::to_string).collect(),
        status: status(workload),
        cluster_id: &workload.cluster,
        locality: api::Locality {
            region: &workload.region,
            zone: &workload.zone,
            subzone: &workload.subzone,
        },
        services: {
            let mut services: Vec<_> =
                workload.services.iter().map(|membership| membership.service.as_str()).collect();
            services.sort_unstable();
            services
        },
        capacity: workload.capacity,
    }
}

fn gateway(gateway: &GatewayAddress) -> api::Gateway {
    api::Gateway { destination: gateway.destination.to_string(), hbone_mtls_port: gateway.hbone_port }
}

fn application_tunnel(tunnel: ApplicationTunnel) -> api::ApplicationTunnel {
    let protocol = match tunnel.protocol {
        ApplicationProtocol::None => "NONE",
        ApplicationProtocol::Proxy => "PROXY",
        ApplicationProtocol::Unknown => "UNKNOWN",
    };
    api::ApplicationTunnel { protocol, port: tunnel.port }
}

fn status(workload: &Workload) -> &'static str {
    if workload.healthy { "Healthy" } else { "Unhealthy" }
}

fn service<'a>(service: &'a Service, endpoints: &'a Endpoints) -> api::Service<'a, impl Serialize + use<'a>> {
    api::Service {
        name: &service.name,
        namespace: &service.namespace,
        hostname: &service.hostname,
        vips: service.vips.iter().map(ToString::to_string).collect(),
        cidr_vips: service
            .cidr_vips
            .iter()
            .map(|known| api::CidrVip { network: &known.network, cidr: known.range.to_string() })
            .collect(),
        ports: service.ports.iter().map(|port| (port.port, port.target)).collect(),
        endpoints: ByName(Some(service), endpoints),
        subject_alt_names: service.subject_alt_names.iter().map(|name| &**name).collect(),
        waypoint: service.waypoint.as_deref().map(gateway),
        weighted_waypoints: service
            .weighted_waypoints
            .iter()
            .map(|known| api::WeightedWaypoint { destination: gateway(&known.gateway), weight: known.weight })
            .collect(),
        load_balancer: service.balancing.as_ref().map(load_balancer),
        ip_families: service.ip_families.map(|families| match families {
            IpFamilies::V4Only => "IPv4",
            IpFamilies::V6Only => "IPv6",
            IpFamilies::Dual => "Dual",
        }),
        canonical: service.canonical,
        visibility: match service.visibility {
            Visibility::Public => "Public",
            Visibility::Namespace => "Namespace",
        },
    }
}

fn load_balancer(balancing: &LoadBalancing) -> api::LoadBalancer {
    api::LoadBalancer {
        routing_preferences: balancing
            .scopes
            .iter()
            .map(|scope| match scope {
                BalanceScope::Region => "Region",
                BalanceScope::Zone => "Zone",
                BalanceScope::Subzone => "Subzone",
                BalanceScope::Node => "Node",
                BalanceScope::Cluster => "Cluster",
                BalanceScope::Network => "Network",
                BalanceScope::Unknown => "Unknown",
            })
            .collect(),
        mode: match balancing.mode {
            BalanceMode::Any => "Standard",
            BalanceMode::Strict => "Strict",
            BalanceMode::Failover => "Failover",
            BalanceMode::Passthrough => "Passthrough",
        },
        health_policy: match balancing.health {
            HealthPolicy::OnlyHealthy => "OnlyHealthy",
            HealthPolicy::AllowAll => "AllowAll",
        },
    }
}

/// `service` is the one it is behind, if that is known.
fn endpoint<'a>(service: Option<&Service>, endpoint: &'a Endpoint) -> api::Endpoint<'a> {
    let targets = service.map(|known| &known.ports[..]).unwrap_or_default().iter();
    let targets = targets.map(|port| (port.port, port.target)).filter(|(_, target)| *target != 0);
    let own = endpoint.membership().map(|membership| &membership.ports[..]).unwrap_or_default();
    api::Endpoint {
        workload_uid: &endpoint.workload().uid,
        // What the endpoint says itself counts.
        port: targets.chain(own.iter().copied()).collect(),
        status: status(endpoint.workload()),
    }
}

fn policy(policy: &Policy) -> api::Policy<'_> {
    api::Policy {
        name: &policy.key.name,
        namespace: &policy.key.namespace,
        scope: match policy.scope {
            Scope::Global => "Global",
            Scope::Namespace => "Namespace",
            Scope::WorkloadSelector => "WorkloadSelector",
        },
        action: match policy.action {
            Action::Allow => "Allow",
            Action::Deny => "Deny",
        },
        rules: policy
            .rules
            .iter()
            .map(|rule| {
                let clauses = rule.clauses.iter();
                clauses.map(|clause| clause.matches.iter().map(matching).collect()).collect()
            })
            .collect(),
        dry_run: policy.dry_run,
    }
}

fn matching(known: &Match) -> api::Match<'_> {
    fn texts(matches: &[StringMatch]) -> Vec<api::StringMatch<'_>> {
        matches.iter().map(text).collect()
    }
    fn accounts(matches: &[ServiceAccountMatch]) -> Vec<api::ServiceAccount<'_>> {
        let accounts = matches.iter();
        accounts
            .map(|known| api::ServiceAccount { namespace: &known.namespace, service_account: &known.name })
            .collect()
    }
    fn networks(matches: &[ipnet::IpNet]) -> Vec<String> {
        matches.iter().map(ToString::to_string).collect()
    }
    api::Match {
        namespaces: texts(&known.namespaces),
        not_namespaces: texts(&known.not_namespaces),
        service_accounts: accounts(&known.service_accounts),
        not_service_accounts: accounts(&known.not_service_accounts),
        principals: texts(&known.principals),
        not_principals: texts(&known.not_principals),
        source_ips: networks(&known.source_ips),
        not_source_ips: networks(&known.not_source_ips),
        destination_ips: networks(&known.destination_ips),
        not_destination_ips: networks(&known.not_destination_ips),
        destination_ports: &known.destination_ports,
        not_destination_ports: &known.not_destination_ports,
    }
}

fn text(known: &StringMatch) -> api::StringMatch<'_> {
    match known {
        StringMatch::Exact(text) => api::StringMatch::Exact(text),
        StringMatch::Prefix(text) => api::StringMatch::Prefix(text),
        StringMatch::Suffix(text) => api::StringMatch::Suffix(text),
        StringMatch::Presence => api::StringMatch::Presence([]),
    }
}
