//! Opening the node: pins, maps, node-wide programs; ownership and counters.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use aya::Ebpf;
use aya::maps::{MapData, PerCpuArray};
use ztunnel_ebpf_abi::{Counter, STATE_GENERATION, STATE_MOUNTED};
use ztunnel_mesh::model::addr::PodUid;

use super::error::OpenError;
use super::maps::{Maps, unpack};
use super::own_sockets::OwnSockets;
use super::pins::{Pins, gone};
use super::reconcile::Watch;
use super::sys::{self, Attach, Ensured, Wanted};
use super::{Config, Node, host, programs};
use crate::net::bypass::Bypass;
use crate::net::netns::Netns;

/// Index in `STATE`: which build of the programs is attached.
const STATE_PROGRAMS: u32 = 2;

/// What an earlier daemon left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakenOver {
    /// Pods that are still captured; enrol them again or `sweep` them.
    pub pods: Vec<PodUid>,
    /// Older versions of the pinned state, removed by `sweep`.
    pub older: Vec<String>,
}

/// What the programs counted since the maps were made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters(Vec<(Counter, u64)>);

/// Reads the counters, whoever owns the node.
pub struct CounterReader(PerCpuArray<MapData, u64>);

impl CounterReader {
    /// What the programs counted.
    pub fn read(&self) -> Counters {
        read(&self.0)
    }
}

fn read(map: &PerCpuArray<MapData, u64>) -> Counters {
    let value = |counter: Counter| map.get(&(counter as u32), 0).map_or(0, |cpus| cpus.iter().sum());
    Counters(Counter::ALL.iter().map(|counter| (*counter, value(*counter))).collect())
}

impl Counters {
    /// All counters; [`Counter::name`] is fit for a metric label.
    pub fn iter(&self) -> impl Iterator<Item = (Counter, u64)> + '_ {
        self.0.iter().copied()
    }

    /// One of them.
    pub fn of(&self, counter: Counter) -> u64 {
        self.0.iter().find(|(each, _)| *each == counter).map_or(0, |(_, value)| *value)
    }
}

impl Node {
    /// Mounts a bpf file system if need be, opens what an earlier daemon pinned or makes it anew, attaches the
    /// node-wide programs and becomes the owner: an older daemon stops changing anything.
    pub fn open(config: Config) -> Result<Self, OpenError> {
        if !programs::embedded() {
            return Err(OpenError::NoPrograms);
        }
        let pins = Pins::new(&config.pin_dir);
        let mounted =
            pins.create().map_err(|source| OpenError::Pins { path: config.pin_dir.clone(), source })?;
        let no_host = |source| OpenError::HostNetns { path: config.host_netns.clone(), source };
        let host = Netns::open(&config.host_netns).map_err(no_host)?;
        let mut loader = programs::Loader::new(&pins);
        let mut object = loader.object(0).map_err(OpenError::Load)?;
        let maps = Maps::open(&pins)?;
        let own_sockets = maps
            .sockets
            .try_clone()
            .map(OwnSockets)
            .map_err(|source| OpenError::Map { map: "SOCKETS", source: source.into() })?;
        let mut node = Self {
            config,
            pins,
            maps,
            host,
            own_sockets: Arc::new(own_sockets),
            generation: 0,
            loader,
            renew: false,
            links: HashMap::new(),
            watch: Watch::default(),
            devices_left: Default::default(),
            unslotted: HashMap::new(),
            pods: HashMap::new(),
        };
        node.own(mounted)?;
        node.describe_host()?;
        node.attach(&mut object)?;
        Ok(node)
    }

    /// Takes the next generation.
    pub(super) fn own(&mut self, mounted: bool) -> Result<(), OpenError> {
        let failed = |source: aya::maps::MapError| OpenError::Map { map: "STATE", source: source.into() };
        let state = &mut self.maps.state;
        self.generation = state.get(&STATE_GENERATION, 0).map_err(failed)? + 1;
        let programs = state.get(&STATE_PROGRAMS, 0).map_err(failed)?;
        self.renew = programs != 0 && programs != programs::fingerprint();
        state.set(STATE_GENERATION, self.generation, 0).map_err(failed)?;
        if mounted {
            state.set(STATE_MOUNTED, 1, 0).map_err(failed)?;
        }
        Ok(())
    }

    fn describe_host(&mut self) -> Result<(), OpenError> {
        let path = self.config.host_netns.clone();
        let failed = |source| OpenError::HostNetns { path, source };
        let (node, added) = host::describe(&self.config, &self.host)
            .and_then(|node| Ok((node, host::add_probe_addresses(&self.host)?)))
            .map_err(failed)?;
        tracing::debug!(
            ?added,
            kubepods = node.kubepods,
            "probe addresses are on the host's loopback device"
        );
        let failed = |source: aya::maps::MapError| OpenError::Map { map: "NODE", source: source.into() };
        self.maps.node.set(0, node, 0).map_err(failed)
    }

    /// Attaches the node-wide programs, or replaces those of another build in place.
    fn attach(&mut self, object: &mut Ebpf) -> Result<(), OpenError> {
        self.load_guards(object, self.renew)?;
        for (name, hook) in programs::CGROUP {
            self.attach_to_cgroup(object, name, hook, self.renew)?;
        }
        // While pods still have links of another build, that is what is attached: a daemon that is killed
        // before it has renewed them must not look as if it had.
        if self.renew { Ok(()) } else { self.note_programs() }
    }

