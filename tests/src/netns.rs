//! Named network namespaces, visible to `ip netns`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};

use crate::process::sh;

/// Where `ip netns` keeps them.
pub const DIRECTORY: &str = "/run/netns";

/// A network namespace with a name. Removed by [`Netns::remove`], not by dropping: it belongs to a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes one, with `lo` up.
    pub fn create(name: &str) -> Result<Self> {
        let netns = Self { name: name.to_owned() };
        sh("ip", &["netns", "add", name])?;
        netns.ip(&["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// Its name for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that opens it.
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// Runs `ip -n <this>` with these arguments and returns what it prints.
    pub fn ip(&self, args: &[&str]) -> Result<String> {
        let mut all = vec!["-n", &self.name];
        all.extend_from_slice(args);
        sh("ip", &all)
    }

    /// Runs `f` on a thread of its own that is inside this namespace.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = self.path();
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&file, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
                f()
            });
            match inside.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Reads `/proc/sys/net/<key>` of this namespace.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        let path = Path::new("/proc/sys/net").join(key);
        self.enter(|| {
            let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            Ok(text.trim().to_owned())
        })
    }

    /// Writes `/proc/sys/net/<key>` of this namespace.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys/net").join(key);
        self.enter(|| std::fs::write(&path, value).with_context(|| path.display().to_string()))
    }

    /// Removes the name; the namespace itself ends with its last process.
    pub fn remove(&self) -> Result<()> {
        if self.path().exists() {
            sh("ip", &["netns", "del", &self.name])?;
        }
        ensure!(!self.path().exists(), "{} is still there", self.path().display());
        Ok(())
    }
}

/// The names of all of them that start with `prefix`.
pub fn named(prefix: &str) -> Vec<Netns> {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else { return Vec::new() };
    let mut found: Vec<Netns> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .map(|name| Netns { name })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}
