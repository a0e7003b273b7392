//! What the client counts, and shows as metrics.

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use crate::telemetry::metrics::Families;
use crate::telemetry::metrics::Sample;
use crate::telemetry::metrics::Source;
use crate::xds::session::Kind;

/// Why a connection ended, as Istio's metric names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// There was none, or no stream on it.
    ConnectionError,
    /// The stream broke, or the control plane ended it with an error.
    Error,
    /// The control plane goes away or the network did.
    Reconnect,
    /// The control plane ended the stream in good order.
    Complete,
}

impl Reason {
    const ALL: [Self; 4] = [Self::ConnectionError, Self::Error, Self::Reconnect, Self::Complete];

    fn label(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
            Self::Complete => "Complete",
        }
    }
}

/// What became of the file with the last good mesh at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loaded {
    /// It was used.
    Whole,
    /// Its end was damaged. What comes before was used.
    Torn,
    /// There was none.
    Absent,
    /// It could not be read, or not in time.
    Unreadable,
    /// Another program's, another cluster's, or one that others can write.
    Foreign,
    /// It is damaged.
    Damaged,
    /// This version does not take what is in it.
    Rejected,
    /// It is too old.
    Expired,
}

impl Loaded {
    const ALL: [Self; 8] = [
        Self::Whole,
        Self::Torn,
        Self::Absent,
        Self::Unreadable,
        Self::Foreign,
        Self::Damaged,
        Self::Rejected,
        Self::Expired,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Torn => "torn",
            Self::Absent => "absent",
            Self::Unreadable => "unreadable",
            Self::Foreign => "foreign",
            Self::Damaged => "damaged",
            Self::Rejected => "rejected",
            Self::Expired => "expired",
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Counts {
    terminations: [AtomicU64; Reason::ALL.len()],
    messages: [AtomicU64; Kind::ALL.len()],
    bytes: [AtomicU64; Kind::ALL.len()],
    rejected: [AtomicU64; Kind::ALL.len()],
    refused: AtomicU64,
    unknown_values: AtomicU64,
    connected: AtomicBool,
    cache_loads: [AtomicU64; Loaded::ALL.len()],
    /// Failed and successful.
    cache_writes: [AtomicU64; 2],
    cache_bytes: AtomicU64,
    cache_pending: AtomicU64,
}

impl Counts {
    pub(super) fn ended(&self, reason: Reason) {
        self.terminations[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn received(&self, kind: Kind, bytes: usize) {
        self.messages[kind as usize].fetch_add(1, Ordering::Relaxed);
        self.bytes[kind as usize].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn rejected(&self, kind: Kind, resources: usize) {
        self.rejected[kind as usize].fetch_add(resources as u64, Ordering::Relaxed);
    }

    pub(super) fn refused(&self, resources: usize) {
        self.refused.store(resources as u64, Ordering::Relaxed);
    }

    pub(super) fn unknown_values(&self, total: u64) {
        self.unknown_values.store(total, Ordering::Relaxed);
    }

    pub(super) fn connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
    }

    pub(super) fn cache_loaded(&self, result: Loaded) {
        self.cache_loads[result as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn cache_written(&self, successfully: bool) {
        self.cache_writes[usize::from(successfully)].fetch_add(1, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(super) fn cache_writes(&self, successfully: bool) -> u64 {
        self.cache_writes[usize::from(successfully)].load(Ordering::Relaxed)
    }

    pub(super) fn cache_pending(&self, resources: usize) {
        self.cache_pending.store(resources as u64, Ordering::Relaxed);
    }

    pub(super) fn cache_bytes(&self, bytes: u64) {
        self.cache_bytes.store(bytes, Ordering::Relaxed);
    }
}

impl Source for Counts {
    fn collect(&self, families: &mut Families<'_>) -> fmt::Result {
        let reasons = Reason::ALL.map(|reason| [("reason", reason.label())]);
        let samples = Reason::ALL.map(|reason| Sample {
            labels: &reasons[reason as usize],
            value: self.terminations[reason as usize].load(Ordering::Relaxed),
        });
        let help = "Connections to the control plane that ended.";
        families.counter("istio_xds_connection_terminations", help, &samples)?;
        let urls = Kind::ALL.map(|kind| [("url", kind.type_url())]);
        let mut by_type = |name, help, counts: &[AtomicU64; Kind::ALL.len()]| {
            let samples = Kind::ALL.map(|kind| Sample {
                labels: &urls[kind as usize],
                value: counts[kind as usize].load(Ordering::Relaxed),
            });
            families.counter(name, help, &samples)
        };
        by_type("istio_xds_message", "Responses of the control plane.", &self.messages)?;
        by_type("istio_xds_message_bytes", "Their size in bytes.", &self.bytes)?;
        let help = "Resources that were rejected.";
        by_type("ztunnel_xds_rejected_resources", help, &self.rejected)?;
        let help = "Workloads and services of which no version could be taken: they are not dialled.";
        let value = self.refused.load(Ordering::Relaxed) as f64;
        families.gauge("ztunnel_xds_refused_resources", help, &[Sample { labels: &[], value }])?;
        let help = "Values in accepted resources that this version does not know.";
        let value = self.unknown_values.load(Ordering::Relaxed);
        families.counter("ztunnel_xds_unknown_values", help, &[Sample { labels: &[], value }])?;
        let help = "Whether there is a stream to the control plane.";
        let value = f64::from(u8::from(self.connected.load(Ordering::Relaxed)));
        families.gauge("ztunnel_xds_connected", help, &[Sample { labels: &[], value }])?;
        let results = Loaded::ALL.map(|result| [("result", result.label())]);
        let samples = Loaded::ALL.map(|result| Sample {
            labels: &results[result as usize],
            value: self.cache_loads[result as usize].load(Ordering::Relaxed),
        });
        let help = "What became of the file with the last good mesh at start.";
        families.counter("ztunnel_xds_cache_loads", help, &samples)?;
        let results = [[("result", "failed")], [("result", "written")]];
        let samples = [0, 1].map(|result| Sample {
            labels: &results[result],
            value: self.cache_writes[result].load(Ordering::Relaxed),
        });
        families.counter("ztunnel_xds_cache_writes", "Writes of that file.", &samples)?;
        let value = self.cache_pending.load(Ordering::Relaxed) as f64;
        let help = "Resources whose newest state is not in that file yet.";
        families.gauge("ztunnel_xds_cache_pending", help, &[Sample { labels: &[], value }])?;
        let value = self.cache_bytes.load(Ordering::Relaxed) as f64;
        families.gauge("ztunnel_xds_cache_bytes", "The size of that file.", &[Sample { labels: &[], value }])
    }
}
