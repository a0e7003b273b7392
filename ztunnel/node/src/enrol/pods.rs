//! The life of every enrolled pod, as a machine: event in, actions out.
//!
//! ```text
//!                Captured                      removed
//!  Capturing ───────────────▶ Captured ─────────────────────▶ Releasing ──Released──▶ (gone)
//!   ▲   │ ▲                      │ changed                        │ ▲          or Capturing,
//!   │   │ └──────────────────────┘                          failed│ │retry     if wanted again
//!   │   │ CaptureFailed                                           ▼ │
//!   └─ Retrying (back-off) ──removed──▶ Releasing              (waiting)
//! ```
//!
//! The machine never blocks and never reads the clock; the program (`ztunnel::app`) carries its actions out and tells
//! it how they went. A pod that is being captured is not interrupted: what was asked of it meanwhile is
//! remembered and done next. A capture is idempotent, so a changed pod is captured again without being
//! released first: it is never open in between.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::source::pod::Enrolled;
use ztunnel_mesh::source::pod::LocalPod;

/// First wait after a failed capture or release.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest wait: a network namespace that comes late is not captured until then.
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// What can happen to enrolment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<P = LocalPod> {
    /// These, and no others, are to be enrolled.
    Desired(Vec<P>),
    /// This one, too, is to be enrolled. Asked for again after a failure it is tried again at once.
    Wanted(P),
    /// This one is no longer to be enrolled.
    Unwanted(PodUid),
    /// The pod's traffic now reaches the daemon.
    Captured(PodUid),
    /// It could not be captured. One that was captured is captured anew, and not released meanwhile: it stays closed.
    CaptureFailed(PodUid),
    /// What was captured is gone; another network namespace may be there under the same path.
    Lost(PodUid),
    /// Nothing of the daemon is left in the pod.
    Released(PodUid),
    /// Something of the daemon may be left in the pod.
    ReleaseFailed(PodUid),
    /// Time has passed: see [`Action::WakeAt`].
    Tick,
}

/// What is to be done about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action<P = LocalPod> {
    /// Redirect this pod's traffic to the daemon, or bring the redirection up to date.
    Capture(P),
    /// Undo that.
    Release(PodUid),
    /// Send [`Event::Tick`] at this time (the latest such request counts).
    WakeAt(Instant),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// `Capture` was asked for and not answered.
    Capturing,
    Captured,
    /// The last capture failed; the next is due then.
    Retrying {
        at: Instant,
        backoff: Duration,
    },
    /// `Release` was asked for and not answered.
    Releasing {
        backoff: Duration,
    },
    /// The last release failed; the next is due then.
    Stuck {
        at: Instant,
        backoff: Duration,
    },
}

#[derive(Debug, Clone)]
struct Pod<P> {
    phase: Phase,
    /// What the source last said; `None` when it wants the pod released.
    wanted: Option<P>,
    /// What the last `Capture` was asked with.
    asked: Option<P>,
    /// How long to wait should the capture under way fail.
    backoff: Duration,
}

/// All pods of this node that are enrolled or on their way in or out.
#[derive(Debug)]
pub struct Pods<P = LocalPod> {
    pods: BTreeMap<PodUid, Pod<P>>,
}

/// How far one pod is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is not to be enrolled.
    Unwanted,
    /// Its traffic reaches the daemon, as the source last said.
    Captured,
    /// That is under way.
    Busy,
    /// It was tried and failed; it will be tried again.
    Failing,
}

impl<P> Default for Pods<P> {
    fn default() -> Self {
        Self { pods: BTreeMap::new() }
    }
}

impl<P: Enrolled> Pods<P> {
    /// Advances enrolment by one event.
    pub fn step(&mut self, event: Event<P>, now: Instant) -> Vec<Action<P>> {
        let mut actions = Vec::new();
        match event {
            Event::Desired(pods) => self.desire(pods, &mut actions),
            Event::Wanted(pod) => self.want(pod, &mut actions),
            Event::Unwanted(uid) => {
                if let Some(pod) = self.pods.get_mut(&uid) {
                    pod.wanted = None;
                    settle(&uid, pod, &mut actions);
                }
            }
            Event::Captured(uid) => {
                if let Some(pod) = self.pods.get_mut(&uid)
                    && pod.phase == Phase::Capturing
                {
                    pod.phase = Phase::Captured;
                    pod.backoff = BACKOFF_MIN;
                    settle(&uid, pod, &mut actions);
                }
            }
            Event::CaptureFailed(uid) => {
                if let Some(pod) = self.pods.get_mut(&uid)
                    && matches!(pod.phase, Phase::Capturing | Phase::Captured)
                {
                    pod.phase = Phase::Retrying { at: now + pod.backoff, backoff: pod.backoff };
                    settle(&uid, pod, &mut actions);
                }
            }
            Event::Lost(uid) => {
                if let Some(pod) = self.pods.get_mut(&uid)
                    && pod.phase == Phase::Captured
                {
                    release(&uid, pod, &mut actions);
                }
            }
            Event::Released(uid) => {
                if let Some(pod) = self.pods.get_mut(&uid)
                    && matches!(pod.phase, Phase::Releasing { .. })
                {
                    match pod.wanted.clone() {
                        Some(wanted) => capture(pod, wanted, &mut actions),
                        None => {
                            self.pods.remove(&uid);
                        }
                    }
                }
            }
            Event::ReleaseFailed(uid) => {
                if let Some(pod) = self.pods.get_mut(&uid)
                    && let Phase::Releasing { backoff } = pod.phase
                {
                    pod.phase = Phase::Stuck { at: now + backoff, backoff };
                }
            }
            Event::Tick => self.retry(now, &mut actions),
        }
        if let Some(at) = self.next_retry() {
            actions.push(Action::WakeAt(at));
        }
        actions
    }

