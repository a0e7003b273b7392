//! One version of the mesh, indexed for the questions the data path asks.
//!
//! Made of persistent maps: a copy costs next to nothing and shares what is not changed later, so that every change
//! can be a version of its own.

use std::collections::HashSet;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::addr::NetworkAddress;
use crate::model::identity::TrustDomain;
use crate::model::policy::Policy;
use crate::model::policy::PolicyKey;
use crate::model::policy::Scope;
use crate::model::refused::Refused;
use crate::model::service::Service;
use crate::model::service::ServiceKey;
use crate::model::workload::Workload;
use crate::store::MeshChange;
use crate::store::endpoints::Endpoints;
use crate::store::map::Map;
use crate::store::network::Network;
use crate::store::network::add_service;
use crate::store::network::best;
use crate::store::network::remove_service;
use crate::store::refusals::Refusals;
use crate::store::several::Several;

/// A service, if it is known already, and its endpoints, which may be known before it.
#[derive(Debug, Clone, Default)]
struct Backed {
    service: Option<Arc<Service>>,
    endpoints: Endpoints,
}

/// The services of one name, and the workloads.
#[derive(Debug, Clone, Default)]
struct Names {
    services: Map<Arc<str>, Several<Arc<Service>>>,
    workloads: Map<Arc<str>, Several<Arc<Workload>>>,
}

/// One version of the mesh. Immutable for those who read it: a change is a new one.
#[derive(Debug, Clone, Default)]
pub struct Mesh {
    trust_domain: TrustDomain,
    workloads: Map<Arc<str>, Arc<Workload>>,
    services: Map<ServiceKey, Backed>,
    /// Services without those that have only endpoints.
    services_known: usize,
    /// A few at most.
    networks: Vec<(Arc<str>, Network)>,
    names: Names,
    policies: Map<PolicyKey, Arc<Policy>>,
    global: Arc<Vec<Arc<Policy>>>,
    by_namespace: Map<Arc<str>, Arc<Vec<Arc<Policy>>>>,
    authorization: u64,
    /// Policies that are not enforced.
    dry_runs: usize,
    refusals: Refusals,
    /// Set by the writer.
    pub(super) is_whole: bool,
    /// Which of the changes that readers see one by one is being made. Counted by the writer.
    pub(super) arrival: u32,
}

/// The policies that apply to one workload.
#[derive(Debug, Clone, Copy)]
pub struct PoliciesOf<'a> {
    mesh: &'a Mesh,
    /// Where else those are looked for that the workload names and the mesh does not have.
    newer: Option<&'a Mesh>,
    namespaced: &'a [Arc<Policy>],
    named: &'a [PolicyKey],
}

impl<'a> PoliciesOf<'a> {
    /// Those that the mesh has.
    pub fn known(self) -> impl Iterator<Item = &'a Arc<Policy>> {
        let named = self.named.iter().filter_map(move |key| self.find(key));
        self.mesh.global.iter().chain(self.namespaced).chain(named)
    }

    /// The first that the workload names and the mesh does not have. It may come yet: until then nobody knows what it
    /// says.
    pub fn missing(self) -> Option<&'a PolicyKey> {
        self.named.iter().find(|key| self.find(key).is_none())
    }

    /// The same, with those that were missing and have come since: `newer` is a later version of the mesh.
    pub fn completed_by(self, newer: &'a Mesh) -> Self {
        Self { newer: Some(newer), ..self }
    }

    fn find(self, key: &PolicyKey) -> Option<&'a Arc<Policy>> {
        self.mesh.policies.get(key).or_else(|| self.newer?.policies.get(key))
    }
}

impl Mesh {
    /// Indexes what a translator produced.
    pub fn new(
        trust_domain: TrustDomain,
        workloads: impl IntoIterator<Item = Arc<Workload>>,
        services: impl IntoIterator<Item = Arc<Service>>,
        policies: impl IntoIterator<Item = Arc<Policy>>,
    ) -> Self {
        let mut mesh = Self { trust_domain, ..Self::default() };
        services.into_iter().map(MeshChange::Service).for_each(|change| mesh.apply(change));
        workloads.into_iter().map(MeshChange::Workload).for_each(|change| mesh.apply(change));
        policies.into_iter().map(MeshChange::Policy).for_each(|change| mesh.apply(change));
        mesh
    }

    /// The trust domain whose identities this mesh accepts.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The workload with this unique name.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload that owns `ip` (canonical form) in `network`. Workloads in their node's network are not found so.
    /// Where several claim it, a pod comes before others, then one that is healthy, then one in the mesh, then the
    /// newest.
    pub fn workload_at(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.network(network)?.workload_at(ip)
    }

