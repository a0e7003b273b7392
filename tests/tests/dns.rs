//! Names that pods ask for, where a node agent's rules redirect that: answered for the mesh, forwarded for the rest.

mod common;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::in_testbed_that;
use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{RData, RecordType};
use ztunnel_proto::workload;
use ztunnel_tests::istiod;
use ztunnel_tests::poll::eventually;
use ztunnel_tests::redirect::Backend;
use ztunnel_tests::resolver::{self, Resolver, TRANSPORTS, Transport, addresses, ask, question};
use ztunnel_tests::testbed::istio::{behind, service};
use ztunnel_tests::testbed::{BOTH, On, SERVICE_IPS, Testbed, http};
use ztunnel_tests::topology::Pod;

const SETTLE: Duration = Duration::from_secs(20);
/// What the two resolvers answer.
const FIRST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const SECOND: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// A resolver on the other node, and another one on the client's: neither is in the mesh.
struct Resolvers {
    first: Resolver,
    second: Resolver,
}

/// Something in a testbed whose pods are enrolled by node agents that redirect their DNS, too.
fn in_redirected(
    name: &str,
    backend: Backend,
    act: impl FnOnce(&mut Testbed, &mut Resolvers) -> Result<String>,
) {
    let prepare = |testbed: &mut Testbed| {
        testbed.enrol_by_agent(&BOTH, backend)?;
        testbed.mesh.write("service-db", HEADLESS)?;
        let start = |pod: &Pod, answer| Resolver::start(&pod.place, &pod.addresses(), answer);
        Ok(Resolvers { first: start(&testbed.outside, FIRST)?, second: start(&testbed.outsider, SECOND)? })
    };
    in_testbed_that(name, prepare, |testbed, resolvers| {
        let told = act(testbed, resolvers)?;
        for on in BOTH {
            testbed.agent(on)?.check()?;
        }
        Ok(told)
    });
}

/// A service whose addresses are those of its pods.
const HEADLESS: &str = "apiVersion: v1
kind: Service
metadata:
  name: db
  namespace: demo
spec:
  clusterIP: None
  selector:
    app: near
  ports:
  - name: lines
    protocol: TCP
    port: 9000
";

/// What the client is answered by the resolver of the cluster.
fn resolve(testbed: &Testbed, name: &str, kind: RecordType, transport: Transport) -> Result<Message> {
    ask(&testbed.client.place, testbed.outside.v4.into(), &question(name, kind)?, transport)
}

fn names_of_the_mesh(testbed: &Testbed, resolvers: &Resolvers) -> Result<usize> {
    let mut asked = 0;
    let near = testbed.near.addresses().map(|address| address.to_string());
    eventually(SETTLE, || {
        let answer = resolve(testbed, "db.demo.svc.cluster.local.", RecordType::A, Transport::Udp)?;
        ensure!(answer.authoritative, "the headless service is not known yet");
        Ok(())
    })?;
    let before = resolvers.first.asked().len();
    for transport in TRANSPORTS {
        for (name, [v4, v6]) in [
            ("server.demo.svc.cluster.local.", SERVICE_IPS),
            ("SERVER.demo.", SERVICE_IPS),
            ("server.", SERVICE_IPS),
            ("server.demo.demo.svc.cluster.local.", SERVICE_IPS),
            ("db.demo.svc.cluster.local.", [&near[0], &near[1]]),
        ] {
            for (kind, address) in [(RecordType::A, v4), (RecordType::AAAA, v6)] {
                let answer = resolve(testbed, name, kind, transport).with_context(|| name.to_owned())?;
                ensure!(answer.authoritative, "{name}: {answer}");
                ensure!(addresses(&answer) == [address], "{name}: {answer}");
                asked += 1;
            }
        }
    }
    ensure!(resolvers.first.asked().len() == before, "{:?}", resolvers.first.asked());
    // And what was resolved is reached.
    http(&testbed.client.place, testbed.server.v4.into(), "").context("a server of the mesh")?;
    Ok(asked)
}

