//! A daemon that is killed: closed while it is away, back in under a second.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::RngExt;

use super::Scenario;
use super::tunnel::marker;
use crate::pcap::Packets;
use crate::peer::hold::Held;
use crate::poll::{PATIENCE, eventually, throughout};
use crate::testbed::{BOTH, On, Testbed, http, http_refused, lines_at, refused};
use crate::topology::Pod;
use crate::wire::HBONE_PORT;

/// On a machine on which [`pace`] takes no longer than a fifth of that; on a slower one so much more.
const BACK_WITHIN: Duration = Duration::from_secs(1);
/// How often it is tried: what else the machine does may take the time of a start, but not each time.
const STARTS: usize = 5;

/// The daemon on the client's side.
pub const KILLED_SOURCE: Scenario = Scenario {
    name: "kill -9 of the client's daemon: nothing goes out in clear, and it is back in under a second",
    run: |testbed| {
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        let marker = marker();
        let watch = testbed.watch_link("killed-source")?;
        testbed.kill_daemon(On::A)?;
        let mut said = String::new();
        let tries = throughout(Duration::from_secs(1), || {
            for to in [&server, &testbed.outside] {
                for address in to.addresses() {
                    said = closed(&client, address, &marker)?;
                }
            }
            Ok(())
        })?;
        let packets = watch.finish()?;
        nothing_in_clear(&packets, &client, &marker)?;
        let back = comes_back(testbed, On::A, &client, server.v4.into())?;
        Ok(format!(
            "{} attempts on both families refused (\"{said}\"), 0 connections of the client on the link; back {} ms \
             after its start",
            tries * 4,
            back.as_millis()
        ))
    },
};

/// The daemon on the server's side.
pub const KILLED_DESTINATION: Scenario = Scenario {
    name: "kill -9 of the server's daemon: tunnelled or plain, nothing gets in until it is back, in under a second",
    run: |testbed| {
        let (client, server, outsider) =
            (testbed.client.clone(), testbed.server.clone(), testbed.outsider.clone());
        let marker = marker();
        let watch = testbed.watch_link("killed-destination")?;
        testbed.kill_daemon(On::B)?;
        let mut said = String::new();
        let tries = throughout(Duration::from_secs(1), || {
            for from in [&client, &outsider] {
                for address in server.addresses() {
                    said = closed(from, address, &marker)?;
                }
            }
            Ok(())
        })?;
        let packets = watch.finish()?;
        nothing_in_clear(&packets, &client, &marker)?;
        let back = comes_back(testbed, On::B, &client, server.v4.into())?;
        let outsider_back = eventually(PATIENCE, || http(&outsider.place, server.v4.into(), ""));
        outsider_back.context("a pod outside the mesh, after the daemon is back")?;
        Ok(format!(
            "{} attempts from inside and outside the mesh refused (\"{said}\"); back {} ms after its start",
            tries * 4,
            back.as_millis()
        ))
    },
};

/// Killed at any moment of its start, enrolment and take-over.
pub const KILLED_AT_ANY_MOMENT: Scenario = Scenario {
    name: "killed at any moment of start, enrolment or take-over: closed or working, never in clear",
    run: |testbed| {
        const ROUNDS: u32 = 20;
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        let marker = marker();
        let watch = testbed.watch_link_for_clear("killed-any")?;
        let mut delays = Vec::new();
        for round in 0..ROUNDS {
            let on = BOTH[round as usize % 2];
            let delay = Duration::from_millis(rand::rng().random_range(0..400));
            testbed.say(&format!("round {} of {ROUNDS}: kill after {} ms", round + 1, delay.as_millis()));
            // Every third time there is no first daemon that goes on: the start itself is hit.
            if round % 3 == 2 {
                testbed.kill_daemon(on)?;
            }
            let mut next = testbed.setting(on).start()?;
            let begun = Instant::now();
            while begun.elapsed() < delay {
                let _closed_or_working = http(&client.place, server.v4.into(), &format!("?marker={marker}"));
            }
            next.process().kill_9().with_context(|| format!("round {round}, after {delay:?}"))?;
            delays.push(delay.as_millis());
            drop(next);
            // The first may have been told to go: whoever is left, one more start must put it right.
            let next = testbed.setting(on).start_ready().with_context(|| format!("round {round}"))?;
            if let Some(first) = testbed.replace_daemon(on, next) {
                first.stop().with_context(|| format!("round {round}: the first daemon"))?;
            }
            eventually(PATIENCE, || http(&client.place, server.v4.into(), ""))
                .with_context(|| format!("round {round}: not working again after a kill at {delay:?}"))?;
        }
        let packets = watch.finish()?;
        nothing_in_clear(&packets, &client, &marker)?;
        Ok(format!("{ROUNDS} kills after {delays:?} ms; works after each, 0 packets in clear"))
    },
};

