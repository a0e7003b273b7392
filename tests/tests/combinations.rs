//! Some hundred kinds of connection, chosen pairwise, under each way of capturing: see `ztunnel_tests::combinations`.
//!
//! `ZTUNNEL_COMBINATIONS=2000 ZTUNNEL_SEED=7 cargo test -p ztunnel-tests --test combinations` plays more, or others.
#![expect(clippy::print_stdout, reason = "what was played is shown with the test")]

use std::sync::OnceLock;

use ztunnel_tests::combinations::axes::{Capture, Combination, Name, Path, Server};
use ztunnel_tests::combinations::cover::{Chosen, choose};
use ztunnel_tests::combinations::{by_kind, play};

ztunnel_tests::enclosed!();

/// How many are played in all, at least.
const COUNT: usize = 330;
const SEED: u64 = 1;

/// What is known not to hold yet: the cause, and where.
type Known = (&'static str, fn(&Combination, &str) -> bool);

const KNOWN: &[Known] = &[
    (
        "an answer without a socket has no mark, and misses the daemon that dials where nobody listens",
        |it, _| {
            it.capture == Capture::Ebpf
                && it.server_in_mesh()
                && matches!(it.server, Server::ClosedPort | Server::Restarting)
        },
    ),
    ("a delivery from a pod's own address to it is bound to the loopback, and its answer is not", |it, _| {
        it.capture == Capture::Ebpf && it.path == Path::Itself && it.name == Name::ClusterIp
    }),
];

fn set<T: std::str::FromStr>(variable: &str, default: T) -> T {
    let Ok(text) = std::env::var(variable) else { return default };
    text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number"))
}

fn all_of(capture: Capture) {
    static CHOSEN: OnceLock<Chosen> = OnceLock::new();
    let (seed, count) = (set("ZTUNNEL_SEED", SEED), set("ZTUNNEL_COMBINATIONS", COUNT));
    let chosen = CHOSEN.get_or_init(|| choose(seed, count));
    let outcome = play(capture, &chosen.combinations).unwrap_or_else(|error| panic!("{capture}: {error:#}"));
    let (known, failures): (Vec<_>, Vec<_>) = outcome
        .failures
        .into_iter()
        .partition(|(it, what)| KNOWN.iter().any(|(_, applies)| applies(it, what)));
    for (kind, combinations) in by_kind(&failures) {
        println!("{} × {kind}, first: {}", combinations.len(), combinations[0]);
    }
    for (cause, applies) in KNOWN {
        let count = known.iter().filter(|(it, what)| applies(it, what)).count();
        println!("{count} findings are known: {cause}");
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
