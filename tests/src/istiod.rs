//! A control plane that serves a mesh as istiod does: what is new or gone, to each who asks, by what it holds.
//!
//! It runs on a thread of its own, so that it can be told from anywhere. What is told one by one is sent one by one;
//! what belongs together ([`Istiod::push`]) is sent as istiod does, workloads and services in one response and then
//! policies in another. For a control plane that says exactly what a test wants, see [`crate::control_plane`].

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Result, ensure};
use parking_lot::{Mutex, MutexGuard};
use rustls::ServerConfig;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use ztunnel_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use ztunnel_proto::prost::Message;
use ztunnel_proto::{Any, security, workload};

use crate::agent;
use crate::ca::Keys;
use crate::control_plane::{ControlPlane, Served};
use crate::mesh::MESHED;
use crate::poll::{PATIENCE, eventually};
use crate::topology::Pod;

/// The type of workloads and services.
pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
/// The type of policies.
pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

/// Who opened a stream.
#[derive(Debug, Clone)]
pub struct Opened {
    /// The header `authorization`.
    pub authorization: Option<String>,
    /// The header `clusterid`.
    pub cluster: Option<String>,
    /// Its first request of each type.
    pub first: Vec<DeltaDiscoveryRequest>,
}

#[derive(Debug)]
struct Entry {
    resource: Resource,
    /// Of each change another one: policies have no version on the wire.
    revision: u64,
}

/// One thing of the mesh that changes.
#[derive(Debug, Clone)]
pub struct Change {
    type_url: &'static str,
    name: String,
    /// Nothing where it goes.
    value: Option<Any>,
}

