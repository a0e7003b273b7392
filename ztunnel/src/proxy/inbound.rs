//! Tunnels that peers dial to a pod, and the streams on them.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::pin::pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;

use bytes::Bytes;

use crate::hbone::address::Authority;
use crate::hbone::server;
use crate::hbone::server::Incoming;
use crate::hbone::server::Refusal;
use crate::hbone::server::ServeError;
use crate::hbone::stream::StreamError;
use crate::identity::worker::Unavailable;
use crate::mesh::lookup::UnknownWorkload;
use crate::model::addr::ClientAddr;
use crate::model::addr::canonical;
use crate::model::identity::SpiffeId;
use crate::model::workload::Named;
use crate::model::workload::Workload;
use crate::net::copy::ResetUnlessDone;
use crate::policy::authorize::Permit;
use crate::proxy::accept::Counted;
use crate::proxy::ending::Ending;
use crate::proxy::ending::Tally;
use crate::proxy::ending::told;
use crate::proxy::live;
use crate::proxy::live::Facts;
use crate::proxy::live::Registered;
use crate::proxy::live::TunnelId;
use crate::proxy::passthrough::DeliveryError;
use crate::proxy::passthrough::deliver;
use crate::proxy::pod::Admitted;
use crate::proxy::pod::Pod;
use crate::proxy::pod::TooMany;
use crate::proxy::relay::Application;
use crate::proxy::relay::Read;
use crate::proxy::relay::Received;
use crate::proxy::relay::Relay;
use crate::proxy::relay::RelayError;
use crate::proxy::shard::Entered;
use crate::proxy::shard::Shard;
use crate::route::plan::RESERVED_PORTS;
use crate::shutdown;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::ResponseFlag;
use crate::tls::trust::Side;
use crate::tls::verify;
use crate::tls::verify::NoIdentity;
use crate::tls::verify::VerifiedPeer;

/// Why a connection to the HBONE port became no tunnel.
#[derive(Debug, thiserror::Error)]
enum NoTunnel {
    #[error(transparent)]
    UnknownWorkload(UnknownWorkload),
    #[error(transparent)]
    Identity(Unavailable),
    #[error("the pod already has {0} tunnels, the most it may have")]
    TooManyTunnels(usize),
    #[error("the pod already has {0} handshakes in progress, the most it may have")]
    TooManyHandshakes(usize),
    #[error(transparent)]
    Serve(ServeError),
    #[error("the client proved no identity")]
    NoIdentity(#[source] NoIdentity),
}

/// A tunnel, as its streams see it.
pub(super) struct Tunnel {
    _admitted: Admitted,
    client: ClientAddr,
    /// The address of the pod that was dialled, with the HBONE port.
    local: SocketAddr,
    peer: VerifiedPeer,
    id: TunnelId,
}

impl Tunnel {
    fn caller(&self) -> Caller<'_> {
        let tunnel = Some(self.id);
        Caller { client: self.client, local: self.local, identity: self.peer.id(), tunnel }
    }
}

/// Who asks for an application of a pod.
#[derive(Clone, Copy)]
pub(super) struct Caller<'a> {
    /// Where it comes from.
    pub(super) client: ClientAddr,
    /// The address of the pod that it asked, with the HBONE port.
    pub(super) local: SocketAddr,
    /// Who it proved to be.
    pub(super) identity: &'a SpiffeId,
    /// Where it proved that; `None` within this node.
    pub(super) tunnel: Option<TunnelId>,
}

/// Serves one connection to `pod`'s HBONE port. `counted` lives as long.
pub(super) async fn serve(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    (socket, client): (TcpStream, ClientAddr),
    counted: Counted,
) {
    let Ok(local) = socket.local_addr().map(canonical) else { return };
    let Ok(socket) = tokio::net::TcpStream::from_std(socket) else { return };
    let (tunnel, accepted) = match Box::pin(accept(&shard, &pod, socket, client, local)).await {
        Ok(accepted) => accepted,
        Err(error) => {
            let addresses = Addresses { source: client.0, destination: local, hbone: None };
            return shard.telemetry.refused_early(addresses, Reporter::Destination, &Told(&error));
        }
    };
    let tunnel = Arc::new(tunnel);
    let drain = drain(&shard, &pod);
    let serving = server::serve(accepted, &shard.config.hbone, drain, |incoming| {
        let (shard_, pod, tunnel) = (Arc::clone(&shard), Arc::clone(&pod), Arc::clone(&tunnel));
        let counted = shard.count.connection();
        shutdown::spawn(stream(shard_, pod, (tunnel, incoming), counted));
    });
    let trust = shard.identities.trust();
    let served = tokio::select! {
        served = serving => served,
        () = trust.revoked(&tunnel.peer, Side::Client) => {
            tracing::warn!(client = %client.0, peer = %tunnel.peer.id(), pod = %pod.uid, "tunnel cut: a certificate of the peer was revoked");
            // Before any of the streams has a turn to notice that its tunnel is gone.
            shard.live.revoke(tunnel.id);
            Ok(())
        }
    };
    if let Err(error) = served {
        tracing::debug!(client = %client.0, pod = %pod.uid, error = &error as &dyn Error, "tunnel broke");
    }
    drop(counted);
}

