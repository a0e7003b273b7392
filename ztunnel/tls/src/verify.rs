//! Who is at the other end: certificate chains and the SPIFFE identity in them.
//!
//! The chain is judged by webpki against the mesh's own roots, the identity here. A failure leaves rustls as
//! [`rustls::Error`] like every other, so that the right alert is sent; [`cause`] tells what it means.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{AlertDescription, CertRevocationListError, CertificateError, CommonState, OtherError};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use ztunnel_mesh::model::identity::{InvalidSpiffeId, SpiffeId};

/// The ALPN protocol of every connection of the mesh.
pub const ALPN: &[u8] = b"h2";

/// No SPIFFE ID is longer (SPIFFE ID, section 2.3), so nothing longer is repeated in a message.
const URI_MAX: usize = 2048;

/// A peer whose chain and SPIFFE URI were verified on this connection. Only [`verified_peer`] makes one, so
/// holding it is the proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedPeer {
    id: SpiffeId,
    shown: Option<Arc<Shown>>,
}

/// What a peer showed, to be looked up again when a certificate of its chain may have been revoked.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// When it was verified: a connection outlives the certificates it was made with.
    pub(super) at: UnixTime,
}

impl VerifiedPeer {
    /// Who the peer is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The same peer, with what it showed on `connection`.
    pub(super) fn showing(self, connection: &CommonState) -> Self {
        let chain = connection.peer_certificates().unwrap_or_default().to_vec();
        Self { shown: Some(Arc::new(Shown { chain, at: UnixTime::now() })), ..self }
    }

    pub(super) fn shown(&self) -> Option<&Shown> {
        self.shown.as_deref()
    }
}

/// Why a connection proves no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoIdentity {
    /// Asked too early: nothing is verified before the handshake is over.
    #[error("the TLS handshake is not over")]
    Handshaking,
    /// The peer agreed on no application protocol, which HTTP/2 over TLS requires (RFC 9113, section 3.3).
    #[error("the peer did not negotiate the protocol h2 (ALPN), so it is not a proxy of the mesh")]
    NotH2,
    /// The peer showed no certificate.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// The certificate speaks for no workload.
    #[error(transparent)]
    NotAccepted(#[from] NotAccepted),
}

/// The identity of the peer of a connection made with a configuration of [`super::configs`]: those let no
/// handshake finish whose peer was not verified.
pub fn verified_peer(connection: &CommonState) -> Result<VerifiedPeer, NoIdentity> {
    if connection.is_handshaking() {
        return Err(NoIdentity::Handshaking);
    }
    if connection.alpn_protocol() != Some(ALPN) {
        return Err(NoIdentity::NotH2);
    }
    let chain = connection.peer_certificates().ok_or(NoIdentity::NoCertificate)?;
    let id = identity_of(chain.first().ok_or(NoIdentity::NoCertificate)?)?;
    Ok(VerifiedPeer { id, shown: None })
}

/// Why a certificate with a good chain is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAccepted {
    /// Not a certificate, or its extensions contradict each other.
    #[error("the certificate cannot be read")]
    Malformed,
    /// Nobody can say whether it was revoked.
    #[error(
        "certificate revocation lists are asked for and none could be loaded yet, so no peer is accepted: see the \
         file that CRL_PATH names"
    )]
    NoRevocationList,
    /// It may sign other certificates, so it speaks for no workload (SPIFFE X509-SVID, section 5.2).
    #[error("the certificate is one that signs others, not one of a workload")]
    Signing,
    /// It has no URI, or more than one (SPIFFE X509-SVID, section 2: exactly one).
    #[error(
        "the certificate has {0} URIs among its alternative names, one that names the workload is needed"
    )]
    UriCount(usize),
    /// Its URI is not the identity of a workload.
    #[error("the certificate does not name a workload")]
    NotSpiffe(#[source] InvalidSpiffeId),
    /// The workload is of another trust domain.
    #[error("{presented} is not of trust domain {own:?}, the only one accepted here")]
    TrustDomain {
        /// The trust domain that is accepted.
        own: String,
        /// Who the peer is.
        presented: SpiffeId,
    },
    /// The peer is a workload, but not one that was to be reached.
    #[error("the peer is {presented}, expected {}", one_of(expected))]
    Identity {
        /// Whom the connection was meant for.
        expected: Arc<[SpiffeId]>,
        /// Who answered.
        presented: SpiffeId,
    },
}

