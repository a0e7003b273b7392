//! A steady load of new connections, counted from inside the client.
//!
//! The schedule is fixed before it starts (an "open" load): a server that stalls gets the same number of
//! attempts, so that nothing hides in a client that politely waits.
#![expect(clippy::print_stdout, reason = "a program answers on standard output")]

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::binaries;
use crate::place::Place;
use crate::poll::{PATIENCE, eventually};
use crate::process::{Log, Process};

const WORKERS: usize = 64;
/// The program tells of every so many attempts.
const TOLD: u64 = 10;

/// What came of a load.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq)]
pub struct Outcome {
    /// Attempts made.
    pub attempts: u64,
    /// Attempts that were answered in full.
    pub ok: u64,
    /// The others, by what happened: `refused`, `reset`, `connect timed out`, …
    pub failed: BTreeMap<String, u64>,
    /// The second in which the first of them happened, from the start of the load.
    pub first_failure_s: Option<f64>,
    /// How long the load ran.
    pub seconds: f64,
    /// The longest time from connect to the end of the answer.
    pub slowest_ms: u64,
    /// The time that 99 of 100 attempts needed at most.
    pub p99_ms: u64,
}

impl Outcome {
    /// Attempts per second.
    pub fn rate(&self) -> f64 {
        self.attempts as f64 / self.seconds.max(0.001)
    }

    /// One line for a report.
    pub fn evidence(&self) -> String {
        let failed: u64 = self.failed.values().sum();
        let mut text = format!(
            "{} new connections ({:.0}/s), {failed} failed, p99 {} ms, slowest {} ms",
            self.attempts,
            self.rate(),
            self.p99_ms,
            self.slowest_ms
        );
        if failed > 0 {
            text += &format!(": {:?}, the first after {:?} s", self.failed, self.first_failure_s);
        }
        text
    }
}

#[derive(Default)]
struct Tally {
    made: u64,
    ok: u64,
    failed: BTreeMap<String, u64>,
    first_failure: Option<Duration>,
    // One bucket per millisecond; the last takes what is longer.
    times: Vec<u64>,
    slowest: u64,
}

/// What the program does: `rate` new connections per second to the targets in turn, each one HTTP request,
/// until standard input ends; then one line of JSON. Meanwhile it tells how many attempts were made.
pub fn load(rate: u64, targets: &[SocketAddr]) -> Result<()> {
    if targets.is_empty() || rate == 0 {
        bail!("give a rate and at least one address");
    }
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let tally = Mutex::new(Tally { times: vec![0; 10_001], ..Tally::default() });
    let start = Instant::now();
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| work(rate, targets, start, &next, &stop, &tally));
        }
        println!("started");
        let _closed = std::io::stdin().read_to_end(&mut Vec::new());
        stop.store(true, Ordering::Relaxed);
    });
    let tally = tally.into_inner();
    println!("{}", serde_json::to_string(&summary(tally, start.elapsed()))?);
    Ok(())
}

fn work(
    rate: u64,
    targets: &[SocketAddr],
    start: Instant,
    next: &AtomicU64,
    stop: &AtomicBool,
    tally: &Mutex<Tally>,
) {
    while !stop.load(Ordering::Relaxed) {
        let slot = next.fetch_add(1, Ordering::Relaxed);
        let due = Duration::from_nanos(slot.saturating_mul(1_000_000_000) / rate);
        thread::sleep(due.saturating_sub(start.elapsed()));
        let target = targets[slot as usize % targets.len()];
        let begun = start.elapsed();
        let result = attempt(target);
        let took = (start.elapsed() - begun).as_millis() as u64;
        let mut tally = tally.lock();
        tally.made += 1;
        if tally.made.is_multiple_of(TOLD) {
            println!("made {}", tally.made);
        }
        match result {
            Ok(()) => {
                tally.ok += 1;
                let last = tally.times.len() - 1;
                tally.times[(took as usize).min(last)] += 1;
                tally.slowest = tally.slowest.max(took);
            }
            Err(reason) => {
                *tally.failed.entry(reason).or_default() += 1;
                tally.first_failure.get_or_insert(begun);
            }
        }
    }
}

