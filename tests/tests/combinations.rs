//! Some hundred kinds of connection, chosen pairwise, under each way of capturing: see `ztunnel_tests::combinations`.
//!
//! `ZTUNNEL_COMBINATIONS=2000 ZTUNNEL_SEED=7 cargo test -p ztunnel-tests --test combinations` plays more, or others.
#![expect(clippy::print_stdout, reason = "what was played is shown with the test")]

use std::sync::OnceLock;

use ztunnel_tests::combinations::axes::Capture;
use ztunnel_tests::combinations::cover::{Chosen, choose};
use ztunnel_tests::combinations::{by_kind, play};

ztunnel_tests::enclosed!();

/// How many are played in all, at least.
const COUNT: usize = 330;
const SEED: u64 = 1;

fn set<T: std::str::FromStr>(variable: &str, default: T) -> T {
    let Ok(text) = std::env::var(variable) else { return default };
    text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number"))
}

fn all_of(capture: Capture) {
    static CHOSEN: OnceLock<Chosen> = OnceLock::new();
    let (seed, count) = (set("ZTUNNEL_SEED", SEED), set("ZTUNNEL_COMBINATIONS", COUNT));
    let chosen = CHOSEN.get_or_init(|| choose(seed, count));
    let outcome = play(capture, &chosen.combinations).unwrap_or_else(|error| panic!("{capture}: {error:#}"));
    let failures = outcome.failures;
    for (kind, combinations) in by_kind(&failures) {
        println!("{} × {kind}, first: {}", combinations.len(), combinations[0]);
    }
    for (combination, what) in &failures {
        println!("FAILED {combination}\n    {what}");
    }
    println!(
        "{capture}: {} of {} combinations (seed {seed}, all {} pairs of {} that make sense), compared with {} \
         connections outside the mesh",
        outcome.played,
        chosen.combinations.len(),
        chosen.pairs,
        chosen.sensible,
        outcome.references
    );
    assert!(failures.is_empty(), "{} findings", failures.len());
}

#[test]
fn captured_by_ebpf() {
    all_of(Capture::Ebpf);
}

#[test]
fn redirected_by_iptables() {
    all_of(Capture::Iptables);
}

#[test]
fn redirected_by_nftables() {
    all_of(Capture::Nft);
}
