//! Two pods of one node: no wire between them, and all else as with one.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::Scenario;
use super::basics::sees_client;
use super::tunnel::{field, identity, inbound_line, marker, outbound_line};
use crate::mesh::{Enrolment, MESHED};
use crate::pcap::{Packets, Segment};
use crate::peer::hold::Held;
use crate::poll::{PATIENCE, eventually, throughout};
use crate::testbed::{On, Testbed, http, http_refused, lines_at};
use crate::topology::Pod;
use crate::wire::{HBONE_PORT, Watch};

/// What is reported of a connection, and that no device carries it.
pub const SAME_NODE: Scenario = Scenario {
    name: "a server on the client's own node is reached the same way, and nothing of it leaves the daemon",
    run: |testbed| {
        let log = testbed.setting(On::A).log();
        let (mark, said) = (log.mark(), marker());
        let watches = watch_devices(testbed, "same-node", "tcp")?;
        let mut evidence = Vec::new();
        for address in testbed.near.addresses() {
            let answer = http(&testbed.client.place, address, &format!("?marker={said}"))?;
            sees_client(&answer, &testbed.client, address)?;
            evidence.push(format!("{address} saw {}", answer.local));
        }
        for watch in watches {
            nothing_between(&watch.finish()?, &testbed.client, &testbed.near)?;
        }
        // Not a short cut past the mesh: both sides tell the same, and by whose identity it was judged.
        let inward = inbound_line(&log, mark, "client", "near")?;
        let outward = outbound_line(&log, mark, "client", "near")?;
        for key in ["dst.addr", "dst.hbone_addr"] {
            let (out, into) = (field(&outward, key), field(&inward, key));
            ensure!(out.is_some() && out == into, "{key} differs: {outward} / {inward}");
        }
        for reporter in ["source", "destination"] {
            eventually(PATIENCE, || counted(testbed, reporter))?;
        }
        // The same look at a connection from outside the mesh shows that it would have been seen.
        let control = Watch::start(&testbed.near.place, "eth0", "same-node-control", "tcp")?;
        http(&testbed.outsider.place, testbed.near.v4.into(), &format!("?marker={said}"))?;
        ensure!(control.finish()?.with_marker(&said) > 0, "the capture does not see what is on the device");
        Ok(format!(
            "{}; no packet on either pod's device; both sides reported who was at the other end",
            evidence.join("; ")
        ))
    },
};

/// What ends an open connection, and what does not.
pub const POLICY_AND_CHANGE: Scenario = Scenario {
    name: "between two pods of a node policies refuse and cut; withdrawing the server and a restart keep what is open",
    run: |testbed| {
        let log = testbed.setting(On::A).log();
        let (near, client, other) = (testbed.near.clone(), testbed.client.clone(), testbed.other.clone());
        let targets = near.addresses().map(lines_at);
        let watches = watch_devices(testbed, "near-held", "tcp port 9000")?;
        let open =
            |pod: &Pod| targets.iter().map(|to| Held::open(&pod.place, *to)).collect::<Result<Vec<_>>>();
        let (mut kept, mut cut) = (open(&client)?, open(&other)?);

        let mark = log.mark();
        testbed.mesh.deny("no-other", "near", "other")?;
        for held in &mut cut {
            eventually(PATIENCE, || match held.say() {
                Ok(_) => bail!("still answered"),
                Err(_) => Ok(()),
            })?;
        }
        log.wait_line(mark, PATIENCE, "the cut", |line| line.contains("due to policy change"))?;
        let mark = log.mark();
        http_refused(&other.place, near.v4.into())?;
        let refused = inbound_line(&log, mark, "other", "near")?;
        ensure!(refused.contains("demo/no-other"), "the policy is not named: {refused}");
        let line = outbound_line(&log, mark, "other", "near")?;
        ensure!(line.contains("http status: 401"), "the client's side says: {line}");
        testbed.mesh.remove("policy-no-other")?;

        testbed.mesh.pod(MESHED, &near, Enrolment::None)?;
        eventually(PATIENCE, || seen(testbed, true)).context("after the server was withdrawn")?;
        all_answer(&mut kept, "after the server was withdrawn")?;
        testbed.mesh.pod(MESHED, &near, Enrolment::Inherit)?;
        eventually(PATIENCE, || seen(testbed, false)).context("after the server was enrolled again")?;
        all_answer(&mut kept, "after the server was enrolled again")?;

        let mut next = testbed.setting(On::A).start()?;
        next.wait_ready()?;
        let mut first = testbed.replace_daemon(On::A, next).context("no first daemon")?;
        throughout(Duration::from_secs(1), || all_answer(&mut kept, "after the second daemon took over"))?;
        all_answer(&mut open(&client)?, "opened in the second daemon")?;
        drop(kept);
        first.ended().context("the first daemon was to end with its last connection")?;
        for watch in watches {
            nothing_between(&watch.finish()?, &client, &near)?;
        }
        let error = field(&refused, "error").unwrap_or(&refused);
        Ok(format!("refused: \"{error}\"; 2 cut, 2 others went on through withdrawal, enrolment and restart"))
    },
};

