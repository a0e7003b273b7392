//! The kubelet's probes.

use anyhow::{Context, Result, bail, ensure};

use super::Scenario;
use crate::place::Place;
use crate::poll::{PATIENCE, eventually};
use crate::testbed::{HTTP, Testbed, curl, http, http_refused};
use crate::topology::in_url;

/// The address under which the node's probes arrive; a process that binds to it must gain nothing.
const PROBE_ADDRESSES: [&str; 2] = ["169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"];

/// A probe passes, nobody else does.
pub const ONLY_THE_NODE: Scenario = Scenario {
    name: "under STRICT a probe from the node passes; another pod, or a hostNetwork pod, does not",
    run: |testbed| {
        let server = testbed.server.clone();
        testbed.mesh.peer_authentication("STRICT")?;
        eventually(PATIENCE, || http_refused(&testbed.outsider.place, server.v4.into()))?;
        for address in server.addresses() {
            http(&testbed.b.place, address, "").with_context(|| format!("probe of {address}"))?;
        }
        let mut tried = 0;
        let host_network = testbed.b.host_network_pod()?;
        for (place, who) in
            [(&host_network, "hostNetwork pod"), (&testbed.outside.place, "pod outside the mesh")]
        {
            for (address, probe) in server.addresses().into_iter().zip(PROBE_ADDRESSES) {
                http_refused(place, address).with_context(|| format!("{who} → {address}"))?;
                let url = format!("http://{}:{HTTP}/", in_url(address));
                refused_as_probe(place, who, probe, &url)?;
                tried += 2;
            }
        }
        let remote = testbed.a.place.clone();
        http_refused(&remote, server.v4.into()).context("a process of another node is no kubelet")?;
        stays_open_to_node(testbed)?;
        Ok(format!(
            "node-b's own process: 200 on both families; hostNetwork pod, pod outside the mesh (also with the probe's \
             source address) and a process of node-a: refused ({} attempts)",
            tried + 1
        ))
    },
};

/// A hostNetwork pod can bind to the probe's address, because it is on the node's `lo`; other pods can't.
fn refused_as_probe(place: &Place, who: &str, probe: &str, url: &str) -> Result<()> {
    if let Ok(answer) = curl(place, &["--interface", probe, "-m", "3", url]) {
        bail!("{who} got through from {probe}: {}", answer.body);
    }
    Ok(())
}

/// The refusals above must not have cost the node its own way in.
fn stays_open_to_node(testbed: &Testbed) -> Result<()> {
    let answer = http(&testbed.b.place, testbed.server.v4.into(), "")?;
    ensure!(answer.body.starts_with("pod=server"), "{}", answer.body);
    Ok(())
}
