//! Tunnels over loopback: two ends in one process, real TLS.

use std::cell::Cell;
use std::future::Future;
use std::future::pending;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;
use http::StatusCode;
use rcgen::BasicConstraints;
use rcgen::CertificateParams;
use rcgen::ExtendedKeyUsagePurpose;
use rcgen::IsCa;
use rcgen::Issuer;
use rcgen::KeyPair;
use rcgen::SanType;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use ztunnel_mesh::model::addr::HbonePeer;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_runtime::shutdown;
use ztunnel_tls::configs::Credentials;
use ztunnel_tls::trust::Trust;
use ztunnel_tls::verify::verified_peer;

use crate::hbone::Config;
use crate::hbone::address::Authority;
use crate::hbone::address::Forwarded;
use crate::hbone::address::TraceParent;
use crate::hbone::client::Answered;
use crate::hbone::client::Connect;
use crate::hbone::client::DialError;
use crate::hbone::client::Lease;
use crate::hbone::client::Opening;
use crate::hbone::client::connect;
use crate::hbone::client::handshake;
use crate::hbone::client::handshake_within;
use crate::hbone::pool::Dialer;
use crate::hbone::pool::Dialled;
use crate::hbone::pool::Key;
use crate::hbone::pool::Pool;
use crate::hbone::server;
use crate::hbone::server::Incoming;
use crate::hbone::server::Refusal;
use crate::hbone::server::ServeError;
use crate::hbone::stream::RecvHalf;
use crate::hbone::stream::SendHalf;
use crate::hbone::stream::StreamError;
use crate::hbone::through::Through;

mod stalled;

/// Longer than anything takes, on whatever machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A root, and whom it certifies.
pub(crate) struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    roots: Arc<RootCertStore>,
}

impl TestCa {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(root.der().to_vec())).unwrap();
        Self { issuer: Issuer::new(params, key), roots: Arc::new(roots) }
    }

    pub(crate) fn certify(&self, identity: &SpiffeId) -> Credentials {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into().unwrap())];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let now = std::time::SystemTime::now();
        params.not_before = (now - Duration::from_secs(60)).into();
        params.not_after = (now + Duration::from_secs(3600)).into();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let chain = vec![CertificateDer::from(leaf.der().to_vec())];
        Credentials::new(identity.clone(), chain, key, Arc::clone(&self.roots)).unwrap()
    }
}

pub(crate) fn id(account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/test/sa/{account}").parse().unwrap()
}

/// A server whose requests are answered by `handle`, and a pool that dials it.
struct Mesh {
    ca: TestCa,
    client: Arc<Credentials>,
    peer: HbonePeer,
    pool: Pool,
    config: Config,
    dials: Arc<AtomicUsize>,
    stop: shutdown::Trigger,
    /// Ends the source.
    leave: shutdown::Trigger,
    over: shutdown::Signal,
}

type Handle = Arc<dyn Fn(Incoming) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

fn handle<F: Future<Output = ()> + Send + 'static>(
    f: impl Fn(Incoming) -> F + Send + Sync + 'static,
) -> Handle {
    Arc::new(move |incoming| Box::pin(f(incoming)))
}

impl Mesh {
    async fn start(config: Config, handle: Handle) -> Self {
        let ca = TestCa::new();
        let server = ca.certify(&id("server"));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = HbonePeer(listener.local_addr().unwrap());
        let (stop, signal) = shutdown::channel();
        let (leave, over) = shutdown::channel();
        let serving = config.clone();
        shutdown::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (tls, config, mut signal) = (server.server_config(), serving.clone(), signal.clone());
                let handle = Arc::clone(&handle);
                shutdown::spawn(async move {
                    let accepted = server::accept(socket, tls, &config).await?;
                    assert_eq!(verified_peer(accepted.tls()).unwrap().id(), &id("client"));
                    let drain = async move { signal.draining().await };
                    server::serve(accepted, &config, drain, |incoming| {
                        shutdown::spawn(handle(incoming));
                    })
                    .await
                });
            }
        });
        Self {
            client: Arc::new(ca.certify(&id("client"))),
            ca,
            peer,
            pool: Pool::new(config.waiters_max, config.spare_timeout),
            config,
            dials: Arc::default(),
            stop,
            leave,
            over,
        }
    }

    fn key(&self) -> Key {
        Key { source: id("client"), netns: (0, 0), peer: self.peer, expect: vec![id("server")] }
    }

    async fn lease(&self) -> Lease {
        self.pool.lease(&self.key(), self).await.unwrap().lease
    }

    async fn open(&self) -> (Lease, Opening) {
        let mut lease = self.lease().await;
        let opening = lease.open(&connect_to("10.0.0.1:80")).await.unwrap();
        (lease, opening)
    }

    async fn connected(&self) -> (Lease, SendHalf, RecvHalf) {
        let (lease, opening) = self.open().await;
        let Opening { send, mut answer } = opening;
        match poll_fn(|cx| answer.poll(cx)).await.unwrap() {
            Answered::Connected { recv, .. } => (lease, send, recv),
            Answered::Refused(status) => panic!("{status}"),
        }
    }

    fn dials(&self) -> usize {
        self.dials.load(Ordering::Relaxed)
    }
}

