//! The metrics registry: Istio's names and labels, in OpenMetrics text.
//!
//! Traffic is counted in [`crate::telemetry::series`]; other components keep their own numbers and are asked for
//! them at each scrape through a [`Source`].

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::EncodeLabel;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::LabelSetEncoder;
use prometheus_client::encoding::MetricEncoder;
use prometheus_client::encoding::NoLabelSet;
use prometheus_client::encoding::text;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::telemetry::events::ResponseFlag;
use crate::telemetry::series::Labels;
use crate::telemetry::series::Series;
use crate::telemetry::series::SeriesTable;
use crate::telemetry::series::Totals;

/// A component that has numbers to show. Asked at each scrape, off the data path; it should answer at once.
pub trait Source: Send + Sync + 'static {
    /// Writes the component's metrics.
    fn collect(&self, families: &mut Families<'_>) -> fmt::Result;
}

impl<F> Source for F
where
    F: Fn(&mut Families<'_>) -> fmt::Result + Send + Sync + 'static,
{
    fn collect(&self, families: &mut Families<'_>) -> fmt::Result {
        self(families)
    }
}

/// One value of a metric and its labels, name and value.
#[derive(Debug, Clone, Copy)]
pub struct Sample<'a, T> {
    /// The labels, in the order they are shown.
    pub labels: &'a [(&'a str, &'a str)],
    /// The value.
    pub value: T,
}

/// One distribution: how many observations fell into each bucket.
#[derive(Debug, Clone, Copy)]
pub struct Distribution<'a> {
    /// The labels, in the order they are shown.
    pub labels: &'a [(&'a str, &'a str)],
    /// The sum of all observations.
    pub sum: f64,
    /// The upper bound of each bucket, the last of them infinity, and how many observations fell
    /// into it and into no earlier one.
    pub buckets: &'a [(f64, u64)],
}

/// Where a [`Source`] writes its metrics, one family (name) after the other.
#[derive(Debug)]
pub struct Families<'a>(DescriptorEncoder<'a>);

impl Families<'_> {
    /// Writes a counter: `name` gets the suffix `_total`. `help` is a sentence.
    pub fn counter(&mut self, name: &str, help: &str, samples: &[Sample<'_, u64>]) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for sample in samples {
            labelled(&mut family, sample.labels, |encoder| {
                encoder.encode_counter::<NoLabelSet, u64, f64>(&sample.value, None)
            })?;
        }
        Ok(())
    }

    /// Writes a gauge. `help` is a sentence.
    pub fn gauge(&mut self, name: &str, help: &str, samples: &[Sample<'_, f64>]) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for sample in samples {
            // Whole numbers read better without a fraction, and most gauges count things.
            labelled(&mut family, sample.labels, |encoder| match whole(sample.value) {
                Some(whole) => encoder.encode_gauge(&whole),
                None => encoder.encode_gauge(&sample.value),
            })?;
        }
        Ok(())
    }
}

impl Families<'_> {
    /// Writes a counter of seconds: `name` gets the suffix `_total`. `help` is a sentence.
    pub fn counter_of_seconds(&mut self, name: &str, help: &str, samples: &[Sample<'_, f64>]) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for sample in samples {
            labelled(&mut family, sample.labels, |encoder| {
                encoder.encode_counter::<NoLabelSet, f64, f64>(&sample.value, None)
            })?;
        }
        Ok(())
    }

    /// Writes a histogram. `help` is a sentence.
    pub fn histogram(&mut self, name: &str, help: &str, samples: &[Distribution<'_>]) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for sample in samples {
            let count = sample.buckets.iter().map(|(_, count)| count).sum();
            labelled(&mut family, sample.labels, |encoder| {
                encoder.encode_histogram::<NoLabelSet>(sample.sum, count, sample.buckets, None)
            })?;
        }
        Ok(())
    }
}