fn attempt(target: SocketAddr) -> Result<(), String> {
    let stream = TcpStream::connect_timeout(&target, PATIENCE).map_err(|error| match error.kind() {
        ErrorKind::ConnectionRefused => "refused".to_owned(),
        ErrorKind::TimedOut => "connect timed out".to_owned(),
        ErrorKind::ConnectionReset => "reset in connect".to_owned(),
        _ => format!("connect: {error}"),
    })?;
    let ended = |error: std::io::Error| match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "reset".to_owned(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "no answer in time".to_owned(),
        _ => error.to_string(),
    };
    stream.set_read_timeout(Some(PATIENCE)).map_err(ended)?;
    let mut writer = &stream;
    writer.write_all(b"GET /load HTTP/1.0\r\n\r\n").map_err(ended)?;
    let mut answer = Vec::new();
    (&stream).take(64 << 10).read_to_end(&mut answer).map_err(ended)?;
    // The whole answer or nothing: a connection that is cut in the middle is a failure.
    match answer.is_empty() {
        true => Err("closed without an answer".to_owned()),
        false if answer.starts_with(b"HTTP/1.1 200") && answer.ends_with(b"\n") => Ok(()),
        false => Err("cut in the middle of the answer".to_owned()),
    }
}

fn summary(tally: Tally, elapsed: Duration) -> Outcome {
    let failed: u64 = tally.failed.values().sum();
    let mut left = tally.ok.saturating_sub(tally.ok / 100);
    let p99 = tally.times.iter().position(|count| {
        left = left.saturating_sub(*count);
        left == 0
    });
    Outcome {
        attempts: tally.ok + failed,
        ok: tally.ok,
        failed: tally.failed,
        first_failure_s: tally.first_failure.map(|at| at.as_secs_f64()),
        seconds: elapsed.as_secs_f64(),
        slowest_ms: tally.slowest,
        p99_ms: p99.unwrap_or_default() as u64,
    }
}

/// A load that runs in a pod.
#[derive(Debug)]
pub struct Load {
    process: Process,
    mark: usize,
}

impl Load {
    /// Starts it; it is running when this returns.
    pub fn start(place: &Place, rate: u64, targets: &[SocketAddr]) -> Result<Self> {
        let mut command = place.command(binaries::peer()?)?;
        command.args(["load", &rate.to_string()]);
        command.args(targets.iter().map(ToString::to_string));
        let name = format!("load-{}", place.netns.name());
        let mark = Log::at(place.logs.join(format!("{name}.log"))).mark();
        let process = place.start_with(&name, command, Stdio::piped())?;
        process.log().wait_line(mark, PATIENCE, "the start", |line| line == "started")?;
        Ok(Self { process, mark })
    }

    /// Waits until so many more attempts were made, however long that takes on this machine: what happens between two
    /// such waits happens in the midst of a load. As many are open at once, so more were made after this was called.
    pub fn goes_on(&mut self, attempts: u64) -> Result<()> {
        let until = self.made() + WORKERS as u64 + attempts;
        eventually(4 * PATIENCE, || {
            let made = self.made();
            ensure!(made >= until, "{made} attempts were made, which were to be {until}");
            Ok(())
        })
        .with_context(|| format!("the load: {:?}", self.process.must_run().err()))
    }

    fn made(&self) -> u64 {
        let told = self.process.log().since(self.mark);
        let numbers = told.lines().filter_map(|line| line.strip_prefix("made ")?.parse().ok());
        numbers.max().unwrap_or_default()
    }

    /// Ends it, and returns what came of it.
    pub fn finish(mut self) -> Result<Outcome> {
        self.process.must_run()?;
        self.process.close_stdin();
        let limit = 3 * PATIENCE;
        let line =
            self.process.log().wait_line(self.mark, limit, "the counts", |line| line.starts_with('{'))?;
        self.process.wait(limit)?;
        serde_json::from_str(&line).context("the load's counts are not JSON")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_counts_and_finds_the_percentile() {
        let mut times = vec![0; 10_001];
        times[2] = 98;
        times[7] = 2;
        let failed = BTreeMap::from([("refused".to_owned(), 3)]);
        let tally = Tally { ok: 100, failed, times, slowest: 7, ..Tally::default() };
        let outcome = summary(tally, Duration::from_secs(1));
        assert_eq!((outcome.attempts, outcome.ok, outcome.p99_ms, outcome.slowest_ms), (103, 100, 7, 7));
        assert!(outcome.evidence().contains("3 failed"), "{}", outcome.evidence());
    }

    #[test]
    fn a_port_without_a_listener_is_counted_as_refused() {
        // Bound, so that nobody else gets it.
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a free port");
        let address = socket.local_addr().expect("it is bound").as_socket().expect("of IPv4");
        assert_eq!(attempt(address), Err("refused".to_owned()));
    }
}
