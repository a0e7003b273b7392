//! A data plane with two pods in one process. Addresses of the mesh are mapped to loopback listeners; all else is
//! real: threads, sockets, TLS, HTTP/2, policies, log lines.

use std::collections::HashMap;
use std::future::pending;
use std::future::poll_fn;
use std::io;
use std::io::Write;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::HeaderValue;
use parking_lot::Mutex;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use ztunnel_mesh::model::addr::HBONE_PORT;
use ztunnel_mesh::model::addr::HbonePeer;
use ztunnel_mesh::model::addr::NetworkAddress;
use ztunnel_mesh::model::addr::OriginalDst;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_mesh::model::policy::Action;
use ztunnel_mesh::model::policy::Clause;
use ztunnel_mesh::model::policy::Match;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::policy::PolicyKey;
use ztunnel_mesh::model::policy::Rule;
use ztunnel_mesh::model::policy::Scope;
use ztunnel_mesh::model::policy::StringMatch;
use ztunnel_mesh::model::service::GatewayAddress;
use ztunnel_mesh::model::service::GatewayDestination;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::service::ServicePort;
use ztunnel_mesh::model::workload::Membership;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::model::workload::Reach;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::model::workload::WorkloadKind;
use ztunnel_mesh::store::MeshChange;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::MeshWriter;
use ztunnel_mesh::store::demand;
use ztunnel_mesh::store::index::Mesh;
use ztunnel_mesh::store::mesh;
use ztunnel_runtime::shutdown;
use ztunnel_tls::ca::CertificateAuthority;
use ztunnel_tls::ca::IssueError;
use ztunnel_tls::configs::Credentials;
use ztunnel_tls::trust::Trust;

use crate::hbone;
use crate::hbone::address::Authority;
use crate::hbone::address::Forwarded;
use crate::hbone::address::TraceParent;
use crate::hbone::client::Answered;
use crate::hbone::client::Connect;
use crate::hbone::client::handshake;
use crate::hbone::server;
use crate::hbone::stream::ResetCode;
use crate::hbone::tests::TestCa;
use crate::hbone::tests::id;
use crate::identity::worker;
use crate::net::budget::Budget;
use crate::net::bypass::Bypass;
use crate::net::socket::Delivery;
use crate::net::socket::Dial;
use crate::net::socket::Keepalive;
use crate::net::socket::PodNetwork;
use crate::net::socket::prepare_listener;
use crate::net::socket::reset_on_close;
use crate::proxy::Config;
use crate::proxy::DataPlane;
use crate::proxy::Listeners;
use crate::proxy::PodSpec;
use crate::proxy::ServedPod;
use crate::proxy::pod::Pod;
use crate::telemetry;
use crate::telemetry::Telemetry;
use crate::telemetry::line::Format;
use crate::telemetry::writer;

mod double_hbone;
mod labels;
mod stalled;

/// Longer than anything takes, on whatever machine.
const PATIENCE: Duration = Duration::from_secs(60);
const CLIENT: &str = "10.0.0.1";
const SERVER: &str = "10.0.0.2";
const SERVICE: &str = "10.0.0.2:80";

/// The authority and the roots it shares with tests that speak HBONE themselves. It has nothing for `stranger`, and says
/// nothing of `orphan`.
struct Ca(Arc<TestCa>);

impl CertificateAuthority for Ca {
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Credentials, IssueError>> {
        Box::pin(async move {
            if *identity == id("stranger") {
                return Err(IssueError::Refused { reason: "unknown".to_owned() });
            }
            if *identity == id("orphan") {
                return Err(IssueError::Unreachable("away".into()));
            }
            Ok(self.0.certify(identity))
        })
    }
}

struct NoBypass;

impl Bypass for NoBypass {
    fn mark_own(&self, _socket: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }
}

/// Where the addresses of the mesh are, and where the next captured connection was going.
struct Net {
    places: Mutex<HashMap<SocketAddr, SocketAddr>>,
    dst: Mutex<SocketAddr>,
}

impl Net {
    fn dial(&self, to: SocketAddr) -> Dial {
        let place = self.places.lock().get(&to).copied();
        Box::pin(async move {
            let socket = TcpStream::connect(place.ok_or(io::ErrorKind::ConnectionRefused)?).await?;
            socket.set_nodelay(true)?;
            Ok(socket)
        })
    }
}

struct TestPod(Arc<Net>);

impl PodNetwork for TestPod {
    fn original_dst(&self, _accepted: &std::net::TcpStream) -> io::Result<OriginalDst> {
        Ok(OriginalDst(*self.0.dst.lock()))
    }

    fn leave(&self, to: SocketAddr) -> Dial {
        self.0.dial(to)
    }

    fn deliver(&self, _client: IpAddr, to: SocketAddr, _first: &mut Bytes) -> io::Result<Delivery> {
        Ok(Delivery::Waiting(self.0.dial(to)))
    }
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Node {
    plane: DataPlane,
    mesh: MeshWriter,
    net: Arc<Net>,
    ca: Arc<TestCa>,
    log: Log,
    telemetry: Telemetry,
    stop: shutdown::Trigger,
    /// The application of the server pod.
    app: TcpListener,
    /// Where the pods' listeners are: outbound of the client; inbound and HBONE of the server.
    outbound: SocketAddr,
    inbound: SocketAddr,
    hbone: SocketAddr,
}

/// A pod that goes nowhere.
pub(super) fn pod(name: &str, addresses: &[&str]) -> Arc<Pod> {
    let net = Net { places: Mutex::default(), dst: Mutex::new(SERVICE.parse().unwrap()) };
    let spec = PodSpec {
        uid: PodUid::from(name),
        workload: Named::Uid(name.into()),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
    };
    let (trigger, signal) = shutdown::channel();
    // A trigger that is gone means the end.
    std::mem::forget(trigger);
    let share = Budget::new(usize::MAX).share(name.to_owned());
    Arc::new(Pod::new(spec, (0, 0), Arc::new(TestPod(net.into())), signal.clone(), None, signal, share))
}

pub(super) fn workload(name: &str, address: &str) -> Arc<Workload> {
    Arc::new(Workload {
        uid: name.into(),
        name: name.into(),
        namespace: "test".into(),
        identity: id(name),
        node: "".into(),
        cluster: "C".into(),
        addresses: vec![address.parse().unwrap()],
        workload_name: name.into(),
        kind: WorkloadKind::Deployment,
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        region: "".into(),
        ..Workload::sample("test", name)
    })
}

fn allow_only(principal: &str) -> Policy {
    let principals = vec![StringMatch::Exact(principal.into())];
    let matches = vec![Match { principals, ..Match::default() }];
    Policy {
        key: PolicyKey { namespace: "test".into(), name: "p".into() },
        scope: Scope::Namespace,
        action: Action::Allow,
        dry_run: false,
        rules: vec![Rule { clauses: vec![Clause { matches }] }],
    }
}

fn two_pods(policies: Vec<Policy>) -> Mesh {
    Mesh::new(
        TrustDomain::default(),
        [workload("client", CLIENT), workload("server", SERVER)],
        [],
        policies.into_iter().map(Arc::new),
    )
}

fn loopback() -> std::net::TcpListener {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap()
}

impl Node {
    async fn start() -> Self {
        Self::start_with(Config { threads: 2, linger: Duration::from_millis(50), ..Config::default() }).await
    }

    async fn start_with(config: Config) -> Self {
        let (mut writer, reader) = mesh();
        writer.publish(two_pods(vec![]));
        Self::start_in(config, writer, reader).await
    }

