//! What does not end where it was dialled: waypoints behind the proxy, services asked for by name, and other networks
//! through their gateways. The waypoint and the gateway are Envoy.

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::hbone::{Came, inside, request, tls};
use common::in_testbed_that;
use http::Method;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use ztunnel_proto::workload;
use ztunnel_tests::binaries;
use ztunnel_tests::certificates::Signed;
use ztunnel_tests::istiod;
use ztunnel_tests::peer::hold::Held;
use ztunnel_tests::poll::eventually;
use ztunnel_tests::process::Process;
use ztunnel_tests::scenarios::outage::nothing_in_clear;
use ztunnel_tests::testbed::istio::{Istio, behind, service};
use ztunnel_tests::testbed::{HTTP, LINES, On, SERVICE_IPS, Testbed, curl, http, refused};
use ztunnel_tests::topology::Pod;
use ztunnel_tests::wire::{HBONE_PORT, Watch, tunnels_only};

const SETTLE: Duration = Duration::from_secs(20);
const CLIENT: &str = "spiffe://cluster.local/ns/demo/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/demo/sa/server";
const GATEWAY: &str = "spiffe://cluster.local/ns/istio-system/sa/gateway";
const HOST: &str = "shop.demo.svc.cluster.local";
const WAYPOINT_PORT: u16 = 15088;

fn in_istio(name: &str, act: impl FnOnce(&mut Testbed, &mut Istio) -> Result<String>) {
    in_testbed_that(name, Testbed::under_istio, |testbed, istio| {
        let told = act(testbed, istio)?;
        ensure!(istio.discovery.rejected().is_empty(), "rejected: {:?}", istio.discovery.rejected());
        Ok(told)
    });
}

fn address(network: &str, ip: Ipv4Addr) -> workload::NetworkAddress {
    workload::NetworkAddress {
        network: network.to_owned(),
        address: ip.octets().to_vec().into(),
        ..workload::NetworkAddress::default()
    }
}

fn gateway(network: &str, ip: Ipv4Addr) -> Option<workload::GatewayAddress> {
    let destination = workload::gateway_address::Destination::Address(address(network, ip));
    Some(workload::GatewayAddress { destination: Some(destination), hbone_mtls_port: HBONE_PORT.into() })
}

fn start_envoy(testbed: &Testbed, pod: &Pod, config: &Value) -> Result<Process> {
    let path = testbed.run.path("state").join(format!("{}-envoy.json", pod.name));
    std::fs::write(&path, serde_json::to_vec_pretty(config)?)?;
    let mut command = pod.place.command(binaries::envoy()?)?;
    command.arg("-c").arg(&path).args(["--use-dynamic-base-id", "--concurrency", "1"]);
    command.args(["--log-level", "warning", "--file-flush-interval-msec", "50"]);
    pod.place.start(&format!("envoy-{}", pod.name), command)
}

fn extension(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = json!(format!("type.googleapis.com/{kind}"));
    json!({ "name": name, "typed_config": config })
}

fn socket(ip: IpAddr, port: u16) -> Value {
    json!({ "socket_address": { "address": ip.to_string(), "port_value": port } })
}

fn cluster(name: &str, to: SocketAddr) -> Value {
    let endpoint = json!({ "endpoint": { "address": socket(to.ip(), to.port()) } });
    json!({
        "name": name,
        "connect_timeout": "5s",
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [endpoint] }] },
    })
}

fn access_log(format: &str) -> Value {
    let format = json!({ "log_format": { "text_format_source": { "inline_string": format } } });
    let kind = "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog";
    json!([extension("envoy.access_loggers.stdout", kind, format)])
}

