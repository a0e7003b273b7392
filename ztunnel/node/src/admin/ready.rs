//! Whether the daemon is ready, and if not, for whom it waits.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use parking_lot::MutexGuard;
use ztunnel_mesh::source::status::Source;

use crate::identity::worker::Identities;
use crate::identity::worker::Shortage;

/// Ready once nobody blocks it. Cheap to clone. A new one is ready: whoever must come first blocks it before the
/// server starts.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    blockers: BTreeMap<&'static str, usize>,
    stale: Option<SystemTime>,
    identities: Option<Identities>,
    source: Source,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { blockers, stale, .. } = self;
        f.debug_struct("State").field("blockers", blockers).field("stale", stale).finish_non_exhaustive()
    }
}

/// Keeps the daemon from being ready until [`Blocker::lift`] is called. Dropping it does not lift it: a task that
/// failed is not ready.
#[derive(Debug)]
#[must_use]
pub struct Blocker {
    name: &'static str,
    readiness: Readiness,
}

impl Readiness {
    /// Nobody blocks it yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Not ready from now on, until the answer is lifted. `name` is shown to who asks: a word for the part of the
    /// daemon that has yet to come up. A name can be blocked more than once, and again after it was lifted.
    pub fn block(&self, name: &'static str) -> Blocker {
        *self.state().blockers.entry(name).or_default() += 1;
        Blocker { name, readiness: self.clone() }
    }

    /// Who still blocks, each name once, in alphabetical order. Empty when ready.
    pub fn pending(&self) -> Vec<&'static str> {
        self.state().blockers.keys().copied().collect()
    }

    /// What is served is as it was at this time, as its source is away; `None` where it is as it is.
    pub fn stale(&self, since: Option<SystemTime>) {
        self.state().stale = since;
    }

    /// What [`Self::stale`] was last told.
    pub fn stale_since(&self) -> Option<SystemTime> {
        self.state().stale
    }

    /// From now on it counts whether the workloads of this node can prove who they are.
    pub fn certificates(&self, identities: Identities) {
        self.state().identities = Some(identities);
    }

    /// Which of them cannot.
    pub fn shortage(&self) -> Option<Shortage> {
        self.state().identities.as_ref().and_then(Identities::shortage)
    }

    /// How the source of pods and mesh stands.
    pub fn source(&self) -> Source {
        self.state().source.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is one step, so a panic elsewhere in the holder leaves nothing half done.
        self.0.lock()
    }
}

impl Blocker {
    /// This part is up.
    pub fn lift(self) {
        let blockers = &mut self.readiness.state().blockers;
        if let Some(count) = blockers.get_mut(self.name) {
            *count -= 1;
            if *count == 0 {
                blockers.remove(self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_everybody_has_lifted() {
        let readiness = Readiness::new();
        assert!(readiness.pending().is_empty());
        let (proxy, mesh) = (readiness.block("proxy"), readiness.block("mesh"));
        assert_eq!(readiness.pending(), ["mesh", "proxy"]);
        mesh.lift();
        assert_eq!(readiness.pending(), ["proxy"]);
        proxy.lift();
        assert!(readiness.pending().is_empty());
        readiness.block("mesh").lift();
        assert!(readiness.pending().is_empty());
    }

    #[test]
    fn a_name_waits_for_all_its_blockers() {
        let readiness = Readiness::new();
        let (one, two) = (readiness.block("proxy"), readiness.block("proxy"));
        one.lift();
        assert_eq!(readiness.pending(), ["proxy"]);
        two.lift();
        assert!(readiness.pending().is_empty());
    }

    #[test]
    fn a_task_that_died_is_not_ready() {
        let readiness = Readiness::new();
        drop(readiness.block("proxy"));
        assert_eq!(readiness.pending(), ["proxy"]);
    }
}
