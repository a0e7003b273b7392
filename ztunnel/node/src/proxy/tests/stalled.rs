//! Applications and peers that do not take what they asked for, on every path.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use rustls::pki_types::ServerName;
use tokio::net::TcpSocket;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::TlsConnector;

use super::*;
use crate::proxy::tunnels::IDENTITY_PART;

/// All that may be held.
const MEMORY: usize = 8 << 20;

/// Connections of which nobody reads anything.
const STALLED: usize = 60;

/// Connects with as little room for what comes as there can be.
async fn connect_narrow(to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(to).await.unwrap()
}

/// Clients read nothing of what servers send without end: no more is held than may be, some may have to give way, and
/// others are served.
async fn stalled_downloads(node: Node, at: SocketAddr, count: usize, shed_in: Option<&str>) {
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(connect_narrow(at).await);
        let (mut server, _) = timeout(PATIENCE, node.app.accept()).await.expect("delivered").unwrap();
        shutdown::spawn(async move { while server.write_all(&[7; 64 * 1024]).await.is_ok() {} });
    }
    let budget = node.plane.budget();
    let filled = async {
        while budget.used() < 1 << 20 || (shed_in.is_some() && budget.shed() == 0) {
            assert!(budget.used() < MEMORY + (4 << 20), "{budget:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, filled).await.expect("more is asked for than may be held");
    if let Some(direction) = shed_in {
        node.logged(&["the memory for what peers do not take is used up, and it held", direction]).await;
    }
    let mut client = TcpStream::connect(at).await.unwrap();
    let (mut server, _) = timeout(PATIENCE, node.app.accept()).await.expect("delivered").unwrap();
    say(&mut client, &mut server, b"question").await;
    say(&mut server, &mut client, b"answer").await;
    assert!(budget.used() < MEMORY + (4 << 20), "{budget:?}");
    drop((client, server, clients));
    let none = async {
        // What is left is tunnels.
        while budget.used() > 1 << 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, none).await.expect("what is gone holds nothing");
}

fn config() -> Config {
    Config { threads: 1, buffer_memory: MEMORY, ..Config::default() }
}

#[tokio::test]
async fn what_nobody_reads_of_a_tunnel_is_bounded() {
    let node = Node::start_with(config()).await;
    let at = node.outbound;
    stalled_downloads(node, at, STALLED, Some("direction=\"outbound\"")).await;
}

#[tokio::test]
async fn what_nobody_reads_on_the_same_node_is_bounded() {
    let node = Node::start_same_node(config()).await;
    let at = node.outbound;
    // Less is read at a time once memory gets short: few of them may stay just below what may be held.
    stalled_downloads(node, at, 4 * STALLED, Some("direction=\"outbound\"")).await;
}

#[tokio::test]
async fn what_nobody_reads_in_clear_is_bounded() {
    let node = Node::start_with(config()).await;
    let at = node.inbound;
    // Less is read at a time once memory gets short, and so little is kept of each.
    stalled_downloads(node, at, STALLED, None).await;
}

/// Takes tunnels and streams, and answers none.
pub(super) async fn mute_peer(listener: TcpListener, credentials: Credentials) {
    while let Ok((socket, _)) = listener.accept().await {
        let tls = credentials.server_config();
        shutdown::spawn(async move {
            let config = hbone::Config::default();
            let Ok(accepted) = server::accept(socket, tls, &config).await else { return };
            let mut unanswered = Vec::new();
            let _ended =
                server::serve(accepted, &config, pending(), |incoming| unanswered.push(incoming)).await;
        });
    }
}

/// So little memory that not all of [`WAITING`] have room.
pub(super) fn narrow() -> Config {
    let answer_timeout = Duration::from_secs(3600);
    Config { threads: 1, buffer_memory: 2 << 20, answer_timeout, ..Config::default() }
}

/// Connections to a peer that does not answer.
const WAITING: usize = 80;

/// Clients wait for an answer that never comes: those are reset for which there is no room.
pub(super) async fn who_waits_gives_way(node: Node) {
    let (tell, mut told) = mpsc::unbounded_channel();
    for _ in 0..WAITING {
        let (tell, at) = (tell.clone(), node.outbound);
        shutdown::spawn(async move {
            let ended = match TcpStream::connect(at).await {
                Ok(mut client) => client.read(&mut [0; 1]).await,
                Err(error) => Err(error),
            };
            tell.send(ended.unwrap_err().kind()).unwrap();
        });
    }
    let ended = timeout(PATIENCE, told.recv()).await.expect("some have to give way");
    assert_eq!(ended, Some(io::ErrorKind::ConnectionReset));
    node.logged(&["direction=\"outbound\"", "the memory for what peers do not take is used up"]).await;
    let budget = node.plane.budget();
    let room = async {
        while budget.used() > budget.limit() / 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, room).await.expect("no more is held than a pod may");
}

#[tokio::test]
async fn who_waits_for_a_peers_answer_gives_way() {
    let node = Node::start_with(narrow()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    node.place("10.0.0.2:15008", listener.local_addr().unwrap());
    shutdown::spawn(mute_peer(listener, node.ca.certify(&id("server"))));
    who_waits_gives_way(node).await;
}

#[tokio::test]
async fn a_peer_that_refuses_every_stream_is_dialled_three_times() {
    let node = Node::start_with(Config { threads: 1, ..Config::default() }).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    node.place("10.0.0.2:15008", listener.local_addr().unwrap());
    let tls = TlsAcceptor::from(node.ca.certify(&id("server")).server_config());
    let dials = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&dials);
    shutdown::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            let tls = tls.clone();
            shutdown::spawn(async move {
                let mut serving = h2::server::handshake(tls.accept(socket).await.unwrap()).await.unwrap();
                while let Some(Ok((_request, mut respond))) = serving.accept().await {
                    respond.send_reset(h2::Reason::REFUSED_STREAM);
                }
            });
        }
    });
    node.refused(node.outbound).await;
    node.logged(&["direction=\"outbound\"", "the peer did not take the stream"]).await;
    assert_eq!(dials.load(Ordering::Relaxed), crate::proxy::upstream::REFUSALS_MAX);
}

