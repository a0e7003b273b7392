//! Certificates as views.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use x509_parser::prelude::FromDer as _;
use x509_parser::prelude::X509Certificate;
use x509_parser::time::ASN1Time;
use ztunnel_mesh::dump;

use crate::identity::worker::Standing;

/// The view of every identity.
pub fn certificates(standings: &[Standing]) -> Vec<dump::Certificates> {
    standings.iter().map(view).collect()
}

fn view(standing: &Standing) -> dump::Certificates {
    let (cert_chain, root_certs) = match &standing.credentials {
        Some(held) => (all(held.chain()), all(held.root_certificates())),
        None => (Vec::new(), Vec::new()),
    };
    let state = match (&standing.credentials, &standing.failure) {
        // A renewal that failed is no harm yet.
        (Some(_), _) => "Available".to_owned(),
        (None, None) => "Initializing".to_owned(),
        (None, Some(error)) => format!("Unavailable: {error}"),
    };
    dump::Certificates { identity: standing.identity.to_string(), state, cert_chain, root_certs }
}

fn all(certificates: &[CertificateDer<'_>]) -> Vec<dump::Certificate> {
    certificates.iter().filter_map(|der| certificate(der)).collect()
}

/// Nothing for what cannot be read: it would not be in use.
fn certificate(der: &[u8]) -> Option<dump::Certificate> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let validity = certificate.validity();
    Some(dump::Certificate {
        pem: STANDARD.encode(pem(der)),
        serial_number: certificate.serial.to_string(),
        valid_from: instant(validity.not_before),
        expiration_time: instant(validity.not_after),
    })
}

/// RFC 7468 §2: lines of 64 characters.
fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        pem.extend([line, "\n"]);
        rest = after;
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

const SECONDS: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");

fn instant(time: ASN1Time) -> String {
    let time = OffsetDateTime::from_unix_timestamp(time.timestamp()).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    time.format(SECONDS).expect("every component of the format is in an OffsetDateTime")
}
