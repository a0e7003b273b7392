//! The mesh as one node knows it: a single writer, snapshots for readers.
//!
//! A snapshot ([`Mesh`]) is immutable and whole: a connection takes one and decides everything
//! from it. Taking one is a lock-free load, so the data path may do it for every connection.
//! The writer does not know where changes come from: a mesh file and a control plane both end here.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::mesh::index::Mesh;

pub mod index;

/// Makes the two ends of the mesh: who writes it, and who reads it.
pub fn mesh() -> (MeshWriter, MeshReader) {
    let current = Arc::new(ArcSwap::from_pointee(Mesh::default()));
    let (changed, version) = watch::channel(0);
    (MeshWriter { current: Arc::clone(&current), changed }, MeshReader { current, version })
}

/// The one place that changes the mesh.
#[derive(Debug)]
pub struct MeshWriter {
    current: Arc<ArcSwap<Mesh>>,
    changed: watch::Sender<u64>,
}

impl MeshWriter {
    /// Publishes `mesh` as a unit: readers see all of it or none of it.
    pub fn publish(&mut self, mesh: Mesh) {
        self.current.store(Arc::new(mesh));
        self.changed.send_modify(|version| *version += 1);
    }
}

/// A handle for those who decide from the mesh. Cheap to clone.
#[derive(Debug, Clone)]
pub struct MeshReader {
    current: Arc<ArcSwap<Mesh>>,
    version: watch::Receiver<u64>,
}

impl MeshReader {
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
}
