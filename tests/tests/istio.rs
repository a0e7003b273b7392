//! In the place of Istio's own ztunnel: started as its chart does, with istiod and a node agent around it.

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use common::in_testbed_that;
use nix::sys::signal::Signal;
use serde_json::Value;
use ztunnel_proto::security::{self, Authorization};
use ztunnel_proto::workload;
use ztunnel_tests::binaries;
use ztunnel_tests::ca::{Answer, Caller};
use ztunnel_tests::daemon::Daemon;
use ztunnel_tests::istiod::{self, ADDRESS, AUTHORIZATION, Change};
use ztunnel_tests::mesh::MESHED;
use ztunnel_tests::peer::hold::Held;
use ztunnel_tests::peer::load::Load;
use ztunnel_tests::place::Place;
use ztunnel_tests::poll::{PATIENCE, eventually};
use ztunnel_tests::scenarios::outage::nothing_in_clear;
use ztunnel_tests::testbed::istio::{Istio, behind, service, token_of};
use ztunnel_tests::testbed::{
    BOTH, HTTP, On, Options, SERVICE_IPS, Testbed, curl, http, http_refused, lines_at, refused,
};
use ztunnel_tests::topology::{Pod, in_url};

const CLIENT: &str = "spiffe://cluster.local/ns/demo/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/demo/sa/server";

/// Something in a testbed whose nodes are as Istio's charts make them.
fn under_istio(name: &str, act: impl FnOnce(&mut Testbed, &mut Istio) -> Result<String>) {
    in_testbed_that(name, Testbed::under_istio, |testbed, istio| {
        let told = act(testbed, istio)?;
        for on in BOTH {
            testbed.agent(on)?.check()?;
        }
        ensure!(istio.discovery.rejected().is_empty(), "rejected: {:?}", istio.discovery.rejected());
        Ok(told)
    });
}

/// A policy that refuses the client, for the server alone.
fn deny_client() -> Authorization {
    let exact = security::string_match::MatchType::Exact("cluster.local/ns/demo/sa/client".to_owned());
    let matching = security::Match {
        principals: vec![security::StringMatch { match_type: Some(exact) }],
        ..security::Match::default()
    };
    Authorization {
        name: "no-client".to_owned(),
        namespace: MESHED.to_owned(),
        scope: security::Scope::Namespace.into(),
        action: security::Action::Deny.into(),
        rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![matching] }] }],
        ..Authorization::default()
    }
}

fn dump(testbed: &Testbed, on: On) -> Result<Value> {
    let (status, body) = testbed.setting(on).ask("GET", "/config_dump")?;
    ensure!(status == 200, "status {status}");
    Ok(serde_json::from_slice(&body)?)
}

fn names<'a>(dump: &'a Value, list: &str, key: &str) -> Vec<&'a str> {
    let all = dump[list].as_array().map(Vec::as_slice).unwrap_or_default();
    all.iter().filter_map(|entry| entry[key].as_str()).collect()
}

