//! Runs the tests and counts them.
//!
//! Suites of scenarios are in enclosures of their own and run side by side, as many as the machine has cores for; those
//! that look at what a busy machine changes run alone, at the end. What a suite says is printed whole when it ends.
//!
//! A suite that did not run is a failure: one that does not compile, one without a test in it, one with ignored
//! tests, and one that needs what this machine or user does not have.
//!
//! cargo-nextest could play them, as an enclosure for every test costs some 11 ms of CPU time; but it is almost 500
//! packages to compile before the first test, and what fails, runs alone or is built before would still be said here.

#![expect(clippy::disallowed_types, reason = "what must be built in seconds has no library for its locks")]

pub(crate) mod tally;

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use xtask::places::{DAEMON_VARIABLE, repository};

use crate::run::{Harness, Profile, build, build_harness, cargo, is_root, visibly};
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

/// Suites that count system calls or look at how long something takes.
const ALONE: [&str; 4] = ["combinations", "hostile", "limits", "scenarios"];
/// How many suites run at once at most: each has daemons, pods and programs, and wants some hundred MiB.
const SIDE_BY_SIDE_MAX: usize = 4;

/// What becomes of what a suite says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Output {
    /// It is seen when it comes.
    Passes,
    /// It is printed when the suite has ended: others run beside it.
    Whole,
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
            total.add(play(suite, arguments, &[], Output::Passes));
        }
    }
    if arguments.part != Some(Part::Units) {
        match scenarios(arguments) {
            Ok(suites) => {
                let (alone, beside): (VecDeque<_>, VecDeque<_>) =
                    suites.into_iter().partition(|suite| ALONE.contains(&&*suite.name));
                let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
                total.add(side_by_side(beside, arguments, cores.min(SIDE_BY_SIDE_MAX)));
                total.add(side_by_side(alone, arguments, 1));
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

/// The crates of the daemon.
pub(crate) const DAEMON: [&str; 7] = [
    "ztunnel",
    "ztunnel-control",
    "ztunnel-mesh",
    "ztunnel-node",
    "ztunnel-objects",
    "ztunnel-runtime",
    "ztunnel-tls",
];

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
        suite("the daemon's units", &DAEMON),
        suite("the harness's units", &["ztunnel-tests"]),
        suite("the tools' units and the house rules", &["xtask", "ztunnel-ebpf-abi", "ztunnel-ebpf-build"]),
    ]
}

fn scenarios(arguments: &Arguments) -> Result<Vec<Suite>> {
    anyhow::ensure!(
        is_root(),
        "they make network namespaces and load eBPF programs: run as root (sudo -E cargo xtask test)"
    );
    setup::ensure()?;
    let daemon = build(Profile::of(arguments.dev))?;
    build_harness(Harness::All)?;
    // All of them first: two that run side by side would otherwise wait for each other's compilation.
    visibly(
        cargo().args(["test", "--no-run", "--package", "ztunnel-tests", "--tests"]).stdout(std::io::stderr()),
    )?;
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

/// Plays suites, so many at once, in their order.
fn side_by_side(suites: VecDeque<Suite>, arguments: &Arguments, at_once: usize) -> Tally {
    let (suites, total) = (Mutex::new(suites), Mutex::new(Tally::default()));
    let output = if at_once > 1 { Output::Whole } else { Output::Passes };
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                loop {
                    let next = suites.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(suite) = next else { return };
                    // One testbed at a time; what a scenario has seen is worth reading when it passes, too.
                    let tally = play(suite, arguments, &["--test-threads=1", "--show-output"], output);
                    total.lock().unwrap_or_else(PoisonError::into_inner).add(tally);
                }
            });
        }
    });
    total.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Runs one suite; what it did not run counts as failed.
fn play(suite: Suite, arguments: &Arguments, options: &[&str], output: Output) -> Tally {
    let Suite { name, mut command } = suite;
    if output == Output::Passes {
        println!("── {name}");
    }
    let begun = Instant::now();
    command.arg("--").args(options).args(&arguments.filter);
    let mut said = Vec::new();
    let mut tally = match stream(&mut command, output, &mut said) {
        Ok(tally) => tally,
        Err(error) => {
            said.push(format!("error: {name}: {error:#}"));
            Tally { failed: 1, ..Tally::default() }
        }
    };
    if tally.passed + tally.failed == 0 && arguments.filter.is_none() {
        said.push(format!("error: {name}: no test ran"));
        tally.failed = 1;
    }
    said.push(format!("── {name}: {tally} in {:.1} s", begun.elapsed().as_secs_f64()));
    if output == Output::Whole {
        said.insert(0, format!("── {name}"));
    }
    // In one piece: another suite may end at the same moment.
    let text = said.join("\n") + "\n";
    let _nobody_reads = std::io::stdout().lock().write_all(text.as_bytes());
    tally
}

/// Runs a command and counts; lines that do not pass are added to `said`.
fn stream(command: &mut Command, output: Output, said: &mut Vec<String>) -> Result<Tally> {
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    if output == Output::Whole {
        // What goes wrong stands where it happened.
        command.stderr(writer.try_clone()?);
    }
    let mut child = command.stdout(writer).spawn().context("cannot run cargo")?;
    // Its copies of the pipe would keep it open.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut tally = Tally::default();
    for line in BufReader::new(reader).lines() {
        let line = line.context("cannot read the test's output")?;
        tally.read(&line);
        // Binaries without a test in them have nothing to say.
        if line.trim().is_empty() || line == "running 0 tests" {
            continue;
        }
        match output {
            Output::Passes => println!("{line}"),
            Output::Whole => said.push(line),
        }
    }
    let status = child.wait()?;
    if !status.success() && tally.failed == 0 {
        // It did not compile, or a test binary died in the middle.
        said.push(format!("error: {status} without a failed test"));
        tally.failed = 1;
    }
    Ok(tally)
}
