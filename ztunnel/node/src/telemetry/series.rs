//! The traffic metrics: one series per label set, at most a configured number of them.
//!
//! A label set is everything Istio's traffic metrics are labelled with but the response flags, which a series
//! keeps apart inside. Each data-plane thread has its own counters in a series, so that counting never makes two
//! cores share a cache line; a scrape adds them up.
//!
//! When the number is reached, a new label set takes the place of series that are idle and whose last value was
//! scraped. If there is none, its connections are counted in one overflow series per reporter, whose other labels
//! are all `unknown`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::workload::Workload;

use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::ResponseFlag;

/// The labels of one workload. Shares its strings with the mesh.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct PartyLabels {
    workload: Arc<str>,
    canonical_name: Arc<str>,
    canonical_revision: Arc<str>,
    namespace: Arc<str>,
    cluster: Arc<str>,
    region: Arc<str>,
    zone: Arc<str>,
}

impl From<&Arc<Workload>> for PartyLabels {
    fn from(workload: &Arc<Workload>) -> Self {
        Self {
            workload: Arc::clone(&workload.workload_name),
            canonical_name: Arc::clone(&workload.canonical_name),
            canonical_revision: Arc::clone(&workload.canonical_revision),
            namespace: Arc::clone(&workload.namespace),
            cluster: Arc::clone(&workload.cluster),
            region: Arc::clone(&workload.region),
            zone: Arc::clone(&workload.zone),
        }
    }
}

/// The labels of the service that was dialled.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct ServiceLabels {
    hostname: Arc<str>,
    namespace: Arc<str>,
    name: Arc<str>,
}

/// What tells two series apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Labels {
    reporter: Reporter,
    source: Option<PartyLabels>,
    source_principal: Option<SpiffeId>,
    destination: Option<PartyLabels>,
    destination_principal: Option<SpiffeId>,
    service: Option<ServiceLabels>,
    security: &'static str,
}

impl Labels {
    fn of(parties: &Parties) -> Self {
        Self {
            reporter: parties.reporter,
            source: parties.source.as_ref().map(PartyLabels::from),
            source_principal: parties.source_identity.clone(),
            destination: parties.destination.as_ref().map(PartyLabels::from),
            destination_principal: parties.destination_identity.clone(),
            service: parties.service.as_ref().map(|service| ServiceLabels {
                hostname: Arc::clone(&service.hostname),
                namespace: Arc::clone(&service.namespace),
                name: Arc::clone(&service.name),
            }),
            security: parties.security.label(),
        }
    }

    /// Calls `label` with each name and value, in Istio's order. A value that is not known is `unknown`.
    pub fn each<E>(
        &self,
        flag: ResponseFlag,
        mut label: impl FnMut(&str, &str) -> Result<(), E>,
    ) -> Result<(), E> {
        let source = self.source.as_ref();
        let destination = self.destination.as_ref();
        let service = self.service.as_ref();
        label("reporter", self.reporter.label())?;

        label("source_workload", known(source.map(|s| &s.workload)))?;
        label("source_canonical_service", known(source.map(|s| &s.canonical_name)))?;
        label("source_canonical_revision", known(source.map(|s| &s.canonical_revision)))?;
        label("source_workload_namespace", known(source.map(|s| &s.namespace)))?;
        label("source_principal", self.source_principal.as_ref().map_or(UNKNOWN, SpiffeId::as_str))?;
        label("source_app", known(source.map(|s| &s.canonical_name)))?;
        label("source_version", known(source.map(|s| &s.canonical_revision)))?;
        label("source_cluster", known(source.map(|s| &s.cluster)))?;

        label("destination_service", known(service.map(|s| &s.hostname)))?;
        label("destination_service_namespace", known(service.map(|s| &s.namespace)))?;
        label("destination_service_name", known(service.map(|s| &s.name)))?;

        label("destination_workload", known(destination.map(|d| &d.workload)))?;
        label("destination_canonical_service", known(destination.map(|d| &d.canonical_name)))?;
        label("destination_canonical_revision", known(destination.map(|d| &d.canonical_revision)))?;
        label("destination_workload_namespace", known(destination.map(|d| &d.namespace)))?;
        label(
            "destination_principal",
            self.destination_principal.as_ref().map_or(UNKNOWN, SpiffeId::as_str),
        )?;
        label("destination_app", known(destination.map(|d| &d.canonical_name)))?;
        label("destination_version", known(destination.map(|d| &d.canonical_revision)))?;
        label("destination_cluster", known(destination.map(|d| &d.cluster)))?;

        label("request_protocol", "tcp")?;
        label("response_flags", flag.label())?;
        label("connection_security_policy", self.security)?;

        if source.is_some() || destination.is_some() {
            label("source_region", known(source.map(|s| &s.region)))?;
            label("source_zone", known(source.map(|s| &s.zone)))?;
            label("destination_region", known(destination.map(|d| &d.region)))?;
            label("destination_zone", known(destination.map(|d| &d.zone)))?;
        }
        Ok(())
    }
}