/// A waypoint behind the proxy: on the loopback address only, it takes what begins with a PROXY header, says what
/// that says, and carries the rest to nginx.
fn waypoint() -> Value {
    let told = "identity=%DYNAMIC_METADATA(envoy.filters.listener.proxy_protocol:identity)% \
                from=%DOWNSTREAM_REMOTE_ADDRESS% meant=%DOWNSTREAM_LOCAL_ADDRESS% got=%BYTES_RECEIVED%\n";
    let listener = |name: &str, ip: IpAddr| {
        let proxied = extension(
            "envoy.filters.listener.proxy_protocol",
            "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol",
            json!({ "rules": [{ "tlv_type": 0xd0, "on_tlv_present": { "key": "identity" } }] }),
        );
        let proxy = extension(
            "tcp",
            "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            json!({ "stat_prefix": "tcp", "cluster": "nginx", "access_log": access_log(told) }),
        );
        json!({
            "name": name,
            "address": socket(ip, WAYPOINT_PORT),
            "listener_filters": [proxied],
            "filter_chains": [{ "filters": [proxy] }],
        })
    };
    json!({ "static_resources": {
        "listeners": [listener("v4", Ipv4Addr::LOCALHOST.into())],
        "clusters": [cluster("nginx", (Ipv4Addr::LOCALHOST, HTTP).into())],
    } })
}

/// The workload with a waypoint's application tunnel.
fn tunnelled(pod: &Pod, protocol: workload::application_tunnel::Protocol, port: u16) -> workload::Workload {
    let tunnel = workload::ApplicationTunnel { protocol: protocol.into(), port: port.into() };
    workload::Workload { application_tunnel: Some(tunnel), ..istiod::workload(pod) }
}

#[test]
fn a_waypoint_behind_the_proxy_is_told_who_comes_and_where_to() {
    in_istio("sandwich", |testbed, istio| {
        let (client, server) = (testbed.client.clone(), testbed.server.clone());
        let waypoint = start_envoy(testbed, &server, &waypoint())?;
        let proxy = workload::application_tunnel::Protocol::Proxy;
        istio.discovery.workload(tunnelled(&server, proxy, WAYPOINT_PORT));
        let mut shop = service("shop");
        shop.waypoint = gateway("", server.v4);
        istio.discovery.service(shop);
        let vip = SERVICE_IPS[0];
        let answer = eventually(SETTLE, || {
            let answer = curl(&client.place, &[&format!("http://{vip}/")])?;
            ensure!(answer.body.contains("pod=server client=127.0.0.1"), "{}", answer.body);
            Ok(answer)
        })
        .with_context(|| waypoint.log().tail(5))?;
        // What Envoy read in the header.
        let line = waypoint.log().wait_line(0, SETTLE, "the header", |line| {
            let line = line.replace('"', "");
            line.contains(&format!("identity={CLIENT} "))
                && line.contains(&format!(" from={}:", client.v4))
                && line.contains(&format!(" meant={vip}:80 "))
        })?;
        // It goes with more than the first words, and from the other service account, too.
        for _ in 0..20 {
            curl(&client.place, &[&format!("http://{vip}/")])?;
        }
        curl(&testbed.other.place, &["-o", "/dev/null", &format!("http://{vip}/large")])
            .context("much at once")?;
        waypoint.log().wait_line(0, SETTLE, "the other client", |line| line.contains("/sa/other"))?;
        // By its own address the same.
        let direct = http(&client.place, server.v4.into(), "")?;
        ensure!(direct.body.contains("client=127.0.0.1"), "past the waypoint: {}", direct.body);
        let meant = format!(" meant={}:{HTTP} ", server.v4);
        waypoint.log().wait_line(0, SETTLE, "its own address", |line| line.contains(&meant))?;

        // Another port and no header: nginx itself.
        let none = workload::application_tunnel::Protocol::None;
        istio.discovery.workload(tunnelled(&server, none, HTTP));
        eventually(SETTLE, || {
            let answer = curl(&client.place, &[&format!("http://{vip}/")])?;
            ensure!(answer.body.contains(&format!("client={}", client.v4)), "{}", answer.body);
            Ok(())
        })?;
        Ok(format!("{}; {}", answer.body, line.trim()))
    });
}

/// A certificate of the mesh, for a client of the test's own.
fn signed(istio: &Istio, identity: &str) -> Result<Signed> {
    let (chain_pem, key_pem) = istio.authority.keys().for_peer(identity);
    let chain = CertificateDer::pem_slice_iter(chain_pem.as_bytes()).collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())?;
    Ok(Signed { chain, key, chain_pem, key_pem })
}

