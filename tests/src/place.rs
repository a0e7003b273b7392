//! Where a program runs: a network namespace and a control group.
#![expect(unsafe_code, reason = "a child enters its namespace and group between fork and exec")]

use std::fs::{File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::poll::PATIENCE;
use crate::process::{self, Log, Process};

/// A network namespace and a control group; programs are started in both.
#[derive(Debug, Clone)]
pub struct Place {
    /// The network namespace.
    pub netns: Netns,
    /// The control group.
    pub cgroup: Cgroup,
    /// Where the output of programs that keep running goes.
    pub logs: PathBuf,
    /// Whether programs may outlive the run that starts them.
    pub outlive: bool,
}

impl Place {
    /// The same namespace, another group.
    pub fn with_cgroup(&self, cgroup: Cgroup) -> Self {
        Self { cgroup, ..self.clone() }
    }

    /// Prepares a program to start here.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let netns = self.netns.path();
        let netns = File::open(&netns).with_context(|| format!("cannot open {}", netns.display()))?;
        let procs = self.cgroup.procs();
        let procs = OpenOptions::new()
            .write(true)
            .open(&procs)
            .with_context(|| format!("cannot open {}", procs.display()))?;
        let outlive = self.outlive;
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        let enter = move || -> std::io::Result<()> {
            // "0" is whoever writes it: the child itself.
            nix::unistd::write(&procs, b"0")?;
            setns(&netns, CloneFlags::CLONE_NEWNET)?;
            if !outlive {
                set_pdeathsig(Signal::SIGKILL)?;
            }
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
            Ok(())
        };
        // SAFETY: between fork and exec only system calls are made, on files opened before; nothing is
        // allocated and no lock is taken.
        unsafe { command.pre_exec(enter) };
        Ok(command)
    }

    /// Runs a program here to its end.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<Output> {
        let mut command = self.command(program)?;
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = spawn(command, program)?;
        process::finish(child, 2 * PATIENCE)
    }

    /// Starts a program that keeps running; what it prints goes to `<logs>/<name>.log`.
    pub fn start(&self, name: &str, command: Command) -> Result<Process> {
        self.start_with(name, command, Stdio::null())
    }

    /// The same, with a pipe to its standard input.
    pub fn start_with(&self, name: &str, mut command: Command, stdin: Stdio) -> Result<Process> {
        let path = self.logs.join(format!("{name}.log"));
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        command.stdin(stdin).stdout(file.try_clone()?).stderr(file);
        let child = spawn(command, name)?;
        Ok(Process::new(child, Log::at(path)))
    }
}

fn spawn(command: Command, name: &str) -> Result<Child> {
    process::spawn(command)
        .with_context(|| format!("cannot start {name}: `cargo xtask setup` says what is missing"))
}
