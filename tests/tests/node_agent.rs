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
use ztunnel_tests::stories::outage::{self, nothing_in_clear};
use ztunnel_tests::stories::{Story, near, policy, restart, sockets, tunnel};
use ztunnel_tests::topology::Pod;
use ztunnel_tests::world::{BOTH, HTTP, On, Options, SERVICE_IPS, World, curl, http, http_refused, lines_at};

/// Something in a world where node agents enrol the pods of these nodes.
fn in_redirected(name: &str, nodes: &[On], backend: Backend, act: impl FnOnce(&mut World) -> Result<String>) {
    let world = World::start_prepared(Options::default(), |world| world.enrol_by_agent(nodes, backend));
    act_in(world, name, |world| {
        let told = act(world)?;
        for on in nodes {
            world.agent(*on)?.check()?;
        }
        Ok(told)
    });
}

/// Client and server see each other's own addresses, on both families, and nothing goes in clear.
fn talk(world: &World) -> Result<String> {
    let watch = world.watch_link_for_clear("redirected")?;
    let mut said = Vec::new();
    for (from, to) in [(&world.client, &world.server), (&world.client, &world.near)] {
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
        let answer = curl(&world.client.place, &[&url]).with_context(|| format!("service {address}"))?;
        ensure!(answer.body.contains("pod=server"), "{}", answer.body);
    }
    nothing_in_clear(&watch.finish()?, &world.client, "secret")?;
    Ok(said.join("; "))
}

/// Connections that are not between two pods of the mesh: as without it.
fn outside(world: &World) -> Result<()> {
    for (from, to) in [(&world.client, &world.outside), (&world.outsider, &world.server)] {
        for (own, address) in from.addresses().into_iter().zip(to.addresses()) {
            let answer = http(&from.place, address, "")
                .with_context(|| format!("{} to {} at {address}", from.name, to.name))?;
            ensure!(answer.body.contains(&format!("client={own}")), "{}", answer.body);
        }
    }
    // A pod that calls itself is not redirected at all.
    for address in world.server.addresses() {
        http(&world.server.place, address, "").with_context(|| format!("server to itself at {address}"))?;
    }
    Ok(())
}

/// Under STRICT the node's own connections pass, under the address of probes, and nobody else's.
fn strict(world: &World) -> Result<()> {
    let server = &world.server;
    world.mesh.peer_authentication("STRICT")?;
    eventually(PATIENCE, || http_refused(&world.outsider.place, server.v4.into()))?;
    for (address, probe) in server.addresses().into_iter().zip(PROBES) {
        let answer = http(&world.b.place, address, "").with_context(|| format!("probe of {address}"))?;
        ensure!(answer.body.contains(&format!("client={probe}")), "{}", answer.body);
        http_refused(&world.outsider.place, address)?;
        http(&world.client.place, address, "").context("by tunnel")?;
    }
    world.mesh.no_policies()
}

/// Stories of pods that the daemon captures itself, which must not depend on who captures. The others are about how it
/// captures, or have a test of their own here.
const STORIES: [Story; 8] = [
    tunnel::ONLY_TLS,
    tunnel::IDENTITIES,
    near::SAME_NODE,
    policy::DENIED,
    policy::OPEN_CONNECTION_CUT,
    policy::STRICT,
    policy::OUTSIDE_UNTOUCHED,
    restart::OPEN_CONNECTIONS_DRAIN,
];

/// Tells stories one after the other, each in a world in which nothing is forbidden and everybody can talk.
fn tell(world: &mut World, stories: &[Story]) -> Result<String> {
    let mut told = String::new();
    for story in stories {
        let begun = Instant::now();
        let evidence = (story.tell)(world).with_context(|| story.name)?;
        told += &format!("; {evidence} ({:.1} s)", begun.elapsed().as_secs_f32());
        world.mesh.no_policies()?;
        eventually(PATIENCE, || {
            for from in [&world.client, &world.other, &world.outsider] {
                for to in [&world.server, &world.near] {
                    http(&from.place, to.v4.into(), "").with_context(|| format!("after {}", story.name))?;
                }
            }
            Ok(())
        })?;
    }
    Ok(told)
}

