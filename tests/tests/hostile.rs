//! Peers that do not play by the rules, on both ends of a tunnel.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};
use common::hbone::{Came, impostor, inside, request, tls, until_closed};
use common::in_testbed;
use http::{Method, StatusCode};
use tokio::net::TcpStream;
use ztunnel_tests::certificates::{Signed, Signer};
use ztunnel_tests::mesh::{Enrolment, PLAIN};
use ztunnel_tests::poll::{PATIENCE, eventually};
use ztunnel_tests::testbed::{HTTP, On, Testbed, http, http_refused};
use ztunnel_tests::topology::Pod;

const CLIENT: &str = "spiffe://cluster.local/ns/demo/sa/client";

fn signer(testbed: &Testbed) -> Result<Signer> {
    Signer::of_mesh(&testbed.setting(On::B).state)
}

fn tunnel_port(pod: &Pod) -> SocketAddr {
    (pod.v4, 15008).into()
}

/// One CONNECT from the pod outside the mesh, which sits in no daemon's way.
fn connect(testbed: &Testbed, own: Option<Signed>, method: Method, authority: &str) -> Result<Came> {
    inside(&testbed.outsider.place.netns, async {
        request(tls(tunnel_port(&testbed.server), own, &["h2"]).await?, method, authority).await
    })
}

fn to_nginx(testbed: &Testbed) -> String {
    format!("{}:{HTTP}", testbed.server.v4)
}

/// The server's daemon has the same process still, and serves.
fn unharmed(testbed: &mut Testbed) -> Result<()> {
    testbed.daemon(On::B)?.process().must_run()?;
    http(&testbed.client.place, testbed.server.v4.into(), "").context("an honest client afterwards").map(drop)
}

#[test]
fn only_a_certificate_of_the_mesh_gets_in() {
    in_testbed("certificates", |testbed| {
        let (mesh, stranger) = (signer(testbed)?, Signer::stranger()?);
        let authority = to_nginx(testbed);
        // First an honest one: the refusals below are not this test's own mistakes.
        match connect(testbed, Some(mesh.sign(&[CLIENT])?), Method::CONNECT, &authority)? {
            Came::Tunnel(text) if text.contains("pod=server") => {}
            other => bail!("an honest client got {other:?}"),
        }
        let foreign = "spiffe://other.example/ns/demo/sa/client";
        let cases = [
            ("none", None),
            ("of another root", Some(stranger.sign(&[CLIENT])?)),
            ("expired", Some(mesh.sign_expired(&[CLIENT])?)),
            ("of another trust domain", Some(mesh.sign(&[foreign])?)),
            ("without an identity", Some(mesh.sign(&[])?)),
            ("with two identities", Some(mesh.sign(&[CLIENT, "spiffe://cluster.local/ns/demo/sa/server"])?)),
            ("with a URI of another kind", Some(mesh.sign(&["https://cluster.local/ns/demo/sa/client"])?)),
            ("with a path trick", Some(mesh.sign(&["spiffe://cluster.local/ns/demo/sa/x/../client"])?)),
        ];
        let mut said = Vec::new();
        for (what, own) in cases {
            match connect(testbed, own, Method::CONNECT, &authority) {
                Ok(came) => bail!("a certificate {what} got {came:?}"),
                Err(error) if format!("{error:#}").contains("left waiting") => bail!("{what}: {error:#}"),
                Err(error) => said.push(format!("{what}: {}", error.root_cause())),
            }
        }
        unharmed(testbed)?;
        Ok(said.join("; "))
    });
}

#[test]
fn a_tunnel_leads_to_its_own_pod_only() {
    in_testbed("authorities", |testbed| {
        let mesh = signer(testbed)?;
        let outside = format!("{}:{HTTP}", testbed.outside.v4);
        let near = format!("{}:{HTTP}", testbed.near.v4);
        let mut said = Vec::new();
        for authority in [
            &outside,
            &near,
            "127.0.0.1:8080",
            "[::1]:8080",
            "10.80.2.1:22",
            "169.254.169.254:80",
            "server:8080",
        ] {
            match connect(testbed, Some(mesh.sign(&[CLIENT])?), Method::CONNECT, authority)? {
                Came::Status(status) if status.is_client_error() || status.is_server_error() => {
                    said.push(format!("{authority}: {status}"));
                }
                other => bail!("CONNECT {authority} got {other:?}"),
            }
        }
        // The daemon's own ports in the pod, which would be a loop.
        for port in [15001, 15006, 15008] {
            let authority = format!("{}:{port}", testbed.server.v4);
            match connect(testbed, Some(mesh.sign(&[CLIENT])?), Method::CONNECT, &authority)? {
                Came::Status(status) if status != StatusCode::OK => {
                    said.push(format!("port {port}: {status}"))
                }
                other => bail!("CONNECT {authority} got {other:?}"),
            }
        }
        let came = connect(testbed, Some(mesh.sign(&[CLIENT])?), Method::GET, &to_nginx(testbed))?;
        ensure!(matches!(came, Came::Status(status) if status.is_client_error()), "GET got {came:?}");
        unharmed(testbed)?;
        Ok(said.join("; "))
    });
}

