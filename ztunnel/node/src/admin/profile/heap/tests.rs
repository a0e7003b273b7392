use std::io::Read;

use flate2::read::GzDecoder;
use tokio::sync::Mutex;
use ztunnel_proto::profile as wire;
use ztunnel_proto::prost::Message;

use super::*;
use crate::admin::profile::heap::allocator::Sampled;

#[global_allocator]
static ALLOCATOR: Sampled = Sampled;

/// The process has one profiler: who switches it is alone with it.
pub(in crate::admin) static TURN: Mutex<()> = Mutex::const_new(());

const MIB: usize = 1 << 20;

/// Of which a profile of the test's own allocations speaks.
#[inline(never)]
fn allocates_for_the_profile(size: usize, count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|_| std::hint::black_box(Vec::with_capacity(size))).collect()
}

#[inline(never)]
fn grows_for_the_profile(size: usize) -> Vec<u8> {
    let mut grown: Vec<u8> = Vec::new();
    while grown.capacity() < size {
        grown.reserve_exact(grown.capacity() + 64 * 1024);
    }
    std::hint::black_box(grown)
}

/// A profile as who reads it sees it.
struct Known {
    strings: Vec<String>,
    /// For each sample the functions, the nearest first, and its two values.
    samples: Vec<(Vec<String>, u64, u64)>,
    /// What the values are.
    kinds: Vec<String>,
    first: String,
}