#[test]
fn pods_talk_with_the_mesh_and_the_certificates_of_istiod() {
    under_istio("as under Istio", |testbed, istio| {
        let watch = testbed.watch_link_for_clear("istio")?;
        let log = testbed.setting(On::B).log();
        let mark = log.mark();
        for (own, address) in testbed.client.addresses().into_iter().zip(testbed.server.addresses()) {
            let answer = http(&testbed.client.place, address, "?marker=secret")?;
            ensure!(answer.body.contains(&format!("pod=server client={own}")), "{}", answer.body);
        }
        let line = log.wait_line(mark, PATIENCE, "both identities", |line| {
            line.contains(CLIENT) && line.contains(SERVER) && line.contains("inbound")
        })?;
        nothing_in_clear(&watch.finish()?, &testbed.client, "secret")?;

        // What istiod was told: who asks, for whom, and what is there already.
        let opened = istio.discovery.opened();
        ensure!(opened.len() == 2, "{} streams of two nodes", opened.len());
        let mut tokens: Vec<_> = opened.iter().filter_map(|stream| stream.authorization.clone()).collect();
        tokens.sort_unstable();
        ensure!(
            tokens == BOTH.map(|on| format!("Bearer {}", token_of(&testbed.node(on).name))),
            "{tokens:?}"
        );
        for stream in &opened {
            ensure!(stream.cluster.as_deref() == Some("Kubernetes"), "{:?}", stream.cluster);
            let types: Vec<_> = stream.first.iter().map(|request| &*request.type_url).collect();
            ensure!(types == [ADDRESS, AUTHORIZATION], "{types:?}");
            let node = stream.first[0].node.as_ref().context("no node")?;
            let pod = node.id.strip_prefix("ztunnel~10.80.0.9~ztunnel-node-").context("another node id")?;
            ensure!(pod.ends_with(".istio-system~istio-system.svc.cluster.local"), "{}", node.id);
            let fields = &node.metadata.as_ref().context("no metadata")?.fields;
            for name in ["NAME", "NAMESPACE", "INSTANCE_IPS", "NODE_NAME", "CLUSTER_ID"] {
                ensure!(fields.contains_key(name), "no {name} in {:?}", fields.keys());
            }
        }
        // Certificates are there before the first connection, and only those of pods of a node that runs them.
        let asked = istio.authority.asked();
        let mut whose: Vec<_> = asked.iter().filter_map(|asked| asked.impersonated.as_deref()).collect();
        whose.sort_unstable();
        // An answer that is late is asked for again.
        whose.dedup();
        let expected = ["client", "near", "other", "server"];
        ensure!(
            whose == expected.map(|name| format!("spiffe://cluster.local/ns/demo/sa/{name}")),
            "{whose:?}"
        );

        // What istioctl would show.
        let shown = dump(testbed, On::B)?;
        ensure!(names(&shown, "workloads", "name").len() == 6, "{}", shown["workloads"]);
        ensure!(names(&shown, "certificates", "identity") == [SERVER], "{}", shown["certificates"]);
        ensure!(shown["certificates"][0]["state"] == "Available", "{}", shown["certificates"]);
        let roots = |shown: &Value| shown["certificates"][0]["rootCerts"].as_array().map(Vec::len);
        ensure!(roots(&shown) == Some(1), "{}", shown["certificates"]);
        let state = &shown["workloadState"][istiod::uid(&testbed.server)];
        ensure!(state["state"] == "Up" && state["info"]["serviceAccount"] == "server", "{state}");
        ensure!(shown["config"].as_object().is_some_and(|config| !config.is_empty()), "no configuration");
        let metrics = testbed.setting(On::B).metrics()?;
        for name in [
            "istio_tcp_connections_opened_total",
            "istio_xds_message_total",
            "workload_manager_active_proxy_count 1",
            "istio_build",
        ] {
            ensure!(metrics.contains(name), "no {name} in the metrics");
        }
        Ok(line.trim().to_owned())
    });
}

#[test]
fn what_istiod_pushes_is_in_force_at_once() {
    under_istio("pushes", |testbed, istio| {
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        // A policy cuts what is open and refuses what is new; others are as before.
        let log = testbed.setting(On::B).log();
        let mut held = Held::open(&client.place, lines_at(server.v4))?;
        let mut other = Held::open(&testbed.other.place, lines_at(server.v4))?;
        let mark = log.mark();
        istio.discovery.policy(deny_client());
        eventually(PATIENCE, || match held.say() {
            Ok(_) => bail!("still answered"),
            Err(_) => Ok(()),
        })?;
        let line = log.wait_line(mark, PATIENCE, "the cut", |line| line.contains("due to policy change"))?;
        http_refused(&client.place, server.v4.into())?;
        other.say().context("nobody has refused it")?;
        ensure!(
            names(&dump(testbed, On::B)?, "policies", "name") == ["no-client"],
            "the policy is not shown"
        );
        istio.discovery.remove(AUTHORIZATION, "demo/no-client");
        eventually(PATIENCE, || http(&client.place, server.v4.into(), ""))?;

        // A service, then its endpoint is another one.
        istio.discovery.service(service("shop"));
        istio.discovery.workload(behind(istiod::workload(&server), "shop"));
        let whose = |pod: &str| {
            eventually(PATIENCE, || {
                for address in SERVICE_IPS {
                    let address: IpAddr = address.parse()?;
                    let answer = curl(&client.place, &[&format!("http://{}/", in_url(address))])?;
                    ensure!(answer.body.contains(&format!("pod={pod}")), "{}", answer.body);
                }
                Ok(())
            })
        };
        whose("server")?;
        istio.discovery.workload(istiod::workload(&server));
        istio.discovery.workload(behind(istiod::workload(&testbed.near), "shop"));
        whose("near")?;
        let shown = dump(testbed, On::A)?;
        let service = &shown["services"][0];
        ensure!(service["hostname"] == "shop.demo.svc.cluster.local", "{service}");
        let endpoints = service["endpoints"].as_object().context("no endpoints")?;
        ensure!(endpoints.keys().eq(["Kubernetes//Pod/demo/near"]), "{endpoints:?}");
        Ok(line.trim().to_owned())
    });
}

