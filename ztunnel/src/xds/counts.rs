//! What the client counts, and shows as metrics.

use std::fmt;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

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

#[derive(Debug, Default)]
pub(super) struct Counts {
    terminations: [AtomicU64; Reason::ALL.len()],
    messages: [AtomicU64; Kind::ALL.len()],
    bytes: [AtomicU64; Kind::ALL.len()],
    rejected: [AtomicU64; Kind::ALL.len()],
    unknown_values: AtomicU64,
    connected: AtomicBool,
    /// When the mesh was last the control plane's, in seconds since 1970; 0 if never.
    current_at: AtomicU64,
    /// Responses that were not kept.
    unkept: OnceLock<Arc<AtomicU64>>,
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

    pub(super) fn unknown_values(&self, total: u64) {
        self.unknown_values.store(total, Ordering::Relaxed);
    }

    pub(super) fn current_at(&self, at: SystemTime) {
        let seconds = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        self.current_at.store(seconds, Ordering::Relaxed);
    }

    pub(super) fn unkept(&self, lost: Arc<AtomicU64>) {
        let _once = self.unkept.set(lost);
    }

    pub(super) fn connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
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
        let help = "Values in accepted resources that this version does not know.";
        let value = self.unknown_values.load(Ordering::Relaxed);
        families.counter("ztunnel_xds_unknown_values", help, &[Sample { labels: &[], value }])?;
        let help = "When the mesh was last known to be the control plane's, in seconds since 1970.";
        let at = self.current_at.load(Ordering::Relaxed);
        if at > 0 {
            let samples = [Sample { labels: &[], value: at as f64 }];
            families.gauge("ztunnel_mesh_current_timestamp_seconds", help, &samples)?;
        }
        if let Some(lost) = self.unkept.get() {
            let help = "Responses of the control plane that were not kept for a start without it.";
            let value = lost.load(Ordering::Relaxed);
            families.counter("ztunnel_mesh_cache_lost_responses", help, &[Sample { labels: &[], value }])?;
        }
        let help = "Whether there is a stream to the control plane.";
        let value = f64::from(u8::from(self.connected.load(Ordering::Relaxed)));
        families.gauge("ztunnel_xds_connected", help, &[Sample { labels: &[], value }])
    }
}
