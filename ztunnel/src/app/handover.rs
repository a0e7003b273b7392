//! How a starting daemon takes a node over from a running one.
//!
//! Two processes talk over a Unix socket in the run directory, one line at a time:
//!
//! ```text
//!  successor                          predecessor
//!     │ ── "yield 1" ───────────────────▶ │  stops changing the kernel
//!     │ ◀─────────────── "yielded <pid>" ─│  (goes on serving: nothing is redirected yet)
//!     │   swaps its sockets in, pod by pod │
//!     │ ── "done" ───────────────────────▶ │  closes its ports, drains, exits
//!     │ ◀───────────────────────── "bye" ──│
//!     │ ── "watch" ──────────────────────▶ │  drains, and takes the node back should the successor die
//!     │ ◀───────────────────── (closes) ───│  its process is gone
//! ```
//!
//! Where the kernel holds nothing for them (pods that a node agent's rules redirect), the successor also asks for the
//! pods themselves, after "yielded": it says "pods", is answered with one pod and its sockets, says "next", and so on
//! until "end". Both then listen on the same sockets, so that no connection attempt is lost when one of them closes.
//!
//! Before that, on a connection of its own, the successor asks for the certificates of the node's workloads, so that
//! it does not depend on their authority being there:
//!
//! ```text
//!  successor ── "credentials 1" ──▶ predecessor
//!            ◀── the bytes, then closes ──
//! ```
//!
//! Only a process of the same user gets an answer, or is believed one. A predecessor that does not know the question
//! closes the connection.
//!
//! If the successor goes away before it says `done`, the predecessor takes everything back: a daemon that dies
//! while it starts costs nothing. Nor does one that dies later, for as long as the predecessor drains: a successor
//! that ends on purpose says `leave` before. A predecessor that does not answer in time is overruled: the generation in the
//! pinned maps tells it that it is no longer the owner (see [`ztunnel_node::capture`]). Its successor stays connected all
//! the same, so that when it wakes up it does not take the node back.

use std::fmt;
use std::io;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::io::Interest;
use tokio::net::UnixListener;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio::time::timeout;
use tokio::time::timeout_at;
use zeroize::Zeroizing;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_node::capture::Listeners;
use ztunnel_node::dns::server::Bound;
use ztunnel_node::dns::server::Sockets;
use ztunnel_node::enrol::zds::AgentPod;
use ztunnel_node::net::netns::Netns;
use ztunnel_runtime::shutdown;

/// The version of the lines above. Another one is treated as no answer.
const VERSION: &str = "1";
/// How long either side waits for the other's next line. The predecessor's answer takes one pass of its
/// control loop; a longer silence means that it hangs.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How long a caller has for its first line. Less than [`ANSWER_WITHIN`], so that a caller that says nothing does
/// not make the real successor behind it give up.
const HELLO_WITHIN: Duration = Duration::from_millis(500);
/// Lines are short; a longer one is not from a daemon of ours.
const LINE_MAX: u64 = 128;
/// The line that names a pod is as long as the node agent's message was, at most.
const POD_MAX: usize = 1200;
/// Of one pod: its network namespace, and its listeners for outbound, inbound and tunnels. After these may come pairs
/// of sockets for DNS, of each address the one for datagrams and the one for connections.
const POD_DESCRIPTORS: usize = 4;
/// With the pairs for DNS of both families.
const POD_DESCRIPTORS_MAX: usize = POD_DESCRIPTORS + 4;
/// How soon after its "done" a successor says "watch". One that goes away before has died; later, it is of a version that
/// does not know the word, and nothing is known of why it ended.
const WATCH_WITHIN: Duration = Duration::from_secs(5);
/// Pods that are taken over. A predecessor that names more is not believed.
const PODS_MAX: usize = 4096;

/// A pod on its way from one daemon to the next.
#[derive(Debug, Clone)]
pub struct HandedPod {
    /// Which.
    pub pod: AgentPod,
    /// Where its connections arrive, in both daemons.
    pub listeners: Arc<Listeners>,
    /// Where its questions for names arrive, if they do.
    pub dns: Option<Arc<Sockets>>,
}

