//! The project's own commands: `cargo xtask --help`.
#![expect(clippy::print_stdout, reason = "a command line talks on standard output")]

mod bench;
mod ci;
mod demo;
mod fuzz;
mod image;
mod run;
mod setup;
mod test;
mod tidy;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The project's own commands.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install what building, testing and the demo need and this machine lacks
    Setup(setup::Arguments),
    /// Show on this machine what the daemon does: two nodes, pods, real traffic, and a report
    Demo(xtask::arguments::Demo),
    /// Run every test; the last line counts them
    Test(test::Arguments),
    /// Everything that must hold before a change is merged: format, lints, tests
    Ci,
    /// Check the module table and the house rules that a compiler does not know
    Tidy,
    /// Measure the daemon beside bare TCP and Envoy
    Bench(xtask::arguments::Bench),
    /// Throw what others may send at the daemon's readers, with cargo-fuzz
    Fuzz(fuzz::Arguments),
    /// Make a container image of the daemon, for Istio's chart
    Image(image::Arguments),
    /// Build the eBPF programs alone
    Ebpf,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Setup(arguments) => setup::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Ci => ci::run(),
        Command::Tidy => tidy::run(),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
        Command::Image(arguments) => image::run(&arguments),
        Command::Ebpf => ebpf(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn ebpf() -> Result<ExitCode> {
    let root = xtask::places::repository();
    let out = xtask::places::target().join("ebpf");
    std::fs::create_dir_all(&out)?;
    let built = ztunnel_ebpf_build::build(&root.join("ebpf/programs"), &out)?;
    println!("{}", built.display());
    Ok(ExitCode::SUCCESS)
}
