//! What is said on a discovery stream: event in, action out. Knows no network and no clock.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;
use std::vec;

use bytes::Bytes;
use ztunnel_mesh::model::service::ServiceKey;
use ztunnel_mesh::store::MeshChange;
use ztunnel_proto::discovery::DeltaDiscoveryRequest;
use ztunnel_proto::discovery::DeltaDiscoveryResponse;
use ztunnel_proto::discovery::Node;
use ztunnel_proto::discovery::Resource;
use ztunnel_proto::discovery::Status;

use crate::xds::convert::Converter;
use crate::xds::convert::Rejected;

#[cfg(test)]
mod tests;

/// A type of resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Workloads and services.
    Address,
    /// Policies.
    Authorization,
}

impl Kind {
    /// All, in the order in which they are asked for.
    pub const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    /// The name of the type on the wire.
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
        }
    }

    fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }
}

/// A reason is no longer than needed by who reads it: further resources are only counted.
const REASONS_MAX: usize = 16 * 1024;

/// A session with a control plane. It goes on when the connection is another one.
#[derive(Debug)]
pub struct Session {
    node: Node,
    converter: Converter,
    /// For each kind the names of what was accepted, with the versions.
    held: [HashMap<Box<str>, Box<str>>; 2],
    /// The names of workloads and services of which no version was accepted.
    refused: Names,
    accepted: [bool; 2],
    keeping: bool,
    on_demand: bool,
}

/// What a response said of a resource to those who asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// It is there, under this name and these others.
    There(String, Vec<String>),
    /// There is none of this name.
    Gone(String),
}

/// What became of a resource that was accepted, as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// Its name.
    pub name: Box<str>,
    /// Its version and its bytes; nothing if it was removed.
    pub resource: Option<(Box<str>, Bytes)>,
}

/// What to do with a response.
#[derive(Debug)]
pub enum Received {
    /// It brings changes: [`Session::advance`] until there are no more, then [`Session::finish`].
    Push(Push),
    /// It brings nothing of a known type. Send this.
    Refused(DeltaDiscoveryRequest),
}

/// A response of which not everything has been looked at.
#[derive(Debug)]
pub struct Push {
    kind: Kind,
    nonce: String,
    resources: vec::IntoIter<Resource>,
    removed: vec::IntoIter<String>,
    rejected: Vec<(String, Rejected)>,
    accepted: Vec<Accepted>,
    told: Vec<Told>,
}

impl Push {
    /// The type of its resources.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The resources rejected so far.
    pub fn rejected(&self) -> &[(String, Rejected)] {
        &self.rejected
    }

    /// What was said to those who asked, if the session is on demand. It is true once the changes are made.
    pub fn take_told(&mut self) -> Vec<Told> {
        std::mem::take(&mut self.told)
    }

    /// The first resource that was rejected, if any was.
    pub(super) fn take_rejected(&mut self) -> Option<(String, Rejected)> {
        (!self.rejected.is_empty()).then(|| self.rejected.swap_remove(0))
    }

    /// What was accepted since this was asked last, if the session keeps it: see [`Session::keep_accepted`].
    pub fn take_accepted(&mut self) -> Vec<Accepted> {
        std::mem::take(&mut self.accepted)
    }

    /// Whether everything has been looked at.
    pub fn is_done(&self) -> bool {
        self.resources.len() == 0 && self.removed.len() == 0
    }
}

impl Session {
    /// A session of `node` that has received nothing.
    pub fn new(node: Node) -> Self {
        let (converter, held) = (Converter::default(), Default::default());
        let refused = Names::default();
        Self { node, converter, held, refused, accepted: [false; 2], keeping: false, on_demand: false }
    }

    /// From now on only those workloads and services are wanted that are asked for. What the control plane sends of
    /// them of its own accord is taken too; the first response of that type is not waited for.
    pub fn on_demand(&mut self) {
        self.on_demand = true;
        self.accepted[Kind::Address as usize] = true;
    }

