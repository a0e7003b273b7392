//! A pod that has too much of something, or cannot be captured, harms itself alone: it is closed, the others are served.

use aya::maps::{HashMap, Map, MapData};
use aya::programs::{ProgramInfo, SkLookup, loaded_programs};
use ztunnel_ebpf_abi::{ADDRESSES_PER_SLOT, Record, SLOTS, SlotAddress};
use ztunnel_node::capture::guards::{DEVICES_MAX, ELSEWHERE_MAX};

use super::*;

fn capture(testbed: &mut Testbed, pod: &Pod) -> Result<Captured, String> {
    let captured = testbed.node.bind(&spec(pod)).map_err(|error| error.to_string())?;
    testbed.node.capture(&spec(pod), &captured).map_err(|error| error.to_string())?;
    Ok(captured)
}

/// Runs many `ip` commands in a pod at once.
fn batch(pod: &Pod, commands: impl Iterator<Item = String>) {
    let commands: Vec<String> = commands.collect();
    let file = std::env::temp_dir().join(format!("{}-batch", pod.ns.0));
    std::fs::write(&file, commands.join("\n")).expect("writes");
    run(&format!("ip -n {} -batch {}", pod.ns.0, file.display()));
    std::fs::remove_file(file).expect("removes");
}

/// Something to dial, outside of the pod and in it.
fn applications(testbed: &Testbed, pod: &Pod) {
    let _outside = application(&testbed.plain, 9090);
    let _inside = application(pod, 8080);
}

/// Neither side of the pod is open.
fn is_closed(testbed: &Testbed, pod: &Pod) {
    for (own, other) in [(pod.v4, testbed.plain.v4), (pod.v6, testbed.plain.v6)] {
        let out = connect(pod, at(other, 9090)).expect_err("what it dials is refused");
        assert_eq!(out.kind(), ErrorKind::ConnectionRefused);
        let to = at(own, 8080);
        let inward = testbed.plain.ns.enter(|| TcpStream::connect_timeout(&to, Duration::from_millis(300)));
        inward.expect_err("what is dialled to it is refused");
    }
}

#[test]
fn an_enrolment_that_fails_leaves_the_pod_closed() {
    let mut testbed = Testbed::new();
    let pod = testbed.net.pod(4);
    // Its rules cannot be made: no device has this address.
    let wrong = PodSpec { addresses: vec!["10.99.0.77".parse().expect("ip"), pod.v6], ..spec(&pod) };
    applications(&testbed, &pod);
    let captured = testbed.node.bind(&wrong).expect("binds");
    testbed.node.capture(&wrong, &captured).expect_err("it has another address");
    assert_eq!(testbed.node.closed(), 1);
    is_closed(&testbed, &pod);
    assert_eq!(testbed.node.reconcile(), vec![], "nor does anybody open it");
    is_closed(&testbed, &pod);

    let captured = capture(&mut testbed, &pod).expect("captures");
    assert_eq!(testbed.node.closed(), 0);
    let daemon = Daemon::start(&captured);
    assert_eq!(greeting(&connect(&pod, at(testbed.plain.v4, 9090)).expect("captured")), "outbound");
    assert_eq!(greeting(&connect(&testbed.plain, at(pod.v6, 8080)).expect("captured")), "inbound");
    drop(captured);
    daemon.stop();
}

#[test]
fn a_pod_with_very_many_addresses_takes_no_room_from_others() {
    let mut testbed = Testbed::new();
    let ip = |n: usize| format!("10.50.{}.{}", n / 250, n % 250 + 1);
    batch(&testbed.enrolled, (0..2_000).map(|n| format!("addr add {}/32 dev lo", ip(n))));
    let repairs = testbed.node.reconcile();
    assert!(repairs.iter().any(|repair| repair.what.contains("addresses more than")), "{repairs:?}");
    assert_eq!(testbed.node.reconcile(), vec![], "it is said once");
    let map = MapData::from_pin(testbed.net.pins.join("v1/ADDRESSES")).expect("is pinned");
    let map = HashMap::<_, SlotAddress, u32>::try_from(Map::HashMap(map)).expect("of that kind");
    assert_eq!(map.keys().flatten().count(), ADDRESSES_PER_SLOT as usize);
    assert_eq!(
        greeting(&connect(&testbed.enrolled, at(testbed.plain.v4, 80)).expect("captured")),
        "outbound"
    );
    assert_eq!(testbed.daemon.next().kind, "outbound");

    let third = testbed.net.pod(4);
    let captured = capture(&mut testbed, &third).expect("there is room for the next");
    let daemon = Daemon::start(&captured);
    assert_eq!(greeting(&connect(&third, at(testbed.plain.v4, 80)).expect("captured")), "outbound");
    assert_eq!(greeting(&connect(&testbed.plain, at(third.v4, 80)).expect("captured")), "inbound");
    drop(captured);
    daemon.stop();

    // What is delivered to an address there is no room for does not come back to the daemon, again and again.
    let unknown = at(ip(1_900).parse().expect("ip"), 80);
    testbed
        .enrolled
        .ns
        .enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
            socket.bind_device(Some(b"lo")).expect("device");
            set(&socket, libc::SOL_IP, libc::IP_TRANSPARENT);
            socket.set_mark(REPLY).expect("mark");
            socket.bind(&at(testbed.plain.v4, 0).into()).expect("binds");
            socket.connect_timeout(&unknown.into(), Duration::from_millis(300))
        })
        .expect_err("it is refused");
    assert!(testbed.count(Counter::DroppedUnknownAddress) > 0);
    testbed.daemon.nothing();
}

