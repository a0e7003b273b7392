//! Certificates for tests, good ones and every kind of bad one.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, CustomExtension,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::ClientConfig;
use rustls::ClientConnection;
use rustls::RootCertStore;
use rustls::ServerConfig;
use rustls::ServerConnection;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use x509_parser::prelude::{FromDer, X509Certificate};
use ztunnel_mesh::model::identity::SpiffeId;

use crate::configs::Credentials;

/// A root with one intermediate.
pub struct Pki {
    root: CertifiedIssuer<'static, KeyPair>,
    intermediate: CertifiedIssuer<'static, KeyPair>,
    /// Root and intermediate as issuers of lists, whether their certificates allow it or not.
    listing: [Issuer<'static, KeyPair>; 2],
}

/// What a leaf says. Starts as a good one.
pub struct Leaf {
    pub names: Vec<SanType>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub uses: Vec<ExtendedKeyUsagePurpose>,
    pub key_uses: Vec<KeyUsagePurpose>,
    pub extensions: Vec<CustomExtension>,
}

impl Leaf {
    /// An hour old, with a day to go.
    pub fn of(id: &str) -> Self {
        let hour = Duration::from_secs(3600);
        let now = SystemTime::now();
        Self {
            names: vec![uri(id)],
            not_before: now - hour,
            not_after: now + 24 * hour,
            uses: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            key_uses: vec![KeyUsagePurpose::DigitalSignature],
            extensions: Vec::new(),
        }
    }
}

/// A URI as alternative name, whatever it contains.
pub fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().expect("tests use ASCII"))
}

/// A parsed identity.
pub fn id(text: &str) -> SpiffeId {
    text.parse().expect("tests use good identities")
}

impl Default for Pki {
    fn default() -> Self {
        Self::new()
    }
}

impl Pki {
    /// A new root and intermediate, trusted by nobody yet.
    pub fn new() -> Self {
        Self::named("root")
    }

    /// [`Pki::new`] with a root of this name.
    pub fn named(name: &str) -> Self {
        // rcgen's own end, far off.
        Self::with(name, CertificateParams::default().not_after.into())
    }

    /// [`Pki::named`] with an intermediate that ends then.
    pub fn with(name: &str, intermediate_ends: SystemTime) -> Self {
        Self::made(name, intermediate_ends, vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign])
    }

    /// [`Pki::new`] with signing certificates for these uses.
    pub fn signing_with(uses: Vec<KeyUsagePurpose>) -> Self {
        Self::made("root", CertificateParams::default().not_after.into(), uses)
    }

    fn made(name: &str, intermediate_ends: SystemTime, uses: Vec<KeyUsagePurpose>) -> Self {
        let certify = |uses: &[KeyUsagePurpose], mut params: CertificateParams| {
            params.key_usages = uses.to_vec();
            params
        };
        let key = || KeyPair::generate().expect("a key can be made");
        let copy = |key: &KeyPair| KeyPair::try_from(key.serialize_der()).expect("a key can be copied");
        let listing = |params: &CertificateParams, key: &KeyPair| {
            let uses = [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            Issuer::new(certify(&uses, params.clone()), copy(key))
        };
        let (root, root_key) = (certify(&uses, signing(name, 1)), key());
        let mut node = certify(&uses, signing("node", 0));
        node.not_after = intermediate_ends.into();
        let node_key = key();
        let listing = [listing(&root, &root_key), listing(&node, &node_key)];
        let root = CertifiedIssuer::self_signed(root, root_key).expect("a root can be made");
        let intermediate = CertifiedIssuer::signed_by(node, node_key, &root).expect("the root may sign");
        Self { root, intermediate, listing }
    }

    /// The root, as trust anchor.
    pub fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.der().clone()).expect("the root is a certificate");
        Arc::new(roots)
    }

    /// A list of the intermediate that names these, as PEM.
    pub fn revoking(&self, certificates: &[&CertificateDer<'_>]) -> Vec<u8> {
        revoking(&self.listing[1], certificates)
    }

    /// A list of the root that names the intermediate, as PEM.
    pub fn revoking_intermediate(&self) -> Vec<u8> {
        revoking(&self.listing[0], &[self.intermediate.der()])
    }

    /// A certificate chain and its key.
    pub fn certify(&self, leaf: Leaf) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = leaf.names;
        params.not_before = leaf.not_before.into();
        params.not_after = leaf.not_after.into();
        params.extended_key_usages = leaf.uses;
        params.key_usages = leaf.key_uses;
        params.custom_extensions = leaf.extensions;
        let key = KeyPair::generate().expect("a key can be made");
        let certificate = params.signed_by(&key, &self.intermediate).expect("the intermediate may sign");
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        (vec![certificate.into(), self.intermediate.der().clone()], key)
    }

    /// Good credentials, of the given validity.
    pub fn credentials(&self, id: &SpiffeId, not_before: SystemTime, not_after: SystemTime) -> Credentials {
        let (chain, key) = self.certify(Leaf { not_before, not_after, ..Leaf::of(id.as_str()) });
        Credentials::new(id.clone(), chain, key, self.roots()).expect("the parts fit together")
    }
}

