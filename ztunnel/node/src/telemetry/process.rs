//! What the process itself uses: its file descriptors, which are its connections.

use std::fmt;
use std::fs;

use nix::sys::resource::Resource;
use nix::sys::resource::getrlimit;

use crate::telemetry::metrics::Families;
use crate::telemetry::metrics::Sample;

/// Writes `process_open_fds` and `process_max_fds`, each where the kernel tells.
pub fn collect(families: &mut Families<'_>) -> fmt::Result {
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // The listing itself is one of the descriptors it lists.
        let count = open.count().saturating_sub(1) as f64;
        families.gauge(
            "process_open_fds",
            "Open file descriptors.",
            &[Sample { labels: &[], value: count }],
        )?;
    }
    if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let help = "The most file descriptors the process may open.";
        families.gauge("process_max_fds", help, &[Sample { labels: &[], value: soft as f64 }])?;
    }
    Ok(())
}
