//! One run of the harness: its prefix, its directory, and taking everything down again.
//!
//! Whatever a run makes carries its prefix. It is made in an [enclosure](crate::enclosure), which is what removes the
//! traces of a run that was killed; a run that ends shows that it needs none.

mod interrupt;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use parking_lot::Mutex;

use crate::cgroup::{self, Cgroup};
use crate::process::sh;
use crate::{binaries, enclosure, netns};

/// Where runs keep their files.
pub const DIRECTORY: &str = "/run/ztunnel-tests";
/// The prefix of a run that is left standing.
const KEPT: &str = "ztdemo";

static ACTIVE: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// A run. Dropping it takes it down, unless it is kept.
#[derive(Debug)]
pub struct Run {
    prefix: String,
    directory: PathBuf,
    keep: bool,
}

impl Run {
    /// Begins a run of its own.
    pub fn begin() -> Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self::with_prefix(&format!("ztd-{}-{count}", std::process::id()), false)
    }

    /// Begins a run that is left standing.
    pub fn begin_kept() -> Result<Self> {
        Self::with_prefix(KEPT, true)
    }

    fn with_prefix(prefix: &str, keep: bool) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("network namespaces, control groups and eBPF need root: run this with sudo");
        }
        ensure!(
            enclosure::is_inside(),
            "a run would disturb others on this machine: enter an enclosure first (`ztunnel_tests::enclosed!();` in a test)"
        );
        interrupt::clean_up_on_signals()?;
        end_here_if_interrupted();
        let directory = Path::new(DIRECTORY).join(prefix);
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        for part in ["logs", "state"] {
            fs::create_dir_all(directory.join(part))?;
        }
        ACTIVE.lock().push(prefix.to_owned());
        // The signal may have come before the line above.
        end_here_if_interrupted();
        Ok(Self { prefix: prefix.to_owned(), directory, keep })
    }

    /// What the names of everything it makes start with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// A path inside its directory.
    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.directory.join(below)
    }

    /// Whether it is left standing.
    pub fn is_kept(&self) -> bool {
        self.keep
    }

    /// Leaves it standing when this value is dropped; returns how to enter its enclosure.
    pub fn leave_standing(&mut self) -> Result<String> {
        let entrance = enclosure::leave_standing()?;
        self.keep = true;
        forget(&self.prefix);
        Ok(entrance)
    }

    /// No longer leaves it standing: something failed on the way.
    pub fn take_down_after_all(&mut self) {
        self.keep = false;
    }

    /// Removes everything that carries its prefix.
    pub fn end(&mut self) -> Result<()> {
        self.keep = true;
        take_down(&self.prefix)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = take_down(&self.prefix)
        {
            eprintln!("{}: not everything could be removed: {error:#}", self.prefix);
        }
    }
}

/// Does not return once a signal has come: everything is being taken down, and the process ends after it. For
/// loops that would otherwise go on with the next thing.
pub fn end_here_if_interrupted() {
    interrupt::wait_for_end();
}

fn forget(prefix: &str) {
    ACTIVE.lock().retain(|other| other != prefix);
}

/// Removes everything that carries this prefix: processes, control groups, namespaces, pins, files.
/// Nothing there is fine.
pub fn take_down(prefix: &str) -> Result<()> {
    forget(prefix);
    let mut failures = Vec::new();
    let mut note = |result: Result<()>| {
        if let Err(error) = result {
            failures.push(format!("{error:#}"));
        }
    };
    let group = cgroup::root()?.join(prefix);
    if group.exists() {
        note(Cgroup::create(prefix).and_then(|group| group.remove()));
    }
    let directory = Path::new(DIRECTORY).join(prefix);
    for pins in pin_directories(&directory) {
        note(release_pins(&pins, &directory.join("meeting")));
    }
    for netns in netns::named(&format!("{prefix}-")) {
        note(netns.remove());
    }
    if directory.exists() {
        note(
            fs::remove_dir_all(&directory).with_context(|| format!("cannot remove {}", directory.display())),
        );
    }
    if failures.is_empty() { Ok(()) } else { bail!(failures.join("; ")) }
}

/// Where the daemons of a run keep their pins.
pub fn pin_directories(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory.join("pins")) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).collect()
}

/// The daemon's own way first; then by force, because a run that failed must not spoil the next one.
fn release_pins(pins: &Path, meeting: &Path) -> Result<()> {
    let text = pins.display().to_string();
    if let Ok(daemon) = binaries::daemon() {
        let meeting = meeting.join(pins.file_name().unwrap_or_default()).display().to_string();
        let arguments = ["uninstall", "--pin-dir", &text, "--run-dir", &meeting];
        let _forced_below = sh(&daemon.display().to_string(), &arguments);
    }
    let mounts = fs::read_to_string("/proc/mounts")?;
    let mounted = mounts.lines().filter(|line| line.split(' ').nth(1) == Some(text.as_str())).count();
    for _ in 0..mounted {
        sh("umount", &["-l", &text])?;
    }
    Ok(())
}
