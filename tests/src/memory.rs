//! A limit on the memory of a process, as a container has it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::cgroup::Cgroup;

/// Where version 1 of the memory controller is mounted, if it is.
const VERSION_1: &str = "/sys/fs/cgroup/memory";

/// A control group with a limit. What is in it when it is dropped is let out.
#[derive(Debug)]
pub struct MemoryLimit {
    path: PathBuf,
    version_1: bool,
    /// What it has to be left for.
    home: PathBuf,
}

impl MemoryLimit {
    /// A group of that name, which may use so many bytes; `own` is the group of version 2 that its process is in.
    pub fn new(name: &str, own: &Cgroup, bytes: u64) -> Result<Self> {
        let version_1 = Path::new(VERSION_1).join("memory.limit_in_bytes").exists();
        let limit = if version_1 {
            let home = PathBuf::from(VERSION_1);
            Self { path: home.join(name), version_1, home }
        } else {
            Self { path: own.path().join(name), version_1, home: own.path().to_owned() }
        };
        fs::create_dir(&limit.path).with_context(|| format!("cannot make {}", limit.path.display()))?;
        limit.write(if version_1 { "memory.limit_in_bytes" } else { "memory.max" }, &bytes.to_string()).context(
            "no memory controller: version 1 at /sys/fs/cgroup/memory, or version 2 delegated to where this runs",
        )?;
        Ok(limit)
    }

    /// Takes a process in. What it has used until then counts elsewhere.
    pub fn hold(&self, pid: u32) -> Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// The most that was used so far, in bytes.
    pub fn peak(&self) -> Result<u64> {
        let text = self.read(if self.version_1 { "memory.max_usage_in_bytes" } else { "memory.peak" })?;
        text.trim().parse().context("not a number")
    }

    /// That nothing was killed for memory.
    pub fn must_not_have_killed(&self) -> Result<()> {
        let text = self.read(if self.version_1 { "memory.oom_control" } else { "memory.events" })?;
        let killed = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        ensure!(killed.is_none_or(|count| count.trim() == "0"), "killed for memory: {text}");
        Ok(())
    }

    fn read(&self, file: &str) -> Result<String> {
        let path = self.path.join(file);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        for pid in self.read("cgroup.procs").unwrap_or_default().lines() {
            let _gone = fs::write(self.home.join("cgroup.procs"), pid);
        }
        let _gone = fs::remove_dir(&self.path);
    }
}
