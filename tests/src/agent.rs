//! A node agent, as istio-cni plays it: it hands pods to the node's daemons over ZDS.
//!
//! [`Listener`] and [`Connection`] are the wire, for a test that wants to misbehave; [`NodeAgent`] behaves: each
//! daemon that connects is told of all pods, a new pod goes to the daemon that came last, a deletion to all.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, listen,
    recv, sendmsg, socket,
};
use parking_lot::{Mutex, MutexGuard};
use ztunnel_proto::prost::Message;
use ztunnel_proto::workload::zds::workload_request::Payload;
use ztunnel_proto::workload::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest, WorkloadResponse,
    ZdsHello, workload_response,
};

use crate::mesh::MESHED;
use crate::netns::Netns;
use crate::poll::{PATIENCE, eventually};
use crate::topology::Pod;

/// Where daemons call.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

/// One daemon.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
}

impl Listener {
    /// Takes the place at `path`.
    pub fn at(path: &Path) -> Result<Self> {
        let _stale = std::fs::remove_file(path);
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&socket, Backlog::new(8)?)?;
        Ok(Self { socket })
    }

    /// The next daemon, after its hello.
    pub fn accept(&self, within: Duration) -> Result<Connection> {
        ensure!(readable(self.socket.as_fd(), within)?, "no daemon called within {within:?}");
        let fd = accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        let connection = Connection { socket: own(fd) };
        let hello = ZdsHello::decode(&*connection.receive()?)?;
        ensure!(hello.version == 1, "{hello:?}");
        Ok(connection)
    }
}

#[expect(unsafe_code, reason = "nix's accept4 returns a number")]
fn own(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn readable(fd: BorrowedFd<'_>, within: Duration) -> Result<bool> {
    let mut polled = [PollFd::new(fd, PollFlags::POLLIN)];
    Ok(poll(&mut polled, PollTimeout::try_from(within)?)? > 0)
}

impl Connection {
    /// Sends one packet as it is.
    pub fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let numbers: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let control = if numbers.is_empty() { &[] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)?;
        Ok(())
    }

    fn receive(&self) -> Result<Vec<u8>> {
        ensure!(readable(self.socket.as_fd(), PATIENCE)?, "the daemon said nothing in {PATIENCE:?}");
        let mut buffer = [0; 1024];
        let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC)?;
        ensure!(length > 0, "the daemon has closed the connection");
        ensure!(length <= buffer.len(), "an answer of {length} bytes");
        Ok(buffer[..length].to_vec())
    }

    /// The answer to the last packet: an error's text, empty for success.
    pub fn answer(&self) -> Result<String> {
        let response = WorkloadResponse::decode(&*self.receive()?)?;
        let Some(workload_response::Payload::Ack(ack)) = response.payload else { bail!("{response:?}") };
        Ok(ack.error)
    }

    /// Sends one packet and returns its answer. What comes unasked is an error.
    pub fn exchange(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<String> {
        self.silent(Duration::ZERO)?;
        self.send(bytes, descriptors)?;
        self.answer()
    }

    /// Checks that the daemon says nothing for a while, and has not closed.
    pub fn silent(&self, within: Duration) -> Result<()> {
        ensure!(!readable(self.socket.as_fd(), within)?, "the daemon spoke unasked, or has closed");
        Ok(())
    }

    /// Waits for the daemon to close the connection.
    pub fn closed(&self) -> Result<()> {
        match self.receive() {
            Ok(bytes) => bail!("instead of closing it said {bytes:?}"),
            Err(_) => Ok(()),
        }
    }

    /// Adds a pod, which must be acknowledged. A daemon that is slower than an agent waits says so, and is asked again,
    /// as istio-cni does.
    pub fn add(&self, pod: &Pod, netns: &File) -> Result<()> {
        let answer = eventually(PATIENCE, || {
            match self.exchange(&encode(add(pod)), &[netns.as_fd()]) {
                Ok(error) if error.contains("; that goes on") => bail!("{error}"),
                // One that is gone is not waited for: others wait behind it.
                answer => Ok(answer),
            }
        });
        let error = answer??;
        ensure!(error.is_empty(), "adding {}: {error}", pod.name);
        Ok(())
    }

    /// A request that must be acknowledged without an error.
    pub fn request(&self, payload: Payload, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let said = format!("{payload:?}");
        let error = self.exchange(&encode(payload), descriptors)?;
        ensure!(error.is_empty(), "{said}: {error}");
        Ok(())
    }
}

