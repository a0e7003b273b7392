//! Where connections come from.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::net::TcpStream;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::sleep;
use ztunnel_mesh::model::addr::ClientAddr;
use ztunnel_runtime::shutdown;
use ztunnel_runtime::shutdown::Signal;

use crate::net::reserve::is_out_of_descriptors;
use crate::net::reserve::refuse;
use crate::net::socket::Acceptor;
use crate::net::socket::accept;
use crate::net::socket::prefer_later;
use crate::proxy::inbound;
use crate::proxy::outbound;
use crate::proxy::passthrough;
use crate::proxy::pod::Pod;
use crate::proxy::shard::Entered;
use crate::proxy::shard::Shard;
use crate::telemetry::events::Reporter;

/// Connections taken from one listener before others get a turn.
const BATCH: usize = 64;

/// How long to wait when the kernel has no memory for another connection. They stay queued.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// The same when the process has no descriptor for another connection, nor one to refuse it with, as another thread
/// is doing just that.
const REFUSAL_PAUSE: Duration = Duration::from_millis(5);

/// How long listeners of a removed pod go on accepting, as a part of the drain's linger: a second, if that is three.
/// Nothing new arrives by then, but handshakes in progress end in a connection, which a closed listener would reset.
const REMOVAL_LINGER: u32 = 3;

/// What a listener takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What the pod dials.
    Outbound,
    /// Plain connections to the pod.
    Inbound,
    /// Tunnels to the pod.
    Hbone,
}

/// One accepted connection, on its way to the thread that serves it.
pub struct AcceptedConnection {
    kind: Kind,
    pod: Arc<Pod>,
    socket: TcpStream,
    client: ClientAddr,
    /// From here on, so that a drain does not overlook what is between two threads.
    entered: Entered,
}

impl AcceptedConnection {
    /// Serves the connection on `shard`, which is the current thread's.
    pub(super) fn serve(self, shard: &Arc<Shard>) {
        let Self { kind, pod, socket, client, entered } = self;
        let (shard_, connection, closed) = (Arc::clone(shard), (socket, client), pod.closed());
        let counted = |reporter| (entered, shard.telemetry.accepted(reporter));
        let lane = match kind {
            Kind::Outbound => shard.lanes.of_pod(&pod.uid),
            Kind::Inbound | Kind::Hbone => shard.lanes.of_source(&pod.uid, client.0.ip()),
        };
        match kind {
            Kind::Outbound => {
                spawn(closed, lane.run(outbound::serve(shard_, pod, connection, counted(Reporter::Source))));
            }
            Kind::Inbound => {
                let counted = counted(Reporter::Destination);
                spawn(closed, lane.run(passthrough::serve(shard_, pod, connection, counted)));
            }
            Kind::Hbone => {
                let (streams, counted) = (lane.clone(), counted(Reporter::Destination));
                spawn(closed, lane.run(inbound::serve(shard_, pod, connection, streams, counted)));
            }
        }
    }
}

/// Spawns what serves a connection; it ends with `closed`, if there is such a thing.
fn spawn(closed: Option<Signal>, connection: impl Future<Output = ()> + Send + 'static) {
    let _task = match closed {
        None => shutdown::spawn(connection),
        Some(mut closed) => shutdown::spawn(async move {
            tokio::select! {
                () = connection => {}
                // What is dropped before its end is reset.
                () = closed.closing() => {}
            }
        }),
    };
}

/// One data-plane thread, and the way to the others.
pub struct DataThread {
    /// What its connections share.
    pub(super) shard: Arc<Shard>,
    pub(super) runtime: Handle,
    others: Vec<mpsc::Sender<AcceptedConnection>>,
    turn: AtomicUsize,
}

impl DataThread {
    /// `others` take connections from this one, in turn.
    pub(super) fn new(
        shard: Arc<Shard>,
        runtime: Handle,
        others: Vec<mpsc::Sender<AcceptedConnection>>,
    ) -> Self {
        Self { shard, runtime, others, turn: AtomicUsize::new(0) }
    }

