//! The decision tree as a table, and what holds in every mesh.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use proptest::prelude::*;
use rand::RngExt;
use rand::SeedableRng;

use crate::model::addr::HBONE_PORT;
use crate::model::addr::HbonePeer;
use crate::model::addr::NetworkAddress;
use crate::model::addr::NetworkCidr;
use crate::model::addr::OriginalDst;
use crate::model::identity::TrustDomain;
use crate::model::refused::Refused;
use crate::model::service::BalanceMode;
use crate::model::service::BalanceScope;
use crate::model::service::GatewayAddress;
use crate::model::service::GatewayDestination;
use crate::model::service::HealthPolicy;
use crate::model::service::IpFamilies;
use crate::model::service::LoadBalancing;
use crate::model::service::Service;
use crate::model::service::ServicePort;
use crate::model::service::WeightedWaypoint;
use crate::model::workload::Membership;
use crate::model::workload::Reach;
use crate::model::workload::Workload;
use crate::route::balance;
use crate::route::balance::Purpose;
use crate::route::balance::Request;
use crate::route::plan::ByName;
use crate::route::plan::NoRoute;
use crate::route::plan::Plan;
use crate::route::plan::Planned;
use crate::route::plan::RESERVED_PORTS;
use crate::route::plan::plan;
use crate::store::MeshChange;
use crate::store::index::Mesh;

fn workload(name: &str, addresses: &[&str], reach: Reach) -> Workload {
    let addresses = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
    Workload { addresses, reach, ..Workload::sample("shop", name) }
}

/// `workload` behind the services of these names, with its own ports for theirs.
fn behind(workload: Workload, services: &[(&str, &[(u16, u16)])]) -> Arc<Workload> {
    let membership = |(name, ports): &(&str, &[(u16, u16)])| Membership {
        service: Service::sample("shop", name).key,
        ports: Arc::from(*ports),
    };
    Arc::new(Workload { services: services.iter().map(membership).collect(), ..workload })
}

fn vip(ip: &str) -> NetworkAddress {
    NetworkAddress { network: Arc::default(), ip: ip.parse().unwrap() }
}

