//! Envoy, an independent implementation of the tunnel, as client and as server.

mod common;

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, ensure};
use common::envoy::{
    Side, address, cluster, connect_route, connection_manager, everywhere, extension, http2, router, start,
    tls_socket,
};
use common::in_testbed;
use serde_json::{Value, json};
use ztunnel_tests::certificates::{Signed, Signer};
use ztunnel_tests::mesh::PLAIN;
use ztunnel_tests::poll::{PATIENCE, eventually};
use ztunnel_tests::testbed::{HTTP, On, Options, Testbed, curl, http, http_refused};
use ztunnel_tests::topology::Pod;
use ztunnel_tests::wire::HBONE_PORT;

const ENTRANCE: u16 = 10000;

#[test]
fn envoy_as_client_reaches_a_pod_of_the_mesh() {
    in_testbed("Envoy as client", |testbed| {
        let (pod, server) = (testbed.outsider.clone(), testbed.server.clone());
        testbed.mesh.peer_authentication("STRICT")?;
        eventually(PATIENCE, || http_refused(&pod.place, server.v4.into()))?;
        let mut evidence = Vec::new();
        for address in server.addresses() {
            let mesh = signer(testbed)?;
            let own = mesh.sign(&[&identity(PLAIN, "outsider")])?;
            let config = client(&files(testbed, &pod, &own, &mesh)?, address, &identity("demo", "server"));
            let mut envoy = start(testbed, &pod, &config)?;
            let entrance = format!("http://127.0.0.1:{ENTRANCE}/");
            let answer = eventually(PATIENCE, || curl(&pod.place, &[&entrance]))
                .with_context(|| format!("through Envoy to {address}: {}", envoy.log().tail(5)))?;
            ensure!(answer.body.starts_with("pod=server"), "{}", answer.body);
            // Several at once share the tunnel.
            for _ in 0..20 {
                curl(&pod.place, &[&entrance]).context("once more")?;
            }
            envoy.kill_9()?;
            evidence.push(answer.body);
        }
        Ok(format!("under STRICT, 21 requests each: {}", evidence.join("; ")))
    });
}

#[test]
fn a_pod_of_the_mesh_reaches_envoy_as_server() {
    in_testbed("Envoy as server", |testbed| {
        let pod = testbed.outside.clone();
        let mesh = signer(testbed)?;
        let own = mesh.sign(&[&identity(PLAIN, "outside")])?;
        let config = server(&files(testbed, &pod, &own, &mesh)?, &identity("demo", "client"));
        let envoy = start(testbed, &pod, &config)?;
        let yaml = std::fs::read_to_string(testbed.mesh.path().join("pod-outside.yaml"))?;
        let native =
            yaml.replace("    app: outside\n", "    app: outside\n    networking.istio.io/tunnel: http\n");
        ensure!(native != yaml, "the pod's labels are not where this test looks for them");
        testbed.mesh.write("pod-outside", &native)?;
        let mut evidence = Vec::new();
        for address in pod.addresses() {
            let answer = eventually(PATIENCE, || {
                let answer = http(&testbed.client.place, address, "")?;
                // Envoy delivers from its own address: any other is a connection that went past it.
                ensure!(answer.body.contains("client=127.0.0.1"), "not through the tunnel: {}", answer.body);
                Ok(answer)
            })
            .with_context(|| format!("{address}; Envoy: {}", envoy.log().tail(5)))?;
            ensure!(answer.remote == address.to_string(), "the client's socket shows {}", answer.remote);
            for _ in 0..20 {
                http(&testbed.client.place, address, "").context("once more")?;
            }
            evidence.push(format!("{address}: {}", answer.body));
        }
        // Envoy was told to expect the client: it refuses the other service account.
        http_refused(&testbed.other.place, pod.v4.into())?;
        Ok(format!("21 requests each: {}; another service account is refused by Envoy", evidence.join("; ")))
    });
}

