//! The ports of pods at which names are asked for.
//!
//! Questions that the mesh answers are answered where they are read; each of the others has a task of its own until its
//! resolver has answered. How many there may be at a time is bounded per pod: one more is answered with SERVFAIL, so
//! that whoever asks does not wait for nothing, and counted.
//!
//! A daemon that hands over stops reading at once, as its successor has the same sockets with whatever is queued on
//! them, and finishes what it has read. One that only stops reads on for a while.

use std::collections::HashMap;
use std::future::Future;
use std::future::pending;
use std::io;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::pin::Pin;
use std::pin::pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hickory_proto::op::ResponseCode;
use socket2::Domain;
use socket2::Protocol;
use socket2::Socket;
use socket2::Type;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::runtime;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::Semaphore;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio::time::sleep;
use tokio::time::timeout;

use crate::dns::answer;
use crate::dns::counts::Counts;
use crate::dns::counts::query_type;
use crate::dns::forward;
use crate::dns::forward::ForwardError;
use crate::dns::forward::Outside;
use crate::dns::forward::read_message;
use crate::dns::forward::write_message;
use crate::dns::message;
use crate::dns::message::Foreign;
use crate::dns::message::Received;
use crate::dns::message::Request;
use crate::dns::message::Transport;
use crate::mesh::MeshReader;
use crate::mesh::index::Mesh;
use crate::mesh::lookup::Lookup;
use crate::model::addr::PodUid;
use crate::model::workload::Named;
use crate::model::workload::Workload;
use crate::net::conntrack::Conntrack;
use crate::net::netns::Netns;
use crate::net::origdst::redirected_dst;
use crate::net::socket::Acceptor;
use crate::shutdown;
use crate::shutdown::Signal;
use crate::shutdown::Trigger;
use crate::telemetry::Telemetry;

/// Where the rules send what a pod asks.
pub const PORT: u16 = 15053;
/// The target of the log's lines about questions, as filters name it.
const TARGET: &str = "dns";
const BACKLOG: i32 = 128;
/// Datagrams taken from one socket before others get a turn.
const BATCH: usize = 64;
/// Requests of one connection that are under way at a time. Further ones wait on it.
const PIPELINE_MAX: usize = 32;
/// A request waits no longer for its pod to become known to the mesh: resolvers ask again.
const WORKLOAD_WITHIN: Duration = Duration::from_secs(2);
/// How long to wait when the process has no descriptors or memory for another connection. They stay queued.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// How names are resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What names of the mesh are.
    pub names: answer::Config,
    /// Where it is listened, instead of [`PORT`] of the loopback.
    pub address: Option<SocketAddr>,
    /// Whether the loopback has IPv6, where there is any.
    pub ipv6: bool,
    /// Whether other daemons may have the same ports.
    pub share_ports: bool,
    /// The mark by which the rules know the daemon's own packets.
    pub mark: u32,
    /// The file of the resolvers to ask where it is not known which a pod has asked.
    pub resolv_conf: PathBuf,
    /// Requests of one pod that wait for other resolvers at a time. One more is answered with SERVFAIL.
    pub requests_max: usize,
    /// Connections of one pod. One more is reset.
    pub connections_max: usize,
    /// How long a client on a connection has for its next request, and to take an answer.
    pub client_within: Duration,
    /// How long it is read on once the drain has begun.
    pub linger: Duration,
}

impl Config {
    /// The defaults, with these names.
    pub fn new(names: answer::Config) -> Self {
        Self {
            names,
            address: None,
            ipv6: true,
            share_ports: true,
            mark: 0x539,
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            requests_max: 512,
            connections_max: 128,
            client_within: Duration::from_secs(5),
            linger: Duration::from_secs(3),
        }
    }
}

/// The two sockets of one address.
#[derive(Debug, Clone)]
pub struct Bound {
    /// For datagrams.
    pub udp: Arc<UdpSocket>,
    /// For connections.
    pub tcp: Arc<TcpListener>,
}

/// Where a pod's questions arrive.
#[derive(Debug)]
pub struct Sockets(pub Vec<Bound>);

