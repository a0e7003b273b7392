//! Moving bytes between an application's socket and a stream.
//!
//! Each direction ends on its own. A reset at either end becomes a reset at the other, and so does the end of
//! the tunnel: an application never takes a part for the whole. What had come before a reset is delivered first: the
//! kernel lets it be read behind a reset, and a peer would have got it, but HTTP/2 throws away what waits to be sent on a
//! stream that is reset. So an application that says something and resets its connection right then, as the kernel
//! does for one that closes it with something unread, is waited for until that is on its way, or [`PARTING_WITHIN`] is over.
//!
//! The exception is CONNECT_ERROR, with which Envoy ends a stream right behind the last data of a server that closes its
//! connection, and of one that resets it: both are an end, as Istio's own proxy has it, since an answer that ends with
//! its connection (HTTP/1.0, `Connection: close`) would otherwise never come through a waypoint without an error.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use bytes::Bytes;
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio::time::Sleep;
use tokio::time::sleep;

use crate::hbone::stream::BULK_SIZE;
use crate::hbone::stream::RecvHalf;
use crate::hbone::stream::ResetCode;
use crate::hbone::stream::SendHalf;
use crate::hbone::stream::StreamError;
use crate::hbone::stream::TunnelError;
use crate::net::budget::Holder;
use crate::net::budget::Pressure;
use crate::net::budget::Shed;
use crate::net::buffer::READ_SIZE;
use crate::net::buffer::poll_read_up_to;
use crate::net::copy::Meter;
use crate::net::copy::Outflow;
use crate::net::copy::PARTING_WITHIN;
use crate::net::copy::ResetUnlessDone;
use crate::net::copy::Watch;
use crate::net::copy::is_reset;

/// Why a relayed connection ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The application's side.
    #[error("the application's connection broke before all data was written")]
    Application(#[source] io::Error),
    /// The tunnel's side.
    #[error("the tunnel's stream ended before all data was written")]
    Stream(#[source] StreamError),
    /// It had to give way.
    #[error(transparent)]
    Shed(Shed),
}

impl RelayError {
    /// Whether one of the two applications reset the connection, as applications do: nothing went wrong with
    /// what carried it. Nor did it, as Istio's proxy has it, if the peer closed the whole tunnel instead of the stream:
    /// some do so when they end, and the application is reset all the same.
    pub fn is_reset(&self) -> bool {
        match self {
            Self::Application(error) => is_reset(error),
            Self::Stream(StreamError::Reset(_) | StreamError::Finished) => true,
            Self::Stream(StreamError::Tunnel(TunnelError::Io(error))) => is_closed(error),
            Self::Stream(StreamError::Tunnel(TunnelError::Protocol(_)) | StreamError::NotTaken) => false,
            Self::Shed(_) => false,
        }
    }
}

/// Whether a tunnel's connection was closed by its peer, with or without a word before.
fn is_closed(error: &io::Error) -> bool {
    is_reset(error) || error.kind() == io::ErrorKind::UnexpectedEof
}

/// Which end of the connection the application is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Application {
    /// It dialled.
    Client,
    /// It was dialled.
    Server,
}

/// One relayed connection: all there is of it. A future that resolves when both directions have ended; when one
/// breaks, or the future is dropped, both ends are reset.
///
/// From the application: reading → ending (the rest and the end are being sent) → ended.
/// To the application: the same, the other way; or receiving → broken (what came before the reset is being written).
/// Once the application's connection breaks there is only the first, as far as there is anything left to be sent.
pub struct Relay<M> {
    application: ResetUnlessDone,
    role: Application,
    send: SendHalf,
    recv: RecvHalf,
    /// What was read and not yet sent. While there is any, nothing more is read; and nothing is read that may not be
    /// sent.
    chunk: Bytes,
    /// Whether there was much to read the last time.
    bulk: bool,
    /// Whether there is something to read that may not be sent.
    blocked: bool,
    from: From,
    /// What was received and not yet written; bounded by the stream's window, as it is released only then.
    outflow: Outflow,
    to: To,
    watch: Watch,
    /// The application's connection broke, and what it had said before is not all on its way: until then.
    parting: Option<Box<Parting>>,
    holder: Holder,
    meter: M,
}

struct Parting {
    error: io::Error,
    over: Pin<Box<Sleep>>,
}

