//! Where a datagram was going before rules of netfilter redirected it.
//!
//! A socket can be asked that of a TCP connection (`SO_ORIGINAL_DST`), but not of datagrams: connection tracking is
//! asked by netlink (`nfnetlink_conntrack.h`), by what an answer would carry.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::net::netns::Netns;

const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
/// `NFNL_SUBSYS_CTNETLINK` in the upper byte; below it `IPCTNL_MSG_CT_NEW` and `_GET`.
const CT_NEW: u16 = 0x100;
const CT_GET: u16 = 0x101;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;
/// In `CTA_…`: the tuple of the first packet, and that of its answer.
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
/// In a tuple.
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
/// In its addresses.
const IP_V4_SRC: u16 = 1;
const IP_V4_DST: u16 = 2;
const IP_V6_SRC: u16 = 3;
const IP_V6_DST: u16 = 4;
/// In its protocol.
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;

/// `nlmsghdr`, then `nfgenmsg`.
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;

/// Connection tracking of one network namespace.
pub struct Conntrack {
    socket: Socket,
    sequence: u32,
}

impl fmt::Debug for Conntrack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conntrack").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl Conntrack {
    /// That of `netns`. Where the kernel does not have `nf_conntrack_netlink` this or the first question fails.
    pub fn open(netns: &Netns) -> io::Result<Self> {
        let mut socket = netns.run(|| Socket::new(NETLINK_NETFILTER))??;
        socket.bind_auto()?;
        socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
        // The kernel has answered when the question is sent.
        socket.set_non_blocking(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Where `client` had sent the datagram that arrived at `local`. `NotFound` where nobody tracks it.
    pub fn original_dst(&mut self, client: SocketAddr, local: SocketAddr) -> io::Result<SocketAddr> {
        self.sequence = self.sequence.wrapping_add(1);
        self.socket.send(&question(self.sequence, client, local), 0)?;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            if let Some(answer) = answer(&datagram, self.sequence) {
                return answer;
            }
        }
    }
}