    /// The request that tells what else is wanted, or no longer: one or the other, as what is in both changes nothing.
    pub fn subscribe(&self, subscribe: Vec<String>, unsubscribe: Vec<String>) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            type_url: Kind::Address.type_url().to_owned(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// Forgets these workloads and services, which are not wanted any more: the changes of the mesh, and what became of
    /// them if that is kept.
    pub fn unsubscribe(&mut self, names: &[Box<str>]) -> (Vec<MeshChange>, Vec<Accepted>) {
        let held = &mut self.held[Kind::Address as usize];
        let refused = &mut self.refused;
        // Both are to be forgotten, and it is in one.
        let gone =
            names.iter().filter(|name| held.remove(&***name).is_some() || refused.remove(name).is_some());
        let gone: Vec<_> = gone.map(|name| Accepted { name: name.clone(), resource: None }).collect();
        let changes = names.iter().map(|name| self.converter.removed_address(name)).collect();
        (changes, if self.keeping { gone } else { Vec::new() })
    }

    /// From now on what is accepted can be had from a push as it was received.
    pub fn keep_accepted(&mut self) {
        self.keeping = true;
    }

    /// The first requests on a new stream: everything of every type, without what is held already. On demand only what
    /// is held already, and what is `wanted`.
    pub fn open<'a>(&self, wanted: impl IntoIterator<Item = &'a str>) -> [DeltaDiscoveryRequest; 2] {
        let mut requests = self.open_with_held();
        if self.on_demand {
            let [addresses, _] = &mut requests;
            // Everything, and then nothing of it.
            addresses.resource_names_subscribe = vec!["*".to_owned()];
            addresses.resource_names_unsubscribe = vec!["*".to_owned()];
            for name in wanted {
                addresses.initial_resource_versions.entry(name.to_owned()).or_default();
            }
        }
        requests
    }

    fn open_with_held(&self) -> [DeltaDiscoveryRequest; 2] {
        Kind::ALL.map(|kind| {
            let held = self.held[kind as usize].iter();
            let held = held.map(|(name, version)| (name.to_string(), version.to_string()));
            // Without a version they are sent again; without the name nobody would say that they are gone.
            let refused = self.refused.iter().filter(|_| kind == Kind::Address);
            DeltaDiscoveryRequest {
                node: Some(self.node.clone()),
                type_url: kind.type_url().to_owned(),
                initial_resource_versions: held
                    .chain(refused.map(|name| (name.to_string(), String::new())))
                    .collect(),
                ..DeltaDiscoveryRequest::default()
            }
        })
    }

    /// Whether the first response of every type was accepted.
    pub fn is_synced(&self) -> bool {
        self.accepted == [true; 2]
    }

    /// How many resources of a type are held.
    pub fn held(&self, kind: Kind) -> usize {
        self.held[kind as usize].len()
    }

    /// How many values that this version does not know were met in accepted resources.
    pub fn unknown_values(&self) -> u64 {
        self.converter.unknown_values()
    }

    /// Begins with a response.
    pub fn receive(&mut self, response: DeltaDiscoveryResponse) -> Received {
        let DeltaDiscoveryResponse { type_url, nonce, resources, removed_resources, .. } = response;
        match Kind::of(&type_url) {
            Some(kind) => Received::Push(Push {
                kind,
                nonce,
                resources: resources.into_iter(),
                removed: removed_resources.into_iter(),
                rejected: Vec::new(),
                accepted: Vec::new(),
                told: Vec::new(),
            }),
            None => {
                let message = "resources of this type were not asked for".to_owned();
                Received::Refused(answer(type_url, nonce, Some(message)))
            }
        }
    }

    /// Whether no version of this resource is held.
    pub fn has_none(&self, kind: Kind, name: &str) -> bool {
        !self.held[kind as usize].contains_key(name)
    }

    /// How many workloads and services are there of which no version was accepted.
    pub fn refused(&self) -> usize {
        self.refused.len()
    }

