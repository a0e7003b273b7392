//! The endpoints of one service: many, and changed one at a time while they are read.

use std::sync::Arc;

use crate::model::workload::Membership;
use crate::model::workload::Workload;

/// A chunk is split when it would have more. A change copies one chunk, and the list of them.
const CHUNK_MAX: usize = 64;

/// A workload as an endpoint of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    workload: Arc<Workload>,
    /// The index of the membership in the workload's list.
    membership: u32,
}

impl Endpoint {
    /// `workload` as an endpoint by its `membership`, an index into its [`Workload::services`].
    fn new(workload: &Arc<Workload>, membership: usize) -> Self {
        Self { workload: Arc::clone(workload), membership: membership as u32 }
    }

    /// The workload.
    pub fn workload(&self) -> &Arc<Workload> {
        &self.workload
    }

    /// How it serves this service.
    pub fn membership(&self) -> Option<&Membership> {
        self.workload.services.get(self.membership as usize)
    }

    /// Its own port for the service's `port`, if it has one.
    pub fn own_port(&self, port: u16) -> Option<u16> {
        let ports = &self.membership()?.ports;
        ports.iter().find(|(from, _)| *from == port).map(|(_, to)| *to).filter(|to| *to != 0)
    }
}

/// The endpoints of one service, healthy or not, in the order of their workloads' names. Cheap to clone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Endpoints {
    chunks: Arc<Vec<Arc<Vec<Endpoint>>>>,
    len: u32,
    capacity_max: u32,
}

impl Endpoints {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The largest weight among them.
    pub fn capacity_max(&self) -> u32 {
        self.capacity_max
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        self.chunks.iter().flat_map(|chunk| chunk.iter())
    }

    /// The endpoint in one of [`Self::slots`] places, or nothing if that place is free. Uniformly random places
    /// give each endpoint the same chance, without counting any.
    pub fn slot(&self, slot: usize) -> Option<&Endpoint> {
        match &self.chunks[..] {
            [only] => only.get(slot),
            chunks => chunks.get(slot / CHUNK_MAX)?.get(slot % CHUNK_MAX),
        }
    }

    /// How many places there are: as many as endpoints where they are few, else a few times as many at most.
    pub fn slots(&self) -> usize {
        match &self.chunks[..] {
            [only] => only.len(),
            chunks => chunks.len() * CHUNK_MAX,
        }
    }

    /// The endpoint that is the workload of this name.
    pub fn find(&self, uid: &str) -> Option<&Endpoint> {
        let chunk = self.chunks.get(self.chunk_of(uid))?;
        chunk.binary_search_by(|endpoint| (*endpoint.workload.uid).cmp(uid)).ok().map(|at| &chunk[at])
    }

    /// The chunk that has `uid`, or would have it.
    fn chunk_of(&self, uid: &str) -> usize {
        let after =
            self.chunks.partition_point(|chunk| chunk.first().is_some_and(|it| *it.workload.uid <= *uid));
        after.saturating_sub(1)
    }

    /// Adds a workload, or replaces the one of the same name.
    pub(super) fn insert(&mut self, workload: &Arc<Workload>, membership: usize) {
        let new = Endpoint::new(workload, membership);
        let before = self.find(&workload.uid).map(|endpoint| endpoint.workload.capacity);
        let at_chunk = self.chunk_of(&workload.uid);
        let chunks = Arc::make_mut(&mut self.chunks);
        if chunks.is_empty() {
            chunks.push(Arc::default());
        }
        let chunk = Arc::make_mut(&mut chunks[at_chunk]);
        match chunk.binary_search_by(|endpoint| endpoint.workload.uid.cmp(&workload.uid)) {
            Ok(at) => chunk[at] = new,
            Err(at) => {
                if chunk.len() == chunk.capacity() {
                    // Most services have few endpoints; the usual doubling starts at four.
                    chunk.reserve_exact((chunk.len() / 2).clamp(1, CHUNK_MAX));
                }
                chunk.insert(at, new);
                self.len += 1;
            }
        }
        if chunk.len() > CHUNK_MAX {
            let upper = chunk.split_off(CHUNK_MAX / 2);
            chunks.insert(at_chunk + 1, Arc::new(upper));
        }
        self.reweigh(before, workload.capacity);
    }

    /// Removes the workload of that name. Says whether it was there.
    pub(super) fn remove(&mut self, uid: &str) -> bool {
        let Some(before) = self.find(uid).map(|endpoint| endpoint.workload.capacity) else { return false };
        let at_chunk = self.chunk_of(uid);
        let chunks = Arc::make_mut(&mut self.chunks);
        let chunk = Arc::make_mut(&mut chunks[at_chunk]);
        chunk.retain(|endpoint| *endpoint.workload.uid != *uid);
        let left = chunk.len();
        if left == 0 {
            chunks.remove(at_chunk);
        } else if let Some(next) = chunks.get(at_chunk + 1)
            && left + next.len() <= CHUNK_MAX / 2
        {
            // Half full at most, so that it is not split again at once.
            let next = chunks.remove(at_chunk + 1);
            Arc::make_mut(&mut chunks[at_chunk]).extend(next.iter().cloned());
        }
        self.len -= 1;
        self.reweigh(Some(before), 0);
        true
    }

    /// Keeps the largest weight when one changed. Only the end of the largest needs a look at all.
    fn reweigh(&mut self, before: Option<u32>, after: u32) {
        if after >= self.capacity_max {
            self.capacity_max = after;
        } else if before == Some(self.capacity_max) && self.capacity_max > 1 {
            self.capacity_max = self.iter().map(|endpoint| endpoint.workload.capacity).max().unwrap_or(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn workload(number: u16, capacity: u32) -> Arc<Workload> {
        Arc::new(Workload { capacity, ..Workload::sample("shop", &format!("w{number:05}")) })
    }

    fn names(endpoints: &Endpoints) -> Vec<String> {
        endpoints.iter().map(|endpoint| endpoint.workload.uid.to_string()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_list_of_chunks_is_a_sorted_list(
            changes in prop::collection::vec((0..400u16, prop::option::weighted(0.7, 1..4u32)), 0..900),
        ) {
            let mut model = BTreeMap::new();
            let mut endpoints = Endpoints::default();
            for (number, change) in changes {
                let before = endpoints.clone();
                let told = names(&before);
                match change {
                    Some(capacity) => {
                        endpoints.insert(&workload(number, capacity), 0);
                        model.insert(format!("w{number:05}"), capacity);
                    }
                    None => {
                        let name = format!("w{number:05}");
                        prop_assert_eq!(endpoints.remove(&name), model.remove(&name).is_some());
                    }
                }
                prop_assert_eq!(names(&before), told, "a snapshot does not change");
            }
            prop_assert_eq!(endpoints.len(), model.len());
            prop_assert!(names(&endpoints).iter().eq(model.keys()));
            for (name, capacity) in &model {
                prop_assert_eq!(endpoints.find(name).map(|it| it.workload.capacity), Some(*capacity));
            }
            let largest = model.values().max().copied().unwrap_or(0);
            prop_assert!(endpoints.capacity_max() >= largest && endpoints.capacity_max() <= largest.max(1));
            let in_slots = (0..endpoints.slots()).filter(|slot| endpoints.slot(*slot).is_some()).count();
            prop_assert_eq!(in_slots, endpoints.len());
            prop_assert!(endpoints.slots() <= 8 * endpoints.len() + 2 * CHUNK_MAX);
        }
    }
}
