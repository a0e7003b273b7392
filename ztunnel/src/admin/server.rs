//! The HTTP/1 servers. Small on purpose, and bounded: in connections, in header size, and in the time a client
//! may take, so that nobody who can reach a port can hold more than a little memory for a little while.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http::HeaderValue;
use http::Method;
use http::StatusCode;
use http::header;
use http_body_util::Full;
use hyper::Request;
use hyper::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::rt::TokioTimer;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time;

use crate::admin::ready::Readiness;
use crate::shutdown;
use crate::shutdown::Signal;
use crate::telemetry::Telemetry;

/// How long a client may take to send a request's header, and to begin the next one.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a connection may last, however it is used. It bounds what a slow reader can hold.
const CONNECTION_MAX: Duration = Duration::from_secs(30);

/// The largest header taken, in bytes.
const HEADER_MAX: usize = 8 * 1024;

/// The most header fields taken.
const FIELDS_MAX: usize = 64;

/// How many connections the metrics server has at once. More wait in the listener's backlog: a scrape can be
/// megabytes, so they are few.
const SCRAPES_MAX: usize = 8;

/// How many connections the readiness server has at once. More wait in the listener's backlog.
const PROBES_MAX: usize = 256;

/// How long to wait after the kernel refused to accept, as it does when descriptors run out.
const ACCEPT_BACKOFF: Duration = Duration::from_secs(1);

const OPENMETRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text;charset=utf-8;version=1.0.0");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// Serves `GET /metrics` and `GET /stats/prometheus` (port 15020 as a rule) until the process closes: metrics are
/// wanted most while it drains.
pub async fn serve_metrics(listener: TcpListener, telemetry: Telemetry, signal: Signal) {
    serve(listener, Site::Metrics(telemetry), SCRAPES_MAX, signal).await;
}

/// Serves `GET /healthz/ready` (port 15021 as a rule) until the process closes: 200 and `ready`, or 503 and who is
/// waited for.
pub async fn serve_readiness(listener: TcpListener, readiness: Readiness, signal: Signal) {
    serve(listener, Site::Readiness(readiness), PROBES_MAX, signal).await;
}

#[derive(Debug, Clone)]
enum Site {
    Metrics(Telemetry),
    Readiness(Readiness),
}

async fn serve(listener: TcpListener, site: Site, connections_max: usize, mut signal: Signal) {
    let slots = Arc::new(Semaphore::new(connections_max));
    loop {
        let next = async {
            let slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            next = next => next,
            () = signal.closing() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let (site, signal) = (site.clone(), signal.clone());
                shutdown::spawn(async move {
                    converse(stream, site, signal).await;
                    drop(slot);
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

async fn converse(stream: TcpStream, site: Site, mut signal: Signal) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let site = site.clone();
        async move { Ok::<_, Infallible>(site.answer(&request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_MAX)
        .max_headers(FIELDS_MAX)
        .serve_connection(TokioIo::new(stream), answer);
    tokio::select! {
        // Whatever ended it (a time-out, a client that hung up, a request that is none) is the client's affair.
        _over = time::timeout(CONNECTION_MAX, connection) => {}
        () = signal.closing() => {}
    }
}

impl Site {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let known = match self {
            Self::Metrics(_) => ["/metrics", "/stats/prometheus"].contains(&request.uri().path()),
            Self::Readiness(_) => request.uri().path() == "/healthz/ready",
        };
        if !known {
            return text(StatusCode::NOT_FOUND, "not found\n");
        }
        if ![Method::GET, Method::HEAD].contains(request.method()) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match self {
            Self::Metrics(telemetry) => metrics(telemetry, request.headers()).await,
            Self::Readiness(readiness) => ready(readiness),
        }
    }
}

async fn metrics(telemetry: &Telemetry, asked: &HeaderMap) -> Response<Full<Bytes>> {
    let telemetry = telemetry.clone();
    // Some milliseconds of work for a big mesh: off the runtime, whose other tasks renew certificates.
    match tokio::task::spawn_blocking(move || telemetry.encode_metrics()).await {
        Ok(Ok(body)) => {
            let mut response = text(StatusCode::OK, body);
            if wants_openmetrics(asked) {
                response.headers_mut().insert(header::CONTENT_TYPE, OPENMETRICS);
            }
            response
        }
        Ok(Err(error)) => {
            tracing::error!(%error, "a component cannot show its metrics");
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

fn ready(readiness: &Readiness) -> Response<Full<Bytes>> {
    let pending = readiness.pending();
    if pending.is_empty() {
        text(StatusCode::OK, "ready\n")
    } else {
        text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready, pending: {}\n", pending.join(", ")))
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, TEXT);
    response
}

#[cfg(test)]
mod tests;
