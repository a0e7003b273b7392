use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::Strategy;
use proptest::prelude::any;
use proptest::prop_assert;
use proptest::prop_assert_eq;
use proptest::proptest;
use tokio::time::Instant;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::source::loss::STABLE;
use ztunnel_mesh::source::pod::Enrolled;

use crate::enrol::zds::machine::ANSWER_WITHIN;
use crate::enrol::zds::machine::Action;
use crate::enrol::zds::machine::Event;
use crate::enrol::zds::machine::Machine;
use crate::enrol::zds::machine::PODS_MAX;
use crate::enrol::zds::machine::Rejected;
use crate::enrol::zds::machine::Request;

#[derive(Debug, Clone, PartialEq)]
struct Pod {
    uid: PodUid,
    netns: u8,
}

impl Enrolled for Pod {
    fn uid(&self) -> &PodUid {
        &self.uid
    }

    fn shares_netns(&self, other: &Self) -> bool {
        self.netns == other.netns
    }
}

fn uid(name: &str) -> PodUid {
    PodUid::from(name)
}

fn pod(name: &str, netns: u8) -> Pod {
    Pod { uid: uid(name), netns }
}

fn add(name: &str, netns: u8) -> Event<Pod> {
    Event::Message(Ok(Request::Add(pod(name, netns))))
}

fn del(name: &str) -> Event<Pod> {
    Event::Message(Ok(Request::Del(uid(name))))
}

fn keep(name: &str) -> Event<Pod> {
    Event::Message(Ok(Request::Keep(uid(name))))
}

const SENT: Event<Pod> = Event::Message(Ok(Request::SnapshotSent));

fn ok() -> Action<Pod> {
    Action::Ack(Ok(()))
}

struct Node {
    machine: Machine<Pod>,
    now: Instant,
}

impl Node {
    fn new() -> Self {
        Self { machine: Machine::default(), now: Instant::now() }
    }

    fn connected() -> Self {
        let mut node = Self::new();
        assert_eq!(node.step(Event::Connected), [Action::Hello]);
        node
    }

    /// A connected node that serves these, each in a namespace of its own.
    fn serving(names: &[&str]) -> Self {
        let mut node = Self::connected();
        for (netns, name) in (0..=255).cycle().zip(names) {
            node.step(add(name, netns));
            node.step(Event::Captured(uid(name)));
        }
        assert_eq!(node.step(SENT), [ok(), Action::Reconciled]);
        node
    }

    fn step(&mut self, event: Event<Pod>) -> Vec<Action<Pod>> {
        self.machine.step(event, self.now)
    }

    fn pass(&mut self, time: Duration) -> Vec<Action<Pod>> {
        self.now += time;
        self.step(Event::Tick)
    }
}

fn refusal(actions: &[Action<Pod>]) -> &str {
    match actions {
        [Action::Ack(Err(why)), ..] => why,
        other => panic!("no refusal: {other:?}"),
    }
}

#[test]
fn an_add_is_answered_when_the_pod_is_captured() {
    let mut node = Node::connected();
    assert_eq!(node.step(add("a", 1)), [Action::Capture(pod("a", 1))]);
    assert!(node.machine.owes());
    assert_eq!(node.step(Event::Captured(uid("a"))), [ok()]);
    assert!(!node.machine.owes());
}

#[test]
fn the_same_add_again_is_answered_at_once() {
    let mut node = Node::serving(&["a"]);
    assert_eq!(node.step(add("a", 0)), [ok()]);
}

#[test]
fn an_add_with_another_namespace_starts_anew() {
    let mut node = Node::serving(&["a"]);
    assert_eq!(node.step(add("a", 9)), [Action::Release(uid("a"))]);
    assert_eq!(node.step(Event::Released(uid("a"))), [Action::Capture(pod("a", 9))]);
    assert_eq!(node.step(Event::Captured(uid("a"))), [ok()]);
}

