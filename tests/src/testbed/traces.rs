//! What capturing a pod changes in its network namespace.

use std::collections::BTreeSet;

use anyhow::{Result, bail};

use crate::netns::Netns;
use crate::poll::{PATIENCE, eventually};

/// Rules, routes, sysctls, queueing disciplines, filters and listeners of one network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// Looks at a namespace now.
    pub fn look(netns: &Netns) -> Result<Self> {
        let mut found = BTreeSet::new();
        for args in [
            &["rule"][..],
            &["-6", "rule"],
            &["route", "show", "table", "all"],
            &["-6", "route", "show", "table", "all"],
        ] {
            for line in netns.ip(args)?.lines() {
                // Link-local and multicast routes come by themselves, some time after the device.
                if !line.contains("fe80:") && !line.contains("ff00::") {
                    // A device that has just been made says for a moment that nothing is at its other end.
                    let line = line.replace(" linkdown", "");
                    found.insert(format!("{}: {}", args.join(" "), line.trim()));
                }
            }
        }
        for key in ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"] {
            found.insert(format!("{key}={}", netns.sysctl(key)?));
        }
        let tc = |args: &[&str]| {
            let mut all = vec!["-n", netns.name()];
            all.extend_from_slice(args);
            crate::process::sh("tc", &all)
        };
        for line in tc(&["qdisc", "show"])?.lines() {
            found.insert(line.split(" parent").next().unwrap_or(line).trim().to_owned());
        }
        for line in tc(&["filter", "show", "dev", "eth0", "egress"]).unwrap_or_default().lines() {
            found.insert(format!("egress filter {line}"));
        }
        found.extend(netns.enter(listeners)?);
        Ok(Self(found))
    }

    /// What is here and was not before.
    pub fn new_since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// Whether there is a routing rule that names table 100: the sign of a captured pod.
    pub fn is_captured(&self) -> bool {
        self.0.iter().any(|line| line.contains("rule: ") && line.ends_with("lookup 100"))
    }

    /// Waits until the namespace looks like this again.
    pub fn same_again(&self, netns: &Netns) -> Result<()> {
        eventually(PATIENCE, || {
            let now = Self::look(netns)?;
            let gone: Vec<_> = self.0.difference(&now.0).collect();
            let new = now.new_since(self);
            if new.is_empty() && gone.is_empty() {
                return Ok(());
            }
            bail!("left behind: {new:?}; gone: {gone:?}")
        })
    }
}

/// The listening TCP sockets of the namespace this thread is in.
fn listeners() -> Result<Vec<String>> {
    const LISTEN: &str = "0A";
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            if words.get(3) == Some(&LISTEN) {
                found.push(format!("listener {table} {}", words[1]));
            }
        }
    }
    Ok(found)
}
