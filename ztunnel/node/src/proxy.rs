//! One connection, from accept to last byte.
//!
//! Owns the data-plane threads and every connection on them. A connection takes a snapshot of the mesh, asks
//! [`ztunnel_mesh::route`] where it goes or [`ztunnel_mesh::policy`] whether it may, dials, and moves bytes; what happened is
//! told to [`crate::telemetry`]. It knows no control plane and waits for none, but for a first certificate.
//!
//! A connection, its tunnel and its buffers stay on one thread. The listeners of a pod are accepted from on one
//! thread, which spreads what it accepts over all of them.
//!
//! # Which snapshot decides
//!
//! The snapshot that knows the pod's workload decides where a connection goes. Another one is taken only here:
//!
//! * [`admit`] and [`passthrough`], whether an inbound connection may proceed
//!   ([`Reauthorization::admit`](reauthorization::Reauthorization::admit)). That one has to be taken after the connection was
//!   registered, or a change between would be seen by nobody. Policies decide about the address that is then dialled, which
//!   is not decided again; so no verdict is about another address.
//! * Where the mesh lacks what it names itself (a waypoint, a gateway, a service), or is asked on demand: [`outbound`] and
//!   [`admit`] decide anew, as a whole, by each later one, and keep nothing of the decision before. Of the pod itself
//!   they keep what they knew: who dials is who it was at the beginning.
//! * [`same_node`] looks at the destination once more, as no handshake proves who it is now. That only says whether the
//!   connection is handed over: if it is another one than the plan expects, it goes through the tunnel of the plan.
//! * A tunnel that a peer dials takes one for the identity it shows. Its streams take their own: a tunnel outlives many
//!   versions of the mesh.
//! * The report on a connection that has no plan, and what is in use of a mesh on demand: nothing is decided by them.
//!
//! # Who uses whom
//!
//! Where connections come from and what serves them; none of these imports another but `accept`, which starts them, and
//! `outbound`, which may hand over or go through a gateway:
//!
//! * [`accept`]: listeners, and the threads that take from them.
//! * [`outbound`]: what the pod dials.
//! * [`double_hbone`]: what it dials of another network, through a tunnel within a tunnel.
//! * [`same_node`]: connections from one pod to another of this node.
//! * [`inbound`]: tunnels that peers dial to the pod.
//! * [`passthrough`]: plain connections to the pod.
//!
//! What they are made of, which knows none of them:
//!
//! * [`upstream`]: opens a stream to a peer, on a tunnel.
//! * [`connect_error`]: why a connection that a pod dialled was not made.
//! * [`admit`]: decides on a request for an application of a pod.
//! * [`delivery`]: dials that application.
//! * [`neighbours`]: the pods to which connections can be handed over.
//! * [`relay`]: moving bytes between an application and a stream.
//! * [`reauthorization`]: inbound connections are authorized again when the mesh changes.
//! * [`listing`]: which connections are open, for those who ask.
//! * [`config`], [`bounds`]: how it behaves, and how much all of it may be.
//! * [`handshakes`], [`tunnels`]: how peers share a pod's.
//! * [`turns`]: how all share a thread.
//! * [`pod`], [`shard`]: what the connections of a pod and of a thread share.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::future::Future;
use std::hash::DefaultHasher;
use std::hash::Hash;
use std::hash::Hasher;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use parking_lot::MutexGuard;
use tokio::runtime;
use tokio::sync::mpsc;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::store::MeshReader;
use ztunnel_runtime::shutdown;
use ztunnel_runtime::shutdown::Signal;
use ztunnel_runtime::shutdown::Trigger;