#[derive(Debug, PartialEq, Eq)]
enum From {
    Reading,
    ConnectionError,
    Ended,
}

#[derive(Debug)]
enum To {
    Receiving,
    ConnectionError,
    /// By this, of which the application is told once it has what came before.
    Broken(StreamError),
    Ended,
}

/// What was already read from the application.
#[derive(Debug, Default)]
pub struct Read {
    /// Not sent yet.
    pub unsent: Bytes,
    /// Whether the end came after it.
    pub ended: bool,
}

/// What was already received from the stream.
#[derive(Debug, Default)]
pub struct Received {
    /// How much of it was written to the application.
    pub sent: usize,
    /// The rest.
    pub unsent: Bytes,
}

impl<M: Meter> Relay<M> {
    /// Joins an application and a stream. `read` was taken from the application before, and counted. `holder` is
    /// charged for what the application does not take; for what the peer does not, the tunnel is.
    pub fn new(
        (application, role): (ResetUnlessDone, Application),
        (send, recv): (SendHalf, RecvHalf),
        read: Read,
        holder: Holder,
        meter: M,
    ) -> Self {
        Self {
            application,
            role,
            send,
            recv,
            chunk: read.unsent,
            bulk: false,
            blocked: false,
            from: if read.ended { From::ConnectionError } else { From::Reading },
            outflow: Outflow::default(),
            to: To::Receiving,
            watch: Watch::default(),
            parting: None,
            holder,
            meter,
        }
    }

    /// The same, with what was received before: counted from here on.
    pub fn after(mut self, received: Received) -> Self {
        if received.sent > 0 {
            self.recv.release(received.sent);
            self.count_written(received.sent);
        }
        self.outflow.push(received.unsent);
        self
    }

    /// What counted; the rest is dropped.
    pub fn into_meter(self) -> M {
        self.meter
    }

    /// Whether it is no more than the end of the server's connection.
    fn is_over(&self, error: &StreamError) -> bool {
        self.role == Application::Client && matches!(error, StreamError::Reset(ResetCode::CONNECT_ERROR))
    }

    fn count_read(&self, bytes: usize) {
        match self.role {
            Application::Client => self.meter.up(bytes as u64),
            Application::Server => self.meter.down(bytes as u64),
        }
    }

    fn count_written(&self, bytes: usize) {
        match self.role {
            Application::Client => self.meter.down(bytes as u64),
            Application::Server => self.meter.up(bytes as u64),
        }
    }