#[test]
fn a_name_leads_to_a_service_of_the_pod_only() {
    in_istio("names", |testbed, istio| {
        let server = testbed.server.clone();
        let mut own = behind(istiod::workload(&server), "shop");
        let ports = own.services.values_mut().next().context("it is behind no service")?;
        ports.ports.push(workload::Port { service_port: 81, target_port: 15008, ..Default::default() });
        istio.discovery.service(service("shop"));
        istio.discovery.service(service("foreign"));
        istio.discovery.workload(own);
        let ask = |authority: &str| {
            let own = signed(istio, CLIENT)?;
            inside(&testbed.outsider.place.netns, async {
                let stream = tls((server.v4, HBONE_PORT).into(), Some(own), &["h2"]).await?;
                request(stream, Method::CONNECT, authority).await
            })
        };
        let answer = eventually(SETTLE, || match ask(&format!("{HOST}:80"))? {
            Came::Tunnel(text) if text.contains("pod=server") => Ok(text),
            other => bail!("an honest name got {other:?}"),
        })?;
        let mut said = Vec::new();
        for (authority, status) in [
            ("nobody.demo.svc.cluster.local:80".to_owned(), 503),
            ("foreign.demo.svc.cluster.local:80".to_owned(), 503),
            (format!("{HOST}:82"), 503),
            (format!("{HOST}:81"), 503),
            (HOST.to_owned(), 400),
            (format!("{HOST}:0"), 400),
            (format!("{}:80", SERVICE_IPS[0]), 400),
            (format!("{}:15006", server.v4), 503),
        ] {
            match ask(&authority)? {
                Came::Status(got) if got.as_u16() == status => said.push(format!("{authority}: {got}")),
                other => bail!("{authority} got {other:?}, not {status}"),
            }
        }
        let answer = answer.lines().last().unwrap_or_default().to_owned();
        Ok(format!("{answer}; {}", said.join("; ")))
    });
}

/// The gateway of a network: it takes tunnels, and carries what is in one for the service, which it cannot read, to
/// the pod's own tunnel port.
fn east_west(testbed: &Testbed, istio: &Istio, pod: &Pod, to: &Pod) -> Result<Value> {
    let (chain, key) = istio.authority.keys().for_peer(GATEWAY);
    let write = |name: &str, text: &str| -> Result<String> {
        let path = testbed.run.path("state").join(format!("{}-{name}", pod.name));
        std::fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let (chain, key) = (write("chain.pem", &chain)?, write("key.pem", &key)?);
    let root = write("root.pem", &istio.authority.keys().root_pem())?;
    let san = json!({ "san_type": "URI", "matcher": { "prefix": "spiffe://cluster.local/" } });
    let common = json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "alpn_protocols": ["h2"],
        "tls_certificates": [{ "certificate_chain": { "filename": chain }, "private_key": { "filename": key } }],
        "validation_context": {
            "trusted_ca": { "filename": root },
            "match_typed_subject_alt_names": [san],
        },
    });
    let context = json!({ "require_client_certificate": true, "common_tls_context": common });
    let transport = extension(
        "envoy.transport_sockets.tls",
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        context,
    );
    let connect = json!([{ "upgrade_type": "CONNECT", "connect_config": {} }]);
    let router =
        extension("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", json!({}));
    let told = "asked=%REQ(:AUTHORITY)% by=%DOWNSTREAM_PEER_URI_SAN% network=%REQ(X-FORWARDED-NETWORK)% \
                baggage=%REQ(BAGGAGE)% forwarded=%REQ(FORWARDED)%\n";
    let manager = extension(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": "tunnels",
            "codec_type": "HTTP2",
            "access_log": access_log(told),
            "http2_protocol_options": { "allow_connect": true },
            "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
            "http_filters": [router],
            "route_config": { "name": "tunnels", "virtual_hosts": [{
                "name": "shop",
                "domains": [format!("{HOST}:80"), format!("{HOST}:{LINES}")],
                "routes": [{
                    "match": { "connect_matcher": {} },
                    "route": { "cluster": "pod", "upgrade_configs": connect },
                }],
            }] },
        }),
    );
    Ok(json!({ "static_resources": {
        "listeners": [{
            "name": "tunnels",
            "address": socket(pod.v4.into(), HBONE_PORT),
            "filter_chains": [{ "filters": [manager], "transport_socket": transport }],
        }],
        "clusters": [cluster("pod", (to.v4, HBONE_PORT).into())],
    } }))
}

