//! Where a captured connection was going.
//!
//! Capture delivers a connection to a transparent listener with its addresses untouched, so the accepted
//! socket's local address is the original destination.

use std::io;
use std::net::TcpStream;

use crate::model::addr::OriginalDst;
use crate::model::addr::canonical;

/// The original destination of an accepted connection, in canonical form.
pub fn original_dst(accepted: &TcpStream) -> io::Result<OriginalDst> {
    accepted.local_addr().map(canonical).map(OriginalDst)
}
