//! What a pod dials: through a tunnel to a peer in the mesh, or on as it is.

use std::future::Future;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::StatusCode;
use tokio::time::timeout;

use crate::hbone::address::Forwarded;
use crate::hbone::address::TraceParent;
use crate::hbone::client::Answered;
use crate::hbone::client::Connect;
use crate::hbone::client::DialError;
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
use crate::model::addr::ClientAddr;
use crate::model::addr::HbonePeer;
use crate::model::addr::OriginalDst;
use crate::model::identity::SpiffeId;
use crate::model::service::Service;
use crate::model::workload::Workload;
use crate::net::copy;
use crate::net::copy::CopyError;
use crate::net::copy::ResetUnlessDone;
use crate::proxy::ending::told;
use crate::proxy::passthrough::Plain;
use crate::proxy::pod::Pod;
use crate::proxy::pod::TooMany;
use crate::proxy::pod::UnknownWorkload;
use crate::proxy::relay::Counter;
use crate::proxy::relay::Early;
use crate::proxy::relay::Relay;
use crate::proxy::relay::RelayError;
use crate::proxy::shard::Shard;
use crate::route::plan::NoRoute;
use crate::route::plan::Plan;
use crate::route::plan::plan;
use crate::telemetry::OpenConnection;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::ResponseFlag;
use crate::tls::configs::Credentials;

/// Why a pod's connection got nowhere, or ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum OutboundError {
    /// The mesh knows nowhere to send it.
    #[error(transparent)]
    NoRoute(NoRoute),
    /// The pod has no certificate to dial with.
    #[error(transparent)]
    Identity(Unavailable),
    /// There is no tunnel to the peer.
    #[error(transparent)]
    Dial(Arc<DialError>),
    /// The tunnel broke before the peer had answered.
    #[error("HBONE peer {} did not answer", peer.0)]
    Unanswered {
        /// Who was asked.
        peer: HbonePeer,
        /// What happened to the stream.
        #[source]
        source: StreamError,
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
    /// It broke later, inside a tunnel.
    #[error(transparent)]
    Relay(RelayError),
    /// It broke later, outside of one.
    #[error(transparent)]
    Copy(CopyError),
}

impl OutboundError {
    /// How it reads in the `response_flags` label.
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::NoRoute(_) | Self::Refused { .. } | Self::Connect { .. } | Self::Timeout { .. } => {
                ResponseFlag::Connect
            }
            Self::Identity(_) => ResponseFlag::Identity,
            Self::Dial(error) => match &**error {
                DialError::Timeout { .. } => ResponseFlag::NetworkPolicy,
                DialError::Connect { .. } | DialError::Busy { .. } | DialError::NoRoom { .. } => {
                    ResponseFlag::Connect
                }
                DialError::Tls { .. } | DialError::Stalled { .. } => ResponseFlag::TlsFailure,
                DialError::NotHttp2 { .. } => ResponseFlag::H2Handshake,
            },
            Self::Unanswered { source, .. } => match source {
                // A peer that does not accept this side's certificate says so only after the handshake.
                StreamError::Tunnel(TunnelError::Io(error)) if is_tls(error) => ResponseFlag::TlsFailure,
                StreamError::Tunnel(TunnelError::Protocol(_)) => ResponseFlag::H2Handshake,
                _ => ResponseFlag::Connect,
            },
            Self::Abandoned(_) | Self::Relay(_) | Self::Copy(_) => ResponseFlag::None,
        }
    }
}

fn is_tls(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>())
}

