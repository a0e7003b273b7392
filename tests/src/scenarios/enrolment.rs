//! Pods come into the mesh and leave it while they work.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail, ensure};

use super::Scenario;
use crate::mesh::{Enrolment, MESHED};
use crate::netns::Netns;
use crate::peer::hold::Held;
use crate::peer::load::Load;
use crate::poll::{PATIENCE, eventually};
use crate::testbed::{HTTP, Testbed, http, lines_at};
use crate::topology::Pod;
use crate::wire::HBONE_PORT;

/// Enrolling and withdrawing leave open connections alone.
pub const OPEN_CONNECTIONS: Scenario = Scenario {
    name: "withdrawing and enrolling a pod: its open connections stay open, only new ones change",
    run: |testbed| {
        let client = testbed.client.clone();
        let targets = testbed.server.addresses().map(lines_at);
        let mut tunnelled =
            targets.iter().map(|to| Held::open(&client.place, *to)).collect::<Result<Vec<_>>>()?;
        testbed.mesh.pod(MESHED, &client, Enrolment::None)?;
        wait_for_port(testbed, &client, HTTP).context("after the client was withdrawn")?;
        for held in &mut tunnelled {
            let seen = held.say().context("opened before the withdrawal")?;
            ensure!(client.addresses().contains(&seen), "the server saw {seen}");
        }
        let mut plain =
            targets.iter().map(|to| Held::open(&client.place, *to)).collect::<Result<Vec<_>>>()?;
        testbed.mesh.pod(MESHED, &client, Enrolment::Inherit)?;
        wait_for_port(testbed, &client, HBONE_PORT).context("after the client was enrolled")?;
        for held in plain.iter_mut().chain(&mut tunnelled) {
            held.say().context("opened before the enrolment")?;
        }
        // The server's side of it.
        let server = testbed.server.clone();
        let mut inward = Held::open(&testbed.outsider.place, targets[0])?;
        testbed.mesh.pod(MESHED, &server, Enrolment::None)?;
        wait_for_port(testbed, &client, HTTP).context("after the server was withdrawn")?;
        for held in plain.iter_mut().chain(&mut tunnelled).chain([&mut inward]) {
            held.say().context("opened before the server was withdrawn")?;
        }
        testbed.mesh.pod(MESHED, &server, Enrolment::Inherit)?;
        wait_for_port(testbed, &client, HBONE_PORT).context("after the server was enrolled again")?;
        for held in plain.iter_mut().chain(&mut tunnelled).chain([&mut inward]) {
            held.say().context("opened before the server was enrolled again")?;
        }
        Ok(format!(
            "client out and in, server out and in: {} tunnelled, {} plain and 1 foreign connection answered after \
             each; new ones went to port {HTTP} while out and to {HBONE_PORT} while in",
            tunnelled.len(),
            plain.len()
        ))
    },
};

/// New connections per second, as far as the machine can.
const RATE: u64 = 100;

/// Pods that leave the mesh while others call them and they call others.
pub const UNDER_LOAD: Scenario = Scenario {
    name: "pods go out of the mesh under a steady load of new connections: not one attempt fails",
    run: |testbed| {
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        let targets = server.addresses().map(|address| SocketAddr::new(address, HTTP));
        let mut seen = Vec::new();
        // The one that is called, the one that calls, and both.
        for pods in [vec![&server], vec![&client], vec![&server, &client]] {
            let mut load = Load::start(&client.place, RATE, &targets)?;
            load.goes_on(100)?;
            for pod in &pods {
                testbed.mesh.pod(MESHED, pod, Enrolment::None)?;
            }
            testbed.wait_carried_out()?;
            load.goes_on(300)?;
            let outcome = load.finish()?;
            ensure!(outcome.failed.is_empty(), "{}", outcome.evidence());
            seen.push(outcome.evidence());
            // On its way back a pod may be dialled by a tunnel before it listens: that is another scenario.
            for pod in &pods {
                testbed.mesh.pod(MESHED, pod, Enrolment::Inherit)?;
            }
            testbed.wait_carried_out()?;
        }
        Ok(seen.join("; "))
    },
};

