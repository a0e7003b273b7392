//! The general log: `tracing` events as lines in the access log's format, through the same writer.
//!
//! The filter is `RUST_LOG`'s `target=level` list; the access log honours it under the target `access`.

use std::fmt;
use std::fmt::Write as _;
use std::str::FromStr;
use std::time::SystemTime;

use tracing::Event;
use tracing::Level;
use tracing::Subscriber;
use tracing::field::Field;
use tracing::field::Visit;
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::Context;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::telemetry::access_log;
use crate::telemetry::line::Format;
use crate::telemetry::line::Head;
use crate::telemetry::line::Line;
use crate::telemetry::line::Span;
use crate::telemetry::line::Value;
use crate::telemetry::writer::Entry;
use crate::telemetry::writer::LogQueue;

/// Which lines are written: `info`, or `info,access=off,ztunnel::proxy=debug`.
#[derive(Debug, Clone)]
pub struct Filter(Targets);

impl Default for Filter {
    /// `info`
    fn default() -> Self {
        Self(Targets::new().with_default(LevelFilter::INFO))
    }
}

/// The text is not a log filter.
#[derive(Debug, thiserror::Error)]
#[error("log filter {text:?} is not a list of <level> and <target>=<level>, such as info,access=off")]
pub struct InvalidFilter {
    text: String,
    source: tracing_subscriber::filter::ParseError,
}

impl FromStr for Filter {
    type Err = InvalidFilter;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let targets: Targets =
            text.parse().map_err(|source| InvalidFilter { text: text.to_owned(), source })?;
        // A list of targets alone says nothing of the rest, which keeps its default.
        let rest = targets.default_level().unwrap_or(LevelFilter::INFO);
        Ok(Self(targets.with_default(rest)))
    }
}

impl Filter {
    /// The least important access log lines that pass.
    pub fn access_log(&self) -> LevelFilter {
        let passes = |level: &Level| self.0.would_enable(access_log::TARGET, level);
        let by_importance = [Level::TRACE, Level::DEBUG, Level::INFO, Level::WARN, Level::ERROR];
        by_importance.into_iter().find(passes).map_or(LevelFilter::OFF, LevelFilter::from)
    }
}

/// The process has a log already.
#[derive(Debug, thiserror::Error)]
#[error("the log was set up twice")]
pub struct AlreadyInstalled(#[source] tracing_subscriber::util::TryInitError);

/// Sends the process's `tracing` events that pass `filter` to `log`.
pub fn install(filter: &Filter, format: Format, log: LogQueue) -> Result<(), AlreadyInstalled> {
    subscriber(filter, format, log).try_init().map_err(AlreadyInstalled)
}

fn subscriber(filter: &Filter, format: Format, log: LogQueue) -> impl Subscriber + Send + Sync + 'static {
    tracing_subscriber::registry().with(Lines { format, log }.with_filter(filter.0.clone()))
}

#[derive(Debug)]
struct Lines {
    format: Format,
    log: LogQueue,
}

impl<S> Layer<S> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &span::Id, record: &span::Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            record.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let around: Vec<Span> = context
            .event_scope(event)
            .into_iter()
            .flat_map(|scope| scope.from_root())
            .map(|span| Span {
                name: span.name(),
                fields: span
                    .extensions()
                    .get::<Fields>()
                    .map(|fields| fields.named.clone())
                    .unwrap_or_default(),
            })
            .collect();
        let head = Head {
            at: SystemTime::now(),
            level: *event.metadata().level(),
            target: event.metadata().target(),
            message: &fields.message,
        };
        let mut text = String::with_capacity(256);
        let mut line = Line::begin(&mut text, self.format, head, &around);
        for (key, value) in &fields.named {
            line.value(key, value);
        }
        line.end(&around);
        self.log.push(Entry::Text(text));
    }
}

