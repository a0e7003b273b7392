//! The eBPF object inside the daemon, and loading programs from it.

#![expect(unsafe_code, reason = "giving memory back to the system has no safe wrapper")]

use std::error::Error;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::programs::{CgroupSkb, CgroupSock, CgroupSockAddr, Program, SchedClassifier, SkLookup, SockOps};
use aya::{Ebpf, EbpfLoader};
use ztunnel_ebpf_abi::NO_SLOT;

use super::pins::Pins;
use super::sys::Attach;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("ZTUNNEL_EBPF_OBJECT"));

type Failure = Box<dyn Error + Send + Sync>;

/// The programs at the cgroup root: name and hook.
pub(super) const CGROUP: [(&str, Attach); 7] = [
    ("connect4", Attach::Connect4),
    ("connect6", Attach::Connect6),
    ("bind4", Attach::Bind4),
    ("bind6", Attach::Bind6),
    ("create", Attach::SockCreate),
    ("record", Attach::SockOps),
    ("leave", Attach::Egress),
];

/// The guards: for Ethernet devices and for those without a link-layer header.
pub(super) const GUARDS: [&str; 2] = ["guard", "guard_ip"];

/// Whether this build has programs at all.
pub(super) fn embedded() -> bool {
    !OBJECT.is_empty()
}

/// Tells two builds of the programs apart (FNV-1a); never zero.
pub(super) fn fingerprint() -> u64 {
    OBJECT.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    }) | 1
}

/// Parses the object and opens or makes the pinned maps. Kept once it was used: for each new one aya reads all
/// of the kernel's type information, some 15 ms.
pub(super) struct Loader {
    pins: Pins,
    loader: Option<EbpfLoader<'static>>,
}

/// Every value the lookup program's `SLOT` can have: the loader keeps a reference.
static SLOT_VALUES: [u32; NO_SLOT as usize + 1] = {
    let mut values = [0; NO_SLOT as usize + 1];
    let mut slot = 0;
    while slot <= NO_SLOT {
        values[slot as usize] = slot;
        slot += 1;
    }
    values
};

impl Loader {
    pub(super) fn new(pins: &Pins) -> Self {
        Self { pins: pins.clone(), loader: None }
    }

    /// The object with everything in it but what is in the kernel; `slot` is for the lookup program.
    pub(super) fn object(&mut self, slot: u32) -> Result<Ebpf, Failure> {
        let value = SLOT_VALUES.get(slot as usize).ok_or("no such slot")?;
        let loader = self.loader.get_or_insert_with(|| {
            let mut loader = EbpfLoader::new();
            // The programs need no kernel types.
            loader
                .btf(None)
                .default_map_pin_directory(self.pins.maps())
                .map_pin_path("SOCKETS", self.pins.map("SOCKETS"));
            give_back();
            loader
        });
        Ok(loader.override_global("SLOT", value, true).load(OBJECT)?)
    }
}

/// Gives freed memory back to the system: making a loader reads the kernel's types, tens of megabytes that are
/// not needed again.
fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Loads one program into the kernel and returns it alone.
pub(super) fn load(object: &mut Ebpf, name: &'static str) -> Result<OwnedFd, Failure> {
    let program = object.program_mut(name).ok_or_else(|| format!("the object has no program {name}"))?;
    let fd = match program {
        Program::CgroupSockAddr(_) => {
            let program: &mut CgroupSockAddr = program.try_into()?;
            program.load()?;
            program.fd()?.as_fd().try_clone_to_owned()?
        }
        Program::CgroupSock(_) => {
            let program: &mut CgroupSock = program.try_into()?;
            program.load()?;
            program.fd()?.as_fd().try_clone_to_owned()?
        }
        Program::SockOps(_) => {
            let program: &mut SockOps = program.try_into()?;
            program.load()?;
            program.fd()?.as_fd().try_clone_to_owned()?
        }
        Program::CgroupSkb(_) => {
            let program: &mut CgroupSkb = program.try_into()?;
            program.load()?;
            program.fd()?.as_fd().try_clone_to_owned()?
        }
        Program::SkLookup(_) => {
            let program: &mut SkLookup = program.try_into()?;
            program.load()?;
            program.fd()?.as_fd().try_clone_to_owned()?
        }
        Program::SchedClassifier(_) => {
            let program: &mut SchedClassifier = program.try_into()?;
            program.load()?;
            program.fd()?.as_fd().try_clone_to_owned()?
        }
        _ => return Err(format!("program {name} is of an unexpected kind").into()),
    };
    Ok(fd)
}