/// The question for the node's certificates, with the version of the answer.
const CREDENTIALS: &str = "credentials 1";
/// More than the certificates of all pods a node can have.
const CREDENTIALS_MAX: u64 = 32 << 20;

/// What a successor says once it serves: that it will say [`LEAVE`] before it ends.
const WATCH: &str = "watch";
/// What a successor says that ends on purpose.
const LEAVE: &str = "leave";

/// What a daemon leaves to its successor: made when asked for, and overwritten when sent.
pub type Legacy = Box<dyn Fn() -> Zeroizing<Vec<u8>> + Send>;

/// A line-wise connection to the other daemon.
#[derive(Debug)]
struct Line(BufReader<UnixStream>);

impl Line {
    async fn read(&mut self) -> io::Result<String> {
        let mut line = String::new();
        let n = (&mut self.0).take(LINE_MAX).read_line(&mut line).await?;
        if n == 0 || !line.ends_with('\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.truncate(n - 1);
        Ok(line)
    }

    async fn write(&mut self, line: &str) -> io::Result<()> {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).await
    }

    /// Sends a pod with its descriptors, or the end of them.
    async fn write_pod(&mut self, handed: Option<&HandedPod>) -> io::Result<()> {
        let Some(HandedPod { pod, listeners, dns }) = handed else { return self.write("end").await };
        let AgentPod { uid, name, namespace, service_account, netns } = pod;
        // None of them has a blank in it: see `enrol::zds::message`.
        let line = format!("pod {uid} {name} {namespace} {service_account}\n");
        let mut descriptors = vec![
            netns.as_fd(),
            listeners.outbound.as_fd(),
            listeners.inbound.as_fd(),
            listeners.hbone.as_fd(),
        ];
        let bound = dns.iter().flat_map(|dns| &dns.0);
        descriptors.extend(bound.flat_map(|bound| [bound.udp.as_fd(), bound.tcp.as_fd()]));
        let stream = self.0.get_ref();
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(POD_DESCRIPTORS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
            let bytes = [IoSlice::new(line.as_bytes())];
            Ok(rustix::net::sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL)?)
        };
        // One at a time is on its way, so there is room for all of it.
        match stream.async_io(Interest::WRITABLE, send).await? == line.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Receives a pod; `None` after the last.
    async fn read_pod(&mut self) -> io::Result<Option<HandedPod>> {
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "not a pod of the daemon before this one");
        let stream = self.0.get_ref();
        let receive = || {
            let mut bytes = [0; POD_MAX];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(POD_DESCRIPTORS_MAX))];
            // Whatever is not taken out of it is closed with it.
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let slices = &mut [IoSliceMut::new(&mut bytes)];
            let received = rustix::net::recvmsg(stream, slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            let mut descriptors: Vec<OwnedFd> = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(some) = message {
                    descriptors.extend(some);
                }
            }
            let line = String::from_utf8_lossy(&bytes[..received.bytes]).into_owned();
            Ok((line, descriptors))
        };
        let (line, descriptors) = stream.async_io(Interest::READABLE, receive).await?;
        let words: Vec<&str> = line.strip_suffix('\n').ok_or_else(wrong)?.split(' ').collect();
        let [name, namespace, service_account, uid] = match words[..] {
            ["end"] => return Ok(None),
            ["pod", uid, name, namespace, service_account] => {
                [name, namespace, service_account, uid].map(Arc::<str>::from)
            }
            _ => return Err(wrong()),
        };
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or_else(wrong);
        let [netns, outbound, inbound, hbone] = [next()?, next()?, next()?, next()?];
        let dns = dns_sockets(descriptors)?;
        let netns = Arc::new(Netns::from_fd(netns)?);
        let [outbound, inbound, hbone] = [outbound, inbound, hbone].map(|fd| Arc::new(TcpListener::from(fd)));
        let pod = AgentPod { uid: PodUid(uid), name, namespace, service_account, netns };
        Ok(Some(HandedPod { pod, listeners: Arc::new(Listeners { outbound, inbound, hbone }), dns }))
    }
}

