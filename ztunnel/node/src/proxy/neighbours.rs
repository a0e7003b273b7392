//! The pods to which connections of other pods of this node can be handed over.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Weak;

use arc_swap::ArcSwap;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::model::workload::Workload;

use crate::proxy::pod::Pod;

/// The pods whose traffic is redirected to this daemon now, by what they are known by. Written by who redirects it;
/// read without a lock.
#[derive(Default)]
pub struct Neighbours(ArcSwap<Known>);

#[derive(Clone, Default)]
struct Known {
    /// By the unique names of their workloads.
    by_uid: HashMap<Arc<str>, Weak<Pod>>,
    /// By namespace and name.
    by_name: HashMap<(Arc<str>, Arc<str>), Weak<Pod>>,
}

impl Neighbours {
    /// The pod's traffic is redirected to its listeners from now on.
    pub(super) fn add(&self, pod: &Arc<Pod>) {
        self.change(|known| {
            match pod.named() {
                Named::Uid(uid) => known.by_uid.insert(Arc::clone(uid), Arc::downgrade(pod)),
                Named::Pod { name, namespace, .. } => {
                    known.by_name.insert((Arc::clone(namespace), Arc::clone(name)), Arc::downgrade(pod))
                }
            };
        });
    }

    /// The pod's traffic will no longer be. Another one of the same workload stays.
    pub(super) fn remove(&self, uid: &PodUid) {
        let stays = |pod: &Weak<Pod>| pod.upgrade().is_some_and(|pod| pod.uid != *uid);
        self.change(|known| {
            known.by_uid.retain(|_, pod| stays(pod));
            known.by_name.retain(|_, pod| stays(pod));
        });
    }

    /// No pod's traffic will be.
    pub(super) fn clear(&self) {
        self.0.store(Arc::default());
    }

    fn change(&self, change: impl Fn(&mut Known)) {
        self.0.rcu(|known| {
            let mut known = Known::clone(known);
            change(&mut known);
            known
        });
    }

    pub(super) fn find(&self, workload: &Workload) -> Option<Arc<Pod>> {
        let known = self.0.load();
        let pod = known.by_uid.get(&workload.uid).or_else(|| {
            // Nobody is looked for by name unless a node agent has named somebody.
            let named = !known.by_name.is_empty();
            named
                .then(|| (Arc::clone(&workload.namespace), Arc::clone(&workload.name)))
                .and_then(|name| known.by_name.get(&name))
        })?;
        pod.upgrade().filter(|pod| pod.named().is(workload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::tests::pod;

    #[test]
    fn who_is_a_neighbour_is_known_by_its_incarnation() {
        let neighbours = Neighbours::default();
        let server = Workload { uid: "server".into(), ..Workload::sample("test", "server") };
        let (old, new) = (pod("server", &["10.0.0.2"]), pod("server", &["10.0.0.2"]));
        assert!(neighbours.find(&server).is_none());
        neighbours.add(&old);
        assert!(neighbours.find(&server).is_some_and(|found| Arc::ptr_eq(&found, &old)));
        neighbours.add(&new);
        assert!(neighbours.find(&server).is_some_and(|found| Arc::ptr_eq(&found, &new)));
        neighbours.remove(&PodUid::from("another"));
        assert!(neighbours.find(&server).is_some());
        drop(new);
        assert!(neighbours.find(&server).is_none(), "it keeps no pod alive");
        neighbours.add(&old);
        neighbours.remove(&old.uid);
        assert!(neighbours.find(&server).is_none());
        neighbours.add(&old);
        neighbours.clear();
        assert!(neighbours.find(&server).is_none());
    }
}
