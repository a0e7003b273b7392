use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use super::*;
use crate::admin::profile::encoder::tests::fields;

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

#[test]
fn numbers_are_written_as_the_format_says() {
    let mut message = Message::default().number(1, 150);
    message.bytes(2, b"testing");
    // The two examples of the encoding's documentation.
    assert_eq!(
        message.into_bytes(),
        [0x08, 0x96, 0x01, 0x12, 0x07, 0x74, 0x65, 0x73, 0x74, 0x69, 0x6e, 0x67]
    );
    let packed = Message::default().packed(6, [3, 270, 86_942]).into_bytes();
    assert_eq!(packed, [0x32, 0x06, 0x03, 0x8e, 0x02, 0x9e, 0xa7, 0x05]);
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

    let profile = fields(&profile.unwrap());
    let of = |field: u32| profile.iter().filter(move |known| known.0 == u64::from(field));
    let strings: Vec<_> = of(STRING).map(|known| String::from_utf8(known.2.clone()).unwrap()).collect();
    assert_eq!(strings[0], "");
    assert!(strings.iter().any(|text| text.contains("busy_for_the_profile")), "{strings:?}");
    assert!(strings.iter().any(|text| text == "busy"), "{strings:?}");
    assert_eq!(of(PERIOD).next().unwrap().1, 2_000_000);
    assert_eq!((of(SAMPLE_TYPE).count(), of(PERIOD_TYPE).count()), (2, 1));

    // Every identifier that is used is defined, counted from 1 without a gap.
    let ids = |field| of(field).map(|known| fields(&known.2)[0].1).collect::<Vec<_>>();
    assert_eq!(ids(FUNCTION), (1..=of(FUNCTION).count() as u64).collect::<Vec<_>>());
    assert_eq!(ids(LOCATION), (1..=of(LOCATION).count() as u64).collect::<Vec<_>>());
    assert!(of(SAMPLE).count() > 0);
}
