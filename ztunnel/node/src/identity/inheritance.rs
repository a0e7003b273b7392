//! The certificates a daemon leaves to the one after it, as bytes: without them a restart while the authority is away
//! would leave every workload of the node without one.
//!
//! They hold private keys. They go from process to process (see `app::handover`), to a disk only if an operator wants
//! that ([`crate::identity::kept`]), and what is received is checked as if the authority had sent it.

use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::TrustAnchor;
use zeroize::Zeroizing;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_tls::configs::Credentials;

/// What the bytes begin with: another version is not understood.
const MAGIC: &[u8] = b"ztunnel credentials 2\n";
/// The version before, in which there were no certificates of roots.
const WITHOUT_ROOT_CERTIFICATES: &[u8] = b"ztunnel credentials 1\n";

/// Not what an earlier daemon of this version would leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the earlier daemon's certificates cannot be read")]
pub struct Unreadable;

/// Writes certificates with their keys.
pub fn encode(all: &[Arc<Credentials>]) -> Zeroizing<Vec<u8>> {
    let mut out = Zeroizing::new(MAGIC.to_vec());
    count(&mut out, all.len());
    for credentials in all {
        piece(&mut out, credentials.identity().as_str().as_bytes());
        piece(&mut out, credentials.secret().secret_der());
        count(&mut out, credentials.chain().len());
        for certificate in credentials.chain() {
            piece(&mut out, certificate);
        }
        count(&mut out, credentials.roots().len());
        for root in &credentials.roots().roots {
            piece(&mut out, &root.subject);
            piece(&mut out, &root.subject_public_key_info);
            let constraints = root.name_constraints.as_deref();
            count(&mut out, constraints.iter().len());
            constraints.iter().for_each(|constraints| piece(&mut out, constraints));
        }
        count(&mut out, credentials.root_certificates().len());
        for certificate in credentials.root_certificates() {
            piece(&mut out, certificate);
        }
    }
    out
}

/// Reads what [`encode`] wrote. Single certificates that are no good are passed over, and said.
pub fn decode(bytes: &[u8]) -> Result<Vec<Credentials>, Unreadable> {
    let (bytes, with_root_certificates) = match bytes.strip_prefix(MAGIC) {
        Some(bytes) => (bytes, true),
        None => (bytes.strip_prefix(WITHOUT_ROOT_CERTIFICATES).ok_or(Unreadable)?, false),
    };
    let mut rest = Reader(bytes);
    let mut all = Vec::new();
    for _ in 0..rest.count()? {
        let identity = std::str::from_utf8(rest.piece()?).map_err(|_| Unreadable)?;
        let identity: SpiffeId = identity.parse().map_err(|_| Unreadable)?;
        let key = PrivateKeyDer::try_from(rest.piece()?.to_vec()).map_err(|_| Unreadable)?;
        let mut chain = Vec::new();
        for _ in 0..rest.count()? {
            chain.push(CertificateDer::from(rest.piece()?.to_vec()));
        }
        let mut roots = RootCertStore::empty();
        for _ in 0..rest.count()? {
            roots.roots.push(TrustAnchor {
                subject: rest.piece()?.to_vec().into(),
                subject_public_key_info: rest.piece()?.to_vec().into(),
                name_constraints: match rest.count()? {
                    0 => None,
                    1 => Some(rest.piece()?.to_vec().into()),
                    _ => return Err(Unreadable),
                },
            });
        }
        let mut root_certificates = Vec::new();
        let shown = if with_root_certificates { rest.count()? } else { 0 };
        for _ in 0..shown {
            root_certificates.push(CertificateDer::from(rest.piece()?.to_vec()));
        }
        match Credentials::new(identity.clone(), chain, key, Arc::new(roots)) {
            Ok(credentials) => all.push(credentials.with_root_certificates(root_certificates.into())),
            Err(error) => {
                tracing::warn!(%identity, %error, "an earlier daemon's certificate is not taken over")
            }
        }
    }
    if rest.0.is_empty() { Ok(all) } else { Err(Unreadable) }
}

