//! A tunnel as its client: dialled, opened streams on, retired.

use std::future::Future;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::ready;
use std::time::Duration;

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::client::SendRequest;
use http::HeaderValue;
use http::Method;
use http::Request;
use http::StatusCode;
use parking_lot::Mutex;
use parking_lot::MutexGuard;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::TlsStream;
use ztunnel_mesh::model::addr::HbonePeer;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_tls::trust::Side;
use ztunnel_tls::trust::Trust;

use crate::hbone::Config;
use crate::hbone::DATA_FRAME_BUDGET;
use crate::hbone::address::Authority;
use crate::hbone::address::Forwarded;
use crate::hbone::address::NETWORK;
use crate::hbone::address::TraceParent;
use crate::hbone::flow::Flow;
use crate::hbone::flow::Piece;
use crate::hbone::stream::RecvHalf;
use crate::hbone::stream::SendHalf;
use crate::hbone::stream::StreamError;
use crate::hbone::stream::TunnelError;
use crate::hbone::through::Through;
use crate::hbone::transport::ALPN;
use crate::hbone::transport::Carrier;
use crate::hbone::transport::Keepalive;
use crate::hbone::transport::defer;
use crate::hbone::window::Windows;
use crate::net::budget::Holder;
use crate::net::budget::Shed;
use crate::net::buffer::ReadAhead;
use crate::net::socket::Dial;

/// Why there is no tunnel. Shared by all who waited for it.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The peer's port did not answer in time.
    #[error(
        "connection timed out, maybe a NetworkPolicy is blocking HBONE port {}: no answer from {} in {after:?}",
        peer.0.port(), peer.0
    )]
    Timeout {
        /// Who was dialled.
        peer: HbonePeer,
        /// For how long.
        after: Duration,
    },
    /// It could not be dialled, or refused the connection.
    #[error("could not connect to HBONE peer {}", peer.0)]
    Connect {
        /// Who was dialled.
        peer: HbonePeer,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// TLS failed: either side may not like the other's certificate.
    #[error("the TLS handshake with HBONE peer {} failed", peer.0)]
    Tls {
        /// Who was dialled.
        peer: HbonePeer,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// The peer speaks TLS, but not HTTP/2 inside it.
    #[error("HBONE peer {} does not speak HTTP/2", peer.0)]
    NotHttp2 {
        /// Who was dialled.
        peer: HbonePeer,
    },
    /// Connected, but the handshakes took too long.
    #[error("HBONE peer {} did not finish its handshake in {after:?}", peer.0)]
    Stalled {
        /// Who was dialled.
        peer: HbonePeer,
        /// For how long.
        after: Duration,
    },
    /// Too many requests wait for this peer's tunnel.
    #[error("{waiting} connections already wait for a tunnel to HBONE peer {}", peer.0)]
    Busy {
        /// Who is to be dialled.
        peer: HbonePeer,
        /// How many wait.
        waiting: usize,
    },
    /// There were tunnels, but never one with room: the peer takes hardly any streams.
    #[error("no tunnel to HBONE peer {} has room for another stream", peer.0)]
    NoRoom {
        /// Who was dialled.
        peer: HbonePeer,
    },
}

/// Waits for `dial` no longer than `limit`.
pub async fn connect(dial: Dial, peer: HbonePeer, limit: Duration) -> Result<TcpStream, DialError> {
    match timeout(limit, dial).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) if source.kind() == io::ErrorKind::TimedOut => {
            Err(DialError::Timeout { peer, after: limit })
        }
        Ok(Err(source)) => Err(DialError::Connect { peer, source }),
        Err(_elapsed) => Err(DialError::Timeout { peer, after: limit }),
    }
}

/// Makes a tunnel of a connection. The second result must be run for the tunnel to do anything.
///
/// Whom `tls` accepts as the peer is all that is verified: afterwards nothing is left to check but whether `trust`
/// learns that a certificate of the peer was revoked, which breaks the tunnel.
pub async fn handshake(
    socket: TcpStream,
    peer: HbonePeer,
    tls: Arc<ClientConfig>,
    config: &Config,
    trust: &Trust,
) -> Result<(Arc<Tunnel>, Driver), DialError> {
    let limit = config.handshake_timeout;
    match timeout(limit, shake(ReadAhead::new(socket), peer, tls, config, trust)).await {
        Ok(result) => result,
        Err(_elapsed) => Err(DialError::Stalled { peer, after: limit }),
    }
}

