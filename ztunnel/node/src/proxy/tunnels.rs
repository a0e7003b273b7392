//! The tunnels peers have open to one pod, shared out among those they prove to be.
//!
//! A tunnel without streams costs memory for nothing. Of one identity no more than a part of a pod's tunnels are kept: who
//! comes then takes the place of the one that has been idle longest, and is turned away if all are in use.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use parking_lot::MutexGuard;
use tokio::time::Instant;
use ztunnel_mesh::model::identity::SpiffeId;

use crate::hbone::server::Activity;

/// Of a pod's tunnels, those of one identity may be one part in so many.
pub const IDENTITY_PART: usize = 4;

/// The tunnels to one pod.
#[derive(Debug, Clone, Default)]
pub struct Tunnels(Arc<Mutex<Open>>);

#[derive(Debug, Default)]
struct Open {
    next: u64,
    of: HashMap<SpiffeId, HashMap<u64, Activity>>,
}

/// Which of those that are idle since then goes: the longest.
fn longest_idle(idle: impl Iterator<Item = (u64, Option<Instant>)>) -> Option<u64> {
    idle.filter_map(|(id, since)| Some((since?, id))).min().map(|(_, id)| id)
}

impl Tunnels {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.0.lock()
    }

    /// A place for one more of `identity`, if it gets one where all may have `max`.
    pub fn enter(&self, identity: &SpiffeId, activity: Activity, max: usize) -> Option<Place> {
        let mut open = self.open();
        let id = open.next;
        open.next += 1;
        let own = open.of.entry(identity.clone()).or_default();
        if own.len() >= (max / IDENTITY_PART).max(1) {
            let gone = longest_idle(own.iter().map(|(id, activity)| (*id, activity.idle_since())))?;
            if let Some(activity) = own.remove(&gone) {
                activity.retire();
            }
        }
        own.insert(id, activity);
        Some(Place { all: self.clone(), identity: identity.clone(), id })
    }
}

/// A place among the tunnels of an identity, given back when dropped.
#[derive(Debug)]
pub struct Place {
    all: Tunnels,
    identity: SpiffeId,
    id: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.all.open();
        if let Some(own) = open.of.get_mut(&self.identity) {
            own.remove(&self.id);
            if own.is_empty() {
                open.of.remove(&self.identity);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::hbone::tests::id;

    #[test]
    fn the_longest_idle_goes_and_none_that_is_in_use() {
        let now = Instant::now();
        let ago = |seconds| Some(now - Duration::from_secs(seconds));
        assert_eq!(longest_idle([(1, ago(5)), (2, None), (3, ago(9)), (4, ago(1))].into_iter()), Some(3));
        assert_eq!(longest_idle([(1, None), (2, None)].into_iter()), None);
    }

    #[test]
    fn an_identity_keeps_no_other_out() {
        let all = Tunnels::default();
        let max = 2 * IDENTITY_PART;
        let enter = |who: &str, activity: &Activity| all.enter(&id(who), activity.clone(), max);
        let used: Vec<_> = (0..2).map(|_| Activity::used()).collect();
        let places: Vec<_> = used.iter().filter_map(|activity| enter("many", activity)).collect();
        assert_eq!(places.len(), 2);
        assert!(enter("many", &Activity::used()).is_none(), "its share is in use");
        let idle = Activity::idle();
        let other = enter("other", &idle).unwrap();
        let (second, third) = (enter("other", &Activity::idle()).unwrap(), enter("other", &Activity::idle()));
        assert!(third.is_some() && idle.is_retired(), "one that was idle makes room");
        drop((other, second, third, places));
        assert!(all.open().of.is_empty());
    }
}
