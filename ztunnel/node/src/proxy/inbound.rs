//! Tunnels that peers dial to a pod, and the streams on them.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::pin::pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use ztunnel_mesh::model::addr::Authority;
use ztunnel_mesh::model::addr::ClientAddr;
use ztunnel_mesh::model::addr::canonical;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::policy::authorize::Permit;
use ztunnel_mesh::route::arrival::Arrival;
use ztunnel_mesh::route::arrival::Asked;
use ztunnel_mesh::route::arrival::NotHere;
use ztunnel_mesh::route::arrival::arrive;
use ztunnel_mesh::store::gap::NEW_WITHIN;
use ztunnel_mesh::store::index::Mesh;
use ztunnel_mesh::store::lookup::UnknownWorkload;
use ztunnel_runtime::shutdown;
use ztunnel_tls::trust::Side;
use ztunnel_tls::verify;
use ztunnel_tls::verify::NoIdentity;
use ztunnel_tls::verify::VerifiedPeer;

use crate::hbone::address::Baggage;
use crate::hbone::server;
use crate::hbone::server::Incoming;
use crate::hbone::server::Refusal;
use crate::hbone::server::ServeError;
use crate::hbone::stream::StreamError;
use crate::identity::worker::Unavailable;
use crate::net::budget::Holder;
use crate::net::budget::Shed;
use crate::net::copy::ResetUnlessDone;
use crate::net::proxy_header;
use crate::proxy::Config;
use crate::proxy::accept::Counted;
use crate::proxy::ending::Ending;
use crate::proxy::ending::Tally;
use crate::proxy::ending::told;
use crate::proxy::live::Admission;
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
use crate::proxy::tunnels;
use crate::proxy::turns::Lane;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::ResponseFlag;
use crate::telemetry::events::Security;

/// Why a connection to the HBONE port became no tunnel.
#[derive(Debug, thiserror::Error)]
enum NoTunnel {
    #[error(transparent)]
    UnknownWorkload(UnknownWorkload),
    #[error(transparent)]
    Identity(Unavailable),
    #[error("the pod already has {0} tunnels, the most it may have")]
    TooManyTunnels(usize),
    #[error("the pod has {0} handshakes in progress, the most it may have, or the client its part of them")]
    TooManyHandshakes(usize),
    #[error(
        "the handshake made room for others: the pod may have {0} in progress, and the client a part of them"
    )]
    HandshakeTaken(usize),
    #[error("the client already has its part of the {0} tunnels the pod may have")]
    TooManyOfOne(usize),
    #[error(transparent)]
    Serve(ServeError),
    #[error("the client proved no identity")]
    NoIdentity(#[source] NoIdentity),
}

