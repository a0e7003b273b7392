//! What policies know of an inbound connection.

use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::policy::authorize::Inbound;

/// What policies know of an inbound connection.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The unique name of the workload it is for.
    pub workload: Arc<str>,
    /// Who the peer proved to be.
    pub identity: Option<SpiffeId>,
    /// Where it came from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: SocketAddr,
}

impl Facts {
    /// For the policies.
    pub fn inbound(&self) -> Inbound<'_> {
        Inbound { identity: self.identity.as_ref(), source: self.source, destination: self.destination }
    }
}
