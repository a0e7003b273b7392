//! Socket options, accepting, and the two kinds of dial: leaving the pod, and delivering to its application.
//!
//! A delivery does not leave the machine: its handshake is over when `connect` returns, so that what there is to
//! say can be said at once, and nothing has to be waited for. Its socket is made ahead, with others.
//!
//! All of these sockets are in the pod's own port space. They allow their address to be used again, so that they keep
//! no application that allows it, too, from binding a port (captured pods' applications always do).
#![expect(unsafe_code, reason = "accept4(2) has no safe wrapper that reports the peer and sets both flags")]

use std::io;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::net::TcpStream;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Weak;
use std::time::Duration;

use bytes::Buf;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt;
use parking_lot::Mutex;
use parking_lot::MutexGuard;
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
use tokio::time::Instant;
use ztunnel_ebpf_abi::BYPASS;
use ztunnel_ebpf_abi::REPLY;
use ztunnel_mesh::model::addr::OriginalDst;
use ztunnel_mesh::model::addr::canonical;
use ztunnel_runtime::shutdown;

use crate::net::bypass::Bypass;
use crate::net::netns::Netns;
use crate::net::origdst::original_dst;
use crate::net::ports::Fronted;
use crate::net::ports::Ports;
use crate::net::ports::Tries;

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
    pub(super) fn apply(&self, socket: SockRef<'_>) -> io::Result<()> {
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

/// Watches a socket of another kind on the current runtime.
pub fn readable(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open descriptor for as long as it lives, and it is not replaced.
    unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }.map_err(io::Error::from)
}

/// The congestion control of connections that stay inside a pod. They have nothing to congest, and some algorithms
/// (BBR) would pace them nevertheless, with a timer for every few packets. Every kernel has this one.
pub const LOCAL_CONGESTION: &str = "reno";

/// Sets the congestion control of a socket before it is connected, or of what a listener will accept. Later is too
/// late: who began to pace a connection (BBR) leaves that behind when it is replaced.
///
/// One the kernel does not have is passed over.
pub fn set_congestion(socket: &impl AsFd, algorithm: &str) {
    if let Err(error) = SockRef::from(socket).set_tcp_congestion(algorithm.as_bytes()) {
        tracing::debug!(%error, algorithm, "the kernel does not have this congestion control");
    }
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

/// A socket for datagrams, in the context of a runtime. As of a listener, there is one descriptor of it, also where it
/// is kept for another process.
pub struct Datagrams(AsyncFd<Arc<UdpSocket>>);

impl Datagrams {
    /// A socket that does not block, in the context of the runtime.
    pub fn new(socket: Arc<UdpSocket>) -> io::Result<Self> {
        // SAFETY: as in [`Acceptor::new`]: the same open descriptor for as long as it lives, which sharing does not
        // change.
        unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }
            .map(Self)
            .map_err(io::Error::from)
    }

    /// Its own address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.get_ref().local_addr()
    }

    /// Waits until there may be a datagram. Fails only when the runtime ends.
    pub async fn readable(&self) -> io::Result<()> {
        self.0.readable().await.map(drop)
    }

    /// The next datagram; `WouldBlock` if there is none.
    pub fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.0.try_io(Interest::READABLE, |socket| socket.recv_from(buffer))
    }

    /// Sends a datagram; `WouldBlock` if there is no room for it.
    pub fn try_send_to(&self, datagram: &[u8], to: SocketAddr) -> io::Result<usize> {
        self.0.get_ref().send_to(datagram, to)
    }
}

/// Where several sockets share the listener's port, has the kernel give what comes from now on to the one that began to
/// listen after it: this one can then be closed without a connection on its way to it. While there is no other, or the
/// port is not shared, all goes on coming here.
pub fn prefer_later(listener: &TcpListener) -> io::Result<()> {
    if !SockRef::from(listener).reuse_port()? {
        return Ok(());
    }
    // A program that returns which of them: they are counted in the order in which they began to listen, and when one
    // closes the last takes its number. With a number that is nobody's the kernel chooses as it does without a program.
    let mut second = [libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 1 }];
    let program = libc::sock_fprog { len: second.len() as u16, filter: second.as_mut_ptr() };
    setsockopt(listener, sockopt::AttachReusePortCbpf, &program).map_err(io::Error::from)
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

    /// [`Self::leave`] for a tunnel.
    fn tunnel(&self, to: SocketAddr) -> Dial {
        self.leave(to)
    }

    /// `client` has a plain connection to `port` of the pod, for as long as the answer lives: no delivery is then given
    /// the same source port. `None` where the kernel sees to that.
    fn fronted(&self, _client: SocketAddr, _port: u16) -> Option<Fronted> {
        None
    }

    /// Dials the pod's application, which sees `client` as its peer. What there is to say to it is in `first`: it
    /// may be sent with the dial, and what was sent is taken from the front.
    fn deliver(&self, client: IpAddr, to: SocketAddr, first: &mut Bytes) -> io::Result<Delivery>;
}

