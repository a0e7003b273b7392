//! Pods that a node agent enrols over ZDS, and whose traffic its own rules redirect.

mod common;

use std::fs::File;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::act_in;
use ztunnel_tests::agent::{self, Listener, NodeAgent};
use ztunnel_tests::mesh::{Enrolment, MESHED};
use ztunnel_tests::peer::hold::Held;
use ztunnel_tests::peer::load::Load;
use ztunnel_tests::poll::{PATIENCE, eventually, throughout};
use ztunnel_tests::redirect::{self, Backend, PROBES};
use ztunnel_tests::scenarios::outage::{self, nothing_in_clear};
use ztunnel_tests::scenarios::{Scenario, policy, restart, same_node, sockets, tunnel};
use ztunnel_tests::testbed::{
    BOTH, HTTP, On, Options, SERVICE_IPS, Testbed, curl, http, http_refused, lines_at,
};
use ztunnel_tests::topology::Pod;

/// Something in a testbed where node agents enrol the pods of these nodes.
fn in_redirected(
    name: &str,
    nodes: &[On],
    backend: Backend,
    act: impl FnOnce(&mut Testbed) -> Result<String>,
) {
    let testbed =
        Testbed::start_prepared(Options::default(), |testbed| testbed.enrol_by_agent(nodes, backend));
    act_in(testbed, name, |testbed| {
        let told = act(testbed)?;
        for on in nodes {
            testbed.agent(*on)?.check()?;
        }
        Ok(told)
    });
}

/// Client and server see each other's own addresses, on both families, and nothing goes in clear.
fn talk(testbed: &Testbed) -> Result<String> {
    let watch = testbed.watch_link_for_clear("redirected")?;
    let mut said = Vec::new();
    for (from, to) in [(&testbed.client, &testbed.server), (&testbed.client, &testbed.near)] {
        for (own, address) in from.addresses().into_iter().zip(to.addresses()) {
            let answer = http(&from.place, address, "?marker=secret")
                .with_context(|| format!("{} to {} at {address}", from.name, to.name))?;
            ensure!(answer.body.contains(&format!("pod={} client={own}", to.name)), "{}", answer.body);
            ensure!(answer.remote == address.to_string(), "{answer:?}");
            said.push(answer.body);
        }
    }
    for address in SERVICE_IPS {
        let address: IpAddr = address.parse()?;
        let url = format!("http://{}/", ztunnel_tests::topology::in_url(address));
        let answer = curl(&testbed.client.place, &[&url]).with_context(|| format!("service {address}"))?;
        ensure!(answer.body.contains("pod=server"), "{}", answer.body);
    }
    nothing_in_clear(&watch.finish()?, &testbed.client, "secret")?;
    Ok(said.join("; "))
}

/// Connections that are not between two pods of the mesh: as without it.
fn outside(testbed: &Testbed) -> Result<()> {
    for (from, to) in [(&testbed.client, &testbed.outside), (&testbed.outsider, &testbed.server)] {
        for (own, address) in from.addresses().into_iter().zip(to.addresses()) {
            let answer = http(&from.place, address, "")
                .with_context(|| format!("{} to {} at {address}", from.name, to.name))?;
            ensure!(answer.body.contains(&format!("client={own}")), "{}", answer.body);
        }
    }
    // A pod that calls itself is not redirected at all.
    for address in testbed.server.addresses() {
        http(&testbed.server.place, address, "").with_context(|| format!("server to itself at {address}"))?;
    }
    Ok(())
}

/// Under STRICT the node's own connections pass, under the address of probes, and nobody else's.
fn strict(testbed: &Testbed) -> Result<()> {
    let server = &testbed.server;
    testbed.mesh.peer_authentication("STRICT")?;
    eventually(PATIENCE, || http_refused(&testbed.outsider.place, server.v4.into()))?;
    for (address, probe) in server.addresses().into_iter().zip(PROBES) {
        let answer = http(&testbed.b.place, address, "").with_context(|| format!("probe of {address}"))?;
        ensure!(answer.body.contains(&format!("client={probe}")), "{}", answer.body);
        http_refused(&testbed.outsider.place, address)?;
        http(&testbed.client.place, address, "").context("by tunnel")?;
    }
    testbed.mesh.no_policies()
}

/// Scenarios of pods that the daemon captures itself, which must not depend on who captures. The others are about how it
/// captures, or have a test of their own here.
const SCENARIOS: [Scenario; 8] = [
    tunnel::ONLY_TLS,
    tunnel::IDENTITIES,
    same_node::SAME_NODE,
    policy::DENIED,
    policy::OPEN_CONNECTION_CUT,
    policy::STRICT,
    policy::OUTSIDE_UNTOUCHED,
    restart::OPEN_CONNECTIONS_DRAIN,
];

