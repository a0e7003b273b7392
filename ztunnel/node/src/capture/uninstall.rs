//! Removing everything capture has ever set up on this node.

use std::collections::HashMap;
use std::fmt;

use ztunnel_ebpf_abi::{STATE_GENERATION, STATE_MOUNTED};
use ztunnel_mesh::model::addr::PodUid;

use super::error::WithdrawError;
use super::maps::Maps;
use super::own_sockets::OwnSockets;
use super::pins::Pins;
use super::programs::Loader;
use super::reconcile::Watch;
use super::{Config, Node, host};
use crate::net::netns::Netns;

/// What was removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removed {
    /// Pods that were captured.
    pub pods: Vec<PodUid>,
    /// Versions of the pinned state.
    pub versions: Vec<String>,
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pods and {} versions of pinned state removed", self.pods.len(), self.versions.len())
    }
}

/// Why something is left.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    /// A pod.
    #[error("cannot remove pod {pod}")]
    Pod {
        /// Which.
        pod: PodUid,
        /// Why.
        #[source]
        source: WithdrawError,
    },
    /// The probe addresses or pins.
    #[error("cannot remove {what}")]
    Remove {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Opens up every pod and removes pins, probe addresses and, if we made it, the mount. Open connections of
/// captured pods break. Stop the daemon first: a running one would put things back.
pub fn uninstall(config: &Config) -> Result<Removed, UninstallError> {
    let mut removed = Removed::default();
    let current = Pins::new(&config.pin_dir);
    if !config.pin_dir.exists() {
        return Ok(removed);
    }
    let failed = |what| move |source| UninstallError::Remove { what, source };
    let host = Netns::open(&config.host_netns).map_err(failed("the probe addresses"))?;
    let mut mounted = false;
    if let Ok(maps) = Maps::open(&current) {
        mounted = maps.state.get(&STATE_MOUNTED, 0).is_ok_and(|flag| flag == 1);
        let own_sockets = maps.sockets.try_clone().map_err(failed("the pins"))?;
        let own = Netns::open(&config.host_netns).map_err(failed("the probe addresses"))?;
        let mut node = Node {
            config: config.clone(),
            pins: current.clone(),
            loader: Loader::new(&current),
            generation: maps.state.get(&STATE_GENERATION, 0).unwrap_or(0) + 1,
            maps,
            host: own,
            own_sockets: std::sync::Arc::new(OwnSockets(own_sockets)),
            renew: false,
            links: HashMap::new(),
            watch: Watch::default(),
            devices_left: Default::default(),
            unslotted: HashMap::new(),
            pods: HashMap::new(),
        };
        // A daemon that still runs stops writing.
        let _unwritten = node.maps.state.set(STATE_GENERATION, node.generation, 0);
        for (pod, dismantled) in node.dismantle_all(node.maps.recorded()) {
            dismantled.map_err(|source| UninstallError::Pod { pod: pod.clone(), source })?;
            removed.pods.push(pod);
        }
    }
    current.remove_dead_self_tests().map_err(failed("the pins of a self-test"))?;
    for version in current.other_versions() {
        Pins::of_version(&config.pin_dir, &version).remove_all().map_err(failed("the pins"))?;
        removed.versions.push(version);
    }
    if current.maps().exists() {
        current.remove_all().map_err(failed("the pins"))?;
        removed.versions.push(format!("v{}", ztunnel_ebpf_abi::VERSION));
    }
    host::remove_probe_addresses(&host).map_err(failed("the probe addresses"))?;
    current.remove_root(mounted).map_err(failed("the pin directory"))?;
    Ok(removed)
}
