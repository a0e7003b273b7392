use std::io;
use std::io::Read as _;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use flate2::read::GzDecoder;
use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::io::AsyncReadExt as _;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::watch;
use tokio::time::Instant;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::source::status::Source;
use ztunnel_mesh::source::status::reloads;
use ztunnel_mesh::store;
use ztunnel_runtime::shutdown::Trigger;
use ztunnel_tls::ca::CertificateAuthority;
use ztunnel_tls::ca::IssueError;
use ztunnel_tls::configs::Credentials;
use ztunnel_tls::trust::Trust;

use super::*;
use crate::admin::dump;
use crate::admin::dump::Sources;
use crate::admin::profile::heap::tests::TURN;
use crate::admin::quit;
use crate::identity::worker;
use crate::net::bypass::Bypass;
use crate::proxy;
use crate::proxy::DataPlane;
use crate::telemetry;
use crate::telemetry::line::Format;
use crate::telemetry::logging::Filter;
use crate::telemetry::logging::Levels;
use crate::telemetry::writer;

/// A server on a free port of the loopback.
async fn start(site: Site, limits: Limits) -> (SocketAddr, Trigger) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (trigger, signal) = shutdown::channel();
    shutdown::spawn(serve(listener, site, limits, signal));
    (address, trigger)
}

fn metrics_site() -> Site {
    let log = writer::start(Box::new(io::sink()), Format::Plain).unwrap();
    let turns = Arc::new(Semaphore::new(SCRAPES_AT_ONCE));
    Site::Metrics(Telemetry::new(telemetry::Config::default(), log), turns)
}

/// What the server answers to `request`, up to the end of the connection.
async fn exchange(address: SocketAddr, request: &str) -> String {
    String::from_utf8(exchange_bytes(address, request).await).unwrap()
}

