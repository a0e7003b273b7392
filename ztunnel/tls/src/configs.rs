//! What one workload needs for mutual TLS: its certificate, key and roots, and the rustls configurations made
//! of them.
//!
//! Knows no clock: whether a certificate is valid now ([`Credentials::validity`]) is the peer's to judge, and to renew
//! in time and to show none that is not the workload's.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroize;
use ztunnel_mesh::model::identity::SpiffeId;

use crate::provider::provider;
use crate::trust::Trust;
use crate::validity::Validity;
use crate::verifiers::{Expected, SameTrustDomain};
use crate::verify::{self, ALPN, NotAccepted};

/// Why certificate, key and roots make no credentials.
#[derive(Debug, thiserror::Error)]
pub enum InvalidCredentials {
    /// There is no certificate, or one of the chain cannot be read.
    #[error("certificate {index} of the chain cannot be read")]
    Chain {
        /// Which, counted from 0, the workload's own.
        index: usize,
    },
    /// The certificate does not name a workload in the one accepted way.
    #[error("the certificate is not one of a workload")]
    NotAWorkload(#[source] NotAccepted),
    /// The certificate is somebody else's.
    #[error("asked for a certificate of {wanted}, got one of {issued}")]
    OtherIdentity {
        /// Who was to be certified.
        wanted: SpiffeId,
        /// Who was certified.
        issued: SpiffeId,
    },
    /// The key is not the certificate's, or of no supported kind.
    #[error("the private key does not fit the certificate")]
    Key(#[source] rustls::Error),
    /// The roots given with the certificate do not vouch for it, so no peer would accept it.
    #[error("the certificate chain does not lead to the given roots")]
    Untrusted(#[source] rustls::Error),
    /// There is no root.
    #[error("no root certificate was given")]
    NoRoots,
}

/// A private key, overwritten when it is not needed any more.
struct Secret(PrivateKeyDer<'static>);

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// The certificate of one workload with its key, chain and roots. Immutable: a renewal makes another one.
pub struct Credentials {
    identity: SpiffeId,
    key: Arc<CertifiedKey>,
    secret: Secret,
    roots: Arc<RootCertStore>,
    root_certificates: Arc<[CertificateDer<'static>]>,
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
    /// Seconds since the epoch from which every certificate of the chain is valid.
    complete_from: Duration,
    trust: Trust,
    server: Arc<ServerConfig>,
    /// Complete but for whom to expect: it accepts nobody.
    client: ClientConfig,
}

impl Credentials {
    /// Checks that the parts belong together: `chain` is leaf first, names exactly `identity`, and leads to
    /// `roots`; `key` is the leaf's.
    pub fn new(
        identity: SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: Arc<RootCertStore>,
    ) -> Result<Self, InvalidCredentials> {
        let leaf = chain.first().ok_or(InvalidCredentials::Chain { index: 0 })?;
        let issued = verify::identity_of(leaf).map_err(InvalidCredentials::NotAWorkload)?;
        if issued != identity {
            return Err(InvalidCredentials::OtherIdentity { wanted: identity, issued });
        }
        let Summary { serial, not_before, not_after, complete_from } = Summary::of(&chain)?;
        if roots.is_empty() {
            return Err(InvalidCredentials::NoRoots);
        }
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(leaf).map_err(InvalidCredentials::Untrusted)?,
            &roots,
            &chain[1..],
            // Not the time of day: whether the chain is complete does not depend on it.
            UnixTime::since_unix_epoch(complete_from),
            provider().signature_verification_algorithms.all,
        )
        .map_err(InvalidCredentials::Untrusted)?;
        let secret = Secret(key);
        let key = CertifiedKey::from_der(chain, secret.0.clone_key(), provider())
            .map_err(InvalidCredentials::Key)?;
        let (key, trust) = (Arc::new(key), Trust::of(&roots));
        Ok(Self {
            server: Arc::new(server(&identity, &key, &trust)),
            client: client(&key, &trust),
            trust,
            secret,
            identity,
            key,
            roots,
            root_certificates: Arc::from([]),
            serial,
            not_before,
            not_after,
            complete_from,
        })
    }

    /// The same, but peers are judged by `trust` instead of by the roots that came with the certificate.
    pub fn judged_by(self, trust: &Trust) -> Self {
        Self {
            server: Arc::new(server(&self.identity, &self.key, trust)),
            client: client(&self.key, trust),
            trust: trust.clone(),
            ..self
        }
    }

    /// Whether a peer that has no roots but these accepts the chain.
    pub fn leads_to(&self, roots: &RootCertStore) -> bool {
        let Some((leaf, intermediates)) = self.chain().split_first() else { return false };
        let verified = ParsedCertificate::try_from(leaf).and_then(|leaf| {
            verify_server_cert_signed_by_trust_anchor(
                &leaf,
                roots,
                intermediates,
                UnixTime::since_unix_epoch(self.complete_from),
                provider().signature_verification_algorithms.all,
            )
        });
        verified.is_ok()
    }

    /// Who is certified.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// The workload's certificate and the intermediates up to, but without, the root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// The private key, for the daemon that follows on this one.
    pub fn secret(&self) -> &PrivateKeyDer<'static> {
        &self.secret.0
    }

    /// The roots that came with the certificate.
    pub fn roots(&self) -> &Arc<RootCertStore> {
        &self.roots
    }

    /// The same credentials, with the certificates behind [`Self::roots`] to be shown to who asks: those are
    /// reduced to what verification needs.
    pub fn with_root_certificates(self, root_certificates: Arc<[CertificateDer<'static>]>) -> Self {
        Self { root_certificates, ..self }
    }

    /// The certificates of the roots, where they are known.
    pub fn root_certificates(&self) -> &[CertificateDer<'static>] {
        &self.root_certificates
    }

    /// From when the workload's certificate is valid.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// When the first certificate of the chain ends: from then on no peer accepts this chain.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// From when to when peers accept the chain: every certificate of it is valid then.
    pub fn validity(&self) -> Validity {
        Validity { from: SystemTime::UNIX_EPOCH + self.complete_from, until: self.not_after }
    }

    /// The serial number of the workload's certificate, as hexadecimal bytes joined by colons.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// The server side of a tunnel: TLS 1.3, `h2`, a client certificate of the same trust domain is required,
    /// nothing can be resumed.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// The client side of a tunnel: TLS 1.3, `h2`, no server name sent, nothing resumed, and the server must be
    /// one of `expect`; nobody is, if `expect` is empty.
    pub fn client_config(&self, expect: &[SpiffeId]) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        config.dangerous().set_certificate_verifier(Arc::new(Expected {
            trust: self.trust.clone(),
            expected: Arc::from(expect),
        }));
        Arc::new(config)
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("identity", &self.identity)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

fn server(identity: &SpiffeId, key: &Arc<CertifiedKey>, trust: &Trust) -> ServerConfig {
    let verifier = SameTrustDomain { trust: trust.clone(), own: identity.clone() };
    let mut config = ServerConfig::builder_with_provider(Arc::clone(provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("the provider's suites are those of TLS 1.3")
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(key))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    // A resumed session would carry yesterday's verification of the peer.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config
}

fn client(key: &Arc<CertifiedKey>, trust: &Trust) -> ClientConfig {
    let nobody = Expected { trust: trust.clone(), expected: Arc::from([]) };
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("the provider's suites are those of TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(nobody))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(key))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    config
}

/// What is told about a chain without verifying it.
struct Summary {
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
    /// Seconds since the epoch from which every certificate of the chain is valid.
    complete_from: Duration,
}

impl Summary {
    fn of(chain: &[CertificateDer<'_>]) -> Result<Self, InvalidCredentials> {
        let mut summary: Option<Self> = None;
        for (index, der) in chain.iter().enumerate() {
            let unreadable = |_| InvalidCredentials::Chain { index };
            let (_, certificate) = X509Certificate::from_der(der).map_err(unreadable)?;
            // Dates before 1970 say "always valid" well enough as 1970.
            let since = |time: x509_parser::time::ASN1Time| {
                Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
            };
            let (from, until) =
                (since(certificate.validity().not_before), since(certificate.validity().not_after));
            match &mut summary {
                None => {
                    summary = Some(Self {
                        serial: certificate.raw_serial_as_string(),
                        not_before: SystemTime::UNIX_EPOCH + from,
                        not_after: SystemTime::UNIX_EPOCH + until,
                        complete_from: from,
                    });
                }
                Some(summary) => {
                    summary.not_after = summary.not_after.min(SystemTime::UNIX_EPOCH + until);
                    summary.complete_from = summary.complete_from.max(from);
                }
            }
        }
        summary.ok_or(InvalidCredentials::Chain { index: 0 })
    }
}
