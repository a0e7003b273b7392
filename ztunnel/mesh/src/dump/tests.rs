use std::collections::HashMap;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::dump::words::Word;
use crate::model;
use crate::model::addr::NetworkAddress;
use crate::model::addr::NetworkCidr;
use crate::model::identity::SpiffeId;
use crate::model::identity::TrustDomain;
use crate::model::policy::PolicyKey;
use crate::model::service::GatewayAddress;
use crate::model::service::GatewayDestination;
use crate::model::service::ServiceKey;
use crate::store::index::Mesh;

fn any_of<T: Word + std::fmt::Debug>() -> impl Strategy<Value = T> {
    select(T::ALL)
}

/// A name, or none where there need not be one.
fn name() -> impl Strategy<Value = Arc<str>> {
    select(vec!["a", "b", "c.example", "d-1"]).prop_map(Arc::from)
}

fn name_or_none() -> impl Strategy<Value = Arc<str>> {
    prop_oneof![Just(Arc::from("")), name()]
}

fn ip() -> impl Strategy<Value = std::net::IpAddr> {
    select(vec!["10.0.0.1", "10.0.0.2", "2001:db8::1"]).prop_map(|ip| ip.parse().unwrap())
}

fn range() -> impl Strategy<Value = ipnet::IpNet> {
    select(vec!["10.0.0.0/8", "10.1.1.1/32", "2001:db8::/32"]).prop_map(|range| range.parse().unwrap())
}

fn address() -> impl Strategy<Value = NetworkAddress> {
    (name_or_none(), ip()).prop_map(|(network, ip)| NetworkAddress { network, ip })
}

fn service_key() -> impl Strategy<Value = ServiceKey> {
    (name(), name()).prop_map(|(namespace, host)| ServiceKey::new(&namespace, &host))
}

fn policy_key() -> impl Strategy<Value = PolicyKey> {
    (name(), name()).prop_map(|(namespace, name)| PolicyKey { namespace, name })
}

fn gateway() -> impl Strategy<Value = Arc<GatewayAddress>> {
    let destination = prop_oneof![
        address().prop_map(GatewayDestination::Address),
        (name_or_none(), name())
            .prop_map(|(namespace, host)| GatewayDestination::Hostname(ServiceKey::new(&namespace, &host))),
    ];
    (destination, 1_u16..)
        .prop_map(|(destination, hbone_port)| Arc::new(GatewayAddress { destination, hbone_port }))
}

/// One target for each port, in their order.
fn ports(targets: std::ops::RangeFrom<u16>) -> impl Strategy<Value = Vec<(u16, u16)>> {
    proptest::collection::btree_map(1_u16..100, targets, 0..3).prop_map(|ports| ports.into_iter().collect())
}

prop_compose! {
    fn workload()(
        (uid, name, namespace, account) in (name(), name(), name(), name()),
        (node, cluster, network, hostname) in (name_or_none(), name_or_none(), name_or_none(), name_or_none()),
        (workload_name, canonical_name, canonical_revision) in (name_or_none(), name_or_none(), name_or_none()),
        (region, zone, subzone) in (name_or_none(), name_or_none(), name_or_none()),
        (kind, reach) in (any_of(), any_of()),
        (native_tunnel, healthy, host_network, capacity) in any::<(bool, bool, bool, u32)>(),
        tunnel in option::of((any_of(), option::of(1_u16..))),
        addresses in vec(ip(), 0..3),
        (waypoint, network_gateway) in (option::of(gateway()), option::of(gateway())),
        services in proptest::collection::btree_map(service_key().prop_map(|key| key.to_string()), ports(1..), 0..4),
        policies in vec(policy_key(), 0..3),
    ) -> Arc<model::workload::Workload> {
        let trust_domain = TrustDomain::new("Td.example").unwrap();
        let membership = |(key, ports): (String, Vec<_>)| model::workload::Membership {
            service: ServiceKey::parse(Arc::from(key)).unwrap(),
            ports: Arc::from(ports),
        };
        Arc::new(model::workload::Workload {
            identity: SpiffeId::new(&trust_domain, &namespace, &account).unwrap(),
            application_tunnel: tunnel
                .map(|(protocol, port)| model::workload::ApplicationTunnel { protocol, port }),
            services: services.into_iter().map(membership).collect(),
            uid, name, namespace, node, cluster, network, addresses, hostname, workload_name, kind,
            canonical_name, canonical_revision, region, zone, subzone, reach, native_tunnel, healthy, capacity,
            host_network, waypoint, network_gateway, policies,
        })
    }
}

