//! What is under a tunnel's HTTP/2: TLS over a socket, written once per pass, watched by pings.
//!
//! HTTP/2 writes and flushes every larger DATA frame, TLS makes a record and a system call of each. Here
//! writes become full records as they come, a flush does nothing, and whoever drives the connection drains
//! what has gathered when a pass over all streams is over, with few system calls: one for the full records and one for
//! what is left over, where the socket takes it all.

use std::future::Future;
use std::io;
use std::io::IoSlice;
use std::io::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use h2::Ping;
use h2::PingPong;
use parking_lot::Mutex;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::ReadBuf;
use tokio::time::Instant;
use tokio::time::Sleep;
use tokio_rustls::TlsStream;

use crate::hbone::Config;
use crate::hbone::flow::Flow;
use crate::hbone::frames::CALM;
use crate::hbone::frames::Frames;
use crate::hbone::frames::Outgoing;
use crate::hbone::frames::step_aside;
use crate::net::buffer::ReadAhead;

/// Bytes that gather before a write waits for the socket.
pub(crate) const BACKLOG_MAX: usize = 256 * 1024;

/// Bytes read before the streams get their turn with what has come: while it is still in the cache, and so that they
/// begin to write while the peer sends on.
const PASS_MAX: usize = 256 * 1024;

/// What a TLS record holds at most (RFC 8446 §5.1).
const RECORD_MAX: usize = 16 * 1024;

/// Pieces one write takes at most.
const PIECES_MAX: usize = 64;

/// TLS over a socket that is read in large pieces, or over something else.
pub type Tls<S = ReadAhead> = TlsStream<S>;

/// What TLS goes over.
pub(super) trait Carrier: AsyncRead + AsyncWrite + Unpin {
    /// How many bytes it keeps that TLS has not read yet.
    fn kept(&mut self, cx: &mut Context<'_>) -> usize;
}

impl Carrier for ReadAhead {
    fn kept(&mut self, _cx: &mut Context<'_>) -> usize {
        Self::kept(self)
    }
}

/// The ALPN name of HTTP/2: both sides must have agreed on it.
pub const ALPN: &[u8] = b"h2";

struct Inner<S> {
    tls: Tls<S>,
    /// What does not fill a record yet: while the socket is full it stays, in a buffer of that size.
    tail: Vec<u8>,
    /// What was encrypted since the socket last took everything.
    encrypted: usize,
    /// What was read in this pass.
    read: usize,
    frames: Frames,
    outgoing: Outgoing,
    flow: Arc<Flow>,
}

impl<S: Carrier> Inner<S> {
    /// What the tunnel holds besides what its streams have put on it.
    fn held(&mut self, cx: &mut Context<'_>) -> usize {
        let kept = match &mut self.tls {
            TlsStream::Client(tls) => tls.get_mut().0.kept(cx),
            TlsStream::Server(tls) => tls.get_mut().0.kept(cx),
        };
        self.encrypted + self.tail.capacity() + self.frames.partial() + kept
    }

    /// Full records are made of it at once, out of where it lies; the rest waits for more, or for the drain.
    fn append(&mut self, cx: &mut Context<'_>, data: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.encrypted >= BACKLOG_MAX {
            ready!(self.flush(cx))?;
        }
        let data = &data[..data.len().min(PIECES_MAX)];
        let length: usize = data.iter().map(|piece| piece.len()).sum();
        let all = self.tail.len() + length;
        // How much of `data` is left over for the tail: all of it while there is no full record.
        let mut rest = if all < RECORD_MAX { length } else { all % RECORD_MAX };
        if all >= RECORD_MAX {
            let mut records = [IoSlice::new(&[]); PIECES_MAX + 1];
            records[0] = IoSlice::new(&self.tail);
            let mut left = length - rest;
            for (record, piece) in records[1..].iter_mut().zip(data) {
                let part = left.min(piece.len());
                *record = IoSlice::new(&piece[..part]);
                left -= part;
            }
            encrypt(&mut self.tls, &records[..=data.len()])?;
            self.encrypted += all - rest;
            self.tail.clear();
        }
        if rest > 0 && self.tail.capacity() == 0 {
            self.tail = Vec::with_capacity(RECORD_MAX);
        }
        let mut skip = length - rest;
        for piece in data {
            let skipped = skip.min(piece.len());
            skip -= skipped;
            self.tail.extend_from_slice(&piece[skipped..]);
            rest -= piece.len() - skipped;
        }
        debug_assert_eq!(rest, 0);
        data.iter().for_each(|piece| self.outgoing.said(piece));
        Poll::Ready(Ok(length))
    }

    /// Tells the peer of windows that HTTP/2 does not know of; where HTTP/2 is in the middle of something, later.
    fn give_back(&mut self, cx: &mut Context<'_>) {
        if self.frames.owes() && self.outgoing.is_between_frames() && self.encrypted < BACKLOG_MAX {
            let updates = self.frames.take_owed();
            // It fails as anything else that is written does, of which the drain tells.
            let _appended = self.append(cx, &[IoSlice::new(&updates)]);
        }
    }

    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // While the socket is full the tail may still grow to a record.
        if self.encrypted > 0 {
            ready!(self.flush(cx))?;
        }
        if !self.tail.is_empty() {
            encrypt(&mut self.tls, &[IoSlice::new(&self.tail)])?;
            self.encrypted += self.tail.len();
            self.tail.clear();
        }
        self.tail = Vec::new();
        self.flush(cx)
    }

    fn flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.tls).poll_flush(cx))?;
        self.encrypted = 0;
        Poll::Ready(Ok(()))
    }
}