fn revoking(issuer: &Issuer<'static, KeyPair>, certificates: &[&CertificateDer<'_>]) -> Vec<u8> {
    let now = SystemTime::now();
    let serial = |der: &CertificateDer<'_>| {
        let (_, certificate) = X509Certificate::from_der(der).expect("tests use certificates");
        SerialNumber::from_slice(certificate.raw_serial())
    };
    let revoked = |der: &&CertificateDer<'_>| RevokedCertParams {
        serial_number: serial(der),
        revocation_time: now.into(),
        reason_code: None,
        invalidity_date: None,
    };
    let list = CertificateRevocationListParams {
        this_update: now.into(),
        next_update: (now + Duration::from_secs(3600)).into(),
        crl_number: SerialNumber::from(1_u64),
        issuing_distribution_point: None,
        revoked_certs: certificates.iter().map(revoked).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let list = list.signed_by(issuer).expect("the issuer may sign");
    list.pem().expect("a list can be written").into_bytes()
}

fn signing(name: &str, path_length: u8) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

/// What became of a handshake, seen from both sides.
#[derive(Debug)]
pub struct Outcome {
    pub client: Result<ClientConnection, rustls::Error>,
    pub server: Result<ServerConnection, rustls::Error>,
}

/// Lets both sides talk until nothing moves any more.
pub fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Outcome {
    let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
    let mut client = ClientConnection::new(client, name).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    let (mut client_result, mut server_result) = (Ok(()), Ok(()));
    // A side that has failed still sends its alert; then nothing moves any more.
    for _ in 0..10 {
        let (to_client, to_server) = (flow(&mut server, &mut client), flow(&mut client, &mut server));
        client_result = client_result.and(to_client);
        server_result = server_result.and(to_server);
    }
    Outcome { client: client_result.map(|()| client), server: server_result.map(|()| server) }
}

fn flow(from: &mut impl Side, to: &mut impl Side) -> Result<(), rustls::Error> {
    let mut wire = Vec::new();
    from.write(&mut wire);
    to.read(&wire)
}

/// One side of a handshake in memory.
pub trait Side {
    /// Appends what it wants to send.
    fn write(&mut self, wire: &mut Vec<u8>);
    /// Takes what the other side has sent.
    fn read(&mut self, wire: &[u8]) -> Result<(), rustls::Error>;
}

macro_rules! side {
    ($connection:ty) => {
        impl Side for $connection {
            fn write(&mut self, wire: &mut Vec<u8>) {
                while self.wants_write() {
                    self.write_tls(wire).unwrap();
                }
            }

            fn read(&mut self, mut wire: &[u8]) -> Result<(), rustls::Error> {
                while !wire.is_empty() {
                    self.read_tls(&mut wire).unwrap();
                    self.process_new_packets()?;
                }
                Ok(())
            }
        }
    };
}
side!(ClientConnection);
side!(ServerConnection);
