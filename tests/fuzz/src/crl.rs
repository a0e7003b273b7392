//! A file of certificate revocation lists, as PEM or DER.
//!
//! What is read is read as the same again; the same lists in the other form, or twice, say the same; and half of a file
//! is never taken for the whole.

use std::time::Duration;

use rustls_pki_types::UnixTime;
use ztunnel_node::fuzzing;
use ztunnel_tls::revocation::Lists;

use crate::memory::bounded;

/// A client's certificate, and its issuer: some of the seeds are lists of theirs.
const LEAF: &[u8] = include_bytes!("crl/leaf.der");
const ROOT: &[u8] = include_bytes!("crl/root.der");

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Within their lives.
fn at() -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000))
}

fn pem(der: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    for three in der.chunks(3) {
        let number =
            three.iter().fold(0_u32, |sum, byte| sum << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for place in 0..4 {
            let known = place <= three.len();
            text.push(if known { BASE64[(number >> (18 - 6 * place) & 63) as usize] } else { b'=' });
        }
    }
    let lines: Vec<&[u8]> = text.chunks(64).collect();
    [b"-----BEGIN X509 CRL-----\n", &*lines.join(&b'\n'), b"\n-----END X509 CRL-----\n"].concat()
}

/// As it is, and as DER.
pub fn run(data: &[u8]) {
    let read = bounded(data.len(), 32, || Lists::parse(data));
    let der = data.first() == Some(&0x30);
    match read {
        Ok(lists) => {
            assert!(!lists.is_empty() && Lists::parse(data).is_ok_and(|again| again == lists));
            let _told = (format!("{lists:?}"), lists.next_update());
            fuzzing::look_up(&lists, LEAF, ROOT, at()).expect("the root is one");
            if der {
                assert_eq!(lists.len(), 1);
                let once = pem(data);
                let other = Lists::parse(&once).expect("the same as PEM");
                assert_eq!((other.entries(), &other), (lists.entries(), &lists));
                let twice = Lists::parse(&[&*once, &once].concat()).expect("both are good");
                assert_eq!((twice.len(), twice.entries()), (2, 2 * lists.entries()));
                let half = [&*once, &once[..once.len() / 2]].concat();
                assert!(Lists::parse(&half).is_err(), "half of it is missing");
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
