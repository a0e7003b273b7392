//! One daemon, whoever enrols its pods: waits for what happens, and carries out what its [`Lifecycle`] says.

use std::convert::Infallible;
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;
use tokio::time::Interval;
use tokio::time::MissedTickBehavior;
use ztunnel_runtime::shutdown;

use crate::app::base;
use crate::app::base::Base;
use crate::app::base::Front;
use crate::app::base::Planes;
use crate::app::descriptors::Descriptors;
use crate::app::handover;
use crate::app::handover::Claim;
use crate::app::handover::HandedPod;
use crate::app::handover::Outcome;
use crate::app::lifecycle::Action;
use crate::app::lifecycle::Ending;
use crate::app::lifecycle::Event;
use crate::app::lifecycle::Lifecycle;
use crate::app::lifecycle::Reason;
use crate::app::lifecycle::Seen;
use crate::app::lifecycle::Sockets;
use crate::app::lifecycle::State;
use crate::app::meeting::Meeting;
use crate::app::meeting::called;
use crate::app::meeting::gone;
use crate::app::meeting::orphaned;
use crate::app::memory::Housekeeping;
use crate::app::signals::Signals;

/// How often the pods are compared with what they should be, and it is looked whether there is memory to give back.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How often a daemon that has handed over looks whether somebody serves the node, and how many looks in a row find
/// nobody before it believes that.
const UNSERVED_EVERY: Duration = Duration::from_secs(1);
const UNSERVED_LOOKS: u32 = 3;

/// Nothing of the node could be taken back; why was told.
#[derive(Debug)]
pub(super) struct NotTakenBack;

/// Who says which pods there are, and how they are captured. What has nothing to do for somebody is left out there.
pub(super) trait Enrolment {
    /// What a successor serves the pods with.
    const SOCKETS: Sockets;
    /// What is told when it ends and nobody takes over.
    const STOPPING: &'static str;
    /// What there is to be done while the node is served.
    type Work;

    /// Waits for the next thing to be done. Cancel-safe.
    async fn next(&mut self) -> Self::Work;

    /// Does it. What that means for the daemon, if anything.
    async fn carry_out(&mut self, work: Self::Work) -> Option<Event>;

    /// Looks whether everything is as it should be, every other second.
    async fn look(&mut self) -> Option<Event> {
        None
    }

    /// Goes on while a successor takes over. Cancel-safe.
    async fn go_on_yielding(&mut self) -> Infallible;

    /// Keeps whoever is still connected under the newest policy. Cancel-safe.
    async fn go_on_draining(&mut self) -> Infallible;

    /// Changes nothing of the pods any more. Returns what a successor may have of this daemon.
    async fn yield_pods(&mut self) -> Vec<HandedPod> {
        Vec::new()
    }

    /// Changes the pods again: the successor has not served them.
    async fn reclaim(&mut self) {}

    /// Refuses what the pods open from now on.
    async fn close(&mut self) {}

    /// Changes nothing of the pods ever again.
    async fn detach(&mut self) {}

    /// Keeps nothing of the pods that only the successor needs.
    async fn let_go(&mut self) {}

    /// Removes what the daemon before this one left, now that it is gone.
    async fn sweep(&mut self) {}

    /// Serves the pods again. `departing`: the daemon before this one still has connections.
    async fn take_back(&mut self, _pods: Vec<HandedPod>, _departing: bool) -> Result<(), NotTakenBack> {
        Err(NotTakenBack)
    }
}

/// A daemon that serves.
pub(super) struct Daemon<E> {
    base: Base,
    enrolment: E,
    lifecycle: Lifecycle,
    planes: Planes,
    front: Front,
    meeting: Meeting,
    /// What the successor may have of this daemon, and this daemon needs should it serve again.
    handed: Vec<HandedPod>,
    look: Interval,
    housekeeping: Housekeeping,
    descriptors: Descriptors,
}

/// What happens while the node is served.
enum Happened<W> {
    Work(W),
    Look,
    PredecessorGone,
    Called(Claim),
    PortsDue,
}

