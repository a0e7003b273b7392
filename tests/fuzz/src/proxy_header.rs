//! The PROXY protocol's header, which is written: what a reader that knows nothing but the specification makes of it is
//! what was to be said, and it ends where it says.

use std::net::IpAddr;
use std::net::SocketAddr;

use arbitrary::Result;
use arbitrary::Unstructured;
use ztunnel_node::net::proxy_header::encode;

use crate::memory::bounded;

/// What a header says: the two addresses, and the identity.
type Said = (Option<(SocketAddr, SocketAddr)>, Option<Vec<u8>>);

/// By the specification's §2.2. Nothing if it is no header, or has more or less behind it than it says.
fn read(header: &[u8]) -> Option<Said> {
    let rest = header.strip_prefix(b"\r\n\r\n\0\r\nQUIT\n\x21")?;
    let (family, length, body) = (rest[0], u16::from_be_bytes([rest[1], rest[2]]), &rest[3..]);
    if body.len() != usize::from(length) {
        return None;
    }
    let port = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
    let four = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&body[at..at + 4]).expect("four bytes"));
    let six = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&body[at..at + 16]).expect("sixteen bytes"));
    let (addresses, mut rest) = match family {
        0x00 => (None, body),
        0x11 => (Some(((four(0), port(8)), (four(4), port(10)))), body.get(12..)?),
        0x21 => (Some(((six(0), port(32)), (six(16), port(34)))), body.get(36..)?),
        _ => return None,
    };
    let mut identity = None;
    while let [kind, high, low, value @ ..] = rest {
        let (value, left) = value.split_at_checked(usize::from(u16::from_be_bytes([*high, *low])))?;
        if *kind != 0xd0 || identity.replace(value.to_vec()).is_some() {
            return None;
        }
        rest = left;
    }
    rest.is_empty().then(|| (addresses.map(|(from, to)| (from.into(), to.into())), identity))
}

fn address(u: &mut Unstructured<'_>) -> Result<SocketAddr> {
    let ip: IpAddr =
        if u.arbitrary()? { u.arbitrary::<[u8; 4]>()?.into() } else { u.arbitrary::<[u8; 16]>()?.into() };
    Ok(SocketAddr::new(ip, u.arbitrary()?))
}

fn written(u: &mut Unstructured<'_>) -> Result<()> {
    let (source, destination) = (address(u)?, address(u)?);
    let times: u16 = if u.ratio(1, 8)? { u.arbitrary()? } else { 1 };
    let part: &str = u.arbitrary()?;
    let identity = part.repeat(usize::from(times).min(80_000 / part.len().max(1)));
    let header = bounded(identity.len(), 8, || encode(source, destination, &identity));
    let (addresses, told) = read(&header).expect("it is a header");
    let sayable = source.is_ipv4() == destination.is_ipv4();
    assert_eq!(addresses, sayable.then_some((source, destination)));
    match told {
        Some(told) => assert_eq!(told, identity.as_bytes()),
        None => assert!(identity.len() > 65_000, "an identity of {} bytes is left out", identity.len()),
    }
    Ok(())
}

/// Two addresses and an identity.
pub fn run(data: &[u8]) {
    let _enough_bytes = written(&mut Unstructured::new(data));
}