async fn accept(
    shard: &Shard,
    pod: &Arc<Pod>,
    socket: tokio::net::TcpStream,
    client: ClientAddr,
    local: SocketAddr,
) -> Result<(Tunnel, server::Accepted), NoTunnel> {
    let turn_away = |socket, why: fn(usize) -> NoTunnel, limit| {
        shard.count.turn_away();
        drop(ResetUnlessDone::new(socket));
        Err(why(limit))
    };
    let limit = shard.config.pod_tunnels_max;
    let Some(admitted) = pod.admit_tunnel(limit) else {
        return turn_away(socket, NoTunnel::TooManyTunnels, limit);
    };
    let limit = shard.config.pod_handshakes_max;
    let Some(_handshake) = pod.admit_handshake(limit) else {
        return turn_away(socket, NoTunnel::TooManyHandshakes, limit);
    };
    let uid = pod.workload(&shard.mesh).await.map_err(NoTunnel::UnknownWorkload)?;
    let mesh = shard.mesh.snapshot();
    let workload = mesh
        .workload(&uid)
        .ok_or_else(|| NoTunnel::UnknownWorkload(UnknownWorkload(Named::Uid(Arc::clone(&uid)))))?;
    let identity = workload.identity.clone();
    drop(mesh);
    let credentials = shard.identities.credentials(&identity).await.map_err(NoTunnel::Identity)?;
    let accepted = server::accept(socket, credentials.server_config(), &shard.config.hbone)
        .await
        .map_err(NoTunnel::Serve)?;
    let peer = shard.identities.trust().verified_peer(accepted.tls()).map_err(NoTunnel::NoIdentity)?;
    Ok((Tunnel { _admitted: admitted, client, local, peer, id: shard.live.tunnel() }, accepted))
}

/// An error with its causes, and what they mean to whoever runs the mesh.
struct Told<'a>(&'a NoTunnel);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&told(self.0))?;
        match self.0 {
            NoTunnel::Serve(ServeError::Tls(io)) => match io.get_ref().and_then(|e| e.downcast_ref()) {
                Some(error) => write!(f, ": {}", verify::cause(error)),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }
}

async fn drain(shard: &Shard, pod: &Pod) {
    let mut signal = shard.signal.clone();
    tokio::select! {
        () = signal.draining() => {}
        () = pod.removed() => {}
        () = pod.handed_over() => {}
    }
}

/// Why a stream was not delivered, or ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum StreamFailure {
    /// It asked for something else than one of the pod's addresses and a port.
    #[error("not a CONNECT to an address of this pod")]
    BadRequest,
    /// It asked for a port of the proxy.
    #[error("attempted recursive call to ourselves: {0} is a port of the proxy")]
    SelfCall(SocketAddr),
    /// The pod has too many connections.
    #[error(transparent)]
    TooMany(TooMany),
    /// The mesh does not know the pod.
    #[error(transparent)]
    UnknownWorkload(UnknownWorkload),
    /// Policy, or the application.
    #[error(transparent)]
    Delivery(#[from] DeliveryError),
    /// The client gave up while the application was being dialled.
    #[error("the client gave up before it was connected")]
    Abandoned(#[source] StreamError),
    /// It broke later.
    #[error(transparent)]
    Relay(RelayError),
}

impl StreamFailure {
    /// What the client is told; nothing once it was connected, or is gone.
    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::BadRequest => Some(Refusal::BadRequest),
            Self::Delivery(DeliveryError::Denied(_) | DeliveryError::Cut(_)) => Some(Refusal::Denied),
            Self::SelfCall(_)
            | Self::TooMany(_)
            | Self::UnknownWorkload(_)
            | Self::Delivery(DeliveryError::Connect { .. } | DeliveryError::Timeout { .. }) => {
                Some(Refusal::Unavailable)
            }
            Self::Delivery(DeliveryError::Copy(_)) | Self::Abandoned(_) | Self::Relay(_) => None,
        }
    }
}

