//! The built-in certificate authority.
//!
//! Three levels, as SPIFFE recommends: a *root* that lives in the state directory and is all that nodes must
//! share, an *intermediate* per node that never leaves its memory, and the workloads' *leaves*, valid for a day.
//! A root belongs to one trust domain, named by the URI in its certificate; a root from elsewhere that names none
//! serves any. Does not decide who asks: that is the daemon's.
//!
//! A root is replaced without an outage in three rounds over all nodes, each with a restart: append the new
//! certificate to `root-cert.pem`; put the new key in place and the new certificate first; remove the old one.

mod root;

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::{self, BoxFuture, FutureExt};
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use ztunnel_mesh::model::identity::{SpiffeId, TrustDomain};
use ztunnel_tls::ca::{CertificateAuthority, IssueError};
use ztunnel_tls::configs::Credentials;
use ztunnel_tls::validity::Validity;

use crate::authority::root::Root;

/// A workload's certificate is valid for so long, Istio's default.
const LEAF_LIFE: Duration = Duration::from_secs(24 * 60 * 60);
/// A node's intermediate is valid for so long.
const INTERMEDIATE_LIFE: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// With less than this left, a node makes itself a new intermediate, so that no leaf is cut short.
const INTERMEDIATE_LEFT_MIN: Duration = Duration::from_secs(2 * 24 * 60 * 60);
/// Validity begins so long before now, for nodes whose clock is behind. Istio's authority does the same.
const SKEW: Duration = Duration::from_secs(2 * 60);

/// Why there is no authority. Every message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file or the directory cannot be used.
    #[error("{} cannot be {doing}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What was tried, as a participle: "read".
        doing: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Somebody has it for longer than anybody should.
    #[error(
        "{0} has been locked by another process for {seconds} s (`fuser {0}` names it): end that, and start again",
        path.display()
    )]
    Locked {
        /// The lock.
        path: PathBuf,
        /// How long it was waited for.
        seconds: u64,
    },
    /// Others may read the key, or put another in its place.
    #[error("{} is open to others (mode {mode:04o}): {remedy}", path.display())]
    Exposed {
        /// The key or its directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// What closes it.
        remedy: String,
    },
    /// The key is somebody else's, who could change it.
    #[error("{} belongs to user {owner}: make it belong to the user who runs the daemon (chown)", path.display())]
    Owner {
        /// The key or its directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// One of the two files is gone or cannot be understood.
    #[error(
        "{} {problem}: bring it back from a backup, or move both root-key.pem and root-cert.pem away to begin \
         with a new root (which workloads on other nodes will not trust)", path.display()
    )]
    Unusable {
        /// The key or certificate.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The two files are not of one root.
    #[error(
        "root-key.pem and root-cert.pem in {} are not a pair: bring both back from the same backup, or move both \
         away to begin with a new root (which workloads on other nodes will not trust)", path.display()
    )]
    Mismatch {
        /// The state directory.
        path: PathBuf,
    },
    /// The root was made for another trust domain.
    #[error(
        "the root in {} is of trust domain {found}, the mesh is of {wanted}: use another state directory, or \
         name the root's trust domain in the mesh", path.display()
    )]
    TrustDomain {
        /// The state directory.
        path: PathBuf,
        /// Of the root.
        found: String,
        /// Of the mesh.
        wanted: TrustDomain,
    },
    /// A key or certificate could not be made.
    #[error("a certificate could not be made")]
    Signing(#[source] rcgen::Error),
}

/// An authority for the workloads of one node. Issues without asking anybody.
pub struct Authority {
    root: Root,
    roots: Arc<RootCertStore>,
    root_certificates: Arc<[CertificateDer<'static>]>,
    node: String,
    intermediate: Mutex<Arc<Intermediate>>,
}

/// Signs for one node; made anew at every start.
struct Intermediate {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    validity: Validity,
}

impl Authority {
    /// Opens the root in `state_dir`, or makes directory and root if there is none. Several daemons may do so at
    /// once and get the same root. `node` is the name in the intermediate's certificate. Blocks for file access.
    pub fn open(state_dir: &Path, node: &str, trust_domain: &TrustDomain) -> Result<Self, AuthorityError> {
        Self::open_at(state_dir, node, trust_domain, SystemTime::now())
    }

