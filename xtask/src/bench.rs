//! Builds the benchmark and becomes it.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use xtask::arguments::Bench;
use xtask::places::{DAEMON_VARIABLE, target};

use crate::run::{self, Profile, cargo, visibly};
use crate::setup;

/// The command.
pub(crate) fn run(arguments: &Bench) -> Result<ExitCode> {
    ensure!(
        run::is_root(),
        "the benchmark makes network namespaces: run it as root (sudo -E cargo xtask bench)"
    );
    // An unknown one is better refused before anything is built.
    arguments.chosen_rows()?;
    setup::ensure()?;
    let daemon = arguments.needs_daemon() && std::env::var_os(DAEMON_VARIABLE).is_none();
    build(daemon)?;
    let built = target().join("release/ztunnel");
    run::become_harness_program(Profile::Release, "bench", daemon.then_some(&built))
}

/// Builds what is measured, and with what, as it is shipped.
fn build(daemon: bool) -> Result<()> {
    let mut command = cargo();
    command.args([
        "build",
        "--release",
        "--package",
        "ztunnel-tests",
        "--bin",
        "bench",
        "--bin",
        "ztunnel-peer",
    ]);
    if daemon {
        command.args(["--package", "ztunnel", "--bin", "ztunnel"]);
    }
    if !target().join("release/bench").exists() {
        eprintln!("compiling the benchmark and what it measures, optimised: {}", run::FIRST_OPTIMISED);
    }
    // Standard output is the report's.
    visibly(command.stdout(std::io::stderr()))
}