    /// The service that has `ip` (canonical form) in `network` as a virtual address, or in a virtual address range,
    /// for a client of `namespace`. Where several have it: that of the client's namespace, else the canonical one.
    pub fn service_at(&self, network: &str, ip: IpAddr, namespace: Option<&str>) -> Option<&Arc<Service>> {
        self.network(network)?.service_at(ip, namespace)
    }

    /// What is at `ip` (canonical form) in `network` and could not be understood, for who would be sent there else: one
    /// that has the address, unless it is also a virtual address of a service that is understood; one that has it in a
    /// range, if nothing else is known of it.
    pub fn refused_at(
        &self,
        network: &Arc<str>,
        ip: IpAddr,
        namespace: Option<&str>,
    ) -> Option<&Arc<Refused>> {
        if self.refusals.iter().len() == 0 {
            return None;
        }
        let service = self.service_at(network, ip, namespace);
        let is_vip = |vip: &NetworkAddress| vip.network == *network && vip.ip == ip;
        if service.is_some_and(|service| service.vips.iter().any(is_vip)) {
            return None;
        }
        self.refusals.at(network, ip).or_else(|| {
            let unknown = service.is_none() && self.workload_at(network, ip).is_none();
            if unknown { self.refusals.spanning(network, ip) } else { None }
        })
    }

    /// Everything that is there and could not be understood, in no order.
    pub fn refused(&self) -> impl ExactSizeIterator<Item = &Arc<Refused>> {
        self.refusals.iter()
    }

    /// The service with this unique name, `namespace/hostname`.
    pub fn service(&self, key: &str) -> Option<&Arc<Service>> {
        self.services.get(key)?.service.as_ref()
    }

    /// The service that a client of `namespace` means by `hostname`.
    pub fn service_by_hostname(&self, hostname: &str, namespace: Option<&str>) -> Option<&Arc<Service>> {
        best(self.names.services.get(hostname)?.as_slice(), namespace)
    }

    /// All services of this hostname, one per namespace at most, in the order in which they came.
    pub fn services_by_hostname(&self, hostname: &str) -> &[Arc<Service>] {
        self.names.services.get(hostname).map(Several::as_slice).unwrap_or_default()
    }

    /// The workload with this hostname, preferably of `namespace`.
    pub fn workload_by_hostname(&self, hostname: &str, namespace: &str) -> Option<&Arc<Workload>> {
        let there = self.names.workloads.get(hostname)?.as_slice();
        there.iter().find(|it| *it.namespace == *namespace).or_else(|| there.first())
    }

    /// The workloads behind a service.
    pub fn endpoints(&self, service: &ServiceKey) -> &Endpoints {
        static NONE: std::sync::LazyLock<Endpoints> = std::sync::LazyLock::new(Endpoints::default);
        self.services.get(service).map_or(&NONE, |backed| &backed.endpoints)
    }

