//! What the addresses of one network belong to.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::service::Service;
use crate::model::workload::Reach;
use crate::model::workload::Workload;
use crate::store::map::Map;
use crate::store::several::Several;

/// A workload that says an address is its own.
#[derive(Debug, Clone)]
struct Claim {
    workload: Arc<Workload>,
    /// Which of the mesh's changes it came with: later ones have greater numbers.
    arrival: u32,
}

/// The indexes of one network.
#[derive(Debug, Clone, Default)]
pub(super) struct Network {
    workloads: Map<IpAddr, Several<Claim>>,
    vips: Map<IpAddr, Several<Arc<Service>>>,
    /// Few, as a rule none, and looked through one by one.
    ranges: Arc<Vec<(IpNet, Arc<Service>)>>,
}

impl Network {
    pub(super) fn is_empty(&self) -> bool {
        self.workloads.is_empty() && self.vips.is_empty() && self.ranges.is_empty()
    }

    pub(super) fn workload_at(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads.get(&ip)?.as_slice().first().map(|claim| &claim.workload)
    }

    /// The service at `ip` that a client of `namespace` finds: one with that address; if there is none, one with a
    /// range that has it.
    pub(super) fn service_at(&self, ip: IpAddr, namespace: Option<&str>) -> Option<&Arc<Service>> {
        let exact = self.vips.get(&ip).map(Several::as_slice).unwrap_or_default();
        best(exact, namespace).or_else(|| {
            let containing = self
                .ranges
                .iter()
                .filter(|(range, service)| range.contains(&ip) && service.is_visible_to(namespace));
            let rank = |(range, service): &(IpNet, Arc<Service>)| {
                let own = namespace.is_some_and(|namespace| *namespace == *service.namespace);
                (own, range.prefix_len(), service.canonical)
            };
            // The first of the best.
            let first = containing.reduce(|best, other| if rank(other) > rank(best) { other } else { best });
            first.map(|(_, service)| service)
        })
    }

    /// `workload` says that `ip` is its own. If it said so before, it has come then, and not now.
    pub(super) fn add_workload(&mut self, ip: IpAddr, workload: &Arc<Workload>, arrival: u32) {
        let mut added = Claim { workload: Arc::clone(workload), arrival };
        match self.workloads.get_mut(&ip) {
            None => {
                self.workloads.insert(ip, Several::One(added));
            }
            Some(claims) => {
                let is_it = |it: &Claim| it.workload.uid == workload.uid;
                if let Some(before) = claims.as_slice().iter().find(|it| is_it(it)) {
                    added.arrival = before.arrival;
                }
                let place = added.clone();
                claims.put(added, is_it, |it| place.rank() < it.rank());
            }
        }
    }

    pub(super) fn remove_workload(&mut self, ip: IpAddr, uid: &str) {
        let Some(claims) = self.workloads.get(&ip) else { return };
        match claims.without(|it| *it.workload.uid == *uid) {
            Some(left) => self.workloads.insert(ip, left),
            None => self.workloads.remove(&ip),
        };
    }

    pub(super) fn add_vip(&mut self, ip: IpAddr, service: &Arc<Service>) {
        add_service(&mut self.vips, &ip, service);
    }

    pub(super) fn remove_vip(&mut self, ip: IpAddr, service: &Service) {
        remove_service(&mut self.vips, &ip, service);
    }

    pub(super) fn add_range(&mut self, range: IpNet, service: &Arc<Service>) {
        Arc::make_mut(&mut self.ranges).push((range, Arc::clone(service)));
    }

    pub(super) fn remove_ranges(&mut self, service: &Service) {
        Arc::make_mut(&mut self.ranges).retain(|(_, it)| it.key != service.key);
    }
}

impl Claim {
    /// The better claim is the smaller: a pod before what else says it has the address; one that is healthy before one
    /// that is about to end; one in the mesh before one outside; the newest; then any order that is the same on every
    /// node.
    fn rank(&self) -> (bool, bool, bool, Reverse<u32>, &str) {
        let Workload { uid, healthy, reach, .. } = &*self.workload;
        (!uid.contains("//Pod/"), !healthy, *reach != Reach::Hbone, Reverse(self.arrival), uid)
    }
}

/// The one a client of `namespace` finds: of its own namespace, else the canonical one, else the first.
pub(super) fn best<'a>(candidates: &'a [Arc<Service>], namespace: Option<&str>) -> Option<&'a Arc<Service>> {
    let visible = || candidates.iter().filter(|service| service.is_visible_to(namespace));
    let own = |service: &&Arc<Service>| namespace.is_some_and(|namespace| *namespace == *service.namespace);
    visible().find(own).or_else(|| visible().find(|service| service.canonical)).or_else(|| visible().next())
}

/// Adds a service to those of one address or name. One that is there already keeps its place among them.
pub(super) fn add_service<K: Clone + Eq + std::hash::Hash>(
    services: &mut Map<K, Several<Arc<Service>>>,
    at: &K,
    service: &Arc<Service>,
) {
    match services.get_mut(at) {
        None => {
            services.insert(at.clone(), Several::One(Arc::clone(service)));
        }
        Some(there) => {
            let next = there.as_slice().iter().position(|it| it.key == service.key).map(|at| at + 1);
            let after = next.and_then(|next| there.as_slice().get(next)).map(|it| it.key.clone());
            let before = |it: &Arc<Service>| after.as_ref() == Some(&it.key);
            there.put(Arc::clone(service), |it| it.key == service.key, before);
        }
    }
}

pub(super) fn remove_service<K: Clone + Eq + std::hash::Hash>(
    services: &mut Map<K, Several<Arc<Service>>>,
    at: &K,
    service: &Service,
) {
    let Some(there) = services.get(at) else { return };
    match there.without(|it| it.key == service.key) {
        Some(left) => services.insert(at.clone(), left),
        None => services.remove(at),
    };
}
