//! Handshakes in memory: who gets through, and what is said to who does not.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CustomExtension, ExtendedKeyUsagePurpose, KeyUsagePurpose, SanType};
use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{SupportedKxGroup, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ServerSessionMemoryCache;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, Connection, NamedGroup, ProtocolVersion, ServerConfig,
    ServerConnection,
};
use tokio::io::AsyncReadExt;

use crate::configs::{Credentials, InvalidCredentials};
use crate::provider::{Compliance, provider_for};
use crate::testing::{Leaf, Pki, Side as _, handshake, id, uri};
use crate::trust::Trust;
use crate::verifiers::Expected;
use crate::verify::{Cause, NoIdentity, NotAccepted, cause, identity_of, tls_error, verified_peer};

const CLIENT: &str = "spiffe://td.example/ns/shop/sa/client";
const SERVER: &str = "spiffe://td.example/ns/shop/sa/server";

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn credentials(pki: &Pki, who: &str) -> Credentials {
    let (chain, key) = pki.certify(Leaf::of(who));
    Credentials::new(id(who), chain, key, pki.roots()).unwrap()
}

/// A client that shows `shown` and accepts any server of the mesh called `SERVER`.
fn client_showing(pki: &Pki, shown: Option<Identity>) -> Arc<ClientConfig> {
    let mut config = ClientConfig::clone(&credentials(pki, CLIENT).client_config(&[id(SERVER)]));
    config.client_auth_cert_resolver = match shown {
        Some(shown) => Arc::new(showing(shown)),
        None => Arc::new(Nothing),
    };
    Arc::new(config)
}

/// A server that shows `shown` and accepts any client of the mesh.
fn server_showing(pki: &Pki, shown: Identity) -> Arc<ServerConfig> {
    let mut config = ServerConfig::clone(&credentials(pki, SERVER).server_config());
    config.cert_resolver = Arc::new(showing(shown));
    Arc::new(config)
}

/// Shows a certificate that our own side would refuse to load.
fn showing((chain, key): Identity) -> SingleCertAndKey {
    let key = aws_lc_rs::sign::any_supported_type(&key).unwrap();
    SingleCertAndKey::from(CertifiedKey::new(chain, key))
}

#[derive(Debug)]
struct Nothing;

