//! What is answered: a text that is there, or chunks that are being made.

use std::io;
use std::io::BufWriter;
use std::io::Write;
use std::pin::Pin;
use std::task::Context;
use std::task::Poll;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::HeaderMap;
use http::HeaderValue;
use http::header;
use hyper::body::Body as HttpBody;
use hyper::body::Frame;
use hyper::body::SizeHint;
use tokio::sync::mpsc;

/// How large a chunk is, about.
const CHUNK: usize = 64 * 1024;

/// Chunks made and not yet sent. When full, whoever makes them waits for the client.
const CHUNKS_MAX: usize = 4;

/// The body of an answer.
#[derive(Debug)]
pub enum Body {
    /// All of it.
    Whole(Option<Bytes>),
    /// What comes, until a chunk says that it was the last. If none does, the connection breaks, so that nobody
    /// takes a part for the whole.
    Chunks(mpsc::Receiver<Chunk>),
}

/// A part of a body.
#[derive(Debug)]
pub enum Chunk {
    /// There is more.
    Some(Bytes),
    /// There is no more.
    End,
}

/// Whoever made the chunks stopped before the end.
#[derive(Debug, thiserror::Error)]
#[error("the answer could not be completed")]
pub struct Incomplete;

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self::Whole(Some(bytes).filter(|bytes| !bytes.is_empty()))
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Incomplete;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Chunks(chunks) => chunks.poll_recv(cx).map(|chunk| match chunk {
                Some(Chunk::Some(bytes)) => Some(Ok(Frame::data(bytes))),
                Some(Chunk::End) => None,
                None => Some(Err(Incomplete)),
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Chunks(_) => SizeHint::default(),
        }
    }
}

/// Has `make` write a body on a thread of its own kind, off the runtime, while what it has written is sent.
/// Compressed, if `gzip`.
pub fn written(gzip: bool, make: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static) -> Body {
    let (chunks, receiver) = mpsc::channel(CHUNKS_MAX);
    let writing = move || {
        let mut out = ChunkWriter { chunks, buffer: Vec::with_capacity(CHUNK) };
        let written = if gzip {
            // Documents come in pieces of a few bytes, and the encoder takes its time for each piece.
            let mut encoder = BufWriter::with_capacity(CHUNK, GzEncoder::new(&mut out, Compression::fast()));
            make(&mut encoder).and_then(|()| encoder.into_inner()?.finish().map(|_out| ()))
        } else {
            make(&mut out)
        };
        // A client that has gone away is the only reason for an error; what it did not get, it did not want.
        let _gone = written.and_then(|()| out.end());
    };
    // Nobody waits for it: it ends with its last chunk, or when the client is gone.
    drop(tokio::task::spawn_blocking(writing));
    Body::Chunks(receiver)
}

/// Collects bytes into chunks, and waits where the client is slower.
struct ChunkWriter {
    chunks: mpsc::Sender<Chunk>,
    buffer: Vec<u8>,
}

impl ChunkWriter {
    fn send(&mut self, chunk: Chunk) -> io::Result<()> {
        self.chunks.blocking_send(chunk).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn end(&mut self) -> io::Result<()> {
        self.flush()?;
        self.send(Chunk::End)
    }
}

impl Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= CHUNK {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        self.send(Chunk::Some(full.into()))
    }
}

/// How `Content-Encoding` says it.
pub const GZIP: HeaderValue = HeaderValue::from_static("gzip");

/// `text`, compressed.
pub fn compressed(text: &str) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::with_capacity(text.len() / 8), Compression::fast());
    encoder.write_all(text.as_bytes())?;
    encoder.finish()
}

/// Whether the client takes gzip (RFC 9110 §12.5.3).
pub fn takes_gzip(asked: &HeaderMap) -> bool {
    let codings = asked.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    let mut any = None;
    for coding in codings.flat_map(|value| value.split(',')) {
        let mut parts = coding.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q=")).map_or(Ok(1.0), str::parse::<f32>);
        let wanted = weight.is_ok_and(|weight| weight > 0.0);
        if name.eq_ignore_ascii_case("gzip") {
            return wanted;
        }
        if name == "*" {
            any = Some(wanted);
        }
    }
    any.unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering;

    use flate2::read::GzDecoder;
    use http_body_util::BodyExt as _;

    use super::*;

    #[test]
    fn gzip_is_used_where_it_is_taken() {
        for (accepted, takes) in [
            (None, false),
            (Some("gzip"), true),
            (Some("deflate, GZIP;q=0.5"), true),
            (Some("gzip;q=0"), false),
            (Some("identity"), false),
            (Some("*"), true),
            (Some("*;q=0.1, gzip;q=0"), false),
            (Some("gzip;q=loud"), false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(accepted) = accepted {
                headers.insert(header::ACCEPT_ENCODING, accepted.parse().unwrap());
            }
            assert_eq!(takes_gzip(&headers), takes, "{accepted:?}");
        }
    }

    #[tokio::test]
    async fn what_is_written_arrives_whole() {
        let text = "0123456789abcdef".repeat(50_000);
        for gzip in [false, true] {
            let sent = text.clone();
            let body = written(gzip, move |out| out.write_all(sent.as_bytes()));
            let bytes = body.collect().await.unwrap().to_bytes();
            let mut got = String::new();
            if gzip {
                assert!(bytes.len() < text.len() / 10);
                GzDecoder::new(&bytes[..]).read_to_string(&mut got).unwrap();
            } else {
                got.push_str(std::str::from_utf8(&bytes).unwrap());
            }
            assert!(got == text, "gzip={gzip}");
        }
    }

    #[tokio::test]
    async fn little_is_made_ahead_of_who_reads_it() {
        let made = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&made);
        let mut body = written(false, move |out| {
            for _ in 0..64 {
                out.write_all(&[b'x'; CHUNK])?;
                count.fetch_add(CHUNK, Ordering::SeqCst);
            }
            Ok(())
        });
        let mut taken = 0;
        while let Some(frame) = body.frame().await {
            taken += frame.unwrap().into_data().unwrap().len();
            let ahead = made.load(Ordering::SeqCst).saturating_sub(taken);
            assert!(ahead <= CHUNKS_MAX * CHUNK, "{ahead} bytes ahead after {taken}");
        }
        assert_eq!(taken, 64 * CHUNK);
    }

    #[tokio::test]
    async fn what_stops_half_way_is_no_end() {
        let body = written(false, |out| {
            out.write_all(&[b'x'; 2 * CHUNK])?;
            Err(io::Error::other("stopped"))
        });
        assert!(body.collect().await.is_err());
    }
}
