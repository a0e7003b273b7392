//! Runs the tests and counts them.
//!
//! A suite that did not run is a failure: one that does not compile, one without a test in it, one with ignored
//! tests, and one that needs what this machine or user does not have.

pub(crate) mod tally;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use ztunnel_tests::binaries::{DAEMON_VARIABLE, repository};

use crate::run::{Profile, build, cargo};
use crate::{ci, setup};
use tally::Tally;

/// `cargo xtask test`
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Arguments {
    /// Which tests; both when left out
    #[arg(value_enum)]
    part: Option<Part>,
    /// Only tests whose name has this in it
    filter: Option<String>,
    /// Use an unoptimised daemon in the scenarios: faster to build
    #[arg(long)]
    dev: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Beside the code; need nothing
    Units,
    /// In network namespaces, with the real daemon; need root
    Scenarios,
}

struct Suite {
    name: String,
    command: Command,
}

/// The command.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut tally = Tally::default();
    // A continuous-integration machine runs this command alone, and must not let pass what `ci` would not.
    if std::env::var_os("CI").is_some_and(|value| value == "true")
        && arguments.part.is_none()
        && arguments.filter.is_none()
    {
        tally.add(ci::checks());
    }
    tally.add(all(arguments)?);
    println!("{tally}");
    Ok(if tally.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the tests; the caller prints the tally.
pub(crate) fn all(arguments: &Arguments) -> Result<Tally> {
    let mut total = Tally::default();
    if arguments.part != Some(Part::Scenarios) {
        for suite in units() {
            total.add(play(suite, arguments, &[]));
        }
    }
    if arguments.part != Some(Part::Units) {
        match scenarios(arguments) {
            Ok(suites) => {
                for suite in suites {
                    // One world at a time; what a story has seen is worth reading when it passes, too.
                    total.add(play(suite, arguments, &["--test-threads=1", "--show-output"]));
                }
            }
            Err(error) => {
                eprintln!("error: the scenarios did not run: {error:#}");
                total.add(Tally { failed: 1, ..Tally::default() });
            }
        }
    }
    if arguments.filter.is_some() && total.passed + total.failed == 0 {
        eprintln!("error: no test has that in its name");
        total.failed = 1;
    }
    Ok(total)
}

fn units() -> Vec<Suite> {
    let suite = |name: &str, packages: &[&str]| {
        let mut command = cargo();
        command.arg("test").args(["--lib", "--bins"]);
        packages.iter().for_each(|package| {
            command.args(["--package", package]);
        });
        Suite { name: name.to_owned(), command }
    };
    vec![
        suite("the daemon's units", &["ztunnel"]),
        suite("the harness's units", &["ztunnel-tests"]),
        suite("the tools' units and the house rules", &["xtask", "ztunnel-ebpf-abi", "ztunnel-ebpf-build"]),
    ]
}

fn scenarios(arguments: &Arguments) -> Result<Vec<Suite>> {
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "they make network namespaces and load eBPF programs: run as root (sudo -E cargo xtask test)"
    );
    setup::ensure()?;
    let daemon = build(Profile::of(arguments.dev))?;
    let mut names = files(&repository().join("tests/tests"))?;
    names.sort();
    let suites = names.into_iter().map(|name| {
        let mut command = cargo();
        command.args(["test", "--package", "ztunnel-tests", "--test", &name]).env(DAEMON_VARIABLE, &daemon);
        Suite { name, command }
    });
    Ok(suites.collect())
}

fn files(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(stem) = path.file_stem()
        {
            names.push(stem.to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// Runs one suite with its output passing through; what it did not run counts as failed.
fn play(suite: Suite, arguments: &Arguments, options: &[&str]) -> Tally {
    let Suite { name, mut command } = suite;
    println!("── {name}");
    let begun = Instant::now();
    command.arg("--").args(options).args(&arguments.filter);
    let mut tally = match stream(&mut command) {
        Ok(tally) => tally,
        Err(error) => {
            eprintln!("error: {name}: {error:#}");
            Tally { failed: 1, ..Tally::default() }
        }
    };
    if tally.passed + tally.failed == 0 && arguments.filter.is_none() {
        eprintln!("error: {name}: no test ran");
        tally.failed = 1;
    }
    println!("── {name}: {tally} in {:.1} s", begun.elapsed().as_secs_f64());
    tally
}

fn stream(command: &mut Command) -> Result<Tally> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot run cargo")?;
    let output = child.stdout.take().context("no standard output")?;
    let mut tally = Tally::default();
    for line in BufReader::new(output).lines() {
        let line = line.context("cannot read the test's output")?;
        // Binaries without a test in them have nothing to say.
        if !line.trim().is_empty() && line != "running 0 tests" {
            println!("{line}");
        }
        tally.read(&line);
    }
    let status = child.wait()?;
    if !status.success() && tally.failed == 0 {
        // It did not compile, or a test binary died in the middle.
        eprintln!("error: {status} without a failed test");
        tally.failed = 1;
    }
    Ok(tally)
}
