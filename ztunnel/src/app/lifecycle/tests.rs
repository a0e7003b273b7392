//! Every transition, by table.

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

const DRAIN: Duration = Duration::from_secs(30);
const EVENTS: [Event; 12] = [
    Event::Asked,
    Event::Finished,
    Event::Abandoned,
    Event::Told,
    Event::Superseded,
    Event::SourceEnded,
    Event::PredecessorGone,
    Event::Drained,
    Event::Orphaned,
    Event::Replaced,
    Event::NotTakenBack,
    Event::Tick,
];

fn at(now: Instant) -> Seen {
    Seen { now, has_place: true, can_return: true }
}

/// A machine after `events`, and when it began.
fn after(sockets: Sockets, events: &[Event]) -> (Lifecycle, Instant) {
    let (mut machine, now) = (Lifecycle::new(sockets, DRAIN), Instant::now());
    for event in events {
        let _actions = machine.step(*event, at(now));
    }
    (machine, now)
}

#[test]
fn a_daemon_that_serves() {
    use Action::*;
    let now = Instant::now();
    for sockets in [Sockets::Swapped, Sockets::Shared] {
        let (mut told, mut superseded) = match sockets {
            Sockets::Swapped => (
                vec![Leave, ClosePods, Detach, EndConnections, HandOverSockets],
                vec![Detach, EndConnections, StopAccepting],
            ),
            Sockets::Shared => {
                (vec![Detach, Vacate, Leave, EndConnections], vec![Detach, Vacate, EndConnections])
            }
        };
        told.insert(0, StopAnswering(Reason::Told));
        superseded.insert(0, StopAnswering(Reason::Superseded));
        for (event, expected) in [
            (Event::Asked, vec![Yield]),
            (Event::PredecessorGone, vec![Sweep]),
            (Event::Told, told.clone()),
            (Event::SourceEnded, told),
            (Event::Superseded, superseded),
            (Event::NotTakenBack, vec![End(Ending::NotTakenBack)]),
            (Event::Finished, vec![]),
            (Event::Abandoned, vec![]),
            (Event::Drained, vec![]),
            (Event::Orphaned, vec![]),
            (Event::Replaced, vec![]),
            (Event::Tick, vec![]),
        ] {
            let mut machine = Lifecycle::new(sockets, DRAIN);
            assert_eq!(machine.step(event, at(now)), expected, "{sockets:?} {event:?}");
            let state = match event {
                Event::Asked => State::Yielding { deadline: now + TAKE_OVER_WITHIN },
                Event::Told | Event::SourceEnded | Event::Superseded => {
                    State::Draining { deadline: now + DRAIN, watching: false }
                }
                Event::NotTakenBack => State::Ended,
                _ => State::Serving,
            };
            assert_eq!(machine.state(), state, "{sockets:?} {event:?}");
        }
    }
}

#[test]
fn a_daemon_that_yields_hands_over_in_the_order_that_its_sockets_need() {
    use Action::*;
    let stop = StopAnswering(Reason::HandedOver);
    for (sockets, expected) in [
        (Sockets::Swapped, vec![stop, Bye, LetGo, StopAccepting]),
        (Sockets::Shared, vec![stop, Detach, Vacate, HandOverSockets, Bye]),
    ] {
        for (event, can_return) in
            [(Event::Finished, true), (Event::Finished, false), (Event::Told, true), (Event::Told, false)]
        {
            let (mut machine, now) = after(sockets, &[Event::Asked]);
            let actions = machine.step(event, Seen { can_return, ..at(now) });
            let mut expected = expected.clone();
            if !can_return {
                expected.push(EndConnections);
            }
            assert_eq!(actions, expected, "{sockets:?} {event:?}");
            assert_eq!(machine.state(), State::Draining { deadline: now + DRAIN, watching: can_return });
            assert_eq!(machine.is_told(), event == Event::Told);
        }
    }
}

