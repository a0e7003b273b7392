//! Everything that must hold before a change is merged.

use std::process::{Command, ExitCode, Stdio};

use anyhow::Result;
use xtask::places::repository;

use crate::run::{cargo, visibly};
use crate::test::DAEMON;
use crate::test::tally::Tally;
use crate::{setup, test};

/// The command.
pub(crate) fn run() -> Result<ExitCode> {
    setup::ensure()?;
    let mut tally = checks();
    tally.add(test::all(&test::Arguments::default())?);
    println!("{tally}");
    Ok(if tally.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Format, lints, documentation and dependencies, each counted like a test.
pub(crate) fn checks() -> Tally {
    let mut tally = Tally::default();
    let mut step = |name: &str, command: &mut Command| match visibly(command) {
        Ok(()) => tally.passed += 1,
        Err(error) => {
            eprintln!("error: {name}: {error:#}");
            tally.failed += 1;
        }
    };
    step("format", cargo().args(["fmt", "--all", "--", "--check"]));
    let programs = repository().join("ebpf/programs/Cargo.toml");
    step("format of the eBPF programs", cargo().args(["fmt", "--check", "--manifest-path"]).arg(programs));
    step("lints", cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]));
    let mut doc = cargo();
    doc.args(["doc", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
    DAEMON.iter().for_each(|package| {
        doc.args(["--package", package]);
    });
    step("documentation", &mut doc);
    if has_cargo_deny() {
        // `--config` is relative to the working directory.
        step("dependencies", cargo().args(["deny", "check", "--config", ".cargo/deny.toml"]));
    } else {
        eprintln!(
            "note: cargo-deny is not installed: licences and advisories are not checked (cargo install cargo-deny)"
        );
    }
    tally
}

fn has_cargo_deny() -> bool {
    let status =
        Command::new("cargo-deny").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}
