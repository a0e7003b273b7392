//! A small HBONE client and server of the tests' own, which will do what no honest one does.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use ztunnel_tests::certificates::{Signed, gullible};
use ztunnel_tests::netns::Netns;
use ztunnel_tests::poll::PATIENCE;

/// How long one client may keep the impostor from the next.
const TURN: Duration = Duration::from_secs(5);

/// How long a peer that says nothing sensible may be kept: the daemon gives a handshake ten seconds.
const CLOSED_WITHIN: Duration = Duration::from_secs(10).saturating_add(PATIENCE);

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Came {
    /// The status of the answer.
    Status(StatusCode),
    /// Status 200, and this through the tunnel.
    Tunnel(String),
}

/// Runs a future on a thread inside a network namespace, for a few seconds at most.
pub(crate) fn inside<T: Send>(netns: &Netns, act: impl Future<Output = Result<T>> + Send) -> Result<T> {
    netns.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            tokio::time::timeout(CLOSED_WITHIN + PATIENCE, act).await.context("left waiting")?
        })
    })
}

/// A TLS connection that trusts everybody.
pub(crate) async fn tls(to: SocketAddr, own: Option<Signed>, alpn: &[&str]) -> Result<TlsStream<TcpStream>> {
    let config = gullible(own, alpn)?;
    let stream = TcpStream::connect(to).await.context("connect")?;
    let name = ServerName::try_from("hbone.invalid")?;
    Ok(TlsConnector::from(Arc::new(config)).connect(name, stream).await?)
}

/// One request over a TLS connection; for a CONNECT with status 200 also an HTTP request through the tunnel.
pub(crate) async fn request(stream: TlsStream<TcpStream>, method: Method, authority: &str) -> Result<Came> {
    let (mut client, connection) = h2::client::handshake(stream).await.context("HTTP/2")?;
    let driver = async {
        connection.await.context("the connection")?;
        std::future::pending().await
    };
    let exchange = async {
        client = client.ready().await?;
        let uri =
            if method == Method::CONNECT { authority.to_owned() } else { format!("https://{authority}/") };
        let request = Request::builder().method(method).uri(uri).body(())?;
        let (answer, mut body) = client.send_request(request, false)?;
        let answer = answer.await.context("no answer")?;
        if answer.status() != StatusCode::OK {
            return Ok(Came::Status(answer.status()));
        }
        body.send_data(Bytes::from_static(b"GET / HTTP/1.0\r\n\r\n"), false)?;
        let mut text = Vec::new();
        let mut incoming = answer.into_body();
        while let Some(data) = incoming.data().await {
            let data = data?;
            incoming.flow_control().release_capacity(data.len())?;
            text.extend_from_slice(&data);
        }
        Ok(Came::Tunnel(String::from_utf8_lossy(&text).into_owned()))
    };
    tokio::select! {
        came = exchange => came,
        ended = driver => ended,
    }
}

/// Sends bytes as they are and reads until the other side closes; fails if it does not.
pub(crate) async fn until_closed(
    mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin,
    bytes: &[u8],
) -> Result<Vec<u8>> {
    // It may be closed before all of it is sent.
    let _closed = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    match tokio::time::timeout(CLOSED_WITHIN, stream.read_to_end(&mut answer)).await {
        Ok(_closed_or_reset) => Ok(answer),
        Err(_) => bail!("the connection stays open"),
    }
}

/// Serves HBONE's port with this certificate and counts requests that get as far as HTTP/2, until dropped.
pub(crate) fn impostor(netns: &Netns, own: Signed, served: Arc<AtomicUsize>) -> Result<Impostor> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(Gullible(provider)))
        .with_single_cert(own.chain, own.key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let (bound, is_bound) = std::sync::mpsc::channel();
    let netns = netns.clone();
    let thread = std::thread::spawn(move || {
        netns.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 15008)).await?;
                bound.send(())?;
                loop {
                    let stream = tokio::select! {
                        accepted = listener.accept() => accepted?.0,
                        _ = &mut stopped => return Ok(()),
                    };
                    // One after the other is enough, and none may hold up the others for long.
                    let _refused = tokio::time::timeout(TURN, answer(&acceptor, stream, &served)).await;
                }
            })
        })
    });
    is_bound.recv().context("the impostor could not bind port 15008")?;
    Ok(Impostor { stop: Some(stop), thread: Some(thread) })
}

async fn answer(acceptor: &TlsAcceptor, stream: TcpStream, served: &AtomicUsize) -> Result<()> {
    let stream = acceptor.accept(stream).await?;
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(request) = connection.accept().await {
        served.fetch_add(1, Ordering::SeqCst);
        request?.1.send_reset(h2::Reason::REFUSED_STREAM);
    }
    Ok(())
}

/// Ends the server when dropped.
pub(crate) struct Impostor {
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<Result<()>>>,
}

impl Drop for Impostor {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

/// Believes everything.
#[derive(Debug)]
struct Gullible(Arc<CryptoProvider>);

impl ClientCertVerifier for Gullible {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