/// Why a pod's questions cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Its network namespace cannot be entered.
    #[error("cannot enter the pod's network namespace")]
    Netns(#[source] io::Error),
    /// An address cannot be had.
    #[error("cannot listen for DNS on {address} in the pod")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Listens in `netns`.
pub fn bind(netns: &Netns, config: &Config) -> Result<Sockets, BindError> {
    let listen = |address| listen(address, config).map_err(|source| BindError::Listen { address, source });
    let bind = || {
        if let Some(address) = config.address {
            return Ok(Sockets(vec![listen(address)?]));
        }
        let mut all = vec![listen((Ipv4Addr::LOCALHOST, PORT).into())?];
        if config.ipv6 {
            match listen((Ipv6Addr::LOCALHOST, PORT).into()) {
                Ok(bound) => all.push(bound),
                // A kernel, or a loopback, without IPv6.
                Err(BindError::Listen { source, .. }) if has_no_ipv6(&source) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Sockets(all))
    };
    netns.run(bind).map_err(BindError::Netns)?
}

fn has_no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn listen(address: SocketAddr, config: &Config) -> io::Result<Bound> {
    let make = |kind: Type, protocol| {
        let socket = Socket::new(Domain::for_address(address), kind.nonblocking(), Some(protocol))?;
        socket.set_mark(config.mark)?;
        socket.set_reuse_port(config.share_ports)?;
        io::Result::Ok(socket)
    };
    let udp = make(Type::DGRAM, Protocol::UDP)?;
    udp.bind(&address.into())?;
    let tcp = make(Type::STREAM, Protocol::TCP)?;
    tcp.set_reuse_address(true)?;
    tcp.set_tcp_nodelay(true)?;
    tcp.bind(&address.into())?;
    tcp.listen(BACKLOG)?;
    Ok(Bound { udp: Arc::new(udp.into()), tcp: Arc::new(tcp.into()) })
}

/// A pod whose questions are to be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    /// This incarnation of the pod.
    pub uid: PodUid,
    /// Which workload of the mesh it is.
    pub workload: Named,
}

/// The thread that answers. It runs until the signal closes.
pub struct Dns {
    shared: Arc<Shared>,
    runtime: runtime::Handle,
    thread: Mutex<Option<JoinHandle<()>>>,
    pods: Mutex<HashMap<PodUid, Trigger>>,
    handover: Trigger,
}

struct Shared {
    config: Config,
    mesh: MeshReader,
    counts: Arc<Counts>,
    resolvers: forward::Own,
    /// Listeners, connections, and requests under way.
    busy: watch::Sender<usize>,
    signal: Signal,
    handing_over: Signal,
}

impl Dns {
    /// Starts the thread.
    pub fn start(
        config: Config,
        mesh: MeshReader,
        telemetry: &Telemetry,
        signal: Signal,
    ) -> io::Result<Self> {
        let counts = Arc::new(Counts::default());
        telemetry.register(Arc::clone(&counts));
        let (handover, handing_over) = shutdown::channel();
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let mut closing = signal.clone();
        let thread = std::thread::Builder::new()
            .name("dns".to_owned())
            .spawn(move || runtime.block_on(closing.closing()))?;
        let resolvers = forward::Own::new(config.resolv_conf.clone());
        let busy = watch::Sender::new(0);
        Ok(Self {
            shared: Arc::new(Shared { config, mesh, counts, resolvers, busy, signal, handing_over }),
            runtime: handle,
            thread: Mutex::new(Some(thread)),
            pods: Mutex::default(),
            handover,
        })
    }

    /// Answers the pod's questions from now on. A pod of the same UID is replaced.
    pub fn add_pod(&self, spec: PodSpec, sockets: &Sockets, netns: Arc<Netns>) -> io::Result<()> {
        let (stop, stopped) = shutdown::channel();
        let conntrack = match Conntrack::open(&netns) {
            Ok(conntrack) => Some(conntrack),
            Err(error) => {
                let pod = &spec.uid;
                tracing::warn!(%pod, %error, "connection tracking cannot be asked which resolver a pod has asked: it is this daemon's");
                None
            }
        };
        let addresses = |bound: &Bound| [bound.udp.local_addr(), bound.tcp.local_addr()];
        let own = sockets.0.iter().flat_map(addresses).flatten();
        let pod = Arc::new(Pod {
            lookup: Lookup::new(spec.workload),
            netns,
            own: own.collect(),
            conntrack: Mutex::new(conntrack),
            requests: Arc::new(Semaphore::new(self.shared.config.requests_max)),
            connections: Arc::new(Semaphore::new(self.shared.config.connections_max)),
            stopped,
            shared: Arc::clone(&self.shared),
        });
        // Tasks go to the runtime whose context this is: the thread's.
        let _context = self.runtime.enter();
        let mut tasks = Vec::new();
        for bound in &sockets.0 {
            // The runtime has the descriptors for itself; they are the same sockets.
            let udp = tokio::net::UdpSocket::from_std(bound.udp.try_clone()?)?;
            let tcp = Acceptor::new(Arc::new(bound.tcp.try_clone()?))?;
            tasks.push((Arc::new(udp), tcp));
        }
        for (udp, tcp) in tasks {
            pod.spawn(Arc::clone(&pod).datagrams(udp));
            pod.spawn(Arc::clone(&pod).accept(tcp));
        }
        self.pods().insert(spec.uid, stop);
        Ok(())
    }

    /// Ends everything of the pod.
    pub fn remove_pod(&self, uid: &PodUid) {
        // What waits for the trigger ends with it.
        self.pods().remove(uid);
    }

    /// Hands over to another process that has the same sockets: reads nothing more, and finishes what was read.
    pub fn hand_over_sockets(&self) {
        self.handover.drain();
    }

    /// Waits until nothing is under way and nobody reads. Only a drain or [`Self::hand_over_sockets`] makes that so.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut busy = self.shared.busy.subscribe();
        async move {
            let _gone = busy.wait_for(|busy| *busy == 0).await;
        }
    }

    /// Waits for the thread to end, which it does when the signal closes.
    pub fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic has been reported by the thread itself.
            let _ended = thread.join();
        }
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<PodUid, Trigger>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts as busy while it lives.
struct Busy(Arc<Shared>);

