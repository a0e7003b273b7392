//! What the daemon's own sockets in a pod change for those who use its network: nothing.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Scenario;
use super::basics::cluster_ips;
use crate::binaries;
use crate::netns::Netns;
use crate::poll::{PATIENCE, eventually};
use crate::process::Log;
use crate::testbed::{HTTP, On, curl, lines_at};
use crate::topology::{Pod, in_url};
use crate::wire::Watch;

/// A port on which nobody listens.
const CLOSED: u16 = 7009;
/// The kernel repeats what is not answered after a second.
const AT_ONCE: Duration = Duration::from_millis(900);

/// A server that is not there.
pub const CLOSED_PORT: Scenario = Scenario {
    name: "a port on which nobody listens is refused at once, and nothing of the refusal leaves the pod but by the mesh",
    run: |testbed| {
        let mut evidence = Vec::new();
        for (how, from, to) in [
            ("by tunnel", &testbed.client, &testbed.server),
            ("on one node", &testbed.client, &testbed.near),
            ("plain", &testbed.outsider, &testbed.server),
            ("plain, on one node", &testbed.outsider, &testbed.near),
        ] {
            let watch = Watch::start(
                &to.place,
                "eth0",
                &format!("closed-{}-{}", from.name, to.name),
                &format!("tcp port {CLOSED}"),
            )?;
            let mut took = Duration::ZERO;
            for address in to.addresses() {
                let elapsed =
                    turned_away(&from.place.netns, SocketAddr::new(address, CLOSED), (is_refusal, AT_ONCE))
                        .with_context(|| format!("{how}, {address}"))?;
                took = took.max(elapsed);
            }
            // Between a client that has dialled and the pod there may be packets if there is no tunnel, and no others.
            let seen = watch.finish()?.segments;
            let dialled: Vec<_> = seen.iter().filter(|it| it.opens).map(|it| it.from).collect();
            let foreign = seen.iter().find(|it| !dialled.contains(&it.from) && !dialled.contains(&it.to));
            ensure!(foreign.is_none(), "{how}: on the pod's device: {foreign:?}");
            ensure!(how.starts_with("plain") || seen.is_empty(), "{how}: in clear: {:?}", seen[0]);
            evidence.push(format!("{how}: {} ms", took.as_millis()));
        }
        Ok(evidence.join(", "))
    },
};

/// Ports that a pod's own firewall rejects, and with what it says so: of IPv4 and of IPv6.
const REJECTED: [(u16, [&str; 2]); 2] = [
    (7010, ["icmp-port-unreachable", "icmp6-port-unreachable"]),
    (7011, ["icmp-host-unreachable", "icmp6-addr-unreachable"]),
];

/// An ICMP error that comes while the kernel still sends is looked at when it sends again, after one second or three. Who
/// is not told at all gives up after ten.
const SOON: Duration = Duration::from_secs(6);

/// A server that answers by ICMP errors.
pub const REJECTED_PORT: Scenario = Scenario {
    name: "a port that a pod's firewall rejects is refused soon, and its ICMP errors do not leave the pod",
    run: |testbed| {
        let mut evidence = Vec::new();
        for to in [&testbed.server, &testbed.near] {
            for (port, kinds) in REJECTED {
                for (program, kind) in ["iptables-nft", "ip6tables-nft"].into_iter().zip(kinds) {
                    let port = port.to_string();
                    let rule =
                        ["-A", "INPUT", "-p", "tcp", "--dport", &port, "-j", "REJECT", "--reject-with", kind];
                    let output = to.place.run(program, &rule)?;
                    let said = String::from_utf8_lossy(&output.stderr);
                    ensure!(output.status.success(), "{program}: {said}");
                }
            }
        }
        // That it is looked for at the right place: without a mesh the errors come by the device.
        for (how, from, to, leaves) in [
            ("by tunnel", &testbed.client, &testbed.server, false),
            ("on one node", &testbed.client, &testbed.near, false),
            ("plain", &testbed.outsider, &testbed.server, true),
        ] {
            let watch = Watch::start(
                &to.place,
                "eth0",
                &format!("rejected-{}-{}", from.name, to.name),
                "icmp[icmptype] == icmp-unreach or (ip6 and ip6[6] == 58 and ip6[40] == 1)",
            )?;
            let mut took = Duration::ZERO;
            for (port, _) in REJECTED {
                for address in to.addresses() {
                    let at = SocketAddr::new(address, port);
                    let elapsed = turned_away(&from.place.netns, at, (is_refusal_or_unreachable, SOON))
                        .with_context(|| format!("{how}, {address} port {port}"))?;
                    took = took.max(elapsed);
                }
            }
            // Besides the frame that ends a capture.
            let errors = watch.finish()?.total - 1;
            ensure!(leaves == (errors > 0), "{how}: {errors} ICMP errors on the pod's device");
            evidence.push(format!("{how}: {} ms, {errors} ICMP errors", took.as_millis()));
        }
        Ok(evidence.join(", "))
    },
};

