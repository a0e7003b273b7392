//! The ports of pods at which names are asked for.
//!
//! A daemon that hands over stops reading at once, as its successor has the same sockets with whatever is queued on
//! them, and finishes what it has read. One that only stops reads on for a while.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use parking_lot::MutexGuard;
use socket2::Domain;
use socket2::Protocol;
use socket2::Socket;
use socket2::Type;
use tokio::runtime;
use tokio::sync::Semaphore;
use tokio::sync::watch;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::lookup::Lookup;
use ztunnel_runtime::shutdown;
use ztunnel_runtime::shutdown::Signal;
use ztunnel_runtime::shutdown::Trigger;

use crate::dns::answer;
use crate::dns::counts::Counts;
use crate::dns::forward;
use crate::dns::pod::Pod;
use crate::dns::pod::Shared;
use crate::net::conntrack::Conntrack;
use crate::net::netns::Netns;
use crate::net::socket::Acceptor;
use crate::net::socket::Datagrams;
use crate::telemetry::Telemetry;

/// Where the rules send what a pod asks.
pub const PORT: u16 = 15053;
const BACKLOG: i32 = 128;

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
    handover: Mutex<Trigger>,
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
            shared: Arc::new(Shared {
                config,
                mesh,
                counts,
                resolvers,
                busy,
                signal,
                handing_over: Mutex::new(handing_over),
            }),
            runtime: handle,
            thread: Mutex::new(Some(thread)),
            pods: Mutex::default(),
            handover: Mutex::new(handover),
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
            // Where the sockets are still read for the pod before, a runtime takes them by another descriptor only.
            let again = |_taken| Datagrams::new(Arc::new(bound.udp.try_clone()?));
            let udp = Datagrams::new(Arc::clone(&bound.udp)).or_else(again)?;
            let again = |_taken| Acceptor::new(Arc::new(bound.tcp.try_clone()?));
            let tcp = Acceptor::new(Arc::clone(&bound.tcp)).or_else(again)?;
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
        self.handover.lock().drain();
    }

    /// Answers again after that, at the sockets of pods that are added from now on.
    pub fn serve_again(&self) {
        let (handover, handing_over) = shutdown::channel();
        *self.shared.handing_over.lock() = handing_over;
        *self.handover.lock() = handover;
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
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            // A panic has been reported by the thread itself.
            let _ended = thread.join();
        }
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<PodUid, Trigger>> {
        self.pods.lock()
    }
}

#[cfg(test)]
mod tests;
