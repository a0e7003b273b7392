//! The way to a control plane: TCP, our TLS, HTTP/2 by tonic.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use socket2::SockRef;
use socket2::TcpKeepalive;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::Channel;
use tonic::transport::Endpoint;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a quiet connection is asked whether it is alive. A control plane may refuse more than one question in half
/// of this time.
const PING_EVERY: Duration = Duration::from_secs(30);
/// How long it has to answer.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes on their way: a push of a whole mesh is large.
const WINDOW: u32 = 4 * 1024 * 1024;

/// What a connection reads and writes.
trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Connects to `address`, with TLS if there is a configuration for it.
pub(super) async fn connect(
    address: &Uri,
    tls: Option<Arc<ClientConfig>>,
) -> Result<Channel, tonic::transport::Error> {
    let connector = tower::service_fn(move |uri: Uri| {
        let tls = tls.clone();
        async move { dial(uri, tls).await.map(TokioIo::new) }
    });
    Endpoint::from(address.clone())
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .connect_with_connector(connector)
        .await
}

async fn dial(uri: Uri, tls: Option<Arc<ClientConfig>>) -> io::Result<Box<dyn Duplex>> {
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
    let host = uri.host().ok_or_else(|| invalid("the address of the control plane has no host"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or_else(|| if tls.is_some() { 443 } else { 80 });
    let socket = TcpStream::connect((host, port)).await?;
    socket.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(300))
        .with_interval(Duration::from_secs(75))
        .with_retries(9);
    SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
    let Some(tls) = tls else { return Ok(Box::new(socket)) };
    let name = ServerName::try_from(host.to_owned());
    let name = name.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    Ok(Box::new(TlsConnector::from(tls).connect(name, socket).await?))
}
