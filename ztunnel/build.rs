//! Compiles the eBPF programs and tells the crate where the object is (`ZTUNNEL_EBPF_OBJECT`), and who compiled it
//! (`ZTUNNEL_RUSTC`).

use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let ebpf = here.join("../ebpf");
    for part in ["programs/src", "programs/Cargo.toml", "programs/Cargo.lock", "abi/src"] {
        tell(&format!("rerun-if-changed={}", ebpf.join(part).display()));
    }
    tell(&format!("rerun-if-env-changed={}", ztunnel_ebpf_build::SKIP));
    tell(&format!("rustc-env=ZTUNNEL_RUSTC={}", compiler().unwrap_or_else(|| "unknown".to_owned())));
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

/// What the compiler says it is.
fn compiler() -> Option<String> {
    let output = std::process::Command::new(std::env::var_os("RUSTC")?).arg("--version").output().ok()?;
    let said = String::from_utf8(output.stdout).ok()?;
    Some(said.trim().to_owned()).filter(|said| output.status.success() && !said.contains('\n'))
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