impl Known {
    fn read(profile: &[u8]) -> Self {
        let mut plain = Vec::new();
        GzDecoder::new(profile).read_to_end(&mut plain).expect("compressed by gzip");
        let profile = wire::Profile::decode(&plain[..]).unwrap();
        let text = |index: i64| profile.string_table[index as usize].clone();
        let functions: HashMap<u64, String> =
            profile.function.iter().map(|function| (function.id, text(function.name))).collect();
        let names = |location: &wire::Location| -> Vec<String> {
            location.line.iter().map(|line| functions[&line.function_id].clone()).collect()
        };
        let locations: HashMap<u64, Vec<String>> =
            profile.location.iter().map(|location| (location.id, names(location))).collect();
        let samples = profile.sample.iter().map(|sample| {
            let stack = sample.location_id.iter().flat_map(|id| locations[id].clone()).collect();
            let [objects, bytes] = sample.value[..] else { panic!("two values") };
            (stack, objects as u64, bytes as u64)
        });
        Self {
            samples: samples.collect(),
            kinds: profile.sample_type.iter().map(|kind| text(kind.r#type)).collect(),
            first: text(profile.default_sample_type),
            strings: profile.string_table.clone(),
        }
    }

    /// Objects and bytes of this function and what it called.
    fn of(&self, function: &str) -> (u64, u64) {
        let within = |stack: &[String]| stack.iter().any(|name| name.ends_with(function));
        let samples = self.samples.iter().filter(|(stack, ..)| within(stack));
        samples.fold((0, 0), |sum, (_, objects, bytes)| (sum.0 + objects, sum.1 + bytes))
    }
}

#[tokio::test]
async fn what_is_live_is_shown_with_who_allocated_it() {
    let _turn = TURN.lock().await;
    assert!(matches!(profile().await, Err(HeapError::Inactive)));
    let before = allocates_for_the_profile(64 * 1024, 1024);
    activate();
    activate();
    assert!(is_active());
    let early = Known::read(&profile().await.unwrap());
    assert_eq!(early.of("allocates_for_the_profile"), (0, 0), "allocated before anybody asked");

    // 64 MiB in each, of which some 128 and 1024 samples are taken.
    let small = allocates_for_the_profile(64 * 1024, 1024);
    let grown = grows_for_the_profile(64 * MIB);
    let known = Known::read(&profile().await.unwrap());
    assert_eq!((known.strings[0].as_str(), known.first.as_str()), ("", "inuse_space"));
    assert_eq!(known.kinds, ["inuse_objects", "inuse_space"]);
    let (objects, bytes) = known.of("allocates_for_the_profile");
    assert!((512..2048).contains(&objects), "{objects} objects of 1024");
    assert!((32 * MIB as u64..128 * MIB as u64).contains(&bytes), "{bytes} bytes of 64 MiB");
    // Of what grew there is one, and it is as large as to be sure to be looked at.
    let (objects, bytes) = known.of("grows_for_the_profile");
    assert_eq!((objects, bytes >> 20), (1, 64), "{bytes}");
    let nearest = known.samples.iter().filter_map(|(stack, ..)| stack.first());
    assert!(!nearest.into_iter().any(|name| name.contains("allocator::")), "{:?}", known.strings);

    // Freed by another thread, and some from before among it.
    std::thread::spawn(move || drop((small, grown, before))).join().unwrap();
    let known = Known::read(&profile().await.unwrap());
    assert_eq!(known.of("allocates_for_the_profile"), (0, 0));
    assert_eq!(known.of("grows_for_the_profile"), (0, 0));

    let kept = allocates_for_the_profile(64 * 1024, 1024);
    deactivate();
    assert!(!is_active());
    assert!(with_table(|table| table.is_none()), "the table is still there");
    assert!(MARKED.iter().all(|mark| mark.load(Ordering::Relaxed) == 0), "marks of what is forgotten");
    assert!(matches!(profile().await, Err(HeapError::Inactive)));
    // Of what was looked at and forgotten nothing comes back.
    activate();
    drop(kept);
    assert_eq!(Known::read(&profile().await.unwrap()).of("allocates_for_the_profile"), (0, 0));
    deactivate();
}

#[tokio::test]
async fn threads_may_allocate_while_it_is_switched_and_written() {
    let _turn = TURN.lock().await;
    let threads: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn(|| {
                for _ in 0..200 {
                    drop(allocates_for_the_profile(256 * 1024, 16));
                }
            })
        })
        .collect();
    while !threads.iter().all(|thread| thread.is_finished()) {
        activate();
        Known::read(&profile().await.unwrap());
        deactivate();
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(MARKED.iter().all(|mark| mark.load(Ordering::Relaxed) == 0), "marks of what is forgotten");
}

#[tokio::test]
async fn the_table_is_bounded() {
    // Shares its marks with the profiler.
    let _turn = TURN.lock().await;
    let mut table = Table::default();
    let address = |nth: usize| (nth + 1) * 16;
    for nth in 0..LIVE_MAX + 10 {
        table.insert(address(nth), Live { size: 1, stack: Box::from([1, 2]) });
    }
    assert_eq!((table.live.len(), table.missed), (LIVE_MAX, 10));
    table.remove(address(LIVE_MAX + 5));
    assert_eq!(table.live.len(), LIVE_MAX, "it was not in there");
    let uses = table.uses();
    let used = uses[&[1, 2][..]];
    assert_eq!(uses.len(), 1);
    assert!((used.bytes / (LIVE_MAX as f64 * INTERVAL) - 1.0).abs() < 0.001, "{used:?}");
    // One at the place of another that was not seen to go.
    table.remove(address(0));
    table.insert(address(1), Live { size: 2, stack: Box::from([3]) });
    assert_eq!(table.live[&address(1)].size, 2);
    (1..LIVE_MAX).for_each(|nth| table.remove(address(nth)));
    assert!(table.live.is_empty());
    assert!(MARKED.iter().all(|mark| mark.load(Ordering::Relaxed) == 0));
}

#[test]
fn a_sample_stands_for_as_much_as_it_is_likely() {
    // A byte of a small allocation for an interval; a large one for itself.
    assert!((stands_for(1) / INTERVAL - 1.0).abs() < 0.001);
    assert!((stands_for(512 * 1024) - 1.582).abs() < 0.001);
    assert!((stands_for(64 * MIB) - 1.0).abs() < 0.001);
    assert_eq!(stands_for(0), 0.0);
}

#[test]
fn distances_are_as_far_apart_as_they_should_be() {
    assert!(distance(0).is_finite() && distance(0) > 30.0 * INTERVAL);
    assert!(distance(u64::MAX) == 0.0);
    let state = Cell::new(1);
    let distances: Vec<f64> = (0..100_000).map(|_| distance(next_random(&state))).collect();
    let mean = distances.iter().sum::<f64>() / distances.len() as f64;
    assert!((mean / INTERVAL - 1.0).abs() < 0.02, "{mean}");
    // As with all that has no memory: 37 % are farther than the mean.
    let far = distances.iter().filter(|distance| **distance > INTERVAL).count();
    assert!((36_000..37_600).contains(&far), "{far}");
}