const UNKNOWN: &str = "unknown";

fn known(value: Option<&Arc<str>>) -> &str {
    value.map(|text| &**text).filter(|text| !text.is_empty()).unwrap_or(UNKNOWN)
}

/// One thread's counters of one series. On cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Counts {
    opened: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    closed: [AtomicU64; ResponseFlag::ALL.len()],
    /// Something was counted that no scrape has seen.
    unseen: AtomicBool,
    /// The series gave way to another: what is counted here is seen by nobody.
    retired: AtomicBool,
}

impl Counts {
    /// Counts a connection, unless this series is no longer one: then false, and nothing is counted.
    pub fn open(&self) -> bool {
        // Pairs with `retire`, which sets the mark and then looks for open connections: of two that meet, at least
        // one sees the other (hence SeqCst), and no connection is counted where nobody looks.
        self.opened.fetch_add(1, Ordering::SeqCst);
        if self.retired.load(Ordering::SeqCst) {
            self.opened.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        self.unseen.store(true, Ordering::Relaxed);
        true
    }

    /// Counts bytes that came from the client.
    pub fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that went to the client.
    pub fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts the end of a connection.
    pub fn close(&self, flag: ResponseFlag) {
        self.unseen.store(true, Ordering::Relaxed);
        self.closed[flag as usize].fetch_add(1, Ordering::SeqCst);
    }

    fn retire(&self) -> bool {
        self.retired.store(true, Ordering::SeqCst);
        let closed: u64 = self.closed.iter().map(|count| count.load(Ordering::SeqCst)).sum();
        let idle = self.opened.load(Ordering::SeqCst) == closed && !self.unseen.load(Ordering::SeqCst);
        if !idle {
            self.retired.store(false, Ordering::SeqCst);
        }
        idle
    }
}

/// A data-plane thread, as series tell threads apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadId(u64);

/// The sums over all threads of one series.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Connections opened.
    pub opened: u64,
    /// Bytes from clients.
    pub received: u64,
    /// Bytes to clients.
    pub sent: u64,
    /// Connections closed, by [`ResponseFlag`] as an index.
    pub closed: [u64; ResponseFlag::ALL.len()],
}

/// All traffic counted under one label set.
#[derive(Debug)]
pub struct Series {
    labels: Labels,
    /// Grows by one for every thread that meets the label set. Locked when a thread meets it, and by scrapes.
    threads: Mutex<Vec<(ThreadId, Arc<Counts>)>>,
}

impl Series {
    fn new(labels: Labels) -> Arc<Self> {
        Arc::new(Self { labels, threads: Mutex::default() })
    }

    /// What it counts.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// The sums over all threads. They count as seen: from here on, the series may give way while it is idle.
    pub fn scrape(&self) -> Totals {
        let mut totals = Totals::default();
        for (_, counts) in self.threads.lock().iter() {
            counts.unseen.store(false, Ordering::SeqCst);
            totals.opened += counts.opened.load(Ordering::Relaxed);
            totals.received += counts.received.load(Ordering::Relaxed);
            totals.sent += counts.sent.load(Ordering::Relaxed);
            for (total, count) in totals.closed.iter_mut().zip(&counts.closed) {
                *total += count.load(Ordering::Relaxed);
            }
        }
        totals
    }