use crate::identity::worker::Identities;
use crate::net::budget::Budget;
use crate::net::bypass::Bypass;
use crate::net::netns::Netns;
use crate::net::redirected::RedirectedPod;
use crate::net::redirected::Settings;
use crate::net::reserve;
use crate::net::socket::CapturedPod;
use crate::net::socket::LOCAL_CONGESTION;
use crate::net::socket::PodNetwork;
use crate::net::socket::prepare_listener;
use crate::net::socket::set_congestion;
use crate::proxy::accept::DataThread;
use crate::proxy::accept::Listener;
use crate::proxy::listing::Connection;
use crate::proxy::neighbours::Neighbours;
use crate::proxy::pod::Own;
use crate::proxy::pod::Pod;
use crate::proxy::shard::Count;
use crate::proxy::shard::Shard;
use crate::telemetry::Telemetry;

pub mod accept;
pub mod admit;
pub mod bounds;
pub mod config;
pub mod connect_error;
pub mod delivery;
pub mod double_hbone;
pub mod handshakes;
pub mod inbound;
pub mod listing;
pub mod names;
pub mod neighbours;
pub mod outbound;
pub mod passthrough;
pub mod pod;
pub mod reauthorization;
pub mod relay;
pub mod report;
pub mod same_node;
pub mod shard;
pub mod tunnels;
pub mod turns;
pub mod upstream;

pub use crate::proxy::config::Config;
pub use crate::proxy::config::PodSpec;

#[cfg(test)]
mod tests;

/// Where a pod's connections arrive: sockets in its network namespace, transparent. Shared, because who redirects
/// traffic to them may have to do so again.
#[derive(Debug)]
pub struct Listeners {
    /// What the pod dials.
    pub outbound: Arc<TcpListener>,
    /// Plain connections to the pod.
    pub inbound: Arc<TcpListener>,
    /// Tunnels to the pod.
    pub hbone: Arc<TcpListener>,
}

/// A removed pod whose open connections go on, for now or until their end.
#[derive(Debug)]
pub struct Leaving(Weak<Pod>);

impl Leaving {
    /// Whether the last of its connections has ended.
    pub fn is_over(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// How long the connections of a removed pod whose traffic was redirected may go on once it takes no new ones.
const CLOSE_AFTER: Duration = Duration::from_secs(1);

/// A pod whose connections are taken.
struct Served {
    home: runtime::Handle,
    pod: Arc<Pod>,
    stop: Trigger,
    /// Where what is open ends soon after the pod's removal; also what it had open before it was handed over and taken
    /// back.
    closers: Vec<Trigger>,
    /// What its workload was known by when it came: the mesh may forget it before its last connection has ended.
    workload: Named,
}

impl Served {
    fn told(&self) -> ServedPod {
        ServedPod { uid: self.pod.uid.clone(), workload: self.workload.clone() }
    }

    /// Takes no new connections after `fade`, or once `hurry` says so. Peers are told to open no new streams then.
    fn leave(self, fade: impl Future<Output = ()> + Send + 'static) -> Leaving {
        let leaving = Leaving(Arc::downgrade(&self.pod));
        let Self { home, pod, stop, closers, workload: _ } = self;
        // Nobody redirects for it any more: see `Pod::unrouted`.
        closers.iter().for_each(Trigger::drain);
        // Tasks go to the runtime whose context this is: the home thread's.
        let _context = home.enter();
        shutdown::spawn(async move {
            fade.await;
            stop.drain();
            // Only its connections keep it from here on.
            drop(pod);
            if !closers.is_empty() {
                tokio::time::sleep(CLOSE_AFTER).await;
                closers.iter().for_each(Trigger::close);
            }
        });
        leaving
    }

    /// Takes no new connections.
    fn leave_now(self) -> Leaving {
        self.stop.drain();
        self.leave(std::future::ready(()))
    }
}

/// Pods that are not served any more, or are none of the node's, and may have open connections. Looked through, and
/// those without any forgotten, whenever there is one more.
#[derive(Debug, Default)]
struct Apart(Vec<(ServedPod, Weak<Pod>)>);

impl Apart {
    fn add(&mut self, served: &Served) {
        self.0.retain(|(_, pod)| pod.strong_count() > 0);
        self.0.push((served.told(), Arc::downgrade(&served.pod)));
    }

    fn all(&self) -> impl Iterator<Item = &ServedPod> {
        self.0.iter().filter(|(_, pod)| pod.strong_count() > 0).map(|(told, _)| told)
    }
}

/// How much is going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activity {
    /// Pods whose connections are taken.
    pub pods: usize,
    /// Connections and streams open, those being dialled included.
    pub connections: usize,
    /// Connections, streams and tunnels turned away because their pod had too many.
    pub turned_away: usize,
    /// Pods whose connections were ever taken.
    pub started: usize,
    /// Pods whose connections were taken and no longer are.
    pub stopped: usize,
}

/// A pod that is served, as those see it who ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedPod {
    /// This incarnation of the pod.
    pub uid: PodUid,
    /// What its workload in the mesh is known by.
    pub workload: Named,
}

