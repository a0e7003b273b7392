//! Which workload of the mesh a pod of this node is.

use std::sync::Arc;
use std::sync::Weak;
use std::time::Duration;

use crate::model::workload::Named;
use crate::model::workload::Workload;
use crate::store::MeshReader;
use crate::store::gap::NEW_WITHIN;
use crate::store::index::Mesh;
use parking_lot::Mutex;

/// The mesh does not know the pod.
#[derive(Debug, thiserror::Error)]
#[error("failed to fetch information about local workload: {0}")]
pub struct UnknownWorkload(pub Named);

/// A connection waits no longer for its pod to become known to the mesh, of which a node agent knows first.
const LOOKUP_WITHIN: Duration = Duration::from_secs(5);

/// Finds a pod's workload, and remembers which it is.
#[derive(Debug)]
pub struct Lookup {
    named: Named,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    uid: Option<Arc<str>>,
    /// The mesh in which it was not found: it is looked through once.
    missing_in: Weak<Mesh>,
}

impl Lookup {
    /// Looks for `named`, when asked.
    pub fn new(named: Named) -> Self {
        Self { named, found: Mutex::default() }
    }

    /// What is looked for.
    pub fn named(&self) -> &Named {
        &self.named
    }

    /// The unique name of the workload. Waits a little for a mesh that does not know it (yet).
    pub async fn find(&self, mesh: &MeshReader) -> Result<Arc<str>, UnknownWorkload> {
        let (_, workload) = self.find_workload(mesh).await?;
        Ok(Arc::clone(&workload.uid))
    }

    /// The workload, and the mesh that knows it. Waits as [`Self::find`] does.
    pub async fn find_workload(
        &self,
        mesh: &MeshReader,
    ) -> Result<(Arc<Mesh>, Arc<Workload>), UnknownWorkload> {
        let patience = match self.named {
            Named::Uid(_) => NEW_WITHIN,
            Named::Pod { .. } => LOOKUP_WITHIN,
        };
        let found = mesh
            .find_within(patience, |mesh| {
                let workload = mesh.workload(&self.find_in(mesh)?)?;
                Some((Arc::clone(mesh), Arc::clone(workload)))
            })
            .await;
        found.ok_or_else(|| UnknownWorkload(self.named.clone()))
    }

    /// The unique name of the workload, if `mesh` knows it.
    pub fn find_in(&self, mesh: &Arc<Mesh>) -> Option<Arc<str>> {
        if let Named::Uid(uid) = &self.named {
            return mesh.workload(uid).map(|_| Arc::clone(uid));
        }
        let mut found = self.found.lock();
        if let Some(uid) = &found.uid
            && mesh.workload(uid).is_some_and(|workload| self.named.is(workload))
        {
            return Some(Arc::clone(uid));
        }
        // While the weak reference is there no other mesh has the same address.
        if std::ptr::eq(found.missing_in.as_ptr(), Arc::as_ptr(mesh)) {
            return None;
        }
        found.uid = mesh
            .workloads()
            .find(|workload| self.named.is(workload))
            .map(|workload| Arc::clone(&workload.uid));
        if found.uid.is_none() {
            found.missing_in = Arc::downgrade(mesh);
        }
        found.uid.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use crate::model::identity::SpiffeId;
    use crate::model::identity::TrustDomain;
    use crate::store::mesh;

    use super::*;

    fn workload(uid: &str, name: &str, account: &str, node: &str) -> Arc<Workload> {
        let identity = SpiffeId::new(&TrustDomain::default(), "shop", account).unwrap();
        let sample = Workload::sample("shop", name);
        Arc::new(Workload { uid: uid.into(), identity, node: node.into(), cluster: "c1".into(), ..sample })
    }

    fn of(workloads: impl IntoIterator<Item = Arc<Workload>>) -> Mesh {
        Mesh::new(TrustDomain::default(), workloads, [], [])
    }

    fn lookup() -> Lookup {
        let [name, namespace, service_account, node, cluster] =
            ["cart-1", "shop", "cart", "n1", "c1"].map(Arc::from);
        Lookup::new(Named::Pod { name, namespace, service_account, node, cluster })
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_pod_of_that_name_account_and_node_is_meant() {
        let (mut writer, reader) = mesh();
        let others =
            [("a", "cart-2", "cart", "n1"), ("b", "cart-1", "other", "n1"), ("c", "cart-1", "cart", "n2")];
        let others = others.map(|(uid, name, account, node)| workload(uid, name, account, node));
        let namesake = Workload { cluster: "c2".into(), ..(*workload("z", "cart-1", "cart", "n1")).clone() };
        let others = others.into_iter().chain([Arc::new(namesake)]).collect::<Vec<_>>();
        writer.publish(of(others.clone()));
        let error = lookup().find(&reader).await.unwrap_err();
        assert!(error.to_string().contains("cart.shop (cart-1)"), "{error}");
        writer.publish(of(others.into_iter().chain([workload("d", "cart-1", "cart", "n1")])));
        assert_eq!(&*lookup().find(&reader).await.unwrap(), "d");
    }

    #[tokio::test(start_paused = true)]
    async fn a_workload_that_comes_late_is_waited_for() {
        let (mut writer, reader) = mesh();
        let lookup = lookup();
        let (found, ()) = tokio::join!(lookup.find(&reader), async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            writer.publish(of([]));
            tokio::time::sleep(Duration::from_secs(2)).await;
            writer.publish(of([workload("d", "cart-1", "cart", "n1")]));
        });
        assert_eq!(&*found.unwrap(), "d");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_found_is_looked_for_again_once_it_is_another() {
        let (mut writer, reader) = mesh();
        let lookup = lookup();
        let mut seen = HashSet::new();
        for uid in ["d", "e"] {
            writer.publish(of([workload(uid, "cart-1", "cart", "n1")]));
            for _ in 0..2 {
                seen.insert(lookup.find(&reader).await.unwrap());
            }
        }
        writer.publish(of([workload("e", "cart-1", "thief", "n1")]));
        assert!(lookup.find(&reader).await.is_err(), "another account under the same uid");
        assert_eq!(seen.len(), 2);
    }
}