/// Killed after its take-over, or in its midst, while the one before it still drains.
pub const KILLED_AFTER_TAKE_OVER: Scenario = Scenario {
    name: "a daemon that is killed while the one before it drains: that one serves the pods again",
    run: |testbed| {
        killed_after_take_over(testbed, &|testbed| {
            for address in testbed.server.addresses() {
                http(&testbed.client.place, address, "")?;
            }
            http(&testbed.outsider.place, testbed.server.v4.into(), "").map(drop)
        })
    },
};

/// When a daemon is killed that takes over.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// It has served for so long.
    Serves(Duration),
    /// It or the one before it says this.
    Says(&'static str),
}

/// Kills a daemon at many moments while the one before it drains; `works`: the pods are served.
pub fn killed_after_take_over(
    testbed: &mut Testbed,
    works: &dyn Fn(&Testbed) -> Result<()>,
) -> Result<String> {
    const MOMENTS: [Moment; 9] = [
        Moment::Serves(Duration::ZERO),
        Moment::Serves(Duration::ZERO),
        Moment::Serves(Duration::from_millis(100)),
        Moment::Serves(Duration::from_secs(1)),
        // The linger is over.
        Moment::Serves(Duration::from_secs(4)),
        Moment::Says("taking over from a running daemon"),
        Moment::Says("pod captured"),
        Moment::Says("the node is handed over"),
        Moment::Says("serving"),
    ];
    let (client, marker) = (testbed.client.clone(), marker());
    let mut slowest = Duration::ZERO;
    let watch = testbed.watch_link_for_clear("killed-after")?;
    for (round, moment) in MOMENTS.into_iter().enumerate() {
        let on = BOTH[round % 2];
        let what = || format!("round {round} on {on:?}: killed at {moment:?}");
        // What the first daemon drains.
        let mut held = Held::open(&client.place, lines_at(testbed.server.v4))?;
        let log = testbed.setting(on).log();
        let mark = log.mark();
        let mut next = testbed.setting(on).start()?;
        match moment {
            Moment::Serves(period) => {
                next.wait_ready().with_context(what)?;
                if !period.is_zero() {
                    throughout(period, || works(testbed)).with_context(what)?;
                }
            }
            Moment::Says(words) => {
                log.wait_line(mark, PATIENCE, words, |line| line.contains(words)).with_context(what)?;
            }
        }
        next.process().kill_9().with_context(what)?;
        let killed = Instant::now();
        drop(next);
        eventually(PATIENCE, || works(testbed)).with_context(what)?;
        slowest = slowest.max(killed.elapsed());
        held.say().with_context(what).context("what the first daemon drained")?;
        testbed.daemon(on)?.process().must_run().with_context(what)?;
        // Others can take over from it as from any.
        let mut again = testbed.setting(on).start()?;
        again.wait_ready().with_context(what)?;
        let mut first = testbed.replace_daemon(on, again).context("no first daemon")?;
        works(testbed).with_context(what).context("after another daemon took over")?;
        held.say().with_context(what).context("after another daemon took over")?;
        drop(held);
        first.ended().with_context(what).context("the first daemon was to end with its last connection")?;
        works(testbed).with_context(what).context("after the first daemon ended")?;
    }
    nothing_in_clear(&watch.finish()?, &client, &marker)?;
    Ok(format!(
        "{} daemons killed; the one before served the pods again within {} ms, nothing in clear",
        MOMENTS.len(),
        slowest.as_millis()
    ))
}

