//! Whatever comes in whatever order: who may stay stays, who may not get in does not.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::future::pending;
use std::rc::Rc;
use std::time::Duration;

use proptest::prelude::*;
use tokio::task::LocalSet;
use tokio::task::spawn_local;
use tokio::time::sleep;
use ztunnel_mesh::model::policy::Action;
use ztunnel_mesh::model::policy::Clause;
use ztunnel_mesh::model::policy::Match;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::policy::PolicyKey;
use ztunnel_mesh::model::policy::Rule;
use ztunnel_mesh::model::policy::Scope;
use ztunnel_mesh::model::policy::StringMatch;
use ztunnel_mesh::store::MeshChange;
use ztunnel_mesh::store::MeshWriter;
use ztunnel_mesh::store::gap::SETTLED_AFTER;
use ztunnel_mesh::store::gap::SETTLED_WITHIN;
use ztunnel_mesh::store::mesh;

use super::*;

/// Who dials: three with an identity, and one without.
const CLIENTS: usize = 4;

fn principal(client: usize) -> Option<SpiffeId> {
    (client + 1 < CLIENTS).then(|| format!("spiffe://cluster.local/ns/shop/sa/c{client}").parse().unwrap())
}

fn facts(client: usize) -> Facts {
    Facts {
        workload: "server".into(),
        identity: principal(client),
        source: [10, 0, 0, 1].into(),
        destination: ([10, 0, 0, 2], 80).into(),
    }
}

fn key(name: usize) -> PolicyKey {
    PolicyKey { namespace: "shop".into(), name: format!("p{name}").into() }
}

/// What a policy says of the clients, one bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rules {
    scope: Scope,
    action: Action,
    clients: u8,
}

fn policy(name: usize, rules: Rules) -> MeshChange {
    let Rules { scope, action, clients } = rules;
    let who = |client: &usize| clients & (1 << client) != 0;
    let matches = (0..CLIENTS).filter(who).map(|client| match principal(client) {
        Some(id) => Match { principals: vec![StringMatch::Exact(id.principal().into())], ..Match::default() },
        None => Match { not_principals: vec![StringMatch::Presence], ..Match::default() },
    });
    let clauses = vec![Clause { matches: matches.collect() }];
    // A clause without matches would match everybody.
    let rules = if clients == 0 { vec![] } else { vec![Rule { clauses }] };
    MeshChange::Policy(Arc::new(Policy { key: key(name), scope, action, dry_run: false, rules }))
}

fn server(policies: Vec<PolicyKey>) -> MeshChange {
    MeshChange::Workload(Arc::new(Workload { policies, ..Workload::sample("shop", "server") }))
}

/// A mesh that somebody has asked for: the workload names the policies that select it.
type State = BTreeMap<usize, Rules>;

fn named(state: &State) -> Vec<PolicyKey> {
    let selected = state.iter().filter(|(_, rules)| rules.scope == Scope::WorkloadSelector);
    selected.map(|(name, _)| key(*name)).collect()
}

/// Whether all policies together let the client in.
fn lets_in(state: &State, client: usize) -> bool {
    let of = |action| state.values().filter(move |rules| rules.action == action);
    let hit = |rules: &Rules| rules.clients & (1 << client) != 0;
    !of(Action::Deny).any(hit) && (of(Action::Allow).next().is_none() || of(Action::Allow).any(hit))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Waiting,
    Refused,
    Open,
    Closed,
}

/// The open connections of a thread, and what feeds them.
struct Thread {
    writer: MeshWriter,
    reader: MeshReader,
    reauthorization: Reauthorization,
}

impl Thread {
    /// Begins with `state`. Only within a [`LocalSet`].
    fn start(state: &State) -> Self {
        let (mut writer, reader) = mesh();
        writer.apply(state.iter().map(|(name, rules)| policy(*name, *rules)).chain([server(named(state))]));
        let reauthorization = Reauthorization::new(reader.snapshot());
        let (watching, mesh) = (reauthorization.clone(), reader.clone());
        spawn_local(async move { watching.watch(mesh).await });
        Self { writer, reader, reauthorization }
    }

