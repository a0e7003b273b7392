//! Compiles the eBPF programs, for the daemon's build script and for `cargo xtask`.
//!
//! Owns the choice of compiler and the environment it runs in; knows nothing of what the programs do.
//! BPF targets need `core` from source: a rustup nightly with `rust-src`, or the distribution's compiler with
//! its library sources (Debian: `rustc-web`, `rust-web-src`).

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// File name of the object in the output directory.
pub const OBJECT: &str = "ztunnel-programs";

/// Set to `1` to skip the compilation (checks, IDEs): the daemon then embeds an empty object and says so when
/// it starts.
pub const SKIP: &str = "ZTUNNEL_EBPF_SKIP";

/// What compiles the programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compiler {
    /// `rustup run <toolchain> cargo`.
    Rustup(String),
    /// The cargo of the caller with this rustc, allowed to use unstable flags.
    Rustc(PathBuf),
}

/// Finds a compiler that has its library sources, or says how to get one.
pub fn compiler() -> Result<Compiler> {
    if let Some(toolchain) = nightly() {
        return Ok(Compiler::Rustup(toolchain));
    }
    let system = PathBuf::from("/usr/bin/rustc");
    if system.exists() && has_sources(&sysroot(Command::new(&system))) {
        return Ok(Compiler::Rustc(system));
    }
    bail!(
        "no compiler for the eBPF programs: neither a rustup nightly with rust-src nor /usr/bin/rustc with library \
         sources; run `cargo xtask setup`, or set {SKIP}=1 to build without them"
    )
}

/// Builds the programs in `programs_dir` and returns the object's path, below `out_dir`. Uses a target
/// directory of its own, so that it does not wait for the cargo that may be running it; all that build for one profile
/// share it, or each set of features would compile `core` anew.
pub fn build(programs_dir: &Path, out_dir: &Path) -> Result<PathBuf> {
    let compiler = compiler()?;
    if linker().is_none() {
        bail!(
            "bpf-linker is not installed; run `cargo xtask setup`, or set {SKIP}=1 to build without the programs"
        );
    }
    // Cargo's is <profile>/build/<package>-<hash>/out.
    let profile = out_dir.ancestors().nth(3).filter(|_| out_dir.ends_with("out"));
    let target_dir = profile.unwrap_or(out_dir).join("ebpf-target");
    let mut command = match &compiler {
        Compiler::Rustup(toolchain) => {
            let mut command = Command::new("rustup");
            command.args(["run", toolchain, "cargo"]);
            command
        }
        Compiler::Rustc(_) => {
            Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
        }
    };
    // What the outer cargo set is meant for the outer build.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let keep = matches!(&*text, "CARGO_HOME" | "RUSTUP_HOME")
            || text.starts_with("CARGO_HTTP_")
            || text.starts_with("CARGO_NET_")
            || text.starts_with("CARGO_REGISTR");
        if !keep
            && (text.starts_with("CARGO") || text.starts_with("RUST") || text == "TARGET" || text == "HOST")
        {
            command.env_remove(&name);
        }
    }
    if let Compiler::Rustc(rustc) = &compiler {
        command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
    }
    let target = if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };
    let flags = ["-Clinker=bpf-linker", "-Cdebuginfo=2", "-Clink-arg=--btf"].join("\x1f");
    command
        .args(["build", "--release", "--locked", "-Zbuild-std=core", "--target", target, "--target-dir"])
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .current_dir(programs_dir);
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!(
            "compiling the eBPF programs with {compiler:?} failed ({}):\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let built = target_dir.join(target).join("release").join(OBJECT);
    let object = out_dir.join(OBJECT);
    std::fs::copy(&built, &object)
        .with_context(|| format!("copying {} to {}", built.display(), object.display()))?;
    Ok(object)
}

fn nightly() -> Option<String> {
    let output = Command::new("rustup").args(["toolchain", "list", "--quiet"]).output().ok()?;
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    list.lines()
        .filter_map(|line| line.split_whitespace().next())
        .find(|toolchain| {
            let mut rustc = Command::new("rustup");
            rustc.args(["run", toolchain, "rustc"]);
            toolchain.starts_with("nightly") && has_sources(&sysroot(rustc))
        })
        .map(str::to_owned)
}

fn sysroot(mut rustc: Command) -> PathBuf {
    let output = rustc.args(["--print", "sysroot"]).env_remove("RUSTC_WRAPPER").output();
    output.map(|o| PathBuf::from(String::from_utf8_lossy(&o.stdout).trim())).unwrap_or_default()
}

fn has_sources(sysroot: &Path) -> bool {
    !sysroot.as_os_str().is_empty() && sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
}

fn linker() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("bpf-linker")).find(|file| file.exists())
}
