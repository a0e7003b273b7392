//! What an enrolment source says of one pod.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use crate::model::addr::PodUid;
use crate::model::workload::Named;

/// A pod that can be enrolled, as the machine that does it sees it.
pub trait Enrolled: Clone + PartialEq {
    /// This incarnation of the pod.
    fn uid(&self) -> &PodUid;

    /// Whether `other` lives in the same network namespace.
    fn shares_netns(&self, other: &Self) -> bool;
}

/// A pod that is to be served and is not yet, as those see it who ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Awaited {
    /// This incarnation of the pod.
    pub uid: PodUid,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// What its workload in the mesh is known by.
    pub workload: Named,
}

impl From<&LocalPod> for Awaited {
    fn from(pod: &LocalPod) -> Self {
        let [namespace, name] = [&pod.namespace, &pod.name].map(Arc::clone);
        Self { uid: pod.uid.clone(), namespace, name, workload: Named::Uid(Arc::clone(&pod.workload)) }
    }
}

/// A pod of this node that is to be captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalPod {
    /// This incarnation of the pod.
    pub uid: PodUid,
    /// The unique name of its workload in the mesh.
    pub workload: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// A path that opens its network namespace.
    pub netns: PathBuf,
    /// Its addresses, the primary one of each family first.
    pub addresses: Vec<IpAddr>,
}

impl Enrolled for LocalPod {
    fn uid(&self) -> &PodUid {
        &self.uid
    }

    fn shares_netns(&self, other: &Self) -> bool {
        self.netns == other.netns
    }
}
