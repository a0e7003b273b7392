//! Roots that come and go, and what is revoked, with real handshakes.

use futures_util::future::FutureExt;
use rcgen::KeyUsagePurpose;
use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;

use super::*;
use crate::configs::Credentials;
use crate::testing::Leaf;
use crate::testing::Pki;
use crate::testing::handshake;
use crate::testing::id;
use crate::verify::Cause;
use crate::verify::cause;

const CLIENT: &str = "spiffe://td.example/ns/shop/sa/client";
const SERVER: &str = "spiffe://td.example/ns/shop/sa/server";
const DAY: Duration = Duration::from_secs(24 * 3600);

fn at(days: u32) -> SystemTime {
    SystemTime::UNIX_EPOCH + DAY * days
}

fn both(one: &Pki, other: &Pki) -> RootCertStore {
    let mut roots = RootCertStore::clone(&one.roots());
    roots.extend(other.roots().roots.iter().cloned());
    roots
}

fn credentials(pki: &Pki, who: &str, trust: &Trust) -> Credentials {
    let (chain, key) = pki.certify(Leaf::of(who));
    Credentials::new(id(who), chain, key, pki.roots()).unwrap().judged_by(trust)
}

/// Whether a client and a server accept each other.
fn meet(client: &Credentials, server: &Credentials) -> Result<(), String> {
    let outcome = handshake(client.client_config(&[id(SERVER)]), server.server_config());
    // Who refused says why; the other side is only told that it was.
    let errors = [outcome.client.err(), outcome.server.err()];
    let (told, own): (Vec<_>, Vec<_>) =
        errors.iter().flatten().map(cause).partition(|cause| matches!(cause, Cause::RefusedByPeer(_)));
    own.first().or_else(|| told.first()).map_or(Ok(()), |cause| Err(cause.to_string()))
}

#[test]
fn a_root_that_is_no_longer_named_goes_when_the_certificates_under_it_have_ended() {
    let (old, new) = (Pki::named("old"), Pki::named("new"));
    let trust = Trust::default();
    let trusts = |pki: &Pki| trust.roots().roots.contains(&pki.roots().roots[0]);
    assert_eq!(trust.learn(&old.roots(), at(0), DAY), Learnt::First);
    assert_eq!(trust.learn(&old.roots(), at(1), DAY), Learnt::Known);
    assert_eq!(trust.learn(&new.roots(), at(2), DAY), Learnt::NewRoot);
    assert!(trusts(&old) && trusts(&new));
    // An answer from an authority that is behind changes nothing, and does not make the change a new one.
    assert_eq!(trust.learn(&old.roots(), at(2), DAY), Learnt::Known);
    assert_eq!(trust.learn(&new.roots(), at(2), DAY), Learnt::Known);
    assert_eq!(trust.learn(&new.roots(), at(3) - Duration::from_secs(1), DAY), Learnt::Known);
    assert!(trusts(&old));
    assert_eq!(trust.learn(&new.roots(), at(3), DAY), Learnt::Known);
    assert!(!trusts(&old) && trusts(&new));
    // Nothing is named: nothing is taken away from one moment to the next.
    trust.learn(&RootCertStore::empty(), at(4), DAY);
    assert!(trusts(&new));
}

#[test]
fn peers_on_both_sides_of_a_change_of_roots_accept_each_other_in_either_role() {
    let (old, new) = (Pki::named("old"), Pki::named("new"));
    // One node has heard of the change, the other only of both roots, a third of nothing yet.
    let (ahead, between, behind) = (Trust::default(), Trust::default(), Trust::default());
    ahead.learn(&old.roots(), at(0), DAY);
    ahead.learn(&new.roots(), at(0), DAY);
    between.learn(&both(&old, &new), at(0), DAY);
    behind.learn(&old.roots(), at(0), DAY);
    for (one, other) in [(&ahead, &between), (&between, &ahead), (&ahead, &ahead)] {
        for (pki_of_one, pki_of_other) in [(&old, &new), (&new, &old), (&new, &new)] {
            let client = credentials(pki_of_one, CLIENT, one);
            let server = credentials(pki_of_other, SERVER, other);
            assert_eq!(meet(&client, &server), Ok(()));
        }
    }
    // Who is ahead is accepted by who is behind as long as it shows its old certificate.
    for (client, server) in [(&ahead, &behind), (&behind, &ahead)] {
        let (client, server) = (credentials(&old, CLIENT, client), credentials(&old, SERVER, server));
        assert_eq!(meet(&client, &server), Ok(()));
    }
    let mut strangers = behind.strangers();
    let (client, server) = (credentials(&old, CLIENT, &behind), credentials(&new, SERVER, &ahead));
    assert!(meet(&client, &server).unwrap_err().contains("does not lead to a root"));
    assert!(strangers.has_changed().unwrap(), "nobody asks for the new root");
    strangers.borrow_and_update();
    // And once it has heard, the credentials it had before will do.
    behind.learn(&new.roots(), at(0), DAY);
    assert_eq!(meet(&client, &server), Ok(()));
    assert!(!strangers.has_changed().unwrap());
}

