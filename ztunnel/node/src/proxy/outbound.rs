//! What a pod dials: through a tunnel to a peer in the mesh, or on as it is.

use std::fmt;
use std::future::Future;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::pin::Pin;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::HeaderValue;
use http::StatusCode;
use tokio::time::Instant;
use tokio::time::sleep;
use tokio::time::timeout;
use ztunnel_mesh::model::addr::Authority;
use ztunnel_mesh::model::addr::ClientAddr;
use ztunnel_mesh::model::addr::HbonePeer;
use ztunnel_mesh::model::addr::OriginalDst;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::route::plan::NoRoute;
use ztunnel_mesh::route::plan::Plan;
use ztunnel_mesh::route::plan::named;
use ztunnel_mesh::route::plan::plan;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::demand::Demand;
use ztunnel_mesh::store::demand::NoAnswer;
use ztunnel_mesh::store::gap::NEW_WITHIN;
use ztunnel_mesh::store::lookup::UnknownWorkload;
use ztunnel_tls::configs::Credentials;
use ztunnel_tls::verify;

use crate::hbone::address::Baggage;
use crate::hbone::address::Forwarded;
use crate::hbone::address::TraceParent;
use crate::hbone::client::Answered;
use crate::hbone::client::Connect;
use crate::hbone::client::DialError;
use crate::hbone::client::Driver;
use crate::hbone::client::Lease;
use crate::hbone::client::Opening;
use crate::hbone::client::connect;
use crate::hbone::client::handshake;
use crate::hbone::pool::Dialer;
use crate::hbone::pool::Dialled;
use crate::hbone::pool::Key;
use crate::hbone::stream::RecvHalf;
use crate::hbone::stream::SendHalf;
use crate::hbone::stream::StreamError;
use crate::hbone::stream::TunnelError;
use crate::identity::worker::Unavailable;
use crate::net::budget::Holder;
use crate::net::budget::Shed;
use crate::net::copy;
use crate::net::copy::CopyError;
use crate::net::copy::Holders;
use crate::net::copy::ResetUnlessDone;
use crate::proxy::accept::Counted;
use crate::proxy::double;
use crate::proxy::ending::Ending;
use crate::proxy::ending::Tally;
use crate::proxy::names::NoAddress;
use crate::proxy::near;
use crate::proxy::pod::Admitted;
use crate::proxy::pod::Pod;
use crate::proxy::pod::TooMany;
use crate::proxy::relay::Application;
use crate::proxy::relay::EARLY_MAX;
use crate::proxy::relay::Early;
use crate::proxy::relay::Relay;
use crate::proxy::relay::RelayError;
use crate::proxy::shard::Shard;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::ResponseFlag;
use crate::telemetry::events::Security;

/// Why a pod's connection got nowhere, or ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum OutboundError {
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
    /// There is a way to the gateway of another network, and beyond it none that is secure to whom it leads to.
    #[error("no tunnel to {host} beyond its gateway")]
    Beyond {
        /// The service that was asked for.
        host: Arc<str>,
        /// What went wrong there.
        #[source]
        source: DialError,
    },
    /// Whoever serves the service in another network answered that it will not connect.
    #[error("{host} beyond its gateway refused the connection: http status: {status}")]
    BeyondRefused {
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
    /// It was cut, as the peer is no longer who it was.
    #[error("connection closed because a certificate of the HBONE peer was revoked")]
    Revoked,
    /// It broke later, inside a tunnel.
    #[error(transparent)]
    Relay(RelayError),
    /// It broke later, outside of one.
    #[error(transparent)]
    Copy(CopyError),
}

impl Ending for OutboundError {
    fn flag(&self) -> ResponseFlag {
        match self {
            Self::NoRoute(_)
            | Self::Unresolved { .. }
            | Self::Name { .. }
            | Self::Silent { .. }
            | Self::Refused { .. }
            | Self::BeyondRefused { .. }
            | Self::Connect { .. }
            | Self::Timeout { .. } => ResponseFlag::Connect,
            Self::Identity(_) => ResponseFlag::Identity,
            Self::Dial(error) => dial_flag(error),
            Self::Beyond { source, .. } => dial_flag(source),
            Self::Unanswered { source, .. } => match source {
                // A peer that does not accept this side's certificate says so only after the handshake.
                StreamError::Tunnel(TunnelError::Io(error)) if is_tls(error) => ResponseFlag::TlsFailure,
                StreamError::Tunnel(TunnelError::Protocol(_)) => ResponseFlag::H2Handshake,
                _ => ResponseFlag::Connect,
            },
            Self::Revoked => ResponseFlag::Revoked,
            Self::Abandoned(_) | Self::Shed(_) | Self::Relay(_) | Self::Copy(_) => ResponseFlag::None,
        }
    }