#[test]
fn without_istiod_a_node_serves_what_it_has() {
    under_istio("istiod away", |testbed, istio| {
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        istio.discovery.policy(deny_client());
        eventually(PATIENCE, || http_refused(&client.place, server.v4.into()))?;
        for on in BOTH {
            // Within a second or two of a push.
            let kept = testbed.setting(on).meeting.join("mesh.cache");
            eventually(PATIENCE, || {
                let bytes = std::fs::read(&kept).context("nothing is kept")?;
                ensure!(bytes.windows(9).any(|window| window == b"no-client"), "the policy is not kept");
                Ok(())
            })?;
        }
        // Away, with its certificates and all.
        istio.discovery.stop();
        istio.authority.answer(Answer::Hang);
        let serves = |testbed: &Testbed, when: &str| -> Result<()> {
            http(&testbed.other.place, testbed.server.v4.into(), "").context(when.to_owned())?;
            http_refused(&testbed.client.place, testbed.server.v4.into()).context(when.to_owned()).map(drop)
        };
        serves(testbed, "while it is away")?;
        for on in BOTH {
            testbed.restart_daemon(on, true).with_context(|| format!("replacing {on:?}"))?;
            serves(testbed, "after a hand-over")?;
        }
        // Killed, it has no certificates any more; the authority is back, the mesh is not.
        istio.authority.answer(Answer::Issue);
        for on in BOTH {
            testbed.kill_daemon(on)?;
            testbed.start_daemon(on)?;
            let ready = testbed.setting(on).readiness()?;
            ensure!(ready.starts_with("ready, with the mesh of "), "{ready}");
            let metrics = testbed.setting(on).metrics()?;
            ensure!(metrics.contains("ztunnel_xds_mesh_age_seconds"), "{metrics}");
            serves(testbed, "after a crash")?;
        }
        // It is back, is told what is held, and sends the rest.
        let before = istio.discovery.opened().len();
        istio.discovery.remove(AUTHORIZATION, "demo/no-client");
        testbed.a.place.netns.enter(|| istio.discovery.restart())?;
        eventually(PATIENCE, || http(&client.place, server.v4.into(), ""))?;
        let opened = eventually(PATIENCE, || {
            let opened = istio.discovery.opened();
            let complete = |stream: &&istiod::Opened| stream.first.len() == 2;
            let opened: Vec<_> = opened.into_iter().skip(before).filter(|stream| complete(&stream)).collect();
            ensure!(opened.len() >= 2, "not both nodes are back");
            Ok(opened)
        })?;
        for stream in &opened {
            let held = &stream.first[0].initial_resource_versions;
            ensure!(held.len() == 6, "{held:?}");
            ensure!(held.values().all(|version| version.starts_with('v')), "{held:?}");
        }
        for on in BOTH {
            eventually(PATIENCE, || {
                let ready = testbed.setting(on).readiness()?;
                ensure!(ready == "ready\n", "{ready}");
                Ok(())
            })?;
        }
        Ok(format!("{} streams opened with versions", opened.len()))
    });
}

#[test]
fn a_first_start_without_istiod_is_not_ready_and_says_why() {
    let testbed = Testbed::without_daemons(Options::default());
    let mut istio = None;
    common::act_in(testbed, "first start without istiod", |testbed| {
        let istio = istio.insert(testbed.under_istio()?);
        istio.discovery.stop();
        let log = testbed.setting(On::A).log();
        let mark = log.mark();
        let daemon = testbed.setting(On::A).start()?;
        testbed.replace_daemon(On::A, daemon);
        let said = eventually(PATIENCE, || {
            let error = testbed.setting(On::A).readiness().err().context("it is ready")?;
            let said = format!("{error:#}");
            ensure!(said.contains("500") && said.contains("state manager"), "{said}");
            Ok(said)
        })?;
        log.wait_line(mark, PATIENCE, "why", |line| line.contains("no control plane"))?;
        // Nothing leaves in clear meanwhile, and pods that start are not kept waiting.
        log.wait_line(mark, PATIENCE, "its pods", |line| {
            line.contains("every pod is as the node agent says")
        })?;
        testbed.a.place.netns.enter(|| istio.discovery.restart())?;
        eventually(PATIENCE, || testbed.setting(On::A).readiness())?;
        testbed.start_daemon(On::B)?;
        eventually(PATIENCE, || http(&testbed.client.place, testbed.server.v4.into(), ""))?;
        Ok(said)
    });
}

