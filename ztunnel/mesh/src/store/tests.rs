//! Changes in every order come to the same mesh.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use proptest::prelude::*;

use crate::model::addr::NetworkAddress;
use crate::model::addr::NetworkCidr;
use crate::model::policy::Action;
use crate::model::policy::Policy;
use crate::model::policy::PolicyKey;
use crate::model::policy::Scope;
use crate::model::service::Service;
use crate::model::service::Visibility;
use crate::model::workload::Membership;
use crate::model::workload::Reach;
use crate::model::workload::Workload;
use crate::store::MeshChange;
use crate::store::index::Mesh;
use crate::store::mesh;

fn ip(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fn workload(name: &str, last: u8, services: &[&str]) -> Workload {
    let membership =
        |name: &&str| Membership { service: Service::sample("shop", name).key, ports: Arc::default() };
    let services = services.iter().map(membership).collect();
    let sample = Workload::sample("shop", name.rsplit('/').next().unwrap_or(name));
    Workload { uid: name.into(), addresses: vec![ip(last)], services, ..sample }
}

fn vip(network: &str, last: u8) -> NetworkAddress {
    NetworkAddress { network: network.into(), ip: ip(last) }
}

fn policy(name: &str, scope: Scope) -> Arc<Policy> {
    let key = PolicyKey { namespace: "shop".into(), name: name.into() };
    Arc::new(Policy { key, scope, action: Action::Deny, dry_run: false, rules: vec![] })
}

fn put(mesh: &mut Mesh, workload: Workload) {
    mesh.apply(MeshChange::Workload(Arc::new(workload)));
}

fn put_service(mesh: &mut Mesh, service: Service) {
    mesh.apply(MeshChange::Service(Arc::new(service)));
}

fn endpoints(mesh: &Mesh, service: &str) -> Vec<String> {
    let key = Service::sample("shop", service).key;
    mesh.endpoints(&key).iter().map(|it| it.workload().uid.to_string()).collect()
}

fn at(mesh: &Mesh, network: &str, last: u8) -> String {
    mesh.workload_at(network, ip(last)).map_or(String::new(), |it| it.uid.to_string())
}

#[test]
fn endpoints_wait_for_their_service_and_stay_with_it() {
    let mut mesh = Mesh::default();
    put(&mut mesh, workload("a", 1, &["s"]));
    assert_eq!((endpoints(&mesh, "s"), mesh.services_len(), mesh.staged().count()), (vec!["a".into()], 0, 1));
    let service = || Service { vips: vec![vip("", 9)], ..Service::sample("shop", "s") };
    put_service(&mut mesh, service());
    put_service(&mut mesh, Service { canonical: true, ..service() });
    put(&mut mesh, workload("b", 2, &["s", "t"]));
    assert_eq!(
        (endpoints(&mesh, "s"), mesh.services_len(), mesh.staged().count()),
        (vec!["a".into(), "b".into()], 1, 1)
    );
    put(&mut mesh, workload("b", 2, &["t"]));
    assert_eq!(endpoints(&mesh, "s"), ["a"]);
    mesh.apply(MeshChange::RemoveAddress(service().key.as_str().into()));
    assert!(mesh.service_at("", ip(9), None).is_none() && mesh.services_len() == 0);
    assert_eq!(endpoints(&mesh, "s"), ["a"], "waits for the service to come back");
    mesh.apply(MeshChange::RemoveAddress("a".into()));
    mesh.apply(MeshChange::RemoveWorkload("b".into()));
    mesh.apply(MeshChange::RemoveWorkload("b".into()));
    assert_eq!((mesh.staged().count(), mesh.workloads().len()), (0, 0));
}

#[test]
fn an_address_belongs_to_the_best_of_those_who_claim_it() {
    let mut mesh = Mesh::default();
    put(&mut mesh, workload("external", 1, &[]));
    put(&mut mesh, Workload { reach: Reach::Plain, ..workload("c//Pod/shop/a", 1, &[]) });
    assert_eq!(at(&mesh, "", 1), "c//Pod/shop/a");
    put(&mut mesh, workload("c//Pod/shop/b", 1, &[]));
    assert_eq!(at(&mesh, "", 1), "c//Pod/shop/b");
    put(&mut mesh, workload("c//Pod/shop/b", 2, &[]));
    assert_eq!((at(&mesh, "", 1), at(&mesh, "", 2)), ("c//Pod/shop/a".into(), "c//Pod/shop/b".into()));
    mesh.apply(MeshChange::RemoveWorkload("c//Pod/shop/a".into()));
    assert_eq!(at(&mesh, "", 1), "external");
    put(&mut mesh, Workload { host_network: true, ..workload("external", 1, &[]) });
    assert_eq!(at(&mesh, "", 1), "");
    put(&mut mesh, Workload { network: "n".into(), ..workload("external", 1, &[]) });
    assert_eq!((at(&mesh, "", 1), at(&mesh, "n", 1)), (String::new(), "external".into()));
}

#[test]
fn an_address_that_is_used_again_belongs_to_who_has_it_now() {
    let (mut writer, reader) = mesh();
    let at = || at(&reader.snapshot(), "", 1);
    let pod =
        |name: &str, healthy| MeshChange::Workload(Arc::new(Workload { healthy, ..workload(name, 1, &[]) }));
    let [a, b, c] = ["c//Pod/shop/a", "c//Pod/shop/b", "c//Pod/shop/c"];
    writer.apply([pod(a, true)]);
    writer.apply([pod(b, true)]);
    assert_eq!(at(), b, "the newer one");
    writer.apply([pod(a, false)]);
    writer.apply([pod(a, true)]);
    assert_eq!(at(), b, "what only changes is not newer for that");
    writer.apply([pod(b, false)]);
    assert_eq!(at(), a, "one that ends has nothing to take");
    writer.apply([pod(c, false)]);
    assert_eq!(at(), a);
    writer.apply([pod(c, true), MeshChange::RemoveWorkload(b.into())]);
    assert_eq!(at(), c);
    writer.apply([MeshChange::RemoveWorkload(c.into()), MeshChange::RemoveWorkload(a.into())]);
    writer.apply([pod(b, true), pod(a, true)]);
    assert_eq!(at(), a, "of what comes at once, the same one on every node");
}

#[test]
fn a_virtual_address_may_be_several_services() {
    let mut mesh = Mesh::default();
    let named = |namespace: &str, name: &str| {
        let mut service = Service { vips: vec![vip("", 9)], ..Service::sample(namespace, name) };
        service.hostname = "same.example".into();
        service
    };
    let found = |mesh: &Mesh, namespace| {
        let by_vip = mesh.service_at("", ip(9), namespace).map(|it| it.key.to_string());
        let by_name = mesh.service_by_hostname("same.example", namespace).map(|it| it.key.to_string());
        assert_eq!(by_vip, by_name);
        by_vip.unwrap_or_default()
    };
    put_service(&mut mesh, named("a", "first"));
    put_service(&mut mesh, named("a", "second"));
    put_service(&mut mesh, Service { canonical: true, ..named("b", "canonical") });
    put_service(&mut mesh, Service { visibility: Visibility::Namespace, ..named("c", "hidden") });
    assert_eq!(found(&mesh, None), "b/canonical.b");
    assert_eq!(found(&mesh, Some("a")), "a/first.a");
    assert_eq!(found(&mesh, Some("c")), "c/hidden.c");
    assert_eq!(found(&mesh, Some("d")), "b/canonical.b");
    // One that changes keeps its place; one of two in a namespace that goes does not take the other with it.
    put_service(
        &mut mesh,
        Service {
            ports: vec![],
            ip_families: None,
            subject_alt_names: vec!["x".into()],
            ..named("a", "first")
        },
    );
    assert_eq!(found(&mesh, Some("a")), "a/first.a");
    mesh.apply(MeshChange::RemoveService(named("a", "first").key));
    assert_eq!(found(&mesh, Some("a")), "a/second.a");
    mesh.apply(MeshChange::RemoveService(named("b", "canonical").key));
    assert_eq!(found(&mesh, Some("d")), "a/second.a");
    put_service(&mut mesh, Service { visibility: Visibility::Namespace, ..named("a", "second") });
    assert_eq!(found(&mesh, Some("d")), "");
}

#[test]
fn ranges_come_after_addresses_and_the_longest_first() {
    let mut mesh = Mesh::default();
    let cidr = |range: &str| NetworkCidr { network: "n".into(), range: range.parse().unwrap() };
    let with = |namespace: &str, name: &str, ranges: &[&str]| Service {
        cidr_vips: ranges.iter().map(|range| cidr(range)).collect(),
        ..Service::sample(namespace, name)
    };
    put_service(&mut mesh, with("a", "wide", &["10.0.0.0/8"]));
    for round in 0..3 {
        let subject_alt_names = vec![Arc::from(round.to_string())];
        put_service(
            &mut mesh,
            Service { subject_alt_names, ..with("b", "narrow", &["10.0.0.0/24", "10.1.0.0/16"]) },
        );
    }
    put_service(&mut mesh, Service { vips: vec![vip("n", 1)], ..with("c", "exact", &[]) });
    let at = |mesh: &Mesh, to: &str, namespace| {
        let found = mesh.service_at("n", to.parse().unwrap(), namespace);
        found.map_or(String::new(), |it| it.name.to_string())
    };
    assert_eq!(at(&mesh, "10.0.0.1", Some("a")), "exact");
    assert_eq!(at(&mesh, "10.0.0.2", Some("a")), "wide", "the client's own namespace first");
    assert_eq!(at(&mesh, "10.0.0.2", None), "narrow");
    assert_eq!(at(&mesh, "10.2.0.2", Some("b")), "wide");
    assert_eq!(at(&mesh, "11.0.0.1", None), "");
    put_service(&mut mesh, with("b", "narrow", &[]));
    assert_eq!(at(&mesh, "10.0.0.2", None), "wide", "an earlier version leaves nothing behind");
}

#[test]
fn who_watches_authorization_is_woken_by_nothing_else() {
    let (mut writer, reader) = mesh();
    let mut seen = reader.snapshot().authorization_version();
    let mut wakes = |change| {
        writer.apply([change]);
        let now = reader.snapshot().authorization_version();
        std::mem::replace(&mut seen, now) != now
    };
    let selected = |name: &str| {
        let policies = vec![PolicyKey { namespace: "shop".into(), name: name.into() }];
        MeshChange::Workload(Arc::new(Workload { policies, ..workload("a", 1, &[]) }))
    };
    assert!(!wakes(MeshChange::Workload(Arc::new(workload("a", 1, &[])))));
    assert!(!wakes(MeshChange::Service(Arc::new(Service::sample("shop", "s")))));
    assert!(!wakes(MeshChange::Workload(Arc::new(workload("a", 2, &["s"])))));
    assert!(wakes(selected("p")));
    assert!(!wakes(selected("p")));
    assert!(wakes(MeshChange::Policy(policy("p", Scope::WorkloadSelector))));
    assert!(!wakes(MeshChange::Policy(policy("p", Scope::WorkloadSelector))));
    assert!(wakes(MeshChange::Policy(policy("p", Scope::Global))));
    assert!(wakes(MeshChange::RemovePolicy(policy("p", Scope::Global).key.clone())));
    assert!(wakes(MeshChange::RemoveWorkload("a".into())), "it may come back without them");
    assert!(wakes(selected("p")), "its connections may still be open");
    writer.publish(Mesh::default());
    assert_ne!(reader.snapshot().authorization_version(), seen);
}

#[test]
fn whether_any_policy_is_a_dry_run_is_known() {
    let mut mesh = Mesh::default();
    let as_dry_run = |name: &str| Policy { dry_run: true, ..Policy::clone(&policy(name, Scope::Global)) };
    let mut after = |change| {
        mesh.apply(change);
        mesh.has_dry_run_policies()
    };
    assert!(!after(MeshChange::Policy(policy("a", Scope::Global))));
    assert!(after(MeshChange::Policy(Arc::new(as_dry_run("a")))));
    assert!(after(MeshChange::Policy(Arc::new(as_dry_run("a")))));
    assert!(after(MeshChange::Policy(Arc::new(as_dry_run("b")))));
    assert!(after(MeshChange::RemovePolicy(as_dry_run("b").key)));
    assert!(!after(MeshChange::Policy(policy("a", Scope::Global))));
}

#[test]
fn a_version_is_freed_by_the_writer_not_by_its_last_reader() {
    let (mut writer, reader) = mesh();
    writer.apply([MeshChange::Workload(Arc::new(workload("a", 1, &[])))]);
    let held = reader.snapshot();
    writer.apply([MeshChange::Workload(Arc::new(workload("b", 2, &[])))]);
    let weak = Arc::downgrade(&held);
    drop(held);
    assert!(weak.upgrade().is_some());
    writer.apply([]);
    assert!(weak.upgrade().is_none());
}

fn some_change() -> impl Strategy<Value = MeshChange> {
    let name = || prop_oneof![Just("a"), Just("c//Pod/b"), Just("c")];
    let services = prop::sample::subsequence(vec!["s", "t"], 0..=2);
    let network = || prop_oneof![Just(""), Just("n")];
    let scope = prop_oneof![Just(Scope::Global), Just(Scope::Namespace), Just(Scope::WorkloadSelector)];
    let put_workload = (name(), 0..3u8, services, network(), any::<bool>(), any::<bool>()).prop_map(
        |(name, last, services, network, host_network, named)| {
            let hostname = if named { "host" } else { "" }.into();
            let new = workload(name, last, &services);
            MeshChange::Workload(Arc::new(Workload {
                network: network.into(),
                host_network,
                hostname,
                ..new
            }))
        },
    );
    let service = || prop_oneof![Just("s"), Just("t")];
    let put_service = (service(), prop::collection::btree_set((network(), 0..3u8), 0..3), any::<bool>());
    let put_service = put_service.prop_map(|(name, vips, canonical)| {
        let cidr_vips = vips.iter().map(|(network, last)| NetworkCidr {
            network: (*network).into(),
            range: format!("10.0.0.{last}/31").parse().unwrap(),
        });
        let cidr_vips = cidr_vips.collect();
        let vips = vips.into_iter().map(|(network, last)| vip(network, last)).collect();
        MeshChange::Service(Arc::new(Service { vips, cidr_vips, canonical, ..Service::sample("shop", name) }))
    });
    prop_oneof![
        4 => put_workload,
        2 => put_service,
        1 => (name(), scope).prop_map(|(name, scope)| MeshChange::Policy(policy(name, scope))),
        1 => name().prop_map(|name| MeshChange::RemoveWorkload(name.into())),
        1 => service().prop_map(|name| MeshChange::RemoveService(Service::sample("shop", name).key)),
        1 => name().prop_map(|name| MeshChange::RemovePolicy(policy(name, Scope::Global).key.clone())),
    ]
}

/// All that can be asked of a mesh, answered.
fn told(mesh: &Mesh) -> BTreeMap<String, Vec<String>> {
    let mut told = BTreeMap::new();
    for network in ["", "n"] {
        for last in 0..4 {
            let service = mesh.service_at(network, ip(last), None).map(|it| it.key.to_string());
            told.insert(
                format!("{network}/{last}"),
                vec![at(mesh, network, last), service.unwrap_or_default()],
            );
        }
    }
    for service in ["s", "t"] {
        told.insert(format!("behind {service}"), endpoints(mesh, service));
    }
    let host = mesh.workload_by_hostname("host", "shop").map(|it| it.uid.to_string());
    told.insert("host".into(), host.into_iter().collect());
    for workload in mesh.workloads() {
        let mut policies: Vec<String> =
            mesh.policies_of(workload).known().map(|policy| policy.key.to_string()).collect();
        policies.sort();
        told.insert(workload.uid.to_string(), policies);
    }
    told.insert(
        "services".into(),
        vec![mesh.services().count().to_string(), mesh.services_len().to_string()],
    );
    told.insert("staged".into(), vec![mesh.staged().count().to_string()]);
    told
}

fn is_address(key: &str) -> bool {
    key.starts_with('/') || key.starts_with("n/")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_mesh_changed_step_by_step_is_the_mesh_of_what_is_left(changes in prop::collection::vec(some_change(), 0..40)) {
        let mut mesh = Mesh::default();
        // What is there in the end, services in the order in which they came.
        let (mut workloads, mut services, mut policies) = (BTreeMap::new(), Vec::<Arc<Service>>::new(), BTreeMap::new());
        for change in changes {
            mesh.apply(change.clone());
            match change {
                MeshChange::Workload(it) => { workloads.insert(Arc::clone(&it.uid), it); }
                MeshChange::Service(it) => match services.iter_mut().find(|other| other.key == it.key) {
                    Some(other) => *other = it,
                    None => services.push(it),
                },
                MeshChange::Policy(it) => { policies.insert(it.key.clone(), it); }
                MeshChange::RemoveWorkload(uid) => { workloads.remove(&uid); }
                MeshChange::RemoveService(key) => services.retain(|it| it.key != key),
                MeshChange::RemovePolicy(key) => { policies.remove(&key); }
                MeshChange::RemoveAddress(_) | MeshChange::Refuse(_) => {}
            }
        }
        let mut whole = Mesh::default();
        services.into_iter().for_each(|it| whole.apply(MeshChange::Service(it)));
        workloads.into_values().for_each(|it| whole.apply(MeshChange::Workload(it)));
        policies.into_values().for_each(|it| whole.apply(MeshChange::Policy(it)));
        // Which of two equals has an address depends on who had it first.
        let without_ties = |mut told: BTreeMap<String, Vec<String>>| {
            for answers in told.iter_mut().filter(|(key, _)| is_address(key)).map(|it| it.1) {
                answers[1] = (!answers[1].is_empty()).to_string();
            }
            told
        };
        prop_assert_eq!(without_ties(told(&mesh)), without_ties(told(&whole)));
    }
}
