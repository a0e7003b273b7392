//! Daemons of one node against each other, in virtual time.
//!
//! The machines are the real ones. Around them stands a model of what they act on: the place where successors ask, the
//! owner of the kernel and the pods' redirection in it, the sockets, the connections between daemons, and processes that
//! die. A daemon carries out one action at a time; between any two of them another daemon may act, a message may arrive,
//! or a process may be killed, hang or be told to stop. Who is next is drawn by a seed, so that a failure can be repeated.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

use super::Action;
use super::Ending;
use super::Event;
use super::Lifecycle;
use super::Reason;
use super::Seen;
use super::Sockets;
use super::State;
use super::TAKE_OVER_WITHIN;

/// How long a starting daemon waits for an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How often a daemon looks whether it owns the kernel.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long connections go on that nobody ends.
const CONNECTIONS: Duration = Duration::from_secs(20);
/// How long connections go on that are told to end.
const ENDING: Duration = Duration::from_secs(3);
const DRAIN: Duration = Duration::from_secs(30);
const PODS: usize = 2;
/// More than any run needs.
const STEPS_MAX: usize = 2000;

/// What one daemon hears of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Message {
    Ask,
    Yielded,
    Done,
    Bye,
    Watch,
    Leave,
    /// The process at the other end is gone.
    Closed,
}

/// How far a start is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Ask,
    /// Until then an answer is waited for.
    AwaitYielded(Instant),
    Open,
    Capture(usize),
    Done,
    AwaitBye(Instant),
    Watch,
    Place,
    Over,
}

#[derive(Debug)]
struct Daemon {
    machine: Lifecycle,
    start: Start,
    /// The process is there.
    alive: bool,
    /// It does nothing, and its sockets stay open.
    hangs: bool,
    actions: VecDeque<Action>,
    inbox: VecDeque<(usize, Message)>,
    /// Who has asked and was not looked at yet.
    calls: VecDeque<usize>,
    /// The one that takes over, or has.
    successor: Option<usize>,
    /// Other daemons that were told only that this one drains.
    turned_away: Vec<usize>,
    predecessor: Option<usize>,
    /// It has what is in the kernel open, and may try to change that.
    attached: bool,
    yielded: bool,
    accepts: bool,
    place_open: bool,
    /// When its last connection ends.
    drained: Option<Instant>,
    look: Instant,
    /// It has refused the pods on purpose, or was told to stop: nobody may expect it to serve.
    stopped: bool,
    /// It has said that its end is meant.
    left: bool,
    /// It found that another one owns the node.
    superseded: bool,
    /// How long its start took.
    started_after: Option<Duration>,
    born: Instant,
    ended: Option<Ending>,
}

struct Node {
    sockets: Sockets,
    now: Instant,
    /// Whose socket is found where successors ask.
    place: Option<usize>,
    /// The newest generation.
    owner: Option<usize>,
    /// Whose sockets each pod's connections are redirected to. With shared sockets not used.
    pods: [Option<usize>; PODS],
    daemons: Vec<Daemon>,
    random: u64,
    steps: usize,
    /// For how long nobody has served, though somebody could.
    dark: Duration,
    darkest: Duration,
    /// What has happened to which daemon, and what it has done.
    log: Vec<(usize, Box<dyn fmt::Debug>)>,
}

/// What is done to a daemon, at which step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    Kill,
    Tell,
    Hang,
    /// Another daemon starts.
    Start,
}

impl Node {
    fn new(sockets: Sockets, seed: u64) -> Self {
        let mut node = Self {
            sockets,
            now: Instant::now(),
            place: None,
            owner: None,
            pods: [None; PODS],
            daemons: Vec::new(),
            random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            steps: 0,
            dark: Duration::ZERO,
            darkest: Duration::ZERO,
            log: Vec::new(),
        };
        node.start();
        // The first daemon serves before anything happens.
        while node.daemons[0].start != Start::Over {
            node.act(0);
        }
        node
    }

    fn start(&mut self) {
        self.daemons.push(Daemon {
            machine: Lifecycle::new(self.sockets, DRAIN),
            start: Start::Ask,
            alive: true,
            hangs: false,
            actions: VecDeque::new(),
            inbox: VecDeque::new(),
            calls: VecDeque::new(),
            successor: None,
            turned_away: Vec::new(),
            predecessor: None,
            attached: false,
            yielded: false,
            accepts: false,
            place_open: false,
            drained: None,
            look: self.now + LOOK_EVERY,
            stopped: false,
            left: false,
            superseded: false,
            started_after: None,
            born: self.now,
            ended: None,
        });
    }