/// Runs scenarios one after the other, each in a testbed in which nothing is forbidden and everybody can talk.
fn run_all(testbed: &mut Testbed, scenarios: &[Scenario]) -> Result<String> {
    let mut said = String::new();
    for scenario in scenarios {
        let begun = Instant::now();
        let evidence = (scenario.run)(testbed).with_context(|| scenario.name)?;
        said += &format!("; {evidence} ({:.1} s)", begun.elapsed().as_secs_f32());
        testbed.mesh.no_policies()?;
        eventually(PATIENCE, || {
            for from in [&testbed.client, &testbed.other, &testbed.outsider] {
                for to in [&testbed.server, &testbed.near] {
                    http(&from.place, to.v4.into(), "")
                        .with_context(|| format!("after {}", scenario.name))?;
                }
            }
            Ok(())
        })?;
    }
    Ok(said)
}

fn everything(testbed: &mut Testbed) -> Result<String> {
    let said = talk(testbed)?;
    outside(testbed)?;
    strict(testbed)?;
    Ok(said + &run_all(testbed, &SCENARIOS)?)
}

#[test]
fn pods_of_two_nodes_talk_through_rules_of_iptables() {
    in_redirected("iptables on nf_tables", &BOTH, Backend::IptablesNft, everything);
}

#[test]
fn pods_of_two_nodes_talk_through_rules_of_legacy_iptables() {
    in_redirected("legacy iptables", &BOTH, Backend::IptablesLegacy, everything);
}

#[test]
fn pods_of_two_nodes_talk_through_rules_of_nftables() {
    in_redirected("nftables", &BOTH, Backend::Nft, everything);
}

/// What the daemon's own sockets in a pod change for those who use its network.
#[test]
fn sockets_of_the_daemon_are_in_nobodys_way() {
    const SCENARIOS: [Scenario; 4] =
        [sockets::CLOSED_PORT, sockets::FEW_SOURCE_PORTS, sockets::MANY_CONNECTIONS, sockets::ITSELF];
    in_redirected("sockets", &BOTH, Backend::IptablesNft, |testbed| run_all(testbed, &SCENARIOS));
}

#[test]
fn a_node_with_an_agent_works_with_one_without() {
    in_redirected("agent on the server's node", &[On::B], Backend::IptablesNft, |testbed| {
        let said = talk(testbed)?;
        outside(testbed)?;
        strict(testbed)?;
        Ok(said)
    });
}

#[test]
fn a_kill_under_strict_never_lets_plaintext_in() {
    in_redirected("kills under STRICT", &BOTH, Backend::Nft, |testbed| {
        (outage::KILLED_UNDER_POLICY.run)(testbed)
    });
}

#[test]
fn a_node_without_an_agent_works_with_one_that_has() {
    in_redirected("agent on the client's node", &[On::A], Backend::IptablesNft, |testbed| {
        let said = talk(testbed)?;
        outside(testbed)?;
        Ok(said)
    });
}

#[test]
fn restarts_under_load_fail_no_attempt() {
    const ROUNDS: usize = 8;
    in_redirected("restarts", &BOTH, Backend::IptablesNft, |testbed| {
        let targets = testbed.server.addresses().map(|address| SocketAddr::new(address, HTTP));
        let mut load = Load::start(&testbed.client.place, 500, &targets)?;
        load.goes_on(100)?;
        for round in 0..ROUNDS {
            let ready = testbed.restart_daemon(BOTH[round % 2], round / 2 % 2 == 1);
            ready.with_context(|| format!("restart {round}"))?;
            load.goes_on(100)?;
        }
        let outcome = load.finish()?;
        ensure!(outcome.failed.is_empty(), "{}", outcome.evidence());
        Ok(format!("{ROUNDS} restarts: {}", outcome.evidence()))
    });
}

#[test]
fn a_daemon_killed_after_its_take_over_gives_the_pods_back() {
    in_redirected("killed after a take-over", &BOTH, Backend::IptablesNft, |testbed| {
        outage::killed_after_take_over(testbed, &|testbed| {
            for address in testbed.server.addresses() {
                http(&testbed.client.place, address, "")?;
            }
            http(&testbed.outsider.place, testbed.server.v4.into(), "").map(drop)
        })
    });
}

