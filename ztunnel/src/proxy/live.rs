//! The inbound connections that are open, judged again whenever the mesh changes.
//!
//! A connection is registered before its own first check, and that check uses a snapshot taken after. So no
//! change falls between the two: either the check sees it, or the watch does.

use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use tokio::sync::oneshot;

use crate::mesh::MeshReader;
use crate::mesh::index::Mesh;
use crate::model::identity::SpiffeId;
use crate::model::workload::Workload;
use crate::policy::authorize::Denial;
use crate::policy::authorize::Inbound;
use crate::policy::authorize::Permit;
use crate::policy::authorize::Trial;
use crate::policy::authorize::authorize;
use crate::policy::authorize::rehearse;

/// Connections judged before others get a turn on the thread.
const BATCH: usize = 256;

/// What policies judge of an inbound connection.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The unique name of the workload it is for.
    pub workload: Arc<str>,
    /// Who the peer proved to be.
    pub identity: Option<SpiffeId>,
    /// Where it came from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: SocketAddr,
}

impl Facts {
    /// For the policies.
    pub fn inbound(&self) -> Inbound<'_> {
        Inbound { identity: self.identity.as_ref(), source: self.source, destination: self.destination }
    }
}

/// Decides whether a new connection may proceed to `workload`, and tells if policies on trial would have decided
/// otherwise.
pub fn admit(mesh: &Mesh, workload: &Workload, facts: &Facts) -> Result<Permit, Denial> {
    let decided = authorize(mesh.policies_of(workload), &facts.inbound());
    if mesh.has_policies_on_trial()
        && let Some(trial) = rehearse(mesh.policies_of(workload), &facts.inbound(), decided.is_ok())
    {
        let (source, destination) = (facts.source, facts.destination);
        let identity = facts.identity.as_ref().map_or("", SpiffeId::as_str);
        let workload = &*facts.workload;
        match trial {
            Trial::Refused(denial) => {
                tracing::info!(%source, identity, %destination, workload, reason = %denial, "dry run: would be refused");
            }
            Trial::LetIn(policy) => {
                let policy = policy.map(|policy| policy.to_string());
                let policy = policy.as_deref().unwrap_or_default();
                tracing::info!(%source, identity, %destination, workload, policy, "dry run: would be allowed");
            }
        }
    }
    decided
}

/// The connection was permitted and no longer is.
#[derive(Debug, thiserror::Error)]
pub enum Cut {
    /// By a policy.
    #[error("connection closed due to policy change")]
    Policy(#[source] Denial),
    /// The peer is no longer who it was.
    #[error("connection closed because a certificate of the peer was revoked")]
    Revoked,
}

/// Tells the inbound tunnels of one thread apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelId(u64);

/// The open inbound connections of one thread.
#[derive(Debug, Clone, Default)]
pub struct Live(Arc<Mutex<Entries>>);

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    open: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    facts: Facts,
    /// The tunnel it came by.
    tunnel: Option<TunnelId>,
    cut: oneshot::Sender<Cut>,
}

impl Live {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a connection. Only then take the snapshot for its first check.
    pub fn register(&self, facts: Facts, tunnel: Option<TunnelId>) -> Registered {
        let (sender, cut) = oneshot::channel();
        let mut entries = self.entries();
        let key = entries.next;
        entries.next += 1;
        entries.open.insert(key, Entry { facts, tunnel, cut: sender });
        Registered { live: self.clone(), key, cut }
    }

    /// A name for one more tunnel.
    pub fn tunnel(&self) -> TunnelId {
        let mut entries = self.entries();
        entries.next += 1;
        TunnelId(entries.next)
    }

    /// Cuts every connection that came by a tunnel whose peer's certificate was revoked.
    pub fn revoke(&self, tunnel: TunnelId) {
        for (_, entry) in self.entries().open.extract_if(|_, entry| entry.tunnel == Some(tunnel)) {
            let _ended = entry.cut.send(Cut::Revoked);
        }
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.entries().open.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Judges all again after every change of what policies a workload has, until nothing can change it any more.
    pub(super) async fn watch(&self, mut mesh: MeshReader) {
        while mesh.authorization_changed().await {
            self.judge(&mesh.snapshot()).await;
        }
    }

    async fn judge(&self, mesh: &Mesh) {
        let keys: Vec<u64> = self.entries().open.keys().copied().collect();
        for batch in keys.chunks(BATCH) {
            {
                let mut entries = self.entries();
                for key in batch {
                    let Some(entry) = entries.open.get(key) else { continue };
                    if let Err(denial) = judge(mesh, &entry.facts)
                        && let Some(entry) = entries.open.remove(key)
                    {
                        let _ended = entry.cut.send(Cut::Policy(denial));
                    }
                }
            }
            tokio::task::yield_now().await;
        }
    }
}

/// A workload that is gone from the mesh says nothing about its connections: a withdrawn pod keeps them.
fn judge(mesh: &Mesh, facts: &Facts) -> Result<(), Denial> {
    let Some(workload) = mesh.workload(&facts.workload) else { return Ok(()) };
    authorize(mesh.policies_of(workload), &facts.inbound()).map(|_permit| ())
}

/// A registered connection; no longer one when dropped.
#[derive(Debug)]
pub struct Registered {
    live: Live,
    key: u64,
    cut: oneshot::Receiver<Cut>,
}

impl Registered {
    /// Runs `connection` unless it is cut, which drops it.
    pub async fn run<T>(&mut self, connection: impl Future<Output = T>) -> Result<T, Cut> {
        tokio::select! {
            biased;
            // The sender is dropped only by sending, or by this value's own drop.
            Ok(cut) = &mut self.cut => Err(cut),
            done = connection => Ok(done),
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.live.entries().open.remove(&self.key);
    }
}