    /// Every workload, in no order.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// Every service, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values().filter_map(|backed| backed.service.as_ref())
    }

    /// How many services there are.
    pub fn services_len(&self) -> usize {
        self.services_known
    }

    /// The endpoints whose service is not known (yet).
    pub fn staged(&self) -> impl Iterator<Item = (&ServiceKey, &Endpoints)> {
        let staged = self.services.iter().filter(|(_, backed)| backed.service.is_none());
        staged.map(|(key, backed)| (key, &backed.endpoints))
    }

    /// Every policy, in no order.
    pub fn policies(&self) -> impl ExactSizeIterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// The policies that apply to `workload`: those of the whole mesh, those of its namespace, and those it
    /// names.
    pub fn policies_of<'a>(&'a self, workload: &'a Workload) -> PoliciesOf<'a> {
        let namespaced = self.by_namespace.get(&workload.namespace).map(|list| &list[..]).unwrap_or_default();
        PoliciesOf { mesh: self, newer: None, namespaced, named: &workload.policies }
    }

    /// Whether there is any dry-run policy.
    pub fn has_dry_run_policies(&self) -> bool {
        self.dry_runs > 0
    }

    /// A number that is another one after a change of what any workload's policies are, if it is the same mesh.
    pub fn authorization_version(&self) -> u64 {
        self.authorization
    }

    /// Whether it was made as a whole. What was changed piece by piece may lack a part that is still to come.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    fn network(&self, name: &str) -> Option<&Network> {
        self.networks.iter().find(|(other, _)| **other == *name).map(|(_, network)| network)
    }

    fn network_mut(&mut self, name: &Arc<str>) -> &mut Network {
        let at = match self.networks.iter().position(|(other, _)| other == name) {
            Some(at) => at,
            None => {
                self.networks.push((Arc::clone(name), Network::default()));
                self.networks.len() - 1
            }
        };
        &mut self.networks[at].1
    }

    /// Continues the versions of another mesh, whose place this one takes.
    pub(super) fn succeed(&mut self, other: &Self) {
        self.authorization = other.authorization.wrapping_add(1);
    }

    /// Changes this version. Those who have a copy of it do not see it.
    pub fn apply(&mut self, change: MeshChange) {
        match change {
            MeshChange::Workload(workload) => {
                self.refusals.remove(&workload.uid);
                self.put_workload(workload);
            }
            MeshChange::Service(service) => {
                self.refusals.remove(service.key.as_str());
                self.put_service(service);
            }
            MeshChange::Refuse(refused) => self.refusals.put(refused),
            MeshChange::Policy(policy) => self.put_policy(policy),
            MeshChange::RemoveWorkload(uid) => {
                self.refusals.remove(&uid);
                self.remove_workload(&uid);
            }
            MeshChange::RemoveService(key) => {
                self.refusals.remove(key.as_str());
                self.remove_service(key.as_str());
            }
            MeshChange::RemoveAddress(name) => {
                self.refusals.remove(&name);
                if !self.remove_workload(&name)
                    && let Some(key) = ServiceKey::parse(name)
                {
                    self.refusals.remove(key.as_str());
                    self.remove_service(key.as_str());
                }
            }
            MeshChange::RemovePolicy(key) => self.remove_policy(&key),
        }
    }

    fn put_workload(&mut self, new: Arc<Workload>) {
        if self.workloads.get(&new.uid) == Some(&new) {
            return;
        }
        let old = self.workloads.insert(Arc::clone(&new.uid), Arc::clone(&new));
        match &old {
            Some(old) if old.policies == new.policies && old.namespace == new.namespace => {}
            // Connections of one that was gone may still be open.
            None if new.policies.is_empty() => {}
            _ => self.authorization += 1,
        }
        if let Some(old) = old {
            let [old_services, new_services] =
                [&old, &new].map(|it| it.services.iter().map(|membership| &membership.service));
            for service in gone(old_services, new_services) {
                self.remove_endpoint(service, &old.uid);
            }
            let kept = if old.network == new.network { addresses(&new) } else { &[] };
            for ip in gone(addresses(&old).iter(), kept.iter()) {
                self.unindex(&old.network, |network| network.remove_workload(*ip, &old.uid));
            }
            if old.hostname != new.hostname {
                self.remove_name(&old);
            }
        }
        for (at, membership) in new.services.iter().enumerate() {
            match self.services.get_mut(&membership.service) {
                Some(backed) => backed.endpoints.insert(&new, at),
                None => {
                    let mut staged = Backed::default();
                    staged.endpoints.insert(&new, at);
                    self.services.insert(membership.service.clone(), staged);
                }
            }
        }
        if !addresses(&new).is_empty() {
            let arrival = self.arrival;
            let network = self.network_mut(&new.network);
            addresses(&new).iter().for_each(|ip| network.add_workload(*ip, &new, arrival));
        }
        if !new.hostname.is_empty() {
            match self.names.workloads.get_mut(&new.hostname) {
                Some(there) => there.put(Arc::clone(&new), |it| it.uid == new.uid, |it| it.uid > new.uid),
                None => {
                    self.names.workloads.insert(Arc::clone(&new.hostname), Several::One(new));
                }
            }
        }
    }

    fn remove_workload(&mut self, uid: &str) -> bool {
        let Some(old) = self.workloads.remove(uid) else { return false };
        // It may come back without them.
        self.authorization += u64::from(!old.policies.is_empty());
        for membership in &old.services {
            self.remove_endpoint(&membership.service, uid);
        }
        for ip in addresses(&old) {
            self.unindex(&old.network, |network| network.remove_workload(*ip, uid));
        }
        self.remove_name(&old);
        true
    }

    fn remove_name(&mut self, old: &Workload) {
        let Some(there) = self.names.workloads.get(&old.hostname) else { return };
        match there.without(|it| it.uid == old.uid) {
            Some(left) => self.names.workloads.insert(Arc::clone(&old.hostname), left),
            None => self.names.workloads.remove(&old.hostname),
        };
    }

    fn remove_endpoint(&mut self, service: &ServiceKey, uid: &str) {
        let Some(backed) = self.services.get_mut(service) else { return };
        backed.endpoints.remove(uid);
        if backed.service.is_none() && backed.endpoints.is_empty() {
            self.services.remove(service);
        }
    }

    fn put_service(&mut self, new: Arc<Service>) {
        if self.service(new.key.as_str()) == Some(&new) {
            return;
        }
        let old = match self.services.get_mut(&new.key) {
            Some(backed) => backed.service.replace(Arc::clone(&new)),
            None => {
                let backed = Backed { service: Some(Arc::clone(&new)), endpoints: Endpoints::default() };
                self.services.insert(new.key.clone(), backed);
                None
            }
        };
        match old {
            Some(old) => self.unindex_service(&old, Some(&new)),
            None => self.services_known += 1,
        }
        for NetworkAddress { network, ip } in &new.vips {
            self.network_mut(network).add_vip(*ip, &new);
        }
        for cidr in &new.cidr_vips {
            self.network_mut(&cidr.network).add_range(cidr.range, &new);
        }
        add_service(&mut self.names.services, &new.hostname, &new);
    }

    fn remove_service(&mut self, key: &str) {
        let Some(backed) = self.services.get_mut(key) else { return };
        let Some(old) = backed.service.take() else { return };
        if backed.endpoints.is_empty() {
            self.services.remove(key);
        }
        self.services_known -= 1;
        self.unindex_service(&old, None);
        remove_service(&mut self.names.services, &old.hostname, &old);
    }

    /// Forgets the addresses of `old` that its successor does not have: those keep their places.
    fn unindex_service(&mut self, old: &Service, new: Option<&Service>) {
        let kept = new.map(|new| &new.vips[..]).unwrap_or_default();
        for vip in gone(old.vips.iter(), kept.iter()) {
            self.unindex(&vip.network, |network| network.remove_vip(vip.ip, old));
        }
        // All of one network at once.
        for of_network in old.cidr_vips.chunk_by(|a, b| a.network == b.network) {
            self.unindex(&of_network[0].network, |network| network.remove_ranges(old));
        }
    }

    fn unindex(&mut self, name: &Arc<str>, forget: impl FnOnce(&mut Network)) {
        let network = self.network_mut(name);
        forget(network);
        if network.is_empty() {
            self.networks.retain(|(other, _)| other != name);
        }
    }

    fn put_policy(&mut self, new: Arc<Policy>) {
        if self.policies.get(&new.key) == Some(&new) {
            return;
        }
        self.remove_policy(&new.key);
        self.authorization += 1;
        self.dry_runs += usize::from(new.dry_run);
        match new.scope {
            Scope::Global => Arc::make_mut(&mut self.global).push(Arc::clone(&new)),
            Scope::Namespace => {
                let list = self.by_namespace.get_or_default(&new.key.namespace);
                Arc::make_mut(list).push(Arc::clone(&new));
            }
            Scope::WorkloadSelector => {}
        }
        self.policies.insert(new.key.clone(), new);
    }

    fn remove_policy(&mut self, key: &PolicyKey) {
        let Some(old) = self.policies.remove(key) else { return };
        self.authorization += 1;
        self.dry_runs -= usize::from(old.dry_run);
        match old.scope {
            Scope::Global => Arc::make_mut(&mut self.global).retain(|policy| policy.key != *key),
            Scope::Namespace => {
                let Some(list) = self.by_namespace.get_mut(&key.namespace) else { return };
                Arc::make_mut(list).retain(|policy| policy.key != *key);
                if list.is_empty() {
                    self.by_namespace.remove(&key.namespace);
                }
            }
            Scope::WorkloadSelector => {}
        }
    }
}

/// Those of `old` that are not in `new`. Where one of them is short, as nearly all are, it is looked through.
fn gone<'a, T: Eq + Hash + 'a>(
    old: impl ExactSizeIterator<Item = &'a T>,
    new: impl ExactSizeIterator<Item = &'a T> + Clone,
) -> Vec<&'a T> {
    if old.len().min(new.len()) <= 16 {
        return old.filter(|it| !new.clone().any(|kept| kept == *it)).collect();
    }
    let new: HashSet<&T> = new.collect();
    old.filter(|it| !new.contains(it)).collect()
}

/// The addresses by which a workload is found.
fn addresses(workload: &Workload) -> &[IpAddr] {
    if workload.host_network { &[] } else { &workload.addresses }
}
