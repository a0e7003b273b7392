//! Tells what happened: the access log, the metrics, and the general log.
//!
//! One value per fact ([`events`]) makes both its log line and its metric. Nothing here blocks or slows the data
//! path: counters are each thread's own, lines go unformatted into a bounded queue and are dropped, and counted,
//! when it is full. Knows the vocabulary of the mesh and no other part of the daemon: they register their numbers
//! here ([`metrics::Source`]).

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::Level;
use tracing::level_filters::LevelFilter;
use ztunnel_mesh::model::addr::Authority;

use crate::telemetry::cache::Cache;
use crate::telemetry::events::AccessRecord;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Closed;
use crate::telemetry::events::Opened;
use crate::telemetry::events::Parties;
use crate::telemetry::events::RefusedEarly;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::ResponseFlag;
use crate::telemetry::metrics::Families;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::metrics::Sample;
use crate::telemetry::metrics::Source;
use crate::telemetry::series::Counts;
use crate::telemetry::series::Place;
use crate::telemetry::series::SeriesTable;
use crate::telemetry::series::ThreadId;
use crate::telemetry::writer::Entry;
use crate::telemetry::writer::LogQueue;

pub mod access_log;
mod cache;
pub mod events;
mod limit;
pub mod line;
pub mod logging;
pub mod metrics;
pub mod process;
pub mod series;
pub mod writer;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

/// What telemetry is told at start.
#[derive(Debug, Clone)]
pub struct Config {
    /// How many label sets the traffic metrics have at most; see [`series`].
    pub series_max: usize,
    /// The least important access log lines that are written.
    pub access_log: LevelFilter,
    /// The version that `istio_build` shows.
    pub version: &'static str,
}

impl Default for Config {
    fn default() -> Self {
        Self { series_max: 10_000, access_log: LevelFilter::INFO, version: env!("CARGO_PKG_VERSION") }
    }
}

/// The process's telemetry. Cheap to clone; the data path counts through [`Telemetry::local`].
#[derive(Debug, Clone)]
pub struct Telemetry(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// How many of [`LEVELS`] are written to the access log.
    access_log: AtomicU8,
    log: LogQueue,
    table: Arc<SeriesTable>,
    sockets: Arc<[AtomicI64; Reporter::ALL.len()]>,
    refused: Arc<[AtomicU64; Reporter::ALL.len()]>,
    metrics: Metrics,
}

/// From the most important to the least.
const LEVELS: [Level; 5] = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];

impl Telemetry {
    /// Starts counting from zero; the access log goes to `log`.
    pub fn new(config: Config, log: LogQueue) -> Self {
        let table = Arc::new(SeriesTable::new(config.series_max));
        let sockets = Arc::new([AtomicI64::new(0), AtomicI64::new(0)]);
        let refused = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let metrics = Metrics::new(Arc::clone(&table));
        metrics.register(process::collect);
        metrics.register({
            let (table, sockets, log) = (Arc::clone(&table), Arc::clone(&sockets), log.clone());
            let refused = Arc::clone(&refused);
            move |families: &mut Families<'_>| {
                own(families, config.version, &table, &sockets, &log)?;
                own_refused(families, &refused)
            }
        });
        let access_log = AtomicU8::new(0);
        let telemetry = Self(Arc::new(Shared { access_log, log, table, sockets, refused, metrics }));
        telemetry.set_access_log(config.access_log);
        telemetry
    }

    /// Changes which access log lines are written from now on: the least important of them.
    pub fn set_access_log(&self, least: LevelFilter) {
        let written = LEVELS.iter().filter(|level| **level <= least).count();
        self.0.access_log.store(written as u8, Ordering::Relaxed);
    }

    /// The handle of one data-plane thread: take one per thread, and clone that within the thread. Sharing one
    /// between threads is correct, but they would wait for each other.
    pub fn local(&self) -> LocalTelemetry {
        let thread = self.0.table.thread();
        LocalTelemetry(Arc::new(Local {
            shared: Arc::clone(&self.0),
            thread,
            cache: Mutex::new(Cache::new()),
        }))
    }

    /// Has `source` asked for its metrics at each scrape from now on.
    pub fn register(&self, source: impl Source) {
        self.0.metrics.register(source);
    }

    /// All metrics in the OpenMetrics text format. It can take some milliseconds: not for a data-plane thread.
    pub fn encode_metrics(&self) -> Result<String, fmt::Error> {
        self.0.metrics.encode()
    }

    /// Where log lines go.
    pub fn log(&self) -> &LogQueue {
        &self.0.log
    }
}

