//! What tells the daemon to stop.

use tokio::signal::unix::Signal as UnixSignal;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;
use ztunnel_node::admin::quit;

use crate::app::error::RunError;

/// SIGTERM, SIGINT and the request over HTTP, which mean the same.
pub(super) struct Signals {
    terminate: UnixSignal,
    interrupt: UnixSignal,
    /// Whoever asked over HTTP.
    pub(super) quit: quit::Asked,
}

impl Signals {
    /// Listens from now on.
    pub(super) fn new(quit: quit::Asked) -> Result<Self, RunError> {
        let listen =
            |kind| signal(kind).map_err(|source| RunError::System("cannot listen to signals", source));
        let (terminate, interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
        Ok(Self { terminate, interrupt, quit })
    }

    /// Waits for one of them. Cancel-safe.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = self.quit.asked() => {}
        }
    }
}