impl Busy {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.busy.send_modify(|busy| *busy += 1);
        Self(Arc::clone(shared))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.send_modify(|busy| *busy -= 1);
    }
}

struct Pod {
    lookup: Lookup,
    netns: Arc<Netns>,
    /// Where its questions arrive: asking there would be asking itself.
    own: Vec<SocketAddr>,
    /// `None` where the kernel does not have it.
    conntrack: Mutex<Option<Conntrack>>,
    requests: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    stopped: Signal,
    shared: Arc<Shared>,
}

/// Why nothing more is read.
enum End {
    /// Nobody is to be answered any more, or somebody else has the same sockets.
    Now,
    /// What is queued is still read.
    Drained,
}

/// What is to be done about a message.
enum Step {
    /// Nothing but to send this, if anything.
    Done(Option<Vec<u8>>),
    /// To wait for others.
    Wait(Waiting),
}

/// A request that others have to be waited for.
struct Waiting {
    message: Vec<u8>,
    transport: Transport,
    kind: Kind,
    began: Instant,
    _room: OwnedSemaphorePermit,
}

enum Kind {
    Foreign(Foreign),
    /// A query of a client that may not be known yet.
    Query(Box<Request>, Option<Arc<Workload>>),
}

/// What comes of a request on a connection.
enum Outcome {
    /// One message, or none.
    Answer(Option<Vec<u8>>),
    /// As many as come on this connection to the resolver.
    Transfer(TcpStream),
}

