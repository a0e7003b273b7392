//! What is written: the model as entries of a dump.

use std::borrow::Cow;

use crate::dump::ApplicationTunnel;
use crate::dump::CidrVip;
use crate::dump::Dump;
use crate::dump::Endpoint;
use crate::dump::Endpoints;
use crate::dump::Gateway;
use crate::dump::Given;
use crate::dump::List;
use crate::dump::LoadBalancer;
use crate::dump::Locality;
use crate::dump::Match;
use crate::dump::Memberships;
use crate::dump::Part;
use crate::dump::Policy;
use crate::dump::Port;
use crate::dump::RefusedResource;
use crate::dump::Service;
use crate::dump::ServiceAccount;
use crate::dump::Staged;
use crate::dump::StringMatch;
use crate::dump::Text;
use crate::dump::WeightedWaypoint;
use crate::dump::Workload;
use crate::dump::words::NetworkMode;
use crate::dump::words::Status;
use crate::dump::words::Word;
use crate::model;
use crate::store::endpoints;
use crate::store::index::Mesh;

impl<'a> Dump<'a> {
    /// The parts of a dump that show `mesh`, and the one that shows what was `given` by hand.
    pub fn of(mesh: &'a Mesh, given: &'a Mesh) -> Self {
        Self {
            workloads: List::Of(mesh),
            services: List::Of(mesh),
            policies: List::Of(mesh),
            staged_services: Staged::Of(mesh),
            refused_resources: List::Of(mesh),
            static_config: Given {
                workloads: List::Of(given),
                policies: List::Of(given),
                services: List::Of(given),
            },
            ..Self::default()
        }
    }
}

impl<'a> Part<'a> for Workload<'a> {
    fn all(mesh: &'a Mesh) -> impl Iterator<Item = Self> {
        let mut all: Vec<_> = mesh.workloads().collect();
        all.sort_unstable_by(|one, other| one.uid.cmp(&other.uid));
        all.into_iter().map(|known| Self::of(known))
    }
}

impl<'a> Part<'a> for Service<'a> {
    fn all(mesh: &'a Mesh) -> impl Iterator<Item = Self> {
        let mut all: Vec<_> = mesh.services().collect();
        all.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        all.into_iter().map(|known| Self::of(known, mesh.endpoints(&known.key)))
    }
}

impl<'a> Part<'a> for Policy<'a> {
    fn all(mesh: &'a Mesh) -> impl Iterator<Item = Self> {
        let mut all: Vec<_> = mesh.policies().collect();
        all.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        all.into_iter().map(|known| Self::of(known))
    }
}

impl<'a> Part<'a> for RefusedResource<'a> {
    fn all(mesh: &'a Mesh) -> impl Iterator<Item = Self> {
        let mut all: Vec<_> = mesh.refused().collect();
        all.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        all.into_iter().map(|refused| {
            let addresses = refused.addresses.iter().map(shown);
            let ranges =
                refused.ranges.iter().map(|cidr| Text::from(format!("{}/{}", cidr.network, cidr.range)));
            Self {
                name: text(&refused.name),
                addresses: addresses.chain(ranges).collect(),
                reason: text(&refused.reason),
            }
        })
    }
}

fn text(text: &str) -> Text<'_> {
    Text::Borrowed(text)
}

fn shown(value: &impl ToString) -> Text<'static> {
    Text::Owned(value.to_string())
}

fn all_shown<T: ToString>(values: &[T]) -> Vec<Text<'static>> {
    values.iter().map(shown).collect()
}

fn word(value: impl Word) -> Text<'static> {
    Text::Borrowed(value.word())
}

impl<'a> Workload<'a> {
    fn of(workload: &'a model::workload::Workload) -> Self {
        Self {
            workload_ips: all_shown(&workload.addresses),
            waypoint: workload.waypoint.as_deref().map(Gateway::of),
            network_gateway: workload.network_gateway.as_deref().map(Gateway::of),
            protocol: word(workload.reach),
            network_mode: word(match workload.host_network {
                true => NetworkMode::HostNetwork,
                false => NetworkMode::Standard,
            }),
            uid: text(&workload.uid),
            name: text(&workload.name),
            namespace: text(&workload.namespace),
            trust_domain: text(workload.identity.trust_domain()),
            service_account: text(workload.service_account()),
            network: text(&workload.network),
            workload_name: text(&workload.workload_name),
            workload_type: word(workload.kind),
            canonical_name: text(&workload.canonical_name),
            canonical_revision: text(&workload.canonical_revision),
            hostname: text(&workload.hostname),
            node: text(&workload.node),
            native_tunnel: workload.native_tunnel,
            application_tunnel: workload
                .application_tunnel
                .map(|tunnel| ApplicationTunnel { protocol: word(tunnel.protocol), port: tunnel.port }),
            authorization_policies: all_shown(&workload.policies),
            status: status(workload),
            cluster_id: text(&workload.cluster),
            locality: Locality {
                region: text(&workload.region),
                zone: text(&workload.zone),
                subzone: text(&workload.subzone),
            },
            services: {
                let memberships = workload.services.iter();
                let mut names: Vec<_> = memberships.map(|known| text(known.service.as_str())).collect();
                names.sort_unstable();
                Memberships::Names(names)
            },
            capacity: workload.capacity,
        }
    }
}