/// A request as bytes.
pub fn encode(payload: Payload) -> Vec<u8> {
    WorkloadRequest { payload: Some(payload) }.encode_to_vec()
}

/// The uid that a pod has in the mesh files.
pub fn uid(pod: &Pod) -> String {
    format!("{}-1", pod.name)
}

/// `add` for a pod of the harness.
pub fn add(pod: &Pod) -> Payload {
    let [name, service_account] = [&pod.name, &pod.name].map(Clone::clone);
    let info = WorkloadInfo { name, namespace: MESHED.to_owned(), service_account };
    Payload::Add(AddWorkload { uid: uid(pod), workload_info: Some(info) })
}

/// `del` for a pod of the harness.
pub fn del(pod: &Pod) -> Payload {
    Payload::Del(DelWorkload { uid: uid(pod) })
}

/// `keep` for a pod of the harness.
pub fn keep(pod: &Pod) -> Payload {
    Payload::Keep(KeepWorkload { uid: uid(pod) })
}

/// The end of a snapshot.
pub fn sent() -> Payload {
    Payload::SnapshotSent(SnapshotSent {})
}

/// An open handle of a pod's network namespace.
pub fn handle(netns: &Netns) -> Result<File> {
    let path = netns.path();
    File::open(&path).with_context(|| format!("cannot open {}", path.display()))
}

/// An agent that behaves. It ends when dropped.
#[derive(Debug)]
pub struct NodeAgent {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    pods: BTreeMap<String, Pod>,
    /// The one that came last is last.
    connections: Vec<Connection>,
    /// How many daemons have come.
    seen: usize,
    /// What went wrong in the background.
    error: Option<String>,
}

impl NodeAgent {
    /// Starts with these pods.
    pub fn start(path: PathBuf, pods: &[&Pod]) -> Result<Self> {
        let listener = Listener::at(&path)?;
        let pods = pods.iter().map(|pod| (uid(pod), (*pod).clone())).collect();
        let state = Arc::new(Mutex::new(State { pods, ..State::default() }));
        let stop = Arc::new(AtomicBool::new(false));
        let (stop_, state_) = (Arc::clone(&stop), Arc::clone(&state));
        let thread = std::thread::spawn(move || serve(&listener, &state_, &stop_));
        Ok(Self { state, stop, path, thread: Some(thread) })
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a pod, to the daemon that came last.
    pub fn add(&self, pod: &Pod) -> Result<()> {
        let mut state = self.state();
        state.pods.insert(uid(pod), pod.clone());
        let latest = state.connections.last().context("no ztunnel connection")?;
        latest.add(pod, &handle(&pod.place.netns)?)
    }

    /// Deletes a pod, at all daemons.
    pub fn del(&self, pod: &Pod) -> Result<()> {
        let mut state = self.state();
        state.pods.remove(&uid(pod));
        state.connections.retain(|connection| connection.silent(Duration::ZERO).is_ok());
        state.connections.iter().try_for_each(|connection| connection.request(del(pod), &[]))
    }

    /// How many daemons have called.
    pub fn seen(&self) -> usize {
        self.state().seen
    }

    /// What went wrong with a daemon in the background.
    pub fn check(&self) -> Result<()> {
        match self.state().error.take() {
            Some(error) => bail!("the node agent: {error}"),
            None => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl Drop for NodeAgent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn serve(listener: &Listener, state: &Mutex<State>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match readable(listener.socket.as_fd(), Duration::from_millis(50)) {
            Ok(false) => continue,
            Ok(true) => {}
            Err(_interrupted) => continue,
        }
        let mut state = state.lock();
        state.seen += 1;
        let told = listener.accept(PATIENCE).and_then(|connection| {
            snapshot(&connection, state.pods.values())?;
            Ok(connection)
        });
        match told {
            Ok(connection) => state.connections.push(connection),
            // A daemon that was killed meanwhile is none of our business.
            Err(error) if is_gone(&error) => {}
            Err(error) => state.error = Some(format!("{error:#}")),
        }
    }
}

fn is_gone(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}");
    let io =
        error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe);
    io || text.contains("EPIPE") || text.contains("ECONNRESET") || text.contains("closed")
}

/// Tells a daemon of all pods.
pub fn snapshot<'a>(connection: &Connection, pods: impl Iterator<Item = &'a Pod>) -> Result<()> {
    for pod in pods {
        match handle(&pod.place.netns) {
            Ok(netns) => connection.add(pod, &netns)?,
            // Its namespace is not known any more.
            Err(_) => connection.request(keep(pod), &[])?,
        }
    }
    connection.request(sent(), &[])
}