/// For those who must have every byte encrypted.
pub const ENCRYPTED: Scenario = Scenario {
    name: "with --encrypt-same-node a connection between two pods of a node goes through a tunnel too",
    run: |testbed| {
        let mut setting = testbed.setting(On::A).clone();
        setting.further.push("--encrypt-same-node".to_owned());
        let mut next = setting.start()?;
        next.wait_ready()?;
        let mut first = testbed.replace_daemon(On::A, next).context("no first daemon")?;
        first.ended().context("the first daemon was to drain")?;
        let (mark, said) = (setting.log().mark(), marker());
        let watch = Watch::start(&testbed.near.place, "eth0", "encrypted", "tcp")?;
        for address in testbed.near.addresses() {
            let answer = http(&testbed.client.place, address, &format!("?marker={said}"))?;
            sees_client(&answer, &testbed.client, address)?;
        }
        let packets = watch.finish()?;
        let tunnels = crate::wire::tunnels_only(&packets)?;
        ensure!(packets.with_marker(&said) == 0, "the payload is seen in clear");
        inbound_line(&setting.log(), mark, "client", "near")?;
        Ok(format!(
            "{} packets, all of port {HBONE_PORT}, {} encrypted records",
            tunnels.packets, tunnels.encrypted
        ))
    },
};

/// What passes the devices of both pods.
fn watch_devices(testbed: &Testbed, name: &str, filter: &str) -> Result<Vec<Watch>> {
    let pods = [&testbed.client, &testbed.near].into_iter();
    pods.map(|pod| Watch::start(&pod.place, "eth0", &format!("{name}-{}", pod.name), filter)).collect()
}

/// Checks that no packet is between these two. Other tunnels of theirs may be on their devices.
fn nothing_between(packets: &Packets, client: &Pod, server: &Pod) -> Result<()> {
    let is = |at: std::net::SocketAddr, pod: &Pod| pod.addresses().contains(&at.ip());
    let between = |segment: &&Segment| {
        (is(segment.from, client) && is(segment.to, server))
            || (is(segment.from, server) && is(segment.to, client))
    };
    let seen: Vec<_> = packets.segments.iter().filter(between).collect();
    ensure!(seen.is_empty(), "{} packets on a pod's device: {:?}", seen.len(), seen.first());
    Ok(())
}

/// Checks whether a new connection from the client to the server on its node is in clear on the server's device.
fn seen(testbed: &Testbed, clear: bool) -> Result<()> {
    let said = marker();
    let watch = Watch::start(&testbed.near.place, "eth0", "near-clear", "tcp")?;
    for address in testbed.near.addresses() {
        http(&testbed.client.place, address, &format!("?marker={said}"))?;
    }
    let seen = watch.finish()?.with_marker(&said) > 0;
    ensure!(seen == clear, "on the device in clear: {seen}, expected {clear}");
    Ok(())
}

fn all_answer(held: &mut [Held], when: &'static str) -> Result<()> {
    held.iter_mut().try_for_each(|held| held.say().map(|_| ()).context(when))
}

/// Checks that one side has counted connections from the client to the server: by whose identities, and not as secured
/// by a mutual TLS that there was none of.
fn counted(testbed: &Testbed, reporter: &str) -> Result<()> {
    let parts = [
        format!("reporter=\"{reporter}\""),
        format!("source_principal=\"{}\"", identity("client")),
        format!("destination_principal=\"{}\"", identity("near")),
        "connection_security_policy=\"unknown\"".to_owned(),
    ];
    let metrics = testbed.setting(On::A).metrics()?;
    let line = metrics.lines().find(|line| {
        line.starts_with("istio_tcp_connections_closed_total") && parts.iter().all(|part| line.contains(part))
    });
    let line = line.with_context(|| format!("the {reporter}'s side has counted nothing"))?;
    ensure!(!line.ends_with(" 0"), "{line}");
    Ok(())
}
