//! The inbound connections that are open, authorized again whenever the mesh changes.
//!
//! A connection is registered before its own first check, and that check uses a snapshot taken after. So no
//! change falls between the two: either the check sees it, or the watch does.
//!
//! The mesh changes piece by piece. A decision that only hangs on a piece that has not come is put off: a new
//! connection waits, and is refused at the end of its patience; an open one stays, and is closed at the end of it. How
//! long that is says [`ztunnel_mesh::store::gap`].

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use parking_lot::MutexGuard;
use tokio::sync::oneshot;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio::time::sleep_until;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::policy::authorize::Denial;
use ztunnel_mesh::policy::authorize::DryRun;
use ztunnel_mesh::policy::authorize::Permit;
use ztunnel_mesh::policy::authorize::dry_run;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::gap::NEW_WITHIN;
use ztunnel_mesh::store::gap::OPEN_WITHIN;
use ztunnel_mesh::store::gap::SETTLED_WITHIN;
use ztunnel_mesh::store::index::Mesh;

pub use crate::proxy::reauthorization::facts::Facts;
use crate::proxy::reauthorization::settling::Settling;
use crate::proxy::reauthorization::settling::Verdict;
use crate::proxy::reauthorization::settling::verdict;

mod facts;
mod settling;

#[cfg(test)]
mod tests;

/// Connections authorized before others get a turn on the thread.
const BATCH: usize = 256;

/// A new connection, decided.
#[derive(Debug)]
pub struct Admission {
    /// The mesh that decided.
    pub mesh: Arc<Mesh>,
    /// The workload it is for.
    pub workload: Arc<Workload>,
    /// Whether it may proceed.
    pub decided: Result<Permit, Denial>,
}

/// A new connection of which nothing is decided.
struct Undecided {
    /// What becomes of it if nothing more comes: it is refused, or nobody knows the workload.
    refused: Option<Admission>,
    /// Whether it waits only for the newest version of the mesh to be settled.
    is_unsettled: bool,
}

/// Reports if dry-run policies would have decided otherwise.
fn report_dry_run(admission: &Admission, facts: &Facts) {
    let Admission { mesh, workload, decided } = admission;
    let policies = mesh.policies_of(workload);
    if !mesh.has_dry_run_policies() || policies.missing().is_some() {
        return;
    }
    let (source, destination) = (facts.source, facts.destination);
    let identity = facts.identity.as_ref().map_or("", SpiffeId::as_str);
    let workload = &*facts.workload;
    match dry_run(policies.known(), &facts.inbound(), decided.is_ok()) {
        None => {}
        Some(DryRun::Refused(denial)) => {
            tracing::info!(%source, identity, %destination, workload, reason = %denial, "dry run: would be refused");
        }
        Some(DryRun::LetIn(policy)) => {
            let policy = policy.map(|policy| policy.to_string());
            let policy = policy.as_deref().unwrap_or_default();
            tracing::info!(%source, identity, %destination, workload, policy, "dry run: would be allowed");
        }
    }
}

/// The connection was permitted and no longer is.
#[derive(Debug, thiserror::Error)]
pub enum Closed {
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
#[derive(Debug, Clone)]
pub struct Reauthorization {
    entries: Arc<Mutex<Entries>>,
    /// The last version of the mesh of which all parts had come. Written by [`Self::watch`].
    settled: Arc<watch::Sender<Arc<Mesh>>>,
}

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    open: HashMap<u64, Entry>,
    /// Those of which the mesh has not decided yet what becomes of them, or had not a while ago. Few, and none as a rule.
    pending: HashMap<u64, Pending>,
}

#[derive(Debug)]
struct Entry {
    facts: Facts,
    /// The tunnel it came by.
    tunnel: Option<TunnelId>,
    closed: oneshot::Sender<Closed>,
}

/// What a connection is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A policy is missing: it uses up the patience with it.
    Missing,
    /// Something comes by itself, or never will: then the connection stays.
    Unsettled,
    /// All that is known permits it, and all is known.
    Permitted,
}

