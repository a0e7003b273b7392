//! One version of the mesh, indexed for the questions the data path asks.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::identity::TrustDomain;
use crate::model::policy::Policy;
use crate::model::policy::PolicyKey;
use crate::model::policy::Scope;
use crate::model::service::Service;
use crate::model::workload::Workload;

/// One version of the mesh. Immutable: a change is a new one.
#[derive(Debug, Default)]
pub struct Mesh {
    trust_domain: TrustDomain,
    workloads: HashMap<Arc<str>, Arc<Workload>>,
    by_ip: HashMap<IpAddr, Arc<Workload>>,
    services: Vec<Arc<Service>>,
    by_vip: HashMap<IpAddr, Arc<Service>>,
    policies: HashMap<PolicyKey, Arc<Policy>>,
    global: Vec<Arc<Policy>>,
    by_namespace: HashMap<Arc<str>, Vec<Arc<Policy>>>,
}

impl Mesh {
    /// Indexes what a translator produced. Where two workloads claim one address, the first is kept:
    /// translators report such claims before it comes to this.
    pub fn new(
        trust_domain: TrustDomain,
        workloads: impl IntoIterator<Item = Arc<Workload>>,
        services: impl IntoIterator<Item = Arc<Service>>,
        policies: impl IntoIterator<Item = Arc<Policy>>,
    ) -> Self {
        let mut mesh = Self { trust_domain, ..Self::default() };
        for workload in workloads {
            if !workload.host_network {
                for ip in &workload.addresses {
                    mesh.by_ip.entry(*ip).or_insert_with(|| Arc::clone(&workload));
                }
            }
            mesh.workloads.insert(Arc::clone(&workload.uid), workload);
        }
        for service in services {
            for vip in &service.vips {
                mesh.by_vip.entry(*vip).or_insert_with(|| Arc::clone(&service));
            }
            mesh.services.push(service);
        }
        for policy in policies {
            match policy.scope {
                Scope::Global => mesh.global.push(Arc::clone(&policy)),
                Scope::Namespace => mesh
                    .by_namespace
                    .entry(Arc::clone(&policy.key.namespace))
                    .or_default()
                    .push(Arc::clone(&policy)),
                Scope::WorkloadSelector => {}
            }
            mesh.policies.insert(policy.key.clone(), policy);
        }
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

    /// The workload that owns `ip` (canonical form). Workloads in their node's network are not found so.
    pub fn workload_at(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.by_ip.get(&ip)
    }

    /// The service that has `ip` (canonical form) as a virtual address.
    pub fn service_at(&self, ip: IpAddr) -> Option<&Arc<Service>> {
        self.by_vip.get(&ip)
    }

    /// Every workload, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// Every service.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.iter()
    }

    /// Every policy, in no order.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// The policies that apply to `workload`: those of the whole mesh, those of its namespace, and those it
    /// names. A name that no policy has is an error in the mesh, which fails closed.
    pub fn policies_of<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> Result<impl Iterator<Item = &'a Arc<Policy>>, &'a PolicyKey> {
        let mut selected = Vec::with_capacity(workload.policies.len());
        for key in &workload.policies {
            selected.push(self.policies.get(key).ok_or(key)?);
        }
        let namespaced = self.by_namespace.get(&workload.namespace).into_iter().flatten();
        Ok(self.global.iter().chain(namespaced).chain(selected))
    }
}
