//! Where the mesh and the certificates come from: istiod's two services.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use http::HeaderName;
use http::HeaderValue;
use http::Uri;
use ztunnel_objects::local;

use crate::config::env::reader::Reader;
use crate::config::origin::Origin;

/// Who vouches for a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootCert {
    /// The certificates in this file, which may change.
    File(PathBuf),
    /// The authorities the system trusts.
    System,
    /// These certificates.
    Pem(String),
}

/// What the control plane is shown to know who asks.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// The content of this file, which changes.
    File(PathBuf),
    /// This text.
    Literal(String),
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Literal(_) => f.write_str("Literal(..)"),
        }
    }
}

/// One gRPC server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// `https://<host>:<port>`.
    pub address: String,
    /// Who vouches for it.
    pub root: RootCert,
    /// A name besides the address's that its certificate may have.
    pub alternative_name: Option<String>,
    /// Metadata sent with each request. Values may be secrets.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// The control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlPlane {
    /// Where the mesh comes from; nowhere if it was switched off.
    pub discovery: Option<Server>,
    /// Whether only what is needed is asked for.
    pub on_demand: bool,
    /// A mesh besides.
    pub local: Option<local::Place>,
    /// Where certificates come from.
    pub authority: Server,
    /// What both are shown.
    pub token: Token,
    /// How long a certificate is asked to last.
    pub secret_ttl: Duration,
}

const ROOT: &str = "./var/run/secrets/istio/root-cert.pem";
const TOKEN: &str = "./var/run/secrets/tokens/istio-token";
const IN_CLUSTER: &str = "https://istiod.istio-system.svc:15012";
const ON_THE_HOST: &str = "https://localhost:15012";

pub(super) fn read(reader: &mut Reader<'_>) -> ControlPlane {
    let discovery = discovery_address(reader).map(|address| server(reader, "XDS", address));
    let (address, origin) = match reader.set("CA_ADDRESS") {
        Some(text) => (text.to_owned(), Origin::Environment),
        None => default_address(reader),
    };
    let address = checked(reader, "CA_ADDRESS", &address, origin);
    ControlPlane {
        discovery,
        authority: server(reader, "CA", address),
        on_demand: reader.flag("XDS_ON_DEMAND", false),
        local: local(reader),
        token: token(reader),
        secret_ttl: reader.duration("SECRET_TTL", Duration::from_secs(24 * 60 * 60)),
    }
}

/// The environment before `PROXY_CONFIG` before the default; an empty variable switches it off.
fn discovery_address(reader: &mut Reader<'_>) -> Option<String> {
    let name = "XDS_ADDRESS";
    let (address, origin) = match (reader.raw(name), reader.proxy.discovery_address.clone()) {
        (Some(""), _) => {
            reader.show(name, "", Origin::Environment);
            return None;
        }
        (Some(text), _) => (text.to_owned(), Origin::Environment),
        (None, Some(said)) => said,
        (None, None) => default_address(reader),
    };
    Some(checked(reader, name, &address, origin))
}

fn default_address(reader: &Reader<'_>) -> (String, Origin) {
    match reader.set("KUBERNETES_SERVICE_HOST") {
        Some(_) => (IN_CLUSTER.to_owned(), Origin::Variable("KUBERNETES_SERVICE_HOST")),
        None => (ON_THE_HOST.to_owned(), Origin::Default),
    }
}

/// `text` with its scheme.
fn checked(reader: &mut Reader<'_>, name: &str, text: &str, origin: Origin) -> String {
    let address = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let sound = address.parse::<Uri>().is_ok_and(|uri| {
        uri.scheme_str() == Some("https")
            && uri.host().is_some_and(|host| !host.is_empty())
            && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
            && matches!(uri.path(), "" | "/")
    });
    if !sound {
        reader.refuse(name, text, "use <host>:<port> or https://<host>:<port>");
    }
    reader.show(name, &address, origin);
    address
}

fn server(reader: &mut Reader<'_>, which: &'static str, address: String) -> Server {
    Server {
        address,
        root: root(reader, &format!("{which}_ROOT_CA")),
        alternative_name: reader.optional(&format!("ALT_{which}_HOSTNAME")),
        headers: headers(reader, if which == "CA" { "CA_HEADER_" } else { "XDS_HEADER_" }),
    }
}

fn root(reader: &mut Reader<'_>, name: &str) -> RootCert {
    match reader.set(name) {
        Some("SYSTEM") => {
            reader.show(name, "SYSTEM", Origin::Environment);
            RootCert::System
        }
        Some(text) if text.contains("-----BEGIN") => {
            reader.show(name, "certificates", Origin::Environment);
            RootCert::Pem(text.to_owned())
        }
        Some(_) | None => RootCert::File(reader.path(name, ROOT)),
    }
}

fn headers(reader: &mut Reader<'_>, prefix: &'static str) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers = Vec::new();
    for (key, value) in reader.prefixed(prefix) {
        let name = format!("{prefix}{key}");
        match (HeaderName::try_from(key), HeaderValue::try_from(value)) {
            (Ok(key), Ok(mut value)) => {
                // Most of these are there to authenticate somebody.
                value.set_sensitive(true);
                reader.show(&name, NOT_SHOWN, Origin::Environment);
                headers.push((key, value));
            }
            (Err(_), _) => reader.refuse(&name, NOT_SHOWN, "its name does not end with that of a header"),
            (_, Err(_)) => reader.refuse(&name, NOT_SHOWN, "use the visible characters of ASCII"),
        }
    }
    headers
}

const NOT_SHOWN: &str = "(not shown)";

fn token(reader: &mut Reader<'_>) -> Token {
    let name = "AUTH_TOKEN";
    match reader.set(name) {
        // A token is base64 and dots.
        Some(text) if !text.starts_with(['/', '.']) => {
            reader.show(name, NOT_SHOWN, Origin::Environment);
            Token::Literal(text.to_owned())
        }
        Some(_) | None => Token::File(reader.path(name, TOKEN)),
    }
}

fn local(reader: &mut Reader<'_>) -> Option<local::Place> {
    let path = reader.optional("LOCAL_XDS_PATH");
    let name = "LOCAL_XDS";
    let text = reader.set(name).map(str::to_owned);
    match &text {
        // It is as long as a mesh is, and shown as one.
        Some(text) => reader.show(name, format_args!("({} bytes)", text.len()), Origin::Environment),
        None => reader.show(name, "", Origin::Default),
    }
    match (path, text) {
        (Some(path), Some(_)) => {
            reader.refuse(
                "LOCAL_XDS_PATH",
                &path,
                "with LOCAL_XDS it is not known which counts: leave one out",
            );
            None
        }
        (Some(path), None) => Some(local::Place::File(path.into())),
        (None, Some(text)) => Some(local::Place::Variable(name, text)),
        (None, None) => None,
    }
}