impl Dialer for Mesh {
    fn credentials(&self) -> Arc<Credentials> {
        Arc::clone(&self.client)
    }

    fn dial(&self, credentials: Arc<Credentials>) -> Pin<Box<dyn Future<Output = Dialled> + Send>> {
        let (peer, config) = (self.peer, self.config.clone());
        self.dials.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            let socket = connect(Box::pin(TcpStream::connect(peer.0)), peer, PATIENCE).await?;
            handshake(socket, peer, credentials.client_config(&[id("server")]), &config, &Trust::default())
                .await
        })
    }

    fn over(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let mut over = self.over.clone();
        Box::pin(async move { over.draining().await })
    }
}

static BAGGAGE: HeaderValue = HeaderValue::from_static("k8s.cluster.name=C");

fn connect_to(authority: &str) -> Connect<'static> {
    Connect {
        authority: Authority::parse(authority).unwrap(),
        network: None,
        baggage: &BAGGAGE,
        forwarded: Forwarded { client: "10.9.9.9:1234".parse().unwrap(), host: Some("web") },
        trace: TraceParent { trace: 7, span: 9 },
    }
}

async fn send(half: &mut SendHalf, data: impl Into<Bytes>) -> Result<(), StreamError> {
    let mut data = data.into();
    while !data.is_empty() {
        poll_fn(|cx| half.poll_send(cx, &mut data)).await?;
    }
    Ok(())
}

async fn receive(half: &mut RecvHalf) -> Result<Vec<u8>, StreamError> {
    let mut all = Vec::new();
    while let Some(piece) = poll_fn(|cx| half.poll_data(cx)).await {
        let piece = piece?;
        half.release(piece.len());
        all.extend_from_slice(&piece);
    }
    Ok(all)
}

