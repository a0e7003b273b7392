use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::Strategy;
use proptest::prelude::any;
use proptest::prop_assert;
use proptest::prop_assert_eq;
use proptest::proptest;
use tokio::time::Instant;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::source::pod::LocalPod;

use crate::enrol::pods::Action;
use crate::enrol::pods::Event;
use crate::enrol::pods::Pods;

fn pod(name: &str, netns: &str) -> LocalPod {
    LocalPod {
        uid: PodUid::from(name),
        workload: Arc::from(name),
        namespace: Arc::from("ns"),
        name: Arc::from(name),
        netns: PathBuf::from(netns),
        addresses: vec!["10.0.0.1".parse().unwrap()],
    }
}

fn uid(name: &str) -> PodUid {
    PodUid::from(name)
}

struct Machine {
    pods: Pods,
    now: Instant,
}

impl Machine {
    fn new() -> Self {
        Self { pods: Pods::default(), now: Instant::now() }
    }

    fn step(&mut self, event: Event) -> Vec<Action> {
        self.pods.step(event, self.now)
    }
}

#[test]
fn a_pod_is_captured_once_however_often_it_is_named() {
    let mut machine = Machine::new();
    let a = pod("a", "/a");
    assert_eq!(machine.step(Event::Desired(vec![a.clone()])), [Action::Capture(a.clone())]);
    assert_eq!(machine.step(Event::Desired(vec![a.clone()])), []);
    assert_eq!(machine.step(Event::Captured(uid("a"))), []);
    assert_eq!(machine.step(Event::Desired(vec![a])), []);
    assert_eq!((machine.pods.captured(), machine.pods.pending()), (1, 0));
}

#[test]
fn a_pod_removed_while_it_is_captured_is_released_afterwards() {
    let mut machine = Machine::new();
    machine.step(Event::Desired(vec![pod("a", "/a")]));
    assert_eq!(machine.step(Event::Desired(vec![])), []);
    assert_eq!(machine.step(Event::Captured(uid("a"))), [Action::Release(uid("a"))]);
    assert_eq!(machine.step(Event::Released(uid("a"))), []);
    assert_eq!(machine.pods.known().count(), 0);
}

#[test]
fn added_removed_added_ends_captured() {
    let mut machine = Machine::new();
    let a = pod("a", "/a");
    machine.step(Event::Desired(vec![a.clone()]));
    machine.step(Event::Captured(uid("a")));
    assert_eq!(machine.step(Event::Desired(vec![])), [Action::Release(uid("a"))]);
    assert_eq!(machine.step(Event::Desired(vec![a.clone()])), []);
    assert_eq!(machine.step(Event::Released(uid("a"))), [Action::Capture(a)]);
}

#[test]
fn a_changed_address_is_captured_without_being_released() {
    let mut machine = Machine::new();
    machine.step(Event::Desired(vec![pod("a", "/a")]));
    machine.step(Event::Captured(uid("a")));
    let mut changed = pod("a", "/a");
    changed.addresses.push("10.0.0.2".parse().unwrap());
    assert_eq!(machine.step(Event::Desired(vec![changed.clone()])), [Action::Capture(changed)]);
}

#[test]
fn another_network_namespace_is_a_release_and_a_capture() {
    let mut machine = Machine::new();
    machine.step(Event::Desired(vec![pod("a", "/a")]));
    machine.step(Event::Captured(uid("a")));
    let moved = pod("a", "/b");
    assert_eq!(machine.step(Event::Desired(vec![moved.clone()])), [Action::Release(uid("a"))]);
    assert_eq!(machine.step(Event::Released(uid("a"))), [Action::Capture(moved)]);
}

#[test]
fn a_pod_whose_namespace_was_made_again_is_captured_again() {
    let mut machine = Machine::new();
    let a = pod("a", "/a");
    machine.step(Event::Desired(vec![a.clone()]));
    machine.step(Event::Captured(uid("a")));
    assert_eq!(machine.step(Event::Lost(uid("a"))), [Action::Release(uid("a"))]);
    assert_eq!(machine.step(Event::Lost(uid("a"))), []);
    assert_eq!(machine.step(Event::Released(uid("a"))), [Action::Capture(a)]);
}

