//! Where the repository is, where cargo builds to, and what `cargo xtask setup` has fetched.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Names the daemon to test, instead of the newest one in `target`.
pub const DAEMON_VARIABLE: &str = "ZTUNNEL_BIN";

/// The repository.
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("the package is a folder of the repository").to_owned()
}

/// Where cargo builds to.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from)
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