    fn draw(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % below as u64) as usize
    }

    fn send(&mut self, from: usize, to: usize, message: Message) {
        if self.daemons[to].alive {
            self.daemons[to].inbox.push_back((from, message));
        }
    }

    /// The process is gone, and with it its ends of all connections.
    fn gone(&mut self, id: usize) {
        let daemon = &mut self.daemons[id];
        (daemon.alive, daemon.accepts, daemon.attached, daemon.place_open) = (false, false, false, false);
        daemon.actions.clear();
        for other in 0..self.daemons.len() {
            if other != id {
                self.send(id, other, Message::Closed);
            }
        }
    }

    fn is_served(&self) -> bool {
        self.place.is_some_and(|id| self.daemons[id].alive && self.daemons[id].place_open)
    }

    fn seen(&self, id: usize) -> Seen {
        let has_place = self.place == Some(id) && self.daemons[id].place_open;
        Seen { now: self.now, has_place, can_return: true }
    }

    fn event(&mut self, id: usize, event: Event) {
        let seen = self.seen(id);
        self.log.push((id, Box::new((event, self.daemons[id].machine.state()))));
        let actions = self.daemons[id].machine.step(event, seen);
        if event == Event::NotTakenBack {
            self.daemons[id].actions.clear();
        }
        self.daemons[id].actions.extend(actions);
    }

    /// Changes the kernel as the owner, which only one can be; false for anybody else.
    fn change(&mut self, id: usize) -> bool {
        assert!(self.daemons[id].attached, "{id} has let go of the kernel for ever");
        self.owner == Some(id)
    }

    fn carry_out(&mut self, id: usize, action: Action) {
        self.log.push((id, Box::new(action)));
        let swapped = self.sockets == Sockets::Swapped;
        match action {
            Action::Yield => {
                self.daemons[id].yielded = true;
                let successor = self.daemons[id].successor.expect("a successor");
                self.send(id, successor, Message::Yielded);
            }
            Action::Reclaim => {
                let gone = self.daemons[id].successor.take().expect("a successor");
                self.send(id, gone, Message::Closed);
                self.daemons[id].yielded = false;
                if swapped {
                    self.owner = Some(id);
                    assert!(self.change(id));
                    self.pods = [Some(id); PODS];
                }
            }
            Action::Leave => {
                self.daemons[id].left = true;
                if let Some(predecessor) = self.daemons[id].predecessor {
                    self.send(id, predecessor, Message::Leave);
                }
            }
            Action::ClosePods => {
                if self.change(id) {
                    self.pods = [None; PODS];
                }
            }
            Action::Detach => {
                self.daemons[id].attached = false;
                if !swapped && self.daemons[id].machine.state() != State::Serving {
                    self.daemons[id].accepts = false;
                }
            }
            Action::Vacate => {
                self.daemons[id].place_open = false;
                if self.place == Some(id) {
                    self.place = None;
                }
            }
            Action::StopAccepting | Action::HandOverSockets => self.daemons[id].accepts = false,
            Action::Bye => {
                let successor = self.daemons[id].successor.expect("a successor");
                self.send(id, successor, Message::Bye);
            }
            Action::EndConnections => {
                let at = self.now + ENDING;
                let drained = &mut self.daemons[id].drained;
                *drained = Some(drained.map_or(at, |before| before.min(at)));
            }
            Action::TurnAway => {
                let caller = *self.daemons[id].turned_away.last().expect("a caller");
                self.send(id, caller, Message::Yielded);
            }
            Action::TakePlace => {
                self.place = Some(id);
                self.daemons[id].place_open = true;
            }
            Action::TakeBack => {
                let daemon = &self.daemons[id];
                assert!(!daemon.stopped, "{id} was stopped on purpose, and serves again");
                let successor = daemon.successor.expect("a successor");
                assert!(
                    !self.daemons[successor].left,
                    "{successor} was stopped on purpose, and {id} serves for it"
                );
                let alive = daemon.turned_away.iter().find(|caller| self.daemons[**caller].alive);
                assert_eq!(alive, None, "{id} takes the node from a daemon that it has told to go on");
                let daemon = &mut self.daemons[id];
                (daemon.accepts, daemon.yielded, daemon.drained) = (true, false, None);
                daemon.successor = None;
                if swapped {
                    self.owner = Some(id);
                    assert!(self.change(id));
                    self.pods = [Some(id); PODS];
                } else {
                    self.daemons[id].attached = true;
                }
            }
            Action::StopAnswering(reason) => {
                self.daemons[id].stopped |= reason != Reason::HandedOver;
                self.daemons[id].superseded |= reason == Reason::Superseded;
                self.daemons[id].drained = Some(self.now + CONNECTIONS);
            }
            Action::End(ending) => {
                self.daemons[id].ended = Some(ending);
                if self.place == Some(id) {
                    self.place = None;
                }
                if let Some(predecessor) = self.daemons[id].predecessor {
                    self.send(id, predecessor, Message::Leave);
                }
                self.gone(id);
            }
            Action::Sweep | Action::LetGo | Action::ForgetReturn | Action::Answer => {}
        }
    }

    /// One step of a start.
    fn advance(&mut self, id: usize) {
        self.log.push((id, Box::new(self.daemons[id].start)));
        let swapped = self.sockets == Sockets::Swapped;
        let next = match self.daemons[id].start {
            Start::Ask if self.is_served() => {
                let place = self.place.expect("a place");
                self.daemons[id].predecessor = Some(place);
                self.send(id, place, Message::Ask);
                Start::AwaitYielded(self.now + ANSWER_WITHIN)
            }
            // The other did not answer, and is overruled.
            Start::Ask | Start::AwaitYielded(_) => Start::Open,
            Start::Open => {
                self.daemons[id].accepts = true;
                self.daemons[id].attached = true;
                if swapped {
                    self.owner = Some(id);
                    Start::Capture(0)
                } else {
                    Start::Done
                }
            }
            Start::Capture(pod) => {
                // One that was overruled meanwhile captures nothing, and finds that out later.
                if self.change(id) {
                    self.pods[pod] = Some(id);
                }
                if pod + 1 < PODS { Start::Capture(pod + 1) } else { Start::Done }
            }
            Start::Done => match self.daemons[id].predecessor {
                Some(predecessor) => {
                    self.send(id, predecessor, Message::Done);
                    Start::AwaitBye(self.now + ANSWER_WITHIN)
                }
                None => Start::Place,
            },
            Start::AwaitBye(_) => Start::Watch,
            Start::Watch => {
                let predecessor = self.daemons[id].predecessor.expect("a predecessor");
                self.send(id, predecessor, Message::Watch);
                Start::Place
            }
            Start::Place => {
                self.place = Some(id);
                self.daemons[id].place_open = true;
                let daemon = &mut self.daemons[id];
                (daemon.look, daemon.started_after) = (self.now + LOOK_EVERY, Some(self.now - daemon.born));
                Start::Over
            }
            Start::Over => Start::Over,
        };
        self.daemons[id].start = next;
    }

    fn hear(&mut self, id: usize, from: usize, message: Message) {
        self.log.push((id, Box::new((message, from))));
        let state = self.daemons[id].machine.state();
        let is_successor = self.daemons[id].successor == Some(from);
        let is_predecessor = self.daemons[id].predecessor == Some(from);
        match message {
            Message::Ask => self.daemons[id].calls.push_back(from),
            Message::Yielded => {
                if is_predecessor && matches!(self.daemons[id].start, Start::AwaitYielded(_)) {
                    self.daemons[id].start = Start::Open;
                }
            }
            Message::Done if is_successor => self.event(id, Event::Finished),
            Message::Done => {
                if self.daemons[id].turned_away.contains(&from) {
                    self.send(id, from, Message::Bye);
                } else {
                    // It was overruled: what it missed is in its backlog.
                    self.daemons[id].inbox.push_back((from, Message::Done));
                }
            }
            Message::Bye => {
                if is_predecessor && matches!(self.daemons[id].start, Start::AwaitBye(_)) {
                    self.daemons[id].start = Start::Watch;
                }
            }
            Message::Watch => {}
            Message::Leave if is_successor => self.event(id, Event::Replaced),
            Message::Leave => {}
            Message::Closed => {
                self.daemons[id].calls.retain(|caller| *caller != from);
                self.daemons[id].inbox.retain(|(sender, _)| *sender != from);
                if is_successor && matches!(state, State::Yielding { .. }) {
                    self.event(id, Event::Abandoned);
                } else if is_successor && self.daemons[id].machine.is_watching() {
                    let has_place = self.seen(id).has_place;
                    let replaced = !has_place && self.is_served();
                    self.event(id, if replaced { Event::Replaced } else { Event::Orphaned });
                }
                if is_predecessor {
                    match self.daemons[id].start {
                        // Neither answers any more.
                        Start::AwaitYielded(_) => self.daemons[id].start = Start::Open,
                        Start::AwaitBye(_) => self.daemons[id].start = Start::Watch,
                        Start::Over => self.event(id, Event::PredecessorGone),
                        _ => {}
                    }
                    self.daemons[id].predecessor = None;
                    if self.daemons[id].start == Start::Watch {
                        self.daemons[id].start = Start::Place;
                    }
                }
            }
        }
    }

    /// Whether a daemon can do something now.
    fn is_ready(&self, id: usize) -> bool {
        let daemon = &self.daemons[id];
        let waits = matches!(daemon.start, Start::AwaitYielded(_) | Start::AwaitBye(_));
        daemon.alive
            && !daemon.hangs
            && (!daemon.actions.is_empty()
                || self.can_hear(id)
                || self.can_take_call(id)
                || (daemon.start != Start::Over && !waits))
    }

    fn can_hear(&self, id: usize) -> bool {
        let daemon = &self.daemons[id];
        daemon.inbox.iter().any(|message| self.is_heard(id, *message))
    }

    /// What was said by somebody whose call is not taken yet waits.
    fn is_heard(&self, id: usize, (from, message): (usize, Message)) -> bool {
        let daemon = &self.daemons[id];
        message != Message::Done || daemon.successor == Some(from) || daemon.turned_away.contains(&from)
    }

    fn can_take_call(&self, id: usize) -> bool {
        let daemon = &self.daemons[id];
        let state = daemon.machine.state();
        !daemon.calls.is_empty()
            && daemon.start == Start::Over
            && matches!(state, State::Serving | State::Draining { .. })
    }

    fn act(&mut self, id: usize) {
        if let Some(action) = self.daemons[id].actions.pop_front() {
            return self.carry_out(id, action);
        }
        let heard = self.daemons[id].inbox.iter().position(|message| self.is_heard(id, *message));
        if let Some((from, message)) = heard.and_then(|at| self.daemons[id].inbox.remove(at)) {
            return self.hear(id, from, message);
        }
        if self.can_take_call(id) {
            let caller = self.daemons[id].calls.pop_front().expect("a call");
            match self.daemons[id].machine.state() {
                State::Serving => self.daemons[id].successor = Some(caller),
                _ => self.daemons[id].turned_away.push(caller),
            }
            return self.event(id, Event::Asked);
        }
        self.advance(id);
    }

    /// When something happens to a daemon by itself, and what.
    fn due(&self, id: usize) -> Option<Instant> {
        let daemon = &self.daemons[id];
        if !daemon.alive || daemon.hangs {
            return None;
        }
        match daemon.start {
            Start::AwaitYielded(at) | Start::AwaitBye(at) => return Some(at),
            Start::Over => {}
            _ => return None,
        }
        let look = (daemon.machine.state() == State::Serving).then_some(daemon.look);
        let drained = daemon.drained.filter(|_| matches!(daemon.machine.state(), State::Draining { .. }));
        [daemon.machine.wake(), look, drained].into_iter().flatten().min()
    }

    fn happen(&mut self, id: usize) {
        let daemon = &self.daemons[id];
        if daemon.start != Start::Over {
            self.advance(id);
        } else if matches!(daemon.machine.state(), State::Draining { .. })
            && daemon.drained.is_some_and(|at| at <= self.now)
        {
            self.event(id, Event::Drained);
        } else if daemon.machine.wake().is_some_and(|at| at <= self.now) {
            self.event(id, Event::Tick);
        } else {
            self.daemons[id].look = self.now + LOOK_EVERY;
            let is_owner = self.owner == Some(id) || self.daemons[id].yielded;
            if self.sockets == Sockets::Swapped && !is_owner {
                self.event(id, Event::Superseded);
            }
        }
    }

    /// Whether every pod's new connections find somebody.
    fn serves(&self) -> bool {
        let accepts =
            |id: usize| self.daemons[id].alive && !self.daemons[id].hangs && self.daemons[id].accepts;
        match self.sockets {
            Sockets::Swapped => self.pods.iter().all(|pod| pod.is_some_and(accepts)),
            Sockets::Shared => (0..self.daemons.len()).any(accepts),
        }
    }

    /// Whether somebody is there who should see to it that the pods are served.
    fn could_serve(&self) -> bool {
        self.daemons.iter().any(|daemon| {
            daemon.alive
                && !daemon.hangs
                && !daemon.stopped
                && !matches!(daemon.machine.state(), State::Draining { watching: false, .. } | State::Ended)
        })
    }

    /// Does one thing; false when nothing will ever happen again.
    fn step(&mut self) -> bool {
        self.steps += 1;
        assert!(self.steps < STEPS_MAX, "it does not end");
        let ready: Vec<usize> = (0..self.daemons.len()).filter(|id| self.is_ready(*id)).collect();
        if !ready.is_empty() {
            let id = ready[self.draw(ready.len())];
            self.act(id);
            return true;
        }
        let next = (0..self.daemons.len()).filter_map(|id| Some((self.due(id)?, id))).min();
        let Some((at, id)) = next else { return false };
        let later = at.max(self.now);
        if self.serves() || !self.could_serve() {
            self.dark = Duration::ZERO;
        } else {
            self.dark += later - self.now;
            self.darkest = self.darkest.max(self.dark);
        }
        self.now = later;
        self.happen(id);
        true
    }

    fn blow(&mut self, id: usize, blow: Blow) {
        if blow == Blow::Start {
            return self.start();
        }
        if id >= self.daemons.len() || !self.daemons[id].alive {
            return;
        }
        self.log.push((id, Box::new(blow)));
        match blow {
            Blow::Kill => self.gone(id),
            Blow::Hang => self.daemons[id].hangs = true,
            // A start that is told to stop before it serves ends.
            Blow::Tell if self.daemons[id].start != Start::Over => self.gone(id),
            Blow::Tell => self.event(id, Event::Told),
            Blow::Start => {}
        }
    }

    /// For so long, and no longer than something happens.
    fn run_for(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until && self.step() {}
    }

    /// What must be true once things have calmed down.
    fn settled(&mut self) {
        let serving: Vec<usize> = (0..self.daemons.len())
            .filter(|id| {
                let daemon = &self.daemons[*id];
                daemon.alive && !daemon.hangs && daemon.machine.state() == State::Serving && !daemon.yielded
            })
            .collect();
        if self.sockets == Sockets::Swapped {
            assert!(serving.len() <= 1, "{serving:?} change the kernel");
        }
        if self.could_serve() {
            assert!(self.serves(), "nobody serves, and somebody could");
        }
    }

    /// The same where no third daemon came between two.
    fn settled_as_two(&self) {
        let superseded = self.daemons.iter().position(|daemon| daemon.superseded);
        assert_eq!(superseded, None, "a daemon ends that nobody has replaced");
        for (id, daemon) in self.daemons.iter().enumerate() {
            if daemon.alive && daemon.start == Start::Over && daemon.machine.state() == State::Serving {
                assert!(daemon.hangs || self.seen(id).has_place, "{id} serves, and is not found");
            }
        }
    }

    /// Whoever is there is told to stop, and does.
    fn end(&mut self) {
        for id in 0..self.daemons.len() {
            self.daemons[id].hangs = false;
            self.blow(id, Blow::Tell);
        }
        self.run_for(DRAIN + TAKE_OVER_WITHIN);
        for (id, daemon) in self.daemons.iter().enumerate() {
            assert!(!daemon.alive, "{id} does not end: {:?}", daemon.machine.state());
        }
    }
}