/// A tunnel, as its streams see it.
pub(super) struct Tunnel {
    _admitted: (Admitted, tunnels::Place),
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

/// Serves one connection to `pod`'s HBONE port, its streams in the lane `streams`. `counted` lives as long.
pub(super) async fn serve(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    (socket, client): (TcpStream, ClientAddr),
    streams: Lane,
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
        shutdown::spawn(streams.clone().run(stream(shard_, pod, (tunnel, incoming), counted)));
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
    let Some(mut handshake) = pod.handshakes.enter(client.0.ip(), limit) else {
        return turn_away(socket, NoTunnel::TooManyHandshakes, limit);
    };
    let shaken = tokio::select! {
        biased;
        () = handshake.taken() => {
            shard.count.turn_away();
            return Err(NoTunnel::HandshakeTaken(limit));
        }
        shaken = shake(shard, pod, socket, client) => shaken,
    };
    let (accepted, peer) = shaken?;
    let limit = shard.config.pod_tunnels_max;
    let Some(place) = pod.peers.enter(peer.id(), accepted.activity(), limit) else {
        shard.count.turn_away();
        accepted.reset();
        return Err(NoTunnel::TooManyOfOne(limit));
    };
    let id = shard.live.tunnel();
    Ok((Tunnel { _admitted: (admitted, place), client, local, peer, id }, accepted))
}

async fn shake(
    shard: &Shard,
    pod: &Arc<Pod>,
    socket: tokio::net::TcpStream,
    client: ClientAddr,
) -> Result<(server::Accepted, VerifiedPeer), NoTunnel> {
    let holder = pod.tunnel_holder_for(client.0.ip());
    let uid = pod.workload(&shard.mesh).await.map_err(NoTunnel::UnknownWorkload)?;
    let identity = match pod.identity() {
        Some(own) => own.clone(),
        None => {
            let mesh = shard.mesh.snapshot();
            let workload = mesh.workload(&uid);
            let unknown = || NoTunnel::UnknownWorkload(UnknownWorkload(Named::Uid(Arc::clone(&uid))));
            workload.ok_or_else(unknown)?.identity.clone()
        }
    };
    let credentials = shard.identities.credentials(&identity).await.map_err(NoTunnel::Identity)?;
    let accepted = server::accept(socket, credentials.server_config(), &shard.config.hbone)
        .await
        .map_err(NoTunnel::Serve)?;
    let peer = shard.identities.trust().verified_peer(accepted.tls()).map_err(NoTunnel::NoIdentity)?;
    accepted.charge_to(holder);
    Ok((accepted, peer))
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
    /// It asked for something else than an address or a name, and a port.
    #[error("not a CONNECT to an address or a name with a port")]
    BadRequest,
    /// What it asked for is not to be had in this pod.
    #[error(transparent)]
    NotHere(NotHere),
    /// It asked for what this proxy's own pod does not offer.
    #[error("{0} is not offered to peers")]
    NotOffered(SocketAddr),
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
    /// It had to give way before it was connected.
    #[error(transparent)]
    Shed(Shed),
}

impl StreamFailure {
    /// What the client is told; nothing once it was connected, or is gone.
    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::BadRequest | Self::NotHere(NotHere::OtherAddress(_) | NotHere::OtherFamily(..)) => {
                Some(Refusal::BadRequest)
            }
            Self::Delivery(DeliveryError::Denied(_) | DeliveryError::Cut(_)) => Some(Refusal::Denied),
            Self::NotHere(
                NotHere::SelfCall(_)
                | NotHere::UnknownHost(_)
                | NotHere::UnknownService(_)
                | NotHere::NotAnEndpoint(_)
                | NotHere::NoPort { .. }
                | NotHere::NoAddress(_)
                | NotHere::UnknownTunnel,
            )
            | Self::NotOffered(_)
            | Self::TooMany(_)
            | Self::UnknownWorkload(_)
            | Self::Shed(_)
            | Self::Delivery(
                DeliveryError::Connect { .. } | DeliveryError::Timeout { .. } | DeliveryError::Shed(_),
            ) => Some(Refusal::Unavailable),
            Self::Delivery(DeliveryError::Copy(_)) | Self::Abandoned(_) | Self::Relay(_) => None,
        }
    }
}

impl Ending for StreamFailure {
    fn flag(&self) -> ResponseFlag {
        match self {
            Self::Delivery(error) => error.flag(),
            Self::NotHere(_) | Self::NotOffered(_) | Self::TooMany(_) | Self::UnknownWorkload(_) => {
                ResponseFlag::Connect
            }
            Self::BadRequest | Self::Abandoned(_) | Self::Relay(_) | Self::Shed(_) => ResponseFlag::None,
        }
    }

