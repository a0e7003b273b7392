//! Pushes of a control plane, one after the other: resources good and bad, known and new, put and removed, in pieces.
//!
//! After each push the mesh holds exactly what was accepted, each of its indexes answers as a look at everything would,
//! the answer names what was rejected, and the same push once more changes nothing. Once everything is removed there is
//! nothing left.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use arbitrary::Result;
use arbitrary::Unstructured;
use bytes::Bytes;
use ztunnel_mesh::store::MeshChange;
use ztunnel_mesh::store::index::Mesh;
use ztunnel_mesh::store::mesh;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::policy::Scope;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::workload::Reach;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_node::xds::session::Kind;
use ztunnel_node::xds::session::Received;
use ztunnel_node::xds::session::Session;
use ztunnel_proto::Any;
use ztunnel_proto::discovery::DeltaDiscoveryResponse;
use ztunnel_proto::discovery::Node;
use ztunnel_proto::discovery::Resource;
use ztunnel_proto::prost::Message;
use ztunnel_proto::workload::Address;
use ztunnel_proto::workload::address::Type;

use crate::wire;
use crate::wire::pick;

/// What was accepted, by name.
#[derive(Default)]
struct Model {
    workloads: BTreeMap<String, Arc<Workload>>,
    services: BTreeMap<String, Arc<Service>>,
    policies: BTreeMap<String, Arc<Policy>>,
}

impl Model {
    fn apply(&mut self, change: &MeshChange) {
        match change {
            MeshChange::Workload(it) => drop(self.workloads.insert(it.uid.to_string(), Arc::clone(it))),
            MeshChange::Service(it) => drop(self.services.insert(it.key.to_string(), Arc::clone(it))),
            MeshChange::Policy(it) => drop(self.policies.insert(it.key.to_string(), Arc::clone(it))),
            MeshChange::Refuse(_) => {}
            MeshChange::RemoveWorkload(uid) => drop(self.workloads.remove(&**uid)),
            MeshChange::RemoveService(key) => drop(self.services.remove(key.as_str())),
            MeshChange::RemoveAddress(name) => {
                if self.workloads.remove(&**name).is_none() {
                    self.services.remove(&**name);
                }
            }
            MeshChange::RemovePolicy(key) => drop(self.policies.remove(&key.to_string())),
        }
    }
}

/// Everything there is to see, in an order that does not depend on how it came about.
pub fn seen(mesh: &Mesh) -> Vec<String> {
    let workloads = mesh.workloads().map(|it| format!("{it:?}"));
    let services = mesh.services().map(|it| format!("{it:?} {:?}", mesh.endpoints(&it.key)));
    let staged = mesh.staged().map(|(key, endpoints)| format!("{key} {endpoints:?}"));
    let policies = mesh.policies().map(|it| format!("{it:?}"));
    let mut all: Vec<String> = workloads.chain(services).chain(staged).chain(policies).collect();
    all.sort_unstable();
    all
}

fn policies_of(mesh: &Mesh, workload: &Workload) -> std::result::Result<BTreeSet<String>, String> {
    let policies = mesh.policies_of(workload);
    match policies.missing() {
        None => Ok(policies.known().map(|it| format!("{it:?}")).collect()),
        Some(missing) => Err(missing.to_string()),
    }
}

/// Compares the primary contents and every index with what `model` has.
fn check(mesh: &Mesh, model: &Model) {
    assert_eq!(mesh.workloads().len(), model.workloads.len());
    assert_eq!(mesh.services().count(), model.services.len());
    assert_eq!(mesh.services_len(), model.services.len());
    assert_eq!(mesh.policies().len(), model.policies.len());
    for (uid, workload) in &model.workloads {
        assert_eq!(mesh.workload(uid), Some(workload));
    }
    for (key, service) in &model.services {
        assert_eq!(mesh.service(key), Some(service));
    }
    assert_eq!(mesh.has_dry_run_policies(), model.policies.values().any(|policy| policy.dry_run));
    endpoints(mesh, model);
    addresses(mesh, model);
    names(mesh, model);
    for workload in model.workloads.values() {
        let missing = workload.policies.iter().find(|key| !model.policies.contains_key(&key.to_string()));
        let expected = match missing {
            Some(missing) => Err(missing.to_string()),
            None => Ok(model
                .policies
                .values()
                .filter(|policy| match policy.scope {
                    Scope::Global => true,
                    Scope::Namespace => policy.key.namespace == workload.namespace,
                    Scope::WorkloadSelector => false,
                } || workload.policies.contains(&policy.key))
                .map(|policy| format!("{policy:?}"))
                .collect()),
        };
        assert_eq!(policies_of(mesh, workload), expected);
    }
}

