//! Certificates signed with the demo's own root, good and bad ones.

use std::path::Path;

use anyhow::{Context, Result};
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use time::{Duration, OffsetDateTime};

/// A root that signs.
pub(crate) struct Signer(Issuer<'static, KeyPair>, String);

/// A certificate with its key.
pub(crate) struct Signed {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) chain_pem: String,
    pub(crate) key_pem: String,
}

impl Signer {
    /// The root of the embedded authority, from its directory.
    pub(crate) fn of_mesh(state: &Path) -> Result<Self> {
        let read = |name: &str| {
            std::fs::read_to_string(state.join(name))
                .with_context(|| format!("{name} in {}", state.display()))
        };
        let (certificate, key) = (read("root-cert.pem")?, read("root-key.pem")?);
        Ok(Self(Issuer::from_ca_cert_pem(&certificate, KeyPair::from_pem(&key)?)?, certificate))
    }

    /// A root nobody trusts.
    pub(crate) fn stranger() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self(Issuer::new(params, key), certificate))
    }

    /// The root itself.
    pub(crate) fn root_pem(&self) -> &str {
        &self.1
    }

    /// A certificate with these URIs, good for an hour.
    pub(crate) fn sign(&self, uris: &[&str]) -> Result<Signed> {
        let now = OffsetDateTime::now_utc();
        self.sign_for(uris, now - Duration::minutes(5), now + Duration::hours(1))
    }

    /// A certificate that was good until an hour ago.
    pub(crate) fn sign_expired(&self, uris: &[&str]) -> Result<Signed> {
        let now = OffsetDateTime::now_utc();
        self.sign_for(uris, now - Duration::hours(3), now - Duration::hours(1))
    }

    fn sign_for(&self, uris: &[&str], from: OffsetDateTime, until: OffsetDateTime) -> Result<Signed> {
        let mut params = CertificateParams::default();
        // The default name is the root's, too, and would make it look signed by itself.
        params.distinguished_name = rcgen::DistinguishedName::new();
        for uri in uris {
            params.subject_alt_names.push(SanType::URI(Ia5String::try_from(*uri)?));
        }
        (params.not_before, params.not_after) = (from, until);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.0)?;
        let key_pem = key.serialize_pem();
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        Ok(Signed { chain: vec![certificate.der().clone()], key, chain_pem: certificate.pem(), key_pem })
    }
}