/// Prints what has happened, if it ends badly.
struct Told<'a>(&'a mut Node, String);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} ({:?}):", self.1, self.0.sockets);
            self.0.log.iter().for_each(|(id, entry)| eprintln!("  {id}: {entry:?}"));
        }
    }
}

/// The longest that the pods may be refused where processes die: two answers that do not come, and a look.
const DARK_MAX: Duration = Duration::from_secs(6);

/// Runs one node to its end, with blows at their steps.
fn play(sockets: Sockets, seed: u64, blows: &[(usize, usize, Blow)], check: impl FnOnce(&Node)) {
    let mut node = Node::new(sockets, seed);
    let told = Told(&mut node, format!("seed {seed}, {blows:?}"));
    let node = &mut *told.0;
    let has = |wanted| blows.iter().any(|(.., blow)| *blow == wanted);
    let hangs = has(Blow::Hang);
    node.start();
    let (mut number, begun) = (0, node.now);
    // As long as it takes a drain and a take-over that hangs, and to find out.
    let until = begun + 2 * TAKE_OVER_WITHIN + DRAIN;
    while node.now < until {
        for (at, id, blow) in blows {
            if *at == number {
                node.blow(*id, *blow);
            }
        }
        number += 1;
        if !node.step() && blows.iter().all(|(at, ..)| *at < number) {
            break;
        }
    }
    node.settled();
    if !hangs && !has(Blow::Start) {
        node.settled_as_two();
    }
    check(node);
    let dark_max = if hangs { TAKE_OVER_WITHIN + DARK_MAX } else { DARK_MAX };
    assert!(node.darkest <= dark_max, "nobody served for {:?}", node.darkest);
    node.end();
}