#[test]
fn a_daemon_that_took_its_node_back_answers_at_its_ports_and_tells_of_its_pods() {
    in_redirected("taken back", &[On::A], Backend::IptablesNft, |testbed| {
        let (client, late) = (testbed.client.clone(), testbed.outsider.clone());
        let setting = testbed.setting(On::A).clone();
        // What the first daemon drains.
        let mut held = Held::open(&client.place, lines_at(testbed.server.v4))?;
        let mut elsewhere = setting.clone();
        for (flag, address) in
            [("--ready-addr", "[::]:16021"), ("--metrics-addr", "[::]:16020"), ("--admin-port", "16000")]
        {
            elsewhere.further.extend([flag.to_owned(), address.to_owned()]);
        }
        let mut next = elsewhere.start_ready()?;
        // Somebody takes a port as soon as the first one has let go of it, and does not share it.
        let taken = eventually(PATIENCE, || {
            testbed.a.place.netns.enter(|| Ok(TcpListener::bind((Ipv6Addr::UNSPECIFIED, 15021))?))
        })?;
        let (mark, agents) = (setting.log().mark(), testbed.agent(On::A)?.seen());
        next.process().kill_9()?;
        setting.log().wait_line(mark, PATIENCE, "the attempt", |line| line.contains("15021"))?;
        ensure!(setting.metrics().is_err(), "it answers at some of its ports");
        drop(taken);
        eventually(PATIENCE, || setting.readiness().map(drop)).context("the port is free")?;
        held.say().context("what the first daemon drained")?;

        // A pod of which it hears now, and that cannot be served yet.
        eventually(PATIENCE, || {
            ensure!(testbed.agent(On::A)?.seen() > agents, "it has not called the agent");
            Ok(())
        })?;
        let taken = late.place.netns.enter(|| Ok(TcpListener::bind("0.0.0.0:15006")?))?;
        let refused = testbed.agent(On::A)?.add(&late);
        ensure!(refused.is_err(), "its port is taken");
        let shown = || -> Result<String> { Ok(String::from_utf8(setting.ask("GET", "/config_dump")?.1)?) };
        eventually(PATIENCE, || {
            ensure!(shown()?.contains("\"Pending\""), "it is not shown as pending");
            Ok(())
        })?;
        drop(taken);
        eventually(PATIENCE, || {
            ensure!(!shown()?.contains("\"Pending\""), "it is shown as pending still");
            Ok(())
        })?;
        testbed.agent(On::A)?.del(&late)?;
        Ok("its ports and its pods are to be seen".to_owned())
    });
}

/// As istio-cni does: the rules go first, then its daemons are told, and the mesh says so last.
#[test]
fn a_pod_that_leaves_the_mesh_under_load_loses_no_attempt() {
    in_redirected("out under load", &BOTH, Backend::IptablesNft, |testbed| {
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        let targets = server.addresses().map(|address| SocketAddr::new(address, HTTP));
        let mut load = Load::start(&client.place, 100, &targets)?;
        load.goes_on(100)?;
        let log = testbed.setting(On::A).log();
        let mark = log.mark();
        redirect::release(&server, Backend::IptablesNft)?;
        testbed.agent(On::B)?.del(&server)?;
        testbed.mesh.pod(MESHED, &server, Enrolment::None)?;
        log.wait_line(mark, PATIENCE, "the change", |line| line.contains("mesh applied"))?;
        load.goes_on(300)?;
        let outcome = load.finish()?;
        redirect::pod(&server, Backend::IptablesNft)?;
        testbed.agent(On::B)?.add(&server)?;
        testbed.mesh.pod(MESHED, &server, Enrolment::Inherit)?;
        ensure!(outcome.failed.is_empty(), "{}", outcome.evidence());
        Ok(outcome.evidence())
    });
}

#[test]
fn beside_a_daemon_that_hands_nothing_over_the_ports_are_shared() {
    in_redirected("rolling update", &[On::B], Backend::IptablesNft, |testbed| {
        let targets = testbed.server.addresses().map(|address| SocketAddr::new(address, HTTP));
        let mut load = Load::start(&testbed.outsider.place, 300, &targets)?;
        load.goes_on(100)?;
        for round in 0..4 {
            // Where it looks for the one before it there is nobody.
            let mut setting = testbed.setting(On::B).clone();
            setting.meeting = testbed.run.path(format!("elsewhere-{round}"));
            let next = setting.start_ready()?;
            let first = testbed.replace_daemon(On::B, next).context("no first daemon")?;
            first.stop().context("the first daemon, after SIGTERM")?;
            load.goes_on(100)?;
        }
        let outcome = load.finish()?;
        ensure!(outcome.failed.is_empty(), "{}", outcome.evidence());
        Ok(format!("4 replacements: {}", outcome.evidence()))
    });
}