/// Dials, and returns how long it took to be turned away. A machine that stands still for as long as
/// the kernel waits does not do so twice.
fn turned_away(
    netns: &Netns,
    to: SocketAddr,
    (is_refusal, within): (fn(&std::io::Error) -> bool, Duration),
) -> Result<Duration> {
    let attempt = || {
        netns.enter(|| {
            let begun = Instant::now();
            let mut stream = match TcpStream::connect_timeout(&to, PATIENCE) {
                Ok(stream) => stream,
                // It may be turned away while it is still being told that it was taken.
                Err(error) if is_refusal(&error) => return Ok(begun.elapsed()),
                Err(error) => return Err(error).context("cannot connect"),
            };
            stream.set_read_timeout(Some(PATIENCE))?;
            match stream.read(&mut [0]) {
                Ok(0) => {}
                Ok(_) => bail!("somebody answered"),
                Err(error) if is_refusal(&error) => {}
                Err(error) => return Err(error).context("it was left waiting"),
            }
            Ok(begun.elapsed())
        })
    };
    let first = attempt()?;
    let took = if first < within { first } else { attempt()? };
    ensure!(took < within, "it took {took:?}, twice");
    Ok(took)
}

fn is_refusal(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset)
}

/// The same where an ICMP error may be what the client hears.
fn is_refusal_or_unreachable(error: &std::io::Error) -> bool {
    is_refusal(error) || error.kind() == ErrorKind::HostUnreachable
}

/// Of 32 ports that clients and servers choose from, this many are held open at once.
const FEW_PORTS: (u16, u16, usize) = (40_000, 40_031, 32);

/// Clients that have few ports to choose from.
pub const FEW_SOURCE_PORTS: Scenario = Scenario {
    name: "a client without a mesh opens as many connections to a pod as it has source ports, and all work",
    run: |testbed| {
        let (low, high, count) = FEW_PORTS;
        let narrowed = [&testbed.outsider, &testbed.server];
        let set = |range: &str| -> Result<Vec<String>> {
            let each = narrowed.iter().map(|pod| {
                let netns = &pod.place.netns;
                let before = netns.sysctl("ipv4/ip_local_port_range")?;
                netns.set_sysctl("ipv4/ip_local_port_range", range)?;
                Ok(before)
            });
            each.collect()
        };
        let before = set(&format!("{low} {high}"))?;
        let opened = testbed.server.addresses().into_iter().map(|address| {
            hold(&testbed.outsider, lines_at(address), count).with_context(|| format!("to {address}"))
        });
        let opened = opened.collect::<Result<Vec<_>>>();
        set(&before[0])?;
        let slowest = opened?.into_iter().max().unwrap_or_default();
        Ok(format!("{count} connections of each family; the slowest took {} ms", slowest.as_millis()))
    },
};

/// Opens connections and uses each; then uses each once more. Returns how long the slowest took to open.
fn hold(from: &Pod, to: SocketAddr, count: usize) -> Result<Duration> {
    let own: IpAddr = if to.is_ipv4() { from.v4.into() } else { from.v6.into() };
    from.place.netns.enter(|| {
        let (mut held, mut slowest) = (Vec::new(), Duration::ZERO);
        for number in 0..count {
            let begun = Instant::now();
            let open = || -> Result<BufReader<TcpStream>> {
                let stream = TcpStream::connect_timeout(&to, PATIENCE).context("cannot connect")?;
                stream.set_read_timeout(Some(PATIENCE))?;
                let mut stream = BufReader::new(stream);
                exchange(&mut stream, own, "first")?;
                Ok(stream)
            };
            held.push(open().with_context(|| format!("connection {number} of {count}"))?);
            slowest = slowest.max(begun.elapsed());
        }
        for (number, stream) in held.iter_mut().enumerate() {
            exchange(stream, own, "again").with_context(|| format!("connection {number}, later"))?;
        }
        Ok(slowest)
    })
}