/// Whom the pod asks is asked, with the pod's address, and what is answered comes back as it is.
fn other_names(testbed: &Testbed, resolvers: &Resolvers) -> Result<usize> {
    let before = [resolvers.first.asked().len(), resolvers.second.asked().len()];
    let mut asked = 0;
    let client = testbed.client.addresses();
    for (number, transport) in TRANSPORTS.into_iter().enumerate() {
        for (pod, said) in [(&testbed.outside, FIRST), (&testbed.outsider, SECOND)] {
            for address in pod.addresses() {
                let name = format!("www-{number}.example.com.");
                let question = question(&name, RecordType::A)?;
                let answer = ask(&testbed.client.place, address, &question, transport)?;
                ensure!(addresses(&answer) == [said.to_string()], "{answer}");
                ensure!(!answer.authoritative && answer.additionals.len() == 1, "{answer}");
                asked += 1;
            }
        }
        let missing = resolve(testbed, "a.missing.", RecordType::AAAA, transport)?;
        ensure!(missing.metadata.response_code == ResponseCode::NXDomain, "{missing}");
        let [authority] = &missing.authorities[..] else { anyhow::bail!("no authority: {missing}") };
        ensure!(matches!(&authority.data, RData::SOA(soa) if soa.minimum == 77), "{authority}");
        let large = resolve(testbed, "a.large.", RecordType::A, transport)?;
        match transport {
            Transport::Udp => ensure!(large.truncation && large.answers.is_empty(), "{large}"),
            Transport::Tcp => ensure!(addresses(&large).len() == 100, "{large}"),
        }
        // An update is for the server it was sent to.
        let update = Message::new(4711, MessageType::Query, OpCode::Update);
        let updated = ask(&testbed.client.place, testbed.outside.v4.into(), &update, transport)?;
        ensure!(updated.metadata.response_code == ResponseCode::NoError, "{updated}");
        ensure!(updated.op_code == OpCode::Update, "{updated}");
        asked += 3;
    }
    let zone = resolver::transfer(&testbed.client.place, testbed.outsider.v4.into(), "zone.")?;
    ensure!(zone.len() == resolver::PARTS, "{} messages", zone.len());
    ensure!(zone.iter().all(|part| addresses(part) == [SECOND.to_string()]), "{zone:?}");
    asked += 1;
    let seen = [resolvers.first.asked(), resolvers.second.asked()];
    let new = seen.iter().zip(before).flat_map(|(seen, before)| &seen[before..]);
    for question in new {
        ensure!(client.contains(&question.from), "from another address: {question:?}");
    }
    Ok(asked)
}

/// One socket asks two servers, as some resolvers do with all that they know.
fn two_servers_from_one_socket(testbed: &Testbed) -> Result<()> {
    let servers = [(&testbed.outside, FIRST), (&testbed.outsider, SECOND)];
    for round in 0..3 {
        let socket = testbed.client.place.netns.enter(|| resolver::unbound(testbed.outside.v4.into()))?;
        for (pod, said) in servers {
            let bytes = question(&format!("round-{round}.example.com."), RecordType::A)?.to_vec()?;
            let answer = resolver::by_datagram(&socket, pod.v4.into(), &bytes, SETTLE)
                .with_context(|| format!("round {round}: {}", pod.name))?;
            let answer = Message::from_vec(&answer)?;
            ensure!(addresses(&answer) == [said.to_string()], "round {round}: {answer}");
        }
    }
    Ok(())
}

