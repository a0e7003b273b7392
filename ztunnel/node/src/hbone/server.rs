//! A tunnel as its server: accepted, its requests handed out, drained.

use std::future::Future;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::pin::pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::HeaderMap;
use http::HeaderValue;
use http::Method;
use http::Request;
use http::Response;
use http::StatusCode;
use rustls::CommonState;
use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio::time::Sleep;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::hbone::Config;
use crate::hbone::DATA_FRAME_BUDGET;
use crate::hbone::address::Authority;
use crate::hbone::address::Forwarded;
use crate::hbone::address::NETWORK;
use crate::hbone::address::TraceParent;
use crate::hbone::flow::Flow;
use crate::hbone::flow::Piece;
use crate::hbone::flow::Stream;
use crate::hbone::frames::PASS_FRAMES_MAX;
use crate::hbone::stream::RecvHalf;
use crate::hbone::stream::SendHalf;
use crate::hbone::stream::StreamError;
use crate::hbone::transport::ALPN;
use crate::hbone::transport::Keepalive;
use crate::hbone::transport::Tls;
use crate::hbone::transport::defer;
use crate::hbone::window::Windows;
use crate::net::budget::Holder;
use crate::net::budget::Shed;
use crate::net::buffer::ReadAhead;
use crate::net::socket::reset_on_close;

/// Why a connection to the HBONE port became no tunnel, or why a tunnel ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// TLS failed: garbage, another protocol, or a certificate that is not from this mesh.
    #[error("the TLS handshake failed")]
    Tls(#[source] io::Error),
    /// TLS went well, but the client did not ask for HTTP/2.
    #[error("the client does not speak HTTP/2")]
    NotHttp2,
    /// The client took too long.
    #[error("the client did not finish its handshake in {0:?}")]
    Stalled(Duration),
    /// The client no longer answers pings.
    #[error("the client no longer answers pings")]
    Dead,
    /// HTTP/2 ended in an error.
    #[error("HTTP/2 ended with an error")]
    Http2(#[source] h2::Error),
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[source] io::Error),
    /// The client sent too many frames that carry nothing.
    #[error("the client sent too many frames that carry nothing")]
    Flooded,
    /// It had to give way.
    #[error(transparent)]
    Shed(Shed),
}

/// A connection with a completed TLS handshake.
pub struct Accepted {
    tls: Tls,
    flow: Arc<Flow>,
}

impl Accepted {
    /// What TLS knows of the client.
    pub fn tls(&self) -> &CommonState {
        self.tls.get_ref().1
    }

    /// What is going on on the tunnel.
    pub fn activity(&self) -> Activity {
        Activity(Arc::clone(&self.flow))
    }

    /// Charges `holder` for what waits on the tunnel to be sent, and for what came of it and is in no stream yet.
    pub fn charge_to(&self, holder: Holder) {
        self.flow.charge_to(holder);
    }

    /// Resets the connection: there is no place for the tunnel.
    pub fn reset(self) {
        reset_on_close(self.tls.get_ref().0.socket());
    }
}

/// What is going on on a tunnel, for those who have to choose one to close.
#[derive(Debug, Clone)]
pub struct Activity(Arc<Flow>);

impl Activity {
    /// Since when the client has had no streams; `None` while it has.
    pub fn idle_since(&self) -> Option<Instant> {
        self.0.idle_since()
    }

    /// Closes the tunnel: the client is told to open no more streams (GOAWAY), and has a moment to do so.
    pub fn retire(&self) {
        self.0.retire();
    }
}

#[cfg(test)]
impl Activity {
    /// Of a tunnel without streams.
    pub(crate) fn idle() -> Self {
        Self(Flow::new(0))
    }

    /// Of one with a stream.
    pub(crate) fn used() -> Self {
        let activity = Self::idle();
        std::mem::forget(activity.0.stream());
        activity
    }

    /// Whether it is being closed.
    pub(crate) fn is_retired(&self) -> bool {
        self.0.is_retired(&Context::from_waker(futures_util::task::noop_waker_ref()))
    }
}