    fn connect(&self, client: usize) -> Rc<RefCell<Outcome>> {
        let outcome = Rc::new(RefCell::new(Outcome::Waiting));
        let (told, reauthorization, mesh) =
            (Rc::clone(&outcome), self.reauthorization.clone(), self.reader.clone());
        spawn_local(async move {
            let facts = facts(client);
            let mut registered = reauthorization.register(facts.clone(), None);
            let admitted =
                reauthorization.admit(&mesh, &facts).await.is_some_and(|admission| admission.decided.is_ok());
            if !admitted {
                *told.borrow_mut() = Outcome::Refused;
                return;
            }
            *told.borrow_mut() = Outcome::Open;
            let Err(_closed) = registered.run(pending::<()>()).await else { return };
            *told.borrow_mut() = Outcome::Closed;
        });
        outcome
    }
}

/// Time is nobody's: it goes on when all wait.
fn run(test: impl Future<Output = ()>) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    LocalSet::new().block_on(&runtime, test);
}

async fn moment() {
    sleep(Duration::from_millis(1)).await;
}

const PLAIN: usize = CLIENTS - 1;
const ALL: u8 = (1 << CLIENTS) - 1;
const STRICT: Rules = Rules { scope: Scope::WorkloadSelector, action: Action::Deny, clients: 1 << PLAIN };
const ALLOW_ALL: Rules = Rules { scope: Scope::WorkloadSelector, action: Action::Allow, clients: ALL };

#[test]
fn a_policy_may_come_after_the_workload_that_names_it() {
    for (rules, plain) in [(STRICT, Outcome::Closed), (ALLOW_ALL, Outcome::Open)] {
        run(async {
            let mut thread = Thread::start(&State::new());
            let (open, open_plain) = (thread.connect(0), thread.connect(PLAIN));
            moment().await;
            thread.writer.apply([server(vec![key(0)])]);
            let (new, new_plain) = (thread.connect(0), thread.connect(PLAIN));
            sleep(Duration::from_millis(1_900)).await;
            assert_eq!((*open.borrow(), *open_plain.borrow()), (Outcome::Open, Outcome::Open));
            assert_eq!((*new.borrow(), *new_plain.borrow()), (Outcome::Waiting, Outcome::Waiting));
            thread.writer.apply([policy(0, rules)]);
            sleep(SETTLED_WITHIN).await;
            assert_eq!((*open.borrow(), *open_plain.borrow()), (Outcome::Open, plain));
            let refused = if plain == Outcome::Closed { Outcome::Refused } else { plain };
            assert_eq!((*new.borrow(), *new_plain.borrow()), (Outcome::Open, refused));
        });
    }
}

#[test]
fn a_policy_may_go_before_the_workload_stops_to_name_it() {
    run(async {
        let mut thread = Thread::start(&State::from([(0, STRICT)]));
        let open = thread.connect(0);
        moment().await;
        thread.writer.apply([MeshChange::RemovePolicy(key(0))]);
        let (new, plain) = (thread.connect(0), thread.connect(PLAIN));
        sleep(Duration::from_millis(1_900)).await;
        assert_eq!(
            (*open.borrow(), *new.borrow(), *plain.borrow()),
            (Outcome::Open, Outcome::Waiting, Outcome::Waiting)
        );
        // That may be a part of more: of another policy that is to come, say.
        thread.writer.apply([server(vec![])]);
        moment().await;
        assert_eq!((*open.borrow(), *new.borrow()), (Outcome::Open, Outcome::Waiting));
        sleep(SETTLED_AFTER).await;
        assert_eq!(
            (*open.borrow(), *new.borrow(), *plain.borrow()),
            (Outcome::Open, Outcome::Open, Outcome::Open)
        );
    });
}