/// Has the nodes be two networks: the server in `far`, everybody else in `near`, and `pod` the gateway of `far`.
fn divide(testbed: &Testbed, istio: &Istio, pod: &Pod) {
    for here in [&testbed.client, &testbed.other, &testbed.near] {
        istio.discovery.workload(workload::Workload { network: "near".to_owned(), ..istiod::workload(here) });
    }
    let mut server = behind(istiod::workload(&testbed.server), "shop");
    server.network = "far".to_owned();
    server.network_gateway = gateway("far", pod.v4);
    for ports in server.services.values_mut() {
        let lines = u32::from(LINES);
        let port = workload::Port { service_port: lines, target_port: lines, ..Default::default() };
        ports.ports.push(port);
    }
    istio.discovery.workload(server);
    istio.discovery.workload(gate(pod, "gateway"));
    istio.discovery.service(shop(&[SERVER]));
}

/// The gateway as istiod publishes one.
fn gate(pod: &Pod, service_account: &str) -> workload::Workload {
    workload::Workload {
        uid: format!("NetworkGateway/far/{}/{HBONE_PORT}", pod.v4),
        name: "gateway".to_owned(),
        namespace: "istio-system".to_owned(),
        network: "far".to_owned(),
        service_account: service_account.to_owned(),
        addresses: vec![pod.v4.octets().to_vec().into()],
        tunnel_protocol: workload::TunnelProtocol::Hbone.into(),
        ..workload::Workload::default()
    }
}

fn shop(identities: &[&str]) -> workload::Service {
    let mut shop = service("shop");
    shop.addresses.iter_mut().for_each(|address| "near".clone_into(&mut address.network));
    let lines = u32::from(LINES);
    let port = workload::Port { service_port: lines, target_port: lines, ..workload::Port::default() };
    shop.ports.push(port);
    shop.subject_alt_names = identities.iter().map(|&identity| identity.to_owned()).collect();
    shop
}

fn connections(testbed: &Testbed, on: On, pod: &Pod, direction: &str) -> Result<Vec<Value>> {
    let (status, body) = testbed.setting(on).ask("GET", "/config_dump")?;
    ensure!(status == 200, "status {status}");
    let dump: Value = serde_json::from_slice(&body)?;
    let list = &dump["workloadState"][istiod::uid(pod)]["connections"][direction];
    Ok(list
        .as_array()
        .with_context(|| format!("no {direction} connections in {}", dump["workloadState"]))?
        .clone())
}

