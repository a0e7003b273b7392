//! Comparing intent with the kernel and repairing what drifted.

use std::fmt;
use std::sync::Arc;

use super::{Node, host};
use crate::model::addr::PodUid;
use crate::net::netns::Netns;

/// Something that was not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// The pod; `None` is the node.
    pub pod: Option<PodUid>,
    /// What it was.
    pub what: String,
    /// Whether it is repaired; if not, `what` says why and the next call tries again.
    pub repaired: bool,
    /// The pod's network namespace is not the one that was captured: withdraw it, and capture it again if it is
    /// still wanted.
    pub lost: bool,
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.pod {
            Some(pod) => write!(f, "pod {pod}: {}", self.what)?,
            None => write!(f, "node: {}", self.what)?,
        }
        f.write_str(if self.repaired { "; repaired" } else { "; not repaired" })
    }
}

impl Node {
    /// Looks at everything that should be in the kernel and puts back what is missing. Does nothing once a
    /// newer daemon owns the node. Call it about once a second.
    pub fn reconcile(&mut self) -> Vec<Repair> {
        let mut repairs = Vec::new();
        if !self.is_owner() {
            return repairs;
        }
        self.reconcile_node(&mut repairs);
        let active: Vec<PodUid> = self
            .pods
            .iter()
            .filter(|(_, known)| known.listeners.is_some())
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in active {
            self.reconcile_pod(&uid, &mut repairs);
        }
        repairs
    }

    fn reconcile_node(&mut self, repairs: &mut Vec<Repair>) {
        let mut note =
            |what: String, repaired| repairs.push(Repair { pod: None, what, repaired, lost: false });
        match self.reattach() {
            Ok(missing) => {
                missing.into_iter().for_each(|what| note(what, true));
            }
            Err(error) => note(chain(&error), false),
        }
        match host::add_probe_addresses(&self.host) {
            Ok(added) => {
                added.iter().for_each(|ip| note(format!("{ip} was not on the loopback device"), true));
            }
            Err(error) => note(format!("cannot add the probe addresses: {error}"), false),
        }
        let current = self.maps.node.get(&0, 0).ok();
        if let Ok(wanted) = host::describe(&self.config, &self.host)
            && current != Some(wanted)
        {
            let set = self.maps.node.set(0, wanted, 0);
            note("the description of the host was not current".to_owned(), set.is_ok());
        }
    }

    fn reconcile_pod(&mut self, uid: &PodUid, repairs: &mut Vec<Repair>) {
        let Some(known) = self.pods.get(uid) else { return };
        let (spec, netns) = (known.spec.clone(), Arc::clone(&known.netns));
        let pod = Some(uid.clone());
        // Our descriptor keeps the namespace; the path tells whether the pod still has it.
        if !Netns::open(&spec.netns).is_ok_and(|current| current.id() == netns.id()) {
            let what = format!("its network namespace {} is gone or another one", spec.netns.display());
            repairs.push(Repair { pod, what, repaired: false, lost: true });
            return;
        }
        let mut note =
            |what: String, repaired| repairs.push(Repair { pod: pod.clone(), what, repaired, lost: false });
        if let Some(listeners) = &known.listeners
            && self.maps.refill_listeners(known.slot, listeners)
        {
            note("a listener was not in its slot".to_owned(), true);
        }
        match self.redirect(uid) {
            Ok(changed) => changed.into_iter().for_each(|what| note(what, true)),
            Err(error) => note(chain(&error), false),
        }
    }
}

/// An error with its causes.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