/// The sockets for DNS among what came with a pod.
fn dns_sockets(mut descriptors: impl Iterator<Item = OwnedFd>) -> io::Result<Option<Arc<Sockets>>> {
    let mut all = Vec::new();
    while let Some(udp) = descriptors.next() {
        let tcp = descriptors.next().ok_or(io::ErrorKind::InvalidData)?;
        all.push(Bound { udp: Arc::new(UdpSocket::from(udp)), tcp: Arc::new(TcpListener::from(tcp)) });
    }
    Ok(Some(all).filter(|all| !all.is_empty()).map(Sockets).map(Arc::new))
}

/// A running daemon that has agreed to be taken over. Dropping this without [`Predecessor::done`] makes it
/// take everything back.
#[derive(Debug)]
pub struct Predecessor {
    line: Line,
    /// The other daemon's process, for the log.
    pub pid: String,
}

/// What was found at the socket of the run directory.
#[derive(Debug)]
pub enum Found {
    /// Nobody: this daemon is the only one.
    Nobody,
    /// A daemon that yielded.
    Yielded(Predecessor),
    /// A daemon that has not answered in time: it is overruled, and told so when it is back.
    Late(Predecessor),
    /// Something that does not answer as agreed: it is overruled.
    Stranger(io::Error),
}

/// Asks the daemon that owns the node, if there is one, to yield.
pub async fn ask(socket: &Path) -> Found {
    let stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Found::Nobody;
        }
        Err(error) => return Found::Stranger(error),
    };
    let mut line = Line(BufReader::new(stream));
    let answer = timeout(ANSWER_WITHIN, async {
        line.write(&format!("yield {VERSION}")).await?;
        line.read().await
    });
    match answer.await {
        Ok(Ok(answer)) => match answer.strip_prefix("yielded ") {
            Some(pid) => Found::Yielded(Predecessor { pid: pid.to_owned(), line }),
            None => Found::Stranger(io::Error::other(format!("unexpected answer {answer:?}"))),
        },
        Ok(Err(error)) => Found::Stranger(error),
        Err(_elapsed) => Found::Late(Predecessor { pid: "unknown".to_owned(), line }),
    }
}

/// Whether a daemon has the node.
pub async fn is_served(socket: &Path) -> bool {
    matches!(timeout(HELLO_WITHIN, UnixStream::connect(socket)).await, Ok(Ok(_)))
}

/// The certificates that the running daemon has, if there is one that gives them.
pub async fn credentials(socket: &Path) -> Option<Zeroizing<Vec<u8>>> {
    let asking = async {
        let stream = UnixStream::connect(socket).await?;
        if !is_ours(&stream) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut line = Line(BufReader::new(stream));
        line.write(CREDENTIALS).await?;
        let mut bytes = Zeroizing::new(Vec::new());
        line.0.take(CREDENTIALS_MAX).read_to_end(&mut bytes).await?;
        io::Result::Ok(bytes)
    };
    match timeout(ANSWER_WITHIN, asking).await {
        Ok(Ok(bytes)) if !bytes.is_empty() => Some(bytes),
        // Nobody there, or nobody who knows the question: the authority is asked as at every first start.
        _ => None,
    }
}

/// Whether the process at the other end is of the same user.
fn is_ours(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == nix::unistd::geteuid().as_raw())
}

impl Predecessor {
    /// The pods that the predecessor serves, and their listeners, which from now on both have.
    pub async fn pods(&mut self) -> io::Result<Vec<HandedPod>> {
        let mut pods = Vec::new();
        let mut say = "pods";
        loop {
            let next = async {
                self.line.write(say).await?;
                self.line.read_pod().await
            };
            match timeout(ANSWER_WITHIN, next).await.map_err(|_elapsed| io::ErrorKind::TimedOut)?? {
                Some(pod) if pods.len() < PODS_MAX => pods.push(pod),
                Some(_) => return Err(io::Error::other("too many pods")),
                None => return Ok(pods),
            }
            say = "next";
        }
    }

    /// Tells the predecessor that everything is taken over, and waits a little until it has closed its ports.
    pub async fn done(mut self) -> Departing {
        let bye: io::Result<()> = timeout(ANSWER_WITHIN, async {
            self.line.write("done").await?;
            // A late one may still have to say that it yields.
            while self.line.read().await? != "bye" {}
            Ok(())
        })
        .await
        .unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()));
        if let Err(error) = bye {
            tracing::warn!(%error, "the daemon before this one did not say goodbye");
        }
        // One that is gone, or of another version, does not hear it.
        let _unheard = self.line.write(WATCH).await;
        Departing(self.line)
    }
}

