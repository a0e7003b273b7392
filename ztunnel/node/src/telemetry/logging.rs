//! The general log: `tracing` events as lines in the access log's format, through the same writer.
//!
//! The filter is `RUST_LOG`'s `target=level` list, and can be changed while the daemon runs ([`Levels`]); the access
//! log honours it under the target `access`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use parking_lot::MutexGuard;
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
use tracing_subscriber::reload;
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    rest: LevelFilter,
    targets: BTreeMap<String, LevelFilter>,
}

impl Default for Filter {
    /// `info`
    fn default() -> Self {
        Self { rest: LevelFilter::INFO, targets: BTreeMap::new() }
    }
}

impl fmt::Display for Filter {
    /// As [`Filter::from_str`] reads it, the level of the rest first.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.rest)?;
        self.targets.iter().try_for_each(|(target, level)| write!(f, ",{target}={level}"))
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
        Ok(Self {
            // A list of targets alone says nothing of the rest, which keeps its default.
            rest: targets.default_level().unwrap_or(LevelFilter::INFO),
            targets: targets.iter().map(|(target, level)| (target.to_owned(), level)).collect(),
        })
    }
}

/// One part of a change of the filter is not `<level>`, `<target>=<level>` or `<target>:<level>`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidChange {
    /// The level is none.
    #[error("{0:?} is not a level: use error, warn, info, debug, trace or off")]
    Level(String),
    /// The target is not the name of a part of the daemon.
    #[error(
        "{0:?} is not a part of this daemon that logs: use access, dns, ztunnel, ztunnel::<module> with one of {modules}, or \
         one of {crates}", modules = MODULES.map(|(module, _)| module).join(", "), crates = CRATES.join(", ")
    )]
    Target(String),
}

/// What is written line by line for what pods do: connections, and questions to their DNS. Each has a level of its own.
const RECORDS: [&str; 2] = [access_log::TARGET, "dns"];

/// The parts of this program that log by their names: the name an operator reads and writes, below `ztunnel::`, and the
/// beginning of the names of what is compiled into it.
const MODULES: [(&str, &str); 18] = [
    ("admin", "ztunnel_node::admin"),
    ("app", "ztunnel::app"),
    ("capture", "ztunnel_node::capture"),
    ("config", "ztunnel::config"),
    ("control", "ztunnel_control"),
    ("dns", "ztunnel_node::dns"),
    ("enrol", "ztunnel_node::enrol"),
    ("hbone", "ztunnel_node::hbone"),
    ("identity", "ztunnel_node::identity"),
    ("mesh", "ztunnel_mesh"),
    ("net", "ztunnel_node::net"),
    ("objects", "ztunnel_objects"),
    ("proxy", "ztunnel_node::proxy"),
    ("runtime", "ztunnel_runtime"),
    ("telemetry", "ztunnel_node::telemetry"),
    ("tls", "ztunnel_tls"),
    ("xds", "ztunnel_node::xds"),
    ("cli", "ztunnel::cli"),
];

/// What begins the names of this program.
const OURS: &str = "ztunnel::";

/// Whether `name` is `module` or something inside of it; what is inside.
fn inside<'a>(name: &'a str, module: &str) -> Option<&'a str> {
    name.strip_prefix(module).filter(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// The name of a part as the compiler knows it: `ztunnel::xds::client` is `ztunnel_node::xds::client`. Others as they are.
fn compiled(name: &str) -> Cow<'_, str> {
    let known = name.strip_prefix(OURS).and_then(|name| {
        MODULES.iter().find_map(|(module, compiled)| Some((inside(name, module)?, compiled)))
    });
    known.map_or(Cow::Borrowed(name), |(rest, compiled)| Cow::Owned(format!("{compiled}{rest}")))
}

/// And back: the name of a part as an operator knows it, whichever crate it is in.
fn shown(target: &str) -> Cow<'_, str> {
    if !target.starts_with("ztunnel_") {
        return Cow::Borrowed(target);
    }
    let known = MODULES.iter().find_map(|(module, compiled)| Some((inside(target, compiled)?, module)));
    known.map_or(Cow::Borrowed(target), |(rest, module)| Cow::Owned(format!("{OURS}{module}{rest}")))
}

/// What else is in this program and logs.
const CRATES: [&str; 8] = ["aya", "aya_obj", "h2", "hyper", "hyper_util", "mio", "rustls", "tokio"];

/// Whether anything logs under this name.
fn is_target(target: &str) -> bool {
    let Some(ours) = target.strip_prefix(OURS) else {
        let first = target.split("::").next().unwrap_or_default();
        return target == "ztunnel" || RECORDS.contains(&target) || CRATES.contains(&first);
    };
    MODULES.iter().any(|(module, _)| inside(ours, module).is_some())
}

