//! The composition root: builds each component once, joins them by channels, and carries out what the pure
//! machines decide.
//!
//! | Who enrols the pods | Module |
//! |---|---|
//! | a mesh file says which, programs in the kernel capture them | `ebpf` |
//! | a node agent says which, and redirects their traffic | `agent` |
//! | nobody: one workload is served where this process is | `dedicated` |
//!
//! Each of them puts a daemon together of what every daemon has (`base`), says what differs (`daemon::Enrolment`), and
//! lets it run (`daemon`), as the pure machine in [`lifecycle`] says. The daemons of a node meet in `meeting`, by the
//! words in [`handover`].
//!
//! Two kinds of threads: this module's control runtime (mesh, certificates, enrolment, hand-over, metrics), and
//! the data plane's own threads. Nothing here is on the way of a byte.

use std::io;
use std::time::Duration;

use ztunnel_node::telemetry;
use ztunnel_node::telemetry::Telemetry;
use ztunnel_node::telemetry::logging;
use ztunnel_node::telemetry::logging::Levels;
use ztunnel_node::telemetry::writer;

pub use crate::app::error::RunError;
use crate::config::resolved::Run;

mod addresses;
mod agent;
mod announcements;
mod base;
pub mod certificates;
mod closed;
pub mod commands;
pub mod control;
mod daemon;
mod dedicated;
pub mod descriptors;
mod ebpf;
mod error;
pub mod handover;
pub mod kernel;
pub mod lifecycle;
mod meeting;
pub mod memory;
pub mod ports;
pub mod privileges;
mod repeats;
mod self_pod;
mod signals;
mod source;
pub mod undo;
pub mod version;

/// How long the end of the process waits for its last log lines to be written.
const LOG_PATIENCE: Duration = Duration::from_secs(2);

/// Serves the node until a signal, or until another daemon has taken over and every connection has ended.
pub fn run(config: Run) -> Result<(), RunError> {
    let log = writer::start_limited(Box::new(io::stdout()), config.log_format, config.access_log_rate)
        .map_err(|source| RunError::System("cannot start the log writer", source))?;
    let levels = logging::install(&config.log_filter, config.log_format, log.clone())?;
    let access_log = config.log_filter.access_log();
    let telemetry = Telemetry::new(telemetry::Config { access_log, ..telemetry::Config::default() }, log);
    raise_open_files();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), node = %config.places.node, "starting");
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let result = serve_on_a_runtime(config, telemetry.clone(), levels);
    // Whoever reads the log sees the end of it.
    telemetry.log().flush(LOG_PATIENCE);
    result
}

fn serve_on_a_runtime(config: Run, telemetry: Telemetry, levels: Levels) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| RunError::System("cannot start the control runtime", source))?;
    runtime.block_on(async {
        match (config.zds.clone(), config.dedicated.clone()) {
            (Some(zds), _) => agent::serve(config, zds, telemetry, levels).await,
            (None, Some(dedicated)) => dedicated::serve(config, dedicated, telemetry, levels).await,
            (None, None) => ebpf::serve(config, telemetry, levels).await,
        }
    })
}

/// Every connection is two or three sockets: the default soft limit is for programs that use select(2).
fn raise_open_files() {
    use nix::sys::resource::Resource::RLIMIT_NOFILE;
    if let Ok((_soft, hard)) = nix::sys::resource::getrlimit(RLIMIT_NOFILE)
        && let Err(error) = nix::sys::resource::setrlimit(RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, "the limit of open files stays low");
    }
}