#[test]
fn a_daemon_that_has_handed_over_stays_until_it_is_told_or_needed() {
    under_istio("handed over", |testbed, _istio| {
        let log = testbed.setting(On::B).log();
        let handed_over = |testbed: &mut Testbed| -> Result<Daemon> {
            let mark = log.mark();
            let next = testbed.setting(On::B).start_ready()?;
            let first = testbed.replace_daemon(On::B, next).context("no first daemon")?;
            log.wait_line(mark, PATIENCE, "the hand-over", |line| {
                line.contains("waiting to be told to stop")
            })?;
            Ok(first)
        };
        // Ended by itself it would be started again, and take the node back.
        let first = handed_over(testbed)?;
        http(&testbed.client.place, testbed.server.v4.into(), "")?;
        first.stop().context("told")?;
        // The next one dies: then it is needed.
        let mut first = handed_over(testbed)?;
        testbed.kill_daemon(On::B)?;
        first.ended().context("nobody serves the node")?;
        testbed.start_daemon(On::B)?;
        http(&testbed.client.place, testbed.server.v4.into(), "")?;
        Ok("told once, needed once".to_owned())
    });
}

#[test]
fn restarts_under_load_fail_no_attempt() {
    const ROUNDS: usize = 4;
    under_istio("restarts", |testbed, _istio| {
        let targets = testbed.server.addresses().map(|address| SocketAddr::new(address, HTTP));
        let mut load = Load::start(&testbed.client.place, 300, &targets)?;
        load.goes_on(100)?;
        for round in 0..ROUNDS {
            // Kubernetes stops the old pod once the new one is ready.
            let ready = testbed.restart_daemon(BOTH[round % 2], true);
            ready.with_context(|| format!("restart {round}"))?;
            load.goes_on(100)?;
        }
        let outcome = load.finish()?;
        ensure!(outcome.failed.is_empty(), "{}", outcome.evidence());
        Ok(format!("{ROUNDS} restarts: {}", outcome.evidence()))
    });
}

#[test]
fn it_serves_in_an_image_with_a_read_only_root_and_three_capabilities() {
    let testbed = Testbed::without_daemons(Options::default());
    let mut istio = None;
    common::act_in(testbed, "in an image", |testbed| {
        istio = Some(testbed.under_istio()?);
        for on in BOTH {
            let mut setting = testbed.setting(on).clone();
            let chart = setting.chart.as_mut().context("no chart")?;
            chart.image = Some(testbed.run.path(format!("image-{}", setting.node)));
            let mut daemon = setting.start_ready()?;
            // It is what it was meant to be.
            let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.process().pid()))?;
            let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            let capabilities = (1_u64 << 12) | (1 << 13) | (1 << 21);
            ensure!(line("CapEff:") == Some(&*format!("{capabilities:016x}")), "{:?}", line("CapEff:"));
            ensure!(line("Gid:").is_some_and(|ids| ids.starts_with("1337\t")), "{:?}", line("Gid:"));
            let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", daemon.process().pid()))?;
            let root = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/")).context("no root")?;
            ensure!(root.split(' ').nth(3).is_some_and(|how| how.starts_with("ro")), "{root}");
            testbed.replace_daemon(on, daemon);
        }
        for address in testbed.server.addresses() {
            http(&testbed.client.place, address, "").context("in an image")?;
        }
        // What it keeps is in the directory that it shares with the node.
        for on in BOTH {
            let kept = testbed.setting(on).meeting.join("mesh.cache");
            eventually(PATIENCE, || std::fs::metadata(&kept).context("the mesh is not kept"))?;
        }
        Ok("capabilities, group and root as the chart asks".to_owned())
    });
}

