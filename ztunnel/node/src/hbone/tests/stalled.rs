//! Peers that do not take what they asked for, and peers that send what nobody asked for.

use std::io;
use std::task::Context;
use std::task::Poll;

use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::ReadBuf;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::TlsConnector;

use super::*;
use crate::hbone::transport::BACKLOG_MAX;
use crate::net::budget::Budget;

/// Long enough to be sure that nothing comes.
const A_WHILE: Duration = Duration::from_millis(200);

/// Sends until nothing is taken any more, and says how much was.
async fn send_until_stalled(half: &mut SendHalf) -> usize {
    let mut sent = 0;
    loop {
        let mut data = Bytes::from(vec![7; 64 * 1024]);
        let moved = tokio::time::timeout(A_WHILE, poll_fn(|cx| half.poll_send(cx, &mut data))).await;
        match moved {
            Ok(moved) => sent += moved.unwrap(),
            Err(_stalled) => return sent,
        }
    }
}

/// Connects, and never reads.
fn never_read() -> Handle {
    handle(async |incoming: Incoming| {
        let _halves = incoming.connect(None).unwrap();
        pending::<()>().await;
    })
}

/// Reads nothing of the first streams, and sends back what comes on later ones.
fn stall(first: usize) -> Handle {
    let count = AtomicUsize::new(0);
    let (mute, echo) = (never_read(), echo());
    Arc::new(
        move |incoming| {
            if count.fetch_add(1, Ordering::Relaxed) < first { mute(incoming) } else { echo(incoming) }
        },
    )
}

async fn is_echoed((_lease, mut forth, mut recv): (Lease, SendHalf, RecvHalf), bytes: usize) {
    let all = vec![9; bytes];
    let (sent, got) = tokio::join!(
        async {
            send(&mut forth, all.clone()).await?;
            forth.finish()
        },
        tokio::time::timeout(PATIENCE, receive(&mut recv)),
    );
    sent.unwrap();
    assert!(got.expect("an answer").unwrap() == all);
}

#[tokio::test]
async fn stalled_streams_cost_no_other_stream() {
    let config = Config { stream_window: 65_535, ..Config::default() };
    let mesh = Mesh::start(Config { connection_window: 65_535, ..config }, stall(99)).await;
    let mut stalled = Vec::new();
    for _ in 0..99 {
        let (lease, mut forth, recv) = mesh.connected().await;
        send(&mut forth, vec![7; 65_535]).await.unwrap();
        stalled.push((lease, forth, recv));
    }
    let one_more = mesh.connected().await;
    assert_eq!(mesh.dials(), 1, "on the same tunnel");
    is_echoed(one_more, 1_000_000).await;
}

/// A server of another make, with these windows, which reads nothing of any stream.
async fn other_server(ca: &TestCa, stream: u32, connection: u32) -> HbonePeer {
    let tls = TlsAcceptor::from(ca.certify(&id("server")).server_config());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = HbonePeer(listener.local_addr().unwrap());
    shutdown::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let tls = tls.clone();
            shutdown::spawn(async move {
                let socket = tls.accept(socket).await.unwrap();
                let mut builder = h2::server::Builder::new();
                builder.initial_window_size(stream).initial_connection_window_size(connection);
                let mut serving = builder.handshake::<_, Bytes>(socket).await.unwrap();
                let mut kept = Vec::new();
                while let Some(Ok((request, mut respond))) = serving.accept().await {
                    let send = respond.send_response(http::Response::new(()), false).unwrap();
                    kept.push((request, respond, send));
                }
            });
        }
    });
    peer
}

#[tokio::test]
async fn a_tunnel_on_which_nothing_moves_gets_no_new_streams() {
    let mut mesh = Mesh::start(Config::default(), echo()).await;
    mesh.peer = other_server(&mesh.ca, 1 << 20, 65_535).await;
    let mut first = mesh.connected().await;
    assert_eq!(send_until_stalled(&mut first.1).await, 65_535);
    let mut second = mesh.connected().await;
    assert_eq!(mesh.dials(), 2, "it would wait for the first");
    assert_eq!(send_until_stalled(&mut second.1).await, 65_535);
    // No peer gets tunnels without end so.
    let mut all = vec![first, second];
    for _ in 0..10 {
        let mut next = mesh.connected().await;
        send_until_stalled(&mut next.1).await;
        all.push(next);
    }
    assert_eq!(mesh.dials(), 8);
}