/// The data plane: its threads run from [`DataPlane::start`] until the signal closes.
pub struct DataPlane {
    config: Arc<Config>,
    bypass: Arc<dyn Bypass>,
    threads: Vec<Arc<DataThread>>,
    running: Mutex<Vec<JoinHandle<()>>>,
    pods: Mutex<HashMap<PodUid, Served>>,
    /// Removed pods that are still served for now: who is dropped here is no longer.
    fading: Mutex<HashMap<PodUid, Trigger>>,
    /// This proxy's own pod, which is none of those.
    own: Mutex<Option<Served>>,
    apart: Mutex<Apart>,
    neighbours: Arc<Neighbours>,
    count: Arc<Count>,
    budget: Budget,
    started: AtomicUsize,
    /// Ends the accepting of all pods that were added so far, as a drain does, without one.
    handover: Mutex<(Trigger, Signal)>,
}

impl DataPlane {
    /// Starts the threads. They end when `signal` closes, dropping what is open; everything dropped before its
    /// end is reset, so that nobody takes a part for the whole.
    pub fn start(
        config: Config,
        mesh: MeshReader,
        identities: Identities,
        telemetry: &Telemetry,
        bypass: Arc<dyn Bypass>,
        signal: Signal,
    ) -> io::Result<Self> {
        let config = Arc::new(config);
        let (neighbours, count) = (Arc::new(Neighbours::default()), Arc::new(Count::default()));
        let mut channels: Vec<_> =
            (0..config.threads.max(1)).map(|_| mpsc::channel(config.handover_max)).collect();
        let senders: Vec<_> = channels.iter().map(|(sender, _)| sender.clone()).collect();
        let mut threads = Vec::with_capacity(channels.len());
        let mut running = Vec::with_capacity(channels.len());
        for (index, (_, accepted)) in channels.drain(..).enumerate() {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            let shard = Shard::new(
                Arc::clone(&config),
                mesh.clone(),
                identities.clone(),
                telemetry.local(),
                Arc::clone(&neighbours),
                Arc::clone(&count),
                signal.clone(),
            );
            // The other threads, the next one first, so that each home begins elsewhere.
            let others = senders.iter().cycle().skip(index + 1).take(senders.len() - 1).cloned().collect();
            let thread = Arc::new(DataThread::new(Arc::new(shard), runtime.handle().clone(), others));
            threads.push(Arc::clone(&thread));
            let started = std::thread::Builder::new()
                .name(format!("data-{index}"))
                .spawn(move || runtime.block_on(thread.run(accepted)))?;
            running.push(started);
        }
        let budget = Budget::new(config.buffer_memory);
        reserve::keep();
        Ok(Self {
            config,
            bypass,
            threads,
            running: Mutex::new(running),
            pods: Mutex::default(),
            fading: Mutex::default(),
            own: Mutex::default(),
            apart: Mutex::default(),
            neighbours,
            count,
            budget,
            started: AtomicUsize::new(0),
            handover: Mutex::new(shutdown::channel()),
        })
    }