/// A dial under way. It takes as long as the kernel takes, unless it is dropped.
pub type Dial = BoxFuture<'static, io::Result<tokio::net::TcpStream>>;

/// A dial to a pod's application.
pub enum Delivery {
    /// It has taken the connection.
    Connected(tokio::net::TcpStream),
    /// It has not yet: its queue is full, say.
    Waiting(Dial),
}

/// A captured pod: its sockets live in its network namespace.
pub struct CapturedPod {
    netns: Arc<Netns>,
    bypass: Arc<dyn Bypass>,
    keepalive: Keepalive,
    tunnel_congestion: Option<String>,
    addresses: Vec<IpAddr>,
    spares: Arc<Spares>,
    ports: Arc<Ports>,
}

impl CapturedPod {
    /// The pod whose namespace is `netns` and which has `addresses`; `bypass` lets the daemon's sockets out of it. Tunnels
    /// get `tunnel_congestion`, where it is to differ from the system's.
    pub fn new(
        netns: Arc<Netns>,
        addresses: Vec<IpAddr>,
        bypass: Arc<dyn Bypass>,
        keepalive: Keepalive,
        tunnel_congestion: Option<String>,
    ) -> Self {
        let spares = Arc::new(Spares::new(Arc::clone(&netns)));
        let ports = Arc::new(Ports::of(&netns));
        Self { netns, bypass, keepalive, tunnel_congestion, addresses, spares, ports }
    }

    fn leaving(&self, to: SocketAddr) -> io::Result<Socket> {
        let socket = self.netns.run(|| tcp_socket(Domain::for_address(to)))??;
        socket.set_tcp_nodelay(true)?;
        socket.set_reuse_address(true)?;
        self.keepalive.apply(SockRef::from(&socket))?;
        socket.set_mark(BYPASS)?;
        self.bypass.mark_own(socket.as_fd())?;
        Ok(socket)
    }

    /// A pod that calls itself is its own client: nothing has to be kept from leaving it then. Bound to the loopback
    /// device such a connection would not be found by its answers, which come, says the kernel, from the device that has
    /// the address.
    fn to_itself(&self, client: IpAddr, to: SocketAddr) -> io::Result<Socket> {
        let socket = self.netns.run(|| tcp_socket(Domain::for_address(to)))??;
        socket.set_tcp_nodelay(true)?;
        socket.set_reuse_address(true)?;
        set_congestion(&socket, LOCAL_CONGESTION);
        if client != to.ip() && client.is_ipv4() == to.is_ipv4() {
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(&SocketAddr::new(client, 0).into())?;
        }
        Ok(socket)
    }
}

/// Deliveries to one application on behalf of one client.
struct Delivering {
    spares: Arc<Spares>,
    tries: Tries,
    to: SocketAddr,
}

impl Delivering {
    /// Connects from a port that is free, and says `first`.
    fn dial(&mut self, first: &mut Bytes) -> io::Result<Begun> {
        loop {
            let socket = self.spares.take(self.to.is_ipv6())?;
            self.tries.bind(&socket)?;
            match connect_at_once(socket, self.to, first) {
                Err(error) if self.tries.again(&error) => {}
                begun => return begun,
            }
        }
    }
}

fn tcp_socket(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))
}

/// What every delivery's socket has. No probes: who is on the same machine cannot vanish without a word.
fn prepare_delivery(socket: &Socket, ipv6: bool) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    set_congestion(socket, LOCAL_CONGESTION);
    socket.set_mark(REPLY)?;
    // Without the device, a dial to the pod's own address would look like one from the wire to the programs that
    // pick the listener, and come back to the daemon.
    socket.bind_device(Some(b"lo"))?;
    if ipv6 {
        socket.set_ip_transparent_v6(true)?;
    } else {
        socket.set_ip_transparent_v4(true)?;
    }
    socket.set_reuse_address(true)
}

/// The most sockets made ahead at once, and so the most that wait.
const BATCH_MAX: usize = 16;

