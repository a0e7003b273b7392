//! The decision tree as a table, and what holds in every mesh.

use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use proptest::prelude::*;

use crate::mesh::index::Mesh;
use crate::model::addr::HBONE_PORT;
use crate::model::addr::HbonePeer;
use crate::model::addr::OriginalDst;
use crate::model::identity::SpiffeId;
use crate::model::identity::TrustDomain;
use crate::model::service::Endpoint;
use crate::model::service::Service;
use crate::model::service::ServicePort;
use crate::model::workload::Reach;
use crate::model::workload::Workload;
use crate::model::workload::WorkloadKind;
use crate::route::balance;
use crate::route::plan::NoRoute;
use crate::route::plan::Plan;
use crate::route::plan::RESERVED_PORTS;
use crate::route::plan::plan;

fn workload(name: &str, addresses: &[&str], reach: Reach) -> Workload {
    Workload {
        uid: name.into(),
        name: name.into(),
        namespace: "shop".into(),
        identity: SpiffeId::new(&TrustDomain::default(), "shop", name).unwrap(),
        node: "".into(),
        cluster: "".into(),
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        workload_name: name.into(),
        kind: WorkloadKind::Pod,
        canonical_name: name.into(),
        canonical_revision: "".into(),
        region: "".into(),
        zone: "".into(),
        reach,
        healthy: true,
        host_network: false,
        policies: Vec::new(),
    }
}

fn service(name: &str, vips: &[&str], endpoints: Vec<Endpoint>) -> Arc<Service> {
    Arc::new(Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: format!("{name}.shop").into(),
        vips: vips.iter().map(|ip| ip.parse().unwrap()).collect(),
        ports: vec![
            ServicePort { port: 80, target: 8080 },
            // Only those endpoints serve it that have a port of this name.
            ServicePort { port: 90, target: 0 },
        ],
        endpoints,
    })
}

fn endpoint(workload: &Arc<Workload>, ports: &[(u16, u16)]) -> Endpoint {
    Endpoint { workload: Arc::clone(workload), ports: ports.to_vec() }
}

fn client() -> Workload {
    workload("client", &["10.0.0.1", "fd00::1"], Reach::Hbone)
}

/// * `in` (10.0.0.2, fd00::2) is in the mesh and behind `both` (10.9.0.1, fd09::1) with port 90 at 9090;
/// * `out` (10.0.0.3) is outside the mesh and behind `both` and `out` (10.9.0.3);
/// * `sick` (10.0.0.4) is behind `sick` (10.9.0.4, and, oddly, 10.0.0.2);
/// * `nobody` (10.9.0.5) has no endpoints;
/// * `homeless` has no address, and is behind `homeless` (10.9.0.6).
fn mesh() -> Mesh {
    let inside = Arc::new(workload("in", &["10.0.0.2", "fd00::2"], Reach::Hbone));
    let outside = Arc::new(workload("out", &["10.0.0.3"], Reach::Plain));
    let sick = Arc::new(Workload { healthy: false, ..workload("sick", &["10.0.0.4"], Reach::Hbone) });
    let homeless = Arc::new(workload("homeless", &[], Reach::Hbone));
    let services = [
        service(
            "both",
            &["10.9.0.1", "fd09::1"],
            vec![endpoint(&inside, &[(90, 9090)]), endpoint(&outside, &[])],
        ),
        service("out", &["10.9.0.3"], vec![endpoint(&outside, &[])]),
        service("sick", &["10.9.0.4", "10.0.0.4"], vec![endpoint(&sick, &[])]),
        service("nobody", &["10.9.0.5"], vec![]),
        service("homeless", &["10.9.0.6"], vec![endpoint(&homeless, &[])]),
    ];
    let workloads = [Arc::new(client()), inside, outside, sick, homeless];
    Mesh::new(TrustDomain::default(), workloads, services, [])
}

/// One random number for each half of the endpoints.
const LOW: u64 = 0;
const HIGH: u64 = u64::MAX;

/// What is expected, in one line: `hbone <peer> <target> <workload> [service]`, `plain <to> [workload] [service]`
/// or the error.
fn outcome(mesh: &Mesh, to: &str, roll: u64) -> String {
    let name = |workload: Arc<Workload>| format!(" {}", workload.name);
    let of = |service: Option<Arc<Service>>| service.map_or(String::new(), |it| format!(" of {}", it.name));
    match plan(mesh, &client(), OriginalDst(to.parse().unwrap()), roll) {
        Ok(Plan::Hbone { peer: HbonePeer(peer), expect, target, destination, service }) => {
            assert_eq!(expect, std::slice::from_ref(&destination.identity));
            format!("hbone {peer} {target}{}{}", name(destination), of(service))
        }
        Ok(Plan::Plain { to, destination, service }) => {
            format!("plain {to}{}{}", destination.map_or(String::new(), name), of(service))
        }
        Err(error) => error.to_string(),
    }
}

