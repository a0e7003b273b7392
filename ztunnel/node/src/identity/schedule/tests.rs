use proptest::prelude::{Strategy, any, prop_oneof, proptest};

use super::*;

fn id(n: u8) -> SpiffeId {
    format!("spiffe://td.example/ns/shop/sa/w{n}").parse().unwrap()
}

fn ids(numbers: &[u8]) -> HashSet<SpiffeId> {
    numbers.iter().map(|n| id(*n)).collect()
}

fn start() -> Now {
    Now { mono: Instant::now(), wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000) }
}

fn after(now: Now, seconds: u64) -> Now {
    let passed = Duration::from_secs(seconds);
    Now { mono: now.mono + passed, wall: now.wall + passed }
}

fn day(now: Now) -> Validity {
    Validity { from: now.wall, until: now.wall + Duration::from_secs(86_400) }
}

/// The clock is set, and nothing else happens.
fn set(now: Now, seconds: i64) -> Now {
    let by = Duration::from_secs(seconds.unsigned_abs());
    Now { wall: if seconds < 0 { now.wall - by } else { now.wall + by }, ..now }
}

/// A schedule that holds a certificate for a day of one identity.
fn holding(now: Now) -> Schedule {
    let mut schedule = Schedule::default();
    schedule.retain(&ids(&[1]));
    assert_eq!(schedule.next(), Some(id(1)));
    assert_eq!(schedule.issued(&id(1), day(now), now, 0.0), Issued::Publish);
    schedule
}

#[test]
fn a_clock_that_takes_a_certificate_out_of_its_time_has_another_asked_for_at_once() {
    for (jump, asks) in
        [(0, false), (3600, false), (-1, true), (-86_400, true), (86_400, true), (86_399, true)]
    {
        let mut schedule = holding(start());
        let now = set(after(start(), 5), jump - 5);
        schedule.tick(now);
        assert_eq!(schedule.next().is_some(), asks, "the clock is set by {jump} s");
    }
}

#[test]
fn what_is_not_valid_yet_is_asked_for_again_only_where_there_is_a_gap() {
    let now = start();
    for (held, ahead, expected) in [
        (true, 0, Issued::Publish),
        (true, 3600, Issued::Later),
        // From the moment on at which the other ends.
        (true, 43_200, Issued::Later),
        (true, 43_201, Issued::TooEarly),
        (false, 0, Issued::Publish),
        (false, 1, Issued::TooEarly),
    ] {
        let later = after(now, 43_200);
        let mut schedule = if held { holding(now) } else { Schedule::default() };
        schedule.retain(&ids(&[1]));
        schedule.tick(later);
        assert_eq!(schedule.next(), Some(id(1)));
        let validity = day(set(later, ahead));
        assert_eq!(schedule.issued(&id(1), validity, later, 0.0), expected, "{held} {ahead}");
        match expected {
            Issued::TooEarly => {
                let failed = schedule.failed(&id(1), later, 0.0);
                assert_eq!(failed.retry_in, Some(BACKOFF_FIRST));
                // When its time comes it is held like any other, and the retries end.
                let then = after(later, ahead.unsigned_abs());
                assert!(schedule.in_force(&id(1), validity, then, 0.0));
                schedule.tick(then);
                assert_eq!(schedule.next(), None);
            }
            _ => {
                for passed in [1, 3600, 43_100] {
                    schedule.tick(after(later, passed));
                    assert_eq!(schedule.next(), None, "after {passed} s");
                }
            }
        }
    }
}

#[test]
fn a_certificate_that_comes_into_force_during_a_request_does_not_cause_a_second_one() {
    let now = start();
    let mut schedule = Schedule::default();
    schedule.retain(&ids(&[1]));
    schedule.next();
    let validity = day(after(now, 10));
    assert_eq!(schedule.issued(&id(1), validity, now, 0.0), Issued::TooEarly);
    schedule.failed(&id(1), now, 0.0);
    schedule.tick(after(now, 5));
    assert_eq!(schedule.next(), Some(id(1)));
    assert!(schedule.is_awaited(&id(1), after(now, 5)));
    assert!(schedule.in_force(&id(1), validity, after(now, 10), 0.0));
    assert!(!schedule.is_awaited(&id(1), after(now, 10)));
    schedule.tick(after(now, 10));
    assert_eq!(schedule.next(), None);
    assert!(!schedule.in_force(&id(2), validity, after(now, 10), 0.0), "nobody wants it");
}