    async fn start_in(config: Config, mesh: MeshWriter, reader: MeshReader) -> Self {
        let ca = Arc::new(TestCa::new());
        let (stop, signal) = shutdown::channel();
        let identities = worker::start(Arc::new(Ca(Arc::clone(&ca))), Trust::default(), signal.clone());
        let log = Log::default();
        let queue = writer::start(Box::new(log.clone()), Format::Plain).unwrap();
        let telemetry = Telemetry::new(telemetry::Config::default(), queue);
        let plane =
            DataPlane::start(config, reader, identities, &telemetry, Arc::new(NoBypass), signal).unwrap();
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let net = Arc::new(Net {
            places: Mutex::new([(SERVICE.parse().unwrap(), app.local_addr().unwrap())].into()),
            dst: Mutex::new(SERVICE.parse().unwrap()),
        });
        let nowhere = app.local_addr().unwrap();
        let mut node = Self {
            plane,
            mesh,
            net,
            ca,
            log,
            telemetry,
            stop,
            app,
            outbound: nowhere,
            inbound: nowhere,
            hbone: nowhere,
        };
        // The client's applications are on the loopback device.
        node.outbound = node.add("client", &[CLIENT, "127.0.0.1"], 1)[0];
        node.add_server();
        node
    }

    /// The pods are neighbours, and nothing but the server's application can be dialled.
    async fn start_same_node(config: Config) -> Self {
        let node = Self::start_with(config).await;
        node.place("10.0.0.2:15008", "127.0.0.1:1".parse().unwrap());
        node.plane.neighbour(&PodUid::from("client"));
        node.plane.neighbour(&PodUid::from("server"));
        node.certified("server").await;
        node.certified("client").await;
        node
    }

    /// Waits for the workload's certificate.
    async fn certified(&self, name: &str) {
        let identities = self.plane.threads[0].shard.identities.clone();
        timeout(PATIENCE, identities.credentials(&id(name))).await.expect("in time").unwrap();
    }

    /// Connects and expects to be sent through a tunnel, for which there is no peer.
    async fn sent_through_a_tunnel(&self) {
        self.refused(self.outbound).await;
        self.logged(&["direction=\"outbound\"", "could not connect to HBONE peer 10.0.0.2:15008"]).await;
    }

    fn add_server(&mut self) {
        let [_, inbound, hbone] = self.add("server", &[SERVER], 2);
        (self.inbound, self.hbone) = (inbound, hbone);
        self.place("10.0.0.2:15008", hbone);
    }

    fn add(&self, name: &str, addresses: &[&str], netns: u64) -> [SocketAddr; 3] {
        self.add_with(name, addresses, netns, None)
    }

    fn add_with(
        &self,
        name: &str,
        addresses: &[&str],
        netns: u64,
        closed: Option<(shutdown::Trigger, shutdown::Signal)>,
    ) -> [SocketAddr; 3] {
        let listeners =
            Listeners { outbound: loopback().into(), inbound: loopback().into(), hbone: loopback().into() };
        let places = [&listeners.outbound, &listeners.inbound, &listeners.hbone]
            .map(|listener| listener.local_addr().unwrap());
        let spec = PodSpec {
            uid: PodUid::from(name),
            workload: Named::Uid(name.into()),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        };
        for listener in [&listeners.outbound, &listeners.inbound, &listeners.hbone] {
            prepare_listener(listener, &Keepalive::default()).unwrap();
        }
        let network = Arc::new(TestPod(Arc::clone(&self.net)));
        self.plane.add(spec, listeners, (0, netns), network, closed).unwrap();
        places
    }

    fn place(&self, address: &str, at: SocketAddr) {
        self.net.places.lock().insert(address.parse().unwrap(), at);
    }

    fn toward(&self, dst: &str) {
        *self.net.dst.lock() = dst.parse().unwrap();
    }

    /// The client pod's application connects, and the server's accepts.
    async fn connect(&self) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(self.outbound).await.unwrap();
        let (server, _) = timeout(PATIENCE, self.app.accept()).await.expect("delivered").unwrap();
        (client, server)
    }