#[test]
fn every_kind_of_destination() {
    let mesh = mesh();
    for (to, roll, expect) in [
        // Unknown to the mesh.
        ("192.0.2.1:443", LOW, "plain 192.0.2.1:443"),
        ("[2001:db8::1]:443", LOW, "plain [2001:db8::1]:443"),
        ("127.0.0.1:80", LOW, "plain 127.0.0.1:80"),
        // A workload by its address.
        ("10.0.0.2:81", LOW, "hbone 10.0.0.2:15008 10.0.0.2:81 in"),
        ("[fd00::2]:81", LOW, "hbone [fd00::2]:15008 [fd00::2]:81 in"),
        ("[::ffff:10.0.0.2]:81", LOW, "hbone 10.0.0.2:15008 10.0.0.2:81 in"),
        ("10.0.0.3:81", LOW, "plain 10.0.0.3:81 out"),
        // A service: balanced, with the port of the endpoint, in the family that was dialled if it can be.
        ("10.9.0.1:80", LOW, "hbone 10.0.0.2:15008 10.0.0.2:8080 in of both"),
        ("10.9.0.1:80", HIGH, "plain 10.0.0.3:8080 out of both"),
        ("[fd09::1]:80", LOW, "hbone [fd00::2]:15008 [fd00::2]:8080 in of both"),
        ("[fd09::1]:80", HIGH, "plain 10.0.0.3:8080 out of both"),
        // A port that only one endpoint serves.
        ("10.9.0.1:90", LOW, "hbone 10.0.0.2:15008 10.0.0.2:9090 in of both"),
        ("10.9.0.1:90", HIGH, "hbone 10.0.0.2:15008 10.0.0.2:9090 in of both"),
        // A service that cannot take it never lets it pass as it is.
        ("10.9.0.1:81", LOW, "service both.shop has no port 81"),
        (
            "10.9.0.3:90",
            LOW,
            "no healthy upstream: none of the 1 endpoints of out.shop is healthy and serves port 90",
        ),
        (
            "10.9.0.4:80",
            LOW,
            "no healthy upstream: none of the 1 endpoints of sick.shop is healthy and serves port 80",
        ),
        (
            "10.9.0.5:80",
            LOW,
            "no healthy upstream: none of the 0 endpoints of nobody.shop is healthy and serves port 80",
        ),
        (
            "10.9.0.6:80",
            LOW,
            "no healthy upstream: none of the 1 endpoints of homeless.shop is healthy and serves port 80",
        ),
        // A service comes before a workload of the same address.
        (
            "10.0.0.4:80",
            LOW,
            "no healthy upstream: none of the 1 endpoints of sick.shop is healthy and serves port 80",
        ),
        // The daemon's own ports, where the client has them, and elsewhere.
        (
            "127.0.0.1:15001",
            LOW,
            "attempted recursive call to ourselves: 127.0.0.1:15001 is a port of the proxy",
        ),
        ("[::1]:15006", LOW, "attempted recursive call to ourselves: [::1]:15006 is a port of the proxy"),
        (
            "10.0.0.1:15008",
            LOW,
            "attempted recursive call to ourselves: 10.0.0.1:15008 is a port of the proxy",
        ),
        ("0.0.0.0:15001", LOW, "attempted recursive call to ourselves: 0.0.0.0:15001 is a port of the proxy"),
        ("10.0.0.1:80", LOW, "hbone 10.0.0.1:15008 10.0.0.1:80 client"),
        ("10.0.0.3:15001", LOW, "plain 10.0.0.3:15001 out"),
        ("192.0.2.1:15008", LOW, "plain 192.0.2.1:15008"),
    ] {
        assert_eq!(outcome(&mesh, to, roll), expect, "{to} with roll {roll}");
    }
}

#[test]
fn an_endpoint_in_its_nodes_network_is_reached_through_its_service_only() {
    let node = Arc::new(Workload { host_network: true, ..workload("node", &["10.0.0.7"], Reach::Plain) });
    let service = service("node", &["10.9.0.7"], vec![endpoint(&node, &[])]);
    let mesh = Mesh::new(TrustDomain::default(), [node], [service], []);
    assert_eq!(outcome(&mesh, "10.9.0.7:80", LOW), "plain 10.0.0.7:8080 node of node");
    assert_eq!(outcome(&mesh, "10.0.0.7:80", LOW), "plain 10.0.0.7:80");
}

#[test]
fn every_candidate_has_the_same_share_and_no_other_has_any() {
    const ROLLS: u64 = 3_000;
    let names = ["a", "b", "c", "sick", "homeless"];
    let endpoints = names.map(|name| {
        let addresses: &[&str] = if name == "homeless" { &[] } else { &["10.0.0.9"] };
        let healthy = name != "sick";
        endpoint(&Arc::new(Workload { healthy, ..workload(name, addresses, Reach::Hbone) }), &[])
    });
    let service = service("it", &[], endpoints.into());
    let picks: Vec<_> = (0..ROLLS)
        .map(|roll| {
            balance::pick(&service, 80, roll * (u64::MAX / ROLLS)).unwrap().0.workload.name.to_string()
        })
        .collect();
    let shares = names.map(|name| picks.iter().filter(|pick| *pick == name).count());
    assert_eq!(shares[3..], [0, 0]);
    assert!(shares[..3].iter().all(|share| share.abs_diff(ROLLS as usize / 3) <= 1), "{shares:?}");
}