const BOTH: [Sockets; 2] = [Sockets::Swapped, Sockets::Shared];
/// A take-over and the drain after it take no more steps.
const TAKE_OVER_STEPS: usize = 60;

#[test]
fn a_daemon_takes_over_from_another() {
    for sockets in BOTH {
        for seed in 0..50 {
            play(sockets, seed, &[], |node| {
                let [old, new] = &node.daemons[..] else { panic!("two") };
                assert_eq!(old.ended, Some(Ending::Drained));
                assert!(new.alive && new.machine.state() == State::Serving && !new.yielded);
                assert_eq!(new.started_after, Some(Duration::ZERO), "it has waited for an answer");
            });
        }
    }
}

#[test]
fn whoever_is_killed_at_whichever_step_the_pods_are_served() {
    for sockets in BOTH {
        for seed in 0..20 {
            for at in 0..TAKE_OVER_STEPS {
                for victim in [0, 1] {
                    play(sockets, seed, &[(at, victim, Blow::Kill)], |_| {});
                }
            }
        }
    }
}

#[test]
fn whoever_is_told_to_stop_or_hangs_at_whichever_step_the_other_serves() {
    for sockets in BOTH {
        for seed in 0..10 {
            for at in 0..TAKE_OVER_STEPS {
                for victim in [0, 1] {
                    for blow in [Blow::Tell, Blow::Hang] {
                        play(sockets, seed, &[(at, victim, blow)], |_| {});
                    }
                }
            }
        }
    }
}

