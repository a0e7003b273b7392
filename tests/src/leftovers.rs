//! What a run may leave behind, and looking for it.
//!
//! The machine may be doing other things meanwhile, so what is looked for is what can be told to be the run's:
//! whatever carries its prefix, BPF objects by the maps they use, and what is the host's alone (its rules, routes,
//! addresses and sysctls), which must be as before. In an [enclosure](crate::enclosure) the host is the enclosure.

#![expect(unsafe_code, reason = "opening a pinned BPF object")]

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fmt;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use aya::maps::loaded_maps;
use aya::programs::{loaded_links, loaded_programs};

use crate::poll::{PATIENCE, eventually};
use crate::process::sh;
use crate::run::DIRECTORY;
use crate::{cgroup, netns};

/// The host's own network settings, one entry per thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine(BTreeSet<String>);

/// The BPF maps of a run. Programs and links are known by them: they outlive restarts, programs don't.
#[derive(Debug, Clone, Default)]
pub struct BpfMaps(BTreeSet<u32>);

/// What was looked for and not found.
#[derive(Debug, Clone)]
pub struct Nothing {
    prefix: String,
    maps: usize,
    same: usize,
}

impl fmt::Display for Nothing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no namespace, control group, mount, pin, process or file of {}, none of its {} BPF maps, no program or link \
             that uses them; {} rules, routes, addresses and sysctls of the host as before",
            self.prefix, self.maps, self.same
        )
    }
}

impl BpfMaps {
    /// Adds the maps that are pinned below this directory.
    pub fn add_pinned(&mut self, directory: &Path) {
        let Ok(entries) = fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.add_pinned(&entry.path());
            } else if let Ok(Some(map)) = pinned_map(&entry.path()) {
                self.0.insert(map);
            }
        }
    }

    /// How many they are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// What is still loaded of them, and of what uses them.
    fn loaded(&self) -> Vec<String> {
        let mut found = Vec::new();
        for map in loaded_maps().flatten().filter(|map| self.0.contains(&map.id())) {
            found.push(format!("BPF map {} {}", map.id(), map.name_as_str().unwrap_or_default()));
        }
        let uses = |ids: Option<Vec<u32>>| ids.unwrap_or_default().iter().any(|id| self.0.contains(id));
        let programs: Vec<_> = loaded_programs()
            .flatten()
            .filter(|program| program.map_ids().is_ok_and(uses))
            .map(|program| (program.id(), program.name_as_str().unwrap_or_default().to_owned()))
            .collect();
        for link in loaded_links().flatten() {
            if programs.iter().any(|(id, _)| *id == link.program_id()) {
                found.push(format!("BPF link {}", link.id()));
            }
        }
        found.extend(programs.into_iter().map(|(id, name)| format!("BPF program {id} {name}")));
        found
    }
}

impl Machine {
    /// Looks at the host's settings now.
    pub fn look() -> Result<Self> {
        let mut things = BTreeSet::new();
        for args in [
            &["rule"][..],
            &["-6", "rule"],
            &["route", "show", "table", "100"],
            &["-6", "route", "show", "table", "100"],
        ] {
            // A table that does not exist is an error for `ip`, and fine here.
            for line in sh("ip", args).unwrap_or_default().lines() {
                things.insert(format!("{}: {}", args.join(" "), line.trim()));
            }
        }
        for line in sh("ip", &["-o", "addr", "show", "dev", "lo"])?.lines() {
            things.insert(format!("lo {}", line.split_whitespace().nth(3).unwrap_or_default()));
        }
        for key in [
            "net/ipv4/tcp_fwmark_accept",
            "net/ipv4/fwmark_reflect",
            "net/ipv6/fwmark_reflect",
            "net/ipv4/ip_forward",
        ] {
            let value = fs::read_to_string(Path::new("/proc/sys").join(key)).unwrap_or_default();
            things.insert(format!("sysctl {key}={}", value.trim()));
        }
        Ok(Self(things))
    }

    /// Waits until nothing is left of the run: the kernel frees programs and namespaces in its own time.
    pub fn nothing_left(&self, prefix: &str, maps: &BpfMaps) -> Result<Nothing> {
        eventually(PATIENCE, || self.differs(prefix, maps))
    }

    /// Looks once, and says what is left.
    pub fn differs(&self, prefix: &str, maps: &BpfMaps) -> Result<Nothing> {
        let now = Self::look()?;
        let changed: Vec<_> = now.0.symmetric_difference(&self.0).collect();
        ensure!(changed.is_empty(), "changed on the host: {changed:?}");
        let mut left = named(prefix)?;
        left.extend(maps.loaded());
        ensure!(left.is_empty(), "left behind: {left:?}");
        Ok(Nothing { prefix: prefix.to_owned(), maps: maps.0.len(), same: now.0.len() })
    }
}

/// The id of the map that is pinned at this path; none if it is a program or a link.
fn pinned_map(path: &Path) -> Result<Option<u32>> {
    /// The start of the kernel's `union bpf_attr` for `BPF_OBJ_GET`.
    #[repr(C)]
    struct ObjGet {
        pathname: u64,
        bpf_fd: u32,
        file_flags: u32,
    }
    const BPF_OBJ_GET: libc::c_int = 7;
    let name = CString::new(path.as_os_str().as_bytes())?;
    let attr = ObjGet { pathname: name.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: the attribute is as long as it is said to be, and the name lives until the call returns.
    let opened = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attr, size_of::<ObjGet>()) };
    ensure!(opened >= 0, "{}: {}", path.display(), std::io::Error::last_os_error());
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    let object = unsafe { OwnedFd::from_raw_fd(opened as i32) };
    // Asked for what it has as a map, a program or link answers with numbers of its own.
    let told = fs::read_to_string(format!("/proc/self/fdinfo/{}", object.as_raw_fd()))?;
    let id = told.lines().find_map(|line| line.strip_prefix("map_id:"));
    id.map(|id| id.trim().parse().with_context(|| id.to_owned())).transpose()
}

/// Everything on the machine that carries this prefix.
fn named(prefix: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for netns in netns::named(&format!("{prefix}-")) {
        found.push(format!("namespace {}", netns.name()));
    }
    let group = cgroup::root()?.join(prefix);
    if group.exists() {
        found.push(format!("cgroup {}", group.display()));
    }
    for line in fs::read_to_string("/proc/mounts")?.lines().filter(|line| line.contains(prefix)) {
        found.push(format!("mount {line}"));
    }
    for folder in [Path::new(DIRECTORY), Path::new("/sys/fs/bpf"), Path::new("/sys/fs/bpf/ztunnel")] {
        found.extend(entries_named(folder, prefix).map(|path| path.display().to_string()));
    }
    for entry in fs::read_dir("/proc")?.flatten() {
        let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
        let ours = |text: Vec<u8>| String::from_utf8_lossy(&text).contains(&format!("{prefix}/"));
        if ours(read("cgroup")) || ours(read("cmdline")) {
            let name = String::from_utf8_lossy(&read("comm")).trim().to_owned();
            found.push(format!("process {} {name}", entry.file_name().to_string_lossy()));
        }
    }
    Ok(found)
}

fn entries_named(folder: &Path, prefix: &str) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let prefix = prefix.to_owned();
    entries
        .filter(move |entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path())
}
