//! Marks sockets as the daemon's own, in their storage in the kernel.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use ztunnel_ebpf_abi::VOUCHED;

use super::sys;
use crate::net::bypass::Bypass;

/// Writes into `SOCKETS`; see [`Bypass`].
#[derive(Debug)]
pub(super) struct OwnSockets(pub(super) OwnedFd);

impl Bypass for OwnSockets {
    fn mark_own(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        sys::map_update(self.0.as_fd(), socket.as_raw_fd() as u32, VOUCHED)
    }
}
