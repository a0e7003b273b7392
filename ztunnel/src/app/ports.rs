//! The daemon's own ports, and the numbers of the components it is made of.

use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::SystemTime;

use socket2::Domain;
use socket2::Protocol;
use socket2::Socket;
use socket2::Type;
use tokio::net::TcpListener;
use tokio::runtime::RuntimeMetrics;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use ztunnel_mesh::source::pod::Awaited;
use ztunnel_mesh::source::status::Source;
use ztunnel_mesh::source::status::Trouble;
use ztunnel_node::admin::console::Console;
use ztunnel_node::admin::ready::Readiness;
use ztunnel_node::admin::server;
use ztunnel_node::capture::node::CounterReader;
use ztunnel_node::identity::worker::Identities;
use ztunnel_node::identity::worker::Standing;
use ztunnel_node::proxy::DataPlane;
use ztunnel_node::proxy::names::SOURCE_LABELS;
use ztunnel_node::telemetry::Telemetry;
use ztunnel_node::telemetry::metrics::Families;
use ztunnel_node::telemetry::metrics::Sample;
use ztunnel_runtime::shutdown;

use crate::app::error::RunError;
use crate::config::resolved::Run;

/// Metrics, readiness and the admin port, before anybody is answered there. Nobody else can take them any more but a
/// daemon of this node, which may still have them.
pub struct Ports {
    metrics: Reserved,
    readiness: Reserved,
    console: Vec<Reserved>,
}

/// A port that is bound and not listened on: who connects to it comes to the daemon that still has it, or is refused.
struct Reserved {
    socket: Socket,
    address: SocketAddr,
    what: &'static str,
    flag: &'static str,
}

impl Ports {
    /// Takes them.
    pub fn bind(config: &Run) -> Result<Self, RunError> {
        Ok(Self {
            metrics: Reserved::bind(
                config.metrics_addr,
                "metrics",
                "--metrics-addr (statsPort of PROXY_CONFIG)",
            )?,
            readiness: Reserved::bind(config.ready_addr, "readiness", "--ready-addr")?,
            console: Self::loopback(config.admin_port)?,
        })
    }

    /// Whoever reaches the admin port may stop the daemon, so nobody but this host does.
    fn loopback(port: u16) -> Result<Vec<Reserved>, RunError> {
        let bind = |address: SocketAddr| {
            Reserved::bind(address, "the admin port", "--admin-port (proxyAdminPort of PROXY_CONFIG)")
        };
        let mut reserved = vec![bind((Ipv4Addr::LOCALHOST, port).into())?];
        match bind((Ipv6Addr::LOCALHOST, port).into()) {
            Ok(v6) => reserved.push(v6),
            // Not every host has IPv6.
            Err(error) => tracing::info!(%error, "the admin port is served over IPv4 only"),
        }
        Ok(reserved)
    }

    /// Answers from now on.
    pub fn serve(
        self,
        telemetry: &Telemetry,
        ready: &Readiness,
        console: Console,
        signal: shutdown::Signal,
    ) -> Result<Admin, RunError> {
        let metrics = server::serve_metrics(self.metrics.listen()?, telemetry.clone(), signal.clone());
        let readiness = server::serve_readiness(self.readiness.listen()?, ready.clone(), signal.clone());
        let consoles: Result<Vec<_>, _> = self.console.into_iter().map(Reserved::listen).collect();
        let consoles = consoles?;
        let mut servers = vec![shutdown::spawn(metrics), shutdown::spawn(readiness)];
        for listener in consoles {
            servers.push(shutdown::spawn(server::serve_console(listener, console.clone(), signal.clone())));
        }
        Ok(Admin(servers))
    }
}

impl Reserved {
    fn bind(address: SocketAddr, what: &'static str, flag: &'static str) -> Result<Self, RunError> {
        let bind = || {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            socket.set_reuse_port(true)?;
            socket.set_nonblocking(true)?;
            socket.bind(&address.into())?;
            Ok(socket)
        };
        match bind() {
            Ok(socket) => Ok(Self { socket, address, what, flag }),
            Err(source) => Err(RunError::Listen { address, what, flag, source }),
        }
    }