#[test]
fn another_network_is_reached_through_its_gateway_which_sees_nothing() {
    const REQUESTS: usize = 20;
    in_istio("two networks", |testbed, istio| {
        let (client, server, pod) = (testbed.client.clone(), testbed.server.clone(), testbed.outside.clone());
        let gateway = start_envoy(testbed, &pod, &east_west(testbed, istio, &pod, &server)?)?;
        divide(testbed, istio, &pod);
        let url = format!("http://{}/?marker=secret", SERVICE_IPS[0]);
        let expected = format!("pod=server client={} marker=secret", pod.v4);
        eventually(SETTLE, || {
            let answer = curl(&client.place, &[&url])?;
            ensure!(answer.body == expected, "{}", answer.body);
            Ok(())
        })
        .with_context(|| gateway.log().tail(5))?;

        let link = testbed.watch_link("networks-link")?;
        let before = Watch::start(&pod.place, "eth0", "networks-gateway", "")?;
        let logs = [On::A, On::B].map(|on| testbed.setting(on).log());
        let marks = logs.each_ref().map(|log| log.mark());
        let mark = gateway.log().mark();
        for _ in 0..REQUESTS {
            let answer = curl(&client.place, &[&url])?;
            ensure!(answer.body == expected, "{}", answer.body);
        }
        // What both ends and the gateway tell.
        let name = format!("dst.hbone_addr={HOST}:80 ");
        let out = logs[0].wait_line(marks[0], SETTLE, "the client's end", |line| {
            line.contains("connection complete")
                && line.contains("direction=\"outbound\"")
                && line.contains(&*name)
        })?;
        for part in [
            format!("dst.addr={}:{HBONE_PORT} ", pod.v4),
            format!("dst.service=\"{HOST}\""),
            "dst.workload=\"server\"".to_owned(),
            "dst.namespace=\"demo\"".to_owned(),
            format!("src.identity=\"{CLIENT}\""),
            format!("dst.identity=\"{SERVER}\""),
        ] {
            ensure!(out.contains(&part), "no {part} in {out}");
        }
        let inward = logs[1].wait_line(marks[1], SETTLE, "the server's end", |line| {
            line.contains("connection complete")
                && line.contains("direction=\"inbound\"")
                && line.contains(&*name)
        })?;
        for part in [
            format!("src.addr={}:", pod.v4),
            "src.workload=\"client\"".to_owned(),
            format!("src.identity=\"{CLIENT}\""),
            format!("dst.service=\"{HOST}\""),
        ] {
            ensure!(inward.contains(&part), "no {part} in {inward}");
        }
        let asked = gateway.log().wait_line(mark, SETTLE, "the gateway", |line| line.contains("asked="))?;
        ensure!(asked.contains(&format!("asked={HOST}:80 by={CLIENT} network=- ")), "{asked}");
        ensure!(asked.contains(&format!(";host={HOST}")), "{asked}");
        for (on, parts) in [
            (
                On::A,
                ["reporter=\"source\"", "destination_workload=\"server\"", "destination_principal=\"spiffe"],
            ),
            (On::B, ["reporter=\"destination\"", "source_workload=\"client\"", "source_principal=\"spiffe"]),
        ] {
            let metrics = testbed.setting(on).metrics()?;
            let service = format!("destination_service=\"{HOST}\"");
            let found = metrics.lines().any(|line| {
                line.starts_with("istio_tcp_connections_opened_total")
                    && line.contains(&service)
                    && parts.iter().all(|part| line.contains(part))
            });
            ensure!(found, "{on:?} counts no such connection");
        }
        // What was on the wire. The gateway's every connection is a tunnel, though it speaks only for one of them.
        let packets = before.finish()?;
        ensure!(packets.with_marker("secret") == 0, "the gateway's network carried the payload in clear");
        let seen = tunnels_only(&packets)?;
        let opened = packets.attempts_by_port().get(&HBONE_PORT).copied().unwrap_or_default();
        // One to the pod for each connection; the client's daemon has a tunnel per thread to the gateway, if not before.
        ensure!((REQUESTS..=REQUESTS + 2).contains(&opened), "{opened} connections for {REQUESTS} requests");
        let packets = link.finish()?;
        nothing_in_clear(&packets, &client, "secret")?;
        let past = packets.segments.iter().filter(|segment| {
            segment.from.ip() == IpAddr::from(client.v4) && segment.to.ip() != IpAddr::from(pod.v4)
        });
        ensure!(past.count() == 0, "the client's daemon went past the gateway");

        // What is open is shown at both ends.
        let lines: SocketAddr = (SERVICE_IPS[0].parse::<IpAddr>()?, LINES).into();
        let mut held = Held::open(&client.place, lines)?;
        eventually(SETTLE, || {
            let outbound = connections(testbed, On::A, &client, "outbound")?;
            let double = outbound.iter().find(|open| open["protocol"] == "DOUBLEHBONE");
            let double = double.with_context(|| format!("{outbound:?}"))?;
            ensure!(double["originalDst"] == lines.to_string(), "{double}");
            ensure!(double["actualDst"] == format!("{}:{HBONE_PORT}", pod.v4), "{double}");
            let inbound = connections(testbed, On::B, &server, "inbound")?;
            let named = inbound.iter().find(|open| open["originalDst"] == HOST);
            let named = named.with_context(|| format!("{inbound:?}"))?;
            ensure!(named["protocol"] == "HBONE", "{named}");
            ensure!(named["actualDst"] == format!("{}:{LINES}", server.v4), "{named}");
            Ok(())
        })?;
        held.say()?;
        // Much of it at a time, and what stays on the node as before.
        curl(&client.place, &["-o", "/dev/null", &format!("http://{}/large", SERVICE_IPS[0])])?;
        let near = http(&client.place, testbed.near.v4.into(), "")?;
        ensure!(near.body.contains(&format!("pod=near client={}", client.v4)), "{}", near.body);
        Ok(format!(
            "{REQUESTS} requests: {opened} TLS 1.3 connections at the gateway, {} encrypted records; {}; {}; {}",
            seen.encrypted,
            out.trim(),
            inward.trim(),
            asked.trim()
        ))
    });
}