/// Writes one sample with its labels, or with none: an empty set of labels would be written as `{}`.
fn labelled(
    family: &mut MetricEncoder<'_>,
    labels: &[(&str, &str)],
    sample: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
) -> fmt::Result {
    if labels.is_empty() { sample(family) } else { sample(&mut family.encode_family(&Pairs(labels))?) }
}

fn whole(value: f64) -> Option<i64> {
    // Below 2^53 every integer is a float of its own.
    (value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0).then_some(value as i64)
}

#[derive(Debug)]
struct Pairs<'a>(&'a [(&'a str, &'a str)]);

impl EncodeLabelSet for Pairs<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.0.encode(encoder)
    }
}

/// Every metric of the process.
pub struct Metrics {
    registry: Mutex<Registry>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// A registry that shows the traffic in `table`.
    pub fn new(table: Arc<SeriesTable>) -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Traffic(table)));
        Self { registry: Mutex::new(registry) }
    }

    /// Has `source` asked at each scrape from now on.
    pub fn register(&self, source: impl Source) {
        let mut registry = self.registry.lock();
        registry.register_collector(Box::new(Collected(source)));
    }

    /// All metrics in the OpenMetrics text format, with `# EOF` at the end. It can take some milliseconds and
    /// be megabytes: not for a data-plane thread.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry.lock())?;
        Ok(out)
    }
}

struct Collected<S>(S);

impl<S> fmt::Debug for Collected<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collected").finish_non_exhaustive()
    }
}

impl<S: Source> Collector for Collected<S> {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0.collect(&mut Families(encoder))
    }
}

/// The labels of one sample of the traffic metrics.
#[derive(Debug)]
struct Flagged<'a>(&'a Labels, ResponseFlag);

impl EncodeLabelSet for Flagged<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.0.each(self.1, |name, value| (name, value).encode(encoder.encode_label()))
    }
}

#[derive(Debug)]
struct Traffic(Arc<SeriesTable>);

impl Collector for Traffic {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        // One look at the counters for all five families: they agree with each other.
        let scraped: Vec<(Totals, Arc<Series>)> =
            self.0.all().into_iter().map(|series| (series.scrape(), series)).collect();
        let ended = |flags: &'static [ResponseFlag]| {
            move |totals: &Totals| {
                flags
                    .iter()
                    .map(|flag| (*flag, totals.closed[*flag as usize]))
                    // A flag that never was has no series, but a series that never failed starts at 0.
                    .filter(|(flag, count)| *flag == ResponseFlag::None || *count > 0)
                    .collect::<Vec<_>>()
            }
        };
        let unflagged =
            |value: fn(&Totals) -> u64| move |totals: &Totals| vec![(ResponseFlag::None, value(totals))];
        let (all, failures) = (&ResponseFlag::ALL, &ResponseFlag::ALL[1..]);

        let encoder = &mut encoder;
        let opened = unflagged(|totals| totals.opened);
        family(encoder, &scraped, "istio_tcp_connections_opened", "TCP connections opened.", opened)?;
        let closed = ended(all);
        family(encoder, &scraped, "istio_tcp_connections_closed", "TCP connections closed.", closed)?;
        let failed = ended(failures);
        family(encoder, &scraped, "istio_tcp_connections_failed", "TCP connections that failed.", failed)?;
        let received = unflagged(|totals| totals.received);
        family(encoder, &scraped, "istio_tcp_received_bytes", "Bytes received from clients.", received)?;
        let sent = unflagged(|totals| totals.sent);
        family(encoder, &scraped, "istio_tcp_sent_bytes", "Bytes sent to clients.", sent)
    }
}

fn family(
    encoder: &mut DescriptorEncoder<'_>,
    scraped: &[(Totals, Arc<Series>)],
    name: &str,
    help: &str,
    samples: impl Fn(&Totals) -> Vec<(ResponseFlag, u64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (totals, series) in scraped {
        for (flag, value) in samples(totals) {
            family
                .encode_family(&Flagged(series.labels(), flag))?
                .encode_counter::<NoLabelSet, u64, f64>(&value, None)?;
        }
    }
    Ok(())
}
