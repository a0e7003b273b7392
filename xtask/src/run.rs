//! Running cargo and other programs, visibly, and going on as one of them.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use xtask::places::{DAEMON_VARIABLE, repository, target};

/// How the daemon is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// As it is shipped.
    Release,
    /// Faster to build.
    Dev,
}

impl Profile {
    /// The profile for a `--dev` switch.
    pub(crate) fn of(dev: bool) -> Self {
        if dev { Self::Dev } else { Self::Release }
    }

    fn folder(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Dev => "debug",
        }
    }
}

/// The cargo that runs us, in the repository.
pub(crate) fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(repository());
    // `cargo run` exports these for the package xtask; a nested cargo must not take them for its own.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a command with its output on the terminal.
pub(crate) fn visibly(command: &mut Command) -> Result<()> {
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let words = words.join(" ");
    eprintln!("$ {words}");
    let status = command.status().with_context(|| format!("cannot run {words}"))?;
    if !status.success() {
        bail!("{words}: {status}");
    }
    Ok(())
}

/// What a first build takes on a machine that does nothing else, roughly.
pub(crate) const FIRST_OPTIMISED: &str = "the first time that takes ten minutes or so on two cores";
const FIRST_UNOPTIMISED: &str = "the first time that takes some five minutes on two cores";

/// Builds the daemon; returns it.
pub(crate) fn build(profile: Profile) -> Result<PathBuf> {
    let daemon = target().join(profile.folder()).join("ztunnel");
    if !daemon.exists() {
        let (how, first) = match profile {
            Profile::Release => ("optimised", FIRST_OPTIMISED),
            Profile::Dev => ("not optimised", FIRST_UNOPTIMISED),
        };
        eprintln!("compiling the daemon, {how}: {first}");
    }
    let mut command = cargo();
    command.args(["build", "--package", "ztunnel", "--bin", "ztunnel"]);
    if profile == Profile::Release {
        command.arg("--release");
    }
    // Standard output may be a report.
    visibly(command.stdout(std::io::stderr()))?;
    daemon.canonicalize().with_context(|| format!("{} was not built", daemon.display()))
}

/// Programs of the harness.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Harness<'a> {
    /// All of them.
    All,
    /// Those with these names.
    Some(&'a [&'a str]),
}

/// Builds programs of the harness.
pub(crate) fn build_harness(which: Harness<'_>) -> Result<()> {
    if !target().join("debug/ztunnel-peer").exists() {
        eprintln!("compiling the harness: {FIRST_UNOPTIMISED}");
    }
    let mut command = cargo();
    command.args(["build", "--package", "ztunnel-tests"]);
    match which {
        Harness::All => {
            command.arg("--bins");
        }
        Harness::Some(names) => {
            command.args(names.iter().flat_map(|name| ["--bin", name]));
        }
    }
    visibly(command.stdout(std::io::stderr()))
}

/// Has this process go on as a program of the harness, with the words that stand behind the command's name: both read
/// them alike. Signals and the exit status so are the program's own.
pub(crate) fn become_harness_program(
    profile: Profile,
    name: &str,
    daemon: Option<&PathBuf>,
) -> Result<ExitCode> {
    let program = target().join(profile.folder()).join(name);
    let mut command = Command::new(&program);
    command.args(std::env::args_os().skip(2));
    if let Some(daemon) = daemon {
        command.env(DAEMON_VARIABLE, daemon);
    }
    Err(command.exec()).with_context(|| format!("cannot run {}", program.display()))
}

/// Whether this process may do everything.
pub(crate) fn is_root() -> bool {
    // Of the effective user. The library that would ask the kernel is more to compile than all of this.
    std::fs::metadata("/proc/self").is_ok_and(|about| about.uid() == 0)
}
