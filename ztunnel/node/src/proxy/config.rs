//! How the data plane behaves, and whose connections it takes.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::model::workload::Workload;

use crate::hbone;
use crate::net::socket::Keepalive;

/// How the data plane behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Data-plane threads. By default half as many as there are cores, so that the pods have the others, but two
    /// as soon as there are two cores: on one thread alone each connection waits for the cryptography of all.
    pub threads: usize,
    /// A dial that takes longer is given up.
    pub connect_timeout: Duration,
    /// A peer that has not answered a request after so long will not: longer than peers take to dial an
    /// application that does not answer them.
    pub answer_timeout: Duration,
    /// How long listeners go on accepting once the drain has begun: who has begun to connect gets through.
    pub linger: Duration,
    /// How long a removed pod is served as before, by whoever still believes that it is there: peers and connections
    /// that have already begun. What arrives later is refused.
    pub fade: Duration,
    /// Connections one pod may have open, streams included. Further ones are reset (streams: 503).
    pub pod_connections_max: usize,
    /// Tunnels peers may have open to one pod, those without streams included. Further ones are reset. One identity
    /// may have a part of them ([`crate::proxy::tunnels`]).
    pub pod_tunnels_max: usize,
    /// TLS handshakes in progress with one pod as the server. One source may have a part of them; the oldest make room
    /// for others ([`crate::proxy::handshakes`]), or further connections to its HBONE port are reset: peers dial again.
    pub pod_handshakes_max: usize,
    /// Bytes that all pods together may make the daemon hold: what peers and applications do not take, and what
    /// connections and tunnels cost themselves. When it is used up, those who hold most are closed.
    pub buffer_memory: usize,
    /// Accepted sockets on their way to another thread. When full the accepting thread keeps them.
    pub handover_max: usize,
    /// Whether connections between two pods of this daemon are handed over inside the process
    /// ([`crate::proxy::same_node`]). Otherwise they go through a tunnel as all others do.
    pub same_node: bool,
    /// Probes on dialled and accepted connections.
    pub keepalive: Keepalive,
    /// The network this proxy is in, where it was told (`NETWORK`): a client that says it is in another one came through
    /// a gateway. Otherwise that of the pod counts.
    pub network: Option<Arc<str>>,
    /// Whether clients are told in the answer who serves them, and what they are told so is believed.
    pub response_baggage: bool,
    /// Whether a waypoint that is told of connections by the PROXY protocol is dialled at the loopback address, from
    /// there, so that it need not listen anywhere else.
    pub localhost_app_tunnel: bool,
    /// Tunnels.
    pub hbone: hbone::Config,
}

impl Config {
    /// The network that the pod of `workload` is in, to peers of other ones.
    pub(crate) fn network_of<'a>(&'a self, workload: &'a Workload) -> &'a str {
        self.network.as_deref().unwrap_or(&workload.network)
    }
}

impl Default for Config {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            threads: (cores / 2).max(2).min(cores),
            connect_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(15),
            linger: Duration::from_secs(3),
            fade: Duration::from_secs(5),
            pod_connections_max: 20_000,
            pod_tunnels_max: 10_000,
            pod_handshakes_max: 1024,
            buffer_memory: 256 << 20,
            handover_max: 1024,
            same_node: true,
            keepalive: Keepalive::default(),
            network: None,
            response_baggage: true,
            localhost_app_tunnel: true,
            hbone: hbone::Config::default(),
        }
    }
}

/// A pod whose connections are to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    /// This incarnation of the pod.
    pub uid: PodUid,
    /// Which workload of the mesh it is.
    pub workload: Named,
    /// Its addresses, in canonical form.
    pub addresses: Vec<IpAddr>,
}
