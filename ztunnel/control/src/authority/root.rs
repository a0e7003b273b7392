//! The root key and certificate in the state directory: made once, under a lock, and checked at every start.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use nix::unistd::geteuid;
use rcgen::string::Ia5String;
use rcgen::{Issuer, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::time::Instant;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use ztunnel_mesh::model::identity::TrustDomain;

use crate::authority::{AuthorityError, SKEW, authority};

/// The root's private key, PKCS#8.
const KEY: &str = "root-key.pem";
/// The root's certificate; further ones after it are trusted too, as those of an old root or one to come.
pub(super) const CERTIFICATE: &str = "root-cert.pem";
/// Held while root files are looked for and made. Empty, and never removed: a removed lock locks nobody out.
const LOCK: &str = "root.lock";

/// How long it is waited for: another daemon that makes a root holds it for some milliseconds.
const LOCK_WITHIN: Duration = Duration::from_secs(10);
/// How often it is tried.
const LOCK_AGAIN: Duration = Duration::from_millis(20);

/// Ten years: to replace a root means to touch every node.
const LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// With less than this left, every start says so.
const LEFT_MIN: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// No key or certificate is larger.
const FILE_MAX: u64 = 64 * 1024;

/// The root of one trust domain.
pub(super) struct Root {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    others: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

impl Root {
    /// Opens the root in `dir`, or makes both if there is none.
    pub(super) fn open(
        dir: &Path,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|source| failed(dir, "made", source))?;
        let metadata = fs::metadata(dir).map_err(|source| failed(dir, "looked at", source))?;
        private(dir, &metadata, 0o022, "chmod go-w")?;

        let _lock = lock(&dir.join(LOCK))?;
        let (key, mut certificates) = Self::find_or_make(dir, trust_domain, now)?;
        let certificate = certificates.remove(0);
        Self::check(dir, key, (certificate, certificates), trust_domain, now)
    }

    /// The certificate, to be trusted by all nodes.
    #[cfg(test)]
    pub(super) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// What to trust: the own certificate, and the others in its file.
    pub(super) fn trusted(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        std::iter::once(&self.certificate).chain(&self.others)
    }

    /// Signs intermediates.
    pub(super) fn issuer(&self) -> &Issuer<'static, KeyPair> {
        &self.issuer
    }

    /// When it ends.
    pub(super) fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Reads the files; the lock is held. The key is written first, so a certificate without a key is no trace of
    /// an interrupted start, but a loss. A key without a certificate is either, and the certificate made anew from
    /// it (same name, same key) is as good as the lost one.
    fn find_or_make(
        dir: &Path,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<(KeyPair, Vec<CertificateDer<'static>>), AuthorityError> {
        let (key_path, certificate_path) = (dir.join(KEY), dir.join(CERTIFICATE));
        let unusable = |path: &Path, problem: &str| AuthorityError::Unusable {
            path: path.to_owned(),
            problem: problem.to_owned(),
        };
        let key = match read(&key_path, Some((0o077, "chmod 600")))? {
            Some(pem) => Some(
                KeyPair::from_pem(&pem)
                    .map_err(|_| unusable(&key_path, "holds no usable private key (PKCS#8)"))?,
            ),
            None => None,
        };
        let certificates = match read(&certificate_path, None)? {
            Some(pem) => {
                match CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>() {
                    Ok(certificates) if !certificates.is_empty() => Some(certificates),
                    _ => return Err(unusable(&certificate_path, "holds no certificate")),
                }
            }
            None => None,
        };
        match (key, certificates) {
            (Some(key), Some(certificates)) => Ok((key, certificates)),
            (None, Some(_)) => Err(unusable(&key_path, "is missing, while root-cert.pem is there")),
            (key, None) => {
                let key = match key {
                    Some(key) => key,
                    None => {
                        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
                            .map_err(AuthorityError::Signing)?;
                        write(&key_path, 0o600, &key.serialize_pem())?;
                        key
                    }
                };
                let certificate = self_signed(&key, trust_domain, now).map_err(AuthorityError::Signing)?;
                write(&certificate_path, 0o644, &certificate.pem())?;
                tracing::info!(path = %certificate_path.display(), %trust_domain, "root certificate made");
                Ok((key, vec![certificate.into()]))
            }
        }
    }

    fn check(
        dir: &Path,
        key: KeyPair,
        (certificate, others): (CertificateDer<'static>, Vec<CertificateDer<'static>>),
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        let path = dir.join(CERTIFICATE);
        let unusable = |problem: String| AuthorityError::Unusable { path: path.clone(), problem };
        let (_, parsed) = X509Certificate::from_der(&certificate)
            .map_err(|_| unusable("holds no readable certificate".to_owned()))?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(AuthorityError::Mismatch { path: dir.to_owned() });
        }
        let may_sign = matches!(parsed.basic_constraints(), Ok(Some(constraints))
            // Room for the intermediate.
            if constraints.value.ca && constraints.value.path_len_constraint != Some(0));
        if !may_sign {
            return Err(unusable("is not the certificate of a root that has intermediates".to_owned()));
        }
        let since = |timestamp: i64| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(timestamp).unwrap_or_default())
        };
        let not_before = since(parsed.validity().not_before.timestamp());
        let not_after = since(parsed.validity().not_after.timestamp());
        if now < not_before {
            return Err(unusable("is not valid yet (is this node's clock right?)".to_owned()));
        }
        if now >= not_after {
            return Err(unusable("has expired (is this node's clock right?)".to_owned()));
        }
        if let Some(found) = trust_domain_of(&parsed).filter(|found| found != trust_domain.as_str()) {
            return Err(AuthorityError::TrustDomain {
                path: dir.to_owned(),
                found,
                wanted: trust_domain.clone(),
            });
        }
        if now + LEFT_MIN > not_after {
            tracing::warn!(path = %path.display(), "the root certificate ends in less than 90 days");
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(AuthorityError::Signing)?;
        Ok(Self { issuer, certificate, others, not_after })
    }
}

