//! Buffers that belong to a thread, not to a connection.
//!
//! An idle connection holds no buffer: a read waits until the socket is readable and only then takes the
//! thread's buffer. A connection and everything that touches it stay on one thread, so nothing is contended.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::pin::pin;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use bytes::Bytes;
use bytes::BytesMut;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::ReadBuf;
use tokio::net::TcpStream;

use crate::net::budget::Pressure;

/// How much one read takes at most, unless more is asked for.
pub const READ_SIZE: usize = 64 * 1024;

/// How much one read takes where there is much: where throughput over a tunnel stops growing.
const BULK_SIZE: usize = 256 * 1024;

/// What is read in pieces up to this share of the thread's buffer is copied out of it. Beyond, the piece keeps the
/// whole buffer alive until it is sent: one that nobody takes keeps so many times its size at most, and no more than its
/// size once memory gets short.
const COPY_SHARE: usize = 4;

/// Spare buffers a thread keeps for the next that asks; more are given back to the allocator.
const SPARE_MAX: usize = 4;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Where a thread reads to. What was split off shares the allocation.
#[derive(Default)]
struct Scratch {
    room: BytesMut,
    /// The size of the allocation of which `room` is what is left.
    size: usize,
}

impl Scratch {
    /// Empty room for `size` bytes.
    fn reserve(&mut self, size: usize) -> &mut BytesMut {
        self.room.clear();
        let left = self.room.capacity();
        self.room.reserve(size);
        // It grows only by becoming a whole allocation, a new one or the old one that nobody shares any more.
        if self.room.capacity() > left {
            self.size = self.room.capacity();
        }
        &mut self.room
    }
}

/// Reads what `socket` has, at most `size`, to where it takes the memory that there is under this pressure. Empty at the
/// end of the stream. While there is nothing to read, no buffer is held.
pub fn poll_read_up_to(
    size: usize,
    pressure: Pressure,
    socket: &mut TcpStream,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Bytes>> {
    ready!(socket.poll_read_ready(cx))?;
    SCRATCH.with_borrow_mut(|scratch| {
        let room = scratch.reserve(size);
        let length = ready!(pin!(socket.take(size as u64).read_buf(room)).poll(cx))?;
        Poll::Ready(Ok(if length <= scratch.size / COPY_SHARE || pressure > Pressure::None {
            Bytes::copy_from_slice(&scratch.room[..length])
        } else {
            scratch.room.split().freeze()
        }))
    })
}

/// An empty buffer with room for much.
fn take() -> Vec<u8> {
    SPARE.with_borrow_mut(Vec::pop).unwrap_or_else(|| Vec::with_capacity(BULK_SIZE))
}

/// Gives a buffer back. One that has grown out of proportion is freed.
fn give(mut buffer: Vec<u8>) {
    buffer.clear();
    let capacity = buffer.capacity();
    if (BULK_SIZE..=2 * BULK_SIZE).contains(&capacity) {
        SPARE.with_borrow_mut(|spare| {
            if spare.len() < SPARE_MAX {
                spare.push(buffer);
            }
        });
    }
}

/// A socket read in large pieces by a reader that asks for small ones (TLS asks for 4 KiB at a time).
/// Writes go through untouched.
#[derive(Debug)]
pub struct ReadAhead {
    socket: TcpStream,
    ahead: Option<Ahead>,
}

#[derive(Debug)]
struct Ahead {
    buffer: Vec<u8>,
    taken: usize,
}

impl ReadAhead {
    /// Reads ahead on `socket`.
    pub fn new(socket: TcpStream) -> Self {
        Self { socket, ahead: None }
    }

    /// The socket.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// How much memory it takes for what was read ahead.
    pub fn kept(&self) -> usize {
        self.ahead.as_ref().map_or(0, |ahead| ahead.buffer.capacity())
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.ahead.is_none() {
            ready!(this.socket.poll_read_ready(cx))?;
            let mut buffer = take();
            match pin!(this.socket.read_buf(&mut buffer)).poll(cx) {
                Poll::Ready(Ok(1..)) => this.ahead = Some(Ahead { buffer, taken: 0 }),
                Poll::Ready(other) => {
                    give(buffer);
                    return Poll::Ready(other.map(|_| ()));
                }
                Poll::Pending => {
                    give(buffer);
                    return Poll::Pending;
                }
            }
        }
        if let Some(ahead) = &mut this.ahead {
            let left = &ahead.buffer[ahead.taken..];
            let length = left.len().min(out.remaining());
            out.put_slice(&left[..length]);
            ahead.taken += length;
        }
        if let Some(ahead) = this.ahead.take_if(|ahead| ahead.taken == ahead.buffer.len()) {
            give(ahead.buffer);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_small_piece_does_not_keep_a_large_buffer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        let mut kept = Vec::new();
        for (size, length) in
            [(READ_SIZE, 17), (READ_SIZE, 9), (BULK_SIZE, 90), (BULK_SIZE, 9), (READ_SIZE, 17)]
        {
            let length = length * 1024;
            near.write_all(&vec![7; length]).await.unwrap();
            // All of it comes in one piece.
            while far.peek(&mut vec![0; length]).await.unwrap() < length {}
            let read = poll_fn(|cx| poll_read_up_to(size, Pressure::None, &mut far, cx));
            let piece = read.await.unwrap();
            assert_eq!(piece, vec![7; length]);
            // The thread's buffer is shared with the thread.
            let copied = piece.is_unique();
            kept.push((length / 1024, copied));
            if !copied {
                let whole = SCRATCH.with_borrow(|scratch| scratch.size);
                assert!(length * COPY_SHARE > whole, "{length} of {whole}");
            }
        }
        assert_eq!(kept, [(17, false), (9, true), (90, false), (9, true), (17, true)]);
        near.write_all(&[7; READ_SIZE / 2]).await.unwrap();
        while far.peek(&mut [0; READ_SIZE]).await.unwrap() < READ_SIZE / 2 {}
        let read = poll_fn(|cx| poll_read_up_to(READ_SIZE, Pressure::Some, &mut far, cx));
        assert!(read.await.unwrap().is_unique(), "nothing is kept but what is in it");
    }
}
