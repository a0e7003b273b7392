//! An enclosure: what a process makes stays inside, and what others make is not seen there.
//!
//! A user's own daemon, another run and this one so do not disturb each other. An enclosure has of its own:
//!
//! | | so that |
//! |---|---|
//! | network namespace | nobody else changes rules, routes, sysctls and addresses that are compared |
//! | mount namespace, with `/run/netns`, [`DIRECTORY`] and the BPF file system | names, pins and files are ours, and vanish with us |
//! | control group, which is the root of the version 2 hierarchy inside | programs that are attached to the root catch our processes alone |
//!
//! [`enter`] forks: the child goes in and goes on, the parent stays outside, waits for it, and removes the group. The
//! child dies with its parent. If both are killed the group is left, with what still runs in it: the next one to enter
//! anywhere sweeps it. Whatever else there is the kernel removes with the last process.
//!
//! `cargo xtask demo --keep` leaves an enclosure standing ([`leave_standing`]) and says how to enter it;
//! [`take_down_standing`] ends it.

#![expect(unsafe_code, reason = "fork, before there is a second thread")]

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getppid};

use crate::cgroup::{self, Cgroup};
use crate::netns;
use crate::process::sh;
use crate::run::DIRECTORY;

/// What the names of enclosures' groups start with; `<process id>-<its start time>` follows.
const PREFIX: &str = "ztunnel-tests-";
/// The group that says that an enclosure is to be left alone.
const STANDING: &str = "standing";
const BPF: &str = "/sys/fs/bpf";

/// The group of the enclosure that this process has entered, by the path it has outside.
static ENTERED: OnceLock<PathBuf> = OnceLock::new();

/// Has a test binary enter an enclosure before its `main`, in which libtest starts its threads.
///
/// Without privileges it does not: tests that need none go on to work, and the others say what they need.
#[macro_export]
macro_rules! enclosed {
    () => {
        #[used]
        #[unsafe(link_section = ".init_array")]
        static ENTER: extern "C" fn() = {
            extern "C" fn enter() {
                $crate::enclosure::enter_or_exit();
            }
            enter
        };
    };
}

/// [`enter`] as root; a failure ends the process.
pub fn enter_or_exit() {
    if nix::unistd::geteuid().is_root()
        && let Err(error) = enter()
    {
        eprintln!("error: cannot make an enclosure for the tests: {error:#}");
        std::process::exit(1);
    }
}

/// Whether this process is in an enclosure that it has entered itself.
pub fn is_inside() -> bool {
    ENTERED.get().is_some()
}

/// Goes on in a child process, in an enclosure of its own, after removing what dead ones have left. Before there is a
/// second thread.
pub fn enter() -> Result<()> {
    ensure!(!is_inside(), "this process is in an enclosure already");
    let threads = fs::read_dir("/proc/self/task").context("/proc is not mounted")?.count();
    ensure!(threads == 1, "there are {threads} threads, and only this one would go in");
    let root = cgroup::root()?;
    sweep(&root)?;
    let owner = Owner::of(std::process::id()).context("cannot read /proc/self/stat")?;
    let group = root.join(format!("{PREFIX}{owner}"));
    fs::create_dir(&group).with_context(|| format!("cannot make {}", group.display()))?;
    // Held back until somebody waits for them.
    let signals: SigSet = FORWARDED.into_iter().chain([Signal::SIGCHLD]).collect();
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), Some(&mut before))?;
    let parent = nix::unistd::getpid();
    // SAFETY: there is no other thread that could hold a lock.
    match unsafe { fork() }.context("cannot fork")? {
        ForkResult::Parent { child } => supervise(child, &group, &signals, &before),
        ForkResult::Child => {
            set_pdeathsig(Signal::SIGKILL)?;
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
            ensure!(getppid() == parent, "the parent has died");
            fs::write(group.join("cgroup.procs"), "0").context("cannot enter the control group")?;
            shut(&root)?;
            let _only_once = ENTERED.set(group);
            Ok(())
        }
    }
}