/// [`handshake`] inside another tunnel: `through` is a stream of it, opened at the gateway `peer`.
pub async fn handshake_within(
    through: Through,
    peer: HbonePeer,
    tls: Arc<ClientConfig>,
    config: &Config,
    trust: &Trust,
) -> Result<(Arc<Tunnel>, Driver), DialError> {
    let limit = config.handshake_timeout;
    match timeout(limit, shake(through, peer, tls, config, trust)).await {
        Ok(result) => result,
        Err(_elapsed) => Err(DialError::Stalled { peer, after: limit }),
    }
}

async fn shake<S: Carrier + Send + 'static>(
    socket: S,
    peer: HbonePeer,
    tls: Arc<ClientConfig>,
    config: &Config,
    trust: &Trust,
) -> Result<(Arc<Tunnel>, Driver), DialError> {
    // An address as a name: none is sent (RFC 6066 §3), and the expected identities are in `tls`.
    let name = ServerName::IpAddress(peer.0.ip().into());
    let tls = TlsConnector::from(tls)
        .connect(name, socket)
        .await
        .map_err(|source| DialError::Tls { peer, source })?;
    if tls.get_ref().1.alpn_protocol() != Some(ALPN) {
        return Err(DialError::NotHttp2 { peer });
    }
    // Always there after a handshake; without, there is nothing that could be revoked.
    let verified = trust.verified_peer(tls.get_ref().1).ok();
    let flow = Flow::new(config.tunnel_send_buffer);
    let (io, backlog) = defer(TlsStream::Client(tls), Arc::clone(&flow));
    let streams_max = u32::try_from(config.client_streams_max).unwrap_or(u32::MAX);
    let handshake = h2::client::Builder::new()
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(config.tunnel_window(streams_max))
        .max_frame_size(config.frame_max)
        .max_header_list_size(config.response_headers_max)
        .initial_max_send_streams(config.client_streams_max)
        .max_send_buffer_size(config.send_buffer)
        .data_frame_budget(DATA_FRAME_BUDGET)
        .max_local_error_reset_streams(None)
        .enable_push(false)
        .handshake::<_, Piece>(io);
    let (sender, mut connection) =
        backlog.drive(handshake).await.map_err(|_| DialError::NotHttp2 { peer })?;
    let tunnel = Arc::new(Tunnel {
        streams_max: config.client_streams_max,
        peer: verified.as_ref().map(|verified| verified.id().clone()),
        flow: Arc::clone(&flow),
        state: Mutex::new(State {
            sender: Some(sender),
            streams: 0,
            idle_since: Instant::now(),
            used: false,
            leaving: false,
            revoked: false,
        }),
    });
    let mut keepalive = connection.ping_pong().map(|pings| Keepalive::new(pings, config));
    let (idle_timeout, idle) = (config.idle_timeout, Arc::downgrade(&tunnel));
    let mut idle_check = Box::pin(tokio::time::sleep(idle_timeout));
    let mut windows = Windows::new(config.stream_window);
    let run = poll_fn(move |cx| {
        if let Poll::Ready(shed) = flow.poll_shed(cx) {
            return Poll::Ready(Err(TunnelEnd::Shed(shed)));
        }
        windows.adapt(flow.pressure(), |size| connection.set_initial_window_size(size).is_ok());
        while idle_check.as_mut().poll(cx).is_ready() {
            let Some(tunnel) = idle.upgrade() else { break };
            idle_check.as_mut().reset(tunnel.retire_if_idle(idle_timeout));
        }
        if let Some(keepalive) = &mut keepalive
            && keepalive.poll_dead(cx).is_ready()
        {
            return Poll::Ready(Err(TunnelEnd::Dead));
        }
        let ended = Pin::new(&mut connection).poll(cx).map_err(TunnelEnd::Http2);
        if let Some(tunnel) = idle.upgrade() {
            tunnel.retire_if_told(cx);
        }
        if backlog.is_flooded(cx) {
            return Poll::Ready(Err(TunnelEnd::Flooded));
        }
        if let Poll::Ready(Err(error)) = backlog.poll_drain(cx)
            && ended.is_pending()
        {
            return Poll::Ready(Err(TunnelEnd::Io(error)));
        }
        ended
    });
    let marked = Arc::downgrade(&tunnel);
    let trust = trust.clone();
    let driver = Driver::new(async move {
        let revoked = async {
            match &verified {
                Some(verified) => trust.revoked(verified, Side::Server).await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            ended = run => ended,
            () = revoked => {
                if let Some(tunnel) = marked.upgrade() {
                    tunnel.state().revoked = true;
                }
                Err(TunnelEnd::Revoked)
            }
        };
        if let Some(tunnel) = marked.upgrade() {
            tunnel.retire();
        }
        ended
    });
    Ok((tunnel, driver))
}

/// How a tunnel ended that did not end well. Its streams have learnt of it themselves.
#[derive(Debug, thiserror::Error)]
pub enum TunnelEnd {
    /// A ping was not answered.
    #[error("the peer no longer answers pings")]
    Dead,
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[source] io::Error),
    /// HTTP/2 ended in an error.
    #[error("HTTP/2 ended with an error")]
    Http2(#[source] h2::Error),
    /// The peer is no longer who it was.
    #[error("a certificate of the peer was revoked")]
    Revoked,
    /// The peer sent too many frames that carry nothing.
    #[error("the peer sent too many frames that carry nothing")]
    Flooded,
    /// It had to give way.
    #[error(transparent)]
    Shed(Shed),
}

/// Moves a tunnel's bytes. Resolves when the tunnel is closed; dropping it breaks the tunnel.
pub struct Driver(Pin<Box<dyn Future<Output = Result<(), TunnelEnd>> + Send>>);

impl Driver {
    /// What runs a tunnel's driver.
    pub fn new(future: impl Future<Output = Result<(), TunnelEnd>> + Send + 'static) -> Self {
        Self(Box::pin(future))
    }
}

impl Future for Driver {
    type Output = Result<(), TunnelEnd>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

/// One tunnel: open → retired (no new streams) → closed, once its last stream has ended.
#[derive(Debug)]
pub struct Tunnel {
    streams_max: usize,
    /// Who the peer proved to be.
    peer: Option<SpiffeId>,
    flow: Arc<Flow>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` once retired; the connection closes when the last clone and the last stream are gone.
    sender: Option<SendRequest<Piece>>,
    streams: usize,
    idle_since: Instant,
    /// Whether it ever had a stream.
    used: bool,
    /// Whether it is retired as soon as it has none.
    leaving: bool,
    /// Whether it broke because a certificate of the peer was revoked.
    revoked: bool,
}

impl State {
    fn has_room(&self, streams_max: usize) -> bool {
        let peers_max = self.sender.as_ref().map_or(0, SendRequest::current_max_send_streams);
        self.streams < streams_max.min(peers_max)
    }

    fn is_over(&self) -> bool {
        self.leaving && self.used && self.streams == 0
    }
}

impl Tunnel {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Whether new streams may be tried.
    pub fn is_open(&self) -> bool {
        self.state().sender.is_some()
    }

    /// Charges `holder` for what waits on the tunnel to be sent, and for what came of it and is in no stream yet.
    pub fn charge_to(&self, holder: Holder) {
        self.flow.charge_to(holder);
    }

    /// Whether the peer has taken nothing any more for a while, on any stream: further ones would wait, too.
    pub fn is_exhausted(&self) -> bool {
        self.flow.is_exhausted()
    }

    /// How many streams are open or about to be.
    pub fn streams(&self) -> usize {
        self.state().streams
    }

    /// Takes no new streams any more; closes when the last has ended.
    pub fn retire(&self) {
        let sender = self.state().sender.take();
        // Dropped outside the lock: it wakes the driver.
        drop(sender);
    }

    /// Retires the tunnel as soon as it has no streams: at once, or when the last of them ends. One that was dialled
    /// only now waits for the stream it was dialled for.
    pub fn retire_when_idle(&self) {
        let mut state = self.state();
        state.leaving = true;
        let over = state.is_over();
        drop(state);
        if over {
            self.retire();
        }
    }

    /// Whether [`Self::lease`] would give room now.
    pub fn has_room(&self) -> bool {
        self.state().has_room(self.streams_max)
    }

    /// Room for one stream, if there is: fewer are open than this side wants and the peer takes now.
    pub fn lease(self: &Arc<Self>) -> Option<Lease> {
        let mut state = self.state();
        if !state.has_room(self.streams_max) {
            return None;
        }
        let sender = state.sender.clone()?;
        state.streams += 1;
        state.used = true;
        Some(Lease { tunnel: Arc::clone(self), sender: Some(sender) })
    }

    /// Retires the tunnel if the peer has told it to open no more streams (GOAWAY), whatever streams it still has.
    fn retire_if_told(&self, cx: &mut Context<'_>) {
        let mut state = self.state();
        // Never pending, as no request goes out through this clone of the sender.
        let told =
            state.sender.as_mut().is_some_and(|sender| matches!(sender.poll_ready(cx), Poll::Ready(Err(_))));
        drop(state);
        if told {
            self.retire();
        }
    }

    /// Retires the tunnel if it has been idle for `limit`; otherwise says when to ask again.
    pub fn retire_if_idle(&self, limit: Duration) -> Instant {
        let state = self.state();
        let due = if state.streams == 0 { state.idle_since } else { Instant::now() } + limit;
        drop(state);
        if due <= Instant::now() {
            self.retire();
            return Instant::now() + limit;
        }
        due
    }
}

/// Room for one stream on a tunnel, given back when dropped. Keep it as long as the stream.
#[derive(Debug)]
pub struct Lease {
    tunnel: Arc<Tunnel>,
    sender: Option<SendRequest<Piece>>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.tunnel.state();
        state.streams -= 1;
        state.idle_since = Instant::now();
        let over = state.is_over();
        drop(state);
        if over {
            self.tunnel.retire();
        }
    }
}

/// What a CONNECT says.
#[derive(Debug, Clone)]
pub struct Connect<'a> {
    /// Where the peer is to deliver.
    pub authority: Authority,
    /// The source workload's `baggage`.
    pub baggage: &'a HeaderValue,
    /// Whose connection it is.
    pub forwarded: Forwarded<'a>,
    /// What ties both ends' telemetry together.
    pub trace: TraceParent,
    /// The network this side is in, for a peer that is reached through a gateway.
    pub network: Option<&'a str>,
}

impl Lease {
    /// Who the peer proved to be.
    pub fn peer(&self) -> Option<&SpiffeId> {
        self.tunnel.peer.as_ref()
    }

    /// The tunnel is not to be used for new streams: it did not take this one.
    pub fn retire(&self) {
        self.tunnel.retire();
    }

    /// Whether the tunnel broke because a certificate of the peer was revoked.
    pub fn is_revoked(&self) -> bool {
        self.tunnel.state().revoked
    }

    /// Sends the request. Data may follow at once; the answer comes when it comes.
    pub async fn open(&mut self, connect: &Connect<'_>) -> Result<Opening, StreamError> {
        // It can be gone only if `open` was called before.
        let Some(mut sender) = self.sender.take() else { return Err(StreamError::NotTaken) };
        // A tunnel that takes no request has not looked at this one.
        let refused = |_| StreamError::NotTaken;
        poll_fn(|cx| sender.poll_ready(cx)).await.map_err(refused)?;
        let (answer, send) = sender.send_request(request(connect)?, false).map_err(refused)?;
        let send = SendHalf::new(send, Arc::clone(&self.tunnel.flow));
        Ok(Opening { send, answer: Answer(answer) })
    }
}

fn request(connect: &Connect<'_>) -> Result<Request<()>, StreamError> {
    let value = |text: String| {
        HeaderValue::from_maybe_shared(Bytes::from(text))
            .expect("addresses, tokens and hex digits are visible ASCII")
    };
    let authority = connect.authority.to_string();
    // Addresses are fine; names come from the control plane.
    let unsayable = |error: http::uri::InvalidUri| {
        StreamError::Tunnel(TunnelError::Protocol(format!("cannot ask for {}: {error}", connect.authority)))
    };
    let uri = http::Uri::try_from(authority).map_err(unsayable)?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = uri;
    *request.version_mut() = http::Version::HTTP_2;
    let headers = request.headers_mut();
    headers.reserve(3);
    headers.insert("baggage", connect.baggage.clone());
    headers.insert("forwarded", value(connect.forwarded.to_string()));
    headers.insert("traceparent", value(connect.trace.to_string()));
    // A name that cannot be said is as good as none: it is for telemetry only.
    if let Some(network) = connect.network.and_then(|network| HeaderValue::from_str(network).ok()) {
        headers.insert(NETWORK, network);
    }
    Ok(request)
}

/// A stream whose request is on its way.
#[derive(Debug)]
pub struct Opening {
    /// Data may be sent before the answer: a peer delivers none before it has decided.
    pub send: SendHalf,
    /// The answer.
    pub answer: Answer,
}

/// The peer's answer, when it comes.
#[derive(Debug)]
pub struct Answer(ResponseFuture);

/// What the peer answered.
#[derive(Debug)]
pub enum Answered {
    /// 200: the stream is connected.
    Connected {
        /// Its other half.
        recv: RecvHalf,
        /// The peer's `baggage`.
        baggage: Option<HeaderValue>,
    },
    /// Any other status: it is not.
    Refused(StatusCode),
}

impl Answer {
    /// Waits for the answer.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Answered, StreamError>> {
        let (mut parts, body) = ready!(Pin::new(&mut self.0).poll(cx))?.into_parts();
        Poll::Ready(Ok(if parts.status == StatusCode::OK {
            Answered::Connected { recv: RecvHalf::new(body), baggage: parts.headers.remove("baggage") }
        } else {
            Answered::Refused(parts.status)
        }))
    }
}