    fn poll_from(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RelayError>> {
        let mut passed = 0;
        loop {
            while !self.chunk.is_empty() {
                ready!(self.send.poll_send(cx, &mut self.chunk)).map_err(RelayError::Stream)?;
            }
            match self.from {
                From::Reading => {
                    // The tunnel has its turn while what was read is still in the cache.
                    if passed >= BULK_SIZE {
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    let size = if self.bulk { BULK_SIZE } else { READ_SIZE };
                    let socket = &mut self.application.socket;
                    self.blocked = false;
                    // Not before there is something to send: what is reserved for one stream others cannot use.
                    ready!(socket.poll_read_ready(cx)).map_err(RelayError::Application)?;
                    self.blocked = true;
                    let room = ready!(self.send.poll_room(cx, size)).map_err(RelayError::Stream)?;
                    self.blocked = false;
                    let read = poll_read_up_to(room, self.holder.share().pressure(), socket, cx);
                    let Poll::Ready(read) = read else {
                        self.send.give_back();
                        return Poll::Pending;
                    };
                    self.chunk = read.map_err(RelayError::Application)?;
                    // Sending reserves no more than what is sent.
                    if self.chunk.is_empty() {
                        self.send.give_back();
                    }
                    self.bulk = self.chunk.len() >= READ_SIZE;
                    passed += self.chunk.len();
                    self.count_read(self.chunk.len());
                    if self.chunk.is_empty() {
                        self.from = From::ConnectionError;
                    }
                }
                From::ConnectionError => {
                    // Fails for a stream that was reset, of which the other direction learns the reason.
                    let _ended = self.send.finish();
                    self.from = From::Ended;
                }
                From::Ended => return Poll::Ready(Ok(())),
            }
        }
    }

    fn poll_to(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RelayError>> {
        let mut stalled = false;
        loop {
            // What nobody takes is received nevertheless: it counts against the stream's window as before, but
            // no longer against the number of frames a tunnel lets wait.
            while matches!(self.to, To::Receiving) && (stalled || !self.outflow.is_full()) {
                match self.recv.poll_data(cx) {
                    Poll::Ready(Some(Ok(data))) => self.outflow.push(data),
                    Poll::Ready(Some(Err(error))) if self.is_over(&error) => {
                        self.to = To::ConnectionError;
                        // Nor is anything taken any more.
                        self.chunk = Bytes::new();
                        self.from = From::Ended;
                    }
                    Poll::Ready(Some(Err(error))) => self.to = To::Broken(error),
                    Poll::Ready(None) => self.to = To::ConnectionError,
                    Poll::Pending => break,
                }
            }
            if stalled {
                self.outflow.settle();
                return Poll::Pending;
            }
            if !self.outflow.is_empty() {
                let written = match self.to {
                    To::ConnectionError => self.outflow.poll_write_last(&self.application.socket, cx),
                    To::Receiving | To::Broken(_) | To::Ended => {
                        self.outflow.poll_write(&mut self.application.socket, cx)
                    }
                };
                match written {
                    Poll::Ready(written) => {
                        let written = written.map_err(RelayError::Application)?;
                        self.recv.release(written);
                        self.count_written(written);
                    }
                    Poll::Pending => stalled = true,
                }
                continue;
            }
            match self.to {
                To::Receiving => return Poll::Pending,
                To::ConnectionError => {
                    // Where the other direction has ended, too, the close that follows says it.
                    if self.from != From::Ended {
                        let ended = Pin::new(&mut self.application.socket).poll_shutdown(cx);
                        ready!(ended).map_err(RelayError::Application)?;
                    }
                    self.to = To::Ended;
                }
                To::Broken(_) => return Poll::Ready(Err(self.broken())),
                To::Ended => return Poll::Ready(Ok(())),
            }
        }
    }

    /// What the stream was broken by.
    fn broken(&mut self) -> RelayError {
        match std::mem::replace(&mut self.to, To::Ended) {
            To::Broken(error) => RelayError::Stream(error),
            To::Receiving | To::ConnectionError | To::Ended => RelayError::Stream(StreamError::Finished),
        }
    }

    /// Nobody takes any more of what the application says. An error if there is nothing left to write to it.
    fn no_more_from(&mut self, error: StreamError) -> Result<(), RelayError> {
        match self.to {
            // The other direction learns of it as well, behind what was received.
            To::Receiving => {}
            To::ConnectionError if !self.outflow.is_empty() => match error {
                StreamError::Finished => {}
                error if self.is_over(&error) => {}
                error => self.to = To::Broken(error),
            },
            To::ConnectionError | To::Broken(_) | To::Ended => return Err(RelayError::Stream(error)),
        }
        self.chunk = Bytes::new();
        self.from = From::Ended;
        Ok(())
    }

    fn poll_both(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RelayError>> {
        if let Poll::Ready(shed) = self.holder.poll_shed(cx) {
            return Poll::Ready(Err(RelayError::Shed(shed)));
        }
        let mut moved = Poll::Pending;
        if self.parting.is_none() {
            moved = self.poll_moved(cx);
            if let Poll::Ready(Err(RelayError::Application(error))) = moved {
                // Nobody takes any more of it.
                self.outflow = Outflow::default();
                self.parting = Some(Box::new(Parting { error, over: Box::pin(sleep(PARTING_WITHIN)) }));
                moved = Poll::Pending;
            }
        }
        if let Some(mut parting) = self.parting.take() {
            if self.poll_rest(cx).is_ready() || parting.over.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(RelayError::Application(parting.error)));
            }
            self.parting = Some(parting);
        }
        self.holder.set(self.outflow.len() + self.chunk.len());
        moved
    }

    /// Sends what the application had said, to the end of it. Ready also if there is no stream any more to send it on.
    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            while !self.chunk.is_empty() {
                if ready!(self.send.poll_send(cx, &mut self.chunk)).is_err() {
                    return Poll::Ready(());
                }
            }
            if self.from != From::Reading {
                return self.send.poll_sent(cx);
            }
            let Ok(room) = ready!(self.send.poll_room(cx, READ_SIZE)) else { return Poll::Ready(()) };
            let pressure = self.holder.share().pressure();
            match poll_read_up_to(room, pressure, &mut self.application.socket, cx) {
                Poll::Ready(Ok(chunk)) if !chunk.is_empty() => {
                    self.count_read(chunk.len());
                    self.chunk = chunk;
                    continue;
                }
                // Where a connection broke there is an end, or the same error once more.
                Poll::Ready(_) => self.from = From::Ended,
                Poll::Pending => {}
            }
            self.send.give_back();
            if self.from == From::Reading {
                return Poll::Pending;
            }
        }
    }

