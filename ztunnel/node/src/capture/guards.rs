//! The guards: one on every device of a pod, and on every one that was the pod's and still exists.
//!
//! A guard goes with its device into another network namespace, and is kept there: nobody else would stop what comes by
//! it. How many there can be is bounded, and how many are made at once: each costs the kernel some ten milliseconds, in
//! which no other pod is looked after. A pod with too many devices is closed. So is one that has taken too many into
//! other namespaces and has others to guard: none that is guarded is given up, and no further one is guarded.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use super::pins::{Pins, gone};
use super::routes;
use super::sys::{self, Attach, Ensured, Wanted};

/// Most devices of one pod.
pub const DEVICES_MAX: usize = 64;
/// Of so many devices that were the pod's and are in other network namespaces, no further one of it is guarded. Those
/// that are guarded by then may still be taken there, so all its guards are fewer than this and [`DEVICES_MAX`].
pub const ELSEWHERE_MAX: usize = 64;
/// Most guards that are attached in one go; whoever has more to attach is called again.
const AT_ONCE: usize = 16;

/// Our hold on a pod's guards, so that they stay attached when their pins are deleted.
#[derive(Debug, Default)]
pub(super) struct Guards {
    /// By the number of the device.
    pub here: HashMap<u32, OwnedFd>,
    /// On devices that are in another network namespace, by the number of the link.
    elsewhere: HashMap<u32, OwnedFd>,
}

/// What was found and done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Guarded {
    /// What was missing.
    pub changed: Vec<String>,
    /// Devices that are in another network namespace since the last time.
    pub left: Vec<u32>,
    /// Devices that have no guard yet.
    pub unguarded: usize,
    /// And will have none for now, as too many that were the pod's are elsewhere.
    pub refused: usize,
}

impl Guards {
    /// Guards the first devices, as many as a pod may have. Runs in the pod's namespace.
    pub(super) fn ensure(
        &mut self,
        pins: &Pins,
        slot: u32,
        devices: &[routes::Device],
        renew: bool,
    ) -> io::Result<Guarded> {
        let mut guarded = Guarded::default();
        // First, so that what is no more takes no room.
        self.clear_up(pins, slot, devices, &mut guarded)?;
        let mut attached = 0;
        for device in devices.iter().take(DEVICES_MAX) {
            let index = device.index;
            let path = pins.guard(slot, index);
            let links = match sys::links_of_device(index) {
                Ok(links) => links,
                // It has gone since it was listed.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => continue,
                Err(error) => return Err(error),
            };
            let mut link = self.here.remove(&index).or_else(|| sys::open(&path).ok());
            if let Some(other) = link.take_if(|link| !id(link).is_some_and(|id| links.contains(&id))) {
                self.set_aside(pins, slot, index, other, &mut guarded)?;
            }
            if link.is_none()
                && let Some(id) = links.iter().find(|id| self.elsewhere.contains_key(id))
            {
                // It has come back.
                gone(std::fs::rename(pins.guard_elsewhere(slot, *id), &path))?;
                link = self.elsewhere.remove(id);
            }
            if link.is_none() && self.elsewhere.len() >= ELSEWHERE_MAX {
                guarded.refused += 1;
                continue;
            }
            if link.is_none() && attached == AT_ONCE {
                guarded.unguarded += 1;
                continue;
            }
            let wanted = Wanted { path: &path, hook: Attach::TcxEgress, target: u64::from(index), renew };
            let ensured = sys::ensure_link(
                &wanted,
                &mut link,
                || sys::open(&pins.program(if device.ethernet { "guard" } else { "guard_ip" })),
                |program| sys::attach(program, index, Attach::TcxEgress),
            );
            self.here.extend(link.map(|link| (index, link)));
            match ensured {
                Ok(Ensured::Present) => {}
                Ok(Ensured::Pinned) => {
                    guarded.changed.push(format!("the guard of device {index} was not pinned"));
                }
                Ok(Ensured::Attached) => {
                    attached += 1;
                    guarded.changed.push(format!("device {index} had no guard"));
                }
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(guarded)
    }

    /// How many are on devices in other network namespaces.
    pub(super) fn elsewhere(&self) -> usize {
        self.elsewhere.len()
    }

    /// Looks after the guards of devices that are not among `devices`.
    fn clear_up(
        &mut self,
        pins: &Pins,
        slot: u32,
        devices: &[routes::Device],
        guarded: &mut Guarded,
    ) -> io::Result<()> {
        let mut former = pins.guarded(slot);
        former.extend(self.here.keys());
        former.sort_unstable();
        former.dedup();
        former.retain(|index| !devices.iter().any(|device| device.index == *index));
        for index in former {
            match self.here.remove(&index).map_or_else(|| sys::open(&pins.guard(slot, index)), Ok) {
                Ok(link) => self.set_aside(pins, slot, index, link, guarded)?,
                Err(_) => gone(std::fs::remove_file(pins.guard(slot, index)))?,
            }
        }
        for id in pins.guarded_elsewhere(slot) {
            if !self.elsewhere.contains_key(&id)
                && let Ok(link) = sys::open(&pins.guard_elsewhere(slot, id))
            {
                self.elsewhere.insert(id, link);
            }
        }
        let over: Vec<u32> =
            self.elsewhere.iter().filter(|(_, link)| !lives(link)).map(|(id, _)| *id).collect();
        for id in over {
            self.elsewhere.remove(&id);
            gone(std::fs::remove_file(pins.guard_elsewhere(slot, id)))?;
        }
        Ok(())
    }

    /// The device of this guard is not here under this number: it is no more, or in another network namespace.
    fn set_aside(
        &mut self,
        pins: &Pins,
        slot: u32,
        index: u32,
        link: OwnedFd,
        guarded: &mut Guarded,
    ) -> io::Result<()> {
        let path = pins.guard(slot, index);
        let Some(id) = id(&link).filter(|_| lives(&link)) else {
            return gone(std::fs::remove_file(path));
        };
        let aside = pins.guard_elsewhere(slot, id);
        match std::fs::rename(&path, &aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => sys::pin(link.as_fd(), &aside)?,
            renamed => renamed?,
        }
        self.elsewhere.insert(id, link);
        guarded.left.push(index);
        Ok(())
    }
}

fn id(link: &OwnedFd) -> Option<u32> {
    sys::link_state(link.as_fd(), Attach::TcxEgress).ok().map(|state| state.id)
}

fn lives(link: &OwnedFd) -> bool {
    sys::link_state(link.as_fd(), Attach::TcxEgress).is_ok_and(|state| state.target != 0)
}
