//! The two halves of a stream. Behind them the HTTP/2 implementation can change without anybody noticing.
//!
//! A half that is dropped before its end resets the stream (CANCEL), as a broken TCP connection would.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use bytes::Bytes;
use bytes::BytesMut;

use crate::hbone::flow::Flow;
use crate::hbone::flow::Piece;
use crate::hbone::flow::Queue;
use crate::hbone::flow::Stream;

/// Why a stream ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer has not looked at the stream (REFUSED_STREAM, or a GOAWAY that leaves it out): it can be
    /// opened again on another tunnel without anything happening twice.
    #[error("the peer did not take the stream")]
    NotTaken,
    /// The peer needs no more of it and lost nothing (NO_ERROR).
    #[error("the peer has finished with the stream")]
    Finished,
    /// The peer reset the stream: its application's connection broke, or its policy changed.
    #[error("the stream was reset by the peer ({0})")]
    Reset(ResetCode),
    /// The tunnel broke, and all its streams with it.
    #[error("the tunnel broke")]
    Tunnel(#[source] TunnelError),
}

/// How a tunnel broke.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The connection under it did.
    #[error("{0}")]
    Io(#[source] io::Error),
    /// One side violated HTTP/2, or wants no more of the other.
    #[error("{0}")]
    Protocol(String),
}

/// An HTTP/2 error code (RFC 9113 §7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResetCode(pub u32);

impl ResetCode {
    /// The stream is no longer needed, and not because it came to its end.
    pub const CANCEL: Self = Self(8);
    /// The connection that the stream stands for is over (RFC 9113 §8.5). Envoy says so whether it was closed or broke.
    pub const CONNECT_ERROR: Self = Self(10);
}

impl fmt::Display for ResetCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        h2::Reason::from(self.0).fmt(f)
    }
}

impl From<h2::Error> for StreamError {
    fn from(error: h2::Error) -> Self {
        let reason = error.reason();
        if error.is_reset() {
            return match reason {
                Some(h2::Reason::NO_ERROR) => Self::Finished,
                Some(h2::Reason::REFUSED_STREAM) if error.is_remote() => Self::NotTaken,
                reason => Self::Reset(ResetCode(reason.unwrap_or(h2::Reason::CANCEL).into())),
            };
        }
        // With NO_ERROR, only the streams beyond the last one the peer will process end with the GOAWAY.
        if error.is_go_away() && error.is_remote() && reason == Some(h2::Reason::NO_ERROR) {
            return Self::NotTaken;
        }
        Self::Tunnel(TunnelError::from(error))
    }
}

impl From<h2::Error> for TunnelError {
    fn from(error: h2::Error) -> Self {
        if error.is_io()
            && let Some(io) = error.get_io()
        {
            if io.kind() == io::ErrorKind::UnexpectedEof {
                return Self::Io(io.kind().into());
            }
            // The error is shared between all streams of the tunnel, so each gets its own copy.
            return match (io.get_ref(), io.raw_os_error()) {
                (_, Some(code)) => Self::Io(io::Error::from_raw_os_error(code)),
                (Some(inner), None) => match inner.downcast_ref::<rustls::Error>() {
                    Some(tls) => Self::Io(io::Error::new(io.kind(), tls.clone())),
                    None => Self::Io(io::Error::new(io.kind(), inner.to_string())),
                },
                (None, None) => Self::Io(io.kind().into()),
            };
        }
        Self::Protocol(error.to_string())
    }
}

/// The size of a large piece of data that costs least: with the header of its frame (RFC 9113 §4.1) it fills 16 TLS
/// records to the last byte, so that nothing of it has to be copied to wait for more.
pub const BULK_SIZE: usize = 16 * 16 * 1024 - 9;

/// Where a stream's data is put.
#[derive(Debug)]
pub struct SendHalf {
    inner: h2::SendStream<Piece>,
    queue: Arc<Queue>,
    ended: bool,
    /// Whether it counts as one that the peer has opened.
    counted: bool,
}

impl SendHalf {
    pub(super) fn new(inner: h2::SendStream<Piece>, flow: Arc<Flow>) -> Self {
        Self { inner, queue: Queue::new(flow), ended: false, counted: false }
    }

    /// The same, of a stream that the peer has opened.
    pub(super) fn counted(mut self, stream: Stream) -> Self {
        self.counted = true;
        stream.goes_on();
        self
    }

