//! What the connections of one data-plane thread share.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use ztunnel_mesh::model::addr::Authority;
use ztunnel_mesh::model::addr::OriginalDst;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::store::MeshReader;
use ztunnel_runtime::shutdown::Signal;

use crate::hbone::pool::Pool;
use crate::identity::worker::Identities;
use crate::proxy::Config;
use crate::proxy::listing::Carrier;
use crate::proxy::listing::Connection;
use crate::proxy::listing::Listing;
use crate::proxy::listing::Original;
use crate::proxy::names::Names;
use crate::proxy::neighbours::Neighbours;
use crate::proxy::pod::Pod;
use crate::proxy::reauthorization::Reauthorization;
use crate::proxy::report::ConnectionReport;
use crate::proxy::turns::Lanes;
use crate::telemetry::AcceptedSocket;
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
    pub reauthorization: Reauthorization,
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
}

impl Shard {
    pub(super) fn new(
        config: Arc<Config>,
        mesh: MeshReader,
        identities: Identities,
        telemetry: LocalTelemetry,
        neighbours: Arc<Neighbours>,
        count: Arc<Count>,
        signal: Signal,
    ) -> Self {
        Self {
            pool: Pool::new(config.hbone.waiters_max, config.hbone.spare_timeout),
            reauthorization: Reauthorization::new(mesh.snapshot()),
            listing: Listing::default(),
            names: Names::default(),
            lanes: Lanes::default(),
            config,
            mesh,
            identities,
            telemetry,
            neighbours,
            count,
            signal,
        }
    }

    /// Tells that a connection of `pod` is open from now on, to `actual`. `original` is where its application dialled,
    /// for one that leaves the pod.
    pub fn report(
        &self,
        pod: &Pod,
        parties: Parties,
        addresses: Addresses,
        original: Option<OriginalDst>,
        actual: SocketAddr,
    ) -> ConnectionReport {
        if let Some(demand) = self.mesh.demand() {
            let Parties { source, destination, service, .. } = &parties;
            [source, destination].into_iter().flatten().for_each(|workload| demand.touch(&workload.uid));
            service.iter().for_each(|service| demand.touch(service.key.as_str()));
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
        ConnectionReport(self.telemetry.open(parties, addresses), listed)
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

/// Counts a connection for as long as it lives: for the drain, and for telemetry.
pub(super) type Counted = (Entered, AcceptedSocket);

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
