//! Starting programs, and making sure that none outlives the run.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::poll::{PATIENCE, eventually};

/// Runs a program of the machine to its end and returns its output; a bad exit status is an error with
/// everything it said.
pub fn sh(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}: is it installed? `cargo xtask setup` says"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {}: {}", args.join(" "), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

type Job = Box<dyn FnOnce() + Send>;

/// Starts a child from one thread that lives as long as the process: "kill the child when its parent dies"
/// means the parent *thread*, and a test's thread ends with the test.
pub fn spawn(mut command: Command) -> std::io::Result<Child> {
    static STARTER: OnceLock<Sender<Job>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for job in jobs {
                job();
            }
        });
        sender
    });
    let (answer, answered) = mpsc::sync_channel(1);
    let job: Job = Box::new(move || {
        let _asker_gone = answer.send(command.spawn());
    });
    starter.send(job).expect("the starter thread runs as long as the process");
    answered.recv().expect("the starter answers every job")
}

/// Waits for a child to end, at most `limit`, collecting its output; kills it when the time is over.
pub fn finish(mut child: Child, limit: Duration) -> Result<Output> {
    let (pid, name) = (Pid::from_raw(child.id() as i32), child.id());
    let stdin = child.stdin.take();
    let (done, waits) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if waits.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _gone = kill(pid, Signal::SIGKILL);
        }
    });
    drop(stdin);
    let output = child.wait_with_output().with_context(|| format!("cannot wait for process {name}"))?;
    drop(done);
    let _ended = watchdog.join();
    Ok(output)
}

/// A program that keeps running, its output in a file. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: Log,
    keep: bool,
}

impl Process {
    /// Takes a started child whose output goes to `log`.
    pub fn new(child: Child, log: Log) -> Self {
        Self { child, log, keep: false }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Its standard input, where that is a pipe.
    pub fn stdin(&mut self) -> Option<&mut ChildStdin> {
        self.child.stdin.as_mut()
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Leaves it running when this value is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Sends a signal. A process that has ended is not an error.
    pub fn signal(&self, signal: Signal) {
        let _gone = kill(Pid::from_raw(self.child.id() as i32), signal);
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > limit {
                bail!("process {} has not ended after {limit:?}; it said: {}", self.pid(), self.log.tail(5));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills it at once and waits for the kernel to have done so.
    pub fn kill_9(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL);
        let status = self.wait(PATIENCE)?;
        if status.signal() != Some(Signal::SIGKILL as i32) {
            bail!("process {} had ended by itself before it was killed: {status}", self.pid());
        }
        Ok(())
    }

    /// An error with its last words if it has ended.
    pub fn must_run(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("process {} has ended, {status}: {}", self.pid(), self.log.tail(10)),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.keep && self.is_running() {
            self.signal(Signal::SIGKILL);
            let _status = self.child.wait();
        }
    }
}

/// A file that a program writes and a scenario reads.
#[derive(Debug, Clone)]
pub struct Log {
    path: PathBuf,
}

impl Log {
    /// The log at this path, which need not exist yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything in it so far.
    pub fn text(&self) -> String {
        fs::read(&self.path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// How long it is now: pass it to [`Log::since`] later.
    pub fn mark(&self) -> usize {
        fs::metadata(&self.path).map_or(0, |data| data.len() as usize)
    }

    /// What was written after `mark`.
    pub fn since(&self, mark: usize) -> String {
        let bytes = fs::read(&self.path).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(mark..).unwrap_or_default()).into_owned()
    }

    /// Its last `lines` lines, joined by ` | `.
    pub fn tail(&self, lines: usize) -> String {
        let text = self.text();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join(" | ")
    }

    /// Waits for a line after `mark` that satisfies `wanted`, and returns it.
    pub fn wait_line(
        &self,
        mark: usize,
        limit: Duration,
        what: &str,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String> {
        eventually(limit, || match self.since(mark).lines().find(|line| wanted(line)) {
            Some(line) => Ok(line.to_owned()),
            None => bail!("no line with {what} in {}; the last: {}", self.path.display(), self.tail(3)),
        })
    }
}

/// The time that all threads of a process have been on a CPU, as the scheduler counts it (`/proc/PID/task/TID/schedstat`).
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        // A thread may have ended since.
        let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        sum += text.split(' ').next().and_then(|time| time.parse::<u64>().ok()).unwrap_or_default();
    }
    ensure!(sum > 0, "process {pid} has used no time: there is no such process");
    Ok(Duration::from_nanos(sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_ended() {
        let mut command = Command::new("sleep");
        command.arg("60").stdout(Stdio::piped());
        let output =
            finish(spawn(command).expect("sleep exists"), Duration::from_millis(20)).expect("it ends");
        assert_eq!(output.status.signal(), Some(Signal::SIGKILL as i32));
    }

    #[test]
    fn a_failure_carries_what_the_program_said() {
        let error = sh("sh", &["-c", "echo no such luck >&2; exit 3"]).expect_err("it exits with 3");
        assert!(error.to_string().contains("no such luck"), "{error}");
    }
}
