//! Why a connection that a pod dialled was not made, whichever way it was to go.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use ztunnel_mesh::model::addr::HbonePeer;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::route::plan::NoRoute;
use ztunnel_mesh::store::demand::NoAnswer;
use ztunnel_tls::verify;

use crate::hbone::client::DialError;
use crate::hbone::stream::StreamError;
use crate::hbone::stream::TunnelError;
use crate::identity::worker::Unavailable;
use crate::net::budget::Shed;
use crate::net::copy;
use crate::proxy::names::NoAddress;
use crate::proxy::report::ConnectionError;
use crate::telemetry::events::ResponseFlag;

/// Why a pod's connection was not made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The mesh knows nowhere to send it.
    #[error(transparent)]
    NoRoute(NoRoute),
    /// Whether the mesh knows the destination, or its waypoint, was not found out: it does not go on as it is.
    #[error("cannot look up {name}")]
    Unresolved {
        /// What was asked for.
        name: String,
        /// Why there was no answer.
        #[source]
        source: NoAnswer,
    },
    /// The destination has no address but a name, and that stands for none.
    #[error("cannot resolve {host}")]
    Name {
        /// The name.
        host: Arc<str>,
        /// Why.
        #[source]
        source: NoAddress,
    },
    /// The pod has no certificate to dial with.
    #[error(transparent)]
    Identity(Unavailable),
    /// There is no tunnel to the peer.
    #[error(transparent)]
    Dial(Arc<DialError>),
    /// There is a way to the gateway of another network, and through it none that is secure to whom it leads to.
    #[error("no tunnel to {host} through its gateway")]
    DoubleHbone {
        /// The service that was asked for.
        host: Arc<str>,
        /// What went wrong there.
        #[source]
        source: DialError,
    },
    /// Whoever serves the service in another network answered that it will not connect.
    #[error("{host} refused the connection through its gateway: http status: {status}")]
    DoubleHboneRefused {
        /// The service that was asked for.
        host: Arc<str>,
        /// What was said.
        status: StatusCode,
        /// Who that is, as it has proved.
        who: Option<SpiffeId>,
    },
    /// The tunnel broke before the peer had answered.
    #[error("HBONE peer {} did not answer", peer.0)]
    Unanswered {
        /// Who was asked.
        peer: HbonePeer,
        /// What happened to the stream.
        #[source]
        source: StreamError,
    },
    /// There is a tunnel, but the peer says nothing to the request.
    #[error("HBONE peer {} did not answer in {after:?}", peer.0)]
    Silent {
        /// Who was asked.
        peer: HbonePeer,
        /// How long was waited.
        after: Duration,
    },
    /// The peer answered that it will not connect.
    #[error("HBONE peer {} refused the connection: http status: {status}", peer.0)]
    Refused {
        /// Who was asked.
        peer: HbonePeer,
        /// What it said.
        status: StatusCode,
    },
    /// The destination outside the mesh cannot be dialled.
    #[error("could not connect to {to}")]
    Connect {
        /// Who was dialled.
        to: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The destination outside the mesh did not answer in time.
    #[error("connection to {to} timed out after {after:?}")]
    Timeout {
        /// Who was dialled.
        to: SocketAddr,
        /// How long was waited.
        after: Duration,
    },
    /// The application gave up while its connection was being made.
    #[error("the client disconnected before it was connected")]
    Abandoned(#[source] io::Error),
    /// It had to give way while it was being made.
    #[error(transparent)]
    Shed(Shed),
}

impl ConnectionError for ConnectError {
    fn flag(&self) -> ResponseFlag {
        match self {
            Self::NoRoute(_)
            | Self::Unresolved { .. }
            | Self::Name { .. }
            | Self::Silent { .. }
            | Self::Refused { .. }
            | Self::DoubleHboneRefused { .. }
            | Self::Connect { .. }
            | Self::Timeout { .. } => ResponseFlag::Connect,
            Self::Identity(_) => ResponseFlag::Identity,
            Self::Dial(error) => dial_flag(error),
            Self::DoubleHbone { source, .. } => dial_flag(source),
            Self::Unanswered { source, .. } => match source {
                // A peer that does not accept this side's certificate says so only after the handshake.
                StreamError::Tunnel(TunnelError::Io(error)) if is_tls(error) => ResponseFlag::TlsFailure,
                StreamError::Tunnel(TunnelError::Protocol(_)) => ResponseFlag::H2Handshake,
                _ => ResponseFlag::Connect,
            },
            Self::Abandoned(_) | Self::Shed(_) => ResponseFlag::None,
        }
    }

    fn is_reset(&self) -> bool {
        match self {
            Self::Abandoned(error) => copy::is_reset(error),
            Self::NoRoute(_)
            | Self::Unresolved { .. }
            | Self::Name { .. }
            | Self::Identity(_)
            | Self::Dial(_)
            | Self::DoubleHbone { .. }
            | Self::DoubleHboneRefused { .. }
            | Self::Shed(_)
            | Self::Unanswered { .. }
            | Self::Silent { .. }
            | Self::Refused { .. }
            | Self::Connect { .. }
            | Self::Timeout { .. } => false,
        }
    }
}

fn dial_flag(error: &DialError) -> ResponseFlag {
    match error {
        DialError::Timeout { .. } => ResponseFlag::NetworkPolicy,
        DialError::Connect { .. } | DialError::Busy { .. } | DialError::NoRoom { .. } => {
            ResponseFlag::Connect
        }
        DialError::Tls { source, .. } if is_revocation(source) => ResponseFlag::Revoked,
        DialError::Tls { .. } | DialError::Stalled { .. } => ResponseFlag::TlsFailure,
        DialError::NotHttp2 { .. } => ResponseFlag::H2Handshake,
    }
}

fn is_revocation(error: &io::Error) -> bool {
    verify::tls_error(error).is_some_and(|error| verify::cause(error).is_revocation())
}

fn is_tls(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>())
}
