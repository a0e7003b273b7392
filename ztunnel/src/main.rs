//! `ztunnel`: chooses the subcommand and reads its configuration; [`ztunnel::app`] does the rest.

use std::error::Error;
use std::fmt::Write;
use std::process::ExitCode;

use ztunnel::app;
use ztunnel::app::commands;
use ztunnel::app::privileges;
use ztunnel::cli;
use ztunnel::cli::Query;
use ztunnel::cli::Source;
use ztunnel::cli::What;
use ztunnel::cli::dump::Filter;
use ztunnel::config::istio;
use ztunnel::config::origin::Shown;
use ztunnel::config::raw;
use ztunnel::config::raw::Cli;
use ztunnel::config::raw::Command;
use ztunnel::config::raw::Output;
use ztunnel::config::raw::Part;
use ztunnel::config::raw::Show;
use ztunnel::config::raw::Start;
use ztunnel::config::resolved;
use ztunnel_mesh::dump::Setting;
use ztunnel_node::admin::profile::heap::allocator::Sampled;
use ztunnel_objects::file::Place;

#[global_allocator]
static ALLOCATOR: Sampled = Sampled;

fn main() -> ExitCode {
    let (cli, shown) = raw::parse();
    match execute(cli, shown) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ztunnel: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli, shown: Vec<Shown>) -> Result<ExitCode, Box<dyn Error>> {
    match cli.command {
        Command::Run(typed) => {
            let config = resolved::run(&typed, shown)?;
            app::run(config)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Proxy { ignored: _ } => {
            app::run(istio::run(resolved::istio()?)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Check(typed) => {
            let node = resolved::node_name(typed.node.as_deref())?;
            let here = resolved::node_name(None).is_ok_and(|host| host == node);
            let place = Place { path: typed.mesh.path(), node, strict: typed.strict };
            Ok(ExitCode::from(commands::check(&place, here)?))
        }
        Command::Selftest(typed) => {
            privileges::check()?;
            let places = resolved::places(&typed)?;
            Ok(ExitCode::from(commands::selftest(&places.capture)?))
        }
        Command::Uninstall(typed) => {
            privileges::check()?;
            let (named, cert_cache) = (typed.kernel.pin_dir.is_some(), typed.cert_cache.as_deref());
            commands::uninstall(&resolved::places(&typed.kernel)?, named, cert_cache)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Config(typed) => {
            let (settings, warnings) = match &typed.start {
                Some(Start::Run(run)) => {
                    let config = resolved::run(run, shown)?;
                    (config.settings, config.warnings)
                }
                Some(Start::Proxy { ignored: _ }) | None => {
                    let istio = resolved::istio()?;
                    let warnings = istio.warnings.iter().map(ToString::to_string).collect();
                    (istio.shown.iter().map(Setting::from).collect(), warnings)
                }
            };
            commands::config(&settings, &warnings, typed.output)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Show(typed) => {
            cli::show(&query(typed), time::UtcDateTime::now(), &mut std::io::stdout().lock())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Log(typed) => {
            let mut out = std::io::stdout().lock();
            cli::log(typed.admin, typed.level.as_deref(), typed.reset, &mut out)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Reload(typed) => {
            cli::reload(typed.admin, typed.force, &mut std::io::stdout().lock())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Version => {
            commands::version()?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn query(typed: Show) -> Query {
    let what = match typed.part {
        Part::All => What::All,
        Part::Workload => What::Workload,
        Part::Service => What::Service,
        Part::Policy => What::Policy,
        Part::Certificate => What::Certificate,
        Part::Connections => What::Connections,
    };
    let source = typed.file.map_or(Source::Daemon(typed.admin), Source::File);
    let filter = Filter { name: typed.name, namespace: typed.namespace, node: typed.node };
    Query { what, source, filter, raw: typed.raw, json: typed.output == Output::Json }
}

/// An error with its causes, on one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        // Some errors say their causes themselves.
        if !text.ends_with(&said) {
            // Writing to a string cannot fail.
            let _written = write!(text, ": {said}");
        }
        cause = error.source();
    }
    text
}