/// Batches that follow each other within this time grow; sockets that nobody took in it are closed.
const SPARE_TIME: Duration = Duration::from_millis(200);

/// Sockets for deliveries, made ahead: entering the pod's namespace costs about as much as making a socket there,
/// so it is entered once for several. How many follows how often they are needed: who delivers now and then has
/// none waiting.
struct Spares {
    netns: Arc<Netns>,
    /// IPv4, IPv6.
    batches: [Mutex<Batch>; 2],
}

#[derive(Default)]
struct Batch {
    waiting: Vec<Socket>,
    /// The size of the last one.
    size: usize,
    /// When it was made.
    made: Option<Instant>,
    /// Whether somebody will come and close what nobody took.
    watched: bool,
}

impl Spares {
    fn new(netns: Arc<Netns>) -> Self {
        Self { netns, batches: Default::default() }
    }

    fn batch(&self, ipv6: bool) -> MutexGuard<'_, Batch> {
        self.batches[usize::from(ipv6)].lock()
    }

    /// A prepared socket. In the context of a runtime.
    fn take(self: &Arc<Self>, ipv6: bool) -> io::Result<Socket> {
        let mut batch = self.batch(ipv6);
        if let Some(socket) = batch.waiting.pop() {
            return Ok(socket);
        }
        let now = Instant::now();
        let often = batch.made.is_some_and(|made| now.duration_since(made) < SPARE_TIME);
        batch.size = if often { (batch.size * 2).min(BATCH_MAX) } else { 1 };
        batch.made = Some(now);
        let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
        let (size, waiting) = (batch.size, &mut batch.waiting);
        self.netns.run(|| {
            for made in 0..size {
                match tcp_socket(domain) {
                    Ok(socket) => waiting.push(socket),
                    Err(error) if made == 0 => return Err(error),
                    // Who needs another one will learn why there is none.
                    Err(_) => break,
                }
            }
            Ok(())
        })??;
        if let Err(error) = waiting.iter().try_for_each(|socket| prepare_delivery(socket, ipv6)) {
            waiting.clear();
            return Err(error);
        }
        let socket = waiting.pop().ok_or_else(|| io::Error::other("no socket was made"))?;
        if !batch.waiting.is_empty() && !batch.watched {
            batch.watched = true;
            shutdown::spawn(Self::watch(Arc::downgrade(self), ipv6));
        }
        Ok(socket)
    }

    /// Closes what waits once nobody takes any more.
    async fn watch(spares: Weak<Self>, ipv6: bool) {
        loop {
            tokio::time::sleep(SPARE_TIME).await;
            let Some(spares) = spares.upgrade() else { return };
            let mut batch = spares.batch(ipv6);
            if batch.made.is_none_or(|made| made.elapsed() >= SPARE_TIME) {
                batch.watched = false;
                batch.waiting = Vec::new();
                return;
            }
        }
    }
}

impl PodNetwork for CapturedPod {
    fn original_dst(&self, accepted: &TcpStream) -> io::Result<OriginalDst> {
        original_dst(accepted)
    }

    fn leave(&self, to: SocketAddr) -> Dial {
        dial(self.leaving(to), to)
    }

    fn tunnel(&self, to: SocketAddr) -> Dial {
        let socket = self.leaving(to);
        if let (Ok(socket), Some(congestion)) = (&socket, &self.tunnel_congestion) {
            set_congestion(socket, congestion);
        }
        dial(socket, to)
    }

    fn deliver(&self, client: IpAddr, to: SocketAddr, first: &mut Bytes) -> io::Result<Delivery> {
        if client == to.ip() || self.addresses.contains(&client) {
            return Ok(match connect_at_once(self.to_itself(client, to)?, to, first)? {
                Begun::Connected(application) => Delivery::Connected(application),
                Begun::Waiting(socket) => Delivery::Waiting(Box::pin(connecting(socket))),
            });
        }
        let mut delivering =
            Delivering { spares: Arc::clone(&self.spares), tries: self.ports.tries(client, to), to };
        Ok(match delivering.dial(first)? {
            Begun::Connected(application) => Delivery::Connected(application),
            // It has said nothing yet.
            Begun::Waiting(socket) => {
                Delivery::Waiting(Box::pin(insisting(socket, move || delivering.dial(&mut Bytes::new()))))
            }
        })
    }
}

pub(super) fn dial(socket: io::Result<Socket>, to: SocketAddr) -> Dial {
    Box::pin(async move { TcpSocket::from_std_stream(socket?.into()).connect(to).await })
}

