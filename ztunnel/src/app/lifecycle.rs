//! When a daemon serves its node, hands it over, takes it back and ends: a pure machine.
//!
//! ```text
//!              asked                finished, told to stop
//!  Serving ───────────▶ Yielding ────────────────────────▶ Draining ──▶ Ended
//!   ▲ │  ▲                 │                                 │  ▲ drained, deadline, told twice
//!   │ │  └─────────────────┘ abandoned, too late             │  │
//!   │ └──────────────────────────────────────────────────────┼──┘ told to stop, superseded
//!   └────────────────────────────────────────────────────────┘ orphaned: the successor has died
//! ```
//!
//! Events come in, actions go out, in the order in which they are to be carried out. The module
//! `daemon` waits for the events and carries the actions out; who enrols the pods says what they mean.
//! The tests play daemons against each other in virtual time, and kill them between any two actions.

use std::time::Duration;

use tokio::time::Instant;

/// How long a successor may take from its first word to its last.
pub const TAKE_OVER_WITHIN: Duration = Duration::from_secs(60);

/// What a successor serves the pods with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sockets {
    /// Its own: the programs in the kernel redirect to these from then on. Whoever asks while this daemon drains is told
    /// that it still has connections.
    Swapped,
    /// The same as this daemon: what waits at them is for whoever accepts. A daemon that drains is not asked.
    Shared,
}

/// What happens to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Another daemon asks for the node.
    Asked,
    /// The successor serves the node.
    Finished,
    /// The successor is gone, and does not serve.
    Abandoned,
    /// A signal, or the request over HTTP.
    Told,
    /// Another daemon owns the node, and has not asked.
    Superseded,
    /// Nothing says any more what to serve: the process ends.
    SourceEnded,
    /// The process of the daemon before this one has ended.
    PredecessorGone,
    /// The last open connection has ended.
    Drained,
    /// The successor has died, and nobody is in its place.
    Orphaned,
    /// The successor has ended on purpose, or somebody is in its place.
    Replaced,
    /// An action of taking the node back has failed.
    NotTakenBack,
    /// It is the time that [`Lifecycle::wake`] names.
    Tick,
}

/// What is true outside when an event comes.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// The time.
    pub now: Instant,
    /// Successors find this daemon where they ask, and no other one.
    pub has_place: bool,
    /// This daemon could serve again should the successor die: that one has everything which that needs.
    pub can_return: bool,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Change nothing of the pods any more, and say so to the successor.
    Yield,
    /// Forget the successor, and change the pods again.
    Reclaim,
    /// Remove what the daemon before this one left.
    Sweep,
    /// Stop to answer operators, and to keep certificates.
    StopAnswering(Reason),
    /// Say to the daemon before this one that the end is meant.
    Leave,
    /// Refuse what the pods open from now on.
    ClosePods,
    /// Change nothing of the pods ever again.
    Detach,
    /// Keep nothing of the pods that only the successor needs now.
    LetGo,
    /// Leave the place where successors ask.
    Vacate,
    /// Take what is queued at the listeners, then close them.
    StopAccepting,
    /// Accept nothing any more, at once: what is queued is another daemon's.
    HandOverSockets,
    /// Say to the successor that this daemon's ports are free.
    Bye,
    /// Have connections end that can.
    EndConnections,
    /// Answer a daemon that asks, as this one drains.
    TurnAway,
    /// The node is not taken back any more: keep nothing for that.
    ForgetReturn,
    /// Take the place where successors ask, unless this daemon has it.
    TakePlace,
    /// Serve the pods again.
    TakeBack,
    /// Answer operators again.
    Answer,
    /// End the process.
    End(Ending),
}

/// Why the daemon stops serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It was told to, and nobody has taken over.
    Told,
    /// Another daemon has its place.
    Superseded,
    /// Another daemon took over.
    HandedOver,
}

/// Why the drain is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Nothing is open any more.
    Drained,
    /// Time is up.
    Deadline,
    /// Whoever told it to stop does not want to wait.
    ToldTwice,
    /// It should have served again, and could not.
    NotTakenBack,
}

/// Where the daemon is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It serves the node.
    Serving,
    /// It serves what it has, and changes nothing: a successor takes over.
    Yielding {
        /// When it is too late for that.
        deadline: Instant,
    },
    /// It takes nothing new.
    Draining {
        /// When what is open is closed.
        deadline: Instant,
        /// It serves again should its successor die.
        watching: bool,
    },
    /// The process is to end.
    Ended,
}

/// The machine.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    sockets: Sockets,
    drain_deadline: Duration,
    state: State,
    /// It was told to stop.
    told: bool,
    /// It was told to stop before it took the node back, and serves until then.
    until: Option<Instant>,
}

impl Lifecycle {
    /// Of a daemon that serves its node from now on. Once it does not, connections may go on for `drain_deadline`.
    pub fn new(sockets: Sockets, drain_deadline: Duration) -> Self {
        Self { sockets, drain_deadline, state: State::Serving, told: false, until: None }
    }

    /// Where it is.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether it was told to stop.
    pub fn is_told(&self) -> bool {
        self.told
    }

    /// Whether the death of the successor matters.
    pub fn is_watching(&self) -> bool {
        matches!(self.state, State::Draining { watching: true, .. })
    }

