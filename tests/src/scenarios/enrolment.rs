//! Pods come into the mesh and leave it while they work.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail, ensure};

use super::Story;
use crate::mesh::{Enrolment, MESHED};
use crate::netns::Netns;
use crate::peer::hold::Held;
use crate::peer::load::Load;
use crate::poll::{PATIENCE, eventually};
use crate::topology::Pod;
use crate::wire::HBONE_PORT;
use crate::world::{HTTP, World, http, lines_at};

/// Enrolling and withdrawing leave open connections alone.
pub const OPEN_CONNECTIONS: Story = Story {
    name: "withdrawing and enrolling a pod: its open connections stay open, only new ones change",
    tell: |world| {
        let client = world.client.clone();
        let targets = world.server.addresses().map(lines_at);
        let mut tunnelled =
            targets.iter().map(|to| Held::open(&client.place, *to)).collect::<Result<Vec<_>>>()?;
        world.mesh.pod(MESHED, &client, Enrolment::None)?;
        wait_for_port(world, &client, HTTP).context("after the client was withdrawn")?;
        for held in &mut tunnelled {
            let seen = held.say().context("opened before the withdrawal")?;
            ensure!(client.addresses().contains(&seen), "the server saw {seen}");
        }
        let mut plain =
            targets.iter().map(|to| Held::open(&client.place, *to)).collect::<Result<Vec<_>>>()?;
        world.mesh.pod(MESHED, &client, Enrolment::Inherit)?;
        wait_for_port(world, &client, HBONE_PORT).context("after the client was enrolled")?;
        for held in plain.iter_mut().chain(&mut tunnelled) {
            held.say().context("opened before the enrolment")?;
        }
        // The server's side of it.
        let server = world.server.clone();
        let mut inward = Held::open(&world.outsider.place, targets[0])?;
        world.mesh.pod(MESHED, &server, Enrolment::None)?;
        wait_for_port(world, &client, HTTP).context("after the server was withdrawn")?;
        for held in plain.iter_mut().chain(&mut tunnelled).chain([&mut inward]) {
            held.say().context("opened before the server was withdrawn")?;
        }
        world.mesh.pod(MESHED, &server, Enrolment::Inherit)?;
        wait_for_port(world, &client, HBONE_PORT).context("after the server was enrolled again")?;
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
pub const UNDER_LOAD: Story = Story {
    name: "pods go out of the mesh under a steady load of new connections: not one attempt fails",
    tell: |world| {
        let (client, server) = (world.client.clone(), world.server.clone());
        let targets = server.addresses().map(|address| SocketAddr::new(address, HTTP));
        let mut told = Vec::new();
        // The one that is called, the one that calls, and both.
        for pods in [vec![&server], vec![&client], vec![&server, &client]] {
            let mut load = Load::start(&client.place, RATE, &targets)?;
            load.goes_on(100)?;
            for pod in &pods {
                world.mesh.pod(MESHED, pod, Enrolment::None)?;
            }
            world.wait_carried_out()?;
            load.goes_on(300)?;
            let outcome = load.finish()?;
            ensure!(outcome.failed.is_empty(), "{}", outcome.evidence());
            told.push(outcome.evidence());
            // On its way back a pod may be dialled by a tunnel before it listens: that is another story.
            for pod in &pods {
                world.mesh.pod(MESHED, pod, Enrolment::Inherit)?;
            }
            world.wait_carried_out()?;
        }
        Ok(told.join("; "))
    },
};

/// Withdrawal leaves nothing behind.
pub const WITHDRAWN_CLEAN: Story = Story {
    name: "after a withdrawal nothing is left in the pod: no rule, route, sysctl, filter or listener",
    tell: |world| {
        let pods: Vec<Pod> = world.meshed().map(Pod::clone).to_vec();
        let mut removed = 0;
        for pod in &pods {
            let before = world.traces_before(pod)?.clone();
            let during = crate::world::Traces::look(&pod.place.netns)?;
            let added = during.new_since(&before).len();
            ensure!(added > 0, "{} was not captured in the first place", pod.name);
            removed += added;
            world.mesh.pod(MESHED, pod, Enrolment::None)?;
        }
        for pod in &pods {
            let before = world.traces_before(pod)?;
            before.same_again(&pod.place.netns).with_context(|| format!("pod {}", pod.name))?;
        }
        http(&world.client.place, world.server.v4.into(), "").context("without the mesh")?;
        Ok(format!(
            "{} pods withdrawn: {removed} rules, routes, sysctls, filters and listeners gone",
            pods.len()
        ))
    },
};

/// A pod that is deleted while it is enrolled: its namespace is gone, the daemon goes on.
pub const POD_DELETED: Story = Story {
    name: "a pod whose network namespace is deleted, before or after its object, does no harm",
    tell: |world| {
        for namespace_first in [true, false] {
            let name = if namespace_first { "brief-1" } else { "brief-2" };
            let pod = world.a.add_pod(&world.run, name)?;
            world.mesh.pod(MESHED, &pod, Enrolment::Inherit)?;
            eventually(PATIENCE, || {
                http(&pod.place, world.server.v4.into(), "")?;
                match crate::world::Traces::look(&pod.place.netns)?.is_captured() {
                    true => Ok(()),
                    false => bail!("{name} is not captured yet"),
                }
            })?;
            if namespace_first {
                pod.place.netns.remove()?;
                world.mesh.remove(&format!("pod-{name}"))?;
            } else {
                world.mesh.remove(&format!("pod-{name}"))?;
                pod.place.netns.remove()?;
            }
            for address in world.server.addresses() {
                http(&world.client.place, address, "")
                    .with_context(|| format!("after {name} was deleted"))?;
            }
        }
        Ok("two pods came, were captured and went, in both orders; the others went on".to_owned())
    },
};

/// A pod whose network namespace is made again under the same name, as a restarted container's is.
pub const NAMESPACE_REMADE: Story = Story {
    name: "a network namespace that is made again under the name of an enrolled one is captured too",
    tell: |world| {
        let pod = world.a.add_pod(&world.run, "remade")?;
        world.mesh.pod(MESHED, &pod, Enrolment::Inherit)?;
        let captured = || match crate::world::Traces::look(&pod.place.netns)?.is_captured() {
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
        world.mesh.remove("pod-remade")?;
        pod.place.netns.remove()?;
        http(&world.client.place, world.server.v4.into(), "")
            .context("another pod of the node, afterwards")?;
        Ok(format!("namespace {old} was captured, and {new} in its place"))
    },
};

/// Waits until a new connection of the client goes over the link to this port and to no other.
pub fn wait_for_port(world: &World, client: &Pod, port: u16) -> Result<()> {
    eventually(PATIENCE, || {
        let mark = super::tunnel::marker();
        let watch = world.watch_link("enrolment")?;
        for address in world.server.addresses() {
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
