//! The loads: wrk for closed loops of HTTP, iperf3 for streams, our own peer program for fixed rates.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use ztunnel_tests::binaries;
use ztunnel_tests::peer::open::Outcome;
use ztunnel_tests::place::Place;
use ztunnel_tests::process::{self, Process};

use super::site::PAGE;

/// How many connections share a fixed rate.
const OPEN_CONNECTIONS: u32 = 32;
/// What a load may take beyond its own time.
const GRACE: Duration = Duration::from_secs(15);

/// What wrk counted.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Requests {
    /// All of them.
    pub(crate) total: f64,
    /// Per second.
    pub(crate) rate: f64,
}

/// What iperf3's receiver counted.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Bytes {
    /// In units of 10⁹.
    pub(crate) gigabytes: f64,
    /// In units of 10⁹ bits per second.
    pub(crate) gigabits_per_second: f64,
}

/// Requests as fast as they are answered, over `connections` at a time; with `close` each on a connection of its own.
pub(crate) fn http(
    place: &Place,
    to: SocketAddr,
    connections: u32,
    close: bool,
    seconds: u64,
) -> Result<Requests> {
    let threads = connections.min(2);
    let url = format!("http://{to}{PAGE}");
    let mut arguments = vec![format!("-t{threads}"), format!("-c{connections}"), format!("-d{seconds}s")];
    if close {
        arguments.extend(["-H".to_owned(), "Connection: close".to_owned()]);
    }
    arguments.push(url);
    wrk_counts(&run(place, "wrk".into(), &arguments, seconds)?)
}

/// `streams` as fast as they go, towards the server, or from it when `reverse`.
pub(crate) fn stream(
    place: &Place,
    to: SocketAddr,
    streams: u32,
    reverse: bool,
    seconds: u64,
) -> Result<Bytes> {
    let mut arguments = vec!["--json".to_owned()];
    for (flag, value) in [
        ("--client", to.ip().to_string()),
        ("--port", to.port().to_string()),
        ("--parallel", streams.to_string()),
        ("--time", seconds.to_string()),
    ] {
        arguments.extend([flag.to_owned(), value]);
    }
    if reverse {
        arguments.push("--reverse".to_owned());
    }
    iperf_counts(&run(place, "iperf3".into(), &arguments, seconds)?)
}

/// Requests at a fixed rate; their times count from when they were due.
pub(crate) fn open(place: &Place, to: SocketAddr, rate: u32, seconds: u64) -> Result<Outcome> {
    let arguments = [
        "open".to_owned(),
        to.to_string(),
        PAGE.to_owned(),
        rate.to_string(),
        OPEN_CONNECTIONS.to_string(),
        seconds.to_string(),
    ];
    let text = run(place, peer_program(), &arguments, seconds)?;
    let outcome: Outcome = serde_json::from_str(&text).context("the load's counts are not JSON")?;
    ensure!(
        outcome.answered == outcome.due,
        "{} of {} requests at {rate}/s were not answered in time",
        outcome.due - outcome.answered,
        outcome.due
    );
    Ok(outcome)
}

/// Starts the peer program's `mode` and waits until it says `word`.
pub(crate) fn start_peer(
    place: &Place,
    mode: &str,
    to: SocketAddr,
    amount: u32,
    word: &str,
) -> Result<Process> {
    let mut command = place.command(peer_program())?;
    // Its last words are shown: one line of them.
    command.args([mode, &to.to_string(), PAGE, &amount.to_string()]).env("RUST_BACKTRACE", "0");
    let mut process = place.start_with(&format!("{mode}-{}", place.netns.name()), command, Stdio::piped())?;
    let log = process.log().clone();
    let said = log.wait_line(0, Duration::from_secs(60), word, |line| line == word);
    match (said, process.must_run()) {
        (Ok(_), _) => Ok(process),
        (Err(_), Err(ended)) | (Err(ended), Ok(())) => Err(ended),
    }
}

/// The load must not be what limits: always the optimised one.
fn peer_program() -> PathBuf {
    binaries::target().join("release/ztunnel-peer")
}

fn run(place: &Place, program: PathBuf, arguments: &[String], seconds: u64) -> Result<String> {
    let name = program.display().to_string();
    let mut command = place.command(program)?;
    command.args(arguments).env("RUST_BACKTRACE", "0").stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = process::spawn(command).with_context(|| format!("cannot start {name}"))?;
    let output = process::finish(child, Duration::from_secs(seconds) + GRACE)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let said = if words.trim().is_empty() { &text } else { &*words };
        bail!("{name}: {}: {}", output.status, said.trim());
    }
    Ok(text)
}

fn wrk_counts(text: &str) -> Result<Requests> {
    for trouble in ["Socket errors", "Non-2xx"] {
        if let Some(line) = text.lines().find(|line| line.trim_start().starts_with(trouble)) {
            bail!("wrk: {}", line.trim());
        }
    }
    let counts = || {
        let line = text.lines().find(|line| line.contains(" requests in "))?;
        let total: f64 = line.split_whitespace().next()?.parse().ok()?;
        let rate = text.lines().find_map(|line| line.strip_prefix("Requests/sec:"))?;
        Some(Requests { total, rate: rate.trim().parse().ok()? })
    };
    match counts() {
        Some(counts) if counts.total > 0.0 => Ok(counts),
        _ => bail!("wrk counted nothing: {}", text.trim()),
    }
}

fn iperf_counts(text: &str) -> Result<Bytes> {
    #[derive(Deserialize)]
    struct Answer {
        end: End,
        error: Option<String>,
    }
    #[derive(Deserialize)]
    struct End {
        sum_received: Option<Sum>,
    }
    #[derive(Deserialize)]
    struct Sum {
        bytes: f64,
        bits_per_second: f64,
    }
    let answer: Answer = serde_json::from_str(text).context("iperf3 has printed something else")?;
    let Some(Sum { bytes, bits_per_second }) = answer.end.sum_received else {
        bail!("iperf3: {}", answer.error.as_deref().unwrap_or("no sum_received in its answer"));
    };
    ensure!(bytes > 1e6, "iperf3 carried {bytes} bytes");
    Ok(Bytes { gigabytes: bytes / 1e9, gigabits_per_second: bits_per_second / 1e9 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRK: &str = "Running 2s test @ http://10.80.2.10:8080/1k
  2 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     0.88ms    1.02ms  17.66ms   89.28%
  76254 requests in 2.10s, 92.35MB read
Requests/sec:  36312.17
Transfer/sec:     43.98MB
";

    #[test]
    fn wrk_is_read_and_its_errors_are_errors() {
        assert_eq!(wrk_counts(WRK).expect("counts"), Requests { total: 76254.0, rate: 36312.17 });
        let trouble = format!("{WRK}  Socket errors: connect 0, read 3, write 0, timeout 0\n");
        assert!(wrk_counts(&trouble).expect_err("errors").to_string().contains("read 3"));
        assert!(wrk_counts("unable to connect\n").is_err());
    }

    #[test]
    fn iperf_is_read_at_the_receiver() {
        let text = r#"{"end":{"sum_sent":{"bytes":9e9,"bits_per_second":9e9},
            "sum_received":{"bytes":2e9,"bits_per_second":8e9}}}"#;
        let bytes = Bytes { gigabytes: 2.0, gigabits_per_second: 8.0 };
        assert_eq!(iperf_counts(text).expect("counts"), bytes);
        let refused = iperf_counts(r#"{"end":{},"error":"refused"}"#).expect_err("an error");
        assert_eq!(refused.to_string(), "iperf3: refused");
    }
}