#[test]
fn a_capture_of_the_namespace_before_does_not_answer_for_the_new_one() {
    let mut node = Node::connected();
    node.step(add("a", 1));
    node.step(Event::Disconnected);
    node.step(Event::Connected);
    assert_eq!(node.step(add("a", 2)), [], "the first capture is under way");
    assert_eq!(node.step(Event::Captured(uid("a"))), [Action::Release(uid("a"))]);
    assert_eq!(node.step(Event::Released(uid("a"))), [Action::Capture(pod("a", 2))]);
    assert_eq!(node.step(Event::Captured(uid("a"))), [ok()]);
}

#[test]
fn a_failure_is_answered_and_tried_again() {
    let mut node = Node::connected();
    node.step(add("a", 1));
    let failed = node.step(Event::CaptureFailed(uid("a"), "port 15008 is taken".to_owned()));
    assert!(refusal(&failed).ends_with("trying again: port 15008 is taken"), "{failed:?}");
    let due = node.machine.wake().expect("a retry");
    assert_eq!(node.pass(due - node.now), [Action::Capture(pod("a", 1))], "without being asked");
    assert_eq!(node.step(Event::Captured(uid("a"))), [], "nobody waits for an answer");
    assert_eq!(node.step(add("a", 1)), [ok()]);
}

#[test]
fn an_agent_that_asks_again_has_it_tried_again_at_once() {
    let mut node = Node::connected();
    node.step(add("a", 1));
    node.step(Event::CaptureFailed(uid("a"), "no".to_owned()));
    assert_eq!(node.step(add("a", 1)), [Action::Capture(pod("a", 1))]);
    assert_eq!(node.step(Event::Captured(uid("a"))), [ok()]);
}

#[test]
fn a_slow_capture_is_answered_once_in_time_and_goes_on() {
    let mut node = Node::connected();
    node.step(add("a", 1));
    assert_eq!(node.pass(ANSWER_WITHIN - Duration::from_millis(1)), []);
    let late = node.pass(Duration::from_millis(1));
    assert!(refusal(&late).contains("goes on"), "{late:?}");
    assert_eq!(node.step(Event::Captured(uid("a"))), [], "a second answer");
    assert_eq!(node.machine.captured(), 1);
}

#[test]
fn a_snapshot_withdraws_what_is_not_in_it() {
    let mut node = Node::serving(&["a", "b", "c"]);
    node.step(Event::Disconnected);
    assert_eq!(node.machine.captured(), 3, "served without an agent");
    node.step(Event::Connected);
    assert_eq!(node.step(add("a", 0)), [ok()]);
    assert_eq!(node.step(keep("b")), [ok()]);
    assert_eq!(node.step(keep("unknown")), [ok()]);
    assert_eq!(node.step(SENT), [Action::Release(uid("c")), ok(), Action::Reconciled]);
}

#[test]
fn a_snapshot_without_most_pods_is_believed_after_a_while() {
    let mut node = Node::serving(&["a", "b", "c"]);
    let mut again = || {
        node.step(Event::Disconnected);
        node.step(Event::Connected);
        assert_eq!(node.step(SENT), [ok(), Action::Reconciled]);
        assert!(node.machine.doubt().is_some());
        assert_eq!(node.pass(STABLE / 2), []);
        std::mem::replace(&mut node, Node::serving(&["a", "b", "c"]))
    };
    // The agent adds what it learns late, and deletes what is meant.
    let mut late = again();
    assert_eq!(late.step(add("a", 0)), [ok()]);
    assert_eq!(late.step(del("b")), [Action::Release(uid("b")), ok()]);
    assert_eq!(late.pass(STABLE), [Action::Release(uid("c"))]);
    let mut forced = again();
    assert_eq!(forced.step(Event::Confirmed), ["a", "b", "c"].map(|name| Action::Release(uid(name))));
    let mut gone = again();
    gone.step(Event::Disconnected);
    assert_eq!(gone.pass(STABLE), [], "the next snapshot tells");
    assert_eq!(gone.machine.captured(), 3);
}

#[test]
fn a_broken_off_snapshot_withdraws_nothing() {
    let mut node = Node::serving(&["a", "b"]);
    node.step(Event::Disconnected);
    node.step(Event::Connected);
    node.step(add("a", 0));
    node.step(Event::Disconnected);
    assert_eq!(node.machine.captured(), 2);
}

