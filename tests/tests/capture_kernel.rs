//! Capture against the real kernel: namespaces made by hand, a trivial daemon, every way to open a connection.
//!
//! Needs root and Linux 6.6.

#![expect(clippy::print_stdout, reason = "what was measured is shown with the test")]

use std::collections::HashSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nix::mount::MsFlags;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use ztunnel_ebpf_abi::{BYPASS, Counter, REPLY};
use ztunnel_mesh::model::addr::{PodUid, canonical};
use ztunnel_node::capture::host::cgroup_root;
use ztunnel_node::capture::selftest::self_test;
use ztunnel_node::capture::uninstall::uninstall;
use ztunnel_node::capture::{Captured, Config, Listeners, Node, PodSpec};
use ztunnel_node::net::socket::{CapturedPod, Delivery, Keepalive, PodNetwork as _};
use ztunnel_tests::poll::{PATIENCE, eventually};
use ztunnel_tests::raw_netns::{Net, Ns, Pod, run};

#[path = "capture/limits.rs"]
mod limits;
#[path = "capture/ownership.rs"]
mod ownership;
#[path = "capture/probes.rs"]
mod probes;
#[path = "capture/selftest.rs"]
mod selftest;
#[path = "capture/watched.rs"]
mod watched;

ztunnel_tests::enclosed!();

/// What somebody does to a pod.
type Attack = Box<dyn Fn(&Testbed)>;

/// Longer than a connection on one machine takes, and short enough to wait for one that is dropped.
const CONNECTED_WITHIN: Duration = Duration::from_secs(10);
/// What must never be seen outside of a pod.
const SECRET: &[u8] = b"clear-text-payload";

fn config(net: &Net) -> Config {
    Config {
        pin_dir: net.pins.clone(),
        cgroup_root: cgroup_root().expect("cgroup v2 is mounted"),
        kubepods: None,
        host_netns: net.node.path(),
    }
}

fn spec(pod: &Pod) -> PodSpec {
    PodSpec { uid: PodUid::from(&*pod.ns.0), netns: pod.ns.path(), addresses: vec![pod.v4, pod.v6] }
}

/// What a listener of the daemon saw.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    kind: &'static str,
    from: SocketAddr,
    to: SocketAddr,
}

/// The daemon of one pod: accepts, notes, greets every connection with its kind and echoes what it sends.
struct Daemon {
    stop: Arc<AtomicBool>,
    seen: mpsc::Receiver<Seen>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Daemon {
    fn start(captured: &Captured) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, seen) = mpsc::channel();
        let Listeners { outbound, inbound, hbone } = &*captured.listeners;
        let threads = [("outbound", outbound), ("inbound", inbound), ("hbone", hbone)]
            .map(|(kind, listener)| {
                let (stop, sender) = (Arc::clone(&stop), sender.clone());
                let listener: TcpListener = listener.try_clone().expect("clone");
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        match listener.accept() {
                            Ok((stream, from)) => accepted(stream, from, kind, &sender),
                            Err(_) => std::thread::sleep(Duration::from_millis(1)),
                        }
                    }
                    // What is queued is still ours.
                    while let Ok((stream, from)) = listener.accept() {
                        accepted(stream, from, kind, &sender);
                    }
                })
            })
            .into();
        Self { stop, seen, threads }
    }

    fn next(&self) -> Seen {
        self.seen.recv_timeout(PATIENCE).expect("the daemon sees a connection")
    }

    fn nothing(&self) {
        assert_eq!(self.seen.try_recv().ok(), None, "the daemon must not see a connection");
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("no panic");
        }
    }
}

fn accepted(stream: TcpStream, from: SocketAddr, kind: &'static str, sender: &mpsc::Sender<Seen>) {
    let to = canonical(stream.local_addr().expect("has one"));
    let _ended = sender.send(Seen { kind, from: canonical(from), to });
    std::thread::spawn(move || serve(stream, kind));
}

fn serve(mut stream: TcpStream, kind: &str) {
    stream.set_nonblocking(false).expect("blocking");
    let _sent = stream.write_all(format!("{kind}\n").as_bytes());
    let mut buffer = [0; 256];
    while let Ok(n) = stream.read(&mut buffer) {
        if n == 0 || stream.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
}

/// The first line a connection says.
fn greeting(stream: &TcpStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let mut line = Vec::new();
    let mut byte = [0];
    let mut reader = stream;
    while reader.read(&mut byte).is_ok_and(|n| n == 1) && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    String::from_utf8_lossy(&line).into_owned()
}

fn echo(stream: &TcpStream, text: &[u8]) -> std::io::Result<()> {
    let (mut writer, mut reader) = (stream, stream);
    writer.write_all(text)?;
    let mut back = vec![0; text.len()];
    reader.read_exact(&mut back)?;
    assert_eq!(back, text);
    Ok(())
}

/// An application: greets with "app" and tells whom it sees and where.
fn application(pod: &Pod, port: u16) -> mpsc::Receiver<(SocketAddr, SocketAddr)> {
    let (sender, seen) = mpsc::channel();
    let listener = pod.ns.enter(|| TcpListener::bind(("::", port)).expect("bind"));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let from = canonical(stream.peer_addr().expect("has one"));
            let to = canonical(stream.local_addr().expect("has one"));
            let _ended = sender.send((from, to));
            std::thread::spawn(move || serve(stream, "app"));
        }
    });
    seen
}

fn connect(pod: &Pod, to: SocketAddr) -> std::io::Result<TcpStream> {
    pod.ns.enter(|| TcpStream::connect_timeout(&to, CONNECTED_WITHIN))
}

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// Watches the node's end of a pod's device for TCP from the pod that opens a connection or carries the secret.
struct Sniffer {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<String>>,
}

impl Sniffer {
    fn start(net: &Net, pod: &Pod) -> Self {
        let (v4, v6) = (pod.v4, pod.v6);
        Self::start_for(net, pod, move |frame| suspicious(frame, v4, v6))
    }

    /// Watches for any TCP from this port of the pod.
    fn start_from_port(net: &Net, pod: &Pod, port: u16) -> Self {
        let (v4, v6) = (pod.v4, pod.v6);
        Self::start_for(net, pod, move |frame| {
            let (source, at) = tcp_of(frame)?;
            let from = u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]);
            ((source == v4 || source == v6) && from == port).then(|| format!("{source}:{from}"))
        })
    }

    fn start_for(net: &Net, pod: &Pod, look: impl Fn(&[u8]) -> Option<String> + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let socket = net.node.enter(|| {
            let all = Protocol::from(i32::from(0x0003_u16.to_be()));
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(all)).expect("packet socket");
            socket.set_read_timeout(Some(Duration::from_millis(20))).expect("timeout");
            socket
        });
        let link = net.node.ip(&format!("-o link show dev {}", pod.veth));
        let index: u32 = link.split(':').next().and_then(|n| n.trim().parse().ok()).expect("index");
        let halt = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut found = Vec::new();
            let mut buffer = vec![0u8; 65536];
            loop {
                match receive(&socket, &mut buffer) {
                    Some((n, from)) if from == index => found.extend(look(&buffer[..n])),
                    Some(_) => {}
                    // What was there when it was told to end has been looked at.
                    None if halt.load(Ordering::Relaxed) => return found,
                    None => {}
                }
            }
        });
        Self { stop, thread }
    }

    fn found(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic")
    }

    /// Ends the watch; nothing may have been found.
    fn nothing_seen(self) {
        let found = self.found();
        assert!(found.is_empty(), "left the pod: {found:?}");
    }
}