/// What ends the child rather than the parent. A terminal sends it to both.
const FORWARDED: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// Waits for the child, removes the group, and ends as the child did.
fn supervise(child: Pid, group: &Path, signals: &SigSet, before: &SigSet) -> ! {
    let status = loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => {}
            Ok(status) => break status,
            Err(_) => break WaitStatus::Exited(child, 1),
        }
        if let Ok(signal) = signals.wait()
            && signal != Signal::SIGCHLD
        {
            let _ended_meanwhile = kill(child, signal);
        }
    };
    let mut code = match status {
        WaitStatus::Exited(_, code) => code,
        _ => 1,
    };
    if !group.join(STANDING).exists()
        && let Err(error) = Cgroup::at(group).remove()
    {
        eprintln!("error: {error:#}");
        code = code.max(1);
    }
    if let WaitStatus::Signaled(_, signal, _) = status {
        let _restored = sigprocmask(SigmaskHow::SIG_SETMASK, Some(before), None);
        let _survived = nix::sys::signal::raise(signal);
        code = 128 + signal as i32;
    }
    // SAFETY: it does not return; what would run at an orderly exit is the child's to do.
    unsafe { libc::_exit(code) }
}

/// Replaces what an enclosure has of its own.
fn shut(root: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWCGROUP)
        .context("cannot make namespaces")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot part from /")?;
    // Whoever looks for version 2 takes the first that is mounted: ours is the only one.
    while let Ok(mounted) = cgroup::root() {
        umount2(&mounted, MntFlags::MNT_DETACH)
            .with_context(|| format!("cannot unmount {}", mounted.display()))?;
    }
    let over = |kind: &str, path: &Path| {
        mount(Some(kind), path, Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("cannot mount {kind} at {}", path.display()))
    };
    over("cgroup2", root)?;
    over("bpf", Path::new(BPF))?;
    for path in [netns::DIRECTORY, DIRECTORY] {
        fs::create_dir_all(path).with_context(|| format!("cannot make {path}"))?;
        over("tmpfs", Path::new(path))?;
    }
    sh("ip", &["link", "set", "lo", "up"])?;
    Ok(())
}

/// Has the enclosure stay when this process ends; returns what has to be typed outside to be in it with a shell.
pub fn leave_standing() -> Result<String> {
    let group = ENTERED.get().context("this process is in no enclosure")?;
    let mut holder = Command::new("sleep");
    holder.arg("infinity").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // Not of the terminal's foreground any more.
    std::os::unix::process::CommandExt::process_group(&mut holder, 0);
    let holder = holder.spawn().context("cannot start sleep")?;
    Cgroup::create(STANDING)?;
    // From outside nobody gets into a group in there: it is the first of the ways in.
    Ok(format!(
        "sh -c 'echo $$ > {}/cgroup.procs; exec nsenter --target {} --mount --net --cgroup'",
        group.display(),
        holder.id()
    ))
}

/// Ends the enclosures that were left standing, and everything in them; returns how many there were.
pub fn take_down_standing() -> Result<usize> {
    let mut ended = 0;
    for group in enclosures(&cgroup::root()?)?.iter().filter(|group| group.join(STANDING).exists()) {
        Cgroup::at(group).remove()?;
        ended += 1;
    }
    Ok(ended)
}

/// Removes what the dead have left.
fn sweep(root: &Path) -> Result<()> {
    for group in enclosures(root)? {
        let name = group.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let owner = Owner::parse(name.strip_prefix(PREFIX).unwrap_or_default());
        let alive = owner.is_some_and(|owner| Owner::of(owner.pid).as_ref() == Some(&owner));
        if !alive && !group.join(STANDING).exists() {
            Cgroup::at(&group)
                .remove()
                .with_context(|| format!("cannot sweep {name}, left by a run that was killed"))?;
        }
    }
    Ok(())
}

fn enclosures(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).with_context(|| root.display().to_string())? {
        match entry {
            Ok(entry) if entry.file_name().to_string_lossy().starts_with(PREFIX) => found.push(entry.path()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => bail!(error),
        }
    }
    Ok(found)
}

/// A process, told apart from a later one with the same id.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Owner {
    pid: u32,
    start: u64,
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.pid, self.start)
    }
}

impl Owner {
    /// The process that has this id now.
    fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command's name, in parentheses, may hold spaces; the start time is the 20th field after it.
        let after_name = stat.rsplit(") ").next()?;
        let start = after_name.split(' ').nth(19)?.parse().ok()?;
        Some(Self { pid, start })
    }

    fn parse(text: &str) -> Option<Self> {
        let (pid, start) = text.split_once('-')?;
        Some(Self { pid: pid.parse().ok()?, start: start.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_apart_from_a_later_one_with_its_id() {
        let own = Owner::of(std::process::id()).expect("this process runs");
        assert_eq!(own.pid, std::process::id());
        assert!(own.start > 0, "{own}");
        assert_eq!(Owner::parse(&own.to_string()), Some(own));
        assert_eq!(Owner::of(u32::MAX), None);
        assert_eq!(Owner::parse("1"), None);
    }
}
