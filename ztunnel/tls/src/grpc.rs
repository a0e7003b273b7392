//! Connections to the control plane: whom to trust there, how to prove who asks, and the TLS below gRPC.
//!
//! The control plane proves itself by a server certificate, this side by a bearer token in each call; there is no
//! client certificate. Roots and token are files that others rewrite, so both are read again for each use
//! ([`ControlPlane::connector`], [`ControlPlane::headers`]); roots that can no longer be read leave the last good
//! ones in force.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use http::HeaderMap;
use http::HeaderName;
use http::HeaderValue;
use http::Uri;
use http::header::AUTHORIZATION;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::CertificateError;
use rustls::ClientConfig;
use rustls::DigitallySignedStruct;
use rustls::RootCertStore;
use rustls::SignatureScheme;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::danger::ServerCertVerified;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::ServerName;
use rustls::pki_types::UnixTime;
use rustls::pki_types::pem::PemObject;
use rustls::version::TLS13;
use socket2::SockRef;
use socket2::TcpKeepalive;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::Channel;
use tonic::transport::Endpoint;
use ztunnel_runtime::files;

use crate::provider::provider;
use crate::verify::ALPN;

/// TCP to the control plane takes no longer: it is its kernel that answers, however busy it is itself.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Nor does TLS. Far longer, as handshakes wait for their turn where thousands connect at once: one that is given up
/// costs the control plane as much as one that ends, and is followed by another.
const SHAKE_WITHIN: Duration = Duration::from_secs(30);
/// Silence on a connection before TCP asks whether the other end is there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(300);
/// Between two such questions.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(75);
/// Unanswered ones after which the connection is dead.
const KEEPALIVE_PROBES: u32 = 9;
/// How often HTTP/2 asks whether the other end is there. istiod closes a connection (ENHANCE_YOUR_CALM) on which
/// it is asked more often than every 15 s.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// How long it may take to answer.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// A file with a token or roots is not longer: what is was named by mistake.
const FILE_MAX: u64 = 1 << 20;

/// A gRPC channel over `connector`, which connects when it is first used and again when the connection breaks.
pub fn channel(address: &Address, connector: Connector) -> Channel {
    endpoint(address).connect_with_connector_lazy(connector)
}

/// How every channel to `address` finds out that the other end is gone.
pub fn endpoint(address: &Address) -> Endpoint {
    Endpoint::from(address.uri().clone())
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
}

/// Where a control plane is: `https://host:port`, the scheme left out or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(Uri);

/// Why a text is no [`Address`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddress {
    /// Not a host and a port.
    #[error("{0:?} is not an address of a control plane: use https://HOST:PORT")]
    Form(String),
    /// The token would be readable for everybody on the way.
    #[error("{0:?} is not encrypted, and tokens and certificates are not sent in the clear: use https://")]
    Plain(String),
}

impl Address {
    /// The URI, always of scheme `https`.
    pub fn uri(&self) -> &Uri {
        &self.0
    }
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let form = || InvalidAddress::Form(text.to_owned());
        if text.starts_with("http://") {
            return Err(InvalidAddress::Plain(text.to_owned()));
        }
        let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
        let uri: Uri = whole.parse().map_err(|_| form())?;
        let usable = uri.scheme_str() == Some("https")
            && matches!(uri.path(), "" | "/")
            && uri.query().is_none()
            && uri.host().is_some_and(|host| server_name(host).is_some())
            && uri.port_u16().is_some_and(|port| port != 0)
            && !uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
        if usable { Ok(Self(uri)) } else { Err(form()) }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}", self.0.authority().map_or("", |authority| authority.as_str()))
    }
}

/// Who vouches for the control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Roots {
    /// The certificates of a PEM file, read again for each connection.
    File(PathBuf),
    /// The roots of the operating system (`SYSTEM`).
    System,
    /// The certificates themselves, as PEM.
    Pem(String),
}

impl From<&str> for Roots {
    fn from(text: &str) -> Self {
        match text {
            "SYSTEM" => Self::System,
            pem if pem.contains("-----BEGIN ") => Self::Pem(pem.to_owned()),
            path => Self::File(PathBuf::from(path)),
        }
    }
}

/// How this daemon proves who it is.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// Not at all.
    None,
    /// By the content of a file, read again for each call: kubelet replaces it. No token is sent while there is
    /// no such file.
    File(PathBuf),
    /// By this text.
    Literal(String),
}