fn endpoints(mesh: &Mesh, model: &Model) {
    let mut expected: BTreeMap<String, Vec<&Arc<Workload>>> = BTreeMap::new();
    for workload in model.workloads.values() {
        for membership in &workload.services {
            expected.entry(membership.service.to_string()).or_default().push(workload);
        }
    }
    let staged: BTreeSet<String> = mesh.staged().map(|(key, _)| key.to_string()).collect();
    let without: BTreeSet<String> =
        expected.keys().filter(|key| !model.services.contains_key(*key)).cloned().collect();
    assert_eq!(staged, without);
    for (key, endpoints) in mesh.staged().chain(mesh.services().map(|it| (&it.key, mesh.endpoints(&it.key))))
    {
        let theirs = expected.remove(key.as_str()).unwrap_or_default();
        let ours: Vec<&Arc<Workload>> = endpoints.iter().map(|it| it.workload()).collect();
        assert_eq!(ours, theirs, "the endpoints of {key}");
        let members = endpoints.iter().all(|it| it.membership().is_some_and(|it| it.service == *key));
        assert!(members, "an endpoint of {key} is none");
    }
    assert!(expected.is_empty());
}

/// Of those that can be seen: one of the client's namespace, else a canonical one, else any.
fn is_best(found: Option<&Arc<Service>>, among: &[&Arc<Service>], namespace: Option<&str>) {
    let own = |it: &Arc<Service>| namespace.is_some_and(|namespace| *namespace == *it.namespace);
    let Some(found) = found else { return assert!(among.is_empty(), "one of {among:?} was not found") };
    assert!(among.contains(&found), "{found:?} is none of {among:?}");
    if among.iter().any(|it| own(it)) {
        assert!(own(found));
    } else if among.iter().any(|it| it.canonical) {
        assert!(found.canonical);
    }
}

fn addresses(mesh: &Mesh, model: &Model) {
    let mut ips: BTreeSet<IpAddr> = model.workloads.values().flat_map(|it| it.addresses.clone()).collect();
    ips.extend(model.services.values().flat_map(|it| it.vips.iter().map(|vip| vip.ip)));
    ips.extend(model.services.values().flat_map(|it| it.cidr_vips.iter().map(|cidr| cidr.range.addr())));
    for ip in ips {
        for network in wire::NETWORKS {
            let claims = model
                .workloads
                .values()
                .filter(|it| !it.host_network && *it.network == *network && it.addresses.contains(&ip));
            let best = claims
                .min_by_key(|it| (!it.uid.contains("//Pod/"), it.reach != Reach::Hbone, Arc::clone(&it.uid)));
            assert_eq!(mesh.workload_at(network, ip), best);
            for namespace in [None, Some("a"), Some("shop")] {
                let found = mesh.service_at(network, ip, namespace);
                let visible = || model.services.values().filter(|it| it.is_visible_to(namespace));
                let exact: Vec<_> = visible()
                    .filter(|it| it.vips.iter().any(|vip| *vip.network == *network && vip.ip == ip))
                    .collect();
                if !exact.is_empty() {
                    is_best(found, &exact, namespace);
                    continue;
                }
                let rank = |it: &Arc<Service>| {
                    let ranges = it.cidr_vips.iter().filter(|cidr| *cidr.network == *network);
                    let longest = ranges
                        .filter(|cidr| cidr.range.contains(&ip))
                        .map(|it| it.range.prefix_len())
                        .max()?;
                    let own = namespace.is_some_and(|namespace| *namespace == *it.namespace);
                    Some((own, longest, it.canonical))
                };
                assert_eq!(found.and_then(&rank), visible().filter_map(rank).max());
                assert_eq!(found.is_some(), visible().any(|it| rank(it).is_some()));
            }
        }
    }
}

fn names(mesh: &Mesh, model: &Model) {
    for host in wire::HOSTS {
        for namespace in wire::NAMESPACES {
            let visible = model.services.values().filter(|it| *it.hostname == *host);
            let visible: Vec<_> = visible.filter(|it| it.is_visible_to(Some(namespace))).collect();
            is_best(mesh.service_by_hostname(host, Some(namespace)), &visible, Some(namespace));
            let named: Vec<_> = model.workloads.values().filter(|it| *it.hostname == *host).collect();
            let found = mesh.workload_by_hostname(host, namespace);
            match named.iter().find(|it| *it.namespace == *namespace) {
                _ if host.is_empty() => assert_eq!(found, None),
                Some(_) => assert!(found.is_some_and(|it| *it.namespace == *namespace)),
                None => assert_eq!(found.is_some(), !named.is_empty()),
            }
        }
    }
}