    /// Runs the thread until the end of the process. What is open then is dropped with the runtime.
    pub(super) async fn run(self: Arc<Self>, mut accepted: mpsc::Receiver<AcceptedConnection>) {
        let watching = Arc::clone(&self.shard);
        shutdown::spawn(async move { watching.reauthorization.watch(watching.mesh.clone()).await });
        let (mut signal, mut drain) = (self.shard.signal.clone(), self.shard.signal.clone());
        let draining = async {
            drain.draining().await;
            // Until then new streams may still be opened for connections that are being accepted.
            sleep(self.shard.config.linger).await;
            self.shard.pool.retire_all();
        };
        let (mut closing, mut draining) = (pin!(signal.closing()), pin!(draining));
        let mut drained = false;
        loop {
            tokio::select! {
                () = &mut closing => return,
                () = &mut draining, if !drained => drained = true,
                Some(connection) = accepted.recv() => connection.serve(&self.shard),
            }
        }
    }

    /// Serves a connection on this thread or another, in turn.
    fn spread(&self, connection: AcceptedConnection) {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % (self.others.len() + 1);
        match self.others.get(turn) {
            // A thread that is behind gets no more: this one keeps it.
            Some(other) => match other.try_send(connection) {
                Ok(()) => {}
                Err(
                    mpsc::error::TrySendError::Full(connection)
                    | mpsc::error::TrySendError::Closed(connection),
                ) => {
                    connection.serve(&self.shard);
                }
            },
            None => connection.serve(&self.shard),
        }
    }
}

/// A listener of a pod, on its home thread.
pub struct Listener {
    kind: Kind,
    acceptor: Acceptor,
}

impl Listener {
    /// In the context of the thread's runtime.
    pub(super) fn new(kind: Kind, listener: Arc<TcpListener>) -> io::Result<Self> {
        Ok(Self { kind, acceptor: Acceptor::new(listener)? })
    }

    /// Accepts until the pod has been removed or the drain has lasted for their lingers. What is queued at that
    /// moment is still taken; then the socket closes.
    pub(super) async fn run(self, thread: Arc<DataThread>, pod: Arc<Pod>, _counted: Entered) {
        let shard = &thread.shard;
        let take = |listener: &TcpListener| self.take(listener, &thread, &pod);
        let mut end = pin!(end(shard, &pod, self.acceptor.listener()));
        loop {
            tokio::select! {
                () = &mut end => break,
                taken = self.acceptor.accepting(take) => match taken {
                    Ok(()) => {}
                    Err(error) if is_out_of_descriptors(&error) => {
                        let refused = refuse(self.acceptor.listener());
                        shard.count.refuse(refused, &pod.uid);
                        if refused == 0 {
                            sleep(REFUSAL_PAUSE).await;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(pod = %pod.uid, %error, "cannot accept connections for now");
                        sleep(EXHAUSTED_PAUSE).await;
                    }
                },
            }
            tokio::task::yield_now().await;
        }
        while take(self.acceptor.listener()).is_ok() {
            tokio::task::yield_now().await;
        }
    }

    /// Takes up to a batch. `WouldBlock` when none is left.
    fn take(&self, listener: &TcpListener, thread: &DataThread, pod: &Arc<Pod>) -> io::Result<()> {
        for _ in 0..BATCH {
            match accept(listener) {
                Ok((socket, client)) => self.dispatch(thread, pod, socket, client),
                // The client is gone already.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn dispatch(&self, thread: &DataThread, pod: &Arc<Pod>, socket: TcpStream, client: SocketAddr) {
        let entered = match self.kind {
            Kind::Outbound | Kind::Inbound => thread.shard.count.connection(),
            Kind::Hbone => thread.shard.count.tunnel(),
        };
        let (pod, client) = (Arc::clone(pod), ClientAddr(client));
        thread.spread(AcceptedConnection { kind: self.kind, pod, socket, client, entered });
    }
}

fn end<'a>(shard: &'a Shard, pod: &'a Pod, listener: &'a TcpListener) -> impl Future<Output = ()> + 'a {
    let mut signal = shard.signal.clone();
    async move {
        tokio::select! {
            biased;
            // Somebody else has the same sockets: what is queued on them is not lost.
            () = pod.sockets_handed_over() => {}
            () = async {
                pod.removed().await;
                sleep(shard.config.linger / REMOVAL_LINGER).await;
            } => {}
            () = async {
                tokio::select! {
                    () = signal.draining() => {}
                    () = pod.handed_over() => {}
                }
                // Whatever still came here when this socket closes would be reset.
                if let Err(error) = prefer_later(listener) {
                    tracing::debug!(pod = %pod.uid, %error, "connections go on coming to the end");
                }
                sleep(shard.config.linger).await;
            } => {}
        }
    }
}
