//! The one thread that writes log lines, and the bounded queue in front of it.
//!
//! Nobody who logs ever waits: a line that does not fit is dropped and counted, and the log says so as soon as it
//! is read again. The writer formats what it finds in the queue, up to a batch, and writes it at once. A line that
//! comes alone is written when it comes; after one the writer rests, so that it is not woken, nor the output written
//! to, for each line of many.

use std::io;
use std::io::Write;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use std::time::SystemTime;

use parking_lot::Condvar;
use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::Level;

use crate::telemetry::access_log;
use crate::telemetry::events::AccessRecord;
use crate::telemetry::limit::Limiter;
use crate::telemetry::limit::SAY_EVERY;
use crate::telemetry::line::Format;
use crate::telemetry::line::Head;
use crate::telemetry::line::Line;

/// How many lines may wait. Beyond it, lines are dropped and counted.
const QUEUE_MAX: usize = 10_000;

/// How much is written at once, about.
const BATCH_BYTES: usize = 64 * 1024;

/// How many lines are looked at for it: most of them may be left out.
const BATCH_LINES: u64 = 10_000;

/// How long the writer rests after a write. Waking it costs whoever logs more than all else there is to a line.
/// The queue takes in the meantime a million lines a second.
const REST: Duration = Duration::from_millis(10);

/// A line on its way to the writer.
#[derive(Debug)]
pub enum Entry {
    /// A line of the access log, formatted by the writer.
    Access(Box<AccessRecord>),
    /// Any other line, formatted, with its line feed.
    Text(String),
}

/// Where lines are handed in. Cheap to clone; the writer's thread ends when the last clone is gone.
#[derive(Debug, Clone)]
pub struct LogQueue {
    entries: mpsc::SyncSender<Entry>,
    tally: Arc<Tally>,
}

/// What became of the lines, and how far the writer is.
#[derive(Debug, Default)]
struct Tally {
    /// Lines that were taken into the queue.
    queued: AtomicU64,
    access_dropped: AtomicU64,
    text_dropped: AtomicU64,
    limited: AtomicU64,
    write_errors: AtomicU64,
    /// Lines the writer is done with: written, or lost to a write error.
    done: Mutex<u64>,
    progress: Condvar,
}

impl Tally {
    fn advance(&self, lines: u64) {
        *self.done.lock() += lines;
        self.progress.notify_all();
    }
}

/// Starts the writer's thread, which writes to `out` in `format`.
pub fn start(out: Box<dyn Write + Send>, format: Format) -> io::Result<LogQueue> {
    start_bounded(out, format, QUEUE_MAX, 0)
}

/// Likewise, with at most `rate` lines of the access log a second about what one source does; 0: all.
pub fn start_limited(out: Box<dyn Write + Send>, format: Format, rate: u32) -> io::Result<LogQueue> {
    start_bounded(out, format, QUEUE_MAX, rate)
}

fn start_bounded(
    out: Box<dyn Write + Send>,
    format: Format,
    queue_max: usize,
    rate: u32,
) -> io::Result<LogQueue> {
    let (entries, waiting) = mpsc::sync_channel(queue_max);
    let tally = Arc::new(Tally::default());
    let writers = Arc::clone(&tally);
    thread::Builder::new()
        .name("log-writer".to_owned())
        .spawn(move || run(out, format, &waiting, &writers, Limiter::new(rate)))?;
    Ok(LogQueue { entries, tally })
}

impl LogQueue {
    /// Hands a line in. Never blocks: when the queue is full (the reader of our output is too slow), or the writer
    /// is gone, the line is dropped and counted.
    pub fn push(&self, entry: Entry) {
        match self.entries.try_send(entry) {
            Ok(()) => self.tally.queued.fetch_add(1, Ordering::Relaxed),
            Err(mpsc::TrySendError::Full(lost) | mpsc::TrySendError::Disconnected(lost)) => match lost {
                Entry::Access(_) => self.tally.access_dropped.fetch_add(1, Ordering::Relaxed),
                Entry::Text(_) => self.tally.text_dropped.fetch_add(1, Ordering::Relaxed),
            },
        };
    }

