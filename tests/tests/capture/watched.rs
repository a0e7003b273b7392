//! What is changed in a pod is heard of at once, and put right or kept closed.

use std::os::fd::OwnedFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ztunnel_node::capture::reconcile::Repair;

use super::*;

/// Waits for an announcement and looks, until something was repaired or noticed.
fn hears(node: &mut Node, announcements: &OwnedFd) -> Vec<Repair> {
    let heard = eventually(PATIENCE, || {
        let mut polled = [PollFd::new(announcements.as_fd(), PollFlags::POLLIN)];
        let _said = poll(&mut polled, PollTimeout::from(100_u16))?;
        let (repairs, _) = node.reconcile_announced();
        anyhow::ensure!(!repairs.is_empty(), "nothing was heard");
        Ok(repairs)
    });
    heard.unwrap_or_else(|error| panic!("{error:#}"))
}

/// A testbed whose node listens from the beginning, and has heard of its own doing.
fn listening() -> (Testbed, OwnedFd) {
    let mut testbed = Testbed::new();
    let announcements = testbed.node.announcements().expect("needs CAP_NET_BROADCAST");
    testbed.node.reconcile();
    let quiet = eventually(PATIENCE, || {
        let (repairs, again) = testbed.node.reconcile_announced();
        anyhow::ensure!(repairs.is_empty() && again.is_none(), "{repairs:?}");
        Ok(())
    });
    quiet.unwrap_or_else(|error| panic!("{error:#}"));
    (testbed, announcements)
}

#[test]
fn rules_routes_and_devices_are_heard_of_without_a_look_at_all() {
    let (mut testbed, announcements) = listening();
    testbed.enrolled.ns.sh("ip rule flush; ip rule add pref 32766 lookup main");
    let repairs = hears(&mut testbed.node, &announcements);
    assert!(repairs.iter().any(|repair| repair.repaired && repair.what.contains("rule for")), "{repairs:?}");
    testbed.enrolled.ns.ip("-6 route flush table 100");
    let repairs = hears(&mut testbed.node, &announcements);
    assert!(repairs.iter().any(|repair| repair.what.contains("route in table 100")), "{repairs:?}");
    testbed.enrolled.ns.ip("link add dev2 type veth peer name dev3");
    let repairs = hears(&mut testbed.node, &announcements);
    assert!(repairs.iter().any(|repair| repair.what.contains("had no guard")), "{repairs:?}");
    assert_eq!(testbed.node.reconcile(), vec![]);
}

#[test]
fn a_pod_that_goes_on_changing_is_looked_at_now_and_then() {
    let (mut testbed, announcements) = listening();
    let flush = "ip rule flush; ip rule add pref 32766 lookup main";
    testbed.enrolled.ns.sh(flush);
    hears(&mut testbed.node, &announcements);
    // It rests after that, and says until when. A slow machine may take longer for the change than the rest is.
    let rests = eventually(PATIENCE, || {
        testbed.enrolled.ns.sh(flush);
        let (repairs, again) = testbed.node.reconcile_announced();
        anyhow::ensure!(repairs.is_empty() && again.is_some(), "it was looked at once more: {repairs:?}");
        Ok(())
    });
    rests.unwrap_or_else(|error| panic!("{error:#}"));
    let looked_at = eventually(PATIENCE, || {
        let (repairs, again) = testbed.node.reconcile_announced();
        anyhow::ensure!(!repairs.is_empty(), "it rests until {again:?}");
        Ok(repairs)
    });
    let repairs = looked_at.unwrap_or_else(|error| panic!("{error:#}"));
    assert!(repairs.iter().any(|repair| repair.what.contains("rule for")), "{repairs:?}");
}

#[test]
fn a_device_that_is_taken_elsewhere_stays_guarded() {
    let (mut testbed, announcements) = listening();
    let _outside = application(&testbed.plain, 9090);
    let sniffer = Sniffer::start(&testbed.net, &testbed.enrolled);
    let link = testbed.enrolled.ns.ip("-o link show dev eth0");
    let index = link.split(':').next().expect("has one");
    let hideout = Pod { ns: Ns(format!("{}-x", testbed.enrolled.ns.0)), ..testbed.enrolled.clone() };
    run(&format!("ip netns add {}", hideout.ns.0));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        testbed.enrolled.ns.ip(&format!("link set eth0 netns {}", hideout.ns.0));
        let repairs = hears(&mut testbed.node, &announcements);
        let left = |repair: &Repair| !repair.repaired && repair.what.contains("another network namespace");
        assert!(repairs.iter().any(left), "{repairs:?}");
        assert_eq!(testbed.node.devices_left().load(Ordering::Relaxed), 1);
        for setup in [
            "link set lo up",
            "link set eth0 up",
            "addr add 10.99.0.2/24 dev eth0",
            "addr add fd99::2/64 dev eth0 nodad",
        ] {
            hideout.ns.ip(setup);
        }
        let before = testbed.count(Counter::GuardSyn);
        for to in [testbed.plain.v4, testbed.plain.v6] {
            hideout
                .ns
                .enter(|| TcpStream::connect_timeout(&at(to, 9090), Duration::from_millis(300)))
                .expect_err("nobody vouches for it");
        }
        assert!(testbed.count(Counter::GuardSyn) >= before + 2);
        // One that takes its number is another one.
        testbed.enrolled.ns.ip(&format!("link add eth9 index {index} type veth peer name eth8"));
        let repairs = hears(&mut testbed.node, &announcements);
        assert!(repairs.iter().any(|it| it.what == format!("device {index} had no guard")), "{repairs:?}");
        testbed.enrolled.ns.ip("link del eth9");
        // It comes back, and all is as before.
        hideout.ns.ip(&format!("link set eth0 netns {}", testbed.enrolled.ns.0));
        for setup in [
            "addr add 10.99.0.2/24 dev eth0",
            "addr add fd99::2/64 dev eth0 nodad",
            "link set eth0 up",
            "route add default via 10.99.0.1",
            "-6 route add default via fd99::1",
        ] {
            testbed.enrolled.ns.ip(setup);
        }
        let whole = eventually(PATIENCE, || {
            let repairs = testbed.node.reconcile();
            anyhow::ensure!(repairs.is_empty(), "{repairs:?}");
            Ok(())
        });
        whole.unwrap_or_else(|error| panic!("{error:#}"));
        assert_eq!(
            greeting(&connect(&testbed.enrolled, at(testbed.plain.v4, 9090)).expect("captured")),
            "outbound"
        );
        let pins = std::fs::read_dir(testbed.net.pins.join("v1/pods/0")).expect("lists");
        let mut pins: Vec<_> =
            pins.flatten().map(|pin| pin.file_name().to_string_lossy().into_owned()).collect();
        pins.sort();
        assert_eq!(pins, [format!("guard-{index}"), "lookup".to_owned()]);
    }));
    run(&format!("ip netns del {}", hideout.ns.0));
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    sniffer.nothing_seen();
}
