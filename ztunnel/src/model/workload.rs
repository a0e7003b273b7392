//! Workloads: what has an address and an identity.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::identity::SpiffeId;
use crate::model::policy::PolicyKey;

/// How a workload can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reach {
    /// It terminates HBONE: mutual TLS to port 15008.
    Hbone,
    /// It is outside the mesh: plain TCP.
    Plain,
}

/// What kind of object owns the workload; it names a key of the `baggage` header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkloadKind {
    /// `k8s.deployment.name`
    Deployment,
    /// `k8s.cronjob.name`
    CronJob,
    /// `k8s.pod.name`
    Pod,
    /// `k8s.job.name`
    Job,
}

impl WorkloadKind {
    /// The word inside the `baggage` key.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// One workload as the mesh knows it. Written by the mesh's single writer, never changed after:
/// a changed workload is a new value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Unique in the mesh: `<cluster>//Pod/<namespace>/<name>` for a pod.
    pub uid: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    /// The pod's namespace.
    pub namespace: Arc<str>,
    /// Who it is.
    pub identity: SpiffeId,
    /// The node it runs on; empty if unknown.
    pub node: Arc<str>,
    /// The cluster it runs in.
    pub cluster: Arc<str>,
    /// Its addresses, the primary one first, in canonical form.
    pub addresses: Vec<IpAddr>,
    /// The name of the object that owns it (a Deployment's name, say).
    pub workload_name: Arc<str>,
    /// What that object is.
    pub kind: WorkloadKind,
    /// `app` in telemetry: the canonical service.
    pub canonical_name: Arc<str>,
    /// `version` in telemetry.
    pub canonical_revision: Arc<str>,
    /// Region, or empty.
    pub region: Arc<str>,
    /// Zone, or empty.
    pub zone: Arc<str>,
    /// How peers reach it.
    pub reach: Reach,
    /// Whether it may be balanced to.
    pub healthy: bool,
    /// It shares its node's network namespace: its address is the node's, so it is not found by it.
    pub host_network: bool,
    /// The policies that name it by selector. Policies of its namespace and of the whole mesh
    /// apply besides.
    pub policies: Vec<PolicyKey>,
}

/// How a pod of this node names its workload.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Named {
    /// By the workload's unique name.
    Uid(Arc<str>),
    /// As a node agent knows it. The mesh may learn of the pod later than the agent.
    Pod {
        /// The pod's name.
        name: Arc<str>,
        /// The pod's namespace.
        namespace: Arc<str>,
        /// The pod's service account.
        service_account: Arc<str>,
        /// The node it is on.
        node: Arc<str>,
    },
}

impl Named {
    /// Whether `workload` is meant.
    pub fn is(&self, workload: &Workload) -> bool {
        match self {
            Self::Uid(uid) => *uid == workload.uid,
            Self::Pod { name, namespace, service_account, node } => {
                *name == workload.name
                    && *namespace == workload.namespace
                    && **service_account == *workload.service_account()
                    // Of a mesh file that does not say where its pods are, each pod is meant.
                    && (*node == workload.node || workload.node.is_empty())
            }
        }
    }
}

impl fmt::Display for Named {
    /// For a message: the unique name, or `<service account>.<namespace> (<pod>)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uid(uid) => f.write_str(uid),
            Self::Pod { name, namespace, service_account, .. } => {
                write!(f, "{service_account}.{namespace} ({name})")
            }
        }
    }
}

impl Workload {
    /// The service account's name.
    pub fn service_account(&self) -> &str {
        self.identity.service_account()
    }
}
