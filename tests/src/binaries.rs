//! Finding the built programs.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

/// Names the daemon to test, instead of the newest one in `target`.
pub const DAEMON_VARIABLE: &str = "ZTUNNEL_BIN";

static CHOSEN: OnceLock<PathBuf> = OnceLock::new();

/// From here on this is the daemon to start. Only the first choice counts.
pub fn use_daemon(path: PathBuf) {
    let _already_chosen = CHOSEN.set(path);
}

/// The repository.
pub fn repository() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the package is a folder of the repository").to_owned()
}

/// Where cargo builds to.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from)
}

/// The daemon's binary.
pub fn daemon() -> Result<PathBuf> {
    if let Some(path) = CHOSEN.get() {
        return Ok(path.clone());
    }
    if let Some(path) = std::env::var_os(DAEMON_VARIABLE) {
        return PathBuf::from(&path).canonicalize().with_context(|| format!("{DAEMON_VARIABLE}={path:?}"));
    }
    match newest("ztunnel") {
        Some(path) => Ok(path),
        None => bail!("the daemon is not built: cargo build --release -p ztunnel"),
    }
}

/// The program that plays client and server where curl and nginx can't.
pub fn peer() -> Result<PathBuf> {
    match newest("ztunnel-peer") {
        Some(path) => Ok(path),
        None => bail!("ztunnel-peer is not built: cargo build -p ztunnel-tests"),
    }
}

/// Envoy's binary, where `cargo xtask setup` has put it.
pub fn envoy() -> Result<PathBuf> {
    let tools = target().join("tools/envoy");
    let found = find(&tools, "envoy", 6);
    found.with_context(|| format!("no envoy below {}: run `cargo xtask setup`", tools.display()))
}

fn find(directory: &Path, name: &str, depth: usize) -> Option<PathBuf> {
    let entries = std::fs::read_dir(directory).ok()?;
    let mut folders = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            folders.push(path);
        } else if entry.file_name() == name && entry.metadata().is_ok_and(|data| data.len() > 1 << 20) {
            return Some(path);
        }
    }
    if depth == 0 {
        return None;
    }
    folders.iter().find_map(|folder| find(folder, name, depth - 1))
}

fn newest(name: &str) -> Option<PathBuf> {
    let built =
        |path: &Path| path.metadata().and_then(|data| data.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    ["release", "debug"]
        .map(|profile| target().join(profile).join(name))
        .into_iter()
        .filter(|path| path.is_file())
        .max_by_key(|path| built(path))
}
