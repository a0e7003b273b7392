//! Looks variables up where Istio looks for them, and keeps record of what was found where.
//!
//! A value that cannot be used is not an end: all of them are told at once.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::env::proxy_config::ProxyConfig;
use crate::config::origin::Origin;
use crate::config::origin::Shown;

/// A value that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}={value:?}: {accepted}")]
pub struct Problem {
    /// The variable.
    pub name: String,
    /// What it says.
    pub value: String,
    /// What it could say, or why it cannot say this.
    pub accepted: String,
}

/// All values that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the environment cannot be used:{}", .0.iter().map(|problem| format!("\n  {problem}")).collect::<String>())]
pub struct Problems(pub Vec<Problem>);

/// What a kind of value is read with, and how it is described to whoever got it wrong.
struct Kind<T> {
    read: fn(&str) -> Option<T>,
    accepted: &'static str,
    show: fn(&T) -> String,
}

/// The environment being read.
pub(super) struct Reader<'a> {
    env: &'a BTreeMap<String, String>,
    /// The merged `ProxyConfig`.
    pub(super) proxy: ProxyConfig,
    pub(super) shown: Vec<Shown>,
    pub(super) problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(env: &'a BTreeMap<String, String>, mesh_config: Option<&str>) -> Self {
        let mut problems = Vec::new();
        let proxy =
            ProxyConfig::merged(env.get("PROXY_CONFIG").map(String::as_str), mesh_config, &mut problems);
        Self { env, proxy, shown: Vec::new(), problems }
    }

    /// The variable as it stands, empty or not.
    pub(super) fn raw(&self, name: &str) -> Option<&'a str> {
        self.env.get(name).map(String::as_str)
    }

    /// The variable, unless it is empty: charts set variables to nothing where a value was not given.
    pub(super) fn set(&self, name: &str) -> Option<&'a str> {
        self.raw(name).filter(|text| !text.is_empty())
    }

    /// All variables whose name begins with `prefix`, without it.
    pub(super) fn prefixed(
        &self,
        prefix: &'static str,
    ) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        let from = self.env.range(prefix.to_owned()..);
        from.map_while(move |(name, value)| Some((name.strip_prefix(prefix)?, value.as_str())))
    }

    /// Records what is in force.
    pub(super) fn show(&mut self, name: &str, value: impl fmt::Display, origin: Origin) {
        self.shown.push(Shown { name: name.to_owned(), value: value.to_string(), origin });
    }

    /// Records a value that cannot be used.
    pub(super) fn refuse(&mut self, name: &str, value: &str, accepted: impl Into<String>) {
        let (name, value) = (name.to_owned(), value.to_owned());
        self.problems.push(Problem { name, value, accepted: accepted.into() });
    }

    fn read<T>(&mut self, name: &str, kind: &Kind<T>, default: impl Into<Option<T>>) -> Option<T> {
        let (value, origin) = match self.set(name) {
            None => (default.into(), Origin::Default),
            Some(text) => match (kind.read)(text.trim()) {
                Some(value) => (Some(value), Origin::Environment),
                None => {
                    self.refuse(name, text, kind.accepted);
                    return default.into();
                }
            },
        };
        self.show(name, value.as_ref().map(kind.show).unwrap_or_default(), origin);
        value
    }

    pub(super) fn text(&mut self, name: &str, default: &str) -> String {
        let value = self.set(name).unwrap_or(default).to_owned();
        let origin = if self.set(name).is_some() { Origin::Environment } else { Origin::Default };
        self.show(name, &value, origin);
        value
    }

    pub(super) fn path(&mut self, name: &str, default: &str) -> PathBuf {
        PathBuf::from(self.text(name, default))
    }

    pub(super) fn optional(&mut self, name: &str) -> Option<String> {
        Some(self.text(name, "")).filter(|text| !text.is_empty())
    }

    pub(super) fn flag(&mut self, name: &str, default: bool) -> bool {
        let kind = Kind { read: flag, accepted: FLAG, show: bool::to_string };
        self.read(name, &kind, default).unwrap_or(default)
    }

    /// `None` when nothing is said.
    pub(super) fn tristate(&mut self, name: &str) -> Option<bool> {
        self.read(name, &Kind { read: flag, accepted: FLAG, show: bool::to_string }, None)
    }

    pub(super) fn duration(&mut self, name: &str, default: Duration) -> Duration {
        self.optional_duration(name, Some(default)).unwrap_or(default)
    }

    pub(super) fn optional_duration(&mut self, name: &str, default: Option<Duration>) -> Option<Duration> {
        let show = |value: &Duration| humantime::format_duration(*value).to_string();
        let read = |text: &str| humantime::parse_duration(text).ok();
        self.read(name, &Kind { read, accepted: "use a duration such as 10s, 5m or 1h30m", show }, default)
    }

    /// A number of at least 1.
    pub(super) fn count(&mut self, name: &str, default: u32) -> u32 {
        let read = |text: &str| text.parse().ok().filter(|count| *count > 0);
        let kind = Kind { read, accepted: "use a whole number from 1 to 4294967295", show: u32::to_string };
        self.read(name, &kind, default).unwrap_or(default)
    }

    pub(super) fn number(&mut self, name: &str, default: Option<u32>) -> Option<u32> {
        let read = |text: &str| match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        };
        let kind = Kind { read, accepted: "use a whole number from 0 to 4294967295", show: u32::to_string };
        self.read(name, &kind, default)
    }

    /// Processor cores as Kubernetes writes them, rounded up.
    pub(super) fn cores(&mut self, name: &str) -> Option<usize> {
        let accepted = "use a number of processor cores such as 2, 0.5 or 500m";
        self.read(name, &Kind { read: cores, accepted, show: usize::to_string }, None)
    }
}

const FLAG: &str = "use true or false";

/// As Istio's: nothing but these two words.
pub(super) fn flag(text: &str) -> Option<bool> {
    match text {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

fn cores(text: &str) -> Option<usize> {
    let milli = match text.strip_suffix('m') {
        Some(milli) => milli.parse::<u32>().ok().map(f64::from)?,
        None => text.parse::<f64>().ok().filter(|cores| cores.is_finite())? * 1000.0,
    };
    // A machine of a million cores is a mistake.
    (0.0..=1e9).contains(&milli).then_some((milli / 1000.0).ceil() as usize)
}