/// Makes TLS of an accepted connection, within the handshake timeout.
pub async fn accept(
    socket: TcpStream,
    tls: Arc<ServerConfig>,
    config: &Config,
) -> Result<Accepted, ServeError> {
    let limit = config.handshake_timeout;
    let tls = timeout(limit, TlsAcceptor::from(tls).accept(ReadAhead::new(socket)))
        .await
        .map_err(|_elapsed| ServeError::Stalled(limit))?
        .map_err(ServeError::Tls)?;
    if tls.get_ref().1.alpn_protocol() != Some(ALPN) {
        return Err(ServeError::NotHttp2);
    }
    Ok(Accepted { tls: tls.into(), flow: Flow::new(config.tunnel_send_buffer) })
}

/// A client whose tunnel is closed because it does not use it has so long to close it, too.
const RETIRED_WITHIN: Duration = Duration::from_secs(5);

/// Serves a tunnel until it is closed. Each request is handed to `on_request`, which must not block.
///
/// When `drain` resolves the client is told to open no more streams (GOAWAY), and the tunnel ends with the
/// last one. Dropping the future breaks the tunnel.
pub async fn serve(
    accepted: Accepted,
    config: &Config,
    drain: impl Future<Output = ()>,
    mut on_request: impl FnMut(Incoming),
) -> Result<(), ServeError> {
    let flow = accepted.flow;
    let (io, backlog) = defer(accepted.tls, Arc::clone(&flow));
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(config.tunnel_window(config.server_streams_max))
        .max_frame_size(config.frame_max)
        .max_header_list_size(config.request_headers_max)
        .max_concurrent_streams(config.server_streams_max)
        .max_send_buffer_size(config.send_buffer)
        .data_frame_budget(DATA_FRAME_BUDGET)
        .max_local_error_reset_streams(None)
        .max_pending_accept_reset_streams(PASS_FRAMES_MAX as usize);
    let limit = config.handshake_timeout;
    let mut connection = timeout(limit, backlog.drive(builder.handshake::<_, Piece>(io)))
        .await
        .map_err(|_elapsed| ServeError::Stalled(limit))?
        .map_err(ServeError::Http2)?;
    let mut keepalive = connection.ping_pong().map(|pings| Keepalive::new(pings, config));
    let mut drain = pin!(drain);
    let mut draining = false;
    let mut given_up: Option<Pin<Box<Sleep>>> = None;
    let mut windows = Windows::new(config.stream_window);
    poll_fn(|cx| {
        if let Poll::Ready(shed) = flow.poll_shed(cx) {
            return Poll::Ready(Err(ServeError::Shed(shed)));
        }
        windows.adapt(flow.pressure(), |size| connection.set_initial_window_size(size).is_ok());
        let idle = flow.idle_since();
        // Pings see to it that this is looked at now and then.
        let unused = idle.is_some_and(|since| since.elapsed() >= config.server_idle_timeout);
        let is_retired = flow.is_retired(cx) || unused;
        if !draining && (is_retired || drain.as_mut().poll(cx).is_ready()) {
            draining = true;
            connection.graceful_shutdown();
            if is_retired {
                given_up = Some(Box::pin(sleep(RETIRED_WITHIN)));
            }
        }
        if let Some(given_up) = &mut given_up
            && idle.is_some()
            && given_up.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Ok(()));
        }
        if let Some(keepalive) = &mut keepalive
            && keepalive.poll_dead(cx).is_ready()
        {
            return Poll::Ready(Err(ServeError::Dead));
        }
        let ended = loop {
            match connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    on_request(Incoming::new(request, respond, Arc::clone(&flow)));
                }
                Poll::Ready(Some(Err(error))) => break Poll::Ready(Err(ServeError::Http2(error))),
                Poll::Ready(None) => break Poll::Ready(Ok(())),
                Poll::Pending => break Poll::Pending,
            }
        };
        if backlog.is_flooded(cx) {
            return Poll::Ready(Err(ServeError::Flooded));
        }
        if let Poll::Ready(Err(error)) = backlog.poll_drain(cx)
            && ended.is_pending()
        {
            return Poll::Ready(Err(ServeError::Io(error)));
        }
        ended
    })
    .await
}