    fn counts_of(&self, thread: ThreadId) -> Arc<Counts> {
        let mut threads = self.threads.lock();
        if let Some((_, counts)) = threads.iter().find(|(owner, _)| *owner == thread) {
            return Arc::clone(counts);
        }
        let counts = Arc::new(Counts::default());
        threads.push((thread, Arc::clone(&counts)));
        counts
    }

    /// Gives way if it is idle and seen on all threads.
    fn retire(&self) -> bool {
        let threads = self.threads.lock();
        let retired = threads.iter().take_while(|(_, counts)| counts.retire()).count();
        let all = retired == threads.len();
        if !all {
            for (_, counts) in &threads[..retired] {
                counts.retired.store(false, Ordering::SeqCst);
            }
        }
        all
    }
}

/// Every series there is.
#[derive(Debug)]
pub struct SeriesTable {
    series_max: usize,
    interned: Mutex<Interned>,
    overflow: [Arc<Series>; Reporter::ALL.len()],
    overflowed: AtomicU64,
    threads: AtomicU64,
}

#[derive(Debug, Default)]
struct Interned {
    by_labels: BTreeMap<Labels, Arc<Series>>,
    /// How many more label sets go to the overflow before it is worth to look for idle series again.
    until_sweep: usize,
}

/// Where the connections of one label set are counted.
#[derive(Debug)]
pub enum Place {
    /// In a series of their own. It may be remembered.
    Own(Arc<Counts>),
    /// With others, as there are too many label sets. Not to be remembered: there may be room later.
    Overflow(Arc<Counts>),
}

impl SeriesTable {
    /// A table of at most `series_max` label sets (besides the overflow).
    pub fn new(series_max: usize) -> Self {
        Self {
            series_max,
            interned: Mutex::default(),
            overflow: Reporter::ALL.map(|reporter| Series::new(Labels::of(&Parties::unknown(reporter)))),
            overflowed: AtomicU64::new(0),
            threads: AtomicU64::new(0),
        }
    }

    /// A thread that counts for itself.
    pub fn thread(&self) -> ThreadId {
        ThreadId(self.threads.fetch_add(1, Ordering::Relaxed))
    }

    /// Where `thread` counts the connections of `parties`.
    pub fn place(&self, thread: ThreadId, parties: &Parties) -> Place {
        let labels = Labels::of(parties);
        let unknown = &self.overflow[parties.reporter as usize];
        if labels == unknown.labels {
            return Place::Own(unknown.counts_of(thread));
        }
        let mut interned = self.interned.lock();
        if let Some(series) = interned.by_labels.get(&labels) {
            return Place::Own(series.counts_of(thread));
        }
        // What a peer says of itself must not take the room of what the mesh knows.
        let said = [&parties.source, &parties.destination].into_iter().flatten().any(|it| it.uid.is_empty());
        let series_max = if said { self.series_max / 2 } else { self.series_max };
        if interned.by_labels.len() >= series_max {
            self.sweep(&mut interned);
        }
        if interned.by_labels.len() >= series_max {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            return Place::Overflow(unknown.counts_of(thread));
        }
        let series = Series::new(labels.clone());
        let counts = series.counts_of(thread);
        interned.by_labels.insert(labels, series);
        Place::Own(counts)
    }

    /// All series in the order of their labels, the overflow series last and only when used.
    pub fn all(&self) -> Vec<Arc<Series>> {
        let mut all: Vec<_> = self.interned.lock().by_labels.values().map(Arc::clone).collect();
        all.extend(self.overflow.iter().filter(|series| !series.threads.lock().is_empty()).map(Arc::clone));
        all
    }

    /// How many connections were counted in the overflow series.
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    fn sweep(&self, interned: &mut Interned) {
        if interned.until_sweep > 0 {
            interned.until_sweep -= 1;
            return;
        }
        interned.by_labels.retain(|_, series| !series.retire());
        // A sweep looks at every series under the lock: after one, that cost is first spread over many look-ups.
        interned.until_sweep = self.series_max / 8;
    }
}
