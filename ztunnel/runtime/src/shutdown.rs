//! The drain signal, its deadline, and the place where tasks are spawned.
//!
//! Two moments matter: *draining* (take nothing new, finish what is open) and *closing* (the deadline has
//! passed: drop what is left). Both are levels, not events: a late listener sees them too.

use std::future::Future;

use tokio::sync::watch;

/// How far the end of the process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Running,
    Draining,
    Closing,
}

/// Starts the drain and, later, the end.
#[derive(Debug)]
pub struct Trigger(watch::Sender<Phase>);

/// Learns of the drain and the end. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Signal(watch::Receiver<Phase>);

/// Makes the two ends of a shutdown.
pub fn channel() -> (Trigger, Signal) {
    let (sender, receiver) = watch::channel(Phase::Running);
    (Trigger(sender), Signal(receiver))
}

impl Trigger {
    /// From here on nothing new is taken.
    pub fn drain(&self) {
        self.0.send_if_modified(|phase| {
            let first = *phase < Phase::Draining;
            *phase = (*phase).max(Phase::Draining);
            first
        });
    }

    /// Whether anybody still listens.
    pub fn is_heard(&self) -> bool {
        self.0.receiver_count() > 0
    }

    /// From here on what is still open is dropped.
    pub fn close(&self) {
        self.0.send_replace(Phase::Closing);
    }
}

impl Signal {
    /// Whether the drain has begun.
    pub fn is_draining(&self) -> bool {
        *self.0.borrow() >= Phase::Draining
    }

    /// Waits for the drain to begin (or for the trigger to be gone, which means the same).
    pub async fn draining(&mut self) {
        let _gone = self.0.wait_for(|phase| *phase >= Phase::Draining).await;
    }

    /// Waits for the deadline (or for the trigger to be gone).
    pub async fn closing(&mut self) {
        let _gone = self.0.wait_for(|phase| *phase >= Phase::Closing).await;
    }
}

/// Spawns a task on the runtime of the caller. The only spawn in the daemon, so that a reader finds every
/// concurrent activity by its callers.
#[expect(clippy::disallowed_methods, reason = "this is the place the lint sends everybody to")]
pub fn spawn<F>(future: F) -> tokio::task::JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(future)
}
