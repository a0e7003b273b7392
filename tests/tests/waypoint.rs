//! Envoy beside node proxies, each with a certificate of istiod's authority and the configuration of its role: as a
//! waypoint, as a gateway, and beside an application.

mod common;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::in_testbed_that;
use common::sidecar::{ENTRANCE, Sidecar};
use ztunnel_proto::security::{self, Authorization};
use ztunnel_proto::workload;
use ztunnel_tests::ca::Answer;
use ztunnel_tests::istiod;
use ztunnel_tests::mesh::{MESHED, ROOT};
use ztunnel_tests::poll::{PATIENCE, eventually};
use ztunnel_tests::process::Log;
use ztunnel_tests::scenarios::outage::nothing_in_clear;
use ztunnel_tests::scenarios::tunnel::field;
use ztunnel_tests::testbed::istio::{Istio, behind, hostname, identity, service};
use ztunnel_tests::testbed::{BOTH, HTTP, On, SERVICE_IPS, Testbed, curl, http, http_refused, refused};
use ztunnel_tests::topology::{Pod, in_url};
use ztunnel_tests::wire::{HBONE_PORT, Watch};

const SETTLE: Duration = Duration::from_secs(20);

/// Something in a testbed whose nodes are as Istio's charts make them.
fn under_istio(name: &str, act: impl FnOnce(&mut Testbed, &mut Istio) -> Result<String>) {
    under_istio_that(name, Answer::Issue, act);
}

/// The same, with an authority that answers so.
fn under_istio_that(
    name: &str,
    answer: Answer,
    act: impl FnOnce(&mut Testbed, &mut Istio) -> Result<String>,
) {
    let prepare = |testbed: &mut Testbed| {
        let istio = testbed.under_istio()?;
        istio.authority.answer(answer);
        Ok(istio)
    };
    in_testbed_that(name, prepare, |testbed, istio| {
        let told = act(testbed, istio)?;
        for on in BOTH {
            testbed.agent(on)?.check()?;
        }
        ensure!(istio.discovery.rejected().is_empty(), "rejected: {:?}", istio.discovery.rejected());
        Ok(told)
    });
}

/// The addresses of the service in front of `server`, with the pod's behind each.
fn routes(server: &Pod) -> Result<[(SocketAddr, SocketAddr); 2]> {
    let [v4, v6] = server.addresses().map(|address| SocketAddr::new(address, HTTP));
    let [vip4, vip6] = SERVICE_IPS.map(|address| address.parse().map(|address| SocketAddr::new(address, 80)));
    Ok([(vip4?, v4), (vip6?, v6)])
}

/// `way` as istiod publishes a waypoint, and it in front of the service `shop` of `server`.
fn publish(istio: &Istio, way: &Pod, server: workload::Workload) {
    let port = u32::from(HBONE_PORT);
    let ports = vec![workload::Port { service_port: port, target_port: port, ..Default::default() }];
    istio.discovery.service(workload::Service {
        addresses: Vec::new(),
        ports: ports.clone(),
        ..service("waypoint")
    });
    let mut published = workload::Workload { native_tunnel: true, ..istiod::workload(way) };
    published.services.insert(format!("{MESHED}/{}", hostname("waypoint")), workload::PortList { ports });
    istio.discovery.workload(published);
    istio.discovery.service(workload::Service { waypoint: Some(waypoint()), ..service("shop") });
    istio.discovery.workload(behind(server, "shop"));
}

/// The waypoint by its service's name.
fn waypoint() -> workload::GatewayAddress {
    let hostname =
        workload::NamespacedHostname { namespace: MESHED.to_owned(), hostname: hostname("waypoint") };
    workload::GatewayAddress {
        hbone_mtls_port: u32::from(HBONE_PORT),
        destination: Some(workload::gateway_address::Destination::Hostname(hostname)),
    }
}

