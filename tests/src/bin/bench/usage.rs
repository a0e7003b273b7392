//! What processes use, as the kernel counts it.

use std::fs;

use anyhow::{Context, Result};

/// The unit of times in `/proc`: USER_HZ, which is 100 on every architecture we run on (proc(5)).
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU time of these processes with all their threads, user and system, in seconds.
pub(crate) fn cpu_seconds(pids: &[u32]) -> Result<f64> {
    let mut ticks = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let text = fs::read_to_string(&path).with_context(|| format!("process {pid} has ended"))?;
        ticks += cpu_ticks(&text).with_context(|| format!("cannot understand {path}"))?;
    }
    Ok(ticks as f64 / TICKS_PER_SECOND)
}

fn cpu_ticks(stat: &str) -> Option<u64> {
    // The command's name, in parentheses, may hold spaces; utime and stime are fields 14 and 15 of all.
    let (_, after_name) = stat.rsplit_once(") ")?;
    let mut fields = after_name.split(' ').skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

/// Resident memory in MiB, the mean of these processes.
pub(crate) fn memory_mib(pids: &[u32]) -> Result<f64> {
    let mut kib = 0.0;
    for pid in pids {
        let text = fs::read_to_string(format!("/proc/{pid}/status"))
            .with_context(|| format!("process {pid} has ended"))?;
        kib += field(&text, "VmRSS:").context("no VmRSS")? as f64;
    }
    Ok(kib / 1024.0 / pids.len().max(1) as f64)
}

/// What one process has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    /// Resident memory in bytes.
    pub(crate) resident: u64,
    /// What of it is no file's.
    pub(crate) own: u64,
    /// File descriptors.
    pub(crate) descriptors: u64,
    /// How often its threads have waited: each time something woke them up.
    pub(crate) switches: u64,
}

impl Usage {
    /// Now.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let mut switches = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            // A thread may have ended since.
            let text = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            switches += field(&text, "voluntary_ctxt_switches:").unwrap_or_default();
        }
        Ok(Self {
            resident: field(&status, "VmRSS:").context("no VmRSS")? << 10,
            own: field(&status, "RssAnon:").context("no RssAnon")? << 10,
            descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
            switches,
        })
    }
}

/// The number behind a name in `/proc/PID/status`.
fn field(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_a_name_with_spaces_and_parentheses() {
        let stat = "42 (a) name (x) S 1 2 3 4 5 6 7 8 9 10 250 150 0 0 20 0 3 0 99 1000 200";
        assert_eq!(cpu_ticks(stat), Some(400));
    }

    #[test]
    fn this_process_uses_memory() {
        assert!(memory_mib(&[std::process::id()]).expect("it runs") > 0.1);
        let usage = Usage::of(std::process::id()).expect("it runs");
        assert!(usage.own > 0 && usage.own < usage.resident && usage.descriptors > 2, "{usage:?}");
    }
}