/// A connection that is not decided, or was not a while ago.
///
/// The patience with it does not begin anew each time it was decided for a moment, or a control plane that flaps would
/// keep it open for ever: it comes back as slowly as it was used up. So a connection is closed once a policy was missing for
/// [`OPEN_WITHIN`] longer than none was, taken together.
#[derive(Debug, Clone, Copy)]
struct Pending {
    state: State,
    /// Since then.
    since: Instant,
    /// What was left of the patience then.
    left: Duration,
}

impl Pending {
    /// One of which nothing was missing until `now`.
    fn new(now: Instant) -> Self {
        Self { state: State::Permitted, since: now, left: OPEN_WITHIN }
    }

    /// What is left of the patience at `now`.
    fn left(&self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.since);
        match self.state {
            State::Missing => self.left.saturating_sub(passed),
            State::Unsettled => self.left,
            State::Permitted => (self.left + passed).min(OPEN_WITHIN),
        }
    }

    /// When the patience ends.
    fn due(&self) -> Option<Instant> {
        (self.state == State::Missing).then(|| self.since + self.left)
    }
}

impl Entries {
    fn forget(&mut self, key: u64) -> Option<Entry> {
        self.pending.remove(&key);
        self.open.remove(&key)
    }

    fn close(&mut self, key: u64, denial: Denial) {
        if let Some(entry) = self.forget(key) {
            let _ended = entry.closed.send(Closed::Policy(denial));
        }
    }

    /// Authorizes the connection, if it is still open.
    fn authorize(&mut self, key: u64, settled: &Mesh, mesh: &Mesh, now: Instant) {
        let Some(entry) = self.open.get(&key) else { return };
        let left = self.pending.get(&key).copied().unwrap_or_else(|| Pending::new(now)).left(now);
        let state = match verdict(settled, mesh, &entry.facts) {
            Verdict::Denied(denial) => return self.close(key, denial),
            Verdict::Missing(missing) if left.is_zero() => {
                return self.close(key, Denial::UnknownPolicy(missing));
            }
            Verdict::Missing(_) => State::Missing,
            Verdict::Unsettled(_) | Verdict::Gone => State::Unsettled,
            Verdict::Permitted(_) => State::Permitted,
        };
        if state == State::Permitted && left == OPEN_WITHIN {
            self.pending.remove(&key);
        } else {
            self.pending.insert(key, Pending { state, since: now, left });
        }
    }

    /// When the patience with the first of them ends.
    fn due(&self) -> Option<Instant> {
        self.pending.values().filter_map(Pending::due).min()
    }
}

impl Reauthorization {
    /// No connection is open. `mesh` counts as it is.
    pub fn new(mesh: Arc<Mesh>) -> Self {
        Self { entries: Arc::default(), settled: Arc::new(watch::Sender::new(mesh)) }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock()
    }

    /// Registers a connection. Only then take the snapshot for its first check.
    pub fn register(&self, facts: Facts, tunnel: Option<TunnelId>) -> Registered {
        let (sender, closed) = oneshot::channel();
        let mut entries = self.entries();
        let key = entries.next;
        entries.next += 1;
        entries.open.insert(key, Entry { facts, tunnel, closed: sender });
        Registered { all: self.clone(), key, closed }
    }

    /// A name for one more tunnel.
    pub fn tunnel(&self) -> TunnelId {
        let mut entries = self.entries();
        entries.next += 1;
        TunnelId(entries.next)
    }

