//! Whose a connection is, is settled when it begins: what a pod does to its sockets, rules and devices afterwards
//! must not send a byte of it out in clear.

use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};

use super::*;

const MPTCP: i32 = 262;

/// A sniffer at every port of the node's bridge that leads to the pod.
fn watch(testbed: &Testbed) -> Sniffer {
    Sniffer::start(&testbed.net, &testbed.enrolled)
}

fn both(testbed: &Testbed) -> [(IpAddr, IpAddr); 2] {
    [(testbed.plain.v4, testbed.enrolled.v4), (testbed.plain.v6, testbed.enrolled.v6)]
}

/// A listener of the application.
fn listening(testbed: &Testbed, own: IpAddr, prepare: impl FnOnce(&Socket) + Send) -> TcpListener {
    testbed.enrolled.ns.enter(|| {
        let socket = Socket::new(Domain::for_address(at(own, 0)), Type::STREAM, None).expect("socket");
        socket.set_reuse_address(true).expect("option");
        prepare(&socket);
        socket.bind(&at(own, 0).into()).expect("binds");
        socket.listen(8).expect("listens");
        socket.into()
    })
}

/// The daemon dials the application for `client`; both ends of that.
fn delivered(testbed: &Testbed, client: IpAddr, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let to = listener.local_addr().expect("bound");
    let ours = testbed.enrolled.ns.enter(|| transparent_dial(client, to));
    let (taken, from) = listener.accept().expect("takes it");
    assert_eq!(canonical(from).ip(), client);
    (ours, taken)
}

/// Says the secret on a connection that must not get out with it.
fn says_secret(stream: &TcpStream) {
    let mut writer = stream;
    // It may be refused at once.
    let _queued = writer.write_all(SECRET);
}