    /// Takes the pod's connections from now on. A pod of the same UID is replaced: its listeners close, its
    /// connections go on, unless its traffic was redirected ([`Self::add_redirected_pod`]) in another network namespace.
    pub fn add_pod(&self, pod: PodSpec, listeners: Listeners, netns: Arc<Netns>) -> io::Result<()> {
        let id = netns.id();
        let network = CapturedPod::new(
            netns,
            pod.addresses.clone(),
            Arc::clone(&self.bypass),
            self.config.keepalive.clone(),
            self.config.hbone.congestion.clone(),
        );
        for listener in [&listeners.outbound, &listeners.inbound, &listeners.hbone] {
            prepare_listener(listener, &self.config.keepalive)?;
        }
        self.add(pod, listeners, id, Arc::new(network), None)
    }

    /// [`Self::add_pod`] for a pod whose traffic is redirected by a node agent's rules, to listeners that hand down
    /// `settings`. When it is removed or replaced, what is open is closed soon after.
    pub fn add_redirected_pod(
        &self,
        pod: PodSpec,
        listeners: Listeners,
        netns: Arc<Netns>,
        settings: Arc<Settings>,
    ) -> io::Result<()> {
        let id = netns.id();
        let network = RedirectedPod::new(netns, settings, self.config.hbone.congestion.clone());
        self.add(pod, listeners, id, Arc::new(network), Some(shutdown::channel()))
    }

    /// Takes tunnels to this proxy's own pod from now on, for what `own` says peers may have of it. It is no pod of the
    /// node: it is neither counted nor listed, and dials nobody. `netns` is its network namespace.
    pub fn add_own(
        &self,
        spec: PodSpec,
        own: Own,
        hbone: Arc<TcpListener>,
        netns: Arc<Netns>,
        settings: Arc<Settings>,
    ) -> io::Result<()> {
        let id = netns.id();
        let network: Arc<dyn PodNetwork> = Arc::new(RedirectedPod::new(netns, settings, None));
        prepare_listener(&hbone, &self.config.keepalive)?;
        self.set_congestion(&hbone);
        let (stop, stopped) = shutdown::channel();
        let share = self.budget.share(spec.uid.to_string());
        let handing_over = self.handing_over();
        let pod = Pod::new(spec, id, network, stopped, None, handing_over, share).owned(own);
        let served = self.take(Arc::new(pod), [(accept::Kind::Hbone, hbone)], stop, None)?;
        self.apart_locked().add(&served);
        *self.own.lock() = Some(served);
        Ok(())
    }

    fn set_congestion(&self, hbone: &TcpListener) {
        if let Some(congestion) = &self.config.hbone.congestion {
            set_congestion(hbone, congestion);
        }
    }