/// The fields of a span or an event, its message apart.
#[derive(Debug, Default)]
struct Fields {
    message: String,
    named: Vec<(&'static str, Value)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        if let Some((_, known)) = self.named.iter_mut().find(|(name, _)| *name == field.name()) {
            *known = value;
        } else {
            self.named.push((field.name(), value));
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message.clear();
            write!(self.message, "{value:?}").expect("a String takes every write");
        } else {
            self.put(field, Value::Shown(format!("{value:?}")));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
        } else {
            self.put(field, Value::Text(value.to_owned()));
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, Value::Bare(value.to_string()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, Value::Bare(value.to_string()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, Value::Bare(value.to_string()));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no way to write the other floats.
        let text = value.to_string();
        self.put(field, if value.is_finite() { Value::Bare(text) } else { Value::Shown(text) });
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        // The causes tell as much as the error itself, whose text leaves them out.
        let mut text = value.to_string();
        let mut cause = value.source();
        while let Some(error) = cause {
            write!(text, ": {error}").expect("a String takes every write");
            cause = error.source();
        }
        self.put(field, Value::Text(text));
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::time::Duration;

    use super::*;
    use crate::telemetry::testing::Written;
    use crate::telemetry::writer;

    /// What `log` writes under `filter`, without the times.
    fn written(filter: &str, format: Format, log: impl FnOnce()) -> String {
        let out = Written::default();
        let queue = writer::start(Box::new(out.clone()), format).unwrap();
        let subscriber = subscriber(&filter.parse().unwrap(), format, queue.clone());
        tracing::subscriber::with_default(subscriber, log);
        assert!(queue.flush(Duration::from_secs(10)));
        out.text()
    }

    fn plain(filter: &str, log: impl FnOnce()) -> Vec<String> {
        let text = written(filter, Format::Plain, log);
        text.lines().map(|line| line.split_once('\t').unwrap().1.to_owned()).collect()
    }

    #[test]
    fn an_event_is_a_line_with_its_fields() {
        let lines = plain("info", || {
            tracing::info!(target: "ztunnel::app", pods = 3, name = "a b", addr = %"1.2.3.4", up = true, "started");
            tracing::warn!(target: "ztunnel::app", "alone");
        });
        assert_eq!(
            lines,
            [
                "info\tztunnel::app\tstarted\tpods=3 name=\"a b\" addr=1.2.3.4 up=true",
                "warn\tztunnel::app\talone"
            ]
        );
    }

    #[test]
    fn spans_stand_behind_the_target() {
        let lines = plain("info", || {
            let span = tracing::info_span!("proxy", wl = %"shop/a", late = tracing::field::Empty);
            span.record("late", 7);
            let _proxy = span.entered();
            let _inbound = tracing::info_span!("inbound").entered();
            tracing::info!(target: "t", "m");
        });
        assert_eq!(lines, ["info\tt:proxy{wl=shop/a late=7}:inbound\tm"]);
    }

    #[test]
    fn json_lines_are_json() {
        let text = written("info", Format::Json, || {
            let _span = tracing::info_span!("proxy", wl = %"shop/a").entered();
            tracing::info!(target: "t", n = 1, odd = f64::NAN, "say \"hi\"\n");
        });
        let (head, tail) = text.split_once("\"time\":\"").unwrap();
        let (time, tail) = tail.split_once('"').unwrap();
        assert_eq!(head, "{\"level\":\"info\",");
        assert_eq!(time.len(), "2026-01-01T00:00:00.000000Z".len());
        assert_eq!(
            tail,
            ",\"scope\":\"t\",\"message\":\"say \\\"hi\\\"\\n\",\"n\":1,\"odd\":\"NaN\",\"proxy\":{\"wl\":\"shop/a\"}}\n"
        );
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
    }

    #[test]
    fn no_text_makes_a_second_line() {
        let lines = plain("info", || {
            tracing::info!(target: "t", peer = %"a\nb", text = "c\nd", "one\ttwo\nthree");
        });
        assert_eq!(lines, ["info\tt\tone\\ttwo\\nthree\tpeer=a\\nb text=\"c\\nd\""]);
    }

    #[test]
    fn an_error_is_told_with_its_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);
        let lines = plain("info", || {
            let error = Outer(io::Error::other("inner"));
            tracing::error!(target: "t", error = &error as &(dyn std::error::Error + 'static), "m");
        });
        assert_eq!(lines, ["error\tt\tm\terror=\"outer: inner\""]);
    }

    #[test]
    fn the_filter_decides_by_target_and_level() {
        let log = || {
            tracing::debug!(target: "ztunnel::proxy", "a");
            tracing::info!(target: "ztunnel::proxy", "b");
            tracing::info!(target: "other", "c");
            tracing::warn!(target: "other", "d");
        };
        let messages = |filter| -> Vec<String> {
            plain(filter, log).iter().map(|line| line.rsplit('\t').next().unwrap().to_owned()).collect()
        };
        assert_eq!(messages("info"), ["b", "c", "d"]);
        assert_eq!(messages("warn,ztunnel::proxy=debug"), ["a", "b", "d"]);
        assert_eq!(messages("ztunnel::proxy=off"), ["c", "d"]);
        assert_eq!(messages("off"), [""; 0]);
    }

    #[test]
    fn the_access_log_has_its_own_level() {
        let level = |filter: &str| filter.parse::<Filter>().unwrap().access_log();
        assert_eq!(Filter::default().access_log(), LevelFilter::INFO);
        assert_eq!(level("info"), LevelFilter::INFO);
        assert_eq!(level("info,access=off"), LevelFilter::OFF);
        assert_eq!(level("debug,access=error"), LevelFilter::ERROR);
        assert_eq!(level("access=debug"), LevelFilter::DEBUG);
        assert_eq!(level("ztunnel=debug"), LevelFilter::INFO);
    }

    #[test]
    fn what_is_not_a_filter_is_refused() {
        for text in ["info,access=loud", "a=b=c"] {
            assert!(text.parse::<Filter>().is_err(), "{text} was accepted");
        }
    }
}