/// Serves one connection that `pod` dialled.
pub(super) async fn serve(shard: Arc<Shard>, pod: Arc<Pod>, socket: TcpStream, client: ClientAddr) {
    let dst = pod.network.original_dst(&socket);
    let Ok(socket) = tokio::net::TcpStream::from_std(socket) else { return };
    let application = ResetUnlessDone::new(socket);
    let dst = match dst {
        Ok(dst) => dst,
        Err(error) => return refuse(&shard, client, OriginalDst(client.0), &error),
    };
    let Some(_admitted) = pod.admit(shard.config.pod_connections_max) else {
        shard.count.turn_away();
        return refuse(&shard, client, dst, &TooMany(shard.config.pod_connections_max));
    };
    // What is captured never goes to the pod itself, so this dialled the listener.
    if dst.0.ip().is_loopback() || pod.has(dst.0.ip()) {
        return refuse(&shard, client, dst, &NoRoute::SelfCall(dst.0));
    }
    let mesh = shard.mesh.snapshot();
    let Some(source) = mesh.workload(&pod.workload).cloned() else {
        return refuse(&shard, client, dst, &UnknownWorkload(Arc::clone(&pod.workload)));
    };
    let planned = plan(&mesh, &source, dst, rand::random());
    drop(mesh);
    match planned {
        Ok(Plan::Hbone { peer, expect, target, destination, service }) => {
            let route = Route { pod, source, client, peer, expect, target, destination, service };
            through_tunnel(shard, route, application).await;
        }
        Ok(Plan::Plain { to, destination, service }) => {
            let parties =
                Parties { source: Some(source), destination, service, ..Parties::unknown(Reporter::Source) };
            let addresses = Addresses { source: client.0, destination: to, hbone: None };
            let connection = shard.telemetry.open(parties, addresses);
            let ended = on_as_it_is(&shard, &pod, to, application, &connection).await;
            close(connection, ended);
        }
        Err(error @ NoRoute::SelfCall(_)) => refuse(&shard, client, dst, &error),
        Err(error) => {
            let parties = Parties { source: Some(source), ..Parties::unknown(Reporter::Source) };
            let addresses = Addresses { source: client.0, destination: dst.0, hbone: None };
            close(shard.telemetry.open(parties, addresses), Err(OutboundError::NoRoute(error)));
        }
    }
}

fn refuse(shard: &Shard, client: ClientAddr, dst: OriginalDst, error: &dyn std::fmt::Display) {
    let addresses = Addresses { source: client.0, destination: dst.0, hbone: None };
    shard.telemetry.refused_early(addresses, Reporter::Source, error);
}

fn close(connection: OpenConnection, ended: Result<(), OutboundError>) {
    match ended {
        Ok(()) => connection.close(ResponseFlag::None, None),
        Err(OutboundError::Relay(error)) if error.is_reset() => connection.close(ResponseFlag::None, None),
        Err(OutboundError::Copy(error)) if error.is_reset() => connection.close(ResponseFlag::None, None),
        Err(error) => connection.close(error.flag(), Some(told(&error))),
    }
}

async fn on_as_it_is(
    shard: &Shard,
    pod: &Pod,
    to: SocketAddr,
    application: ResetUnlessDone,
    connection: &OpenConnection,
) -> Result<(), OutboundError> {
    let after = shard.config.connect_timeout;
    let server = timeout(after, pod.network.leave(to))
        .await
        .map_err(|_elapsed| OutboundError::Timeout { to, after })?
        .map_err(|source| OutboundError::Connect { to, source })?;
    copy::relay(application, ResetUnlessDone::new(server), &Plain(connection))
        .await
        .map_err(OutboundError::Copy)
}

/// One connection through a tunnel: who, from where, to whom.
struct Route {
    pod: Arc<Pod>,
    source: Arc<Workload>,
    client: ClientAddr,
    peer: HbonePeer,
    expect: Vec<SpiffeId>,
    target: SocketAddr,
    destination: Arc<Workload>,
    service: Option<Arc<Service>>,
}

/// Counts for the client's side: what comes from the application comes from the client.
struct Client(OpenConnection);

impl Counter for Client {
    fn from_application(&self, bytes: u64) {
        self.0.received(bytes);
    }

    fn to_application(&self, bytes: u64) {
        self.0.sent(bytes);
    }
}

async fn through_tunnel(shard: Arc<Shard>, route: Route, mut application: ResetUnlessDone) {
    let parties = Parties {
        reporter: Reporter::Source,
        source: Some(Arc::clone(&route.source)),
        source_identity: Some(route.source.identity.clone()),
        destination: Some(Arc::clone(&route.destination)),
        destination_identity: route.expect.first().cloned(),
        service: route.service.clone(),
    };
    let addresses =
        Addresses { source: route.client.0, destination: route.peer.0, hbone: Some(route.target) };
    let connection = shard.telemetry.open(parties, addresses);
    // On the heap, and gone once connected: a relay must not carry the room its dial needed.
    let stream = match Box::pin(open(&shard, route, &mut application)).await {
        Ok(stream) => stream,
        Err(error) => return close(connection, Err(error)),
    };
    drop(shard);
    let Connected { lease, halves, early } = stream;
    connection.received(early.len() as u64);
    let mut relay = Relay::new(application, halves, early.into_read(), Client(connection));
    let ended = (&mut relay).await;
    let Client(connection) = relay.into_counter();
    drop(lease);
    close(connection, ended.map_err(OutboundError::Relay));
}

