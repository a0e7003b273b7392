//! What operators and their tools ask a running daemon: read with the types of `istioctl`, which are not forgiving.

mod common;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use common::in_testbed;
use serde::Deserialize;
use ztunnel_tests::binaries;
use ztunnel_tests::daemon::ADMIN_PORT;
use ztunnel_tests::peer::hold::Held;
use ztunnel_tests::poll::{PATIENCE, eventually};
use ztunnel_tests::testbed::{HTTP, LINES, On, Testbed, curl, http};

/// The document as `istioctl ztunnel-config` reads it. A field without a default is one it prints.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Dump {
    workloads: Vec<Workload>,
    services: Vec<Service>,
    policies: Vec<Policy>,
    certificates: Vec<Certificates>,
    workload_state: BTreeMap<String, State>,
    config: BTreeMap<String, String>,
    config_origins: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Workload {
    workload_ips: Vec<std::net::IpAddr>,
    protocol: String,
    name: String,
    namespace: String,
    uid: String,
    status: String,
    cluster_id: String,
    capacity: u32,
    #[serde(default)]
    node: String,
    #[serde(default)]
    services: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Service {
    name: String,
    namespace: String,
    hostname: String,
    vips: Vec<String>,
    ports: BTreeMap<u16, u16>,
    endpoints: BTreeMap<String, Endpoint>,
    subject_alt_names: Vec<String>,
    #[serde(default = "dual")]
    ip_families: String,
    canonical: bool,
    visibility: String,
}

fn dual() -> String {
    "Dual".to_owned()
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    workload_uid: String,
    port: BTreeMap<u16, u16>,
}

#[derive(Debug, Deserialize)]
struct Policy {
    name: String,
    namespace: String,
    scope: String,
    action: String,
    rules: Vec<Vec<Vec<BTreeMap<String, serde_json::Value>>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Certificates {
    identity: String,
    state: String,
    cert_chain: Vec<Certificate>,
    root_certs: Vec<Certificate>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Certificate {
    pem: String,
    serial_number: String,
    valid_from: String,
    expiration_time: String,
}

#[derive(Debug, Deserialize)]
struct State {
    state: String,
    connections: Connections,
    info: Info,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Info {
    name: String,
    namespace: String,
    service_account: String,
}

#[derive(Debug, Deserialize)]
struct Connections {
    inbound: Vec<Connection>,
    outbound: Vec<Connection>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Connection {
    src: SocketAddr,
    original_dst: Option<String>,
    actual_dst: SocketAddr,
    protocol: String,
}

fn dump(testbed: &Testbed, on: On) -> Result<Dump> {
    let (status, body) = testbed.setting(on).ask("GET", "/config_dump")?;
    ensure!(status == 200, "{status}");
    serde_json::from_slice(&body).context("not what istioctl reads")
}

/// What `POST` answers with this status.
fn post(testbed: &Testbed, path: &str, wanted: u16) -> Result<String> {
    let (status, body) = testbed.setting(On::A).ask("POST", path)?;
    ensure!(status == wanted, "POST {path}: {status}");
    Ok(String::from_utf8(body)?)
}

impl Dump {
    fn pod(&self, name: &str) -> Result<&State> {
        let found = self.workload_state.values().find(|state| state.info.name == name);
        found.with_context(|| format!("no {name} in {:?}", self.workload_state.keys()))
    }
}

#[test]
fn a_dump_shows_the_mesh_the_certificates_and_the_open_connections() {
    in_testbed("config_dump", |testbed| {
        testbed.mesh.deny("no-other", "server", "other")?;
        let lines = SocketAddr::from((testbed.server.v4, LINES));
        let mut held = Held::open(&testbed.client.place, lines)?;
        let mut plain = Held::open(&testbed.outsider.place, lines)?;
        let (a, b) = eventually(PATIENCE, || {
            let (a, b) = (dump(testbed, On::A)?, dump(testbed, On::B)?);
            ensure!(a.policies.iter().any(|policy| policy.name.contains("no-other")), "no policy yet");
            // Connections made before these may not have ended yet.
            let (client, server) = (&a.pod("client")?.connections, &b.pod("server")?.connections);
            ensure!(client.outbound.len() == 1, "the client has others: {client:?}");
            ensure!(server.inbound.len() == 2, "the server has others: {server:?}");
            Ok((a, b))
        })?;
        held.say()?;
        plain.say()?;

        let server = a.workloads.iter().find(|workload| workload.name == "server").context("no server")?;
        ensure!(server.workload_ips.contains(&testbed.server.v4.into()), "{server:?}");
        ensure!(
            server.protocol == "HBONE" && server.status == "Healthy" && server.capacity == 1,
            "{server:?}"
        );
        ensure!(server.node == testbed.b.name && server.namespace == "demo", "{server:?}");
        ensure!(!server.cluster_id.is_empty() && server.services.len() == 1, "{server:?}");
        let service = a.services.iter().find(|service| service.name == "server").context("no service")?;
        ensure!(server.services == [format!("{}/{}", service.namespace, service.hostname)], "{server:?}");
        ensure!(
            service.vips.iter().all(|vip| vip.starts_with('/')) && service.vips.len() == 2,
            "{service:?}"
        );
        ensure!(service.ports.get(&80) == Some(&HTTP), "{service:?}");
        let endpoint = service.endpoints.get(&server.uid).context("the server is no endpoint")?;
        ensure!(endpoint.workload_uid == server.uid && endpoint.port.get(&80) == Some(&HTTP), "{endpoint:?}");
        ensure!(service.subject_alt_names.is_empty() && service.ip_families == "Dual", "{service:?}");
        ensure!(service.canonical && service.visibility == "Public", "{service:?}");
        let policy =
            a.policies.iter().find(|policy| policy.name.contains("no-other")).context("no policy")?;
        ensure!(policy.action == "Deny" && policy.scope == "WorkloadSelector", "{policy:?}");
        ensure!(policy.namespace == "demo" && !policy.rules.is_empty(), "{policy:?}");

        let identity = "spiffe://cluster.local/ns/demo/sa/client";
        let held_by = a.certificates.iter().find(|known| known.identity == identity);
        let certificates = held_by.context("no certificate of the client")?;
        ensure!(certificates.state == "Available" && certificates.cert_chain.len() == 2, "{certificates:?}");
        ensure!(certificates.root_certs.len() == 1, "{certificates:?}");
        for certificate in certificates.cert_chain.iter().chain(&certificates.root_certs) {
            ensure!(certificate.serial_number.bytes().all(|digit| digit.is_ascii_digit()), "{certificate:?}");
            for time in [&certificate.valid_from, &certificate.expiration_time] {
                let parsed =
                    time::OffsetDateTime::parse(time, &time::format_description::well_known::Rfc3339);
                parsed.with_context(|| format!("{time} is not RFC 3339"))?;
            }
            ensure!(certificate.pem.starts_with("LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t"), "{certificate:?}");
        }

        let client = a.pod("client")?;
        ensure!(client.state == "Up" && client.info.namespace == "demo", "{client:?}");
        ensure!(client.info.service_account == "client", "{client:?}");
        let [outbound] = &client.connections.outbound[..] else { bail!("{client:?}") };
        ensure!(outbound.protocol == "HBONE" && outbound.src.ip() == testbed.client.v4, "{outbound:?}");
        ensure!(outbound.actual_dst == SocketAddr::from((testbed.server.v4, 15008)), "{outbound:?}");
        ensure!(outbound.original_dst.as_deref() == Some(&*lines.to_string()), "{outbound:?}");
        let inbound = &b.pod("server")?.connections.inbound;
        let from = |ip: std::net::Ipv4Addr| inbound.iter().find(|known| known.src.ip() == ip);
        let (tunnelled, plain) = (from(testbed.client.v4), from(testbed.outsider.v4));
        let (tunnelled, plain) = (tunnelled.context("no tunnelled")?, plain.context("no plain")?);
        ensure!(tunnelled.protocol == "HBONE" && tunnelled.actual_dst == lines, "{tunnelled:?}");
        ensure!(plain.protocol == "TCP" && plain.actual_dst == lines, "{plain:?}");

        ensure!(a.config.get("node") == Some(&testbed.a.name), "{:?}", a.config);
        ensure!(a.config_origins["node"] == "command line", "{:?}", a.config_origins);
        drop(held);
        eventually(PATIENCE, || {
            let left = dump(testbed, On::A)?.pod("client")?.connections.outbound.len();
            ensure!(left == 0, "{left} connections are still listed");
            Ok(())
        })?;
        // A pod that is in the mesh no more keeps what is open, and it is said whose that is.
        let mut kept = Held::open(&testbed.client.place, lines)?;
        testbed.mesh.remove("pod-server")?;
        testbed.wait_carried_out()?;
        kept.say()?;
        let left = dump(testbed, On::B)?;
        ensure!(left.workloads.iter().all(|workload| workload.name != "server"), "it is still in the mesh");
        let server = left.pod("server")?;
        // The one in clear, too.
        ensure!(
            server.connections.inbound.len() == 2 && server.info.service_account == "server",
            "{server:?}"
        );
        testbed.write_pods()?;
        Ok(format!(
            "{} workloads, {} services, {} certificates, {} policies; {outbound:?}",
            a.workloads.len(),
            a.services.len(),
            a.certificates.len(),
            a.policies.len()
        ))
    });
}

#[test]
fn the_command_line_shows_what_a_daemon_knows() {
    in_testbed("ztunnel show", |testbed| {
        let daemon = binaries::daemon()?;
        let daemon = daemon.to_str().context("the daemon's path is no text")?;
        let said = |arguments: &[&str]| -> Result<String> {
            let output = testbed.a.place.run(daemon, arguments)?;
            let (said, wrong) =
                (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr).into_owned());
            ensure!(output.status.success(), "ztunnel {arguments:?}: {}: {wrong}", output.status);
            Ok(said)
        };
        let row = |table: &str, words: &[&str]| -> Result<()> {
            let is = |line: &str| line.split_whitespace().eq(words.iter().copied());
            ensure!(table.lines().any(is), "no row {words:?} in\n{table}");
            Ok(())
        };
        let mut held = Held::open(&testbed.client.place, SocketAddr::from((testbed.server.v4, LINES)))?;
        held.say()?;
        let workloads = said(&["show", "workload", "server"])?;
        row(&workloads, &["NAMESPACE", "POD", "NAME", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL"])?;
        let addresses = testbed.server.addresses().map(|address| address.to_string()).join(",");
        row(&workloads, &["demo", "server", &addresses, &testbed.b.name, "None", "HBONE"])?;
        let connections = said(&["show", "connections", "client"])?;
        let target = format!("server.demo:{LINES}");
        let open = connections.lines().find(|line| line.starts_with("client.demo ")).context("no row")?;
        let words: Vec<_> = open.split_whitespace().collect();
        ensure!(words[1] == "Outbound" && words[2].starts_with("client.demo:"), "{open}");
        ensure!(words[3..] == ["server.demo:15008", &target, "HBONE"], "{open}");
        let certificates = said(&["show", "certificates", "sa/client"])?;
        ensure!(certificates.contains("Leaf") && certificates.contains("Root"), "{certificates}");
        ensure!(!certificates.contains("false"), "not valid:\n{certificates}");

        // JSON is for programs; a saved dump is as good as a daemon.
        let all: serde_json::Value = serde_json::from_str(&said(&["show", "-o", "json"])?)?;
        ensure!(all["workloads"].as_array().is_some_and(|workloads| workloads.len() >= 4), "{all}");
        let saved = testbed.run.path("dump.json");
        std::fs::write(&saved, all.to_string())?;
        let saved = saved.to_str().context("no text")?;
        ensure!(said(&["show", "workload", "server", "--file", saved])? == workloads, "another table");

        ensure!(said(&["log", "access:debug"])?.contains("access=debug"), "not set");
        ensure!(!said(&["log", "--reset"])?.contains("debug"), "not reset");
        let nobody = testbed.a.place.run(daemon, &["show", "--admin", "127.0.0.1:9"])?;
        let wrong = String::from_utf8(nobody.stderr)?;
        ensure!(!nobody.status.success() && wrong.contains("no daemon answers at 127.0.0.1:9"), "{wrong}");
        Ok(open.trim().to_owned())
    });
}

#[test]
fn the_admin_port_changes_levels_takes_profiles_and_stops_the_daemon() {
    in_testbed("the admin port", |testbed| {
        let log = testbed.setting(On::A).log();
        let client = testbed.client.place.clone();
        let server = testbed.server.v4.into();
        let listed = post(testbed, "/logging", 200)?;
        ensure!(listed.starts_with("current log level is info"), "{listed}");

        ensure!(post(testbed, "/logging?level=access:off", 200)?.contains("access=off"), "not off");
        // A connection is told of when it has ended, which may be a moment after its client has.
        let over = |testbed: &Testbed| {
            eventually(PATIENCE, || {
                let metrics = testbed.setting(On::A).metrics()?;
                ensure!(metrics.contains("ztunnel_connections_open 0\n"), "connections are open");
                Ok(())
            })
        };
        over(testbed)?;
        let mark = log.mark();
        http(&client, server, "")?;
        over(testbed)?;
        // What is logged after it comes behind it.
        post(testbed, "/logging?level=info&reset", 200)?;
        http(&client, server, "")?;
        log.wait_line(mark, PATIENCE, "an access log line", |line| line.contains("\taccess\t"))?;
        let lines = log.since(mark).lines().filter(|line| line.contains("\taccess\t")).count();
        ensure!(lines == 1, "{lines} lines of two connections, one of which was not to be logged");
        ensure!(post(testbed, "/logging?level=access:loud", 400)?.contains("usage"), "no help");

        let (status, profile) =
            testbed.setting(On::A).ask("GET", "/debug/pprof/profile?seconds=1&frequency=1000")?;
        // The first field of every profile: what is counted.
        ensure!(status == 200 && profile.starts_with(&[0x0a]), "{status} {:?}", profile.get(..8));
        let heap = |path: &str| testbed.setting(On::A).ask("GET", &format!("/debug/pprof/heap{path}"));
        let (status, refused) = heap("")?;
        let refused = String::from_utf8(refused)?;
        ensure!(status == 500 && refused.contains("heap profiling is not active"), "{status} {refused}");
        for active in [true, false] {
            let (status, said) = heap(&format!("/profiling?activate={active}"))?;
            let wanted = format!("heap profiling active: {active}\n");
            ensure!(status == 200 && said == wanted.as_bytes(), "{status} {said:?}");
            http(&client, server, "")?;
            let (status, profile) = heap("")?;
            ensure!(status == if active { 200 } else { 500 }, "{status} after activate={active}");
            // What the format is compressed by.
            ensure!(profile.starts_with(&[0x1f, 0x8b]) == active, "{:?}", profile.get(..8));
        }
        for (method, path, wanted) in [("GET", "/logging", 405), ("GET", "/nothing", 404), ("GET", "/", 200)]
        {
            let (status, _) = testbed.setting(On::A).ask(method, path)?;
            ensure!(status == wanted, "{method} {path}: {status}");
        }
        let node = format!("10.80.{}.1", testbed.a.number);
        if let Ok(answer) =
            curl(&testbed.a.place, &["-m", "3", &format!("http://{node}:{ADMIN_PORT}/config_dump")])
        {
            bail!("the admin port answers on {node}: {}", answer.body.len());
        }

        let metrics = testbed.setting(On::A).metrics()?;
        for name in [
            "istio_build{component=\"ztunnel\",tag=",
            "workload_manager_active_proxy_count 3",
            "workload_manager_pending_proxy_count 0",
            "workload_manager_proxies_started_total 3",
            "workload_manager_proxies_stopped_total 0",
            "process_open_fds ",
            "tokio_num_workers ",
            "tokio_worker_total_busy_duration_seconds_total{worker=\"0\"}",
            "tokio_worker_park_count_total{worker=\"0\"}",
            "ztunnel_certificate_expiry_timestamp_seconds{identity=\"spiffe://cluster.local/ns/demo/sa/client\"}",
            "ztunnel_certificates_missing 0",
        ] {
            ensure!(metrics.lines().any(|line| line.starts_with(name)), "no {name} in the metrics");
        }

        ensure!(post(testbed, "/quitquitquit", 200)? == "shutdown now\n", "another answer");
        testbed.daemon(On::A)?.ended()?;
        Ok(format!("a profile of {} bytes; the daemon stopped when it was asked to", profile.len()))
    });
}
