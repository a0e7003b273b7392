use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use super::*;

#[inline(never)]
fn busy_for_the_profile(done: &AtomicBool) -> u64 {
    let mut sum = 0_u64;
    while !done.load(Ordering::Relaxed) {
        for number in 0..10_000 {
            sum = black_box(sum.wrapping_mul(31).wrapping_add(number));
        }
    }
    sum
}

/// Cryptography in assembly moves the stack without telling how: a sample in the midst of it must do no harm.
fn makes_keys(done: &AtomicBool) {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    while !done.load(Ordering::Relaxed) {
        for group in &provider.kx_groups {
            black_box(group.start().unwrap());
        }
    }
}

#[tokio::test]
async fn a_busy_thread_is_seen_and_one_profile_is_taken_at_a_time() {
    // Meanwhile no allocation is looked at.
    let _turn = heap::tests::TURN.lock().await;
    let done = Arc::new(AtomicBool::new(false));
    let theirs = Arc::clone(&done);
    let busy = std::thread::Builder::new().name("busy".into()).spawn(move || busy_for_the_profile(&theirs));
    let theirs = Arc::clone(&done);
    let keys = std::thread::spawn(move || makes_keys(&theirs));
    let (profile, second) =
        tokio::join!(processor(Duration::from_secs(1), 500), processor(Duration::from_millis(1), 100));
    done.store(true, Ordering::Relaxed);
    busy.unwrap().join().unwrap();
    keys.join().unwrap();
    assert!(matches!(second, Err(ProfileError::Start(_))), "two profiles at once");

    let profile = wire::Profile::decode(&profile.unwrap()[..]).unwrap();
    let strings = &profile.string_table;
    assert_eq!(strings[0], "");
    assert!(strings.iter().any(|text| text.contains("busy_for_the_profile")), "{strings:?}");
    assert!(strings.iter().any(|text| text == "busy"), "{strings:?}");
    assert_eq!(profile.period, 2_000_000);
    assert_eq!((profile.sample_type.len(), profile.period_type.is_some()), (2, true));

    // Every identifier that is used is defined, counted from 1 without a gap.
    let (functions, locations) = (profile.function.len() as u64, profile.location.len() as u64);
    assert!(profile.function.iter().map(|function| function.id).eq(1..=functions));
    assert!(profile.location.iter().map(|location| location.id).eq(1..=locations));
    assert!(!profile.sample.is_empty());
    for location in profile.sample.iter().flat_map(|sample| &sample.location_id) {
        assert!((1..=locations).contains(location), "{location}");
    }
    for line in profile.location.iter().flat_map(|location| &location.line) {
        assert!((1..=functions).contains(&line.function_id), "{line:?}");
    }
}

/// Written by hand from the format's description, so that a number that is wrong in our copy of it does not go unnoticed.
#[test]
fn fields_have_the_numbers_that_pprof_knows() {
    let mut profile = Profile::new([("a", "b"), ("a", "b")], ("a", "b"), SystemTime::UNIX_EPOCH);
    profile.duration(Duration::from_nanos(3));
    profile.period(4);
    profile.comment("a");
    profile.shown_first("b");
    let line = Line { name: "a".into(), system_name: "b".into(), file: "a".into(), line: 9 };
    let location = profile.location(&[line]);
    profile.add(vec![location], [7, 8]);
    let expected: &[&[u8]] = &[
        // What the values are: type (1) and unit (2), twice.
        &[0x0a, 4, 0x08, 1, 0x10, 2, 0x0a, 4, 0x08, 1, 0x10, 2],
        // A sample: its locations (1) and values (2).
        &[0x12, 7, 0x0a, 1, 1, 0x12, 2, 7, 8],
        // A location (4): its id (1), and a line (4) of a function (1) and a number (2).
        &[0x22, 8, 0x08, 1, 0x22, 4, 0x08, 1, 0x10, 9],
        // A function (5): its id (1), name (2), system's name (3) and file (4).
        &[0x2a, 8, 0x08, 1, 0x10, 1, 0x18, 2, 0x20, 1],
        // Texts (6).
        &[0x32, 0, 0x32, 1, b'a', 0x32, 1, b'b'],
        // Duration (10), the period's type (11), period (12), comments (13), and what is shown first (14).
        &[0x50, 3, 0x5a, 4, 0x08, 1, 0x10, 2, 0x60, 4, 0x6a, 1, 1, 0x70, 2],
    ];
    assert_eq!(profile.finish(), expected.concat());
}
