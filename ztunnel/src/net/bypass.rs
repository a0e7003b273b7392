//! The daemon's word for its own sockets.

use std::io;
use std::os::fd::BorrowedFd;

/// Lets a socket of the daemon leave an enrolled pod.
///
/// Call it on every socket that connects to the outside of a pod (tunnels, passthrough) before `connect`: one
/// system call, no allocation. The word is kept in the kernel with the socket; a pod cannot give it.
pub trait Bypass: Send + Sync {
    /// Vouches for `socket`. When this fails the connection will be refused, so give up on the socket.
    fn vouch(&self, socket: BorrowedFd<'_>) -> io::Result<()>;
}