/// A control: what the tests above tell Envoy is right, with Envoy on both ends and no daemon at all.
#[test]
fn envoy_understands_itself() -> Result<()> {
    let testbed = Testbed::without_daemons(Options::default())?;
    let root = Signer::stranger()?;
    let (from, to) = (testbed.outsider.clone(), testbed.outside.clone());
    let [client_id, server_id] = [identity(PLAIN, "outsider"), identity(PLAIN, "outside")];
    let own = root.sign(&[&server_id])?;
    let served = start(&testbed, &to, &server(&files(&testbed, &to, &own, &root)?, &client_id))?;
    for address in to.addresses() {
        let own = root.sign(&[&client_id])?;
        let mut dialled =
            start(&testbed, &from, &client(&files(&testbed, &from, &own, &root)?, address, &server_id))?;
        let answer = eventually(PATIENCE, || curl(&from.place, &[&format!("http://127.0.0.1:{ENTRANCE}/")]))
            .with_context(|| format!("{}; {}", served.log().tail(5), dialled.log().tail(5)))?;
        ensure!(answer.body.starts_with("pod=outside client=127.0.0.1"), "{}", answer.body);
        dialled.kill_9()?;
    }
    Ok(())
}

fn signer(testbed: &Testbed) -> Result<Signer> {
    Signer::of_mesh(&testbed.setting(On::B).state)
}

fn identity(namespace: &str, service_account: &str) -> String {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{service_account}")
}

/// Where Envoy finds a certificate, its key and the root.
struct Files {
    chain: String,
    key: String,
    root: String,
}

fn files(testbed: &Testbed, pod: &Pod, own: &Signed, root: &Signer) -> Result<Files> {
    let write = |name: &str, text: &str| -> Result<String> {
        let path = testbed.run.path("state").join(format!("{}-{name}", pod.name));
        std::fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    Ok(Files {
        chain: write("envoy-chain.pem", &own.chain_pem)?,
        key: write("envoy-key.pem", &own.key_pem)?,
        root: write("envoy-root.pem", root.root_pem())?,
    })
}

fn tls(files: &Files, expect: &str) -> Value {
    json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "alpn_protocols": ["h2"],
        "tls_certificates": [{
            "certificate_chain": { "filename": files.chain },
            "private_key": { "filename": files.key },
        }],
        "validation_context": {
            "trusted_ca": { "filename": files.root },
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": expect } }],
        },
    })
}

/// Takes plain TCP on the entrance's port, and carries it to nginx behind `to`'s tunnel port.
fn client(files: &Files, to: IpAddr, expect: &str) -> Value {
    let target = std::net::SocketAddr::new(to, HTTP).to_string();
    let mut tunnel = cluster("tunnel", address(to, HBONE_PORT));
    tunnel["transport_socket"] = tls_socket(Side::Client, tls(files, expect));
    tunnel["typed_extension_protocol_options"] = http2(json!({}));
    let proxy = extension(
        "tcp",
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        json!({ "stat_prefix": "tcp", "cluster": "tunnel", "tunneling_config": { "hostname": target } }),
    );
    json!({ "static_resources": {
        "listeners": [{
            "name": "entrance",
            "address": address(Ipv4Addr::LOCALHOST.into(), ENTRANCE),
            "filter_chains": [{ "filters": [proxy] }],
        }],
        "clusters": [tunnel],
    } })
}

/// Takes tunnels, and delivers what is in them to nginx in its own pod.
fn server(files: &Files, expect: &str) -> Value {
    let manager = connection_manager(json!({
        "stat_prefix": "tunnels",
        "codec_type": "HTTP2",
        "http2_protocol_options": { "allow_connect": true },
        "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
        "http_filters": [router()],
        "route_config": connect_route("nginx", json!([])),
    }));
    let socket = tls_socket(Side::Server, tls(files, expect));
    json!({ "static_resources": {
        "listeners": [{
            "name": "tunnels",
            "address": everywhere(HBONE_PORT),
            "filter_chains": [{ "filters": [manager], "transport_socket": socket }],
        }],
        "clusters": [cluster("nginx", address(Ipv4Addr::LOCALHOST.into(), HTTP))],
    } })
}