impl Change {
    /// This workload is there.
    pub fn workload(workload: workload::Workload) -> Self {
        let name = workload.uid.clone();
        let address = workload::Address { r#type: Some(workload::address::Type::Workload(workload)) };
        Self::put(ADDRESS, name, &address)
    }

    /// This service is there.
    pub fn service(service: workload::Service) -> Self {
        let name = format!("{}/{}", service.namespace, service.hostname);
        let address = workload::Address { r#type: Some(workload::address::Type::Service(service)) };
        Self::put(ADDRESS, name, &address)
    }

    /// This policy is there.
    pub fn policy(policy: security::Authorization) -> Self {
        let name = format!("{}/{}", policy.namespace, policy.name);
        Self::put(AUTHORIZATION, name, &policy)
    }

    /// What has this name goes.
    pub fn remove(type_url: &'static str, name: &str) -> Self {
        Self { type_url, name: name.to_owned(), value: None }
    }

    /// This is there, whatever it is.
    pub fn put(type_url: &'static str, name: String, message: &impl Message) -> Self {
        let value = message.encode_to_vec().into();
        Self { type_url, name, value: Some(Any { type_url: type_url.to_owned(), value }) }
    }

    /// Whether it is a policy, which istiod sends after the rest.
    pub fn is_policy(&self) -> bool {
        self.type_url == AUTHORIZATION
    }
}

#[derive(Debug, Default)]
struct State {
    held: BTreeMap<(&'static str, String), Entry>,
    revisions: u64,
    opened: Vec<Opened>,
    /// What clients said was wrong.
    rejected: Vec<String>,
    /// By the number of a stream that is open, the last change of which everything was answered.
    answered: BTreeMap<usize, u64>,
}

#[derive(Debug, Clone)]
struct Shared {
    state: Arc<Mutex<State>>,
    changed: Arc<watch::Sender<u64>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// A running control plane. It stops when dropped.
pub struct Istiod {
    address: SocketAddr,
    tls: Arc<ServerConfig>,
    shared: Shared,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl fmt::Debug for Istiod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Istiod").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Istiod {
    /// Listens on `address` with a certificate of `keys`. The mesh is empty.
    pub fn start(keys: &Keys, address: SocketAddr) -> Result<Self> {
        let shared = Shared { state: Arc::default(), changed: Arc::new(watch::Sender::new(0)) };
        let mut istiod = Self { address, tls: Arc::new(keys.serving()), shared, running: None };
        istiod.restart()?;
        Ok(istiod)
    }

    /// Closes every connection, and listens again at the same address with the same mesh, in the network namespace of
    /// the caller.
    pub fn restart(&mut self) -> Result<()> {
        self.stop();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (address, tls, shared) = (self.address, Arc::clone(&self.tls), self.shared.clone());
        let plane = runtime.block_on(ControlPlane::start(address, tls));
        let (stop, stopped) = oneshot::channel();
        let serving = move || {
            runtime.block_on(async move {
                tokio::select! {
                    () = serve(plane, shared) => {}
                    _ = stopped => {}
                }
            });
        };
        self.running = Some((stop, std::thread::spawn(serving)));
        Ok(())
    }

    /// Closes every connection and listens no more.
    pub fn stop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            let _panicked = thread.join();
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Adds or replaces a workload.
    pub fn workload(&self, workload: workload::Workload) {
        self.make(&[Change::workload(workload)]);
    }

    /// Adds or replaces a service.
    pub fn service(&self, service: workload::Service) {
        self.make(&[Change::service(service)]);
    }

    /// Adds or replaces a policy.
    pub fn policy(&self, policy: security::Authorization) {
        self.make(&[Change::policy(policy)]);
    }

    /// Removes what has this name.
    pub fn remove(&self, type_url: &'static str, name: &str) {
        self.make(&[Change::remove(type_url, name)]);
    }

    /// Makes all of these changes at once, and waits until every client has answered what it was sent of them.
    pub fn push(&self, changes: &[Change]) -> Result<()> {
        let change = self.make(changes);
        eventually(PATIENCE, || {
            let state = self.shared.state();
            let late = state.answered.iter().find(|(_, answered)| **answered < change);
            ensure!(late.is_none(), "a client has not answered: {late:?}");
            Ok(())
        })
    }

    /// How many clients are here that have answered everything they were sent.
    pub fn answered(&self) -> usize {
        let latest = *self.shared.changed.borrow();
        self.shared.state().answered.values().filter(|answered| **answered >= latest).count()
    }

    /// Who has opened streams so far.
    pub fn opened(&self) -> Vec<Opened> {
        self.shared.state().opened.clone()
    }

    /// What clients said was wrong with what they were sent.
    pub fn rejected(&self) -> Vec<String> {
        self.shared.state().rejected.clone()
    }

    /// Makes these changes, whose number is told.
    fn make(&self, changes: &[Change]) -> u64 {
        let mut state = self.shared.state();
        for Change { type_url, name, value } in changes {
            let Some(any) = value else {
                state.held.remove(&(*type_url, name.clone()));
                continue;
            };
            state.revisions += 1;
            let revision = state.revisions;
            let version = if *type_url == ADDRESS { format!("v{revision}") } else { String::new() };
            let (name, resource) = (name.clone(), Some(any.clone()));
            let resource = Resource { name: name.clone(), version, resource, ..Resource::default() };
            state.held.insert((*type_url, name), Entry { resource, revision });
        }
        // While nobody looks, so that a number stands for all that is there.
        self.shared.changed.send_modify(|change| *change += 1);
        *self.shared.changed.borrow()
    }
}

impl Drop for Istiod {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A pod of the testbed as istiod publishes one that is enrolled: it takes tunnels.
pub fn workload(pod: &Pod) -> workload::Workload {
    let octets = |address: std::net::IpAddr| match address {
        std::net::IpAddr::V4(address) => address.octets().to_vec().into(),
        std::net::IpAddr::V6(address) => address.octets().to_vec().into(),
    };
    workload::Workload {
        uid: format!("Kubernetes//Pod/{MESHED}/{}", pod.name),
        name: pod.name.clone(),
        namespace: MESHED.to_owned(),
        addresses: pod.addresses().into_iter().map(octets).collect(),
        tunnel_protocol: workload::TunnelProtocol::Hbone.into(),
        service_account: pod.name.clone(),
        node: pod.node.clone(),
        workload_name: pod.name.clone(),
        canonical_name: pod.name.clone(),
        canonical_revision: "latest".to_owned(),
        cluster_id: "Kubernetes".to_owned(),
        ..workload::Workload::default()
    }
}

/// Who a pod is to the node agent: for comparison with what a daemon shows.
pub fn uid(pod: &Pod) -> String {
    agent::uid(pod)
}

async fn serve(mut plane: ControlPlane, shared: Shared) {
    // They end with it.
    let mut streams = JoinSet::new();
    loop {
        let stream = plane.stream().await;
        streams.spawn(stream_of(stream, shared.clone()));
    }
}

/// Serves one stream to its end.
async fn stream_of(stream: Served, shared: Shared) {
    let header = |name| stream.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (authorization, cluster) = (header("authorization"), header("clusterid"));
    let number = {
        let mut state = shared.state();
        state.opened.push(Opened { authorization, cluster, first: Vec::new() });
        state.opened.len() - 1
    };
    let mut changed = shared.changed.subscribe();
    let (mut requests, answers) = stream.split();
    let (said, mut saying) = mpsc::channel(16);
    let mut reading = JoinSet::new();
    reading.spawn(async move {
        while let Ok(Some(request)) = requests.message().await {
            if said.send(request).await.is_err() {
                return;
            }
        }
    });
    // By type what the client has: the version it says it has, or the revision it was sent.
    let mut clients: HashMap<&'static str, HashMap<String, Has>> = HashMap::new();
    let (mut nonce, mut answered) = (0_u64, 0_u64);
    let _open = Open { shared: shared.clone(), number };
    loop {
        let mut first = None;
        tokio::select! {
            request = saying.recv() => {
                let Some(request) = request else { return };
                if let Some(error) = &request.error_detail {
                    shared.state().rejected.push(error.message.clone());
                }
                answered = request.response_nonce.parse().unwrap_or(answered);
                let kind = [ADDRESS, AUTHORIZATION].into_iter().find(|kind| *kind == request.type_url);
                let Some(kind) = kind else { continue };
                if !clients.contains_key(kind) {
                    let held = request.initial_resource_versions.clone();
                    let held = held.into_iter().map(|(name, version)| (name, Has::Version(version)));
                    clients.insert(kind, held.collect());
                    shared.state().opened[number].first.push(request);
                    first = Some(kind);
                }
            }
            _ = changed.changed() => {}
        }
        let change = *changed.borrow_and_update();
        let mut unanswered = nonce > answered;
        for kind in [ADDRESS, AUTHORIZATION] {
            let Some(has) = clients.get_mut(kind) else { continue };
            let response = what_is_new(&shared, kind, has);
            if first != Some(kind) && response.resources.is_empty() && response.removed_resources.is_empty() {
                continue;
            }
            nonce += 1;
            let response = DeltaDiscoveryResponse { nonce: nonce.to_string(), ..response };
            unanswered = true;
            if answers.send(Ok(response)).await.is_err() {
                return;
            }
        }
        if !unanswered {
            shared.state().answered.insert(number, change);
        }
    }
}

/// A stream that is open.
struct Open {
    shared: Shared,
    number: usize,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shared.state().answered.remove(&self.number);
    }
}

enum Has {
    Version(String),
    Revision(u64),
}

fn what_is_new(
    shared: &Shared,
    kind: &'static str,
    has: &mut HashMap<String, Has>,
) -> DeltaDiscoveryResponse {
    let state = shared.state();
    let mut response =
        DeltaDiscoveryResponse { type_url: kind.to_owned(), ..DeltaDiscoveryResponse::default() };
    for ((_, name), entry) in state.held.iter().filter(|((type_url, _), _)| *type_url == kind) {
        let current = match has.get(name) {
            // What has no version is always sent again.
            Some(Has::Version(version)) => !version.is_empty() && *version == entry.resource.version,
            Some(Has::Revision(revision)) => *revision == entry.revision,
            None => false,
        };
        has.insert(name.clone(), Has::Revision(entry.revision));
        if !current {
            response.resources.push(entry.resource.clone());
        }
    }
    has.retain(|name, _| {
        let known = state.held.contains_key(&(kind, name.clone()));
        if !known {
            response.removed_resources.push(name.clone());
        }
        known
    });
    response
}