/// Sends back what it receives, and ends when that ends.
fn echo() -> Handle {
    handle(async |incoming: Incoming| {
        let Ok((mut send_half, mut recv)) = incoming.connect(None) else { return };
        while let Some(Ok(piece)) = poll_fn(|cx| recv.poll_data(cx)).await {
            recv.release(piece.len());
            if send(&mut send_half, piece).await.is_err() {
                return;
            }
        }
        let _gone = send_half.finish();
    })
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_on_its_own() {
    let mesh = Mesh::start(
        Config::default(),
        handle(async |incoming: Incoming| {
            let (mut back, mut recv) = incoming.connect(None).unwrap();
            // Answers only after the client's end was seen.
            let got = receive(&mut recv).await.unwrap();
            send(&mut back, got).await.unwrap();
            back.finish().unwrap();
        }),
    )
    .await;
    let (_lease, mut forth, mut recv) = mesh.connected().await;
    // More than a stream's window.
    let data: Vec<u8> = (0..5_000_000_u32).map(|n| (n % 251) as u8).collect();
    send(&mut forth, data.clone()).await.unwrap();
    forth.finish().unwrap();
    assert!(receive(&mut recv).await.unwrap() == data);
}

#[tokio::test]
async fn bytes_arrive_in_order_however_they_are_cut() {
    let mesh = Mesh::start(Config::default(), echo()).await;
    let (_lease, mut to, mut from) = mesh.connected().await;
    // Around a TLS record, with and without a frame's header, and what is many of them.
    let sizes = [1, 7, 9, 256, 257, 16_375, 16_376, 16_384, 16_385, 65_527, 65_536, 100_001, 700_000];
    let all: Vec<u8> = (0..sizes.iter().sum::<usize>()).map(|n| (n / 251 + n) as u8).collect();
    let talk = async {
        let mut rest = all.as_slice();
        for size in sizes {
            let (piece, after) = rest.split_at(size);
            rest = after;
            send(&mut to, piece.to_vec()).await.unwrap();
            // Between passes and within one.
            if size % 2 == 0 {
                tokio::task::yield_now().await;
            }
        }
        to.finish().unwrap();
    };
    let ((), got) = tokio::join!(talk, receive(&mut from));
    assert!(got.unwrap() == all);
}

/// A gateway: it passes on to `to` what it is sent, without a look at it, and says how that ended.
fn gateway(to: HbonePeer, ended: mpsc::UnboundedSender<bool>) -> Handle {
    handle(move |incoming: Incoming| {
        let ended = ended.clone();
        async move {
            let Ok(halves) = incoming.connect(None) else { return };
            let mut socket = TcpStream::connect(to.0).await.unwrap();
            let (mut through, _tail) = Through::new(halves);
            let passed_on = tokio::io::copy_bidirectional(&mut through, &mut socket).await;
            let _gone = ended.send(passed_on.is_ok());
        }
    })
}

#[tokio::test]
async fn a_tunnel_goes_through_a_stream_of_another() {
    let inner = Mesh::start(Config::default(), echo()).await;
    let (ended, mut passed_on) = mpsc::unbounded_channel();
    let outer = Mesh::start(Config::default(), gateway(inner.peer, ended)).await;
    let within = async |expect: &str| {
        let (around, send, recv) = outer.connected().await;
        let tls = inner.client.client_config(&[id(expect)]);
        let (through, tail) = Through::new((send, recv));
        let made = handshake_within(through, outer.peer, tls, &inner.config, &Trust::default()).await;
        (around, tail, made)
    };
    for _ in 0..3 {
        let (_around, tail, made) = within("server").await;
        let (tunnel, driver) = made.unwrap();
        let mut lease = tunnel.lease().unwrap();
        tunnel.retire();
        assert_eq!(lease.peer(), Some(&id("server")));
        let talk = async {
            let Opening { send: mut forth, mut answer } =
                lease.open(&connect_to("web.shop:80")).await.unwrap();
            let Answered::Connected { mut recv, .. } = poll_fn(|cx| answer.poll(cx)).await.unwrap() else {
                panic!("it is refused");
            };
            // More than either tunnel lets a stream have under way.
            let data: Vec<u8> = (0..5_000_000_u32).map(|n| (n % 251) as u8).collect();
            let to = async {
                send(&mut forth, data.clone()).await.unwrap();
                forth.finish().unwrap();
            };
            let ((), got) = tokio::join!(to, receive(&mut recv));
            assert!(got.unwrap() == data);
        };
        // With its only stream the tunnel ends.
        let ((), ended) = tokio::join!(talk, driver);
        assert!(ended.is_ok(), "{ended:?}");
        // And the gateway has passed on all of it before its stream is gone.
        tail.ended().await;
        assert_eq!(passed_on.recv().await, Some(true));
    }
    let (_around, _tail, made) = within("other").await;
    assert!(matches!(made, Err(DialError::Tls { .. })));
    assert_eq!(outer.dials(), 1, "they all went through one tunnel to the gateway");
}

#[tokio::test]
async fn the_request_says_whose_it_is_and_the_response_who_answers() {
    let mesh = Mesh::start(
        Config::default(),
        handle(async |incoming: Incoming| {
            assert_eq!(incoming.authority(), Some(Authority::Address("10.0.0.1:80".parse().unwrap())));
            assert_eq!(incoming.baggage(), Some("k8s.cluster.name=C"));
            assert_eq!(incoming.trace(), Some(TraceParent { trace: 7, span: 9 }));
            let forwarded = incoming.forwarded().unwrap();
            assert_eq!((forwarded.client.port(), forwarded.host), (1234, Some("web")));
            incoming.connect(Some(HeaderValue::from_static("service.name=s"))).unwrap().0.finish().unwrap();
        }),
    )
    .await;
    let (_lease, mut opening) = mesh.open().await;
    let Ok(Answered::Connected { baggage, .. }) = poll_fn(|cx| opening.answer.poll(cx)).await else {
        panic!("refused")
    };
    assert_eq!(baggage.unwrap(), "service.name=s");
}

#[tokio::test]
async fn a_refusal_is_its_status_and_data_sent_early_is_lost() {
    for (refusal, status) in [
        (Refusal::BadRequest, StatusCode::BAD_REQUEST),
        (Refusal::Denied, StatusCode::UNAUTHORIZED),
        (Refusal::Unavailable, StatusCode::SERVICE_UNAVAILABLE),
    ] {
        let mesh = Mesh::start(
            Config::default(),
            handle(move |incoming: Incoming| async move { incoming.refuse(refusal) }),
        )
        .await;
        let (_lease, mut opening) = mesh.open().await;
        send(&mut opening.send, "early").await.unwrap();
        let answered = poll_fn(|cx| opening.answer.poll(cx)).await.unwrap();
        assert!(matches!(answered, Answered::Refused(got) if got == status), "{answered:?}");
        // The tunnel is none the worse for it.
        let mut again = mesh.lease().await;
        again.open(&connect_to("10.0.0.1:80")).await.unwrap();
        assert_eq!(mesh.dials(), 1);
    }
}

#[tokio::test]
async fn a_reset_goes_across_either_way() {
    let (seen, mut saw) = mpsc::channel(1);
    let mesh = Mesh::start(
        Config::default(),
        handle(move |incoming: Incoming| {
            let seen = seen.clone();
            async move {
                let (mut send_half, mut recv) = incoming.connect(None).unwrap();
                match poll_fn(|cx| recv.poll_data(cx)).await.unwrap() {
                    Ok(_) => send_half.reset(),
                    Err(error) => seen.send(error).await.unwrap(),
                }
            }
        }),
    )
    .await;

    let (_lease, mut forth, mut recv) = mesh.connected().await;
    send(&mut forth, "reset me").await.unwrap();
    let error = receive(&mut recv).await.unwrap_err();
    assert!(matches!(error, StreamError::Reset(_)), "{error}");
    assert!(matches!(poll_fn(|cx| forth.poll_reset(cx)).await, StreamError::Reset(_)));

    let (_lease, mut forth, _recv) = mesh.connected().await;
    forth.reset();
    let error = saw.recv().await.unwrap();
    assert!(matches!(error, StreamError::Reset(_)), "{error}");

    // Dropped halfway, as when a connection's task ends early.
    let (_lease, forth, recv) = mesh.connected().await;
    drop((forth, recv));
    assert!(matches!(saw.recv().await.unwrap(), StreamError::Reset(_)));
}

#[tokio::test]
async fn a_stalled_stream_does_not_hold_up_the_others() {
    let mesh = Mesh::start(
        Config::default(),
        handle(async |incoming: Incoming| {
            let stall = incoming.authority() == Some(Authority::parse("10.0.0.9:9").unwrap());
            let (mut send_half, mut recv) = incoming.connect(None).unwrap();
            if stall {
                return pending().await;
            }
            while let Some(Ok(piece)) = poll_fn(|cx| recv.poll_data(cx)).await {
                recv.release(piece.len());
                send(&mut send_half, piece).await.unwrap();
            }
            send_half.finish().unwrap();
        }),
    )
    .await;
    let mut stalled = Vec::new();
    for _ in 0..8 {
        let mut lease = mesh.lease().await;
        let mut opening = lease.open(&connect_to("10.0.0.9:9")).await.unwrap();
        // As much as its window takes; the rest never.
        let all = send(&mut opening.send, vec![0; 4 << 20]);
        assert!(tokio::time::timeout(Duration::from_millis(300), all).await.is_err());
        stalled.push((lease, opening));
    }
    let (_lease, mut forth, mut recv) = mesh.connected().await;
    let talk = async {
        send(&mut forth, vec![1; 3 << 20]).await.unwrap();
        forth.finish().unwrap();
    };
    let (got, ()) = tokio::join!(receive(&mut recv), talk);
    assert_eq!(got.unwrap().len(), 3 << 20);
    assert_eq!(mesh.dials(), 1);
}

#[tokio::test]
async fn a_tunnel_is_reused_and_another_dialled_when_it_is_full() {
    let config = Config { client_streams_max: 3, ..Config::default() };
    let mesh = Mesh::start(config, echo()).await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(mesh.connected().await);
    }
    assert_eq!(mesh.dials(), 1);
    streams.push(mesh.connected().await);
    assert_eq!((mesh.dials(), mesh.pool.tunnels()), (2, 2));
    // A stream of the first tunnel ends, and its room is used again.
    streams.remove(0);
    for _ in 0..3 {
        streams.push(mesh.connected().await);
    }
    assert_eq!((mesh.dials(), mesh.pool.tunnels()), (2, 2));
}

