//! What the machine looks like, to compare before and after.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::poll::eventually;
use crate::process::sh;
use crate::run::DIRECTORY;
use crate::{cgroup, netns};

/// Everything a run may leave behind, one entry per thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine(BTreeSet<String>);

/// How many things of each kind were compared.
#[derive(Debug, Clone, Copy, Default)]
pub struct Compared {
    /// Things of the machine that were there before and are now.
    pub same: usize,
}

impl fmt::Display for Compared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "namespaces, control groups, BPF programs and links, pins, mounts, rules, routes, addresses, sysctls and \
             processes are as before ({} compared)",
            self.same
        )
    }
}

impl Machine {
    /// Looks at the machine now.
    pub fn look() -> Result<Self> {
        let mut things = BTreeSet::new();
        for netns in netns::named("") {
            things.insert(format!("namespace {}", netns.name()));
        }
        folders(&cgroup::root()?, 0, &mut |path| {
            things.insert(format!("cgroup {}", path.display()));
        });
        for program in aya::programs::loaded_programs().flatten() {
            things.insert(format!(
                "BPF program {} {}",
                program.id(),
                program.name_as_str().unwrap_or_default()
            ));
        }
        for link in aya::programs::loaded_links().flatten() {
            things.insert(format!("BPF link {}", link.id()));
        }
        pins(Path::new("/sys/fs/bpf"), &mut things);
        for line in fs::read_to_string("/proc/mounts")?.lines() {
            if line.contains(" bpf ") || line.contains(DIRECTORY) || line.contains("nsfs") {
                things.insert(format!("mount {line}"));
            }
        }
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
        for key in ["net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect", "net/ipv4/ip_forward"] {
            let value = fs::read_to_string(Path::new("/proc/sys").join(key)).unwrap_or_default();
            things.insert(format!("sysctl {key}={}", value.trim()));
        }
        things.extend(processes());
        things.extend(run_files());
        Ok(Self(things))
    }

    /// Waits, a few seconds at most, until nothing is there that was not there before, and nothing is gone. The
    /// kernel frees programs and namespaces in its own time.
    pub fn same_again(&self) -> Result<Compared> {
        eventually(Duration::from_secs(8), || {
            let now = Self::look()?;
            let new: Vec<_> = now.0.difference(&self.0).map(String::as_str).collect();
            // Programs and links that others remove meanwhile are none of our business.
            let gone: Vec<_> = self
                .0
                .difference(&now.0)
                .filter(|thing| !thing.starts_with("BPF "))
                .map(String::as_str)
                .collect();
            if new.is_empty() && gone.is_empty() {
                return Ok(Compared { same: now.0.len() });
            }
            bail!("left behind: {new:?}; gone: {gone:?}")
        })
    }
}

fn folders(path: &Path, depth: usize, found: &mut impl FnMut(&Path)) {
    let Ok(entries) = fs::read_dir(path) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found(&entry.path());
            if depth < 4 {
                folders(&entry.path(), depth + 1, found);
            }
        }
    }
}

fn pins(path: &Path, things: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(path) else { return };
    for entry in entries.flatten() {
        things.insert(format!("pin {}", entry.path().display()));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            pins(&entry.path(), things);
        }
    }
}

fn processes() -> Vec<String> {
    const OURS: [&str; 6] = ["ztunnel", "ztunnel-peer", "tcpdump", "nginx", "envoy", "curl"];
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // An orphan that has ended waits for init, which takes its time.
        let ended = stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'));
        if OURS.contains(&name.trim()) && !ended {
            found.push(format!("process {} {}", entry.file_name().to_string_lossy(), name.trim()));
        }
    }
    found
}

fn run_files() -> Vec<String> {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return Vec::new() };
    entries.flatten().map(|entry| format!("file {}", entry.path().display())).collect()
}
