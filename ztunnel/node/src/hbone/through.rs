//! A stream as that through which another tunnel goes: to a peer beyond a gateway, which passes on what it cannot read.

use std::future::poll_fn;
use std::io;
use std::io::IoSlice;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use bytes::Buf;
use bytes::Bytes;
use bytes::BytesMut;
use parking_lot::Mutex;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::ReadBuf;

use crate::hbone::stream::RecvHalf;
use crate::hbone::stream::SendHalf;
use crate::hbone::stream::StreamError;
use crate::hbone::transport::Carrier;

/// What one write takes at most: as much as four records of TLS.
const WRITE_MAX: usize = 64 * 1024;

/// Both halves of a stream. Dropped before this side has ended it, it resets the stream.
#[derive(Debug)]
pub struct Through {
    send: SendHalf,
    recv: Arc<Mutex<RecvHalf>>,
    /// What was received and not yet read.
    ahead: Bytes,
    finished: bool,
}

impl Through {
    /// Joins the halves of one stream. Keep the other result until this side is done with it.
    pub fn new((send, recv): (SendHalf, RecvHalf)) -> (Self, Tail) {
        let recv = Arc::new(Mutex::new(recv));
        (Self { send, recv: Arc::clone(&recv), ahead: Bytes::new(), finished: false }, Tail(recv))
    }
}

/// What is left of a stream that this side has ended.
#[derive(Debug)]
pub struct Tail(Arc<Mutex<RecvHalf>>);

impl Tail {
    /// Waits until the other side has ended the stream, too, or broken it. Dropped before, it resets the stream, and
    /// then whoever passes its data on may lose what it has not passed on yet.
    pub async fn ended(self) {
        poll_fn(|cx| {
            let mut recv = self.0.lock();
            loop {
                match ready!(recv.poll_data(cx)) {
                    Some(Ok(data)) => recv.release(data.len()),
                    Some(Err(_)) | None => return Poll::Ready(()),
                }
            }
        })
        .await;
    }
}

// One task has both ends, one after the other: nobody ever waits for it.
fn broken(error: StreamError) -> io::Error {
    match error {
        StreamError::Reset(_) => io::Error::new(io::ErrorKind::ConnectionReset, error),
        error => io::Error::other(error),
    }
}

impl Carrier for Through {
    fn kept(&mut self, cx: &mut Context<'_>) -> usize {
        self.ahead.len() + self.recv.lock().pull(cx)
    }
}

impl AsyncRead for Through {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.ahead.is_empty() {
            let received = ready!(self.recv.lock().poll_data(cx));
            match received {
                Some(Ok(data)) => self.ahead = data,
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let length = self.ahead.len().min(out.remaining());
        out.put_slice(&self.ahead[..length]);
        self.ahead.advance(length);
        self.recv.lock().release(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Through {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let all: usize = data.iter().map(|piece| piece.len()).sum();
        let mut left = all.min(WRITE_MAX);
        let mut gathered = BytesMut::with_capacity(left);
        for piece in data {
            let part = left.min(piece.len());
            gathered.extend_from_slice(&piece[..part]);
            left -= part;
        }
        self.send.poll_send(cx, &mut gathered.freeze()).map_err(broken)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Whoever drives the outer tunnel writes what it has.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !std::mem::replace(&mut self.finished, true) {
            self.send.finish().map_err(broken)?;
        }
        Poll::Ready(Ok(()))
    }
}
