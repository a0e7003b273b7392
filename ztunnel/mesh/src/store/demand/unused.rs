//! Which of what was found nobody uses any more. Pure: the mesh, and when what was used last, in; names out.

use std::collections::HashMap;

use crate::model::service::GatewayAddress;
use crate::model::service::GatewayDestination;
use crate::model::workload::Workload;
use crate::model::workload::WorkloadKind;
use crate::store::index::Mesh;

/// Time as use is recorded: it goes on now and then. Never 0 for what was used.
pub(super) type Epoch = u32;

/// What may be unsubscribed from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// What was last used this many epochs ago or more.
    pub(super) after: Epoch,
    /// Of more than that, those that were not used for longest.
    pub(super) names_max: usize,
}

/// Whether it was used just now: somebody may be about to decide by it. Never unsubscribed from, whatever the bounds.
pub(super) fn is_recent(used: Epoch, now: Epoch) -> bool {
    now.saturating_sub(used) <= 1
}

/// The names to be unsubscribed from, of all that the source knows by name, each with its last use. What others rely on is used as
/// late as they are: endpoints of a service, without which it would be balanced over fewer, and gateways. So a service
/// goes before its endpoints do, or with them. The workloads of `node` stay: its pods' connections are judged by them.
pub(super) fn unused<'a>(
    mesh: &Mesh,
    node: &str,
    names: impl Iterator<Item = (&'a str, Epoch)>,
    now: Epoch,
    bounds: Bounds,
) -> Vec<&'a str> {
    let mut used: HashMap<&str, Epoch> = names.collect();
    let mut relied = Vec::new();
    for (name, at) in &used {
        relied.extend(relied_on(mesh, name).map(|gateway| (gateway, *at)));
    }
    later(&mut used, relied);
    let mut endpoints = Vec::new();
    for name in used.keys() {
        let services = mesh.workload(name).into_iter().flat_map(|it| &it.services);
        let last = services.filter_map(|member| used.get(member.service.as_str())).max();
        endpoints.extend(last.map(|at| (*name, *at)));
    }
    later(&mut used, endpoints);

    let total = used.len();
    let is_own = |name: &str| mesh.workload(name).is_some_and(|workload| may_be_on(node, workload));
    let mut idle: Vec<(Epoch, bool, &str)> = used
        .into_iter()
        .filter(|(name, at)| !is_recent(*at, now) && !is_own(name))
        .map(|(name, at)| (at, mesh.workload(name).is_some(), name))
        .collect();
    // Services come before workloads of the same age.
    idle.sort_unstable();
    let expired = idle.partition_point(|(at, ..)| now - at >= bounds.after);
    // Some room is made at once: looking through all takes its time.
    let crowded = match total > bounds.names_max {
        true => total - bounds.names_max + bounds.names_max / 8,
        false => 0,
    };
    idle.truncate(expired.max(crowded));
    idle.into_iter().map(|(.., name)| name).collect()
}

/// These were used as late as this, or later.
fn later(used: &mut HashMap<&str, Epoch>, at_least: Vec<(&str, Epoch)>) {
    for (name, at) in at_least {
        if let Some(known) = used.get_mut(name) {
            *known = at.max(*known);
        }
    }
}

/// A pod of which nobody says where it is may be one of this node's: see [`Named`](crate::model::workload::Named).
fn may_be_on(node: &str, workload: &Workload) -> bool {
    *workload.node == *node || (workload.node.is_empty() && workload.kind == WorkloadKind::Pod)
}

/// The gateways in front of what has this name, by theirs.
fn relied_on<'a>(mesh: &'a Mesh, name: &str) -> impl Iterator<Item = &'a str> + use<'a> {
    let (workload, service) = (mesh.workload(name), mesh.service(name));
    let of_workload = workload.into_iter().flat_map(|it| it.waypoint.iter().chain(&it.network_gateway));
    let of_service = service.into_iter().flat_map(|it| {
        it.waypoint.iter().chain(it.weighted_waypoints.iter().map(|weighted| &weighted.gateway))
    });
    of_workload.chain(of_service).flat_map(|gateway| named(mesh, gateway))
}

/// All that may be meant by a gateway.
fn named<'a>(mesh: &'a Mesh, gateway: &GatewayAddress) -> impl Iterator<Item = &'a str> + use<'a> {
    let (service, workload) = match &gateway.destination {
        GatewayDestination::Hostname(key) => {
            let service = match key.namespace() {
                "" => mesh.service_by_hostname(key.hostname(), None),
                _ => mesh.service(key.as_str()),
            };
            (service, mesh.workload_by_hostname(key.hostname(), key.namespace()))
        }
        GatewayDestination::Address(at) => {
            (mesh.service_at(&at.network, at.ip, None), mesh.workload_at(&at.network, at.ip))
        }
    };
    service.map(|it| it.key.as_str()).into_iter().chain(workload.map(|it| &*it.uid))
}
