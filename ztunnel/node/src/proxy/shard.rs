//! What the connections of one data-plane thread share.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::mpsc;
use tokio::time::Instant;
use ztunnel_mesh::model::addr::Authority;
use ztunnel_mesh::model::addr::OriginalDst;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::store::MeshReader;
use ztunnel_runtime::shutdown;
use ztunnel_runtime::shutdown::Signal;

use crate::hbone::pool::Pool;
use crate::identity::worker::Identities;
use crate::proxy::Config;
use crate::proxy::accept::Arrival;
use crate::proxy::ending::Tally;
use crate::proxy::listing::Carrier;
use crate::proxy::listing::Connection;
use crate::proxy::listing::Listing;
use crate::proxy::listing::Original;
use crate::proxy::live::Live;
use crate::proxy::names::Names;
use crate::proxy::near::Neighbours;
use crate::proxy::pod::Pod;
use crate::proxy::turns::Lanes;
use crate::telemetry::LocalTelemetry;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::Security;

/// One data-plane thread.
pub struct Shard {
    /// The same for all threads.
    pub config: Arc<Config>,
    /// The mesh.
    pub mesh: MeshReader,
    /// Certificates.
    pub identities: Identities,
    /// Tells what happened.
    pub telemetry: LocalTelemetry,
    /// This thread's tunnels to peers.
    pub pool: Pool,
    /// This thread's inbound connections.
    pub live: Live,
    /// This thread's connections, in both directions.
    pub listing: Listing,
    /// What names stand for, as far as this thread has asked.
    pub names: Names,
    /// Who shares this thread's turns.
    pub lanes: Lanes,
    /// Pods to which connections can be handed over.
    pub neighbours: Arc<Neighbours>,
    /// What is open, on all threads together.
    pub count: Arc<Count>,
    /// The end of the process.
    pub signal: Signal,
    pub(super) runtime: Handle,
    others: Vec<mpsc::Sender<Arrival>>,
    turn: AtomicUsize,
}

impl Shard {
    #[expect(clippy::too_many_arguments, reason = "each is a part of its own, joined nowhere else")]
    pub(super) fn new(
        config: Arc<Config>,
        mesh: MeshReader,
        identities: Identities,
        telemetry: LocalTelemetry,
        neighbours: Arc<Neighbours>,
        count: Arc<Count>,
        signal: Signal,
        runtime: Handle,
        others: Vec<mpsc::Sender<Arrival>>,
    ) -> Self {
        Self {
            pool: Pool::new(config.hbone.waiters_max, config.hbone.spare_timeout),
            live: Live::new(mesh.snapshot()),
            listing: Listing::default(),
            names: Names::default(),
            lanes: Lanes::default(),
            turn: AtomicUsize::new(0),
            config,
            mesh,
            identities,
            telemetry,
            neighbours,
            count,
            signal,
            runtime,
            others,
        }
    }

    /// Runs the thread until the end of the process. What is open then is dropped with the runtime.
    pub(super) async fn run(self: Arc<Self>, mut arrivals: mpsc::Receiver<Arrival>) {
        let watching = Arc::clone(&self);
        shutdown::spawn(async move { watching.live.watch(watching.mesh.clone()).await });
        let (mut signal, mut drain) = (self.signal.clone(), self.signal.clone());
        let draining = async {
            drain.draining().await;
            // Until then new streams may still be opened for connections that are being accepted.
            tokio::time::sleep(self.config.linger).await;
            self.pool.retire_all();
        };
        let (mut closing, mut draining) = (pin!(signal.closing()), pin!(draining));
        let mut drained = false;
        loop {
            tokio::select! {
                () = &mut closing => return,
                () = &mut draining, if !drained => drained = true,
                Some(arrival) = arrivals.recv() => arrival.serve(&self),
            }
        }
    }

