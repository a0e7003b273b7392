//! The pinned maps, seen from the daemon.

use std::error::Error;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, SockMap};
use ztunnel_ebpf_abi::{
    Address, LISTENERS_PER_SLOT, NodeConfig, PodEntry, Record, SLOTS, SlotAddress, TEXT_MAX, mapped,
};

use super::Listeners;
use super::error::OpenError;
use super::pins::Pins;
use super::sys;

/// Maps that the daemon only keeps pinned.
const PROGRAMS_OWN: [&str; 2] = ["PROBES", "DELIVERIES"];

/// See the module; names as in `ebpf/programs/src/maps.rs`.
pub(super) struct Maps {
    pub pods: HashMap<MapData, u64, PodEntry>,
    pub addresses: HashMap<MapData, SlotAddress, u32>,
    pub pod_ips: HashMap<MapData, Address, u32>,
    pub listeners: SockMap<MapData>,
    pub node: Array<MapData, NodeConfig>,
    pub counters: PerCpuArray<MapData, u64>,
    pub state: Array<MapData, u64>,
    pub records: HashMap<MapData, u32, Record>,
    pub sockets: OwnedFd,
    /// All of them again, to pin them anew.
    fds: Vec<(&'static str, OwnedFd)>,
    /// What is in `addresses` by slot, so that nobody has to walk through it: read once, then kept.
    written_addresses: std::collections::HashMap<u32, Vec<Address>>,
    /// The same of `pod_ips`.
    written_pod_ips: std::collections::HashMap<u32, Vec<Address>>,
}

impl Maps {
    /// Opens all of them.
    pub(super) fn open(pins: &Pins) -> Result<Self, OpenError> {
        let mut fds = Vec::new();
        let mut maps = Self {
            pods: open(pins, "PODS", &mut fds)?,
            addresses: open(pins, "ADDRESSES", &mut fds)?,
            pod_ips: open(pins, "POD_IPS", &mut fds)?,
            listeners: open(pins, "LISTENERS", &mut fds)?,
            node: open(pins, "NODE", &mut fds)?,
            counters: open(pins, "COUNTERS", &mut fds)?,
            state: open(pins, "STATE", &mut fds)?,
            records: open(pins, "RECORDS", &mut fds)?,
            sockets: {
                let sockets = duplicate("SOCKETS", &data(pins, "SOCKETS")?)?;
                let again = sockets.try_clone().map_err(|source| failed("SOCKETS", source))?;
                fds.push(("SOCKETS", again));
                sockets
            },
            fds: {
                // Those of the programs alone. Who only removes what an earlier build left finds none.
                let own = PROGRAMS_OWN.into_iter().filter(|name| pins.map(name).exists());
                for name in own {
                    fds.push((name, duplicate(name, &data(pins, name)?)?));
                }
                fds
            },
            written_addresses: Default::default(),
            written_pod_ips: Default::default(),
        };
        for key in maps.addresses.keys().flatten() {
            maps.written_addresses.entry(key.slot).or_default().push(key.address);
        }
        for (address, slot) in maps.pod_ips.iter().flatten() {
            maps.written_pod_ips.entry(slot).or_default().push(address);
        }
        Ok(maps)
    }

    /// Opens the counters alone.
    pub(super) fn open_counters(pins: &Pins) -> Result<PerCpuArray<MapData, u64>, OpenError> {
        open(pins, "COUNTERS", &mut Vec::new())
    }

    /// Pins again those whose pin was deleted.
    pub(super) fn pin(&self, pins: &Pins) -> io::Result<()> {
        self.fds
            .iter()
            .filter(|(name, _)| !pins.map(name).exists())
            .try_for_each(|(name, map)| sys::pin(map.as_fd(), &pins.map(name)))
    }

    /// Puts a pod's listeners into its slot: from here on new connections are theirs.
    pub(super) fn set_listeners(&mut self, slot: u32, listeners: &Listeners) -> Result<(), MapError> {
        use ztunnel_ebpf_abi::{HBONE, INBOUND, OUTBOUND};
        let first = slot * LISTENERS_PER_SLOT;
        self.listeners.set(first + HBONE, &listeners.hbone, 0)?;
        self.listeners.set(first + INBOUND, &listeners.inbound, 0)?;
        self.listeners.set(first + OUTBOUND, &listeners.outbound, 0)
    }

    /// Puts listeners into empty places of a slot only, so that a successor's stay; true if any was empty.
    pub(super) fn refill_listeners(&mut self, slot: u32, listeners: &Listeners) -> bool {
        use ztunnel_ebpf_abi::{HBONE, INBOUND, OUTBOUND};
        const NOEXIST: u64 = 1;
        let first = slot * LISTENERS_PER_SLOT;
        let each =
            [(HBONE, &listeners.hbone), (INBOUND, &listeners.inbound), (OUTBOUND, &listeners.outbound)];
        each.iter()
            .filter(|(kind, socket)| self.listeners.set(first + kind, *socket, NOEXIST).is_ok())
            .count()
            > 0
    }