#[expect(unsafe_code, reason = "recvfrom of a packet socket")]
fn receive(socket: &Socket, buffer: &mut [u8]) -> Option<(usize, u32)> {
    // SAFETY: all zeros is a valid sockaddr_ll.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: buffer and address are valid for their sizes.
    let n = unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            0,
            std::ptr::from_mut(&mut from).cast(),
            &mut length,
        )
    };
    (n >= 0).then_some((n as usize, from.sll_ifindex as u32))
}

/// A TCP packet from the pod that has SYN without ACK, or the secret in it.
fn suspicious(frame: &[u8], v4: IpAddr, v6: IpAddr) -> Option<String> {
    let (source, at) = tcp_of(frame)?;
    let flags = *frame.get(at + 13)?;
    let secret = frame.windows(SECRET.len()).any(|window| window == SECRET);
    let ours = source == v4 || source == v6;
    (ours && (flags & 0x12 == 0x02 || secret)).then(|| format!("{source} flags {flags:#x} secret {secret}"))
}

/// Where a TCP packet comes from, and where in the frame its header begins.
fn tcp_of(frame: &[u8]) -> Option<(IpAddr, usize)> {
    match *frame.get(12..14)? {
        [0x08, 0x00] if frame.get(23) == Some(&6) => {
            let octets: [u8; 4] = frame.get(26..30)?.try_into().ok()?;
            Some((octets.into(), 14 + usize::from(frame[14] & 15) * 4))
        }
        [0x86, 0xdd] if frame.get(20) == Some(&6) => {
            let octets: [u8; 16] = frame.get(22..38)?.try_into().ok()?;
            Some((octets.into(), 54))
        }
        _ => None,
    }
}

/// One enrolled pod (10.99.0.2), one that is not (10.99.0.3).
struct Testbed {
    node: Node,
    daemon: Daemon,
    captured: Option<Captured>,
    enrolled: Pod,
    plain: Pod,
    net: Net,
}

impl Testbed {
    fn new() -> Self {
        let mut net = Net::new();
        let (enrolled, plain) = (net.pod(2), net.pod(3));
        Self::of(net, enrolled, plain)
    }

    fn of(net: Net, enrolled: Pod, plain: Pod) -> Self {
        let mut node = Node::open(config(&net)).unwrap_or_else(|error| panic!("{error}: {error:?}"));
        let captured = node.bind(&spec(&enrolled)).expect("binds");
        node.capture(&spec(&enrolled), &captured).unwrap_or_else(|error| panic!("{error:?}"));
        let daemon = Daemon::start(&captured);
        Self { node, daemon, captured: Some(captured), enrolled, plain, net }
    }

    fn uid(&self) -> PodUid {
        spec(&self.enrolled).uid
    }

    fn count(&self, counter: Counter) -> u64 {
        self.node.counters().of(counter)
    }

    /// Runs Python in the enrolled pod with `PLAIN4`, `PLAIN6` (the other pod) and `SECRET` defined.
    fn python(&self, script: &str) -> String {
        let script = format!(
            "import socket,struct,os,sys,time\nPLAIN4,PLAIN6,SECRET='{}','{}',b'{}'\n{script}",
            self.plain.v4,
            self.plain.v6,
            String::from_utf8_lossy(SECRET)
        );
        self.enrolled.ns.sh(&format!("timeout 100 python3 - <<'END'\n{script}\nEND"))
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        self.daemon.stop.store(true, Ordering::Relaxed);
        self.captured = None;
        let removed = uninstall(&config(&self.net));
        if std::thread::panicking() {
            return;
        }
        removed.expect("uninstalls");
        assert!(!self.net.pins.exists(), "the pin directory is left");
        let rules = self.enrolled.ns.ip("rule") + &self.enrolled.ns.ip("-6 rule");
        assert!(!rules.contains("0x53"), "rules are left: {rules}");
        assert_eq!(settings(&self.enrolled), [0, 0, 0], "a setting is left");
        let addresses = self.net.node.ip("addr show dev lo");
        assert!(!addresses.contains("7.127") && !addresses.contains("7127"), "{addresses}");
    }
}

/// The settings of a pod that capture changes.
fn settings(pod: &Pod) -> [u32; 3] {
    ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"].map(|name| {
        let text = pod.ns.sh(&format!("cat /proc/sys/net/{name}"));
        text.trim().parse().unwrap_or_else(|_| panic!("{name}: {text}"))
    })
}

/// Waits until something was counted at all.
fn counted(testbed: &Testbed, counter: Counter) {
    let seen = eventually(PATIENCE, || {
        anyhow::ensure!(testbed.count(counter) > 0, "{counter:?} was not counted");
        Ok(())
    });
    seen.unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn connections_of_a_pod_arrive_with_their_destination() {
    let testbed = Testbed::new();
    let sniffer = Sniffer::start(&testbed.net, &testbed.enrolled);
    let far = [address("198.51.100.7:8080"), address("[2001:db8::7]:8080"), address("198.51.100.7:65535")];
    for to in far.into_iter().chain([at(testbed.plain.v4, 80), at(testbed.plain.v6, 15008)]) {
        let stream = connect(&testbed.enrolled, to).unwrap_or_else(|error| panic!("{to}: {error}"));
        assert_eq!(greeting(&stream), "outbound");
        echo(&stream, SECRET).expect("echoes");
        let seen = testbed.daemon.next();
        let own = if to.is_ipv4() { testbed.enrolled.v4 } else { testbed.enrolled.v6 };
        assert_eq!((seen.kind, seen.to, seen.from.ip()), ("outbound", to, own));
        assert_eq!(stream.peer_addr().expect("has one"), to);
    }
    assert_eq!(testbed.count(Counter::ConnectCaptured), 5);
    assert_eq!(testbed.count(Counter::AcceptedOutbound), 5);
    sniffer.nothing_seen();
}

#[test]
fn connections_to_a_pod_arrive_by_kind() {
    let testbed = Testbed::new();
    let application = application(&testbed.enrolled, 8080);
    for ip in [testbed.enrolled.v4, testbed.enrolled.v6] {
        for (port, kind) in [(8080, "inbound"), (15008, "hbone"), (65535, "inbound"), (1, "inbound")] {
            let stream = connect(&testbed.plain, at(ip, port)).expect("connects");
            assert_eq!(greeting(&stream), kind);
            assert_eq!(testbed.daemon.next().to, at(ip, port));
        }
    }
    application.try_recv().expect_err("the application sees none of them");

    let loopback = ["127.0.0.1".parse().expect("ip"), "::1".parse().expect("ip")];
    for ip in [testbed.enrolled.v4, testbed.enrolled.v6].into_iter().chain(loopback) {
        let stream = connect(&testbed.enrolled, at(ip, 8080)).expect("itself is left alone");
        assert_eq!(greeting(&stream), "app");
    }
    testbed.daemon.nothing();
    let refused =
        connect(&testbed.enrolled, at(testbed.enrolled.v4, 65535)).expect_err("no listener is reachable");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(testbed.count(Counter::ConnectLocal), 5);
}

#[test]
fn the_daemon_dials_the_application_as_the_client() {
    let testbed = Testbed::new();
    let seen = application(&testbed.enrolled, 8080);
    for (client, own) in [(testbed.plain.v4, testbed.enrolled.v4), (testbed.plain.v6, testbed.enrolled.v6)] {
        let stream = testbed.enrolled.ns.enter(|| transparent_dial(client, at(own, 8080)));
        assert_eq!(greeting(&stream), "app");
        let (from, to) = seen.recv_timeout(PATIENCE).expect("the application accepts");
        assert_eq!((from.ip(), to), (client, at(own, 8080)));
    }
    testbed.daemon.nothing();
}

fn transparent_dial(client: IpAddr, to: SocketAddr) -> TcpStream {
    try_transparent_dial(client, to).expect("reaches the application")
}

fn try_transparent_dial(client: IpAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    transparent_dial_from(at(client, 0), to)
}

fn transparent_dial_from(client: SocketAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).expect("socket");
    socket.bind_device(Some(b"lo")).expect("device");
    let (level, name) = if to.is_ipv4() {
        (libc::SOL_IP, libc::IP_TRANSPARENT)
    } else {
        (libc::SOL_IPV6, libc::IPV6_TRANSPARENT)
    };
    set(&socket, level, name);
    set(&socket, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT);
    socket.set_mark(REPLY).expect("mark");
    socket.bind(&client.into()).expect("binds the client's address");
    socket.connect_timeout(&to.into(), CONNECTED_WITHIN)?;
    Ok(socket.into())
}