/// A resource by the name that it should have.
fn resource(u: &mut Unstructured<'_>, kind: Kind) -> Result<Resource> {
    let (name, value) = match (kind, u.int_in_range(0..=15)?) {
        (_, 0) => (wire::word(u)?, u.arbitrary::<&[u8]>()?.to_vec()),
        (Kind::Authorization, _) => {
            let policy = wire::authorization(u)?;
            (format!("{}/{}", policy.namespace, policy.name), policy.encode_to_vec())
        }
        (Kind::Address, 1..=9) => {
            let workload = wire::workload(u)?;
            (workload.uid.clone(), Address { r#type: Some(Type::Workload(workload)) }.encode_to_vec())
        }
        (Kind::Address, _) => {
            let service = wire::service(u)?;
            let name = format!("{}/{}", service.namespace, service.hostname);
            (name, Address { r#type: Some(Type::Service(service)) }.encode_to_vec())
        }
    };
    let other = u.ratio(1, 32)?;
    let type_url = if other { "type.googleapis.com/other" } else { kind.type_url() }.to_owned();
    let any = Any { type_url, value: Bytes::from(value) };
    let resource = if u.ratio(1, 32)? { None } else { Some(any) };
    Ok(Resource { name, version: wire::word(u)?, resource, ..Resource::default() })
}

/// A response with resources by the names that they should have.
pub fn push(u: &mut Unstructured<'_>) -> Result<DeltaDiscoveryResponse> {
    let kind = *u.choose(&[Kind::Address, Kind::Address, Kind::Authorization])?;
    let removed: &[&str] = match kind {
        Kind::Address => {
            &["c//Pod/a/1", "c//Pod/a/2", "c//Pod/shop/3", "vm/4", "a/x", "b/x", "shop/y.shop", ""]
        }
        Kind::Authorization => &wire::POLICIES,
    };
    Ok(DeltaDiscoveryResponse {
        type_url: kind.type_url().to_owned(),
        nonce: wire::word(u)?,
        resources: wire::few(u, 4, |u| resource(u, kind))?,
        removed_resources: wire::few(u, 2, |u| Ok(pick(u, removed)?.to_owned()))?,
        ..DeltaDiscoveryResponse::default()
    })
}

/// Whether everything has a name of its own: then the order makes no difference.
fn is_plain(changes: &[MeshChange]) -> bool {
    let mut names = BTreeSet::new();
    changes.iter().all(|change| {
        names.insert(match change {
            MeshChange::Workload(it) => it.uid.to_string(),
            MeshChange::Service(it) => it.key.to_string(),
            MeshChange::Policy(it) => it.key.to_string(),
            MeshChange::Refuse(it) => it.name.to_string(),
            MeshChange::RemoveWorkload(name) | MeshChange::RemoveAddress(name) => name.to_string(),
            MeshChange::RemoveService(key) => key.to_string(),
            MeshChange::RemovePolicy(key) => key.to_string(),
        })
    })
}

/// Up to eight pushes.
pub fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let (mut writer, reader) = mesh();
    let mut session = Session::new(Node::default());
    let mut model = Model::default();
    for _ in 0..8 {
        let (Ok(response), Ok(limit)) = (push(&mut u), u.int_in_range(1..=3)) else { break };
        let before = reader.snapshot();
        let (brought, removed) = (response.resources.len(), response.removed_resources.clone());
        let nonce = response.nonce.clone();
        let Received::Push(mut push) = session.receive(response) else { panic!("the type is known") };
        let kind = push.kind();
        let mut changes = Vec::new();
        while !push.is_done() {
            let some = session.advance(&mut push, limit);
            assert!(some.len() <= limit);
            changes.extend(some);
        }
        let rejected = push.rejected().to_vec();
        let named = removed.iter().filter(|name| kind == Kind::Address || is_policy_name(name)).count();
        let refused = changes.iter().filter(|change| matches!(change, MeshChange::Refuse(_))).count();
        assert!(refused <= rejected.len());
        assert_eq!(changes.len() - refused, brought - rejected.len() + named, "each is taken or rejected");
        let answer = session.finish(push);
        assert_eq!(answer.response_nonce, nonce);
        assert_eq!(answer.error_detail.is_some(), !rejected.is_empty());
        for (name, reason) in &rejected {
            let told = &answer.error_detail.as_ref().expect("it was just looked at").message;
            assert!(told.contains(name.as_str()) && told.contains(&reason.to_string()), "{told}");
        }
        changes.iter().for_each(|change| model.apply(change));
        writer.apply(changes.clone());
        let after = reader.snapshot();
        check(&after, &model);
        for workload in after.workloads() {
            let same = before
                .workload(&workload.uid)
                .is_none_or(|old| policies_of(&before, old) == policies_of(&after, workload));
            assert!(same || before.authorization_version() != after.authorization_version());
        }
        if is_plain(&changes) {
            let told = seen(&after);
            writer.apply(changes);
            assert_eq!(seen(&reader.snapshot()), told, "the same again changes nothing");
            check(&reader.snapshot(), &model);
            assert_eq!(reader.snapshot().authorization_version(), after.authorization_version());
        }
    }
    writer.apply(model.workloads.keys().map(|uid| MeshChange::RemoveWorkload(Arc::from(uid.as_str()))));
    writer.apply(model.services.values().map(|it| MeshChange::RemoveService(it.key.clone())));
    writer.apply(model.policies.values().map(|it| MeshChange::RemovePolicy(it.key.clone())));
    let left = reader.snapshot();
    check(&left, &Model::default());
    assert_eq!(seen(&left), Vec::<String>::new());
    assert!(format!("{left:?}").contains("networks: []"), "an index is left: {left:?}");
}

fn is_policy_name(name: &str) -> bool {
    name.split_once('/').is_some_and(|(namespace, name)| !namespace.is_empty() && !name.is_empty())
}
