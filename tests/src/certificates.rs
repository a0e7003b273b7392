//! Certificates signed with the demo's own root, good and bad ones, and what a daemon says to who shows one.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};
use time::{Duration, OffsetDateTime};

use crate::poll::PATIENCE;

/// A root that signs.
#[derive(Debug)]
pub struct Signer(Issuer<'static, KeyPair>, String);

/// A certificate with its key.
#[derive(Debug)]
pub struct Signed {
    /// The certificate alone.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// The same as PEM.
    pub chain_pem: String,
    /// The same as PEM.
    pub key_pem: String,
}

impl Signer {
    /// The root of the embedded authority, from its directory.
    pub fn of_mesh(state: &Path) -> Result<Self> {
        let read = |name: &str| {
            std::fs::read_to_string(state.join(name))
                .with_context(|| format!("{name} in {}", state.display()))
        };
        let (certificate, key) = (read("root-cert.pem")?, read("root-key.pem")?);
        Ok(Self(Issuer::from_ca_cert_pem(&certificate, KeyPair::from_pem(&key)?)?, certificate))
    }

    /// A root nobody trusts.
    pub fn stranger() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self(Issuer::new(params, key), certificate))
    }

    /// The root itself.
    pub fn root_pem(&self) -> &str {
        &self.1
    }

    /// A certificate with these URIs, good for an hour.
    pub fn sign(&self, uris: &[&str]) -> Result<Signed> {
        let now = OffsetDateTime::now_utc();
        self.sign_for(uris, now - Duration::minutes(5), now + Duration::hours(1))
    }

    /// A certificate that was good until an hour ago.
    pub fn sign_expired(&self, uris: &[&str]) -> Result<Signed> {
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

/// A client's configuration that believes every server and shows this certificate, if any.
pub fn gullible(own: Option<Signed>, alpn: &[&str]) -> Result<ClientConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible(provider)));
    let mut config = match own {
        Some(own) => builder.with_client_auth_cert(own.chain, own.key)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(config)
}

/// Shows a certificate at the tunnels' port and waits for the first byte of HTTP/2: whoever is not let in gets none.
/// An error has the alert in it.
pub fn let_in(to: SocketAddr, own: Option<Signed>) -> Result<()> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE).context("connect")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let client =
        ClientConnection::new(Arc::new(gullible(own, &["h2"])?), ServerName::try_from("hbone.invalid")?)?;
    let mut first = [0; 1];
    StreamOwned::new(client, stream).read_exact(&mut first)?;
    Ok(())
}

/// Believes every server.
#[derive(Debug)]
struct Gullible(Arc<CryptoProvider>);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
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
