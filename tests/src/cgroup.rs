//! Control groups (version 2) for the nodes' processes and pods.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::poll::{PATIENCE, eventually};

/// A directory of the version 2 hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

/// Where version 2 is mounted; a "hybrid" machine has it beside version 1.
pub fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
    match find_root(&mounts) {
        Some(path) => Ok(path),
        None => bail!("no cgroup2 file system is mounted: mount -t cgroup2 none /sys/fs/cgroup"),
    }
}

fn find_root(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (_device, path, kind) = (words.next()?, words.next()?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

impl Cgroup {
    /// The group with this directory.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The group at this path below the root, made if it is not there.
    pub fn create(below_root: impl AsRef<Path>) -> Result<Self> {
        let path = root()?.join(below_root);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }

    /// The group of that name inside this one, made if it is not there.
    pub fn child(&self, name: &str) -> Result<Self> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that takes a process in.
    pub fn procs(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Kills every process in it and below, and removes it and the groups below.
    pub fn remove(&self) -> Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        // cgroup.kill is there from Linux 5.14.
        let _ignored = fs::write(self.path.join("cgroup.kill"), "1");
        eventually(PATIENCE, || {
            remove_tree(&self.path).with_context(|| format!("cannot remove {}", self.path.display()))
        })
    }
}

fn remove_tree(path: &Path) -> std::io::Result<()> {
    let entries = match fs::read_dir(path) {
        // Somebody else removes it too.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_two_is_found_on_unified_and_hybrid_machines() {
        let unified = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(find_root(unified), Some(PathBuf::from("/sys/fs/cgroup")));
        assert_eq!(find_root(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(find_root("tmpfs /sys/fs/cgroup tmpfs rw 0 0\n"), None);
    }
}
