use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;

use rustix::net::SendAncillaryMessage;
use tokio::time::timeout;

use super::*;

/// An agent that listens, in its simplest form.
struct Agent {
    _dir: tempfile::TempDir,
    path: PathBuf,
    listener: OwnedFd,
}

impl Agent {
    fn listen() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ztunnel.sock");
        let flags = SocketFlags::CLOEXEC;
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 8).unwrap();
        Self { _dir: dir, path, listener }
    }

    fn accept(&self) -> OwnedFd {
        rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC).unwrap()
    }
}

fn send(socket: &OwnedFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
}

async fn connected(agent: &Agent) -> (Link, OwnedFd) {
    let mut link = Link::new(agent.path.clone());
    assert!(matches!(link.next(false).await, Happened::Connected));
    (link, agent.accept())
}

async fn received(link: &mut Link) -> Packet {
    match link.next(false).await {
        Happened::Received(packet) => packet,
        other => panic!("{other:?}"),
    }
}

/// Descriptors of this process that lead to `/dev/zero`, which nothing else here opens.
fn zeros() -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    open.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|path| path == Path::new("/dev/zero"))).count()
}

#[tokio::test]
async fn packets_go_both_ways() {
    let agent = Agent::listen();
    let (mut link, socket) = connected(&agent).await;
    link.send(b"hello").unwrap();
    let mut buffer = [0; 64];
    assert_eq!(rustix::io::read(&socket, &mut buffer).unwrap(), 5);
    send(&socket, b"one", &[]);
    send(&socket, b"two", &[]);
    assert_eq!(received(&mut link).await.bytes, b"one", "a packet is one message");
    assert_eq!(received(&mut link).await.bytes, b"two");
}

#[tokio::test]
async fn descriptors_come_with_their_packet_and_none_is_leaked() {
    let agent = Agent::listen();
    let (mut link, socket) = connected(&agent).await;
    let file = File::open("/dev/zero").unwrap();
    let before = zeros();
    send(&socket, b"one", &[file.as_fd()]);
    let packet = received(&mut link).await;
    assert_eq!((packet.descriptors.len(), packet.truncated), (1, false));
    assert!(rustix::io::fcntl_getfd(&packet.descriptors[0]).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    drop(packet);
    for count in [DESCRIPTORS_MAX, 60] {
        send(&socket, b"many", &vec![file.as_fd(); count]);
        let packet = received(&mut link).await;
        assert!(packet.descriptors.len() > 1, "{}", packet.descriptors.len());
        assert_eq!(packet.truncated, count > DESCRIPTORS_MAX);
    }
    assert_eq!(zeros(), before);
}

#[tokio::test]
async fn a_long_packet_is_truncated() {
    let agent = Agent::listen();
    let (mut link, socket) = connected(&agent).await;
    send(&socket, &[7; MESSAGE_MAX], &[]);
    assert!(!received(&mut link).await.truncated);
    send(&socket, &[7; MESSAGE_MAX + 1], &[]);
    assert!(received(&mut link).await.truncated);
}

#[tokio::test]
async fn a_packet_waits_while_the_last_is_not_answered() {
    let agent = Agent::listen();
    let (mut link, socket) = connected(&agent).await;
    send(&socket, b"early", &[]);
    assert!(timeout(Duration::from_millis(50), link.next(true)).await.is_err());
    assert_eq!(received(&mut link).await.bytes, b"early");
}

#[tokio::test(start_paused = true)]
async fn a_lost_agent_is_looked_for_until_it_is_back() {
    let agent = Agent::listen();
    let (mut link, socket) = connected(&agent).await;
    drop(socket);
    assert!(matches!(link.next(false).await, Happened::Lost(_)));
    let Agent { _dir, path, listener } = agent;
    drop(listener);
    std::fs::remove_file(&path).unwrap();
    let away = timeout(Duration::from_secs(60), link.next(false)).await;
    assert!(away.is_err(), "there is no agent");
    let back = Agent::listen();
    std::fs::rename(&back.path, &path).unwrap();
    let found = timeout(BACKOFF_MAX * 2, link.next(false)).await;
    assert!(matches!(found, Ok(Happened::Connected)), "{found:?}");
    assert!(link.send(b"hello").is_ok());
}

#[test]
fn waits_double_up_to_a_limit_and_start_again_once_proved() {
    let mut backoff = Backoff::default();
    let waits: Vec<Duration> = (0..8).map(|_| backoff.next(1.0)).collect();
    assert_eq!(waits[..3], [BACKOFF_MIN, BACKOFF_MIN * 2, BACKOFF_MIN * 4]);
    assert_eq!(waits[7], BACKOFF_MAX);
    assert_eq!(Backoff::default().next(0.0), BACKOFF_MIN / 2);
    backoff.reset();
    assert_eq!(backoff.next(1.0), BACKOFF_MIN);
}