#[test]
fn del_is_taken_at_any_time() {
    let mut node = Node::serving(&["a", "b"]);
    assert_eq!(node.step(del("a")), [Action::Release(uid("a")), ok()]);
    assert_eq!(node.step(del("unknown")), [ok()]);
    node.step(Event::Disconnected);
    node.step(Event::Connected);
    assert_eq!(node.step(del("b")), [Action::Release(uid("b")), ok()], "before the snapshot");
}

#[test]
fn what_breaks_the_protocol_ends_the_connection_only() {
    let broken = || Event::Message(Err(Rejected::Protocol("not protobuf".to_owned())));
    for event in [keep("a"), SENT, broken()] {
        let mut node = Node::serving(&["a"]);
        let actions = node.step(event.clone());
        refusal(&actions);
        assert_eq!(actions[1..], [Action::Close], "{event:?}");
        assert_eq!(node.machine.captured(), 1, "{event:?}");
        assert_eq!(node.step(add("b", 7)), [], "the connection is gone");
    }
}

#[test]
fn a_bad_message_ends_nothing() {
    let mut node = Node::serving(&["a"]);
    let bad = Event::Message(Err(Rejected::Message("Add without a network namespace".to_owned())));
    assert_eq!(node.step(bad), [Action::Ack(Err("Add without a network namespace".to_owned()))]);
    assert_eq!(node.step(add("a", 0)), [ok()]);
}