    /// A listening socket that a daemon of the same node may have as well, for the moment of a hand-over.
    fn listen(self) -> Result<TcpListener, RunError> {
        let Self { socket, address, what, flag } = self;
        let listening = socket.listen(128).and_then(|()| TcpListener::from_std(socket.into()));
        listening.map_err(|source| RunError::Listen { address, what, flag, source })
    }
}

/// The servers. Their ports are free again when this is dropped.
pub struct Admin(Vec<JoinHandle<()>>);

impl Drop for Admin {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

/// How soon a daemon that has taken the node back tries again to have its ports, at first and at last. Whoever has taken
/// them meanwhile may keep them for ever, and nobody else says when they are free.
const AGAIN_MIN: Duration = Duration::from_millis(250);
const AGAIN_MAX: Duration = Duration::from_secs(10);

/// When to try again to have the ports, if somebody else has them.
#[derive(Debug, Default)]
pub struct Again(Option<(Instant, Duration)>);

impl Again {
    /// When to call [`Self::attempt`] again; `None` while there is no need.
    pub fn due(&self) -> Option<Instant> {
        self.0.map(|(at, _)| at)
    }

    /// Does it, or sees to it that it is tried again.
    pub fn attempt<T>(&mut self, serve: impl FnOnce() -> Result<T, RunError>) -> Option<T> {
        let before = self.0.take();
        match serve() {
            Ok(served) => {
                if before.is_some() {
                    tracing::info!("metrics, readiness and the admin port are answered again");
                }
                Some(served)
            }
            Err(error) => {
                let wait = before.map_or(AGAIN_MIN, |(_, wait)| AGAIN_MAX.min(wait * 2));
                self.0 = Some((Instant::now() + wait, wait));
                if before.is_none() {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(
                        error,
                        "metrics, readiness and the admin port are not answered; trying again"
                    );
                }
                None
            }
        }
    }

    /// It is not to be tried any more.
    pub fn give_up(&mut self) {
        self.0 = None;
    }
}

/// Has the scrape show what the programs in the kernel counted.
pub fn register_capture(
    telemetry: &Telemetry,
    counters: CounterReader,
    devices_left: Arc<AtomicU64>,
    closed: watch::Receiver<usize>,
) {
    telemetry.register(move |families: &mut Families<'_>| {
        capture_metrics(families, &counters)?;
        let help = "Devices that were taken out of captured pods into other network namespaces.";
        let left = [Sample { labels: &[], value: devices_left.load(Ordering::Relaxed) }];
        families.counter("ztunnel_capture_devices_left", help, &left)?;
        let help = "Pods that cannot be captured and are closed: their new connections are refused.";
        let closed = [Sample { labels: &[], value: *closed.borrow() as f64 }];
        families.gauge("ztunnel_capture_pods_closed", help, &closed)
    });
}

/// Has the scrape show what the components know of themselves.
pub fn register_components(
    telemetry: &Telemetry,
    data_plane: &Arc<DataPlane>,
    waiting: watch::Receiver<Arc<[Awaited]>>,
    identities: Identities,
) {
    let weak = Arc::downgrade(data_plane);
    telemetry.register(move |families: &mut Families<'_>| {
        let Some(data_plane) = weak.upgrade() else { return Ok(()) };
        proxy_metrics(families, &data_plane, waiting.borrow().len())?;
        runtime_metrics(families, &data_plane)
    });
    telemetry.register(move |families: &mut Families<'_>| certificate_metrics(families, &identities));
}