/// Asks for the connection that is answered from `local` to `client`.
fn question(sequence: u32, client: SocketAddr, local: SocketAddr) -> Vec<u8> {
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut out = vec![0; HEADER];
    // The family, version 0, no resource.
    out.extend([family as u8, 0, 0, 0]);
    nested(&mut out, TUPLE_REPLY, |out| {
        nested(out, TUPLE_IP, |out| {
            for (ip, [v4, v6]) in
                [(local.ip(), [IP_V4_SRC, IP_V6_SRC]), (client.ip(), [IP_V4_DST, IP_V6_DST])]
            {
                match ip {
                    IpAddr::V4(ip) => attribute(out, v4, &ip.octets()),
                    IpAddr::V6(ip) => attribute(out, v6, &ip.octets()),
                }
            }
        });
        nested(out, TUPLE_PROTO, |out| {
            attribute(out, PROTO_NUM, &[libc::IPPROTO_UDP as u8]);
            attribute(out, PROTO_SRC_PORT, &local.port().to_be_bytes());
            attribute(out, PROTO_DST_PORT, &client.port().to_be_bytes());
        });
    });
    let length = (out.len() as u32).to_ne_bytes();
    out[..4].copy_from_slice(&length);
    out[4..6].copy_from_slice(&CT_GET.to_ne_bytes());
    out[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    out[8..12].copy_from_slice(&sequence.to_ne_bytes());
    out
}

fn attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend(((4 + value.len()) as u16).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn nested(out: &mut Vec<u8>, kind: u16, inside: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    attribute(out, kind | NLA_F_NESTED, &[]);
    inside(out);
    let length = ((out.len() - start) as u16).to_ne_bytes();
    out[start..start + 2].copy_from_slice(&length);
}

/// What a datagram of the kernel says to the question with this number; `None` if nothing.
fn answer(datagram: &[u8], sequence: u32) -> Option<io::Result<SocketAddr>> {
    let mut rest = datagram;
    while let Some(header) = rest.first_chunk::<HEADER>() {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let number = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        let body = rest.get(HEADER..length)?;
        if number == sequence {
            match kind {
                NLMSG_ERROR => {
                    let code = body.first_chunk::<4>().map(|code| i32::from_ne_bytes(*code))?;
                    return Some(Err(io::Error::from_raw_os_error(code.checked_neg()?)));
                }
                CT_NEW => {
                    let missing = || io::Error::new(io::ErrorKind::InvalidData, "no original destination");
                    return Some(destination(body).ok_or_else(missing));
                }
                _ => {}
            }
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

/// The destination of the first packet of a connection.
fn destination(body: &[u8]) -> Option<SocketAddr> {
    let tuple = find(body.get(FAMILY_HEADER..)?, &[TUPLE_ORIG])?;
    let addresses = find(tuple, &[TUPLE_IP])?;
    let ip = match find(addresses, &[IP_V4_DST, IP_V6_DST])? {
        bytes if bytes.len() == 4 => IpAddr::from(<[u8; 4]>::try_from(bytes).map(Ipv4Addr::from).ok()?),
        bytes => IpAddr::from(<[u8; 16]>::try_from(bytes).map(Ipv6Addr::from).ok()?),
    };
    let port = find(find(tuple, &[TUPLE_PROTO])?, &[PROTO_DST_PORT])?;
    Some(SocketAddr::new(ip, u16::from_be_bytes(port.try_into().ok()?)))
}

/// The value of the first attribute of one of these kinds.
fn find<'a>(mut attributes: &'a [u8], kinds: &[u16]) -> Option<&'a [u8]> {
    while let Some([a, b, c, d]) = attributes.first_chunk::<4>() {
        let (length, kind) = (u16::from_ne_bytes([*a, *b]) as usize, u16::from_ne_bytes([*c, *d]));
        let value = attributes.get(4..length)?;
        if kinds.contains(&(kind & NLA_TYPE_MASK)) {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CLIENT: &str = "10.0.0.1:4242";
    const LOCAL: &str = "127.0.0.1:15053";

    /// As the kernel answers: both tuples.
    fn entry(sequence: u32, original: SocketAddr) -> Vec<u8> {
        let mut out = question(sequence, CLIENT.parse().unwrap(), LOCAL.parse().unwrap());
        nested(&mut out, TUPLE_ORIG, |out| {
            nested(out, TUPLE_IP, |out| match original.ip() {
                IpAddr::V4(ip) => attribute(out, IP_V4_DST, &ip.octets()),
                IpAddr::V6(ip) => attribute(out, IP_V6_DST, &ip.octets()),
            });
            nested(out, TUPLE_PROTO, |out| {
                attribute(out, PROTO_DST_PORT, &original.port().to_be_bytes());
            });
        });
        let length = (out.len() as u32).to_ne_bytes();
        out[..4].copy_from_slice(&length);
        out[4..6].copy_from_slice(&CT_NEW.to_ne_bytes());
        out
    }

    #[test]
    fn the_original_destination_is_read_from_the_answer_to_the_question() {
        for original in ["10.96.0.10:53", "[fd96::10]:53"] {
            let original = original.parse().unwrap();
            assert_eq!(answer(&entry(7, original), 7).unwrap().unwrap(), original);
            assert!(answer(&entry(6, original), 7).is_none(), "to another question");
            let both = [entry(6, CLIENT.parse().unwrap()), entry(7, original)].concat();
            assert_eq!(answer(&both, 7).unwrap().unwrap(), original);
        }
    }

    #[test]
    fn an_error_of_the_kernel_is_told() {
        let mut refused = entry(7, CLIENT.parse().unwrap());
        refused[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        refused[HEADER..HEADER + 4].copy_from_slice(&(-libc::ENOENT).to_ne_bytes());
        assert_eq!(answer(&refused, 7).unwrap().unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_nobody_tracks_is_not_found() {
        let netns = Netns::current().unwrap();
        let mut conntrack = Conntrack::open(&netns).expect("needs root and nf_conntrack_netlink");
        for _ in 0..2 {
            let none = conntrack.original_dst(CLIENT.parse().unwrap(), LOCAL.parse().unwrap());
            assert_eq!(none.unwrap_err().kind(), io::ErrorKind::NotFound);
        }
    }

    proptest! {
        #[test]
        fn whatever_is_read_ends(bytes in proptest::collection::vec(any::<u8>(), 0..200), at in 0..80_usize) {
            let _any = answer(&bytes, 7);
            let mut torn = entry(7, "10.96.0.10:53".parse().unwrap());
            torn.splice(at..at, bytes);
            let _any = answer(&torn, 7);
        }
    }
}
