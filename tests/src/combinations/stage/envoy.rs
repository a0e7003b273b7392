//! Envoy as a waypoint that passes bytes on as they are, and as the gateway of a network.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use serde_json::{Value, json};

use crate::binaries;
use crate::process::Process;
use crate::testbed::Testbed;
use crate::testbed::istio::Istio;
use crate::topology::{Pod, in_url};
use crate::wire::HBONE_PORT;

/// Where a connection is meant to go, from one of Envoy's own listeners to the next.
const MEANT: &str = "envoy.filters.listener.original_dst.local_ip";

/// Starts Envoy in a pod that nobody captures.
pub(super) fn start(testbed: &Testbed, pod: &Pod, config: &Value) -> Result<Process> {
    let path = testbed.run.path("state").join(format!("{}-envoy.json", pod.name));
    std::fs::write(&path, serde_json::to_vec_pretty(config)?)?;
    let mut command = pod.place.command(binaries::envoy()?)?;
    command.arg("-c").arg(&path).args([
        "--use-dynamic-base-id",
        "--concurrency",
        "1",
        "--log-level",
        "warning",
    ]);
    pod.place.start(&format!("envoy-{}", pod.name), command)
}

/// A waypoint: what comes for an address of the first column goes to that of the second, at the same port, and
/// everything else to where it was meant to go.
pub(super) fn waypoint(
    testbed: &Testbed,
    istio: &Istio,
    pod: &Pod,
    own: &str,
    routes: &[(IpAddr, IpAddr)],
) -> Result<Value> {
    let tls = tls(testbed, istio, pod, own)?;
    let chain = |to: Option<IpAddr>, meant: &str| {
        let mut chain = json!({ "filters": [
            extension(
                "meant",
                "envoy.extensions.filters.network.set_filter_state.v3.Config",
                json!({ "on_new_connection": [state(meant)] }),
            ),
            tcp_proxy("passed-on", "originate", None),
        ] });
        if let Some(to) = to {
            let length = if to.is_ipv4() { 32 } else { 128 };
            let range = json!({ "address_prefix": to.to_string(), "prefix_len": length });
            chain["filter_chain_match"] = json!({ "prefix_ranges": [range] });
        }
        chain
    };
    let mut chains = vec![chain(None, "%DOWNSTREAM_LOCAL_ADDRESS%")];
    for (dialled, endpoint) in routes {
        chains.push(chain(Some(*dialled), &format!("{}:%DOWNSTREAM_LOCAL_PORT%", in_url(*endpoint))));
    }
    let inside = |name: &str, chains: Vec<Value>| {
        json!({
            "name": name,
            "internal_listener": {},
            "listener_filters": [extension(
                "envoy.filters.listener.original_dst",
                "envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
                json!({}),
            )],
            "filter_chains": chains,
        })
    };
    let states = extension(
        "meant",
        "envoy.extensions.filters.http.set_filter_state.v3.Config",
        json!({ "on_request_headers": [state("%REQ(:AUTHORITY)%")] }),
    );
    let tunnels = json!({ "tunneling_config": { "hostname": "%DOWNSTREAM_LOCAL_ADDRESS%" } });
    let originate = json!({
        "name": "tunnels-out",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "5s",
        "original_dst_lb_config": { "upstream_port_override": HBONE_PORT },
        "typed_extension_protocol_options": http2(),
        "transport_socket": extension(
            "envoy.transport_sockets.tls",
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            json!({ "common_tls_context": tls }),
        ),
    });
    Ok(bootstrap(
        pod,
        &[
            tunnels_in(&tls, "pass-on", &[states]),
            inside("pass-on", chains),
            inside("originate", vec![json!({ "filters": [tcp_proxy("out", "tunnels-out", Some(tunnels))] })]),
        ],
        &[internal("pass-on"), internal("originate"), originate],
    ))
}

/// The gateway of a network, which carries everything, and cannot read it, to the tunnel port of one pod.
pub(super) fn gateway(testbed: &Testbed, istio: &Istio, pod: &Pod, own: &str, to: &Pod) -> Result<Value> {
    let tls = tls(testbed, istio, pod, own)?;
    let at = SocketAddr::from((to.v4, HBONE_PORT));
    let endpoint = json!({ "endpoint": { "address": address(at.ip(), at.port()) } });
    let cluster = json!({
        "name": "pod",
        "connect_timeout": "5s",
        "load_assignment": { "cluster_name": "pod", "endpoints": [{ "lb_endpoints": [endpoint] }] },
    });
    Ok(bootstrap(pod, &[tunnels_in(&tls, "pod", &[])], &[cluster]))
}