/// A predecessor that is finishing its open connections.
#[derive(Debug)]
pub struct Departing(Line);

impl Departing {
    /// Waits until its process is gone, and with it every connection that it had.
    pub async fn gone(&mut self) {
        // It holds its end of the connection for as long as it lives.
        while self.0.read().await.is_ok() {}
    }

    /// Says that this daemon ends on purpose: the predecessor does not take the node back.
    pub async fn leave(&mut self) {
        let _gone = self.0.write(LEAVE).await;
    }
}

/// The socket at which successors call.
pub struct Successors {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
    legacy: Legacy,
    /// Who has called and not said what for yet, and until when that is waited for.
    calling: Mutex<Option<(Line, Instant)>>,
}

impl fmt::Debug for Successors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Successors").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Successors {
    /// Takes the place at `path`, whoever had it before: call when the node is this daemon's.
    /// Who asks for certificates gets `legacy`.
    pub fn listen(path: &Path, legacy: Legacy) -> io::Result<Self> {
        // A new name swapped in by rename, so that at no moment there is no socket.
        let fresh = path.with_extension(format!("sock.{}", std::process::id()));
        let _stale = std::fs::remove_file(&fresh);
        let listener = UnixListener::bind(&fresh)?;
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&fresh, path)?;
        Ok(Self { listener, path: path.to_owned(), inode: inode(path)?, legacy, calling: Mutex::default() })
    }

    /// Whether this is still the socket that successors find.
    pub fn is_current(&self) -> bool {
        inode(&self.path).is_ok_and(|inode| inode == self.inode)
    }

    /// The next daemon that wants the node. Whoever calls without the agreed line is ignored. Cancel-safe.
    pub async fn next(&self) -> Claim {
        // Whoever has called stays on the line should this wait be given up for something else that happens.
        let mut calling = self.calling.lock().await;
        loop {
            let (line, until) = match &mut *calling {
                Some(caller) => caller,
                none => {
                    let Ok((stream, _)) = self.listener.accept().await else {
                        // Out of file descriptors, as a rule: it must not spin.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    };
                    none.insert((Line(BufReader::new(stream)), Instant::now() + HELLO_WITHIN))
                }
            };
            let hello = timeout_at(*until, line.read()).await;
            let Some((mut line, _)) = calling.take() else { continue };
            let Ok(Ok(hello)) = hello else { continue };
            if hello == format!("yield {VERSION}") {
                return Claim(line, false);
            }
            if hello == CREDENTIALS && is_ours(line.0.get_ref()) {
                let bytes = (self.legacy)();
                let sending = async move { line.0.get_mut().write_all(&bytes).await };
                // Whoever does not read them does not keep others from calling.
                shutdown::spawn(timeout(ANSWER_WITHIN, sending));
            }
        }
    }
}

impl Drop for Successors {
    fn drop(&mut self) {
        // A successor may already have its own socket under the same name.
        if self.is_current() {
            let _gone = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::symlink_metadata(path)?.ino())
}

/// A successor that has asked this daemon to yield; and whether it was given all pods.
#[derive(Debug)]
pub struct Claim(Line, bool);

/// How a successor that serves the node ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// On purpose, or for reasons that are not known.
    Left,
    /// It died.
    Died,
}

/// How a claim ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The successor serves the node.
    Done,
    /// The successor is gone: the node is this daemon's again.
    Abandoned,
}

impl Claim {
    /// Says that this daemon no longer changes the kernel, gives the successor `pods` if it asks for them, and waits
    /// for it to finish or die.
    pub async fn outcome(&mut self, pods: &[HandedPod]) -> Outcome {
        match self.converse(pods).await {
            Ok(()) => Outcome::Done,
            Err(_gone) => Outcome::Abandoned,
        }
    }

