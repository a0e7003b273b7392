//! Somebody else takes our rules, routes and pins away.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Scenario;
use super::outage::nothing_in_clear;
use super::tunnel::marker;
use crate::netns::Netns;
use crate::poll::{PATIENCE, eventually, throughout};
use crate::testbed::{On, Testbed, http};

type Damage = fn(&Netns) -> Result<()>;

/// What somebody may do in a pod.
const DAMAGE: [(&str, Damage); 4] = [
    ("rules flushed", flush_rules),
    ("table 100 flushed", flush_table),
    ("tcp_fwmark_accept cleared", |netns| netns.set_sysctl("ipv4/tcp_fwmark_accept", "0")),
    ("all of it", |netns| {
        flush_rules(netns)?;
        flush_table(netns)?;
        for setting in ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"] {
            netns.set_sysctl(setting, "0")?;
        }
        Ok(())
    }),
];

/// Rules, routes and sysctl of a pod.
pub const DAMAGED_POD: Scenario = Scenario {
    name: "rules, routes or the sysctl of a pod are deleted: closed meanwhile, repaired by itself",
    run: |testbed| {
        let mut evidence = Vec::new();
        for (what, damage) in DAMAGE {
            for pod in [testbed.client.clone(), testbed.server.clone()] {
                testbed.say(&format!("{what} in {}", pod.name));
                let whole = crate::testbed::Traces::look(&pod.place.netns)?;
                let took = survive(testbed, || damage(&pod.place.netns))
                    .with_context(|| format!("{what} in {}", pod.name))?;
                whole.same_again(&pod.place.netns).with_context(|| format!("{what} in {}", pod.name))?;
                evidence.push(format!("{what} in {}: {} ms", pod.name, took.as_millis()));
            }
        }
        Ok(format!("working again after: {}; nothing in clear meanwhile", evidence.join(", ")))
    },
};

/// The pins of the daemon.
pub const PINS_DELETED: Scenario = Scenario {
    name: "the pins are deleted under a running daemon: it goes on, and restores them or says so",
    run: |testbed| {
        let pins = testbed.setting(On::A).pins.clone();
        let count = files_below(&pins)?.len();
        ensure!(count > 0, "no pins in {}", pins.display());
        survive(testbed, || {
            for file in files_below(&pins)? {
                std::fs::remove_file(&file).with_context(|| file.display().to_string())?;
            }
            Ok(())
        })?;
        let restored = eventually(PATIENCE, || {
            let now = files_below(&pins)?.len();
            ensure!(now == count, "{now} of {count} pins are back");
            Ok(now)
        })?;
        // The point of pins: what a successor finds.
        testbed.restart_daemon(On::A, false)?;
        http(&testbed.client.place, testbed.server.v4.into(), "")
            .context("after a restart with restored pins")?;
        Ok(format!("{count} pins deleted, {restored} restored; a restart after that works"))
    },
};

/// Does the damage, and checks that the client is closed or in the mesh from then on, and in the mesh at the end.
fn survive(testbed: &Testbed, damage: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let (client, server, marker) = (&testbed.client, &testbed.server, marker());
    let watch = testbed.watch_link("repair")?;
    damage()?;
    let begun = std::time::Instant::now();
    let query = format!("?marker={marker}");
    // A fixed time first: "works" at once may be the moment before the damage shows.
    throughout(Duration::from_millis(500), || {
        let _closed_or_working = http(&client.place, server.v4.into(), &query);
        Ok(())
    })?;
    eventually(PATIENCE, || {
        for address in server.addresses() {
            http(&client.place, address, &query)?;
        }
        Ok(())
    })
    .context("not repaired")?;
    let took = begun.elapsed();
    nothing_in_clear(&watch.finish()?, client, &marker)?;
    Ok(took)
}

fn flush_rules(netns: &Netns) -> Result<()> {
    for family in ["-4", "-6"] {
        let rules = netns.ip(&[family, "rule"])?;
        let priorities = rules.lines().filter_map(|line| line.split(':').next());
        for priority in priorities.filter(|priority| !matches!(*priority, "0" | "32766" | "32767")) {
            netns.ip(&[family, "rule", "del", "priority", priority])?;
        }
    }
    Ok(())
}

fn flush_table(netns: &Netns) -> Result<()> {
    for family in ["-4", "-6"] {
        netns.ip(&[family, "route", "flush", "table", "100"])?;
    }
    Ok(())
}

fn files_below(directory: &std::path::Path) -> Result<Vec<std::path::PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.extend(files_below(&entry.path())?);
        } else if !matches!(entry.file_name().to_str(), Some("progs.debug" | "maps.debug")) {
            // Those two are the file system's own.
            files.push(entry.path());
        }
    }
    Ok(files)
}
