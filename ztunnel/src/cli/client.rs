//! One request to the admin port.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::BodyExt as _;
use http_body_util::Empty;
use hyper::Method;
use hyper::Request;
use hyper::StatusCode;
use hyper::body::Bytes;
use hyper::header::HOST;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::process;

/// How long it may take until an answer begins. The daemon's control thread never waits for so long.
const BEGIN_WITHIN: Duration = Duration::from_secs(5);
/// How long an answer may pause: a dump of a large mesh is made while the daemon works.
const PAUSE_MAX: Duration = Duration::from_secs(20);
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
    #[error("no answer at {0} within {limit} s{1}", limit = BEGIN_WITHIN.as_secs())]
    Slow(SocketAddr, String),
    /// It has stopped in the middle.
    #[error("the answer at {0} pauses for more than {limit} s{1}", limit = PAUSE_MAX.as_secs())]
    Pauses(SocketAddr, String),
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
    runtime.block_on(exchange(address, method, path))
}

/// Who it is that does not answer, if that is to be seen.
fn who(address: SocketAddr) -> String {
    process::listener(address).map_or_else(String::new, |listener| format!(": there listens {listener}"))
}

async fn exchange(address: SocketAddr, method: Method, path: &str) -> Result<Vec<u8>, ClientError> {
    let slow = |_elapsed| ClientError::Slow(address, who(address));
    let connecting = timeout(BEGIN_WITHIN, TcpStream::connect(address));
    let stream = connecting.await.map_err(slow)?;
    let stream = stream.map_err(|error| ClientError::Unreachable(address, error))?;
    let http = |error| ClientError::Http(address, error);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().expect("a path of our own, escaped");
    request.headers_mut().insert(HOST, address.to_string().parse().expect("an address"));
    let answered = async {
        let response =
            timeout(BEGIN_WITHIN, sender.send_request(request)).await.map_err(slow)?.map_err(http)?;
        let status = response.status();
        let mut rest = response.into_body();
        let mut body = Vec::new();
        loop {
            let frame = timeout(PAUSE_MAX, rest.frame()).await;
            let Some(frame) = frame.map_err(|_elapsed| ClientError::Pauses(address, who(address)))? else {
                break;
            };
            let frame = frame.map_err(|error| ClientError::Body(error.to_string()))?;
            let Ok(data) = frame.into_data() else { continue };
            if body.len() + data.len() > SIZE_LIMIT {
                return Err(ClientError::TooLong);
            }
            body.extend_from_slice(&data);
        }
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