    /// Waits until what this thread handed in so far is written out. False if that took longer than `patience`.
    /// Blocks: for the end of the process, and not for async code.
    pub fn flush(&self, patience: Duration) -> bool {
        let target = self.tally.queued.load(Ordering::Relaxed);
        let mut done = self.tally.done.lock();
        self.tally.progress.wait_while_for(&mut done, |done| *done < target, patience);
        *done >= target
    }

    /// How many lines of the access log were dropped because the queue was full.
    pub fn access_dropped(&self) -> u64 {
        self.tally.access_dropped.load(Ordering::Relaxed)
    }

    /// How many other lines were dropped because the queue was full.
    pub fn text_dropped(&self) -> u64 {
        self.tally.text_dropped.load(Ordering::Relaxed)
    }

    /// How many lines of the access log were left out because their source filled it.
    pub fn limited(&self) -> u64 {
        self.tally.limited.load(Ordering::Relaxed)
    }

    /// How many batches could not be written.
    pub fn write_errors(&self) -> u64 {
        self.tally.write_errors.load(Ordering::Relaxed)
    }
}

fn run(
    mut out: Box<dyn Write + Send>,
    format: Format,
    waiting: &mpsc::Receiver<Entry>,
    tally: &Tally,
    mut limiter: Limiter,
) {
    let mut batch = String::with_capacity(BATCH_BYTES);
    let mut said = [0, 0];
    loop {
        let mut next = match limiter.is_pending() {
            false => match waiting.recv() {
                Ok(first) => Some(first),
                Err(_over) => return,
            },
            true => match waiting.recv_timeout(SAY_EVERY) {
                Ok(first) => Some(first),
                Err(mpsc::RecvTimeoutError::Timeout) => None,
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            },
        };
        let lost = [&tally.access_dropped, &tally.text_dropped].map(|count| count.load(Ordering::Relaxed));
        if lost != said {
            say_lost(&mut batch, format, [lost[0] - said[0], lost[1] - said[1]]);
            said = lost;
        }
        let now = Instant::now();
        let mut lines = 0;
        let mut full = false;
        while let Some(entry) = next {
            match entry {
                Entry::Access(record) if !limiter.admits(record.source().ip(), now) => {
                    tally.limited.fetch_add(1, Ordering::Relaxed);
                }
                Entry::Access(record) => access_log::write(&mut batch, format, &record),
                Entry::Text(text) => batch.push_str(&text),
            }
            lines += 1;
            full = batch.len() >= BATCH_BYTES || lines >= BATCH_LINES;
            next = if full { None } else { waiting.try_recv().ok() };
        }
        for (source, lines) in limiter.left_out(now) {
            say_left_out(&mut batch, format, source, lines);
        }
        // There is nowhere to report that the log cannot be written but a counter.
        if !batch.is_empty() && out.write_all(batch.as_bytes()).and_then(|()| out.flush()).is_err() {
            tally.write_errors.fetch_add(1, Ordering::Relaxed);
        }
        batch.clear();
        tally.advance(lines);
        if !full {
            thread::sleep(REST);
        }
    }
}

/// Nor must it take one source for all.
fn say_left_out(out: &mut String, format: Format, source: Option<IpAddr>, lines: u64) {
    let message = "access log lines were left out: too many of one source";
    let head =
        Head { at: SystemTime::now(), level: Level::WARN, target: "ztunnel::telemetry::writer", message };
    let mut line = Line::begin(out, format, head, &[]);
    match source {
        Some(source) => line.shown("source", source),
        None => line.text("source", "others"),
    }
    line.number("lines", lines);
    line.end(&[]);
}

