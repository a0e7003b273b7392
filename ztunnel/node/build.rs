//! Compiles the eBPF programs and tells the crate where the object is (`ZTUNNEL_EBPF_OBJECT`).

use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let ebpf = here.join("../../ebpf");
    for part in ["programs/src", "programs/Cargo.toml", "programs/Cargo.lock", "abi/src"] {
        tell(&format!("rerun-if-changed={}", ebpf.join(part).display()));
    }
    tell(&format!("rerun-if-env-changed={}", ztunnel_ebpf_build::SKIP));
    match object(&ebpf, &out) {
        Ok(object) => {
            tell(&format!("rustc-env=ZTUNNEL_EBPF_OBJECT={}", object.display()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn object(ebpf: &Path, out: &Path) -> anyhow::Result<PathBuf> {
    if std::env::var_os(ztunnel_ebpf_build::SKIP).is_some_and(|value| value == "1") {
        let empty = out.join("no-programs");
        std::fs::write(&empty, [])?;
        return Ok(empty);
    }
    ztunnel_ebpf_build::build(&ebpf.join("programs"), out)
}

fn tell(what: &str) {
    println!("cargo::{what}");
}
