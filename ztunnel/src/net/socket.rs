//! Socket options, accepting, and the two kinds of dial: leaving the pod, and delivering to its application.
#![expect(unsafe_code, reason = "accept4(2) has no safe wrapper that reports the peer and sets both flags")]

use std::io;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt;
use socket2::Domain;
use socket2::Protocol;
use socket2::SockAddr;
use socket2::SockRef;
use socket2::Socket;
use socket2::TcpKeepalive;
use socket2::Type;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpSocket;
use ztunnel_ebpf_abi::BYPASS;
use ztunnel_ebpf_abi::REPLY;

use crate::model::addr::OriginalDst;
use crate::model::addr::canonical;
use crate::net::bypass::Bypass;
use crate::net::netns::Netns;
use crate::net::origdst::original_dst;

/// Probes that find dead peers of idle connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keepalive {
    /// Whether there are any.
    pub enabled: bool,
    /// How long a connection is idle before the first probe.
    pub time: Duration,
    /// Between probes.
    pub interval: Duration,
    /// Unanswered probes before the connection is dead.
    pub retries: u32,
    /// Whether data that the peer does not acknowledge for as long ends the connection, too (TCP_USER_TIMEOUT).
    pub user_timeout: bool,
}

impl Default for Keepalive {
    fn default() -> Self {
        let period = Duration::from_secs(180);
        Self { enabled: true, time: period, interval: period, retries: 9, user_timeout: false }
    }
}

impl Keepalive {
    fn apply(&self, socket: SockRef<'_>) -> io::Result<()> {
        if self.user_timeout {
            socket.set_tcp_user_timeout(Some(self.time + self.interval * self.retries))?;
        }
        if !self.enabled {
            return Ok(());
        }
        let probes =
            TcpKeepalive::new().with_time(self.time).with_interval(self.interval).with_retries(self.retries);
        socket.set_tcp_keepalive(&probes)
    }
}

/// Sets what accepted sockets inherit from their listener (Linux copies TCP_NODELAY and the keepalive
/// settings), so that nothing has to be set per connection.
pub fn prepare_listener(listener: &TcpListener, keepalive: &Keepalive) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    SockRef::from(listener).set_tcp_nodelay(true)?;
    keepalive.apply(SockRef::from(listener))
}

/// Takes one connection from a listener: a non-blocking socket, and who connected (canonical form).
/// `WouldBlock` when none is waiting.
pub fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    // SAFETY: accept4 writes at most `len` bytes of an address to `storage` and sets `len`.
    let (fd, peer) = unsafe {
        SockAddr::try_init(|storage, len| {
            let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            match libc::accept4(listener.as_raw_fd(), storage.cast(), len, flags) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(fd),
            }
        })
    }?;
    // SAFETY: accept4 has just made this descriptor, and nobody else knows it.
    let stream = unsafe { TcpStream::from_raw_fd(fd) };
    let peer = peer.as_socket().ok_or_else(|| io::Error::other("a TCP peer without an IP address"))?;
    Ok((stream, canonical(peer)))
}

/// A listener whose connections are taken on the current runtime.
#[derive(Debug)]
pub struct Acceptor(AsyncFd<Arc<TcpListener>>);

impl Acceptor {
    /// A prepared listener ([`prepare_listener`]), in the context of the runtime.
    pub fn new(listener: Arc<TcpListener>) -> io::Result<Self> {
        // SAFETY: a `TcpListener` is the same open descriptor for as long as it lives, and it is not replaced;
        // sharing it changes neither.
        unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }
            .map(Self)
            .map_err(io::Error::from)
    }

    /// Waits until `take` finds a connection, or fails for another reason. Fails only when the runtime ends.
    ///
    /// `take` is called with the listener, and answers `WouldBlock` once no connection is left.
    pub async fn accepting(&self, mut take: impl FnMut(&TcpListener) -> io::Result<()>) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|listener| take(listener.get_ref())) {
                Ok(taken) => return taken,
                Err(_would_block) => {}
            }
        }
    }

    /// The listener.
    pub fn listener(&self) -> &TcpListener {
        self.0.get_ref()
    }
}