#[test]
fn what_is_no_tunnel_at_all_is_closed() {
    in_testbed("garbage", |testbed| {
        let mesh = signer(testbed)?;
        let to = tunnel_port(&testbed.server);
        let netns = &testbed.outsider.place.netns;
        let random: Vec<u8> = (0..4096).map(|_| rand::random()).collect();
        let cases: [(&str, &[u8]); 4] = [
            ("random bytes", &random),
            ("HTTP/1", b"CONNECT 10.80.2.10:8080 HTTP/1.1\r\nHost: 10.80.2.10:8080\r\n\r\n"),
            ("HTTP/2 in clear", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"),
            ("half a TLS record", b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc"),
        ];
        for (what, bytes) in cases {
            let answer = inside(netns, async { until_closed(TcpStream::connect(to).await?, bytes).await });
            let answer = answer.context(what)?;
            // At most an alert.
            ensure!(answer.len() < 32, "{what}: {} bytes of an answer", answer.len());
        }
        // Good TLS, and then not HTTP/2.
        let http1 = mesh.sign(&[CLIENT])?;
        let answer = inside(netns, async {
            let stream = tls(to, Some(http1), &["h2"]).await?;
            until_closed(stream, b"CONNECT 10.80.2.10:8080 HTTP/1.1\r\nHost: 10.80.2.10:8080\r\n\r\n").await
        })?;
        ensure!(!answer.starts_with(b"HTTP/1"), "{}", String::from_utf8_lossy(&answer));
        let no_alpn = mesh.sign(&[CLIENT])?;
        let came = inside(netns, async {
            request(tls(to, Some(no_alpn), &["http/1.1"]).await?, Method::CONNECT, "10.80.2.10:8080").await
        });
        ensure!(came.is_err(), "another protocol than h2 got {came:?}");
        unharmed(testbed)?;
        Ok("random bytes, HTTP/1, HTTP/2 in clear, half a record, HTTP/1 within TLS, no ALPN: all closed"
            .to_owned())
    });
}

#[test]
fn a_server_with_another_identity_is_not_spoken_to() {
    in_testbed("impostors", |testbed| {
        let (mesh, stranger) = (signer(testbed)?, Signer::stranger()?);
        let pod = testbed.outside.clone();
        // From now on the mesh says: that pod takes tunnels, as plain/outside.
        let yaml = std::fs::read_to_string(testbed.mesh.path().join("pod-outside.yaml"))?;
        let native =
            yaml.replace("    app: outside\n", "    app: outside\n    networking.istio.io/tunnel: http\n");
        ensure!(native != yaml, "the pod's labels are not where this test looks for them");
        testbed.mesh.pod(PLAIN, &pod, Enrolment::Inherit)?;
        testbed.mesh.write("pod-outside", &native)?;
        let honest = "spiffe://cluster.local/ns/plain/sa/outside";
        let other = "spiffe://cluster.local/ns/plain/sa/other";
        let cases = [
            ("another identity", mesh.sign(&[other])?, false),
            ("another root", stranger.sign(&[honest])?, false),
            ("an expired certificate", mesh.sign_expired(&[honest])?, false),
            ("the right one", mesh.sign(&[honest])?, true),
        ];
        let mut said = Vec::new();
        for (what, own, trusted) in cases {
            let served = Arc::new(AtomicUsize::new(0));
            let server = impostor(&pod.place.netns, own, Arc::clone(&served))?;
            // The impostor refuses every stream, so no request succeeds; the question is whether one is made.
            let refusal = eventually(PATIENCE, || {
                let refusal = http_refused(&testbed.client.place, pod.v4.into())?;
                ensure!(!trusted || served.load(Ordering::SeqCst) > 0, "no request arrived: {refusal}");
                Ok(refusal)
            })
            .with_context(|| format!("a server with {what}"))?;
            let count = served.load(Ordering::SeqCst);
            ensure!(trusted || count == 0, "{count} requests were made to a server with {what}");
            said.push(format!("{what}: {count} requests ({refusal})"));
            drop(server);
        }
        Ok(said.join("; "))
    });
}
