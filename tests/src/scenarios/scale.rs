//! Many pods on one node.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Scenario;
use crate::mesh::{Enrolment, MESHED};
use crate::poll::{PATIENCE, eventually};
use crate::syscalls::Counting;
use crate::testbed::{On, Testbed, http};
use crate::topology::Pod;

const PODS: usize = 200;
/// What a pod may cost the daemon, in bytes of resident memory and in descriptors.
const MEMORY_PER_POD: u64 = 60_000;
const DESCRIPTORS_PER_POD: usize = 10;
/// Generous, to notice a quadratic step: how long it takes depends on what else the machine does.
const ENROLLED_WITHIN: Duration = Duration::from_secs(300);
/// For how long the daemon is watched while nothing happens, and the system calls it may make meanwhile: at each of its
/// passes, every other second, it makes eight for each pod, to see that its namespace, settings and pins are there. Looking into
/// every pod would be several times as many. How much processor time they take depends on the machine.
const IDLE: Duration = Duration::from_secs(10);
const IDLE_CALLS: u64 = 50 * PODS as u64;
/// In the first of so many such times it may still be coming to rest.
const IDLE_TIMES: usize = 6;

/// Two hundred pods.
pub const TWO_HUNDRED_PODS: Scenario = Scenario {
    name: "two hundred pods on one node: enrolled in reasonable time, memory and descriptors",
    run: |testbed| {
        testbed.say(&format!("making {PODS} pods"));
        let pods = (0..PODS)
            .map(|number| testbed.a.add_pod(&testbed.run, &format!("many-{number}")))
            .collect::<Result<Vec<_>>>()?;
        let (memory, descriptors) = usage(testbed)?;
        testbed.say(&format!("enrolling {PODS} pods"));
        let begun = Instant::now();
        for pod in &pods {
            testbed.mesh.pod(MESHED, pod, Enrolment::Inherit)?;
        }
        wait_captured(&pods, true)?;
        let enrolled = begun.elapsed();
        for pod in [&pods[0], &pods[PODS / 2], &pods[PODS - 1]] {
            http(&pod.place, testbed.server.v4.into(), "").with_context(|| pod.name.clone())?;
        }
        let (memory_then, descriptors_then) = usage(testbed)?;
        let idle = idle(testbed)?;
        let per_pod = memory_then.saturating_sub(memory) / PODS as u64;
        let descriptors_per_pod = descriptors_then.saturating_sub(descriptors) / PODS;
        testbed.say("restarting the daemon");
        let restart = testbed.restart_daemon(On::A, false)?;
        testbed.say(&format!("withdrawing {PODS} pods"));
        let begun = Instant::now();
        testbed.mesh.remove_all("pod-many-")?;
        // To the daemons it looks as if everything were gone.
        let meant = testbed.setting(On::A).command(&["reload", "--force"])?;
        ensure!(meant.status.success(), "{}", String::from_utf8_lossy(&meant.stderr));
        wait_captured(&pods, false)?;
        let withdrawn = begun.elapsed();
        ensure!(per_pod <= MEMORY_PER_POD, "{per_pod} bytes per pod");
        ensure!(descriptors_per_pod <= DESCRIPTORS_PER_POD, "{descriptors_per_pod} descriptors per pod");
        eventually(PATIENCE, || {
            let (_, after) = usage(testbed)?;
            ensure!(
                after < descriptors + PODS,
                "descriptors: {descriptors} before, {descriptors_then} with the pods, {after} after"
            );
            Ok(())
        })?;
        Ok(format!(
            "enrolled in {} ms ({:.1} ms each), {} KiB and {descriptors_per_pod} descriptors per pod, {idle} system \
             calls in {} s of doing nothing, restart ready in {} ms, withdrawn in {} ms",
            enrolled.as_millis(),
            enrolled.as_secs_f64() * 1000.0 / PODS as f64,
            per_pod >> 10,
            IDLE.as_secs(),
            restart.as_millis(),
            withdrawn.as_millis()
        ))
    },
};

/// How many system calls the daemon makes while nothing happens, once it has come to rest.
fn idle(testbed: &mut Testbed) -> Result<u64> {
    let pid = testbed.daemon(On::A)?.process().pid();
    let mut seen = Vec::new();
    for _ in 0..IDLE_TIMES {
        let counting = Counting::start(pid, "", &testbed.run.path("logs").join("strace-idle"))?;
        std::thread::sleep(IDLE);
        let calls = counting.finish()?;
        if calls.total() <= IDLE_CALLS {
            return Ok(calls.total());
        }
        seen.push(format!("{} ({})", calls.total(), calls.per(IDLE.as_secs_f64())));
    }
    bail!("system calls in {} s of doing nothing, and of which each per second: {seen:?}", IDLE.as_secs())
}

fn usage(testbed: &mut Testbed) -> Result<(u64, usize)> {
    let daemon = testbed.daemon(On::A)?;
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
