//! Who may talk to whom.

use anyhow::{Context, Result, bail, ensure};

use super::Scenario;
use super::basics::sees_client;
use crate::peer::hold::Held;
use crate::poll::{PATIENCE, eventually};
use crate::testbed::{On, Testbed, http, http_refused, lines_at};
use crate::wire::HBONE_PORT;

/// An AuthorizationPolicy that refuses one service account.
pub const DENIED: Scenario = Scenario {
    name: "an AuthorizationPolicy refuses another service account, and the log names it",
    run: |testbed| {
        let log = testbed.setting(On::B).log();
        testbed.mesh.deny("no-other", "server", "other")?;
        let server = testbed.server.clone();
        let mark = log.mark();
        let said = eventually(PATIENCE, || http_refused(&testbed.other.place, server.v4.into()))?;
        for address in server.addresses() {
            http_refused(&testbed.other.place, address).with_context(|| format!("other → {address}"))?;
            http(&testbed.client.place, address, "").context("the policy does not name the client")?;
        }
        let line =
            log.wait_line(mark, PATIENCE, "the policy's name", |line| line.contains("demo/no-other"))?;
        testbed.mesh.remove("policy-no-other")?;
        eventually(PATIENCE, || http(&testbed.other.place, server.v4.into(), ""))
            .context("after the policy was removed")?;
        let error = super::tunnel::field(&line, "error").unwrap_or(&line);
        Ok(format!("other: \"{said}\"; client: 200; log of node-b: error=\"{error}\""))
    },
};

/// STRICT and PERMISSIVE.
pub const STRICT: Scenario = Scenario {
    name: "PeerAuthentication STRICT refuses plaintext from outside the mesh, PERMISSIVE lets it in",
    run: |testbed| {
        let server = testbed.server.clone();
        testbed.mesh.peer_authentication("STRICT")?;
        let said = eventually(PATIENCE, || http_refused(&testbed.outsider.place, server.v4.into()))?;
        for address in server.addresses() {
            http_refused(&testbed.outsider.place, address).with_context(|| format!("STRICT, {address}"))?;
            http(&testbed.client.place, address, "").context("STRICT must not touch the mesh")?;
        }
        testbed.mesh.peer_authentication("PERMISSIVE")?;
        let answer = eventually(PATIENCE, || http(&testbed.outsider.place, server.v4.into(), ""))?;
        sees_client(&answer, &testbed.outsider, server.v4.into())?;
        let answer = http(&testbed.outsider.place, server.v6.into(), "")?;
        sees_client(&answer, &testbed.outsider, server.v6.into())?;
        Ok(format!("STRICT: \"{said}\", the client still gets 200; PERMISSIVE: {}", answer.body))
    },
};

/// Pods outside the mesh, and calls to outside it.
pub const OUTSIDE_UNTOUCHED: Scenario = Scenario {
    name: "pods outside the mesh, and calls from the mesh to outside, work as without it",
    run: |testbed| {
        let watch = testbed.watch_link("outside")?;
        let mut evidence = Vec::new();
        for (from, what) in [(&testbed.outsider, "outside to outside"), (&testbed.client, "mesh to outside")]
        {
            for address in testbed.outside.addresses() {
                let answer = http(&from.place, address, "").context(what)?;
                sees_client(&answer, from, address)?;
                ensure!(answer.remote == address.to_string(), "the client's socket shows {}", answer.remote);
            }
            evidence.push(format!("{what}: both families, real addresses on both sides"));
        }
        let tunnels = watch.finish()?.attempts_by_port();
        ensure!(!tunnels.contains_key(&HBONE_PORT), "a tunnel was opened: {tunnels:?}");
        untouched(testbed)?;
        evidence.push(format!("connections on the link by port {tunnels:?}"));
        Ok(evidence.join("; "))
    },
};

/// Checks that nothing was changed in the network of the pods outside the mesh.
fn untouched(testbed: &Testbed) -> Result<()> {
    for pod in [&testbed.outsider, &testbed.outside] {
        testbed.traces_before(pod)?.same_again(&pod.place.netns).with_context(|| pod.name.clone())?;
    }
    Ok(())
}

/// A policy that changes while a connection is open.
pub const OPEN_CONNECTION_CUT: Scenario = Scenario {
    name: "a connection that a new policy refuses is cut at once, and others are not",
    run: |testbed| {
        let log = testbed.setting(On::B).log();
        let targets = testbed.server.addresses().map(lines_at);
        let open = |place| targets.iter().map(|to| Held::open(place, *to)).collect::<Result<Vec<_>>>();
        let (mut refused, mut allowed) = (open(&testbed.other.place)?, open(&testbed.client.place)?);
        let mut plain = open(&testbed.outsider.place)?;
        let mark = log.mark();
        testbed.mesh.deny("no-other", "server", "other")?;
        for held in &mut refused {
            eventually(PATIENCE, || match held.say() {
                Ok(_) => bail!("still answered"),
                Err(_) => Ok(()),
            })?;
        }
        let line =
            log.wait_line(mark, PATIENCE, "the reason", |line| line.contains("due to policy change"))?;
        for held in allowed.iter_mut().chain(&mut plain) {
            held.say().context("the policy does not name it")?;
        }
        testbed.mesh.peer_authentication("STRICT")?;
        for held in &mut plain {
            eventually(PATIENCE, || match held.say() {
                Ok(_) => bail!("plaintext still answered under STRICT"),
                Err(_) => Ok(()),
            })?;
        }
        for held in &mut allowed {
            held.say().context("STRICT must not touch the mesh")?;
        }
        let error = super::tunnel::field(&line, "error").unwrap_or(&line);
        Ok(format!("2 tunnelled cut by DENY (\"{error}\"), 2 plain ones by STRICT; 2 others went on"))
    },
};
