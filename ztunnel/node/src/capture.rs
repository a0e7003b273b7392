//! How the traffic of an enrolled pod reaches the daemon, and that nothing else leaves the pod.
//!
//! ```text
//!  app ─connect─▶ [connect: mark] ─▶ route table 100 ─▶ lo ─▶ [lookup] ─▶ outbound listener
//!                                                                          │ a socket of the daemon itself
//!  eth0 ◀─[guard]──────────────────────────────────────────────────────────┘
//!  eth0 ─SYN─▶ [lookup] ─▶ HBONE or inbound listener ─dial: client's address, mark REPLY, lo─▶ app
//! ```
//!
//! Whose a connection is, is written down with its socket when it begins. What is a pod's own goes to loopback or
//! nowhere: that is looked at before a packet comes to any device, so rules, marks and devices do not matter.
//!
//! No packet is rewritten and no connection tracked. Programs, maps and links are pinned, so a dead daemon
//! leaves pods closed, not open, and the next one takes over by putting its listeners into the slots.
//!
//! Every change is idempotent and ordered so that a pod is never half open: closed parts first on the way in,
//! last on the way out. Knows nothing of what is done with a connection, nor why a pod is enrolled.
//!
//! Needs Linux 6.6: the guard is a tcx link, and without it no pod is enrolled. All of this but the listeners is left
//! out where a node agent redirects pods' traffic itself: see [`rules`].

mod changes;
pub mod error;
pub mod guards;
pub mod host;
mod listeners;
mod maps;
mod netlink;
pub mod node;
mod own_sockets;
pub mod ownership;
mod pins;
mod pod;
mod programs;
pub mod reconcile;
mod routes;
pub mod rules;
pub mod selftest;
mod shut;
mod sys;
mod sysctls;
pub mod uninstall;

use std::collections::HashMap;
use std::net::{IpAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use ztunnel_mesh::model::addr::PodUid;

use crate::net::netns::Netns;

/// Where capture keeps its state and what it attaches to.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of the pins; a bpf file system is mounted if it is not on one.
    pub pin_dir: PathBuf,
    /// Root of cgroup v2 (see [`host::cgroup_root`]).
    pub cgroup_root: PathBuf,
    /// Cgroup of the kubelet's pods, relative to `cgroup_root`; `None` looks at the usual places.
    pub kubepods: Option<PathBuf>,
    /// A path that opens the host's network namespace.
    pub host_netns: PathBuf,
}

/// A pod to capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    /// This incarnation of the pod.
    pub uid: PodUid,
    /// A path that opens its network namespace.
    pub netns: PathBuf,
    /// Its addresses, the primary one of each family first.
    pub addresses: Vec<IpAddr>,
}

/// The three listeners of a pod: non-blocking, dual-stack (IPv4 only where the kernel has no IPv6),
/// `IP_TRANSPARENT`, in the pod's namespace. Accepted sockets inherit `TCP_NODELAY` and keep-alive (180 s).
/// `local_addr` of an accepted socket is the original destination.
#[derive(Debug)]
pub struct Listeners {
    /// Connections the pod opens.
    pub outbound: Arc<TcpListener>,
    /// Plaintext connections to the pod.
    pub inbound: Arc<TcpListener>,
    /// HBONE tunnels to the pod.
    pub hbone: Arc<TcpListener>,
}

/// A pod's listeners and namespace.
#[derive(Debug)]
pub struct Captured {
    /// For the data plane. The node keeps them too until the pod is withdrawn, to put them back into its slot.
    pub listeners: Arc<Listeners>,
    /// For sockets that have to be made inside the pod.
    pub netns: Arc<Netns>,
}

/// The capture of one node. All methods block (for milliseconds) and belong on one control thread.
pub struct Node {
    config: Config,
    pins: pins::Pins,
    maps: maps::Maps,
    host: Netns,
    own_sockets: Arc<own_sockets::OwnSockets>,
    /// Our number; a higher one in the map means another daemon owns the node.
    generation: u64,
    loader: programs::Loader,
    /// The programs differ from those the last daemon left, so each link is given the new ones, once.
    renew: bool,
    /// Our own hold on the node-wide programs, by name.
    links: HashMap<&'static str, OwnedFd>,
    watch: reconcile::Watch,
    /// Pods for which there is no slot.
    unslotted: HashMap<PodUid, shut::Unslotted>,
    /// Devices that were taken out of pods' namespaces into others.
    devices_left: Arc<AtomicU64>,
    /// What we have enrolled, written by `bind`, `capture`, `withdraw`, `close` and `forget`.
    pods: HashMap<PodUid, Enrolled>,
}

/// Intent for one pod.
#[derive(Debug)]
struct Enrolled {
    slot: u32,
    cookie: u64,
    netns: Arc<Netns>,
    spec: PodSpec,
    /// The links are still to be given new programs.
    renew: bool,
    /// What `capture` was given; `None` before it and after `withdraw` or `close`. The reconciler keeps it so.
    listeners: Option<Arc<Listeners>>,
    /// It could not be captured, or no longer: new connections are refused until it can.
    closed: bool,
    /// It has more addresses than the programs are told of, and that was said.
    crowded: bool,
    /// What the reconciler found.
    watched: reconcile::Watched,
    /// Our own hold on the programs, so that they stay attached when their pins are deleted.
    links: Links,
}

/// The links of one pod.
#[derive(Debug, Default)]
struct Links {
    lookup: Option<OwnedFd>,
    guards: guards::Guards,
}
