//! What delivers a connection to the application of its pod, however it came there.
//!
//! Used by [`inbound`](crate::proxy::inbound) and [`same_node`](crate::proxy::same_node) by way of
//! [`admit`](crate::proxy::admit), and by [`passthrough`](crate::proxy::passthrough). It knows none of them.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;
use ztunnel_mesh::policy::authorize::Denial;
use ztunnel_mesh::policy::authorize::Permit;

use crate::net::budget::Shed;
use crate::net::copy::CopyError;
use crate::net::socket::Delivery;
use crate::proxy::pod::Pod;
use crate::proxy::reauthorization::Closed;
use crate::proxy::report::ConnectionError;
use crate::proxy::shard::Shard;
use crate::telemetry::events::ResponseFlag;

/// Why a connection to a pod was not delivered, or ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum DeliveryError {
    /// Policy refused it. In Istio's words, by which people and tools look for it.
    #[error("connection closed due to policy rejection: {0}")]
    Denied(#[from] Denial),
    /// Policy refused it later, or the peer's certificate was revoked.
    #[error(transparent)]
    Closed(#[from] Closed),
    /// The application does not take it.
    #[error("could not connect to the application at {to}")]
    Connect {
        /// Where it was dialled.
        to: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The application does not answer.
    #[error("connection to the application at {to} timed out after {after:?}")]
    Timeout {
        /// Where it was dialled.
        to: SocketAddr,
        /// How long was waited.
        after: Duration,
    },
    /// It had to give way before it was connected.
    #[error(transparent)]
    Shed(Shed),
    /// It broke later.
    #[error(transparent)]
    Copy(CopyError),
}

impl ConnectionError for DeliveryError {
    fn flag(&self) -> ResponseFlag {
        match self {
            Self::Denied(_) | Self::Closed(Closed::Policy(_)) => ResponseFlag::Denied,
            Self::Closed(Closed::Revoked) => ResponseFlag::Revoked,
            Self::Connect { .. } | Self::Timeout { .. } => ResponseFlag::Connect,
            Self::Shed(_) | Self::Copy(_) => ResponseFlag::None,
        }
    }

    fn is_reset(&self) -> bool {
        match self {
            Self::Copy(error) => error.is_reset(),
            Self::Denied(_)
            | Self::Closed(_)
            | Self::Connect { .. }
            | Self::Timeout { .. }
            | Self::Shed(_) => false,
        }
    }
}

/// Dials the pod's application on behalf of `client`, with what it says `first` ([`PodNetwork::deliver`]). Nobody is
/// delivered without leave.
///
/// [`PodNetwork::deliver`]: crate::net::socket::PodNetwork::deliver
pub(super) async fn deliver(
    _permit: Permit,
    shard: &Shard,
    pod: &Pod,
    client: SocketAddr,
    to: SocketAddr,
    first: &mut Bytes,
) -> Result<tokio::net::TcpStream, DeliveryError> {
    let failed = |source| DeliveryError::Connect { to, source };
    // Its own address needs no rule to be answered at. Rather that than no connection, for who came too late.
    let as_whom = |pod: &Pod| if pod.is_unrouted() { to.ip() } else { client.ip() };
    match pod.network.deliver(as_whom(pod), to, first).map_err(failed)? {
        Delivery::Connected(application) => Ok(application),
        Delivery::Waiting(dial) => {
            let after = shard.config.connect_timeout;
            let dialling = async {
                tokio::select! {
                    dialled = dial => dialled,
                    // The answer has gone where no rule leads it back from.
                    () = pod.unrouted(), if !pod.is_unrouted() => match pod.network.deliver(to.ip(), to, first)? {
                        Delivery::Connected(application) => Ok(application),
                        Delivery::Waiting(dial) => dial.await,
                    },
                }
            };
            let dialled =
                timeout(after, dialling).await.map_err(|_elapsed| DeliveryError::Timeout { to, after });
            dialled?.map_err(failed)
        }
    }
}
