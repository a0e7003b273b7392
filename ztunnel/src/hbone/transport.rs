//! What is under a tunnel's HTTP/2: TLS over a socket, written once per pass, watched by pings.
//!
//! HTTP/2 writes and flushes every larger DATA frame, TLS makes a record and a system call of each. Here
//! writes gather in one buffer, a flush does nothing, and whoever drives the connection drains the buffer
//! when a pass over all streams is over.

use std::future::Future;
use std::io;
use std::io::IoSlice;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use h2::Ping;
use h2::PingPong;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::ReadBuf;
use tokio::time::Instant;
use tokio::time::Sleep;
use tokio_rustls::TlsStream;

use crate::hbone::Config;
use crate::net::buffer;
use crate::net::buffer::ReadAhead;

/// Bytes that gather before a write waits for the socket.
const BACKLOG_MAX: usize = 256 * 1024;

/// TLS over a socket that is read in large pieces.
pub type Tls = TlsStream<ReadAhead>;

/// The ALPN name of HTTP/2: both sides must have agreed on it.
pub const ALPN: &[u8] = b"h2";

struct Inner {
    tls: Tls,
    backlog: Vec<u8>,
    written: usize,
}

impl Inner {
    fn append(&mut self, cx: &mut Context<'_>, data: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.backlog.len() - self.written >= BACKLOG_MAX {
            ready!(self.drain(cx))?;
        }
        if self.backlog.capacity() == 0 {
            self.backlog = buffer::take();
        }
        let before = self.backlog.len();
        for piece in data {
            self.backlog.extend_from_slice(piece);
        }
        Poll::Ready(Ok(self.backlog.len() - before))
    }

    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.backlog.len() {
            let rest = &self.backlog[self.written..];
            let written = ready!(Pin::new(&mut self.tls).poll_write(cx, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
        }
        if self.backlog.capacity() > 0 {
            self.written = 0;
            buffer::give(std::mem::take(&mut self.backlog));
        }
        Pin::new(&mut self.tls).poll_flush(cx)
    }
}

/// The end that HTTP/2 reads and writes.
pub(super) struct Deferred(Arc<Mutex<Inner>>);

/// The end that whoever drives the connection drains after every pass.
pub(super) struct Backlog(Arc<Mutex<Inner>>);

/// Puts a deferring writer on `tls`.
pub(super) fn defer(tls: Tls) -> (Deferred, Backlog) {
    let inner = Arc::new(Mutex::new(Inner { tls, backlog: Vec::new(), written: 0 }));
    (Deferred(Arc::clone(&inner)), Backlog(inner))
}

// The lock is there because tasks must be `Send`; a tunnel stays on its thread, so nobody ever waits for it.
fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Backlog {
    /// Writes what has gathered. Pending when the socket takes no more for now.
    pub(super) fn poll_drain(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.0).drain(cx)
    }

    /// Drives `future`, which uses the other end, and drains after each of its passes.
    pub(super) async fn drive<F: Future>(&self, future: F) -> F::Output {
        let mut future = std::pin::pin!(future);
        std::future::poll_fn(|cx| {
            let output = future.as_mut().poll(cx);
            // An error comes up in the future's own next read or write.
            let _drained = self.poll_drain(cx);
            output
        })
        .await
    }
}

impl AsyncRead for Deferred {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut lock(&self.0).tls).poll_read(cx, out)
    }
}

impl AsyncWrite for Deferred {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        lock(&self.0).append(cx, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        lock(&self.0).append(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = lock(&self.0);
        ready!(inner.drain(cx))?;
        Pin::new(&mut inner.tls).poll_shutdown(cx)
    }
}

/// Pings the peer: silence → ping → answer → silence, or no answer → dead.
pub(super) struct Keepalive {
    pings: PingPong,
    timer: Pin<Box<Sleep>>,
    waiting: bool,
    interval: std::time::Duration,
    timeout: std::time::Duration,
}

impl Keepalive {
    /// `pings` is the connection's, taken once.
    pub(super) fn new(pings: PingPong, config: &Config) -> Self {
        Self {
            pings,
            timer: Box::pin(tokio::time::sleep(config.ping_interval)),
            waiting: false,
            interval: config.ping_interval,
            timeout: config.ping_timeout,
        }
    }

    /// Ready when the peer is dead. Poll it before the connection, which carries its pings.
    pub(super) fn poll_dead(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.waiting
                && let Poll::Ready(Ok(_)) = self.pings.poll_pong(cx)
            {
                self.waiting = false;
                self.timer.as_mut().reset(Instant::now() + self.interval);
            }
            ready!(self.timer.as_mut().poll(cx));
            if self.waiting {
                return Poll::Ready(());
            }
            // It fails only when the connection is closing, and then it does not matter.
            let _sent = self.pings.send_ping(Ping::opaque());
            self.waiting = true;
            self.timer.as_mut().reset(Instant::now() + self.timeout);
        }
    }
}
