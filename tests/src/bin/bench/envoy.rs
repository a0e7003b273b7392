//! Envoy as sidecars: one in the client's pod, one in each server's, with mutual TLS between them.
//!
//! The client dials its own Envoy's listener directly, so that Envoy carries no cost of redirection. Both sides
//! present a SPIFFE certificate and accept exactly the other's. TLS 1.3 as for the daemons; Envoy's TLS library then
//! takes AES-128-GCM where ours takes AES-256-GCM, and neither can be told to do otherwise for TLS 1.3. Everything else
//! is Envoy's default, except the circuit breaker that would refuse the 1,025th connection.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use ztunnel_tests::binaries;
use ztunnel_tests::process::{Process, sh};
use ztunnel_tests::topology::Pod;

use super::site::{HTTP, STREAM, Site};

/// What Envoy makes of the bytes of an HTTP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Nothing: one mutual TLS connection for each client connection.
    Tcp,
    /// Requests, over pooled HTTP/2 between the two.
    Http,
}

/// Where an Envoy listens, the one beside a server for HTTP and for streams.
const INBOUND: [u16; 2] = [15006, 15007];
/// Where the client's Envoy listens: HTTP and streams to the server, then to the near one.
const OUTBOUND: [u16; 4] = [15001, 15002, 15003, 15004];

/// Starts the one in a server's pod.
pub(crate) fn start_server(site: &Site, pod: &Pod, mode: Mode) -> Result<Process> {
    let own = certificate(site, &pod.name)?;
    let tls = |alpn: &[&str]| {
        json!({
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "common_tls_context": tls_context(&own, "client", alpn),
                "require_client_certificate": true,
            }
        })
    };
    let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let listeners = [
        listener("http", (pod.v4, INBOUND[0]).into(), Some(tls(mode.alpn())), mode),
        listener("stream", (pod.v4, INBOUND[1]).into(), Some(tls(&[])), Mode::Tcp),
    ];
    let clusters =
        [cluster("http", local(HTTP), None, Mode::Tcp), cluster("stream", local(STREAM), None, Mode::Tcp)];
    start(site, pod, &bootstrap(&listeners, &clusters))
}

/// Fails while the one in a server's pod does not listen.
pub(crate) fn is_up(pod: &Pod) -> Result<()> {
    let try_all = || {
        for port in INBOUND {
            TcpStream::connect((pod.v4, port)).with_context(|| format!("port {port} of {}", pod.name))?;
        }
        Ok(())
    };
    pod.place.netns.enter(try_all)
}

/// Starts the one in the client's pod.
pub(crate) fn start_client(site: &Site, mode: Mode) -> Result<Process> {
    let own = certificate(site, &site.client.name)?;
    let (mut listeners, mut clusters) = (Vec::new(), Vec::new());
    for (server, [http, stream]) in servers(site) {
        for (at, to, kind, mode) in
            [(http, INBOUND[0], "http", mode), (stream, INBOUND[1], "stream", Mode::Tcp)]
        {
            let name = format!("{kind}-{}", server.name);
            let tls = json!({
                "name": "envoy.transport_sockets.tls",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                    "common_tls_context": tls_context(&own, &server.name, mode.alpn()),
                }
            });
            listeners.push(listener(&name, at, None, mode));
            clusters.push(cluster(&name, (server.v4, to).into(), Some(tls), mode));
        }
    }
    start(site, &site.client, &bootstrap(&listeners, &clusters))
}

/// Where the client reaches the server and the near one, each with HTTP and streams.
pub(crate) fn servers(site: &Site) -> [(&Pod, [SocketAddr; 2]); 2] {
    let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let [http, stream, near_http, near_stream] = OUTBOUND;
    [(&site.server, [at(http), at(stream)]), (&site.near, [at(near_http), at(near_stream)])]
}

impl Mode {
    fn alpn(self) -> &'static [&'static str] {
        match self {
            Self::Tcp => &[],
            Self::Http => &["h2"],
        }
    }
}

fn start(site: &Site, pod: &Pod, config: &Value) -> Result<Process> {
    let path = site.run.path("state").join(format!("envoy-{}.json", pod.name));
    fs::write(&path, serde_json::to_vec_pretty(config)?)?;
    let mut command = pod.place.command(binaries::envoy()?)?;
    command.arg("--config-path").arg(&path);
    command.args(["--concurrency", "2", "--disable-hot-restart", "--log-level", "warning"]);
    pod.place.start(&format!("envoy-{}", pod.name), command)
}