prop_compose! {
    fn service()(
        (key, name) in (service_key(), name()),
        vips in vec(address(), 0..3),
        cidrs in vec((name_or_none(), range()), 0..2),
        ports in ports(0..),
        names in vec(select(vec!["spiffe://td/ns/a/sa/b", "a.example"]), 0..2),
        waypoint in option::of(gateway()),
        weighted in vec((gateway(), any::<u32>()), 0..3),
        balancing in option::of((any_of(), vec(any_of(), 0..3), any_of())),
        ip_families in option::of(any_of()),
        (canonical, visibility) in (any::<bool>(), any_of()),
    ) -> Arc<model::service::Service> {
        let cidrs = cidrs.into_iter();
        let weighted = weighted.into_iter();
        let port = |(port, target)| model::service::ServicePort { port, target };
        Arc::new(model::service::Service {
            namespace: Arc::from(key.namespace()),
            hostname: Arc::from(key.hostname()),
            cidr_vips: cidrs.map(|(network, range)| NetworkCidr { network, range }).collect(),
            ports: ports.into_iter().map(port).collect(),
            identities: names.iter().filter_map(|name| name.parse().ok()).collect(),
            subject_alt_names: names.into_iter().map(Arc::from).collect(),
            weighted_waypoints: weighted
                .map(|(gateway, weight)| model::service::WeightedWaypoint { gateway, weight })
                .collect(),
            balancing: balancing.map(|(mode, scopes, health)| model::service::LoadBalancing {
                mode,
                scopes: scopes.into_boxed_slice(),
                health,
            }),
            key, name, vips, waypoint, ip_families, canonical, visibility,
        })
    }
}

fn string_match() -> impl Strategy<Value = model::policy::StringMatch> {
    use model::policy::StringMatch;
    prop_oneof![
        name_or_none().prop_map(StringMatch::Exact),
        name_or_none().prop_map(StringMatch::Prefix),
        name_or_none().prop_map(StringMatch::Suffix),
        Just(StringMatch::Presence),
    ]
}

prop_compose! {
    fn matching()(
        texts in proptest::array::uniform4(vec(string_match(), 0..2)),
        accounts in proptest::array::uniform2(vec((name(), name()), 0..2)),
        ranges in proptest::array::uniform4(vec(range(), 0..2)),
        ports in proptest::array::uniform2(vec(any::<u16>(), 0..3)),
    ) -> model::policy::Match {
        let accounts = accounts.map(|all| {
            let account = |(namespace, name)| model::policy::ServiceAccountMatch { namespace, name };
            all.into_iter().map(account).collect()
        });
        let [namespaces, not_namespaces, principals, not_principals] = texts;
        let [service_accounts, not_service_accounts] = accounts;
        let [source_ips, not_source_ips, destination_ips, not_destination_ips] = ranges;
        let [destination_ports, not_destination_ports] = ports;
        model::policy::Match {
            namespaces, not_namespaces, principals, not_principals, service_accounts, not_service_accounts,
            source_ips, not_source_ips, destination_ips, not_destination_ips, destination_ports,
            not_destination_ports,
        }
    }
}

prop_compose! {
    fn policy()(
        (key, scope, action, dry_run) in (policy_key(), any_of(), any_of(), any::<bool>()),
        rules in vec(vec(vec(matching(), 0..2), 0..3), 0..3),
    ) -> Arc<model::policy::Policy> {
        let clause = |matches| model::policy::Clause { matches };
        let rule = |clauses: Vec<_>| model::policy::Rule { clauses: clauses.into_iter().map(clause).collect() };
        let rules = rules.into_iter().map(rule).collect();
        Arc::new(model::policy::Policy { key, scope, action, dry_run, rules })
    }
}

prop_compose! {
    fn mesh()(
        workloads in vec(workload(), 0..5),
        services in vec(service(), 0..4),
        policies in vec(policy(), 0..3),
    ) -> Mesh {
        Mesh::new(TrustDomain::default(), workloads, services, policies)
    }
}

fn written(mesh: &Mesh) -> String {
    serde_json::to_string(&Dump::of(mesh, mesh)).unwrap()
}

