//! Finding the built programs.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

pub use xtask::places::{DAEMON_VARIABLE, envoy, repository, target};

/// The daemon's binary.
pub fn daemon() -> Result<PathBuf> {
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

fn newest(name: &str) -> Option<PathBuf> {
    let built =
        |path: &Path| path.metadata().and_then(|data| data.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    ["release", "debug"]
        .map(|profile| target().join(profile).join(name))
        .into_iter()
        .filter(|path| path.is_file())
        .max_by_key(|path| built(path))
}