/// The metrics of telemetry itself.
fn own(
    families: &mut Families<'_>,
    version: &str,
    table: &SeriesTable,
    sockets: &[AtomicI64; Reporter::ALL.len()],
    log: &LogQueue,
) -> fmt::Result {
    let build = [Sample { labels: &[("component", "ztunnel"), ("tag", version)], value: 1.0 }];
    families.gauge("istio_build", "The version of this process.", &build)?;

    let [source, destination] = Reporter::ALL.map(|reporter| [("reporter", reporter.label())]);
    let open = |reporter: Reporter| sockets[reporter as usize].load(Ordering::Relaxed) as f64;
    let samples = [
        Sample { labels: &source, value: open(Reporter::Source) },
        Sample { labels: &destination, value: open(Reporter::Destination) },
    ];
    families.gauge("istio_tcp_sockets_open", "Accepted sockets that are open.", &samples)?;

    let alone = |value| [Sample { labels: &[], value }];
    let help = "Access log lines dropped because the log's reader was too slow.";
    families.counter("ztunnel_access_log_lines_dropped", help, &alone(log.access_dropped()))?;
    let help = "Access log lines left out because too many were of one source.";
    families.counter("ztunnel_access_log_lines_limited", help, &alone(log.limited()))?;
    let help = "Other log lines dropped because the log's reader was too slow.";
    families.counter("ztunnel_log_lines_dropped", help, &alone(log.text_dropped()))?;
    let help = "Batches of log lines that could not be written.";
    families.counter("ztunnel_log_write_errors", help, &alone(log.write_errors()))?;
    let help = "Connections counted without their labels because there were too many label sets.";
    families.counter("ztunnel_metrics_overflowed_connections", help, &alone(table.overflowed()))
}

fn own_refused(families: &mut Families<'_>, refused: &[AtomicU64; Reporter::ALL.len()]) -> fmt::Result {
    let [source, destination] = Reporter::ALL.map(|reporter| [("reporter", reporter.label())]);
    let count = |reporter: Reporter| refused[reporter as usize].load(Ordering::Relaxed);
    let samples = [
        Sample { labels: &source, value: count(Reporter::Source) },
        Sample { labels: &destination, value: count(Reporter::Destination) },
    ];
    let help = "Connections refused before their parties were known.";
    families.counter("ztunnel_connections_refused_early", help, &samples)
}

/// Telemetry as one data-plane thread uses it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LocalTelemetry(Arc<Local>);

#[derive(Debug)]
struct Local {
    shared: Arc<Shared>,
    thread: ThreadId,
    /// Only its thread takes the lock, so it is always free.
    cache: Mutex<Cache>,
}

impl LocalTelemetry {
    /// Counts a connection as opened. `addresses.hbone` and `addresses.destination` may be set later, when the
    /// peer is known: [`OpenConnection::reaches`].
    pub fn open(&self, parties: Parties, addresses: Addresses) -> OpenConnection {
        let counts = self.0.opened(&parties);
        if self.0.shared.writes(Level::DEBUG) {
            let (parties, addresses) = (parties.clone(), addresses.clone());
            let opened = Opened { at: SystemTime::now(), parties, addresses };
            self.0.shared.write(AccessRecord::Opened(opened));
        }
        let started = Instant::now();
        let live = Live { parties, addresses, started, counts, shared: Arc::clone(&self.0.shared) };
        OpenConnection { live: Some(live), received: AtomicU64::new(0), sent: AtomicU64::new(0) }
    }

    /// Logs that a connection was refused before its parties were known. It is counted by itself: the traffic
    /// metrics are labelled with the parties.
    pub fn refused_early(&self, addresses: Addresses, reporter: Reporter, error: &dyn fmt::Display) {
        self.0.shared.refused[reporter as usize].fetch_add(1, Ordering::Relaxed);
        if self.0.shared.writes(Level::WARN) {
            let (at, error) = (SystemTime::now(), error.to_string());
            let refused = RefusedEarly { at, reporter, addresses, error };
            self.0.shared.write(AccessRecord::RefusedEarly(refused));
        }
    }