struct Connected {
    lease: Lease,
    halves: (SendHalf, RecvHalf),
    early: Early,
}

/// Opens a stream. Once more on another tunnel if the first did not take it, or if it broke before anything of
/// the application's was put on it: never if the peer may already have delivered some.
async fn open(
    shard: &Arc<Shard>,
    route: Route,
    application: &mut ResetUnlessDone,
) -> Result<Connected, OutboundError> {
    let peer = route.peer;
    let credentials =
        shard.identities.credentials(&route.source.identity).await.map_err(OutboundError::Identity)?;
    let baggage = route.pod.baggage(&route.source);
    let host = route.service.as_ref().map(|service| &*service.hostname);
    let connect = Connect {
        authority: route.target,
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
    let mut retried = false;
    loop {
        let mut leased = shard.pool.lease(&key, &dialer).await.map_err(OutboundError::Dial)?;
        let source = match ask(&mut leased.lease, &connect, application, &mut early).await? {
            Asked::Connected(send, recv) => {
                return Ok(Connected { lease: leased.lease, halves: (send, recv), early });
            }
            Asked::Refused(status) => return Err(OutboundError::Refused { peer, status }),
            Asked::Unanswered(source) => source,
        };
        let again = match source {
            StreamError::NotTaken => true,
            StreamError::Tunnel(_) => leased.reused && !early.is_taken(),
            StreamError::Finished | StreamError::Reset(_) => false,
        };
        if !again || retried {
            return Err(OutboundError::Unanswered { peer, source });
        }
        retried = true;
        leased.lease.retire();
        early.rewind();
    }
}

enum Asked {
    Connected(SendHalf, RecvHalf),
    Refused(StatusCode),
    Unanswered(StreamError),
}

/// Asks for the stream and waits for the answer. Meanwhile the application's first words are sent: a peer
/// delivers nothing before it has decided, and the round trip is saved.
async fn ask(
    lease: &mut Lease,
    connect: &Connect<'_>,
    application: &mut ResetUnlessDone,
    early: &mut Early,
) -> Result<Asked, OutboundError> {
    let Opening { mut send, mut answer } = match lease.open(connect).await {
        Ok(opening) => opening,
        Err(error) => return Ok(Asked::Unanswered(error)),
    };
    let answered = poll_fn(|cx| match answer.poll(cx) {
        Poll::Ready(answered) => Poll::Ready(Ok(answered)),
        Poll::Pending => early.poll(&mut application.socket, &mut send, cx).map(Err),
    })
    .await
    .map_err(OutboundError::Abandoned)?;
    Ok(match answered {
        Ok(Answered::Connected { recv, .. }) => Asked::Connected(send, recv),
        Ok(Answered::Refused(status)) => Asked::Refused(status),
        Err(error) => Asked::Unanswered(error),
    })
}

/// Dials the peer from inside the pod.
struct TunnelDialer<'a> {
    shard: &'a Arc<Shard>,
    pod: &'a Arc<Pod>,
    peer: HbonePeer,
    expect: &'a [SpiffeId],
    /// Should the present ones have ended meanwhile.
    first: Arc<Credentials>,
}

impl Dialer for TunnelDialer<'_> {
    fn credentials(&self) -> Arc<Credentials> {
        let current = self.shard.identities.current(self.first.identity());
        current.unwrap_or_else(|| Arc::clone(&self.first))
    }

    fn dial(&self, credentials: Arc<Credentials>) -> Pin<Box<dyn Future<Output = Dialled> + Send>> {
        let (peer, config) = (self.peer, Arc::clone(&self.shard.config));
        let (dial, tls) = (self.pod.network.leave(peer.0), credentials.client_config(self.expect));
        Box::pin(async move {
            let socket = connect(dial, peer, config.connect_timeout).await?;
            handshake(socket, peer, tls, &config.hbone).await
        })
    }
}