fn everything(world: &mut World) -> Result<String> {
    let said = talk(world)?;
    outside(world)?;
    strict(world)?;
    Ok(said + &tell(world, &STORIES)?)
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
    const STORIES: [Story; 4] =
        [sockets::CLOSED_PORT, sockets::FEW_SOURCE_PORTS, sockets::MANY_CONNECTIONS, sockets::ITSELF];
    in_redirected("sockets", &BOTH, Backend::IptablesNft, |world| tell(world, &STORIES));
}

#[test]
fn a_node_with_an_agent_works_with_one_without() {
    in_redirected("agent on the server's node", &[On::B], Backend::IptablesNft, |world| {
        let said = talk(world)?;
        outside(world)?;
        strict(world)?;
        Ok(said)
    });
}

#[test]
fn a_kill_under_strict_never_lets_plaintext_in() {
    in_redirected("kills under STRICT", &BOTH, Backend::Nft, |world| {
        (outage::KILLED_UNDER_POLICY.tell)(world)
    });
}

#[test]
fn a_node_without_an_agent_works_with_one_that_has() {
    in_redirected("agent on the client's node", &[On::A], Backend::IptablesNft, |world| {
        let said = talk(world)?;
        outside(world)?;
        Ok(said)
    });
}

#[test]
fn restarts_under_load_fail_no_attempt() {
    const ROUNDS: usize = 8;
    in_redirected("restarts", &BOTH, Backend::IptablesNft, |world| {
        let targets = world.server.addresses().map(|address| SocketAddr::new(address, HTTP));
        let mut load = Load::start(&world.client.place, 500, &targets)?;
        load.goes_on(100)?;
        for round in 0..ROUNDS {
            let ready = world.restart_daemon(BOTH[round % 2], round / 2 % 2 == 1);
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
    in_redirected("killed after a take-over", &BOTH, Backend::IptablesNft, |world| {
        outage::killed_after_take_over(world, &|world| {
            for address in world.server.addresses() {
                http(&world.client.place, address, "")?;
            }
            http(&world.outsider.place, world.server.v4.into(), "").map(drop)
        })
    });
}

#[test]
fn a_daemon_that_took_its_node_back_answers_at_its_ports_and_tells_of_its_pods() {
    in_redirected("taken back", &[On::A], Backend::IptablesNft, |world| {
        let (client, late) = (world.client.clone(), world.outsider.clone());
        let setting = world.setting(On::A).clone();
        // What the first daemon drains.
        let mut held = Held::open(&client.place, lines_at(world.server.v4))?;
        let mut elsewhere = setting.clone();
        for (flag, address) in
            [("--ready-addr", "[::]:16021"), ("--metrics-addr", "[::]:16020"), ("--admin-port", "16000")]
        {
            elsewhere.further.extend([flag.to_owned(), address.to_owned()]);
        }
        let mut next = elsewhere.start_ready()?;
        // Somebody takes a port as soon as the first one has let go of it, and does not share it.
        let taken = eventually(PATIENCE, || {
            world.a.place.netns.enter(|| Ok(TcpListener::bind((Ipv6Addr::UNSPECIFIED, 15021))?))
        })?;
        let (mark, agents) = (setting.log().mark(), world.agent(On::A)?.seen());
        next.process().kill_9()?;
        setting.log().wait_line(mark, PATIENCE, "the attempt", |line| line.contains("15021"))?;
        ensure!(setting.metrics().is_err(), "it answers at some of its ports");
        drop(taken);
        eventually(PATIENCE, || setting.readiness().map(drop)).context("the port is free")?;
        held.say().context("what the first daemon drained")?;

        // A pod of which it hears now, and that cannot be served yet.
        eventually(PATIENCE, || {
            ensure!(world.agent(On::A)?.seen() > agents, "it has not called the agent");
            Ok(())
        })?;
        let taken = late.place.netns.enter(|| Ok(TcpListener::bind("0.0.0.0:15006")?))?;
        let refused = world.agent(On::A)?.add(&late);
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
        world.agent(On::A)?.del(&late)?;
        Ok("its ports and its pods are to be seen".to_owned())
    });
}

/// As istio-cni does: the rules go first, then its daemons are told, and the mesh says so last.
#[test]
fn a_pod_that_leaves_the_mesh_under_load_loses_no_attempt() {
    in_redirected("out under load", &BOTH, Backend::IptablesNft, |world| {
        let (client, server) = (world.client.clone(), world.server.clone());
        let targets = server.addresses().map(|address| SocketAddr::new(address, HTTP));
        let mut load = Load::start(&client.place, 100, &targets)?;
        load.goes_on(100)?;
        let log = world.setting(On::A).log();
        let mark = log.mark();
        redirect::release(&server, Backend::IptablesNft)?;
        world.agent(On::B)?.del(&server)?;
        world.mesh.pod(MESHED, &server, Enrolment::None)?;
        log.wait_line(mark, PATIENCE, "the change", |line| line.contains("mesh applied"))?;
        load.goes_on(300)?;
        let outcome = load.finish()?;
        redirect::pod(&server, Backend::IptablesNft)?;
        world.agent(On::B)?.add(&server)?;
        world.mesh.pod(MESHED, &server, Enrolment::Inherit)?;
        ensure!(outcome.failed.is_empty(), "{}", outcome.evidence());
        Ok(outcome.evidence())
    });
}

#[test]
fn beside_a_daemon_that_hands_nothing_over_the_ports_are_shared() {
    in_redirected("rolling update", &[On::B], Backend::IptablesNft, |world| {
        let targets = world.server.addresses().map(|address| SocketAddr::new(address, HTTP));
        let mut load = Load::start(&world.outsider.place, 300, &targets)?;
        load.goes_on(100)?;
        for round in 0..4 {
            // Where it looks for the one before it there is nobody.
            let mut setting = world.setting(On::B).clone();
            setting.meeting = world.run.path(format!("elsewhere-{round}"));
            let next = setting.start_ready()?;
            let first = world.replace_daemon(On::B, next).context("no first daemon")?;
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
    in_redirected("kill -9", &BOTH, Backend::IptablesNft, |world| {
        let (client, server) = (world.client.clone(), world.server.clone());
        for on in BOTH {
            let watch = world.watch_link_for_clear("killed")?;
            world.kill_daemon(on)?;
            let tries = throughout(Duration::from_millis(500), || {
                for address in server.addresses() {
                    http_refused(&client.place, address)?;
                }
                Ok(())
            })?;
            ensure!(tries > 0, "nothing was tried");
            nothing_in_clear(&watch.finish()?, &client, "nothing")?;
            world.start_daemon(on)?;
            http(&client.place, server.v4.into(), "").context("after the restart")?;
        }
        Ok(format!("{} daemons called the agent of node-b", world.agent(On::B)?.seen()))
    });
}

#[test]
fn an_agent_that_restarts_changes_nothing_for_its_pods() {
    in_redirected("agent restarts", &BOTH, Backend::IptablesNft, |world| {
        let (client, server) = (world.client.clone(), world.server.clone());
        let mut held = Held::open(&client.place, lines_at(server.v4))?;
        let path = world.agent(On::B)?.path().to_owned();
        world.replace_agent(On::B, None);
        eventually(PATIENCE, || {
            let answer = world.setting(On::B).readiness();
            let error = answer.err().context("it is ready without its agent")?;
            ensure!(format!("{error:#}").contains("workload proxy manager"), "{error:#}");
            Ok(())
        })?;
        held.say().context("without the agent")?;
        http(&client.place, server.v4.into(), "").context("without the agent")?;
        world.replace_agent(On::B, Some(NodeAgent::start(path, &[&server])?));
        eventually(PATIENCE, || world.setting(On::B).readiness())?;
        held.say().context("with the agent back")?;
        http(&client.place, server.v4.into(), "").context("with the agent back")?;
        Ok("open and new connections went on".to_owned())
    });
}

#[test]
fn a_deleted_pod_is_let_go_wholly() {
    in_redirected("deletion", &BOTH, Backend::IptablesNft, |world| {
        let (client, server) = (world.client.clone(), world.server.clone());
        http(&client.place, server.v4.into(), "")?;
        let mut held_before = 0;
        for _ in 0..3 {
            let mut held = Held::open(&client.place, lines_at(server.v4))?;
            held_before = world.daemon(On::B)?.held_of(&server.place.netns)?.len();
            ensure!(held_before > 3, "namespace, listeners and connection are {held_before} descriptors");
            world.agent(On::B)?.del(&server)?;
            eventually(PATIENCE, || {
                ensure!(held.say().is_err(), "the connection of the deleted pod goes on");
                Ok(())
            })?;
            eventually(PATIENCE, || http_refused(&client.place, server.v4.into()))?;
            eventually(PATIENCE, || {
                let left = world.daemon(On::B)?.held_of(&server.place.netns)?;
                ensure!(left.is_empty(), "still held: {left:?}");
                Ok(())
            })?;
            world.agent(On::B)?.add(&server)?;
            http(&client.place, server.v4.into(), "").context("added again: at once")?;
        }
        // Whatever else is held of a pod's namespace keeps that alive, and so the device in it and its other end.
        let pod = world.b.add_pod(&world.run, "brief")?;
        redirect::pod(&pod, Backend::IptablesNft)?;
        world.mesh.pod(MESHED, &pod, Enrolment::Inherit)?;
        world.agent(On::B)?.add(&pod)?;
        for to in [&server, &world.near] {
            eventually(PATIENCE, || http(&pod.place, to.v4.into(), ""))?;
        }
        let devices = || world.b.place.netns.ip(&["-o", "link", "show"]);
        let device = format!("pod{}@", pod.v4.octets()[3]);
        ensure!(devices()?.contains(&device), "no {device} on the node");
        world.agent(On::B)?.del(&pod)?;
        world.mesh.remove("pod-brief")?;
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

fn hostile(world: &mut World) -> Result<String> {
    let (client, server) = (world.client.clone(), world.server.clone());
    let path = world.agent(On::B)?.path().to_owned();
    world.replace_agent(On::B, None);
    let listener = Listener::at(&path)?;
    let served = |world: &mut World, when: &str| -> Result<usize> {
        http(&client.place, server.v4.into(), "").with_context(|| format!("after {when}"))?;
        let daemon = world.daemon(On::B)?;
        daemon.process().must_run().with_context(|| format!("after {when}"))?;
        daemon.files()
    };
    // What messages bring: namespaces and files. That connections end is looked at besides.
    let none_leaked = |world: &mut World, when: &str, before: usize| {
        eventually(PATIENCE, || {
            let now = served(world, when)?;
            ensure!(now <= before, "{now} descriptors after {when}, {before} before");
            Ok(())
        })
    };
    let connection = listener.accept(PATIENCE)?;
    agent::snapshot(&connection, [&server].into_iter())?;
    connection.silent(Duration::from_millis(300))?;
    let before = served(world, "a good snapshot")?;

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
    none_leaked(world, "bad messages", before)?;
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
        none_leaked(world, what, before)?;
    }
    // A pod whose port is taken is refused in time, named, and served as soon as that is over.
    let outside = world.outside.clone();
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
    served(world, "an agent that is gone")?;
    // The rest is for an agent that behaves.
    drop(listener);
    world.replace_agent(On::B, Some(NodeAgent::start(path, &[&server])?));
    eventually(PATIENCE, || world.setting(On::B).readiness())?;
    Ok(format!(
        "{} kinds of bad messages, {} of broken protocol; {before} descriptors",
        cases.len(),
        broken.len()
    ))
}