/// Released when the file is closed, also by a crash. None where nothing can be made anyway: a root that is there is
/// good without.
fn lock(path: &Path) -> Result<Option<File>, AuthorityError> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true).mode(0o600).custom_flags(libc::O_NONBLOCK);
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => return Ok(None),
        Err(source) => return Err(failed(path, "opened", source)),
    };
    if !file.metadata().map_err(|source| failed(path, "looked at", source))?.is_file() {
        let what = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
        return Err(failed(path, "locked", what));
    }
    let begun = Instant::now();
    let mut said = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::Error(source)) => return Err(failed(path, "locked", source)),
            Err(TryLockError::WouldBlock) if begun.elapsed() >= LOCK_WITHIN => {
                let (path, seconds) = (path.to_owned(), LOCK_WITHIN.as_secs());
                return Err(AuthorityError::Locked { path, seconds });
            }
            Err(TryLockError::WouldBlock) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(path = %path.display(), "another process holds the lock of the root: waiting");
                }
                std::thread::sleep(LOCK_AGAIN);
            }
        }
    }
}

fn self_signed(
    key: &KeyPair,
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<rcgen::Certificate, rcgen::Error> {
    // With a part of the key's digest, so that two roots of one trust domain are told apart by name: a peer then
    // reads "unknown issuer", not "bad signature".
    let digest = digest(&SHA256, key.public_key_raw());
    let fingerprint: String = digest.as_ref().iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let name = format!("root {fingerprint} of {trust_domain}");
    let mut params = authority(&name, 1, now - SKEW, now + LIFE);
    // SPIFFE X509-SVID, section 2: what signs should name its trust domain.
    params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(format!("spiffe://{trust_domain}"))?)];
    params.self_signed(key)
}

/// The trust domain a root names, if it names one.
fn trust_domain_of(root: &X509Certificate<'_>) -> Option<String> {
    let names = root.subject_alternative_name().ok().flatten()?;
    names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix("spiffe://").map(str::to_owned),
        _ => None,
    })
}

fn failed(path: &Path, doing: &'static str, source: io::Error) -> AuthorityError {
    AuthorityError::File { path: path.to_owned(), doing, source }
}

/// Refuses what others may access in the ways of `forbidden`, or own.
fn private(path: &Path, metadata: &fs::Metadata, forbidden: u32, remedy: &str) -> Result<(), AuthorityError> {
    let mode = metadata.mode() & 0o7777;
    if mode & forbidden != 0 {
        let remedy = format!("{remedy} {}", path.display());
        return Err(AuthorityError::Exposed { path: path.to_owned(), mode, remedy });
    }
    let owner = metadata.uid();
    if owner != 0 && owner != geteuid().as_raw() {
        return Err(AuthorityError::Owner { path: path.to_owned(), owner });
    }
    Ok(())
}

/// The text of a file, or nothing if there is no such file. Permissions are those of the file that is read.
fn read(path: &Path, permissions: Option<(u32, &str)>) -> Result<Option<String>, AuthorityError> {
    // Opening a pipe would wait for its writer.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed(path, "opened", source)),
    };
    let metadata = file.metadata().map_err(|source| failed(path, "looked at", source))?;
    if !metadata.is_file() {
        let what = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
        return Err(failed(path, "read", what));
    }
    if let Some((forbidden, remedy)) = permissions {
        private(path, &metadata, forbidden, remedy)?;
    }
    let mut text = String::new();
    file.take(FILE_MAX).read_to_string(&mut text).map_err(|source| failed(path, "read", source))?;
    Ok(Some(text))
}

/// Puts a whole file in place, or nothing: written aside, synced, renamed.
fn write(path: &Path, mode: u32, text: &str) -> Result<(), AuthorityError> {
    let aside = PathBuf::from(format!("{}.new", path.display()));
    let placed = || -> io::Result<()> {
        // What an interrupted start left, perhaps with other permissions.
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().create_new(true).write(true).mode(mode).open(&aside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&aside, path)?;
        match path.parent() {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    };
    placed().map_err(|source| failed(path, "written", source))
}