/// A connection on this machine that was begun.
pub(super) enum Begun {
    /// The application has taken it.
    Connected(tokio::net::TcpStream),
    /// It has not yet, and was told nothing.
    Waiting(Socket),
}

/// Connects on this machine and says `first`.
pub(super) fn connect_at_once(socket: Socket, to: SocketAddr, first: &mut Bytes) -> io::Result<Begun> {
    let speaks = !first.is_empty();
    if speaks {
        // The last packet of the handshake then waits for `first` to go with, which spares the application a
        // packet, and a wake-up for nothing.
        socket.set_tcp_quickack(false)?;
    }
    let to = to.into();
    let connected = match socket.connect(&to) {
        Ok(()) => Ok(()),
        // It has only begun, the kernel says, as it does not look again before it returns.
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            if speaks {
                socket.send_with_flags(first, libc::MSG_NOSIGNAL).map(|sent| first.advance(sent))
            } else {
                socket.connect(&to)
            }
        }
        Err(error) => Err(error),
    };
    if speaks {
        // From here on as in any new connection: one that writes its answer in pieces must not wait for each.
        socket.set_tcp_quickack(true)?;
    }
    match connected {
        Ok(()) => {}
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EALREADY | libc::EINPROGRESS | libc::EINTR) => {
                return Ok(Begun::Waiting(socket));
            }
            // It had taken the connection, and reset it: that is for whoever moves bytes to find.
            Some(libc::ECONNRESET | libc::EPIPE) => {}
            _ => return Err(error),
        },
    }
    tokio::net::TcpStream::from_std(socket.into()).map(Begun::Connected)
}

/// An application on this machine answers at once, or its queue is full, or the kernel has taken the first packet for one
/// of another connection: one that was open before the pod was enrolled, say, or that another daemon has. After so long
/// it is tried from another port, so many times.
const INSIST_AFTER: Duration = Duration::from_millis(100);
const INSIST: usize = 2;

/// Waits for a connection that has begun, and begins it anew if that takes long.
pub(super) async fn insisting(
    socket: Socket,
    mut again: impl FnMut() -> io::Result<Begun>,
) -> io::Result<tokio::net::TcpStream> {
    let mut waiting = Box::pin(connecting(socket));
    for _ in 0..INSIST {
        if let Ok(connected) = tokio::time::timeout(INSIST_AFTER, &mut waiting).await {
            return connected;
        }
        match again() {
            Ok(Begun::Connected(application)) => return Ok(application),
            Ok(Begun::Waiting(socket)) => waiting = Box::pin(connecting(socket)),
            // There is no other port.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => break,
            Err(error) => return Err(error),
        }
    }
    waiting.await
}

