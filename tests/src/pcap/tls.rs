//! Whether a stream is TLS 1.3 from its first byte to its last.

use anyhow::{Context, Result, bail, ensure};

use super::Stream;

const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;
const SUPPORTED_VERSIONS: u16 = 43;
const TLS_1_3: u16 = 0x0304;

/// How many records a stream has, by what an observer can see of them.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Records {
    /// The hellos, which are in clear in TLS 1.3.
    pub hellos: usize,
    /// Encrypted ones.
    pub encrypted: usize,
}

/// Checks that both directions are TLS records only, that the server chose TLS 1.3, and that nothing but the
/// hellos is in clear. An empty stream (a connection nobody spoke on) passes with no records.
pub fn check(stream: &Stream) -> Result<Records> {
    let mut records = Records::default();
    direction(&stream.sent, CLIENT_HELLO, stream.from_start, &mut records).context("from the client")?;
    direction(&stream.received, SERVER_HELLO, stream.from_start, &mut records).context("from the server")?;
    Ok(records)
}

fn direction(mut bytes: &[u8], hello: u8, from_start: bool, records: &mut Records) -> Result<()> {
    let mut first = true;
    // A record that is cut off at the end of the capture is judged by its header.
    while let Some(header) = bytes.get(..5) {
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        ensure!(header[1] == 3 && length <= (1 << 14) + 256, "not a TLS record: {:02x?}", header);
        let body = &bytes[5..bytes.len().min(5 + length)];
        match header[0] {
            HANDSHAKE if body.first() == Some(&hello) => {
                if hello == SERVER_HELLO {
                    let version = chosen_version(body).context("cannot read the ServerHello")?;
                    ensure!(version == TLS_1_3, "the server chose version {version:#06x}");
                }
                records.hellos += 1;
            }
            APPLICATION_DATA if !first || !from_start => records.encrypted += 1,
            CHANGE_CIPHER_SPEC if !first => {}
            // In TLS 1.3 an alert in clear can only answer a hello, and is two bytes long.
            ALERT if body.len() == 2 => {}
            kind => bail!(
                "a record of type {kind} where none may be, first bytes {:02x?}",
                &body[..body.len().min(8)]
            ),
        }
        first = false;
        bytes = bytes.get(5 + length..).unwrap_or_default();
    }
    ensure!(bytes.is_empty() || !first, "{} bytes that are no TLS record", bytes.len());
    Ok(())
}

/// `supported_versions` of a ServerHello (RFC 8446 §4.1.3, §4.2.1); without it, the legacy version.
fn chosen_version(hello: &[u8]) -> Option<u16> {
    // type 1, length 3, legacy version 2, random 32, session id, cipher 2, compression 1, extensions
    let legacy = u16::from_be_bytes([*hello.get(4)?, *hello.get(5)?]);
    let session = usize::from(*hello.get(38)?);
    let mut extensions = hello.get(39 + session + 3 + 2..)?;
    while let Some(head) = extensions.get(..4) {
        let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
        let body = extensions.get(4..4 + length)?;
        if u16::from_be_bytes([head[0], head[1]]) == SUPPORTED_VERSIONS {
            return Some(u16::from_be_bytes([*body.first()?, *body.get(1)?]));
        }
        extensions = &extensions[4 + length..];
    }
    Some(legacy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind, 3, 3];
        bytes.extend((body.len() as u16).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn server_hello(version: Option<u16>) -> Vec<u8> {
        let mut body = vec![SERVER_HELLO, 0, 0, 0, 3, 3];
        body.extend([7; 32]);
        body.extend([0, 0x13, 0x01, 0]);
        let mut extensions = vec![0, 51, 0, 1, 9];
        if let Some(version) = version {
            extensions.extend([0, 43, 0, 2]);
            extensions.extend(version.to_be_bytes());
        }
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        record(HANDSHAKE, &body)
    }

    fn stream(sent: Vec<u8>, received: Vec<u8>) -> Stream {
        Stream { sent, received, from_start: true }
    }

    #[test]
    fn tls_1_3_passes_and_is_counted() {
        let sent = [record(HANDSHAKE, &[CLIENT_HELLO, 0, 0, 0]), record(APPLICATION_DATA, &[1; 40])].concat();
        let received = [
            server_hello(Some(TLS_1_3)),
            record(CHANGE_CIPHER_SPEC, &[1]),
            record(APPLICATION_DATA, &[2; 90]),
        ];
        let records = check(&stream(sent, received.concat())).expect("it is TLS 1.3");
        assert_eq!(records, Records { hellos: 2, encrypted: 2 });
    }

    #[test]
    fn anything_else_is_refused() {
        let hello = || record(HANDSHAKE, &[CLIENT_HELLO, 0, 0, 0]);
        let cases = [
            ("plain HTTP", stream(b"GET / HTTP/1.1\r\n\r\n".to_vec(), Vec::new())),
            ("TLS 1.2 by extension", stream(hello(), server_hello(Some(0x0303)))),
            ("TLS 1.2 by its absence", stream(hello(), server_hello(None))),
            ("data before the hello", stream(record(APPLICATION_DATA, &[1]), Vec::new())),
            ("a certificate in clear", stream(hello(), record(HANDSHAKE, &[11, 0, 0, 0]))),
            ("clear text after the hello", stream([hello(), b"secret".to_vec()].concat(), Vec::new())),
        ];
        for (name, stream) in cases {
            assert!(check(&stream).is_err(), "{name}");
        }
    }
}