#[test]
fn a_pod_with_too_many_devices_is_closed_and_the_others_are_served() {
    let mut testbed = Testbed::new();
    let third = testbed.net.pod(4);
    batch(&third, (0..40).map(|n| format!("link add a{n} type veth peer name b{n}")));
    let error = capture(&mut testbed, &third).expect_err("it has too many devices");
    assert!(error.contains("at most 64"), "{error}");
    applications(&testbed, &third);
    is_closed(&testbed, &third);
    assert_eq!(testbed.node.closed(), 1);
    // One that is served already.
    batch(&testbed.enrolled, (0..40).map(|n| format!("link add a{n} type veth peer name b{n}")));
    let repairs = testbed.node.reconcile();
    assert!(
        repairs.iter().any(|repair| !repair.repaired && repair.what.contains("at most 64")),
        "{repairs:?}"
    );
    connect(&testbed.enrolled, at(testbed.plain.v4, 9090)).expect_err("closed");
    assert_eq!(testbed.node.closed(), 2);

    let fourth = testbed.net.pod(5);
    let captured = capture(&mut testbed, &fourth).expect("captures");
    let daemon = Daemon::start(&captured);
    assert_eq!(greeting(&connect(&fourth, at(testbed.plain.v4, 80)).expect("captured")), "outbound");
    drop(captured);
    daemon.stop();

    // With fewer it is served again, without being enrolled again.
    batch(&testbed.enrolled, (0..20).map(|n| format!("link del a{n}")));
    let served = eventually(PATIENCE, || {
        testbed.node.reconcile();
        anyhow::ensure!(testbed.node.closed() == 1, "it is still closed");
        Ok(())
    });
    served.unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(
        greeting(&connect(&testbed.enrolled, at(testbed.plain.v4, 80)).expect("captured")),
        "outbound"
    );
}

#[test]
fn a_pod_that_goes_on_moving_devices_elsewhere_is_closed_and_its_guards_are_bounded() {
    let mut testbed = Testbed::new();
    let hideout = Ns(format!("{}-x", testbed.enrolled.ns.0));
    run(&format!("ip netns add {}", hideout.0));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let directory = testbed.net.pins.join("v1/pods/0");
        let guards = || std::fs::read_dir(&directory).expect("lists").count() - 1;
        let guarded = |testbed: &mut Testbed| {
            // Some devices each time.
            for _ in 0..4 {
                testbed.node.reconcile();
            }
            let looked = eventually(PATIENCE, || {
                let repairs = testbed.node.reconcile();
                anyhow::ensure!(repairs.is_empty(), "{repairs:?}");
                Ok(())
            });
            looked.unwrap_or_else(|error| panic!("{error:#}"));
        };
        // Twice as many as there may be, in all.
        let rounds = 2 * (DEVICES_MAX + ELSEWHERE_MAX) / 40 + 1;
        for round in 0..rounds {
            batch(&testbed.enrolled, (0..20).map(|n| format!("link add a{n} type veth peer name b{n}")));
            guarded(&mut testbed);
            let devices = ["a", "b"].into_iter().flat_map(|side| (0..20).map(move |n| format!("{side}{n}")));
            let moves =
                devices.map(|device| format!("link set {device} netns {} name {device}r{round}", hideout.0));
            batch(&testbed.enrolled, moves);
            // That they are gone is heard of.
            guarded(&mut testbed);
            assert!(guards() < DEVICES_MAX + ELSEWHERE_MAX, "{} guards in round {round}", guards());
        }
        batch(&testbed.enrolled, std::iter::once("link add a0 type veth peer name b0".to_owned()));
        let repairs = testbed.node.reconcile();
        testbed.node.reconcile();
        assert_eq!(testbed.node.closed(), 1, "{repairs:?}");
        applications(&testbed, &testbed.enrolled);
        connect(&testbed.enrolled, at(testbed.plain.v4, 9090)).expect_err("closed");
        // What is no more takes no room, and it is served again.
        run(&format!("ip netns del {}", hideout.0));
        let served = eventually(PATIENCE, || {
            testbed.node.reconcile();
            anyhow::ensure!(testbed.node.closed() == 0, "it is still closed");
            Ok(())
        });
        served.unwrap_or_else(|error| panic!("{error:#}"));
        guarded(&mut testbed);
        assert_eq!(guards(), 3, "of eth0 and the last two");
        assert_eq!(
            greeting(&connect(&testbed.enrolled, at(testbed.plain.v4, 80)).expect("captured")),
            "outbound"
        );
    }));
    if outcome.is_err() {
        let _gone = std::panic::catch_unwind(|| run(&format!("ip netns del {}", hideout.0)));
    }
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// The records of the node's pods.
fn records(testbed: &Testbed) -> HashMap<MapData, u32, Record> {
    let map = MapData::from_pin(testbed.net.pins.join("v1/RECORDS")).expect("is pinned");
    HashMap::try_from(Map::HashMap(map)).expect("of that kind")
}