fn count(out: &mut Vec<u8>, count: usize) {
    out.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
}

fn piece(out: &mut Vec<u8>, bytes: &[u8]) {
    count(out, bytes.len());
    out.extend_from_slice(bytes);
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn count(&mut self) -> Result<usize, Unreadable> {
        let (count, rest) = self.0.split_first_chunk().ok_or(Unreadable)?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*count) as usize)
    }

    fn piece(&mut self) -> Result<&'a [u8], Unreadable> {
        let length = self.count()?;
        let (piece, rest) = self.0.split_at_checked(length).ok_or(Unreadable)?;
        self.0 = rest;
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;
    use std::time::SystemTime;

    use ztunnel_tls::testing::Pki;
    use ztunnel_tls::testing::handshake;
    use ztunnel_tls::testing::id;

    use super::*;

    fn two(pki: &Pki) -> Vec<Arc<Credentials>> {
        let now = SystemTime::now();
        let hour = Duration::from_secs(3600);
        let credentials = |name: &str| {
            let id = id(&format!("spiffe://td.example/ns/shop/sa/{name}"));
            let credentials = pki.credentials(&id, now - hour, now + hour);
            // Any certificates do, as they are only shown.
            let shown = credentials.chain().to_vec();
            credentials.with_root_certificates(shown.into())
        };
        vec![Arc::new(credentials("a")), Arc::new(credentials("b"))]
    }

    #[test]
    fn what_is_left_can_be_used_as_it_was() {
        let left = two(&Pki::new());
        let taken = decode(&encode(&left)).unwrap();
        assert_eq!(taken.len(), 2);
        for (taken, left) in taken.iter().zip(&left) {
            assert_eq!(taken.identity(), left.identity());
            assert_eq!(taken.serial(), left.serial());
            assert_eq!(taken.not_after(), left.not_after());
            assert_eq!(taken.chain(), left.chain());
            assert_eq!(taken.root_certificates(), left.root_certificates());
        }
        let outcome =
            handshake(taken[0].client_config(&[taken[1].identity().clone()]), left[1].server_config());
        outcome.client.unwrap();
        outcome.server.unwrap();
        assert!(decode(&encode(&[])).unwrap().is_empty());
    }

    #[test]
    fn what_the_version_before_has_left_is_read() {
        let (pki, now, hour) = (Pki::new(), SystemTime::now(), Duration::from_secs(3600));
        let left = pki.credentials(&id("spiffe://td.example/ns/shop/sa/a"), now - hour, now + hour);
        let left = Arc::new(left);
        let bare = encode(&[Arc::clone(&left)]);
        // Without the number of certificates that are shown.
        let end = bare.len() - 4;
        let old = [WITHOUT_ROOT_CERTIFICATES, &bare[MAGIC.len()..end]].concat();
        let taken = decode(&old).unwrap();
        let [taken] = &taken[..] else { panic!("{} certificates", taken.len()) };
        assert_eq!(taken.chain(), left.chain());
        assert!(taken.root_certificates().is_empty());
    }

    #[test]
    fn what_is_torn_or_changed_is_refused_and_never_believed() {
        let left = two(&Pki::new());
        let good = encode(&left);
        for end in 0..good.len() {
            assert_eq!(decode(&good[..end]).unwrap_err(), Unreadable, "cut at {end}");
        }
        assert!(decode(&[&good[..], b"x"].concat()).is_err());
        for byte in (0..good.len()).step_by(7) {
            let mut changed = good.to_vec();
            changed[byte] ^= 0xff;
            // Certificates that were changed are found out by their signatures.
            for taken in decode(&changed).into_iter().flatten() {
                assert!(left.iter().any(|left| left.chain() == taken.chain()), "byte {byte}");
            }
        }
    }
}