impl rustls::client::ResolvesClientCert for Nothing {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// The server refuses a client that shows `shown`: for the `expected` reason, and the client is told.
#[track_caller]
fn client_is_refused(pki: &Pki, shown: Option<Identity>, expected: &str) {
    let outcome = handshake(client_showing(pki, shown), credentials(pki, SERVER).server_config());
    let error = outcome.server.expect_err("the server accepted the client");
    let text = cause(&error).to_string();
    assert!(text.contains(expected), "{text:?} does not say {expected:?}");
    let told = outcome.client.expect_err("the client was not told");
    assert!(matches!(cause(&told), Cause::RefusedByPeer(_)), "{told:?}");
}

/// The client refuses a server that shows `shown`: for the `expected` reason, and the server is told.
#[track_caller]
fn server_is_refused(pki: &Pki, shown: Identity, expected: &str) {
    let client = credentials(pki, CLIENT).client_config(&[id(SERVER)]);
    let outcome = handshake(client, server_showing(pki, shown));
    let error = outcome.client.expect_err("the client accepted the server");
    let text = cause(&error).to_string();
    assert!(text.contains(expected), "{text:?} does not say {expected:?}");
    let told = outcome.server.expect_err("the server was not told");
    assert!(matches!(cause(&told), Cause::RefusedByPeer(_)), "{told:?}");
}

/// Neither side accepts the other with the certificate that `make` makes of its own name.
#[track_caller]
fn both_refuse(pki: &Pki, make: impl Fn(&str) -> Identity, expected: &str) {
    client_is_refused(pki, Some(make(CLIENT)), expected);
    server_is_refused(pki, make(SERVER), expected);
}

#[test]
fn both_sides_learn_who_the_other_is() {
    let pki = Pki::new();
    let client = credentials(&pki, CLIENT).client_config(&[id("spiffe://td.example/ns/x/sa/y"), id(SERVER)]);
    let outcome = handshake(client, credentials(&pki, SERVER).server_config());
    let (client, server) = (outcome.client.unwrap(), outcome.server.unwrap());
    assert_eq!(verified_peer(&client).unwrap().id(), &id(SERVER));
    assert_eq!(verified_peer(&server).unwrap().id(), &id(CLIENT));
    for side in [&Connection::from(client), &Connection::from(server)] {
        assert_eq!(side.protocol_version(), Some(ProtocolVersion::TLSv1_3));
        assert_eq!(side.alpn_protocol(), Some(b"h2".as_slice()));
        let group = side.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(group, NamedGroup::X25519MLKEM768);
        assert_eq!(side.negotiated_cipher_suite().unwrap().suite(), CipherSuite::TLS13_AES_128_GCM_SHA256);
        assert_eq!(side.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
}

#[test]
fn a_peer_that_only_knows_older_groups_and_the_other_suite_is_still_met() {
    let pki = Pki::new();
    for group in [aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1] {
        let mut provider = aws_lc_rs::default_provider();
        provider.kx_groups = vec![group];
        provider.cipher_suites = vec![aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384];
        let verifier = Expected { trust: Trust::of(&pki.roots()), expected: Arc::from([id(SERVER)]) };
        let mut client = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(showing(pki.certify(Leaf::of(CLIENT)))));
        client.alpn_protocols = vec![b"h2".to_vec()];
        let outcome = handshake(Arc::new(client), credentials(&pki, SERVER).server_config());
        assert_eq!(verified_peer(&outcome.client.unwrap()).unwrap().id(), &id(SERVER));
        let server = outcome.server.unwrap();
        assert_eq!(verified_peer(&server).unwrap().id(), &id(CLIENT));
        assert_eq!(server.negotiated_key_exchange_group().unwrap().name(), group.name());
    }
}

#[test]
fn chacha_alone_is_refused() {
    let pki = Pki::new();
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256];
    let client = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(pki.roots())
        .with_no_client_auth();
    let outcome = handshake(Arc::new(client), credentials(&pki, SERVER).server_config());
    assert!(matches!(outcome.server.unwrap_err(), rustls::Error::PeerIncompatible(_)));
}

#[test]
fn nothing_is_proven_before_the_handshake_is_over() {
    let pki = Pki::new();
    let server = ServerConnection::new(credentials(&pki, SERVER).server_config()).unwrap();
    assert_eq!(verified_peer(&server).unwrap_err(), NoIdentity::Handshaking);
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    client_is_refused(&Pki::new(), None, "the peer presented no certificate");
}

#[test]
fn an_expired_certificate_is_refused() {
    let pki = Pki::new();
    let ended = |who: &str| Leaf { not_after: SystemTime::now() - Duration::from_secs(100), ..Leaf::of(who) };
    both_refuse(&pki, |who| pki.certify(ended(who)), "certificate expired 10");
}

#[test]
fn a_certificate_of_the_future_is_refused() {
    let pki = Pki::new();
    let future =
        |who: &str| Leaf { not_before: SystemTime::now() + Duration::from_secs(500), ..Leaf::of(who) };
    both_refuse(&pki, |who| pki.certify(future(who)), "compare the clocks of both nodes");
}

#[test]
fn a_chain_from_another_root_is_refused() {
    let (pki, other, namesake) = (Pki::new(), Pki::named("other"), Pki::new());
    both_refuse(&pki, |who| other.certify(Leaf::of(who)), "does not lead to a root of this mesh");
    both_refuse(&pki, |who| namesake.certify(Leaf::of(who)), "another root of the same name");
}

#[test]
fn a_chain_without_its_intermediate_is_refused() {
    let pki = Pki::new();
    let alone = |who: &str| {
        let (mut chain, key) = pki.certify(Leaf::of(who));
        chain.truncate(1);
        (chain, key)
    };
    both_refuse(&pki, alone, "does not lead to a root of this mesh");
}

#[test]
fn a_certificate_for_another_use_is_refused() {
    let pki = Pki::new();
    let only =
        |usage: ExtendedKeyUsagePurpose, who: &str| pki.certify(Leaf { uses: vec![usage], ..Leaf::of(who) });
    client_is_refused(&pki, Some(only(ExtendedKeyUsagePurpose::ServerAuth, CLIENT)), "is not trusted");
    server_is_refused(&pki, only(ExtendedKeyUsagePurpose::ClientAuth, SERVER), "is not trusted");
}

#[test]
fn a_certificate_that_may_sign_is_refused() {
    let pki = Pki::new();
    let key_uses = || vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign];
    both_refuse(&pki, |who| pki.certify(Leaf { key_uses: key_uses(), ..Leaf::of(who) }), "signs others");
}

