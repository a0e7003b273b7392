//! Where a captured connection was going.
//!
//! Capture delivers a connection to a transparent listener with its addresses untouched, so the accepted
//! socket's local address is the original destination. Where a node agent's rules redirect instead, they rewrite the
//! destination, and connection tracking knows what it was.

use std::io;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::net::TcpStream;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt;
use ztunnel_mesh::model::addr::OriginalDst;
use ztunnel_mesh::model::addr::canonical;

/// The original destination of an accepted connection, in canonical form.
pub fn original_dst(accepted: &TcpStream) -> io::Result<OriginalDst> {
    accepted.local_addr().map(canonical).map(OriginalDst)
}

/// The original destination of a connection that rules of netfilter have redirected, in canonical form. One that was
/// not redirected was going where it arrived.
pub fn redirected_dst(accepted: &TcpStream) -> io::Result<OriginalDst> {
    let local = canonical(accepted.local_addr()?);
    let tracked = match local.ip() {
        IpAddr::V4(_) => getsockopt(accepted, sockopt::OriginalDst).map(|dst| {
            SocketAddr::from((u32::from_be(dst.sin_addr.s_addr).to_be_bytes(), u16::from_be(dst.sin_port)))
        }),
        IpAddr::V6(_) => getsockopt(accepted, sockopt::Ip6tOriginalDst)
            .map(|dst| SocketAddr::from((dst.sin6_addr.s6_addr, u16::from_be(dst.sin6_port)))),
    };
    // Nobody tracks the connection, or not with netfilter.
    Ok(OriginalDst(tracked.map_or(local, canonical)))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_connection_that_nobody_redirected_was_going_where_it_arrived() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let to = listener.local_addr().unwrap();
            let _client = TcpStream::connect(to).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            assert_eq!(redirected_dst(&accepted).unwrap(), OriginalDst(to));
        }
    }
}