#[test]
fn a_clock_that_is_set_ends_the_waiting_for_a_retry() {
    let now = start();
    let mut schedule = Schedule::default();
    schedule.retain(&ids(&[1]));
    schedule.next();
    for _ in 0..9 {
        schedule.failed(&id(1), now, 0.0);
    }
    schedule.tick(now);
    assert_eq!(schedule.next(), None);
    schedule.clock_was_set(now);
    schedule.tick(now);
    assert_eq!(schedule.next(), Some(id(1)));
}

#[test]
fn certificates_that_end_at_once_are_not_asked_for_in_a_loop() {
    let now = start();
    let mut schedule = Schedule::default();
    schedule.retain(&ids(&[1]));
    schedule.next();
    let validity = Validity { from: now.wall, until: now.wall + Duration::from_millis(10) };
    schedule.issued(&id(1), validity, now, 0.0);
    let passed = Duration::from_millis(20);
    let over = Now { mono: now.mono + passed, wall: now.wall + passed };
    schedule.tick(over);
    assert_eq!(schedule.next(), None);
    assert!(schedule.wake_at(over) > over.mono);
    schedule.tick(after(now, 1));
    assert_eq!(schedule.next(), Some(id(1)));
}

#[test]
fn a_waiting_connection_precedes_a_renewal_and_that_a_warm_up() {
    let now = start();
    let mut schedule = Schedule::default();
    schedule.retain(&ids(&[1]));
    assert_eq!(schedule.next(), Some(id(1)));
    schedule.issued(&id(1), day(now), now, 0.0);
    let later = after(now, 43_200);
    schedule.retain(&ids(&[1, 2]));
    schedule.tick(later);
    schedule.want(&id(3), later);
    let order: Vec<_> = std::iter::from_fn(|| schedule.next()).collect();
    assert_eq!(order, [id(3), id(1), id(2)]);
}

#[test]
fn a_connection_raises_what_is_queued_already() {
    let now = start();
    let mut schedule = Schedule::default();
    schedule.retain(&ids(&[1, 2, 3]));
    assert_eq!(schedule.want(&id(3), now), Outlook::Wait);
    let order: Vec<_> = std::iter::from_fn(|| schedule.next()).collect();
    assert_eq!(order, [id(3), id(1), id(2)]);
}

#[test]
fn a_failure_of_what_has_left_is_the_end_of_it() {
    let now = start();
    let mut schedule = Schedule::default();
    schedule.retain(&ids(&[1]));
    assert_eq!(schedule.next(), Some(id(1)));
    schedule.retain(&ids(&[]));
    assert_eq!(schedule.failed(&id(1), now, 0.0), Failed { retry_in: None, tell: true });
    assert!(schedule.entries.is_empty());
}

#[test]
fn a_certificate_that_a_clock_set_back_revives_does_not_keep_the_worker_awake() {
    let now = start();
    let mut schedule = Schedule::default();
    schedule.want(&id(1), now);
    schedule.next();
    schedule.issued(&id(1), day(now), now, 0.0);
    let ended = after(now, 86_400);
    schedule.want(&id(1), ended);
    schedule.next();
    for _ in 0..3 {
        schedule.failed(&id(1), ended, 0.0);
    }
    let set_back = Now { mono: ended.mono + Duration::from_secs(3600), ..now };
    assert_eq!(schedule.tick(set_back), []);
    assert!(schedule.wake_at(set_back) > set_back.mono);
}

#[derive(Debug, Clone)]
enum Step {
    Want(u8),
    Retain(Vec<u8>),
    Issued { pick: u8, life: u32, age: i32 },
    Failed(u8),
    Pass(u32),
    SetWall(i32),
}