    /// Empties a slot: from here on new connections are refused.
    pub(super) fn clear_listeners(&mut self, slot: u32) {
        for index in slot * LISTENERS_PER_SLOT..(slot + 1) * LISTENERS_PER_SLOT {
            // An empty entry is an error and as good.
            let _empty = self.listeners.clear_index(&index);
        }
    }

    /// Makes a pod's own addresses exactly `wanted`; true if anything changed.
    pub(super) fn set_addresses(&mut self, slot: u32, wanted: &[IpAddr]) -> Result<bool, MapError> {
        let wanted: Vec<Address> = wanted.iter().map(|ip| words(*ip)).collect();
        let known = self.written_addresses.entry(slot).or_default();
        let mut changed = false;
        for address in &wanted {
            let key = SlotAddress { slot, address: *address };
            if self.addresses.get(&key, 0).is_err() {
                self.addresses.insert(key, 1, 0)?;
                changed = true;
            }
        }
        for stale in known.iter().filter(|address| !wanted.contains(address)) {
            absent(self.addresses.remove(&SlotAddress { slot, address: *stale }))?;
            changed = true;
        }
        *known = wanted;
        Ok(changed)
    }

    /// Makes the addresses the node may probe this pod at exactly `wanted`; true if anything changed. An
    /// address that now belongs to another pod's slot stays with it.
    pub(super) fn set_pod_ips(&mut self, slot: u32, wanted: &[IpAddr]) -> Result<bool, MapError> {
        let wanted: Vec<Address> = wanted.iter().map(|ip| words(*ip)).collect();
        let known = self.written_pod_ips.entry(slot).or_default();
        let mut changed = false;
        for address in &wanted {
            if self.pod_ips.get(address, 0).is_err() {
                self.pod_ips.insert(address, slot, 0)?;
                changed = true;
            }
        }
        for stale in known.iter().filter(|address| !wanted.contains(address)) {
            if self.pod_ips.get(stale, 0).is_ok_and(|owner| owner == slot) {
                absent(self.pod_ips.remove(stale))?;
                changed = true;
            }
        }
        *known = wanted;
        Ok(changed)
    }

    /// Every recorded pod.
    pub(super) fn recorded(&self) -> Vec<(u32, Record)> {
        self.records.iter().flatten().collect()
    }

    /// The lowest slot nobody has.
    pub(super) fn free_slot(&self) -> Option<u32> {
        let taken: std::collections::HashSet<u32> = self.records.keys().flatten().collect();
        (0..SLOTS).find(|slot| !taken.contains(slot))
    }
}

fn failed(map: &'static str, source: impl Into<Box<dyn Error + Send + Sync>>) -> OpenError {
    OpenError::Map { map, source: source.into() }
}

fn data(pins: &Pins, name: &'static str) -> Result<MapData, OpenError> {
    MapData::from_pin(pins.map(name)).map_err(|source| failed(name, source))
}

fn duplicate(name: &'static str, map: &MapData) -> Result<OwnedFd, OpenError> {
    map.fd().as_fd().try_clone_to_owned().map_err(|source| failed(name, source))
}

fn open<M>(pins: &Pins, name: &'static str, fds: &mut Vec<(&'static str, OwnedFd)>) -> Result<M, OpenError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = data(pins, name)?;
    fds.push((name, duplicate(name, &map)?));
    let map = Map::from_map_data(map).map_err(|source| failed(name, source))?;
    M::try_from(map).map_err(|source| failed(name, source))
}

/// An entry that is gone already is as good as removed.
pub(super) fn absent(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// An address as the programs see it.
pub(super) fn words(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(v4) => mapped(u32::from_ne_bytes(v4.octets())),
        IpAddr::V6(v6) => {
            let o = v6.octets();
            let word = |at: usize| u32::from_ne_bytes([o[at], o[at + 1], o[at + 2], o[at + 3]]);
            [word(0), word(4), word(8), word(12)]
        }
    }
}

/// Fills a record's text field; `None` when it does not fit.
pub(super) fn pack(text: &[u8]) -> Option<([u8; TEXT_MAX], u16)> {
    let mut field = [0; TEXT_MAX];
    field.get_mut(..text.len())?.copy_from_slice(text);
    Some((field, text.len() as u16))
}

/// The text of a record's field.
pub(super) fn unpack(field: &[u8; TEXT_MAX], length: u16) -> &[u8] {
    field.get(..usize::from(length)).unwrap_or(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_words_in_network_order() {
        assert_eq!(words("169.254.7.127".parse().expect("address")), ztunnel_ebpf_abi::PROBE_V4);
        let probe = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff".parse().expect("address");
        assert_eq!(words(probe), ztunnel_ebpf_abi::PROBE_V6);
    }

    #[test]
    fn text_fits_or_is_refused() {
        let (field, length) = pack(b"shop/cart").expect("short");
        assert_eq!(unpack(&field, length), b"shop/cart");
        assert!(pack(&[b'x'; TEXT_MAX + 1]).is_none());
    }
}