#[test]
fn a_killed_daemon_is_closed_and_the_next_serves_without_the_agent_asking() {
    in_redirected("kill -9", &BOTH, Backend::IptablesNft, |testbed| {
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        for on in BOTH {
            let watch = testbed.watch_link_for_clear("killed")?;
            testbed.kill_daemon(on)?;
            let tries = throughout(Duration::from_millis(500), || {
                for address in server.addresses() {
                    http_refused(&client.place, address)?;
                }
                Ok(())
            })?;
            ensure!(tries > 0, "nothing was tried");
            nothing_in_clear(&watch.finish()?, &client, "nothing")?;
            testbed.start_daemon(on)?;
            http(&client.place, server.v4.into(), "").context("after the restart")?;
        }
        Ok(format!("{} daemons called the agent of node-b", testbed.agent(On::B)?.seen()))
    });
}

#[test]
fn an_agent_that_restarts_changes_nothing_for_its_pods() {
    in_redirected("agent restarts", &BOTH, Backend::IptablesNft, |testbed| {
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        let mut held = Held::open(&client.place, lines_at(server.v4))?;
        let path = testbed.agent(On::B)?.path().to_owned();
        testbed.replace_agent(On::B, None);
        eventually(PATIENCE, || {
            let answer = testbed.setting(On::B).readiness();
            let error = answer.err().context("it is ready without its agent")?;
            ensure!(format!("{error:#}").contains("workload proxy manager"), "{error:#}");
            Ok(())
        })?;
        held.say().context("without the agent")?;
        http(&client.place, server.v4.into(), "").context("without the agent")?;
        testbed.replace_agent(On::B, Some(NodeAgent::start(path, &[&server])?));
        eventually(PATIENCE, || testbed.setting(On::B).readiness())?;
        held.say().context("with the agent back")?;
        http(&client.place, server.v4.into(), "").context("with the agent back")?;
        Ok("open and new connections went on".to_owned())
    });
}

#[test]
fn a_deleted_pod_is_let_go_wholly() {
    in_redirected("deletion", &BOTH, Backend::IptablesNft, |testbed| {
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        http(&client.place, server.v4.into(), "")?;
        let mut held_before = 0;
        for _ in 0..3 {
            let mut held = Held::open(&client.place, lines_at(server.v4))?;
            held_before = testbed.daemon(On::B)?.held_of(&server.place.netns)?.len();
            ensure!(held_before > 3, "namespace, listeners and connection are {held_before} descriptors");
            testbed.agent(On::B)?.del(&server)?;
            eventually(PATIENCE, || {
                ensure!(held.say().is_err(), "the connection of the deleted pod goes on");
                Ok(())
            })?;
            eventually(PATIENCE, || http_refused(&client.place, server.v4.into()))?;
            eventually(PATIENCE, || {
                let left = testbed.daemon(On::B)?.held_of(&server.place.netns)?;
                ensure!(left.is_empty(), "still held: {left:?}");
                Ok(())
            })?;
            testbed.agent(On::B)?.add(&server)?;
            http(&client.place, server.v4.into(), "").context("added again: at once")?;
        }
        // Whatever else is held of a pod's namespace keeps that alive, and so the device in it and its other end.
        let pod = testbed.b.add_pod(&testbed.run, "brief")?;
        redirect::pod(&pod, Backend::IptablesNft)?;
        testbed.mesh.pod(MESHED, &pod, Enrolment::Inherit)?;
        testbed.agent(On::B)?.add(&pod)?;
        for to in [&server, &testbed.near] {
            eventually(PATIENCE, || http(&pod.place, to.v4.into(), ""))?;
        }
        let devices = || testbed.b.place.netns.ip(&["-o", "link", "show"]);
        let device = format!("pod{}@", pod.v4.octets()[3]);
        ensure!(devices()?.contains(&device), "no {device} on the node");
        testbed.agent(On::B)?.del(&pod)?;
        testbed.mesh.remove("pod-brief")?;
        pod.place.netns.remove()?;
        eventually(PATIENCE, || {
            ensure!(!devices()?.contains(&device), "{device} is still there: something holds the namespace");
            Ok(())
        })?;
        Ok(format!(
            "of {held_before} descriptors none is left after a deletion, nor of a namespace the device"
        ))
    });
}

#[test]
fn whatever_an_agent_sends_its_pods_are_served() {
    in_redirected("a hostile agent", &BOTH, Backend::IptablesNft, hostile);
}

