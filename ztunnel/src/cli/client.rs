//! One request to the admin port.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::BodyExt as _;
use http_body_util::Empty;
use http_body_util::LengthLimitError;
use http_body_util::Limited;
use hyper::Method;
use hyper::Request;
use hyper::StatusCode;
use hyper::body::Bytes;
use hyper::header::HOST;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// How long an answer may take: a dump of a large mesh is made while the daemon works.
const TIME_LIMIT: Duration = Duration::from_secs(60);
/// The longest answer that is read, in bytes: a dump of some hundred thousand workloads.
const SIZE_LIMIT: usize = 1 << 30;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error(
        "no daemon answers at {0}: it listens on the loopback of its own network namespace, or its pod's"
    )]
    Unreachable(SocketAddr, #[source] std::io::Error),
    /// It takes too long.
    #[error("the daemon at {0} does not answer within {limit} s", limit = TIME_LIMIT.as_secs())]
    Slow(SocketAddr),
    /// It is not what was expected there.
    #[error("what answers at {0} speaks no HTTP")]
    Http(SocketAddr, #[source] hyper::Error),
    /// It said no.
    #[error("the daemon says {0}: {1}")]
    Refused(StatusCode, String),
    /// The answer is beyond all measure.
    #[error("the answer is longer than {limit} MiB", limit = SIZE_LIMIT >> 20)]
    TooLong,
    /// The answer broke off.
    #[error("the answer broke off: {0}")]
    Body(String),
    /// Not even the runtime starts.
    #[error("cannot start")]
    Runtime(#[source] std::io::Error),
}

/// The body of the answer to a GET.
pub fn get(address: SocketAddr, path: &str) -> Result<Vec<u8>, ClientError> {
    ask(address, Method::GET, path)
}

/// The body of the answer to a POST.
pub fn post(address: SocketAddr, path: &str) -> Result<Vec<u8>, ClientError> {
    ask(address, Method::POST, path)
}

/// A value as part of a query: everything but letters, digits and what levels are made of is escaped.
pub fn escape(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'=' | b',' | b'_' | b'-' | b'.' => {
                escaped.push(char::from(byte));
            }
            other => escaped += &format!("%{other:02X}"),
        }
    }
    escaped
}

fn ask(address: SocketAddr, method: Method, path: &str) -> Result<Vec<u8>, ClientError> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ClientError::Runtime)?;
    runtime.block_on(async {
        let answer = tokio::time::timeout(TIME_LIMIT, exchange(address, method, path));
        answer.await.unwrap_or(Err(ClientError::Slow(address)))
    })
}

async fn exchange(address: SocketAddr, method: Method, path: &str) -> Result<Vec<u8>, ClientError> {
    let stream =
        TcpStream::connect(address).await.map_err(|error| ClientError::Unreachable(address, error))?;
    let http = |error| ClientError::Http(address, error);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().expect("a path of our own, escaped");
    request.headers_mut().insert(HOST, address.to_string().parse().expect("an address"));
    let answered = async {
        let response = sender.send_request(request).await.map_err(http)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), SIZE_LIMIT).collect().await;
        let body = body.map_err(|error| match error.is::<LengthLimitError>() {
            true => ClientError::TooLong,
            false => ClientError::Body(error.to_string()),
        })?;
        let body = Vec::from(body.to_bytes());
        if status != StatusCode::OK {
            return Err(ClientError::Refused(status, String::from_utf8_lossy(&body).trim().to_owned()));
        }
        Ok(body)
    };
    // The connection makes the progress of both; that it ends is told by the answer.
    tokio::pin!(connection, answered);
    let mut open = true;
    loop {
        tokio::select! {
            answer = &mut answered => return answer,
            _ended = &mut connection, if open => open = false,
        }
    }
}
