//! The HTTP/1 servers. Small on purpose, and bounded: in connections, of all and of each source, in header size, and in
//! the time a client may take, so that nobody who can reach a port can hold more than a little memory for a little
//! while, nor keep others from being answered.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http::HeaderValue;
use http::Method;
use http::StatusCode;
use http::header;
use hyper::Request;
use hyper::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::rt::TokioTimer;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::sync::oneshot;
use tokio::time;
use ztunnel_mesh::source::status::Refused;
use ztunnel_runtime::shutdown;
use ztunnel_runtime::shutdown::Signal;

use crate::admin::body;
use crate::admin::body::Body;
use crate::admin::console;
use crate::admin::console::Console;
use crate::admin::quit::Unanswered;
use crate::admin::ready::Readiness;
use crate::admin::shares::Admission;
use crate::admin::shares::Limits;
use crate::admin::shares::Number;
use crate::admin::shares::Shares;
use crate::identity::worker::Shortage;
use crate::telemetry::Telemetry;

/// How long a client may take to send a request's header, and to begin the next one.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a connection may last, however it is used. It bounds what a slow reader can hold.
const CONNECTION_MAX: Duration = Duration::from_secs(30);

/// The same on the admin port, where an answer may be a long profile, the dump of a big mesh through a slow tunnel,
/// or the end of a drain.
const CONSOLE_MAX: Duration = Duration::from_secs(600);

/// How long an answer that is being given may still take when the process closes.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The largest header taken, in bytes.
const HEADER_MAX: usize = 8 * 1024;

/// The most header fields taken.
const FIELDS_MAX: usize = 64;

/// The connections of the metrics server. A scrape can be megabytes, so they are few.
const SCRAPES: Limits = Limits { connections: 16, share: 4, patience: Some(Duration::from_secs(10)) };

/// How many scrapes are made at once; more wait for their turn.
const SCRAPES_AT_ONCE: usize = 4;

/// The connections of the readiness server.
const PROBES: Limits = Limits { connections: 256, share: 64, patience: Some(Duration::from_secs(2)) };

/// The connections of the admin server: all are of this host, and an answer may be long.
const CONSOLES: Limits = Limits { connections: 16, share: 16, patience: None };

/// How long to wait after the kernel refused to accept, as it does when descriptors run out.
const ACCEPT_BACKOFF: Duration = Duration::from_secs(1);

const OPENMETRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text;charset=utf-8;version=1.0.0");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// Serves `GET /metrics` and `GET /stats/prometheus` (port 15020 as a rule) until the process closes: metrics are
/// wanted most while it drains.
pub async fn serve_metrics(listener: TcpListener, telemetry: Telemetry, signal: Signal) {
    serve(listener, Site::Metrics(telemetry, Arc::new(Semaphore::new(SCRAPES_AT_ONCE))), SCRAPES, signal)
        .await;
}

/// Serves `GET /healthz/ready` (port 15021 as a rule) until the process closes: 200 and `ready`, or 500 and who is
/// waited for.
pub async fn serve_readiness(listener: TcpListener, readiness: Readiness, signal: Signal) {
    serve(listener, Site::Readiness(readiness), PROBES, signal).await;
}

/// Serves what operators ask (port 15000 of the loopback as a rule) until the process closes.
pub async fn serve_console(listener: TcpListener, console: Console, signal: Signal) {
    serve(listener, Site::Console(console), CONSOLES, signal).await;
}

#[derive(Clone)]
enum Site {
    /// With the turns of those who scrape.
    Metrics(Telemetry, Arc<Semaphore>),
    Readiness(Readiness),
    Console(Console),
}

async fn serve(listener: TcpListener, site: Site, limits: Limits, mut signal: Signal) {
    let open = Arc::new(Mutex::new(Open { shares: Shares::new(limits), closers: HashMap::new() }));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = signal.closing() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                // One that is not taken is closed by being dropped.
                let Some(place) = Place::take(&open, peer.ip()) else { continue };
                let (site, signal) = (site.clone(), signal.clone());
                shutdown::spawn(async move {
                    let mut place = place;
                    let (number, all) = (place.number, Arc::clone(&place.open));
                    let asked = move || all.lock().shares.asked(number);
                    tokio::select! {
                        () = converse(stream, site, signal, asked) => {}
                        _evicted = &mut place.evicted => {}
                    }
                });
            }
            // A listener that gives up at the first error is gone for good when descriptors ran out once.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection, trying again");
                time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// The connections of a server, and what closes each.
struct Open {
    shares: Shares,
    closers: HashMap<Number, oneshot::Sender<()>>,
}

/// A connection's place among them, given back when this is dropped.
struct Place {
    number: Number,
    open: Arc<Mutex<Open>>,
    /// Ends when another one takes the place.
    evicted: oneshot::Receiver<()>,
}

impl Place {
    fn take(open: &Arc<Mutex<Open>>, peer: IpAddr) -> Option<Self> {
        let mut all = open.lock();
        let number = match all.shares.admit(peer, time::Instant::now()) {
            Admission::Taken(number) => number,
            Admission::Instead(number, victim) => {
                // Dropping it is the word.
                all.closers.remove(&victim);
                number
            }
            Admission::Refused => return None,
        };
        let (closer, evicted) = oneshot::channel();
        all.closers.insert(number, closer);
        Some(Self { number, open: Arc::clone(open), evicted })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.open.lock();
        all.shares.ended(self.number);
        all.closers.remove(&self.number);
    }
}

