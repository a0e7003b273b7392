//! What the agent's messages mean: event in, actions out.
//!
//! ```text
//!  (away) ──Connected──▶ Snapshot ──SnapshotSent──▶ Live
//!    ▲                       │                        │
//!    └──────Disconnected, or the agent broke the protocol
//! ```
//!
//! Never blocks and never reads the clock. Pods are enrolled and withdrawn by the same machine as those of a mesh
//! file ([`Pods`]); this one adds who is owed an answer. Whatever the agent sends, a pod that is enrolled stays so
//! until a well-formed Del, or a whole snapshot without it; and if that is without most pods, until it has been so for
//! a while ([`ztunnel_mesh::source::loss`]).

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::source::loss::Caution;
use ztunnel_mesh::source::loss::Change;
use ztunnel_mesh::source::loss::Verdict;
use ztunnel_mesh::source::pod::Enrolled;

use crate::enrol::pods;
use crate::enrol::pods::Pods;
use crate::enrol::pods::Standing;

/// An Add that takes longer is answered with an error, and goes on. The agent's own patience is 5 seconds, which
/// include the way there and back.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// Pods a node may have. Further ones are refused.
pub const PODS_MAX: usize = 1024;

/// What the agent asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Request<P> {
    /// Enrol this pod.
    Add(P),
    /// The agent knows the pod, but not its network namespace: it stays if it is enrolled.
    Keep(PodUid),
    /// Withdraw this pod.
    Del(PodUid),
    /// The snapshot is complete.
    SnapshotSent,
}

/// Why a message is no request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// What it says cannot be done; the next message may be better.
    #[error("{0}")]
    Message(String),
    /// The two sides no longer understand each other: only a new connection helps.
    #[error("protocol error: {0}")]
    Protocol(String),
}

/// What can happen.
#[derive(Debug, Clone, PartialEq)]
pub enum Event<P> {
    /// There is an agent.
    Connected,
    /// It has sent a message.
    Message(Result<Request<P>, Rejected>),
    /// It is gone.
    Disconnected,
    /// This pod was enrolled by an earlier daemon, which has handed it over.
    Inherited(P),
    /// The pod's traffic now reaches the daemon.
    Captured(PodUid),
    /// It could not be captured, and why.
    CaptureFailed(PodUid, String),
    /// Nothing of the daemon is left in the pod.
    Released(PodUid),
    /// What is in doubt is meant.
    Confirmed,
    /// Time has passed: see [`Machine::wake`].
    Tick,
}

/// What is to be done about it.
#[derive(Debug, Clone, PartialEq)]
pub enum Action<P> {
    /// Say hello to the agent.
    Hello,
    /// Acknowledge its request; the error if there is one.
    Ack(Result<(), String>),
    /// Close the connection; another one may be made.
    Close,
    /// Take this pod's traffic.
    Capture(P),
    /// No longer take it.
    Release(PodUid),
    /// The agent's snapshot is carried out: each of its pods has been tried.
    Reconciled,
}

#[derive(Debug)]
struct Connection {
    /// The pods named so far, until the snapshot is complete.
    snapshot: Option<BTreeSet<PodUid>>,
    /// The Add that is not answered, and until when it must be.
    owed: Option<(PodUid, Instant)>,
}

/// Enrolment by a node agent.
#[derive(Debug)]
pub struct Machine<P> {
    pods: Pods<P>,
    /// Why pods that are [`Standing::Failing`] are.
    failures: BTreeMap<PodUid, String>,
    connection: Option<Connection>,
    /// A snapshot without most of the pods that are enrolled, until it is believed.
    doubted: Caution<BTreeSet<PodUid>>,
}

impl<P> Default for Machine<P> {
    fn default() -> Self {
        Self {
            pods: Pods::default(),
            failures: BTreeMap::new(),
            connection: None,
            doubted: Caution::default(),
        }
    }
}

impl<P: Enrolled> Machine<P> {
    /// Advances by one event.
    pub fn step(&mut self, event: Event<P>, now: Instant) -> Vec<Action<P>> {
        let mut actions = Vec::new();
        match event {
            Event::Connected => {
                // What the one before left out is told by the next snapshot.
                self.doubted.forget();
                self.connection = Some(Connection { snapshot: Some(BTreeSet::new()), owed: None });
                actions.push(Action::Hello);
            }
            Event::Disconnected => {
                self.connection = None;
                self.doubted.forget();
            }
            Event::Message(message) => self.message(message, now, &mut actions),
            Event::Inherited(pod) => self.enrol(pods::Event::Wanted(pod), now, &mut actions),
            Event::Captured(uid) => {
                self.failures.remove(&uid);
                self.enrol(pods::Event::Captured(uid), now, &mut actions);
            }
            Event::CaptureFailed(uid, why) => {
                self.enrol(pods::Event::CaptureFailed(uid.clone()), now, &mut actions);
                // Nobody asks for the reason of one that was withdrawn meanwhile, so nobody would forget it.
                if self.pods.standing(&uid) == Standing::Failing {
                    self.failures.insert(uid, why);
                }
            }
            Event::Released(uid) => self.enrol(pods::Event::Released(uid), now, &mut actions),
            Event::Confirmed => {
                if let Some(named) = self.doubted.confirm() {
                    self.reconcile(&named, now, &mut actions);
                }
            }
            Event::Tick => {
                let pods = &self.pods;
                let again = |named: &BTreeSet<PodUid>| Change::of_list(pods.wanted().map(P::uid), named);
                if let Some(named) = self.doubted.again(again, now) {
                    self.reconcile(&named, now, &mut actions);
                }
                self.enrol(pods::Event::Tick, now, &mut actions);
            }
        }
        self.answer_owed(now, &mut actions);
        actions
    }