#[test]
fn the_address_that_was_dialled_comes_before_its_family_and_the_family_before_the_rest() {
    let address = |own: &[&str], wanted: &str| {
        balance::address(&workload("it", own, Reach::Hbone), wanted.parse().unwrap()).map(|ip| ip.to_string())
    };
    let both = &["10.0.0.1", "fd00::1", "10.0.0.2", "fd00::2"];
    assert_eq!(address(both, "10.0.0.2").unwrap(), "10.0.0.2");
    assert_eq!(address(both, "10.9.9.9").unwrap(), "10.0.0.1");
    assert_eq!(address(both, "fd09::9").unwrap(), "fd00::1");
    assert_eq!(address(&["10.0.0.1"], "fd09::9").unwrap(), "10.0.0.1");
    assert_eq!(address(&[], "10.0.0.1"), None);
}

/// Of few addresses, so that workloads, services and destinations meet.
fn some_ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0..6u8).prop_map(|last| IpAddr::from([10, 0, 0, last])),
        (0..3u16).prop_map(|last| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last])),
    ]
}

fn some_workload() -> impl Strategy<Value = Arc<Workload>> {
    let name = prop_oneof![Just("a"), Just("b"), Just("c"), Just("d")];
    let addresses = prop::collection::vec(some_ip(), 0..3);
    let reach = prop_oneof![3 => Just(Reach::Hbone), 1 => Just(Reach::Plain)];
    (name, addresses, reach, any::<bool>(), any::<bool>()).prop_map(
        |(name, addresses, reach, healthy, host_network)| {
            Arc::new(Workload { addresses, healthy, host_network, ..workload(name, &[], reach) })
        },
    )
}

fn some_mesh() -> impl Strategy<Value = Mesh> {
    let workloads = prop::collection::vec(some_workload(), 1..5);
    let vips = prop::collection::vec(some_ip(), 0..3);
    let member = (any::<prop::sample::Index>(), prop::option::of(1..9u16));
    let services = prop::collection::vec((vips, prop::collection::vec(member, 0..4)), 0..3);
    (workloads, services).prop_map(|(workloads, services)| {
        let services = services.into_iter().map(|(vips, members)| {
            let member = |(index, own): (prop::sample::Index, Option<u16>)| {
                let ports: Vec<_> = own.map(|to| (90, to)).into_iter().collect();
                endpoint(index.get(&workloads), &ports)
            };
            let members = members.into_iter().map(member).collect();
            Arc::new(Service { vips, ..service("s", &[], members).as_ref().clone() })
        });
        let services: Vec<_> = services.collect();
        Mesh::new(TrustDomain::default(), workloads, services, [])
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_holds_in_every_mesh(
        mesh in some_mesh(),
        ip in prop_oneof![4 => some_ip(), 1 => Just(IpAddr::from([127, 0, 0, 1]))],
        port in prop_oneof![Just(80), Just(90), Just(81), Just(15001), Just(HBONE_PORT)],
        roll in any::<u64>(),
    ) {
        let wanted = SocketAddr::new(ip, port);
        let planned = plan(&mesh, &client(), OriginalDst(wanted), roll);
        prop_assert_eq!(&planned, &plan(&mesh, &client(), OriginalDst(wanted), roll), "the plan is a function");

        let service_dialled = mesh.service_at(ip);
        match planned {
            Ok(Plan::Hbone { peer, expect, target, destination, service }) => {
                prop_assert_eq!(peer.0, SocketAddr::new(target.ip(), HBONE_PORT));
                prop_assert_eq!(expect, vec![destination.identity.clone()]);
                prop_assert_eq!(destination.reach, Reach::Hbone);
                prop_assert!(destination.addresses.contains(&target.ip()));
                prop_assert_eq!(service.as_ref(), service_dialled);
            }
            Ok(Plan::Plain { to, destination, service }) => {
                prop_assert!(destination.as_ref().is_none_or(|it| it.reach == Reach::Plain), "in the clear");
                prop_assert_eq!(service.as_ref(), service_dialled, "passed a service by");
                if destination.is_none() {
                    prop_assert_eq!(to, wanted);
                    prop_assert!(mesh.workload_at(ip).is_none());
                }
            }
            Err(NoRoute::SelfCall(to)) => {
                prop_assert!(RESERVED_PORTS.contains(&to.port()));
                prop_assert!(to.ip().is_loopback() || client().addresses.contains(&to.ip()));
            }
            Err(NoRoute::NoServicePort { .. } | NoRoute::NoHealthyUpstream { .. }) => {
                let service = service_dialled.expect("only a service can have nobody");
                let usable = service.endpoints.iter().any(|endpoint| {
                    endpoint.workload.healthy
                        && !endpoint.workload.addresses.is_empty()
                        && service.target_port(endpoint, port).is_some()
                });
                prop_assert!(!usable, "an endpoint could have taken it");
            }
        }
    }
}
