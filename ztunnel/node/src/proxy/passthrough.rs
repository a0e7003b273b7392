//! Plain connections to a pod: from outside the mesh, judged without an identity, delivered as they are.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;
use ztunnel_mesh::model::addr::ClientAddr;
use ztunnel_mesh::model::addr::OriginalDst;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::policy::authorize::Denial;
use ztunnel_mesh::policy::authorize::Permit;
use ztunnel_mesh::route::meant::service_behind;
use ztunnel_mesh::route::plan::NoRoute;
use ztunnel_mesh::route::plan::RESERVED_PORTS;
use ztunnel_mesh::store::lookup::UnknownWorkload;

use crate::net::budget::Shed;
use crate::net::copy;
use crate::net::copy::CopyError;
use crate::net::copy::Holders;
use crate::net::copy::ResetUnlessDone;
use crate::net::ports::Fronted;
use crate::net::socket::Delivery;
use crate::proxy::accept::Counted;
use crate::proxy::ending::Ending;
use crate::proxy::ending::Tally;
use crate::proxy::live::Admission;
use crate::proxy::live::Cut;
use crate::proxy::live::Facts;
use crate::proxy::live::Registered;
use crate::proxy::pod::Admitted;
use crate::proxy::pod::Pod;
use crate::proxy::pod::TooMany;
use crate::proxy::shard::Shard;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::ResponseFlag;

/// Why a connection to a pod was not delivered, or ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum DeliveryError {
    /// Policy refused it. In Istio's words, by which people and tools look for it.
    #[error("connection closed due to policy rejection: {0}")]
    Denied(#[from] Denial),
    /// Policy refused it later, or the peer's certificate was revoked.
    #[error(transparent)]
    Cut(#[from] Cut),
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

impl Ending for DeliveryError {
    fn flag(&self) -> ResponseFlag {
        match self {
            Self::Denied(_) | Self::Cut(Cut::Policy(_)) => ResponseFlag::Denied,
            Self::Cut(Cut::Revoked) => ResponseFlag::Revoked,
            Self::Connect { .. } | Self::Timeout { .. } => ResponseFlag::Connect,
            Self::Shed(_) | Self::Copy(_) => ResponseFlag::None,
        }
    }

    fn is_reset(&self) -> bool {
        match self {
            Self::Copy(error) => error.is_reset(),
            Self::Denied(_) | Self::Cut(_) | Self::Connect { .. } | Self::Timeout { .. } | Self::Shed(_) => {
                false
            }
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

/// A connection in both directions: all there is of it.
struct Connected {
    relay: copy::Relay<Tally>,
    registered: Registered,
    admitted: Admitted,
    /// Keeps its source port from deliveries.
    fronted: Option<Fronted>,
}

/// Serves one plain connection to `pod`. `counted` lives as long.
pub(super) async fn serve(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    (socket, client): (TcpStream, ClientAddr),
    counted: Counted,
) {
    // On the heap, and gone once connected: what is relayed must not carry the room its dial needed.
    let Some(mut connected) = Box::pin(establish(shard, pod, socket, client)).await else { return };
    let Connected { relay, registered, .. } = &mut connected;
    let ended = match registered.run(relay).await {
        Ok(ended) => ended.map_err(DeliveryError::Copy),
        Err(cut) => Err(DeliveryError::Cut(cut)),
    };
    // What was cut is dropped here, and so reset.
    connected.relay.into_meter().close(ended);
    drop((connected.registered, connected.admitted, connected.fronted, counted));
}

/// Decides and dials. `None` when it came to nothing, which has been told then.
async fn establish(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    socket: TcpStream,
    client: ClientAddr,
) -> Option<Connected> {
    let dst = pod.network.original_dst(&socket);
    let front = ResetUnlessDone::new(tokio::net::TcpStream::from_std(socket).ok()?);
    let refuse = |dst: OriginalDst, error: &dyn fmt::Display| {
        let addresses = Addresses { source: client.0, destination: dst.0, hbone: None };
        shard.telemetry.refused_early(addresses, Reporter::Destination, error);
        None
    };
    let dst = match dst {
        Ok(dst) => dst,
        Err(error) => return refuse(OriginalDst(client.0), &error),
    };
    let Some(admitted) = pod.admit(shard.config.pod_connections_max) else {
        shard.count.turn_away();
        return refuse(dst, &TooMany(shard.config.pod_connections_max));
    };
    let holder = pod.connection_holder_for(client.0.ip());
    if RESERVED_PORTS.contains(&dst.0.port()) {
        return refuse(dst, &NoRoute::SelfCall(dst.0));
    }
    let fronted = pod.network.fronted(client.0, dst.0.port());
    let uid = match holder.run(pod.workload(&shard.mesh)).await {
        Ok(Ok(uid)) => uid,
        Ok(Err(unknown)) => return refuse(dst, &unknown),
        Err(shed) => return refuse(dst, &shed),
    };
    let facts =
        Facts { workload: Arc::clone(&uid), identity: None, source: client.0.ip(), destination: dst.0 };
    let mut registered = shard.live.register(facts.clone(), None);
    let admission = match holder.run(shard.live.admit(&shard.mesh, &facts)).await {
        Ok(Some(admission)) => admission,
        Ok(None) => return refuse(dst, &UnknownWorkload(Named::Uid(uid))),
        Err(shed) => return refuse(dst, &shed),
    };
    let Admission { mesh, workload, decided: permit } = admission;
    let source = mesh.workload_at(&workload.network, client.0.ip()).cloned();
    let parties = Parties {
        source,
        // Who came is not known, and who was reached is.
        destination_identity: Some(workload.identity.clone()),
        service: service_behind(&mesh, &workload, dst.0.port(), None).cloned(),
        destination: Some(workload),
        ..Parties::unknown(Reporter::Destination)
    };
    drop(mesh);
    let addresses = Addresses { source: client.0, destination: dst.0, hbone: None };
    let tally = shard.tally(&pod, parties, addresses, None, dst.0);
    let delivered = match permit {
        Ok(permit) => {
            let mut first = Bytes::new();
            let delivered = deliver(permit, &shard, &pod, client.0, dst.0, &mut first);
            match registered.run(holder.run(delivered)).await {
                Ok(delivered) => delivered.unwrap_or_else(|shed| Err(DeliveryError::Shed(shed))),
                Err(cut) => Err(cut.into()),
            }
        }
        Err(denial) => Err(denial.into()),
    };
    match delivered {
        Ok(application) => {
            let relay =
                copy::Relay::new(front, ResetUnlessDone::new(application), Holders::One(holder), tally);
            Some(Connected { relay, registered, admitted, fronted })
        }
        Err(error) => {
            tally.close(Err(error));
            None
        }
    }
}