#[test]
fn a_client_of_another_trust_domain_is_refused() {
    let pki = Pki::new();
    let foreign = pki.certify(Leaf::of("spiffe://td.example.org/ns/shop/sa/client"));
    let expected = "spiffe://td.example.org/ns/shop/sa/client is not of trust domain \"td.example\"";
    client_is_refused(&pki, Some(foreign), expected);
}

#[test]
fn a_server_of_another_trust_domain_is_accepted_only_if_expected() {
    let pki = Pki::new();
    let foreign = "spiffe://other.example/ns/shop/sa/server";
    server_is_refused(&pki, pki.certify(Leaf::of(foreign)), "the peer is spiffe://other.example/");
    let client = credentials(&pki, CLIENT).client_config(&[id(foreign)]);
    let outcome = handshake(client, server_showing(&pki, pki.certify(Leaf::of(foreign))));
    assert_eq!(verified_peer(&outcome.client.unwrap()).unwrap().id(), &id(foreign));
}

#[test]
fn a_server_that_is_somebody_else_is_refused_and_both_are_named() {
    let pki = Pki::new();
    let other = "spiffe://td.example/ns/shop/sa/server-2";
    let expected = format!("the peer is {other}, expected {SERVER}");
    server_is_refused(&pki, pki.certify(Leaf::of(other)), &expected);
}

#[test]
fn a_client_that_expects_nobody_accepts_nobody() {
    let pki = Pki::new();
    let client = credentials(&pki, CLIENT).client_config(&[]);
    let outcome = handshake(client, credentials(&pki, SERVER).server_config());
    let error = outcome.client.unwrap_err();
    assert!(cause(&error).is_identity());
    assert!(cause(&error).to_string().ends_with("expected nobody"));
}

#[test]
fn alternative_names_other_than_one_identity_are_refused() {
    let pki = Pki::new();
    // NAME stands for the service account that would be accepted.
    let good = "spiffe://td.example/ns/shop/sa/NAME";
    let long = good.replace("NAME", &"x".repeat(3000));
    let cases: [(&[&str], &str); 13] = [
        (&[], "has 0 URIs"),
        (&[good, "spiffe://td.example/ns/a/sa/b"], "has 2 URIs"),
        (&[good, good], "has 2 URIs"),
        (&["https://td.example/", good], "has 2 URIs"),
        (&[""], "does not name a workload"),
        (&["spiffe://td.example/ns/shop/sa/NAME\0.evil"], "does not name a workload"),
        (&["spiffe://td.example/ns/sh\0op/sa/NAME"], "does not name a workload"),
        (&["spiffe://td.example/ns/shop/sa/NAME/x"], "does not name a workload"),
        (&["spiffe://td.example/ns/shop/sa/NAME?x"], "does not name a workload"),
        (&["spiffe://td.example/ns/sh%6fp/sa/NAME"], "does not name a workload"),
        (&["SPIFFE://td.example/ns/shop/sa/NAME"], "does not name a workload"),
        (&["spiffe://td.example:1/ns/shop/sa/NAME"], "is not a trust domain"),
        (&[&long], "cannot be read"),
    ];
    for (uris, expected) in cases {
        let names = |who: &str| {
            let account = who.rsplit('/').next().unwrap();
            uris.iter().map(|text| uri(&text.replace("NAME", account))).collect()
        };
        both_refuse(&pki, |who| pki.certify(Leaf { names: names(who), ..Leaf::of(who) }), expected);
    }
    let dns = || vec![SanType::DnsName("server.shop".try_into().unwrap())];
    both_refuse(&pki, |who| pki.certify(Leaf { names: dns(), ..Leaf::of(who) }), "has 0 URIs");
}

