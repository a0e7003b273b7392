//! What one data-plane thread remembers of where connections are counted, so that opening one hashes and formats
//! no strings.
//!
//! Workloads and services are told apart by their address in memory. A remembered address is backed by a weak
//! reference, which keeps it from being given to another object; the entry goes once the object is gone.
//! Identities are as a rule those of the workloads: then they are compared, and hashed only where they differ.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Weak;

use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::workload::Workload;

use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::Security;
use crate::telemetry::series::Counts;

/// How many entries are kept. When that many are in use, all are forgotten; the series they name stay.
const ENTRIES_MAX: usize = 4096;

/// At this many entries the first look for dead ones is taken.
const FIRST_SWEEP: usize = 64;

/// The memory of one thread.
#[derive(Debug)]
pub(super) struct Cache {
    entries: HashMap<Key, Entry>,
    sweep_at: usize,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    reporter: Reporter,
    source: Option<usize>,
    source_identity: Identity,
    destination: Option<usize>,
    destination_identity: Identity,
    service: Option<usize>,
    security: Security,
}

#[derive(Debug, PartialEq, Eq, Hash)]
enum Identity {
    Unproven,
    OfWorkload,
    Other(SpiffeId),
}

#[derive(Debug)]
struct Entry {
    source: Option<Weak<Workload>>,
    destination: Option<Weak<Workload>>,
    service: Option<Weak<Service>>,
    counts: Arc<Counts>,
}

impl Cache {
    /// Nothing remembered yet.
    pub(super) fn new() -> Self {
        Self { entries: HashMap::new(), sweep_at: FIRST_SWEEP }
    }

    /// Where connections of `parties` are counted, if that is remembered.
    pub(super) fn find(&self, parties: &Parties) -> Option<&Arc<Counts>> {
        self.entries.get(&Key::of(parties)).map(|entry| &entry.counts)
    }

    /// Remembers where connections of `parties` are counted.
    pub(super) fn remember(&mut self, parties: &Parties, counts: Arc<Counts>) {
        if self.entries.len() >= self.sweep_at {
            self.sweep();
        }
        let entry = Entry {
            source: parties.source.as_ref().map(Arc::downgrade),
            destination: parties.destination.as_ref().map(Arc::downgrade),
            service: parties.service.as_ref().map(Arc::downgrade),
            counts,
        };
        self.entries.insert(Key::of(parties), entry);
    }

    /// Drops entries that cannot be found any more. The next time is when twice as many are there, so that the
    /// cost per remembered entry stays the same.
    fn sweep(&mut self) {
        self.entries.retain(|_, entry| entry.is_alive());
        if self.entries.len() >= ENTRIES_MAX {
            self.entries.clear();
        }
        self.sweep_at = (self.entries.len() * 2).clamp(FIRST_SWEEP, ENTRIES_MAX);
    }
}

impl Key {
    fn of(parties: &Parties) -> Self {
        Self {
            reporter: parties.reporter,
            source: parties.source.as_ref().map(|workload| Arc::as_ptr(workload).addr()),
            source_identity: Identity::of(parties.source_identity.as_ref(), parties.source.as_deref()),
            destination: parties.destination.as_ref().map(|workload| Arc::as_ptr(workload).addr()),
            destination_identity: Identity::of(
                parties.destination_identity.as_ref(),
                parties.destination.as_deref(),
            ),
            service: parties.service.as_ref().map(|service| Arc::as_ptr(service).addr()),
            security: parties.security,
        }
    }
}

impl Identity {
    fn of(identity: Option<&SpiffeId>, workload: Option<&Workload>) -> Self {
        match identity {
            None => Self::Unproven,
            Some(id) if workload.is_some_and(|workload| workload.identity == *id) => Self::OfWorkload,
            Some(id) => Self::Other(id.clone()),
        }
    }
}

impl Entry {
    fn is_alive(&self) -> bool {
        fn alive<T>(reference: &Option<Weak<T>>) -> bool {
            reference.as_ref().is_none_or(|reference| reference.strong_count() > 0)
        }
        alive(&self.source) && alive(&self.destination) && alive(&self.service)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::testing::parties;
    use crate::telemetry::testing::workload;

    #[test]
    fn the_same_parties_are_found_and_others_are_not() {
        let known = parties(Reporter::Source);
        let counts = Arc::new(Counts::default());
        let mut cache = Cache::new();
        cache.remember(&known, Arc::clone(&counts));

        assert!(cache.find(&known.clone()).is_some_and(|found| Arc::ptr_eq(found, &counts)));
        assert!(cache.find(&Parties { reporter: Reporter::Destination, ..known.clone() }).is_none());
        assert!(cache.find(&Parties { service: None, ..known.clone() }).is_none());
        assert!(cache.find(&Parties { source_identity: None, ..known.clone() }).is_none());
        assert!(cache.find(&Parties { security: Security::Plain, ..known.clone() }).is_none());
        let other = "spiffe://cluster.local/ns/other/sa/other".parse().unwrap();
        assert!(cache.find(&Parties { source_identity: Some(other), ..known.clone() }).is_none());
        assert!(cache.find(&Parties { source: Some(workload("a", "shop")), ..known }).is_none());
    }

    #[test]
    fn entries_of_dead_workloads_go() {
        let mut cache = Cache::new();
        for _ in 0..10 * ENTRIES_MAX {
            let short_lived = Parties { source: Some(workload("a", "shop")), ..parties(Reporter::Source) };
            cache.remember(&short_lived, Arc::default());
        }
        assert!(cache.entries.len() <= FIRST_SWEEP, "{} entries are kept", cache.entries.len());
    }

    #[test]
    fn the_number_of_entries_is_bounded() {
        let mut cache = Cache::new();
        let mut living = Vec::new();
        for _ in 0..2 * ENTRIES_MAX + 1 {
            let lasting = parties(Reporter::Source);
            cache.remember(&lasting, Arc::default());
            living.push(lasting);
            assert!(cache.entries.len() <= ENTRIES_MAX);
        }
    }
}
