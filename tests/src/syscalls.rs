//! Counts the system calls of a running program, with strace. A count says what a change costs where a time would
//! say how busy the machine was.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::poll::{PATIENCE, eventually};
use crate::process::{self, Log, Process};

/// Counting, until it is finished or dropped.
#[derive(Debug)]
pub struct Counting {
    strace: Process,
    output: PathBuf,
}

impl Counting {
    /// Counts from when this returns what those threads of a process do whose name starts with `threads` (`data-`:
    /// the daemon's data plane). strace writes to `output` and beside it.
    pub fn start(pid: u32, threads: &str, output: &Path) -> Result<Self> {
        let all = threads_of(pid)?;
        let tids: Vec<u32> =
            all.into_iter().filter(|(_, name)| name.starts_with(threads)).map(|(tid, _)| tid).collect();
        ensure!(!tids.is_empty(), "process {pid} has no thread {threads}*");
        let words = output.with_extension("log");
        let mut command = Command::new("strace");
        command.args(["-c", "-U", "calls,errors,name", "-o"]).arg(output);
        command.args(tids.iter().flat_map(|tid| ["-p".to_owned(), tid.to_string()]));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&words)?);
        let child = process::spawn(command).context("cannot start strace: see `cargo xtask setup`")?;
        let mut strace = Process::new(child, Log::at(words));
        eventually(PATIENCE, || {
            strace.must_run()?;
            for tid in &tids {
                let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status"))?;
                let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
                ensure!(tracer.is_some_and(|tracer| tracer.trim() != "0"), "thread {tid} is not traced");
            }
            Ok(())
        })?;
        Ok(Self { strace, output: output.to_owned() })
    }

    /// Ends it, and says what was counted.
    pub fn finish(mut self) -> Result<Calls> {
        self.strace.signal(Signal::SIGINT);
        // It ends as who is interrupted does: its status says nothing.
        self.strace.wait(PATIENCE)?;
        let text = fs::read_to_string(&self.output).context("strace has written nothing")?;
        let calls = Calls::parse(&text);
        ensure!(calls.total() > 0, "strace has counted nothing: {}; {text}", self.strace.log().tail(3));
        Ok(calls)
    }
}

fn threads_of(pid: u32) -> Result<Vec<(u32, String)>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        let tid = entry.file_name().to_string_lossy().parse()?;
        // A thread may end meanwhile.
        if let Ok(name) = fs::read_to_string(entry.path().join("comm")) {
            threads.push((tid, name.trim().to_owned()));
        }
    }
    Ok(threads)
}

/// How often each system call was made, and how often of these in vain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calls(BTreeMap<String, (u64, u64)>);

/// The call that waits for something to do.
const WAIT: &str = "epoll_wait";

impl Calls {
    fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            // A column of nothing is left empty.
            let (calls, errors, name) = match words[..] {
                [calls, name] => (calls, "0", name),
                [calls, errors, name] => (calls, errors, name),
                _ => return None,
            };
            (name != "total").then_some(())?;
            Some((name.to_owned(), (calls.parse().ok()?, errors.parse().ok()?)))
        };
        Self(text.lines().filter_map(line).collect())
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.0.values().map(|(calls, _)| calls).sum()
    }

    /// Those that did something. How often there is a wait, and a look that finds nothing, depends on how fast the
    /// other side is: a slow machine makes two turns of one.
    pub fn done(&self) -> u64 {
        let useful = self.0.iter().filter(|(name, _)| *name != WAIT);
        useful.map(|(_, (calls, errors))| calls - errors).sum()
    }

    /// How often there was a wait.
    pub fn waits(&self) -> u64 {
        self.of(WAIT)
    }

    /// How often this one was made.
    pub fn of(&self, name: &str) -> u64 {
        self.0.get(name).map_or(0, |(calls, _)| *calls)
    }

    /// What each was made per unit, the most frequent first, for a report.
    pub fn per(&self, units: f64) -> String {
        let mut calls: Vec<_> = self.0.iter().collect();
        calls.sort_by_key(|(_, (calls, _))| std::cmp::Reverse(*calls));
        let each =
            |(name, (calls, _)): &(&String, &(u64, u64))| format!("{name} {:.2}", *calls as f64 / units);
        calls.iter().take(5).map(each).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_strace_is_read() {
        let text = "    calls    errors syscall\n--------- --------- ----------------\n       12           epoll_wait\n        \
                    3         1 recvfrom\n--------- --------- ----------------\n       15         1 total\n";
        let calls = Calls::parse(text);
        assert_eq!((calls.total(), calls.of("recvfrom"), calls.of("writev")), (15, 3, 0));
        assert_eq!((calls.done(), calls.waits()), (2, 12));
        assert_eq!(calls.per(3.0), "epoll_wait 4.00, recvfrom 1.00");
        assert_eq!(Calls::parse("").total(), 0);
    }
}