impl Pod {
    /// Spawns what ends with the pod, and counts as busy until then.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let (busy, mut stopped) = (Busy::new(&self.shared), self.stopped.clone());
        shutdown::spawn(async move {
            let _busy = busy;
            tokio::select! {
                () = task => {}
                () = stopped.closing() => {}
            }
        });
    }

    async fn end(&self) -> End {
        let (mut signal, mut handing_over) = (self.shared.signal.clone(), self.shared.handing_over.clone());
        let drained = async {
            signal.draining().await;
            sleep(self.shared.config.linger).await;
        };
        tokio::select! {
            () = handing_over.draining() => End::Now,
            () = drained => End::Drained,
        }
    }

    async fn datagrams(self: Arc<Self>, socket: Arc<tokio::net::UdpSocket>) {
        let local = socket.local_addr().ok();
        let mut buffer = vec![0; usize::from(u16::MAX)];
        let mut end = pin!(self.end());
        loop {
            tokio::select! {
                end = &mut end => match end {
                    End::Now => return,
                    End::Drained => break,
                },
                ready = socket.readable() => if ready.is_err() {
                    return;
                },
            }
            self.read(&socket, local, &mut buffer);
            tokio::task::yield_now().await;
        }
        while self.read(&socket, local, &mut buffer) {
            tokio::task::yield_now().await;
        }
    }

    /// Reads up to a batch. False when nothing is left.
    fn read(
        self: &Arc<Self>,
        socket: &Arc<tokio::net::UdpSocket>,
        local: Option<SocketAddr>,
        buffer: &mut [u8],
    ) -> bool {
        for _ in 0..BATCH {
            match socket.try_recv_from(buffer) {
                Ok((length, client)) => self.datagram(socket, local, client, &buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                // About an earlier datagram.
                Err(_) => {}
            }
        }
        true
    }

    fn datagram(
        self: &Arc<Self>,
        socket: &Arc<tokio::net::UdpSocket>,
        local: Option<SocketAddr>,
        client: SocketAddr,
        bytes: &[u8],
    ) {
        let waiting = match self.begin(bytes, Transport::Udp) {
            Step::Done(answer) => {
                if let Some(answer) = answer {
                    send(socket, client, &answer);
                }
                return;
            }
            Step::Wait(waiting) => waiting,
        };
        // As long as it is tracked.
        let original = local.and_then(|local| self.original_dst(client, local));
        let (pod, socket) = (Arc::clone(self), Arc::clone(socket));
        self.spawn(async move {
            if let Outcome::Answer(Some(answer)) = pod.finish(waiting, original).await {
                send(&socket, client, &answer);
            }
        });
    }

    fn original_dst(&self, client: SocketAddr, local: SocketAddr) -> Option<SocketAddr> {
        let mut conntrack = self.conntrack.lock().unwrap_or_else(PoisonError::into_inner);
        match conntrack.as_mut()?.original_dst(client, local) {
            Ok(original) => Some(original),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(%client, %error, "it is not known which resolver a pod has asked");
                }
                None
            }
        }
    }

    async fn accept(self: Arc<Self>, acceptor: Acceptor) {
        let take = |listener: &TcpListener| self.take(listener);
        let mut end = pin!(self.end());
        loop {
            tokio::select! {
                end = &mut end => match end {
                    End::Now => return,
                    End::Drained => break,
                },
                taken = acceptor.accepting(take) => if let Err(error) = taken {
                    tracing::warn!(%error, "cannot accept DNS connections for now");
                    sleep(EXHAUSTED_PAUSE).await;
                },
            }
            tokio::task::yield_now().await;
        }
        while self.take(acceptor.listener()).is_ok() {
            tokio::task::yield_now().await;
        }
    }

    /// Takes up to a batch. `WouldBlock` when none is left.
    fn take(self: &Arc<Self>, listener: &TcpListener) -> io::Result<()> {
        for _ in 0..BATCH {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                // The client is gone already.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(error),
            };
            let Ok(room) = Arc::clone(&self.connections).try_acquire_owned() else {
                self.shared.counts.turn_away();
                continue;
            };
            let original = redirected_dst(&stream).ok().map(|original| original.0);
            stream.set_nonblocking(true)?;
            let Ok(stream) = TcpStream::from_std(stream) else { continue };
            let pod = Arc::clone(self);
            self.spawn(async move {
                let _room = room;
                pod.connection(stream, original).await;
            });
        }
        Ok(())
    }

    /// Serves a connection until its client has nothing more to ask, or is too slow.
    async fn connection(self: Arc<Self>, stream: TcpStream, original: Option<SocketAddr>) {
        let (reader, mut writer) = stream.into_split();
        let within = self.shared.config.client_within;
        let mut request = Some(next_request(reader, within));
        let mut under_way = FuturesUnordered::new();
        loop {
            let more = under_way.len() < PIPELINE_MAX && request.is_some();
            let received = async {
                match &mut request {
                    Some(request) => request.as_mut().await,
                    None => pending().await,
                }
            };
            tokio::select! {
                received = received, if more => {
                    request = None;
                    if let Some((reader, message)) = received {
                        request = Some(next_request(reader, within));
                        under_way.push(Arc::clone(&self).respond(message, original));
                    }
                }
                Some(outcome) = under_way.next() => match outcome {
                    Outcome::Answer(None) => {}
                    Outcome::Answer(Some(answer)) => {
                        let written = timeout(within, write_message(&mut writer, &answer)).await;
                        if !matches!(written, Ok(Ok(()))) {
                            return;
                        }
                    }
                    Outcome::Transfer(resolver) => return relay(resolver, writer, within).await,
                },
                else => return,
            }
        }
    }

    async fn respond(self: Arc<Self>, message: Vec<u8>, original: Option<SocketAddr>) -> Outcome {
        match self.begin(&message, Transport::Tcp) {
            Step::Done(answer) => Outcome::Answer(answer),
            Step::Wait(waiting) => self.finish(waiting, original).await,
        }
    }

    /// Does what can be done at once.
    fn begin(self: &Arc<Self>, bytes: &[u8], transport: Transport) -> Step {
        let began = Instant::now();
        let kind = match message::read(bytes) {
            Received::Nothing => {
                self.shared.counts.refuse();
                return Step::Done(None);
            }
            Received::Refused(answer) => {
                self.shared.counts.refuse();
                return Step::Done(Some(answer));
            }
            Received::Foreign(foreign) => Kind::Foreign(foreign),
            Received::Query(request) => {
                let mesh = self.shared.mesh.snapshot();
                let client = self.lookup.find_in(&mesh).and_then(|uid| mesh.workload(&uid)).cloned();
                if let Some(client) = &client
                    && let Some(answer) = self.of_the_mesh(&mesh, client, &request, transport)
                {
                    return Step::Done(Some(answer));
                }
                Kind::Query(request, client)
            }
        };
        match Arc::clone(&self.requests).try_acquire_owned() {
            Ok(room) => Step::Wait(Waiting { message: bytes.to_vec(), transport, kind, began, _room: room }),
            Err(_full) => {
                self.shared.counts.turn_away();
                Step::Done(Some(match kind {
                    Kind::Foreign(foreign) => foreign.refuse(ResponseCode::ServFail),
                    Kind::Query(request, client) => {
                        tell(client.as_deref(), &request, "too many requests under way", 0);
                        request.refuse(ResponseCode::ServFail)
                    }
                }))
            }
        }
    }

    /// The answer, if it is a name of the mesh.
    fn of_the_mesh(
        &self,
        mesh: &Mesh,
        client: &Workload,
        request: &Request,
        transport: Transport,
    ) -> Option<Vec<u8>> {
        let (family, name) = (request.family()?, request.name());
        let names = &self.shared.config.names;
        let found = answer::find(mesh, names, client, &name, family, rand::random())?;
        self.shared.counts.series(query_type(request.record_type()), transport, Some(client)).requested();
        if let Some(fault) = request.fault() {
            tell(Some(client), request, "refused", 0);
            return Some(request.refuse(fault));
        }
        let result = match (found.addresses.is_empty(), found.unsupported) {
            (false, _) => "success",
            (true, true) => "service does not support this record type",
            (true, false) => "no records",
        };
        tell(Some(client), request, result, found.addresses.len());
        Some(request.answer(&found, transport))
    }

    /// Waits for the others. `original` is whom the pod has asked, where that is known.
    async fn finish(&self, waiting: Waiting, original: Option<SocketAddr>) -> Outcome {
        let Waiting { message, transport, kind, began, _room } = waiting;
        let counts = &self.shared.counts;
        let original = original.filter(|original| !self.own.contains(original));
        let answer = match kind {
            Kind::Foreign(foreign) => {
                let series = counts.series("other", transport, None);
                series.requested();
                match original {
                    // It is meant for that server, and no other one.
                    Some(original) => {
                        let answer = self.forward(&[original], &message, 0, transport).await;
                        series.forwarded(began.elapsed(), answer.is_err());
                        answer.unwrap_or_else(|_| foreign.refuse(ResponseCode::ServFail))
                    }
                    None => foreign.refuse(ResponseCode::NotImp),
                }
            }
            Kind::Query(request, mut client) => {
                if client.is_none() {
                    client = self.awaited_client().await;
                    if let Some(client) = &client {
                        let mesh = self.shared.mesh.snapshot();
                        if let Some(answer) = self.of_the_mesh(&mesh, client, &request, transport) {
                            return Outcome::Answer(Some(answer));
                        }
                    }
                }
                let client = client.as_deref();
                let series = counts.series(query_type(request.record_type()), transport, client);
                series.requested();
                let Some(client) = client else {
                    tell(None, &request, "unknown client", 0);
                    return Outcome::Answer(Some(request.refuse(ResponseCode::ServFail)));
                };
                let began = Instant::now();
                let resolvers =
                    original.map_or_else(|| self.shared.resolvers.resolvers(), |known| vec![known]);
                if transport == Transport::Tcp && request.is_transfer() {
                    let begun = self.begin_transfer(&resolvers, &message).await;
                    series.forwarded(began.elapsed(), begun.is_err());
                    tell_forwarded(client, &request, begun.as_ref().err());
                    return match begun {
                        Ok(stream) => Outcome::Transfer(stream),
                        Err(_) => Outcome::Answer(Some(request.refuse(ResponseCode::ServFail))),
                    };
                }
                let answer = self.forward(&resolvers, &message, request.question_end(), transport).await;
                series.forwarded(began.elapsed(), answer.is_err());
                tell_forwarded(client, &request, answer.as_ref().err());
                answer.unwrap_or_else(|_| request.refuse(ResponseCode::ServFail))
            }
        };
        Outcome::Answer(Some(answer))
    }

    /// The pod's workload, as soon as the mesh knows it.
    async fn awaited_client(&self) -> Option<Arc<Workload>> {
        let found = timeout(WORKLOAD_WITHIN, self.lookup.find(&self.shared.mesh)).await;
        let uid = found.ok()?.ok()?;
        self.shared.mesh.snapshot().workload(&uid).cloned()
    }

    async fn forward(
        &self,
        resolvers: &[SocketAddr],
        message: &[u8],
        question_end: usize,
        transport: Transport,
    ) -> Result<Vec<u8>, ForwardError> {
        let outside = self.outside();
        match transport {
            Transport::Udp => outside.over_udp(resolvers, message, question_end).await,
            Transport::Tcp => outside.over_tcp(resolvers, message, question_end).await,
        }
    }

    async fn begin_transfer(
        &self,
        resolvers: &[SocketAddr],
        message: &[u8],
    ) -> Result<TcpStream, ForwardError> {
        let resolver = *resolvers.first().ok_or(ForwardError::NoResolver)?;
        let outside = self.outside();
        let begin = async {
            let mut stream = outside.connect(resolver).await?;
            write_message(&mut stream, message).await?;
            io::Result::Ok(stream)
        };
        let begun =
            timeout(forward::ANSWER_WITHIN, begin).await.map_err(|_elapsed| ForwardError::TimedOut)?;
        begun.map_err(ForwardError::Failed)
    }

    fn outside(&self) -> Outside<'_> {
        Outside { netns: &self.netns, mark: self.shared.config.mark }
    }
}