    /// Writes down that every program attached is of this build.
    pub(super) fn note_programs(&mut self) -> Result<(), OpenError> {
        let failed = |source: aya::maps::MapError| OpenError::Map { map: "STATE", source: source.into() };
        self.maps.state.set(STATE_PROGRAMS, programs::fingerprint(), 0).map_err(failed)?;
        self.renew = false;
        Ok(())
    }

    fn attach_to_cgroup(
        &mut self,
        object: &mut Ebpf,
        name: &'static str,
        hook: Attach,
        renew: bool,
    ) -> Result<Ensured, OpenError> {
        let root = self.config.cgroup_root.clone();
        let failed = |source| OpenError::Attach { program: name, cgroup: root.clone(), source };
        let cgroup = File::open(&root).map_err(failed)?;
        let target = cgroup.metadata().map_err(failed)?.ino();
        let wanted = Wanted { path: &self.pins.link(name), hook, target, renew };
        let mut held = self.links.remove(name);
        let ensured = sys::ensure_link(
            &wanted,
            &mut held,
            || programs::load(object, name).map_err(io::Error::other),
            |program| sys::attach(program, cgroup.as_raw_fd() as u32, hook),
        );
        self.links.extend(held.map(|link| (name, link)));
        ensured.map_err(failed)
    }

    /// Whether the node-wide programs are all attached and pinned.
    fn attached(&self) -> bool {
        let cgroup = self.config.cgroup_root.metadata().map_or(0, |metadata| metadata.ino());
        let alive = |(name, hook): (&str, Attach)| {
            sys::open(&self.pins.link(name))
                .and_then(|link| sys::link_state(link.as_fd(), hook))
                .is_ok_and(|state| state.target == cgroup)
        };
        programs::CGROUP.into_iter().all(alive)
            && programs::GUARDS.iter().all(|name| self.pins.program(name).exists())
    }

    /// Attaches or pins again what is missing; names it.
    pub(super) fn reattach(&mut self) -> Result<Vec<String>, OpenError> {
        let mut repaired = Vec::new();
        if self.attached() {
            return Ok(repaired);
        }
        let no_pins = |source| OpenError::Pins { path: self.config.pin_dir.clone(), source };
        let mounted = self.pins.create().map_err(no_pins)?;
        self.maps.pin(&self.pins).map_err(no_pins)?;
        if mounted {
            let failed = |source: aya::maps::MapError| OpenError::Map { map: "STATE", source: source.into() };
            self.maps.state.set(STATE_MOUNTED, 1, 0).map_err(failed)?;
        }
        let mut object = self.loader.object(0).map_err(OpenError::Load)?;
        for name in self.load_guards(&mut object, false)? {
            repaired.push(format!("program {name} was not pinned"));
        }
        for (name, hook) in programs::CGROUP {
            match self.attach_to_cgroup(&mut object, name, hook, false)? {
                Ensured::Present => {}
                Ensured::Pinned => repaired.push(format!("program {name} was not pinned")),
                Ensured::Attached => repaired.push(format!("program {name} was not attached")),
            }
        }
        Ok(repaired)
    }

    fn load_guards(&self, object: &mut Ebpf, renew: bool) -> Result<Vec<&'static str>, OpenError> {
        let mut loaded = Vec::new();
        for name in programs::GUARDS {
            let path = self.pins.program(name);
            if renew || !path.exists() {
                let program = programs::load(object, name).map_err(OpenError::Load)?;
                gone(std::fs::remove_file(&path))
                    .and_then(|()| sys::pin(program.as_fd(), &path))
                    .map_err(|source| OpenError::Pins { path, source })?;
                loaded.push(name);
            }
        }
        Ok(loaded)
    }

    /// What an earlier daemon left, for the log line of a start.
    pub fn taken_over(&self) -> TakenOver {
        let pods = self.maps.recorded().iter().map(|(_, record)| uid_of(record)).collect();
        TakenOver { pods, older: self.pins.other_versions() }
    }

    /// Our number among the daemons of this node.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether no newer daemon has opened the node; a superseded one must only drain.
    pub fn is_owner(&self) -> bool {
        self.maps.state.get(&STATE_GENERATION, 0).is_ok_and(|newest| newest == self.generation)
    }

    /// For the sockets of the data plane.
    pub fn own_sockets(&self) -> Arc<dyn Bypass> {
        Arc::<OwnSockets>::clone(&self.own_sockets)
    }

    /// Whether pods' processes in the node's own network namespace can be told from the node's: without a cgroup of
    /// pods, the probes of every process there pass.
    pub fn knows_pods(&self) -> bool {
        self.maps.node.get(&0, 0).is_ok_and(|node| node.kubepods != 0)
    }

    /// What the programs counted.
    pub fn counters(&self) -> Counters {
        read(&self.maps.counters)
    }

    /// How many devices were taken out of pods' network namespaces into others, now and from now on.
    pub fn devices_left(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.devices_left)
    }

    /// A handle that reads the counters from another thread.
    pub fn counter_reader(&self) -> Result<CounterReader, OpenError> {
        Maps::open_counters(&self.pins).map(CounterReader)
    }
}

/// The pod a record is about.
pub(super) fn uid_of(record: &ztunnel_ebpf_abi::Record) -> PodUid {
    PodUid::from(&*String::from_utf8_lossy(unpack(&record.uid, record.uid_len)))
}