    /// The changes that the next resources of a response make, of `limit` of them at most. What is rejected leaves what
    /// was there before in place. If that is nothing it is refused from then on, and not unknown.
    pub fn advance(&mut self, push: &mut Push, limit: usize) -> Vec<MeshChange> {
        let mut changes = Vec::with_capacity(limit.min(push.resources.len() + push.removed.len()));
        let kind = push.kind;
        let held = &mut self.held[kind as usize];
        let telling = self.on_demand && kind == Kind::Address;
        let mut left = limit;
        for Resource { name, version, resource, aliases, .. } in push.resources.by_ref().take(left) {
            left -= 1;
            let value = resource.as_ref().map(|any| any.value.clone());
            let converted = match resource {
                Some(any) if any.type_url != kind.type_url() => {
                    Err(Rejected::Unsupported("a resource of another type than the response's"))
                }
                Some(any) => match kind {
                    Kind::Address => self.converter.address(any.value),
                    Kind::Authorization => self.converter.authorization(any.value),
                },
                None => Err(Rejected::Missing("the resource")),
            };
            match converted {
                Ok(change) => {
                    changes.push(change);
                    if telling {
                        push.told.push(Told::There(name.clone(), aliases));
                    }
                    let (name, version) = (name.into_boxed_str(), version.into_boxed_str());
                    if let Some(value) = value.filter(|_| self.keeping) {
                        let resource = Some((version.clone(), value));
                        push.accepted.push(Accepted { name: name.clone(), resource });
                    }
                    if kind == Kind::Address
                        && let Some(refused) = self.refused.remove(&name)
                        && refused != name
                        && self.keeping
                    {
                        // Nobody needs to know any more that it was refused by that name.
                        push.accepted.push(Accepted { name: refused, resource: None });
                    }
                    held.insert(name, version);
                }
                Err(reason) => {
                    if kind == Kind::Address && !name.is_empty() && !is_held(held, &name) {
                        let value = value.unwrap_or_default();
                        changes.push(self.converter.refused_address(&name, &aliases, value.clone(), &reason));
                        if telling {
                            push.told.push(Told::There(name.clone(), aliases));
                        }
                        let name = name.clone().into_boxed_str();
                        if self.keeping {
                            let resource = Some((Box::default(), value));
                            push.accepted.push(Accepted { name: name.clone(), resource });
                        }
                        self.refused.insert(name);
                    }
                    push.rejected.push((name, reason));
                }
            }
        }
        for name in push.removed.by_ref().take(left) {
            let was_refused = kind == Kind::Address && self.refused.remove(&name).is_some();
            if (held.remove(name.as_str()).is_some() || was_refused) && self.keeping {
                push.accepted.push(Accepted { name: Box::from(name.as_str()), resource: None });
            }
            match kind {
                // By another spelling of its name it is there.
                Kind::Address if is_held(held, &name) => {}
                Kind::Address => changes.push(self.converter.removed_address(&name)),
                Kind::Authorization => changes.extend(self.converter.removed_authorization(&name)),
            }
            if telling {
                push.told.push(Told::Gone(name));
            }
        }
        changes
    }

    /// The answer to a response that has been looked at: accepted, or rejected with every bad resource and its reason.
    pub fn finish(&mut self, push: Push) -> DeltaDiscoveryRequest {
        let Push { kind, nonce, rejected, .. } = push;
        let mut message = String::new();
        let mut told = 0;
        for (name, reason) in &rejected {
            if message.len() > REASONS_MAX {
                break;
            }
            let separator = if message.is_empty() { "" } else { "; " };
            let _never_fails = write!(message, "{separator}{name}: {reason}");
            told += 1;
        }
        if told < rejected.len() {
            let _never_fails = write!(message, "; and {} more", rejected.len() - told);
        }
        self.accepted[kind as usize] |= rejected.is_empty();
        answer(kind.type_url().to_owned(), nonce, (!rejected.is_empty()).then_some(message))
    }
}

/// Names by which the control plane calls what it has sent. Those of services are told apart without case.
#[derive(Debug, Default)]
struct Names(HashMap<Box<str>, Box<str>>);

impl Names {
    fn insert(&mut self, name: Box<str>) {
        self.0.insert(without_case(&name).unwrap_or_else(|| name.clone()), name);
    }

    /// As what it was called.
    fn remove(&mut self, name: &str) -> Option<Box<str>> {
        // Nearly always there is none at all.
        if self.0.is_empty() {
            return None;
        }
        match without_case(name) {
            Some(key) => self.0.remove(&key),
            None => self.0.remove(name),
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Box<str>> {
        self.0.values()
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

/// The name of a service as the mesh knows it, if it is another one than this.
fn without_case(name: &str) -> Option<Box<str>> {
    let key = ServiceKey::parse(Arc::from(name)).filter(|key| key.as_str() != name)?;
    Some(Box::from(key.as_str()))
}

/// Whether there is a good version of what is called so.
fn is_held(held: &HashMap<Box<str>, Box<str>>, name: &str) -> bool {
    held.contains_key(name) || without_case(name).is_some_and(|key| held.contains_key(&key))
}

fn answer(type_url: String, response_nonce: String, rejected: Option<String>) -> DeltaDiscoveryRequest {
    let error_detail = rejected.map(|message| Status { message, ..Status::default() });
    DeltaDiscoveryRequest { type_url, response_nonce, error_detail, ..DeltaDiscoveryRequest::default() }
}
