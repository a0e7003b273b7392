//! A start that fails leaves the node as it was.
//!
//! What an earlier daemon captured stays captured, and closed or served as it was; what only this start captured is
//! released; and where there was nothing of ours in the kernel, nothing is left.

use ztunnel_node::capture;
use ztunnel_node::capture::uninstall::uninstall;

use crate::app::control::Control;
use crate::app::kernel::Kernel;

/// What was in the kernel before a start.
#[derive(Debug)]
pub struct Before {
    config: capture::Config,
    /// Nothing of any daemon.
    nothing: bool,
}

impl Before {
    /// Looks now.
    pub fn look(config: &capture::Config) -> Self {
        Self { config: config.clone(), nothing: !config.pin_dir.exists() }
    }

    /// Takes back a start that has captured no pod yet.
    pub fn restore(&self) {
        if self.nothing
            && let Err(error) = uninstall(&self.config)
        {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "something is left in the kernel of the start that failed: `ztunnel uninstall` removes it"
            );
        }
    }

    /// Takes back a start that has captured pods. `served`: whether another daemon serves them when it is told that this
    /// one is gone.
    pub async fn restore_from(&self, control: &mut Control, kernel: &Kernel, served: bool) {
        control.withdraw_new().await;
        match served {
            true => kernel.yield_node().await,
            false => kernel.close().await,
        }
        kernel.end().await;
        self.restore();
    }
}