/// One request that must be refused, not answered and not left waiting.
fn closed(from: &Pod, to: IpAddr, marker: &str) -> Result<String> {
    let url = format!("http://{}:{}/?marker={marker}", crate::topology::in_url(to), crate::testbed::HTTP);
    refused(&from.place, &[&url]).with_context(|| format!("{} → {to}", from.name))
}

/// No marker on the link, and no connection of this pod but tunnels.
pub fn nothing_in_clear(packets: &Packets, client: &Pod, marker: &str) -> Result<()> {
    let seen = packets.with_marker(marker);
    ensure!(seen == 0, "{seen} packets carry the payload in clear");
    let of_client = |address: IpAddr| client.addresses().contains(&address);
    let plain: Vec<_> = packets
        .segments
        .iter()
        .filter(|segment| segment.opens && of_client(segment.from.ip()) && segment.to.port() != HBONE_PORT)
        .map(|segment| segment.to)
        .collect();
    ensure!(plain.is_empty(), "{} connection attempts in clear: {plain:?}", plain.len());
    Ok(())
}

/// Starts the killed daemon; how long after that the first connection works.
fn comes_back(testbed: &mut Testbed, on: On, client: &Pod, to: IpAddr) -> Result<Duration> {
    let mut late = Vec::new();
    for start in 0..STARTS {
        if start > 0 {
            testbed.kill_daemon(on)?;
        }
        let before = pace(testbed)?;
        let daemon = testbed.setting(on).start()?;
        let started = daemon.started();
        testbed.replace_daemon(on, daemon);
        eventually(PATIENCE, || http(&client.place, to, "")).context("after the restart")?;
        let back = started.elapsed();
        testbed.daemon(on)?.wait_ready()?;
        // And not once only.
        throughout(Duration::from_millis(300), || http(&client.place, to, "").map(drop))?;
        let within = BACK_WITHIN.max(5 * before.max(pace(testbed)?));
        if back < within {
            return Ok(back);
        }
        late.push(format!("{} ms of {} ms", back.as_millis(), within.as_millis()));
    }
    bail!("it took too long until the first connection worked, each time: {}", late.join(", "))
}

/// How fast this machine is now: the time for some requests that no daemon has a part in.
fn pace(testbed: &Testbed) -> Result<Duration> {
    let begun = Instant::now();
    for _ in 0..10 {
        http(&testbed.outsider.place, testbed.outside.v4.into(), "")?;
    }
    Ok(begun.elapsed())
}

/// While a policy forbids it, a kill must not open a way: the refusal outlives the daemon.
pub const KILLED_UNDER_POLICY: Scenario = Scenario {
    name: "under STRICT, killing and restarting the server's daemon never lets plaintext in",
    run: |testbed| {
        let (outsider, server) = (testbed.outsider.clone(), testbed.server.clone());
        testbed.mesh.peer_authentication("STRICT")?;
        eventually(PATIENCE, || http_refused(&outsider.place, server.v4.into()))?;
        let mut tries = 0;
        for _ in 0..5 {
            testbed.kill_daemon(On::B)?;
            let mut next = testbed.setting(On::B).start()?;
            // All the way through the start: a daemon that opens before it knows the policies is caught here.
            let begun = Instant::now();
            let mut since_ready = 0;
            while since_ready < 5 {
                ensure!(begun.elapsed() < PATIENCE, "it does not get ready");
                since_ready += u32::from(next.is_ready()?);
                for address in server.addresses() {
                    http_refused(&outsider.place, address)
                        .with_context(|| format!("{} ms after the start", begun.elapsed().as_millis()))?;
                    tries += 1;
                }
            }
            testbed.replace_daemon(On::B, next);
        }
        Ok(format!("5 kills and restarts, {tries} plaintext attempts in the midst of it, all refused"))
    },
};
