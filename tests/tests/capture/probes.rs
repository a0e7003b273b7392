//! What the node itself dials passes; what only looks as if it did, does not.

use super::*;

const PROBE: [&str; 2] = ["169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"];

/// A neighbour that the pod takes for its gateway.
fn spoof_gateway(testbed: &Testbed) {
    let link = testbed.plain.ns.ip("-o link show dev eth0");
    let address = link.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).expect("has one");
    for ip in ["10.99.0.1", "fd99::1"] {
        testbed.enrolled.ns.ip(&format!("neigh replace {ip} lladdr {} dev eth0 nud permanent", address));
    }
    testbed.plain.ns.ip(&format!("addr add {}/32 dev eth0", PROBE[0]));
    testbed.plain.ns.ip(&format!("addr add {}/128 dev eth0 nodad", PROBE[1]));
}

fn dial_from(pod: &Pod, source: SocketAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    pod.ns.enter(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&source.into())?;
        socket.connect_timeout(&to.into(), CONNECTED_WITHIN)?;
        Ok(socket.into())
    })
}

#[test]
fn a_neighbour_with_the_probes_source_address_is_no_probe() {
    let testbed = Testbed::new();
    let _seen = application(&testbed.enrolled, 8080);
    spoof_gateway(&testbed);
    for (source, own) in PROBE.into_iter().zip([testbed.enrolled.v4, testbed.enrolled.v6]) {
        let source = at(source.parse().expect("ip"), 0);
        for _ in 0..3 {
            let stream = dial_from(&testbed.plain, source, at(own, 8080)).expect("the daemon takes it");
            assert_eq!(greeting(&stream), "inbound");
            assert_eq!(testbed.daemon.next().from.ip(), source.ip());
        }
    }
    assert_eq!(testbed.count(Counter::AcceptedProbe), 0);
}

#[test]
fn a_probe_is_forgotten_when_it_has_ended() {
    let testbed = Testbed::new();
    let _seen = application(&testbed.enrolled, 8080);
    let mut used = Vec::new();
    for own in [testbed.enrolled.v4, testbed.enrolled.v6] {
        let probe = testbed.net.node.enter(|| TcpStream::connect_timeout(&at(own, 8080), CONNECTED_WITHIN));
        let probe = probe.expect("probes");
        assert_eq!(greeting(&probe), "app");
        used.push((probe.local_addr().expect("has one"), own));
        // Its end is at once, on both sides.
        SockRef::from(&probe).set_linger(Some(Duration::ZERO)).expect("linger");
    }
    assert_eq!(testbed.count(Counter::AcceptedProbe), 2);
    spoof_gateway(&testbed);
    for (source, own) in used {
        let stream = dial_from(&testbed.plain, source, at(own, 8080)).expect("the daemon takes it");
        assert_eq!(greeting(&stream), "inbound");
    }
    assert_eq!(testbed.count(Counter::AcceptedProbe), 2);
}

#[test]
fn many_probes_at_once_all_pass() {
    let testbed = Testbed::new();
    let _seen = application(&testbed.enrolled, 8080);
    let to = at(testbed.enrolled.v4, 8080);
    let probes: Vec<TcpStream> = testbed.net.node.enter(|| {
        (0..300).map(|_| TcpStream::connect_timeout(&to, CONNECTED_WITHIN).expect("probes")).collect()
    });
    probes.iter().for_each(|probe| assert_eq!(greeting(probe), "app"));
    assert_eq!(testbed.count(Counter::AcceptedProbe), 300);
}
