//! A self-test that does not come to its end leaves nothing behind.

use std::collections::HashSet;
use std::process::{Command, Stdio};

use aya::programs::loaded_links;
use ztunnel_tests::binaries;

use super::*;

/// The links that a process holds.
fn links_of(pid: u32) -> HashSet<u32> {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return HashSet::new() };
    let texts = descriptors.flatten().filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    texts
        .filter_map(|text| text.lines().find_map(|line| line.strip_prefix("link_id:")?.trim().parse().ok()))
        .collect()
}

#[test]
fn a_self_test_that_is_killed_leaves_nothing() {
    let pins = std::env::temp_dir().join(format!("self-test-pins-{}", std::process::id()));
    let mut seen = HashSet::new();
    // It is over soon: it may have ended before it is seen in its midst.
    for _ in 0..50 {
        let mut child = Command::new(binaries::daemon().expect("built"))
            .args(["selftest", "--pin-dir"])
            .arg(&pins)
            .stdout(Stdio::null())
            .spawn()
            .expect("starts");
        while seen.len() < 3 && child.try_wait().expect("waits").is_none() {
            seen = links_of(child.id());
        }
        child.kill().expect("kills");
        child.wait().expect("waits");
        if seen.len() >= 3 {
            break;
        }
        seen.clear();
    }
    assert!(seen.len() >= 3, "it was never seen with its programs attached");
    let gone = eventually(PATIENCE, || {
        let left: Vec<u32> =
            loaded_links().flatten().map(|link| link.id()).filter(|id| seen.contains(id)).collect();
        anyhow::ensure!(left.is_empty(), "links {left:?} of {seen:?} are left");
        Ok(())
    });
    gone.unwrap_or_else(|error| panic!("{error:#}"));
    assert!(!pins.exists(), "{} is left", pins.display());
}
