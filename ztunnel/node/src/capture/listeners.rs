//! The daemon's listeners inside a pod.
//!
//! They take connections only through the lookup program: each is bound to an address that nobody has, so a
//! packet cannot reach them by address and port, and a dial to a pod's own port 65535 does not end in the
//! daemon. The port only has to be free of the application's wildcard binds.
//!
//! What they accept has the port that was dialled, in the pod's own port space. So that an application can bind that
//! port meanwhile, these sockets allow their address to be used again (SO_REUSEADDR, which accepted ones inherit).

#![expect(unsafe_code, reason = "socket options without a wrapper")]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Socket, TcpKeepalive, Type};
use ztunnel_mesh::model::addr::HBONE_PORT;

use super::Listeners;

/// Above the ephemeral ports of a default kernel, below nothing: applications rarely bind here.
const PORTS: std::ops::RangeInclusive<u16> = 65_100..=65_535;
const BACKLOG: i32 = 4096;
const KEEPALIVE: Duration = Duration::from_secs(180);
const KEEPALIVE_PROBES: u32 = 9;
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Binds all three in the namespace of this thread.
pub(super) fn bind() -> io::Result<Listeners> {
    Ok(Listeners { outbound: listener(1)?, inbound: listener(2)?, hbone: listener(3)? })
}

fn listener(last: u8) -> io::Result<Arc<TcpListener>> {
    let mut port = *PORTS.end();
    loop {
        match listen_on(last, port) {
            Ok(listener) => return Ok(Arc::new(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && port > *PORTS.start() => port -= 1,
            Err(error) => return Err(error),
        }
    }
}

fn listen_on(last: u8, port: u16) -> io::Result<TcpListener> {
    let nowhere = Ipv4Addr::new(169, 254, 7, 127 - last);
    let (socket, address) = match Socket::new(Domain::IPV6, Type::STREAM.nonblocking(), None) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            option(&socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT)?;
            // Bound to an IPv6 address proper it would take IPv6 alone.
            (socket, SocketAddr::from((nowhere.to_ipv6_mapped(), port)))
        }
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
            (socket, SocketAddr::from((nowhere, port)))
        }
        Err(error) => return Err(error),
    };
    option(&socket, libc::SOL_IP, libc::IP_TRANSPARENT)?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
    socket.set_tcp_keepalive(&keepalive.with_retries(KEEPALIVE_PROBES))?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A listener for tunnels that is found by its address and port, in the namespace of this thread: for a pod that is
/// captured no longer, and whose peers have yet to hear of it.
pub(super) fn bind_in_the_open() -> io::Result<TcpListener> {
    let family = |domain, any: IpAddr| {
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), None)?;
        if any.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_tcp_nodelay(true)?;
        socket.bind(&SocketAddr::from((any, HBONE_PORT)).into())?;
        socket.listen(BACKLOG)?;
        io::Result::Ok(socket)
    };
    let both = family(Domain::IPV6, Ipv6Addr::UNSPECIFIED.into());
    let socket = match both {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            family(Domain::IPV4, Ipv4Addr::UNSPECIFIED.into())?
        }
        both => both?,
    };
    Ok(socket.into())
}

fn option(socket: &Socket, level: libc::c_int, name: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: an int option with the address and size of an int.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(&on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The cookie of the namespace a socket belongs to (Linux 5.14).
pub(super) fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option writes eight bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// The cookie of this thread's namespace.
pub(super) fn current_netns_cookie() -> io::Result<u64> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    netns_cookie(socket.as_fd())
}