fn requests(testbed: &Testbed) -> Result<u64> {
    let metrics = testbed.setting(On::A).metrics()?;
    let counted = metrics.lines().filter(|line| line.starts_with("istio_dns_requests_total"));
    Ok(counted.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
}

fn everything(testbed: &mut Testbed, resolvers: &mut Resolvers) -> Result<String> {
    let known = names_of_the_mesh(testbed, resolvers)?;
    let before = requests(testbed)?;
    let others = other_names(testbed, resolvers)?;
    // The proxy's own questions would be counted if they were redirected.
    let counted = requests(testbed)? - before;
    ensure!(counted == others as u64, "{others} questions were counted as {counted}");
    two_servers_from_one_socket(testbed)?;
    // What is not redirected is as without it: a pod outside the mesh.
    let place = &testbed.outsider.place;
    let answer = ask(place, testbed.outside.v4.into(), &question("server.", RecordType::A)?, Transport::Udp)?;
    ensure!(addresses(&answer) == [FIRST.to_string()], "{answer}");
    let metrics = testbed.setting(On::A).metrics()?;
    for name in [
        "istio_dns_requests_total{request_query_type=\"aaaa\",request_protocol=\"tcp\",source_canonical_service=\"client\"",
        "istio_dns_upstream_requests_total{request_query_type=\"a\",request_protocol=\"udp\",source_canonical_service=\"client\"",
        "istio_dns_upstream_request_duration_seconds_count",
    ] {
        ensure!(metrics.contains(name), "no {name} in {metrics}");
    }
    Ok(format!("{known} questions for names of the mesh, {others} for others"))
}

#[test]
fn names_are_resolved_through_rules_of_iptables() {
    in_redirected("iptables on nf_tables", Backend::IptablesNft, everything);
}

#[test]
fn names_are_resolved_through_rules_of_legacy_iptables() {
    in_redirected("legacy iptables", Backend::IptablesLegacy, everything);
}

#[test]
fn names_are_resolved_through_rules_of_nftables() {
    in_redirected("nftables", Backend::Nft, everything);
}

#[test]
fn a_slow_resolver_is_heard_and_one_that_is_away_is_told_at_once() {
    in_redirected("resolver away", Backend::IptablesNft, |testbed, resolvers| {
        // Slower than clients wait the first time.
        resolvers.first.slow(Duration::from_millis(5500));
        let answer = resolve(testbed, "www.example.com.", RecordType::A, Transport::Udp)?;
        ensure!(addresses(&answer) == [FIRST.to_string()], "{answer}");
        // Names of the mesh need nobody.
        let answer = resolve(testbed, "server.", RecordType::A, Transport::Udp)?;
        ensure!(addresses(&answer) == [SERVICE_IPS[0]], "{answer}");
        resolvers.first.slow(Duration::ZERO);
        // It closes the connection without an answer.
        resolvers.first.silent(true);
        let answer = resolve(testbed, "www.example.com.", RecordType::A, Transport::Tcp)?;
        ensure!(answer.metadata.response_code == ResponseCode::ServFail, "{answer}");
        resolvers.first.silent(false);
        let answer = resolve(testbed, "www.example.com.", RecordType::A, Transport::Udp)?;
        ensure!(addresses(&answer) == [FIRST.to_string()], "{answer}");
        // Nobody at that port: known at once.
        let nobody = IpAddr::from(testbed.server.v4);
        for transport in TRANSPORTS {
            let answer =
                ask(&testbed.client.place, nobody, &question("www.example.com.", RecordType::A)?, transport)?;
            ensure!(answer.metadata.response_code == ResponseCode::ServFail, "{answer}");
        }
        let metrics = testbed.setting(On::A).metrics()?;
        ensure!(metrics.contains("istio_dns_upstream_failures_total"), "{metrics}");
        Ok("answers after 5.5 s, SERVFAIL where it is refused".to_owned())
    });
}

#[test]
fn handing_over_loses_no_answer() {
    const ROUNDS: usize = 4;
    in_redirected("hand-over", Backend::IptablesNft, |testbed, _resolvers| {
        let (place, server) = (testbed.client.place.clone(), IpAddr::from(testbed.outside.v4));
        let stop = AtomicBool::new(false);
        // Each with a socket of its own, one question after the other, asked once.
        let asking = |name: &'static str, transport| {
            let (place, stop) = (&place, &stop);
            move || -> Result<usize> {
                let mut answered = 0;
                while !stop.load(Ordering::Relaxed) {
                    let answer = ask(place, server, &question(name, RecordType::A)?, transport)
                        .with_context(|| format!("{name} after {answered} answers"))?;
                    ensure!(addresses(&answer).len() == 1, "{name} after {answered} answers: {answer}");
                    answered += 1;
                }
                Ok(answered)
            }
        };
        let answered = std::thread::scope(|scope| {
            let clients = [
                ("server.", Transport::Udp),
                ("www.example.com.", Transport::Udp),
                ("server.", Transport::Tcp),
            ];
            let threads = clients.map(|(name, transport)| scope.spawn(asking(name, transport)));
            let replaced = (0..ROUNDS).try_for_each(|round| {
                let ready = testbed.restart_daemon(On::A, round % 2 == 1);
                ready.with_context(|| format!("restart {round}")).map(drop)
            });
            stop.store(true, Ordering::Relaxed);
            let answered: Result<Vec<usize>> =
                threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
            replaced.and(answered)
        })?;
        ensure!(answered.iter().all(|count| *count > ROUNDS), "too little to show anything: {answered:?}");
        Ok(format!("{ROUNDS} restarts, {answered:?} answers"))
    });
}

