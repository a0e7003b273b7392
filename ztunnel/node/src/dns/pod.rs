//! One pod's questions, from what is read to what is answered.
//!
//! What the mesh answers is answered where it is read; each of the others has a task of its own until its resolver has
//! answered. How many there may be at a time is bounded: one more is answered with SERVFAIL, so that whoever asks does
//! not wait for nothing, and counted.

use std::future::Future;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::pin::Pin;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::DNSClass;
use hickory_proto::rr::RecordType;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::Semaphore;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio::time::sleep;
use tokio::time::timeout;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::index::Mesh;
use ztunnel_mesh::store::lookup::Lookup;
use ztunnel_runtime::shutdown;
use ztunnel_runtime::shutdown::Signal;

use crate::dns::answer;
use crate::dns::answer::Family;
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
use crate::dns::server::Config;
use crate::net::conntrack::Conntrack;
use crate::net::netns::Netns;
use crate::net::origdst::redirected_dst;
use crate::net::socket::Acceptor;
use crate::net::socket::Datagrams;

/// The target of the log's lines about questions, as filters name it.
const TARGET: &str = "dns";
/// Datagrams taken from one socket before others get a turn.
const BATCH: usize = 64;
/// A request that waits for others counts once more for every so many of its bytes.
const REQUEST_WEIGHS: usize = 512;
/// Requests of one connection that are under way at a time. Further ones wait on it.
pub(super) const PIPELINE_MAX: usize = 32;
/// A request waits no longer for its pod to become known to the mesh: resolvers ask again.
const WORKLOAD_WITHIN: Duration = Duration::from_secs(2);
/// How long to wait when the process has no descriptors or memory for another connection. They stay queued.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// What all pods share.
pub(super) struct Shared {
    pub(super) config: Config,
    pub(super) mesh: MeshReader,
    pub(super) counts: Arc<Counts>,
    pub(super) resolvers: forward::Own,
    /// Listeners, connections, and requests under way.
    pub(super) busy: watch::Sender<usize>,
    pub(super) signal: Signal,
    /// Of the sockets that were added last.
    pub(super) handing_over: Mutex<Signal>,
}

impl Shared {
    /// When the sockets that are added now are to be left to another process.
    fn handing_over(&self) -> Signal {
        self.handing_over.lock().clone()
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

/// One pod.
pub(super) struct Pod {
    pub(super) lookup: Lookup,
    pub(super) netns: Arc<Netns>,
    /// Where its questions arrive: asking there would be asking itself.
    pub(super) own: Vec<SocketAddr>,
    /// `None` where the kernel does not have it.
    pub(super) conntrack: Mutex<Option<Conntrack>>,
    pub(super) requests: Arc<Semaphore>,
    pub(super) connections: Arc<Semaphore>,
    pub(super) stopped: Signal,
    pub(super) shared: Arc<Shared>,
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

/// Whether the kernel says that it will never tell.
fn is_lasting(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM | libc::EOPNOTSUPP))
}

impl Pod {
    /// Spawns what ends with the pod, and counts as busy until then.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
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
        let (mut signal, mut handing_over) = (self.shared.signal.clone(), self.shared.handing_over());
        let drained = async {
            signal.draining().await;
            sleep(self.shared.config.linger).await;
        };
        tokio::select! {
            () = handing_over.draining() => End::Now,
            () = drained => End::Drained,
        }
    }

    /// Answers what comes in datagrams.
    pub(super) async fn datagrams(self: Arc<Self>, socket: Arc<Datagrams>) {
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
    fn read(self: &Arc<Self>, socket: &Arc<Datagrams>, local: Option<SocketAddr>, buffer: &mut [u8]) -> bool {
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
        socket: &Arc<Datagrams>,
        local: Option<SocketAddr>,
        client: SocketAddr,
        bytes: &[u8],
    ) {
        // Somebody has put on this port's address as that of a client.
        if self.own.contains(&client) {
            return self.shared.counts.refuse();
        }
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
        let mut conntrack = self.conntrack.lock();
        match conntrack.as_mut()?.original_dst(client, local) {
            Ok(original) => Some(original),
            // Not for this question alone.
            Err(error) if is_lasting(&error) => {
                tracing::warn!(
                    %error,
                    "it cannot be known which resolver a pod asks in datagrams: those of this proxy are asked"
                );
                *conntrack = None;
                None
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::debug!(%client, %error, "it is not known which resolver a pod has asked");
                }
                None
            }
        }
    }