#[test]
fn three_daemons_and_a_kill_at_each_step() {
    for sockets in BOTH {
        for seed in 0..3 {
            for third in (0..TAKE_OVER_STEPS).step_by(3) {
                for at in 0..TAKE_OVER_STEPS {
                    for victim in [0, 1, 2] {
                        play(sockets, seed, &[(third, 0, Blow::Start), (at, victim, Blow::Kill)], |_| {});
                    }
                }
            }
        }
    }
}

#[test]
fn two_kills_or_a_stop_and_a_kill() {
    for sockets in BOTH {
        for seed in 0..2 {
            for first in (0..TAKE_OVER_STEPS).step_by(2) {
                for second in (first..TAKE_OVER_STEPS).step_by(2) {
                    for (one, blow) in [(0, Blow::Tell), (1, Blow::Tell), (1, Blow::Kill)] {
                        for other in [0, 1] {
                            play(sockets, seed, &[(first, one, blow), (second, other, Blow::Kill)], |_| {});
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn whoever_hangs_a_daemon_that_starts_later_serves_and_is_found() {
    for sockets in BOTH {
        for seed in 0..3 {
            for at in 0..TAKE_OVER_STEPS {
                for third in (at..at + 30).step_by(3) {
                    for victim in [0, 1] {
                        play(sockets, seed, &[(at, victim, Blow::Hang), (third, 0, Blow::Start)], |node| {
                            let found = &node.daemons[node.place.expect("a daemon that is found")];
                            assert!(found.alive && !found.hangs && !found.yielded);
                            assert_eq!(found.machine.state(), State::Serving);
                        });
                    }
                }
            }
        }
    }
}
