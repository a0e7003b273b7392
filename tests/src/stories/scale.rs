//! Many pods on one node.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Story;
use crate::mesh::{Enrolment, MESHED};
use crate::poll::eventually;
use crate::process::cpu_time;
use crate::topology::Pod;
use crate::world::{On, World, http};

const PODS: usize = 200;
/// What a pod may cost the daemon, in bytes of resident memory and in descriptors.
const MEMORY_PER_POD: u64 = 60_000;
const DESCRIPTORS_PER_POD: usize = 8;
/// Generous, to notice a quadratic step: how long it takes depends on what else the machine does.
const ENROLLED_WITHIN: Duration = Duration::from_secs(60);
/// For how long the daemon is watched while nothing happens, after it had time to come to rest, and the CPU time it
/// may use meanwhile. Three times what it does, a third of what it would if it looked into every pod at every pass.
const IDLE: Duration = Duration::from_secs(10);
const REST: Duration = Duration::from_secs(5);
const IDLE_CPU: Duration = Duration::from_millis(100);

/// Two hundred pods.
pub const TWO_HUNDRED_PODS: Story = Story {
    name: "two hundred pods on one node: enrolled in reasonable time, memory and descriptors",
    tell: |world| {
        world.say(&format!("making {PODS} pods"));
        let pods = (0..PODS)
            .map(|number| world.a.add_pod(&world.run, &format!("many-{number}")))
            .collect::<Result<Vec<_>>>()?;
        let (memory, descriptors) = usage(world)?;
        world.say(&format!("enrolling {PODS} pods"));
        let begun = Instant::now();
        for pod in &pods {
            world.mesh.pod(MESHED, pod, Enrolment::Inherit)?;
        }
        wait_captured(&pods, true)?;
        let enrolled = begun.elapsed();
        for pod in [&pods[0], &pods[PODS / 2], &pods[PODS - 1]] {
            http(&pod.place, world.server.v4.into(), "").with_context(|| pod.name.clone())?;
        }
        let (memory_then, descriptors_then) = usage(world)?;
        std::thread::sleep(REST);
        let pid = world.daemon(On::A)?.process().pid();
        let cpu = cpu_time(pid)?;
        std::thread::sleep(IDLE);
        let cpu = cpu_time(pid)?.saturating_sub(cpu);
        let per_pod = memory_then.saturating_sub(memory) / PODS as u64;
        let descriptors_per_pod = descriptors_then.saturating_sub(descriptors) / PODS;
        world.say("restarting the daemon");
        let restart = world.restart_daemon(On::A, false)?;
        world.say(&format!("withdrawing {PODS} pods"));
        let begun = Instant::now();
        world.mesh.remove_all("pod-many-")?;
        wait_captured(&pods, false)?;
        let withdrawn = begun.elapsed();
        let (_, descriptors_after) = usage(world)?;
        ensure!(
            cpu <= IDLE_CPU,
            "{} ms of CPU time in {} s of doing nothing",
            cpu.as_millis(),
            IDLE.as_secs()
        );
        ensure!(per_pod <= MEMORY_PER_POD, "{per_pod} bytes per pod");
        ensure!(descriptors_per_pod <= DESCRIPTORS_PER_POD, "{descriptors_per_pod} descriptors per pod");
        ensure!(
            descriptors_after < descriptors + PODS,
            "descriptors: {descriptors} before, {descriptors_then} with the pods, {descriptors_after} after"
        );
        Ok(format!(
            "enrolled in {} ms ({:.1} ms each), {} KiB and {descriptors_per_pod} descriptors per pod, {:.1} ms of CPU \
             time per idle second, restart ready in {} ms, withdrawn in {} ms",
            enrolled.as_millis(),
            enrolled.as_secs_f64() * 1000.0 / PODS as f64,
            per_pod >> 10,
            cpu.as_secs_f64() * 1000.0 / IDLE.as_secs_f64(),
            restart.as_millis(),
            withdrawn.as_millis()
        ))
    },
};

fn usage(world: &mut World) -> Result<(u64, usize)> {
    let daemon = world.daemon(On::A)?;
    Ok((daemon.memory()?, daemon.descriptors()?))
}

fn wait_captured(pods: &[Pod], captured: bool) -> Result<()> {
    let begun = Instant::now();
    for pod in pods {
        eventually(ENROLLED_WITHIN.saturating_sub(begun.elapsed()), || {
            let rules = pod.place.netns.ip(&["rule"])?;
            ensure!(rules.contains("lookup 100") == captured, "{}: {rules}", pod.name);
            Ok(())
        })?;
    }
    Ok(())
}