/// Names one principal, or, with an empty text, any.
fn principal(text: &str) -> security::StringMatch {
    let kind = match text.strip_prefix("spiffe://") {
        Some(exact) => security::string_match::MatchType::Exact(exact.to_owned()),
        None => security::string_match::MatchType::Presence(()),
    };
    security::StringMatch { match_type: Some(kind) }
}

fn policy(namespace: &str, name: &str, action: security::Action, matching: security::Match) -> Authorization {
    Authorization {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        scope: security::Scope::WorkloadSelector.into(),
        action: action.into(),
        rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![matching] }] }],
        ..Authorization::default()
    }
}

/// A request to the service at its virtual address, which must have come by way of the waypoint.
fn through(client: &Pod, way: &Pod, vip: SocketAddr) -> Result<String> {
    let answer = curl(&client.place, &[&format!("http://{}/via?marker=secret", in_url(vip.ip()))])
        .with_context(|| format!("{} to {vip}", client.name))?;
    ensure!(answer.remote == vip.ip().to_string(), "the client's socket shows {}", answer.remote);
    let seen = if vip.is_ipv4() { IpAddr::from(way.v4) } else { way.v6.into() };
    ensure!(answer.body == format!("pod=server client={seen} via={}", way.name), "{}", answer.body);
    Ok(answer.body)
}