/// As many pods as a node can have.
fn fill(records: &mut HashMap<MapData, u32, Record>) {
    let model = records.get(&0, 0).expect("the enrolled pod's");
    for slot in 1..SLOTS {
        let mut record = Record { cookie: u64::MAX - u64::from(slot), netns_len: 0, ..model };
        record.uid[..4].copy_from_slice(&slot.to_be_bytes());
        records.insert(slot, record, 0).expect("room");
    }
}

fn empty(records: &mut HashMap<MapData, u32, Record>, keep: &[u32]) {
    let slots: Vec<u32> = records.keys().flatten().filter(|slot| !keep.contains(slot)).collect();
    slots.iter().for_each(|slot| records.remove(slot).expect("there"));
}

#[test]
fn a_pod_for_which_there_is_no_slot_is_closed() {
    let mut testbed = Testbed::new();
    let third = testbed.net.pod(4);
    applications(&testbed, &third);
    let mut records = records(&testbed);
    fill(&mut records);
    testbed.node.bind(&spec(&third)).expect_err("there is no slot");
    is_closed(&testbed, &third);
    // Taken out of the mesh it is as without one.
    testbed.node.withdraw(&spec(&third).uid).expect("withdraws");
    for (from, to) in [(&third, at(testbed.plain.v4, 9090)), (&testbed.plain, at(third.v6, 8080))] {
        assert_eq!(greeting(&connect(from, to).expect("is open")), "app");
    }
    testbed.node.bind(&spec(&third)).expect_err("there is no slot");
    is_closed(&testbed, &third);
    // One is free.
    records.remove(&7).expect("there");
    let captured = capture(&mut testbed, &third).expect("captures");
    let daemon = Daemon::start(&captured);
    assert_eq!(greeting(&connect(&third, at(testbed.plain.v4, 9090)).expect("captured")), "outbound");
    assert_eq!(greeting(&connect(&testbed.plain, at(third.v6, 8080)).expect("captured")), "inbound");
    drop(captured);
    daemon.stop();
    empty(&mut records, &[0, 7]);
}

/// Attaches as many programs to a pod's namespace as it takes.
fn crowd_out(pod: &Pod) -> SkLookup {
    let lookup = |info: &ProgramInfo| info.name_as_str() == Some("steer");
    let info = loaded_programs().flatten().find(lookup).expect("the enrolled pod's");
    let mut program = SkLookup::from_program_info(info, "steer".into()).expect("it is one");
    let netns = std::fs::File::open(pod.ns.path()).expect("opens");
    while program.attach(&netns).is_ok() {}
    program
}

#[test]
fn a_pod_without_a_slot_that_could_be_closed_one_way_only_is_closed_later_and_let_go() {
    let mut testbed = Testbed::new();
    let third = testbed.net.pod(4);
    applications(&testbed, &third);
    let mut records = records(&testbed);
    fill(&mut records);
    let out = at(testbed.plain.v4, 9090);
    for then_close in [false, true] {
        let crowd = crowd_out(&third);
        testbed.node.bind(&spec(&third)).expect_err("there is no slot");
        connect(&third, out).expect_err("this way it is closed");
        drop(crowd);
        if then_close {
            testbed.node.bind(&spec(&third)).expect_err("there is no slot");
            is_closed(&testbed, &third);
        }
        testbed.node.withdraw(&spec(&third).uid).expect("withdraws");
        for (from, to) in [(&third, out), (&testbed.plain, at(third.v6, 8080))] {
            assert_eq!(greeting(&connect(from, to).expect("is open")), "app");
        }
    }
    empty(&mut records, &[0]);
}
