//! Comparing intent with the kernel and repairing what drifted.
//!
//! A close look at a pod takes a quarter of a millisecond, most of it in the pod's namespace. So that hundreds of pods
//! can be looked after every other second for next to nothing, a pod is looked at closely only when it gives cause:
//! * the kernel has announced a change of its devices, addresses, rules or routes (see `changes`);
//! * the path of its namespace leads elsewhere, or the directory of its pins has changed;
//! * one of its programs is detached;
//! * its `tcp_fwmark_accept` is off, or its `fwmark_reflect` (of one family in each glance);
//! * its turn has come: what is left, entries of maps, closes a pod when it is missing.
//!
//! A pod of which something is announced need not wait for that: [`Node::announcements`] tells when, and
//! [`Node::reconcile_announced`] looks at these alone. A pod that goes on changing is looked at no more often than takes
//! `SHARE` of the time, so that nobody gets less because of it.

use std::collections::HashSet;
use std::fmt;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ztunnel_mesh::model::addr::PodUid;

use super::changes::{Changes, Heard};
use super::error::EnrolError;
use super::sys::{self, Attach};
use super::sysctls::Opened;
use super::{Enrolled, Node, host};
use crate::net::netns::Netns;

/// In how many calls every pod's turn for a close look comes.
const TURNS: u32 = 150;
/// A look that took some time is followed by a rest of so many times that, for its pod.
const SHARE: u32 = 20;
/// The shortest rest.
const REST: Duration = Duration::from_millis(50);

/// What the reconciler remembers between its calls.
#[derive(Default)]
pub(super) struct Watch {
    changes: Listening,
    /// Counts the calls.
    call: u32,
}

#[derive(Default)]
enum Listening {
    /// Not yet.
    #[default]
    NotYet,
    /// To what is announced in pods' namespaces.
    To(Changes),
    /// It is not possible here: every look is a close one.
    Refused,
}

/// What it remembers of one pod.
#[derive(Debug, Default)]
pub(super) struct Watched {
    /// The number by which changes in its namespace are announced.
    number: Option<i32>,
    /// Its settings: to open them anew each time costs more than all the rest of a glance.
    settings: Option<Opened>,
    /// The directory of its pins when all was in order; `None` asks for a close look.
    pins: Option<Stamp>,
    /// Something was announced of it since the last look.
    announced: bool,
    /// It is not to be looked at again before.
    rests_until: Option<Instant>,
}

impl Watched {
    /// Asks for a close look.
    pub(super) fn doubt(&mut self) {
        self.pins = None;
    }
}