#[tokio::test]
async fn a_tunnel_beyond_the_part_of_its_identity_is_reset() {
    let node =
        Node::start_with(Config { threads: 1, pod_tunnels_max: IDENTITY_PART, ..Config::default() }).await;
    let (mut client, mut server) = node.connect().await;
    say(&mut client, &mut server, b"in use").await;
    let socket = TcpStream::connect(node.hbone).await.unwrap();
    let tls = node.ca.certify(&id("client")).client_config(&[id("server")]);
    let name = ServerName::IpAddress(node.hbone.ip().into());
    let mut second = TlsConnector::from(tls).connect(name, socket).await.unwrap();
    let ended = timeout(PATIENCE, second.read(&mut [0; 1])).await.expect("an end");
    assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    node.logged(&["direction=\"inbound\"", "the client already has its part of the 4 tunnels"]).await;
    assert_eq!(node.plane.live().turned_away, 1);
    say(&mut client, &mut server, b"still in use").await;
}

#[tokio::test]
async fn handshakes_that_are_not_finished_keep_nobody_out() {
    let node = Node::start_with(Config { pod_handshakes_max: 32, ..Config::default() }).await;
    let mut idle = Vec::new();
    for _ in 0..20 {
        // Those above the source's share are reset, maybe before they know that they are connected.
        idle.extend(TcpStream::connect(node.hbone).await.ok());
    }
    // All come from one address, of which four may be in progress: the oldest is closed for the next, after a second.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let (mut client, mut server) = node.connect().await;
    say(&mut client, &mut server, b"question").await;
    node.logged(&["connection failed", "the handshake made room for others"]).await;
    drop(idle);
}