#[test]
fn with_no_source_of_the_mesh_everything_is_refused_and_that_is_said() {
    let testbed = Testbed::without_daemons(Options::default());
    let mut istio = None;
    common::act_in(testbed, "XDS_ADDRESS is empty", |testbed| {
        istio = Some(testbed.under_istio()?);
        let mut setting = testbed.setting(On::A).clone();
        let chart = setting.chart.as_mut().context("no chart")?;
        chart.environment.push(("XDS_ADDRESS".to_owned(), String::new()));
        let log = setting.log();
        let mark = log.mark();
        let daemon = setting.start_ready()?;
        testbed.replace_daemon(On::A, daemon);
        let line = log.wait_line(mark, PATIENCE, "why", |line| line.contains("XDS_ADDRESS is empty"))?;
        let watch = testbed.watch_link_for_clear("nothing")?;
        http_refused(&testbed.client.place, testbed.server.v4.into())?;
        nothing_in_clear(&watch.finish()?, &testbed.client, "secret")?;
        Ok(line.trim().to_owned())
    });
}

/// The proxy of a node as istiod publishes its pod, were that pod enrolled. Here it has the node's addresses.
fn proxy_workload(testbed: &Testbed, on: On) -> workload::Workload {
    let node = testbed.node(on);
    let (v4, v6) = proxy_addresses(testbed, on);
    workload::Workload {
        uid: format!("Kubernetes//Pod/istio-system/ztunnel-{}", node.name),
        name: format!("ztunnel-{}", node.name),
        namespace: "istio-system".to_owned(),
        service_account: "ztunnel".to_owned(),
        addresses: vec![v4.octets().to_vec().into(), v6.octets().to_vec().into()],
        tunnel_protocol: workload::TunnelProtocol::Hbone.into(),
        node: node.name.clone(),
        ..istiod::workload(&testbed.server)
    }
}

fn proxy_addresses(testbed: &Testbed, on: On) -> (Ipv4Addr, Ipv6Addr) {
    let number = testbed.node(on).number;
    (Ipv4Addr::new(10, 80, number, 1), Ipv6Addr::new(0xfd80, number.into(), 0, 0, 0, 0, 0, 1))
}

#[test]
fn metrics_are_scraped_through_a_tunnel() {
    under_istio("metrics through HBONE", |testbed, istio| {
        for on in BOTH {
            istio.discovery.workload(proxy_workload(testbed, on));
        }
        let (client, other) = (testbed.client.clone(), testbed.other.clone());
        let url = |address: IpAddr, port: u16, path: &str| format!("http://{}:{port}{path}", in_url(address));
        let scrape = |place: &Place, address: IpAddr| -> Result<String> {
            let answer = curl(place, &[&url(address, 15020, "/metrics")])?;
            ensure!(answer.body.contains("istio_build{component=\"ztunnel\""), "{}", answer.body);
            Ok(answer.body)
        };
        let log = testbed.setting(On::B).log();
        let mark = log.mark();
        // From the other node, from its own, and to both addresses.
        for on in BOTH {
            let (v4, v6) = proxy_addresses(testbed, on);
            for address in [IpAddr::from(v4), v6.into()] {
                let by_tunnel = || {
                    let body = scrape(&client.place, address)?;
                    // Until both nodes know of the proxy it is reached in clear.
                    ensure!(
                        body.contains("destination_workload_namespace=\"istio-system\""),
                        "not by a tunnel"
                    );
                    Ok(())
                };
                eventually(PATIENCE, by_tunnel).with_context(|| format!("{address} of {on:?}"))?;
            }
        }
        let line = log.wait_line(mark, PATIENCE, "both identities", |line| {
            let own = "dst.identity=\"spiffe://cluster.local/ns/istio-system/sa/ztunnel\"";
            line.contains(own) && line.contains(CLIENT) && line.contains(":15020") && line.contains("inbound")
        })?;
        let (far, _) = proxy_addresses(testbed, On::B);
        let watch = testbed.watch_link_for_clear("metrics")?;
        scrape(&client.place, far.into())?;
        nothing_in_clear(&watch.finish()?, &client, "istio_build")?;

        // Nothing else is there for peers, policies hold for it, and it is no pod of the node.
        let said = refused(&client.place, &[&url(far.into(), 15021, "/healthz/ready")])?;
        log.wait_line(mark, PATIENCE, "why", |line| {
            line.contains("10.80.2.1:15021 is not offered to peers")
        })?;
        istio.discovery.policy(Authorization { namespace: "istio-system".to_owned(), ..deny_client() });
        eventually(PATIENCE, || refused(&client.place, &[&url(far.into(), 15020, "/metrics")]))?;
        let metrics = scrape(&other.place, far.into())?;
        ensure!(metrics.contains("workload_manager_active_proxy_count 1\n"), "it counts as a pod");
        istio.discovery.remove(AUTHORIZATION, "istio-system/no-client");
        eventually(PATIENCE, || scrape(&client.place, far.into()))?;

        // The next daemon has it, too.
        testbed.restart_daemon(On::B, true)?;
        scrape(&client.place, far.into()).context("after a hand-over")?;
        Ok(format!("{}; {said}", line.trim()))
    });
}