fn bootstrap(listeners: &[Value], clusters: &[Value]) -> Value {
    json!({ "static_resources": { "listeners": listeners, "clusters": clusters } })
}

fn address(at: SocketAddr) -> Value {
    json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } })
}

fn listener(name: &str, at: SocketAddr, tls: Option<Value>, mode: Mode) -> Value {
    let filter = match mode {
        Mode::Tcp => json!({
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": name, "cluster": name,
            }
        }),
        Mode::Http => json!({
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3\
                          .HttpConnectionManager",
                "stat_prefix": name,
                "route_config": { "virtual_hosts": [{
                    "name": "all", "domains": ["*"],
                    "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": name } }],
                }] },
                "http_filters": [{
                    "name": "envoy.filters.http.router",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
                    }
                }],
            }
        }),
    };
    let mut chain = json!({ "filters": [filter] });
    if let Some(tls) = tls {
        chain["transport_socket"] = tls;
    }
    json!({ "name": name, "address": address(at), "filter_chains": [chain] })
}

fn cluster(name: &str, to: SocketAddr, tls: Option<Value>, mode: Mode) -> Value {
    let plenty = 1_000_000;
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(to) } }] }],
        },
        "circuit_breakers": { "thresholds": [{
            "max_connections": plenty, "max_pending_requests": plenty, "max_requests": plenty,
        }] },
    });
    if let Some(tls) = tls {
        cluster["transport_socket"] = tls;
    }
    if mode == Mode::Http {
        cluster["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": { "http2_protocol_options": {} },
            }
        });
    }
    cluster
}

/// A certificate, its key, and the authority that both sides trust.
struct Certificate {
    chain: PathBuf,
    key: PathBuf,
    authority: PathBuf,
}

fn tls_context(own: &Certificate, peer: &str, alpn: &[&str]) -> Value {
    json!({
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3",
        },
        "alpn_protocols": alpn,
        "tls_certificates": [{
            "certificate_chain": { "filename": own.chain },
            "private_key": { "filename": own.key },
        }],
        "validation_context": {
            "trusted_ca": { "filename": own.authority },
            "match_typed_subject_alt_names": [{
                "san_type": "URI", "matcher": { "exact": spiffe(peer) },
            }],
        },
    })
}

fn spiffe(name: &str) -> String {
    format!("spiffe://cluster.local/ns/{}/sa/{name}", ztunnel_tests::mesh::MESHED)
}

/// P-256, as the daemon's own.
fn certificate(site: &Site, name: &str) -> Result<Certificate> {
    let directory = site.run.path("state").join("envoy");
    fs::create_dir_all(&directory)?;
    let at = |file: String| directory.join(file);
    let authority = at("authority.pem".to_owned());
    let authority_key = at("authority.key".to_owned());
    if !authority.exists() {
        let extension = "basicConstraints=critical,CA:TRUE";
        openssl(&authority, &authority_key, &["-subj", "/O=cluster.local", "-addext", extension])
            .context("the authority")?;
    }
    let (chain, key) = (at(format!("{name}.pem")), at(format!("{name}.key")));
    let san = format!("subjectAltName=critical,URI:{}", spiffe(name));
    let (issuer, issuer_key) = (authority.display().to_string(), authority_key.display().to_string());
    let extra = [
        "-subj",
        "/",
        "-addext",
        &san,
        "-addext",
        "basicConstraints=critical,CA:FALSE",
        "-addext",
        "extendedKeyUsage=serverAuth,clientAuth",
        "-CA",
        &issuer,
        "-CAkey",
        &issuer_key,
    ];
    openssl(&chain, &key, &extra).with_context(|| format!("the certificate of {name}"))?;
    Ok(Certificate { chain, key, authority })
}

fn openssl(certificate: &Path, key: &Path, extra: &[&str]) -> Result<()> {
    let (certificate, key) = (certificate.display().to_string(), key.display().to_string());
    let mut arguments =
        vec!["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    // The machine's own configuration would add extensions.
    let config = Path::new(&certificate).with_file_name("openssl.cnf");
    fs::write(&config, "[req]\ndistinguished_name = name\n[name]\n")?;
    let config = config.display().to_string();
    arguments.extend(["-days", "2", "-config", &config, "-out", &certificate, "-keyout", &key]);
    arguments.extend(extra);
    sh("openssl", &arguments).map(drop)
}
