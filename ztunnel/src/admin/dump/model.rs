//! Workloads, services and policies as views, in the order of their unique names.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use serde::Serialize;
use serde::Serializer;
use serde::ser::SerializeSeq;

use crate::api;
use crate::mesh::index::Mesh;
use crate::model::policy::Action;
use crate::model::policy::Match;
use crate::model::policy::Policy;
use crate::model::policy::Scope;
use crate::model::policy::ServiceAccountMatch;
use crate::model::policy::StringMatch;
use crate::model::service::Endpoint;
use crate::model::service::Service;
use crate::model::workload::Reach;
use crate::model::workload::Workload;

/// All workloads of a mesh, one view at a time.
pub struct Workloads<'a>(pub &'a Mesh);

impl Serialize for Workloads<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut services: HashMap<*const Workload, Vec<String>> = HashMap::new();
        for service in self.0.services() {
            for endpoint in &service.endpoints {
                let name = format!("{}/{}", service.namespace, service.hostname);
                services.entry(Arc::as_ptr(&endpoint.workload)).or_default().push(name);
            }
        }
        services.values_mut().for_each(|names| names.sort_unstable());
        let mut all: Vec<_> = self.0.workloads().collect();
        all.sort_unstable_by(|one, other| one.uid.cmp(&other.uid));
        let mut list = serializer.serialize_seq(Some(all.len()))?;
        for known in all {
            let services = services.get(&Arc::as_ptr(known)).map(Vec::as_slice).unwrap_or_default();
            list.serialize_element(&workload(known, services))?;
        }
        list.end()
    }
}

/// All services of a mesh, one view at a time.
pub struct Services<'a>(pub &'a Mesh);

impl Serialize for Services<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut all: Vec<_> = self.0.services().collect();
        all.sort_unstable_by_key(|service| (&service.namespace, &service.hostname));
        serializer.collect_seq(all.into_iter().map(|known| service(known)))
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

fn workload<'a>(workload: &'a Workload, services: &'a [String]) -> api::Workload<'a> {
    api::Workload {
        workload_ips: workload.addresses.iter().map(ToString::to_string).collect(),
        waypoint: None,
        network_gateway: None,
        protocol: match workload.reach {
            Reach::Hbone => "HBONE",
            Reach::Plain => "TCP",
        },
        network_mode: if workload.host_network { "HostNetwork" } else { "Standard" },
        uid: &workload.uid,
        name: &workload.name,
        namespace: &workload.namespace,
        trust_domain: workload.identity.trust_domain(),
        service_account: workload.service_account(),
        network: "",
        workload_name: &workload.workload_name,
        workload_type: workload.kind.as_str(),
        canonical_name: &workload.canonical_name,
        canonical_revision: &workload.canonical_revision,
        hostname: "",
        node: &workload.node,
        native_tunnel: false,
        application_tunnel: None,
        authorization_policies: workload.policies.iter().map(ToString::to_string).collect(),
        status: status(workload),
        cluster_id: &workload.cluster,
        locality: api::Locality { region: &workload.region, zone: &workload.zone, subzone: "" },
        services: Cow::Borrowed(services),
        capacity: 1,
    }
}

fn status(workload: &Workload) -> &'static str {
    if workload.healthy { "Healthy" } else { "Unhealthy" }
}

fn service(service: &Service) -> api::Service<'_> {
    api::Service {
        name: &service.name,
        namespace: &service.namespace,
        hostname: &service.hostname,
        vips: service.vips.iter().map(|ip| format!("/{ip}")).collect(),
        cidr_vips: Vec::new(),
        ports: service.ports.iter().map(|port| (port.port, port.target)).collect(),
        endpoints: service
            .endpoints
            .iter()
            .map(|known| (&*known.workload.uid, endpoint(service, known)))
            .collect(),
        subject_alt_names: Vec::new(),
        waypoint: None,
        weighted_waypoints: Vec::new(),
        load_balancer: None,
        ip_families: None,
        canonical: true,
        visibility: "Public",
    }
}

fn endpoint<'a>(service: &Service, endpoint: &'a Endpoint) -> api::Endpoint<'a> {
    let target = |port: u16| Some((port, service.target_port(endpoint, port)?));
    api::Endpoint {
        workload_uid: &endpoint.workload.uid,
        port: service.ports.iter().filter_map(|known| target(known.port)).collect(),
        status: status(&endpoint.workload),
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
        dry_run: false,
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