#[test]
fn names_that_are_no_uris_do_not_matter() {
    let pki = Pki::new();
    let names = vec![SanType::DnsName("server.shop".try_into().unwrap()), uri(SERVER)];
    let client = credentials(&pki, CLIENT).client_config(&[id(SERVER)]);
    let server = server_showing(&pki, pki.certify(Leaf { names, ..Leaf::of(SERVER) }));
    assert_eq!(verified_peer(&handshake(client, server).client.unwrap()).unwrap().id(), &id(SERVER));
}

#[test]
fn the_case_of_a_trust_domain_does_not_matter() {
    let pki = Pki::new();
    let names = vec![uri(&SERVER.replace("td.example", "TD.Example"))];
    let client = credentials(&pki, CLIENT).client_config(&[id(SERVER)]);
    let server = server_showing(&pki, pki.certify(Leaf { names, ..Leaf::of(SERVER) }));
    assert_eq!(verified_peer(&handshake(client, server).client.unwrap()).unwrap().id(), &id(SERVER));
}

/// A subject alternative name extension with one URI of these bytes.
fn raw_uri(bytes: &[u8]) -> CustomExtension {
    let length = u8::try_from(bytes.len()).unwrap();
    let mut der = vec![0x30, length + 2, 0x86, length];
    der.extend_from_slice(bytes);
    CustomExtension::from_oid_content(&[2, 5, 29, 17], der)
}

#[test]
fn a_uri_that_is_no_text_is_refused() {
    let pki = Pki::new();
    let leaf = |who: &str| Leaf {
        names: vec![],
        extensions: vec![raw_uri(&[who.as_bytes(), b"\xff"].concat())],
        ..Leaf::of(who)
    };
    both_refuse(&pki, |who| pki.certify(leaf(who)), "cannot be read");
}

#[test]
fn a_second_extension_of_names_is_refused() {
    let pki = Pki::new();
    let leaf = |who: &str| Leaf { extensions: vec![raw_uri(who.as_bytes())], ..Leaf::of(who) };
    both_refuse(&pki, |who| pki.certify(leaf(who)), "is not trusted");
}

#[test]
fn a_client_of_tls_1_2_is_refused() {
    let hello = [
        &[0x16, 0x03, 0x01, 0x00, 0x2f][..],   // record: handshake, 47 bytes
        &[0x01, 0x00, 0x00, 0x2b, 0x03, 0x03], // ClientHello, 43 bytes, TLS 1.2
        &[7; 32],                              // random
        &[0x00],                               // no session
        &[0x00, 0x04, 0xc0, 0x2b, 0xc0, 0x2f], // ECDHE with AES-128-GCM
        &[0x01, 0x00],                         // no compression, and no extensions
    ]
    .concat();
    let mut server = ServerConnection::new(credentials(&Pki::new(), SERVER).server_config()).unwrap();
    let error = server.read(&hello).expect_err("TLS 1.2 was accepted");
    assert!(matches!(error, rustls::Error::PeerIncompatible(_)), "{error:?}");
    assert!(matches!(cause(&error), Cause::Protocol(_)));
}