    fn is_reset(&self) -> bool {
        match self {
            Self::Abandoned(error) => copy::is_reset(error),
            Self::Relay(error) => error.is_reset(),
            Self::Copy(error) => error.is_reset(),
            Self::NoRoute(_)
            | Self::Unresolved { .. }
            | Self::Name { .. }
            | Self::Identity(_)
            | Self::Dial(_)
            | Self::Beyond { .. }
            | Self::BeyondRefused { .. }
            | Self::Shed(_)
            | Self::Revoked
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

/// A connection in both directions: all there is of it.
enum Connected {
    /// Through a tunnel, whose room it holds; and that of the tunnel around it, where there is one.
    Tunnelled { relay: Relay<Tally>, lease: Lease, around: Option<Box<Lease>>, admitted: Admitted },
    /// On as it is.
    Plain { relay: copy::Relay<Tally>, admitted: Admitted },
    /// To another pod of this daemon.
    Near { connection: Box<near::Connection>, admitted: Admitted },
}

/// Serves one connection that `pod` dialled. `counted` lives as long.
pub(super) async fn serve(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    (socket, client): (TcpStream, ClientAddr),
    counted: Counted,
) {
    // On the heap, and gone once connected: what is relayed must not carry the room its dial needed.
    let Some(mut connected) = Box::pin(establish(shard, pod, socket, client)).await else { return };
    // In place, as moving it would reserve its room twice.
    let ended = match &mut connected {
        Connected::Tunnelled { relay, .. } => relay.await.map_err(OutboundError::Relay),
        Connected::Plain { relay, .. } => relay.await.map_err(OutboundError::Copy),
        // It knows itself how it ended: for both ends.
        Connected::Near { connection, .. } => {
            connection.run().await;
            Ok(())
        }
    };
    match connected {
        Connected::Tunnelled { relay, lease, around, admitted } => {
            let is_revoked = || lease.is_revoked() || around.as_ref().is_some_and(|lease| lease.is_revoked());
            let ended = ended.map_err(|error| if is_revoked() { OutboundError::Revoked } else { error });
            relay.into_meter().close(ended);
            drop((lease, around, admitted));
        }
        Connected::Plain { relay, admitted } => {
            relay.into_meter().close(ended);
            drop(admitted);
        }
        Connected::Near { connection, admitted } => {
            connection.close();
            drop(admitted);
        }
    }
    drop(counted);
}

/// Decides and dials. `None` when it came to nothing, which has been told then.
async fn establish(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    socket: TcpStream,
    client: ClientAddr,
) -> Option<Connected> {
    let dst = pod.network.original_dst(&socket);
    let mut application = ResetUnlessDone::new(tokio::net::TcpStream::from_std(socket).ok()?);
    let refuse = |dst: OriginalDst, error: &dyn fmt::Display| {
        let addresses = Addresses { source: client.0, destination: dst.0, hbone: None };
        shard.telemetry.refused_early(addresses, Reporter::Source, error);
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
    let holder = pod.connection_holder();
    // What the application says before it is connected.
    holder.set(EARLY_MAX);
    // What is captured never goes to the pod itself, so this dialled the listener.
    if dst.0.ip().is_loopback() || pod.has(dst.0.ip()) {
        return refuse(dst, &NoRoute::SelfCall(dst.0));
    }
    let uid = match holder.run(pod.workload(&shard.mesh)).await {
        Ok(Ok(uid)) => uid,
        Ok(Err(unknown)) => return refuse(dst, &unknown),
        Err(shed) => return refuse(dst, &shed),
    };
    let mesh = shard.mesh.snapshot();
    let Some(source) = mesh.workload(&uid).cloned() else {
        return refuse(dst, &UnknownWorkload(Named::Uid(uid)));
    };
    let roll = rand::random();
    let planned = plan(&mesh, &source, dst, roll).map_err(OutboundError::NoRoute);
    drop(mesh);
    let planned = unless_shed(&holder, complete(&shard, &uid, &source, dst, roll, planned)).await;
    let told = |parties: Parties, destination, hbone: Option<Authority>| {
        let addresses = Addresses { source: client.0, destination, hbone };
        shard.tally(&pod, parties, addresses, Some(dst), destination)
    };
    match planned {
        Ok(Plan::Hbone { peer, expect, target, destination, service }) => {
            let mut parties = Parties {
                reporter: Reporter::Source,
                source: Some(Arc::clone(&source)),
                source_identity: Some(source.identity.clone()),
                destination: Some(Arc::clone(&destination)),
                destination_identity: expect.first().cloned(),
                service: service.clone(),
                security: Security::MutualTls,
            };
            let pod = Arc::clone(&pod);
            let route = Route { pod, source, client, peer, expect, target, destination, service };
            let neighbour = near::neighbour(&shard, &route);
            if neighbour.is_some() {
                parties.security = Security::WithinNode;
            }
            let tally = told(parties, peer.0, Some(target.into()));
            if let Some(to) = neighbour {
                match unless_shed(&holder, near::open(&shard, &to, &route, &mut application)).await {
                    Ok(opened) => {
                        let connection = Box::new(near::Connection::new(application, holder, tally, opened));
                        return Some(Connected::Near { connection, admitted });
                    }
                    Err(error) => tally.close(Err(error)),
                }
                return None;
            }
            match unless_shed(&holder, open(&shard, route, &mut application)).await {
                Ok(Opened { lease, halves, early }) => {
                    tally.0.received(early.bytes() as u64);
                    let application = (application, Application::Client);
                    let relay = Relay::new(application, halves, early.into_read(), holder, tally);
                    return Some(Connected::Tunnelled { relay, lease, around: None, admitted });
                }
                Err(error) => tally.close(Err(error)),
            }
        }
        Ok(Plan::Beyond { gateway, expect, service, port, destination }) => {
            let began = Instant::now();
            // What is told of it afterwards is what it says of itself.
            if let Some(demand) = shard.mesh.demand() {
                demand.used(&destination.uid);
            }
            let mut parties = Parties {
                reporter: Reporter::Source,
                source: Some(Arc::clone(&source)),
                source_identity: Some(source.identity.clone()),
                destination: Some(destination),
                destination_identity: None,
                service: Some(Arc::clone(&service)),
                security: Security::MutualTls,
            };
            let asked = Authority::Hostname { host: Arc::clone(&service.hostname), port };
            let pod = Arc::clone(&pod);
            let route = double::Route { pod, source, client, gateway, expect, service, asked };
            // In a box of its own: few connections go there.
            let opened = Box::pin(double::open(&shard, &route, &mut application));
            match unless_shed(&holder, opened).await {
                Ok(double::Opened { around, opened: Opened { lease, halves, early }, baggage }) => {
                    // Who it is, only those know who are there.
                    parties.destination_identity = lease.peer().cloned();
                    if let (Some(text), Some(who)) = (&baggage, lease.peer()) {
                        let said = Baggage::parse(text.to_str().unwrap_or_default());
                        parties.destination = Some(Arc::new(said.describe(who)));
                    }
                    let mut tally = told(parties, gateway.0, Some(route.asked));
                    tally.0.began(began);
                    tally.0.received(early.bytes() as u64);
                    let application = (application, Application::Client);
                    let relay = Relay::new(application, halves, early.into_read(), holder, tally);
                    let around = Some(Box::new(around));
                    return Some(Connected::Tunnelled { relay, lease, around, admitted });
                }
                Err(error) => {
                    if let OutboundError::BeyondRefused { who, .. } = &error {
                        parties.destination_identity.clone_from(who);
                    }
                    let mut tally = told(parties, gateway.0, Some(route.asked));
                    tally.0.began(began);
                    tally.close(Err(error));
                }
            }
        }
        Ok(Plan::Plain { to, destination, service }) => {
            let (source, unknown) = (Some(source), Parties::unknown(Reporter::Source));
            let destination_identity = destination.as_ref().map(|destination| destination.identity.clone());
            let tally =
                told(Parties { source, destination, destination_identity, service, ..unknown }, to, None);
            match unless_shed(&holder, dial(&shard, &pod, to)).await {
                Ok(server) => {
                    let relay = copy::Relay::new(
                        application,
                        ResetUnlessDone::new(server),
                        Holders::One(holder),
                        tally,
                    );
                    return Some(Connected::Plain { relay, admitted });
                }
                Err(error) => tally.close(Err(error)),
            }
        }
        // It was made another one.
        Ok(Plan::Named { .. }) => return refuse(dst, &NoAddress::Nothing),
        Err(OutboundError::NoRoute(error @ NoRoute::SelfCall(_))) => return refuse(dst, &error),
        Err(error) => {
            let (mesh, ip) = (shard.mesh.snapshot(), dst.0.ip().to_canonical());
            let service = mesh.service_at(&source.network, ip, Some(&source.namespace)).cloned();
            let parties = Parties { source: Some(source), service, ..Parties::unknown(Reporter::Source) };
            told(parties, dst.0, None).close(Err(error));
        }
    }
    None
}

/// Waits for what a connection needs to be made, unless it has to give way meanwhile.
async fn unless_shed<T>(
    holder: &Holder,
    future: impl Future<Output = Result<T, OutboundError>>,
) -> Result<T, OutboundError> {
    holder.run(future).await.unwrap_or_else(|shed| Err(OutboundError::Shed(shed)))
}

/// Finds out what `planned` lacks.
async fn complete(
    shard: &Shard,
    uid: &str,
    source: &Workload,
    dst: OriginalDst,
    roll: u64,
    planned: Result<Plan, OutboundError>,
) -> Result<Plan, OutboundError> {
    let planned = match shard.mesh.demand() {
        Some(demand) => resolve(demand, &shard.mesh, source, dst, planned).await,
        None => planned,
    };
    let planned =
        if is_missing(&planned) { later(&shard.mesh, uid, dst, roll, planned).await } else { planned };
    let Ok(Plan::Named { destination, port, service }) = planned else { return planned };
    let host = &destination.hostname;
    let unnamed = |source| OutboundError::Name { host: Arc::clone(host), source };
    let addresses = shard.names.look_up(host, source).await.map_err(unnamed)?;
    let plan = named(&destination, port, &service, &addresses, dst.0.ip().to_canonical(), roll);
    plan.ok_or_else(|| unnamed(NoAddress::Nothing))?.map_err(OutboundError::NoRoute)
}

/// How often a plan is made again: the destination may be unknown, then its waypoint.
const LOOK_UPS_MAX: usize = 3;

/// Asks for what the mesh does not have, as long as a plan lacks something else then.
async fn resolve(
    demand: &Demand,
    mesh: &MeshReader,
    source: &Workload,
    dst: OriginalDst,
    mut planned: Result<Plan, OutboundError>,
) -> Result<Plan, OutboundError> {
    let mut asked = None;
    for _ in 0..LOOK_UPS_MAX {
        let name = match &planned {
            Ok(Plan::Plain { to, destination: None, .. }) => format!("{}/{}", source.network, to.ip()),
            Err(OutboundError::NoRoute(
                NoRoute::UnknownWaypoint(gateway) | NoRoute::UnknownGateway(gateway),
            )) => gateway.destination.to_string(),
            _ => break,
        };
        if asked.as_ref() == Some(&name) {
            break;
        }
        if let Err(source) = demand.look_up(&name).await {
            return Err(OutboundError::Unresolved { name, source });
        }
        planned = plan(&mesh.snapshot(), source, dst, rand::random()).map_err(OutboundError::NoRoute);
        asked = Some(name);
    }
    // The plan speaks of the waypoint in front of it, if it has one.
    if let Some(dialled) = mesh.snapshot().workload_at(&source.network, dst.0.ip().to_canonical()) {
        demand.used(&dialled.uid);
    }
    planned
}

/// Whether a plan lacks a waypoint or gateway that the mesh names. It may not have come yet.
fn is_missing(planned: &Result<Plan, OutboundError>) -> bool {
    matches!(planned, Err(OutboundError::NoRoute(NoRoute::UnknownWaypoint(_) | NoRoute::UnknownGateway(_))))
}

/// Waits for what `planned` lacks.
async fn later(
    mesh: &MeshReader,
    source: &str,
    dst: OriginalDst,
    roll: u64,
    planned: Result<Plan, OutboundError>,
) -> Result<Plan, OutboundError> {
    let complete = mesh.find_within(NEW_WITHIN, |mesh| {
        let planned = plan(mesh, mesh.workload(source)?, dst, roll).map_err(OutboundError::NoRoute);
        (!is_missing(&planned)).then_some(planned)
    });
    complete.await.unwrap_or(planned)
}

async fn dial(shard: &Shard, pod: &Pod, to: SocketAddr) -> Result<tokio::net::TcpStream, OutboundError> {
    let after = shard.config.connect_timeout;
    timeout(after, pod.network.leave(to))
        .await
        .map_err(|_elapsed| OutboundError::Timeout { to, after })?
        .map_err(|source| OutboundError::Connect { to, source })
}

/// One connection through a tunnel: whose, from where, to whom.
pub(super) struct Route {
    pub(super) pod: Arc<Pod>,
    pub(super) source: Arc<Workload>,
    pub(super) client: ClientAddr,
    pub(super) peer: HbonePeer,
    pub(super) expect: Vec<SpiffeId>,
    pub(super) target: SocketAddr,
    pub(super) destination: Arc<Workload>,
    pub(super) service: Option<Arc<Service>>,
}

/// A stream that is connected.
pub(super) struct Opened {
    pub(super) lease: Lease,
    pub(super) halves: (SendHalf, RecvHalf),
    /// What was said on it already.
    pub(super) early: Early,
}

/// How many tunnels a stream is tried on. A peer that drains or dies may leave several behind, and each may be
/// met before the news of it.
pub(super) const TRIES_MAX: usize = 16;

/// How many tunnels that were dialled for a stream may refuse it before it is given up.
pub(super) const REFUSALS_MAX: usize = 3;

/// Opens a stream. Again on another tunnel if one did not take it, or if one that was there before broke before
/// anything of the application's was put on it: never if the peer may already have delivered some.
async fn open(
    shard: &Arc<Shard>,
    route: Route,
    application: &mut ResetUnlessDone,
) -> Result<Opened, OutboundError> {
    let peer = route.peer;
    let credentials =
        shard.identities.credentials(&route.source.identity).await.map_err(OutboundError::Identity)?;
    let baggage = route.pod.baggage(&route.source);
    let host = route.service.as_ref().map(|service| &*service.hostname);
    let connect = Connect {
        authority: route.target.into(),
        network: None,
        baggage: &baggage,
        forwarded: Forwarded { client: route.client.0, host },
        trace: TraceParent::from_random(rand::random(), rand::random()),
    };
    let key = Key {
        source: route.source.identity.clone(),
        netns: route.pod.netns,
        peer,
        expect: route.expect.clone(),
    };
    let dialer = TunnelDialer { shard, pod: &route.pod, peer, expect: &route.expect, first: credentials };
    let mut early = Early::default();
    let (mut tries, mut refused) = (0, 0);
    loop {
        tries += 1;
        let mut leased = shard.pool.lease(&key, &dialer).await.map_err(OutboundError::Dial)?;
        let after = shard.config.answer_timeout;
        let source = match ask(&mut leased.lease, &connect, application, Some(&mut early), after).await? {
            Asked::Connected(send, recv, _) => {
                return Ok(Opened { lease: leased.lease, halves: (send, recv), early });
            }
            Asked::Refused(status) => return Err(OutboundError::Refused { peer, status }),
            Asked::Silent => return Err(OutboundError::Silent { peer, after }),
            Asked::Unanswered(source) => source,
        };
        let again = match source {
            StreamError::NotTaken if leased.reused => true,
            // One that was dialled for this. A peer that refuses so many takes none at all for now.
            StreamError::NotTaken => {
                refused += 1;
                refused < REFUSALS_MAX
            }
            StreamError::Tunnel(_) => leased.reused && !early.is_taken(),
            StreamError::Finished | StreamError::Reset(_) => false,
        };
        if !again || tries >= TRIES_MAX {
            return Err(OutboundError::Unanswered { peer, source });
        }
        leased.lease.retire();
        early.rewind();
    }
}

/// What a request came to.
pub(super) enum Asked {
    /// A stream, to one that said this of itself.
    Connected(SendHalf, RecvHalf, Option<HeaderValue>),
    Refused(StatusCode),
    Silent,
    Unanswered(StreamError),
}

/// How long an application may be gone before it is noticed, where it is not being read.
pub(super) const LOOK_PERIOD: Duration = Duration::from_secs(1);

/// Asks for the stream and waits for the answer, `limit` at most. Meanwhile the application's first words are
/// sent, if there is an `early` to keep them: a peer delivers nothing before it has decided, and the round trip is
/// saved.
pub(super) async fn ask(
    lease: &mut Lease,
    connect: &Connect<'_>,
    application: &mut ResetUnlessDone,
    mut early: Option<&mut Early>,
    limit: Duration,
) -> Result<Asked, OutboundError> {
    let Opening { mut send, mut answer } = match lease.open(connect).await {
        Ok(opening) => opening,
        Err(error) => return Ok(Asked::Unanswered(error)),
    };
    let (deadline, period) = (Instant::now() + limit, LOOK_PERIOD.min(limit));
    let mut look = pin!(sleep(period));
    poll_fn(|cx| {
        if let Poll::Ready(answered) = answer.poll(cx) {
            return Poll::Ready(Ok(Some(answered)));
        }
        while look.as_mut().poll(cx).is_ready() {
            if Instant::now() >= deadline {
                return Poll::Ready(Ok(None));
            }
            // Once its first words were taken the application is not read, and its reset would go unseen.
            if let Ok(Some(error)) = application.socket.take_error() {
                return Poll::Ready(Err(error));
            }
            look.as_mut().reset(deadline.min(Instant::now() + period));
        }
        match &mut early {
            Some(early) => early.poll(&mut application.socket, &mut send, cx).map(Err),
            None => Poll::Pending,
        }
    })
    .await
    .map(|answered| match answered {
        Some(Ok(Answered::Connected { recv, baggage })) => Asked::Connected(send, recv, baggage),
        Some(Ok(Answered::Refused(status))) => Asked::Refused(status),
        Some(Err(error)) => Asked::Unanswered(error),
        None => Asked::Silent,
    })
    .map_err(OutboundError::Abandoned)
}

/// Dials the peer from inside the pod.
pub(super) struct TunnelDialer<'a> {
    pub(super) shard: &'a Arc<Shard>,
    pub(super) pod: &'a Arc<Pod>,
    pub(super) peer: HbonePeer,
    pub(super) expect: &'a [SpiffeId],
    /// Should the present ones have ended meanwhile.
    pub(super) first: Arc<Credentials>,
}

impl Dialer for TunnelDialer<'_> {
    fn credentials(&self) -> Arc<Credentials> {
        let current = self.shard.identities.current(self.first.identity());
        current.unwrap_or_else(|| Arc::clone(&self.first))
    }

    fn dial(&self, credentials: Arc<Credentials>) -> Pin<Box<dyn Future<Output = Dialled> + Send>> {
        let (peer, config) = (self.peer, Arc::clone(&self.shard.config));
        let trust = self.shard.identities.trust().clone();
        let (dial, tls) = (self.pod.network.tunnel(peer.0), credentials.client_config(self.expect));
        let holder = self.pod.tunnel_holder();
        let lane = self.shard.lanes.of_pod(&self.pod.uid);
        // The handshake is in no lane: there is one at a time, and who waits for it is not to wait for a turn after it.
        Box::pin(async move {
            let socket = connect(dial, peer, config.connect_timeout).await?;
            let (tunnel, driver) = handshake(socket, peer, tls, &config.hbone, &trust).await?;
            tunnel.charge_to(holder);
            Ok((tunnel, Driver::new(lane.run(driver))))
        })
    }

    fn over(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.pod.removed())
    }
}
