//! One line of a log, in the two formats Istio's node proxy writes.
//!
//! Plain: `<time>\t<level>\t<target>[:<span>{<k>=<v>}]\t<message>\t<k>=<v> <k>=<v>`. JSON:
//! `{"level","time","scope",<fields>,"message",<spans>}`. Knows nothing of what is logged.

use std::cell::RefCell;
use std::fmt;
use std::fmt::Write as _;
use std::str::FromStr;
use std::time::Duration;
use std::time::SystemTime;

use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use tracing::Level;

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Tab-separated text.
    #[default]
    Plain,
    /// One JSON object per line.
    Json,
}

/// The text is not a log format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("log format {0:?} is unknown: use plain or json")]
pub struct UnknownFormat(String);

impl FromStr for Format {
    type Err = UnknownFormat;

    /// `plain` or `json`, as `LOG_FORMAT` has it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "plain" => Ok(Self::Plain),
            "json" => Ok(Self::Json),
            other => Err(UnknownFormat(other.to_owned())),
        }
    }
}

/// A field's value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A string: quoted in both formats.
    Text(String),
    /// Something shown by its own rules: bare in plain lines, a string in JSON.
    Shown(String),
    /// A number or a truth value, already rendered: bare in both formats.
    Bare(String),
}

/// A line being appended to a buffer. Control characters never reach it as they are, so one event stays one line
/// whatever a peer put into its names.
#[derive(Debug)]
pub struct Line<'a> {
    out: &'a mut String,
    format: Format,
    /// What comes before the next field.
    separator: char,
    /// JSON only: written behind the fields, as Istio has it.
    message: &'a str,
}

/// What a line starts with.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// When it happened.
    pub at: SystemTime,
    /// How important it is.
    pub level: Level,
    /// Which part of the daemon tells.
    pub target: &'a str,
    /// What happened.
    pub message: &'a str,
}

/// A span an event happened in.
#[derive(Debug, Clone, Default)]
pub struct Span {
    /// Its name.
    pub name: &'static str,
    /// Its fields.
    pub fields: Vec<(&'static str, Value)>,
}

impl<'a> Line<'a> {
    /// Starts a line at the end of `out`. `spans` are the spans around it, the outermost first.
    pub fn begin(out: &'a mut String, format: Format, head: Head<'a>, spans: &[Span]) -> Self {
        let level = level_name(head.level);
        match format {
            Format::Plain => {
                push_time(out, head.at);
                out.extend(["\t", level, "\t"]);
                push_clean(out, head.target);
                for span in spans {
                    out.extend([":", span.name]);
                    if !span.fields.is_empty() {
                        out.push('{');
                        let mut inner = Line { out: &mut *out, format, separator: '\0', message: "" };
                        for (key, value) in &span.fields {
                            inner.value(key, value);
                        }
                        out.push('}');
                    }
                }
                out.push('\t');
                push_clean(out, head.message);
            }
            Format::Json => {
                out.extend(["{\"level\":\"", level, "\",\"time\":\""]);
                push_time(out, head.at);
                out.push_str("\",\"scope\":");
                push_json(out, head.target);
            }
        }
        Self { out, format, separator: '\t', message: head.message }
    }

    /// A string: `key="value"`.
    pub fn text(&mut self, key: &str, value: &str) {
        self.key(key);
        match self.format {
            // Most texts have nothing to escape, and looking at each character for it takes long.
            _ if is_plain(value) => self.out.extend(["\"", value, "\""]),
            Format::Plain => write!(self.out, "{value:?}").expect("a String takes every write"),
            Format::Json => push_json(self.out, value),
        }
    }

    /// A string that has nothing to escape, as numbers with their units have not: `key="value"`.
    pub fn quoted(&mut self, key: &str, value: fmt::Arguments<'_>) {
        self.key(key);
        write!(self.out, "\"{value}\"").expect("a String takes every write");
    }

    /// Something shown by its own rules: `key=value`.
    pub fn shown(&mut self, key: &str, value: impl fmt::Display) {
        self.key(key);
        let quote = if self.format == Format::Json { "\"" } else { "" };
        self.out.push_str(quote);
        let start = self.out.len();
        write!(self.out, "{value}").expect("a String takes every write");
        if is_plain(&self.out[start..]) {
            self.out.push_str(quote);
            return;
        }
        let text = self.out.split_off(start);
        match self.format {
            Format::Plain => push_clean(self.out, &text),
            Format::Json => {
                self.out.truncate(start - quote.len());
                push_json(self.out, &text);
            }
        }
    }

    /// A number: `key=1`.
    pub fn number(&mut self, key: &str, value: u64) {
        self.key(key);
        write!(self.out, "{value}").expect("a String takes every write");
    }

    /// Any value.
    pub fn value(&mut self, key: &str, value: &Value) {
        match value {
            Value::Text(text) => self.text(key, text),
            Value::Shown(text) => self.shown(key, text),
            Value::Bare(text) => {
                self.key(key);
                self.out.push_str(text);
            }
        }
    }

    /// Ends the line. JSON puts the message here, and the spans, each an object under its name.
    pub fn end(mut self, spans: &[Span]) {
        if self.format == Format::Json {
            self.key("message");
            push_json(self.out, self.message);
            for span in spans {
                self.key(span.name);
                self.out.push('{');
                let (format, message) = (Format::Json, "");
                let mut inner = Line { out: &mut *self.out, format, separator: '\0', message };
                for (key, value) in &span.fields {
                    inner.value(key, value);
                }
                self.out.push('}');
            }
            self.out.push('}');
        }
        self.out.push('\n');
    }

    fn key(&mut self, key: &str) {
        match self.format {
            Format::Plain => {
                if self.separator != '\0' {
                    self.out.push(self.separator);
                }
                self.separator = ' ';
                self.out.extend([key, "="]);
            }
            Format::Json => {
                if self.separator != '\0' {
                    self.out.push(',');
                }
                self.separator = ',';
                push_json(self.out, key);
                self.out.push(':');
            }
        }
    }
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

const SECOND: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].");

thread_local! {
    /// The last second that was written, since 1970, and how it reads: the next line mostly has the same.
    static WRITTEN: RefCell<(u64, String)> = const { RefCell::new((u64::MAX, String::new())) };
}

fn push_time(out: &mut String, at: SystemTime) {
    // A clock before 1970 is as good as none.
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    WRITTEN.with_borrow_mut(|(second, text)| {
        if *second != since.as_secs() {
            *second = since.as_secs();
            let whole = SystemTime::UNIX_EPOCH + Duration::from_secs(*second);
            let known = OffsetDateTime::from(whole).format(SECOND);
            *text = known.expect("every component of the format is in an OffsetDateTime");
        }
        out.push_str(text);
    });
    write!(out, "{:06}Z", since.subsec_micros()).expect("a String takes every write");
}

/// Whether nothing in `text` has to be escaped, in either format.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'"' && b != b'\\')
}

fn push_clean(out: &mut String, text: &str) {
    if is_plain(text) {
        return out.push_str(text);
    }
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
}

fn push_json(out: &mut String, text: &str) {
    if is_plain(text) {
        return out.extend(["\"", text, "\""]);
    }
    out.push_str(&serde_json::Value::from(text).to_string());
}
