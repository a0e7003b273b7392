//! Wire messages → changes of the mesh. A resource is taken as a whole or rejected with a reason, and a bad one harms
//! no other.
//!
//! What is wrong is rejected: addresses that are none, ports out of range, names without their parts. What is only
//! newer than this version (an enumerator it does not know) is taken with the most careful meaning and counted, so that
//! a newer control plane does not blind an older proxy: an endpoint in an unknown state is not healthy, one that is
//! reached in an unknown way is not reached, a scope that is not known has nobody in common. An authorization policy is
//! always taken, however little of it is understood: see `convert::authorization`.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use bytes::Bytes;
use ztunnel_mesh::model::addr::NetworkAddress;
use ztunnel_mesh::model::addr::canonical_ip;
use ztunnel_mesh::model::identity::InvalidSpiffeId;
use ztunnel_mesh::model::policy::PolicyKey;
use ztunnel_mesh::model::refused::Refused;
use ztunnel_mesh::model::service::ServiceKey;
use ztunnel_mesh::store::MeshChange;
use ztunnel_proto::prost::DecodeError;
use ztunnel_proto::prost::Message;
use ztunnel_proto::security;
use ztunnel_proto::workload as wire;

use crate::xds::intern::Interner;

mod authorization;
mod service;
mod workload;

#[cfg(test)]
mod tests;

/// Why a resource is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// It is no message of its type.
    #[error("cannot be decoded: {0}")]
    Decode(DecodeError),
    /// It is empty where it should be one of several things.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// An address has neither 4 nor 16 bytes.
    #[error("an address of {0} bytes")]
    Address(usize),
    /// The prefix is longer than the address.
    #[error("a prefix of {0} bits is longer than the address")]
    Prefix(u32),
    /// A number is no port.
    #[error("{0} is not a port")]
    Port(u32),
    /// A value has a meaning that is not supported, and never was.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    /// A name has not its parts.
    #[error("{0:?} is not of the form namespace/name")]
    Name(String),
    /// The identity would not be one.
    #[error(transparent)]
    Identity(#[from] InvalidSpiffeId),
}

/// Translates resources. Keeps one copy of what many of them say.
#[derive(Debug, Default)]
pub struct Converter {
    interner: Interner,
    unknown: u64,
}

impl Converter {
    /// How many values this version did not know were met so far, in resources that were taken.
    pub fn unknown_values(&self) -> u64 {
        self.unknown
    }

    /// Translates a resource of the type `istio.workload.Address`.
    pub fn address(&mut self, resource: Bytes) -> Result<MeshChange, Rejected> {
        let address = wire::Address::decode(resource).map_err(Rejected::Decode)?;
        match address.r#type.ok_or(Rejected::Missing("the workload or service"))? {
            wire::address::Type::Workload(workload) => {
                Ok(MeshChange::Workload(Arc::new(self.workload(&workload)?)))
            }
            wire::address::Type::Service(service) => {
                Ok(MeshChange::Service(Arc::new(self.service(&service)?)))
            }
        }
    }

    /// Translates a resource of the type `istio.security.Authorization`.
    pub fn authorization(&mut self, resource: Bytes) -> Result<MeshChange, Rejected> {
        let policy = security::Authorization::decode(resource).map_err(Rejected::Decode)?;
        Ok(MeshChange::Policy(Arc::new(self.policy(&policy)?)))
    }

    /// What can be said of an `istio.workload.Address` that was rejected: that it is there, under this name, and at
    /// those of its addresses that can be read. `aliases` are other names of it, which may say addresses too.
    pub fn refused_address(
        &mut self,
        name: &str,
        aliases: &[String],
        resource: Bytes,
        reason: &Rejected,
    ) -> MeshChange {
        let mut refused = Refused {
            name: Arc::from(name),
            addresses: Vec::new(),
            ranges: Vec::new(),
            reason: Arc::from(reason.to_string()),
        };
        let address = wire::Address::decode(resource).ok().and_then(|address| address.r#type);
        // As a good version would be named, which may be of a service where this one cannot be read.
        if !matches!(address, Some(wire::address::Type::Workload(_)))
            && let Some(key) = ServiceKey::parse(Arc::from(name))
        {
            refused.name = Arc::from(key.as_str());
        }
        match address {
            Some(wire::address::Type::Workload(workload)) => self.refused_workload(&workload, &mut refused),
            Some(wire::address::Type::Service(service)) => self.refused_service(&service, &mut refused),
            None => {}
        }
        for alias in aliases {
            let Some((network, ip)) = alias.rsplit_once('/') else { continue };
            let Ok(ip) = ip.parse().map(canonical_ip) else { continue };
            refused.addresses.push(NetworkAddress { network: self.interner.text(network), ip });
        }
        refused.addresses.sort_unstable();
        refused.addresses.dedup();
        MeshChange::Refuse(Arc::new(refused))
    }

    /// The removal of an `istio.workload.Address` by its name.
    pub fn removed_address(&mut self, name: &str) -> MeshChange {
        MeshChange::RemoveAddress(Arc::from(name))
    }

    /// The removal of an `istio.security.Authorization` by its name; nothing if no policy can have that name.
    pub fn removed_authorization(&mut self, name: &str) -> Option<MeshChange> {
        policy_key(&mut self.interner, name).map(MeshChange::RemovePolicy)
    }

    /// Counts an enumerator that is not known, and gives it its careful meaning.
    fn unknown<T>(&mut self, careful: T) -> T {
        self.unknown += 1;
        careful
    }
}

/// A list of what is different, in the order in which it came.
struct Distinct<T> {
    list: Vec<T>,
    /// What is in the list, once that is so long that it is not looked through any more.
    seen: HashSet<T>,
}

/// Lists are looked through while they are not longer. Nearly all are.
const LOOKED_THROUGH: usize = 16;

impl<T: Clone + Eq + Hash> Distinct<T> {
    fn with_capacity(capacity: usize) -> Self {
        Self { list: Vec::with_capacity(capacity), seen: HashSet::new() }
    }

    fn push(&mut self, new: T) {
        if self.list.len() < LOOKED_THROUGH {
            if !self.list.contains(&new) {
                self.list.push(new);
            }
            return;
        }
        if self.seen.is_empty() {
            self.seen.extend(self.list.iter().cloned());
        }
        if self.seen.insert(new.clone()) {
            self.list.push(new);
        }
    }
}

/// The name of a policy, `namespace/name`.
fn policy_key(interner: &mut Interner, text: &str) -> Option<PolicyKey> {
    let (namespace, name) = text.split_once('/')?;
    let valid = !namespace.is_empty() && !name.is_empty();
    valid.then(|| PolicyKey { namespace: interner.text(namespace), name: interner.text(name) })
}
