//! What traffic costs the daemons, in system calls: a count is the same on every machine, busy or not.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::Scenario;
use crate::binaries;
use crate::peer::open::Outcome;
use crate::syscalls::{Calls, Counting};
use crate::testbed::{BOTH, HTTP, LARGE_MIB, Testbed};

/// What one unit may cost a daemon: the calls that do something, and the waits.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// Seen everywhere, with a little room.
    done: f64,
    /// Twice what was seen, as a slow machine makes two turns of one, and strace makes each of them slower still.
    waits: f64,
}

/// For one request with its answer a daemon waits, reads and writes once in each direction.
const PER_REQUEST: Cost = Cost { done: 4.3, waits: 4.0 };
/// In bulk one call moves far more than a TLS record (16 KiB), of which a mebibyte has 64, each to be read and written.
/// The kernel hands on a stream in pieces as it comes, so there is room above what was seen.
const PER_MIB: Cost = Cost { done: 45.0, waits: 45.0 };

/// For one connection after the other, each with a request and its answer: the client's daemon, whose part is to accept
/// and watch, to move request, answer and both ends between application and tunnel, and to close; and the server's,
/// which has no accept but a socket to make (eight calls) and to connect. Some of these sockets, which are made ahead,
/// are closed before somebody needs them.
const PER_CONNECTION: [Cost; 2] = [Cost { done: 20.0, waits: 12.0 }, Cost { done: 30.0, waits: 12.0 }];
const CONNECTIONS: u32 = 300;

/// New connections, one after the other.
pub const NEW_CONNECTIONS: Scenario = Scenario {
    name: "a new connection with a request costs the daemons a bounded number of system calls",
    run: |testbed| {
        let urls = format!("http://{}:{HTTP}/?[1-{CONNECTIONS}]", testbed.server.v4);
        let place = testbed.client.place.clone();
        let (counted, ()) = counting(testbed, "connections", || {
            let arguments = ["-q", "-sS", "-m", "100", "-o", "/dev/null", "-w", "%{num_connects}\n"];
            let output =
                place.run("curl", &[&arguments[..], &["-H", "Connection: close", &urls]].concat())?;
            let made = String::from_utf8_lossy(&output.stdout).lines().filter(|line| *line == "1").count();
            let words = String::from_utf8_lossy(&output.stderr);
            ensure!(made == CONNECTIONS as usize, "{made} of {CONNECTIONS} connections were made: {words}");
            Ok(())
        })?;
        hold_to(&counted, f64::from(CONNECTIONS), PER_CONNECTION, "connection")
    },
};

/// Requests over one connection, one after the other.
pub const REQUESTS: Scenario = Scenario {
    name: "a request costs each daemon six system calls: wait, read and write, in each direction",
    run: |testbed| {
        let target = format!("{}:{HTTP}", testbed.server.v4);
        let place = testbed.client.place.clone();
        let (counted, outcome) = counting(testbed, "requests", || {
            let program = binaries::peer()?.display().to_string();
            let output = place.run(&program, &["open", &target, "/", "400", "1", "2"])?;
            let text = String::from_utf8_lossy(&output.stdout);
            let outcome: Outcome = serde_json::from_str(&text)
                .with_context(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))?;
            ensure!(outcome.answered == outcome.due, "{} of {} answered", outcome.answered, outcome.due);
            Ok(outcome)
        })?;
        hold_to(&counted, outcome.answered as f64, [PER_REQUEST; 2], "request")
    },
};

/// One large answer.
pub const BULK: Scenario = Scenario {
    name: "a megabyte costs each daemon far fewer system calls than it has TLS records",
    run: |testbed| {
        let url = format!("http://{}:{HTTP}/large", testbed.server.v4);
        let place = testbed.client.place.clone();
        let (counted, ()) = counting(testbed, "bulk", || {
            let arguments = ["-q", "-sS", "-m", "100", "-o", "/dev/null", "-w", "%{size_download}", &url];
            let output = place.run("curl", &arguments)?;
            let got = String::from_utf8_lossy(&output.stdout);
            let all = (LARGE_MIB << 20).to_string();
            ensure!(got == all, "got {got} of {all}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        })?;
        hold_to(&counted, LARGE_MIB as f64, [PER_MIB; 2], "MiB")
    },
};

/// What the data plane of both daemons does meanwhile.
fn counting<T>(
    testbed: &mut Testbed,
    name: &str,
    load: impl FnOnce() -> Result<T>,
) -> Result<([Calls; 2], T)> {
    let logs: PathBuf = testbed.run.path("logs");
    let mut start = |on| {
        let pid = testbed.daemon(on)?.process().pid();
        Counting::start(pid, "data-", &logs.join(format!("strace-{name}-{on:?}")))
    };
    let [a, b] = BOTH.map(&mut start);
    let (a, b) = (a?, b?);
    let result = load()?;
    Ok(([a.finish()?, b.finish()?], result))
}

/// `limits`: the client's daemon, the server's.
fn hold_to(counted: &[Calls; 2], units: f64, limits: [Cost; 2], unit: &str) -> Result<String> {
    let each = |count: u64| count as f64 / units;
    let described = |calls: &Calls| {
        let (all, done) = (each(calls.total()), each(calls.done()));
        format!("{all:.2}, of which {done:.2} do something ({})", calls.per(units))
    };
    let [a, b] = counted;
    let said = format!("per {unit}, the client's daemon: {}; the server's: {}", described(a), described(b));
    for (calls, limit) in counted.iter().zip(limits) {
        ensure!(each(calls.done()) <= limit.done, "more than {limit:?}: {said}");
        ensure!(each(calls.waits()) <= limit.waits, "more than {limit:?}: {said}");
    }
    Ok(said)
}