impl Ending for StreamFailure {
    fn flag(&self) -> ResponseFlag {
        match self {
            Self::Delivery(error) => error.flag(),
            Self::SelfCall(_) | Self::TooMany(_) | Self::UnknownWorkload(_) => ResponseFlag::Connect,
            Self::BadRequest | Self::Abandoned(_) | Self::Relay(_) => ResponseFlag::None,
        }
    }

    fn is_reset(&self) -> bool {
        match self {
            Self::Relay(error) => error.is_reset(),
            Self::Delivery(error) => error.is_reset(),
            Self::Abandoned(_) => true,
            Self::BadRequest | Self::SelfCall(_) | Self::TooMany(_) | Self::UnknownWorkload(_) => false,
        }
    }
}

/// A stream and its application: all there is of the connection.
struct Connected {
    relay: Relay<Tally>,
    registered: Registered,
    admitted: Admitted,
}

/// Serves one stream. `counted` lives as long.
pub(super) async fn stream(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    (tunnel, incoming): (Arc<Tunnel>, Incoming),
    counted: Entered,
) {
    // On the heap, and gone once connected: what is relayed must not carry the room its dial needed.
    let Some(mut connected) = Box::pin(establish(shard, pod, tunnel, incoming)).await else { return };
    let Connected { relay, registered, .. } = &mut connected;
    let ended = match registered.run(relay).await {
        Ok(ended) => ended.map_err(StreamFailure::Relay),
        Err(cut) => Err(DeliveryError::from(cut).into()),
    };
    // What was cut is dropped here, and so reset at both ends.
    connected.relay.into_meter().close(ended);
    drop((connected.registered, connected.admitted, counted));
}

/// Decides, dials and answers. `None` when it came to nothing, which has been told then.
async fn establish(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    tunnel: Arc<Tunnel>,
    mut incoming: Incoming,
) -> Option<Connected> {
    let asked = match incoming.authority() {
        Some(Authority::Address(asked)) => Some(asked),
        // A name would have to be resolved to a service of which this pod is an endpoint.
        Some(_) | None => None,
    };
    let delivered = match admit(&shard, &pod, tunnel.caller(), asked, &mut incoming).await {
        Ok(delivered) => delivered,
        Err(refusal) => {
            if let Some(refusal) = refusal {
                incoming.refuse(refusal);
            }
            return None;
        }
    };
    let Delivered { application, first, workload, tally, registered, admitted } = delivered;
    let baggage = shard.config.response_baggage.then(|| pod.baggage(&workload));
    match incoming.connect(baggage) {
        Ok(halves) => {
            let application = (application, Application::Server);
            let relay = Relay::new(application, halves, Read::default(), tally).after(first);
            Some(Connected { relay, registered, admitted })
        }
        Err(error) => {
            tally.close(Err(StreamFailure::Abandoned(error)));
            None
        }
    }
}

/// An application that was dialled for a caller who may have it, and what goes with the connection.
pub(super) struct Delivered {
    /// The application.
    pub(super) application: ResetUnlessDone,
    /// What the caller had said before it was dialled.
    pub(super) first: Received,
    /// Whose it is.
    pub(super) workload: Arc<Workload>,
    /// What is told of it on this side.
    pub(super) tally: Tally,
    /// Judged again whenever the mesh changes.
    pub(super) registered: Registered,
    /// Its place among the pod's connections.
    pub(super) admitted: Admitted,
}