    /// Answers what comes on connections.
    pub(super) async fn accept(self: Arc<Self>, acceptor: Acceptor) {
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
                        // What a client that never stops to ask has asked is answered; the drain does not wait for more.
                        let ending = self.shared.signal.is_draining() || self.shared.handing_over().is_draining();
                        request = (!ending).then(|| next_request(reader, within));
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
        // Also for how much is kept of it.
        let weight = 1 + (bytes.len() / REQUEST_WEIGHS) as u32;
        match Arc::clone(&self.requests).try_acquire_many_owned(weight) {
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
            (true, _) if !found.exists => "no ready endpoints",
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
                        match answer {
                            Ok(answer) => Some(answer),
                            Err(error) => unanswered(&error, || foreign.refuse(ResponseCode::ServFail)),
                        }
                    }
                    None => Some(foreign.refuse(ResponseCode::NotImp)),
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
                        // The client waits for a connection.
                        Err(_) => Outcome::Answer(Some(request.refuse(ResponseCode::ServFail))),
                    };
                }
                let answer = self.forward(&resolvers, &message, request.question_end(), transport).await;
                series.forwarded(began.elapsed(), answer.is_err());
                if let Ok(answer) = &answer
                    && message::is_no_such_name(answer)
                    && let Some(answer) = self.instead(client, &request, transport)
                {
                    tell(Some(client), &request, "no records", 0);
                    return Outcome::Answer(Some(answer));
                }
                tell_forwarded(client, &request, answer.as_ref().err());
                match answer {
                    Ok(answer) => Some(answer),
                    Err(error) => unanswered(&error, || request.refuse(ResponseCode::ServFail)),
                }
            }
        };
        Outcome::Answer(answer)
    }

    /// The answer for a name that no other resolver has, if the mesh has it: not of what is asked for, or it had been
    /// answered at once. All that is known of a name, which is asked for by `ANY`, is its addresses, of one family
    /// (RFC 8482 §4.1).
    fn instead(&self, client: &Workload, request: &Request, transport: Transport) -> Option<Vec<u8>> {
        if request.class() != DNSClass::IN || request.fault().is_some() {
            return None;
        }
        let (mesh, names, name) = (self.shared.mesh.snapshot(), &self.shared.config.names, request.name());
        let zone = answer::has(&mesh, names, client, &name)?;
        if request.record_type() == RecordType::ANY {
            let find = |family| answer::find(&mesh, names, client, &name, family, rand::random());
            let mut found = [Family::V4, Family::V6].into_iter().filter_map(find);
            let found = found.find(|found| !found.addresses.is_empty())?;
            return Some(request.answer(&found, transport));
        }
        Some(request.nothing(zone.as_deref()))
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

/// What the client is told of a request that was not answered: that is what it would have learned itself. Of a resolver
/// that says nothing it hears nothing, by then it has given up or asks anew.
fn unanswered(error: &ForwardError, refuse: impl FnOnce() -> Vec<u8>) -> Option<Vec<u8>> {
    match error {
        ForwardError::TimedOut => None,
        ForwardError::NoResolver | ForwardError::Failed(_) => Some(refuse()),
    }
}

/// Sends an answer. If there is no room for it it is lost, as it may be anywhere on its way.
fn send(socket: &Datagrams, client: SocketAddr, answer: &[u8]) {
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
        query = &*request.record_type().to_string(),
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
mod tests {
    use super::*;

    #[test]
    fn of_a_resolver_that_says_nothing_nothing_is_said() {
        let refuse = || vec![7];
        assert_eq!(unanswered(&ForwardError::TimedOut, refuse), None);
        let refused = ForwardError::Failed(io::ErrorKind::ConnectionRefused.into());
        for error in [ForwardError::NoResolver, refused] {
            assert_eq!(unanswered(&error, refuse), Some(vec![7]), "{error}");
        }
    }
}
