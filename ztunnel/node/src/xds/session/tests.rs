//! What is said in answer to what, without a network.

use std::sync::Arc;

use proptest::prelude::*;
use ztunnel_mesh::store::index::Mesh;
use ztunnel_proto::Any;
use ztunnel_proto::prost::Message;
use ztunnel_proto::security;
use ztunnel_proto::workload as wire;

use super::*;

fn session() -> Session {
    Session::new(Node { id: "ztunnel~me".to_owned(), ..Node::default() })
}

fn resource(kind: Kind, name: &str, version: &str, message: impl Message) -> Resource {
    let any = Any { type_url: kind.type_url().to_owned(), value: message.encode_to_vec().into() };
    let (name, version) = (name.to_owned(), version.to_owned());
    Resource { name, version, resource: Some(any), ..Resource::default() }
}

fn pod(name: &str, version: &str, node: &str) -> Resource {
    let workload = wire::Workload {
        uid: name.to_owned(),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        node: node.to_owned(),
        ..wire::Workload::default()
    };
    let address = wire::Address { r#type: Some(wire::address::Type::Workload(workload)) };
    resource(Kind::Address, name, version, address)
}

fn bad(name: &str) -> Resource {
    resource(Kind::Address, name, "1", wire::Address { r#type: None })
}

fn deny(name: &str) -> Resource {
    let (name, namespace) = (name.to_owned(), "shop".to_owned());
    let policy = security::Authorization { name: name.clone(), namespace, action: 1, ..Default::default() };
    resource(Kind::Authorization, &format!("shop/{name}"), "", policy)
}

fn response(kind: Kind, nonce: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: kind.type_url().to_owned(),
        nonce: nonce.to_owned(),
        resources,
        removed_resources: removed.iter().map(ToString::to_string).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}

/// Takes a response in slices of `slice` resources into `mesh`, and gives the answer.
fn take(
    session: &mut Session,
    mesh: &mut Mesh,
    response: DeltaDiscoveryResponse,
    slice: usize,
) -> DeltaDiscoveryRequest {
    match session.receive(response) {
        Received::Refused(answer) => answer,
        Received::Push(mut push) => {
            while !push.is_done() {
                let changes = session.advance(&mut push, slice);
                assert!(changes.len() <= slice);
                changes.into_iter().for_each(|change| mesh.apply(change));
            }
            session.finish(push)
        }
    }
}

fn rejected(answer: &DeltaDiscoveryRequest) -> &str {
    answer.error_detail.as_ref().map_or("", |status| &status.message)
}

#[test]
fn a_session_begins_with_what_it_has_and_is_synced_by_both_types() {
    let (mut session, mut mesh) = (session(), Mesh::default());
    let first = session.open([]);
    assert_eq!(first.each_ref().map(|it| it.type_url.as_str()), Kind::ALL.map(Kind::type_url));
    for request in first {
        assert_eq!(request.node.unwrap().id, "ztunnel~me");
        assert!(request.initial_resource_versions.is_empty() && request.resource_names_subscribe.is_empty());
    }
    let answer = take(
        &mut session,
        &mut mesh,
        response(Kind::Address, "n1", vec![pod("a", "1", "x"), pod("b", "7", "x")], &[]),
        9,
    );
    let accepted = DeltaDiscoveryRequest {
        type_url: Kind::Address.type_url().to_owned(),
        response_nonce: "n1".to_owned(),
        ..DeltaDiscoveryRequest::default()
    };
    assert_eq!(answer, accepted, "nothing else is said");
    assert!(!session.is_synced());
    take(&mut session, &mut mesh, response(Kind::Authorization, "n2", vec![deny("p")], &[]), 9);
    assert!(session.is_synced());
    take(
        &mut session,
        &mut mesh,
        response(Kind::Address, "n3", vec![pod("b", "8", "y")], &["a", "unknown"]),
        9,
    );
    let [addresses, policies] = session.open([]).map(|request| request.initial_resource_versions);
    assert_eq!(addresses, [("b".to_owned(), "8".to_owned())].into());
    assert_eq!(policies, [("shop/p".to_owned(), String::new())].into());
    assert_eq!((mesh.workloads().len(), &*mesh.workload("b").unwrap().node), (1, "y"));
    take(&mut session, &mut mesh, response(Kind::Authorization, "n4", vec![], &["shop/p", "x"]), 9);
    assert_eq!(mesh.policies().len(), 0);
}

#[test]
fn what_is_bad_is_named_and_harms_nothing_else() {
    let (mut session, mut mesh) = (session(), Mesh::default());
    take(&mut session, &mut mesh, response(Kind::Authorization, "n0", vec![], &[]), 2);
    let other_type =
        Resource { name: "z".into(), ..resource(Kind::Authorization, "z", "1", wire::Address::default()) };
    let push = vec![
        pod("a", "1", "x"),
        bad("b"),
        other_type,
        pod("c", "1", "x"),
        Resource { name: "e".into(), ..Resource::default() },
    ];
    let answer = take(&mut session, &mut mesh, response(Kind::Address, "n1", push, &[]), 2);
    assert_eq!(
        rejected(&answer),
        "b: the workload or service is missing; z: a resource of another type than the response's is not supported; e: \
         the resource is missing"
    );
    assert_eq!(answer.response_nonce, "n1");
    assert_eq!(mesh.workloads().len(), 2);
    assert!(!session.is_synced(), "a first response that is rejected does not count");
    let mut broken = pod("a", "2", "y");
    broken.resource = bad("a").resource;
    let answer = take(
        &mut session,
        &mut mesh,
        response(Kind::Address, "n2", vec![broken, pod("d", "1", "x")], &[]),
        2,
    );
    assert_eq!(rejected(&answer), "a: the workload or service is missing");
    assert_eq!(&*mesh.workload("a").unwrap().node, "x", "the version before stays");
    let held = session.open([])[0].initial_resource_versions.clone();
    assert_eq!(held["a"], "1");
    assert_eq!(held["b"], "", "what is refused is sent again, or said to be gone");
    take(&mut session, &mut mesh, response(Kind::Address, "n3", vec![], &[]), 2);
    assert!(session.is_synced());
}

#[test]
fn what_has_no_good_version_is_refused_until_it_has_one_or_goes() {
    let (mut session, mut mesh) = (session(), Mesh::default());
    session.keep_accepted();
    // Its port is none, and its address can be read.
    let odd = |name: &str, last: u8| {
        let workload = wire::Workload {
            uid: name.to_owned(),
            namespace: "shop".to_owned(),
            addresses: vec![vec![10, 0, 0, last].into()],
            tunnel_protocol: 2,
            ..wire::Workload::default()
        };
        let address = wire::Address { r#type: Some(wire::address::Type::Workload(workload)) };
        resource(Kind::Address, name, "1", address)
    };
    let names = |mesh: &Mesh| {
        let mut names: Vec<_> = mesh.refused().map(|refused| refused.name.to_string()).collect();
        names.sort_unstable();
        names
    };
    let network = Arc::from("");
    let push =
        response(Kind::Address, "n1", vec![pod("a", "1", "x"), odd("a", 1), odd("b", 2), odd("c", 3)], &[]);
    take(&mut session, &mut mesh, push, 9);
    assert_eq!(names(&mesh), ["b", "c"], "of one there is a good version");
    assert!(mesh.refused_at(&network, [10, 0, 0, 2].into(), None).is_some());
    assert_eq!((session.refused(), session.has_none(Kind::Address, "b")), (2, true));
    take(&mut session, &mut mesh, response(Kind::Address, "n2", vec![pod("b", "2", "x")], &["c"]), 9);
    assert_eq!((names(&mesh), session.refused()), (vec![], 0));
    assert!(mesh.refused_at(&network, [10, 0, 0, 2].into(), None).is_none());
    assert_eq!(mesh.workloads().len(), 2);
}

#[test]
fn a_good_version_by_another_spelling_of_the_name_is_a_good_version() {
    let (mut session, mut mesh) = (session(), Mesh::default());
    session.keep_accepted();
    let named = |name: &str| Resource { name: name.to_owned(), ..bad("any") };
    let good = |name: &str, hostname: &str| {
        let service = wire::Service {
            namespace: "shop".to_owned(),
            hostname: hostname.to_owned(),
            ..wire::Service::default()
        };
        let address = wire::Address { r#type: Some(wire::address::Type::Service(service)) };
        resource(Kind::Address, name, "1", address)
    };
    take(&mut session, &mut mesh, response(Kind::Address, "n1", vec![named("shop/Web.Example")], &[]), 9);
    assert_eq!((mesh.refused().len(), session.refused()), (1, 1));
    let push = response(Kind::Address, "n2", vec![good("shop/web.example", "web.example")], &[]);
    take(&mut session, &mut mesh, push, 9);
    assert_eq!((mesh.refused().len(), session.refused()), (0, 0));
    let held = session.open([])[0].initial_resource_versions.clone();
    assert_eq!(held.keys().map(String::as_str).collect::<Vec<_>>(), ["shop/web.example"]);
    // Nor does a bad version by the other spelling refuse it, or the end of that take it away.
    let push = response(Kind::Address, "n3", vec![named("shop/WEB.example")], &[]);
    take(&mut session, &mut mesh, push, 9);
    assert_eq!((mesh.refused().len(), session.refused()), (0, 0));
    take(&mut session, &mut mesh, response(Kind::Address, "n4", vec![], &["shop/WEB.example"]), 9);
    assert_eq!(mesh.services_len(), 1);
    take(&mut session, &mut mesh, response(Kind::Address, "n5", vec![], &["shop/web.example"]), 9);
    assert_eq!(mesh.services_len(), 0);
}

#[test]
fn a_type_that_was_not_asked_for_is_refused() {
    let mut mesh = Mesh::default();
    let other = DeltaDiscoveryResponse {
        type_url: "type.googleapis.com/other".to_owned(),
        nonce: "n".to_owned(),
        ..response(Kind::Address, "", vec![pod("a", "1", "x")], &[])
    };
    let answer = take(&mut session(), &mut mesh, other, 1);
    assert_eq!(
        (answer.type_url.as_str(), answer.response_nonce.as_str()),
        ("type.googleapis.com/other", "n")
    );
    assert!(!rejected(&answer).is_empty() && mesh.workloads().len() == 0);
}

#[test]
fn on_demand_only_what_is_wanted_is_asked_for_and_what_is_said_of_it_is_told() {
    let (mut session, mut mesh) = (session(), Mesh::default());
    session.on_demand();
    session.keep_accepted();
    let [addresses, policies] = session.open(["n/10.0.0.1"]);
    assert_eq!(addresses.resource_names_subscribe, ["*"]);
    assert_eq!(addresses.resource_names_unsubscribe, ["*"]);
    assert_eq!(addresses.initial_resource_versions, [("n/10.0.0.1".to_owned(), String::new())].into());
    assert!(policies.resource_names_subscribe.is_empty() && policies.resource_names_unsubscribe.is_empty());
    assert!(policies.initial_resource_versions.is_empty());
    take(&mut session, &mut mesh, response(Kind::Authorization, "n1", vec![deny("p")], &[]), 9);
    assert!(session.is_synced(), "addresses are not waited for");
    let found = Resource { aliases: vec!["n/10.0.0.1".to_owned()], ..pod("a", "1", "x") };
    let push = response(Kind::Address, "n2", vec![bad("b"), found], &["n/10.0.0.2"]);
    let Received::Push(mut push) = session.receive(push) else { panic!("a push") };
    session.advance(&mut push, 9);
    let told = [
        Told::There("b".into(), vec![]),
        Told::There("a".into(), vec!["n/10.0.0.1".into()]),
        Told::Gone("n/10.0.0.2".into()),
    ];
    assert_eq!(push.take_told(), told, "what was rejected is there");
    assert_eq!(push.take_accepted().len(), 2, "what was not held needs no removal");
    let asked = session.subscribe(vec!["n/10.0.0.3".into()], vec![]);
    assert_eq!((asked.type_url.as_str(), asked.node), (Kind::Address.type_url(), None));
    assert_eq!(asked.resource_names_subscribe, ["n/10.0.0.3"]);
    let [addresses, _] = session.open(["n/10.0.0.3"]);
    let held = [("a", "1"), ("b", ""), ("n/10.0.0.3", "")];
    let held = held.map(|(name, version)| (name.to_owned(), version.to_owned()));
    assert_eq!(addresses.initial_resource_versions, held.into());
    // What is unsubscribed from is not told of to the next stream; of what was not there nothing is kept.
    let (changes, kept) = session.unsubscribe(&["a", "b", "c"].map(Box::from));
    assert_eq!(changes, ["a", "b", "c"].map(|name| MeshChange::RemoveAddress(Arc::from(name))));
    assert_eq!(kept, ["a", "b"].map(|name| Accepted { name: Box::from(name), resource: None }));
    assert!(session.open([])[0].initial_resource_versions.is_empty());
}

#[test]
fn the_reasons_of_a_whole_mesh_do_not_fill_a_request() {
    let all = (0..20_000).map(|number| bad(&format!("workload-{number}"))).collect();
    let answer = take(&mut session(), &mut Mesh::default(), response(Kind::Address, "n", all, &[]), 512);
    assert!(rejected(&answer).len() < REASONS_MAX + 200 && rejected(&answer).ends_with(" more"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn how_a_push_is_cut_makes_no_difference(
        changes in prop::collection::vec((0..8u8, prop::option::weighted(0.8, 0..3u8)), 1..60),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
        slice in 1..7usize,
    ) {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(changes.len())).collect();
        cuts.extend([0, changes.len()]);
        cuts.sort_unstable();
        let (mut session, mut mesh) = (session(), Mesh::default());
        let mut expected = std::collections::BTreeMap::new();
        for part in cuts.windows(2).map(|cut| &changes[cut[0]..cut[1]]) {
            // In one response a resource is there once, or removed.
            let last: std::collections::BTreeMap<u8, Option<u8>> = part.iter().copied().collect();
            let name = |number: &u8| format!("w{number}");
            let resources = last.iter().filter_map(|(number, node)| {
                node.map(|node| pod(&name(number), &node.to_string(), &node.to_string()))
            });
            let removed: Vec<String> = last.iter().filter(|(_, node)| node.is_none()).map(|(number, _)| name(number)).collect();
            let removed: Vec<&str> = removed.iter().map(String::as_str).collect();
            let push = response(Kind::Address, "n", resources.collect(), &removed);
            let twice = push.clone();
            take(&mut session, &mut mesh, push, slice);
            take(&mut session, &mut mesh, twice, slice + 1);
            for (number, node) in last {
                match node {
                    Some(node) => expected.insert(name(&number), node.to_string()),
                    None => expected.remove(&name(&number)),
                };
            }
        }
        let there: std::collections::BTreeMap<String, String> =
            mesh.workloads().map(|it| (it.uid.to_string(), it.node.to_string())).collect();
        prop_assert_eq!(&there, &expected);
        let held: std::collections::BTreeMap<String, String> = session.open([])[0].initial_resource_versions.clone().into_iter().collect();
        prop_assert_eq!(held, expected);
    }
}
