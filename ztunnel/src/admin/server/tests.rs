use std::io;
use std::net::SocketAddr;

use tokio::io::AsyncReadExt as _;
use tokio::io::AsyncWriteExt as _;
use tokio::time::Instant;

use super::*;
use crate::shutdown::Trigger;
use crate::telemetry;
use crate::telemetry::line::Format;
use crate::telemetry::writer;

/// A server on a free port of the loopback.
async fn start(site: Site, connections_max: usize) -> (SocketAddr, Trigger) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (trigger, signal) = shutdown::channel();
    shutdown::spawn(serve(listener, site, connections_max, signal));
    (address, trigger)
}

fn metrics_site() -> Site {
    let log = writer::start(Box::new(io::sink()), Format::Plain).unwrap();
    Site::Metrics(Telemetry::new(telemetry::Config::default(), log))
}

/// What the server answers to `request`, up to the end of the connection.
async fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A server that refuses a request without reading all of it resets the connection after its answer.
    let _reset = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

async fn get(address: SocketAddr, path: &str, extra: &str) -> String {
    exchange(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{extra}\r\n")).await
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or("none")
}

#[tokio::test]
async fn readiness_names_who_is_waited_for() {
    let readiness = Readiness::new();
    let (mesh, proxy) = (readiness.block("mesh"), readiness.block("proxy"));
    let (address, _running) = start(Site::Readiness(readiness), PROBES_MAX).await;

    let answer = get(address, "/healthz/ready", "").await;
    assert!(
        answer.starts_with("HTTP/1.1 500 ") && answer.ends_with("\r\n\r\nnot ready, pending: mesh, proxy\n")
    );
    mesh.lift();
    let answer = get(address, "/healthz/ready", "").await;
    assert!(answer.starts_with("HTTP/1.1 500 ") && answer.ends_with("\r\n\r\nnot ready, pending: proxy\n"));
    proxy.lift();
    let answer = get(address, "/healthz/ready", "").await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\nready\n"), "{answer}");
}

#[tokio::test]
async fn metrics_come_in_the_type_asked_for() {
    let (address, _running) = start(metrics_site(), SCRAPES_MAX).await;
    for path in ["/metrics", "/stats/prometheus", "/metrics?x=1"] {
        let answer = get(address, path, "").await;
        assert_eq!(status(&answer), "200", "{path}");
        assert!(answer.contains("\r\ncontent-type: text/plain; charset=utf-8\r\n"), "{answer}");
        assert!(answer.contains("\nistio_build{component=\"ztunnel\","), "{answer}");
        assert!(answer.ends_with("\n# EOF\n"), "{answer}");
    }
    let accept = "accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.1\r\n";
    let answer = get(address, "/metrics", accept).await;
    assert!(
        answer.contains("\r\ncontent-type: application/openmetrics-text;charset=utf-8;version=1.0.0\r\n"),
        "{answer}"
    );
}

#[tokio::test]
async fn other_paths_and_methods_are_refused() {
    let (metrics, _running) = start(metrics_site(), SCRAPES_MAX).await;
    let (ready, _running_too) = start(Site::Readiness(Readiness::new()), PROBES_MAX).await;
    assert_eq!(status(&get(metrics, "/", "").await), "404");
    assert_eq!(status(&get(ready, "/healthz", "").await), "404");
    assert_eq!(status(&get(ready, "/metrics", "").await), "404");
    for (address, path) in [(metrics, "/metrics"), (ready, "/healthz/ready")] {
        let post =
            format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        let answer = exchange(address, &post).await;
        assert_eq!(status(&answer), "405");
        assert!(answer.contains("\r\nallow: GET, HEAD\r\n"), "{answer}");
    }
    let head = exchange(ready, "HEAD /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"), "{head}");
}

#[tokio::test]
async fn what_is_too_large_or_no_http_is_refused() {
    let (address, _running) = start(Site::Readiness(Readiness::new()), PROBES_MAX).await;
    let large = format!("x: {}\r\n", "a".repeat(2 * HEADER_MAX));
    assert_eq!(status(&get(address, "/healthz/ready", &large).await), "431");
    let many = "x: y\r\n".repeat(FIELDS_MAX + 1);
    assert_eq!(status(&get(address, "/healthz/ready", &many).await), "431");
    assert_eq!(status(&exchange(address, "\x16\x03\x01 no http\r\n\r\n").await), "400");
}

/// Time is paused, so it passes only when nothing else can happen: the client's patience costs the test nothing.
#[tokio::test(start_paused = true)]
async fn a_slow_client_is_cut_off() {
    let (address, _running) = start(Site::Readiness(Readiness::new()), PROBES_MAX).await;
    for begun in ["", "GET /healthz/ready HTTP/1.1\r\nhos"] {
        let before = Instant::now();
        // Status 408 or nothing at all: what counts is that the connection ends.
        let answer = exchange(address, begun).await;
        assert!(!answer.contains("ready"), "{answer}");
        assert!(before.elapsed() <= HEADER_TIMEOUT * 2, "it took {:?}", before.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_trickles_is_cut_off() {
    let (address, _running) = start(Site::Readiness(Readiness::new()), PROBES_MAX).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let before = Instant::now();
    let trickled = async {
        for byte in b"GET /healthz/ready HTTP/1.1\r\nx: ".iter().chain([b'a'; 1000].iter()) {
            stream.write_all(&[*byte]).await?;
            time::sleep(HEADER_TIMEOUT / 4).await;
        }
        io::Result::Ok(())
    };
    assert!(trickled.await.is_err(), "the server listened on");
    assert!(before.elapsed() < CONNECTION_MAX, "it took {:?}", before.elapsed());
}

#[tokio::test(start_paused = true)]
async fn beyond_the_cap_clients_wait_for_their_turn() {
    let (address, _running) = start(Site::Readiness(Readiness::new()), 2).await;
    let idle = [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
    let before = Instant::now();
    let answer = get(address, "/healthz/ready", "").await;
    assert_eq!(status(&answer), "200");
    assert!(before.elapsed() >= HEADER_TIMEOUT, "it was served beside the two that hold the slots");
    drop(idle);
}

#[tokio::test]
async fn draining_is_no_end_but_closing_is() {
    let (address, trigger) = start(Site::Readiness(Readiness::new()), PROBES_MAX).await;
    trigger.drain();
    assert_eq!(status(&get(address, "/healthz/ready", "").await), "200");
    let mut idle = TcpStream::connect(address).await.unwrap();
    trigger.close();
    let mut answer = Vec::new();
    let _reset = idle.read_to_end(&mut answer).await;
    assert!(answer.is_empty());
}
