//! The socket to the node agent, and connecting to it again.

use std::io;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use rustix::net::AddressFamily;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::ReturnFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendFlags;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;
use tokio::time::sleep_until;

use crate::enrol::zds::message::MESSAGE_MAX;
use crate::net::socket::readable;

/// Descriptors that may come with one message. One is right; the others are taken to be closed again.
const DESCRIPTORS_MAX: usize = 4;
/// The first wait after a connection that came to nothing. An agent takes five connections a second.
const BACKOFF_MIN: Duration = Duration::from_millis(250);
/// The longest wait.
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// One packet of the agent's.
#[derive(Debug)]
pub struct Packet {
    /// What it says.
    pub bytes: Vec<u8>,
    /// The descriptors that came with it.
    pub descriptors: Vec<OwnedFd>,
    /// It was longer, or had more descriptors, than there may be.
    pub truncated: bool,
}

/// What has happened to the connection.
#[derive(Debug)]
pub enum Happened {
    /// There is one now.
    Connected,
    /// A packet has come.
    Received(Packet),
    /// It is gone.
    Lost(io::Error),
}

/// How long to wait before the next connection, doubling and never twice the same.
#[derive(Debug, Default)]
struct Backoff(Option<Duration>);

impl Backoff {
    /// `roll` is between 0 and 1: with it the daemons of many nodes, or of one, don't come all at once.
    fn next(&mut self, roll: f64) -> Duration {
        let wait = self.0.map_or(BACKOFF_MIN, |last| (last * 2).min(BACKOFF_MAX));
        self.0 = Some(wait);
        wait.mul_f64(0.5 + 0.5 * roll)
    }

    fn reset(&mut self) {
        self.0 = None;
    }
}

#[derive(Debug)]
enum State {
    /// The next try is due then.
    Away(Instant),
    Connected(AsyncFd<OwnedFd>),
}

/// A connection to the agent that is made again whenever it is lost. On the runtime of the caller.
#[derive(Debug)]
pub struct Link {
    path: PathBuf,
    state: State,
    backoff: Backoff,
    /// Why the last try failed: the same reason is logged once.
    said: Option<String>,
}

impl Link {
    /// To the agent that listens at `path`. Connects when [`Link::next`] is called.
    pub fn new(path: PathBuf) -> Self {
        Self { path, state: State::Away(Instant::now()), backoff: Backoff::default(), said: None }
    }

    /// What happens next. A packet that comes while `busy` is left where it is: the agent sends the next one only
    /// after the answer to the last. Cancel-safe.
    pub async fn next(&mut self, busy: bool) -> Happened {
        loop {
            match &self.state {
                State::Away(at) => {
                    sleep_until(*at).await;
                    match connect(&self.path) {
                        Ok(socket) => {
                            self.state = State::Connected(socket);
                            self.said = None;
                            tracing::info!(path = %self.path.display(), "connected to the node agent");
                            return Happened::Connected;
                        }
                        Err(error) => self.failed(&error),
                    }
                }
                State::Connected(_) if busy => std::future::pending().await,
                State::Connected(socket) => match socket.async_io(Interest::READABLE, receive).await {
                    Ok(packet) => return Happened::Received(packet),
                    Err(error) => {
                        self.away();
                        return Happened::Lost(error);
                    }
                },
            }
        }
    }

    /// Sends one packet. One that cannot be sent at once means that nobody reads: the connection is given up.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let State::Connected(socket) = &self.state else { return Err(io::ErrorKind::NotConnected.into()) };
        let (flags, mut nothing) = (SendFlags::NOSIGNAL, SendAncillaryBuffer::default());
        match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut nothing, flags) {
            Ok(_all) => Ok(()),
            Err(error) => {
                self.away();
                Err(error.into())
            }
        }
    }

    /// Closes the connection; another one is made after a while.
    pub fn close(&mut self) {
        self.away();
    }

    /// The connection has proved good: should it be lost, the next one is made soon.
    pub fn proved(&mut self) {
        self.backoff.reset();
    }

    fn away(&mut self) {
        self.state = State::Away(Instant::now() + self.backoff.next(rand::random()));
    }

    fn failed(&mut self, error: &io::Error) {
        let error = error.to_string();
        if self.said.as_ref() != Some(&error) {
            tracing::warn!(path = %self.path.display(), error, "no node agent, trying again");
            self.said = Some(error);
        }
        self.away();
    }
}

fn connect(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    // Answers at once: the agent's backlog has room, or it has not.
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    readable(socket)
}

pub(crate) fn receive(socket: &OwnedFd) -> io::Result<Packet> {
    let mut bytes = vec![0; MESSAGE_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    // Whatever is not taken out of it is closed with it.
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let slices = &mut [IoSliceMut::new(&mut bytes)];
    let received = rustix::net::recvmsg(socket, slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 && descriptors.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the node agent has closed the connection"));
    }
    bytes.truncate(received.bytes);
    let truncated = received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    Ok(Packet { bytes, descriptors, truncated })
}

#[cfg(test)]
mod tests;