/// Waits until packets of captured connections were stopped since `before`.
fn stopped(testbed: &Testbed, before: u64) {
    let stopped = eventually(PATIENCE, || {
        let now = testbed.count(Counter::LeaveCaptured);
        anyhow::ensure!(now > before, "no packet of a captured connection was stopped");
        Ok(())
    });
    stopped.unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn an_accepted_connection_that_changes_its_mark_is_stopped() {
    let testbed = Testbed::new();
    for (client, own) in both(&testbed) {
        for mark in [0, BYPASS, 0x1234] {
            let sniffer = watch(&testbed);
            let before = testbed.count(Counter::LeaveCaptured);
            let listener = listening(&testbed, own, |_| {});
            let (_ours, taken) = delivered(&testbed, client, &listener);
            SockRef::from(&taken).set_mark(mark).expect("mark");
            says_secret(&taken);
            stopped(&testbed, before);
            sniffer.nothing_seen();
        }
    }
}

#[test]
fn a_listener_with_a_mark_of_the_mesh_gains_nothing() {
    let testbed = Testbed::new();
    for (client, own) in both(&testbed) {
        // What has its answers stay in the pod until the connection is there.
        for mark in [REPLY, ztunnel_ebpf_abi::CAPTURE, 0x1_0000 | REPLY] {
            let sniffer = watch(&testbed);
            let before = testbed.count(Counter::LeaveCaptured);
            let listener = listening(&testbed, own, |socket| socket.set_mark(mark).expect("mark"));
            let (_ours, taken) = delivered(&testbed, client, &listener);
            SockRef::from(&taken).set_mark(0).expect("mark");
            says_secret(&taken);
            stopped(&testbed, before);
            sniffer.nothing_seen();
        }
    }
}

#[test]
fn a_delivery_is_known_without_its_mark() {
    let testbed = Testbed::new();
    let pod = &testbed.enrolled.ns;
    pod.sh("sysctl -qw net.ipv4.tcp_fwmark_accept=0");
    for (client, own) in both(&testbed) {
        let family = if client.is_ipv4() { "" } else { "-6 " };
        let rule = format!("from {own} to {client} priority 5 table 100");
        pod.ip(&format!("{family}rule add {rule}"));
        let sniffer = watch(&testbed);
        let before = testbed.count(Counter::LeaveCaptured);
        let listener = listening(&testbed, own, |_| {});
        let (_ours, taken) = delivered(&testbed, client, &listener);
        pod.ip(&format!("{family}rule del {rule}"));
        says_secret(&taken);
        stopped(&testbed, before);
        sniffer.nothing_seen();
    }
}

#[test]
fn a_connection_that_had_a_mark_of_the_mesh_when_it_was_dialled_is_stopped() {
    let testbed = Testbed::new();
    for (remote, own) in both(&testbed) {
        for mark in [REPLY, ztunnel_ebpf_abi::CAPTURE, BYPASS] {
            let sniffer = watch(&testbed);
            let before = testbed.count(Counter::LeaveCaptured);
            let stream = testbed.enrolled.ns.enter(|| {
                let socket =
                    Socket::new(Domain::for_address(at(remote, 0)), Type::STREAM, None).expect("socket");
                socket.set_mark(mark).expect("mark");
                socket.connect_timeout(&at(remote, 7777).into(), CONNECTED_WITHIN).expect("is captured");
                TcpStream::from(socket)
            });
            assert_eq!(greeting(&stream), "outbound");
            assert_eq!(testbed.daemon.next().from.ip(), own);
            SockRef::from(&stream).set_mark(0).expect("mark");
            says_secret(&stream);
            stopped(&testbed, before);
            sniffer.nothing_seen();
        }
    }
}

#[test]
fn a_multipath_connection_that_changes_its_mark_is_stopped() {
    let testbed = Testbed::new();
    for (remote, _) in both(&testbed) {
        let sniffer = watch(&testbed);
        let before = testbed.count(Counter::LeaveCaptured);
        let stream = testbed.enrolled.ns.enter(|| {
            let domain = Domain::for_address(at(remote, 0));
            let socket = Socket::new(domain, Type::STREAM, Some(Protocol::from(MPTCP))).expect("socket");
            socket.connect(&at(remote, 7777).into()).expect("is captured");
            TcpStream::from(socket)
        });
        assert_eq!(greeting(&stream), "outbound");
        SockRef::from(&stream).set_mark(0).expect("mark");
        says_secret(&stream);
        stopped(&testbed, before);
        sniffer.nothing_seen();
    }
}

/// A device that nobody guards yet, and no rule that keeps anything in the pod.
#[test]
fn without_rules_and_by_an_unguarded_device_nothing_captured_leaves() {
    let testbed = Testbed::new();
    let pod = &testbed.enrolled.ns;
    let open: Vec<_> = both(&testbed)
        .into_iter()
        .map(|(remote, own)| {
            let dialled = connect(&testbed.enrolled, at(remote, 7777)).expect("captured");
            assert_eq!(greeting(&dialled), "outbound");
            let listener = listening(&testbed, own, |_| {});
            (dialled, delivered(&testbed, remote, &listener))
        })
        .collect();
    testbed.net.node.ip(&format!("link add late type veth peer name eth1 netns {}", pod.0));
    testbed.net.node.ip("link set late master br0 up");
    let sniffer = Sniffer::start(&testbed.net, &Pod { veth: "late".to_owned(), ..testbed.enrolled.clone() });
    pod.sh(
        "ip rule flush; ip rule add pref 32766 lookup main; ip -6 rule flush; ip -6 rule add pref 32766 lookup main; \
         ip link set eth1 up; ip route add 10.99.0.3/32 dev eth1 src 10.99.0.2; ip -6 route add fd99::3/128 dev eth1 src \
         fd99::2",
    );
    for (dialled, (_ours, taken)) in &open {
        for stream in [dialled, taken] {
            let before = testbed.count(Counter::LeaveCaptured);
            says_secret(stream);
            stopped(&testbed, before);
        }
    }
    let before = testbed.count(Counter::LeaveCaptured);
    testbed
        .enrolled
        .ns
        .enter(|| TcpStream::connect_timeout(&at(testbed.plain.v4, 7778), Duration::from_millis(300)))
        .expect_err("nothing brings it to the daemon");
    stopped(&testbed, before);
    sniffer.nothing_seen();
}

#[test]
fn connections_from_before_the_enrolment_go_on_both_ways() {
    let mut net = Net::new();
    let (enrolled, plain) = (net.pod(2), net.pod(3));
    let (_inside, _outside) = (application(&enrolled, 8080), application(&plain, 9090));
    let ips = [(enrolled.v4, plain.v4), (enrolled.v6, plain.v6)];
    let early: Vec<TcpStream> = ips
        .into_iter()
        .flat_map(|(own, other)| {
            [connect(&enrolled, at(other, 9090)), connect(&plain, at(own, 8080))].map(|it| it.expect("plain"))
        })
        .collect();
    early.iter().for_each(|stream| assert_eq!(greeting(stream), "app"));
    let testbed = Testbed::of(net, enrolled, plain);
    for stream in &early {
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        echo(stream, SECRET).expect("goes on");
    }
    assert_eq!(testbed.count(Counter::LeaveCaptured) + testbed.count(Counter::GuardLostMark), 0);
}

/// What the program on the way out of every socket takes, by the kernel's own count.
#[test]
fn what_runs_for_every_packet_is_short() {
    let testbed = Testbed::new();
    let _outside = application(&testbed.plain, 9090);
    let ours = egress_programs();
    let _counting = enable_stats(Stats::RunTime).expect("needs root");
    let before = run(&ours);
    let captured = connect(&testbed.enrolled, at(testbed.plain.v4, 9090)).expect("captured");
    let free = connect(&testbed.plain, at(testbed.plain.v4, 9090)).expect("itself");
    let probe =
        testbed.net.node.enter(|| TcpStream::connect(at(testbed.plain.v4, 9090))).expect("not captured");
    for stream in [&captured, &free, &probe] {
        greeting(stream);
        (0..2000).for_each(|_| echo(stream, b"a line").expect("echoes"));
    }
    let (time, count) = run(&ours);
    let (time, count) = (time - before.0, count - before.1);
    println!("{} ns for each of {count} packets", time.as_nanos() / u128::from(count));
    assert!(count >= 12_000, "{count} packets");
    // Some 50 ns; a busy machine may interrupt it.
    assert!(time < Duration::from_micros(5) * count as u32, "{time:?} for {count} packets");
}

/// The numbers of the programs of that kind that this process has attached.
fn egress_programs() -> Vec<u32> {
    let descriptors = std::fs::read_dir("/proc/self/fdinfo").expect("proc").flatten();
    let texts = descriptors.filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    let egress = texts.filter(|text| text.contains("cgroup_id:") && text.contains("attach_type:\t1\n"));
    egress
        .filter_map(|text| text.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse().ok()))
        .collect()
}

/// How long these have run, and how often.
fn run(programs: &[u32]) -> (Duration, u64) {
    let ours = loaded_programs().flatten().filter(|program| programs.contains(&program.id()));
    ours.fold((Duration::ZERO, 0), |(time, count), program| {
        (time + program.run_time(), count + program.run_count())
    })
}
