//! What is counted of questions, and shown as metrics.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hickory_proto::rr::RecordType;
use parking_lot::Mutex;
use parking_lot::MutexGuard;
use ztunnel_mesh::model::workload::Workload;

use crate::dns::message::Transport;
use crate::telemetry::metrics::Distribution;
use crate::telemetry::metrics::Families;
use crate::telemetry::metrics::Sample;
use crate::telemetry::metrics::Source;

/// Label sets. Further ones are counted without the client.
const SERIES_MAX: usize = 10_000;
/// The upper bounds of the buckets, in seconds.
const BUCKETS: [f64; 7] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0, f64::INFINITY];

/// What tells two series apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Labels {
    query: &'static str,
    transport: Transport,
    /// The canonical service and revision of the client.
    client: Option<(Arc<str>, Arc<str>)>,
}

/// One series.
#[derive(Debug, Default)]
pub struct Series {
    requests: AtomicU64,
    upstream: AtomicU64,
    failures: AtomicU64,
    buckets: [AtomicU64; BUCKETS.len()],
    microseconds: AtomicU64,
}

impl Series {
    /// One more request.
    pub fn requested(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// One more request that another resolver was asked, which took this long and may have failed.
    pub fn forwarded(&self, took: Duration, failed: bool) {
        self.upstream.fetch_add(1, Ordering::Relaxed);
        self.failures.fetch_add(failed.into(), Ordering::Relaxed);
        let seconds = took.as_secs_f64();
        if let Some(bucket) = BUCKETS.iter().position(|bound| seconds <= *bound) {
            self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        }
        self.microseconds.fetch_add(took.as_micros() as u64, Ordering::Relaxed);
    }
}

/// All series, and what has none.
#[derive(Debug, Default)]
pub struct Counts {
    series: Mutex<HashMap<Labels, Arc<Series>>>,
    turned_away: AtomicU64,
    refused: AtomicU64,
}

impl Counts {
    /// The series of a client's requests.
    pub fn series(
        &self,
        query: &'static str,
        transport: Transport,
        client: Option<&Workload>,
    ) -> Arc<Series> {
        let mut all = self.lock();
        let client = client.map(|it| (Arc::clone(&it.canonical_name), Arc::clone(&it.canonical_revision)));
        let mut labels = Labels { query, transport, client };
        if all.len() >= SERIES_MAX && !all.contains_key(&labels) {
            labels.client = None;
        }
        Arc::clone(all.entry(labels).or_default())
    }

    /// One more request that its pod had no room for.
    pub fn turn_away(&self) {
        self.turned_away.fetch_add(1, Ordering::Relaxed);
    }

    /// One more message that was none.
    pub fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Labels, Arc<Series>>> {
        self.series.lock()
    }
}

impl Source for Arc<Counts> {
    fn collect(&self, families: &mut Families<'_>) -> fmt::Result {
        let mut all: Vec<_> =
            self.lock().iter().map(|(key, value)| (key.clone(), Arc::clone(value))).collect();
        let order = |labels: &Labels| (labels.client.clone(), labels.query, labels.transport);
        all.sort_by_cached_key(|(labels, _)| order(labels));
        let labels: Vec<_> = all.iter().map(|(labels, _)| shown(labels)).collect();
        let counter = |value: fn(&Series) -> &AtomicU64| -> Vec<Sample<'_, u64>> {
            let values = all.iter().map(|(_, series)| value(series).load(Ordering::Relaxed));
            labels.iter().zip(values).map(|(labels, value)| Sample { labels, value }).collect()
        };
        let help = "DNS requests of pods.";
        families.counter("istio_dns_requests", help, &counter(|series| &series.requests))?;
        let help = "DNS requests of pods that another resolver was asked.";
        families.counter("istio_dns_upstream_requests", help, &counter(|series| &series.upstream))?;
        let help = "DNS requests of pods that no other resolver answered.";
        families.counter("istio_dns_upstream_failures", help, &counter(|series| &series.failures))?;

        let buckets: Vec<Vec<(f64, u64)>> = all
            .iter()
            .map(|(_, series)| {
                let counts = series.buckets.iter().map(|count| count.load(Ordering::Relaxed));
                BUCKETS.into_iter().zip(counts).collect()
            })
            .collect();
        let sums = all.iter().map(|(_, series)| series.microseconds.load(Ordering::Relaxed) as f64 / 1e6);
        let samples: Vec<_> = labels
            .iter()
            .zip(&buckets)
            .zip(sums)
            .map(|((labels, buckets), sum)| Distribution { labels, sum, buckets })
            .collect();
        let help = "How long other resolvers took to answer, in seconds.";
        families.histogram("istio_dns_upstream_request_duration_seconds", help, &samples)?;