    /// Waits for a log line that has all of `parts`.
    async fn logged(&self, parts: &[&str]) {
        let found = async {
            loop {
                let text = String::from_utf8(self.log.0.lock().clone()).unwrap();
                if text.lines().any(|line| parts.iter().all(|part| line.contains(part))) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(PATIENCE, found).await.is_err() {
            panic!("no line has all of {parts:?}:\n{}", String::from_utf8_lossy(&self.log.0.lock()));
        }
    }

    /// Connects and expects a reset, with nothing delivered.
    async fn refused(&self, at: SocketAddr) {
        // The reset may come before the connect is told of its success.
        match TcpStream::connect(at).await {
            Ok(mut client) => assert_reset(&mut client).await,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
        let delivered = timeout(Duration::from_millis(50), self.app.accept()).await;
        assert!(delivered.is_err(), "nothing reaches the application");
    }
}

async fn assert_reset(socket: &mut TcpStream) {
    let read = timeout(PATIENCE, socket.read(&mut [0; 1])).await.expect("an end");
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

/// Says something that ends in a reset, which may be there before it was said.
async fn said_and_reset(socket: &mut TcpStream, what: &[u8]) {
    match socket.write_all(what).await {
        Ok(()) => assert_reset(socket).await,
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
}

async fn say(from: &mut TcpStream, to: &mut TcpStream, what: &[u8]) {
    from.write_all(what).await.unwrap();
    let mut heard = vec![0; what.len()];
    timeout(PATIENCE, to.read_exact(&mut heard)).await.expect("an answer").unwrap();
    assert_eq!(heard, what);
}

/// The first three bytes, or nothing where there is an end instead.
async fn ended_or_said(socket: &mut TcpStream) -> Vec<u8> {
    let mut heard = vec![0; 3];
    match timeout(PATIENCE, socket.read_exact(&mut heard)).await.expect("words or an end") {
        Ok(_) => heard,
        Err(_) => Vec::new(),
    }
}

async fn ended(socket: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    timeout(PATIENCE, socket.read_to_end(&mut rest)).await.expect("an end").unwrap();
    rest
}

#[tokio::test]
async fn a_connection_goes_through_both_proxies_and_is_told_of_by_both() {
    let node = Node::start().await;
    let (mut client, mut server) = node.connect().await;
    say(&mut client, &mut server, b"question").await;
    say(&mut server, &mut client, b"answer").await;
    client.shutdown().await.unwrap();
    assert_eq!(ended(&mut server).await, b"");
    // The other direction is still open.
    say(&mut server, &mut client, b"more").await;
    drop(server);
    assert_eq!(ended(&mut client).await, b"");

    let identity = |name| format!("{name}.identity=\"spiffe://cluster.local/ns/test/sa/");
    let (source, destination) = (identity("src") + "client", identity("dst") + "server");
    node.logged(&[
        "connection complete",
        "direction=\"outbound\"",
        "bytes_sent=8",
        "bytes_recv=10",
        "dst.addr=10.0.0.2:15008",
        "dst.hbone_addr=10.0.0.2:80",
        &source,
        &destination,
    ])
    .await;
    node.logged(&["direction=\"inbound\"", "dst.hbone_addr=10.0.0.2:80", &source, &destination]).await;
}

#[tokio::test]
async fn much_data_both_ways_arrives_whole() {
    much_data(Node::start().await).await;
}

#[tokio::test]
async fn much_data_between_neighbours_arrives_whole() {
    much_data(Node::start_same_node(Config { threads: 1, ..Config::default() }).await).await;
}

async fn much_data(node: Node) {
    let (client, server) = node.connect().await;
    let data: Arc<Vec<u8>> = Arc::new((0..20_000_000_u32).map(|n| (n % 253) as u8).collect());
    let mut ends = Vec::new();
    for socket in [client, server] {
        let (mut read, mut write) = socket.into_split();
        let data = Arc::clone(&data);
        ends.push(shutdown::spawn({
            let data = Arc::clone(&data);
            async move {
                write.write_all(&data).await.unwrap();
                write.shutdown().await.unwrap();
            }
        }));
        ends.push(shutdown::spawn(async move {
            let mut all = Vec::new();
            read.read_to_end(&mut all).await.unwrap();
            assert!(all == *data);
        }));
    }
    for end in ends {
        timeout(PATIENCE, end).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_reset_at_one_end_is_a_reset_at_the_other() {
    let node = Node::start().await;
    let (client, mut server) = node.connect().await;
    reset_on_close(&client);
    drop(client);
    assert_reset(&mut server).await;

    let (mut client, server) = node.connect().await;
    reset_on_close(&server);
    drop(server);
    assert_reset(&mut client).await;
}

/// Who says something and resets its connection right then is heard before the reset, as it would be without a mesh:
/// whether it does so itself, or the kernel does it for one that closes its connection with something unread, and whether or
/// not more comes for it.
async fn last_words(node: Node) {
    let words: Vec<u8> = (0..20_000_u32).map(|n| (n % 251) as u8).collect();
    for round in 0..30 {
        let (mut one, mut other) = node.connect().await;
        if round % 2 == 1 {
            (one, other) = (other, one);
        }
        // A reset before that would be a connection that was never made.
        say(&mut one, &mut other, b"here").await;
        say(&mut other, &mut one, b"here").await;
        let (mut hears, mut writes) = other.into_split();
        let mut writing = None;
        match round % 3 {
            0 => reset_on_close(&one),
            1 => {
                writes.write_all(b"unread").await.unwrap();
                timeout(PATIENCE, one.peek(&mut [0; 1])).await.expect("something unread").unwrap();
            }
            _ => {
                writing = Some(shutdown::spawn(async move {
                    loop {
                        if let Err(error) = writes.write_all(&[7; 16 * 1024]).await {
                            return error;
                        }
                    }
                }));
                timeout(PATIENCE, one.peek(&mut [0; 1])).await.expect("something unread").unwrap();
            }
        }
        one.write_all(&words).await.unwrap();
        drop(one);
        let mut heard = Vec::new();
        let ended = timeout(PATIENCE, hears.read_to_end(&mut heard)).await.expect("an end");
        assert!(heard == words, "round {round}: {} bytes were heard, then {ended:?}", heard.len());
        let ended = match (ended, writing) {
            (Err(error), _) => error,
            // A socket tells of a reset once.
            (Ok(_), Some(writing)) => timeout(PATIENCE, writing).await.expect("an end").unwrap(),
            (Ok(_), None) => panic!("round {round}: an end instead of a reset"),
        };
        assert_eq!(ended.kind(), io::ErrorKind::ConnectionReset, "round {round}");
    }
}

#[tokio::test]
async fn last_words_are_heard_through_a_tunnel() {
    last_words(Node::start().await).await;
}

#[tokio::test]
async fn last_words_are_heard_between_neighbours() {
    last_words(Node::start_same_node(Config { threads: 1, ..Config::default() }).await).await;
}

#[tokio::test]
async fn who_is_denied_is_reset_and_nothing_is_delivered() {
    let mut node = Node::start().await;
    node.mesh.publish(two_pods(vec![allow_only("cluster.local/ns/test/sa/other")]));
    let mut client = TcpStream::connect(node.outbound).await.unwrap();
    said_and_reset(&mut client, b"early data").await;
    node.refused(node.outbound).await;
    let why = "error=\"connection closed due to policy rejection: allow policies exist, but none allowed\"";
    node.logged(&["direction=\"inbound\"", why]).await;
    node.logged(&["direction=\"outbound\"", "error", "http status: 401"]).await;
}

#[tokio::test]
async fn an_application_that_does_not_listen_is_a_reset() {
    let node = Node::start().await;
    node.toward("10.0.0.2:81");
    node.refused(node.outbound).await;
    node.logged(&["direction=\"inbound\"", "could not connect to the application at 10.0.0.2:81"]).await;
    node.logged(&["direction=\"outbound\"", "http status: 503"]).await;
}

#[tokio::test]
async fn a_peer_without_a_proxy_is_a_reset() {
    let node = Node::start().await;
    node.place("10.0.0.2:15008", "127.0.0.1:1".parse().unwrap());
    node.refused(node.outbound).await;
    node.logged(&["direction=\"outbound\"", "could not connect to HBONE peer 10.0.0.2:15008"]).await;
}

#[tokio::test]
async fn open_connections_are_closed_when_policy_turns_against_them() {
    let mut node = Node::start().await;
    let (mut client, mut server) = node.connect().await;
    say(&mut client, &mut server, b"fine").await;
    let mut plain = TcpStream::connect(node.inbound).await.unwrap();
    let (mut plain_server, _) = node.app.accept().await.unwrap();
    say(&mut plain, &mut plain_server, b"fine").await;

    // Those that the new policy allows stay.
    node.mesh.publish(two_pods(vec![allow_only("cluster.local/ns/test/sa/client")]));
    assert_reset(&mut plain).await;
    assert_reset(&mut plain_server).await;
    say(&mut client, &mut server, b"still fine").await;

    node.mesh.publish(two_pods(vec![allow_only("cluster.local/ns/test/sa/other")]));
    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
    node.logged(&["direction=\"inbound\"", "dst.hbone_addr", "connection closed due to policy change"]).await;
}

/// The server, with something else of it.
fn server_with(change: impl FnOnce(&mut Workload)) -> MeshChange {
    let mut server = Arc::unwrap_or_clone(workload("server", SERVER));
    change(&mut server);
    MeshChange::Workload(Arc::new(server))
}

#[tokio::test]
async fn a_policy_that_comes_after_the_workload_that_names_it_is_waited_for() {
    let mut node = Node::start().await;
    let (mut client, mut server) = node.connect().await;
    say(&mut client, &mut server, b"before").await;
    let mut plain = TcpStream::connect(node.inbound).await.unwrap();
    let (mut plain_server, _) = node.app.accept().await.unwrap();
    let policy = Policy { scope: Scope::WorkloadSelector, ..allow_only("cluster.local/ns/test/sa/client") };
    node.mesh.apply([server_with(|server| server.policies.push(policy.key.clone()))]);
    let mut waiting = TcpStream::connect(node.outbound).await.unwrap();
    say(&mut client, &mut server, b"meanwhile").await;
    say(&mut plain, &mut plain_server, b"meanwhile").await;
    let delivered = timeout(Duration::from_millis(50), node.app.accept()).await;
    assert!(delivered.is_err(), "it is not known yet whether it may");
    node.mesh.apply([MeshChange::Policy(Arc::new(policy))]);
    let (mut waited, _) = timeout(PATIENCE, node.app.accept()).await.expect("delivered").unwrap();
    say(&mut waiting, &mut waited, b"after").await;
    say(&mut client, &mut server, b"after").await;
    assert_reset(&mut plain).await;
    assert_reset(&mut plain_server).await;
    // One that never comes.
    let never = PolicyKey { namespace: "test".into(), name: "never".into() };
    node.mesh.apply([server_with(|server| server.policies.push(never))]);
    node.refused(node.outbound).await;
    node.logged(&["direction=\"inbound\"", "policy test/never, which the mesh does not have"]).await;
}

#[tokio::test]
async fn a_waypoint_that_comes_after_what_names_it_is_waited_for() {
    let mut node = Node::start().await;
    let front = Service::sample("test", "front");
    let destination = GatewayDestination::Hostname(front.key.clone());
    let gateway = Arc::new(GatewayAddress { destination, hbone_port: HBONE_PORT });
    let behind = |server: &mut Workload| server.waypoint = Some(Arc::clone(&gateway));
    node.mesh.apply([server_with(behind)]);
    let mut client = TcpStream::connect(node.outbound).await.unwrap();
    let delivered = timeout(Duration::from_millis(50), node.app.accept()).await;
    assert!(delivered.is_err(), "nobody knows the waypoint");
    // Its service, and only then who serves it: the server itself, for once.
    node.mesh.apply([MeshChange::Service(Arc::new(front.clone()))]);
    let serves = Membership { service: front.key.clone(), ports: Arc::new([(HBONE_PORT, HBONE_PORT)]) };
    node.mesh.apply([server_with(|server| {
        behind(server);
        server.services = Box::new([serves]);
    })]);
    let (mut server, _) = timeout(PATIENCE, node.app.accept()).await.expect("delivered").unwrap();
    say(&mut client, &mut server, b"through it").await;
    // It goes, and does not come back.
    node.mesh.apply([MeshChange::RemoveService(front.key.clone())]);
    node.refused(node.outbound).await;
    node.logged(&["direction=\"outbound\"", "unknown waypoint test/front.test"]).await;
}

#[tokio::test]
async fn plain_connections_are_delivered_unless_policy_wants_an_identity() {
    let mut node = Node::start().await;
    let mut client = TcpStream::connect(node.inbound).await.unwrap();
    let (mut server, _) = timeout(PATIENCE, node.app.accept()).await.unwrap().unwrap();
    say(&mut client, &mut server, b"hello").await;
    client.shutdown().await.unwrap();
    assert_eq!(ended(&mut server).await, b"");
    drop(server);
    assert_eq!(ended(&mut client).await, b"");
    node.logged(&["direction=\"inbound\"", "dst.addr=10.0.0.2:80", "bytes_recv=5", "connection complete"])
        .await;

    node.mesh.publish(two_pods(vec![allow_only("cluster.local/ns/test/sa/client")]));
    node.refused(node.inbound).await;

    node.toward("10.0.0.2:15008");
    node.refused(node.inbound).await;
    node.logged(&["connection failed", "recursive"]).await;
}

#[tokio::test]
async fn what_is_outside_the_mesh_goes_on_as_it_is() {
    let node = Node::start().await;
    let outside = TcpListener::bind("127.0.0.1:0").await.unwrap();
    node.place("93.184.216.34:443", outside.local_addr().unwrap());
    node.toward("93.184.216.34:443");
    let mut client = TcpStream::connect(node.outbound).await.unwrap();
    let (mut server, _) = timeout(PATIENCE, outside.accept()).await.unwrap().unwrap();
    say(&mut client, &mut server, b"hello").await;
    say(&mut server, &mut client, b"hello yourself").await;
    reset_on_close(&server);
    drop(server);
    assert_reset(&mut client).await;
    node.logged(&["direction=\"outbound\"", "dst.addr=93.184.216.34:443", "bytes_sent=5"]).await;

    node.toward("93.184.216.34:444");
    node.refused(node.outbound).await;
    node.logged(&["direction=\"outbound\"", "could not connect to 93.184.216.34:444"]).await;
}

#[tokio::test]
async fn what_the_mesh_does_not_know_is_asked_for_before_it_goes_on_as_it_is() {
    let start = async |wait| {
        let (mut writer, reader) = mesh();
        // Only the client is known.
        writer.apply([MeshChange::Workload(workload("client", CLIENT))]);
        let (demand, mut demands) = demand::channel(demand::Config { wait, ..demand::Config::default() });
        let config = Config { threads: 2, linger: Duration::from_millis(50), ..Config::default() };
        let node = Node::start_in(config, writer, reader.on_demand(demand)).await;
        demands.connected();
        (node, demands)
    };
    let (node, mut demands) = start(Duration::from_millis(300)).await;
    // Nobody answers: it does not go on in the clear.
    node.refused(node.outbound).await;
    node.logged(&["direction=\"outbound\"", "cannot look up /10.0.0.2", "did not answer in 300ms"]).await;
    assert_eq!(demands.next().await.subscribe, [Arc::from("/10.0.0.2")]);
    // It is in the mesh: through a tunnel.
    let (mut node, mut demands) = start(PATIENCE).await;
    let client = TcpStream::connect(node.outbound).await.unwrap();
    assert_eq!(demands.next().await.subscribe, [Arc::from("/10.0.0.2")]);
    let far = |name, address| {
        let workload = workload(name, address);
        MeshChange::Workload(Arc::new(Workload { node: Arc::from("far"), ..Arc::unwrap_or_clone(workload) }))
    };
    node.mesh.apply([far("server", SERVER), far("idle", "10.0.0.7")]);
    demands.is_there("server", &["/10.0.0.2".to_owned()]);
    demands.is_there("idle", &[]);
    let (server, _) = timeout(PATIENCE, node.app.accept()).await.expect("delivered").unwrap();
    drop((client, server));
    node.logged(&["direction=\"inbound\""]).await;
    // What is used is kept for longer.
    (0..20).for_each(|_| demands.next_epoch());
    drop(node.connect().await);
    node.logged(&["direction=\"inbound\""]).await;
    (0..20).for_each(|_| demands.next_epoch());
    assert_eq!(demands.unused(node.mesh.mesh(), "own"), [Box::from("idle")]);
    (0..20).for_each(|_| demands.next_epoch());
    assert_eq!(demands.unused(node.mesh.mesh(), "own").len(), 2);
    // It is outside.
    node.toward("93.184.216.34:443");
    node.place("93.184.216.34:443", node.app.local_addr().unwrap());
    let outside = async {
        assert_eq!(demands.next().await.subscribe, [Arc::from("/93.184.216.34")]);
        demands.is_gone("/93.184.216.34");
    };
    let ((_client, _server), ()) = tokio::join!(node.connect(), outside);
}

#[tokio::test]
async fn what_was_not_captured_goes_nowhere() {
    let mut node = Node::start().await;
    for dst in ["127.0.0.1:80", "[::1]:80", "10.0.0.1:15001", "10.0.0.1:80"] {
        node.toward(dst);
        node.refused(node.outbound).await;
        node.logged(&["connection failed", &format!("dst.addr={dst}"), "recursive"]).await;
    }
    node.mesh.publish(Mesh::default());
    node.toward(SERVICE);
    node.refused(node.outbound).await;
    node.logged(&["connection failed", "information about local workload: client"]).await;
}

#[tokio::test]
async fn a_pod_has_only_so_many_connections() {
    let node = Node::start_with(Config { pod_connections_max: 2, ..Config::default() }).await;
    let first = node.connect().await;
    let _second = node.connect().await;
    node.refused(node.outbound).await;
    assert_eq!(node.plane.live().turned_away, 1);
    node.logged(&["connection failed", "already has 2 connections"]).await;
    drop(first);
    node.logged(&["connection complete", "direction=\"inbound\""]).await;
    node.logged(&["connection complete", "direction=\"outbound\""]).await;
    // What a connection held is let go after it was told of. Both ends of the second one are left.
    let ended = async {
        while node.plane.live().connections > 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, ended).await.expect("it is over");
    node.connect().await;
}

#[tokio::test]
async fn a_drain_finishes_what_is_open_and_takes_nothing_new() {
    let node = Node::start().await;
    let (mut client, mut server) = node.connect().await;
    let mut drained = Box::pin(node.plane.drained());
    node.stop.drain();
    // What still gets in is not to stay.
    node.toward("127.0.0.1:80");
    let new = async {
        // Until the listener has closed.
        while TcpStream::connect(node.outbound).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, new).await.unwrap();
    assert!(timeout(Duration::from_millis(50), &mut drained).await.is_err(), "one is open");
    say(&mut client, &mut server, b"last words").await;
    drop(server);
    assert_eq!(ended(&mut client).await, b"");
    drop(client);
    timeout(PATIENCE, drained).await.unwrap();
}

#[tokio::test]
async fn who_begins_to_connect_during_the_linger_gets_through() {
    let linger = 100 * PATIENCE;
    let node = Node::start_with(Config { linger, threads: 1, ..Config::default() }).await;
    node.stop.drain();
    let (mut client, mut server) = node.connect().await;
    say(&mut client, &mut server, b"just in time").await;
}

#[tokio::test]
async fn what_is_open_at_the_end_is_reset() {
    let node = Node::start().await;
    let (mut client, _server) = node.connect().await;
    node.stop.close();
    assert_reset(&mut client).await;
}

#[tokio::test]
async fn a_removed_pod_keeps_its_connections_and_gets_no_new_ones() {
    let mut node = Node::start().await;
    let (mut client, mut server) = node.connect().await;
    node.plane.remove_pod(&PodUid::from("server"));
    assert_eq!(node.plane.live().pods, 1);
    while TcpStream::connect(node.hbone).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    say(&mut client, &mut server, b"still here").await;
    // Who looks at what is open finds out whose it was, also once the mesh has forgotten the pod.
    node.mesh.publish(Mesh::default());
    let apart = node.plane.apart();
    assert_eq!(
        apart,
        [ServedPod { uid: PodUid::from("server"), workload: Named::of(&workload("server", SERVER)) }]
    );
    node.mesh.publish(two_pods(vec![]));

    // Another proxy took the pod over: streams go to it without a failure, whatever the old tunnel says.
    node.add_server();
    for _ in 0..10 {
        let (mut client, mut server) = node.connect().await;
        say(&mut client, &mut server, b"and here").await;
    }
    say(&mut client, &mut server, b"and still here").await;
    drop((client, server));
    let over = async {
        while !node.plane.apart().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, over).await.expect("nothing is told of a pod without connections");
}

#[tokio::test]
async fn a_removed_pod_leaves_no_tunnels_behind() {
    let hbone = hbone::Config { client_streams_max: 1, ..hbone::Config::default() };
    let node = Node::start_with(Config { threads: 1, hbone, ..Config::default() }).await;
    let tunnels = || node.plane.threads[0].shard.pool.tunnels();
    let (mut client, mut server) = node.connect().await;
    drop(node.connect().await);
    node.logged(&["connection complete", "direction=\"outbound\""]).await;
    assert_eq!(tunnels(), 2);
    let leaving = node.plane.remove_pod(&PodUid::from("client")).unwrap();
    let left = async |most| {
        let fewer = async {
            while tunnels() > most {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, fewer).await.unwrap();
    };
    left(1).await;
    say(&mut client, &mut server, b"still here").await;
    drop((client, server));
    left(0).await;
    let over = async {
        while !leaving.is_over() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, over).await.unwrap();
}

#[tokio::test]
async fn all_tunnels_of_a_peer_that_drains_are_given_up() {
    let hbone = hbone::Config { client_streams_max: 2, ..hbone::Config::default() };
    let mut node = Node::start_with(Config { threads: 1, hbone, ..Config::default() }).await;
    let mut open = Vec::new();
    for _ in 0..8 {
        open.push(node.connect().await);
    }
    assert_eq!(node.plane.threads[0].shard.pool.tunnels(), 4);
    // Every tunnel has a stream, and room for another.
    for ended in [6, 4, 2, 0] {
        drop(open.remove(ended));
    }
    while node.plane.live().connections > 8 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    node.plane.remove_pod(&PodUid::from("server"));
    node.add_server();
    for _ in 0..10 {
        let (mut client, mut server) = node.connect().await;
        say(&mut client, &mut server, b"hello").await;
    }
    for (client, server) in &mut open {
        say(client, server, b"still here").await;
    }
}

#[tokio::test]
async fn who_is_connecting_when_its_pod_is_removed_gets_through() {
    let linger = 100 * PATIENCE;
    let node = Node::start_with(Config { linger, threads: 1, ..Config::default() }).await;
    node.plane.remove_pod(&PodUid::from("client"));
    // Later than any that had begun before.
    for _ in 0..10 {
        let (mut client, mut server) = node.connect().await;
        say(&mut client, &mut server, b"just in time").await;
    }
    // Not for ever.
    let node = Node::start().await;
    node.plane.remove_pod(&PodUid::from("client"));
    let closed = async {
        while TcpStream::connect(node.outbound).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, closed).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_dies_between_two_connections_is_dialled_again() {
    let mut node = Node::start().await;
    drop(node.connect().await);
    for _ in 0..5 {
        node.plane.remove_pod(&PodUid::from("server"));
        node.add_server();
        let (mut client, mut server) = node.connect().await;
        say(&mut client, &mut server, b"hello again").await;
    }
}

/// Answers one stream with this many bytes and a reset right behind them, in one piece: what no HTTP/2 implementation
/// does where it can help it, and Envoy does when a server has closed its connection.
async fn hasty_peer(node: &Node, bytes: usize, code: ResetCode) {
    const HEADERS: u8 = 1;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    node.place("10.0.0.2:15008", listener.local_addr().unwrap());
    let tls = tokio_rustls::TlsAcceptor::from(node.ca.certify(&id("server")).server_config());
    shutdown::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let mut socket = tls.accept(socket).await.unwrap();
        socket.read_exact(&mut [0; 24]).await.unwrap();
        let mut kind = 0;
        while kind != HEADERS {
            let mut head = [0; 9];
            socket.read_exact(&mut head).await.unwrap();
            kind = head[3];
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            socket.read_exact(&mut vec![0; length as usize]).await.unwrap();
        }
        let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
            let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
            [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
        };
        let settings = [frame(4, 0, 0, &[]), frame(4, 1, 0, &[])].concat();
        // `:status: 200` is the eighth entry of HPACK's table.
        let mut all = [settings, frame(HEADERS, 4, 1, &[0x88])].concat();
        for piece in vec![b'x'; bytes].chunks(16_384) {
            all.extend(frame(0, 0, 1, piece));
        }
        all.extend(frame(3, 0, 1, &code.0.to_be_bytes()));
        socket.write_all(&all).await.unwrap();
        socket.flush().await.unwrap();
        let _gone = socket.read_to_end(&mut Vec::new()).await;
    });
}

#[tokio::test]
async fn what_came_before_a_reset_is_delivered() {
    for bytes in [1, 212, 50_000] {
        let node = Node::start_with(Config { threads: 1, ..Config::default() }).await;
        hasty_peer(&node, bytes, ResetCode::CANCEL).await;
        let mut client = TcpStream::connect(node.outbound).await.unwrap();
        let mut answer = vec![0; bytes];
        timeout(PATIENCE, client.read_exact(&mut answer)).await.expect("an answer").unwrap();
        assert!(answer.iter().all(|byte| *byte == b'x'));
        assert_reset(&mut client).await;
        node.logged(&["connection complete", &format!("bytes_recv={bytes} ")]).await;
    }
}

#[tokio::test]
async fn an_endpoint_without_an_address_is_dialled_by_its_name() {
    let mut node = Node::start().await;
    let service = Service {
        vips: vec![NetworkAddress { network: "".into(), ip: "10.9.0.1".parse().unwrap() }],
        ports: vec![ServicePort { port: 80, target: 8080 }],
        ..Service::sample("test", "db")
    };
    let endpoint = |host: &str| {
        MeshChange::Workload(Arc::new(Workload {
            addresses: Vec::new(),
            hostname: host.into(),
            reach: Reach::Plain,
            services: [Membership { service: service.key.clone(), ports: Arc::default() }].into(),
            ..Arc::unwrap_or_clone(workload("db", "10.0.0.9"))
        }))
    };
    node.mesh.apply([MeshChange::Service(Arc::new(service.clone())), endpoint("localhost")]);
    node.toward("10.9.0.1:80");
    for address in ["127.0.0.1:8080", "[::1]:8080"] {
        node.place(address, node.app.local_addr().unwrap());
    }
    drop(node.connect().await);
    node.logged(&["connection complete", "dst.service=\"db.test\"", "dst.workload=\"db\""]).await;
    let asked: Vec<_> = node.plane.names_asked().into_iter().collect();
    let [(asker, 1)] = &asked[..] else { panic!("{asked:?}") };
    assert_eq!((&*asker.hostname, &*asker.source[0]), ("localhost", "client"));
    // A name that no resolver knows (RFC 6761): refused, and why is told.
    node.mesh.apply([endpoint("nowhere.invalid")]);
    node.refused(node.outbound).await;
    node.logged(&["cannot resolve nowhere.invalid"]).await;
}

#[tokio::test]
async fn a_connection_that_is_over_beyond_envoy_is_over_here() {
    for bytes in [0, 1, 50_000] {
        let node = Node::start_with(Config { threads: 1, ..Config::default() }).await;
        hasty_peer(&node, bytes, ResetCode::CONNECT_ERROR).await;
        let mut client = TcpStream::connect(node.outbound).await.unwrap();
        let mut answer = Vec::new();
        timeout(PATIENCE, client.read_to_end(&mut answer)).await.expect("an end").expect("no reset");
        assert_eq!(answer.len(), bytes);
        node.logged(&["connection complete", &format!("bytes_recv={bytes} ")]).await;
    }
}

/// When a peer breaks its tunnel: at the request, or once something was said on it.
#[derive(Clone, Copy, PartialEq)]
enum Breaks {
    AtRequest,
    AtData,
}

/// A peer that answers the first stream of its first tunnel, and breaks that tunnel at the second; later tunnels
/// answer all. What an application says is sent back.
async fn breaking_peer(node: &Node, at: Breaks) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    node.place("10.0.0.2:15008", listener.local_addr().unwrap());
    let credentials = node.ca.certify(&id("server"));
    shutdown::spawn(async move {
        let mut first = true;
        while let Ok((socket, _)) = listener.accept().await {
            let (tls, breaks) = (credentials.server_config(), std::mem::take(&mut first));
            shutdown::spawn(async move {
                let config = hbone::Config::default();
                let accepted = server::accept(socket, tls, &config).await.unwrap();
                let (broken, mut breaking) = mpsc::unbounded_channel();
                let mut streams = 0;
                let serving = server::serve(accepted, &config, pending(), |mut incoming| {
                    streams += 1;
                    if breaks && streams == 2 {
                        let broken = broken.clone();
                        shutdown::spawn(async move {
                            if at == Breaks::AtData {
                                incoming.first_data().await;
                            }
                            broken.send(()).unwrap();
                            pending::<()>().await;
                            drop(incoming);
                        });
                        return;
                    }
                    let (mut send, mut recv) = incoming.connect(None).unwrap();
                    shutdown::spawn(async move {
                        while let Some(Ok(mut data)) = poll_fn(|cx| recv.poll_data(cx)).await {
                            recv.release(data.len());
                            poll_fn(|cx| send.poll_send(cx, &mut data)).await.unwrap();
                        }
                        let _gone = send.finish();
                    });
                });
                tokio::select! {
                    _ended = serving => {}
                    _broken = breaking.recv() => {}
                }
            });
        }
    });
}

/// A peer that takes streams and answers none. Told of each stream when its first data is there, and of its end.
async fn silent_peer(node: &Node) -> mpsc::UnboundedReceiver<&'static str> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    node.place("10.0.0.2:15008", listener.local_addr().unwrap());
    let credentials = node.ca.certify(&id("server"));
    let (tell, told) = mpsc::unbounded_channel();
    shutdown::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let config = hbone::Config::default();
        let accepted = server::accept(socket, credentials.server_config(), &config).await.unwrap();
        server::serve(accepted, &config, pending(), |mut incoming| {
            let tell = tell.clone();
            shutdown::spawn(async move {
                incoming.first_data().await;
                tell.send("data").unwrap();
                poll_fn(|cx| incoming.poll_gone(cx)).await;
                tell.send("gone").unwrap();
            });
        })
        .await
    });
    told
}

#[tokio::test]
async fn a_peer_that_never_answers_is_given_up() {
    let answer_timeout = Duration::from_millis(100);
    let node = Node::start_with(Config { threads: 1, answer_timeout, ..Config::default() }).await;
    let mut peer = silent_peer(&node).await;
    let mut client = TcpStream::connect(node.outbound).await.unwrap();
    said_and_reset(&mut client, b"anybody there?").await;
    assert_eq!(peer.recv().await, Some("data"));
    assert_eq!(peer.recv().await, Some("gone"));
    node.logged(&["direction=\"outbound\"", "HBONE peer 10.0.0.2:15008 did not answer in 100ms"]).await;
}

#[tokio::test]
async fn an_application_that_gives_up_before_the_answer_is_noticed() {
    let answer_timeout = Duration::from_secs(3600);
    let node = Node::start_with(Config { threads: 1, answer_timeout, ..Config::default() }).await;
    let mut peer = silent_peer(&node).await;
    let mut client = TcpStream::connect(node.outbound).await.unwrap();
    client.write_all(b"anybody there?").await.unwrap();
    assert_eq!(peer.recv().await, Some("data"));
    reset_on_close(&client);
    drop(client);
    let gone = timeout(PATIENCE, peer.recv()).await.expect("noticed");
    assert_eq!(gone, Some("gone"));
}

async fn echoed(socket: &mut TcpStream) {
    socket.write_all(b"echo").await.unwrap();
    let mut heard = [0; 4];
    timeout(PATIENCE, socket.read_exact(&mut heard)).await.expect("an answer").unwrap();
    assert_eq!(&heard, b"echo");
}

#[tokio::test]
async fn a_stream_on_a_tunnel_that_broke_is_opened_again_if_nothing_was_said_on_it() {
    let node = Node::start_with(Config { threads: 1, ..Config::default() }).await;
    breaking_peer(&node, Breaks::AtRequest).await;
    let mut first = TcpStream::connect(node.outbound).await.unwrap();
    echoed(&mut first).await;
    let mut second = TcpStream::connect(node.outbound).await.unwrap();
    // Its tunnel breaks, and the first connection with it.
    assert_reset(&mut first).await;
    echoed(&mut second).await;
    // A peer that closes its tunnel is no failure of this side's.
    node.logged(&[
        "\tinfo\taccess\tconnection complete",
        "direction=\"outbound\"",
        "bytes_sent=4 bytes_recv=4",
    ])
    .await;
}

#[tokio::test]
async fn what_an_application_said_is_not_said_twice() {
    let node = Node::start_with(Config { threads: 1, ..Config::default() }).await;
    breaking_peer(&node, Breaks::AtData).await;
    let mut first = TcpStream::connect(node.outbound).await.unwrap();
    echoed(&mut first).await;
    let mut second = TcpStream::connect(node.outbound).await.unwrap();
    second.write_all(b"once").await.unwrap();
    assert_reset(&mut second).await;
    node.logged(&["direction=\"outbound\"", "HBONE peer 10.0.0.2:15008 did not answer", "tunnel broke"])
        .await;
}

#[tokio::test]
async fn somebody_elses_server_is_no_peer() {
    let node = Node::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    node.place("10.0.0.2:15008", listener.local_addr().unwrap());
    // Of this mesh, but not who should be there.
    let credentials = node.ca.certify(&id("intruder"));
    let accepting = shutdown::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        server::accept(socket, credentials.server_config(), &hbone::Config::default()).await.is_err()
    });
    node.refused(node.outbound).await;
    assert!(accepting.await.unwrap());
    node.logged(&["direction=\"outbound\"", "the TLS handshake with HBONE peer 10.0.0.2:15008 failed"]).await;
}

#[tokio::test]
async fn a_pod_has_only_so_many_tunnels() {
    let node = Node::start_with(Config { pod_tunnels_max: 1, ..Config::default() }).await;
    let _through = node.connect().await;
    node.refused(node.hbone).await;
    node.logged(&["connection failed", "already has 1 tunnels"]).await;
}

#[tokio::test]
async fn a_peer_can_ask_only_for_what_is_the_pods() {
    let node = Node::start().await;
    let [.., hbone] = node.add("server", &[SERVER, "fd00::2"], 2);
    node.place("[fd00::2]:80", node.app.local_addr().unwrap());
    let socket = TcpStream::connect(hbone).await.unwrap();
    let credentials = node.ca.certify(&id("client"));
    let (peer, tls) = (HbonePeer(hbone), credentials.client_config(&[id("server")]));
    let (tunnel, driver) =
        handshake(socket, peer, tls, &hbone::Config::default(), &Trust::default()).await.unwrap();
    shutdown::spawn(driver);
    let baggage = HeaderValue::from_static("");
    for (authority, status) in [
        ("10.0.0.3:80", 400),
        ("127.0.0.2:80", 400),
        ("[::1]:80", 400),
        // The pod's, but the application would not see the client there.
        ("[fd00::2]:80", 400),
        ("10.0.0.2:15001", 503),
        ("10.0.0.2:15006", 503),
        ("10.0.0.2:15008", 503),
        ("10.0.0.2:82", 503),
    ] {
        let mut lease = tunnel.lease().unwrap();
        let connect = Connect {
            authority: Authority::parse(authority).unwrap(),
            network: None,
            baggage: &baggage,
            forwarded: Forwarded { client: "10.0.0.1:1".parse().unwrap(), host: None },
            trace: TraceParent { trace: 1, span: 1 },
        };
        let mut opening = lease.open(&connect).await.unwrap();
        match poll_fn(|cx| opening.answer.poll(cx)).await.unwrap() {
            Answered::Refused(got) => assert_eq!(got, status, "{authority}"),
            Answered::Connected { .. } => panic!("connected to {authority}"),
        }
    }
}

#[tokio::test]
async fn strangers_on_the_hbone_port_are_told_of() {
    let node = Node::start().await;
    let mut stranger = TcpStream::connect(node.hbone).await.unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    node.logged(&["connection failed", "direction=\"inbound\"", "the TLS handshake failed"]).await;
    // Somebody from another mesh.
    let socket = TcpStream::connect(node.hbone).await.unwrap();
    let tls = TestCa::new().certify(&id("client")).client_config(&[id("server")]);
    let shaken =
        handshake(socket, HbonePeer(node.hbone), tls, &hbone::Config::default(), &Trust::default()).await;
    assert!(shaken.is_err());
}

fn size<A, B, C, D, F>(_connection: impl Fn(A, B, C, D) -> F) -> usize {
    size_of::<F>()
}

#[test]
fn connections_stay_small() {
    // What an idle connection costs besides its sockets and its stream.
    let sizes = [size(super::outbound::serve), size(super::passthrough::serve), size(super::inbound::stream)];
    assert!(sizes.iter().all(|size| *size <= 1024), "{sizes:?}");
    // Instead of a tunnel's two ends.
    let near = size_of::<super::same_node::SameNodeConnection>();
    assert!(near <= 1024, "{near}");
}

#[tokio::test]
async fn neighbours_are_joined_without_a_tunnel_and_both_ends_tell() {
    let node = Node::start_same_node(Config::default()).await;
    let (mut client, mut server) = node.connect().await;
    say(&mut client, &mut server, b"question").await;
    say(&mut server, &mut client, b"answer").await;
    client.shutdown().await.unwrap();
    assert_eq!(ended(&mut server).await, b"");
    // The other direction is still open.
    say(&mut server, &mut client, b"more").await;
    drop(server);
    assert_eq!(ended(&mut client).await, b"");

    // As through a tunnel.
    let told = [
        "connection complete",
        "src.addr=127.0.0.1:",
        "dst.addr=10.0.0.2:15008",
        "dst.hbone_addr=10.0.0.2:80",
        "src.identity=\"spiffe://cluster.local/ns/test/sa/client",
        "dst.identity=\"spiffe://cluster.local/ns/test/sa/server",
    ];
    node.logged(&[&told[..], &["direction=\"outbound\"", "bytes_sent=8", "bytes_recv=10"]].concat()).await;
    node.logged(&[&told[..], &["direction=\"inbound\"", "bytes_sent=10", "bytes_recv=8"]].concat()).await;
    assert_eq!(node.plane.shards().map(|shard| shard.pool.tunnels()).sum::<usize>(), 0);
}

#[tokio::test]
async fn a_reset_between_neighbours_is_a_reset() {
    let node = Node::start_same_node(Config::default()).await;
    let (client, mut server) = node.connect().await;
    reset_on_close(&client);
    drop(client);
    assert_reset(&mut server).await;

    let (mut client, server) = node.connect().await;
    reset_on_close(&server);
    drop(server);
    assert_reset(&mut client).await;
}

#[tokio::test]
async fn policies_hold_between_neighbours() {
    let mut node = Node::start_same_node(Config::default()).await;
    let (mut client, mut server) = node.connect().await;
    node.mesh.publish(two_pods(vec![allow_only("cluster.local/ns/test/sa/client")]));
    say(&mut client, &mut server, b"still fine").await;

    node.mesh.publish(two_pods(vec![allow_only("cluster.local/ns/test/sa/other")]));
    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
    node.logged(&["direction=\"inbound\"", "dst.hbone_addr", "connection closed due to policy change"]).await;
    node.logged(&["connection complete", "direction=\"outbound\"", "bytes_sent=10"]).await;

    node.refused(node.outbound).await;
    let why = "error=\"connection closed due to policy rejection: allow policies exist, but none allowed\"";
    node.logged(&["direction=\"inbound\"", why]).await;
    node.logged(&["direction=\"outbound\"", "error", "http status: 401"]).await;
}

#[tokio::test]
async fn what_a_neighbour_refuses_is_told_as_through_a_tunnel() {
    let node = Node::start_same_node(Config { pod_connections_max: 1, ..Config::default() }).await;
    for (to, why) in [
        ("10.0.0.2:81", "could not connect to the application at 10.0.0.2:81"),
        ("10.0.0.2:15006", "attempted recursive call to ourselves: 10.0.0.2:15006"),
    ] {
        node.toward(to);
        node.refused(node.outbound).await;
        node.logged(&["direction=\"inbound\"", why]).await;
        let asked = format!("dst.hbone_addr={to}");
        node.logged(&["direction=\"outbound\"", &asked, "http status: 503"]).await;
    }
    node.toward(SERVICE);
    let server = Arc::clone(&node.plane.pods().get(&PodUid::from("server")).unwrap().pod);
    let full = server.admit(1);
    node.refused(node.outbound).await;
    node.logged(&["connection failed", "direction=\"inbound\"", "already has 1 connections"]).await;
    drop(full);
    let _through = node.connect().await;
}

#[tokio::test]
async fn only_a_pod_that_is_served_now_is_a_neighbour() {
    let off = Config { same_node: false, ..Config::default() };
    Node::start_same_node(off).await.sent_through_a_tunnel().await;

    let node = Node::start_same_node(Config::default()).await;
    node.plane.no_neighbour(&PodUid::from("server"));
    node.sent_through_a_tunnel().await;

    let node = Node::start_same_node(Config::default()).await;
    node.plane.no_neighbours();
    node.sent_through_a_tunnel().await;

    let node = Node::start_same_node(Config::default()).await;
    node.plane.stop_accepting();
    node.plane.neighbour(&PodUid::from("server"));
    node.sent_through_a_tunnel().await;
}

#[tokio::test]
async fn a_removed_pod_keeps_its_neighbours_connections() {
    let node = Node::start_same_node(Config::default()).await;
    let (mut client, mut server) = node.connect().await;
    let leaving = node.plane.remove_pod(&PodUid::from("server")).unwrap();
    say(&mut client, &mut server, b"still here").await;
    assert!(!leaving.is_over());
    node.sent_through_a_tunnel().await;
    say(&mut server, &mut client, b"and still here").await;
    drop((client, server));
    let over = async {
        while !leaving.is_over() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, over).await.expect("nothing is kept of the pod");
}

/// As [`DataPlane::add_redirected_pod`] promises.
#[tokio::test]
async fn what_is_open_of_a_removed_redirected_pod_is_closed_between_neighbours_too() {
    let mut node = Node::start_same_node(Config::default()).await;
    node.outbound = node.add_with("client", &[CLIENT, "127.0.0.1"], 1, Some(shutdown::channel()))[0];
    node.add_with("server", &[SERVER], 2, Some(shutdown::channel()));
    node.plane.neighbour(&PodUid::from("client"));
    node.plane.neighbour(&PodUid::from("server"));
    let (mut client, mut server) = node.connect().await;
    say(&mut client, &mut server, b"question").await;
    assert_eq!(node.plane.shards().map(|shard| shard.pool.tunnels()).sum::<usize>(), 0);

    let leaving = node.plane.remove_pod(&PodUid::from("server")).unwrap();
    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
    node.logged(&["connection complete", "direction=\"inbound\"", "bytes_recv=8"]).await;
    node.logged(&["connection complete", "direction=\"outbound\"", "bytes_sent=8"]).await;
    let over = async {
        while !leaving.is_over() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, over).await.expect("nothing is kept of the pod");
}

#[tokio::test]
async fn a_drain_waits_for_neighbours() {
    let linger = Duration::from_millis(50);
    let node = Node::start_same_node(Config { linger, ..Config::default() }).await;
    let (mut client, mut server) = node.connect().await;
    let mut drained = Box::pin(node.plane.drained());
    node.stop.drain();
    assert!(timeout(Duration::from_millis(200), &mut drained).await.is_err(), "one is open");
    say(&mut client, &mut server, b"last words").await;
    drop((client, server));
    timeout(PATIENCE, drained).await.unwrap();
}

#[tokio::test]
async fn without_a_certificate_there_is_no_neighbour() {
    for (client, server, why) in [
        ("stranger", "server", "no certificate for spiffe://cluster.local/ns/test/sa/stranger"),
        ("client", "stranger", "could not connect to HBONE peer"),
    ] {
        let mut node = Node::start_same_node(Config::default()).await;
        let as_whom = |name, who, address| {
            Arc::new(Workload { identity: id(who), ..Workload::clone(&workload(name, address)) })
        };
        let workloads = [as_whom("client", client, CLIENT), as_whom("server", server, SERVER)];
        node.mesh.publish(Mesh::new(TrustDomain::default(), workloads, [], []));
        node.refused(node.outbound).await;
        node.logged(&["direction=\"outbound\"", why]).await;
    }
}

#[tokio::test]
async fn while_the_authority_says_nothing_neighbours_are_who_the_mesh_says() {
    for (client, server) in [("orphan", "server"), ("client", "orphan"), ("orphan", "orphan")] {
        let mut node = Node::start_same_node(Config::default()).await;
        let identities = node.plane.threads[0].shard.identities.clone();
        let asked = identities.clone();
        shutdown::spawn(async move { asked.credentials(&id("orphan")).await });
        let silent = async {
            while !identities.is_authority_silent(&id("orphan")) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, silent).await.expect("the failure is noted");
        let as_whom = |name, who, address| {
            Arc::new(Workload { identity: id(who), ..Workload::clone(&workload(name, address)) })
        };
        let workloads = [as_whom("client", client, CLIENT), as_whom("server", server, SERVER)];
        let only = allow_only(&format!("cluster.local/ns/test/sa/{client}"));
        node.mesh.publish(Mesh::new(TrustDomain::default(), workloads.clone(), [], [Arc::new(only)]));
        let (mut one, mut other) = node.connect().await;
        say(&mut one, &mut other, b"question").await;
        drop((one, other));
        node.logged(&["direction=\"inbound\"", &format!("/sa/{client}\"")]).await;
        // Policies hold for that identity as for any other.
        let only = allow_only("cluster.local/ns/test/sa/somebody");
        node.mesh.publish(Mesh::new(TrustDomain::default(), workloads, [], [Arc::new(only)]));
        node.refused(node.outbound).await;
    }
}

#[tokio::test]
async fn pods_that_were_handed_over_can_be_taken_back() {
    let linger = Duration::from_millis(50);
    let mut node = Node::start_with(Config { linger, ..Config::default() }).await;
    let (mut client, mut server) = node.connect().await;
    for sockets in [false, true] {
        if sockets {
            node.plane.hand_over_sockets()
        } else {
            node.plane.stop_accepting()
        }
        let closed = async {
            while TcpStream::connect(node.outbound).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, closed).await.expect("nothing new is taken");
        node.plane.serve_again();
        node.outbound = node.add("client", &[CLIENT, "127.0.0.1"], 1)[0];
        node.add_server();
        let mut again = TcpStream::connect(node.outbound).await.unwrap();
        again.write_all(b"new").await.unwrap();
        // What was tried until nothing was taken any more may come first, and says nothing.
        while ended_or_said(&mut node.app.accept().await.unwrap().0).await != b"new" {}
        say(&mut client, &mut server, b"what was open").await;
    }
}

#[tokio::test]
async fn a_removed_pod_is_served_for_a_moment_by_whoever_does_not_know_yet() {
    let fade = Duration::from_millis(300);
    let linger = Duration::from_millis(50);
    let node = Node::start_with(Config { linger, fade, ..Config::default() }).await;
    node.certified("server").await;
    for uid in ["server", "client"] {
        node.plane.remove_pod(&PodUid::from(uid)).unwrap();
    }
    // No tunnel was there before.
    let (mut client, mut server) = node.connect().await;
    say(&mut client, &mut server, b"late").await;
    let closed = async {
        while TcpStream::connect(node.outbound).await.is_ok() || TcpStream::connect(node.hbone).await.is_ok()
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, closed).await.expect("then it is over");
    say(&mut server, &mut client, b"goes on").await;
}