#[test]
fn a_mesh_is_given_by_hand_alone_and_beside_istiod() {
    let testbed = Testbed::without_daemons(Options::default());
    let mut istio = None;
    common::act_in(testbed, "LOCAL_XDS", |testbed| {
        istio = Some(testbed.under_istio()?);
        let chart = |testbed: &Testbed, on: On, variables: &[(&str, &str)]| {
            let mut setting = testbed.setting(on).clone();
            let environment = setting.chart.as_mut().map(|chart| &mut chart.environment);
            let own = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            environment.context("no chart")?.extend(own);
            anyhow::Ok(setting)
        };
        let file = testbed.setting(On::A).meeting.join("mesh.yaml");
        let path = file.display().to_string();
        // What is wrong with it ends the start, by line and field.
        std::fs::write(&file, "workloads:\n- name: a\n  namespace: b\n  workloadIps: [10.0.0]\n")?;
        let alone = [("XDS_ADDRESS", ""), ("LOCAL_XDS_PATH", &*path)];
        let started = chart(testbed, On::A, &alone)?.start_ready();
        let said = format!("{:#}", started.err().context("it has started")?);
        let wrong = format!("{path}:4: error: workloads[0].workloadIps[0]: \"10.0.0\" is not an IP address");
        ensure!(said.contains(&wrong), "{said}");

        let mut yaml = String::from("workloads:\n");
        for pod in [&testbed.client, &testbed.other, &testbed.server] {
            let (name, v4, v6, node) = (&pod.name, pod.v4, pod.v6, &pod.node);
            yaml += &format!(
                "- {{uid: 'Kubernetes//Pod/demo/{name}', name: {name}, namespace: demo, serviceAccount: {name}, \
                 workloadIps: [{v4}, '{v6}'], protocol: HBONE, node: {node}"
            );
            let port = if name == "server" { format!("{{80: {HTTP}}}") } else { "{}".to_owned() };
            yaml += &format!(", services: {{demo/hand.made: {port}}}}}\n");
        }
        yaml += &format!(
            "services:\n- {{name: hand, namespace: demo, hostname: hand.made, vips: [/{}], ports: {{80: 0}}}}\n",
            SERVICE_IPS[0]
        );
        std::fs::write(&file, yaml)?;
        let daemon = chart(testbed, On::A, &alone)?.start_ready()?;
        testbed.replace_daemon(On::A, daemon);
        let policy = "policies:\n- name: by-hand\n  namespace: demo\n  scope: Namespace\n  action: Deny\n  rules:\n  \
                      - - - principals: [{Exact: cluster.local/ns/demo/sa/other}]\n";
        let daemon = chart(testbed, On::B, &[("LOCAL_XDS", policy)])?.start_ready()?;
        testbed.replace_daemon(On::B, daemon);

        let log = testbed.setting(On::B).log();
        let mark = log.mark();
        let url = format!("http://{}/", SERVICE_IPS[0]);
        let answer = eventually(PATIENCE, || curl(&testbed.client.place, &[&url]))?;
        ensure!(answer.body.contains("pod=server"), "{}", answer.body);
        log.wait_line(mark, PATIENCE, "both identities", |line| {
            line.contains(CLIENT) && line.contains(SERVER) && line.contains("inbound")
        })?;
        refused(&testbed.other.place, &[&url])?;
        let line = log.wait_line(mark, PATIENCE, "the policy", |line| line.contains("demo/by-hand"))?;

        let (a, b) = (dump(testbed, On::A)?, dump(testbed, On::B)?);
        ensure!(names(&a["staticConfig"], "workloads", "name") == ["client", "other", "server"], "{a}");
        ensure!(names(&a["staticConfig"], "services", "hostname") == ["hand.made"], "{a}");
        ensure!(names(&b["staticConfig"], "policies", "name") == ["by-hand"], "{b}");
        ensure!(
            names(&b, "policies", "name") == ["by-hand"] && names(&b, "workloads", "name").len() == 6,
            "{b}"
        );
        Ok(line.trim().to_owned())
    });
}