#[tokio::test]
async fn the_peers_limit_counts_as_well() {
    let config = Config { server_streams_max: 2, ..Config::default() };
    let mesh = Mesh::start(config, echo()).await;
    let _first = mesh.connected().await;
    let _second = mesh.connected().await;
    assert_eq!(mesh.dials(), 1);
    let _third = mesh.connected().await;
    assert_eq!(mesh.dials(), 2);
}

#[tokio::test]
async fn many_at_once_share_one_dial() {
    let mesh = Mesh::start(Config::default(), echo()).await;
    let all: Vec<_> = (0..50).map(|_| mesh.connected()).collect();
    let all = futures_util::future::join_all(all).await;
    assert_eq!((all.len(), mesh.dials()), (50, 1));
}

#[tokio::test]
async fn who_waits_shares_the_failure_and_too_many_do_not_wait() {
    struct Failing(Arc<Credentials>, Cell<usize>, HbonePeer);
    // Used from one task only.
    struct Shared(parking_lot::Mutex<Failing>);
    impl Dialer for Shared {
        fn credentials(&self) -> Arc<Credentials> {
            Arc::clone(&self.0.lock().0)
        }
        fn dial(&self, _: Arc<Credentials>) -> Pin<Box<dyn Future<Output = Dialled> + Send>> {
            let failing = self.0.lock();
            failing.1.set(failing.1.get() + 1);
            let peer = failing.2;
            Box::pin(async move {
                tokio::task::yield_now().await;
                Err(DialError::Timeout { peer, after: Duration::from_secs(10) })
            })
        }
        fn over(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
            Box::pin(pending())
        }
    }
    let peer = HbonePeer("10.0.0.1:15008".parse().unwrap());
    let credentials = Arc::new(TestCa::new().certify(&id("client")));
    let dialer = Shared(parking_lot::Mutex::new(Failing(credentials, Cell::new(0), peer)));
    let pool = Pool::new(3, Duration::from_secs(3));
    let key = Key { source: id("client"), netns: (0, 0), peer, expect: vec![id("server")] };
    let all = (0..5).map(|_| pool.lease(&key, &dialer));
    let errors: Vec<_> =
        futures_util::future::join_all(all).await.into_iter().map(|r| r.unwrap_err()).collect();
    assert_eq!(dialer.0.lock().1.get(), 1);
    let timeouts = errors.iter().filter(|e| matches!(***e, DialError::Timeout { .. })).count();
    let busy = errors.iter().filter(|e| matches!(***e, DialError::Busy { waiting: 3, .. })).count();
    assert_eq!((timeouts, busy), (3, 2));
    assert_eq!(pool.tunnels(), 0);
}