/// Has the scrape show how the sources of pods and mesh stand.
pub fn register_source(telemetry: &Telemetry, source: Source) {
    telemetry.register(move |families: &mut Families<'_>| {
        let tally = source.tally();
        let result = |result| [("result", result)];
        let labels = [result("applied"), result("rejected"), result("held")];
        let counts = [tally.applied, tally.rejected, tally.held];
        let samples: Vec<_> =
            labels.iter().zip(counts).map(|(labels, value)| Sample { labels, value }).collect();
        let help = "Versions of the mesh files, and lists of pods, by what came of them when they came.";
        families.counter("ztunnel_source_versions", help, &samples)?;
        let refusals = source.refusals();
        let state = |state| [("state", state)];
        let all = [Trouble::Rejected, Trouble::Waiting, Trouble::Held];
        let labels = all.map(|trouble| state(trouble.word()));
        let count = |trouble| refusals.iter().filter(|refused| refused.trouble == trouble).count() as f64;
        let samples: Vec<_> = labels
            .iter()
            .zip(all)
            .map(|(labels, trouble)| Sample { labels, value: count(trouble) })
            .collect();
        let help = "Sources of pods and mesh whose last version is not in force, by why.";
        families.gauge("ztunnel_source_refused", help, &samples)
    });
}

/// What the programs in the kernel counted.
fn capture_metrics(families: &mut Families<'_>, counters: &CounterReader) -> std::fmt::Result {
    let counted = counters.read();
    let labels: Vec<_> =
        counted.iter().map(|(counter, value)| ([("event", counter.name())], value)).collect();
    let samples: Vec<_> = labels.iter().map(|(labels, value)| Sample { labels, value: *value }).collect();
    let help = "Connections and packets that the programs in the kernel captured, passed or refused.";
    families.counter("ztunnel_capture_events", help, &samples)
}

/// What is known of the pods that are served, and how many are yet to be.
fn proxy_metrics(families: &mut Families<'_>, data_plane: &DataPlane, pending: usize) -> std::fmt::Result {
    let live = data_plane.live();
    let alone = |value| [Sample { labels: &[], value }];
    let help = "Pods whose connections are taken.";
    families.gauge("workload_manager_active_proxy_count", help, &alone(live.pods as f64))?;
    let help = "Pods whose connections are to be taken and are not yet.";
    families.gauge("workload_manager_pending_proxy_count", help, &alone(pending as f64))?;
    let help = "Connections and streams that are open.";
    families.gauge("ztunnel_connections_open", help, &alone(live.connections as f64))?;
    let alone = |value: usize| [Sample { labels: &[], value: value as u64 }];
    let help = "Pods whose connections were ever taken.";
    families.counter("workload_manager_proxies_started", help, &alone(live.started))?;
    let help = "Pods whose connections were taken and no longer are.";
    families.counter("workload_manager_proxies_stopped", help, &alone(live.stopped))?;
    let help = "Connections and streams turned away, as their pod had too many or the process no descriptor.";
    families.counter("ztunnel_connections_turned_away", help, &alone(live.turned_away))?;
    let budget = data_plane.budget();
    let help =
        "Connections, streams and tunnels closed as those that held most when the buffer memory was used up.";
    families.counter("ztunnel_connections_shed", help, &alone(budget.shed() as usize))?;
    let alone = |value: usize| [Sample { labels: &[], value: value as f64 }];
    let help = "Bytes that connections and tunnels hold: what is not taken, and what they cost themselves.";
    families.gauge("ztunnel_buffer_bytes", help, &alone(budget.used()))?;
    let help = "Bytes that connections and tunnels may hold (--buffer-memory).";
    families.gauge("ztunnel_buffer_limit_bytes", help, &alone(budget.limit()))?;

    let asked = data_plane.names_asked();
    let or_unknown =
        |text: &'_ Arc<str>| if text.is_empty() { Arc::from("unknown") } else { Arc::clone(text) };
    let labels = asked.keys().map(|asker| asker.source.iter().chain([&asker.hostname]).map(or_unknown));
    let labels: Vec<Vec<Arc<str>>> = labels.map(Iterator::collect).collect();
    let names = || SOURCE_LABELS.into_iter().chain(["hostname"]);
    let labels: Vec<Vec<(&str, &str)>> =
        labels.iter().map(|values| names().zip(values.iter().map(|value| &**value)).collect()).collect();
    let samples: Vec<_> =
        labels.iter().zip(asked.values()).map(|(labels, value)| Sample { labels, value: *value }).collect();
    let help = "Connections to endpoints that have no address, but a name that was resolved.";
    families.counter("istio_on_demand_dns", help, &samples)
}

