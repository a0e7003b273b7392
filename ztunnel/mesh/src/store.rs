//! The mesh as one node knows it: a single writer, snapshots for readers.
//!
//! A snapshot ([`Mesh`]) is immutable and whole: a connection takes one and decides everything
//! from it. Taking one is a lock-free load, so the data path may do it for every connection.
//! The writer does not know where changes come from: a mesh file and a control plane both end here.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::model::policy::Policy;
use crate::model::policy::PolicyKey;
use crate::model::refused::Refused;
use crate::model::service::Service;
use crate::model::service::ServiceKey;
use crate::model::workload::Workload;
use crate::store::demand::Demand;
use crate::store::index::Mesh;

pub mod demand;
pub mod endpoints;
pub mod gap;
pub mod index;
pub mod lookup;
pub mod map;
mod network;
mod refusals;
mod several;

#[cfg(test)]
mod tests;

/// One change of the mesh. Applied in any order that a source may have: endpoints may come before their service, and
/// what is removed may not be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MeshChange {
    /// This workload is there, perhaps in the place of one with the same unique name. It is an endpoint of the
    /// services it lists, whether they are known or not.
    Workload(Arc<Workload>),
    /// This service is there, perhaps in the place of one with the same name. Its endpoints stay.
    Service(Arc<Service>),
    /// This policy is there, perhaps in the place of one with the same name.
    Policy(Arc<Policy>),
    /// There is a workload or service of this name, and what it is could not be understood. It stays so until there is
    /// one of this name, or it is gone.
    Refuse(Arc<Refused>),
    /// The workload with this unique name is gone.
    RemoveWorkload(Arc<str>),
    /// The service with this name is gone. Endpoints that still list it wait for it to come back.
    RemoveService(ServiceKey),
    /// The workload or, if there is none, the service with this name is gone.
    RemoveAddress(Arc<str>),
    /// The policy with this name is gone.
    RemovePolicy(PolicyKey),
}

/// Makes the two ends of the mesh: who writes it, and who reads it.
pub fn mesh() -> (MeshWriter, MeshReader) {
    let current = Arc::new(ArcSwap::from_pointee(Mesh::default()));
    let (changed, version) = watch::channel(0);
    let writer =
        MeshWriter { current: Arc::clone(&current), draft: Mesh::default(), changed, retired: Vec::new() };
    let reader = MeshReader { current, version, demand: None };
    (writer, reader)
}

/// The one place that changes the mesh.
#[derive(Debug)]
pub struct MeshWriter {
    current: Arc<ArcSwap<Mesh>>,
    /// What is published, once more: copying it shares everything.
    draft: Mesh,
    changed: watch::Sender<u64>,
    /// Versions that a reader had when they were replaced. They are dropped here, as freeing what only they have may
    /// take a while, which must not be a reader's.
    retired: Vec<Arc<Mesh>>,
}

impl MeshWriter {
    /// Publishes `mesh` as a unit in the place of all there was: readers see all of it or none of it.
    pub fn publish(&mut self, mut mesh: Mesh) {
        mesh.succeed(&self.draft);
        mesh.is_whole = true;
        mesh.arrival = self.draft.arrival;
        self.draft = mesh;
        self.release();
    }

    /// Applies `changes` as a unit: readers see all of them or none.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = MeshChange>) {
        self.draft(changes);
        self.release();
    }

    /// Applies `changes` that belong together with others: readers see none of them before [`Self::release`].
    pub fn draft(&mut self, changes: impl IntoIterator<Item = MeshChange>) {
        self.draft.is_whole = false;
        changes.into_iter().for_each(|change| self.draft.apply(change));
    }

    /// What was published last, with what was drafted since.
    pub fn mesh(&self) -> &Mesh {
        &self.draft
    }

    /// Publishes what was drafted, of which nothing is missing.
    pub fn release_whole(&mut self) {
        self.draft.is_whole = true;
        self.release();
    }

    /// Publishes what was drafted.
    pub fn release(&mut self) {
        let old = self.current.swap(Arc::new(self.draft.clone()));
        self.draft.arrival = self.draft.arrival.saturating_add(1);
        self.retired.retain(|mesh| Arc::strong_count(mesh) > 1);
        if Arc::strong_count(&old) > 1 {
            self.retired.push(old);
        }
        self.changed.send_modify(|version| *version += 1);
    }
}

/// A handle for those who decide from the mesh. Cheap to clone.
#[derive(Debug, Clone)]
pub struct MeshReader {
    current: Arc<ArcSwap<Mesh>>,
    version: watch::Receiver<u64>,
    demand: Option<Demand>,
}

impl MeshReader {
    /// A mesh that does not have all there is, and whom to ask for the rest.
    pub fn on_demand(self, demand: Demand) -> Self {
        Self { demand: Some(demand), ..self }
    }

    /// Whom to ask for what the mesh does not have. Nobody if it has all there is.
    pub fn demand(&self) -> Option<&Demand> {
        self.demand.as_ref()
    }

    /// The mesh as of now. Take one per connection and decide everything from it.
    pub fn snapshot(&self) -> Arc<Mesh> {
        self.current.load_full()
    }

    /// How many times the mesh was published; 0 before the first time.
    pub fn version(&self) -> u64 {
        *self.version.borrow()
    }

    /// Waits until the mesh is another one than when this handle last looked (or was made).
    /// Returns false once the writer is gone and nothing will change any more.
    pub async fn changed(&mut self) -> bool {
        self.version.changed().await.is_ok()
    }

    /// What `ask` finds in the mesh as it is, or becomes within `patience`: what others name may come after them.
    pub async fn find_within<T>(
        &self,
        patience: Duration,
        mut ask: impl FnMut(&Arc<Mesh>) -> Option<T>,
    ) -> Option<T> {
        if let Some(found) = ask(&self.snapshot()) {
            return Some(found);
        }
        // A handle of its own remembers from when on it looks: no version falls between.
        let mut mesh = self.clone();
        let wait = async {
            loop {
                mesh.version.mark_unchanged();
                if let Some(found) = ask(&mesh.snapshot()) {
                    return Some(found);
                }
                if !mesh.changed().await {
                    return None;
                }
            }
        };
        timeout(patience, wait).await.ok().flatten()
    }

    /// From now on [`Self::changed`] means another mesh than this one.
    pub fn latest(&mut self) -> Arc<Mesh> {
        self.version.mark_unchanged();
        self.snapshot()
    }
}