impl From<&str> for Token {
    /// A text with a slash is a path, as tokens (RFC 7519) have none.
    fn from(text: &str) -> Self {
        match text {
            "" => Self::None,
            path if path.contains('/') => Self::File(PathBuf::from(path)),
            token => Self::Literal(token.to_owned()),
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Literal(_) => f.write_str("Literal(..)"),
        }
    }
}

/// One control plane, and how it is talked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where it is.
    pub address: Address,
    /// Who vouches for it.
    pub roots: Roots,
    /// A name that its certificate may have instead of the host of the address.
    pub alternate: Option<String>,
    /// How this daemon proves who it is.
    pub token: Token,
    /// The cluster this node is of, sent as `clusterid`.
    pub cluster: String,
    /// Further headers of each call.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// Why the control plane cannot be talked to. Every message says what to look at.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A file cannot be read.
    #[error("{what} {} cannot be read", path.display())]
    File {
        /// What it is for.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is no certificate among the roots, or one that cannot be read.
    #[error("{origin} {problem}")]
    Roots {
        /// Where they are from.
        origin: String,
        /// What is wrong with them.
        problem: String,
    },
    /// The token cannot be sent in a header.
    #[error("the token {} has characters that a token cannot have", path.display())]
    Token {
        /// Its file.
        path: PathBuf,
    },
    /// The alternative name is no host name.
    #[error("{0:?} is not a host name that a certificate could have")]
    Alternate(String),
}

/// A control plane as its clients use it. Cheap to share.
#[derive(Debug)]
pub struct ControlPlane {
    config: Config,
    /// The roots that were read last and were good.
    last_good: Mutex<Option<Trusted>>,
}

#[derive(Debug, Clone)]
struct Trusted {
    certificates: Vec<CertificateDer<'static>>,
    tls: Arc<ClientConfig>,
}

impl ControlPlane {
    /// Reads nothing yet.
    pub fn new(config: Config) -> Self {
        Self { config, last_good: Mutex::default() }
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.config.address
    }

    /// Makes connections that trust the roots as they are now, or, if those cannot be used, as they were.
    pub fn connector(&self) -> Result<Connector, ControlError> {
        let fresh = certificates(&self.config.roots).and_then(|fresh| {
            let mut held = self.last_good.lock();
            match &*held {
                Some(trusted) if trusted.certificates == fresh => Ok(Arc::clone(&trusted.tls)),
                _ => {
                    let tls = Arc::new(self.client_config(&fresh)?);
                    *held = Some(Trusted { certificates: fresh, tls: Arc::clone(&tls) });
                    Ok(tls)
                }
            }
        });
        match fresh {
            Ok(tls) => Ok(Connector { tls }),
            Err(error) => {
                let held = self.last_good.lock();
                let Some(trusted) = &*held else { return Err(error) };
                tracing::warn!(
                    control_plane = %self.config.address,
                    error = &error as &dyn std::error::Error,
                    "the roots of the control plane cannot be used; the last good ones stay in force"
                );
                Ok(Connector { tls: Arc::clone(&trusted.tls) })
            }
        }
    }

    /// The headers of one call: token, cluster and what was configured beside them.
    pub fn headers(&self) -> Result<HeaderMap, ControlError> {
        let mut headers = HeaderMap::new();
        for (name, value) in &self.config.headers {
            headers.append(name, value.clone());
        }
        if let Ok(cluster) = HeaderValue::from_str(&self.config.cluster) {
            headers.insert("clusterid", cluster);
        }
        if let Some(bearer) = self.bearer()? {
            headers.insert(AUTHORIZATION, bearer);
        }
        Ok(headers)
    }