    /// Pods whose traffic reaches the daemon.
    pub fn captured(&self) -> usize {
        self.pods.values().filter(|pod| pod.phase == Phase::Captured).count()
    }

    /// Pods that should be captured and are not (yet).
    pub fn pending(&self) -> usize {
        self.pods.values().filter(|pod| pod.wanted.is_some() && pod.phase != Phase::Captured).count()
    }

    /// The pods that should be captured and are not (yet).
    pub fn waiting(&self) -> impl Iterator<Item = &P> {
        let waiting = self.pods.values().filter(|pod| pod.phase != Phase::Captured);
        waiting.filter_map(|pod| pod.wanted.as_ref())
    }

    /// Whether nothing is under way: every pod that should be captured is, and of no other anything is left.
    pub fn is_settled(&self) -> bool {
        self.pods.values().all(|pod| pod.phase == Phase::Captured)
    }

    /// Pods of which something may be in the kernel.
    pub fn known(&self) -> impl Iterator<Item = &PodUid> {
        self.pods.keys()
    }

    /// How far a pod is.
    pub fn standing(&self, uid: &PodUid) -> Standing {
        let Some(pod) = self.pods.get(uid).filter(|pod| pod.wanted.is_some()) else {
            return Standing::Unwanted;
        };
        match pod.phase {
            Phase::Captured => Standing::Captured,
            Phase::Retrying { .. } => Standing::Failing,
            Phase::Capturing | Phase::Releasing { .. } | Phase::Stuck { .. } => Standing::Busy,
        }
    }

    /// Pods that are to be enrolled, as the source last said.
    pub fn wanted(&self) -> impl Iterator<Item = &P> {
        self.pods.values().filter_map(|pod| pod.wanted.as_ref())
    }

    /// When the next failed step is due.
    pub fn next_retry(&self) -> Option<Instant> {
        let due = |pod: &Pod<P>| match pod.phase {
            Phase::Retrying { at, .. } | Phase::Stuck { at, .. } => Some(at),
            _ => None,
        };
        self.pods.values().filter_map(due).min()
    }

    fn want(&mut self, local: P, actions: &mut Vec<Action<P>>) {
        let uid = local.uid().clone();
        match self.pods.get_mut(&uid) {
            Some(pod) => {
                let again = matches!(pod.phase, Phase::Retrying { .. }) && pod.asked.as_ref() == Some(&local);
                pod.wanted = Some(local.clone());
                match again {
                    true => capture(pod, local, actions),
                    false => settle(&uid, pod, actions),
                }
            }
            None => self.add(local, actions),
        }
    }

    fn add(&mut self, local: P, actions: &mut Vec<Action<P>>) {
        let mut pod =
            Pod { phase: Phase::Capturing, wanted: Some(local.clone()), asked: None, backoff: BACKOFF_MIN };
        let uid = local.uid().clone();
        capture(&mut pod, local, actions);
        self.pods.insert(uid, pod);
    }

    fn desire(&mut self, desired: Vec<P>, actions: &mut Vec<Action<P>>) {
        let mut gone: BTreeMap<&PodUid, &mut Pod<P>> = self.pods.iter_mut().collect();
        let mut new = Vec::new();
        for local in desired {
            match gone.remove(local.uid()) {
                Some(pod) => {
                    let uid = local.uid().clone();
                    pod.wanted = Some(local);
                    settle(&uid, pod, actions);
                }
                None => new.push(local),
            }
        }
        for (uid, pod) in gone {
            pod.wanted = None;
            settle(uid, pod, actions);
        }
        for local in new {
            self.add(local, actions);
        }
    }

    fn retry(&mut self, now: Instant, actions: &mut Vec<Action<P>>) {
        for (uid, pod) in &mut self.pods {
            match pod.phase {
                Phase::Retrying { at, backoff } if at <= now => {
                    let Some(wanted) = pod.wanted.clone() else { continue };
                    pod.backoff = (backoff * 2).min(BACKOFF_MAX);
                    capture(pod, wanted, actions);
                }
                Phase::Stuck { at, backoff } if at <= now => {
                    pod.phase = Phase::Releasing { backoff: (backoff * 2).min(BACKOFF_MAX) };
                    actions.push(Action::Release(uid.clone()));
                }
                _ => {}
            }
        }
    }
}

/// Brings a pod that is at rest nearer to what is wanted of it. A pod that is busy is left alone: it
/// comes here again when it is done.
fn settle<P: Enrolled>(uid: &PodUid, pod: &mut Pod<P>, actions: &mut Vec<Action<P>>) {
    let at_rest = matches!(pod.phase, Phase::Captured | Phase::Retrying { .. });
    if !at_rest {
        return;
    }
    match pod.wanted.clone() {
        None => release(uid, pod, actions),
        Some(wanted) if pod.asked.as_ref() == Some(&wanted) => {}
        // Another network namespace under the same name: what is in the old one must go first.
        Some(wanted) if pod.asked.as_ref().is_some_and(|asked| !asked.shares_netns(&wanted)) => {
            release(uid, pod, actions);
        }
        Some(wanted) => capture(pod, wanted, actions),
    }
}

fn capture<P: Enrolled>(pod: &mut Pod<P>, wanted: P, actions: &mut Vec<Action<P>>) {
    pod.phase = Phase::Capturing;
    pod.asked = Some(wanted.clone());
    actions.push(Action::Capture(wanted));
}

fn release<P>(uid: &PodUid, pod: &mut Pod<P>, actions: &mut Vec<Action<P>>) {
    pod.phase = Phase::Releasing { backoff: BACKOFF_MIN };
    pod.asked = None;
    actions.push(Action::Release(uid.clone()));
}

#[cfg(test)]
mod tests;