/// The mesh that a dump shows: the ports of a workload are where the dump has them, at the services.
fn shown(dump: &Dump<'_>) -> Mesh {
    let mut ports = HashMap::new();
    let known = dump.services.read().iter();
    let known =
        known.map(|service| (format!("{}/{}", service.namespace, service.hostname), &service.endpoints));
    let staged = dump.staged_services.read().map(|(name, endpoints)| (name.to_string(), endpoints));
    for (service, endpoints) in known.chain(staged) {
        for (uid, endpoint) in endpoints.read() {
            let own = endpoint.port.iter().map(|(port, target)| (port.0, *target));
            ports.insert((service.clone(), uid.to_string()), own.collect::<Arc<[_]>>());
        }
    }
    let workload = |workload: &Workload<'_>| {
        let mut read = workload.read().unwrap();
        for membership in &mut read.services {
            let key = (membership.service.to_string(), read.uid.to_string());
            membership.ports = ports.get(&key).cloned().expect("every service has it as an endpoint");
        }
        Arc::new(read)
    };
    Mesh::new(
        TrustDomain::default(),
        dump.workloads.read().iter().map(workload),
        dump.services.read().iter().map(|service| Arc::new(service.read().unwrap())),
        dump.policies.read().iter().map(|policy| Arc::new(policy.read().unwrap())),
    )
}

proptest! {
    #[test]
    fn what_a_dump_shows_of_a_mesh_is_read_back_as_it_was(mesh in mesh()) {
        let json = written(&mesh);
        let dump: Dump<'_> = serde_json::from_str(&json).unwrap();
        let again = shown(&dump);
        for workload in mesh.workloads() {
            let read = again.workload(&workload.uid).expect("it is there");
            // What of its ports is its own, and what its services', a dump does not say.
            let services = workload.services.clone();
            let read = model::workload::Workload { services, ..(**read).clone() };
            prop_assert_eq!(&read, &**workload);
            prop_assert_eq!(read.identity.as_str(), workload.identity.as_str());
        }
        for service in mesh.services() {
            prop_assert_eq!(Some(service), again.service(service.key.as_str()));
        }
        let all = |mesh: &Mesh| {
            let mut all: Vec<_> = mesh.policies().cloned().collect();
            all.sort_unstable_by(|one, other| one.key.cmp(&other.key));
            all
        };
        prop_assert_eq!(all(&again), all(&mesh));
        // Byte for byte, endpoints and their ports included.
        prop_assert_eq!(written(&again), json.clone());
        // As is a dump that is written as it was read.
        prop_assert_eq!(serde_json::to_string(&dump).unwrap(), json);
    }

    #[test]
    fn ports_that_are_written_at_a_workload_are_read_as_they_are(known in workload()) {
        let ports = |ports: &[(u16, u16)]| ports.iter().map(|&(port, target)| (Port(port), target)).collect();
        let services = known.services.iter();
        let services = services.map(|known| (Text::from(known.service.as_str()), ports(&known.ports)));
        let services = Memberships::Ports(services.collect());
        let mesh = Mesh::new(TrustDomain::default(), [Arc::clone(&known)], [], []);
        let entry = Workload { services, ..Workload::all(&mesh).next().unwrap() };
        let json = serde_json::to_string(&entry).unwrap();
        let read: Workload<'_> = serde_json::from_str(&json).unwrap();
        prop_assert_eq!(&read.read().unwrap(), &*known);
    }
}

#[test]
fn what_does_not_fit_is_named_by_its_path() {
    let read = |json: &str| {
        let json = format!("{{\"name\": \"a\", \"namespace\": \"b\", {json}}}");
        let workload: Workload<'_> = serde_json::from_str(&json).unwrap();
        let misfit = workload.read().unwrap_err();
        (misfit.path.join("/"), misfit.key.clone().unwrap_or_default(), misfit.to_string())
    };
    for (json, path, key, message) in [
        (r#""protocol": "GRE""#, "protocol", "", "unknown variant `GRE`, expected `HBONE` or `TCP`"),
        (r#""workloadIps": ["10.0.0.1", "x"]"#, "workloadIps/[1]", "", "\"x\" is not an IP address"),
        (r#""services": {"b/c": {"0": 1}}"#, "services/b/c", "0", "\"0\" is not a port"),
        (r#""services": {"c": {}}"#, "services", "c", "\"c\" is not <namespace>/<hostname>"),
        (
            r#""waypoint": {"destination": "c"}"#,
            "waypoint/destination",
            "",
            "\"c\" is not <network>/<IP address> or <namespace>/<hostname>",
        ),
    ] {
        assert_eq!(read(json), (path.to_owned(), key.to_owned(), message.to_owned()), "{json}");
    }
}

#[test]
fn a_dump_of_another_release_is_read() {
    let json =
        r#"{"workloads": [{"name": "a", "namespace": "b", "protocol": "NEW", "more": 1}], "more": {}}"#;
    let dump: Dump<'_> = serde_json::from_str(json).unwrap();
    assert_eq!(dump.workloads.read()[0].protocol, "NEW");
}

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