    fn is_reset(&self) -> bool {
        match self {
            Self::Relay(error) => error.is_reset(),
            Self::Delivery(error) => error.is_reset(),
            Self::Abandoned(_) => true,
            Self::BadRequest
            | Self::NotHere(_)
            | Self::NotOffered(_)
            | Self::TooMany(_)
            | Self::UnknownWorkload(_)
            | Self::Shed(_) => false,
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
    let asked = incoming.authority();
    let delivered = match admit(&shard, &pod, tunnel.caller(), asked, &mut incoming).await {
        Ok(delivered) => delivered,
        Err(refusal) => {
            if let Some(refusal) = refusal {
                incoming.refuse(refusal);
            }
            return None;
        }
    };
    let Delivered { application, first, workload, tally, registered, admitted, holder } = delivered;
    let baggage = shard.config.response_baggage.then(|| pod.baggage(&workload));
    match incoming.connect(baggage) {
        Ok(halves) => {
            let application = (application, Application::Server);
            let relay = Relay::new(application, halves, Read::default(), holder, tally).after(first);
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
    /// Charged for what it holds.
    pub(super) holder: Holder,
}

/// A caller, while the application is being dialled for it.
pub(super) trait Asker {
    /// Which workload it says it is, as text of the `baggage` header: for telemetry, as it can say what it likes.
    fn baggage(&self) -> Option<&str>;

    /// Which network it says it is in, which one does that came through a gateway.
    fn network(&self) -> Option<&str>;

    /// Which service it says it meant, by its hostname.
    fn host(&self) -> Option<&str>;

    /// Its workload, where that is known for sure.
    fn workload(&self) -> Option<&Arc<Workload>> {
        None
    }

    /// What it has said without waiting for the answer: nothing, or a piece, or that it is gone.
    fn first_words(&mut self, cx: &mut Context<'_>) -> Option<Result<Bytes, StreamError>>;

    /// How many bytes of what it has said are kept.
    fn kept(&mut self, _cx: &mut Context<'_>) -> usize {
        0
    }

    /// Waits for it to give up.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<StreamError>;
}

impl Asker for Incoming {
    fn baggage(&self) -> Option<&str> {
        Self::baggage(self)
    }

    fn network(&self) -> Option<&str> {
        Self::network(self)
    }

    fn host(&self) -> Option<&str> {
        self.forwarded().and_then(|forwarded| forwarded.host)
    }

    fn first_words(&mut self, cx: &mut Context<'_>) -> Option<Result<Bytes, StreamError>> {
        Self::first_words(self, cx)
    }

    fn kept(&mut self, cx: &mut Context<'_>) -> usize {
        Self::kept(self, cx)
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        Self::poll_gone(self, cx)
    }
}

/// The client's workload. One that came through a gateway is not found by its address, which is the gateway's; of it
/// there is only what it says, as there is of one that the mesh does not know.
fn source(
    mesh: &Mesh,
    own_network: &str,
    workload: &Workload,
    facts: &Facts,
    asker: &impl Asker,
) -> Option<Arc<Workload>> {
    if let Some(known) = asker.workload() {
        return Some(Arc::clone(known));
    }
    let elsewhere = asker.network().is_some_and(|network| !network.eq_ignore_ascii_case(own_network));
    let known = if elsewhere { None } else { mesh.workload_at(&workload.network, facts.source) };
    known.cloned().or_else(|| {
        let (baggage, identity) = asker.baggage().zip(facts.identity.as_ref())?;
        Some(Arc::new(Baggage::parse(baggage).describe(identity)))
    })
}

/// Decides where it goes. A service that the pod is behind and that the mesh does not have is asked for if it can be,
/// and waited for.
async fn arrival(shard: &Shard, uid: &str, asked: &Asked<'_>) -> Result<Arrival, StreamFailure> {
    let arrive = |mesh: &Mesh| {
        let unknown = || StreamFailure::UnknownWorkload(UnknownWorkload(Named::Uid(Arc::from(uid))));
        let workload = mesh.workload(uid).ok_or_else(unknown)?;
        arrive(mesh, workload, asked).map_err(StreamFailure::NotHere)
    };
    let arrived = arrive(&shard.mesh.snapshot());
    let Err(StreamFailure::NotHere(NotHere::UnknownService(name))) = &arrived else { return arrived };
    if let Some(demand) = shard.mesh.demand() {
        let _unanswered = demand.look_up(name).await;
    }
    let known = shard.mesh.find_within(NEW_WITHIN, |mesh| match arrive(mesh) {
        Err(StreamFailure::NotHere(NotHere::UnknownService(_))) => None,
        arrived => Some(arrived),
    });
    known.await.unwrap_or(arrived)
}

/// Decides and dials. `asked` is what was asked for, if that makes sense. What it came to when it came to nothing has
/// been told then, and the answer to the caller is the error: none to one that is gone.
pub(super) async fn admit(
    shard: &Shard,
    pod: &Arc<Pod>,
    caller: Caller<'_>,
    asked: Option<Authority>,
    asker: &mut impl Asker,
) -> Result<Delivered, Option<Refusal>> {
    let refuse = |asked: Option<Authority>, failure: StreamFailure| {
        let addresses = Addresses { source: caller.client.0, destination: caller.local, hbone: asked };
        shard.telemetry.refused_early(addresses, Reporter::Destination, &failure);
        Err(failure.refusal())
    };
    let Some(authority) = asked else { return refuse(None, StreamFailure::BadRequest) };
    let limit = shard.config.pod_connections_max;
    let Some(admitted) = pod.admit(limit) else {
        shard.count.turn_away();
        return refuse(Some(authority), StreamFailure::TooMany(TooMany(limit)));
    };
    let holder = pod.connection_holder_for(caller.client.0.ip());
    let uid = match holder.run(pod.workload(&shard.mesh)).await {
        Ok(Ok(uid)) => uid,
        Ok(Err(unknown)) => return refuse(Some(authority), StreamFailure::UnknownWorkload(unknown)),
        Err(shed) => return refuse(Some(authority), StreamFailure::Shed(shed)),
    };
    let (client, local) = (caller.client.0.ip(), caller.local.ip());
    let asked = Asked {
        client,
        local,
        addresses: pod.addresses(),
        authority: &authority,
        host: asker.host(),
        namespace: caller.identity.namespace(),
    };
    let arrived = holder.run(arrival(shard, &uid, &asked)).await;
    let Arrival { to, service, announce } =
        match arrived.unwrap_or_else(|shed| Err(StreamFailure::Shed(shed))) {
            Ok(arrival) => arrival,
            Err(failure) => return refuse(Some(authority), failure),
        };
    if !pod.offers(to.port()) {
        return refuse(Some(authority), StreamFailure::NotOffered(to));
    }
    let facts = Facts {
        workload: Arc::clone(&uid),
        identity: Some(caller.identity.clone()),
        source: client,
        destination: to,
    };
    let mut registered = shard.live.register(facts.clone(), caller.tunnel);
    let admission = match holder.run(shard.live.admit(&shard.mesh, &facts)).await {
        Ok(Some(admission)) => admission,
        Ok(None) => {
            let unknown = StreamFailure::UnknownWorkload(UnknownWorkload(Named::Uid(uid)));
            return refuse(Some(authority), unknown);
        }
        Err(shed) => return refuse(Some(authority), StreamFailure::Shed(shed)),
    };
    let Admission { mesh, workload, decided: permit } = admission;
    let parties = Parties {
        reporter: Reporter::Destination,
        source: source(&mesh, shard.config.network_of(&workload), &workload, &facts, asker),
        source_identity: facts.identity.clone(),
        destination: Some(Arc::clone(&workload)),
        destination_identity: Some(workload.identity.clone()),
        service,
        security: if caller.tunnel.is_some() { Security::MutualTls } else { Security::WithinNode },
    };
    drop(mesh);
    let addresses = Addresses { source: caller.client.0, destination: caller.local, hbone: Some(authority) };
    let tally = shard.tally(pod, parties, addresses, None, to);
    let mut first = Received::default();
    let door = Door::new(&shard.config, &caller, to, announce);
    let delivered = match permit {
        Ok(permit) => registered
            .run(dial(permit, shard, pod, door, (asker, &mut first), &holder))
            .await
            .unwrap_or_else(|cut| Err(DeliveryError::from(cut).into())),
        Err(denial) => Err(DeliveryError::from(denial).into()),
    };
    match delivered {
        Ok(application) => {
            let application = ResetUnlessDone::new(application);
            Ok(Delivered { application, first, workload, tally, registered, admitted, holder })
        }
        Err(failure) => {
            let refusal = failure.refusal();
            tally.close(Err(failure));
            Err(refusal)
        }
    }
}

/// How the application is dialled.
struct Door {
    /// Whom it sees as its client.
    client: SocketAddr,
    to: SocketAddr,
    /// What it is told before anything else.
    header: Vec<u8>,
}

impl Door {
    /// To the application at `to`, which is to be told that the caller meant to go to `announce`.
    fn new(config: &Config, caller: &Caller<'_>, to: SocketAddr, announce: Option<SocketAddr>) -> Self {
        let client = caller.client.0;
        let Some(meant) = announce else { return Self { client, to, header: Vec::new() } };
        let header = proxy_header::encode(client, meant, caller.identity.as_str());
        if !config.localhost_app_tunnel {
            return Self { client, to, header };
        }
        let loopback: IpAddr =
            if to.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        Self { client: SocketAddr::new(loopback, 0), to: SocketAddr::new(loopback, to.port()), header }
    }
}

/// Dials the application, unless the caller gives up meanwhile. What the caller has said already goes with it, after
/// what the application is to be told first.
async fn dial(
    permit: Permit,
    shard: &Shard,
    pod: &Pod,
    door: Door,
    (asker, first): (&mut impl Asker, &mut Received),
    holder: &Holder,
) -> Result<tokio::net::TcpStream, StreamFailure> {
    // Policy has spoken: from here on the caller's words may be looked at.
    if let Some(said) = poll_fn(|cx| Poll::Ready(asker.first_words(cx))).await {
        first.unsent = said.map_err(StreamFailure::Abandoned)?;
    }
    let header = door.header.len();
    if header > 0 {
        first.unsent = Bytes::from([&door.header[..], &first.unsent].concat());
    }
    let all = first.unsent.len();
    let mut dialled = {
        let mut dial = pin!(deliver(permit, shard, pod, door.client, door.to, &mut first.unsent));
        poll_fn(|cx| {
            if let Poll::Ready(dialled) = dial.as_mut().poll(cx) {
                return Poll::Ready(dialled.map_err(StreamFailure::from));
            }
            holder.set(all + asker.kept(cx));
            if let Poll::Ready(shed) = holder.poll_shed(cx) {
                return Poll::Ready(Err(StreamFailure::Shed(shed)));
            }
            asker.poll_gone(cx).map(|gone| Err(StreamFailure::Abandoned(gone)))
        })
        .await
    }?;
    // What the caller has said is counted, and what was told of it is not: nothing of that may be left over.
    while all - first.unsent.len() < header {
        let failed = |source| DeliveryError::Connect { to: door.to, source };
        if dialled.write_buf(&mut first.unsent).await.map_err(failed)? == 0 {
            return Err(failed(io::ErrorKind::WriteZero.into()).into());
        }
    }
    first.sent = all - first.unsent.len() - header;
    Ok(dialled)
}

#[cfg(test)]
mod tests {
    use ztunnel_mesh::model::identity::TrustDomain;

    use super::*;

    /// A caller that says this of itself.
    struct Says(Option<&'static str>);

    impl Asker for Says {
        fn baggage(&self) -> Option<&str> {
            Some("k8s.pod.name=elsewhere")
        }

        fn network(&self) -> Option<&str> {
            self.0
        }

        fn host(&self) -> Option<&str> {
            None
        }

        fn first_words(&mut self, _cx: &mut Context<'_>) -> Option<Result<Bytes, StreamError>> {
            None
        }

        fn poll_gone(&mut self, _cx: &mut Context<'_>) -> Poll<StreamError> {
            Poll::Pending
        }
    }

    #[test]
    fn a_client_that_came_through_a_gateway_is_not_known_by_its_address() {
        let network = |name: &str| Some(Arc::from(name));
        let told = |own: Option<Arc<str>>, says| {
            let config = Config { network: own, ..Config::default() };
            let at = |name: &str, ip: &str| Workload {
                network: "mesh".into(),
                addresses: vec![ip.parse().unwrap()],
                ..Workload::sample("shop", name)
            };
            let [here, pod] = [at("here", "10.0.0.1"), at("pod", "10.0.0.2")].map(Arc::new);
            let mesh = Mesh::new(TrustDomain::default(), [here, Arc::clone(&pod)], [], []);
            let facts = Facts {
                workload: Arc::clone(&pod.uid),
                identity: Some("spiffe://cluster.local/ns/shop/sa/elsewhere".parse().unwrap()),
                source: "10.0.0.1".parse().unwrap(),
                destination: "10.0.0.2:80".parse().unwrap(),
            };
            let source = source(&mesh, config.network_of(&pod), &pod, &facts, &Says(says)).unwrap();
            source.workload_name.to_string()
        };
        for (own, says, expect) in [
            (None, None, "here"),
            (None, Some("MESH"), "here"),
            (None, Some("far"), "elsewhere"),
            // Where this proxy is told its network, that is what it compares with, whatever the mesh says of the pod.
            (network("told"), None, "here"),
            (network("told"), Some("Told"), "here"),
            (network("told"), Some("mesh"), "elsewhere"),
        ] {
            assert_eq!(told(own.clone(), says), expect, "{own:?} {says:?}");
        }
    }

    #[test]
    fn a_waypoint_is_dialled_at_the_loopback_unless_that_is_switched_off() {
        let identity = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
        let check = |to: &str, announce: Option<&str>, localhost: bool, expect: [&str; 2]| {
            let config = Config { localhost_app_tunnel: localhost, ..Config::default() };
            let client = ClientAddr("10.0.0.1:4000".parse().unwrap());
            let caller = Caller {
                client,
                local: "10.0.0.2:15008".parse().unwrap(),
                identity: &identity,
                tunnel: None,
            };
            let announce: Option<SocketAddr> = announce.map(|at| at.parse().unwrap());
            let door = Door::new(&config, &caller, to.parse().unwrap(), announce);
            assert_eq!([door.client, door.to].map(|at| at.to_string()), expect, "{to}");
            let header = announce.map(|at| proxy_header::encode(client.0, at, identity.as_str()));
            assert_eq!(door.header, header.unwrap_or_default(), "{to}");
        };
        check("10.0.0.2:80", None, true, ["10.0.0.1:4000", "10.0.0.2:80"]);
        check("10.0.0.2:15088", Some("10.9.0.1:80"), true, ["127.0.0.1:0", "127.0.0.1:15088"]);
        check("[fd00::2]:15088", Some("[fd09::1]:80"), true, ["[::1]:0", "[::1]:15088"]);
        check("10.0.0.2:15088", Some("10.9.0.1:80"), false, ["10.0.0.1:4000", "10.0.0.2:15088"]);
    }
}
