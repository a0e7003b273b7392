//! Where the daemons of one node meet: the one before this one, and those after it.

use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::timeout;
use ztunnel_node::identity::inheritance;
use ztunnel_node::identity::worker::Identities;

use crate::app::error::RunError;
use crate::app::handover;
use crate::app::handover::Claim;
use crate::app::handover::Departing;
use crate::app::handover::Found;
use crate::app::handover::Predecessor;
use crate::app::handover::Successors;

/// The socket at which daemons of one node meet.
pub(super) const CONTROL_SOCKET: &str = "control.sock";

/// The other daemons of the node, as far as this one knows them.
pub(super) struct Meeting {
    /// Where they meet; `None` where no daemon follows on another.
    pub(super) socket: Option<PathBuf>,
    /// What is left to a successor that asks for it.
    identities: Identities,
    /// The place where successors ask, while this daemon answers there.
    pub(super) successors: Option<Successors>,
    /// The daemon before this one, while its process is there.
    pub(super) predecessor: Option<Departing>,
    /// The daemon that takes over, or has.
    pub(super) successor: Option<Claim>,
    /// One that asked while this daemon drains.
    pub(super) caller: Option<Claim>,
    /// Successors to which this daemon owes its end: see [`Claim::bye`].
    pub(super) held: Vec<Claim>,
}

impl Meeting {
    /// Asks nobody and answers nobody yet.
    pub(super) fn new(socket: Option<PathBuf>, identities: Identities) -> Self {
        let (successors, predecessor, successor, caller) = (None, None, None, None);
        Self { socket, identities, successors, predecessor, successor, caller, held: Vec::new() }
    }

    /// Asks the daemon that serves the node now, if there is one, to yield it.
    pub(super) async fn ask(&self) -> Found {
        match &self.socket {
            Some(socket) => handover::ask(socket).await,
            None => Found::Nobody,
        }
    }

    /// Tells that daemon that everything is taken over.
    pub(super) async fn finish(&mut self, predecessor: Option<Predecessor>) {
        self.predecessor = match predecessor {
            Some(predecessor) => Some(predecessor.done().await),
            None => None,
        };
    }

    /// Has successors find this daemon from now on, and no other one.
    pub(super) fn take_place(&mut self) -> Result<(), RunError> {
        let Some(socket) = &self.socket else { return Ok(()) };
        if self.has_place() {
            return Ok(());
        }
        let identities = self.identities.clone();
        let legacy = Box::new(move || inheritance::encode(&identities.usable()));
        let listening = Successors::listen(socket, legacy).map_err(|source| RunError::Path {
            what: "the control socket",
            path: socket.clone(),
            source,
        })?;
        self.successors = Some(listening);
        Ok(())
    }

    /// Whether successors find this daemon.
    pub(super) fn has_place(&self) -> bool {
        self.successors.as_ref().is_some_and(Successors::is_current)
    }

    /// Says to the daemon before this one that the end of this one is meant.
    pub(super) async fn leave(&mut self) {
        if let Some(predecessor) = &mut self.predecessor {
            predecessor.leave().await;
        }
    }

    /// Waits for the end of the daemon before this one, but not for longer. False if it is still there.
    pub(super) async fn predecessor_gone(&mut self, limit: Duration) -> bool {
        self.predecessor.is_none() || timeout(limit, gone(&mut self.predecessor)).await.is_ok()
    }
}

/// The next daemon that asks at that place. Cancel-safe.
pub(super) async fn called(successors: Option<&Successors>) -> Claim {
    match successors {
        Some(successors) => successors.next().await,
        None => std::future::pending().await,
    }
}

/// Waits for the end of the daemon before this one; for ever if there is none. Cancel-safe.
pub(super) async fn gone(predecessor: &mut Option<Departing>) {
    match predecessor {
        Some(predecessor) => predecessor.gone().await,
        None => std::future::pending().await,
    }
}

/// Waits for the end of the daemon that has taken over. Whether nobody serves the node then: it has died, and nobody is
/// in its place.
pub(super) async fn orphaned(
    successor: Option<&mut Claim>,
    successors: Option<&Successors>,
    socket: Option<&Path>,
) -> bool {
    let died = match successor {
        Some(successor) => successor.died().await,
        None => std::future::pending().await,
    };
    // It may have died before it had a place of its own; then this is the one where others ask.
    let has_place = successors.is_some_and(Successors::is_current);
    died && (has_place
        || match socket {
            Some(socket) => !handover::is_served(socket).await,
            None => true,
        })
}