impl<E: Enrolment> Daemon<E> {
    /// Serves from now on.
    pub(super) fn new(base: Base, enrolment: E, planes: Planes, front: Front, meeting: Meeting) -> Self {
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            lifecycle: Lifecycle::new(E::SOCKETS, base.config.drain_deadline),
            descriptors: Descriptors::new(&base.readiness),
            base,
            enrolment,
            planes,
            front,
            meeting,
            handed: Vec::new(),
            look,
            housekeeping: Housekeeping::default(),
        }
    }

    /// Serves, hands over, takes back and drains, until the process is to end.
    pub(super) async fn run(mut self) {
        loop {
            let actions = match self.lifecycle.state() {
                State::Serving => {
                    let event = self.serving().await;
                    self.step(event)
                }
                State::Yielding { .. } => {
                    let event = self.yielding().await;
                    self.step(event)
                }
                State::Draining { .. } => self.draining().await,
                State::Ended => break,
            };
            for action in actions {
                if self.carry_out(action).await.is_err() {
                    // What was to follow makes no sense any more, and there is nothing to be done.
                    let _ended = self.step(Event::NotTakenBack);
                    break;
                }
            }
        }
        self.end().await;
    }

    fn step(&mut self, event: Event) -> Vec<Action> {
        let has_all = self.meeting.successor.as_ref().is_some_and(Claim::has_all_pods);
        let can_return = match E::SOCKETS {
            Sockets::Swapped => true,
            // What connects meanwhile waits at the sockets that both have.
            Sockets::Shared => has_all && !self.handed.is_empty(),
        };
        let seen = Seen { now: Instant::now(), has_place: self.meeting.has_place(), can_return };
        self.lifecycle.step(event, seen)
    }

    async fn serving(&mut self) -> Event {
        loop {
            let Self { base, enrolment, lifecycle, front, meeting, look, .. } = self;
            let happened = tokio::select! {
                work = enrolment.next() => Happened::Work(work),
                _ = look.tick() => Happened::Look,
                () = gone(&mut meeting.predecessor) => Happened::PredecessorGone,
                claim = called(meeting.successors.as_ref()) => Happened::Called(claim),
                () = at(front.due()) => Happened::PortsDue,
                () = base.signals.next() => return Event::Told,
                () = at(lifecycle.wake()) => return Event::Tick,
            };
            let event = match happened {
                Happened::Work(work) => self.enrolment.carry_out(work).await,
                Happened::Look => {
                    self.housekeeping.look(LOOK_EVERY);
                    self.descriptors.look();
                    self.enrolment.look().await
                }
                Happened::PredecessorGone => {
                    self.meeting.predecessor = None;
                    Some(Event::PredecessorGone)
                }
                Happened::Called(claim) => {
                    self.meeting.successor = Some(claim);
                    Some(Event::Asked)
                }
                Happened::PortsDue => {
                    self.front.answer_again();
                    None
                }
            };
            if let Some(event) = event {
                return event;
            }
        }
    }

    /// Until the successor serves the node, or is gone, or has taken too long. This daemon goes on meanwhile.
    async fn yielding(&mut self) -> Event {
        let Self { base, enrolment, lifecycle, meeting, handed, .. } = self;
        let Some(claim) = &mut meeting.successor else { return Event::Abandoned };
        tokio::select! {
            outcome = claim.outcome(handed) => match outcome {
                Outcome::Done => Event::Finished,
                Outcome::Abandoned => Event::Abandoned,
            },
            never = enrolment.go_on_yielding() => match never {},
            () = at(lifecycle.wake()) => {
                tracing::error!("the daemon that was taking over does not get ready; taking the node back");
                Event::Tick
            }
            () = base.signals.next() => Event::Told,
        }
    }

    /// Until what is open has ended, or this daemon is to serve again.
    async fn draining(&mut self) -> Vec<Action> {
        let drained = self.planes.drained();
        let Meeting { socket, successors, successor, caller, .. } = &mut self.meeting;
        let orphaned = orphaned(successor.as_mut(), successors.as_ref(), socket.as_deref());
        tokio::pin!(drained, orphaned);
        loop {
            let event = tokio::select! {
                () = &mut drained => Event::Drained,
                is_orphan = &mut orphaned, if self.lifecycle.is_watching() => match is_orphan {
                    true => Event::Orphaned,
                    false => Event::Replaced,
                },
                never = self.enrolment.go_on_draining() => match never {},
                claim = called(successors.as_ref()) => {
                    *caller = Some(claim);
                    Event::Asked
                }
                () = self.base.signals.next() => Event::Told,
                () = at(self.lifecycle.wake()) => Event::Tick,
            };
            // Neither the place nor what the successor has matters any more.
            let seen = Seen { now: Instant::now(), has_place: false, can_return: false };
            let actions = self.lifecycle.step(event, seen);
            if !actions.is_empty() {
                return actions;
            }
            if event == Event::Told {
                tracing::info!("told to stop: stopping already, once the open connections have ended");
            }
        }
    }

    async fn carry_out(&mut self, action: Action) -> Result<(), NotTakenBack> {
        match action {
            Action::Yield => self.handed = self.enrolment.yield_pods().await,
            Action::Reclaim => {
                tracing::warn!("the daemon that was taking over is gone; this one goes on");
                // It must not be told that all is well should it wake up.
                self.meeting.successor = None;
                self.handed.clear();
                self.enrolment.reclaim().await;
            }
            Action::Sweep => self.enrolment.sweep().await,
            Action::StopAnswering(reason) => {
                self.front.stop();
                match reason {
                    Reason::Told => tracing::info!("{}", E::STOPPING),
                    Reason::Superseded => {
                        self.meeting.successor = None;
                        tracing::warn!("stopping: another daemon owns the node");
                    }
                    Reason::HandedOver => tracing::info!("stopping: the node is handed over"),
                }
            }
            Action::Leave => self.meeting.leave().await,
            Action::ClosePods => self.enrolment.close().await,
            Action::Detach => self.enrolment.detach().await,
            Action::LetGo => self.enrolment.let_go().await,
            Action::Vacate => self.meeting.successors = None,
            Action::StopAccepting => self.planes.data_plane.stop_accepting(),
            Action::HandOverSockets => self.planes.hand_over_sockets(),
            Action::Bye => {
                if let Some(successor) = &mut self.meeting.successor {
                    successor.bye().await;
                }
            }
            Action::EndConnections => {
                self.handed.clear();
                self.base.trigger.drain();
            }
            Action::TurnAway => {
                if let Some(caller) = self.meeting.caller.take() {
                    shutdown::spawn(turn_away(caller));
                }
            }
            Action::ForgetReturn => self.handed.clear(),
            Action::TakePlace => {
                tracing::warn!("the daemon that had taken over has died; taking the node back");
                self.meeting.held.extend(self.meeting.successor.take());
                if let Err(error) = self.meeting.take_place() {
                    tracing::error!(error = &error as &dyn std::error::Error, "the pods stay closed");
                    return Err(NotTakenBack);
                }
            }
            Action::TakeBack => {
                let pods = std::mem::take(&mut self.handed);
                self.enrolment.take_back(pods, self.meeting.predecessor.is_some()).await?;
            }
            Action::Answer => {
                self.front.answer_again();
                self.front.keep();
            }
            Action::End(Ending::Deadline) => {
                let open = self.planes.data_plane.live().connections;
                tracing::warn!(open, "the drain deadline has passed; closing what is open");
            }
            Action::End(Ending::ToldTwice) => tracing::warn!("told twice to stop; closing what is open"),
            Action::End(Ending::Drained | Ending::NotTakenBack) => {}
        }
        Ok(())
    }

    /// Ends the data plane, and what is to end with it.
    async fn end(mut self) {
        self.handed.clear();
        self.enrolment.detach().await;
        self.base.trigger.drain();
        base::end(&self.base.trigger, &mut self.base.signals, &self.planes).await;
        // Whoever waits for this daemon to be gone must not take that for the end of the one before it, whose connections
        // need what is in the kernel.
        if E::SOCKETS == Sockets::Swapped
            && !self.meeting.predecessor_gone(self.base.config.drain_deadline).await
        {
            tracing::warn!("the daemon before this one is still there");
        }
        self.meeting.leave().await;
        let Self { base: Base { config, mut signals, .. }, lifecycle, meeting, .. } = self;
        let Meeting { socket, successors, predecessor, successor, held, .. } = meeting;
        drop((held, successor, predecessor, successors));
        if let Some(socket) = socket.filter(|_| config.kept_running && !lifecycle.is_told()) {
            stay(&socket, &mut signals).await;
        }
        tracing::info!("stopped");
    }
}

/// Tells a daemon that starts only that this one still has connections, for as long as its process is there.
async fn turn_away(mut caller: Claim) {
    if caller.outcome(&[]).await == Outcome::Done {
        caller.bye().await;
        std::future::pending::<()>().await;
    }
}

/// Kubernetes starts what has ended again, and that would take the node back from the daemon it was handed to. Waits to
/// be told to stop, or until nobody serves the node any more.
async fn stay(socket: &Path, signals: &mut Signals) {
    tracing::info!("handed over: waiting to be told to stop");
    let mut unserved = 0;
    while unserved < UNSERVED_LOOKS {
        tokio::select! {
            () = signals.next() => return,
            () = tokio::time::sleep(UNSERVED_EVERY) => {
                unserved = if handover::is_served(socket).await { 0 } else { unserved + 1 };
            }
        }
    }
    tracing::warn!("the daemon that had taken over is gone: ending, to be started again");
}

/// Waits for that time, if there is one.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