#[tokio::test]
async fn what_differs_in_its_key_shares_no_tunnel() {
    let mesh = Mesh::start(Config::default(), echo()).await;
    let _first = mesh.lease().await;
    for (key, dials) in [
        (mesh.key(), 1),
        (Key { netns: (0, 1), ..mesh.key() }, 2),
        (Key { source: id("other"), ..mesh.key() }, 3),
        (Key { expect: vec![id("server"), id("other")], ..mesh.key() }, 4),
    ] {
        mesh.pool.lease(&key, &mesh).await.unwrap();
        assert_eq!(mesh.dials(), dials, "{key:?}");
    }
}

#[tokio::test]
async fn a_tunnel_made_with_older_credentials_keeps_its_streams_and_gets_no_new_ones() {
    let mut mesh = Mesh::start(Config::default(), echo()).await;
    let (_lease, mut forth, mut recv) = mesh.connected().await;
    mesh.client = Arc::new(mesh.ca.certify(&id("client")));
    let _renewed = mesh.connected().await;
    assert_eq!(mesh.dials(), 2);
    send(&mut forth, "still there").await.unwrap();
    forth.finish().unwrap();
    assert_eq!(receive(&mut recv).await.unwrap(), b"still there");
}

#[tokio::test]
async fn a_drained_server_finishes_its_streams_and_the_next_stream_goes_elsewhere() {
    let mesh = Mesh::start(Config::default(), echo()).await;
    let (_lease, mut forth, mut recv) = mesh.connected().await;
    mesh.stop.drain();
    // The news of the drain ends the tunnel's use, not its streams.
    while mesh.dials() == 1 {
        let mut lease = mesh.lease().await;
        let Ok(mut opening) = lease.open(&connect_to("10.0.0.1:80")).await else {
            panic!("told, and still used")
        };
        match poll_fn(|cx| opening.answer.poll(cx)).await {
            // What crosses the news.
            Ok(_) | Err(StreamError::NotTaken) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
    send(&mut forth, "last words").await.unwrap();
    forth.finish().unwrap();
    assert_eq!(receive(&mut recv).await.unwrap(), b"last words");
}

#[tokio::test]
async fn an_idle_tunnel_is_closed_and_forgotten() {
    let config = Config { idle_timeout: Duration::from_millis(50), ..Config::default() };
    let mesh = Mesh::start(config, echo()).await;
    let stream = mesh.connected().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(mesh.pool.tunnels(), 1, "it has a stream");
    drop(stream);
    tokio::time::timeout(PATIENCE, async {
        while mesh.pool.tunnels() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn after_a_burst_one_tunnel_with_room_is_kept() {
    let config = Config { client_streams_max: 1, ..Config::default() };
    let spare_timeout = config.spare_timeout;
    let mesh = Mesh::start(config, echo()).await;
    // Time runs only here, as fast as it can: what is on its way over a socket needs time of the clock on the wall.
    let left = async |tunnels| {
        tokio::time::pause();
        let fewer = async {
            while mesh.pool.tunnels() > tunnels {
                tokio::time::sleep(spare_timeout).await;
            }
        };
        tokio::time::timeout(1000 * spare_timeout, fewer).await.unwrap();
        tokio::time::sleep(4 * spare_timeout).await;
        assert_eq!(mesh.pool.tunnels(), tunnels);
        tokio::time::resume();
    };
    let mut streams = Vec::new();
    for _ in 0..5 {
        streams.push(mesh.connected().await);
    }
    assert_eq!(mesh.pool.tunnels(), 5);
    // Two are in use, and one is kept beside them.
    streams.truncate(2);
    left(3).await;
    let (_lease, forth, recv) = streams.last_mut().unwrap();
    send(forth, "still there").await.unwrap();
    forth.finish().unwrap();
    assert_eq!(receive(recv).await.unwrap(), b"still there");
    streams.clear();
    left(1).await;
    assert_eq!(mesh.dials(), 5);
    // The next burst is noticed as well.
    for _ in 0..3 {
        streams.push(mesh.connected().await);
    }
    assert_eq!((mesh.dials(), mesh.pool.tunnels()), (7, 3));
    streams.clear();
    left(1).await;
}

#[tokio::test]
async fn tunnels_of_a_source_that_is_over_close_with_their_last_stream() {
    let config = Config { client_streams_max: 1, ..Config::default() };
    let mesh = Mesh::start(config, echo()).await;
    let (_lease, mut forth, mut recv) = mesh.connected().await;
    drop(mesh.connected().await);
    assert_eq!(mesh.pool.tunnels(), 2);
    let left = async |tunnels| {
        let fewer = async {
            while mesh.pool.tunnels() > tunnels {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, fewer).await.unwrap();
    };
    mesh.leave.drain();
    left(1).await;
    // A straggler still gets through.
    let straggler = mesh.connected().await;
    assert_eq!((mesh.dials(), mesh.pool.tunnels()), (3, 2));
    drop(straggler);
    left(1).await;
    send(&mut forth, "still there").await.unwrap();
    forth.finish().unwrap();
    assert_eq!(receive(&mut recv).await.unwrap(), b"still there");
    drop((_lease, forth, recv));
    left(0).await;
}

#[tokio::test]
async fn a_peer_that_answers_no_pings_is_given_up() {
    let ca = TestCa::new();
    let server_credentials = ca.certify(&id("server"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = HbonePeer(listener.local_addr().unwrap());
    // Completes TLS and then says nothing.
    let mute = shutdown::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let accepted =
            server::accept(socket, server_credentials.server_config(), &Config::default()).await.unwrap();
        pending::<()>().await;
        drop(accepted);
    });
    let config = Config {
        ping_interval: Duration::from_millis(20),
        ping_timeout: Duration::from_millis(50),
        ..Config::default()
    };
    let socket = connect(Box::pin(TcpStream::connect(peer.0)), peer, PATIENCE).await.unwrap();
    let tls = ca.certify(&id("client")).client_config(&[id("server")]);
    let (tunnel, driver) = handshake(socket, peer, tls, &config, &Trust::default()).await.unwrap();
    let mut lease = tunnel.lease().unwrap();
    let driver = shutdown::spawn(driver);
    let mut opening = lease.open(&connect_to("10.0.0.1:80")).await.unwrap();
    let error = poll_fn(|cx| opening.answer.poll(cx)).await.unwrap_err();
    assert!(matches!(error, StreamError::Tunnel(_)), "{error}");
    assert!(driver.await.unwrap().is_err());
    assert!(!tunnel.is_open());
    mute.abort();
}

#[tokio::test]
async fn the_wrong_server_is_no_peer() {
    let mesh = Mesh::start(Config::default(), echo()).await;
    let socket = connect(Box::pin(TcpStream::connect(mesh.peer.0)), mesh.peer, PATIENCE).await.unwrap();
    let tls = mesh.client.client_config(&[id("somebody-else")]);
    let result = handshake(socket, mesh.peer, tls, &mesh.config, &Trust::default()).await;
    assert!(matches!(result, Err(DialError::Tls { .. })));
}

#[tokio::test]
async fn strangers_on_the_hbone_port_get_nothing() {
    let ca = TestCa::new();
    let credentials = ca.certify(&id("server"));
    let config = Config { handshake_timeout: Duration::from_millis(200), ..Config::default() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    for (said, check) in [
        (&b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..], (|e| matches!(e, ServeError::Tls(_))) as fn(&_) -> bool),
        (&[0x16, 3, 1, 0xff, 0xff, 1, 2, 3], |e| matches!(e, ServeError::Tls(_))),
        (b"", |e| matches!(e, ServeError::Stalled(_))),
        (b"\x16", |e| matches!(e, ServeError::Stalled(_))),
    ] {
        let mut stranger = TcpStream::connect(address).await.unwrap();
        stranger.write_all(said).await.unwrap();
        let (socket, _) = listener.accept().await.unwrap();
        let Err(error) = server::accept(socket, credentials.server_config(), &config).await else {
            panic!("accepted {said:?}")
        };
        assert!(check(&error), "{error:?} for {said:?}");
        let mut rest = Vec::new();
        let _reset = stranger.read_to_end(&mut rest).await;
        assert!(rest.len() < 16, "nothing but an alert: {rest:?}");
    }
}

#[tokio::test]
async fn a_client_that_does_not_ask_for_http2_gets_no_tunnel() {
    let ca = TestCa::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tls = (*ca.certify(&id("client")).client_config(&[id("server")])).clone();
    tls.alpn_protocols.clear();
    let client = shutdown::spawn(async move {
        let socket = TcpStream::connect(address).await.unwrap();
        let name = rustls::pki_types::ServerName::IpAddress(address.ip().into());
        let mut tls = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, socket).await.unwrap();
        tls.read(&mut [0; 1]).await
    });
    let (socket, _) = listener.accept().await.unwrap();
    let server = ca.certify(&id("server")).server_config();
    let accepted = server::accept(socket, server, &Config::default()).await;
    assert!(matches!(accepted, Err(ServeError::NotHttp2)));
    // It hears an end, and nothing before.
    assert!(!matches!(client.await.unwrap(), Ok(1..)));
}
