//! What is taken, how, and what is rejected, as tables.

use std::net::IpAddr;
use std::net::SocketAddr;

use proptest::prelude::*;
use ztunnel_mesh::model::policy::Action;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::service::BalanceScope;
use ztunnel_mesh::model::service::GatewayDestination;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::service::Visibility;
use ztunnel_mesh::model::workload::Reach;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::model::workload::WorkloadKind;
use ztunnel_mesh::policy::authorize::Inbound;
use ztunnel_mesh::policy::authorize::authorize;
use ztunnel_proto::Any;
use ztunnel_proto::security;
use ztunnel_proto::security::string_match::MatchType;
use ztunnel_proto::workload::address::Type;
use ztunnel_proto::workload::gateway_address::Destination;

use super::*;

fn encoded(message: impl Message) -> Bytes {
    message.encode_to_vec().into()
}

fn pod() -> wire::Workload {
    wire::Workload {
        uid: "c//Pod/shop/cart".into(),
        name: "cart".into(),
        namespace: "shop".into(),
        addresses: vec![vec![10, 0, 0, 1].into()],
        tunnel_protocol: 1,
        services: [("shop/cart.shop".to_owned(), ports(&[(80, 8080)]))].into(),
        ..wire::Workload::default()
    }
}

fn ports(ports: &[(u32, u32)]) -> wire::PortList {
    let port = |(service_port, target_port): &(u32, u32)| wire::Port {
        service_port: *service_port,
        target_port: *target_port,
        app_protocol: 0,
    };
    wire::PortList { ports: ports.iter().map(port).collect() }
}

fn svc() -> wire::Service {
    wire::Service {
        name: "cart".into(),
        namespace: "shop".into(),
        hostname: "cart.shop".into(),
        addresses: vec![net(&[10, 9, 0, 1], None)],
        ports: ports(&[(80, 8080)]).ports,
        ..wire::Service::default()
    }
}

fn net(bytes: &[u8], length: Option<u32>) -> wire::NetworkAddress {
    wire::NetworkAddress { network: "n".into(), address: bytes.to_vec().into(), length }
}

fn gateway(destination: Option<Destination>, hbone_mtls_port: u32) -> Option<wire::GatewayAddress> {
    Some(wire::GatewayAddress { destination, hbone_mtls_port })
}

fn by_name(namespace: &str, hostname: &str) -> Option<Destination> {
    let (namespace, hostname) = (namespace.to_owned(), hostname.to_owned());
    Some(Destination::Hostname(wire::NamespacedHostname { namespace, hostname }))
}

