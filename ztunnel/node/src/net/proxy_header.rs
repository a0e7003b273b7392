//! The PROXY protocol's header, version 2 (HAProxy's `proxy-protocol.txt`, §2.2): what an application that takes
//! connections for others is told of one before its first byte.

use std::net::IpAddr;
use std::net::SocketAddr;

/// What every header begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;

/// TCP over IPv4, TCP over IPv6, and neither.
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
const UNSPECIFIED: u8 = 0x00;

/// The client's identity, as waypoints know it: of the range that is for custom use (§2.2.7).
const TLV_IDENTITY: u8 = 0xd0;

/// The header of a connection from `source`, who proved to be `identity` (a SPIFFE ID), to `destination`.
///
/// Addresses of two families cannot be said in one header: then it says neither, and the identity all the same. An
/// identity that is longer than the header can say (some 65,000 bytes; none is) is left out.
pub fn encode(source: SocketAddr, destination: SocketAddr, identity: &str) -> Vec<u8> {
    let mut body = Vec::with_capacity(36 + 3 + identity.len());
    let family = match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            body.extend(from.octets());
            body.extend(to.octets());
            TCP4
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            body.extend(from.octets());
            body.extend(to.octets());
            TCP6
        }
        _ => UNSPECIFIED,
    };
    if family != UNSPECIFIED {
        body.extend(source.port().to_be_bytes());
        body.extend(destination.port().to_be_bytes());
    }
    if let Ok(length) = u16::try_from(identity.len())
        && usize::from(u16::MAX) >= body.len() + 3 + identity.len()
    {
        body.push(TLV_IDENTITY);
        body.extend(length.to_be_bytes());
        body.extend(identity.as_bytes());
    }
    let length = u16::try_from(body.len()).expect("what would make it longer was left out");
    let mut header = Vec::with_capacity(SIGNATURE.len() + 4 + body.len());
    header.extend(SIGNATURE);
    header.extend([VERSION_AND_COMMAND, family]);
    header.extend(length.to_be_bytes());
    header.extend(body);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_as_the_specification_has_them() {
        let signature = [0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a];
        let who = [0xd0, 0, 3, b's', b'/', b'a'];
        let v6 = |last: u8| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
        let cases: [(&str, &str, &str, Vec<u8>); 5] = [
            (
                "10.1.2.3:4660",
                "10.96.0.10:80",
                "s/a",
                [&[0x21, 0x11, 0, 12 + 6, 10, 1, 2, 3, 10, 96, 0, 10, 0x12, 0x34, 0, 80][..], &who].concat(),
            ),
            (
                "[fd00::1]:4660",
                "[fd00::2]:80",
                "s/a",
                [&[0x21, 0x21, 0, 36 + 6][..], &v6(1), &v6(2), &[0x12, 0x34, 0, 80], &who].concat(),
            ),
            ("10.1.2.3:1", "[fd00::2]:80", "s/a", [&[0x21, 0x00, 0, 6][..], &who].concat()),
            ("[fd00::1]:1", "10.96.0.10:80", "s/a", [&[0x21, 0x00, 0, 6][..], &who].concat()),
            (
                "127.0.0.1:65535",
                "127.0.0.2:1",
                "",
                vec![0x21, 0x11, 0, 15, 127, 0, 0, 1, 127, 0, 0, 2, 255, 255, 0, 1, 0xd0, 0, 0],
            ),
        ];
        for (source, destination, identity, rest) in cases {
            let header = encode(source.parse().unwrap(), destination.parse().unwrap(), identity);
            assert_eq!(header, [&signature[..], &rest].concat(), "{source} to {destination}");
        }
    }

    #[test]
    fn what_cannot_be_said_is_left_out_and_the_length_is_true() {
        let at = "10.0.0.1:1".parse().unwrap();
        for (length, said) in [(65_520, true), (65_521, false), (70_000, false)] {
            let header = encode(at, at, &"x".repeat(length));
            let told = usize::from(u16::from_be_bytes([header[14], header[15]]));
            assert_eq!((told, told > 12), (header.len() - 16, said), "{length}");
        }
    }
}