/// A socket that is read from only while that is allowed.
struct Gated {
    socket: TcpStream,
    closed: Arc<AtomicBool>,
}

impl AsyncRead for Gated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Who opens it polls as well.
        if self.closed.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        Pin::new(&mut self.socket).poll_read(cx, out)
    }
}

impl AsyncWrite for Gated {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// A server of another make, with large windows. Of each tunnel it reads nothing once there are two streams on it; when
/// `shrink` has something for it, it makes the windows of streams as small as can be, and reads on.
async fn shrinking_server(ca: &TestCa, shrink: Arc<Semaphore>) -> HbonePeer {
    let tls = TlsAcceptor::from(ca.certify(&id("server")).server_config());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = HbonePeer(listener.local_addr().unwrap());
    shutdown::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (tls, shrink) = (tls.clone(), Arc::clone(&shrink));
            shutdown::spawn(async move {
                let closed = Arc::new(AtomicBool::new(false));
                let socket = tls.accept(Gated { socket, closed: Arc::clone(&closed) }).await.unwrap();
                let mut builder = h2::server::Builder::new();
                builder.initial_window_size(64 << 20).initial_connection_window_size(1 << 30);
                let mut serving = builder.handshake::<_, Bytes>(socket).await.unwrap();
                let mut kept = Vec::new();
                while let Some(Ok((request, mut respond))) = serving.accept().await {
                    let send = respond.send_response(http::Response::new(()), false).unwrap();
                    kept.push((request, respond, send));
                    if kept.len() == 2 {
                        closed.store(true, Ordering::Relaxed);
                        tokio::select! {
                            more = serving.accept() => panic!("it is not read from: {}", more.is_some()),
                            permit = shrink.acquire() => permit.unwrap().forget(),
                        }
                        serving.set_initial_window_size(0).unwrap();
                        // What is said goes out before anything is read.
                        poll_fn(|cx| Poll::Ready(serving.poll_accept(cx).is_pending())).await;
                        closed.store(false, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    peer
}

#[tokio::test]
async fn a_tunnel_whose_room_is_taken_by_streams_that_may_not_send_gets_no_new_ones() {
    let mut mesh = Mesh::start(Config::default(), echo()).await;
    let shrink = Arc::new(Semaphore::new(0));
    mesh.peer = shrinking_server(&mesh.ca, Arc::clone(&shrink)).await;
    let (mut first, mut second) = (mesh.connected().await, mesh.connected().await);
    let tunnel = mesh.pool.only_tunnel();
    // Until the tunnel is full: neither the socket nor the tunnel itself takes more.
    send_until_stalled(&mut first.1).await;
    send_until_stalled(&mut second.1).await;
    assert!(!tunnel.is_exhausted(), "there is window for more");
    shrink.add_permits(1);
    let noticed = async {
        while !tunnel.is_exhausted() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, noticed).await.expect("that nothing moves any more is noticed");
    let _third = mesh.connected().await;
    assert_eq!(mesh.dials(), 2, "it would wait for what the first two have put there");
    // With these gone there is room again.
    drop((first, second));
    let freed = async {
        while tunnel.is_exhausted() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, freed).await.expect("there is room again");
}

#[tokio::test]
async fn what_a_peer_does_not_read_is_not_kept() {
    let (served, mut streams) = mpsc::unbounded_channel();
    let mesh = Mesh::start(
        Config::default(),
        handle(move |incoming: Incoming| {
            let served = served.clone();
            async move { served.send(incoming.connect(None).unwrap()).unwrap() }
        }),
    )
    .await;
    // A client that takes everything, as far as HTTP/2 goes, and reads nothing.
    let socket = TcpStream::connect(mesh.peer.0).await.unwrap();
    let name = rustls::pki_types::ServerName::IpAddress(mesh.peer.0.ip().into());
    let tls = TlsConnector::from(mesh.client.client_config(&[id("server")]));
    let tls = tls.connect(name, socket).await.unwrap();
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(i32::MAX as u32).initial_connection_window_size(i32::MAX as u32);
    let (mut client, connection) = builder.handshake::<_, Bytes>(tls).await.unwrap();
    let mut connection = Box::pin(connection);
    let mut opened = Vec::new();
    let open = async {
        for _ in 0..100 {
            client = client.clone().ready().await.unwrap();
            let request = http::Request::builder().method("CONNECT").uri("10.0.0.1:80").body(()).unwrap();
            let (answer, send) = client.send_request(request, false).unwrap();
            opened.push((answer.await.unwrap(), send));
        }
    };
    tokio::select! {
        () = open => {}
        _ended = &mut connection => panic!("it ended"),
    }
    // From here on the connection is not polled any more.
    let mut sent = 0;
    let mut kept = Vec::new();
    while let Ok((mut send, recv)) = streams.try_recv() {
        let mut data = Bytes::from(vec![7; 4 << 20]);
        // Until the tunnel is full; then none of its streams gets anything on it.
        while let Ok(moved) = tokio::time::timeout(
            if sent == 0 { A_WHILE } else { Duration::from_millis(10) },
            poll_fn(|cx| send.poll_send(cx, &mut data)),
        )
        .await
        {
            sent += moved.unwrap();
            if data.is_empty() {
                break;
            }
        }
        kept.push((send, recv));
    }
    assert_eq!(kept.len(), 100);
    // What the kernel takes for both sockets is in it as well.
    let bound = Config::default().tunnel_send_buffer + Config::default().send_buffer + 2 * BACKLOG_MAX;
    assert!(sent < bound + (16 << 20), "{sent}");
}

#[tokio::test]
async fn who_holds_most_is_closed_and_the_others_go_on() {
    let budget = Budget::new(1 << 20);
    let mesh = Mesh::start(Config::default(), echo()).await;
    let (_lease, mut forth, _recv) = mesh.connected().await;
    let share = budget.share("pod".to_owned());
    let tunnel = mesh.pool.only_tunnel();
    tunnel.charge_to(share.holder(100_000));
    is_echoed(mesh.connected().await, 100_000).await;
    let small = share.holder(50_000);
    assert!(tunnel.is_open());
    let large = share.holder(400_000);
    assert_eq!(budget.shed(), 1);
    assert!(tunnel.is_open(), "it does not hold most");
    drop(large);
    let more: Vec<_> = (0..5).map(|_| share.holder(76_000)).collect();
    assert_eq!(budget.shed(), 2);
    let error = poll_fn(|cx| forth.poll_reset(cx)).await;
    assert!(matches!(error, StreamError::Tunnel(_)), "{error}");
    drop((small, more));
}

/// A client of another make.
async fn other_client(mesh: &Mesh) -> impl AsyncRead + AsyncWrite + Unpin + Send + use<> {
    let socket = TcpStream::connect(mesh.peer.0).await.unwrap();
    let name = rustls::pki_types::ServerName::IpAddress(mesh.peer.0.ip().into());
    let tls = TlsConnector::from(mesh.client.client_config(&[id("server")]));
    tls.connect(name, socket).await.unwrap()
}

#[tokio::test]
async fn small_and_empty_frames_end_no_tunnel() {
    // The application is dialled for a while, so that nobody takes what is said.
    let mesh = Mesh::start(
        Config::default(),
        handle(async |mut incoming: Incoming| {
            let dialling = poll_fn(|cx| {
                let kept = incoming.kept(cx);
                if kept >= 60_000 { Poll::Ready(()) } else { Poll::Pending }
            });
            tokio::time::timeout(PATIENCE, dialling).await.expect("all of it comes");
            let (mut send, mut recv) = incoming.connect(None).unwrap();
            assert_eq!(receive(&mut recv).await.unwrap().len(), 60_000);
            send.finish().unwrap();
        }),
    )
    .await;
    let tls = other_client(&mesh).await;
    let (mut client, connection) = h2::client::handshake(tls).await.unwrap();
    let connection = shutdown::spawn(connection);
    client = client.ready().await.unwrap();
    let request = http::Request::builder().method("CONNECT").uri("10.0.0.1:80").body(()).unwrap();
    let (answer, mut send) = client.send_request(request, false).unwrap();
    for _ in 0..500 {
        send.send_data(Bytes::new(), false).unwrap();
    }
    for n in 0..60_000 {
        send.send_data(Bytes::from_static(b"."), n == 59_999).unwrap();
        if n % 100 == 0 {
            tokio::task::yield_now().await;
        }
    }
    let answer = tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(!connection.is_finished());
}

/// A frame, to be written as it is.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
    [&[a, b, c, kind, flags, 0, 0, 0, stream], payload].concat()
}

/// Reads a frame: its kind, its flags, its stream and its payload.
async fn read_frame(from: &mut (impl AsyncRead + Unpin)) -> (u8, u8, u32, Vec<u8>) {
    let mut head = [0; 9];
    from.read_exact(&mut head).await.unwrap();
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    from.read_exact(&mut payload).await.unwrap();
    (head[3], head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload)
}

#[tokio::test]
async fn padding_uses_up_no_window() {
    // As much as HTTP/2 begins with, for the stream and for the tunnel.
    let config = Config { stream_window: 65_535, connection_window: 65_535, ..Config::default() };
    let mesh = Mesh::start(Config { server_streams_max: 1, ..config }, echo()).await;
    let mut tls = other_client(&mesh).await;
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    // CONNECT, by literals whose names are in the static table (RFC 7541, appendix A).
    let headers = [b"\x02\x07CONNECT\x01\x0b", &b"10.0.0.1:80"[..]].concat();
    for said in [frame(4, 0, 0, b""), frame(4, 1, 0, b""), frame(1, 4, 1, &headers)] {
        tls.write_all(&said).await.unwrap();
    }
    let padding = frame(0, 8, 1, &[&[255][..], &[0; 255]].concat());
    let (mut windows, mut used) = ([65_535_u32; 2], 0);
    // Several times as much as the windows, as far as they allow; an answered ping says that no more is to be expected.
    while used < 4 * 65_535 {
        let many = windows.into_iter().min().unwrap() / 256;
        assert!(many > 0, "{used} bytes were padding, and that was all: {windows:?}");
        for _ in 0..many {
            tls.write_all(&padding).await.unwrap();
        }
        used += 256 * many;
        windows = windows.map(|window| window - 256 * many);
        for number in [b"first...", b"second.."] {
            tls.write_all(&frame(6, 0, 0, number)).await.unwrap();
            tls.flush().await.unwrap();
            let answered = async {
                loop {
                    match read_frame(&mut tls).await {
                        (6, 1, 0, said) => return assert_eq!(said, number),
                        (8, 0, stream @ (0 | 1), more) => {
                            windows[stream as usize] += u32::from_be_bytes(more.try_into().unwrap());
                        }
                        (3 | 7, ..) => panic!("reset"),
                        _ => {}
                    }
                }
            };
            tokio::time::timeout(PATIENCE, answered).await.expect("an answered ping");
        }
        assert!(windows.into_iter().all(|window| window <= 65_535), "more than was taken: {windows:?}");
    }
    // The stream is the same as before.
    tls.write_all(&frame(0, 1, 1, b"said")).await.unwrap();
    tls.flush().await.unwrap();
    let echoed = async {
        loop {
            if let (0, _, 1, said) = read_frame(&mut tls).await {
                return said;
            }
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, echoed).await.unwrap(), b"said");
}

#[tokio::test]
async fn who_floods_is_told_to_be_calm() {
    let mesh = Mesh::start(Config::default(), echo()).await;
    let ping = [&[0, 0, 8, 6, 0, 0, 0, 0, 0][..], b"12345678"].concat();
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    for frame in [&ping[..], &settings] {
        let mut tls = other_client(&mesh).await;
        tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        tls.write_all(&settings).await.unwrap();
        let (mut read, mut write) = tokio::io::split(tls);
        let flood = frame.repeat(100);
        let flooding =
            async { while write.write_all(&flood).await.is_ok() && write.flush().await.is_ok() {} };
        let mut heard = Vec::new();
        let (ended, ()) =
            tokio::join!(tokio::time::timeout(PATIENCE, read.read_to_end(&mut heard)), flooding);
        // GOAWAY, ENHANCE_YOUR_CALM; of which a reset, as there is always more that nobody reads, may leave nothing.
        let (ended, calm) = (ended.expect("it is cut"), crate::hbone::frames::CALM);
        let told = heard.windows(calm.len()).any(|said| said == calm);
        assert!(told || ended.is_err(), "{} bytes", heard.len());
    }
    // Others are served.
    is_echoed(mesh.connected().await, 1000).await;
}

#[tokio::test]
async fn a_tunnel_that_is_not_used_is_closed() {
    let config = Config {
        server_idle_timeout: Duration::from_millis(100),
        ping_interval: Duration::from_millis(20),
        ..Config::default()
    };
    let mesh = Mesh::start(config, echo()).await;
    let used = mesh.connected().await;
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(mesh.pool.tunnels(), 1, "it has a stream");
    is_echoed(used, 1000).await;
    let closed = async {
        while mesh.pool.tunnels() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, closed).await.unwrap();
}