/// Before, nobody is let in, as a policy is missing; after, the client is not, as another denies it. Between the two parts
/// of the change there is neither.
#[test]
fn a_policy_that_is_no_longer_missed_lets_nobody_in_before_its_successor_comes() {
    for (without, also) in [
        // The workload stops to name it.
        (vec![server(vec![])], None),
        // It comes, and in the same part one goes that let only others in.
        (vec![policy(0, Rules { clients: 0, ..STRICT }), MeshChange::RemovePolicy(key(1))], Some(1)),
    ] {
        run(async {
            let mut thread = Thread::start(&State::new());
            let others = Rules { scope: Scope::Namespace, action: Action::Allow, clients: 1 };
            thread.writer.apply(also.map(|name| policy(name, others)));
            thread.writer.apply([server(vec![key(0)])]);
            sleep(SETTLED_WITHIN).await;
            let waiting = thread.connect(PLAIN);
            moment().await;
            thread.writer.apply(without);
            let between = thread.connect(PLAIN);
            sleep(SETTLED_AFTER - Duration::from_millis(10)).await;
            assert_eq!((*waiting.borrow(), *between.borrow()), (Outcome::Waiting, Outcome::Waiting));
            thread.writer.apply([policy(2, Rules { scope: Scope::Namespace, ..STRICT })]);
            sleep(SETTLED_WITHIN).await;
            assert_eq!((*waiting.borrow(), *between.borrow()), (Outcome::Refused, Outcome::Refused));
        });
    }
}

/// When the patience with a missing policy ends in the midst of a change, the rest of it is waited for, too.
#[test]
fn the_end_of_the_patience_decides_nothing_between_two_parts() {
    for (last, plain) in [(None, Outcome::Open), (Some(STRICT), Outcome::Refused)] {
        run(async {
            let mut thread = Thread::start(&State::new());
            thread.writer.apply([server(vec![key(0)])]);
            sleep(SETTLED_WITHIN).await;
            let new = thread.connect(PLAIN);
            sleep(NEW_WITHIN - Duration::from_millis(100)).await;
            thread.writer.apply([server(vec![])]);
            sleep(Duration::from_millis(200)).await;
            assert_eq!(*new.borrow(), Outcome::Waiting);
            let last = last.map(|rules| policy(1, Rules { scope: Scope::Namespace, ..rules }));
            thread.writer.apply(last);
            sleep(SETTLED_WITHIN).await;
            assert_eq!(*new.borrow(), plain);
        });
    }
}

#[test]
fn a_policy_that_never_comes_is_waited_for_only_so_long() {
    run(async {
        let mut thread = Thread::start(&State::new());
        let open = thread.connect(0);
        moment().await;
        thread.writer.apply([server(vec![key(0)])]);
        moment().await;
        let new = thread.connect(0);
        sleep(NEW_WITHIN - Duration::from_millis(10)).await;
        assert_eq!(*new.borrow(), Outcome::Waiting);
        sleep(Duration::from_millis(20)).await;
        assert_eq!(*new.borrow(), Outcome::Refused);
        sleep(OPEN_WITHIN - NEW_WITHIN - Duration::from_millis(100)).await;
        assert_eq!(*open.borrow(), Outcome::Open);
        // What else changes meanwhile gives it no more time.
        thread.writer.apply([MeshChange::Workload(Arc::new(Workload::sample("shop", "other")))]);
        sleep(Duration::from_millis(200)).await;
        assert_eq!(*open.borrow(), Outcome::Closed);
        assert!(thread.reauthorization.is_empty());
    });
}

/// A policy that comes and goes: it is missing for so long, then for so long it is not, and so on. Says after what time
/// the open connection was closed, if it was.
fn closed_while_it_flaps(missing: Duration, there: Duration, back: fn() -> MeshChange) -> Option<Duration> {
    let mut closed = None;
    run(async {
        let mut thread = Thread::start(&State::from([(0, ALLOW_ALL)]));
        let open = thread.connect(0);
        moment().await;
        let began = Instant::now();
        let flap = async {
            while began.elapsed() < 20 * OPEN_WITHIN {
                thread.writer.apply([MeshChange::RemovePolicy(key(0)), server(vec![key(0)])]);
                sleep(missing).await;
                thread.writer.apply([back()]);
                sleep(there).await;
            }
        };
        let ended = async {
            while *open.borrow() != Outcome::Closed {
                sleep(Duration::from_millis(10)).await;
            }
            began.elapsed()
        };
        closed = tokio::select! {
            () = flap => None,
            after = ended => Some(after),
        };
    });
    closed
}