fn one_of(ids: &[SpiffeId]) -> String {
    match ids {
        [] => "nobody".to_owned(),
        ids => ids.iter().map(SpiffeId::as_str).collect::<Vec<_>>().join(" or "),
    }
}

impl From<NotAccepted> for rustls::Error {
    fn from(error: NotAccepted) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
    }
}

/// Reads the one identity of a workload's certificate. Says nothing about who vouches for it.
pub(super) fn identity_of(leaf: &CertificateDer<'_>) -> Result<SpiffeId, NotAccepted> {
    let (rest, certificate) = X509Certificate::from_der(leaf).map_err(|_| NotAccepted::Malformed)?;
    if !rest.is_empty() {
        return Err(NotAccepted::Malformed);
    }
    let authority = certificate.basic_constraints().map_err(|_| NotAccepted::Malformed)?;
    let usage = certificate.key_usage().map_err(|_| NotAccepted::Malformed)?;
    if authority.is_some_and(|constraints| constraints.value.ca)
        || usage.is_some_and(|usage| usage.value.key_cert_sign() || usage.value.crl_sign())
    {
        return Err(NotAccepted::Signing);
    }
    // A second extension of the same kind is an error here: the two could be read by different readers.
    let names = certificate.subject_alternative_name().map_err(|_| NotAccepted::Malformed)?;
    let mut uris = Vec::new();
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            GeneralName::Invalid(..) => return Err(NotAccepted::Malformed),
            _ => {}
        }
    }
    let &[uri] = uris.as_slice() else {
        return Err(NotAccepted::UriCount(uris.len()));
    };
    if uri.len() > URI_MAX {
        return Err(NotAccepted::Malformed);
    }
    uri.parse().map_err(NotAccepted::NotSpiffe)
}

