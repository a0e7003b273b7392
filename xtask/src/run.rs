//! Running cargo and other programs, visibly.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use ztunnel_tests::binaries;

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
    command.current_dir(binaries::repository());
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

/// Builds the daemon and the harness's programs; returns the daemon.
pub(crate) fn build(profile: Profile) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--package", "ztunnel", "--bin", "ztunnel"]);
    if profile == Profile::Release {
        command.arg("--release");
    }
    // Standard output may be a report.
    command.stdout(std::io::stderr());
    visibly(&mut command)?;
    visibly(cargo().args(["build", "--package", "ztunnel-tests", "--bins"]).stdout(std::io::stderr()))?;
    let daemon = binaries::target().join(profile.folder()).join("ztunnel");
    daemon.canonicalize().with_context(|| format!("{} was not built", daemon.display()))
}