#[test]
fn a_failed_capture_is_retried_later_and_later() {
    let mut machine = Machine::new();
    let a = pod("a", "/a");
    machine.step(Event::Desired(vec![a.clone()]));
    let mut waits = Vec::new();
    for _ in 0..10 {
        let actions = machine.step(Event::CaptureFailed(uid("a")));
        let [Action::WakeAt(at)] = actions[..] else { panic!("{actions:?}") };
        waits.push(at - machine.now);
        machine.now = at;
        assert_eq!(machine.step(Event::Tick), [Action::Capture(a.clone())]);
    }
    assert_eq!(waits[0], Duration::from_millis(100));
    assert_eq!(waits[1], Duration::from_millis(200));
    assert_eq!(waits[9], Duration::from_secs(1));
}

#[test]
fn a_failed_release_is_retried() {
    let mut machine = Machine::new();
    machine.step(Event::Desired(vec![pod("a", "/a")]));
    machine.step(Event::Captured(uid("a")));
    machine.step(Event::Desired(vec![]));
    let actions = machine.step(Event::ReleaseFailed(uid("a")));
    let [Action::WakeAt(at)] = actions[..] else { panic!("{actions:?}") };
    machine.now = at;
    assert_eq!(machine.step(Event::Tick), [Action::Release(uid("a"))]);
}

/// What a test does next: a new intent, the answer to something under way, or time.
#[derive(Debug, Clone)]
enum Move {
    Intend(Vec<(u8, u8)>),
    Answer { which: usize, ok: bool },
    Wait,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let intend = vec((0..4u8, 0..2u8), 0..5).prop_map(Move::Intend);
    let answer = (any::<usize>(), any::<bool>()).prop_map(|(which, ok)| Move::Answer { which, ok });
    let wait = proptest::strategy::Just(Move::Wait);
    vec(proptest::prop_oneof![intend, answer, wait], 0..80)
}

/// A kernel that does what it is told, some time later.
#[derive(Default)]
struct Kernel {
    under_way: Vec<Action>,
    captured: BTreeMap<PodUid, LocalPod>,
}

impl Kernel {
    fn take(&mut self, actions: Vec<Action>) {
        for action in actions {
            if !matches!(action, Action::WakeAt(_)) {
                self.under_way.push(action);
            }
        }
    }

    fn answer(&mut self, which: usize, ok: bool) -> Option<Event> {
        if self.under_way.is_empty() {
            return None;
        }
        let action = self.under_way.remove(which % self.under_way.len());
        Some(match (action, ok) {
            (Action::Capture(pod), true) => {
                let uid = pod.uid.clone();
                self.captured.insert(uid.clone(), pod);
                Event::Captured(uid)
            }
            (Action::Capture(pod), false) => Event::CaptureFailed(pod.uid),
            (Action::Release(uid), true) => {
                self.captured.remove(&uid);
                Event::Released(uid)
            }
            (Action::Release(uid), false) => Event::ReleaseFailed(uid),
            (Action::WakeAt(_), _) => return None,
        })
    }
}

proptest! {
    /// Whatever happened, once everything asked for is answered well the kernel has exactly what was
    /// last intended, and at no time two actions for one pod were under way.
    #[test]
    fn the_kernel_ends_as_intended(moves in moves()) {
        let mut machine = Machine::new();
        let mut kernel = Kernel::default();
        let mut intended: BTreeMap<PodUid, LocalPod> = BTreeMap::new();
        for step in moves {
            let event = match step {
                Move::Intend(names) => {
                    intended = names
                        .iter()
                        .map(|(name, netns)| pod(&format!("p{name}"), &format!("/n{netns}")))
                        .map(|pod| (pod.uid.clone(), pod))
                        .collect();
                    Some(Event::Desired(intended.values().cloned().collect()))
                }
                Move::Answer { which, ok } => kernel.answer(which, ok),
                Move::Wait => {
                    machine.now += Duration::from_secs(20);
                    Some(Event::Tick)
                }
            };
            let Some(event) = event else { continue };
            let actions = machine.step(event);
            kernel.take(actions);
            let mut busy: Vec<String> = kernel.under_way.iter().map(|action| match action {
                Action::Capture(pod) => pod.uid.to_string(),
                Action::Release(uid) => uid.to_string(),
                Action::WakeAt(_) => String::new(),
            }).collect();
            let all = busy.len();
            busy.sort();
            busy.dedup();
            prop_assert_eq!(busy.len(), all);
        }
        for _ in 0..100 {
            machine.now += Duration::from_secs(20);
            let event = kernel.answer(0, true).unwrap_or(Event::Tick);
            let actions = machine.step(event);
            kernel.take(actions);
        }
        prop_assert_eq!(&kernel.captured, &intended);
        prop_assert_eq!(machine.pods.captured(), intended.len());
        prop_assert!(machine.pods.pending() == 0);
        prop_assert!(machine.pods.is_settled());
    }
}
