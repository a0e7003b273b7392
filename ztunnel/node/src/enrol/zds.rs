//! Enrolment by a node agent (istio-cni, or Cilium's), over the protocol ZDS.
//!
//! The agent listens on a Unix socket of type SOCK_SEQPACKET; one packet is one protobuf message. The daemon says
//! hello, and from then on answers: one acknowledgement per request, never anything unasked.
//!
//! ```text
//!  daemon                                   agent
//!    │ ── ZdsHello ──────────────────────────▶ │
//!    │ ◀── Add (+ network namespace), Keep … ──│  a snapshot: every pod it knows
//!    │ ── Ack, one for each ─────────────────▶ │
//!    │ ◀── SnapshotSent ───────────────────────│  what was not in it is withdrawn
//!    │ ── Ack ───────────────────────────────▶ │
//!    │ ◀── Add, Del ───────────────────────────│  from now on
//!    │ ── Ack … ─────────────────────────────▶ │
//! ```
//!
//! An Add is acknowledged once the pod's listeners are up: the start of the pod waits for it. The agent waits five
//! seconds and then takes a late answer for the next one's, so an Add that takes longer is answered with an error
//! and goes on by itself. The loss of the agent stops change, nothing else.
//!
//! * [`machine`]: what is to be done, as a pure machine;
//! * [`message`]: the wire format;
//! * [`link`]: the socket, and connecting to it again.

use std::sync::Arc;

use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::source::pod::Enrolled;

use crate::net::netns::Netns;

pub mod link;
pub mod machine;
pub mod message;

/// A pod as the node agent describes it.
#[derive(Debug, Clone)]
pub struct AgentPod {
    /// Its Kubernetes UID.
    pub uid: PodUid,
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
    /// Its network namespace, open.
    pub netns: Arc<Netns>,
}

impl PartialEq for AgentPod {
    fn eq(&self, other: &Self) -> bool {
        let names =
            |pod: &Self| [&pod.uid.0, &pod.name, &pod.namespace, &pod.service_account].map(Arc::clone);
        names(self) == names(other) && self.shares_netns(other)
    }
}

impl Enrolled for AgentPod {
    fn uid(&self) -> &PodUid {
        &self.uid
    }

    fn shares_netns(&self, other: &Self) -> bool {
        self.netns.id() == other.netns.id()
    }
}