fn status(workload: &model::workload::Workload) -> Text<'static> {
    word(if workload.healthy { Status::Healthy } else { Status::Unhealthy })
}

impl Gateway<'_> {
    fn of(gateway: &model::service::GatewayAddress) -> Self {
        Self { destination: shown(&gateway.destination), hbone_mtls_port: gateway.hbone_port }
    }
}

impl<'a> Service<'a> {
    fn of(service: &'a model::service::Service, endpoints: &'a endpoints::Endpoints) -> Self {
        let weighted = service.weighted_waypoints.iter();
        let cidrs = service.cidr_vips.iter();
        Self {
            name: text(&service.name),
            namespace: text(&service.namespace),
            hostname: text(&service.hostname),
            vips: all_shown(&service.vips),
            cidr_vips: cidrs
                .map(|known| CidrVip { network: text(&known.network), cidr: shown(&known.range) })
                .collect(),
            ports: service.ports.iter().map(|port| (Port(port.port), port.target)).collect(),
            endpoints: Endpoints::Of(Some(service), endpoints),
            subject_alt_names: service.subject_alt_names.iter().map(|name| text(name)).collect(),
            waypoint: service.waypoint.as_deref().map(Gateway::of),
            weighted_waypoints: weighted
                .map(|known| WeightedWaypoint {
                    destination: Gateway::of(&known.gateway),
                    weight: known.weight,
                })
                .collect(),
            load_balancer: service.balancing.as_ref().map(|balancing| LoadBalancer {
                routing_preferences: balancing.scopes.iter().copied().map(word).collect(),
                mode: word(balancing.mode),
                health_policy: word(balancing.health),
            }),
            ip_families: service.ip_families.map(word),
            canonical: service.canonical,
            visibility: word(service.visibility),
        }
    }
}

impl<'a> Endpoint<'a> {
    /// `service` is the one it is behind, if that is known.
    pub(super) fn of(service: Option<&model::service::Service>, endpoint: &'a endpoints::Endpoint) -> Self {
        let targets = service.map(|known| &known.ports[..]).unwrap_or_default().iter();
        let targets = targets.map(|port| (port.port, port.target)).filter(|(_, target)| *target != 0);
        let own = endpoint.membership().map(|membership| &membership.ports[..]).unwrap_or_default();
        Self {
            workload_uid: text(&endpoint.workload().uid),
            // What the endpoint says itself counts.
            port: targets.chain(own.iter().copied()).map(|(port, target)| (Port(port), target)).collect(),
            status: status(endpoint.workload()),
        }
    }
}

impl<'a> Policy<'a> {
    fn of(policy: &'a model::policy::Policy) -> Self {
        let clause = |clause: &'a model::policy::Clause| clause.matches.iter().map(Match::of).collect();
        let rule = |rule: &'a model::policy::Rule| rule.clauses.iter().map(clause).collect();
        Self {
            name: text(&policy.key.name),
            namespace: text(&policy.key.namespace),
            scope: word(policy.scope),
            action: word(policy.action),
            rules: policy.rules.iter().map(rule).collect(),
            dry_run: policy.dry_run,
        }
    }
}

impl<'a> Match<'a> {
    fn of(known: &'a model::policy::Match) -> Self {
        let texts = |matches: &'a [model::policy::StringMatch]| matches.iter().map(StringMatch::of).collect();
        let accounts = |matches: &'a [model::policy::ServiceAccountMatch]| {
            let account = |known: &'a model::policy::ServiceAccountMatch| ServiceAccount {
                namespace: text(&known.namespace),
                service_account: text(&known.name),
            };
            matches.iter().map(account).collect()
        };
        Self {
            namespaces: texts(&known.namespaces),
            not_namespaces: texts(&known.not_namespaces),
            service_accounts: accounts(&known.service_accounts),
            not_service_accounts: accounts(&known.not_service_accounts),
            principals: texts(&known.principals),
            not_principals: texts(&known.not_principals),
            source_ips: all_shown(&known.source_ips),
            not_source_ips: all_shown(&known.not_source_ips),
            destination_ips: all_shown(&known.destination_ips),
            not_destination_ips: all_shown(&known.not_destination_ips),
            destination_ports: Cow::Borrowed(&known.destination_ports),
            not_destination_ports: Cow::Borrowed(&known.not_destination_ports),
        }
    }
}

impl<'a> StringMatch<'a> {
    fn of(known: &'a model::policy::StringMatch) -> Self {
        match known {
            model::policy::StringMatch::Exact(exact) => Self { exact: Some(text(exact)), ..Self::default() },
            model::policy::StringMatch::Prefix(prefix) => {
                Self { prefix: Some(text(prefix)), ..Self::default() }
            }
            model::policy::StringMatch::Suffix(suffix) => {
                Self { suffix: Some(text(suffix)), ..Self::default() }
            }
            model::policy::StringMatch::Presence => Self { presence: Some(Vec::new()), ..Self::default() },
        }
    }
}