/// Why a request gets no stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// 400: not a CONNECT, or not to an address of this workload.
    BadRequest,
    /// 401: policy.
    Denied,
    /// 503: the application does not answer, or must not be asked.
    Unavailable,
}

impl Refusal {
    /// The status of the response.
    pub fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Denied => StatusCode::UNAUTHORIZED,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// What a header costs besides its text.
const HEADER_COST: usize = 64;

/// A request nobody has answered yet. Dropping it resets its stream.
pub struct Incoming {
    method: Method,
    authority: Option<http::uri::Authority>,
    headers: HeaderMap,
    body: RecvHalf,
    respond: SendResponse<Piece>,
    flow: Arc<Flow>,
    counted: Stream,
}

impl Incoming {
    fn new(request: Request<RecvStream>, respond: SendResponse<Piece>, flow: Arc<Flow>) -> Self {
        let (parts, body) = request.into_parts();
        let authority = parts.uri.into_parts().authority;
        let body = RecvHalf::new(body);
        let counted = flow.stream();
        Self { method: parts.method, authority, headers: parts.headers, body, respond, flow, counted }
    }

    /// Where the client wants to be connected to; `None` if it is not a CONNECT to anything that makes sense.
    pub fn authority(&self) -> Option<Authority> {
        if self.method != Method::CONNECT {
            return None;
        }
        Authority::parse(self.authority.as_ref()?.as_str()).ok()
    }

    /// Whose connection the client says it is.
    pub fn forwarded(&self) -> Option<Forwarded<'_>> {
        Forwarded::parse(self.headers.get("forwarded")?.to_str().ok()?)
    }

    /// The trace the connection belongs to.
    pub fn trace(&self) -> Option<TraceParent> {
        TraceParent::parse(self.headers.get("traceparent")?.to_str().ok()?)
    }

    /// The client's `baggage`.
    pub fn baggage(&self) -> Option<&str> {
        self.headers.get("baggage")?.to_str().ok()
    }

    /// The network the client says it is in, which only one does that was sent through a gateway.
    pub fn network(&self) -> Option<&str> {
        self.headers.get(NETWORK)?.to_str().ok()
    }

    /// What the client has said without waiting for the answer: nothing, or a piece, or that the stream broke. It
    /// counts against the stream's window until the stream's half releases it.
    pub fn first_words(&mut self, cx: &mut Context<'_>) -> Option<Result<Bytes, StreamError>> {
        match self.body.poll_data(cx) {
            Poll::Ready(Some(said)) => Some(said),
            // The stream's half finds the end again.
            Poll::Ready(None) | Poll::Pending => None,
        }
    }

    /// How many bytes of it are kept until it is answered: its headers, and what it said meanwhile.
    pub fn kept(&mut self, cx: &mut Context<'_>) -> usize {
        let headers =
            self.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + HEADER_COST);
        headers.sum::<usize>() + self.body.pull(cx)
    }

    /// Waits for the client to give up. For while the application is being dialled.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        self.respond.poll_reset(cx).map(|reset| match reset {
            Ok(reason) => StreamError::Reset(crate::hbone::stream::ResetCode(reason.into())),
            Err(error) => error.into(),
        })
    }

    /// Answers 200 with this side's `baggage`: from here on it is a stream.
    pub fn connect(mut self, baggage: Option<HeaderValue>) -> Result<(SendHalf, RecvHalf), StreamError> {
        let mut response = Response::new(());
        if let Some(baggage) = baggage {
            response.headers_mut().insert("baggage", baggage);
        }
        let send = self.respond.send_response(response, false)?;
        Ok((SendHalf::new(send, self.flow).counted(self.counted), self.body))
    }

    /// Answers with an error, no body. What the client sent meanwhile is thrown away unread.
    pub fn refuse(mut self, refusal: Refusal) {
        let mut response = Response::new(());
        *response.status_mut() = refusal.status();
        // It fails only for a stream that is gone.
        let _sent = self.respond.send_response(response, true);
    }
}

#[cfg(test)]
impl Incoming {
    /// Waits for what the client says before it is answered.
    pub(crate) async fn first_data(&mut self) {
        let _data = poll_fn(|cx| self.body.poll_data(cx)).await;
    }
}