#[test]
fn a_peer_that_speaks_another_protocol_is_refused() {
    let pki = Pki::new();
    let mut client = ClientConfig::clone(&credentials(&pki, CLIENT).client_config(&[id(SERVER)]));
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    let outcome = handshake(Arc::new(client.clone()), credentials(&pki, SERVER).server_config());
    assert!(outcome.server.is_err());
    assert!(cause(&outcome.client.unwrap_err()).to_string().contains("it does not speak h2"));

    client.alpn_protocols = vec![];
    let outcome = handshake(Arc::new(client), credentials(&pki, SERVER).server_config());
    assert_eq!(verified_peer(&outcome.server.unwrap()).unwrap_err(), NoIdentity::NotH2);

    let mut server = ServerConfig::clone(&credentials(&pki, SERVER).server_config());
    server.alpn_protocols = vec![];
    let client = credentials(&pki, CLIENT).client_config(&[id(SERVER)]);
    let outcome = handshake(client, Arc::new(server));
    assert_eq!(verified_peer(&outcome.client.unwrap()).unwrap_err(), NoIdentity::NotH2);
}

#[test]
fn a_session_is_never_resumed_and_no_server_name_is_sent() {
    let pki = Pki::new();
    let mut client = ClientConfig::clone(&credentials(&pki, CLIENT).client_config(&[id(SERVER)]));
    client.resumption = Resumption::in_memory_sessions(8);
    let (client, server) = (Arc::new(client), credentials(&pki, SERVER).server_config());
    for _ in 0..2 {
        let outcome = handshake(Arc::clone(&client), Arc::clone(&server));
        let client = outcome.client.unwrap();
        assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert_eq!(client.tls13_tickets_received(), 0);
        assert_eq!(outcome.server.unwrap().server_name(), None);
    }
    assert_eq!(server.send_tls13_tickets, 0);

    // Nor does our client take up what another server offers.
    let mut server = ServerConfig::clone(&server);
    server.send_tls13_tickets = 2;
    server.session_storage = ServerSessionMemoryCache::new(8);
    let (client, server) = (credentials(&pki, CLIENT).client_config(&[id(SERVER)]), Arc::new(server));
    for _ in 0..2 {
        let client = handshake(Arc::clone(&client), Arc::clone(&server)).client.unwrap();
        assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }

    let name = ServerName::try_from("server.shop.example").unwrap();
    let client = credentials(&pki, CLIENT).client_config(&[id(SERVER)]);
    let mut client = ClientConnection::new(client, name).unwrap();
    let mut hello = Vec::new();
    client.write(&mut hello);
    assert!(!hello.windows(11).any(|window| window == b"server.shop"), "the name is in the hello");
}

#[test]
fn credentials_whose_parts_do_not_fit_are_refused() {
    let (pki, other) = (Pki::new(), Pki::new());
    let (chain, key) = pki.certify(Leaf::of(CLIENT));
    let new = |who: &str, chain: &[CertificateDer<'static>], key: &PrivateKeyDer<'static>, roots| {
        Credentials::new(id(who), chain.to_vec(), key.clone_key(), roots).unwrap_err()
    };
    let empty = Arc::new(rustls::RootCertStore::empty());
    let junk = [chain[0].clone(), CertificateDer::from(vec![1, 2, 3])];
    let (_, other_key) = pki.certify(Leaf::of(CLIENT));
    use InvalidCredentials as Bad;
    let roots = || pki.roots();
    assert!(matches!(new(CLIENT, &[], &key, roots()), Bad::Chain { index: 0 }));
    assert!(matches!(new(CLIENT, &junk, &key, roots()), Bad::Chain { index: 1 }));
    assert!(matches!(new(SERVER, &chain, &key, roots()), Bad::OtherIdentity { .. }));
    assert!(matches!(new(CLIENT, &chain[..1], &key, roots()), Bad::Untrusted(_)));
    assert!(matches!(new(CLIENT, &chain, &key, other.roots()), Bad::Untrusted(_)));
    assert!(matches!(new(CLIENT, &chain, &key, empty), Bad::NoRoots));
    assert!(matches!(new(CLIENT, &chain, &other_key, roots()), Bad::Key(_)));
    let (chain, key) = pki.certify(Leaf { names: vec![], ..Leaf::of(CLIENT) });
    assert!(matches!(new(CLIENT, &chain, &key, roots()), Bad::NotAWorkload(NotAccepted::UriCount(0))));
}

#[test]
fn credentials_tell_their_validity_and_not_their_key() {
    let pki = Pki::new();
    let epoch = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let credentials = pki.credentials(&id(CLIENT), epoch(1_000_000_000), epoch(1_000_086_400));
    assert_eq!(credentials.not_before(), epoch(1_000_000_000));
    assert_eq!(credentials.not_after(), epoch(1_000_086_400));
    assert_eq!(credentials.identity(), &id(CLIENT));
    assert_eq!(credentials.chain().len(), 2);
    let text = format!("{credentials:?}");
    assert!(text.contains(CLIENT) && text.contains(credentials.serial()), "{text}");
    assert!(!text.to_lowercase().contains("key"), "{text}");
}

#[test]
fn credentials_end_with_the_first_certificate_of_their_chain() {
    let soon = SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000);
    let pki = Pki::with("root", soon);
    let credentials =
        pki.credentials(&id(CLIENT), soon - Duration::from_secs(9), soon + Duration::from_secs(9));
    assert_eq!(credentials.not_after(), soon);
}