#[test]
fn a_pod_whose_dns_port_is_taken_is_refused_in_time_and_served_afterwards() {
    in_redirected("port taken", Backend::IptablesNft, |testbed, _resolvers| {
        let server = testbed.server.clone();
        testbed.agent(On::B)?.del(&server)?;
        let taken = server.place.netns.enter(|| Ok(std::net::UdpSocket::bind("127.0.0.1:15053")?))?;
        let error = testbed.agent(On::B)?.add(&server).err().context("it was acknowledged")?;
        ensure!(format!("{error:#}").contains("cannot listen for DNS on 127.0.0.1:15053"), "{error:#}");
        drop(taken);
        eventually(SETTLE, || testbed.agent(On::B)?.add(&server))?;
        let question = question("server.", RecordType::A)?;
        let answer = ask(&server.place, testbed.outside.v4.into(), &question, Transport::Udp)?;
        ensure!(addresses(&answer) == [SERVICE_IPS[0]], "{answer}");
        Ok(format!("{error:#}"))
    });
}

#[test]
fn under_istios_defaults_names_are_resolved() {
    in_testbed_that("under Istio", Testbed::under_istio, |testbed, istio| {
        let resolver = Resolver::start(&testbed.outside.place, &testbed.outside.addresses(), FIRST)?;
        istio.discovery.service(service("shop"));
        istio.discovery.workload(behind(istiod::workload(&testbed.server), "shop"));
        let log = testbed.setting(On::A).log();
        let (status, _) = testbed.setting(On::A).ask("POST", "/logging?level=dns=debug")?;
        ensure!(status == 200, "{status}");
        let mark = log.mark();
        eventually(SETTLE, || {
            let answer = resolve(testbed, "shop.", RecordType::A, Transport::Udp)?;
            ensure!(addresses(&answer) == [SERVICE_IPS[0]], "{answer}");
            Ok(())
        })?;
        let line = log.wait_line(mark, SETTLE, "the question", |line| line.contains("result=\"success\""))?;
        for field in [
            "\tdns\t",
            "src.workload=\"client\"",
            "src.namespace=\"demo\"",
            "query=\"A\"",
            "domain=\"shop\"",
            "endpoints=1",
        ] {
            ensure!(line.contains(field), "no {field} in {line}");
        }
        let answer = resolve(testbed, "www.example.com.", RecordType::A, Transport::Udp)?;
        ensure!(addresses(&answer) == [FIRST.to_string()], "{answer}");
        log.wait_line(mark, SETTLE, "the other", |line| line.contains("result=\"forwarded\""))?;
        drop(resolver);
        Ok(line.trim().to_owned())
    });
}

/// The code of a negative answer, and of which zone it is.
fn negative(answer: &Message) -> Result<(ResponseCode, String)> {
    ensure!(answer.answers.is_empty(), "{answer}");
    let [authority] = &answer.authorities[..] else { anyhow::bail!("no authority: {answer}") };
    ensure!(matches!(authority.data, RData::SOA(_)), "{authority}");
    Ok((answer.metadata.response_code, authority.name.to_string()))
}