    /// When [`Event::Tick`] is due.
    pub fn wake(&self) -> Option<Instant> {
        let owed = self.connection.as_ref().and_then(|connection| connection.owed.as_ref());
        let others = [self.pods.next_retry(), self.doubted.wake()];
        owed.map(|(_, by)| *by).into_iter().chain(others.into_iter().flatten()).min()
    }

    /// Whether the agent waits for an answer: its next message is to be read only after that.
    pub fn owes(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.owed.is_some())
    }

    /// Pods that are enrolled, or are to be.
    pub fn wanted(&self) -> impl Iterator<Item = &P> {
        self.pods.wanted()
    }

    /// Pods whose traffic reaches the daemon.
    pub fn captured(&self) -> usize {
        self.pods.captured()
    }

    /// Pods whose traffic should, and does not (yet).
    pub fn waiting(&self) -> impl Iterator<Item = &P> {
        self.pods.waiting()
    }

    /// What of the agent's snapshot is in doubt, and how it was judged.
    pub fn doubt(&self) -> Option<(&Change, Verdict)> {
        self.doubted.doubt()
    }

    /// For how many pods it is kept why they failed.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn failures(&self) -> usize {
        self.failures.len()
    }

    /// How many those are.
    pub fn pending(&self) -> usize {
        self.pods.pending()
    }

    fn message(&mut self, message: Result<Request<P>, Rejected>, now: Instant, actions: &mut Vec<Action<P>>) {
        let Some(connection) = &mut self.connection else { return };
        if connection.owed.is_some() {
            let early = Rejected::Protocol("a request before the last one was answered".to_owned());
            return self.reject(early, actions);
        }
        match message {
            Ok(Request::Add(pod)) => {
                let uid = pod.uid().clone();
                if self.pods.standing(&uid) == Standing::Unwanted && self.pods.wanted().count() >= PODS_MAX {
                    let full = format!("this node serves {PODS_MAX} pods already");
                    return self.reject(Rejected::Message(full), actions);
                }
                if let Some(named) = connection.snapshot.as_mut().or_else(|| self.doubted.version_mut()) {
                    named.insert(uid.clone());
                }
                connection.owed = Some((uid, now + ANSWER_WITHIN));
                self.enrol(pods::Event::Wanted(pod), now, actions);
            }
            Ok(Request::Keep(uid)) => match &mut connection.snapshot {
                // What is not enrolled cannot be kept, nor need it be remembered.
                Some(named) => {
                    if self.pods.standing(&uid) != Standing::Unwanted {
                        named.insert(uid);
                    }
                    actions.push(Action::Ack(Ok(())));
                }
                None => self.reject(Rejected::Protocol("Keep after the snapshot".to_owned()), actions),
            },
            Ok(Request::Del(uid)) => {
                if let Some(named) = &mut connection.snapshot {
                    named.remove(&uid);
                }
                self.failures.remove(&uid);
                self.enrol(pods::Event::Unwanted(uid), now, actions);
                actions.push(Action::Ack(Ok(())));
            }
            Ok(Request::SnapshotSent) => match connection.snapshot.take() {
                Some(named) => {
                    let change = Change::of_list(self.pods.wanted().map(P::uid), &named);
                    if let Some(named) = self.doubted.offer(named, change, now) {
                        self.reconcile(&named, now, actions);
                    }
                    actions.extend([Action::Ack(Ok(())), Action::Reconciled]);
                }
                None => self.reject(Rejected::Protocol("a second SnapshotSent".to_owned()), actions),
            },
            Err(rejected) => self.reject(rejected, actions),
        }
    }

    /// Withdraws what the agent no longer knows.
    fn reconcile(&mut self, named: &BTreeSet<PodUid>, now: Instant, actions: &mut Vec<Action<P>>) {
        let gone: Vec<PodUid> =
            self.pods.wanted().map(|pod| pod.uid().clone()).filter(|uid| !named.contains(uid)).collect();
        for uid in gone {
            self.failures.remove(&uid);
            self.enrol(pods::Event::Unwanted(uid), now, actions);
        }
    }

    fn reject(&mut self, rejected: Rejected, actions: &mut Vec<Action<P>>) {
        // Exactly one answer per request: if one is owed still, this is it.
        actions.push(Action::Ack(Err(rejected.to_string())));
        if let Rejected::Protocol(_) = rejected {
            actions.push(Action::Close);
            self.connection = None;
        }
    }

    fn enrol(&mut self, event: pods::Event<P>, now: Instant, actions: &mut Vec<Action<P>>) {
        for action in self.pods.step(event, now) {
            match action {
                pods::Action::Capture(pod) => actions.push(Action::Capture(pod)),
                pods::Action::Release(uid) => actions.push(Action::Release(uid)),
                // See `wake`.
                pods::Action::WakeAt(_) => {}
            }
        }
    }

    /// Answers the Add that is not answered, if it can be by now.
    fn answer_owed(&mut self, now: Instant, actions: &mut Vec<Action<P>>) {
        let Some(connection) = &mut self.connection else { return };
        let Some((uid, by)) = &connection.owed else { return };
        let answer = match self.pods.standing(uid) {
            Standing::Captured => Ok(()),
            Standing::Failing => Err(match self.failures.get(uid) {
                Some(why) => format!("pod {uid} is not served, trying again: {why}"),
                None => format!("pod {uid} is not served, trying again"),
            }),
            Standing::Unwanted => Err(format!("pod {uid} was withdrawn meanwhile")),
            Standing::Busy if now >= *by => {
                Err(format!("pod {uid} is not served after {ANSWER_WITHIN:?}; that goes on"))
            }
            Standing::Busy => return,
        };
        connection.owed = None;
        actions.push(Action::Ack(answer));
    }
}

#[cfg(test)]
mod tests;