#[test]
fn a_daemon_whose_successor_does_not_finish_goes_on_unless_it_has_lost_its_place() {
    for sockets in [Sockets::Swapped, Sockets::Shared] {
        for (event, after_) in [(Event::Abandoned, Duration::ZERO), (Event::Tick, TAKE_OVER_WITHIN)] {
            let (mut machine, start) = after(sockets, &[Event::Asked]);
            let now = start + after_ + Duration::from_secs(1);
            assert_eq!(machine.step(event, at(now)), [Action::Reclaim], "{event:?}");
            assert_eq!(machine.state(), State::Serving);

            let (mut machine, _) = after(sockets, &[Event::Asked]);
            let actions = machine.step(event, Seen { has_place: false, ..at(now) });
            assert_eq!(actions[0], Action::StopAnswering(Reason::Superseded), "{event:?}");
            assert!(!machine.is_watching());
        }
        let (mut machine, start) = after(sockets, &[Event::Asked]);
        assert_eq!(machine.step(Event::Tick, at(start)), [], "it is not late yet");
    }
}

#[test]
fn what_does_not_matter_to_a_daemon_that_yields_or_drains_changes_nothing() {
    use Action::*;
    for sockets in [Sockets::Swapped, Sockets::Shared] {
        let (machine, _) = after(sockets, &[Event::Asked]);
        for event in [
            Event::Asked,
            Event::SourceEnded,
            Event::PredecessorGone,
            Event::Drained,
            Event::Orphaned,
            Event::Replaced,
        ] {
            let mut machine = machine.clone();
            let (state, now) = (machine.state(), Instant::now());
            assert_eq!(machine.step(event, at(now)), [], "{event:?}");
            assert_eq!(machine.state(), state);
        }
        let (stopped, now) = after(sockets, &[Event::Told]);
        let deadline = stopped.wake().unwrap();
        let quiet = State::Draining { deadline, watching: false };
        let mut twice = stopped.clone();
        assert_eq!(twice.step(Event::Told, at(now)), [End(Ending::ToldTwice)]);
        let mut asked = stopped.clone();
        assert_eq!((asked.step(Event::Asked, at(now)), asked.state()), (vec![TurnAway], quiet));
        let mut drained = stopped.clone();
        assert_eq!(drained.step(Event::Drained, at(now)), [End(Ending::Drained)]);
        let mut late = stopped.clone();
        assert_eq!(late.step(Event::Tick, at(deadline)), [End(Ending::Deadline)]);
        for event in
            [Event::Orphaned, Event::Replaced, Event::Superseded, Event::NotTakenBack, Event::Finished]
        {
            let mut machine = stopped.clone();
            assert_eq!((machine.step(event, at(now)), machine.state()), (vec![], quiet), "{event:?}");
        }
        let (ended, now) = after(sockets, &[Event::Told, Event::Drained]);
        for event in EVENTS {
            let mut machine = ended.clone();
            assert_eq!((machine.step(event, at(now)), machine.state()), (vec![], State::Ended), "{event:?}");
        }
    }
}

#[test]
fn a_daemon_that_has_handed_over_serves_again_when_its_successor_dies_and_only_then() {
    use Action::*;
    for sockets in [Sockets::Swapped, Sockets::Shared] {
        let handed = [Event::Asked, Event::Finished];
        let back = [TakePlace, TakeBack, Answer];
        let (mut machine, now) = after(sockets, &handed);
        assert_eq!(machine.step(Event::Orphaned, at(now)), back);
        assert_eq!((machine.state(), machine.wake()), (State::Serving, None));
        assert_eq!(machine.step(Event::NotTakenBack, at(now)), [End(Ending::NotTakenBack)]);

        for meanwhile in [Event::Replaced, Event::Asked] {
            let (mut machine, now) = after(sockets, &handed);
            let expected = if meanwhile == Event::Asked { TurnAway } else { ForgetReturn };
            assert_eq!(machine.step(meanwhile, at(now)), [expected]);
            assert_eq!(machine.step(Event::Orphaned, at(now)), [], "{meanwhile:?}");
            assert!(!machine.is_watching());
        }
    }
}

#[test]
fn a_daemon_told_to_stop_meanwhile_serves_again_no_longer_than_it_would_have_drained() {
    for events in [
        // Told before the successor had finished, and after.
        [Event::Asked, Event::Told, Event::Orphaned].as_slice(),
        &[Event::Asked, Event::Finished, Event::Told, Event::Orphaned],
    ] {
        let (mut machine, start) = after(Sockets::Swapped, events);
        let until = machine.wake().expect("an end");
        assert_eq!(machine.state(), State::Serving);
        assert!(until >= start + DRAIN);
        assert_eq!(machine.step(Event::Tick, at(until)).first(), Some(&Action::StopAnswering(Reason::Told)));
        assert_eq!(machine.step(Event::Tick, at(until)), [Action::End(Ending::Deadline)]);
    }
}