#[test]
fn a_name_that_only_the_mesh_has_is_not_denied() {
    in_testbed_that("names of the mesh alone", Testbed::under_istio, |testbed, istio| {
        // Which knows nothing below `missing.`.
        let resolver = Resolver::start(&testbed.outside.place, &testbed.outside.addresses(), FIRST)?;
        let external = |hostname: &str| workload::Service {
            hostname: hostname.to_owned(),
            canonical: false,
            ..service("api")
        };
        istio.discovery.service(external("API.Only.Missing"));
        istio.discovery.service(external("*.wild.missing"));
        istio.discovery.service(workload::Service { addresses: Vec::new(), ..service("db") });
        let endpoint = |status: workload::WorkloadStatus| {
            istio.discovery.workload(workload::Workload {
                status: status.into(),
                ..behind(istiod::workload(&testbed.server), "db")
            });
        };
        endpoint(workload::WorkloadStatus::Unhealthy);
        let ask = |name: &str, kind, transport| resolve(testbed, name, kind, transport);
        eventually(SETTLE, || {
            let answer = ask("x.wild.missing.", RecordType::A, Transport::Udp)?;
            ensure!(addresses(&answer) == [SERVICE_IPS[0]], "{answer}");
            Ok(())
        })?;
        for transport in TRANSPORTS {
            for name in ["api.only.missing.", "API.ONLY.missing.", "a.b.wild.missing."] {
                let answer = ask(name, RecordType::AAAA, transport)?;
                ensure!(addresses(&answer) == [SERVICE_IPS[1]], "{name}: {answer}");
                for kind in [RecordType::TXT, RecordType::MX, RecordType::HTTPS, RecordType::SRV] {
                    let answer = ask(name, kind, transport)?;
                    let (code, zone) = negative(&answer).with_context(|| format!("{name} {kind}"))?;
                    ensure!(code == ResponseCode::NoError && answer.authoritative, "{name} {kind}: {answer}");
                    ensure!(zone.eq_ignore_ascii_case(name), "{name} {kind}: {answer}");
                }
                let answer = ask(name, RecordType::ANY, transport)?;
                ensure!(addresses(&answer) == [SERVICE_IPS[0]], "{name}: {answer}");
            }
            // What nobody has is denied as before, and nothing is invented for what others have.
            let answer = ask("wild.missing.", RecordType::TXT, transport)?;
            ensure!(negative(&answer)?.0 == ResponseCode::NXDomain && !answer.authoritative, "{answer}");
            // Nobody is ready: there is no such name, whatever is asked for.
            for kind in [RecordType::A, RecordType::AAAA] {
                let answer = ask("db.demo.svc.cluster.local.", kind, transport)?;
                let (code, zone) = negative(&answer)?;
                ensure!((code, &*zone) == (ResponseCode::NXDomain, "cluster.local."), "{answer}");
            }
        }
        endpoint(workload::WorkloadStatus::Healthy);
        eventually(SETTLE, || {
            let answer = ask("db.demo.svc.cluster.local.", RecordType::A, Transport::Udp)?;
            ensure!(addresses(&answer) == [testbed.server.v4.to_string()], "{answer}");
            Ok(())
        })?;
        drop(resolver);
        Ok("every kind of question for what only the mesh has".to_owned())
    });
}

#[test]
fn a_pod_costs_a_few_descriptors() {
    /// Its network namespace, three listeners, two sockets for names in each family, and one for connection tracking.
    const EACH: usize = 9;
    const PODS: usize = 10;
    in_redirected("descriptors", Backend::IptablesNft, |testbed, _resolvers| {
        let name = |number| format!("more-{number}");
        let pods = (0..PODS).map(|number| testbed.a.add_pod(&testbed.run, &name(number)));
        let pods = pods.collect::<Result<Vec<_>>>()?;
        let before = testbed.daemon(On::A)?.descriptors()?;
        for pod in &pods {
            testbed.agent(On::A)?.add(pod)?;
        }
        // What others have open meanwhile comes and goes.
        let settled = |testbed: &mut Testbed, count: usize| {
            eventually(SETTLE, || {
                let open = testbed.daemon(On::A)?.descriptors()?;
                ensure!(open == count, "{open} descriptors, {before} without the pods");
                Ok(())
            })
        };
        settled(testbed, before + PODS * EACH)?;
        for pod in &pods {
            testbed.agent(On::A)?.del(pod)?;
        }
        settled(testbed, before)?;
        Ok(format!("{EACH} descriptors a pod"))
    });
}