    /// Tells that a connection of `pod` is open from now on, to `actual`. `original` is where its application dialled,
    /// for one that leaves the pod.
    pub fn tally(
        &self,
        pod: &Pod,
        parties: Parties,
        addresses: Addresses,
        original: Option<OriginalDst>,
        actual: SocketAddr,
    ) -> Tally {
        if let Some(demand) = self.mesh.demand() {
            let Parties { source, destination, service, .. } = &parties;
            [source, destination].into_iter().flatten().for_each(|workload| demand.used(&workload.uid));
            service.iter().for_each(|service| demand.used(service.key.as_str()));
        }
        let listed = self.listing.enter(Connection {
            pod: pod.uid.clone(),
            reporter: parties.reporter,
            source: addresses.source,
            original: match original {
                Some(dst) => Some(Original::Address(dst)),
                None => parties.service.as_ref().map(|service| Original::Host(Arc::clone(&service.hostname))),
            },
            actual: match (&addresses.hbone, parties.security, parties.reporter) {
                (Some(Authority::Address(asked)), Security::WithinNode, Reporter::Source) => *asked,
                _ => actual,
            },
            carrier: match (&addresses.hbone, parties.security, parties.reporter) {
                // What is handed over within the process is asked for as through a tunnel, and goes through none.
                (None, ..) | (_, Security::WithinNode, _) => Carrier::Tcp,
                // A name is asked for only beyond a gateway.
                (Some(Authority::Hostname { .. }), _, Reporter::Source) => Carrier::DoubleHbone,
                (Some(_), ..) => Carrier::Hbone,
            },
        });
        Tally(self.telemetry.open(parties, addresses), listed)
    }

    /// Serves a connection on this thread or another, in turn.
    pub fn spread(self: &Arc<Self>, arrival: Arrival) {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % (self.others.len() + 1);
        match self.others.get(turn) {
            // A thread that is behind gets no more: this one keeps it.
            Some(other) => match other.try_send(arrival) {
                Ok(()) => {}
                Err(
                    mpsc::error::TrySendError::Full(arrival) | mpsc::error::TrySendError::Closed(arrival),
                ) => {
                    arrival.serve(self);
                }
            },
            None => arrival.serve(self),
        }
    }
}

/// Counts what must end before the process may.
#[derive(Debug, Default)]
pub struct Count {
    listeners: AtomicUsize,
    connections: AtomicUsize,
    tunnels: AtomicUsize,
    turned_away: AtomicUsize,
    /// When it was last told that there are no descriptors, and how many connections were refused since.
    refused: Mutex<(Option<Instant>, usize)>,
    left: Notify,
}

/// How often is told that there are no descriptors.
const TOLD_EVERY: Duration = Duration::from_secs(10);

impl Count {
    /// One more listener.
    pub fn listener(self: &Arc<Self>) -> Entered {
        Entered::new(self, |count| &count.listeners)
    }

    /// One more connection or stream.
    pub fn connection(self: &Arc<Self>) -> Entered {
        Entered::new(self, |count| &count.connections)
    }

    /// One more tunnel to a pod. A drain waits for it too, as its next stream may be on the way: a drained tunnel
    /// ends with its last stream.
    pub fn tunnel(self: &Arc<Self>) -> Entered {
        Entered::new(self, |count| &count.tunnels)
    }

    /// One connection more that its pod had no room for.
    pub fn turn_away(&self) {
        self.turned_away.fetch_add(1, Ordering::Relaxed);
    }

    /// So many connections to `pod` were refused as the process has no descriptor for them.
    pub fn refuse(&self, count: usize, pod: &PodUid) {
        if count == 0 {
            return;
        }
        self.turned_away.fetch_add(count, Ordering::Relaxed);
        let mut refused = self.refused.lock();
        refused.1 += count;
        if refused.0.is_none_or(|told| told.elapsed() >= TOLD_EVERY) {
            tracing::warn!(%pod, refused = refused.1, "out of descriptors: new connections are reset");
            *refused = (Some(Instant::now()), 0);
        }
    }

    /// How many connections were turned away.
    pub fn turned_away(&self) -> usize {
        self.turned_away.load(Ordering::Relaxed)
    }

    /// How many connections are open.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Waits until all have left.
    pub async fn zero(&self) {
        loop {
            let mut left = pin!(self.left.notified());
            left.as_mut().enable();
            if self.all() == 0 {
                return;
            }
            left.await;
        }
    }

    fn all(&self) -> usize {
        [&self.listeners, &self.connections, &self.tunnels]
            .iter()
            .map(|count| count.load(Ordering::SeqCst))
            .sum()
    }
}

/// Leaves when dropped.
#[derive(Debug)]
pub struct Entered {
    count: Arc<Count>,
    which: fn(&Count) -> &AtomicUsize,
}

impl Entered {
    fn new(count: &Arc<Count>, which: fn(&Count) -> &AtomicUsize) -> Self {
        which(count).fetch_add(1, Ordering::SeqCst);
        Self { count: Arc::clone(count), which }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        (self.which)(&self.count).fetch_sub(1, Ordering::SeqCst);
        if self.count.all() == 0 {
            self.count.left.notify_waiters();
        }
    }
}