/// A caller, while the application is being dialled for it.
pub(super) trait Asker {
    /// What it has said without waiting for the answer: nothing, or a piece, or that it is gone.
    fn first_words(&mut self, cx: &mut Context<'_>) -> Option<Result<Bytes, StreamError>>;

    /// Waits for it to give up.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<StreamError>;
}

impl Asker for Incoming {
    fn first_words(&mut self, cx: &mut Context<'_>) -> Option<Result<Bytes, StreamError>> {
        Self::first_words(self, cx)
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        Self::poll_gone(self, cx)
    }
}

/// Decides and dials. `asked` is the address asked for, if what was asked for is one. What it came to when it came to nothing has been told then, and the answer to the caller is the
/// error: none to one that is gone.
pub(super) async fn admit(
    shard: &Shard,
    pod: &Arc<Pod>,
    caller: Caller<'_>,
    asked: Option<SocketAddr>,
    asker: &mut impl Asker,
) -> Result<Delivered, Option<Refusal>> {
    let refuse = |asked: Option<SocketAddr>, failure: StreamFailure| {
        let addresses = Addresses { source: caller.client.0, destination: caller.local, hbone: asked };
        shard.telemetry.refused_early(addresses, Reporter::Destination, &failure);
        Err(failure.refusal())
    };
    let to = match destination(asked, pod, caller.local) {
        Ok(to) => to,
        Err(failure) => return refuse(None, failure),
    };
    let limit = shard.config.pod_connections_max;
    let Some(admitted) = pod.admit(limit) else {
        shard.count.turn_away();
        return refuse(Some(to), StreamFailure::TooMany(TooMany(limit)));
    };
    let uid = match pod.workload(&shard.mesh).await {
        Ok(uid) => uid,
        Err(unknown) => return refuse(Some(to), StreamFailure::UnknownWorkload(unknown)),
    };
    let facts = Facts {
        workload: Arc::clone(&uid),
        identity: Some(caller.identity.clone()),
        source: caller.client.0.ip(),
        destination: to,
    };
    let mut registered = shard.live.register(facts.clone(), caller.tunnel);
    let mesh = shard.mesh.snapshot();
    let Some(workload) = mesh.workload(&uid).cloned() else {
        let unknown = StreamFailure::UnknownWorkload(UnknownWorkload(Named::Uid(uid)));
        return refuse(Some(to), unknown);
    };
    let permit = live::admit(&mesh, &workload, &facts);
    let parties = Parties {
        reporter: Reporter::Destination,
        source: mesh.workload_at(&workload.network, facts.source).cloned(),
        source_identity: facts.identity.clone(),
        destination: Some(Arc::clone(&workload)),
        destination_identity: Some(workload.identity.clone()),
        // Which one was meant is only the client's word.
        service: None,
    };
    drop(mesh);
    let addresses = Addresses { source: caller.client.0, destination: caller.local, hbone: Some(to) };
    let tally = shard.tally(pod, parties, addresses, None);
    let mut first = Received::default();
    let delivered = match permit {
        Ok(permit) => registered
            .run(dial(permit, shard, pod, caller.client, to, (asker, &mut first)))
            .await
            .unwrap_or_else(|cut| Err(DeliveryError::from(cut).into())),
        Err(denial) => Err(DeliveryError::from(denial).into()),
    };
    match delivered {
        Ok(application) => {
            let application = ResetUnlessDone::new(application);
            Ok(Delivered { application, first, workload, tally, registered, admitted })
        }
        Err(failure) => {
            let refusal = failure.refusal();
            tally.close(Err(failure));
            Err(refusal)
        }
    }
}

/// Dials the application, unless the caller gives up meanwhile. What the caller has said already goes with it.
async fn dial(
    permit: Permit,
    shard: &Shard,
    pod: &Pod,
    client: ClientAddr,
    to: SocketAddr,
    (asker, first): (&mut impl Asker, &mut Received),
) -> Result<tokio::net::TcpStream, StreamFailure> {
    // Policy has spoken: from here on the caller's words may be looked at.
    if let Some(said) = poll_fn(|cx| Poll::Ready(asker.first_words(cx))).await {
        first.unsent = said.map_err(StreamFailure::Abandoned)?;
    }
    let said = first.unsent.len();
    let dialled = {
        let mut dial = pin!(deliver(permit, shard, pod, client.0, to, &mut first.unsent));
        poll_fn(|cx| {
            if let Poll::Ready(dialled) = dial.as_mut().poll(cx) {
                return Poll::Ready(dialled.map_err(StreamFailure::from));
            }
            asker.poll_gone(cx).map(|gone| Err(StreamFailure::Abandoned(gone)))
        })
        .await
    };
    first.sent = said - first.unsent.len();
    dialled
}

/// Where a connection goes: the address of the pod that was asked or another one of it, and a port that is the
/// application's to have.
fn destination(asked: Option<SocketAddr>, pod: &Pod, local: SocketAddr) -> Result<SocketAddr, StreamFailure> {
    let asked = asked.map(canonical).ok_or(StreamFailure::BadRequest)?;
    if asked.ip() != local.ip() && !pod.has(asked.ip()) {
        return Err(StreamFailure::BadRequest);
    }
    if RESERVED_PORTS.contains(&asked.port()) {
        return Err(StreamFailure::SelfCall(asked));
    }
    Ok(asked)
}