/// Makes records of `data`, which are written with the next flush.
fn encrypt<S>(tls: &mut Tls<S>, data: &[IoSlice<'_>]) -> io::Result<()> {
    let written = match tls {
        TlsStream::Client(tls) => tls.get_mut().1.writer().write_vectored(data)?,
        TlsStream::Server(tls) => tls.get_mut().1.writer().write_vectored(data)?,
    };
    // Without a limit everything is taken. What was not would be missing in the middle of the connection.
    let all: usize = data.iter().map(|piece| piece.len()).sum();
    if written == all { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// The end that HTTP/2 reads and writes.
pub(super) struct Deferred<S>(Arc<Mutex<Inner<S>>>);

/// The end that whoever drives the connection drains after every pass.
pub(super) struct Backlog<S>(Arc<Mutex<Inner<S>>>);

/// Puts a deferring writer on `tls`.
pub(super) fn defer<S>(mut tls: Tls<S>, flow: Arc<Flow>) -> (Deferred<S>, Backlog<S>) {
    // What gathers is bounded here.
    let (frames, outgoing) = match &mut tls {
        TlsStream::Client(tls) => {
            tls.get_mut().1.set_buffer_limit(None);
            (Frames::of_server(), Outgoing::of_client())
        }
        TlsStream::Server(tls) => {
            tls.get_mut().1.set_buffer_limit(None);
            (Frames::of_client(), Outgoing::of_server())
        }
    };
    let inner = Inner { tls, tail: Vec::new(), encrypted: 0, read: 0, frames, outgoing, flow };
    let inner = Arc::new(Mutex::new(inner));
    (Deferred(Arc::clone(&inner)), Backlog(inner))
}

// The lock is there because tasks must be `Send`; a tunnel stays on its thread, so nobody ever waits for it.
impl<S: Carrier> Backlog<S> {
    /// Ends a pass: writes what has gathered, and charges for what is left. Pending when the socket takes no more for
    /// now.
    pub(super) fn poll_drain(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.lock();
        inner.read = 0;
        let (widened, earned) = (inner.frames.take_widened(), inner.flow.take_earned());
        inner.frames.pass(earned);
        if widened > 0 {
            inner.flow.widen(widened);
        }
        inner.give_back(cx);
        let drained = inner.drain(cx);
        let held = inner.held(cx);
        inner.flow.settle(held);
        inner.flow.passed(drained.is_ready());
        drained
    }

    /// Whether the peer has sent more than it had reason to. It is told so, and nothing is read any more.
    pub(super) fn is_flooded(&self, cx: &mut Context<'_>) -> bool {
        let mut inner = self.0.lock();
        if !inner.frames.is_flooded() {
            return false;
        }
        // Whether it takes it or not.
        let _told = inner.append(cx, &[IoSlice::new(&CALM)]);
        let _drained = inner.drain(cx);
        true
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

impl<S: Carrier> AsyncRead for Deferred<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let inner = &mut *self.0.lock();
        if inner.read >= PASS_MAX {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if inner.frames.is_pass_over() {
            step_aside(cx);
            return Poll::Pending;
        }
        let before = out.filled().len();
        let read = inner.frames.poll_read(&mut inner.tls, cx, out);
        inner.read += out.filled().len() - before;
        read
    }
}

impl<S: Carrier> AsyncWrite for Deferred<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.0.lock().append(cx, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.lock().append(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.lock();
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

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use rustls::pki_types::ServerName;
    use tokio::net::TcpListener;
    use tokio::net::TcpStream;
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::hbone::tests::TestCa;
    use crate::hbone::tests::id;

    /// Both ends of a connection.
    async fn tls() -> [Tls; 2] {
        let ca = TestCa::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let near = ReadAhead::new(TcpStream::connect(address).await.unwrap());
        let far = ReadAhead::new(listener.accept().await.unwrap().0);
        let client = TlsConnector::from(ca.certify(&id("client")).client_config(&[id("server")]));
        let server = TlsAcceptor::from(ca.certify(&id("server")).server_config());
        let name = ServerName::IpAddress(address.ip().into());
        let (near, far) = tokio::try_join!(client.connect(name, near), server.accept(far)).unwrap();
        [near.into(), far.into()]
    }

    #[tokio::test]
    async fn what_tls_does_not_take_is_not_lost_in_silence() {
        let [mut near, _far] = tls().await;
        let data = [IoSlice::new(&[7; RECORD_MAX])];
        encrypt(&mut near, &data).unwrap();
        match &mut near {
            TlsStream::Client(tls) => tls.get_mut().1.set_buffer_limit(Some(RECORD_MAX / 2)),
            TlsStream::Server(tls) => tls.get_mut().1.set_buffer_limit(Some(RECORD_MAX / 2)),
        }
        assert_eq!(encrypt(&mut near, &data).unwrap_err().kind(), io::ErrorKind::WriteZero);
    }

    #[tokio::test]
    async fn what_waits_for_a_full_socket_keeps_no_more_than_a_record() {
        let [near, _far] = tls().await;
        let (deferred, backlog) = defer(near, Flow::new(1 << 20));
        let data = [7; RECORD_MAX + 100];
        poll_fn(|cx| {
            loop {
                let appended = deferred.0.lock().append(cx, &[IoSlice::new(&data)]);
                assert!(matches!(appended, Poll::Ready(Ok(_))), "there is room in the backlog");
                if backlog.poll_drain(cx).is_pending() {
                    return Poll::Ready(());
                }
            }
        })
        .await;
        let appended = poll_fn(|cx| deferred.0.lock().append(cx, &[IoSlice::new(b"more")])).await;
        assert_eq!(appended.unwrap(), 4);
        let tail = &deferred.0.lock().tail;
        assert!(!tail.is_empty() && tail.capacity() <= RECORD_MAX, "{} of {}", tail.len(), tail.capacity());
    }
}