/// What the runtimes of the data plane tell of themselves: each thread has its own, so each is a worker.
fn runtime_metrics(families: &mut Families<'_>, data_plane: &DataPlane) -> std::fmt::Result {
    let runtimes: Vec<_> = data_plane.runtimes().collect();
    let sum = |value: fn(&RuntimeMetrics) -> usize| {
        let sum: usize = runtimes.iter().map(value).sum();
        [Sample { labels: &[], value: sum as f64 }]
    };
    families.gauge("tokio_num_workers", "Data-plane threads.", &sum(RuntimeMetrics::num_workers))?;
    let help = "Tasks waiting in the data plane's queues for work from other threads.";
    families.gauge("tokio_global_queue_depth", help, &sum(RuntimeMetrics::global_queue_depth))?;
    let help = "Tasks of the data plane that have not ended.";
    families.gauge("tokio_num_alive_tasks", help, &sum(RuntimeMetrics::num_alive_tasks))?;

    let workers: Vec<String> = (0..runtimes.len()).map(|worker| worker.to_string()).collect();
    let labels: Vec<_> = workers.iter().map(|worker| [("worker", worker.as_str())]).collect();
    let each = |value: fn(&RuntimeMetrics) -> u64| -> Vec<Sample<'_, u64>> {
        let values = runtimes.iter().map(value);
        labels.iter().zip(values).map(|(labels, value)| Sample { labels, value }).collect()
    };
    let help = "How long a thread was busy, in seconds.";
    let busy = runtimes.iter().map(|runtime| runtime.worker_total_busy_duration(0).as_secs_f64());
    let busy: Vec<_> = labels.iter().zip(busy).map(|(labels, value)| Sample { labels, value }).collect();
    families.counter_of_seconds("tokio_worker_total_busy_duration_seconds", help, &busy)?;
    let help = "How often a thread had nothing to do.";
    families.counter("tokio_worker_park_count", help, &each(|runtime| runtime.worker_park_count(0)))?;
    let help = "How often a thread went to sleep or woke up.";
    let unparks = each(|runtime| runtime.worker_park_unpark_count(0));
    families.counter("tokio_worker_park_unpark_count", help, &unparks)
}

/// When certificates end, and how many identities have none.
fn certificate_metrics(families: &mut Families<'_>, identities: &Identities) -> std::fmt::Result {
    let standings = identities.standings();
    let end =
        |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let held = standings.iter().filter_map(|standing| {
        Some(([("identity", standing.identity.as_str())], end(standing.credentials.as_ref()?.not_after())))
    });
    let held: Vec<_> = held.collect();
    let samples: Vec<_> = held.iter().map(|(labels, value)| Sample { labels, value: *value }).collect();
    let help = "When the certificate of an identity of this node ends, in seconds since 1970.";
    families.gauge("ztunnel_certificate_expiry_timestamp_seconds", help, &samples)?;
    let count = |wanted: fn(&Standing) -> bool| standings.iter().filter(|known| wanted(known)).count() as f64;
    let failing = count(|standing| standing.failure.is_some());
    let help = "Identities of this node whose last request for a certificate failed.";
    families.gauge("ztunnel_certificates_failing", help, &[Sample { labels: &[], value: failing }])?;
    let missing = count(|standing| standing.credentials.is_none());
    let help = "Identities of this node without a certificate.";
    families.gauge("ztunnel_certificates_missing", help, &[Sample { labels: &[], value: missing }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ports_that_somebody_else_has_are_tried_again_ever_more_seldom_until_they_are_free() {
        let mut again = Again::default();
        let listener = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let mut waits = Vec::new();
        for _ in 0..8 {
            let begun = Instant::now();
            let bind = || Reserved::bind(address, "readiness", "--ready-addr").and_then(Reserved::listen);
            assert!(again.attempt(bind).is_none());
            tokio::time::sleep_until(again.due().unwrap()).await;
            waits.push(begun.elapsed().as_millis());
        }
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
        drop(listener);
        let bind = || Reserved::bind(address, "readiness", "--ready-addr").and_then(Reserved::listen);
        assert!(again.attempt(bind).is_some());
        assert_eq!(again.due(), None);
    }
}