fn step() -> impl Strategy<Value = Step> {
    let number = || 0..20_u8;
    prop_oneof![
        number().prop_map(Step::Want),
        proptest::collection::vec(number(), 0..20).prop_map(Step::Retain),
        (any::<u8>(), 1..100_000_u32, -50_000..100_000_i32).prop_map(|(pick, life, age)| Step::Issued {
            pick,
            life,
            age
        }),
        any::<u8>().prop_map(Step::Failed),
        (0..50_000_u32).prop_map(Step::Pass),
        (-50_000..50_000_i32).prop_map(Step::SetWall),
    ]
}

proptest! {
    /// Whatever happens: no identity is asked for twice at once, no more than eight are, the queue does not stand
    /// while there is room, what is retained is never lost, what is not valid now is asked for anew, and the worker is
    /// never woken for nothing.
    #[test]
    fn the_schedule_keeps_its_promises(steps in proptest::collection::vec(step(), 1..80)) {
        let mut now = start();
        let mut schedule = Schedule::default();
        let mut under_way: Vec<SpiffeId> = Vec::new();
        let mut early: Vec<(SpiffeId, Validity)> = Vec::new();
        let mut retained = HashSet::new();
        for step in steps {
            match step {
                Step::Want(n) => {
                    schedule.want(&id(n), now);
                }
                Step::Retain(numbers) => {
                    retained = ids(&numbers);
                    schedule.retain(&retained);
                }
                Step::Issued { pick, life, age } if !under_way.is_empty() => {
                    let id = under_way.remove(usize::from(pick) % under_way.len());
                    let seconds = |n: u32| Duration::from_secs(n.into());
                    // The worker passes nothing on that has ended.
                    let from = set(now, -i64::from(age)).wall;
                    let validity = Validity { from, until: now.wall.max(from) + seconds(life) };
                    let before = schedule.entries.get(&id).is_some_and(|entry| entry.usable(now.wall));
                    match schedule.issued(&id, validity, now, 0.5) {
                        Issued::TooEarly => {
                            schedule.failed(&id, now, 0.5);
                            early.push((id, validity));
                        }
                        Issued::Later => assert!(before, "there is none to serve until then"),
                        Issued::Publish => assert!(validity.holds_at(now.wall), "it is no good yet"),
                        Issued::Unwanted => {}
                    }
                }
                Step::Failed(pick) if !under_way.is_empty() => {
                    let id = under_way.remove(usize::from(pick) % under_way.len());
                    schedule.failed(&id, now, -0.5);
                }
                Step::Issued { .. } | Step::Failed(_) => {}
                Step::Pass(seconds) => now = after(now, seconds.into()),
                Step::SetWall(seconds) => {
                    let by = Duration::from_secs(seconds.unsigned_abs().into());
                    now.wall = if seconds < 0 { now.wall - by } else { now.wall + by };
                }
            }
            for (id, validity) in early.extract_if(.., |(_, validity)| !validity.is_ahead(now.wall)) {
                if validity.holds_at(now.wall) {
                    schedule.in_force(&id, validity, now, 0.5);
                }
            }
            schedule.tick(now);
            while let Some(id) = schedule.next() {
                assert!(!under_way.contains(&id), "{id} is asked for twice at once");
                under_way.push(id);
            }
            assert!(under_way.len() <= CONCURRENT_MAX);
            let held_useless = schedule.entries.values().find(|entry| {
                entry.retained && entry.phase == Phase::Held && entry.held.is_some_and(|held| {
                    !held.validity.holds_at(now.wall) && held.came + RENEWAL_MIN <= now.mono
                })
            });
            assert!(held_useless.is_none(), "nothing is done about one that is not valid now: {held_useless:?}");
            let queued = schedule.entries.values().any(|entry| matches!(entry.phase, Phase::Queued { .. }));
            assert!(!queued || under_way.len() == CONCURRENT_MAX, "the queue stands");
            assert!(retained.iter().all(|id| schedule.entries.contains_key(id)), "one was lost");
            assert!(schedule.wake_at(now) > now.mono, "the worker would spin");
        }
    }
}