    fn add(
        &self,
        spec: PodSpec,
        listeners: Listeners,
        netns: (u64, u64),
        network: Arc<dyn PodNetwork>,
        closed: Option<(Trigger, Signal)>,
    ) -> io::Result<()> {
        let (closed, when_closed) = closed.unzip();
        set_congestion(&*listeners.outbound, LOCAL_CONGESTION);
        self.set_congestion(&listeners.hbone);
        let (stop, stopped) = shutdown::channel();
        let uid = spec.uid.clone();
        let share = self.budget.share(uid.to_string());
        let handing_over = self.handing_over();
        let pod = Arc::new(Pod::new(spec, netns, network, stopped, when_closed, handing_over, share));
        let listeners = [
            (accept::Kind::Outbound, listeners.outbound),
            (accept::Kind::Inbound, listeners.inbound),
            (accept::Kind::Hbone, listeners.hbone),
        ];
        let served = self.take(pod, listeners, stop, closed)?;
        self.fading().remove(&uid);
        let mut pods = self.pods();
        match pods.insert(uid.clone(), served) {
            // What is open goes on under the same rules.
            Some(replaced) if replaced.pod.netns == netns => {
                self.apart_locked().add(&replaced);
                replaced.stop.drain();
                if let Some(served) = pods.get_mut(&uid) {
                    served.closers.extend(replaced.closers);
                }
            }
            Some(replaced) => {
                self.apart_locked().add(&replaced);
                replaced.leave_now();
            }
            None => {
                self.started.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Accepts on the listeners of `pod`, on its home thread.
    fn take<const N: usize>(
        &self,
        pod: Arc<Pod>,
        listeners: [(accept::Kind, Arc<TcpListener>); N],
        stop: Trigger,
        closed: Option<Trigger>,
    ) -> io::Result<Served> {
        let home = &self.threads[self.home_of(&pod)];
        // Tasks go to the runtime whose context this is: the home thread's.
        let _context = home.runtime.enter();
        for (kind, listener) in listeners {
            let listener = Listener::new(kind, listener)?;
            shutdown::spawn(listener.run(Arc::clone(home), Arc::clone(&pod), self.count.listener()));
        }
        let known = match pod.named() {
            Named::Uid(uid) => home.shard.mesh.snapshot().workload(uid).map(|workload| Named::of(workload)),
            Named::Pod { .. } => None,
        };
        let workload = known.unwrap_or_else(|| pod.named().clone());
        let closers = closed.into_iter().collect();
        Ok(Served { home: home.runtime.clone(), pod, stop, closers, workload })
    }

    /// The pod's traffic is redirected to its listeners from now on: connections of other pods may be handed over to
    /// it directly ([`same_node`]), until it is removed or [`Self::no_neighbour`] says otherwise. Not before: a connection
    /// must not reach a pod past what the kernel says of it.
    pub fn neighbour(&self, uid: &PodUid) {
        if let Some(served) = self.pods().get(uid) {
            self.neighbours.add(&served.pod);
        }
    }

    /// The pod's traffic is about to be redirected here no longer. Connections that are being handed over get
    /// through, further ones take the way over the wire.
    pub fn no_neighbour(&self, uid: &PodUid) {
        self.neighbours.remove(uid);
    }

    /// [`Self::no_neighbour`] for all pods: another process may redirect any of them from now on.
    pub fn no_neighbours(&self) {
        self.neighbours.clear();
    }

    /// The pod's traffic is redirected here no longer. Who does not know that yet, peers above all, is served as before
    /// for [`Config::fade`]. Then it takes no new connections, and lets those that are open go on until their end: of a
    /// redirected pod for a moment only ([`Self::add_redirected_pod`]). Peers are told to open no new streams on their
    /// tunnels to it; its own tunnels close with their last stream.
    pub fn remove_pod(&self, uid: &PodUid) -> Option<Leaving> {
        self.neighbours.remove(uid);
        let mut pods = self.pods();
        let served = pods.remove(uid)?;
        // Before it can be missed among the others.
        self.apart_locked().add(&served);
        drop(pods);
        let (until, mut hurry) = (self.config.fade, shutdown::channel());
        let mut fading = self.fading();
        fading.retain(|_, trigger| trigger.is_heard());
        fading.insert(uid.clone(), hurry.0);
        Some(served.leave(async move {
            let _either = tokio::time::timeout(until, hurry.1.draining()).await;
        }))
    }

    /// Takes tunnels to the pod here as well, until it is removed: where the sockets are not redirected to any more that
    /// were given with it.
    pub fn take_tunnels(&self, uid: &PodUid, hbone: Arc<TcpListener>) -> io::Result<()> {
        prepare_listener(&hbone, &self.config.keepalive)?;
        self.set_congestion(&hbone);
        let pods = self.pods();
        let Some(served) = pods.get(uid) else { return Ok(()) };
        let home = &self.threads[self.home_of(&served.pod)];
        let _context = home.runtime.enter();
        let listener = Listener::new(accept::Kind::Hbone, hbone)?;
        shutdown::spawn(listener.run(Arc::clone(home), Arc::clone(&served.pod), self.count.listener()));
        Ok(())
    }

    /// The thread on which the pod's listeners are.
    fn home_of(&self, pod: &Pod) -> usize {
        let mut hasher = DefaultHasher::new();
        pod.uid.hash(&mut hasher);
        hasher.finish() as usize % self.threads.len()
    }

    /// Hands over to another process that has its own listeners in the same pods: goes on accepting for
    /// [`Config::linger`] what has already been queued here, then closes the listeners and lets what is open
    /// finish. The drain signal does the same.
    pub fn stop_accepting(&self) {
        self.neighbours.clear();
        self.handover().0.drain();
    }

    /// Hands over to another process that has the same listening sockets: stops accepting at once, as whatever is
    /// queued is that process's to take, and lets what is open finish.
    pub fn hand_over_sockets(&self) {
        self.neighbours.clear();
        // Its listener is not one of those: the other process may be in another pod, or share the port.
        if let Some(own) = self.own.lock().take() {
            own.leave_now();
        }
        self.handover().0.close();
    }

    /// Takes connections again after [`Self::stop_accepting`] or [`Self::hand_over_sockets`]: of pods that are added from
    /// now on, those from before among them. What those had open goes on to its end.
    pub fn serve_again(&self) {
        *self.handover() = shutdown::channel();
    }

    /// Waits until no connection and no tunnel to a pod is open and no listener accepts. Only a drain, [`Self::stop_accepting`] or the
    /// removal of all pods makes that so.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + 'static {
        let count = Arc::clone(&self.count);
        async move { count.zero().await }
    }

    /// Waits for the threads to end, which they do when the signal closes, so that what they drop is reset before
    /// the process ends and its sockets are closed in order.
    pub fn join(&self) {
        let mut running = self.running.lock();
        for thread in running.drain(..) {
            // A panic has been reported by the thread itself.
            let _ended = thread.join();
        }
    }

    /// How much is going on now.
    pub fn live(&self) -> Activity {
        // Under the lock both change together.
        let (pods, started) = {
            let pods = self.pods();
            (pods.len(), self.started.load(Ordering::Relaxed))
        };
        Activity {
            pods,
            connections: self.count.connections(),
            turned_away: self.count.turned_away(),
            started,
            stopped: started.saturating_sub(pods),
        }
    }

    /// What the pods make the daemon hold, and what they may.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Who asked what names of endpoints stand for, and how often.
    pub fn names_asked(&self) -> BTreeMap<names::LookupLabels, u64> {
        let mut all = BTreeMap::new();
        for (labels, count) in self.shards().flat_map(|shard| shard.names.counted()) {
            *all.entry(labels).or_default() += count;
        }
        all
    }

    /// The pods whose connections are taken, in no order.
    pub fn served(&self) -> Vec<ServedPod> {
        let pods = self.pods();
        let pods = pods.values().map(|served| &served.pod);
        pods.map(|pod| ServedPod { uid: pod.uid.clone(), workload: pod.named().clone() }).collect()
    }

    /// The pods that are not served and may have open connections: those that were, until these have ended, and this
    /// proxy's own.
    pub fn apart(&self) -> Vec<ServedPod> {
        self.apart_locked().all().cloned().collect()
    }

    /// The connections and streams that are open, in no order. Not for a data-plane thread; those wait for it no
    /// longer than it takes to copy a few hundred entries.
    pub fn connections(&self) -> Vec<Connection> {
        self.shards().flat_map(|shard| shard.listing.all()).collect()
    }

    /// What the runtimes of the threads tell of themselves, in the order of the threads.
    pub fn runtimes(&self) -> impl Iterator<Item = runtime::RuntimeMetrics> {
        self.threads.iter().map(|thread| thread.runtime.metrics())
    }

    fn shards(&self) -> impl Iterator<Item = &Arc<Shard>> {
        self.threads.iter().map(|thread| &thread.shard)
    }

    fn apart_locked(&self) -> MutexGuard<'_, Apart> {
        self.apart.lock()
    }

    fn handover(&self) -> MutexGuard<'_, (Trigger, Signal)> {
        self.handover.lock()
    }

    fn handing_over(&self) -> Signal {
        self.handover().1.clone()
    }

    fn fading(&self) -> MutexGuard<'_, HashMap<PodUid, Trigger>> {
        self.fading.lock()
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<PodUid, Served>> {
        self.pods.lock()
    }
}