    /// Closes every connection that came by a tunnel whose peer's certificate was revoked.
    pub fn revoke(&self, tunnel: TunnelId) {
        let mut entries = self.entries();
        let Entries { open, pending, .. } = &mut *entries;
        for (key, entry) in open.extract_if(|_, entry| entry.tunnel == Some(tunnel)) {
            pending.remove(&key);
            let _ended = entry.closed.send(Closed::Revoked);
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

    /// Decides whether a registered connection may proceed, as soon as that can be decided, and reports if
    /// dry-run policies would have decided otherwise. `None` if the mesh does not know the workload.
    pub async fn admit(&self, mesh: &MeshReader, facts: &Facts) -> Option<Admission> {
        let admission = match self.try_admit(mesh.snapshot(), facts) {
            Ok(admission) => admission,
            Err(_undecided) => self.admit_later(mesh.clone(), facts).await?,
        };
        report_dry_run(&admission, facts);
        Some(admission)
    }

    async fn admit_later(&self, mut mesh: MeshReader, facts: &Facts) -> Option<Admission> {
        let mut settled = self.settled.subscribe();
        let began = Instant::now();
        loop {
            settled.mark_unchanged();
            let undecided = match self.try_admit(mesh.latest(), facts) {
                Ok(admission) => return Some(admission),
                Err(undecided) => undecided,
            };
            // All parts may have come, and only that none follows is not known yet.
            let patience = if undecided.is_unsettled { NEW_WITHIN + SETTLED_WITHIN } else { NEW_WITHIN };
            let changed = async {
                tokio::select! {
                    true = mesh.changed() => {}
                    Ok(()) = settled.changed() => {}
                    else => std::future::pending().await,
                }
            };
            if tokio::time::timeout_at(began + patience, changed).await.is_err() {
                return undecided.refused;
            }
        }
    }

    /// What is decided of the connection, if anything is.
    fn try_admit(&self, mesh: Arc<Mesh>, facts: &Facts) -> Result<Admission, Undecided> {
        let unknown = Undecided { refused: None, is_unsettled: false };
        let Some(workload) = mesh.workload(&facts.workload).cloned() else { return Err(unknown) };
        let verdict = verdict(&self.settled.borrow(), &mesh, facts);
        let decided = |decided| Admission { mesh, workload, decided };
        match verdict {
            Verdict::Gone => Err(unknown),
            Verdict::Permitted(permit) => Ok(decided(Ok(permit))),
            Verdict::Denied(denial) => Ok(decided(Err(denial))),
            Verdict::Missing(missing) => {
                let refused = decided(Err(Denial::UnknownPolicy(missing)));
                Err(Undecided { refused: Some(refused), is_unsettled: false })
            }
            Verdict::Unsettled(denial) => {
                let refused = denial.map(|denial| decided(Err(denial)));
                Err(Undecided { refused, is_unsettled: true })
            }
        }
    }

    /// Authorizes all again after every change of what policies a workload has, and those that are not decided after every
    /// change and at the end of the patience with them. Until nothing can change any more.
    pub(super) async fn watch(&self, mut mesh: MeshReader) {
        let mut settling = Settling::new(Arc::clone(&self.settled.borrow()));
        let mut goes_on = true;
        loop {
            let newest = mesh.latest();
            let now = Instant::now();
            let changed = settling.observe(&newest, now);
            let settled = Arc::clone(settling.settled());
            self.settled.send_replace(Arc::clone(&settled));
            let keys: Vec<u64> = {
                let entries = self.entries();
                if changed {
                    entries.open.keys().copied().collect()
                } else {
                    entries.pending.keys().copied().collect()
                }
            };
            for batch in keys.chunks(BATCH) {
                {
                    let mut entries = self.entries();
                    batch.iter().for_each(|key| entries.authorize(*key, &settled, &newest, now));
                }
                tokio::task::yield_now().await;
            }
            let due = settling.due().into_iter().chain(self.entries().due()).min();
            if due.is_none() && !goes_on {
                return;
            }
            tokio::select! {
                there = mesh.changed(), if goes_on => goes_on = there,
                () = at(due) => {}
            }
        }
    }
}

/// Waits until then; for ever if there is no such time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// A registered connection; no longer one when dropped.
#[derive(Debug)]
pub struct Registered {
    all: Reauthorization,
    key: u64,
    closed: oneshot::Receiver<Closed>,
}

impl Registered {
    /// Runs `connection` unless it is closed, which drops it.
    pub async fn run<T>(&mut self, connection: impl Future<Output = T>) -> Result<T, Closed> {
        tokio::select! {
            biased;
            // The sender is dropped only by sending, or by this value's own drop.
            Ok(closed) = &mut self.closed => Err(closed),
            done = connection => Ok(done),
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.all.entries().forget(self.key);
    }
}
