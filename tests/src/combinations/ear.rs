//! Listens to every device of a node for what is said in clear.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;

/// What a frame is looked at of: its headers, and more than a line of a script.
const LOOKED_AT: usize = 400;
/// For what comes while the listener does not run.
const BUFFER: usize = 64 << 20;
const LOOK: Duration = Duration::from_millis(50);

/// A running listener. It ends when dropped.
#[derive(Debug)]
pub(super) struct Ear {
    heard: Arc<Mutex<BTreeSet<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ear {
    /// Listens in a namespace for words that start so and end at a space.
    pub(super) fn open(netns: &Netns, start: &str) -> Result<Self> {
        let all = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
        let socket = netns.enter(|| {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(all)).context("a packet socket")?;
            setsockopt(&socket, RcvBufForce, &BUFFER)?;
            socket.set_read_timeout(Some(LOOK))?;
            Ok(socket)
        })?;
        let (heard, stop) = (Arc::new(Mutex::new(BTreeSet::new())), Arc::new(AtomicBool::new(false)));
        let (into, until, start) = (Arc::clone(&heard), Arc::clone(&stop), start.as_bytes().to_vec());
        let thread = std::thread::spawn(move || listen(&socket, &start, &into, &until));
        Ok(Self { heard, stop, thread: Some(thread) })
    }

    /// The words that were heard so far.
    pub(super) fn heard(&self) -> BTreeSet<String> {
        self.heard.lock().clone()
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn listen(mut socket: &Socket, start: &[u8], heard: &Mutex<BTreeSet<String>>, stop: &AtomicBool) {
    let mut frame = [0; LOOKED_AT];
    loop {
        match socket.read(&mut frame) {
            Ok(length) => {
                if let Some(word) = word(&frame[..length], start) {
                    heard.lock().insert(word);
                }
            }
            // What came before the end is heard.
            Err(error) if error.kind() == ErrorKind::WouldBlock && !stop.load(Ordering::Relaxed) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// The first word in a frame that starts so and is there to its end.
fn word(frame: &[u8], start: &[u8]) -> Option<String> {
    let at = frame.windows(start.len()).position(|window| window == start)?;
    let rest = &frame[at..];
    let end = rest.iter().position(|byte| *byte == b' ')?;
    String::from_utf8(rest[..end].to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_where_it_is_whole() {
        assert_eq!(word(b"\x00\xffcombi-1-22 x", b"combi-"), Some("combi-1-22".to_owned()));
        assert_eq!(word(b"combi-1-2", b"combi-"), None);
        assert_eq!(word(b"comb", b"combi-"), None);
    }
}