    fn poll_moved(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RelayError>> {
        let to = self.poll_to(cx)?;
        if matches!(self.to, To::Broken(_)) {
            // Nobody waits for what the application says, and it may take its time, but not for ever.
            if self.watch.is_due(true, cx) {
                return Poll::Ready(Err(self.broken()));
            }
            return Poll::Pending;
        }
        let from = match self.poll_from(cx) {
            Poll::Ready(Err(RelayError::Stream(error))) => Poll::Ready(self.no_more_from(error)?),
            from => from?,
        };
        if to.is_ready() && from.is_ready() {
            return Poll::Ready(Ok(()));
        }
        // With nothing left to receive, only this tells of a reset.
        if matches!(self.to, To::Ended)
            && let Poll::Ready(error) = self.send.poll_reset(cx)
        {
            return Poll::Ready(match error {
                StreamError::Finished => Ok(()),
                error if self.is_over(&error) => Ok(()),
                error => Err(RelayError::Stream(error)),
            });
        }
        let unread = self.from != From::Reading || !self.chunk.is_empty() || self.blocked;
        if self.watch.is_due(unread, cx)
            && let Ok(Some(error)) = self.application.socket.take_error()
        {
            return Poll::Ready(Err(RelayError::Application(error)));
        }
        Poll::Pending
    }
}

impl<M: Meter + Unpin> Future for Relay<M> {
    type Output = Result<(), RelayError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let ended = ready!(self.poll_both(cx));
        match &ended {
            Ok(()) => self.application.done(),
            // Also where this side's end was sent before: the other side must not wait for more.
            Err(RelayError::Application(_)) => self.send.reset(),
            Err(RelayError::Stream(_) | RelayError::Shed(_)) => {}
        }
        Poll::Ready(ended)
    }
}

/// How much of it is kept until it is answered.
pub const EARLY_MAX: usize = 16 * 1024;

/// What an application says while a stream for it is being opened: at most one chunk is taken, sent before the
/// answer, and kept so that it can be sent again over another tunnel.
#[derive(Debug, Default)]
pub struct Early {
    kept: Option<Bytes>,
    unsent: Bytes,
    ended: bool,
}

impl Early {
    /// Whether anything was taken from the application, and so may have been sent.
    pub fn is_taken(&self) -> bool {
        self.kept.is_some()
    }

    /// How many bytes were taken.
    pub fn bytes(&self) -> usize {
        self.kept.as_ref().map_or(0, Bytes::len)
    }

    /// Sends from the beginning again.
    pub fn rewind(&mut self) {
        self.unsent = self.kept.clone().unwrap_or_default();
    }

    /// Takes and sends what there is. Never ready but with the application's error: what ails the stream, its
    /// answer will say.
    pub fn poll(
        &mut self,
        application: &mut TcpStream,
        send: &mut SendHalf,
        cx: &mut Context<'_>,
    ) -> Poll<io::Error> {
        if self.kept.is_none() && !self.ended {
            match poll_read_up_to(EARLY_MAX, Pressure::Some, application, cx) {
                Poll::Ready(Ok(chunk)) if chunk.is_empty() => self.ended = true,
                Poll::Ready(Ok(chunk)) => {
                    self.unsent = chunk.clone();
                    self.kept = Some(chunk);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(error),
                Poll::Pending => {}
            }
        }
        while !self.unsent.is_empty() {
            match send.poll_send(cx, &mut self.unsent) {
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) | Poll::Pending => break,
            }
        }
        Poll::Pending
    }

    /// What the relay begins with.
    pub fn into_read(self) -> Read {
        Read { unsent: self.unsent, ended: self.ended }
    }
}