async fn exchange_bytes(address: SocketAddr, request: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A server that refuses a request without reading all of it resets the connection after its answer.
    let _reset = stream.read_to_end(&mut answer).await;
    answer
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
    let (address, _running) = start(Site::Readiness(readiness), PROBES).await;

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

#[test]
fn readiness_tells_of_certificates_that_are_missing() {
    let short =
        |lacking, of| Shortage { lacking, of, reason: "spiffe://a: it has no certificate: why".to_owned() };
    for (pending, age, shortage, expected) in [
        (&[][..], None, None, Ok("ready\n")),
        (&[], Some(20), None, Ok("ready, with the mesh of 20 seconds ago: no control plane\n")),
        (&["proxy"], Some(20), Some(short(2, 2)), Err("not ready, pending: proxy\n")),
        (
            &[],
            Some(20),
            Some(short(2, 2)),
            Err("not ready, none of 2 identities of this node has a valid certificate: \
                 spiffe://a: it has no certificate: why\n"),
        ),
        (
            &[],
            None,
            Some(short(1, 2)),
            Ok(
                "ready; 1 of 2 identities have no valid certificate: spiffe://a: it has no certificate: why\n",
            ),
        ),
    ] {
        let state = state(pending, age, &[], shortage.as_ref());
        assert_eq!(state.as_deref().map_err(|text| text.as_str()), expected);
    }
}

#[tokio::test]
async fn metrics_come_in_the_type_asked_for() {
    let (address, _running) = start(metrics_site(), SCRAPES).await;
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

/// The head of an answer, and its body uncompressed.
fn unpacked(answer: &[u8]) -> (String, String) {
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    assert!(head.contains("\r\ncontent-encoding: gzip\r\n"), "{head}");
    let (mut packed, mut body) = (Vec::new(), String::new());
    if head.contains("transfer-encoding: chunked") {
        let mut rest = &answer[end..];
        loop {
            let line = rest.windows(2).position(|bytes| bytes == b"\r\n").unwrap();
            let length = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
            packed.extend_from_slice(&rest[line + 2..line + 2 + length]);
            rest = &rest[line + 4 + length..];
            if length == 0 {
                break;
            }
        }
    } else {
        packed.extend_from_slice(&answer[end..]);
    }
    GzDecoder::new(&packed[..]).read_to_string(&mut body).unwrap();
    (head, body)
}

#[tokio::test]
async fn metrics_are_compressed_for_who_takes_that() {
    let (address, _running) = start(metrics_site(), SCRAPES).await;
    let request = "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\naccept-encoding: gzip\r\n\r\n";
    let (_, body) = unpacked(&exchange_bytes(address, request).await);
    assert!(body.contains("istio_build{") && body.ends_with("# EOF\n"), "{body}");
}

struct NoBypass;

impl Bypass for NoBypass {
    fn mark_own(&self, _socket: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }
}

struct NoAuthority;

impl CertificateAuthority for NoAuthority {
    fn issue<'a>(&'a self, _identity: &'a SpiffeId) -> BoxFuture<'a, Result<Credentials, IssueError>> {
        Box::pin(async { Err(IssueError::Refused { reason: "none here".to_owned() }) })
    }
}

struct Admin {
    address: SocketAddr,
    trigger: Trigger,
    asked: quit::Asked,
}

async fn admin() -> Admin {
    let (mut mesh_writer, reader) = store::mesh();
    mesh_writer.publish(dump::tests::sample_mesh());
    let (trigger, signal) = shutdown::channel();
    let identities = worker::start(Arc::new(NoAuthority), Trust::default(), signal.clone());
    let log = writer::start(Box::new(io::sink()), Format::Plain).unwrap();
    let telemetry = Telemetry::new(telemetry::Config::default(), log);
    let config = proxy::Config { threads: 1, ..proxy::Config::default() };
    let bypass = Arc::new(NoBypass);
    let data_plane =
        DataPlane::start(config, reader.clone(), identities.clone(), &telemetry, bypass, signal.clone());
    let sources = Sources {
        mesh: reader,
        local: Arc::new(dump::tests::sample_mesh()),
        identities,
        data_plane: Arc::new(data_plane.unwrap()),
        waiting: watch::Sender::new(Arc::default()).subscribe(),
        source: Source::default(),
        settings: Arc::from([ztunnel_mesh::dump::Setting {
            name: "NODE_NAME".to_owned(),
            value: "n".to_owned(),
            origin: "environment".to_owned(),
        }]),
        version: dump::tests::version(),
    };
    let (quit, asked) = quit::quit();
    let levels = Levels::unattached(Filter::default());
    let (reloader, _nobody) = reloads();
    let console = Console::new(sources, levels, telemetry, quit, reloader);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    shutdown::spawn(serve_console(listener, console, signal));
    Admin { address, trigger, asked }
}

async fn post(address: SocketAddr, path: &str) -> String {
    let head = "host: x\r\nconnection: close\r\ncontent-length: 0\r\n";
    exchange(address, &format!("POST {path} HTTP/1.1\r\n{head}\r\n")).await
}

#[tokio::test]
async fn the_dump_comes_whole_plain_or_compressed() {
    let admin = admin().await;
    let gzip = "GET /config_dump HTTP/1.1\r\nhost: x\r\nconnection: close\r\naccept-encoding: gzip\r\n\r\n";
    let (head, body) = unpacked(&exchange_bytes(admin.address, gzip).await);
    assert!(head.contains("content-type: application/json"), "{head}");
    let document: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(document["workloads"].as_array().unwrap().len(), 2);
    assert_eq!(document["config"]["nodeName"], "n");
    let plain = get(admin.address, "/config_dump", "").await;
    assert!(plain.starts_with("HTTP/1.1 200 ") && plain.contains("\"workloadState\": {}"), "{plain}");
}

#[tokio::test]
async fn the_logs_levels_are_shown_and_changed() {
    let admin = admin().await;
    for (path, body) in [
        ("/logging", "current log level is info\n"),
        ("/logging?level=access:debug", "current log level is info,access=debug\n"),
        ("/logging?level=warn", "current log level is warn,access=debug\n"),
        ("/logging?level=info&reset", "current log level is info\n"),
        ("/logging?level=ztunnel%3A%3Aproxy=trace", "current log level is info,ztunnel::proxy=trace\n"),
        ("/logging?reset=", "current log level is info\n"),
    ] {
        let answer = post(admin.address, path).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with(body), "{path}: {answer}");
    }
    for path in ["/logging?level=loud", "/logging?levels=info", "/logging?level=%zz"] {
        let answer = post(admin.address, path).await;
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("usage: POST /logging"), "{answer}");
    }
    let answer = get(admin.address, "/logging", "").await;
    assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("\r\nallow: POST\r\n"), "{answer}");
}

#[tokio::test]
async fn other_paths_of_the_admin_port_are_not_found() {
    let admin = admin().await;
    assert_eq!(status(&get(admin.address, "/nothing", "").await), "404");
    assert_eq!(status(&get(admin.address, "/quitquitquit", "").await), "405");
    assert_eq!(status(&get(admin.address, "/debug/pprof/profile?seconds=0", "").await), "400");
    let page = get(admin.address, "/", "").await;
    assert!(page.contains("content-type: text/html") && page.contains("config_dump"), "{page}");
}