    fn open_at(
        state_dir: &Path,
        node: &str,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        let root = Root::open(state_dir, trust_domain, now)?;
        let intermediate = Intermediate::new(&root, node, now).map_err(AuthorityError::Signing)?;
        let mut roots = RootCertStore::empty();
        for certificate in root.trusted() {
            roots.add(certificate.clone()).map_err(|error| AuthorityError::Unusable {
                path: state_dir.join(root::CERTIFICATE),
                problem: format!("holds a certificate that is no root's ({error})"),
            })?;
        }
        Ok(Self {
            root_certificates: root.trusted().cloned().collect(),
            root,
            roots: Arc::new(roots),
            node: node.to_owned(),
            intermediate: Mutex::new(Arc::new(intermediate)),
        })
    }

    fn issue_at(&self, identity: &SpiffeId, now: SystemTime) -> Result<Credentials, IssueError> {
        let intermediate = self.intermediate(now).map_err(signing)?;
        let (not_before, not_after) = (now - SKEW, (now + LEAF_LIFE).min(intermediate.validity.until));
        if not_after <= now {
            return Err(IssueError::Refused { reason: "the root certificate has expired".to_owned() });
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(signing)?;
        let leaf = leaf(identity, not_before, not_after)
            .and_then(|params| params.signed_by(&key, &intermediate.issuer))
            .map_err(signing)?;
        let chain = vec![leaf.into(), intermediate.certificate.clone()];
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let credentials = Credentials::new(identity.clone(), chain, key, Arc::clone(&self.roots))?;
        Ok(credentials.with_root_certificates(Arc::clone(&self.root_certificates)))
    }

    /// The node's intermediate, replaced when it has not much longer to go and the root allows for more, and when the
    /// clock was set back to before it: nobody would accept what it signs.
    fn intermediate(&self, now: SystemTime) -> Result<Arc<Intermediate>, rcgen::Error> {
        // The value is replaced as a whole, so a panic elsewhere leaves it good.
        let mut held = self.intermediate.lock();
        let until = held.validity.until;
        let ends = until < now + INTERMEDIATE_LEFT_MIN && until < self.root.not_after();
        if ends || held.validity.is_ahead(now) {
            *held = Arc::new(Intermediate::new(&self.root, &self.node, now)?);
        }
        Ok(Arc::clone(&held))
    }
}

impl CertificateAuthority for Authority {
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Credentials, IssueError>> {
        // About 0.2 ms of arithmetic, without anything to wait for.
        future::lazy(|_| self.issue_at(identity, SystemTime::now())).boxed()
    }
}

fn signing(error: impl Error + Send + Sync + 'static) -> IssueError {
    IssueError::Signing(Box::new(error))
}

impl Intermediate {
    fn new(root: &Root, node: &str, now: SystemTime) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let not_after = (now + INTERMEDIATE_LIFE).min(root.not_after());
        let validity = Validity { from: now - SKEW, until: not_after };
        let mut params = authority(node, 0, validity.from, validity.until);
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, root.issuer())?.into();
        Ok(Self { issuer: Issuer::new(params, key), certificate, validity })
    }
}

/// What a certificate that signs says: `common_name`, and how many further levels may sign below it.
fn authority(
    common_name: &str,
    path_length: u8,
    not_before: SystemTime,
    not_after: SystemTime,
) -> CertificateParams {
    let mut params = bare(not_before, not_after);
    params.distinguished_name.push(DnType::OrganizationName, "ztunnel");
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// What a workload's certificate says (SPIFFE X509-SVID): no subject, so the one URI is critical.
fn leaf(
    identity: &SpiffeId,
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = bare(not_before, not_after);
    params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn bare(not_before: SystemTime, not_after: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = OffsetDateTime::from(not_before);
    params.not_after = OffsetDateTime::from(not_after);
    // 126 random bits (RFC 5280, section 4.1.2.2: positive, at most 20 bytes), always of the same length.
    let mut serial: [u8; 16] = rand::random();
    serial[0] = serial[0] & 0x3f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params
}

#[cfg(test)]
mod tests;
