//! What is left to do when the process has no descriptor left: to tell those who connect so.
//!
//! A connection that cannot be accepted would wait in the listener's queue until its client gives up. One descriptor is
//! kept for this: it makes room for the connection, which is reset, and is taken again.

use std::fs::File;
use std::io;
use std::net::TcpListener;

use nix::errno::Errno;
use parking_lot::Mutex;

use crate::net::socket::accept;
use crate::net::socket::reset_on_close;

/// Connections refused at a time.
const BATCH: usize = 64;

static RESERVE: Mutex<Option<File>> = Mutex::new(None);

/// Keeps the descriptor, if it is not kept yet.
pub fn keep() {
    let mut reserve = RESERVE.lock();
    if reserve.is_none() {
        *reserve = File::open("/dev/null").ok();
    }
}

/// Whether an error says that there is no descriptor left, of the process's or of the system's.
pub fn is_out_of_descriptors(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| matches!(Errno::from_raw(code), Errno::EMFILE | Errno::ENFILE))
}

/// Resets connections that wait at `listener`, and says how many.
pub fn refuse(listener: &TcpListener) -> usize {
    let mut reserve = RESERVE.lock();
    if reserve.is_none() {
        return 0;
    }
    let mut refused = 0;
    while refused < BATCH {
        *reserve = None;
        let accepted = accept(listener);
        let done = accepted.is_err();
        if let Ok((socket, _)) = accepted {
            reset_on_close(&socket);
            refused += 1;
        }
        // Somebody else may have been quicker: then it is taken when there is one again.
        *reserve = File::open("/dev/null").ok();
        if done || reserve.is_none() {
            break;
        }
    }
    refused
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn who_waits_is_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut clients: Vec<_> =
            (0..3).map(|_| TcpStream::connect(listener.local_addr().unwrap()).unwrap()).collect();
        keep();
        assert_eq!(refuse(&listener), 3);
        for client in &mut clients {
            assert_eq!(client.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
        assert_eq!(refuse(&listener), 0);
        assert!(is_out_of_descriptors(&io::Error::from_raw_os_error(libc::EMFILE)));
        assert!(!is_out_of_descriptors(&io::ErrorKind::WouldBlock.into()));
    }
}
