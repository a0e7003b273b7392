//! What the processor does: samples of all threads, in the format of pprof.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;
use std::time::SystemTime;

use pprof::Frames;
use pprof::ProfilerGuard;
use pprof::ProfilerGuardBuilder;
use tokio::time::sleep;

use crate::admin::profile::encoder::Message;

pub mod encoder;

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
    let hertz = i32::try_from(frequency).unwrap_or(i32::MAX);
    let guard = ProfilerGuardBuilder::default()
        .frequency(hertz)
        .blocklist(&NOT_UNWOUND)
        .build()
        .map_err(ProfileError::Start)?;
    let started = SystemTime::now();
    sleep(duration).await;
    // Finding the names of all frames takes its time.
    let encoding = tokio::task::spawn_blocking(move || encode(&guard, started, duration, frequency));
    encoding.await.map_err(|_| ProfileError::Panicked)?
}

fn encode(
    guard: &ProfilerGuard<'_>,
    started: SystemTime,
    duration: Duration,
    frequency: u32,
) -> Result<Vec<u8>, ProfileError> {
    let report = guard.report().build().map_err(ProfileError::Report)?;
    let period = Duration::from_secs(1) / frequency.max(1);
    let mut profile = Profile::new(started, duration, period);
    for (frames, count) in &report.data {
        profile.add(frames, i64::try_from(*count).unwrap_or(i64::MAX));
    }
    Ok(profile.finish())
}

/// A profile being written: <https://github.com/google/pprof/blob/main/proto/profile.proto>.
struct Profile {
    message: Message,
    period_ns: i64,
    strings: HashMap<String, u64>,
    functions: HashMap<(u64, u64), u64>,
    locations: HashMap<Vec<(u64, u32)>, u64>,
}

const SAMPLE_TYPE: u32 = 1;
const SAMPLE: u32 = 2;
const LOCATION: u32 = 4;
const FUNCTION: u32 = 5;
const STRING: u32 = 6;
const TIME: u32 = 9;
const DURATION: u32 = 10;
const PERIOD_TYPE: u32 = 11;
const PERIOD: u32 = 12;

impl Profile {
    fn new(started: SystemTime, duration: Duration, period: Duration) -> Self {
        let nanos = |duration: Duration| i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
        let mut profile = Self {
            message: Message::default(),
            period_ns: nanos(period),
            strings: HashMap::new(),
            functions: HashMap::new(),
            locations: HashMap::new(),
        };
        // The format wants the empty text first.
        profile.text("");
        for (field, kind, unit) in [
            (SAMPLE_TYPE, "samples", "count"),
            (SAMPLE_TYPE, "cpu", "nanoseconds"),
            (PERIOD_TYPE, "cpu", "nanoseconds"),
        ] {
            let (kind, unit) = (profile.text(kind), profile.text(unit));
            profile.message.nested(field, Message::default().number(1, kind).number(2, unit));
        }
        let since = started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        profile.message.signed(TIME, nanos(since));
        profile.message.signed(DURATION, nanos(duration));
        profile.message.signed(PERIOD, profile.period_ns);
        profile
    }

    fn text(&mut self, text: &str) -> u64 {
        if let Some(index) = self.strings.get(text) {
            return *index;
        }
        let index = self.strings.len() as u64;
        self.strings.insert(text.to_owned(), index);
        self.message.bytes(STRING, text.as_bytes());
        index
    }

    fn add(&mut self, frames: &Frames, count: i64) {
        let mut locations: Vec<u64> = Vec::with_capacity(frames.frames.len() + 1);
        for inlined in &frames.frames {
            let lines = inlined
                .iter()
                .map(|symbol| {
                    let file = symbol.filename.as_deref().unwrap_or_else(|| Path::new(""));
                    (
                        self.function(&symbol.name(), &symbol.sys_name(), &file.to_string_lossy()),
                        symbol.lineno(),
                    )
                })
                .collect();
            locations.push(self.location(lines));
        }
        // The thread stands at the root of what it did.
        let thread = self.function(&frames.thread_name_or_id(), "", "");
        locations.push(self.location(vec![(thread, 0)]));
        let nanos = count.saturating_mul(self.period_ns);
        let sample = Message::default().packed(1, locations).packed(2, [count as u64, nanos as u64]);
        self.message.nested(SAMPLE, sample);
    }

    fn function(&mut self, name: &str, system_name: &str, file: &str) -> u64 {
        let (name, file, system_name) = (self.text(name), self.text(file), self.text(system_name));
        if let Some(id) = self.functions.get(&(name, file)) {
            return *id;
        }
        let id = self.functions.len() as u64 + 1;
        self.functions.insert((name, file), id);
        let function =
            Message::default().number(1, id).number(2, name).number(3, system_name).number(4, file);
        self.message.nested(FUNCTION, function);
        id
    }

    fn location(&mut self, lines: Vec<(u64, u32)>) -> u64 {
        if let Some(id) = self.locations.get(&lines) {
            return *id;
        }
        let id = self.locations.len() as u64 + 1;
        let mut location = Message::default().number(1, id);
        for (function, line) in &lines {
            location.nested(4, Message::default().number(1, *function).number(2, u64::from(*line)));
        }
        self.locations.insert(lines, id);
        self.message.nested(LOCATION, location);
        id
    }

    fn finish(self) -> Vec<u8> {
        self.message.into_bytes()
    }
}

#[cfg(test)]
mod tests;
