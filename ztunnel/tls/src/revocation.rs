//! Certificate revocation lists: read from PEM or DER, asked about chains.
//!
//! Does not know files: see `identity::crl`.

use std::fmt;
use std::time::Duration;
use std::time::SystemTime;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::UnixTime;
use rustls::pki_types::pem::PemObject;
use webpki::CertRevocationList;
use webpki::EndEntityCert;
use webpki::KeyUsage;
use webpki::OwnedCertRevocationList;
use webpki::RevocationOptionsBuilder;
use webpki::UnknownStatusPolicy;
use x509_parser::prelude::CertificateRevocationList;
use x509_parser::prelude::FromDer;
use x509_parser::prelude::X509Certificate;

use crate::provider::provider;

/// Why there are no lists.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// The file cannot be read.
    #[error("it cannot be read: {0}")]
    Unreadable(String),
    /// There is nothing in it.
    #[error("it holds no certificate revocation list, neither as PEM nor as DER")]
    Empty,
    /// Something in it is no list, or one of a kind that is not understood (delta or indirect ones).
    #[error("list {index} in it cannot be used: {problem}")]
    List {
        /// Which, counted from 1.
        index: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// All lists of one file, which replace those that were there before.
pub struct Lists {
    lists: Vec<List>,
    der: Vec<Vec<u8>>,
}

struct List {
    /// The issuer's name, as encoded.
    issuer: Vec<u8>,
    issuer_text: String,
    entries: usize,
    next_update: Option<SystemTime>,
    list: CertRevocationList<'static>,
}

impl fmt::Debug for Lists {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told = |list: &List| format!("{} revoked by {}", list.entries, list.issuer_text);
        f.debug_list().entries(self.lists.iter().map(told)).finish()
    }
}

/// The same file content.
impl PartialEq for Lists {
    fn eq(&self, other: &Self) -> bool {
        self.der == other.der
    }
}

impl Lists {
    /// Reads one list as DER, or any number of them as PEM. All must be good: half of a file would let through what
    /// the other half revokes.
    pub fn parse(bytes: &[u8]) -> Result<Self, Unusable> {
        let der: Vec<Vec<u8>> = if bytes.first() == Some(&0x30) {
            vec![bytes.to_vec()]
        } else {
            CertificateRevocationListDer::pem_slice_iter(bytes)
                .enumerate()
                .map(|(at, found)| match found {
                    Ok(list) => Ok(list.as_ref().to_vec()),
                    Err(error) => Err(Unusable::List { index: at + 1, problem: error.to_string() }),
                })
                .collect::<Result<_, _>>()?
        };
        if der.is_empty() {
            return Err(Unusable::Empty);
        }
        let lists: Result<_, _> = der
            .iter()
            .enumerate()
            .map(|(at, der)| List::parse(der).map_err(|problem| Unusable::List { index: at + 1, problem }))
            .collect();
        Ok(Self { lists: lists?, der })
    }

    /// How many lists there are.
    pub fn len(&self) -> usize {
        self.lists.len()
    }

    /// Whether there is none, which [`Lists::parse`] does not let happen.
    pub fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    /// How many certificates they name together.
    pub fn entries(&self) -> usize {
        self.lists.iter().map(|list| list.entries).sum()
    }

    /// When the first of them was to be replaced by a newer one.
    pub fn next_update(&self) -> Option<SystemTime> {
        self.lists.iter().filter_map(|list| list.next_update).min()
    }

    /// Looks every certificate of a chain up in the lists of its issuer. A list is believed if the issuer in the
    /// chain signed it; one of another issuer of the same name is passed over.
    pub fn look_up(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        roots: &RootCertStore,
        at: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), webpki::Error> {
        let issuers: Vec<Vec<u8>> =
            std::iter::once(leaf).chain(intermediates).filter_map(issuer_of).collect();
        let end_entity = EndEntityCert::try_from(leaf)?;
        for list in self.lists.iter().filter(|list| issuers.contains(&list.issuer)) {
            // One at a time: of two for one name only the first would be looked at.
            let alone = [&list.list];
            let options = RevocationOptionsBuilder::new(&alone)
                .expect("one list is given")
                .with_status_policy(UnknownStatusPolicy::Allow)
                .build();
            let verified = end_entity.verify_for_usage(
                provider().signature_verification_algorithms.all,
                &roots.roots,
                intermediates,
                at,
                usage,
                Some(options),
                None,
            );
            match verified {
                Ok(_) | Err(webpki::Error::InvalidCrlSignatureForPublicKey) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl List {
    fn parse(der: &[u8]) -> Result<Self, String> {
        let list = OwnedCertRevocationList::from_der(der).map_err(|error| error.to_string())?;
        let (rest, told) = CertificateRevocationList::from_der(der).map_err(|error| error.to_string())?;
        if !rest.is_empty() {
            return Err("there is something behind it".to_owned());
        }
        let since_epoch =
            |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        Ok(Self {
            issuer: told.issuer().as_raw().to_vec(),
            issuer_text: told.issuer().to_string(),
            entries: told.iter_revoked_certificates().count(),
            next_update: told.next_update().map(|time| since_epoch(time.timestamp())),
            list: list.into(),
        })
    }
}

fn issuer_of(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(certificate.issuer().as_raw().to_vec())
}
