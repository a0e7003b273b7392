//! Tells the program who compiled it (`ZTUNNEL_RUSTC`), and of which commit.

use std::path::{Path, PathBuf};

fn main() {
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    tell("rerun-if-changed=build.rs");
    tell(&format!("rustc-env=ZTUNNEL_RUSTC={}", compiler().unwrap_or_else(|| "unknown".to_owned())));
    revision(&here);
}

/// The commit of a clone, where whoever builds does not name it (`ZTUNNEL_GIT_REVISION`). Of release builds only: others
/// would be compiled anew at every commit.
fn revision(here: &Path) {
    tell("rerun-if-env-changed=ZTUNNEL_GIT_REVISION");
    let named = std::env::var_os("ZTUNNEL_GIT_REVISION").is_some();
    if named || std::env::var("PROFILE").as_deref() != Ok("release") {
        return;
    }
    let git = |args: &[&str]| {
        let output = std::process::Command::new("git").arg("-C").arg(here).args(args).output().ok()?;
        let said = String::from_utf8(output.stdout).ok()?;
        Some(said.trim().to_owned()).filter(|said| output.status.success() && !said.is_empty())
    };
    let Some(revision) = git(&["rev-parse", "HEAD"]) else { return };
    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--path-format=absolute", "--git-path", file]) {
            tell(&format!("rerun-if-changed={path}"));
        }
    }
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some();
    tell(&format!("rustc-env=ZTUNNEL_GIT_REVISION={revision}"));
    tell(&format!("rustc-env=ZTUNNEL_BUILD_STATUS={}", if changed { "Modified" } else { "Clean" }));
}

/// What the compiler says it is.
fn compiler() -> Option<String> {
    let output = std::process::Command::new(std::env::var_os("RUSTC")?).arg("--version").output().ok()?;
    let said = String::from_utf8(output.stdout).ok()?;
    Some(said.trim().to_owned()).filter(|said| output.status.success() && !said.contains('\n'))
}

fn tell(what: &str) {
    println!("cargo::{what}");
}