/// Sends an answer. If there is no room for it it is lost, as it may be anywhere on its way.
fn send(socket: &tokio::net::UdpSocket, client: SocketAddr, answer: &[u8]) {
    if let Err(error) = socket.try_send_to(answer, client) {
        tracing::debug!(%client, %error, "an answer is lost");
    }
}

type NextRequest = Pin<Box<dyn Future<Output = Option<(OwnedReadHalf, Vec<u8>)>> + Send>>;

/// The next message of a client; `None` where it has no more to ask, or takes too long.
fn next_request(mut reader: OwnedReadHalf, within: Duration) -> NextRequest {
    Box::pin(async move {
        let message = timeout(within, read_message(&mut reader)).await.ok()?.ok()??;
        Some((reader, message))
    })
}

/// Passes on what a resolver says until it has said everything, or either is too slow.
async fn relay(mut resolver: TcpStream, mut client: OwnedWriteHalf, within: Duration) {
    while let Ok(Ok(Some(message))) = timeout(within, read_message(&mut resolver)).await {
        let written = timeout(within, write_message(&mut client, &message)).await;
        if !matches!(written, Ok(Ok(()))) {
            return;
        }
    }
}

/// The line about a question. Names are what clients have made them.
fn tell(client: Option<&Workload>, request: &Request, result: &str, endpoints: usize) {
    tracing::debug!(
        target: TARGET,
        {
        src.workload = client.map(|client| &*client.name),
        src.namespace = client.map(|client| &*client.namespace),
        query = query_type(request.record_type()),
        domain = request.name(),
        result,
        endpoints
        },
        "dns query"
    );
}

fn tell_forwarded(client: &Workload, request: &Request, error: Option<&ForwardError>) {
    match error {
        None => tell(Some(client), request, "forwarded", 0),
        Some(error) => tell(Some(client), request, &format!("forwarding failed ({error})"), 0),
    }
}

#[cfg(test)]
mod tests;
