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

fn day(now: Now) -> (SystemTime, SystemTime) {
    (now.wall, now.wall + Duration::from_secs(86_400))
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
    Issued { pick: u8, life: u32, age: u32 },
    Failed(u8),
    Pass(u32),
    SetWall(i32),
}

fn step() -> impl Strategy<Value = Step> {
    let number = || 0..20_u8;
    prop_oneof![
        number().prop_map(Step::Want),
        proptest::collection::vec(number(), 0..20).prop_map(Step::Retain),
        (any::<u8>(), 1..100_000_u32, 0..100_000_u32).prop_map(|(pick, life, age)| Step::Issued {
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
    /// while there is room, what is retained is never lost, and the worker is never woken for nothing.
    #[test]
    fn the_schedule_keeps_its_promises(steps in proptest::collection::vec(step(), 1..80)) {
        let mut now = start();
        let mut schedule = Schedule::default();
        let mut under_way: Vec<SpiffeId> = Vec::new();
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
                    let validity = (now.wall - seconds(age), now.wall + seconds(life));
                    schedule.issued(&id, validity, now, 0.5);
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
            schedule.tick(now);
            while let Some(id) = schedule.next() {
                assert!(!under_way.contains(&id), "{id} is asked for twice at once");
                under_way.push(id);
            }
            assert!(under_way.len() <= CONCURRENT_MAX);
            let queued = schedule.entries.values().any(|entry| matches!(entry.phase, Phase::Queued { .. }));
            assert!(!queued || under_way.len() == CONCURRENT_MAX, "the queue stands");
            assert!(retained.iter().all(|id| schedule.entries.contains_key(id)), "one was lost");
            assert!(schedule.wake_at(now) > now.mono, "the worker would spin");
        }
    }
}
