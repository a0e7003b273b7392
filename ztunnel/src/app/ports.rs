//! The daemon's own ports, and the numbers of the components it is made of.

use std::net::SocketAddr;
use std::sync::Arc;

use socket2::Domain;
use socket2::Protocol;
use socket2::Socket;
use socket2::Type;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::admin::ready::Readiness;
use crate::admin::server;
use crate::app::RunError;
use crate::capture::node::CounterReader;
use crate::config::resolved::Run;
use crate::proxy::DataPlane;
use crate::shutdown;
use crate::telemetry::Telemetry;
use crate::telemetry::metrics::Families;
use crate::telemetry::metrics::Sample;

/// Metrics and readiness. Their ports are free again when this is dropped.
pub struct Admin([JoinHandle<()>; 2]);

impl Admin {
    /// Starts to listen; another daemon of this node may still have the same ports.
    pub fn start(
        config: &Run,
        telemetry: &Telemetry,
        ready: &Readiness,
        signal: shutdown::Signal,
    ) -> Result<Self, RunError> {
        let metrics = server::serve_metrics(listen(config.metrics_addr)?, telemetry.clone(), signal.clone());
        let readiness = server::serve_readiness(listen(config.ready_addr)?, ready.clone(), signal);
        Ok(Self([shutdown::spawn(metrics), shutdown::spawn(readiness)]))
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

/// A listening socket that a daemon of the same node may have as well, for the moment of a hand-over.
fn listen(address: SocketAddr) -> Result<TcpListener, RunError> {
    let bind = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(128)?;
        TcpListener::from_std(socket.into())
    };
    bind().map_err(|source| RunError::Listen(address, source))
}

/// Has the scrape show what the programs in the kernel counted, and the pods that are served.
pub fn register_metrics(telemetry: &Telemetry, counters: CounterReader, data_plane: &Arc<DataPlane>) {
    telemetry.register(move |families: &mut Families<'_>| capture_metrics(families, &counters));
    register_proxies(telemetry, data_plane);
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

/// What is known of the pods that are served.
pub fn register_proxies(telemetry: &Telemetry, data_plane: &Arc<DataPlane>) {
    let data_plane = Arc::downgrade(data_plane);
    telemetry.register(move |families: &mut Families<'_>| {
        let Some(data_plane) = data_plane.upgrade() else { return Ok(()) };
        let live = data_plane.live();
        let alone = |value| [Sample { labels: &[], value }];
        let help = "Pods whose connections are taken.";
        families.gauge("workload_manager_active_proxy_count", help, &alone(live.pods as f64))?;
        let help = "Connections and streams that are open.";
        families.gauge("ztunnel_connections_open", help, &alone(live.connections as f64))?;
        let help = "Connections and streams turned away because their pod had too many.";
        let turned_away = [Sample { labels: &[], value: live.turned_away as u64 }];
        families.counter("ztunnel_connections_turned_away", help, &turned_away)
    });
}