/// A directory as `stat` shows it: another one when an entry was made or removed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    directory: (u64, u64),
    modified: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let found = path.metadata().ok()?;
        Some(Self { directory: (found.dev(), found.ino()), modified: (found.mtime(), found.mtime_nsec()) })
    }
}

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
    /// Looks closely at everything that should be in the kernel and puts back what is missing. Does nothing once a
    /// newer daemon owns the node.
    pub fn reconcile(&mut self) -> Vec<Repair> {
        self.look(|_, _| true)
    }

    /// The same, but pods that give no cause are only glanced at. Call it every other second.
    pub fn reconcile_changed(&mut self) -> Vec<Repair> {
        if self.is_owner() {
            self.watch.call = self.watch.call.wrapping_add(1);
            self.hear();
        }
        self.look(Self::gives_cause)
    }

    /// Looks closely at the pods of which something was announced. Returns as well when to call again for those that it
    /// was too early for.
    pub fn reconcile_announced(&mut self) -> (Vec<Repair>, Option<Instant>) {
        let mut repairs = Vec::new();
        if !self.is_owner() {
            return (repairs, None);
        }
        self.hear();
        let now = Instant::now();
        let announced =
            self.pods.iter().filter(|(_, known)| known.watched.announced && known.listeners.is_some());
        let rested = announced.filter(|(_, known)| known.watched.rests_until.is_none_or(|at| at <= now));
        let rested: Vec<_> = rested.map(|(uid, _)| uid.clone()).collect();
        for uid in rested {
            self.look_closely(&uid, &mut repairs);
        }
        // Of those that were looked at just now, too: one that has more to guard than one look may wants another.
        let waiting = self.pods.values().filter(|known| known.watched.announced && known.listeners.is_some());
        let again = waiting.filter_map(|known| known.watched.rests_until).min();
        (repairs, again)
    }

    /// Becomes readable when something is announced. Read it only by calling [`Self::reconcile_announced`]. `None` where
    /// nothing is.
    pub fn announcements(&mut self) -> Option<OwnedFd> {
        self.listen();
        match &self.watch.changes {
            Listening::To(changes) => changes.descriptor().ok(),
            _ => None,
        }
    }

    fn look(&mut self, closely: impl Fn(&Self, &Enrolled) -> bool) -> Vec<Repair> {
        let mut repairs = Vec::new();
        if !self.is_owner() {
            return repairs;
        }
        self.reconcile_node(&mut repairs);
        let active = self.pods.iter().filter(|(_, known)| known.listeners.is_some());
        let doubtful: Vec<PodUid> =
            active.filter(|(_, known)| closely(self, known)).map(|(uid, _)| uid.clone()).collect();
        for uid in doubtful {
            self.look_closely(&uid, &mut repairs);
        }
        repairs
    }

    fn look_closely(&mut self, uid: &PodUid, repairs: &mut Vec<Repair>) {
        let begun = Instant::now();
        let pins = self.expect_changes(uid);
        let before = repairs.len();
        self.reconcile_pod(uid, repairs);
        let Some(known) = self.pods.get_mut(uid) else { return };
        // What had to be repaired is looked at once more.
        if repairs.len() == before {
            known.watched.pins = pins;
        }
        let ended = Instant::now();
        known.watched.rests_until = Some(ended + ((ended - begun) * SHARE).max(REST));
    }

    /// Marks the pods of which something has been announced.
    fn hear(&mut self) {
        self.listen();
        let heard = match &self.watch.changes {
            Listening::To(changes) => changes.heard(),
            _ => Heard { namespaces: HashSet::new(), more: true },
        };
        for known in self.pods.values_mut() {
            if known.watched.number.is_some_and(|number| heard.namespaces.contains(&number)) {
                known.watched.announced = true;
                known.watched.doubt();
            } else if heard.more || known.watched.number.is_none() {
                // It can wait for the next turn of all.
                known.watched.doubt();
            }
        }
    }

    /// Begins to listen, if it has not.
    fn listen(&mut self) {
        if matches!(self.watch.changes, Listening::NotYet) {
            self.watch.changes = Changes::open().map_or_else(
                |error| {
                    tracing::warn!(
                        %error,
                        "changes in pods' network namespaces are not announced to this process (it needs \
                         CAP_NET_BROADCAST): it looks for them, which takes more CPU time"
                    );
                    Listening::Refused
                },
                Listening::To,
            );
        }
    }

    /// To be called before a close look, so that nothing is missed after it. Returns what the pod is remembered by if
    /// that finds all in order.
    pub(super) fn expect_changes(&mut self, uid: &PodUid) -> Option<Stamp> {
        let (Listening::To(changes), Some(known)) = (&mut self.watch.changes, self.pods.get_mut(uid)) else {
            return None;
        };
        known.watched.announced = false;
        if known.watched.number.is_none() {
            known.watched.number = changes
                .listen(&known.netns)
                .inspect_err(|error| tracing::debug!(pod = %uid, %error, "cannot listen for changes"))
                .ok();
        }
        if known.watched.settings.is_none() {
            let opened = known.netns.run(Opened::open);
            known.watched.settings = opened.and_then(|opened| opened).ok();
        }
        known.watched.number.and_then(|_| Stamp::of(&self.pins.pod(known.slot)))
    }

    /// Whether a glance shows that something may be wrong with a pod.
    fn gives_cause(&self, known: &Enrolled) -> bool {
        let attached = |link, hook, target| {
            sys::link_state(link, hook).is_ok_and(|state: sys::LinkState| state.target == target)
        };
        known.watched.pins.is_none()
            || known.slot % TURNS == self.watch.call % TURNS
            || known.watched.pins != Stamp::of(&self.pins.pod(known.slot))
            || !known
                .spec
                .netns
                .metadata()
                .is_ok_and(|current| (current.dev(), current.ino()) == known.netns.id())
            || !known
                .links
                .lookup
                .as_ref()
                .is_some_and(|link| attached(link.as_fd(), Attach::SkLookup, known.netns.id().1))
            || !known
                .links
                .guards
                .here
                .iter()
                .all(|(index, link)| attached(link.as_fd(), Attach::TcxEgress, u64::from(*index)))
            || !known.watched.settings.as_ref().is_some_and(|settings| settings.are_on(self.watch.call))
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
        let redirected = self.redirect(uid);
        let Some(known) = self.pods.get_mut(uid) else { return };
        match redirected {
            Ok(found) => {
                found.repaired.into_iter().for_each(|what| note(what, true));
                found.noticed.into_iter().for_each(|what| note(what, false));
            }
            Err(error) => {
                let news = match &error {
                    EnrolError::TooManyDevices { .. } | EnrolError::TooManyElsewhere { .. } => {
                        !std::mem::replace(&mut known.closed, true)
                    }
                    // What is left is looked at soon.
                    EnrolError::Unguarded(_) => std::mem::replace(&mut known.watched.announced, true),
                    _ => true,
                };
                // What had to be said of a pod that stays closed was said.
                if news {
                    note(chain(&error), false);
                }
                known.watched.doubt();
            }
        }
        if known.closed {
            self.maps.clear_listeners(known.slot);
        } else if let Some(listeners) = &known.listeners
            && self.maps.refill_listeners(known.slot, listeners)
        {
            note("a listener was not in its slot".to_owned(), true);
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