/// Withdrawal leaves nothing behind.
pub const WITHDRAWN_CLEAN: Scenario = Scenario {
    name: "after a withdrawal nothing is left in the pod: no rule, route, sysctl, filter or listener",
    run: |testbed| {
        let pods: Vec<Pod> = testbed.meshed().map(Pod::clone).to_vec();
        let mut removed = 0;
        for pod in &pods {
            let before = testbed.traces_before(pod)?.clone();
            let during = crate::testbed::Traces::look(&pod.place.netns)?;
            let added = during.new_since(&before).len();
            ensure!(added > 0, "{} was not captured in the first place", pod.name);
            removed += added;
            testbed.mesh.pod(MESHED, pod, Enrolment::None)?;
        }
        for pod in &pods {
            let before = testbed.traces_before(pod)?;
            before.same_again(&pod.place.netns).with_context(|| format!("pod {}", pod.name))?;
        }
        http(&testbed.client.place, testbed.server.v4.into(), "").context("without the mesh")?;
        Ok(format!(
            "{} pods withdrawn: {removed} rules, routes, sysctls, filters and listeners gone",
            pods.len()
        ))
    },
};

/// A pod that is deleted while it is enrolled: its namespace is gone, the daemon goes on.
pub const POD_DELETED: Scenario = Scenario {
    name: "a pod whose network namespace is deleted, before or after its object, does no harm",
    run: |testbed| {
        for namespace_first in [true, false] {
            let name = if namespace_first { "brief-1" } else { "brief-2" };
            let pod = testbed.a.add_pod(&testbed.run, name)?;
            testbed.mesh.pod(MESHED, &pod, Enrolment::Inherit)?;
            eventually(PATIENCE, || {
                http(&pod.place, testbed.server.v4.into(), "")?;
                match crate::testbed::Traces::look(&pod.place.netns)?.is_captured() {
                    true => Ok(()),
                    false => bail!("{name} is not captured yet"),
                }
            })?;
            if namespace_first {
                pod.place.netns.remove()?;
                testbed.mesh.remove(&format!("pod-{name}"))?;
            } else {
                testbed.mesh.remove(&format!("pod-{name}"))?;
                pod.place.netns.remove()?;
            }
            for address in testbed.server.addresses() {
                http(&testbed.client.place, address, "")
                    .with_context(|| format!("after {name} was deleted"))?;
            }
        }
        Ok("two pods came, were captured and went, in both orders; the others went on".to_owned())
    },
};

/// A pod whose network namespace is made again under the same name, as a restarted container's is.
pub const NAMESPACE_REMADE: Scenario = Scenario {
    name: "a network namespace that is made again under the name of an enrolled one is captured too",
    run: |testbed| {
        let pod = testbed.a.add_pod(&testbed.run, "remade")?;
        testbed.mesh.pod(MESHED, &pod, Enrolment::Inherit)?;
        let captured = || match crate::testbed::Traces::look(&pod.place.netns)?.is_captured() {
            true => Ok(()),
            false => bail!("not captured"),
        };
        eventually(PATIENCE, captured).context("at first")?;
        let old = std::fs::metadata(pod.place.netns.path())?.ino();
        pod.place.netns.remove()?;
        let again = Netns::create(pod.place.netns.name())?;
        again.ip(&["addr", "add", &format!("{}/32", pod.v4), "dev", "lo"])?;
        again.ip(&["addr", "add", &format!("{}/128", pod.v6), "dev", "lo", "nodad"])?;
        let new = std::fs::metadata(pod.place.netns.path())?.ino();
        ensure!(old != new, "it is the same namespace");
        eventually(PATIENCE, captured).context("after it was made again")?;
        testbed.mesh.remove("pod-remade")?;
        pod.place.netns.remove()?;
        http(&testbed.client.place, testbed.server.v4.into(), "")
            .context("another pod of the node, afterwards")?;
        Ok(format!("namespace {old} was captured, and {new} in its place"))
    },
};

/// Waits until a new connection of the client goes over the link to this port and to no other.
pub fn wait_for_port(testbed: &Testbed, client: &Pod, port: u16) -> Result<()> {
    eventually(PATIENCE, || {
        let mark = super::tunnel::marker();
        let watch = testbed.watch_link("enrolment")?;
        for address in testbed.server.addresses() {
            http(&client.place, address, &format!("?marker={mark}"))?;
        }
        let packets = watch.finish()?;
        let clear = packets.with_marker(&mark) > 0;
        match (port, clear) {
            (HBONE_PORT, false) | (HTTP, true) => Ok(()),
            _ => bail!("new connections do not go to port {port} yet: {:?}", packets.attempts_by_port()),
        }
    })
}