/// Redirects what a pod's programs dial and what is dialled to them, but for those of the group 1337.
fn redirect_by_group(pod: &Pod) -> Result<()> {
    for program in ["iptables-nft", "ip6tables-nft"] {
        for rule in [
            "-A OUTPUT -p tcp ! -o lo -m owner ! --gid-owner 1337 -j REDIRECT --to-ports 15001",
            "-A PREROUTING -p tcp ! -i lo ! --dport 15008 -j REDIRECT --to-ports 15006",
        ] {
            let arguments: Vec<&str> = ["-t", "nat"].into_iter().chain(rule.split(' ')).collect();
            let output = pod.place.run(program, &arguments)?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }
    Ok(())
}

#[test]
fn a_proxy_of_one_workload_serves_it_without_a_node_agent() {
    under_istio("dedicated", |testbed, istio| {
        let pod = testbed.outsider.clone();
        let own = format!("spiffe://cluster.local/ns/demo/sa/{}", pod.name);
        let mut setting = testbed.setting(On::A).clone();
        (setting.node, setting.place) = (pod.name.clone(), pod.place.clone());
        let chart = setting.chart.as_ref().context("no chart")?;
        let info = format!("{MESHED}/{0}/{0}", pod.name);
        // It needs no privilege; its group is how the rules know it.
        let mut command = pod.place.command("setpriv")?;
        command.args(["--regid=1337", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]);
        command.arg(binaries::daemon()?).args(["proxy", "ztunnel"]).current_dir(&chart.root);
        command.envs(chart.environment.iter().map(|(name, value)| (name, value)));
        command.env("PROXY_MODE", "dedicated").env("PROXY_WORKLOAD_INFO", info);
        // Its token is its own, so there is nobody to impersonate.
        let token = format!("{}-token", pod.name);
        istio.authority.admit(&token, Caller { identity: own.clone(), impersonates: Vec::new() });
        command.env("AUTH_TOKEN", &token);
        redirect_by_group(&pod)?;
        let (log, mark) = (setting.log(), setting.log().mark());
        let mut process = pod.place.start(&format!("daemon-{}", pod.name), command)?;
        log.wait_line(mark, PATIENCE, "ready", |line| line.contains("\tready"))?;
        istio.discovery.workload(istiod::workload(&pod));

        // What it dials.
        let far = testbed.setting(On::B).log();
        let seen = far.mark();
        for address in testbed.server.addresses() {
            let answer = eventually(PATIENCE, || http(&pod.place, address, ""))?;
            ensure!(answer.body.contains("pod=server"), "{}", answer.body);
        }
        far.wait_line(seen, PATIENCE, "its identity", |line| line.contains(&own) && line.contains(SERVER))?;
        // What is dialled to it, through a tunnel and in clear. No rule would bring an answer to another's address back.
        for (address, from) in pod.addresses().into_iter().zip(testbed.outside.addresses()) {
            let tunnelled = eventually(PATIENCE, || {
                let answer = http(&testbed.client.place, address, "")?;
                ensure!(answer.body.contains(&format!("client={address}")), "{}", answer.body);
                Ok(answer)
            })?;
            ensure!(tunnelled.body.contains(&format!("pod={}", pod.name)), "{}", tunnelled.body);
            http(&testbed.outside.place, address, "")?;
            log.wait_line(mark, PATIENCE, "the plain one", |line| {
                line.contains("inbound") && line.contains(&format!("src.addr={}:", in_url(from)))
            })?;
        }
        let line = log.wait_line(mark, PATIENCE, "both identities", |line| {
            line.contains("inbound") && line.contains(CLIENT) && line.contains(&own)
        })?;

        let asked = istio.authority.asked();
        let for_itself = asked.iter().filter(|asked| asked.impersonated.is_none()).count();
        ensure!(for_itself == 1, "{for_itself} certificates were asked for without impersonation");
        ensure!(testbed.agent(On::A)?.seen() == 1, "it has called the node agent");
        let (status, body) = setting.ask("GET", "/config_dump")?;
        let shown: Value = serde_json::from_slice(&body)?;
        ensure!(status == 200 && names(&shown, "certificates", "identity") == [&*own], "{shown}");
        ensure!(shown["workloadState"]["demo/outsider"]["state"] == "Up", "{}", shown["workloadState"]);
        ensure!(shown["config"]["proxyMode"] == "dedicated", "{}", shown["config"]);
        process.signal(Signal::SIGTERM);
        let ended = process.wait(PATIENCE)?;
        ensure!(ended.success(), "{ended}");
        Ok(line.trim().to_owned())
    });
}

/// A pod of another cluster of the mesh: called as one here, on a node that is called as one here, at another address.
fn twin(pod: &Pod, at: &Pod) -> workload::Workload {
    workload::Workload {
        uid: istiod::workload(pod).uid.replacen("Kubernetes/", "Elsewhere/", 1),
        cluster_id: "Elsewhere".to_owned(),
        service_account: "twin".to_owned(),
        addresses: istiod::workload(at).addresses,
        ..istiod::workload(pod)
    }
}

#[test]
fn pods_of_another_cluster_with_the_same_names_are_others() {
    under_istio("two clusters", |testbed, istio| {
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        let (far, away) = (testbed.outside.clone(), testbed.outsider.clone());
        let own = [&client, &server].map(istiod::workload);
        let twins = [twin(&client, &far), twin(&server, &away)];
        let put = |all: &[workload::Workload]| -> Vec<Change> {
            all.iter().cloned().map(Change::workload).collect()
        };
        let gone = |all: &[workload::Workload]| -> Vec<Change> {
            all.iter().map(|workload| Change::remove(ADDRESS, &workload.uid)).collect()
        };
        // What has the twins' addresses is nobody else.
        istio.discovery.push(&gone(&[&far, &away].map(istiod::workload)))?;
        let watch = testbed.watch_link_for_clear("two-clusters")?;
        let log = testbed.setting(On::B).log();
        let mut asked = 0;
        let mut check = |testbed: &Testbed, when: &str| -> Result<()> {
            let mark = log.mark();
            for (own, address) in client.addresses().into_iter().zip(server.addresses()) {
                for _ in 0..3 {
                    let answer =
                        http(&client.place, address, "?marker=secret").with_context(|| when.to_owned())?;
                    ensure!(
                        answer.body.contains(&format!("pod=server client={own}")),
                        "{when}: {}",
                        answer.body
                    );
                    asked += 1;
                }
            }
            log.wait_line(mark, PATIENCE, "both identities", |line| {
                line.contains("direction=\"inbound\"") && line.contains(CLIENT) && line.contains(SERVER)
            })
            .with_context(|| when.to_owned())?;
            for (on, pod) in [(On::A, &client), (On::B, &server)] {
                let shown = eventually(PATIENCE, || dump(testbed, on)).with_context(|| when.to_owned())?;
                let state = &shown["workloadState"][istiod::uid(pod)];
                ensure!(state["info"]["serviceAccount"] == *pod.name, "{when}: {state}");
            }
            Ok(())
        };
        istio.discovery.push(&put(&twins))?;
        check(testbed, "the other cluster's come last")?;
        for address in far.addresses() {
            // A member of the mesh, where nobody takes tunnels: not in clear instead.
            http_refused(&client.place, address)?;
        }
        istio.discovery.push(&gone(&own))?;
        istio.discovery.push(&put(&own))?;
        eventually(PATIENCE, || http(&client.place, server.v4.into(), "").map(drop))?;
        check(testbed, "the own come last")?;
        istio.discovery.push(&gone(&twins))?;
        check(testbed, "the other cluster's have gone")?;
        istio.discovery.push(&put(&twins))?;
        for on in BOTH {
            testbed.kill_daemon(on)?;
            testbed.start_daemon(on)?;
        }
        check(testbed, "the daemons are new")?;
        nothing_in_clear(&watch.finish()?, &client, "secret")?;
        let asked_for = istio.authority.asked();
        let twin = asked_for
            .iter()
            .find(|asked| asked.impersonated.as_ref().is_some_and(|who| who.contains("twin")));
        ensure!(twin.is_none(), "a certificate of somebody else's was asked for: {twin:?}");
        Ok(format!("{asked} requests, all between the pods of this cluster"))
    });
}
