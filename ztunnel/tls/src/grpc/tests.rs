//! Addresses, tokens and roots as operators write them, and handshakes with a server of a control plane.

use std::fs;

use rcgen::BasicConstraints;
use rcgen::CertificateParams;
use rcgen::CertifiedIssuer;
use rcgen::IsCa;
use rcgen::KeyPair;
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tower_service::Service;
use ztunnel_runtime::shutdown;

use super::*;

#[test]
fn addresses_are_read_as_operators_write_them() {
    for (text, expected) in [
        ("istiod.istio-system.svc:15012", "https://istiod.istio-system.svc:15012"),
        ("https://istiod.istio-system.svc:15012", "https://istiod.istio-system.svc:15012"),
        ("https://istiod.istio-system.svc:15012/", "https://istiod.istio-system.svc:15012"),
        (" 10.0.0.1:15012 ", "https://10.0.0.1:15012"),
        ("[fd00::1]:15012", "https://[fd00::1]:15012"),
    ] {
        assert_eq!(text.parse::<Address>().unwrap().to_string(), expected, "{text:?}");
    }
    for text in [
        "",
        "istiod",
        "https://istiod",
        "https://:1",
        "https://a:0",
        "ftp://a:1",
        "https://a:1/x",
        "https://u@a:1",
        "a b:1",
    ] {
        assert!(matches!(text.parse::<Address>(), Err(InvalidAddress::Form(_))), "{text:?}");
    }
    let error = "http://istiod:15010".parse::<Address>().unwrap_err();
    assert!(error.to_string().contains("use https://"), "{error}");
}

#[test]
fn roots_and_tokens_are_files_words_or_themselves() {
    assert_eq!(Roots::from("SYSTEM"), Roots::System);
    assert_eq!(Roots::from("./var/run/root-cert.pem"), Roots::File("./var/run/root-cert.pem".into()));
    assert!(matches!(Roots::from("-----BEGIN CERTIFICATE-----\nAAAA\n"), Roots::Pem(_)));
    assert_eq!(
        Token::from("./var/run/secrets/tokens/istio-token"),
        Token::File("./var/run/secrets/tokens/istio-token".into())
    );
    assert_eq!(Token::from("eyJhbGciOi.JSUzI1.NiIsImt"), Token::Literal("eyJhbGciOi.JSUzI1.NiIsImt".into()));
    assert_eq!(Token::from(""), Token::None);
    assert!(!format!("{:?}", Token::from("secret")).contains("secret"));
}

fn plane(address: &str, roots: Roots, token: Token) -> ControlPlane {
    ControlPlane::new(Config {
        address: address.parse().unwrap(),
        roots,
        alternate: None,
        token,
        cluster: "Kubernetes".to_owned(),
        headers: vec![(HeaderName::from_static("x-team"), HeaderValue::from_static("mesh"))],
    })
}

#[test]
fn every_call_has_the_token_as_it_is_now() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    let plane = plane("a:1", Roots::System, Token::File(path.clone()));
    let bearer = || {
        let headers = plane.headers().unwrap();
        assert_eq!(headers["clusterid"], "Kubernetes");
        assert_eq!(headers["x-team"], "mesh");
        headers.get(AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned())
    };
    assert_eq!(bearer(), None, "no file, no token");
    for token in ["one", "two"] {
        fs::write(&path, format!("{token}\n")).unwrap();
        assert_eq!(bearer(), Some(format!("Bearer {token}")));
    }
    fs::write(&path, "a\u{7f}b").unwrap();
    assert!(matches!(plane.headers(), Err(ControlError::Token { .. })));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(plane.headers(), Err(ControlError::File { .. })));
}

struct Issuer(CertifiedIssuer<'static, KeyPair>);

impl Issuer {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    /// The TLS configuration of a server of this name.
    fn server(&self, name: &str, protocol: &[u8]) -> Arc<ServerConfig> {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.0).unwrap();
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let mut config = ServerConfig::builder_with_provider(Arc::clone(provider()))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.into()], key)
            .unwrap();
        config.alpn_protocols = vec![protocol.to_vec()];
        Arc::new(config)
    }
}

/// A server that shakes hands, again and again; its port.
async fn serve(tls: Arc<ServerConfig>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    shutdown::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let _refused = TlsAcceptor::from(Arc::clone(&tls)).accept(socket).await;
        }
    });
    port
}

async fn connect(plane: &ControlPlane) -> Result<(), String> {
    let mut connector = plane.connector().map_err(|error| error.to_string())?;
    connector
        .call(plane.address().uri().clone())
        .await
        .map(|_connected| ())
        .map_err(|error| error.to_string())
}

#[tokio::test]
async fn the_server_is_verified_by_its_host_or_its_other_name() {
    let issuer = Issuer::new();
    let port = serve(issuer.server("istiod.example", ALPN)).await;
    let config = |alternate: Option<&str>| Config {
        alternate: alternate.map(str::to_owned),
        ..plane(&format!("localhost:{port}"), Roots::Pem(issuer.pem()), Token::None).config
    };
    connect(&ControlPlane::new(config(Some("istiod.example")))).await.unwrap();
    for wrong in [None, Some("other.example")] {
        let error = connect(&ControlPlane::new(config(wrong))).await.unwrap_err();
        assert!(error.contains("not valid for name"), "{error}");
    }
    let error = connect(&ControlPlane::new(config(Some("no host name")))).await.unwrap_err();
    assert!(error.contains("not a host name"), "{error}");

    let port = serve(issuer.server("localhost", ALPN)).await;
    connect(&plane(&format!("localhost:{port}"), Roots::Pem(issuer.pem()), Token::None)).await.unwrap();
    let port = serve(issuer.server("localhost", b"http/1.1")).await;
    let address = format!("localhost:{port}");
    assert!(connect(&plane(&address, Roots::Pem(issuer.pem()), Token::None)).await.is_err());
}

#[tokio::test]
async fn roots_are_read_again_and_the_last_good_ones_outlive_a_bad_file() {
    let (one, two) = (Issuer::new(), Issuer::new());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root-cert.pem");
    let port = serve(two.server("localhost", ALPN)).await;
    let plane = plane(&format!("localhost:{port}"), Roots::File(path.clone()), Token::None);
    let error = plane.connector().unwrap_err();
    assert!(error.to_string().contains("root-cert.pem cannot be read"), "{error}");

    for bad in ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        fs::write(&path, bad).unwrap();
        assert!(matches!(plane.connector(), Err(ControlError::Roots { .. })), "{bad:?}");
    }
    fs::write(&path, one.pem()).unwrap();
    let first = plane.connector().unwrap();
    assert_eq!(first, plane.connector().unwrap(), "nothing has changed");
    assert!(connect(&plane).await.is_err());

    fs::write(&path, one.pem() + &two.pem()).unwrap();
    let both = plane.connector().unwrap();
    assert_ne!(first, both);
    connect(&plane).await.unwrap();

    fs::write(&path, "torn").unwrap();
    assert_eq!(plane.connector().unwrap(), both);
    fs::remove_file(&path).unwrap();
    connect(&plane).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_given_up() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let plane = plane(&format!("127.0.0.1:{port}"), Roots::Pem(Issuer::new().pem()), Token::None);
    let error = connect(&plane).await.unwrap_err();
    assert!(error.ends_with("did not end its handshake in 30s"), "{error}");
}