/// A reader of the log must not take a gap for silence.
fn say_lost(out: &mut String, format: Format, [access, other]: [u64; 2]) {
    let message = "log lines were dropped: the reader of the log is too slow";
    let head =
        Head { at: SystemTime::now(), level: Level::WARN, target: "ztunnel::telemetry::writer", message };
    let mut line = Line::begin(out, format, head, &[]);
    line.number("access", access);
    line.number("other", other);
    line.end(&[]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::events::RefusedEarly;
    use crate::telemetry::events::Reporter;
    use crate::telemetry::testing::Written;
    use crate::telemetry::testing::addresses;

    const LONG: Duration = Duration::from_secs(60);

    /// Output that a test lets through one write at a time.
    struct Gated {
        gate: mpsc::Receiver<()>,
        out: Written,
    }

    impl Write for Gated {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.gate.recv().map_err(io::Error::other)?;
            self.out.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn text(line: &str) -> Entry {
        Entry::Text(format!("{line}\n"))
    }

    fn access() -> Entry {
        let (at, error) = (SystemTime::UNIX_EPOCH, "no".to_owned());
        let refused = RefusedEarly { at, reporter: Reporter::Source, addresses: addresses(), error };
        Entry::Access(Box::new(AccessRecord::RefusedEarly(refused)))
    }

    #[test]
    fn lines_are_written_in_order() {
        let out = Written::default();
        let log = start(Box::new(out.clone()), Format::Plain).unwrap();
        log.push(text("one"));
        log.push(access());
        log.push(text("three"));
        assert!(log.flush(LONG));
        let lines = out.text();
        let lines: Vec<_> = lines.lines().collect();
        assert_eq!((lines[0], lines[2], lines.len()), ("one", "three", 3));
        assert!(lines[1].contains("\taccess\t"), "{}", lines[1]);
    }

    #[test]
    fn a_full_queue_drops_and_counts_and_never_blocks() {
        let (open, gate) = mpsc::channel();
        let out = Written::default();
        let log = start_bounded(Box::new(Gated { gate, out: out.clone() }), Format::Plain, 2, 0).unwrap();
        // However many the writer has taken out, it is stuck at its first write, and the queue holds two more.
        for _ in 0..5_000 {
            log.push(access());
            log.push(text("x"));
        }
        assert!(log.access_dropped() > 0 && log.text_dropped() > 0);
        assert!(!log.flush(Duration::ZERO), "nothing can have been written");

        for _ in 0..10_000 {
            open.send(()).unwrap();
        }
        assert!(log.flush(LONG));
        // The writer may have taken the last line out before the last ones were dropped, and says so with the next.
        log.push(text("last"));
        assert!(log.flush(LONG));
        let text = out.text();
        let (said, written): (Vec<_>, Vec<_>) =
            text.lines().partition(|line| line.contains("log lines were dropped"));
        assert_eq!(written.len() as u64 + log.access_dropped() + log.text_dropped(), 10_001);
        let told = |key: &str| -> u64 {
            let values = said.iter().filter_map(|line| line.split(key).nth(1)?.split(' ').next());
            values.map(|value| value.parse::<u64>().unwrap()).sum()
        };
        assert_eq!((told("access="), told("other=")), (log.access_dropped(), log.text_dropped()), "{said:?}");
    }

    #[test]
    fn a_source_that_fills_the_log_is_cut_short_and_others_are_not() {
        let out = Written::default();
        let log = start_limited(Box::new(out.clone()), Format::Plain, 1).unwrap();
        for _ in 0..500 {
            log.push(access());
        }
        log.push(text("another line"));
        assert!(log.flush(LONG));
        let written = out.text();
        let lines = written.lines().filter(|line| line.contains("\taccess\t")).count() as u64;
        assert!(lines >= 5 && lines + log.limited() == 500, "{lines} and {}", log.limited());
        assert!(written.contains("another line"));
        assert!(written.contains("left out: too many of one source"), "{written}");
    }

    #[test]
    fn a_failing_output_is_counted_and_logging_goes_on() {
        let (open, gate) = mpsc::channel::<()>();
        drop(open);
        let log = start(Box::new(Gated { gate, out: Written::default() }), Format::Plain).unwrap();
        for _ in 0..3 {
            log.push(text("x"));
            assert!(log.flush(LONG));
        }
        assert_eq!(log.write_errors(), 3);
    }
}