fn service(name: &str, vips: &[&str]) -> Service {
    Service {
        vips: vips.iter().map(|ip| vip(ip)).collect(),
        ports: vec![
            ServicePort { port: 80, target: 8080 },
            // Only those endpoints serve it that have a port of this name.
            ServicePort { port: 90, target: 0 },
        ],
        ..Service::sample("shop", name)
    }
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
    let inside = behind(workload("in", &["10.0.0.2", "fd00::2"], Reach::Hbone), &[("both", &[(90, 9090)])]);
    let outside = behind(workload("out", &["10.0.0.3"], Reach::Plain), &[("both", &[]), ("out", &[])]);
    let sick = Workload { healthy: false, ..workload("sick", &["10.0.0.4"], Reach::Hbone) };
    let homeless = workload("homeless", &[], Reach::Hbone);
    let services = [
        service("both", &["10.9.0.1", "fd09::1"]),
        service("out", &["10.9.0.3"]),
        service("sick", &["10.9.0.4", "10.0.0.4"]),
        service("nobody", &["10.9.0.5"]),
        service("homeless", &["10.9.0.6"]),
    ];
    let sick = behind(sick, &[("sick", &[])]);
    let homeless = behind(homeless, &[("homeless", &[])]);
    let workloads = [Arc::new(client()), inside, outside, sick, homeless];
    Mesh::new(TrustDomain::default(), workloads, services.map(Arc::new), [])
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
        Ok(Planned::Known(Plan::Hbone { peer: HbonePeer(peer), expect, target, destination, service })) => {
            assert_eq!(expect, std::slice::from_ref(&destination.identity));
            format!("hbone {peer} {target}{}{}", name(destination), of(service))
        }
        Ok(Planned::Known(Plan::DoubleHbone {
            gateway: HbonePeer(gateway),
            expect,
            service,
            port,
            destination,
        })) => {
            let expect: Vec<_> = expect.iter().map(|id| id.service_account()).collect();
            format!(
                "double hbone {gateway} ({}) {}:{port}{}",
                expect.join(" "),
                service.hostname,
                name(destination)
            )
        }
        Ok(Planned::ByName(ByName { destination, port, service })) => {
            format!(
                "named {}:{port}{}{}",
                destination.hostname,
                name(Arc::clone(&destination)),
                of(Some(service))
            )
        }
        Ok(Planned::Known(Plan::Plain { to, destination, service })) => {
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
    let node = Workload { host_network: true, ..workload("node", &["10.0.0.7"], Reach::Plain) };
    let service = Arc::new(service("node", &["10.9.0.7"]));
    let mesh = Mesh::new(TrustDomain::default(), [behind(node, &[("node", &[])])], [service], []);
    assert_eq!(outcome(&mesh, "10.9.0.7:80", LOW), "plain 10.0.0.7:8080 node of node");
    assert_eq!(outcome(&mesh, "10.0.0.7:80", LOW), "plain 10.0.0.7:80");
}

#[test]
fn a_waypoint_goes_on_to_what_it_is_in_front_of_and_not_to_itself() {
    let gateway = |ip: &str| {
        Arc::new(GatewayAddress { destination: GatewayDestination::Address(vip(ip)), hbone_port: 15008 })
    };
    let guarded = |name: &str, ip: &str, by: &str| {
        Arc::new(Service { waypoint: Some(gateway(by)), ..service(name, &[ip]) })
    };
    let services = [
        guarded("own", "10.9.0.1", "10.0.0.1"),
        guarded("itself", "10.9.0.2", "10.0.0.1"),
        guarded("other", "10.9.0.3", "10.0.0.9"),
    ];
    let workloads = [
        behind(client(), &[("itself", &[])]),
        behind(workload("in", &["10.0.0.2"], Reach::Hbone), &[("own", &[]), ("other", &[])]),
        behind(workload("way", &["10.0.0.9"], Reach::Hbone), &[]),
    ];
    let mesh = Mesh::new(TrustDomain::default(), workloads, services, []);
    for (to, expect) in [
        ("10.9.0.1:80", "hbone 10.0.0.2:15008 10.0.0.2:8080 in of own"),
        ("10.9.0.2:80", "hbone 10.0.0.1:15008 10.0.0.1:8080 client of itself"),
        ("10.9.0.3:80", "hbone 10.0.0.9:15008 10.9.0.3:80 way of other"),
    ] {
        assert_eq!(outcome(&mesh, to, LOW), expect, "{to}");
    }
}

/// In the network `west`: the gateway `gate` (10.0.0.9), `far` without an address here, and the waypoint `way`.
fn two_networks() -> Mesh {
    let gateway = |ip: &str| {
        let ip = ip.parse().unwrap();
        let destination = GatewayDestination::Address(NetworkAddress { network: "west".into(), ip });
        Arc::new(GatewayAddress { destination, hbone_port: 15443 })
    };
    let named = |name: &str| {
        let destination = GatewayDestination::Hostname(Service::sample("shop", name).key);
        Arc::new(GatewayAddress { destination, hbone_port: 80 })
    };
    let west = |name: &str, addresses: &[&str], through: Option<Arc<GatewayAddress>>| Workload {
        network: "west".into(),
        network_gateway: through,
        ..workload(name, addresses, Reach::Hbone)
    };
    let through = |name: &str, through| west(name, &[], Some(through));
    let workloads = [
        behind(west("gate", &["10.0.0.9"], None), &[("gates", &[(80, 15008)])]),
        behind(
            through("far", gateway("10.0.0.9")),
            &[("far", &[]), ("unsure", &[]), ("mixed", &[]), ("*", &[]), ("near_first", &[])],
        ),
        behind(workload("near", &["10.0.0.2"], Reach::Hbone), &[("mixed", &[]), ("near_first", &[])]),
        behind(west("lost", &["10.0.0.3"], None), &[("lost", &[])]),
        behind(through("misled", gateway("10.0.0.7")), &[("misled", &[])]),
        behind(through("by_name", named("gates")), &[("by_name", &[])]),
        behind(west("way", &["10.0.0.8"], Some(gateway("10.0.0.9"))), &[]),
        Arc::new(Workload {
            waypoint: Some(gateway("10.0.0.8")),
            ..workload("direct", &["10.0.0.4"], Reach::Hbone)
        }),
    ];
    let identities =
        || vec![Workload::sample("shop", "far").identity, Workload::sample("shop", "far2").identity];
    let known = |name: &str, vip: &str| Service { identities: identities(), ..service(name, &[vip]) };
    let near_first = LoadBalancing {
        mode: BalanceMode::Failover,
        scopes: Box::new([BalanceScope::Network]),
        health: HealthPolicy::OnlyHealthy,
    };
    let services = [
        known("far", "10.9.1.1"),
        service("unsure", &["10.9.1.2"]),
        known("lost", "10.9.1.3"),
        known("misled", "10.9.1.4"),
        known("mixed", "10.9.1.5"),
        known("by_name", "10.9.1.6"),
        Service { waypoint: Some(gateway("10.0.0.8")), ..known("guarded", "10.9.1.7") },
        Service { waypoint: Some(gateway("10.0.0.8")), ..service("unsure_guarded", &["10.9.1.8"]) },
        known("*", "10.9.1.9"),
        Service { balancing: Some(near_first), ..known("near_first", "10.9.1.10") },
        known("gates", "10.9.1.11"),
    ];
    Mesh::new(TrustDomain::default(), workloads, services.map(Arc::new), [])
}

#[test]
fn another_network_is_reached_through_its_gateway_by_name() {
    let mesh = two_networks();
    for (to, roll, expect) in [
        ("10.9.1.1:80", LOW, "double hbone 10.0.0.9:15443 (gate) far.shop:80 far"),
        ("10.9.1.1:81", LOW, "service far.shop has no port 81"),
        ("10.9.1.2:80", LOW, "no identity is known that unsure.shop may have in another network"),
        ("10.9.1.3:80", LOW, "lost.shop is in another network, which cannot be reached"),
        ("10.9.1.4:80", LOW, "unknown network gateway west/10.0.0.7"),
        ("10.9.1.5:80", LOW, "double hbone 10.0.0.9:15443 (gate) mixed.shop:80 far"),
        // The gateway is a service: one of those behind it, at the port of its own, with what the service may present.
        ("10.9.1.6:80", LOW, "double hbone 10.0.0.9:15008 (gate far far2) by_name.shop:80 by_name"),
        // A waypoint there.
        ("10.9.1.7:80", LOW, "double hbone 10.0.0.9:15443 (gate) guarded.shop:80 way"),
        ("10.9.1.8:80", LOW, "no identity is known that unsure_guarded.shop may have in another network"),
        ("10.0.0.4:80", LOW, "west/10.0.0.8 is in another network, which cannot be reached"),
        ("10.9.1.9:80", LOW, "\"*.shop\" is no name to ask another network for"),
    ] {
        assert_eq!(outcome(&mesh, to, roll), expect, "{to} with roll {roll}");
    }
    // With a service in both networks either may be chosen, or the own comes first where that is wanted.
    let service = mesh.service_at("", "10.9.1.5".parse().unwrap(), None).unwrap();
    let chosen = |to: &str, roll| plan(&mesh, &client(), OriginalDst(to.parse().unwrap()), roll).unwrap();
    assert!(matches!(chosen("10.9.1.5:80", LOW), Planned::Known(Plan::DoubleHbone { .. })));
    let Planned::Known(Plan::Hbone { expect, .. }) = chosen("10.9.1.5:80", HIGH) else {
        panic!("it goes elsewhere")
    };
    assert_eq!(expect.len(), 1 + service.identities.len());
    for roll in [LOW, HIGH] {
        assert!(
            matches!(chosen("10.9.1.10:80", roll), Planned::Known(Plan::Hbone { .. })),
            "with roll {roll}"
        );
    }
}

/// How often each of `workloads` is picked for the port 80 of `service`, in 1,000 random picks.
fn shares(workloads: &[(&str, Workload)], service: Service) -> Vec<(String, usize)> {
    const ROLLS: usize = 20_000;
    let members = workloads.iter().map(|(name, workload)| {
        let uid = Arc::from(*name);
        behind(Workload { uid, ..workload.clone() }, &[("it", &[])])
    });
    let mesh = Mesh::new(TrustDomain::default(), members, [Arc::new(service.clone())], []);
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut rng = rand::rngs::SmallRng::seed_from_u64(7);
    for _ in 0..ROLLS {
        let (source, wanted) = (&client(), "10.9.0.1".parse().unwrap());
        let request = Request { source, service: &service, port: 80, wanted, purpose: Purpose::Service };
        let picked = balance::pick(mesh.endpoints(&service.key), &request, rng.random());
        if let Some(picked) = picked {
            *counts.entry(picked.workload.uid.to_string()).or_default() += 1;
        }
    }
    counts.into_iter().map(|(name, count)| (name, count * 1000 / ROLLS)).collect()
}

fn assert_shares(workloads: &[(&str, Workload)], service: Service, expect: &[(&str, usize)]) {
    let shares = shares(workloads, service);
    let near = shares.len() == expect.len()
        && shares.iter().zip(expect).all(|(is, wants)| is.0 == wants.0 && is.1.abs_diff(wants.1) <= 15);
    assert!(near, "{shares:?} instead of {expect:?}");
}

#[test]
fn what_was_rejected_is_dialled_in_no_way() {
    let refused = |name: &str, addresses: &[&str], ranges: &[&str]| {
        let cidr = |range: &&str| NetworkCidr { network: Arc::default(), range: range.parse().unwrap() };
        MeshChange::Refuse(Arc::new(Refused {
            name: name.into(),
            addresses: addresses.iter().map(|ip| vip(ip)).collect(),
            ranges: ranges.iter().map(cidr).collect(),
            reason: "it is odd".into(),
        }))
    };
    let mut mesh = mesh();
    mesh.apply(refused(
        "shop/odd.shop",
        &["10.9.0.99", "10.0.0.3", "10.9.0.1"],
        &["10.7.0.0/16", "10.0.0.0/8"],
    ));
    mesh.apply(refused("pod", &["10.0.0.50"], &[]));
    let odd =
        "shop/odd.shop is not dialled, as it was rejected when it came from the control plane: it is odd";
    let pod = "pod is not dialled, as it was rejected when it came from the control plane: it is odd";
    let check = |mesh: &Mesh, table: &[(&str, &str)]| {
        for (to, expect) in table {
            assert_eq!(outcome(mesh, to, LOW), *expect, "{to}");
        }
    };
    check(
        &mesh,
        &[
            ("10.9.0.99:80", odd),
            ("10.0.0.50:81", pod),
            // Whose it is now, nobody knows.
            ("10.0.0.3:81", odd),
            ("10.7.1.1:80", odd),
            ("10.0.0.77:80", odd),
            // What is understood and has the address too, or is somebody of the range.
            ("10.9.0.1:80", "hbone 10.0.0.2:15008 10.0.0.2:8080 in of both"),
            ("10.0.0.2:81", "hbone 10.0.0.2:15008 10.0.0.2:81 in"),
            ("192.0.2.1:443", "plain 192.0.2.1:443"),
        ],
    );
    let other = Workload { network: "n".into(), ..client() };
    let to = OriginalDst("10.0.0.50:80".parse().unwrap());
    assert!(
        matches!(plan(&mesh, &other, to, LOW), Ok(Planned::Known(Plan::Plain { .. }))),
        "another network"
    );
    // A good version, and the end.
    mesh.apply(MeshChange::Workload(Arc::new(Workload {
        uid: "pod".into(),
        ..workload("pod", &["10.0.0.50"], Reach::Hbone)
    })));
    mesh.apply(MeshChange::RemoveAddress("shop/odd.shop".into()));
    check(
        &mesh,
        &[
            ("10.9.0.99:80", "plain 10.9.0.99:80"),
            ("10.0.0.50:81", "hbone 10.0.0.50:15008 10.0.0.50:81 pod"),
            ("10.0.0.3:81", "plain 10.0.0.3:81 out"),
            ("10.7.1.1:80", "plain 10.7.1.1:80"),
        ],
    );
    assert_eq!(mesh.refused().len(), 0);
}

#[test]
fn what_has_no_weight_gets_nothing_also_where_nobody_has_any() {
    let idle = |name: &str, ip: &str| Workload { capacity: 0, ..workload(name, &[ip], Reach::Hbone) };
    let named = |name: &str| GatewayDestination::Hostname(Service::sample("shop", name).key);
    let at = |ip: &str| GatewayDestination::Address(vip(ip));
    let gateway = |destination| Arc::new(GatewayAddress { destination, hbone_port: 15008 });
    let weighted = |gateways: &[(GatewayDestination, u32)]| {
        let weighted = gateways.iter().cloned();
        weighted.map(|(to, weight)| WeightedWaypoint { gateway: gateway(to), weight }).collect::<Vec<_>>()
    };
    let way = behind(workload("way", &["10.0.0.8"], Reach::Hbone), &[("way", &[(15008, 15008)])]);
    let workloads = [
        behind(
            workload("served", &["10.0.0.2"], Reach::Hbone),
            &[("none", &[]), ("kept", &[]), ("moved", &[])],
        ),
        behind(idle("idle", "10.0.0.3"), &[("idle", &[])]),
        behind(idle("idle-way", "10.0.0.9"), &[("idle_way", &[(15008, 15008)])]),
        way,
    ];
    let services = [
        service("idle", &["10.9.0.1"]),
        Service { weighted_waypoints: weighted(&[(named("way"), 0)]), ..service("none", &["10.9.0.2"]) },
        // The one waypoint of old does not stand in for several without weight.
        Service {
            waypoint: Some(gateway(named("way"))),
            weighted_waypoints: weighted(&[(named("way"), 0), (named("idle_way"), 0)]),
            ..service("kept", &["10.9.0.3"])
        },
        Service {
            weighted_waypoints: weighted(&[(named("idle_way"), 0), (named("way"), 1)]),
            ..service("moved", &["10.9.0.4"])
        },
        Service { waypoint: Some(gateway(named("idle_way"))), ..service("behind idle", &["10.9.0.5"]) },
        Service { waypoint: Some(gateway(at("10.0.0.9"))), ..service("at idle", &["10.9.0.6"]) },
        service("way", &[]),
        service("idle_way", &[]),
    ];
    let mesh = Mesh::new(TrustDomain::default(), workloads, services.map(Arc::new), []);
    for (to, expect) in [
        (
            "10.9.0.1:80",
            "no healthy upstream: none of the 1 endpoints of idle.shop is healthy and serves port 80",
        ),
        ("10.9.0.2:80", "none of the waypoints of none.shop has a weight"),
        ("10.9.0.3:80", "none of the waypoints of kept.shop has a weight"),
        ("10.9.0.4:80", "hbone 10.0.0.8:15008 10.9.0.4:80 way of moved"),
        ("10.9.0.5:80", "unknown waypoint shop/idle_way.shop"),
        ("10.9.0.6:80", "unknown waypoint /10.0.0.9"),
        // Weights are for choosing: by its own address it is reached.
        ("10.0.0.3:80", "hbone 10.0.0.3:15008 10.0.0.3:80 idle"),
    ] {
        for roll in [LOW, HIGH] {
            assert_eq!(outcome(&mesh, to, roll), expect, "{to} with roll {roll}");
        }
    }
}

#[test]
fn the_share_of_a_candidate_is_its_capacity_and_no_other_has_any() {
    let it = || workload("it", &["10.0.0.9"], Reach::Hbone);
    let sick = || Workload { healthy: false, ..it() };
    let none = || Workload { capacity: 0, ..it() };
    let homeless = || workload("it", &[], Reach::Hbone);
    let away = || Workload { network: "away".into(), ..it() };
    let no_v4 = || workload("it", &["fd00::9"], Reach::Hbone);
    let thrice = || Workload { capacity: 3, ..it() };
    let all = [
        ("a", it()),
        ("b", thrice()),
        ("c", sick()),
        ("d", none()),
        ("e", homeless()),
        ("f", away()),
        ("g", no_v4()),
        ("h", it()),
    ];
    let service = || service("it", &[]);
    assert_shares(&all, service(), &[("a", 166), ("b", 500), ("g", 166), ("h", 166)]);
    let v4_only = Service { ip_families: Some(IpFamilies::V4Only), ..service() };
    assert_shares(&all, v4_only, &[("a", 200), ("b", 600), ("h", 200)]);
    let (mode, scopes, health) = (BalanceMode::Any, Box::default(), HealthPolicy::AllowAll);
    let sick_too = Service { balancing: Some(LoadBalancing { mode, scopes, health }), ..service() };
    assert_shares(&all, sick_too, &[("a", 142), ("b", 428), ("c", 142), ("g", 142), ("h", 142)]);
    // So few can be chosen that drawing does not find them.
    let names: Vec<String> = (0..300).map(|number| format!("x{number}")).collect();
    let mut many: Vec<(&str, Workload)> = names.iter().map(|name| (name.as_str(), sick())).collect();
    many.extend([("a", it()), ("b", thrice())]);
    assert_shares(&many, service(), &[("a", 250), ("b", 750)]);
    assert_shares(&[("c", sick()), ("d", none())], service(), &[]);
}

#[test]
fn a_service_may_prefer_what_is_near() {
    use BalanceScope::*;
    let at = |region: &str, zone: &str, node: &str| Workload {
        region: region.into(),
        zone: zone.into(),
        node: node.into(),
        ..workload("it", &["10.0.0.9"], Reach::Hbone)
    };
    // The client is nowhere: everything about it is the empty text.
    let all = [("far", at("r", "", "")), ("near", at("", "z", "")), ("here", at("", "", "n"))];
    let here_twice = [("far", at("r", "", "")), ("here", at("", "", "n")), ("here-2", at("", "", "n"))];
    let with = |mode, scopes: &[BalanceScope]| Service {
        balancing: Some(LoadBalancing { mode, scopes: scopes.into(), health: HealthPolicy::OnlyHealthy }),
        ..service("it", &[])
    };
    use BalanceMode::*;
    assert_shares(&all, with(Failover, &[Network, Region, Zone]), &[("here", 1000)]);
    assert_shares(&all, with(Failover, &[Network, Region, Zone, Node]), &[("here", 1000)]);
    assert_shares(&all, with(Failover, &[Network, Region]), &[("here", 500), ("near", 500)]);
    assert_shares(&all, with(Failover, &[Zone, Region]), &[("here", 1000)]);
    assert_shares(&here_twice, with(Failover, &[Region, Zone]), &[("here", 500), ("here-2", 500)]);
    assert_shares(&all, with(Failover, &[]), &[("far", 333), ("here", 333), ("near", 333)]);
    assert_shares(&all, with(Strict, &[Region, Zone]), &[("here", 1000)]);
    assert_shares(&all, with(Strict, &[Node]), &[("far", 500), ("near", 500)]);
    assert_shares(&all, with(Strict, &[Region, Zone, Node]), &[]);
    assert_shares(&all, with(Strict, &[Unknown]), &[]);
    assert_shares(&all, with(Failover, &[Unknown]), &[("far", 333), ("here", 333), ("near", 333)]);
}

#[test]
fn the_address_that_was_dialled_comes_before_its_family_and_the_family_before_the_rest() {
    let address = |own: &[&str], wanted: &str| {
        balance::address(&workload("it", own, Reach::Hbone), wanted.parse().unwrap(), None)
            .map(|ip| ip.to_string())
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

fn some_workload() -> impl Strategy<Value = Workload> {
    let name = prop_oneof![Just("a"), Just("b"), Just("c"), Just("d")];
    let addresses = prop::collection::vec(some_ip(), 0..3);
    let reach = prop_oneof![3 => Just(Reach::Hbone), 1 => Just(Reach::Plain), 1 => Just(Reach::Unknown)];
    (name, addresses, reach, any::<bool>(), any::<bool>()).prop_map(
        |(name, addresses, reach, healthy, host_network)| Workload {
            addresses,
            healthy,
            host_network,
            ..workload(name, &[], reach)
        },
    )
}

/// A gateway that is a service, a workload, or nothing.
fn some_gateway() -> impl Strategy<Value = Arc<GatewayAddress>> {
    let name = (0..4u8).prop_map(|name| GatewayDestination::Hostname(service(&format!("s{name}"), &[]).key));
    let address =
        some_ip().prop_map(|ip| GatewayDestination::Address(NetworkAddress { network: Arc::default(), ip }));
    prop_oneof![name, address]
        .prop_map(|destination| Arc::new(GatewayAddress { destination, hbone_port: HBONE_PORT }))
}

fn some_mesh() -> impl Strategy<Value = Mesh> {
    let member = (0..3usize, prop::option::of(1..9u16));
    let waypoint = || prop::option::weighted(0.2, some_gateway());
    let workload = (some_workload(), prop::collection::btree_map(0..3usize, member, 0..3), waypoint());
    let workloads = prop::collection::vec(workload, 1..5);
    let vips = prop::collection::vec(some_ip(), 0..3);
    let mode =
        prop_oneof![Just(BalanceMode::Any), Just(BalanceMode::Failover), Just(BalanceMode::Passthrough)];
    let services = prop::collection::vec((vips, waypoint(), mode), 0..3);
    (workloads, services).prop_map(|(workloads, services)| {
        let workloads = workloads.into_iter().map(|(workload, members, waypoint)| {
            let services = members.into_iter().map(|(index, (_, own))| Membership {
                service: service(&format!("s{index}"), &[]).key,
                ports: own.map(|to| (90, to)).into_iter().collect(),
            });
            Arc::new(Workload { services: services.collect(), waypoint, ..workload })
        });
        let services = services.into_iter().enumerate().map(|(index, (vips, waypoint, mode))| {
            let vips = vips.into_iter().map(|ip| NetworkAddress { network: Arc::default(), ip }).collect();
            let scopes = Box::new([BalanceScope::Node]);
            let balancing = Some(LoadBalancing { mode, scopes, health: HealthPolicy::OnlyHealthy });
            Arc::new(Service { vips, waypoint, balancing, ..service(&format!("s{index}"), &[]) })
        });
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

        let service_dialled = mesh.service_at("", ip, Some("shop"));
        let workload_dialled = mesh.workload_at("", ip);
        let direct = service_dialled.is_none_or(|service| service.balance_mode() == BalanceMode::Passthrough);
        let waypoint = match service_dialled {
            Some(service) if service.waypoint.is_some() => service.waypoint.as_ref(),
            _ if direct => workload_dialled.and_then(|workload| workload.waypoint.as_ref()),
            _ => None,
        };
        match planned {
            Ok(Planned::Known(Plan::Hbone { peer, expect, target, destination, service })) => {
                prop_assert_eq!(expect, vec![destination.identity.clone()]);
                prop_assert_eq!(service.as_ref(), service_dialled);
                prop_assert!(destination.addresses.contains(&peer.0.ip()));
                if waypoint.is_some() {
                    prop_assert_eq!(target, wanted, "a waypoint is asked for what was dialled");
                } else {
                    prop_assert_eq!(peer.0, SocketAddr::new(target.ip(), HBONE_PORT));
                    prop_assert_eq!(destination.reach, Reach::Hbone);
                }
            }
            Ok(Planned::ByName(_)) => prop_assert!(false, "none of them has a name"),
            Ok(Planned::Known(Plan::Plain { to, destination, service })) => {
                prop_assert!(waypoint.is_none(), "passed a waypoint by");
                prop_assert!(destination.as_ref().is_none_or(|it| it.reach == Reach::Plain), "in the clear");
                prop_assert_eq!(service.as_ref(), service_dialled, "passed a service by");
                if destination.is_none() {
                    prop_assert_eq!(to, wanted);
                    prop_assert!(workload_dialled.is_none() && direct);
                }
            }
            Err(NoRoute::SelfCall(to)) => {
                prop_assert!(RESERVED_PORTS.contains(&to.port()));
                prop_assert!(to.ip().is_loopback() || client().addresses.contains(&to.ip()));
            }
            Err(NoRoute::NoServicePort { .. } | NoRoute::NoHealthyUpstream { .. }) => {
                let service = service_dialled.expect("only a service can have nobody");
                let usable = mesh.endpoints(&service.key).iter().any(|endpoint| {
                    let workload = endpoint.workload();
                    let target = match port {
                        80 => true,
                        90 => endpoint.own_port(90).is_some(),
                        _ => false,
                    };
                    workload.healthy && !workload.addresses.is_empty() && target
                });
                prop_assert!(!usable, "an endpoint could have taken it");
            }
            Err(NoRoute::UnknownWaypoint(gateway)) => prop_assert_eq!(Some(&gateway), waypoint),
            Err(NoRoute::UnknownProtocol(uid)) => {
                prop_assert!(mesh.workloads().any(|it| it.uid == uid && it.reach == Reach::Unknown)
                    || workload_dialled.is_some_and(|it| it.reach == Reach::Unknown));
            }
            Ok(Planned::Known(Plan::DoubleHbone { .. }))
            | Err(
                NoRoute::OtherNetwork { .. }
                | NoRoute::UnknownGateway(_)
                | NoRoute::NobodyExpected { .. }
                | NoRoute::NoName { .. },
            ) => prop_assert!(false, "there is one network only"),
            Err(NoRoute::Refused(_)) => prop_assert!(false, "everything is understood"),
            Err(NoRoute::NoWaypoint { .. }) => prop_assert!(false, "no service has several waypoints"),
        }
    }
}

#[test]
fn an_endpoint_without_an_address_is_found_by_its_name() {
    let database = Workload { hostname: "db.example".into(), ..workload("db", &[], Reach::Plain) };
    let database = behind(database, &[("db", &[])]);
    let mesh = Mesh::new(
        TrustDomain::default(),
        [Arc::new(client()), Arc::clone(&database)],
        [Arc::new(service("db", &["10.9.0.7"]))],
        [],
    );
    assert_eq!(outcome(&mesh, "10.9.0.7:80", LOW), "named db.example:8080 db of db");
    let Ok(Planned::ByName(by_name)) =
        plan(&mesh, &client(), OriginalDst("10.9.0.7:80".parse().unwrap()), LOW)
    else {
        panic!("no name")
    };
    let addresses: Vec<IpAddr> =
        ["192.0.2.1", "2001:db8::1", "192.0.2.2"].map(|ip| ip.parse().unwrap()).into();
    for (wanted, roll, expected) in [
        ("10.9.0.7", LOW, "192.0.2.1:8080"),
        ("10.9.0.7", HIGH, "192.0.2.2:8080"),
        ("fd09::7", HIGH, "[2001:db8::1]:8080"),
    ] {
        let plan = by_name.plan(&addresses, wanted.parse().unwrap(), roll);
        let Some(Ok(Plan::Plain { to, destination: Some(to_whom), service: Some(_) })) = plan else {
            panic!("{plan:?}")
        };
        assert_eq!((to.to_string(), &*to_whom.name), (expected.to_owned(), "db"));
    }
    // Of the other family, where there is none of that which was dialled.
    let plan = by_name.plan(&addresses[1..2], "10.9.0.7".parse().unwrap(), LOW);
    assert!(matches!(plan, Some(Ok(Plan::Plain { to, .. })) if to.is_ipv6()), "another family");
    assert_eq!(by_name.plan(&[], "10.9.0.7".parse().unwrap(), LOW), None);
}