fn take(converter: &mut Converter, resource: Type) -> Result<MeshChange, Rejected> {
    converter.address(encoded(wire::Address { r#type: Some(resource) }))
}

fn workload(from: wire::Workload) -> Arc<Workload> {
    match take(&mut Converter::default(), Type::Workload(from)) {
        Ok(MeshChange::Workload(workload)) => workload,
        other => panic!("{other:?}"),
    }
}

fn service(from: wire::Service) -> Arc<Service> {
    match take(&mut Converter::default(), Type::Service(from)) {
        Ok(MeshChange::Service(service)) => service,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_workload_says_who_it_is_and_defaults_for_the_rest() {
    let cart = workload(pod());
    assert_eq!(cart.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/default");
    assert_eq!((&*cart.cluster, cart.capacity, cart.healthy), ("Kubernetes", 1, true));
    assert_eq!((cart.kind, cart.reach), (WorkloadKind::Deployment, Reach::Hbone));
    assert_eq!(cart.services[0].service.as_str(), "shop/cart.shop");
    assert_eq!(*cart.services[0].ports, [(80, 8080)]);
    assert_eq!(cart.waypoint, None);

    let mapped = IpAddr::from([10, 0, 0, 2]);
    let full = workload(wire::Workload {
        addresses: vec![vec![10, 0, 0, 2].into(), [&[0; 10][..], &[255, 255, 10, 0, 0, 2]].concat().into()],
        trust_domain: "td".into(),
        service_account: "a".into(),
        cluster_id: "c1".into(),
        status: 1,
        network_mode: 1,
        capacity: Some(0),
        workload_type: 2,
        waypoint: gateway(by_name("shop", "wp.shop"), 0),
        network_gateway: gateway(Some(Destination::Address(net(&[1, 2, 3, 4], None))), 15443),
        authorization_policies: vec!["shop/p".into()],
        ..pod()
    });
    assert_eq!(full.addresses, [mapped], "an IPv4 address is one, however it is written");
    assert_eq!(full.identity.as_str(), "spiffe://td/ns/shop/sa/a");
    assert_eq!((full.healthy, full.host_network, full.capacity), (false, true, 0));
    let waypoint = full.waypoint.clone().unwrap();
    assert_eq!((waypoint.destination.to_string().as_str(), waypoint.hbone_port), ("shop/wp.shop", 15008));
    let gateway = full.network_gateway.clone().unwrap();
    assert!(matches!(&gateway.destination, GatewayDestination::Address(it) if it.to_string() == "n/1.2.3.4"));
    assert_eq!(gateway.hbone_port, 15443);
    assert_eq!(full.policies[0].to_string(), "shop/p");
}

#[test]
fn a_service_has_addresses_and_ranges() {
    let cart = service(wire::Service {
        addresses: vec![
            net(&[10, 9, 0, 1], None),
            net(&[10, 9, 0, 1], Some(32)),
            net(&[10, 8, 1, 1], Some(16)),
            net(&[0xfd; 16], Some(128)),
        ],
        subject_alt_names: vec!["spiffe://td/ns/a/sa/b".into(), "cart.example".into()],
        load_balancing: Some(wire::LoadBalancing {
            routing_preference: vec![1, 6],
            mode: 2,
            health_policy: 1,
        }),
        ip_families: 1,
        visibility: 1,
        ..svc()
    });
    let vips: Vec<String> = cart.vips.iter().map(ToString::to_string).collect();
    assert_eq!(vips, ["n/10.9.0.1", "n/fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd"]);
    assert_eq!(cart.cidr_vips[0].range.to_string(), "10.8.0.0/16");
    assert_eq!((cart.subject_alt_names.len(), cart.identities.len()), (2, 1));
    let balancing = cart.balancing.clone().unwrap();
    assert_eq!(*balancing.scopes, [BalanceScope::Region, BalanceScope::Network]);
    assert_eq!(cart.visibility, Visibility::Namespace);
}

#[test]
fn what_is_wrong_is_rejected_with_a_reason() {
    let workloads = [
        (wire::Workload { uid: String::new(), ..pod() }, "the uid is missing"),
        (wire::Workload { addresses: vec![vec![1, 2, 3].into()], ..pod() }, "an address of 3 bytes"),
        (wire::Workload { addresses: vec![Bytes::new()], ..pod() }, "an address of 0 bytes"),
        (
            wire::Workload { tunnel_protocol: 2, ..pod() },
            "tunnel protocol LEGACY_ISTIO_MTLS is not supported",
        ),
        (
            wire::Workload { waypoint: gateway(None, 15008), ..pod() },
            "the destination of a gateway is missing",
        ),
        (
            wire::Workload { waypoint: gateway(by_name("a", ""), 1), ..pod() },
            "\"a/\" is not of the form namespace/name",
        ),
        (
            wire::Workload { network_gateway: gateway(by_name("a", "x"), 70_000), ..pod() },
            "70000 is not a port",
        ),
        (
            wire::Workload { services: [("cart".to_owned(), ports(&[]))].into(), ..pod() },
            "\"cart\" is not of the form namespace/name",
        ),
        (
            wire::Workload { services: [("a/b".to_owned(), ports(&[(0, 1)]))].into(), ..pod() },
            "0 is not a port",
        ),
        (
            wire::Workload { services: [("a/b".to_owned(), ports(&[(1, 65536)]))].into(), ..pod() },
            "65536 is not a port",
        ),
        (
            wire::Workload { authorization_policies: vec!["p".into()], ..pod() },
            "\"p\" is not of the form namespace/name",
        ),
        (
            wire::Workload { service_account: "a/b".into(), ..pod() },
            "\"a/b\" is not a namespace or service account name",
        ),
    ];
    for (from, reason) in workloads {
        let rejected = take(&mut Converter::default(), Type::Workload(from)).unwrap_err();
        assert_eq!(rejected.to_string(), reason);
    }
    let scopes = |scope| {
        Some(wire::LoadBalancing {
            routing_preference: vec![scope],
            mode: 2,
            ..wire::LoadBalancing::default()
        })
    };
    let services = [
        (wire::Service { hostname: String::new(), ..svc() }, "\"shop/\" is not of the form namespace/name"),
        (wire::Service { hostname: "a/b".into(), ..svc() }, "\"shop/a/b\" is not of the form namespace/name"),
        (
            wire::Service { addresses: vec![net(&[1, 2, 3, 4], Some(33))], ..svc() },
            "a prefix of 33 bits is longer than the address",
        ),
        (wire::Service { addresses: vec![net(&[1], None)], ..svc() }, "an address of 1 bytes"),
        (wire::Service { ports: ports(&[(65536, 1)]).ports, ..svc() }, "65536 is not a port"),
        (wire::Service { load_balancing: scopes(0), ..svc() }, "scope UNSPECIFIED_SCOPE is not supported"),
        (
            wire::Service {
                weighted_waypoints: vec![wire::WeightedWaypoint { destination: None, weight: 1 }],
                ..svc()
            },
            "the destination of a waypoint is missing",
        ),
    ];
    for (from, reason) in services {
        let rejected = take(&mut Converter::default(), Type::Service(from)).unwrap_err();
        assert_eq!(rejected.to_string(), reason);
    }
    let mut converter = Converter::default();
    assert_eq!(
        converter.address(encoded(wire::Address { r#type: None })).unwrap_err().to_string(),
        "the workload or service is missing"
    );
    assert!(matches!(converter.address(Bytes::from_static(&[0xff])), Err(Rejected::Decode(_))));
    let nameless = security::Authorization { namespace: "shop".into(), ..Default::default() };
    assert!(matches!(converter.authorization(encoded(nameless)), Err(Rejected::Name(_))));
}

#[test]
fn what_istiod_may_send_is_taken() {
    let taken = |from| match take(&mut Converter::default(), Type::Workload(from)) {
        Ok(MeshChange::Workload(it)) => it,
        other => panic!("{other:?}"),
    };
    let shouted = taken(wire::Workload { trust_domain: "Corp.Example".into(), ..pod() });
    assert!(shouted.identity.as_str().starts_with("spiffe://Corp.Example/ns/"), "{}", shouted.identity);
    let anywhere = taken(wire::Workload { network_gateway: gateway(by_name("", "gw.example"), 0), ..pod() });
    let gateway = anywhere.network_gateway.clone().unwrap();
    assert_eq!((gateway.destination.to_string(), gateway.hbone_port), ("/gw.example".to_owned(), 15008));
}

#[test]
fn what_is_rejected_is_known_to_be_there() {
    let refused = |resource, aliases: &[&str]| {
        let aliases: Vec<String> = aliases.iter().map(|alias| (*alias).to_owned()).collect();
        let why = Rejected::Missing("something");
        match Converter::default().refused_address("the/name", &aliases, resource, &why) {
            MeshChange::Refuse(refused) => refused,
            other => panic!("{other:?}"),
        }
    };
    let of = |it: Type| encoded(wire::Address { r#type: Some(it) });
    let addresses = |resource, aliases: &[&str]| {
        let refused = refused(resource, aliases);
        assert_eq!((&*refused.name, &*refused.reason), ("the/name", "something is missing"));
        let ranges = refused.ranges.iter().map(|it| format!("{}/{}", it.network, it.range));
        refused.addresses.iter().map(ToString::to_string).chain(ranges).collect::<Vec<_>>()
    };
    let workload = wire::Workload {
        addresses: vec![vec![10, 0, 0, 1].into(), vec![1, 2, 3].into()],
        network: "n".into(),
        ..wire::Workload::default()
    };
    assert_eq!(addresses(of(Type::Workload(workload.clone())), &[]), ["n/10.0.0.1"]);
    assert_eq!(
        addresses(of(Type::Workload(workload.clone())), &["n/10.0.0.1", "n/fd00::1", "x"]),
        ["n/10.0.0.1", "n/fd00::1"]
    );
    let of_node = wire::Workload { network_mode: 1, ..workload };
    assert_eq!(addresses(of(Type::Workload(of_node)), &[]), [""; 0]);
    let vips = vec![net(&[10, 9, 0, 1], None), net(&[10, 8, 0, 0], Some(16)), net(&[1], None)];
    let service = wire::Service { addresses: vips, ..wire::Service::default() };
    let network = net(&[], None).network;
    assert_eq!(
        addresses(of(Type::Service(service)), &[]),
        [format!("{network}/10.9.0.1"), format!("{network}/10.8.0.0/16")]
    );
    assert_eq!(addresses(Bytes::from_static(&[0xff]), &["/10.0.0.1"]), ["/10.0.0.1"]);
}

#[test]
fn what_is_newer_is_taken_with_care_and_counted() {
    let mut converter = Converter::default();
    let newer = wire::Workload {
        tunnel_protocol: 9,
        status: 9,
        network_mode: 9,
        workload_type: 9,
        application_tunnel: Some(wire::ApplicationTunnel { protocol: 9, port: 0 }),
        ..pod()
    };
    let Ok(MeshChange::Workload(it)) = take(&mut converter, Type::Workload(newer)) else { panic!() };
    assert_eq!((it.reach, it.healthy, it.kind), (Reach::Unknown, false, WorkloadKind::Deployment));
    assert_eq!(converter.unknown_values(), 5);
    let newer = wire::Service {
        load_balancing: Some(wire::LoadBalancing { routing_preference: vec![9], mode: 9, health_policy: 9 }),
        ip_families: 9,
        visibility: 9,
        ..svc()
    };
    let Ok(MeshChange::Service(it)) = take(&mut converter, Type::Service(newer)) else { panic!() };
    assert_eq!((it.visibility, it.ip_families), (Visibility::Public, None));
    assert_eq!(*it.balancing.clone().unwrap().scopes, [BalanceScope::Unknown]);
    assert_eq!(converter.unknown_values(), 10);
}

fn exactly(principal: &str) -> security::StringMatch {
    security::StringMatch { match_type: Some(MatchType::Exact(principal.to_owned())) }
}

/// What this version does not know in a match, in each of its fields.
fn not_understood() -> Vec<(&'static str, security::Match)> {
    let nothing = || security::Match::default();
    let text = || vec![security::StringMatch { match_type: None }];
    let range = || vec![security::Address { address: vec![1, 2].into(), length: 8 }];
    let extension = wire::Extension { name: "x".into(), config: Some(Any::default()) };
    vec![
        ("namespaces", security::Match { namespaces: text(), ..nothing() }),
        ("not_namespaces", security::Match { not_namespaces: text(), ..nothing() }),
        ("principals", security::Match { principals: text(), ..nothing() }),
        ("not_principals", security::Match { not_principals: text(), ..nothing() }),
        ("source_ips", security::Match { source_ips: range(), ..nothing() }),
        ("not_source_ips", security::Match { not_source_ips: range(), ..nothing() }),
        ("destination_ips", security::Match { destination_ips: range(), ..nothing() }),
        ("not_destination_ips", security::Match { not_destination_ips: range(), ..nothing() }),
        ("destination_ports", security::Match { destination_ports: vec![70_000], ..nothing() }),
        ("not_destination_ports", security::Match { not_destination_ports: vec![70_000], ..nothing() }),
        ("extensions", security::Match { extensions: vec![extension], ..nothing() }),
    ]
}

fn policy(action: i32, scope: i32, matches: Vec<security::Match>) -> (Policy, u64) {
    let rules = vec![security::Rule { clauses: vec![security::Clause { matches }] }];
    let (name, namespace) = ("p".to_owned(), "shop".to_owned());
    let from = security::Authorization { name, namespace, scope, action, rules, ..Default::default() };
    let mut converter = Converter::default();
    match converter.authorization(encoded(from)) {
        Ok(MeshChange::Policy(policy)) => ((*policy).clone(), converter.unknown_values()),
        other => panic!("{other:?}"),
    }
}

/// Whether that policy alone lets `spiffe://td/ns/shop/sa/good` in from 10.0.0.1 to port 80.
fn lets_in(policy: &Policy) -> bool {
    let identity = "spiffe://td/ns/shop/sa/good".parse().unwrap();
    let destination: SocketAddr = "10.0.0.2:80".parse().unwrap();
    let inbound = Inbound { identity: Some(&identity), source: "10.0.0.1".parse().unwrap(), destination };
    let policies = [Arc::new(policy.clone())];
    authorize(policies.iter(), None, &inbound).last().is_ok()
}

const ALLOW: i32 = 0;
const DENY: i32 = 1;

#[test]
fn a_match_that_is_not_understood_lets_nobody_in() {
    for (field, wanted) in not_understood() {
        let (allow, counted) = policy(ALLOW, 0, vec![wanted.clone()]);
        assert!(!lets_in(&allow) && counted > 0, "{field} of an allow policy");
        let (deny, counted) = policy(DENY, 0, vec![wanted.clone()]);
        assert!(!lets_in(&deny) && counted > 0, "{field} of a deny policy");
        // Beside it, what is understood keeps its meaning.
        let good = security::Match { principals: vec![exactly("td/ns/shop/sa/good")], ..Default::default() };
        let bad = security::Match { principals: vec![exactly("td/ns/shop/sa/bad")], ..Default::default() };
        assert!(lets_in(&policy(ALLOW, 0, vec![wanted.clone(), good]).0), "{field} beside what allows");
        if field != "principals" {
            let both = security::Match { principals: bad.principals.clone(), ..wanted.clone() };
            assert!(lets_in(&policy(DENY, 0, vec![both]).0), "{field} with what does not match");
        }
        assert!(lets_in(&policy(DENY, 0, vec![bad]).0));
    }
    assert!(!lets_in(
        &policy(7, 0, vec![security::Match { destination_ports: vec![80], ..Default::default() }]).0
    ));
    assert_eq!(policy(7, 0, vec![]).0.action, Action::Deny);
    assert_eq!(policy(ALLOW, 7, vec![]).0.scope, ztunnel_mesh::model::policy::Scope::Namespace);
}

#[test]
fn ranges_may_be_written_in_the_form_of_the_other_family() {
    let mapped = [&[0; 10][..], &[255, 255, 10, 0, 0, 0]].concat();
    let source_ips = vec![security::Address { address: mapped.into(), length: 104 }];
    let (deny, unknown) = policy(DENY, 0, vec![security::Match { source_ips, ..Default::default() }]);
    assert_eq!(unknown, 0);
    assert!(!lets_in(&deny));
}

#[test]
fn a_removal_has_only_a_name() {
    let mut converter = Converter::default();
    assert_eq!(converter.removed_address("x"), MeshChange::RemoveAddress("x".into()));
    assert!(matches!(converter.removed_authorization("a/b"), Some(MeshChange::RemovePolicy(_))));
    assert_eq!(converter.removed_authorization("a"), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_taken_or_rejected(
        mut good in prop_oneof![
            Just(encoded(wire::Address { r#type: Some(Type::Workload(pod())) })),
            Just(encoded(wire::Address { r#type: Some(Type::Service(svc())) })),
            Just(Bytes::new()),
        ].prop_map(|bytes| bytes.to_vec()),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        tail in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        for (at, byte) in changes {
            if !good.is_empty() {
                let at = at.index(good.len());
                good[at] = byte;
            }
        }
        good.extend(tail);
        let mut converter = Converter::default();
        let bytes = Bytes::from(good);
        let first = converter.address(bytes.clone());
        prop_assert_eq!(&first, &converter.address(bytes.clone()));
        let _taken_or_rejected = converter.authorization(bytes);
    }
}

/// With as many comparisons as there are pairs this would take minutes.
#[test]
fn an_address_counts_once_however_many_there_are() {
    let number = |n: u32| Bytes::from(n.to_be_bytes().to_vec());
    let numbers = || (0..100_000).chain(0..100_000);
    let expected: Vec<IpAddr> = (0..100_000_u32).map(|n| IpAddr::from(n.to_be_bytes())).collect();
    let pod = workload(wire::Workload { addresses: numbers().map(number).collect(), ..pod() });
    assert!(pod.addresses == expected);
    let vip = |n| wire::NetworkAddress { address: number(n), ..net(&[], None) };
    let svc = service(wire::Service { addresses: numbers().map(vip).collect(), ..svc() });
    assert!(svc.vips.iter().map(|vip| vip.ip).eq(expected));
}

#[test]
fn hosts_are_the_same_however_they_are_spelled() {
    let api = service(wire::Service { hostname: "API.Shop".into(), ..svc() });
    assert_eq!((api.key.as_str(), &*api.hostname), ("shop/api.shop", "api.shop"));
    let of = |hostname: &str| (hostname.to_owned(), ports(&[(80, 8080)]));
    let pod = workload(wire::Workload {
        hostname: "DB.example".into(),
        services: [of("shop/Api.shop"), of("shop/api.SHOP")].into(),
        waypoint: gateway(by_name("shop", "Way.Shop"), 0),
        ..pod()
    });
    let behind: Vec<_> = pod.services.iter().map(|it| it.service.as_str()).collect();
    assert_eq!((&*pod.hostname, &behind[..]), ("db.example", &["shop/api.shop"][..]));
    let waypoint = pod.waypoint.as_ref().map(|waypoint| waypoint.destination.to_string());
    assert_eq!(waypoint.as_deref(), Some("shop/way.shop"));
    // And so it goes, by the name that it came with.
    let mut mesh = ztunnel_mesh::store::index::Mesh::default();
    mesh.apply(MeshChange::Service(api));
    mesh.apply(Converter::default().removed_address("shop/API.Shop"));
    assert_eq!(mesh.services_len(), 0);
}