    async fn converse(&mut self, pods: &[HandedPod]) -> io::Result<()> {
        self.0.write(&format!("yielded {}", std::process::id())).await?;
        let mut left = pods.iter();
        loop {
            match &*self.0.read().await? {
                "done" => return Ok(()),
                "pods" | "next" => {
                    let pod = left.next();
                    self.1 |= pod.is_none();
                    self.0.write_pod(pod).await?;
                }
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
    }

    /// Whether the successor was given all pods, with their sockets.
    pub fn has_all_pods(&self) -> bool {
        self.1
    }

    /// Waits for the end of a successor that serves the node. Whether it died, without having said that it ends.
    pub async fn died(&mut self) -> bool {
        self.fate().await == Fate::Died
    }

    async fn fate(&mut self) -> Fate {
        let said = Instant::now();
        let mut watched = false;
        loop {
            match self.0.read().await.as_deref() {
                Ok(WATCH) => watched = true,
                Ok(LEAVE) => return Fate::Left,
                // Words of a later version.
                Ok(_) => {}
                Err(_gone) if watched || said.elapsed() < WATCH_WITHIN => return Fate::Died,
                Err(_gone) => return Fate::Left,
            }
        }
    }

    /// Says that this daemon's ports are free. The claim is to be kept until the process ends: that tells the
    /// successor that no connection of this daemon needs anything in the kernel any more.
    pub async fn bye(&mut self) {
        // The successor goes on without it, after a time-out.
        let _gone = self.0.write("bye").await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        (dir, path)
    }

    fn nothing() -> Legacy {
        Box::new(Zeroizing::default)
    }

    #[tokio::test]
    async fn certificates_are_given_to_who_asks_and_the_take_over_follows() {
        let (_dir, path) = socket();
        assert!(credentials(&path).await.is_none(), "nobody is there");
        let large: Vec<u8> = (0..1_000_000_u32).map(|n| n as u8).collect();
        let left = large.clone();
        let old = Successors::listen(&path, Box::new(move || Zeroizing::new(left.clone()))).unwrap();
        let successor = async {
            // One that asks and does not read is in nobody's way.
            let mut idle = Line(BufReader::new(UnixStream::connect(&path).await.unwrap()));
            idle.write(CREDENTIALS).await.unwrap();
            let got = credentials(&path).await.expect("the certificates");
            assert!(*got == large);
            assert!(matches!(ask(&path).await, Found::Yielded(_)));
        };
        let ((), outcome) = tokio::join!(successor, async { old.next().await.outcome(&[]).await });
        assert_eq!(outcome, Outcome::Abandoned);
        drop(old);
        let old = Successors::listen(&path, nothing()).unwrap();
        tokio::select! {
            got = credentials(&path) => assert!(got.is_none(), "nothing was left"),
            _claim = old.next() => panic!("a question is no claim"),
        }
    }

    #[tokio::test]
    async fn who_has_called_stays_on_the_line_while_something_else_is_done() {
        let (_dir, path) = socket();
        let old = Successors::listen(&path, nothing()).unwrap();
        let mut line = Line(BufReader::new(UnixStream::connect(&path).await.unwrap()));
        // It is accepted, and before it has said anything the wait is given up.
        assert!(timeout(Duration::from_millis(50), old.next()).await.is_err());
        line.write(&format!("yield {VERSION}")).await.unwrap();
        let mut claim = timeout(ANSWER_WITHIN, old.next()).await.expect("it has called");
        let successor = async {
            assert!(line.read().await.unwrap().starts_with("yielded "));
            drop(line);
        };
        let (outcome, ()) = tokio::join!(claim.outcome(&[]), successor);
        assert_eq!(outcome, Outcome::Abandoned);
    }

    #[tokio::test]
    async fn a_successor_finds_nobody_on_a_fresh_node() {
        let (_dir, path) = socket();
        assert!(matches!(ask(&path).await, Found::Nobody));
    }

    #[tokio::test]
    async fn a_socket_left_by_a_killed_daemon_is_nobody() {
        let (_dir, path) = socket();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        assert!(matches!(ask(&path).await, Found::Nobody));
        let again = Successors::listen(&path, nothing()).unwrap();
        drop(again);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_take_over_runs_to_its_end() {
        let (_dir, path) = socket();
        let old = Successors::listen(&path, nothing()).unwrap();
        let successor = async {
            let Found::Yielded(predecessor) = ask(&path).await else { panic!("not yielded") };
            assert_eq!(predecessor.pid, std::process::id().to_string());
            let mut departing = predecessor.done().await;
            let new = Successors::listen(&path, nothing()).unwrap();
            departing.gone().await;
            new
        };
        let predecessor = async {
            let mut claim = old.next().await;
            assert_eq!(claim.outcome(&[]).await, Outcome::Done);
            claim.bye().await;
            assert!(old.is_current());
            drop(claim);
        };
        let (new, ()) = tokio::join!(successor, predecessor);
        drop(old);
        assert!(path.exists(), "the old daemon removed its successor's socket");
        drop(new);
    }

    /// What becomes of a successor that does `then` after it has taken over.
    async fn fate_after(then: impl AsyncFnOnce(Departing)) -> Fate {
        let (_dir, path) = socket();
        let old = Successors::listen(&path, nothing()).unwrap();
        let successor = async {
            let Found::Yielded(predecessor) = ask(&path).await else { panic!("not yielded") };
            then(predecessor.done().await).await;
        };
        let predecessor = async {
            let mut claim = old.next().await;
            assert_eq!(claim.outcome(&[]).await, Outcome::Done);
            claim.bye().await;
            claim.fate().await
        };
        tokio::join!(successor, predecessor).1
    }

    #[tokio::test]
    async fn a_successor_that_dies_after_the_take_over_is_told_from_one_that_leaves() {
        assert_eq!(fate_after(async |departing| drop(departing)).await, Fate::Died);
        let later = async |departing| {
            tokio::time::sleep(Duration::from_millis(100)).await;
            drop(departing);
        };
        assert_eq!(fate_after(later).await, Fate::Died);
        let leaves = async |mut departing: Departing| departing.leave().await;
        assert_eq!(fate_after(leaves).await, Fate::Left);
    }

    #[tokio::test(start_paused = true)]
    async fn a_successor_that_does_not_know_how_to_leave_is_not_taken_for_dead() {
        for (after, fate) in [(0, Fate::Died), (60, Fate::Left)] {
            let (_dir, path) = socket();
            let old = Successors::listen(&path, nothing()).unwrap();
            let successor = async {
                let mut line = Line(BufReader::new(UnixStream::connect(&path).await.unwrap()));
                line.write("yield 1").await.unwrap();
                line.read().await.unwrap();
                line.write("done").await.unwrap();
                assert_eq!(line.read().await.unwrap(), "bye");
                tokio::time::sleep(Duration::from_secs(after)).await;
            };
            let predecessor = async {
                let mut claim = old.next().await;
                assert_eq!(claim.outcome(&[]).await, Outcome::Done);
                claim.bye().await;
                claim.fate().await
            };
            assert_eq!(tokio::join!(successor, predecessor).1, fate);
        }
    }

    fn handed(uid: &str) -> HandedPod {
        let listener = || Arc::new(TcpListener::bind("127.0.0.1:0").unwrap());
        let [name, namespace, service_account] = ["cart-1", "shop", "cart"].map(Arc::from);
        let netns = Arc::new(Netns::current().unwrap());
        let pod = AgentPod { uid: PodUid::from(uid), name, namespace, service_account, netns };
        let [outbound, inbound, hbone] = [listener(), listener(), listener()];
        let bound = || Bound { udp: Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap()), tcp: listener() };
        // None, one and both families.
        let dns = (0..uid.len() % 3).map(|_| bound()).collect::<Vec<_>>();
        let dns = Some(dns).filter(|all| !all.is_empty()).map(|all| Arc::new(Sockets(all)));
        HandedPod { pod, listeners: Arc::new(Listeners { outbound, inbound, hbone }), dns }
    }

    /// Where the sockets for DNS are bound.
    fn asked_at(pod: &HandedPod) -> Vec<[std::net::SocketAddr; 2]> {
        let bound = pod.dns.iter().flat_map(|dns| &dns.0);
        bound.map(|one| [one.udp.local_addr().unwrap(), one.tcp.local_addr().unwrap()]).collect()
    }

    #[tokio::test]
    async fn pods_are_handed_over_with_their_sockets() {
        let (_dir, path) = socket();
        let old = Successors::listen(&path, nothing()).unwrap();
        let given: Vec<HandedPod> = (0..300).map(|number| handed(&format!("uid-{number}"))).collect();
        let ports: Vec<_> =
            given.iter().map(|pod| (pod.listeners.hbone.local_addr().unwrap(), asked_at(pod))).collect();
        let successor = async {
            let Found::Yielded(mut predecessor) = ask(&path).await else { panic!("not yielded") };
            let pods = predecessor.pods().await.unwrap();
            (pods, predecessor.done().await)
        };
        let predecessor = async {
            let mut claim = old.next().await;
            assert_eq!(claim.outcome(&given).await, Outcome::Done);
            claim.bye().await;
            claim
        };
        let ((pods, _departing), _claim) = tokio::join!(successor, predecessor);
        drop(given);
        assert_eq!(pods.len(), 300);
        for (index, (pod, (address, names))) in pods.iter().zip(ports).enumerate() {
            assert_eq!(asked_at(pod), names);
            assert_eq!(*pod.pod.uid.0, format!("uid-{index}"));
            assert_eq!((&*pod.pod.name, &*pod.pod.service_account), ("cart-1", "cart"));
            assert_eq!(pod.listeners.hbone.local_addr().unwrap(), address);
            // It still listens, though the first daemon has closed it.
            std::net::TcpStream::connect(address).unwrap();
        }
    }

    #[tokio::test]
    async fn what_is_no_pod_is_refused() {
        let (_dir, path) = socket();
        let old = Successors::listen(&path, nothing()).unwrap();
        let successor = async {
            let Found::Yielded(mut predecessor) = ask(&path).await else { panic!("not yielded") };
            predecessor.pods().await
        };
        let predecessor = async {
            let mut claim = old.next().await;
            claim.0.write("yielded 1").await.unwrap();
            assert_eq!(claim.0.read().await.unwrap(), "pods");
            claim.0.write("pod without sockets or names").await.unwrap();
            claim
        };
        let (pods, _claim) = tokio::join!(successor, predecessor);
        assert_eq!(pods.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_successor_that_dies_gives_the_node_back() {
        let (_dir, path) = socket();
        let old = Successors::listen(&path, nothing()).unwrap();
        let successor = async {
            let Found::Yielded(predecessor) = ask(&path).await else { panic!("not yielded") };
            drop(predecessor);
        };
        let predecessor = async { old.next().await.outcome(&[]).await };
        let ((), outcome) = tokio::join!(successor, predecessor);
        assert_eq!(outcome, Outcome::Abandoned);
    }

    #[tokio::test]
    async fn garbage_at_the_socket_does_not_stop_a_successor_after_it() {
        let (_dir, path) = socket();
        let old = Successors::listen(&path, nothing()).unwrap();
        let garbage = UnixStream::connect(&path).await.unwrap();
        let mut garbage = Line(BufReader::new(garbage));
        garbage.write(&"x".repeat(1000)).await.unwrap();
        let (found, claim) = tokio::join!(ask(&path), async {
            let mut claim = old.next().await;
            claim.0.write("yielded 1").await.unwrap();
            claim
        });
        assert!(matches!(found, Found::Yielded(_)));
        drop(claim);
    }

    #[tokio::test(start_paused = true)]
    async fn a_predecessor_that_hangs_is_overruled() {
        let (_dir, path) = socket();
        let hung = Successors::listen(&path, nothing()).unwrap();
        let Found::Late(predecessor) = ask(&path).await else { panic!("not late") };
        // It wakes up, finds what it was asked, and that all is done.
        let (done, outcome) = tokio::join!(predecessor.done(), async {
            let mut claim = hung.next().await;
            let outcome = claim.outcome(&[]).await;
            claim.bye().await;
            (outcome, claim)
        });
        let mut departing = done;
        assert_eq!(outcome.0, Outcome::Done);
        let early = timeout(Duration::from_secs(1), departing.gone()).await;
        assert!(early.is_err(), "gone while the old process still holds its claim");
        drop(outcome);
        departing.gone().await;
    }
}