/// Waits for a connection that has begun.
pub(super) async fn connecting(socket: Socket) -> io::Result<tokio::net::TcpStream> {
    let socket = tokio::net::TcpStream::from_std(socket.into())?;
    socket.writable().await?;
    match socket.take_error()? {
        Some(error) => Err(error),
        None => Ok(socket),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever connects may know of it before the listener does.
    fn next(listener: &TcpListener) -> (TcpStream, SocketAddr) {
        loop {
            match accept(listener) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                accepted => return accepted.unwrap(),
            }
        }
    }

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
        set_congestion(&listener, LOCAL_CONGESTION);
        set_congestion(&listener, "no-such");
        assert_eq!(accept(&listener).unwrap_err().kind(), io::ErrorKind::WouldBlock);

        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, peer) = next(&listener);

        assert_eq!(peer, client.local_addr().unwrap());
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().unwrap());
        assert!(accepted.nonblocking().unwrap());
        assert_eq!(accepted.tcp_keepalive_time().unwrap(), keepalive.time);
        assert_eq!(accepted.tcp_keepalive_interval().unwrap(), keepalive.interval);
        assert_eq!(accepted.tcp_keepalive_retries().unwrap(), 4);
        let congestion = accepted.tcp_congestion().unwrap();
        assert_eq!(congestion.split(|byte| *byte == 0).next().unwrap(), LOCAL_CONGESTION.as_bytes());
    }

    #[test]
    fn a_client_of_a_dual_stack_listener_is_reported_as_ipv4() {
        let Ok(listener) = TcpListener::bind("[::]:0") else { return };
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (_accepted, peer) = next(&listener);
        assert_eq!(peer, client.local_addr().unwrap());
    }

    /// A port that nobody else gets.
    fn bound() -> (Socket, SocketAddr) {
        let socket = tcp_socket(Domain::IPV4).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let to = socket.local_addr().unwrap().as_socket().unwrap();
        (socket, to)
    }

    fn listening(backlog: i32) -> (Socket, SocketAddr) {
        let (socket, to) = bound();
        socket.listen(backlog).unwrap();
        (socket, to)
    }

    #[test]
    fn who_prefers_a_later_listener_gets_nothing_that_it_could_have() {
        let share = |port| {
            let socket = tcp_socket(Domain::IPV4).unwrap();
            socket.set_reuse_port(true).unwrap();
            socket.bind(&SocketAddr::from(([127, 0, 0, 1], port)).into()).unwrap();
            socket.listen(64).unwrap();
            TcpListener::from(socket)
        };
        let first = share(0);
        let to = first.local_addr().unwrap();
        let second = share(to.port());
        prefer_later(&first).unwrap();
        for _ in 0..50 {
            let client = TcpStream::connect(to).unwrap();
            assert_eq!(next(&second).1, client.local_addr().unwrap());
        }
        assert_eq!(accept(&first).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        // Alone it is as before.
        drop(second);
        let client = TcpStream::connect(to).unwrap();
        assert_eq!(next(&first).1, client.local_addr().unwrap());
        // Nor does it hold on to what comes when it is gone.
        let third = share(to.port());
        drop(first);
        let client = TcpStream::connect(to).unwrap();
        assert_eq!(next(&third).1, client.local_addr().unwrap());
        prefer_later(&TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    }

    #[tokio::test]
    async fn an_application_on_this_machine_takes_connection_and_first_words_at_once() {
        for words in ["", "hello"] {
            // A kernel that is busy may put it off, but not each time.
            let at_once = (0..1000).find_map(|_| {
                let (listener, to) = listening(8);
                let mut first = Bytes::from_static(words.as_bytes());
                let dialled = connect_at_once(tcp_socket(Domain::IPV4).unwrap(), to, &mut first).unwrap();
                let Begun::Connected(dialled) = dialled else { return None };
                assert!(first.is_empty());
                // Taken before anything else is done here.
                let taken = listener.accept();
                drop(dialled);
                taken.ok()
            });
            let (mut taken, _) = at_once.expect("it waits");
            let mut said = String::new();
            taken.set_nonblocking(false).unwrap();
            io::Read::read_to_string(&mut taken, &mut said).unwrap();
            assert_eq!(said, words);
        }
    }

    #[tokio::test]
    async fn an_application_that_is_not_there_is_an_error() {
        let (_nobody, to) = bound();
        for words in ["", "hello"] {
            let mut first = Bytes::from_static(words.as_bytes());
            let refused = connect_at_once(tcp_socket(Domain::IPV4).unwrap(), to, &mut first).err().unwrap();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        }
    }

    #[tokio::test]
    async fn an_application_whose_queue_is_full_is_waited_for() {
        let (listener, to) = listening(0);
        let _queued = TcpStream::connect(to).unwrap();
        let mut first = Bytes::from_static(b"hello");
        let dialled = connect_at_once(tcp_socket(Domain::IPV4).unwrap(), to, &mut first).unwrap();
        let Begun::Waiting(dial) = dialled else { panic!("it was taken") };
        assert_eq!(first.len(), 5);
        let (_taken, _) = listener.accept().unwrap();
        // The kernel tries again after a second.
        tokio::time::timeout(Duration::from_secs(60), connecting(dial)).await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn sockets_are_made_ahead_where_they_are_needed_often() {
        let spares = Arc::new(Spares::new(Arc::new(Netns::current().unwrap())));
        let waiting = || spares.batch(false).waiting.len();
        let _first = spares.take(false).unwrap();
        assert_eq!(waiting(), 0);
        let mut most = 0;
        for _ in 0..100 {
            let socket = spares.take(false).unwrap();
            let socket = SockRef::from(&socket);
            assert_eq!(socket.mark().unwrap(), REPLY);
            assert_eq!(socket.device().unwrap().as_deref(), Some(b"lo".as_slice()));
            assert!(socket.tcp_nodelay().unwrap());
            assert!(socket.ip_transparent_v4().unwrap());
            most = most.max(waiting());
        }
        assert_eq!(most, BATCH_MAX - 1);
        tokio::time::sleep(3 * SPARE_TIME).await;
        assert_eq!((waiting(), spares.batch(false).watched), (0, false));
        let _again = spares.take(false).unwrap();
        assert_eq!(waiting(), 0);
    }
}
