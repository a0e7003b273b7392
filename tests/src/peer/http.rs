//! As much of HTTP/1.1 as a client needs that asks for one small page over and over.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, bail, ensure};

const HEAD_LIMIT: usize = 16 << 10;

/// A request that keeps the connection open.
pub(super) fn request(to: SocketAddr, path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: {to}\r\n\r\n").into_bytes()
}

/// How long the answer at the start of `bytes` is in all, once its head is there. Anything but status 200 with
/// a `content-length` is an error.
pub(super) fn answer_length(bytes: &[u8]) -> Result<Option<usize>> {
    let Some(head) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        ensure!(bytes.len() < HEAD_LIMIT, "the head of the answer does not end");
        return Ok(None);
    };
    let text = std::str::from_utf8(&bytes[..head]).context("the head of the answer is not text")?;
    let mut lines = text.split("\r\n");
    let status = lines.next().unwrap_or_default();
    ensure!(status.split(' ').nth(1) == Some("200"), "answered {status:?}");
    for line in lines {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            let body: usize = value.trim().parse().with_context(|| line.to_owned())?;
            return Ok(Some(head + 4 + body));
        }
    }
    bail!("the answer has no content-length")
}

/// One request and its whole answer.
pub(super) fn exchange(stream: &mut TcpStream, request: &[u8]) -> Result<()> {
    stream.write_all(request).context("cannot send")?;
    let mut answer = Vec::new();
    let mut chunk = [0; 8 << 10];
    loop {
        let read = stream.read(&mut chunk).context("no answer")?;
        ensure!(read > 0, "closed before the answer was complete");
        answer.extend_from_slice(&chunk[..read]);
        if answer_length(&answer)?.is_some_and(|length| answer.len() >= length) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_is_known_once_the_head_is_there() {
        let answer = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-LENGTH: 5\r\n\r\nhel";
        assert_eq!(answer_length(&answer[..30]).expect("a part"), None);
        assert_eq!(answer_length(answer).expect("a head"), Some(answer.len() + 2));
    }

    #[test]
    fn failures_are_not_taken_for_answers() {
        for answer in ["HTTP/1.1 503 Unavailable\r\ncontent-length: 0\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"] {
            assert!(answer_length(answer.as_bytes()).is_err(), "{answer:?}");
        }
    }
}