        let alone = |count: &AtomicU64| [Sample { labels: &[], value: count.load(Ordering::Relaxed) }];
        let help = "DNS requests answered with SERVFAIL because their pod had too many under way.";
        families.counter("ztunnel_dns_requests_turned_away", help, &alone(&self.turned_away))?;
        let help = "Messages to the DNS port of pods that were no requests.";
        families.counter("ztunnel_dns_messages_refused", help, &alone(&self.refused))
    }
}

fn shown(labels: &Labels) -> [(&'static str, &str); 4] {
    let known = |text: &str| !text.is_empty();
    let (service, revision) = match &labels.client {
        Some((service, revision)) => (&**service, &**revision),
        None => ("", ""),
    };
    let or_unknown = |text| if known(text) { text } else { "unknown" };
    [
        ("request_query_type", labels.query),
        ("request_protocol", labels.transport.label()),
        ("source_canonical_service", or_unknown(service)),
        ("source_canonical_revision", or_unknown(revision)),
    ]
}

/// The type of a question as a label, in lower case as Istio has it: of those that are asked for, by name; of others there may be thousands.
pub fn query_type(kind: RecordType) -> &'static str {
    match kind {
        RecordType::A => "a",
        RecordType::AAAA => "aaaa",
        RecordType::ANY => "any",
        RecordType::AXFR => "axfr",
        RecordType::CAA => "caa",
        RecordType::CNAME => "cname",
        RecordType::DNSKEY => "dnskey",
        RecordType::DS => "ds",
        RecordType::HTTPS => "https",
        RecordType::IXFR => "ixfr",
        RecordType::MX => "mx",
        RecordType::NAPTR => "naptr",
        RecordType::NS => "ns",
        RecordType::PTR => "ptr",
        RecordType::SOA => "soa",
        RecordType::SRV => "srv",
        RecordType::SVCB => "svcb",
        RecordType::TXT => "txt",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Metrics;
    use crate::telemetry::series::SeriesTable;

    #[test]
    fn requests_are_told_by_what_is_asked_how_and_who_asks() {
        let counts = Arc::new(Counts::default());
        let client = Workload { canonical_revision: "v1".into(), ..Workload::sample("shop", "cart") };
        let asked = counts.series("a", Transport::Udp, Some(&client));
        asked.requested();
        asked.requested();
        asked.forwarded(Duration::from_millis(2), false);
        asked.forwarded(Duration::from_secs(4), true);
        counts.series(query_type(RecordType::Unknown(4711)), Transport::Tcp, None).requested();
        counts.turn_away();
        let metrics = Metrics::new(Arc::new(SeriesTable::new(1)));
        metrics.register(Arc::clone(&counts));
        let text = metrics.encode().unwrap();
        let cart = "request_query_type=\"a\",request_protocol=\"udp\",source_canonical_service=\"cart\",\
                    source_canonical_revision=\"v1\"";
        let unknown = "request_query_type=\"other\",request_protocol=\"tcp\",source_canonical_service=\"unknown\",\
                       source_canonical_revision=\"unknown\"";
        for line in [
            format!("istio_dns_requests_total{{{cart}}} 2"),
            format!("istio_dns_requests_total{{{unknown}}} 1"),
            format!("istio_dns_upstream_requests_total{{{cart}}} 2"),
            format!("istio_dns_upstream_failures_total{{{cart}}} 1"),
            format!("istio_dns_upstream_request_duration_seconds_sum{{{cart}}} 4.002"),
            format!("istio_dns_upstream_request_duration_seconds_count{{{cart}}} 2"),
            format!("istio_dns_upstream_request_duration_seconds_bucket{{le=\"0.01\",{cart}}} 1"),
            format!("istio_dns_upstream_request_duration_seconds_bucket{{le=\"5.0\",{cart}}} 2"),
            "ztunnel_dns_requests_turned_away_total 1".to_owned(),
        ] {
            assert!(text.lines().any(|known| known == line), "no {line} in\n{text}");
        }
    }

    #[test]
    fn there_are_not_too_many_series() {
        let counts = Counts::default();
        for number in 0..SERIES_MAX + 10 {
            let client = Workload { canonical_name: number.to_string().into(), ..Workload::sample("a", "b") };
            counts.series("a", Transport::Udp, Some(&client)).requested();
        }
        assert_eq!(counts.lock().len(), SERIES_MAX + 1);
        assert_eq!(counts.series("a", Transport::Udp, None).requests.load(Ordering::Relaxed), 10);
    }
}