#[test]
fn a_policy_that_flaps_keeps_nobody_for_ever() {
    let seconds = Duration::from_secs_f64;
    let comes: fn() -> MeshChange = || policy(0, ALLOW_ALL);
    // Here the workload only stops to name it for a moment, and here it goes itself.
    let unnamed: fn() -> MeshChange = || server(vec![]);
    let gone: fn() -> MeshChange = || MeshChange::RemoveWorkload("server".into());
    for (missing, there, back, within) in [
        (9.0, 0.1, comes, Some(11.0)),
        (9.0, 0.1, unnamed, Some(11.0)),
        (9.0, 0.1, gone, Some(11.0)),
        (2.0, 1.0, comes, Some(30.0)),
        (0.2, 0.1, unnamed, Some(31.0)),
        // Somebody who changes policies again and again, and is done each time.
        (2.0, 3.0, comes, None),
        (0.1, 5.0, comes, None),
    ] {
        let closed = closed_while_it_flaps(seconds(missing), seconds(there), back);
        match (within, closed) {
            (None, None) => {}
            (Some(within), Some(closed)) => {
                assert!((OPEN_WITHIN..=seconds(within)).contains(&closed), "{missing} {there}: {closed:?}");
            }
            (within, closed) => {
                panic!("{missing} {there}: closed after {closed:?}, expected after {within:?}")
            }
        }
    }
}

#[test]
fn a_workload_that_goes_and_comes_is_authorized_when_it_comes() {
    run(async {
        let mut thread = Thread::start(&State::new());
        let (open, plain) = (thread.connect(0), thread.connect(PLAIN));
        moment().await;
        thread.writer.apply([MeshChange::RemoveWorkload("server".into())]);
        let new = thread.connect(0);
        moment().await;
        // It concerns all of the namespace, and nobody is there.
        thread.writer.apply([policy(0, Rules { scope: Scope::Namespace, ..STRICT })]);
        sleep(Duration::from_millis(1_500)).await;
        assert_eq!(
            (*open.borrow(), *plain.borrow(), *new.borrow()),
            (Outcome::Open, Outcome::Open, Outcome::Waiting)
        );
        thread.writer.apply([server(vec![])]);
        sleep(SETTLED_WITHIN).await;
        assert_eq!(
            (*open.borrow(), *plain.borrow(), *new.borrow()),
            (Outcome::Open, Outcome::Closed, Outcome::Open)
        );
    });
}

#[test]
fn what_is_made_as_a_whole_counts_at_once() {
    run(async {
        let mut thread = Thread::start(&State::new());
        let open = thread.connect(PLAIN);
        moment().await;
        let mut whole = thread.reader.snapshot().as_ref().clone();
        whole.apply(policy(0, Rules { scope: Scope::Global, ..STRICT }));
        thread.writer.publish(whole);
        let new = thread.connect(PLAIN);
        moment().await;
        assert_eq!((*open.borrow(), *new.borrow()), (Outcome::Closed, Outcome::Refused));
    });
}

fn some_rules() -> impl Strategy<Value = Rules> {
    let scope = prop_oneof![Just(Scope::Global), Just(Scope::Namespace), Just(Scope::WorkloadSelector)];
    let action = prop_oneof![Just(Action::Allow), Just(Action::Deny)];
    (scope, action, 0..=ALL).prop_map(|(scope, action, clients)| Rules { scope, action, clients })
}

fn some_state() -> impl Strategy<Value = State> {
    prop::collection::btree_map(0..4_usize, some_rules(), 0..4)
}

/// The name of a policy that never comes.
const NEVER: usize = 9;