    /// How many bytes may be sent now, of `wanted`: at least one. Pending while the peer's windows allow none, or as much
    /// as may waits on the stream or the tunnel already. What is not sent then must be given back.
    pub fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<Result<usize, StreamError>> {
        loop {
            let room = self.queue.flow().room(cx).min(wanted);
            if room == 0 {
                // Its waker is the same, so that a reset is noticed as well.
                return match self.poll_reset(cx) {
                    Poll::Ready(error) => Poll::Ready(Err(error)),
                    Poll::Pending => Poll::Pending,
                };
            }
            self.inner.reserve_capacity(room);
            let capacity = self.inner.capacity();
            if capacity > 0 {
                return Poll::Ready(Ok(capacity.min(room)));
            }
            match ready!(self.inner.poll_capacity(cx)) {
                Some(more) => {
                    more?;
                }
                // Closed for sending: the reason, if there is one, is what the stream was reset with.
                None => {
                    return match self.inner.poll_reset(cx) {
                        Poll::Ready(Err(error)) => Poll::Ready(Err(error.into())),
                        Poll::Ready(Ok(reason)) => Poll::Ready(Err(reset(reason))),
                        Poll::Pending => Poll::Ready(Err(StreamError::Finished)),
                    };
                }
            }
        }
    }

    /// Leaves to the tunnel's other streams what [`Self::poll_room`] said and was not used.
    pub fn give_back(&mut self) {
        self.inner.reserve_capacity(0);
    }

    /// Takes from the front of `data` what the peer's windows allow, and says how many bytes that was: at
    /// least one, or all of no data. Pending while they allow none.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<Result<usize, StreamError>> {
        let mut taken = 0;
        while !data.is_empty() {
            let room = match self.poll_room(cx, data.len()) {
                Poll::Ready(room) => room?,
                Poll::Pending if taken > 0 => break,
                Poll::Pending => return Poll::Pending,
            };
            let piece = data.split_to(room);
            taken += room;
            self.inner.send_data(self.queue.piece(piece), false)?;
        }
        Poll::Ready(Ok(taken))
    }

    /// Ends this direction; the other one goes on.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        self.ended = true;
        Ok(self.inner.send_data(self.queue.piece(Bytes::new()), true)?)
    }

    /// Waits until all that was sent is on its way, or lost with the stream: only then [`Self::reset`] loses nothing.
    /// Shares its waker with [`Self::poll_send`]: from one task.
    pub fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.poll_reset(cx).is_ready() {
            return Poll::Ready(());
        }
        self.queue.poll_sent(cx)
    }

    /// Ends both directions at once, losing what is under way (CANCEL).
    pub fn reset(&mut self) {
        self.ended = true;
        self.inner.send_reset(h2::Reason::CANCEL);
    }

    /// Waits for the peer to end both directions. Shares its waker with [`Self::poll_send`]: from one task.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        match ready!(self.inner.poll_reset(cx)) {
            Ok(reason) => Poll::Ready(reset(reason)),
            Err(error) => Poll::Ready(error.into()),
        }
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        if !self.ended {
            self.inner.send_reset(h2::Reason::CANCEL);
        }
        if self.counted {
            self.queue.flow().stream_ended();
        }
    }
}

fn reset(reason: h2::Reason) -> StreamError {
    match reason {
        h2::Reason::NO_ERROR => StreamError::Finished,
        h2::Reason::REFUSED_STREAM => StreamError::NotTaken,
        reason => StreamError::Reset(ResetCode(reason.into())),
    }
}

/// Where a stream's data comes from.
#[derive(Debug)]
pub struct RecvHalf {
    inner: h2::RecvStream,
    /// What was pulled and comes first: few have any.
    ahead: Option<Box<BytesMut>>,
}

impl RecvHalf {
    pub(super) fn new(inner: h2::RecvStream) -> Self {
        Self { inner, ahead: None }
    }

    /// The next piece; `None` at the end. It counts against the window until it is released.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, StreamError>>> {
        if let Some(ahead) = self.ahead.take() {
            return Poll::Ready(Some(Ok(ahead.freeze())));
        }
        self.inner.poll_data(cx).map(|piece| match piece? {
            Ok(piece) => Some(Ok(piece)),
            Err(error) => match StreamError::from(error) {
                StreamError::Finished => None,
                error => Some(Err(error)),
            },
        })
    }

    /// Takes what has come and is not asked for yet out of HTTP/2, which keeps each frame of it apart, and says how
    /// many bytes wait so. An end, or an error, is found again by [`Self::poll_data`].
    pub fn pull(&mut self, cx: &mut Context<'_>) -> usize {
        while let Poll::Ready(Some(Ok(piece))) = self.inner.poll_data(cx) {
            if !piece.is_empty() {
                self.ahead.get_or_insert_default().extend_from_slice(&piece);
            }
        }
        self.ahead.as_ref().map_or(0, |ahead| ahead.len())
    }

    /// Lets the peer send as many bytes again as were delivered.
    pub fn release(&mut self, bytes: usize) {
        // Fails only for more than was received, which no caller has.
        let _released = self.inner.flow_control().release_capacity(bytes);
    }
}
