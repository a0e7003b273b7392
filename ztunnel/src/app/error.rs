//! Why the daemon does not start.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use ztunnel_control::authority::AuthorityError;
use ztunnel_node::capture;
use ztunnel_node::telemetry::logging;
use ztunnel_objects::diagnostic::Diagnostic;
use ztunnel_tls::provider::TooLate;

use crate::app::privileges::Missing;

/// Why the daemon does not start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The mesh has errors, and there is no last good one yet.
    #[error("the mesh file has errors:\n{}", lines(.0))]
    Mesh(Vec<Diagnostic>),
    /// Only a mesh file says which pods programs are to capture.
    #[error("a mesh of a control plane does not say which pods to capture: a node agent has to (--zds)")]
    NoPods,
    /// A directory or a socket of the daemon cannot be used.
    #[error("{what} {path:?} cannot be made (run as root, or name another directory with --run-dir)")]
    Path {
        /// What it is for.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An address cannot be listened on.
    #[error(
        "cannot listen on {address} ({what}): name another one with {flag}, or see who has it with \
         `ss -ltnp sport = :{port}`; the node is as it was", port = address.port()
    )]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What for.
        what: &'static str,
        /// What would name another one.
        flag: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The certificate authority.
    #[error("the certificate authority does not start")]
    Authority(#[from] AuthorityError),
    /// A port is not free.
    #[error(transparent)]
    Bind(#[from] capture::rules::BindError),
    /// A privilege is missing.
    #[error(transparent)]
    NotPermitted(#[from] capture::rules::NotPermitted),
    /// What TLS has to comply with.
    #[error("COMPLIANCE_POLICY")]
    Compliance(#[from] TooLate),
    /// So are these.
    #[error(transparent)]
    Privileges(#[from] Missing),
    /// The kernel.
    #[error("capture does not start")]
    Capture(#[from] capture::error::OpenError),
    /// The self-test.
    #[error("{0}")]
    SelfTest(String),
    /// The log.
    #[error("cannot set up the log")]
    Log(#[from] logging::AlreadyInstalled),
    /// Threads, signals, file descriptors.
    #[error("{0}")]
    System(&'static str, #[source] io::Error),
}

fn lines(diagnostics: &[Diagnostic]) -> String {
    diagnostics.iter().map(|diagnostic| format!("  {diagnostic}\n")).collect()
}