    /// When to step with [`Event::Tick`].
    pub fn wake(&self) -> Option<Instant> {
        match self.state {
            State::Serving => self.until,
            State::Yielding { deadline } | State::Draining { deadline, .. } => Some(deadline),
            State::Ended => None,
        }
    }

    /// Advances by one event. What does not matter where the daemon is changes nothing.
    #[must_use]
    pub fn step(&mut self, event: Event, seen: Seen) -> Vec<Action> {
        let is_due = event == Event::Tick && self.wake().is_some_and(|at| at <= seen.now);
        match (self.state, event) {
            (State::Serving, Event::Asked) => {
                self.state = State::Yielding { deadline: seen.now + TAKE_OVER_WITHIN };
                vec![Action::Yield]
            }
            (State::Serving, Event::PredecessorGone) => vec![Action::Sweep],
            (State::Serving, Event::Told | Event::SourceEnded) => self.stop(seen),
            (State::Serving, Event::Tick) if is_due => self.stop(seen),
            (State::Serving | State::Yielding { .. }, Event::Superseded) => self.superseded(seen),
            (State::Yielding { .. }, Event::Finished) => self.handed_over(seen),
            // The successor has what it has, and takes the rest.
            (State::Yielding { .. }, Event::Told) => {
                self.told = true;
                self.handed_over(seen)
            }
            (State::Yielding { .. }, Event::Abandoned) => self.abandoned(seen),
            (State::Yielding { .. }, Event::Tick) if is_due => self.abandoned(seen),
            (State::Draining { .. }, Event::Drained) => self.end(Ending::Drained),
            (State::Draining { .. }, Event::Tick) if is_due => self.end(Ending::Deadline),
            (State::Draining { .. }, Event::Told) if self.told => self.end(Ending::ToldTwice),
            (State::Draining { .. }, Event::Told) => {
                // Whoever replaced this daemon stops it now: that is no reason to cut connections off.
                self.told = true;
                Vec::new()
            }
            (State::Draining { deadline, .. }, Event::Asked) => {
                // The node is that daemon's from now on.
                self.state = State::Draining { deadline, watching: false };
                vec![Action::TurnAway]
            }
            (State::Draining { deadline, watching: true }, Event::Replaced) => {
                self.state = State::Draining { deadline, watching: false };
                vec![Action::ForgetReturn]
            }
            (State::Draining { deadline, watching: true }, Event::Orphaned) => {
                self.until = self.told.then_some(deadline);
                self.state = State::Serving;
                // First the place: who starts now is to find this daemon.
                vec![Action::TakePlace, Action::TakeBack, Action::Answer]
            }
            (State::Serving, Event::NotTakenBack) => self.end(Ending::NotTakenBack),
            _ => Vec::new(),
        }
    }

    /// Nobody serves the pods from here on.
    fn stop(&mut self, seen: Seen) -> Vec<Action> {
        self.told = true;
        self.drain(seen, false);
        let stop = Action::StopAnswering(Reason::Told);
        match self.sockets {
            // Nobody comes any more: what is queued is taken, and that is all.
            Sockets::Swapped => vec![
                stop,
                Action::Leave,
                Action::ClosePods,
                Action::Detach,
                Action::EndConnections,
                Action::HandOverSockets,
            ],
            // Until the linger is over the listeners share their ports with whoever else has them.
            Sockets::Shared => {
                vec![stop, Action::Detach, Action::Vacate, Action::Leave, Action::EndConnections]
            }
        }
    }

    /// Another daemon serves the pods, and changes them.
    fn superseded(&mut self, seen: Seen) -> Vec<Action> {
        self.drain(seen, false);
        let stop = Action::StopAnswering(Reason::Superseded);
        match self.sockets {
            Sockets::Swapped => vec![stop, Action::Detach, Action::EndConnections, Action::StopAccepting],
            Sockets::Shared => vec![stop, Action::Detach, Action::Vacate, Action::EndConnections],
        }
    }

    /// The successor serves the pods.
    fn handed_over(&mut self, seen: Seen) -> Vec<Action> {
        self.drain(seen, seen.can_return);
        let stop = Action::StopAnswering(Reason::HandedOver);
        let mut actions = match self.sockets {
            // The data plane has its own hold on the listeners, and lets go of them after its linger.
            Sockets::Swapped => vec![stop, Action::Bye, Action::LetGo, Action::StopAccepting],
            // Before anybody is told that the pods' connections are to go elsewhere.
            Sockets::Shared => {
                vec![stop, Action::Detach, Action::Vacate, Action::HandOverSockets, Action::Bye]
            }
        };
        if !seen.can_return {
            actions.push(Action::EndConnections);
        }
        actions
    }

    /// Nobody takes over after all.
    fn abandoned(&mut self, seen: Seen) -> Vec<Action> {
        if !seen.has_place {
            // Another successor has come and gone by since then, or rather has stayed.
            return self.superseded(seen);
        }
        self.state = State::Serving;
        vec![Action::Reclaim]
    }

    fn drain(&mut self, seen: Seen, watching: bool) {
        let deadline = self.until.unwrap_or(seen.now + self.drain_deadline);
        self.state = State::Draining { deadline, watching };
    }

    fn end(&mut self, why: Ending) -> Vec<Action> {
        self.state = State::Ended;
        vec![Action::End(why)]
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
