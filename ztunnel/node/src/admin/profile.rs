//! What the processor does, as samples of all threads, and what memory is used for ([`heap`]): in the format of pprof.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;
use std::time::SystemTime;

use pprof::Frames;
use pprof::ProfilerGuard;
use pprof::ProfilerGuardBuilder;
use pprof::Symbol;
use tokio::time::sleep;
use ztunnel_proto::profile as wire;
use ztunnel_proto::prost::Message;

pub mod heap;

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// Only one at a time can be made, and the kernel must allow for timers.
    #[error("the profiler does not start (is another profile being taken?): {0}")]
    Start(pprof::Error),
    /// Samples cannot be told.
    #[error("the samples cannot be read: {0}")]
    Report(pprof::Error),
    /// Reading them panicked.
    #[error("the samples cannot be read")]
    Panicked,
}

// The crate unwinds with framehop, which looks whether there is memory before it reads any. What libgcc's unwinder reads
// it believes to be there, and assembly (of aws-lc's ML-KEM, that is: of each TLS handshake) describes its stack wrongly.

/// Unwinding inside of these from a signal could wait for a lock that the interrupted code holds.
const NOT_UNWOUND: [&str; 4] = ["libc", "libgcc", "pthread", "vdso"];

/// Samples all threads for `duration`, `frequency` times per second of processor time. Ends early when the future is
/// dropped.
pub async fn processor(duration: Duration, frequency: u32) -> Result<Vec<u8>, ProfileError> {
    // The handler's first sample allocates what it needs to unwind. Dropped after the guard.
    let paused = heap::pause();
    let hertz = i32::try_from(frequency).unwrap_or(i32::MAX);
    let guard = ProfilerGuardBuilder::default()
        .frequency(hertz)
        .blocklist(&NOT_UNWOUND)
        .build()
        .map_err(ProfileError::Start)?;
    let started = SystemTime::now();
    sleep(duration).await;
    // Finding the names of all frames takes its time.
    let encoding = tokio::task::spawn_blocking(move || {
        let encoded = encode(&guard, started, duration, frequency);
        drop(guard);
        drop(paused);
        encoded
    });
    encoding.await.map_err(|_| ProfileError::Panicked)?
}

fn encode(
    guard: &ProfilerGuard<'_>,
    started: SystemTime,
    duration: Duration,
    frequency: u32,
) -> Result<Vec<u8>, ProfileError> {
    let report = guard.report().build().map_err(ProfileError::Report);
    // What was read to find the names is as large as the program.
    backtrace::clear_symbol_cache();
    let period = nanos(Duration::from_secs(1) / frequency.max(1));
    let cpu = ("cpu", "nanoseconds");
    let mut profile = Profile::new([("samples", "count"), cpu], cpu, started);
    profile.duration(duration);
    profile.period(period);
    for (frames, count) in &report?.data {
        let locations = locations(&mut profile, frames);
        let count = i64::try_from(*count).unwrap_or(i64::MAX);
        profile.add(locations, [count, count.saturating_mul(period)]);
    }
    Ok(profile.finish())
}

/// The nearest first.
fn locations(profile: &mut Profile, frames: &Frames) -> Vec<u64> {
    let mut locations: Vec<u64> = Vec::with_capacity(frames.frames.len() + 1);
    for inlined in &frames.frames {
        let line = |symbol: &Symbol| {
            let file = symbol.filename.as_deref().unwrap_or_else(|| Path::new(""));
            Line {
                name: symbol.name(),
                system_name: symbol.sys_name().into_owned(),
                file: file.to_string_lossy().into_owned(),
                line: symbol.lineno(),
            }
        };
        locations.push(profile.location(&inlined.iter().map(line).collect::<Vec<_>>()));
    }
    // The thread stands at the root of what it did.
    let thread = Line { name: frames.thread_name_or_id(), ..Line::default() };
    locations.push(profile.location(&[thread]));
    locations
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// A place in a function.
#[derive(Debug, Clone, Default)]
struct Line {
    name: String,
    /// The name as the linker knows it.
    system_name: String,
    /// Empty if it is not known.
    file: String,
    /// 0 if it is not known.
    line: u32,
}

/// A profile being made: <https://github.com/google/pprof/blob/main/proto/profile.proto>.
struct Profile {
    message: wire::Profile,
    strings: HashMap<String, i64>,
    functions: HashMap<(i64, i64), u64>,
    locations: HashMap<Vec<wire::Line>, u64>,
}

impl Profile {
    /// What a sample's two values count, in which units, and what there is between two samples.
    fn new(values: [(&str, &str); 2], period: (&str, &str), at: SystemTime) -> Self {
        let mut profile = Self {
            message: wire::Profile::default(),
            strings: HashMap::new(),
            functions: HashMap::new(),
            locations: HashMap::new(),
        };
        // The format wants the empty text first.
        profile.text("");
        profile.message.sample_type = values.map(|value| profile.value_type(value)).into();
        profile.message.period_type = Some(profile.value_type(period));
        profile.message.time_nanos = nanos(at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        profile
    }

    fn value_type(&mut self, (kind, unit): (&str, &str)) -> wire::ValueType {
        wire::ValueType { r#type: self.text(kind), unit: self.text(unit) }
    }

    fn duration(&mut self, duration: Duration) {
        self.message.duration_nanos = nanos(duration);
    }

    fn period(&mut self, period: i64) {
        self.message.period = period;
    }

    fn comment(&mut self, text: &str) {
        let text = self.text(text);
        self.message.comment.push(text);
    }

    /// Which of the two values is shown unless somebody wants the other.
    fn shown_first(&mut self, kind: &str) {
        self.message.default_sample_type = self.text(kind);
    }

    fn text(&mut self, text: &str) -> i64 {
        if let Some(index) = self.strings.get(text) {
            return *index;
        }
        let index = self.strings.len() as i64;
        self.strings.insert(text.to_owned(), index);
        self.message.string_table.push(text.to_owned());
        index
    }

    fn add(&mut self, locations: Vec<u64>, values: [i64; 2]) {
        self.message.sample.push(wire::Sample { location_id: locations, value: values.into() });
    }

    fn function(&mut self, line: &Line) -> u64 {
        let [name, system_name, filename] =
            [&line.name, &line.system_name, &line.file].map(|text| self.text(text));
        let next = self.functions.len() as u64 + 1;
        *self.functions.entry((name, filename)).or_insert_with(|| {
            self.message.function.push(wire::Function { id: next, name, system_name, filename });
            next
        })
    }

    /// One instruction: what was inlined there first.
    fn location(&mut self, lines: &[Line]) -> u64 {
        let line = |line: &Line| wire::Line { function_id: self.function(line), line: line.line.into() };
        let lines: Vec<_> = lines.iter().map(line).collect();
        if let Some(id) = self.locations.get(&lines) {
            return *id;
        }
        let id = self.locations.len() as u64 + 1;
        self.message.location.push(wire::Location { id, line: lines.clone() });
        self.locations.insert(lines, id);
        id
    }

    fn finish(self) -> Vec<u8> {
        self.message.encode_to_vec()
    }
}

#[cfg(test)]
mod tests;
