//! A pod that cannot be captured.

use anyhow::{Context, Result, ensure};

use super::Scenario;
use crate::poll::{PATIENCE, eventually};
use crate::testbed::{On, Testbed, http, http_refused};
use crate::topology::Pod;

/// More than a pod may have.
const PAIRS: usize = 40;

/// A pod that cannot be captured is closed, the node says so, and the others do not notice.
pub const TOO_MANY_DEVICES: Scenario = Scenario {
    name: "a pod that has too many devices is closed, its node is not ready and says why; the others are served",
    run: |testbed| {
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        let before = counted(testbed)?;
        ensure!(before == 0.0, "{before} pods are closed in the first place");
        change(&client, |pair| format!("link add a{pair} type veth peer name b{pair}"))?;
        eventually(PATIENCE, || {
            let error = testbed.setting(On::A).readiness().err().context("ready")?;
            ensure!(format!("{error:#}").contains("cannot be captured"), "{error:#}");
            Ok(())
        })?;
        ensure!(counted(testbed)? == 1.0, "{} pods are closed", counted(testbed)?);
        for address in server.addresses() {
            http_refused(&client.place, address)?;
        }
        http(&testbed.outsider.place, server.v4.into(), "").context("somebody else")?;
        change(&client, |pair| format!("link del a{pair}"))?;
        eventually(PATIENCE, || testbed.setting(On::A).readiness().map(drop))?;
        for address in server.addresses() {
            http(&client.place, address, "").context("with fewer devices")?;
        }
        ensure!(counted(testbed)? == 0.0, "{} pods are closed", counted(testbed)?);
        Ok(format!("{} devices: closed and said so; without them served again", 2 * PAIRS))
    },
};

fn change(pod: &Pod, command: impl Fn(usize) -> String) -> Result<()> {
    for pair in 0..PAIRS {
        let command = command(pair);
        pod.place.netns.ip(&command.split(' ').collect::<Vec<_>>())?;
    }
    Ok(())
}

/// How many closed pods the daemon of the client's node counts.
fn counted(testbed: &Testbed) -> Result<f64> {
    let metrics = testbed.setting(On::A).metrics()?;
    let line = metrics.lines().find_map(|line| line.strip_prefix("ztunnel_capture_pods_closed "));
    Ok(line.context("no such metric")?.trim().parse()?)
}