#[test]
fn a_delivery_is_not_made_from_a_port_at_which_its_client_has_a_connection_open() {
    let testbed = Testbed::new();
    let _seen = application(&testbed.enrolled, 8080);
    for (client, own) in [(testbed.plain.v4, testbed.enrolled.v4), (testbed.plain.v6, testbed.enrolled.v6)] {
        let front = testbed.plain.ns.enter(|| {
            let socket = Socket::new(Domain::for_address(at(own, 8080)), Type::STREAM, None).expect("socket");
            socket.bind(&at(client, 61_500).into()).expect("binds");
            socket.connect_timeout(&at(own, 8080).into(), CONNECTED_WITHIN).expect("connects");
            TcpStream::from(socket)
        });
        assert_eq!(greeting(&front), "inbound");
        let dial =
            |port| testbed.enrolled.ns.enter(|| transparent_dial_from(at(client, port), at(own, 8080)));
        let met = dial(61_500).expect_err("its end would be the client's");
        assert_eq!(met.kind(), ErrorKind::AddrNotAvailable);
        echo(&front, b"still there").expect("echoes");
        let other = dial(61_501).expect("connects");
        assert_eq!(greeting(&other), "app");
        // What is over is in nobody's way.
        drop((front, other));
        let free = eventually(PATIENCE, || Ok(dial(61_500)?)).expect("connects");
        assert_eq!(greeting(&free), "app");
    }
}

#[test]
fn where_nobody_listens_the_daemon_is_refused_at_once_and_nothing_leaves_the_pod() {
    let testbed = Testbed::new();
    assert_eq!(settings(&testbed.enrolled), [1, 1, 1]);
    for (client, own) in [(testbed.plain.v4, testbed.enrolled.v4), (testbed.plain.v6, testbed.enrolled.v6)] {
        let sniffer = Sniffer::start_from_port(&testbed.net, &testbed.enrolled, 7001);
        let begun = Instant::now();
        let refused = testbed.enrolled.ns.enter(|| try_transparent_dial(client, at(own, 7001)));
        assert_eq!(refused.expect_err("nobody listens").kind(), ErrorKind::ConnectionRefused);
        // The kernel tries again after a second.
        assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
        sniffer.nothing_seen();
    }
}

#[test]
fn a_connection_that_an_application_does_not_know_any_more_is_reset_at_once() {
    let testbed = Testbed::new();
    for (client, own) in [(testbed.plain.v4, testbed.enrolled.v4), (testbed.plain.v6, testbed.enrolled.v6)] {
        let listener = testbed.enrolled.ns.enter(|| TcpListener::bind(at(own, 7002)).expect("binds"));
        let mut stream = testbed.enrolled.ns.enter(|| transparent_dial(client, at(own, 7002)));
        let (accepted, _) = listener.accept().expect("accepts");
        let sniffer = Sniffer::start_from_port(&testbed.net, &testbed.enrolled, 7002);
        // Closed in this state it is gone without a word.
        set(&accepted.into(), libc::SOL_TCP, libc::TCP_REPAIR);
        stream.set_read_timeout(Some(Duration::from_millis(900))).expect("timeout");
        stream.write_all(b"hello").expect("it does not know yet");
        let reset = stream.read(&mut [0]).expect_err("there is nobody");
        assert_eq!(reset.kind(), ErrorKind::ConnectionReset);
        sniffer.nothing_seen();
    }
}

#[test]
fn what_the_settings_of_a_pod_were_is_restored_also_after_a_daemon_that_knew_less_of_them() {
    let mut testbed = Testbed::new();
    testbed.node.withdraw(&testbed.uid()).expect("withdraws");
    testbed.node.forget(&testbed.uid()).expect("forgets");
    for before in [[0, 1, 0], [1, 0, 1], [0, 0, 0]] {
        let [accept, v4, v6] = before;
        testbed.enrolled.ns.sh(&format!(
            "sysctl -qw net.ipv4.tcp_fwmark_accept={accept} net.ipv4.fwmark_reflect={v4} net.ipv6.fwmark_reflect={v6}"
        ));
        let captured = testbed.node.bind(&spec(&testbed.enrolled)).expect("binds");
        testbed.node.capture(&spec(&testbed.enrolled), &captured).expect("captures");
        assert_eq!(settings(&testbed.enrolled), [1, 1, 1]);
        // Another daemon takes over, which finds them as this one has set them.
        let mut next = Node::open(config(&testbed.net)).expect("opens");
        next.bind(&spec(&testbed.enrolled)).expect("binds");
        next.withdraw(&testbed.uid()).expect("withdraws");
        assert_eq!(settings(&testbed.enrolled), [1, 1, 1], "open connections go on");
        next.forget(&testbed.uid()).expect("forgets");
        assert_eq!(settings(&testbed.enrolled), before);
        testbed.node = next;
    }
}

/// What an application that is told nothing of the mesh does: no option is set.
#[test]
fn an_application_binds_a_port_that_captured_connections_were_dialled_at() {
    let testbed = Testbed::new();
    for plain in ["PLAIN4", "PLAIN6"] {
        for reuse in ["", "SO_REUSEADDR", "SO_REUSEPORT"] {
            let said = testbed.python(&format!(
                "
def listen(port, address='::', reuse='{reuse}'):
    s = socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET)
    if reuse: s.setsockopt(socket.SOL_SOCKET, getattr(socket, reuse), 1)
    s.bind((address, port))
    s.listen()
    return s
held = [socket.create_connection(({plain}, 5432)) for _ in range(3)]
for address in ['::', '0.0.0.0']:
    server = listen(5432, address)
    client = socket.create_connection(('::1' if address == '::' else '127.0.0.1', 5432))
    accepted, _ = server.accept()
    # It restarts, which a plain server can while nothing of its own is left.
    client.close(); accepted.close(); server.close()
for c in held:
    c.sendall(b'x')
    while c.recv(1) != b'x': pass
print('fine')
"
            ));
            assert_eq!(said.trim(), "fine", "{plain} {reuse}");
        }
    }
}