/// The status of the answer to a request to the service.
fn status(client: &Pod, vip: SocketAddr, path: &str) -> Result<String> {
    let url = format!("http://{}/{path}", in_url(vip.ip()));
    let arguments = ["-q", "-sS", "-g", "-m", "6", "-o", "/dev/null", "-w", "%{http_code}", &url];
    let output = client.place.run("curl", &arguments)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Checks that this line of Envoy's access log has all of these in it.
fn said(envoy: &Sidecar, kind: &str, parts: &[String]) -> Result<String> {
    envoy.log()?.wait_line(0, SETTLE, &format!("{kind} and {parts:?}"), |line| {
        line.starts_with(kind) && parts.iter().all(|part| line.contains(part))
    })
}

/// The `baggage` of a pod of the mesh.
fn baggage(pod: &str) -> String {
    format!(
        "k8s.cluster.name=Kubernetes,k8s.namespace.name={MESHED},k8s.deployment.name={pod},service.name={pod},\
         service.version=latest"
    )
}

/// Checks that the server's daemon has taken a connection from somebody with this identity.
fn taken_from(testbed: &Testbed, source: &str) -> Result<String> {
    eventually(SETTLE, || {
        let metrics = testbed.setting(On::B).metrics()?;
        let line = metrics.lines().find(|line| {
            line.starts_with("istio_tcp_connections_opened_total{reporter=\"destination\"")
                && line.contains(&format!("source_principal=\"{}\"", identity(MESHED, source)))
                && line.contains("connection_security_policy=\"mutual_tls\"")
        });
        Ok(line.with_context(|| format!("no connection from {source} was counted"))?.to_owned())
    })
}

#[test]
fn a_waypoint_stands_between_client_and_server() {
    under_istio("waypoint", |testbed, istio| {
        let way = testbed.b.add_pod(&testbed.run, "waypoint")?;
        let (client, other, server) = (testbed.client.clone(), testbed.other.clone(), testbed.server.clone());
        let routes = routes(&server)?;
        let mut envoy = Sidecar::new(testbed, istio, &way)?;
        envoy.start(testbed, &envoy.waypoint(&routes, &identity(MESHED, "client"), "600s"))?;
        publish(istio, &way, istiod::workload(&server));
        let logs = BOTH.map(|on| testbed.setting(on).log());
        let marks = logs.each_ref().map(Log::mark);
        let [(v4, _), (v6, _)] = routes;
        eventually(SETTLE, || through(&client, &way, v4))?;
        let on_link = testbed.watch_link_for_clear("waypoint-link")?;
        let at_waypoint = Watch::start(&way.place, "eth0", "waypoint-eth0", "not tcp port 15008")?;
        let mut seen = String::new();
        for pod in [&client, &other] {
            for vip in [v4, v6] {
                seen = through(pod, &way, vip)?;
            }
        }
        // What ends the connection in the waypoint, which resets the stream right behind the answer.
        let url = format!("http://{}/via", in_url(v4.ip()));
        let answer =
            curl(&client.place, &["-H", "Connection: close", &url]).context("closed by the server")?;
        // One that reads to the end of the connection sees an end, too.
        curl(&client.place, &["-H", "Connection: close", "--ignore-content-length", &url])
            .context("read to its end")?;
        ensure!(answer.body.ends_with("via=waypoint"), "{}", answer.body);
        nothing_in_clear(&on_link.finish()?, &client, "secret")?;
        ensure!(at_waypoint.finish()?.with_marker("secret") == 0, "in clear on the waypoint's device");

        // What only layer 7 can tell, by whom the tunnel was from.
        ensure!(status(&client, v4, "secret")? == "403", "the client was not refused");
        ensure!(status(&other, v4, "secret")? == "200", "nobody has refused the other one");

        // What the waypoint was told by the client's proxy, and what it was told by the server's.
        for (pod, (vip, _)) in [(&client, routes[0]), (&client, routes[1]), (&other, routes[0])] {
            let address = if vip.is_ipv4() { pod.v4.to_string() } else { format!("[{}]", pod.v6) };
            said(
                &envoy,
                "terminated",
                &[
                    format!("authority={vip} peer={} ", identity(MESHED, &pod.name)),
                    "tls=TLSv1.3 sni=- ".to_owned(),
                    format!("forwarded=[for=\"{address}:"),
                    format!("\";host={}]", hostname("shop")),
                    "traceparent=00-".to_owned(),
                    format!("baggage=[{}]", baggage(&pod.name)),
                    "code=200".to_owned(),
                ],
            )?;
        }
        for (_, endpoint) in routes {
            said(&envoy, "originated", &[format!("to={endpoint}"), baggage("server")])?;
        }
        // What the proxies tell of it.
        logs[0].wait_line(marks[0], SETTLE, "the waypoint", |line| {
            field(line, "dst.hbone_addr") == Some(&v4.to_string())
                && field(line, "dst.identity") == Some(&identity(MESHED, "waypoint"))
                && field(line, "dst.service") == Some(&hostname("shop"))
                && field(line, "src.identity") == Some(&identity(MESHED, "client"))
                && line.contains("connection complete")
        })?;
        let taken = taken_from(testbed, "waypoint")?;
        ensure!(taken.contains("destination_service_name=\"shop\""), "the service is not told: {taken}");

        // Only the waypoint may.
        let only = security::Match {
            principals: vec![principal(&identity(MESHED, "waypoint"))],
            ..Default::default()
        };
        let name = "istio_allow_waypoint_demo_waypoint";
        http(&client.place, server.v4.into(), "").context("past the waypoint, without a policy")?;
        istio.discovery.policy(policy(MESHED, name, security::Action::Allow, only));
        let restricted = workload::Workload {
            authorization_policies: vec![format!("{MESHED}/{name}")],
            ..istiod::workload(&server)
        };
        istio.discovery.workload(behind(restricted.clone(), "shop"));
        eventually(SETTLE, || http_refused(&client.place, server.v4.into()))?;
        for address in server.addresses() {
            eventually(PATIENCE, || http_refused(&client.place, address))?;
        }
        let refused = logs[1].wait_line(marks[1], SETTLE, "the refusal", |line| {
            field(line, "src.identity") == Some(&identity(MESHED, "client")) && line.contains("none allowed")
        })?;
        for vip in [v4, v6] {
            eventually(PATIENCE, || through(&client, &way, vip))
                .context("by the waypoint, with the policy")?;
        }

        // In front of the pod itself: then its own address is served, too.
        let fronted = workload::Workload { waypoint: Some(waypoint()), ..restricted };
        istio.discovery.workload(behind(fronted, "shop"));
        for address in server.addresses() {
            let url = format!("http://{}:{HTTP}/via", in_url(address));
            eventually(SETTLE, || {
                let answer = curl(&client.place, &[&url])?;
                ensure!(answer.body.ends_with("via=waypoint"), "{}", answer.body);
                Ok(())
            })?;
        }
        Ok(format!("{seen}; past it: {}", field(&refused, "error").unwrap_or(&refused)))
    });
}

/// Half of a life of a minute is over within some seconds (a proxy renews up to a tenth sooner or later): certificates
/// are renewed often, and a slow machine has half a minute for it.
const OFTEN: Answer = Answer::Between(-26, 34);

/// Whether the daemons have renewed so many times, and Envoy has seen it and does use its own new ones.
fn renewed_since(
    istio: &Istio,
    envoy: &Sidecar,
    renewed: &mut BTreeMap<String, usize>,
    round: usize,
) -> Result<()> {
    for asked in istio.authority.asked() {
        *renewed.entry(asked.impersonated.unwrap_or_default()).or_default() += 1;
    }
    for name in ["client", "server"] {
        let count = renewed.get(&identity(MESHED, name)).copied().unwrap_or_default();
        ensure!(count >= round, "{name} was renewed {count} times");
    }
    let text = envoy.log()?.text();
    let of_client = text.lines().filter(|line| line.contains("ns/demo/sa/client "));
    let serials: BTreeSet<_> = of_client.filter_map(|line| field(line, "serial")).collect();
    ensure!(serials.len() > round, "{} certificates of the client were seen", serials.len());
    for side in ["listener.*15008.server", "cluster.connect_originate.client"] {
        let name = format!("{side}_ssl_socket_factory.ssl_context_update_by_sds");
        let updates = envoy.stat(&name)?;
        ensure!(updates > round as u64, "{name}: {updates}");
    }
    Ok(())
}

#[test]
fn certificates_are_renewed_and_the_waypoint_restarts_without_a_failed_request() {
    under_istio_that("renewals", OFTEN, |testbed, istio| {
        let way = testbed.b.add_pod(&testbed.run, "waypoint")?;
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        let routes = routes(&server)?;
        let [v4, v6] = routes.map(|(vip, _)| vip);
        let mut envoy = Sidecar::new(testbed, istio, &way)?;
        // Its own tunnels are made anew every second, with the certificate it has then.
        let config = envoy.waypoint(&routes, &identity(MESHED, "nobody"), "1s");
        envoy.start(testbed, &config)?;
        publish(istio, &way, istiod::workload(&server));
        eventually(SETTLE, || through(&client, &way, v4))?;
        let _so_far = istio.authority.asked();
        let mut renewed = BTreeMap::<String, usize>::new();
        let requests = Cell::new(0);
        let ask = || -> Result<()> {
            requests.set(requests.get() + 1);
            [v4, v6].into_iter().try_for_each(|vip| through(&client, &way, vip).map(drop))
        };
        for round in 1..=3 {
            envoy.renew()?;
            // Both proxies have renewed once more, and tunnels of the new certificates have been used on both legs.
            let begun = Instant::now();
            while let Err(why) = renewed_since(istio, &envoy, &mut renewed, round) {
                ensure!(begun.elapsed() < SETTLE, "round {round}: {why:#}");
                ask().with_context(|| format!("request {} in round {round}", requests.get()))?;
            }
        }
        let dialled = envoy.stat("cluster.connect_originate.upstream_cx_total")?;
        ensure!(dialled > 3, "{dialled} tunnels to the server");
        istio.authority.answer(Answer::Issue);
        envoy.renew()?;
        // It dies and comes back: nobody is left waiting for it, on either side of it.
        for round in 0..2 {
            through(&client, &way, v4)?;
            envoy.kill()?;
            let said = refused(&client.place, &[&format!("http://{}/via", in_url(v4.ip()))])?;
            ensure!(!said.is_empty(), "refused without a word");
            envoy.start(testbed, &config)?;
            eventually(SETTLE, || through(&client, &way, v4)).with_context(|| format!("restart {round}"))?;
            for _ in 0..20 {
                for vip in [v4, v6] {
                    through(&client, &way, vip).with_context(|| format!("after restart {round}"))?;
                }
            }
        }
        Ok(format!(
            "{} requests while certificates were renewed: {renewed:?}; {dialled} tunnels on",
            requests.get()
        ))
    });
}

#[test]
fn a_gateway_reaches_a_pod_under_strict() {
    under_istio("gateway", |testbed, istio| {
        let (pod, server) = (testbed.outsider.clone(), testbed.server.clone());
        let name = "istio_converted_static_strict";
        let anybody = security::Match { not_principals: vec![principal("")], ..Default::default() };
        istio.discovery.policy(policy(ROOT, name, security::Action::Deny, anybody));
        istio.discovery.workload(workload::Workload {
            authorization_policies: vec![format!("{ROOT}/{name}")],
            ..istiod::workload(&server)
        });
        eventually(SETTLE, || http_refused(&pod.place, server.v4.into()))?;
        http_refused(&pod.place, server.v6.into())?;
        let mut envoy = Sidecar::new(testbed, istio, &pod)?;
        let mut seen = String::new();
        for address in server.addresses() {
            let to = SocketAddr::new(address, HTTP);
            envoy.start(testbed, &envoy.gateway(to))?;
            let url = format!("http://127.0.0.1:{ENTRANCE}/via");
            let own = if address.is_ipv4() { IpAddr::from(pod.v4) } else { pod.v6.into() };
            let get = || {
                let answer = curl(&pod.place, &[&url])?;
                ensure!(answer.body == format!("pod=server client={own} via=outsider"), "{}", answer.body);
                Ok(answer.body)
            };
            seen = eventually(SETTLE, get).with_context(|| format!("to {address}"))?;
            for _ in 0..20 {
                get().context("once more")?;
            }
            said(&envoy, "originated", &[format!("to={to}"), baggage("server")])?;
        }
        taken_from(testbed, "outsider")?;
        Ok(seen)
    });
}

#[test]
fn beside_an_application_it_takes_tunnels() {
    under_istio("beside an application", |testbed, istio| {
        let (pod, client) = (testbed.outside.clone(), testbed.client.clone());
        let mut envoy = Sidecar::new(testbed, istio, &pod)?;
        envoy.start(testbed, &envoy.beside_application())?;
        istio.discovery.workload(workload::Workload { native_tunnel: true, ..istiod::workload(&pod) });
        let url = |address| format!("http://{}:{HTTP}/via", in_url(address));
        let mut seen = String::new();
        for address in pod.addresses() {
            let get = |from: &Pod| {
                let answer = curl(&from.place, &[&url(address)])?;
                ensure!(answer.body == "pod=outside client=127.0.0.1 via=outside", "{}", answer.body);
                Ok(answer.body)
            };
            seen = eventually(SETTLE, || get(&client)).with_context(|| format!("to {address}"))?;
            for _ in 0..20 {
                get(&client).context("once more")?;
                get(&testbed.other)?;
            }
            let authority = SocketAddr::new(address, HTTP);
            for pod in ["client", "other"] {
                let whose = format!("authority={authority} peer={} ", identity(MESHED, pod));
                said(&envoy, "terminated", &[whose, format!("baggage=[{}]", baggage(pod))])?;
            }
        }
        // With a good certificate of somebody else it is nobody's peer.
        let log = testbed.setting(On::A).log();
        let mark = log.mark();
        envoy.kill()?;
        let mut impostor = Sidecar::known_as(testbed, istio, &pod, "impostor")?;
        impostor.start(testbed, &impostor.beside_application())?;
        eventually(SETTLE, || impostor.stat("server.state"))?;
        let refused = refused(&client.place, &[&url(pod.v4.into())])?;
        let line = log.wait_line(mark, SETTLE, "the impostor", |line| {
            line.contains("impostor") && field(line, "src.workload") == Some("client")
        })?;
        Ok(format!("{seen}; an impostor: \"{refused}\", {}", field(&line, "error").unwrap_or(&line)))
    });
}
