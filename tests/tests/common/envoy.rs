//! Envoy in a pod.

use std::net::IpAddr;

use anyhow::Result;
use serde_json::{Value, json};
use ztunnel_tests::binaries;
use ztunnel_tests::process::Process;
use ztunnel_tests::testbed::Testbed;
use ztunnel_tests::topology::Pod;

/// Starts Envoy in this pod. What it prints goes to the log of that name, its own access log soon after the fact.
pub(crate) fn start(testbed: &Testbed, pod: &Pod, config: &Value) -> Result<Process> {
    let path = testbed.run.path("state").join(format!("{}-envoy.json", pod.name));
    std::fs::write(&path, serde_json::to_vec_pretty(config)?)?;
    let mut command = pod.place.command(binaries::envoy()?)?;
    command.arg("-c").arg(&path).args([
        "--use-dynamic-base-id",
        "--concurrency",
        "1",
        "--log-level",
        "warning",
        "--file-flush-interval-msec",
        "50",
    ]);
    pod.place.start(&format!("envoy-{}", pod.name), command)
}

/// An extension of this name, whose configuration is a message of this type.
pub(crate) fn extension(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = json!(format!("type.googleapis.com/{kind}"));
    json!({ "name": name, "typed_config": config })
}

/// An address and port.
pub(crate) fn address(ip: IpAddr, port: u16) -> Value {
    json!({ "socket_address": { "address": ip.to_string(), "port_value": port } })
}

/// Every address of both families.
pub(crate) fn everywhere(port: u16) -> Value {
    let mut at = address(std::net::Ipv6Addr::UNSPECIFIED.into(), port);
    at["socket_address"]["ipv4_compat"] = json!(true);
    at
}

/// A cluster of one endpoint.
pub(crate) fn cluster(name: &str, at: Value) -> Value {
    json!({
        "name": name,
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": at } }] }],
        },
    })
}

/// TLS as a client or as a server.
pub(crate) fn tls_socket(side: Side, common: Value) -> Value {
    let (kind, config) = match side {
        Side::Client => ("UpstreamTlsContext", json!({ "common_tls_context": common })),
        Side::Server => (
            "DownstreamTlsContext",
            json!({ "require_client_certificate": true, "common_tls_context": common }),
        ),
    };
    extension(
        "envoy.transport_sockets.tls",
        &format!("envoy.extensions.transport_sockets.tls.v3.{kind}"),
        config,
    )
}

/// Who begins.
#[derive(Clone, Copy)]
pub(crate) enum Side {
    /// The one that connects.
    Client,
    /// The other.
    Server,
}

/// What makes a cluster speak HTTP/2.
pub(crate) fn http2(common: Value) -> Value {
    http(common, json!({ "http2_protocol_options": { "allow_connect": true } }))
}

/// What makes a cluster speak HTTP/1.
pub(crate) fn http1(common: Value) -> Value {
    http(common, json!({ "http_protocol_options": {} }))
}

fn http(common: Value, explicit: Value) -> Value {
    let kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    json!({ kind: {
        "@type": format!("type.googleapis.com/{kind}"),
        "common_http_protocol_options": common,
        "explicit_http_config": explicit,
    } })
}

/// An HTTP connection manager with these further settings.
pub(crate) fn connection_manager(config: Value) -> Value {
    extension(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        config,
    )
}

/// The last of the HTTP filters.
pub(crate) fn router() -> Value {
    extension("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", json!({}))
}

/// A route that ends CONNECT here and hands what is in it to a cluster.
pub(crate) fn connect_route(cluster: &str, response_headers: Value) -> Value {
    json!({ "name": "tunnels", "virtual_hosts": [{
        "name": "all",
        "domains": ["*"],
        "routes": [{
            "match": { "connect_matcher": {} },
            "route": {
                "cluster": cluster,
                "timeout": "0s",
                "upgrade_configs": [{ "upgrade_type": "CONNECT", "connect_config": {} }],
            },
            "response_headers_to_add": response_headers,
        }],
    }] })
}