/// All that has to be said to make one of the other, in the order in which istiod says it: workloads, then policies.
fn changes(from: &State, to: &State) -> Vec<MeshChange> {
    let mut changes = Vec::new();
    if named(from) != named(to) {
        changes.push(server(named(to)));
    }
    let new = to.iter().filter(|(name, rules)| from.get(name) != Some(rules));
    changes.extend(new.map(|(name, rules)| policy(*name, *rules)));
    let gone = from.keys().filter(|name| !to.contains_key(name));
    changes.extend(gone.map(|name| MeshChange::RemovePolicy(key(*name))));
    changes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// From one mesh to another in all orders, in one piece or in many, with a pause after each. The workload itself
    /// may go in the midst of it and come back. At first it may name a policy that never comes: then nobody is let in.
    #[test]
    fn no_order_cuts_who_may_stay_or_lets_in_who_may_not(
        from in some_state(),
        to in some_state(),
        order in prop::collection::vec(any::<prop::sample::Index>(), 6),
        splits in prop::collection::vec(any::<bool>(), 6),
        pauses in prop::collection::vec(0..140_u64, 7),
        goes in prop::option::weighted(0.2, 0..6_usize),
        lacks in prop::bool::weighted(0.3),
    ) {
        let mut left = changes(&from, &to);
        if lacks && !left.contains(&server(named(&to))) {
            left.push(server(named(&to)));
        }
        let mut pieces: Vec<Vec<MeshChange>> = vec![Vec::new()];
        for at in 0.. {
            if left.is_empty() { break }
            let next = order[at % order.len()].index(left.len());
            if splits[at % splits.len()] { pieces.push(Vec::new()) }
            if let Some(piece) = pieces.last_mut() { piece.push(left.remove(next)) }
        }
        if let Some(at) = goes && at < pieces.len() {
            pieces.insert(at, vec![MeshChange::RemoveWorkload("server".into())]);
            pieces.push(vec![server(named(&to))]);
        }
        let wrong = Rc::new(RefCell::new(BTreeSet::new()));
        let found = Rc::clone(&wrong);
        run(async {
            let mut thread = Thread::start(&from);
            if lacks {
                thread.writer.apply([server([named(&from), vec![key(NEVER)]].concat())]);
                sleep(SETTLED_WITHIN).await;
            }
            let lets_in_before = |client| !lacks && lets_in(&from, client);
            let mut connections = Vec::new();
            let mut connect = |thread: &Thread, when: String| {
                for client in 0..CLIENTS {
                    connections.push((when.clone(), client, thread.connect(client)));
                }
            };
            connect(&thread, "before".to_owned());
            moment().await;
            for (at, piece) in pieces.iter().enumerate() {
                thread.writer.apply(piece.iter().cloned());
                connect(&thread, format!("at {at}"));
                sleep(Duration::from_millis(pauses[at % pauses.len()])).await;
                connect(&thread, format!("after {at}"));
                moment().await;
            }
            sleep(NEW_WITHIN + SETTLED_WITHIN).await;
            connect(&thread, "in the end".to_owned());
            moment().await;
            for (when, client, outcome) in connections {
                let outcome = *outcome.borrow();
                let right = match (lets_in_before(client), lets_in(&to, client), &*when) {
                    (_, false, "in the end") | (false, false, _) => outcome == Outcome::Refused,
                    (_, true, "in the end") | (true, true, _) => outcome == Outcome::Open,
                    (true, false, "before") => outcome == Outcome::Closed,
                    (true, false, _) => matches!(outcome, Outcome::Closed | Outcome::Refused),
                    (false, true, "before") if !lacks => outcome == Outcome::Refused,
                    (false, true, _) => matches!(outcome, Outcome::Open | Outcome::Refused),
                };
                if !right {
                    found.borrow_mut().insert(format!("c{client} {when}: {outcome:?}"));
                }
            }
        });
        prop_assert!(wrong.borrow().is_empty(), "{:?} with {pieces:?}", wrong.borrow());
    }
}
