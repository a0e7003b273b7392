//! `ztunnel`: chooses the subcommand and reads its configuration; [`ztunnel::app`] does the rest.

use std::error::Error;
use std::fmt::Write;
use std::process::ExitCode;

use ztunnel::admin::profile::heap::allocator::Sampled;
use ztunnel::api::Setting;
use ztunnel::app;
use ztunnel::app::commands;
use ztunnel::config::istio;
use ztunnel::config::raw;
use ztunnel::config::raw::Cli;
use ztunnel::config::raw::Command;
use ztunnel::config::resolved;

#[global_allocator]
static ALLOCATOR: Sampled = Sampled;

fn main() -> ExitCode {
    let (cli, settings) = raw::parse();
    match execute(cli, settings) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ztunnel: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli, settings: Vec<Setting>) -> Result<ExitCode, Box<dyn Error>> {
    match cli.command {
        Command::Run(typed) => {
            let config = resolved::run(&typed, settings)?;
            app::run(config)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Proxy { ignored: _ } => {
            app::run(istio::run(resolved::istio()?)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Check(typed) => {
            let node = resolved::node_name(typed.node.as_deref())?;
            Ok(ExitCode::from(commands::check(&typed.mesh, &node)?))
        }
        Command::Selftest(typed) => {
            let places = resolved::places(&typed)?;
            Ok(ExitCode::from(commands::selftest(&places.capture)?))
        }
        Command::Uninstall(typed) => {
            commands::uninstall(&resolved::places(&typed.kernel)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Config(typed) => {
            commands::config(&resolved::istio()?, typed.output)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Version => {
            commands::version()?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// An error with its causes, on one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string cannot fail.
        let _written = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
