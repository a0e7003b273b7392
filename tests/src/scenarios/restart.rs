//! A restart that nobody notices.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::Scenario;
use super::enrolment::wait_for_port;
use super::outage::nothing_in_clear;
use crate::mesh::{Enrolment, MESHED};
use crate::peer::hold::Held;
use crate::peer::load::Load;
use crate::poll::throughout;
use crate::testbed::{BOTH, HTTP, LINES, On, Testbed, lines_at};

/// New connections per second, as far as the machine can.
const RATE: u64 = 600;
/// How many connections must be made before, between and after two restarts. As many as the rate has in a moment, and
/// a slow machine has in longer.
const BETWEEN: u64 = 100;

/// For the demo.
pub const THREE_RESTARTS: Scenario = Scenario {
    name: "restarts under a steady load of new connections: not one attempt fails",
    run: |testbed| restarts(testbed, 3),
};

/// For the tests.
pub const TWENTY_RESTARTS: Scenario = Scenario {
    name: "twenty restarts under a steady load of new connections: not one attempt fails",
    run: |testbed| restarts(testbed, 20),
};

fn restarts(testbed: &mut Testbed, count: u32) -> Result<String> {
    let (client, server) = (testbed.client.clone(), testbed.server.clone());
    let targets: Vec<SocketAddr> = server.addresses().map(|address| SocketAddr::new(address, HTTP)).to_vec();
    let watch = testbed.watch_link_for_clear("restarts")?;
    let mut load = Load::start(&client.place, RATE, &targets)?;
    load.goes_on(BETWEEN)?;
    let mut slowest = Duration::ZERO;
    for round in 0..count {
        let on = BOTH[round as usize % 2];
        // Both ways a first daemon may go: told by the second alone, and by a service manager too.
        let ask = round / 2 % 2 == 1;
        testbed.say(&format!("restart {} of {count}, {on:?}", round + 1));
        let ready =
            testbed.restart_daemon(on, ask).with_context(|| format!("restart {} on {on:?}", round + 1))?;
        slowest = slowest.max(ready);
        load.goes_on(BETWEEN)?;
    }
    let outcome = load.finish()?;
    ensure!(outcome.failed.is_empty(), "{}", outcome.evidence());
    nothing_in_clear(&watch.finish()?, &client, "GET /load")?;
    Ok(format!(
        "{count} restarts: {}; the slowest daemon was ready after {} ms; nothing in clear on the link",
        outcome.evidence(),
        slowest.as_millis()
    ))
}

/// What is open when the restart begins.
pub const OPEN_CONNECTIONS_DRAIN: Scenario = Scenario {
    name: "a connection that is open during a restart goes on until the drain's deadline",
    run: |testbed| {
        let mut held = Held::open(&testbed.client.place, lines_at(testbed.server.v4))?;
        let mut next = testbed.setting(On::A).start()?;
        next.wait_ready()?;
        let first = testbed.replace_daemon(On::A, next).context("no first daemon")?;
        held.say().context("after the second daemon took over")?;
        let mut first = first;
        // As a service manager would that replaces one daemon by another. In a second it must not have acted on it.
        first.process().signal(Signal::SIGTERM);
        let mut seen = None;
        throughout(Duration::from_secs(1), || {
            seen = Some(held.say().context("after the first daemon was also told to stop")?);
            Ok(())
        })?;
        let seen = seen.context("nothing was said")?;
        drop(held);
        first.ended().context("the first daemon was to end with its last connection")?;
        Ok(format!(
            "the server still saw {seen} after the take-over; the first daemon ended with the connection"
        ))
    },
};

/// What a withdrawn pod's open connection needs in the kernel outlives the daemon that withdrew it.
pub const WITHDRAWN_THEN_RESTARTED: Scenario = Scenario {
    name: "a pod is withdrawn and the daemon restarted: what was open stays in its tunnel to the end, never in clear",
    run: |testbed| {
        let client = testbed.client.clone();
        let mut held = Held::open(&client.place, lines_at(testbed.server.v4))?;
        testbed.mesh.pod(MESHED, &client, Enrolment::None)?;
        wait_for_port(testbed, &client, HTTP).context("after the client was withdrawn")?;
        let watch = testbed.watch_link("withdrawn-restarted")?;
        let mut next = testbed.setting(On::A).start()?;
        next.wait_ready()?;
        let mut first = testbed.replace_daemon(On::A, next).context("no first daemon")?;
        let began = Instant::now();
        let mut said = 0;
        // Longer than the second daemon takes to look at the kernel, twice.
        while began.elapsed() < Duration::from_secs(5) {
            held.say().context("while the first daemon still has the connection")?;
            said += 1;
            std::thread::sleep(Duration::from_millis(200));
        }
        first.ended().context("the first daemon was to end at its deadline")?;
        ensure!(held.say().is_err(), "the connection was to end with its daemon");
        let packets = watch.finish()?;
        let clear = packets.segments_by_port().get(&LINES).copied().unwrap_or_default();
        ensure!(clear == 0, "{clear} packets of the connection were on the link in clear");
        testbed.traces_before(&client)?.same_again(&client.place.netns)?;
        Ok(format!(
            "{said} lines answered after the take-over, 0 packets to port {LINES} on the link; when the first daemon \
             had gone nothing was left in the pod"
        ))
    },
};
