//! Builds the demo and becomes it.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use xtask::arguments::Demo;

use crate::run::{self, Harness, Profile};
use crate::setup;

/// The command.
pub(crate) fn run(arguments: &Demo) -> Result<ExitCode> {
    if arguments.down {
        run::build_harness(Harness::Some(&["demo"]))?;
        return run::become_harness_program(Profile::Dev, "demo", None);
    }
    ensure!(
        run::is_root(),
        "the demo makes network namespaces and loads eBPF programs: run it as root (sudo -E cargo xtask demo)"
    );
    setup::ensure()?;
    let daemon = run::build(Profile::of(arguments.dev))?;
    run::build_harness(Harness::Some(&["demo", "ztunnel-peer"]))?;
    run::become_harness_program(Profile::Dev, "demo", Some(&daemon))
}