/// The TLS failure in an I/O error, if that is what it is: TLS over a socket reports its own errors so.
///
/// A client's handshake can end well although the server refuses its certificate (RFC 8446, section 2: the
/// client speaks last). It learns of that from the first read or write afterwards, by an error of this kind.
pub fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// What a failed handshake means to whoever runs the mesh.
#[derive(Debug)]
pub enum Cause<'a> {
    /// The client showed no certificate.
    NoCertificate,
    /// The peer's certificate (or one of its chain) is past its end.
    Expired(&'a CertificateError),
    /// The peer's certificate (or one of its chain) is not valid yet: one of the two clocks is wrong.
    NotYetValid(&'a CertificateError),
    /// A certificate of the peer's chain was revoked.
    Revoked,
    /// Nobody can say whether it was: the lists do not fit the authority.
    RevocationUnknown(&'a CertRevocationListError),
    /// The peer's chain does not lead to a root of this mesh, or is not valid for this use.
    Untrusted(&'a CertificateError),
    /// The chain is good, but the identity is not one to accept.
    Identity(&'a NotAccepted),
    /// The peer refused: what it found wrong is in its own log.
    RefusedByPeer(AlertDescription),
    /// Something else about TLS.
    Protocol(&'a rustls::Error),
}

/// Tells apart why a handshake failed.
pub fn cause(error: &rustls::Error) -> Cause<'_> {
    use CertificateError as Bad;
    match error {
        rustls::Error::NoCertificatesPresented => Cause::NoCertificate,
        rustls::Error::AlertReceived(alert) => Cause::RefusedByPeer(*alert),
        rustls::Error::InvalidCertificate(Bad::Revoked) => Cause::Revoked,
        rustls::Error::InvalidCertRevocationList(bad) => Cause::RevocationUnknown(bad),
        rustls::Error::InvalidCertificate(bad) => match bad {
            Bad::Other(OtherError(inner)) => match inner.downcast_ref() {
                Some(identity) => Cause::Identity(identity),
                None => Cause::Untrusted(bad),
            },
            Bad::Expired | Bad::ExpiredContext { .. } => Cause::Expired(bad),
            Bad::NotValidYet | Bad::NotValidYetContext { .. } => Cause::NotYetValid(bad),
            _ => Cause::Untrusted(bad),
        },
        _ => Cause::Protocol(error),
    }
}

impl Cause<'_> {
    /// Whether a revocation, or not knowing of one, was the reason.
    pub fn is_revocation(&self) -> bool {
        match self {
            Self::Revoked | Self::RevocationUnknown(_) => true,
            Self::Identity(bad) => **bad == NotAccepted::NoRevocationList,
            _ => false,
        }
    }

    /// Whether who the peer is (rather than TLS as such) was the reason.
    pub fn is_identity(&self) -> bool {
        matches!(self, Self::Identity(_))
    }
}

impl fmt::Display for Cause<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCertificate => f.write_str("the peer presented no certificate"),
            Self::Expired(CertificateError::ExpiredContext { time, not_after }) => {
                let age = time.as_secs().saturating_sub(not_after.as_secs());
                write!(
                    f,
                    "the peer's certificate expired {age} s ago: it was not renewed, or a clock is wrong"
                )
            }
            Self::Expired(_) => f.write_str("the peer's certificate has expired"),
            Self::NotYetValid(CertificateError::NotValidYetContext { time, not_before }) => {
                let wait = not_before.as_secs().saturating_sub(time.as_secs());
                write!(
                    f,
                    "the peer's certificate is valid only in {wait} s: compare the clocks of both nodes"
                )
            }
            Self::NotYetValid(_) => f.write_str("the peer's certificate is not valid yet"),
            Self::Revoked => f.write_str("a certificate of the peer's chain was revoked"),
            Self::RevocationUnknown(CertRevocationListError::IssuerInvalidForCrl) => f.write_str(
                "the authority's certificate does not allow it to sign revocation lists (key usage cRLSign), so its \
                 lists prove nothing and none of its certificates is accepted",
            ),
            Self::RevocationUnknown(bad) => {
                write!(f, "whether the peer's certificate was revoked cannot be said: {bad:?}")
            }
            Self::Untrusted(CertificateError::UnknownIssuer) => {
                f.write_str("the peer's certificate chain does not lead to a root of this mesh")
            }
            Self::Untrusted(CertificateError::BadSignature) => f.write_str(
                "a signature in the peer's certificate chain is wrong: it is of another root of the same name, or \
                 was changed on the way",
            ),
            Self::Untrusted(bad) => write!(f, "the peer's certificate chain is not trusted: {bad}"),
            Self::Identity(bad @ NotAccepted::NotSpiffe(why)) => write!(f, "{bad}: {why}"),
            Self::Identity(bad) => write!(f, "{bad}"),
            Self::RefusedByPeer(alert) => write!(f, "the peer refused the handshake: {}", meaning(*alert)),
            Self::Protocol(error) => write!(f, "TLS failed: {error}"),
        }
    }
}

/// The alerts as peers of a mesh mean them.
fn meaning(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateRevoked => "it holds our certificate for revoked".to_owned(),
        AlertDescription::UnknownCA => "it does not trust the root of our certificate".to_owned(),
        AlertDescription::CertificateExpired => "it holds our certificate for expired".to_owned(),
        AlertDescription::CertificateUnknown | AlertDescription::AccessDenied => {
            "it does not accept our identity".to_owned()
        }
        AlertDescription::CertificateRequired => "it saw no certificate of ours".to_owned(),
        AlertDescription::NoApplicationProtocol => "it does not speak h2".to_owned(),
        other => format!("alert {other:?}"),
    }
}