impl Filter {
    /// The filter after a change such as `debug` or `access:off,ztunnel::proxy=debug`: a level alone is that of
    /// the rest, a target's level is the target's, and what is not named stays.
    pub fn changed(&self, change: &str) -> Result<Self, InvalidChange> {
        let mut changed = self.clone();
        for part in change.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match split(part) {
                Some((target, level)) => {
                    let level = level_of(level)?;
                    let target = if is_target(target) {
                        target.to_owned()
                    } else if MODULES.iter().any(|(module, _)| *module == target) {
                        // A module by its own name.
                        format!("{OURS}{target}")
                    } else {
                        return Err(InvalidChange::Target(target.to_owned()));
                    };
                    changed.targets.insert(target, level);
                }
                None => changed.rest = level_of(part)?,
            }
        }
        Ok(changed)
    }

    /// Names under which nothing logs, so that their levels have no effect.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        self.targets.keys().map(String::as_str).filter(|target| !is_target(target))
    }

    /// The least important access log lines that pass.
    pub fn access_log(&self) -> LevelFilter {
        let targets = self.targets();
        let passes = |level: &Level| targets.would_enable(access_log::TARGET, level);
        let by_importance = [Level::TRACE, Level::DEBUG, Level::INFO, Level::WARN, Level::ERROR];
        by_importance.into_iter().find(passes).map_or(LevelFilter::OFF, LevelFilter::from)
    }

    fn targets(&self) -> Targets {
        let named = self.targets.iter().map(|(target, level)| (compiled(target), *level));
        Targets::new().with_default(self.rest).with_targets(named)
    }
}

/// The target and the level of `target=level` or `target:level`, of which the target may have `::` in it.
fn split(part: &str) -> Option<(&str, &str)> {
    part.split_once('=')
        .or_else(|| part.rsplit_once(':').filter(|(before, _)| !before.ends_with(':')))
        .map(|(target, level)| (target.trim(), level.trim()))
}

fn level_of(text: &str) -> Result<LevelFilter, InvalidChange> {
    // The parser would take numbers, too.
    match text.to_ascii_lowercase().as_str() {
        known @ ("error" | "warn" | "info" | "debug" | "trace" | "off") => {
            known.parse().map_err(|_| InvalidChange::Level(text.to_owned()))
        }
        "warning" => Ok(LevelFilter::WARN),
        _ => Err(InvalidChange::Level(text.to_owned())),
    }
}

/// The process has a log already.
#[derive(Debug, thiserror::Error)]
#[error("the log was set up twice")]
pub struct AlreadyInstalled(#[source] tracing_subscriber::util::TryInitError);

/// The filter in force, which may change while the process runs. Cheap to clone.
#[derive(Clone)]
pub struct Levels(Arc<InForce>);

struct InForce {
    startup: Filter,
    current: Mutex<Filter>,
    apply: Box<dyn Fn(&Filter) + Send + Sync>,
}

impl Levels {
    fn new(startup: Filter, apply: impl Fn(&Filter) + Send + Sync + 'static) -> Self {
        let current = Mutex::new(startup.clone());
        Self(Arc::new(InForce { startup, current, apply: Box::new(apply) }))
    }

    /// Levels that nothing heeds.
    #[cfg(test)]
    pub(crate) fn unattached(startup: Filter) -> Self {
        Self::new(startup, |_| {})
    }

    /// The filter in force.
    pub fn current(&self) -> Filter {
        self.lock().clone()
    }

    /// Makes the change in force, on top of the filter of the start if `reset`, and returns the filter that is in
    /// force then. A change that cannot be read changes nothing.
    pub fn change(&self, reset: bool, change: Option<&str>) -> Result<Filter, InvalidChange> {
        let mut current = self.lock();
        let base = if reset { &self.0.startup } else { &*current };
        let changed = change.map_or_else(|| Ok(base.clone()), |change| base.changed(change))?;
        (self.0.apply)(&changed);
        current.clone_from(&changed);
        Ok(changed)
    }

    fn lock(&self) -> MutexGuard<'_, Filter> {
        self.0.current.lock()
    }
}

impl fmt::Debug for Levels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Levels").field(&self.current()).finish()
    }
}

/// Sends the process's `tracing` events that pass `filter` to `log`.
pub fn install(filter: &Filter, format: Format, log: LogQueue) -> Result<Levels, AlreadyInstalled> {
    let (subscriber, levels) = subscriber(filter, format, log);
    subscriber.try_init().map_err(AlreadyInstalled)?;
    Ok(levels)
}

