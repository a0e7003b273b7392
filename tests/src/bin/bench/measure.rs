//! Runs one load over one column and says what each of its rows came to.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use xtask::rows::Work;
use ztunnel_tests::peer::open::Outcome;

use super::column::{Running, Way};
use super::load;
use super::usage::{cpu_seconds, memory_mib};

/// How long memory may settle before it is read.
const SETTLE: Duration = Duration::from_secs(2);
/// The same after the start, until what only that needed is given back.
const AFTER_START: Duration = Duration::from_secs(6);
/// How long after the end of idle connections their memory is looked at.
const AFTER_CLOSE: Duration = Duration::from_secs(10);

/// So many requests do not go through a proxy unnoticed.
const MANY: u64 = 1000;

/// A row's name and its value.
pub(crate) type Value = (String, f64);

/// Runs it. A column that has no proxies has no values for rows about proxies; a value that is not in the table of
/// rows is of no harm.
pub(crate) fn measure(running: &Running, work: Work, seconds: u64) -> Result<Vec<Value>> {
    let way = |near| -> Way { if near { running.near } else { running.far } };
    let place = &running.site.client.place;
    let many = |requests: &load::Requests| requests.total > MANY as f64;
    match work {
        Work::FirstByte => {
            let value = |time: Duration| ("first_byte_ms".to_owned(), time.as_secs_f64() * 1e3);
            Ok(running.first_byte.map(value).into_iter().collect())
        }
        Work::Idle => idle(running),
        Work::Crowd { connections } => crowd(running, connections),
        Work::Http { connections, near } => {
            let (requests, cpu) =
                accounted(running, many, || load::http(place, way(near).http, connections, false, seconds))?;
            if near {
                return Ok(vec![(format!("same_node_http_{connections}"), requests.rate)]);
            }
            let suffix = if connections == 64 { String::new() } else { format!("_{connections}") };
            let mut values = vec![(format!("http_{connections}"), requests.rate)];
            values
                .extend(cpu.map(|cpu| (format!("cpu_per_1k_requests{suffix}"), cpu / requests.total * 1e6)));
            Ok(values)
        }
        Work::Connect { clients } => {
            let (requests, cpu) =
                accounted(running, many, || load::http(place, running.far.http, clients, true, seconds))?;
            let mut values = vec![(format!("connect_{clients}"), requests.rate)];
            values.extend(cpu.map(|cpu| ("cpu_per_connection".to_owned(), cpu / requests.total * 1e6)));
            Ok(values)
        }
        Work::Stream { streams, reverse, near } => {
            let (bytes, cpu) = accounted(
                running,
                |bytes: &load::Bytes| bytes.gigabytes > 0.1,
                || load::stream(place, way(near).stream, streams, reverse, seconds),
            )?;
            if near {
                return Ok(vec![(format!("same_node_stream_{streams}"), bytes.gigabits_per_second)]);
            }
            let direction = if reverse { "_r" } else { "" };
            let count = if streams == 1 { String::new() } else { format!("_{streams}") };
            let mut values = vec![(format!("stream_{streams}{direction}"), bytes.gigabits_per_second)];
            values.extend(cpu.map(|cpu| (format!("cpu_per_gb{count}{direction}"), cpu / bytes.gigabytes)));
            Ok(values)
        }
        Work::Open { rate } => {
            let (outcome, cpu) = accounted(
                running,
                |outcome: &Outcome| outcome.answered > MANY,
                || load::open(place, running.far.http, rate, seconds),
            )?;
            let mut values: Vec<Value> = [("p50", outcome.p50), ("p99", outcome.p99), ("p999", outcome.p999)]
                .into_iter()
                .map(|(name, value)| (format!("open_{rate}_{name}"), value))
                .collect();
            values.extend(
                cpu.map(|cpu| (format!("cpu_per_1k_open_{rate}"), cpu / outcome.answered as f64 * 1e6)),
            );
            Ok(values)
        }
    }
}

/// Runs a load; the second value is the CPU time of the proxies meanwhile, in seconds, where there are proxies.
/// `much` says whether it was so much that they must have used some.
fn accounted<T>(
    running: &Running,
    much: impl FnOnce(&T) -> bool,
    load: impl FnOnce() -> Result<T>,
) -> Result<(T, Option<f64>)> {
    let before = cpu_seconds(&running.pids)?;
    let result = load()?;
    let used = cpu_seconds(&running.pids)? - before;
    if running.pids.is_empty() {
        return Ok((result, None));
    }
    // The kernel samples CPU time: of a small load it may see nothing.
    ensure!(used > 0.0 || !much(&result), "the load went around the proxies: they have used no CPU time");
    Ok((result, Some(used)))
}

fn idle(running: &Running) -> Result<Vec<Value>> {
    if running.pids.is_empty() {
        return Ok(Vec::new());
    }
    thread::sleep(AFTER_START);
    Ok(vec![("rss_idle".to_owned(), memory_mib(&running.pids)?)])
}

fn crowd(running: &Running, connections: u32) -> Result<Vec<Value>> {
    if running.pids.is_empty() {
        return Ok(Vec::new());
    }
    let before = memory_mib(&running.pids)?;
    let place = &running.site.client.place;
    let mut crowd = load::start_peer(place, "crowd", running.far.http, connections, "open")?;
    thread::sleep(SETTLE);
    let held = memory_mib(&running.pids)?;
    crowd.must_run()?;
    crowd.close_stdin();
    let ended = crowd.wait(Duration::from_secs(10))?;
    ensure!(ended.success(), "the idle connections: {ended}");
    thread::sleep(AFTER_CLOSE);
    let after = memory_mib(&running.pids)?;
    Ok(vec![
        (format!("rss_{connections}_idle"), held),
        ("rss_after_close".to_owned(), after),
        ("rss_per_connection".to_owned(), (held - before) * 1024.0 / f64::from(connections)),
    ])
}
