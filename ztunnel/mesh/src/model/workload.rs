//! Workloads: what has an address and an identity.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::identity::SpiffeId;
use crate::model::policy::PolicyKey;
use crate::model::service::GatewayAddress;
use crate::model::service::ServiceKey;

/// How a workload can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reach {
    /// It terminates HBONE: mutual TLS to port 15008.
    Hbone,
    /// It is outside the mesh: plain TCP.
    Plain,
    /// By a protocol this version does not know: not at all. Never in the clear, which it did not ask for.
    Unknown,
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

/// A service the workload is an endpoint of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// Which service.
    pub service: ServiceKey,
    /// Service port → port of this workload. A port that is missing here is served at the service's own target.
    pub ports: Arc<[(u16, u16)]>,
}

/// What the workload's application expects in front of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ApplicationProtocol {
    /// Nothing.
    None,
    /// A PROXY protocol header.
    Proxy,
    /// Something that this version does not know.
    Unknown,
}

/// The workload's application wants to be told of the tunnel: it is a waypoint behind this proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApplicationTunnel {
    /// How.
    pub protocol: ApplicationProtocol,
    /// At which port, if not at that of the request.
    pub port: Option<u16>,
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
    /// The network its addresses are in; empty for the one without a name.
    pub network: Arc<str>,
    /// Its addresses, the primary one first, in canonical form.
    pub addresses: Vec<IpAddr>,
    /// A DNS name to find it at, in lower case, where it has no address; empty if none.
    pub hostname: Arc<str>,
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
    /// Part of a zone, or empty.
    pub subzone: Arc<str>,
    /// How peers reach it.
    pub reach: Reach,
    /// It terminates HBONE itself, without a proxy of its node. Changes no decision; told in dumps.
    pub native_tunnel: bool,
    /// What its application expects in front of connections.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Whether it may be balanced to.
    pub healthy: bool,
    /// Its weight in balancing; 0 is never chosen.
    pub capacity: u32,
    /// It shares its node's network namespace: its address is the node's, so it is not found by it.
    pub host_network: bool,
    /// The waypoint in front of connections to its own addresses.
    pub waypoint: Option<Arc<GatewayAddress>>,
    /// The gateway through which other networks reach it.
    pub network_gateway: Option<Arc<GatewayAddress>>,
    /// The services it is an endpoint of, each once.
    pub services: Box<[Membership]>,
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
        /// The node it is on; empty where that may be any.
        node: Arc<str>,
        /// The cluster it is in, in which alone the other names are unique; empty where that may be any.
        cluster: Arc<str>,
    },
}

impl Named {
    /// What a node agent would know `workload` by.
    pub fn of(workload: &Workload) -> Self {
        Self::Pod {
            name: Arc::clone(&workload.name),
            namespace: Arc::clone(&workload.namespace),
            service_account: Arc::from(workload.service_account()),
            node: Arc::clone(&workload.node),
            cluster: Arc::clone(&workload.cluster),
        }
    }

    /// Whether `workload` is meant.
    pub fn is(&self, workload: &Workload) -> bool {
        match self {
            Self::Uid(uid) => *uid == workload.uid,
            Self::Pod { name, namespace, service_account, node, cluster } => {
                *name == workload.name
                    && *namespace == workload.namespace
                    && **service_account == *workload.service_account()
                    // Of a mesh file that does not say where its pods are, each pod is meant.
                    && (*node == workload.node || workload.node.is_empty() || node.is_empty())
                    && (*cluster == workload.cluster || cluster.is_empty())
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

#[cfg(any(test, feature = "testing"))]
impl Workload {
    /// A healthy workload in the mesh with the service account and everything else of its name: for tests, which
    /// change what they are about.
    pub fn sample(namespace: &str, name: &str) -> Self {
        let text = Arc::<str>::from;
        let trust_domain = crate::model::identity::TrustDomain::default();
        Self {
            uid: text(name),
            name: text(name),
            namespace: text(namespace),
            identity: SpiffeId::new(&trust_domain, namespace, name).expect("names in tests are valid"),
            node: text(""),
            cluster: text(""),
            network: text(""),
            addresses: Vec::new(),
            hostname: text(""),
            workload_name: text(name),
            kind: WorkloadKind::Pod,
            canonical_name: text(name),
            canonical_revision: text(""),
            region: text(""),
            zone: text(""),
            subzone: text(""),
            reach: Reach::Hbone,
            native_tunnel: false,
            application_tunnel: None,
            healthy: true,
            capacity: 1,
            host_network: false,
            waypoint: None,
            network_gateway: None,
            services: Box::default(),
            policies: Vec::new(),
        }
    }
}
