//! Throws what others may send at the daemon's readers, with cargo-fuzz.
//!
//! The targets are a workspace of their own, `tests/fuzz`, as they need a nightly compiler. What is written while they
//! run goes below `tests/fuzz/target`; the seeds in `tests/fuzz/corpus` are only read, unless `--distil` is given.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use xtask::places::repository;

use crate::run::{cargo, visibly};

const TOOLCHAIN: &str = "nightly";

/// What each target runs within. An input that takes longer or more is a finding, as one that panics is.
/// Inputs become longer sooner than by default: short ones make no mesh.
const LIMITS: [&str; 5] =
    ["-timeout=10", "-rss_limit_mb=1024", "-malloc_limit_mb=256", "-max_len=8192", "-len_control=20"];
/// Address sanitizer keeps what was freed for a while, by default more than a target may take.
const SANITIZER: &str = "quarantine_size_mb=16:detect_leaks=0";
/// How large the seeds of one target may be: with those of all others they are read by everybody who clones this.
const SEEDS_MAX: u64 = 16 * 1024;
/// How many of them may be what runs have found, and how large each of those.
const SEEDS_FOUND_MAX: usize = 48;
const SEED_MAX: u64 = 1024;

const ABOUT: &str = "\
Each target starts from its seeds in tests/fuzz/corpus and from what earlier runs have found (tests/fuzz/target/corpus),
and runs for the given time with limits on memory, time and length of one input. An input that breaks a promise ends its
target: it is kept, and the last lines say where, and by which command it is run again. What is fixed gets a test beside
the code. Needs rustup and a C++ compiler; the nightly toolchain and cargo-fuzz are installed where they are missing.";

/// `cargo xtask fuzz`
#[derive(Debug, clap::Args)]
#[command(after_long_help = ABOUT)]
pub(crate) struct Arguments {
    /// Which targets; all when left out
    targets: Vec<String>,
    /// How long each of them runs
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Afterwards make what was found, cut down to what adds coverage, the seeds
    #[arg(long)]
    distil: bool,
}

