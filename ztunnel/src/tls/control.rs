//! TLS to a control plane: the server is verified by its DNS name, the client has no certificate.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

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
use rustls::pki_types::InvalidDnsNameError;
use rustls::pki_types::ServerName;
use rustls::pki_types::UnixTime;
use rustls::pki_types::pem;
use rustls::pki_types::pem::PemObject;
use rustls::version::TLS13;

use crate::tls::configs::PROVIDER;
use crate::tls::verify::ALPN;

/// Who vouches for a control plane.
#[derive(Clone, PartialEq, Eq)]
pub enum Roots {
    /// The certificates in this file, which is read for every new connection.
    File(PathBuf),
    /// Those the operating system trusts.
    System,
    /// These, as PEM.
    Pem(String),
}

impl Roots {
    /// Reads a setting: the word `SYSTEM`, PEM, or a path.
    pub fn parse(text: &str) -> Self {
        match text {
            "SYSTEM" => Self::System,
            pem if pem.contains("-----BEGIN") => Self::Pem(pem.to_owned()),
            path => Self::File(PathBuf::from(path)),
        }
    }
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::System => f.write_str("SYSTEM"),
            Self::Pem(_) => f.write_str("PEM"),
        }
    }
}

/// Why nobody can be verified.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// The file cannot be read.
    #[error("cannot read the root certificates in {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is no PEM.
    #[error("the root certificates of the control plane are not PEM")]
    Pem(#[source] pem::Error),
    /// There is none that can be used.
    #[error("there is no root certificate of the control plane")]
    None,
    /// The additional name is none.
    #[error("{0:?} is not a DNS name")]
    Name(String, #[source] InvalidDnsNameError),
    /// The roots cannot be used.
    #[error("the root certificates of the control plane cannot be used")]
    Verifier(#[source] rustls::client::VerifierBuilderError),
}

/// The client side of a connection to a control plane: TLS 1.3 and `h2`. The server's certificate must lead to one of
/// `roots` and name the server that was dialled or `also`. Reads files.
pub fn client_config(roots: &Roots, also: Option<&str>) -> Result<Arc<ClientConfig>, RootsError> {
    let roots = match roots {
        Roots::File(path) => {
            let read = std::fs::read(path);
            store(&read.map_err(|source| RootsError::Read { path: path.clone(), source })?)?
        }
        Roots::Pem(text) => store(text.as_bytes())?,
        Roots::System => {
            let mut store = RootCertStore::empty();
            // Some of a system's roots may be unreadable; what matters is whether any is left.
            let _counts = store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            store
        }
    };
    if roots.is_empty() {
        return Err(RootsError::None);
    }
    let also = match also {
        Some(name) => Some(
            ServerName::try_from(name.to_owned())
                .map_err(|error| RootsError::Name(name.to_owned(), error))?,
        ),
        None => None,
    };
    let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&PROVIDER))
        .build()
        .map_err(RootsError::Verifier)?;
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])
        .expect("the provider's suites are those of TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Named { chain, also }))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

fn store(text: &[u8]) -> Result<RootCertStore, RootsError> {
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(text) {
        let certificate = certificate.map_err(RootsError::Pem)?;
        // One that is of no use may stand beside others that are.
        let _counts = store.add_parsable_certificates([certificate]);
    }
    Ok(store)
}

/// Accepts the usual, with one more name.
#[derive(Debug)]
struct Named {
    chain: Arc<WebPkiServerVerifier>,
    also: Option<ServerName<'static>>,
}

impl ServerCertVerifier for Named {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.chain.verify_server_cert(leaf, intermediates, name, ocsp, now);
        match (&verified, &self.also) {
            (
                Err(rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                )),
                Some(also),
            ) => self.chain.verify_server_cert(leaf, intermediates, also, ocsp, now),
            _ => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_a_word_pem_or_a_path() {
        assert_eq!(Roots::parse("SYSTEM"), Roots::System);
        assert_eq!(Roots::parse("./var/root.pem"), Roots::File("./var/root.pem".into()));
        let pem = "-----BEGIN CERTIFICATE-----\n";
        assert_eq!(Roots::parse(pem), Roots::Pem(pem.to_owned()));
    }

    #[test]
    fn without_roots_nobody_is_verified() {
        let error = |roots: &str| client_config(&Roots::parse(roots), None).unwrap_err();
        assert!(matches!(error("/nonexistent/root.pem"), RootsError::Read { .. }));
        assert!(matches!(error("-----BEGIN CERTIFICATE-----\nx"), RootsError::Pem(_) | RootsError::None));
        assert!(matches!(error("-----BEGIN X-----\n-----END X-----\n"), RootsError::None));
    }
}