    /// Counts an accepted socket as open (`istio_tcp_sockets_open`) until the answer is dropped. A tunnel is one
    /// socket, however many connections it carries.
    pub fn accepted(&self, reporter: Reporter) -> AcceptedSocket {
        let sockets = Arc::clone(&self.0.shared.sockets);
        sockets[reporter as usize].fetch_add(1, Ordering::Relaxed);
        AcceptedSocket { sockets, reporter }
    }
}

impl Local {
    /// Counts one more connection of `parties` and says where it was counted.
    fn opened(&self, parties: &Parties) -> Arc<Counts> {
        let mut cache = self.cache.lock();
        if let Some(counts) = cache.find(parties)
            && counts.open()
        {
            return Arc::clone(counts);
        }
        loop {
            let (counts, lasting) = match self.shared.table.place(self.thread, parties) {
                Place::Own(counts) => (counts, true),
                Place::Overflow(counts) => (counts, false),
            };
            // It can fail only if the series was retired since: then the table has another answer.
            if counts.open() {
                if lasting {
                    cache.remember(parties, Arc::clone(&counts));
                }
                return counts;
            }
        }
    }
}

impl Shared {
    fn writes(&self, level: Level) -> bool {
        LEVELS.iter().position(|known| *known == level) < Some(self.access_log.load(Ordering::Relaxed).into())
    }

    fn write(&self, record: AccessRecord) {
        self.log.push(Entry::Access(Box::new(record)));
    }
}

/// A socket that counts as open while this lives.
#[derive(Debug)]
#[must_use]
pub struct AcceptedSocket {
    sockets: Arc<[AtomicI64; Reporter::ALL.len()]>,
    reporter: Reporter,
}

impl Drop for AcceptedSocket {
    fn drop(&mut self) {
        self.sockets[self.reporter as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection that is counted as opened and not yet as closed. [`OpenConnection::close`] it: one that is only
/// dropped (its task was cancelled, say) counts as closed and is logged with the error `dropped`.
#[derive(Debug)]
#[must_use]
pub struct OpenConnection {
    /// There until it is closed.
    live: Option<Live>,
    received: AtomicU64,
    sent: AtomicU64,
}

#[derive(Debug)]
struct Live {
    parties: Parties,
    addresses: Addresses,
    started: Instant,
    counts: Arc<Counts>,
    shared: Arc<Shared>,
}

impl OpenConnection {
    /// Counts bytes that came from the client.
    pub fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
        if let Some(live) = &self.live {
            live.counts.received(bytes);
        }
    }

    /// Counts bytes that went to the client.
    pub fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        if let Some(live) = &self.live {
            live.counts.sent(bytes);
        }
    }

    /// The bytes counted so far: from the client, to the client.
    pub fn bytes(&self) -> (u64, u64) {
        (self.received.load(Ordering::Relaxed), self.sent.load(Ordering::Relaxed))
    }

    /// Says that it began before it was counted: to find out who is at its ends took a while.
    pub fn began(&mut self, at: Instant) {
        if let Some(live) = &mut self.live {
            live.started = at;
        }
    }

    /// Says whom the connection turned out to go to, for the log line.
    pub fn reaches(&mut self, destination: SocketAddr, hbone: Option<Authority>) {
        if let Some(live) = &mut self.live {
            live.addresses = Addresses { source: live.addresses.source, destination, hbone };
        }
    }

    /// Counts the connection as closed with `flag` and writes its line. `error` is what went wrong, if something
    /// did.
    pub fn close(mut self, flag: ResponseFlag, error: Option<String>) {
        self.end(flag, error);
    }

    fn end(&mut self, flag: ResponseFlag, error: Option<String>) {
        let (received, sent) = self.bytes();
        let Some(Live { parties, addresses, started, counts, shared }) = self.live.take() else { return };
        let (at, duration) = (SystemTime::now(), started.elapsed());
        let closed = Closed { at, parties, addresses, received, sent, duration, flag, error };
        counts.close(closed.flag);
        let record = AccessRecord::Closed(closed);
        if shared.writes(record.level()) {
            shared.write(record);
        }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        if self.live.is_some() {
            self.end(ResponseFlag::None, Some("dropped".to_owned()));
        }
    }
}
