//! Moving bytes from one socket to another without copying them: splice(2), through a pipe.
//!
//! A pipe belongs to a thread and is lent to a direction of a relay only while there is something in it: idle
//! connections hold none. A thread makes a bounded number; who gets none copies.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use nix::errno::Errno;
use nix::fcntl::FcntlArg;
use nix::fcntl::OFlag;
use nix::fcntl::SpliceFFlags;
use nix::fcntl::fcntl;
use nix::fcntl::splice;
use nix::unistd::pipe2;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// How much one call moves at most. A pipe takes less if the pieces are small.
pub(super) const SPLICE_SIZE: usize = 512 * 1024;

/// Pieces a pipe takes, in pages: each may be as large as the sender's buffer is.
const PIPE_SIZE: i32 = 64 * 4096;

/// Pipes of one thread. Each is two descriptors, and a connection whose receiver takes nothing keeps one with up to
/// [`SPLICE_SIZE`] bytes: 16 MiB, should nobody take anything.
const PIPES_MAX: usize = 32;

thread_local! {
    static PIPES: RefCell<Pipes> = const { RefCell::new(Pipes { spare: Vec::new(), lent: 0 }) };
}

#[cfg(test)]
thread_local! {
    /// Bytes that went through a pipe of this thread.
    pub(super) static SPLICED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// The pipes of a thread.
struct Pipes {
    /// Empty ones.
    spare: Vec<Ends>,
    /// Those that are somebody's now.
    lent: usize,
}

#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

impl Ends {
    fn new() -> io::Result<Self> {
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        // One of the default size is of use, too.
        let _smaller = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
        Ok(Self { read, write })
    }
}

/// A pipe lent by the thread. It is given back when it is dropped, or closed if something is left in it. It must not
/// leave its thread.
#[derive(Debug)]
pub struct Pipe {
    ends: Option<Ends>,
    bytes: usize,
}

impl Pipe {
    /// An empty pipe, unless the thread has lent as many as it may, or the process has no descriptors left.
    pub fn lend() -> Option<Self> {
        PIPES.with_borrow_mut(|pipes| {
            if pipes.lent >= PIPES_MAX {
                return None;
            }
            let ends = pipes.spare.pop().or_else(|| Ends::new().ok())?;
            pipes.lent += 1;
            Some(Self { ends: Some(ends), bytes: 0 })
        })
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// How many bytes are in it.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Takes what `from` has, into an empty pipe. 0 where there is nothing that could be spliced, which says nothing of
    /// the stream: splice(2) stops at urgent data, before the end and after it. Only reading tells, and goes past it.
    /// What is no fault of the connection ([`cannot_splice`]) has left it as it was.
    pub fn poll_fill(&mut self, from: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        debug_assert!(self.is_empty(), "a full pipe and an empty socket could not be told apart");
        let Some(ends) = &self.ends else { return Poll::Ready(Ok(0)) };
        ready!(from.poll_read_ready(cx))?;
        let moved = loop {
            match splice(from, None, &ends.write, None, SPLICE_SIZE, SpliceFFlags::SPLICE_F_NONBLOCK) {
                Err(Errno::EINTR) => {}
                // The socket counts as readable until a read finds nothing either.
                Err(Errno::EAGAIN) => break 0,
                moved => break moved?,
            }
        };
        self.bytes = moved;
        #[cfg(test)]
        SPLICED.set(SPLICED.get() + moved);
        Poll::Ready(Ok(moved))
    }

    /// Moves what is in the pipe on, as much as `to` takes.
    pub fn poll_drain(&mut self, to: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Some(ends) = &self.ends else { return Poll::Ready(Ok(0)) };
        let bytes = self.bytes;
        let moved = loop {
            ready!(to.poll_write_ready(cx))?;
            let moved = to.try_io(Interest::WRITABLE, || {
                Ok(splice(&ends.read, None, to, None, bytes, SpliceFFlags::SPLICE_F_NONBLOCK)?)
            });
            match moved {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                moved => break moved?,
            }
        };
        if moved == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.bytes -= moved;
        Poll::Ready(Ok(moved))
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        // Fails when the thread ends, and with it all its pipes.
        let _ending = PIPES.try_with(|pipes| {
            let mut pipes = pipes.borrow_mut();
            pipes.lent = pipes.lent.saturating_sub(1);
            if self.bytes == 0 {
                pipes.spare.extend(self.ends.take());
            }
        });
    }
}

/// Whether an error says that this socket, or this process, may not splice at all.
pub fn cannot_splice(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
    matches!(error.kind(), InvalidInput | PermissionDenied | Unsupported)
}