#[test]
fn two_applications_do_not_listen_on_one_port() {
    let testbed = Testbed::new();
    let said = testbed.python(
        "
import errno
def bound(address='0.0.0.0'):
    s = socket.socket()
    s.bind((address, 5433))
    return s
def fails(f):
    try: f()
    except OSError as e: assert e.errno == errno.EADDRINUSE, e
    else: assert False, 'it may'
held = socket.create_connection((PLAIN4, 5433))
first = bound()
first.listen()
for address in ['0.0.0.0', '127.0.0.1']:
    fails(lambda: bound(address))
first.close()
# Bound and not yet listening: here the second is told when it listens.
first, second = bound(), bound()
first.listen()
fails(second.listen)
print('fine')
",
    );
    assert_eq!(said.trim(), "fine");
}

#[test]
fn an_application_binds_the_source_port_of_a_delivery_or_of_a_tunnel() {
    let testbed = Testbed::new();
    let _seen = application(&testbed.enrolled, 8080);
    let _far = application(&testbed.plain, 9090);
    let netns = Arc::clone(&testbed.captured.as_ref().expect("captured").netns);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let pod = CapturedPod::new(
        netns,
        vec![testbed.enrolled.v4, testbed.enrolled.v6],
        testbed.node.own_sockets(),
        Keepalive::default(),
        None,
    );
    runtime.block_on(async {
        for (plain, own) in [(testbed.plain.v4, testbed.enrolled.v4), (testbed.plain.v6, testbed.enrolled.v6)]
        {
            let delivered = match pod.deliver(plain, at(own, 8080), &mut bytes::Bytes::new()) {
                Ok(Delivery::Connected(stream)) => stream,
                Ok(Delivery::Waiting(dial)) => dial.await.expect("reaches the application"),
                Err(error) => panic!("{error}"),
            };
            assert_eq!(delivered.local_addr().expect("has one").ip(), plain);
            let tunnel = pod.tunnel(at(plain, 9090)).await.expect("leaves the pod");
            for ours in [delivered, tunnel] {
                let port = ours.local_addr().expect("has one").port();
                let address = if own.is_ipv4() { "0.0.0.0" } else { "::" };
                let said = testbed.python(&format!(
                    "s = socket.socket(socket.AF_INET6 if ':' in '{address}' else socket.AF_INET)
s.bind(('{address}', {port})); s.listen(); print('fine')"
                ));
                assert_eq!(said.trim(), "fine", "{ours:?}");
            }
        }
    });
}