#[test]
fn nobody_is_trusted_before_the_first_root() {
    let pki = Pki::new();
    let knowing = Trust::of(&pki.roots());
    let (client, server) =
        (credentials(&pki, CLIENT, &Trust::default()), credentials(&pki, SERVER, &knowing));
    assert!(meet(&client, &server).unwrap_err().contains("does not lead to a root"));
    let (client, server) =
        (credentials(&pki, CLIENT, &knowing), credentials(&pki, SERVER, &Trust::default()));
    assert!(meet(&client, &server).is_err());
}

/// A node whose trust has these lists.
fn node(pki: &Pki, lists: &[u8]) -> Trust {
    let trust = Trust::of(&pki.roots());
    trust.revoke(Lists::parse(lists).unwrap());
    trust
}

#[test]
fn a_revoked_certificate_is_refused_in_either_role_and_others_are_not() {
    let pki = Pki::new();
    let plain = Trust::of(&pki.roots());
    let (client, server) = (credentials(&pki, CLIENT, &plain), credentials(&pki, SERVER, &plain));
    for (revoked, refuses) in [(&client, Side::Client), (&server, Side::Server)] {
        let checking = node(&pki, &pki.revoking(&[&revoked.chain()[0]]));
        let outcome = match refuses {
            Side::Client => meet(&client, &credentials(&pki, SERVER, &checking)),
            Side::Server => meet(&credentials(&pki, CLIENT, &checking), &server),
        };
        let error = outcome.unwrap_err();
        assert_eq!(error, "a certificate of the peer's chain was revoked");
        assert_eq!(checking.rejections(refuses), 1);
        assert!(checking.names(revoked.chain(), UnixTime::now(), refuses));
        // Somebody else of the same issuer.
        let other = credentials(&pki, CLIENT, &plain);
        assert_eq!(
            meet(&other, &credentials(&pki, SERVER, &node(&pki, &pki.revoking(&[&revoked.chain()[0]])))),
            Ok(())
        );
    }
}

#[test]
fn a_revoked_intermediate_takes_all_below_it_along() {
    let pki = Pki::new();
    let checking = node(&pki, &pki.revoking_intermediate());
    let client = credentials(&pki, CLIENT, &Trust::of(&pki.roots()));
    let error = meet(&client, &credentials(&pki, SERVER, &checking)).unwrap_err();
    assert_eq!(error, "a certificate of the peer's chain was revoked");
}

#[test]
fn every_list_of_a_file_is_looked_in_and_one_of_a_namesake_proves_nothing() {
    let (pki, namesake) = (Pki::new(), Pki::new());
    let plain = Trust::of(&pki.roots());
    let (client, other) = (credentials(&pki, CLIENT, &plain), credentials(&pki, CLIENT, &plain));
    let by_namesake = namesake.revoking(&[&other.chain()[0]]);
    let ours = pki.revoking(&[&client.chain()[0]]);
    for file in [[by_namesake.clone(), ours.clone()].concat(), [ours, by_namesake].concat()] {
        let server = credentials(&pki, SERVER, &node(&pki, &file));
        assert!(meet(&client, &server).is_err(), "revoked");
        assert_eq!(meet(&other, &server), Ok(()), "revoked by somebody else of that name");
    }
}