#[test]
fn there_is_a_most_that_is_served() {
    let names: Vec<String> = (0..PODS_MAX).map(|n| n.to_string()).collect();
    let mut node = Node::serving(&names.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(refusal(&node.step(add("more", 0))).contains("already"));
    assert_eq!(node.step(add("7", 7)), [ok()], "a known one");
    node.step(del("7"));
    assert_eq!(node.step(add("more", 0)), [Action::Capture(pod("more", 0))]);
}

#[test]
fn an_inherited_pod_is_served_without_an_agent() {
    let mut node = Node::new();
    assert_eq!(node.step(Event::Inherited(pod("a", 1))), [Action::Capture(pod("a", 1))]);
    node.step(Event::Captured(uid("a")));
    node.step(Event::Connected);
    assert_eq!(node.step(add("a", 1)), [ok()]);
}

fn message() -> impl Strategy<Value = Result<Request<Pod>, Rejected>> {
    (0..6_u8, 0..4_u8, 0..3_u8).prop_map(|(kind, name, netns)| match kind {
        0 => Ok(Request::Add(pod(&name.to_string(), netns))),
        1 => Ok(Request::Keep(uid(&name.to_string()))),
        2 => Ok(Request::Del(uid(&name.to_string()))),
        3 => Ok(Request::SnapshotSent),
        4 => Err(Rejected::Message("bad".to_owned())),
        _ => Err(Rejected::Protocol("broken".to_owned())),
    })
}

#[derive(Debug, Clone)]
enum Move {
    Message(Result<Request<Pod>, Rejected>),
    Reconnect,
    /// The kernel answers the oldest question: well or not.
    Kernel(bool),
    Wait(u16),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one =
        (0..10_u8, message(), any::<bool>(), 0..4000_u16).prop_map(
            |(kind, message, well, wait)| match kind {
                0..5 => Move::Message(message),
                5 => Move::Reconnect,
                6..9 => Move::Kernel(well),
                _ => Move::Wait(wait),
            },
        );
    vec(one, 0..60)
}

proptest! {
    /// One answer per request and none besides; one step at a time per pod; and when the kernel has caught up, what
    /// is captured is what the agent last said.
    #[test]
    fn the_agent_is_answered_once_and_believed(moves in moves()) {
        let mut node = Node::connected();
        let mut connected = true;
        let mut unanswered = 0;
        let mut asked: Vec<Action<Pod>> = Vec::new();
        let mut captured: BTreeMap<PodUid, u8> = BTreeMap::new();
        // What the agent has said: the pods it wants, and those of the snapshot under way.
        let mut wanted: BTreeMap<PodUid, u8> = BTreeMap::new();
        let mut named: Option<BTreeSet<PodUid>> = Some(BTreeSet::new());
        for step in moves {
            let event = match step {
                Move::Message(_) if !connected || node.machine.owes() => continue,
                Move::Message(message) => {
                    unanswered += 1;
                    match &message {
                        Ok(Request::Add(pod)) => {
                            wanted.insert(pod.uid.clone(), pod.netns);
                            named.iter_mut().for_each(|named| { named.insert(pod.uid.clone()); });
                        }
                        Ok(Request::Keep(uid)) => {
                            named.iter_mut().for_each(|named| { named.insert(uid.clone()); });
                        }
                        Ok(Request::Del(uid)) => {
                            wanted.remove(uid);
                            named.iter_mut().for_each(|named| { named.remove(uid); });
                        }
                        Ok(Request::SnapshotSent) => {
                            if let Some(named) = named.take() {
                                wanted.retain(|uid, _| named.contains(uid));
                            }
                        }
                        Err(_) => {}
                    }
                    Event::Message(message)
                }
                Move::Reconnect => {
                    node.step(Event::Disconnected);
                    (connected, unanswered, named) = (true, 0, Some(BTreeSet::new()));
                    Event::Connected
                }
                Move::Kernel(_) if asked.is_empty() => continue,
                Move::Kernel(well) => match asked.remove(0) {
                    Action::Capture(pod) if well => {
                        captured.insert(pod.uid.clone(), pod.netns);
                        Event::Captured(pod.uid)
                    }
                    Action::Capture(pod) => Event::CaptureFailed(pod.uid, "no".to_owned()),
                    Action::Release(uid) => {
                        captured.remove(&uid);
                        Event::Released(uid)
                    }
                    other => panic!("{other:?}"),
                },
                Move::Wait(ms) => {
                    node.now += Duration::from_millis(ms.into());
                    Event::Tick
                }
            };
            let sent = event == SENT;
            let mut actions = node.step(event);
            if sent {
                // Whatever it leaves out is meant.
                actions.extend(node.step(Event::Confirmed));
            }
            for action in actions {
                match action {
                    Action::Hello | Action::Reconciled => {}
                    Action::Ack(_) => {
                        prop_assert!(unanswered > 0, "an answer to nobody");
                        unanswered -= 1;
                    }
                    Action::Close => (connected, unanswered) = (false, 0),
                    Action::Capture(_) | Action::Release(_) => {
                        let of = |action: &Action<Pod>| match action {
                            Action::Capture(pod) => pod.uid.clone(),
                            Action::Release(uid) => uid.clone(),
                            other => panic!("{other:?}"),
                        };
                        prop_assert!(asked.iter().all(|other| of(other) != of(&action)), "two at a time");
                        asked.push(action);
                    }
                }
            }
            prop_assert_eq!(unanswered > 0, connected && node.machine.owes());
        }
        // The kernel catches up, and no longer fails.
        for _ in 0..1000 {
            if asked.is_empty() {
                node.now += Duration::from_secs(1);
                asked.extend(node.step(Event::Tick).into_iter().filter(|action| {
                    matches!(action, Action::Capture(_) | Action::Release(_))
                }));
            }
            let Some(next) = (!asked.is_empty()).then(|| asked.remove(0)) else { break };
            let event = match next {
                Action::Capture(pod) => {
                    captured.insert(pod.uid.clone(), pod.netns);
                    Event::Captured(pod.uid)
                }
                Action::Release(uid) => {
                    captured.remove(&uid);
                    Event::Released(uid)
                }
                other => panic!("{other:?}"),
            };
            asked.extend(node.step(event).into_iter().filter(|action| {
                matches!(action, Action::Capture(_) | Action::Release(_))
            }));
        }
        prop_assert_eq!(captured, wanted);
    }
}

#[test]
fn why_a_pod_failed_is_forgotten_with_the_pod() {
    let mut node = Node::serving(&[]);
    for number in 0..10 {
        let name = format!("u{number}");
        node.step(add(&name, 1));
        // Its capture takes longer than the agent waits, and fails after the agent has given it up.
        assert!(refusal(&node.pass(ANSWER_WITHIN)).contains("that goes on"));
        node.step(del(&name));
        node.step(Event::CaptureFailed(uid(&name), "no".to_owned()));
        node.step(Event::Released(uid(&name)));
    }
    assert_eq!(node.machine.failures(), 0);
}
