//! What an enrolment source says of one pod.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use crate::model::addr::PodUid;

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