/// Makes the coming close of `socket` a reset: the other side must not take what it got for the whole.
pub fn reset_on_close(socket: &impl AsFd) {
    // Fails only for what is not a socket.
    let _set = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

/// The network of one pod, as the data path uses it.
pub trait PodNetwork: Send + Sync {
    /// Where a connection that one of the pod's listeners accepted was going, in canonical form.
    fn original_dst(&self, accepted: &TcpStream) -> io::Result<OriginalDst>;

    /// Dials what leaves the pod: a tunnel, or an application's own connection that goes on unchanged. It
    /// carries the pod's address.
    fn leave(&self, to: SocketAddr) -> Dial;

    /// Dials the pod's application, which sees `client` as its peer.
    fn deliver(&self, client: IpAddr, to: SocketAddr) -> Dial;
}

/// A dial under way. It takes as long as the kernel takes, unless it is dropped.
pub type Dial = BoxFuture<'static, io::Result<tokio::net::TcpStream>>;

/// A captured pod: its sockets live in its network namespace.
pub struct CapturedPod {
    netns: Arc<Netns>,
    bypass: Arc<dyn Bypass>,
    keepalive: Keepalive,
}

impl CapturedPod {
    /// The pod whose namespace is `netns`; `bypass` lets the daemon's sockets out of it.
    pub fn new(netns: Arc<Netns>, bypass: Arc<dyn Bypass>, keepalive: Keepalive) -> Self {
        Self { netns, bypass, keepalive }
    }

    fn socket(&self, to: SocketAddr, mark: u32) -> io::Result<Socket> {
        let create = || Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), Some(Protocol::TCP));
        let socket = self.netns.run(create)??;
        socket.set_tcp_nodelay(true)?;
        self.keepalive.apply(SockRef::from(&socket))?;
        socket.set_mark(mark)?;
        Ok(socket)
    }

    fn leaving(&self, to: SocketAddr) -> io::Result<Socket> {
        let socket = self.socket(to, BYPASS)?;
        self.bypass.vouch(socket.as_fd())?;
        Ok(socket)
    }

    fn delivering(&self, client: IpAddr, to: SocketAddr) -> io::Result<Socket> {
        let socket = self.socket(to, REPLY)?;
        // Without the device, a dial to the pod's own address would look like one from the wire to the
        // programs that pick the listener, and come back to the daemon.
        socket.bind_device(Some(b"lo"))?;
        // A pod that calls itself is its own client: its address needs no transparency.
        if client != to.ip() {
            if client.is_ipv4() {
                socket.set_ip_transparent_v4(true)?;
            } else {
                socket.set_ip_transparent_v6(true)?;
            }
            // The port is chosen at connect, per destination, so that clients do not run out of ports.
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(&SocketAddr::new(client, 0).into())?;
        }
        Ok(socket)
    }
}

impl PodNetwork for CapturedPod {
    fn original_dst(&self, accepted: &TcpStream) -> io::Result<OriginalDst> {
        original_dst(accepted)
    }

    fn leave(&self, to: SocketAddr) -> Dial {
        dial(self.leaving(to), to)
    }

    fn deliver(&self, client: IpAddr, to: SocketAddr) -> Dial {
        dial(self.delivering(client, to), to)
    }
}

fn dial(socket: io::Result<Socket>, to: SocketAddr) -> Dial {
    Box::pin(async move { TcpSocket::from_std_stream(socket?.into()).connect(to).await })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_accepted_socket_inherits_what_the_listener_was_given() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let keepalive = Keepalive {
            time: Duration::from_secs(33),
            interval: Duration::from_secs(7),
            retries: 4,
            ..Keepalive::default()
        };
        prepare_listener(&listener, &keepalive).unwrap();
        assert_eq!(accept(&listener).unwrap_err().kind(), io::ErrorKind::WouldBlock);

        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, peer) = accept(&listener).unwrap();

        assert_eq!(peer, client.local_addr().unwrap());
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().unwrap());
        assert!(accepted.nonblocking().unwrap());
        assert_eq!(accepted.tcp_keepalive_time().unwrap(), keepalive.time);
        assert_eq!(accepted.tcp_keepalive_interval().unwrap(), keepalive.interval);
        assert_eq!(accepted.tcp_keepalive_retries().unwrap(), 4);
    }

    #[test]
    fn a_client_of_a_dual_stack_listener_is_reported_as_ipv4() {
        let Ok(listener) = TcpListener::bind("[::]:0") else { return };
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (_accepted, peer) = accept(&listener).unwrap();
        assert_eq!(peer, client.local_addr().unwrap());
    }
}