#[test]
fn a_certificate_with_any_bit_changed_is_refused() {
    let pki = Pki::new();
    let (chain, _) = pki.certify(Leaf::of(SERVER));
    let verifier = Expected { trust: Trust::of(&pki.roots()), expected: Arc::from([id(SERVER)]) };
    let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
    let accepted = |leaf: &CertificateDer<'_>| {
        verifier.verify_server_cert(leaf, &chain[1..], &name, &[], UnixTime::now()).is_ok()
    };
    assert!(accepted(&chain[0]));
    for bit in 0..chain[0].len() * 8 {
        let mut leaf = chain[0].to_vec();
        leaf[bit / 8] ^= 1 << (bit % 8);
        // Reading it alone, before any chain is verified, must not panic either.
        let _read = identity_of(&leaf.clone().into());
        assert!(!accepted(&leaf.into()), "bit {bit} does not matter");
    }
}

#[tokio::test]
async fn the_reason_is_found_in_the_errors_of_a_socket() {
    let pki = Pki::new();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
    let connector = tokio_rustls::TlsConnector::from(client_showing(&pki, None));
    let acceptor = tokio_rustls::TlsAcceptor::from(credentials(&pki, SERVER).server_config());
    let (client, server) = tokio::join!(connector.connect(name, near), acceptor.accept(far));
    let error = server.err().unwrap();
    assert!(matches!(cause(tls_error(&error).unwrap()), Cause::NoCertificate), "{error:?}");
    // The client was content, and hears of it by its first read.
    let error = client.unwrap().read_u8().await.unwrap_err();
    assert!(matches!(cause(tls_error(&error).unwrap()), Cause::RefusedByPeer(_)), "{error:?}");
    assert!(tls_error(&std::io::ErrorKind::ConnectionReset.into()).is_none());
}

#[test]
fn who_complies_with_pqc_meets_only_peers_with_the_hybrid_group() {
    let pki = Pki::new();
    let server = |compliance| {
        let (chain, key) = pki.certify(Leaf::of(SERVER));
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider_for(compliance)))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    };
    let client = |groups: &[&'static dyn SupportedKxGroup]| {
        let mut provider = provider_for(Compliance::None);
        provider.kx_groups = groups.to_vec();
        let verifier = Expected { trust: Trust::of(&pki.roots()), expected: Arc::from([id(SERVER)]) };
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    };
    let (hybrid, old) = (aws_lc_rs::kx_group::X25519MLKEM768, aws_lc_rs::kx_group::X25519);
    let met = handshake(client(&[old, hybrid]), server(Compliance::Pqc)).server.unwrap();
    assert_eq!(met.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
    assert!(handshake(client(&[old]), server(Compliance::Pqc)).server.is_err());
    handshake(client(&[old]), server(Compliance::None)).server.unwrap();
}