fn subscriber(
    filter: &Filter,
    format: Format,
    log: LogQueue,
) -> (impl Subscriber + Send + Sync + 'static, Levels) {
    let (targets, handle) = reload::Layer::new(filter.targets());
    let levels = Levels::new(filter.clone(), move |filter| {
        // It fails only when the subscriber is gone, and with it every reader of the filter.
        let _gone = handle.reload(filter.targets());
    });
    (tracing_subscriber::registry().with(Lines { format, log }.with_filter(targets)), levels)
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
            target: &shown(event.metadata().target()),
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
        let (subscriber, _levels) = subscriber(&filter.parse().unwrap(), format, queue.clone());
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
            ",\"scope\":\"t\",\"n\":1,\"odd\":\"NaN\",\"message\":\"say \\\"hi\\\"\\n\",\"proxy\":{\"wl\":\"shop/a\"}}\n"
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
            tracing::debug!(target: "ztunnel_node::proxy", "a");
            tracing::info!(target: "ztunnel_node::proxy", "b");
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
    fn a_filter_is_written_as_it_is_read() {
        for (text, written) in [
            ("debug", "debug"),
            ("access=off,info", "info,access=off"),
            ("ztunnel::proxy=debug", "info,ztunnel::proxy=debug"),
            ("info,hickory_server::server=off", "info,hickory_server::server=off"),
        ] {
            assert_eq!(text.parse::<Filter>().unwrap().to_string(), written);
        }
    }

    #[test]
    fn a_filter_is_changed_as_istioctl_asks() {
        let start: Filter = "info,access=off".parse().unwrap();
        for (change, after) in [
            ("debug", "debug,access=off"),
            ("WARNING", "warn,access=off"),
            ("access:debug", "info,access=debug"),
            ("access=debug", "info,access=debug"),
            ("dns=debug", "info,access=off,dns=debug"),
            ("ztunnel::proxy:trace,xds=off", "info,access=off,ztunnel::proxy=trace,ztunnel::xds=off"),
            ("error,access:info", "error,access=info"),
            ("", "info,access=off"),
        ] {
            assert_eq!(start.changed(change).unwrap().to_string(), after, "{change}");
        }
        for bad in [
            "loud",
            "access:loud",
            "access=",
            "access:",
            "ztunnel::proxy",
            "=debug",
            "a b=info",
            "3",
            "acess:debug",
            "ztunnel::prox=off",
        ] {
            assert!(start.changed(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn every_module_has_levels() {
        let modules = include_str!("../lib.rs").lines().filter_map(|line| line.strip_prefix("pub mod "));
        for module in modules.map(|module| module.trim_end_matches(';')) {
            // These two have nothing to say.
            let known = is_target(&format!("ztunnel::{module}")) || ["api", "fuzzing"].contains(&module);
            assert!(known, "{module} is not named");
        }
        assert_eq!(shown(module_path!()), "ztunnel::telemetry::logging::tests");
        let unknown: Filter = "info,acess=debug,ztunnel::xds=debug,h2=warn".parse().unwrap();
        assert_eq!(unknown.unknown().collect::<Vec<_>>(), ["acess"]);
    }

    #[test]
    fn a_part_has_one_name_whichever_crate_it_is_in() {
        for (name, in_the_program) in [
            ("ztunnel::xds::client", "ztunnel_node::xds::client"),
            ("ztunnel::control::watch", "ztunnel_control::watch"),
            ("ztunnel::tls", "ztunnel_tls"),
            ("ztunnel::app::control", "ztunnel::app::control"),
            ("access", "access"),
            ("h2::proto", "h2::proto"),
        ] {
            assert_eq!(compiled(name), in_the_program);
            assert_eq!(shown(in_the_program), name);
        }
        // Not a module that only begins like one.
        assert_eq!(compiled("ztunnel::nets"), "ztunnel::nets");
    }

    #[test]
    fn levels_change_what_is_written_from_then_on() {
        let out = Written::default();
        let queue = writer::start(Box::new(out.clone()), Format::Plain).unwrap();
        let (subscriber, levels) = subscriber(&"info".parse().unwrap(), Format::Plain, queue.clone());
        let log = |text: &str| tracing::debug!(target: "ztunnel::app", "{text}");
        tracing::subscriber::with_default(subscriber, || {
            log("one");
            assert_eq!(
                levels.change(false, Some("app:debug")).unwrap().to_string(),
                "info,ztunnel::app=debug"
            );
            log("two");
            assert!(levels.change(true, Some("loud")).is_err());
            assert_eq!(
                levels.current().to_string(),
                "info,ztunnel::app=debug",
                "an error changed the filter"
            );
            log("three");
            assert_eq!(levels.change(true, None).unwrap().to_string(), "info");
            log("four");
            assert_eq!(levels.change(true, Some("debug")).unwrap().to_string(), "debug");
            log("five");
        });
        assert!(queue.flush(Duration::from_secs(10)));
        let text = out.text();
        let said: Vec<_> = text.lines().map(|line| line.rsplit('\t').next().unwrap()).collect();
        assert_eq!(said, ["two", "three", "five"]);
    }

    #[test]
    fn what_is_not_a_filter_is_refused() {
        for text in ["info,access=loud", "a=b=c"] {
            assert!(text.parse::<Filter>().is_err(), "{text} was accepted");
        }
    }
}