#[test]
fn where_lists_are_asked_for_and_missing_nobody_is_accepted() {
    let pki = Pki::new();
    let missing = Trust::new(Revocation::Missing(Arc::new(Unusable::Empty)));
    missing.learn(&pki.roots(), at(0), DAY);
    let plain = Trust::of(&pki.roots());
    let server = credentials(&pki, SERVER, &missing);
    let client = credentials(&pki, CLIENT, &plain);
    let error = meet(&client, &server).unwrap_err();
    assert!(error.contains("CRL_PATH"), "{error}");
    assert_eq!(missing.rejections(Side::Client), 1);
    missing.revoke(Lists::parse(&pki.revoking(&[])).unwrap());
    assert_eq!(meet(&client, &server), Ok(()), "a list that names nobody");
}

#[test]
fn a_list_whose_issuer_may_not_sign_lists_proves_nothing_and_lets_nobody_through() {
    let pki = Pki::signing_with(vec![KeyUsagePurpose::KeyCertSign]);
    let server = credentials(&pki, SERVER, &node(&pki, &pki.revoking(&[])));
    let error = meet(&credentials(&pki, CLIENT, &Trust::of(&pki.roots())), &server).unwrap_err();
    assert!(error.contains("cRLSign"), "{error}");
}

#[test]
fn files_that_are_no_lists_are_refused_as_a_whole() {
    let pki = Pki::new();
    let good = pki.revoking(&[]);
    let der = CertificateRevocationListDer::from_pem_slice(&good).unwrap();
    assert_eq!(Lists::parse(&der).unwrap(), Lists::parse(&good).unwrap(), "DER is understood as well");
    let torn = &good[..good.len() / 2];
    let (_, key) = pki.certify(Leaf::of(CLIENT));
    let PrivateKeyDer::Pkcs8(key) = key else { panic!("another kind of key") };
    for (bytes, expected) in [
        (&b""[..], "holds no certificate revocation list"),
        (b"nonsense", "holds no certificate revocation list"),
        (torn, "cannot be used"),
        (&[&good[..], torn].concat(), "list 2 in it cannot be used"),
        (&der[..der.len() - 1], "list 1 in it cannot be used"),
        (&[&der[..], b"x"].concat(), "list 1 in it cannot be used"),
        (key.secret_pkcs8_der(), "list 1 in it cannot be used"),
    ] {
        let error = Lists::parse(bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} does not say {expected:?}");
    }
    // Whatever is changed in it, reading it does not panic.
    for byte in 0..der.len() {
        let mut changed = der.to_vec();
        changed[byte] ^= 0x55;
        let _read = Lists::parse(&changed);
    }
}

#[tokio::test]
async fn who_is_connected_is_looked_up_again_when_lists_change() {
    let pki = Pki::new();
    let trust = node(&pki, &pki.revoking(&[]));
    let server = credentials(&pki, SERVER, &trust);
    let (client, stays) = (credentials(&pki, CLIENT, &trust), credentials(&pki, CLIENT, &trust));
    let connected = |client: &Credentials| {
        let outcome = handshake(client.client_config(&[id(SERVER)]), server.server_config());
        trust.verified_peer(&outcome.server.unwrap()).unwrap()
    };
    let (peer, other) = (connected(&client), connected(&stays));
    let mut revoked = std::pin::pin!(trust.revoked(&peer, Side::Client));
    let mut other_revoked = std::pin::pin!(trust.revoked(&other, Side::Client));
    assert!((&mut revoked).now_or_never().is_none());
    assert!((&mut other_revoked).now_or_never().is_none());
    trust.revoke(Lists::parse(&pki.revoking(&[&client.chain()[0]])).unwrap());
    revoked.await;
    assert!((&mut other_revoked).now_or_never().is_none());
    assert_eq!(trust.rejections(Side::Client), 1);
    // Without lists nothing is kept that could be looked up.
    let plain = Trust::of(&pki.roots());
    let outcome = handshake(client.client_config(&[id(SERVER)]), server.judged_by(&plain).server_config());
    drop(outcome.client);
    let peer = verified_peer(&outcome.server.unwrap()).unwrap();
    assert!(peer.shown().is_none());
}