/// The command.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let folder = repository().join("tests/fuzz");
    let known = targets(&folder)?;
    if let Some(unknown) = arguments.targets.iter().find(|name| !known.contains(name)) {
        bail!("there is no target {unknown}; there are {}", known.join(" "));
    }
    let chosen = if arguments.targets.is_empty() { &known } else { &arguments.targets };
    ensure_tools()?;
    lock(&folder)?;
    let binaries = build(&folder, chosen)?;
    let mut failed = 0;
    for name in chosen {
        let target = Target::new(&folder, name, &binaries)?;
        match target.run(arguments.seconds) {
            Ok(ran) => println!("{name:<14}{ran}"),
            Err(error) => {
                println!("{name:<14}failed");
                eprintln!("error: {name}: {error:#}");
                failed += 1;
                continue;
            }
        }
        if arguments.distil {
            target.distil().with_context(|| format!("cannot distil the seeds of {name}"))?;
        }
    }
    println!("{} targets, {failed} failed", chosen.len());
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The targets there are, by their files.
fn targets(folder: &Path) -> Result<Vec<String>> {
    let sources = folder.join("fuzz_targets");
    let entries = fs::read_dir(&sources).with_context(|| format!("cannot read {}", sources.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if let (Some(name), Some("rs")) =
            (path.file_stem().and_then(|it| it.to_str()), path.extension().and_then(|it| it.to_str()))
        {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn works(program: &str, arguments: &[&str]) -> bool {
    let status = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn ensure_tools() -> Result<()> {
    ensure!(
        works("rustup", &["--version"]),
        "rustup is missing: cargo-fuzz needs a nightly compiler beside the one that is used (https://rustup.rs)"
    );
    ensure!(works("c++", &["--version"]), "a C++ compiler is missing, for libFuzzer: apt-get install g++");
    if !works("rustup", &["run", TOOLCHAIN, "rustc", "--version"]) {
        let mut install = Command::new("rustup");
        install.args(["toolchain", "install", TOOLCHAIN, "--profile", "minimal"]);
        visibly(&mut install).context("the nightly toolchain cannot be installed")?;
    }
    if !works("cargo", &["fuzz", "--version"]) {
        visibly(cargo().args(["install", "cargo-fuzz", "--locked"]))
            .context("cargo-fuzz cannot be installed")?;
    }
    Ok(())
}

/// What is fuzzed has the dependencies that are shipped: the lock file begins as a copy of the workspace's.
fn lock(folder: &Path) -> Result<()> {
    let (ours, theirs) = (repository().join("Cargo.lock"), folder.join("Cargo.lock"));
    let changed = |path: &Path| fs::metadata(path).and_then(|about| about.modified());
    let newer = changed(&ours).context("the workspace has no Cargo.lock")?;
    if changed(&theirs).is_ok_and(|theirs| theirs >= newer) {
        return Ok(());
    }
    fs::copy(&ours, &theirs).map(drop).with_context(|| format!("cannot write {}", theirs.display()))
}

/// Builds what is to be run; returns where it is.
fn build(folder: &Path, chosen: &[String]) -> Result<PathBuf> {
    let host = host()?;
    let one = if let [one] = chosen { Some(one) } else { None };
    let mut command = Command::new("rustup");
    command.args(["run", TOOLCHAIN, "cargo", "fuzz", "build", "--target", &host, "--fuzz-dir"]).arg(folder);
    command.args(one).current_dir(repository()).env("ZTUNNEL_EBPF_SKIP", "1").env_remove("CARGO_TARGET_DIR");
    visibly(command.stdout(std::io::stderr()))?;
    Ok(folder.join("target").join(host).join("release"))
}

fn host() -> Result<String> {
    let output = Command::new("rustup").args(["run", TOOLCHAIN, "rustc", "-vV"]).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("the nightly compiler does not say for what it compiles")
}

/// One target and its folders.
struct Target {
    name: String,
    binary: PathBuf,
    seeds: PathBuf,
    /// What runs add.
    found: PathBuf,
    /// Inputs that break something.
    broken: PathBuf,
    log: PathBuf,
}

impl Target {
    fn new(folder: &Path, name: &str, binaries: &Path) -> Result<Self> {
        let below = |what: &str| folder.join("target").join(what).join(name);
        let target = Self {
            name: name.to_owned(),
            binary: binaries.join(name),
            seeds: folder.join("corpus").join(name),
            found: below("corpus"),
            broken: below("broken"),
            log: below("log"),
        };
        for made in [Some(&*target.seeds), Some(&target.found), Some(&target.broken), target.log.parent()] {
            fs::create_dir_all(made.unwrap_or(folder))?;
        }
        Ok(target)
    }

    /// The program with its limits. It ends with this process, whatever ends that.
    fn command(&self) -> Result<Command> {
        let log =
            fs::File::create(&self.log).with_context(|| format!("cannot write {}", self.log.display()))?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(&self.binary).args(LIMITS);
        command.env("ASAN_OPTIONS", SANITIZER).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command.arg(format!("-artifact_prefix={}/", self.broken.display()));
        Ok(command)
    }

    fn run(&self, seconds: u64) -> Result<String> {
        eprintln!("{} for {seconds} s, log in {}", self.name, self.log.display());
        let mut command = self.command()?;
        command.arg(format!("-max_total_time={seconds}")).arg("-print_final_stats=1");
        // What is found goes to the first of them.
        let status =
            command.args([&self.found, &self.seeds]).status().context("cannot run setpriv (util-linux)")?;
        let log = String::from_utf8_lossy(&fs::read(&self.log)?).into_owned();
        if status.success() {
            return Ok(Ran::read(&log).to_string());
        }
        let lines: Vec<&str> = log.lines().collect();
        eprintln!("{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        match input(&log) {
            Some(input) => bail!(
                "an input breaks it: {input}\nto run it again: ZTUNNEL_EBPF_SKIP=1 cargo +{TOOLCHAIN} fuzz run --fuzz-dir \
                 tests/fuzz {} {input}",
                self.name
            ),
            None => bail!("{status}; its log is {}", self.log.display()),
        }
    }

    /// Puts some of the inputs that reach what all reach in the place of the seeds that were found: those that reach
    /// most. Seeds with names stay.
    fn distil(&self) -> Result<()> {
        let least = self.found.with_extension("least");
        let _not_there = fs::remove_dir_all(&least);
        fs::create_dir_all(&least)?;
        let mut command = self.command()?;
        let status = command.arg("-set_cover_merge=1").args([&least, &self.seeds, &self.found]).status()?;
        ensure!(status.success(), "{status}; its log is {}", self.log.display());
        let (mut size, mut count) = (0, 0);
        for seed in fs::read_dir(&self.seeds)? {
            let seed = seed?;
            if is_found(&seed.file_name()) {
                fs::remove_file(seed.path())?;
            } else {
                size += seed.metadata()?.len();
            }
        }
        let mut inputs = Vec::new();
        for entry in fs::read_dir(&least)? {
            let entry = entry?;
            let about = entry.metadata()?;
            // They are written in the order of what each adds.
            inputs.push((about.modified()?, entry.file_name(), about.len()));
        }
        inputs.sort();
        for (_, name, length) in inputs {
            if is_found(&name) && count < SEEDS_FOUND_MAX && length <= SEED_MAX && size + length <= SEEDS_MAX
            {
                fs::copy(least.join(&name), self.seeds.join(&name))?;
                (size, count) = (size + length, count + 1);
            }
        }
        Ok(fs::remove_dir_all(&least)?)
    }
}

/// Whether a run gave an input its name, which is a digest then.
fn is_found(name: &OsStr) -> bool {
    name.len() == 40 && name.as_encoded_bytes().iter().all(u8::is_ascii_hexdigit)
}

/// The input that a log says was kept.
fn input(log: &str) -> Option<&str> {
    log.lines().find_map(|line| line.split_once("Test unit written to ").map(|(_, path)| path.trim()))
}

/// What a log says of a run that ended well.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ran {
    runs: u64,
    each_second: u64,
    edges: u64,
    inputs: u64,
}

impl Ran {
    fn read(log: &str) -> Self {
        let number = |line: &str, after: &str| {
            let (_, rest) = line.split_once(after)?;
            rest.trim_start().split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        let mut ran = Self::default();
        for line in log.lines() {
            for (after, to) in [
                ("stat::number_of_executed_units:", &mut ran.runs),
                ("stat::average_exec_per_sec:", &mut ran.each_second),
                (" cov:", &mut ran.edges),
                (" corp:", &mut ran.inputs),
            ] {
                *to = number(line, after).unwrap_or(*to);
            }
        }
        ran
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { runs, each_second, edges, inputs } = self;
        write!(f, "{runs:>9} runs, {each_second:>6} each second, {edges:>6} edges, {inputs:>5} inputs")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_module_a_binary_and_seeds() {
        let folder = repository().join("tests/fuzz");
        let read = |path: &str| fs::read_to_string(folder.join(path)).expect("it can be read");
        let (manifest, library) = (read("Cargo.toml"), read("src/lib.rs"));
        let targets = targets(&folder).expect("there are targets");
        assert!(targets.len() >= 5, "{targets:?}");
        assert_eq!(manifest.matches("[[bin]]").count(), targets.len());
        for name in &targets {
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is no binary");
            assert!(library.contains(&format!("pub mod {name};")), "{name} has no module");
            let seeds = fs::read_dir(folder.join("corpus").join(name)).expect("there are seeds");
            let sizes: Vec<u64> =
                seeds.map(|seed| seed.and_then(|it| it.metadata()).expect("a file").len()).collect();
            assert!(!sizes.is_empty() && sizes.iter().sum::<u64>() <= SEEDS_MAX, "{name}: {sizes:?}");
        }
    }

    #[test]
    fn logs_are_read() {
        let log = "#2\tINITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 40Mb\n\
                   #4096\tDONE   cov: 321 ft: 999 corp: 57/2Kb lim: 8192 exec/s: 819 rss: 61Mb\n\
                   stat::number_of_executed_units: 4096\nstat::average_exec_per_sec:     819\n";
        let ran = Ran { runs: 4096, each_second: 819, edges: 321, inputs: 57 };
        assert_eq!(Ran::read(log), ran);
        assert_eq!(input(log), None);
        let log = "artifact_prefix='/a/'; Test unit written to /a/crash-0123\nBase64: AAA=\n";
        assert_eq!(input(log), Some("/a/crash-0123"));
    }
}
