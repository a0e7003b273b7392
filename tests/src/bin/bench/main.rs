//! Measures the daemon beside bare TCP and Envoy, all in one run on this machine.
//!
//! In each round every column gets nodes, pods and proxies of its own, runs every load, and is taken down: the columns
//! stand as close together in time as they can. The loads, the servers and the proxies share the machine's cores, so
//! a throughput is that of the whole; the CPU time of the proxies alone stands beside it.
//!
//! `cargo xtask bench` builds this and becomes it; the flags, columns and rows are in `xtask`.
#![expect(clippy::print_stdout, reason = "a report goes to standard output")]

mod column;
mod envoy;
mod load;
mod measure;
mod peer;
mod picture;
mod results;
mod scale;
mod site;
mod table;
mod usage;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use column::Running;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use results::Results;
use xtask::arguments::{Bench, Column};
use xtask::rows::{self, Work};
use ztunnel_tests::enclosure;
use ztunnel_tests::run::end_here_if_interrupted;

/// The longest failure in a report, in characters.
const FAILURE_LIMIT: usize = 800;

fn main() -> ExitCode {
    run(&Bench::parse()).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(arguments: &Bench) -> Result<ExitCode> {
    let mut results = plan(arguments)?;
    enclosure::enter().context("cannot make an enclosure for the benchmark")?;
    raise_file_limit();
    if arguments.scale {
        facts()?.iter().take(1).for_each(|fact| println!("{fact}"));
        print!("{}", scale::measure(results.seconds)?);
        return Ok(ExitCode::SUCCESS);
    }
    results.facts = facts()?;
    let start = Instant::now();
    for round in 0..results.rounds {
        // No column always has the machine that another has left.
        let shift = round % results.columns.len();
        let order: Vec<Column> =
            results.columns.iter().cycle().skip(shift).take(results.columns.len()).copied().collect();
        for column in order {
            eprintln!("round {} of {}: {}", round + 1, results.rounds, column.name());
            if let Err(error) = visit(&mut results, column, round, arguments.peer_binary.as_deref()) {
                fail(&mut results, format!("round {}: {}: {error:#}", round + 1, column.name()));
            }
        }
    }
    results.facts.push(format!("Took {} s.", start.elapsed().as_secs()));
    print!("{}", table::table(&results));
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&results.to_json())?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &arguments.svg {
        std::fs::write(path, picture::draw(&results))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(if results.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn plan(arguments: &Bench) -> Result<Results> {
    let (rounds, seconds) = if arguments.quick { (2, 2) } else { (5, 4) };
    let (rounds, seconds) = (arguments.rounds.unwrap_or(rounds), arguments.seconds.unwrap_or(seconds));
    Ok(Results::new(arguments.chosen_rows()?, arguments.chosen_columns(), rounds.max(1), seconds.max(1)))
}

/// One column in one round.
fn visit(results: &mut Results, column: Column, round: usize, peer: Option<&Path>) -> Result<()> {
    let mut running = column::start(column, peer).context("cannot start")?;
    for work in rows::works(&results.rows) {
        if !column::carries(column, work) {
            continue;
        }
        match measured(&mut running, work, results.seconds) {
            Ok(values) => {
                for (name, value) in values {
                    eprintln!("  {name} {}", table::number(value));
                    results.add(&name, column, round, value);
                }
            }
            Err(error) => {
                fail(results, format!("round {}: {}: {work:?}: {error:#}", round + 1, column.name()));
            }
        }
    }
    end_here_if_interrupted();
    running.remove().context("cannot remove everything")
}

fn measured(running: &mut Running, work: Work, seconds: u64) -> Result<Vec<measure::Value>> {
    let values = measure::measure(running, work, seconds)?;
    running.must_run()?;
    Ok(values)
}

fn fail(results: &mut Results, failure: String) {
    // What fails while everything is being taken down is no result.
    end_here_if_interrupted();
    // A daemon may have said pages.
    let failure: String = failure.chars().take(FAILURE_LIMIT).collect();
    eprintln!("  FAILED: {failure}");
    results.failures.push(failure);
}

/// Thousands of connections need as many files, in the proxies and in nginx, which inherit this limit.
fn raise_file_limit() {
    const WANTED: u64 = 65_536;
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    for limit in [WANTED.max(hard), hard] {
        if setrlimit(Resource::RLIMIT_NOFILE, limit, limit).is_ok() {
            return;
        }
    }
}

/// What the machine is.
fn facts() -> Result<Vec<String>> {
    let cpus = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let cores = std::thread::available_parallelism()?;
    Ok(vec![
        format!(
            "{cores} cores ({}) for loads, servers and proxies together; Linux {}; load average before: {}.",
            model.trim_start_matches(['\t', ' ', ':']),
            kernel.trim(),
            load.split(' ').next().unwrap_or_default(),
        ),
        "ztunnel: access log on, real capture. Envoy: no access log, dialled directly; --concurrency 2."
            .to_owned(),
    ])
}