fn exchange(stream: &mut BufReader<TcpStream>, own: IpAddr, word: &str) -> Result<()> {
    stream.get_mut().write_all(format!("{word}\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_line(&mut answer).context("no answer")?;
    ensure!(answer == format!("{own} {word}\n"), "the answer is {answer:?}");
    Ok(())
}

/// Of the ports that a client chooses first there are 14,114.
const CROWD: usize = 5000;

/// A client with very many connections.
pub const MANY_CONNECTIONS: Scenario = Scenario {
    name: "a client without a mesh holds thousands of connections to one pod",
    run: |testbed| {
        let mut command = testbed.outsider.place.command(binaries::peer()?)?;
        let to = SocketAddr::new(testbed.server.v4.into(), HTTP);
        command.args(["crowd", &to.to_string(), "/", &CROWD.to_string()]);
        let log = Log::at(testbed.outsider.place.logs.join("crowd.log"));
        let mark = log.mark();
        let begun = Instant::now();
        let mut crowd = testbed.outsider.place.start_with("crowd", command, Stdio::piped())?;
        let limit = 10 * PATIENCE;
        // One that has ended will not open them any more.
        let opened = eventually(limit, || {
            let said = log.since(mark);
            if said.contains("open") {
                return Ok(Ok(()));
            }
            if let Err(ended) = crowd.must_run() {
                return Ok(Err(ended.context(said)));
            }
            bail!("{CROWD} connections are not open after {limit:?}: {said}")
        })?;
        opened?;
        let took = begun.elapsed();
        crowd.close_stdin();
        crowd.wait(PATIENCE)?;
        Ok(format!("{CROWD} connections, opened in {} ms, each with a request", took.as_millis()))
    },
};

/// A pod that is a client of its own service.
pub const ITSELF: Scenario = Scenario {
    name: "a pod that dials a service which it serves itself is connected to itself, and nothing leaves it",
    run: |testbed| {
        let mut evidence = Vec::new();
        for encrypted in [false, true] {
            if encrypted {
                let mut setting = testbed.setting(On::B).clone();
                setting.further.push("--encrypt-same-node".to_owned());
                let mut next = setting.start()?;
                next.wait_ready()?;
                let mut first = testbed.replace_daemon(On::B, next).context("no first daemon")?;
                first.ended().context("the first daemon was to drain")?;
            }
            let watch = Watch::start(&testbed.server.place, "eth0", &format!("itself-{encrypted}"), "tcp")?;
            for cluster_ip in cluster_ips()? {
                let own: IpAddr =
                    if cluster_ip.is_ipv4() { testbed.server.v4.into() } else { testbed.server.v6.into() };
                for _ in 0..3 {
                    let answer =
                        curl(&testbed.server.place, &[&format!("http://{}/", in_url(cluster_ip))])
                            .with_context(|| format!("itself by {cluster_ip}, encrypted: {encrypted}"))?;
                    let expected = format!("pod=server client={own} ");
                    ensure!(answer.body.contains(&expected), "{}", answer.body);
                    ensure!(answer.remote == cluster_ip.to_string(), "{answer:?}");
                }
                curl(&testbed.server.place, &[&format!("http://{}:{HTTP}/", in_url(own))])
                    .with_context(|| format!("itself by {own}"))?;
                evidence.push(cluster_ip.to_string());
            }
            let seen = watch.finish()?.segments;
            let own = |at: SocketAddr| testbed.server.addresses().contains(&at.ip());
            let service = |at: SocketAddr| cluster_ips().is_ok_and(|all| all.contains(&at.ip()));
            let left =
                seen.iter().find(|it| (own(it.from) && own(it.to)) || service(it.from) || service(it.to));
            ensure!(left.is_none(), "on the pod's device: {left:?}");
        }
        Ok(format!("answered at {}", evidence.join(", ")))
    },
};

/// The addresses of a service of two pods.
const OF_TWO: [&str; 2] = ["10.96.0.20", "fd96::20"];
/// So often that one of two is not missed by chance.
const CALLS: usize = 40;

/// A pod that is a client of a service of which it is one endpoint of several.
pub const ONE_OF_SEVERAL: Scenario = Scenario {
    name: "a pod that dials a service of which it is one endpoint of two reaches both, itself like the other",
    run: |testbed| {
        let client = testbed.near.clone();
        for pod in [&client, &testbed.server] {
            let path = testbed.mesh.path().join(format!("pod-{}.yaml", pod.name));
            let label = format!("    app: {}\n", pod.name);
            let text = std::fs::read_to_string(&path)?;
            ensure!(text.contains(&label), "another text: {text}");
            let both = text.replacen(&label, &format!("{label}    group: both\n"), 1);
            testbed.mesh.write(&format!("pod-{}", pod.name), &both)?;
        }
        let [v4, v6] = OF_TWO;
        testbed.mesh.service("both", v4, v6)?;
        let service = std::fs::read_to_string(testbed.mesh.path().join("service-both.yaml"))?;
        testbed.mesh.write("service-both", &service.replace("    app: both\n", "    group: both\n"))?;
        let mut reached = [0; 2];
        for (cluster_ip, own) in OF_TWO.into_iter().zip(client.addresses()) {
            let cluster_ip: IpAddr = cluster_ip.parse()?;
            let call = || curl(&client.place, &[&format!("http://{}/", in_url(cluster_ip))]);
            eventually(PATIENCE, call).with_context(|| format!("{cluster_ip} is not known"))?;
            let watch =
                Watch::start(&client.place, "eth0", &format!("one-of-several-{own}"), "not tcp port 15008")?;
            for number in 0..CALLS {
                let answer = call().with_context(|| format!("call {number} of {CALLS} to {cluster_ip}"))?;
                let by = |pod: &str| answer.body.contains(&format!("pod={pod} client={own} "));
                let which = ["near", "server"].into_iter().position(by);
                reached[which.with_context(|| format!("call {number}: {}", answer.body))?] += 1;
                ensure!(answer.remote == cluster_ip.to_string(), "{answer:?}");
            }
            let beside = watch.finish()?.segments;
            ensure!(beside.is_empty(), "not in a tunnel: {:?}", beside[0]);
        }
        ensure!(reached.into_iter().all(|calls| calls > 0), "one was never reached: {reached:?}");
        testbed.mesh.remove("service-both")?;
        testbed.write_pods()?;
        let [itself, other] = reached;
        Ok(format!("of {} calls {itself} were answered by the pod itself, {other} by the other", 2 * CALLS))
    },
};