    fn bearer(&self) -> Result<Option<HeaderValue>, ControlError> {
        let (token, path) = match &self.config.token {
            Token::None => return Ok(None),
            Token::Literal(token) => (token.clone(), PathBuf::from("AUTH_TOKEN")),
            Token::File(path) => match read(path) {
                Ok(token) => (token, path.clone()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(source) => {
                    return Err(ControlError::File { what: "the token", path: path.clone(), source });
                }
            },
        };
        let mut bearer = HeaderValue::try_from(format!("Bearer {}", token.trim()))
            .map_err(|_| ControlError::Token { path })?;
        bearer.set_sensitive(true);
        Ok(Some(bearer))
    }

    fn client_config(&self, certificates: &[CertificateDer<'static>]) -> Result<ClientConfig, ControlError> {
        let unusable = |problem: String| ControlError::Roots { origin: self.config.roots.origin(), problem };
        let mut roots = RootCertStore::empty();
        match &self.config.roots {
            // Old roots of operating systems are not always well formed.
            Roots::System => {
                roots.add_parsable_certificates(certificates.iter().cloned());
            }
            Roots::File(_) | Roots::Pem(_) => {
                for certificate in certificates {
                    let unreadable =
                        |error| unusable(format!("hold a certificate that is no root's: {error}"));
                    roots.add(certificate.clone()).map_err(unreadable)?;
                }
            }
        }
        let alternate = match &self.config.alternate {
            Some(name) => Some(server_name(name).ok_or_else(|| ControlError::Alternate(name.clone()))?),
            None => None,
        };
        let provider = provider();
        let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
            .build()
            .map_err(|error| unusable(format!("are of no use: {error}")))?;
        let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
            .with_protocol_versions(&[&TLS13])
            .expect("the provider's suites are those of TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(EitherName { chain, alternate }))
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }
}

impl Roots {
    fn origin(&self) -> String {
        match self {
            Self::File(path) => format!("the roots in {}", path.display()),
            Self::System => "the roots of the operating system".to_owned(),
            Self::Pem(_) => "the roots that were given".to_owned(),
        }
    }
}

fn certificates(roots: &Roots) -> Result<Vec<CertificateDer<'static>>, ControlError> {
    let problem = |problem: String| ControlError::Roots { origin: roots.origin(), problem };
    let pem = match roots {
        Roots::System => {
            let found = rustls_native_certs::load_native_certs();
            if found.certs.is_empty() {
                return Err(problem(format!("cannot be found: {:?}", found.errors)));
            }
            return Ok(found.certs);
        }
        Roots::Pem(pem) => pem.clone(),
        Roots::File(path) => read(path).map_err(|source| ControlError::File {
            what: "the file of roots",
            path: path.clone(),
            source,
        })?,
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match found {
        Ok(found) if found.is_empty() => Err(problem("hold no certificate".to_owned())),
        Ok(found) => Ok(found),
        Err(error) => Err(problem(format!("are not PEM: {error}"))),
    }
}

/// The text of a file that is not absurdly large.
fn read(path: &std::path::Path) -> io::Result<String> {
    let bytes = files::read(path, FILE_MAX)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(io::Error::other("it is larger than a megabyte"));
    }
    String::from_utf8(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

fn server_name(host: &str) -> Option<ServerName<'static>> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    ServerName::try_from(bare.to_owned()).ok()
}

/// Verifies a server by the name that was dialled or by another one.
#[derive(Debug)]
struct EitherName {
    chain: Arc<WebPkiServerVerifier>,
    alternate: Option<ServerName<'static>>,
}

impl ServerCertVerifier for EitherName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verify = |name: &ServerName<'_>| {
            self.chain.verify_server_cert(end_entity, intermediates, name, ocsp_response, now)
        };
        match (verify(server_name), &self.alternate) {
            (
                Err(rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                )),
                Some(alternate),
            ) => verify(alternate),
            (verified, _) => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Makes connections for a gRPC channel: a [`tower_service::Service`] of [`Uri`]s, so
/// `Endpoint::connect_with_connector` takes it. Two that trust the same roots are equal.
#[derive(Debug, Clone)]
pub struct Connector {
    tls: Arc<ClientConfig>,
}

impl PartialEq for Connector {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.tls, &other.tls)
    }
}

impl Connector {
    /// Connects to the first address of the URI's host that answers, and verifies who it is.
    async fn connect(self, uri: Uri) -> io::Result<TlsStream<TcpStream>> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "the URI names no host and port");
        let host = uri.host().ok_or_else(invalid)?;
        let name = server_name(host).ok_or_else(invalid)?;
        let port = uri.port_u16().unwrap_or(443);
        let late = |what: &str, within| {
            io::Error::new(io::ErrorKind::TimedOut, format!("{host}:{port} {what} in {within:?}"))
        };
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let socket = timeout(CONNECT_WITHIN, TcpStream::connect((bare, port))).await;
        let socket = socket.map_err(|_elapsed| late("did not answer", CONNECT_WITHIN))??;
        socket.set_nodelay(true)?;
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_PROBES);
        SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
        let tls = timeout(SHAKE_WITHIN, TlsConnector::from(self.tls).connect(name, socket)).await;
        let tls = tls.map_err(|_elapsed| late("accepts, and did not end its handshake", SHAKE_WITHIN))??;
        if tls.get_ref().1.alpn_protocol() != Some(ALPN) {
            return Err(io::Error::other("the control plane does not speak HTTP/2"));
        }
        Ok(tls)
    }
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect(uri).await.map(TokioIo::new) })
    }
}

#[cfg(test)]
mod tests;