/// As in a container, where settings can be read and not written.
#[test]
fn a_pod_is_captured_and_let_go_where_settings_are_mounted_for_reading_only() {
    let mut testbed = Testbed::new();
    testbed.node.withdraw(&testbed.uid()).expect("withdraws");
    testbed.node.forget(&testbed.uid()).expect("forgets");
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("a mount namespace");
            let none = None::<&str>;
            let mount = |from, kind| nix::mount::mount(from, "/proc/sys", none, kind, none).expect("mounts");
            nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
            mount(Some("/proc/sys"), MsFlags::MS_BIND);
            mount(none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
            let written = std::fs::write("/proc/sys/net/ipv4/tcp_fwmark_accept", "0");
            assert_eq!(written.expect_err("for reading only").raw_os_error(), Some(libc::EROFS));
            let captured = testbed.node.bind(&spec(&testbed.enrolled)).expect("binds");
            testbed.node.capture(&spec(&testbed.enrolled), &captured).expect("captures");
            assert_eq!(settings(&testbed.enrolled), [1, 1, 1]);
            testbed.node.withdraw(&spec(&testbed.enrolled).uid).expect("withdraws");
            testbed.node.forget(&spec(&testbed.enrolled).uid).expect("forgets");
            assert_eq!(settings(&testbed.enrolled), [0, 0, 0]);
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

#[expect(unsafe_code, reason = "socket options without a wrapper")]
fn set(socket: &Socket, level: i32, name: i32) {
    let on = 1_i32;
    // SAFETY: an int option.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(&on).cast(), 4) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_socket_marked_as_the_daemons_own_leaves_the_pod_and_the_bypass_mark_alone_does_not() {
    let testbed = Testbed::new();
    let seen = application(&testbed.plain, 9090);
    let own_sockets = testbed.node.own_sockets();
    for ip in [testbed.plain.v4, testbed.plain.v6] {
        let stream = testbed.enrolled.ns.enter(|| {
            let socket = Socket::new(Domain::for_address(at(ip, 9090)), Type::STREAM, None).expect("socket");
            own_sockets.mark_own(socket.as_fd()).expect("marked");
            socket.connect_timeout(&at(ip, 9090).into(), CONNECTED_WITHIN).expect("leaves the pod");
            TcpStream::from(socket)
        });
        assert_eq!(greeting(&stream), "app");
        seen.recv_timeout(PATIENCE).expect("arrives");
        let forged = testbed.enrolled.ns.enter(|| {
            let socket = Socket::new(Domain::for_address(at(ip, 9090)), Type::STREAM, None).expect("socket");
            socket.set_mark(BYPASS).expect("mark");
            socket.connect_timeout(&at(ip, 9090).into(), CONNECTED_WITHIN).expect("is captured");
            TcpStream::from(socket)
        });
        assert_eq!(greeting(&forged), "outbound");
        assert_eq!(testbed.daemon.next().to, at(ip, 9090));
    }
    assert_eq!(testbed.count(Counter::ConnectVouched), 2);
}

#[test]
fn probes_of_the_node_pass_and_those_of_host_networked_pods_do_not() {
    let mut testbed = Testbed::new();
    let root = cgroup_root().expect("cgroup v2");
    let kubepods = testbed.net.cgroup(&root, "kubepods");
    let mut config = config(&testbed.net);
    config.kubepods = Some(PathBuf::from(kubepods.file_name().expect("name")));
    // A successor that knows the cgroup takes over.
    let mut node = Node::open(config).expect("opens");
    let captured = node.bind(&spec(&testbed.enrolled)).expect("binds");
    node.capture(&spec(&testbed.enrolled), &captured).expect("captures");
    let daemon = Daemon::start(&captured);
    let before = node.counters();
    let counted = |counter| node.counters().of(counter) - before.of(counter);

    let seen = application(&testbed.enrolled, 8080);
    let (v4, v6) = ("169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff");
    let mapped = address(&format!("[::ffff:{}]:8080", testbed.enrolled.v4));
    for (to, source) in
        [(at(testbed.enrolled.v4, 8080), v4), (at(testbed.enrolled.v6, 8080), v6), (mapped, v4)]
    {
        let probe = testbed
            .net
            .node
            .enter(|| TcpStream::connect_timeout(&to, CONNECTED_WITHIN))
            .unwrap_or_else(|error| panic!("{to}: {error}"));
        assert_eq!(greeting(&probe), "app");
        let (from, _) = seen.recv_timeout(PATIENCE).expect("the application sees the probe");
        assert_eq!(from.ip(), source.parse::<IpAddr>().expect("ip"));
    }
    assert_eq!((counted(Counter::ConnectProbe), counted(Counter::AcceptedProbe)), (3, 3));
    daemon.nothing();

    let nested = testbed.net.cgroup(&kubepods, "container");
    let in_pod = |script: &str| {
        let procs = nested.join("cgroup.procs");
        let script = format!("import socket\n{script}");
        testbed.net.node.sh(&format!(
            "echo $$ > {} && exec timeout 100 python3 - <<'END'\n{script}\nEND",
            procs.display()
        ))
    };
    let dial = format!("s=socket.create_connection(('{}',8080),30); print(s.recv(99))", testbed.enrolled.v4);
    let said = in_pod(&dial);
    assert!(said.contains("inbound"), "{said}");
    assert_eq!(daemon.next().kind, "inbound");
    for (family, ip) in [("AF_INET", v4), ("AF_INET6", v6)] {
        let said = in_pod(&format!("s=socket.socket(socket.{family}); s.bind(('{ip}',0))"));
        assert!(said.contains("PermissionError"), "{said}");
    }
    assert_eq!(counted(Counter::RefusedProbeAddress), 2);
    drop(captured);
    daemon.stop();
}

/// One way to open a connection, in Python; `T4` and `T6` are the destinations.
struct Way {
    name: &'static str,
    script: &'static str,
    expect: Expect,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    /// The daemon sees it with its destination.
    Captured,
    /// Nobody sees it.
    Refused,
}

const DIAL: &str = "
def talk(s):
    s.settimeout(30)
    print('GOT', s.recv(99))
    s.sendall(SECRET)
    print('ECHO', s.recv(99))
";

const WAYS: &[Way] = &[
    Way {
        name: "blocking connect",
        script: "s=socket.socket(); s.connect((PLAIN4,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "non-blocking connect",
        script: "import select\ns=socket.socket(); s.setblocking(False); s.connect_ex((PLAIN4,7777)); \
                 select.select([],[s],[],30); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "fast open by sendto",
        script: "s=socket.socket(); s.sendto(SECRET,socket.MSG_FASTOPEN,(PLAIN4,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "fast open by connect",
        script: "s=socket.socket(); s.setsockopt(6,30,1); s.connect((PLAIN4,7777)); s.sendall(SECRET); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "fast open over IPv6",
        script: "s=socket.socket(socket.AF_INET6); s.sendto(SECRET,socket.MSG_FASTOPEN,(PLAIN6,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "multipath TCP",
        script: "s=socket.socket(2,1,262); s.settimeout(30); s.connect((PLAIN4,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "multipath TCP over IPv6",
        script: "s=socket.socket(10,1,262); s.settimeout(30); s.connect((PLAIN6,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "multipath TCP after bind",
        script: "s=socket.socket(2,1,262); s.bind(('0.0.0.0',0)); s.settimeout(30); s.connect((PLAIN4,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "v4-mapped IPv6",
        script: "s=socket.socket(socket.AF_INET6); s.connect(('::ffff:'+PLAIN4,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "bind to a port, then connect",
        script: "s=socket.socket(); s.bind(('0.0.0.0',33333)); s.connect((PLAIN4,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "bound to eth0",
        script: "s=socket.socket(); s.setsockopt(1,25,b'eth0'); s.connect((PLAIN4,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "bound to eth0 over IPv6",
        script: "s=socket.socket(socket.AF_INET6); s.setsockopt(1,25,b'eth0'); s.connect((PLAIN6,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "a mark of its own",
        script: "s=socket.socket(); s.setsockopt(1,36,0x1234); s.connect((PLAIN4,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "the bypass mark",
        script: "s=socket.socket(); s.setsockopt(1,36,0x539); s.connect((PLAIN4,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "the reply mark",
        script: "s=socket.socket(); s.setsockopt(1,36,0x53a); s.connect((PLAIN4,7777)); talk(s)",
        expect: Expect::Captured,
    },
    Way {
        name: "a nested cgroup",
        script: "root=[l.split()[1] for l in open('/proc/mounts') if l.split()[2]=='cgroup2'][0]\n\
                 d=root+'/zc-nested-%d'%os.getpid(); os.makedirs(d+'/deep')\n\
                 pid=os.fork()\n\
                 if pid==0:\n    open(d+'/deep/cgroup.procs','w').write(str(os.getpid()))\n    \
                 s=socket.create_connection((PLAIN4,7777),30); talk(s); sys.stdout.flush(); os._exit(0)\n\
                 os.waitpid(pid,0); os.rmdir(d+'/deep'); os.rmdir(d)",
        expect: Expect::Captured,
    },
    Way {
        name: "a SYN from a raw socket",
        script: "s=socket.socket(2,3,6)\n\
                 t=struct.pack('!HHIIBBHHH',1234,7777,1,0,0x50,2,1000,0,0)\n\
                 try: s.sendto(t+SECRET,(PLAIN4,0))\n\
                 except OSError as e: print(e)",
        expect: Expect::Refused,
    },
    Way {
        name: "a SYN from a raw socket with the bypass mark",
        script: "s=socket.socket(2,3,6); s.setsockopt(1,36,0x539)\n\
                 t=struct.pack('!HHIIBBHHH',1234,7777,1,0,0x50,2,1000,0,0)\n\
                 try: s.sendto(t+SECRET,(PLAIN4,0))\n\
                 except OSError as e: print(e)",
        expect: Expect::Refused,
    },
    Way {
        name: "a SYN from a packet socket that lies about its protocol",
        script: "s=socket.socket(17,3,0)\n\
                 ip=struct.pack('!BBHHHBBH4s4s',0x45,0,58,0,0,64,6,0,socket.inet_aton('10.99.0.2'),\
                 socket.inet_aton(PLAIN4))\n\
                 t=struct.pack('!HHIIBBHHH',1234,7777,1,0,0x50,2,1000,0,0)\n\
                 for proto in (0x0800,0x0806,0x88b5):\n    \
                 try: s.sendto(b'\\xff'*6+b'\\x02'*6+b'\\x08\\x00'+ip+t+SECRET,('eth0',proto))\n    \
                 except OSError as e: print(e)",
        expect: Expect::Refused,
    },
    Way {
        name: "a VLAN-tagged SYN from a packet socket",
        script: "s=socket.socket(17,3,0)\n\
                 ip=struct.pack('!BBHHHBBH4s4s',0x45,0,58,0,0,64,6,0,socket.inet_aton('10.99.0.2'),\
                 socket.inet_aton(PLAIN4))\n\
                 t=struct.pack('!HHIIBBHHH',1234,7777,1,0,0x50,2,1000,0,0)\n\
                 try: s.sendto(b'\\xff'*6+b'\\x02'*6+b'\\x81\\x00\\x00\\x05\\x08\\x00'+ip+t+SECRET,('eth0',0x8100))\n\
                 except OSError as e: print(e)",
        expect: Expect::Refused,
    },
    Way {
        name: "an IPv6 SYN behind extension headers from a packet socket",
        script: "s=socket.socket(17,3,0)\n\
                 t=struct.pack('!HHIIBBHHH',1234,7777,1,0,0x50,2,1000,0,0)+SECRET\n\
                 e=bytes([60,0,1,4,0,0,0,0])+bytes([6,0,1,4,0,0,0,0])\n\
                 ip=struct.pack('!IHBB16s16s',0x60000000,len(e+t),0,64,socket.inet_pton(10,'fd99::2'),\
                 socket.inet_pton(10,PLAIN6))\n\
                 try: s.sendto(b'\\x33\\x33'+b'\\xff'*4+b'\\x02'*6+b'\\x86\\xdd'+ip+e+t,('eth0',0x86dd))\n\
                 except OSError as e: print(e)",
        expect: Expect::Refused,
    },
    Way {
        name: "a fragment from a packet socket",
        script: "s=socket.socket(17,3,0)\n\
                 ip=struct.pack('!BBHHHBBH4s4s',0x45,0,38,1,1,64,6,0,socket.inet_aton('10.99.0.2'),\
                 socket.inet_aton(PLAIN4))\n\
                 try: s.sendto(b'\\xff'*6+b'\\x02'*6+b'\\x08\\x00'+ip+SECRET,('eth0',0x0800))\n\
                 except OSError as e: print(e)",
        expect: Expect::Refused,
    },
    Way {
        name: "an IPv6 link-local destination",
        script: "s=socket.socket(socket.AF_INET6); s.settimeout(2); s.connect(('fe80::1%eth0',7777))",
        expect: Expect::Refused,
    },
];

#[test]
fn every_way_to_open_a_connection_is_captured_or_refused() {
    let testbed = Testbed::new();
    let mut wrong = Vec::new();
    for way in WAYS {
        let sniffer = Sniffer::start(&testbed.net, &testbed.enrolled);
        let begin = Instant::now();
        let said = testbed.python(&format!("{DIAL}{}", way.script));
        let took = begin.elapsed();
        let seen: Vec<Seen> = testbed.daemon.seen.try_iter().collect();
        let outcome = match (&seen[..], said.contains("GOT b'outbound")) {
            ([seen], true) if seen.kind == "outbound" && seen.to.port() == 7777 => Expect::Captured,
            ([], false) => Expect::Refused,
            _ => {
                wrong.push(format!("{}: saw {seen:?}, said {said}", way.name));
                continue;
            }
        };
        if outcome != way.expect {
            wrong.push(format!("{}: {outcome:?} after {took:?}, said {said}", way.name));
        }
        let found = sniffer.found();
        if !found.is_empty() {
            wrong.push(format!("{}: left the pod: {found:?}", way.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn an_io_uring_connect_is_captured() {
    let testbed = Testbed::new();
    let to = at(testbed.plain.v4, 7777);
    let stream = testbed.enrolled.ns.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
        let address = socket2::SockAddr::from(to);
        let mut ring = io_uring::IoUring::new(2).expect("io_uring");
        let entry = io_uring::opcode::Connect::new(
            io_uring::types::Fd(socket.as_raw_fd()),
            address.as_ptr().cast(),
            address.len(),
        )
        .build();
        #[expect(unsafe_code, reason = "the address and the socket outlive the wait below")]
        // SAFETY: see the reason.
        unsafe {
            ring.submission().push(&entry).expect("room for one");
        }
        ring.submit_and_wait(1).expect("submits");
        assert_eq!(ring.completion().next().expect("one").result(), 0);
        TcpStream::from(socket)
    });
    assert_eq!(greeting(&stream), "outbound");
    assert_eq!(testbed.daemon.next().to, to);
}

#[test]
fn a_connection_that_changes_its_mark_is_stopped() {
    let testbed = Testbed::new();
    let sniffer = Sniffer::start(&testbed.net, &testbed.enrolled);
    let stream = connect(&testbed.enrolled, at(testbed.plain.v4, 7777)).expect("captured");
    assert_eq!(greeting(&stream), "outbound");
    SockRef::from(&stream).set_mark(BYPASS).expect("mark");
    let mut writer = &stream;
    writer.write_all(SECRET).expect("is queued");
    counted(&testbed, Counter::LeaveCaptured);
    sniffer.nothing_seen();
}

#[test]
fn forwarded_connections_do_not_leave_the_pod() {
    let testbed = Testbed::new();
    let pod = &testbed.enrolled.ns;
    // A machine behind the pod.
    pod.sh("ip netns exec 2>/dev/null; sysctl -qw net.ipv4.ip_forward=1");
    let inner = format!("{}-vm", pod.0);
    run(&format!("ip netns add {inner}"));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        pod.ip(&format!("link add tap0 type veth peer name eth0 netns {inner}"));
        pod.ip("addr add 10.98.0.1/24 dev tap0");
        pod.ip("link set tap0 up");
        for setup in ["addr add 10.98.0.2/24 dev eth0", "link set eth0 up", "route add default via 10.98.0.1"]
        {
            run(&format!("ip -n {inner} {setup}"));
        }
        let sniffer = Sniffer::start(&testbed.net, &testbed.enrolled);
        let dial = format!("import socket; s=socket.create_connection((\"{}\",7777),0.5)", testbed.plain.v4);
        let output = std::process::Command::new("ip")
            .args(["netns", "exec", &inner, "python3", "-c", &dial])
            .output()
            .expect("python");
        assert!(!output.status.success());
        counted(&testbed, Counter::GuardSyn);
        sniffer.nothing_seen();
    }));
    run(&format!("ip netns del {inner}"));
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn open_connections_survive_enrolment_and_withdrawal() {
    let mut net = Net::new();
    let (enrolled, plain) = (net.pod(2), net.pod(3));
    let _seen = application(&plain, 9090);
    let early = connect(&enrolled, at(plain.v4, 9090)).expect("not captured yet");
    assert_eq!(greeting(&early), "app");
    // Opened before, connected after.
    let socket = enrolled.ns.enter(|| Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket"));

    let mut testbed = Testbed::of(net, enrolled, plain);
    echo(&early, b"still there").expect("goes on");
    socket.connect_timeout(&at(testbed.plain.v4, 9090).into(), CONNECTED_WITHIN).expect("connects");
    let late = TcpStream::from(socket);
    assert_eq!(greeting(&late), "outbound");
    echo(&late, b"captured").expect("echoes");
    let inbound = connect(&testbed.plain, at(testbed.enrolled.v4, 80)).expect("captured");
    assert_eq!(greeting(&inbound), "inbound");

    let uid = testbed.uid();
    testbed.node.withdraw(&uid).expect("withdraws");
    let plain_again = connect(&testbed.enrolled, at(testbed.plain.v4, 9090)).expect("plain again");
    assert_eq!(greeting(&plain_again), "app");
    for (stream, name) in [(&early, "early"), (&late, "captured"), (&inbound, "inbound")] {
        echo(stream, b"after withdrawal").unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    // Enrolled again, then for good.
    let captured = testbed.captured.take().expect("captured");
    testbed.node.capture(&spec(&testbed.enrolled), &captured).expect("captures again");
    assert_eq!(
        greeting(&connect(&testbed.enrolled, at(testbed.plain.v4, 9090)).expect("connects")),
        "outbound"
    );
    echo(&late, b"and again").expect("goes on");
    testbed.node.withdraw(&uid).expect("withdraws");
    testbed.node.forget(&uid).expect("forgets");
    echo(&early, b"to the end").expect("goes on");
    let rules = testbed.enrolled.ns.ip("rule");
    assert!(!rules.contains("0x53"), "{rules}");
    testbed.node.forget(&uid).expect_err("forgotten");
}

#[test]
fn without_a_daemon_connections_are_refused() {
    let mut testbed = Testbed::new();
    let _seen = application(&testbed.enrolled, 8080);
    let _other = application(&testbed.plain, 9090);
    let sniffer = Sniffer::start(&testbed.net, &testbed.enrolled);
    let uid = testbed.uid();
    testbed.node.close(&uid).expect("closes");
    for attempt in [
        connect(&testbed.enrolled, at(testbed.plain.v4, 9090)),
        connect(&testbed.plain, at(testbed.enrolled.v6, 8080)),
    ] {
        attempt.expect_err("closed");
    }
    assert!(testbed.count(Counter::RefusedNoListener) >= 1 && testbed.count(Counter::DroppedNoListener) >= 1);
    assert_eq!(testbed.node.reconcile(), vec![], "closed on purpose");
    // A probe does not need the daemon.
    let probe = testbed
        .net
        .node
        .enter(|| TcpStream::connect_timeout(&at(testbed.enrolled.v4, 8080), CONNECTED_WITHIN));
    assert_eq!(greeting(&probe.expect("probes")), "app");
    sniffer.nothing_seen();
}

#[test]
fn what_others_break_stays_closed_and_is_repaired() {
    let mut testbed = Testbed::new();
    let _other = application(&testbed.plain, 9090);
    let to = at(testbed.plain.v4, 9090);
    assert_eq!(testbed.node.reconcile(), vec![], "nothing to repair at first");
    let pins = testbed.net.pins.join("v1");
    let attacks: [(&str, Attack, &str); 9] = [
        (
            "rules flushed",
            Box::new(|w| drop(w.enrolled.ns.sh("ip rule flush; ip rule add pref 32766 lookup main"))),
            "rule for captured",
        ),
        (
            "IPv6 rules flushed",
            Box::new(|w| {
                drop(w.enrolled.ns.sh("ip -6 rule flush; ip -6 rule add pref 32766 lookup main; ip -6 rule add pref 0 lookup local"))
            }),
            "rule for captured",
        ),
        (
            "route flushed",
            Box::new(|w| drop(w.enrolled.ns.ip("route flush table 100"))),
            "route in table 100",
        ),
        (
            "sysctl reset",
            Box::new(|w| drop(w.enrolled.ns.sh("sysctl -qw net.ipv4.tcp_fwmark_accept=0"))),
            "tcp_fwmark_accept",
        ),
        (
            "refusals unmarked",
            Box::new(|w| drop(w.enrolled.ns.sh("sysctl -qw net.ipv4.fwmark_reflect=0"))),
            "the fwmark_reflect",
        ),
        (
            "IPv6 refusals unmarked",
            Box::new(|w| drop(w.enrolled.ns.sh("sysctl -qw net.ipv6.fwmark_reflect=0"))),
            "the IPv6 fwmark_reflect",
        ),
        (
            "pins removed",
            Box::new(|w| std::fs::remove_dir_all(w.net.pins.join("v1")).expect("removes")),
            "not pinned",
        ),
        (
            "guard pin removed",
            Box::new(|w| drop(run(&format!("rm {}/v1/pods/0/guard-*", w.net.pins.display())))),
            "guard",
        ),
        (
            "probe address removed",
            Box::new(|w| drop(w.net.node.ip("addr del 169.254.7.127/32 dev lo"))),
            "169.254.7.127",
        ),
    ];
    for (name, attack, expect) in attacks {
        let sniffer = Sniffer::start(&testbed.net, &testbed.enrolled);
        attack(&testbed);
        if let Ok(stream) = connect(&testbed.enrolled, to) {
            assert_eq!(greeting(&stream), "outbound", "{name}");
        }
        let repairs = testbed.node.reconcile();
        assert!(repairs.iter().any(|r| r.what.contains(expect) && r.repaired), "{name}: {repairs:?}");
        assert!(repairs.iter().all(|r| r.repaired), "{name}: {repairs:?}");
        let rest = testbed.node.reconcile();
        assert_eq!(rest, vec![], "{name}");
        assert!(pins.join("pods/0/lookup").exists(), "{name}");
        let stream = connect(&testbed.enrolled, to).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(greeting(&stream), "outbound", "{name}");
        sniffer.nothing_seen();
    }
    // A device that appears.
    testbed.enrolled.ns.ip("link add dev2 type veth peer name dev3");
    let repairs = testbed.node.reconcile();
    assert!(repairs.iter().any(|r| r.what.contains("had no guard")), "{repairs:?}");
    testbed.enrolled.ns.ip("link del dev2");
    testbed.node.reconcile();
    assert_eq!(std::fs::read_dir(pins.join("pods/0")).expect("lists").count(), 2);
    // An address that appears.
    testbed.enrolled.ns.ip("addr add 10.97.0.1/32 dev eth0");
    assert_eq!(testbed.node.reconcile().len(), 1);
}

#[test]
fn a_successor_takes_over_without_losing_a_connection() {
    let mut testbed = Testbed::new();
    let stop = Arc::new(AtomicBool::new(false));
    let counts = [(); 2].map(|()| Arc::new(AtomicU32::new(0)));
    let clients: Vec<_> = [
        (testbed.enrolled.clone(), address("198.51.100.7:80")),
        (testbed.plain.clone(), at(testbed.enrolled.v6, 80)),
    ]
    .into_iter()
    .zip(counts.clone())
    .map(|((pod, to), done)| {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || {
            pod.ns.enter(|| {
                let mut failed = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let result = TcpStream::connect_timeout(&to, CONNECTED_WITHIN).and_then(|stream| {
                        greeting(&stream);
                        echo(&stream, b"hello")
                    });
                    done.fetch_add(1, Ordering::Relaxed);
                    failed.extend(result.err());
                }
                failed
            })
        })
    })
    .collect();
    // So that a take-over is in the midst of it, however fast the clients are.
    let go_on = || {
        let until = counts.each_ref().map(|done| done.load(Ordering::Relaxed) + 20);
        let gone_on = eventually(PATIENCE, || {
            let done = counts.each_ref().map(|done| done.load(Ordering::Relaxed));
            anyhow::ensure!(
                done.iter().zip(until).all(|(done, until)| *done >= until),
                "{done:?} connections"
            );
            Ok(())
        });
        gone_on.unwrap_or_else(|error| panic!("{error:#}"));
    };
    go_on();
    for _ in 0..5 {
        let mut successor = Node::open(config(&testbed.net)).expect("opens");
        assert_eq!(successor.taken_over().pods, vec![testbed.uid()]);
        let captured = successor.bind(&spec(&testbed.enrolled)).expect("binds");
        successor.capture(&spec(&testbed.enrolled), &captured).expect("captures");
        let daemon = Daemon::start(&captured);
        assert!(!testbed.node.is_owner() && successor.is_owner());
        assert_eq!(testbed.node.reconcile(), vec![], "the old one does nothing");
        testbed.node.withdraw(&testbed.uid()).expect_err("nor that");
        std::mem::replace(&mut testbed.daemon, daemon).stop();
        testbed.node = successor;
        testbed.captured = Some(captured);
        assert_eq!(testbed.node.reconcile(), vec![]);
        go_on();
    }
    stop.store(true, Ordering::Relaxed);
    for (client, done) in clients.into_iter().zip(&counts) {
        let failed = client.join().expect("no panic");
        assert!(failed.is_empty(), "of {done:?} connections failed: {failed:?}");
    }
}

#[test]
fn a_pod_without_ipv6_is_captured() {
    let mut net = Net::new();
    let (enrolled, plain) = (net.pod(2), net.pod(3));
    enrolled.ns.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.lo.disable_ipv6=1");
    let mut testbed = Testbed::of(net, enrolled, plain);
    assert_eq!(
        greeting(&connect(&testbed.enrolled, at(testbed.plain.v4, 80)).expect("connects")),
        "outbound"
    );
    assert_eq!(
        greeting(&connect(&testbed.plain, at(testbed.enrolled.v4, 15008)).expect("connects")),
        "hbone"
    );
    assert_eq!(testbed.node.reconcile(), vec![]);
    testbed.enrolled.ns.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.lo.disable_ipv6=0");
    assert!(!testbed.node.reconcile().is_empty(), "IPv6 has come back");
}

#[test]
fn pods_that_are_gone_are_swept() {
    let mut testbed = Testbed::new();
    // The daemon dies without a word; one pod is deleted, the other is no longer enrolled.
    let third = testbed.net.pod(4);
    let captured = testbed.node.bind(&spec(&third)).expect("binds");
    testbed.node.capture(&spec(&third), &captured).expect("captures");
    drop(captured);
    let node = std::mem::replace(&mut testbed.node, Node::open(config(&testbed.net)).expect("opens"));
    drop(node);
    assert_eq!(testbed.node.taken_over().pods.len(), 2);
    run(&format!("ip netns del {}", third.ns.0));
    let captured = testbed.node.bind(&spec(&testbed.enrolled)).expect("binds");
    testbed.node.capture(&spec(&testbed.enrolled), &captured).expect("captures");
    assert_eq!(testbed.node.sweep(&HashSet::new()), vec![spec(&third).uid]);
    assert_eq!(testbed.node.taken_over().pods, vec![testbed.uid()]);
    assert!(!testbed.net.pins.join("v1/pods/1").exists());
    testbed.node = Node::open(config(&testbed.net)).expect("opens");
    assert_eq!(testbed.node.sweep(&HashSet::from([testbed.uid()])), vec![]);
    assert_eq!(testbed.node.sweep(&HashSet::new()), vec![testbed.uid()]);
    assert_eq!(
        connect(&testbed.enrolled, at(testbed.plain.v4, 9)).expect_err("plain").kind(),
        ErrorKind::ConnectionRefused
    );
    let rules = testbed.enrolled.ns.ip("rule");
    assert!(!rules.contains("0x53"), "{rules}");
}

#[test]
fn a_pod_that_vanishes_is_reported_and_can_be_withdrawn() {
    let mut testbed = Testbed::new();
    let third = testbed.net.pod(4);
    let captured = testbed.node.bind(&spec(&third)).expect("binds");
    testbed.node.capture(&spec(&third), &captured).expect("captures");
    run(&format!("ip netns del {}", third.ns.0));
    let repairs = testbed.node.reconcile();
    assert_eq!(repairs.len(), 1);
    assert!(repairs[0].lost && !repairs[0].repaired, "{:?}", repairs[0]);
    assert!(repairs[0].to_string().contains("is gone or another one"), "{}", repairs[0]);
    testbed.node.withdraw(&spec(&third).uid).expect("withdraws");
    testbed.node.forget(&spec(&third).uid).expect("forgets");
    assert_eq!(testbed.node.reconcile(), vec![]);
    let error = testbed.node.bind(&spec(&third)).expect_err("gone");
    assert!(error.to_string().contains("is the pod gone?"), "{error}");
}

/// A server that listens with multipath TCP, as Go's do: probes, captured connections and itself all work.
#[test]
fn a_multipath_listener_gets_its_connections() {
    let mut testbed = Testbed::new();
    let script = "import socket\ns=socket.socket(2,1,262); s.bind(('0.0.0.0',8080)); s.listen(9)\n\
                  while True:\n c,a=s.accept(); c.sendall(b'app\\n'); c.recv(9)";
    let server = testbed.enrolled.ns.command(&format!("exec python3 -c \"{script}\""));
    testbed.net.start(server);
    let to = at(testbed.enrolled.v4, 8080);
    let own = eventually(PATIENCE, || Ok(connect(&testbed.enrolled, to)?));
    let own = own.unwrap_or_else(|error| panic!("{error:#}"));
    assert!(testbed.count(Counter::MultipathMarked) >= 1);
    let probe = testbed.net.node.enter(|| TcpStream::connect_timeout(&to, CONNECTED_WITHIN)).expect("probes");
    let delivered = testbed.enrolled.ns.enter(|| transparent_dial(testbed.plain.v4, to));
    // One at a time: the server waits for each to end.
    for stream in [own, probe, delivered] {
        assert_eq!(greeting(&stream), "app");
    }
}

#[test]
fn enrolment_is_cheap() {
    const PODS: usize = 200;
    let mut net = Net::new();
    let mut pods: Vec<Pod> = (0..PODS).map(|n| net.pod(n as u8 + 2)).collect();
    let mut node = Node::open(config(&net)).expect("opens");
    let before = (descriptors(), resident());
    let begin = Instant::now();
    let (mut all, mut took) = (Vec::new(), Vec::new());
    for pod in &mut pods {
        let begin = processor_time();
        let captured = node.bind(&spec(pod)).expect("binds");
        node.capture(&spec(pod), &captured).expect("captures");
        took.push(processor_time() - begin);
        all.push(captured);
    }
    // What it costs when nothing else is counted in; the last ones beside the first, for a cost that grows with the pods.
    let [first, last] =
        [&took[..20], &took[PODS - 20..]].map(|took| *took.iter().min().expect("there are 20"));
    let each = begin.elapsed() / PODS as u32;
    let after = (descriptors(), resident());
    let begin = Instant::now();
    assert_eq!(node.reconcile(), vec![]);
    let reconcile = begin.elapsed();
    let begin = Instant::now();
    let mut successor = Node::open(config(&net)).expect("opens");
    let mut taken = Vec::new();
    for pod in &pods {
        let captured = successor.bind(&spec(pod)).expect("binds");
        successor.capture(&spec(pod), &captured).expect("captures");
        taken.push(captured);
    }
    let take_over = begin.elapsed() / PODS as u32;
    let fds = (after.0 - before.0) / PODS;
    let memory = (after.1.saturating_sub(before.1)) / PODS;
    println!(
        "{each:?} per enrolment, {first:?} to {last:?} of the processor, {take_over:?} per take-over, {fds} descriptors and {memory} bytes per pod, {reconcile:?} to reconcile {PODS}"
    );
    let removed = uninstall(&config(&net)).expect("uninstalls");
    assert_eq!(removed.pods.len(), PODS);
    assert!(fds <= 8, "{fds} descriptors per pod");
    assert!(memory < 60_000, "{memory} bytes per pod");
    assert!(last < 3 * first, "{last:?} per enrolment, {first:?} at first");
}

/// What this process has used of the processor.
fn processor_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("a clock");
    let time = usage.user_time() + usage.system_time();
    Duration::from_micros(time.num_microseconds() as u64)
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("proc").count()
}

fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("proc");
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("pages") * 4096
}

#[test]
fn the_self_test_succeeds_and_leaves_nothing() {
    let net = Net::new();
    let begin = Instant::now();
    let verdict = self_test(&config(&net));
    let took = begin.elapsed();
    assert!(verdict.works, "{verdict}");
    assert!(!net.pins.exists());
    println!("self-test: {took:?}");
    let wrong = Config { cgroup_root: PathBuf::from("/tmp"), ..config(&net) };
    let verdict = self_test(&wrong);
    assert!(!verdict.works && verdict.reason.contains("root of cgroup v2"), "{verdict}");
    assert!(!net.pins.exists());
}

#[test]
fn what_a_killed_self_test_left_is_removed() {
    let net = Net::new();
    let leave = || {
        // No process ever has this id.
        let left = net.pins.join(format!("self-test-{}", u32::MAX));
        let node = Node::open(Config { pin_dir: left.clone(), ..config(&net) }).expect("opens");
        drop(node);
        assert!(left.join("v1/links").exists(), "nothing is left in the first place");
        left
    };
    let left = leave();
    let verdict = self_test(&config(&net));
    assert!(verdict.works, "{verdict}");
    assert!(!left.exists(), "the next self-test does not remove it");
    leave();
    uninstall(&config(&net)).expect("uninstalls");
    assert!(!net.pins.exists(), "uninstall does not remove it");
    let mounts = std::fs::read_to_string("/proc/mounts").expect("mounts");
    assert!(!mounts.contains(&*net.pins.to_string_lossy()), "{mounts}");
}
