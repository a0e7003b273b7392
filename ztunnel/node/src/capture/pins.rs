//! The pin directory: what keeps maps, links and programs alive while no daemon runs.
//!
//! ```text
//! <pin_dir>/v1/<MAP>                  maps
//! <pin_dir>/v1/links/<program>        node-wide links
//! <pin_dir>/v1/programs/<program>     the guards, loaded once
//! <pin_dir>/v1/pods/<slot>/{lookup,guard-<device>,elsewhere-<link>}
//! <pin_dir>/self-test-<pid>/v1/...    what the self-test of an earlier build may have left
//! ```

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::sys;

const SELF_TEST: &str = "self-test-";

/// Paths below the pin directory, for one version of the maps.
#[derive(Debug, Clone)]
pub(super) struct Pins {
    root: PathBuf,
    versioned: PathBuf,
}

impl Pins {
    pub(super) fn new(pin_dir: &Path) -> Self {
        Self::of_version(pin_dir, &format!("v{}", ztunnel_ebpf_abi::VERSION))
    }

    pub(super) fn of_version(pin_dir: &Path, version: &str) -> Self {
        Self { root: pin_dir.to_owned(), versioned: pin_dir.join(version) }
    }

    /// Makes the directories, mounting a bpf file system when there is none. True if it did.
    pub(super) fn create(&self) -> io::Result<bool> {
        let mounted = ensure_bpffs(&self.root)?;
        for dir in [self.links(), self.programs(), self.versioned.join("pods")] {
            std::fs::create_dir_all(dir)?;
        }
        Ok(mounted)
    }

    pub(super) fn maps(&self) -> &Path {
        &self.versioned
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.versioned.join(name)
    }

    pub(super) fn links(&self) -> PathBuf {
        self.versioned.join("links")
    }

    pub(super) fn link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    fn programs(&self) -> PathBuf {
        self.versioned.join("programs")
    }

    pub(super) fn program(&self, program: &str) -> PathBuf {
        self.programs().join(program)
    }

    pub(super) fn pod(&self, slot: u32) -> PathBuf {
        self.versioned.join("pods").join(slot.to_string())
    }

    pub(super) fn lookup(&self, slot: u32) -> PathBuf {
        self.pod(slot).join("lookup")
    }

    pub(super) fn guard(&self, slot: u32, device: u32) -> PathBuf {
        self.pod(slot).join(format!("guard-{device}"))
    }

    /// Where a guard is pinned whose device is in another namespace.
    pub(super) fn guard_elsewhere(&self, slot: u32, link: u32) -> PathBuf {
        self.pod(slot).join(format!("elsewhere-{link}"))
    }

    /// The devices a pod's guards are pinned for.
    pub(super) fn guarded(&self, slot: u32) -> Vec<u32> {
        self.numbered(slot, "guard-")
    }

    /// The links of a pod's guards that are pinned and elsewhere.
    pub(super) fn guarded_elsewhere(&self, slot: u32) -> Vec<u32> {
        self.numbered(slot, "elsewhere-")
    }

    fn numbered(&self, slot: u32, prefix: &str) -> Vec<u32> {
        let Ok(entries) = std::fs::read_dir(self.pod(slot)) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok())
            .collect()
    }

    /// Version directories other than this one.
    pub(super) fn other_versions(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(&self.root) else { return Vec::new() };
        entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| *path != self.versioned)
            .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
            .filter(|name| name.strip_prefix('v').is_some_and(|n| n.parse::<u32>().is_ok()))
            .collect()
    }

    /// Detaches and removes everything of this version.
    pub(super) fn remove_all(&self) -> io::Result<()> {
        let pods = std::fs::read_dir(self.versioned.join("pods")).into_iter().flatten().flatten();
        for dir in pods.map(|entry| entry.path()).chain([self.links()]) {
            for link in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                sys::detach(&link.path())?;
            }
        }
        gone(std::fs::remove_dir_all(&self.versioned))
    }

    /// Detaches and removes what self-tests of earlier builds left whose process was killed; names it. Today's pin
    /// nothing here. A process id that is our own is another's, from another namespace of ids or from before.
    pub(super) fn remove_dead_self_tests(&self) -> io::Result<Vec<String>> {
        let mut removed = Vec::new();
        for entry in std::fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let pid = name.strip_prefix(SELF_TEST).and_then(|pid| pid.parse::<u32>().ok());
            let Some(pid) = pid.filter(|pid| *pid == std::process::id() || !is_alive(*pid)) else { continue };
            tracing::debug!(pid, "a self-test was killed: its pins are removed");
            let path = entry.path();
            let left = Self::new(&path);
            left.remove_all()?;
            for version in left.other_versions() {
                Self::of_version(&path, &version).remove_all()?;
            }
            left.remove_root(path.metadata()?.dev() != self.root.metadata()?.dev())?;
            removed.push(name);
        }
        Ok(removed)
    }

    /// Removes the pin directory when nothing is left in it, the empty ones above it on the same file system, and
    /// the mount if `mounted` and empty.
    pub(super) fn remove_root(&self, mounted: bool) -> io::Result<()> {
        if !self.root.exists() {
            return Ok(());
        }
        let point = mount_point(&self.root)?;
        let inside = self.root.ancestors().take_while(|dir| *dir != point);
        for dir in inside {
            match std::fs::remove_dir(dir) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => return Ok(()),
                other => gone(other)?,
            }
        }
        if mounted && is_empty(&point)? {
            umount2(&point, MntFlags::empty())?;
            if point == self.root {
                gone(std::fs::remove_dir(&point))?;
            }
        }
        Ok(())
    }
}

fn is_alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

/// Whether a bpf file system holds no pins; what the kernel itself puts there has a dot in its name.
fn is_empty(dir: &Path) -> io::Result<bool> {
    Ok(!std::fs::read_dir(dir)?.flatten().any(|entry| !entry.file_name().as_encoded_bytes().contains(&b'.')))
}

/// A file or directory that is gone already is as good as removed.
pub(super) fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

/// Mounts at `dir`, or, when it cannot be made (below `/sys`), at the nearest directory above it that exists.
fn ensure_bpffs(dir: &Path) -> io::Result<bool> {
    if is_bpffs(existing(dir)) {
        std::fs::create_dir_all(dir)?;
        return Ok(false);
    }
    // A mount in a namespace of our own would vanish with it, and the programs with the mount.
    // Where the first process cannot be looked at, nothing is known.
    let ours = std::fs::read_link("/proc/self/ns/mnt")?;
    if std::fs::read_link("/proc/1/ns/mnt").is_ok_and(|first| first != ours) {
        return Err(io::Error::other(
            "no bpf file system is mounted there, and a mount made in this mount namespace would not outlive the \
             daemon: mount one on the host",
        ));
    }
    let point = if std::fs::create_dir_all(dir).is_ok() { dir } else { existing(dir) };
    mount(
        Some("bpf"),
        point,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0700"),
    )?;
    std::fs::create_dir_all(dir)?;
    Ok(true)
}

fn existing(path: &Path) -> &Path {
    path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or_else(|| Path::new("/"))
}

fn mount_point(path: &Path) -> io::Result<PathBuf> {
    let device = path.metadata()?.dev();
    let mut point = path;
    while let Some(parent) = point.parent() {
        if parent.metadata()?.dev() != device {
            break;
        }
        point = parent;
    }
    Ok(point.to_owned())
}