#[test]
fn whoever_is_not_expected_beyond_or_at_a_gateway_is_not_spoken_to() {
    in_istio("two networks, wrong identities", |testbed, istio| {
        let (client, server, pod) = (testbed.client.clone(), testbed.server.clone(), testbed.outside.clone());
        let gateway = start_envoy(testbed, &pod, &east_west(testbed, istio, &pod, &server)?)?;
        divide(testbed, istio, &pod);
        let url = format!("http://{}/", SERVICE_IPS[0]);
        let works = || {
            eventually(SETTLE, || {
                let answer = curl(&client.place, &[&url])?;
                ensure!(answer.body.contains("pod=server"), "{}", answer.body);
                Ok(())
            })
            .with_context(|| gateway.log().tail(5))
        };
        works()?;
        let (log, served) = (testbed.setting(On::A).log(), testbed.setting(On::B).log());
        let mut said = Vec::new();
        // Refused, and for this reason; nothing reaches the server's application, and nothing the gateway if that is
        // the one who is somebody else.
        let mut check = |what: &str, why: &str, gateway_asked: bool| -> Result<()> {
            let line = eventually(SETTLE, || {
                let (at_a, at_b, at_gateway) = (log.mark(), served.mark(), gateway.log().mark());
                refused(&client.place, &[&url])?;
                let line = log.wait_line(at_a, SETTLE, why, |line| {
                    line.contains("outbound") && line.contains("error=")
                })?;
                ensure!(line.contains(why), "{line}");
                let complete = served.since(at_b).contains("connection complete");
                ensure!(!complete, "{what}: served nevertheless: {}", served.since(at_b));
                let asked = gateway.log().since(at_gateway).contains("asked=");
                ensure!(gateway_asked || !asked, "{what}: asked nevertheless");
                Ok(line)
            })
            .with_context(|| what.to_owned())?;
            said.push(format!("{what}: {}", line.split("error=").last().unwrap_or_default().trim()));
            Ok(())
        };
        istio.discovery.service(shop(&["spiffe://cluster.local/ns/demo/sa/impostor"]));
        check("a server with another identity", "no tunnel to shop.demo.svc.cluster.local through", true)?;
        // Its own identity is not enough where the service does not say so: whoever has an address there is unknown here.
        istio.discovery.service(shop(&[GATEWAY]));
        check("the gateway's own identity", "no tunnel to shop.demo.svc.cluster.local through", true)?;
        istio.discovery.service(shop(&[]));
        check("nobody expected", "no identity is known that shop", false)?;
        istio.discovery.service(shop(&[SERVER]));
        works()?;
        istio.discovery.workload(gate(&pod, "impostor"));
        check("a gateway with another identity", "the TLS handshake with HBONE peer", false)?;
        istio.discovery.workload(gate(&pod, "gateway"));
        works()?;
        let lost = workload::Workload {
            network_gateway: self::gateway("far", Ipv4Addr::new(192, 0, 2, 9)),
            network: "far".to_owned(),
            ..behind(istiod::workload(&server), "shop")
        };
        istio.discovery.workload(lost);
        check("a gateway that nobody knows", "unknown network gateway far/192.0.2.9", false)?;
        Ok(said.join("; "))
    });
}