#[tokio::test]
async fn a_heap_profile_is_there_while_it_is_active() {
    let _turn = TURN.lock().await;
    let admin = admin().await;
    let inactive = get(admin.address, "/debug/pprof/heap", "").await;
    assert!(inactive.starts_with("HTTP/1.1 500 "), "{inactive}");
    assert!(inactive.contains("heap profiling is not active"), "{inactive}");
    let switched =
        async |query: &str| get(admin.address, &format!("/debug/pprof/heap/profiling{query}"), "").await;
    for (query, active) in [
        ("", false),
        ("?activate=false", false),
        ("?activate=true", true),
        ("?activate=true", true),
        ("", true),
    ] {
        let answer = switched(query).await;
        let wanted = format!("\r\n\r\nheap profiling active: {active}\n");
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with(&wanted), "{query}: {answer}");
    }
    for query in ["?a=%", "?activate=yes", "?activate", "?active=false"] {
        assert_eq!(status(&switched(query).await), "400", "{query}");
    }
    let asked = "GET /debug/pprof/heap HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let profile = exchange_bytes(admin.address, asked).await;
    let body = profile.windows(4).position(|four| four == b"\r\n\r\n").expect("a body") + 4;
    assert!(profile.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&profile[..body]));
    assert!(profile[body..].starts_with(&[0x1f, 0x8b]), "not compressed by gzip");
    assert!(switched("?activate=false").await.ends_with("heap profiling active: false\n"));
    assert_eq!(status(&get(admin.address, "/debug/pprof/heap", "").await), "500");
}

#[tokio::test]
async fn who_asks_to_quit_is_answered_at_the_end() {
    let mut admin = admin().await;
    let answer = shutdown::spawn(post_owned(admin.address));
    admin.asked.asked().await;
    assert!(!answer.is_finished(), "answered before the end");
    admin.trigger.drain();
    // A dump in the middle of a drain shows that the answer waits for more than that.
    assert_eq!(status(&get(admin.address, "/config_dump", "").await), "200");
    assert!(!answer.is_finished(), "answered before the end");
    admin.trigger.close();
    admin.asked.answered().await;
    let answer = answer.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\nshutdown now\n"), "{answer}");
}

async fn post_owned(address: SocketAddr) -> String {
    post(address, "/quitquitquit").await
}

#[tokio::test]
async fn other_paths_and_methods_are_refused() {
    let (metrics, _running) = start(metrics_site(), SCRAPES).await;
    let (ready, _running_too) = start(Site::Readiness(Readiness::new()), PROBES).await;
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
    let (address, _running) = start(Site::Readiness(Readiness::new()), PROBES).await;
    let large = format!("x: {}\r\n", "a".repeat(2 * HEADER_MAX));
    assert_eq!(status(&get(address, "/healthz/ready", &large).await), "431");
    let many = "x: y\r\n".repeat(FIELDS_MAX + 1);
    assert_eq!(status(&get(address, "/healthz/ready", &many).await), "431");
    assert_eq!(status(&exchange(address, "\x16\x03\x01 no http\r\n\r\n").await), "400");
}

/// Time is paused, so it passes only when nothing else can happen: the client's patience costs the test nothing.
#[tokio::test(start_paused = true)]
async fn a_slow_client_is_cut_off() {
    let (address, _running) = start(Site::Readiness(Readiness::new()), PROBES).await;
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
    let (address, _running) = start(Site::Readiness(Readiness::new()), PROBES).await;
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
async fn clients_that_say_nothing_do_not_keep_others_waiting() {
    let limits = Limits { connections: 2, ..PROBES };
    let (address, _running) = start(Site::Readiness(Readiness::new()), limits).await;
    let mut idle = [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
    let before = Instant::now();
    for _ in 0..10 {
        let answer = get(address, "/healthz/ready", "").await;
        assert_eq!(status(&answer), "200");
    }
    assert!(before.elapsed() < HEADER_TIMEOUT, "it took {:?}", before.elapsed());
    // The one that has waited longest made room.
    assert_eq!(idle[0].read(&mut [0]).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn draining_is_no_end_but_closing_is() {
    let (address, trigger) = start(Site::Readiness(Readiness::new()), PROBES).await;
    trigger.drain();
    assert_eq!(status(&get(address, "/healthz/ready", "").await), "200");
    let mut idle = TcpStream::connect(address).await.unwrap();
    trigger.close();
    let mut answer = Vec::new();
    let _reset = idle.read_to_end(&mut answer).await;
    assert!(answer.is_empty());
}