async fn converse(stream: TcpStream, site: Site, mut signal: Signal, asked: impl Fn()) {
    let limit = match site {
        Site::Console(_) => CONSOLE_MAX,
        Site::Metrics(..) | Site::Readiness(_) => CONNECTION_MAX,
    };
    let closing = signal.clone();
    // Held until the answer has left.
    let unanswered: Arc<Mutex<Option<Unanswered>>> = Arc::default();
    let hold = Arc::clone(&unanswered);
    let answer = service_fn(move |request: Request<Incoming>| {
        let (site, closing, hold) = (site.clone(), closing.clone(), Arc::clone(&hold));
        asked();
        async move {
            let (response, unanswered) = site.answer(&request, closing).await;
            if unanswered.is_some() {
                *hold.lock() = unanswered;
            }
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_MAX)
        .max_headers(FIELDS_MAX)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = pin!(connection);
    tokio::select! {
        // Whatever ended it (a time-out, a client that hung up, a request that is none) is the client's affair.
        _over = time::timeout(limit, connection.as_mut()) => {}
        () = signal.closing() => {
            connection.as_mut().graceful_shutdown();
            let _said = time::timeout(LAST_WORDS, connection).await;
        }
    }
    drop(unanswered);
}

impl Site {
    async fn answer(
        &self,
        request: &Request<Incoming>,
        signal: Signal,
    ) -> (Response<Body>, Option<Unanswered>) {
        let (method, path) = (request.method(), request.uri().path());
        // What is the same for the servers that only tell: what is there, and by which methods.
        let refused = |known: bool| match known {
            false => Some(text(StatusCode::NOT_FOUND, "not found\n")),
            true if ![Method::GET, Method::HEAD].contains(method) => Some(not_allowed("GET, HEAD")),
            true => None,
        };
        let response = match self {
            Self::Console(console) => {
                let query = request.uri().query().unwrap_or_default();
                let asked = console::Asked { method, path, query, headers: request.headers() };
                return console.answer(asked, signal).await;
            }
            Self::Metrics(telemetry, turns) => {
                match refused(["/metrics", "/stats/prometheus"].contains(&path)) {
                    Some(refused) => refused,
                    None => {
                        let _turn = turns.acquire().await.expect("the semaphore is never closed");
                        metrics(telemetry, request.headers()).await
                    }
                }
            }
            Self::Readiness(readiness) => {
                refused(path == "/healthz/ready").unwrap_or_else(|| ready(readiness))
            }
        };
        (response, None)
    }
}

pub(super) fn not_allowed(allowed: &'static str) -> Response<Body> {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
    response
}

async fn metrics(telemetry: &Telemetry, asked: &HeaderMap) -> Response<Body> {
    let (telemetry, gzip) = (telemetry.clone(), body::takes_gzip(asked));
    let encode = move || {
        let body = telemetry.encode_metrics()?;
        if gzip { body::compressed(&body).map_err(|_| fmt::Error) } else { Ok(body.into_bytes()) }
    };
    // Some milliseconds of work for a big mesh: off the runtime, whose other tasks renew certificates.
    match tokio::task::spawn_blocking(encode).await {
        Ok(Ok(body)) => {
            let mut response = text(StatusCode::OK, body);
            if wants_openmetrics(asked) {
                response.headers_mut().insert(header::CONTENT_TYPE, OPENMETRICS);
            }
            if gzip {
                response.headers_mut().insert(header::CONTENT_ENCODING, body::GZIP);
            }
            response
        }
        Ok(Err(fmt::Error)) => {
            tracing::error!("a component cannot show its metrics");
            text(StatusCode::INTERNAL_SERVER_ERROR, "a component cannot show its metrics\n")
        }
        Err(error) => {
            tracing::error!(%error, "encoding the metrics failed");
            text(StatusCode::INTERNAL_SERVER_ERROR, "encoding the metrics failed\n")
        }
    }
}

fn wants_openmetrics(asked: &HeaderMap) -> bool {
    let names_it = |value: &HeaderValue| {
        value.to_str().is_ok_and(|text| text.to_ascii_lowercase().contains("application/openmetrics-text"))
    };
    asked.get_all(header::ACCEPT).iter().any(names_it)
}

fn ready(readiness: &Readiness) -> Response<Body> {
    let age = readiness.stale_since().map(|since| since.elapsed().unwrap_or_default().as_secs());
    let refused = readiness.source().refusals();
    match state(&readiness.pending(), age, &refused, readiness.shortage().as_ref()) {
        Ok(ready) => text(StatusCode::OK, ready),
        // Istio's status for it.
        Err(not_ready) => text(StatusCode::INTERNAL_SERVER_ERROR, not_ready),
    }
}

/// What who asks is told: whether the daemon is ready, and what to know of it in either case. `age`: of the mesh in
/// seconds, where it may be old; `refused`: what of its sources is not in force.
fn state(
    pending: &[&str],
    age: Option<u64>,
    refused: &[Refused],
    shortage: Option<&Shortage>,
) -> Result<String, String> {
    if !pending.is_empty() {
        return Err(format!("not ready, pending: {}\n", pending.join(", ")));
    }
    let mut told =
        age.map_or_else(String::new, |age| format!(", with the mesh of {age} seconds ago: no control plane"));
    for refused in refused {
        let age = refused.since.elapsed().unwrap_or_default().as_secs();
        told += &format!(", with the mesh as it was {age} seconds ago: {refused}");
    }
    let Some(short) = shortage else { return Ok(format!("ready{told}\n")) };
    let Shortage { lacking, of, reason } = short;
    match short.is_total() {
        // Whatever its pods send to other nodes fails, and what those send to them.
        true => Err(format!(
            "not ready, none of {of} identities of this node has a valid certificate: {reason}\n"
        )),
        false => {
            Ok(format!("ready{told}; {lacking} of {of} identities have no valid certificate: {reason}\n"))
        }
    }
}

pub(super) fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::from(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, TEXT);
    response
}

#[cfg(test)]
mod tests;