/// A certificate of the authority's, and whom to believe.
fn tls(testbed: &Testbed, istio: &Istio, pod: &Pod, own: &str) -> Result<Value> {
    let keys = istio.authority.keys();
    let (chain, key) = keys.for_peer(own);
    let write = |name: &str, text: &str| -> Result<String> {
        let path = testbed.run.path("state").join(format!("{}-{name}", pod.name));
        std::fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let (chain, key) = (write("chain.pem", &chain)?, write("key.pem", &key)?);
    let root = write("root.pem", &keys.root_pem())?;
    let of_the_mesh = json!([{ "san_type": "URI", "matcher": { "prefix": "spiffe://cluster.local/" } }]);
    Ok(json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "alpn_protocols": ["h2"],
        "tls_certificates": [{ "certificate_chain": { "filename": chain }, "private_key": { "filename": key } }],
        "validation_context": {
            "trusted_ca": { "filename": root },
            "match_typed_subject_alt_names": of_the_mesh,
        },
    }))
}

/// Ends tunnels, and hands what is in them to a cluster.
fn tunnels_in(tls: &Value, cluster: &str, filters: &[Value]) -> Value {
    let router =
        extension("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", json!({}));
    let upgrade = json!([{ "upgrade_type": "CONNECT", "connect_config": {} }]);
    let manager = extension(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": "tunnels",
            "codec_type": "HTTP2",
            "http2_protocol_options": { "allow_connect": true },
            "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
            "http_filters": filters.iter().chain([&router]).collect::<Vec<_>>(),
            "route_config": { "name": "tunnels", "virtual_hosts": [{
                "name": "all",
                "domains": ["*"],
                "routes": [{
                    "match": { "connect_matcher": {} },
                    "route": { "cluster": cluster, "timeout": "0s", "upgrade_configs": upgrade },
                }],
            }] },
        }),
    );
    let mut everywhere = address(Ipv6Addr::UNSPECIFIED.into(), HBONE_PORT);
    everywhere["socket_address"]["ipv4_compat"] = json!(true);
    let transport = extension(
        "envoy.transport_sockets.tls",
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        json!({ "require_client_certificate": true, "common_tls_context": tls }),
    );
    json!({
        "name": "tunnels",
        "address": everywhere,
        "filter_chains": [{ "filters": [manager], "transport_socket": transport }],
    })
}

fn bootstrap(pod: &Pod, listeners: &[Value], clusters: &[Value]) -> Value {
    json!({
        "node": { "id": pod.name, "cluster": pod.name },
        "bootstrap_extensions": [extension(
            "envoy.bootstrap.internal_listener",
            "envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
            json!({}),
        )],
        "static_resources": { "listeners": listeners, "clusters": clusters },
    })
}

/// A cluster whose endpoint is a listener of the same Envoy, to which filter state goes along.
fn internal(listener: &str) -> Value {
    let raw = extension(
        "envoy.transport_sockets.raw_buffer",
        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer",
        json!({}),
    );
    let endpoint = json!({ "endpoint": { "address": {
        "envoy_internal_address": { "server_listener_name": listener }
    } } });
    json!({
        "name": listener,
        "connect_timeout": "5s",
        "load_assignment": { "cluster_name": listener, "endpoints": [{ "lb_endpoints": [endpoint] }] },
        "transport_socket": extension(
            "envoy.transport_sockets.internal_upstream",
            "envoy.extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
            json!({ "transport_socket": raw }),
        ),
    })
}

/// Where a connection is meant to go, for the next listener alone.
fn state(format: &str) -> Value {
    json!({
        "object_key": MEANT,
        "format_string": { "text_format_source": { "inline_string": format } },
        "shared_with_upstream": "ONCE",
    })
}

fn tcp_proxy(name: &str, cluster: &str, further: Option<Value>) -> Value {
    let mut config = further.unwrap_or_else(|| json!({}));
    config["stat_prefix"] = json!(name);
    config["cluster"] = json!(cluster);
    extension(
        "envoy.filters.network.tcp_proxy",
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        config,
    )
}

fn http2() -> Value {
    let kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    json!({ kind: {
        "@type": format!("type.googleapis.com/{kind}"),
        "explicit_http_config": { "http2_protocol_options": { "allow_connect": true } },
    } })
}

fn extension(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = json!(format!("type.googleapis.com/{kind}"));
    json!({ "name": name, "typed_config": config })
}

fn address(ip: IpAddr, port: u16) -> Value {
    json!({ "socket_address": { "address": ip.to_string(), "port_value": port } })
}