fn hostile(testbed: &mut Testbed) -> Result<String> {
    let (client, server) = (testbed.client.clone(), testbed.server.clone());
    let path = testbed.agent(On::B)?.path().to_owned();
    testbed.replace_agent(On::B, None);
    let listener = Listener::at(&path)?;
    let served = |testbed: &mut Testbed, when: &str| -> Result<usize> {
        http(&client.place, server.v4.into(), "").with_context(|| format!("after {when}"))?;
        let daemon = testbed.daemon(On::B)?;
        daemon.process().must_run().with_context(|| format!("after {when}"))?;
        daemon.files()
    };
    // What messages bring: namespaces and files. That connections end is looked at besides.
    let none_leaked = |testbed: &mut Testbed, when: &str, before: usize| {
        eventually(PATIENCE, || {
            let now = served(testbed, when)?;
            ensure!(now <= before, "{now} descriptors after {when}, {before} before");
            Ok(())
        })
    };
    let connection = listener.accept(PATIENCE)?;
    agent::snapshot(&connection, [&server].into_iter())?;
    connection.silent(Duration::from_millis(300))?;
    let before = served(testbed, "a good snapshot")?;

    // What is refused and ends nothing.
    let netns = agent::handle(&server.place.netns)?;
    let plain = File::open("/dev/null")?;
    let add = agent::encode(agent::add(&server));
    let other = Pod { name: "nobody".to_owned(), ..server.clone() };
    let unknown_kind = [0x7a, 0];
    let cases: [(&str, Vec<u8>, Vec<&File>); 6] = [
        ("Add without a namespace", add.clone(), vec![]),
        ("Add with two", add.clone(), vec![&netns, &netns]),
        ("Add with a file", add.clone(), vec![&plain]),
        ("Del with a namespace", agent::encode(agent::del(&other)), vec![&netns]),
        ("an unknown kind", unknown_kind.to_vec(), vec![]),
        ("Add of nothing", vec![0x0a, 0], vec![&netns]),
    ];
    for (what, bytes, files) in &cases {
        for _ in 0..20 {
            let descriptors: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
            let error = connection.exchange(bytes, &descriptors).with_context(|| (*what).to_owned())?;
            ensure!(!error.is_empty(), "{what} was acknowledged");
        }
    }
    none_leaked(testbed, "bad messages", before)?;
    connection.request(agent::del(&other), &[]).context("an unknown pod is gone already")?;
    connection.request(agent::add(&server), &[netns.as_fd()]).context("a repeated Add")?;

    // What ends the connection; the next one begins anew. Each Add is answered in time, well or not.
    let mut last = connection;
    let many = vec![netns.as_fd(); 60];
    let long = vec![0x0a; 4000];
    let broken: [(&str, &[u8], &[std::os::fd::BorrowedFd<'_>]); 4] = [
        ("garbage", &[0xff; 64], &[]),
        ("a long message", &long, &[]),
        ("sixty descriptors", &add, &many),
        ("a second SnapshotSent", &agent::encode(agent::sent()), &[]),
    ];
    for (what, bytes, descriptors) in broken {
        let error = last.exchange(bytes, descriptors).with_context(|| what.to_owned())?;
        ensure!(error.contains("protocol error"), "{what}: {error:?}");
        last.closed().with_context(|| what.to_owned())?;
        last = listener.accept(PATIENCE).with_context(|| format!("after {what}"))?;
        agent::snapshot(&last, [&server].into_iter()).with_context(|| format!("after {what}"))?;
        none_leaked(testbed, what, before)?;
    }
    // A pod whose port is taken is refused in time, named, and served as soon as that is over.
    let outside = testbed.outside.clone();
    let taken = outside.place.netns.enter(|| Ok(TcpListener::bind("0.0.0.0:15006")?))?;
    let netns = agent::handle(&outside.place.netns)?;
    let error = last.exchange(&agent::encode(agent::add(&outside)), &[netns.as_fd()])?;
    ensure!(error.contains("cannot listen on port 15006"), "{error}");
    drop(taken);
    eventually(PATIENCE, || last.request(agent::add(&outside), &[netns.as_fd()]))?;
    last.request(agent::del(&outside), &[])?;
    // Gone in the middle of an Add.
    last.send(&add, &[agent::handle(&server.place.netns)?.as_fd()])?;
    drop(last);
    served(testbed, "an agent that is gone")?;
    // The rest is for an agent that behaves.
    drop(listener);
    testbed.replace_agent(On::B, Some(NodeAgent::start(path, &[&server])?));
    eventually(PATIENCE, || testbed.setting(On::B).readiness())?;
    Ok(format!(
        "{} kinds of bad messages, {} of broken protocol; {before} descriptors",
        cases.len(),
        broken.len()
    ))
}
