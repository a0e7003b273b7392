//! Envoy as istiod configures it where it is a peer of node proxies: waypoint, gateway, or beside an application.
//!
//! ```text
//!  :15008 ──▶ connect_terminate ═internal═▶ main_internal ═internal═▶ connect_originate ──▶ :15008 of the destination
//!             TLS, ends CONNECT             rules and routes          CONNECT, TLS
//!             (not in a gateway)            of layer 7                (not beside an application)
//! ```
//! Between them the address that is meant goes along, as filter state or as the endpoint's metadata.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use serde_json::{Value, json};
use tonic::metadata::MetadataMap;
use tonic::{Extensions, Request};
use ztunnel_proto::auth::IstioCertificateRequest;
use ztunnel_proto::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use ztunnel_tests::ca::Caller;
use ztunnel_tests::mesh::MESHED;
use ztunnel_tests::process::Process;
use ztunnel_tests::testbed::istio::{Istio, identity};
use ztunnel_tests::testbed::{HTTP, Testbed};
use ztunnel_tests::topology::{Pod, in_url};
use ztunnel_tests::wire::HBONE_PORT;
use ztunnel_tls::grpc::{self, Roots, Token};

use super::envoy::{
    Side, address, cluster, connect_route, connection_manager, everywhere, extension, http1, http2, router,
    start, tls_socket,
};
use super::hbone::inside;

/// The port on which a gateway takes plain HTTP.
pub(crate) const ENTRANCE: u16 = 10000;
/// Where Envoy's own numbers are.
const ADMIN: u16 = 15000;
/// What Envoy writes about each tunnel that ends at it.
const TERMINATED: &str = "terminated authority=%REQ(:AUTHORITY)% peer=%DOWNSTREAM_PEER_URI_SAN% \
     serial=%DOWNSTREAM_PEER_SERIAL% tls=%DOWNSTREAM_TLS_VERSION% sni=%REQUESTED_SERVER_NAME% \
     forwarded=[%REQ(FORWARDED)%] traceparent=%REQ(TRACEPARENT)% baggage=[%REQ(BAGGAGE)%] code=%RESPONSE_CODE%\n";
/// What it writes about each request.
const SERVED: &str = "served path=%REQ(:PATH)% code=%RESPONSE_CODE% why=%RESPONSE_CODE_DETAILS%\n";
/// What it writes about each tunnel it has opened.
const ORIGINATED: &str = "originated to=%DOWNSTREAM_LOCAL_ADDRESS% upstream=%UPSTREAM_HOST% \
     answered=[%FILTER_STATE(envoy.tcp_proxy.propagate_response_headers)%]\n";

/// An Envoy in a pod of its own, and what Istio runs beside it.
pub(crate) struct Sidecar {
    pod: Pod,
    own: String,
    directory: PathBuf,
    plane: grpc::Config,
    process: Option<Process>,
}

impl Sidecar {
    /// Prepares one: its service account is called as its pod. istiod's authority knows it by a token of its own.
    pub(crate) fn new(testbed: &Testbed, istio: &Istio, pod: &Pod) -> Result<Self> {
        Self::known_as(testbed, istio, pod, &pod.name)
    }

    /// The same with another service account.
    pub(crate) fn known_as(
        testbed: &Testbed,
        istio: &Istio,
        pod: &Pod,
        service_account: &str,
    ) -> Result<Self> {
        let token = format!("token-of-{service_account}");
        let own = Caller { identity: identity(MESHED, service_account), impersonates: Vec::new() };
        istio.authority.admit(&token, own);
        let directory = testbed.run.path("state").join(format!("sds-{}", pod.name));
        std::fs::create_dir_all(&directory)?;
        let plane = grpc::Config {
            address: istio.authority.address().to_string().parse()?,
            roots: Roots::Pem(istio.authority.keys().root_pem()),
            alternate: Some("istiod.istio-system.svc".to_owned()),
            token: Token::Literal(token),
            cluster: "Kubernetes".to_owned(),
            headers: Vec::new(),
        };
        let own = identity(MESHED, service_account);
        let sidecar = Self { pod: pod.clone(), own, directory, plane, process: None };
        sidecar.renew()?;
        Ok(sidecar)
    }

    /// Asks for a certificate with a new key, and puts it where Envoy sees that it is another one.
    pub(crate) fn renew(&self) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(self.own.as_str().try_into()?)];
        let csr = params.serialize_request(&key)?.pem()?;
        // No name of another one: it asks for itself.
        let request = IstioCertificateRequest { csr, validity_duration: 86_400, metadata: None };
        let plane = grpc::ControlPlane::new(self.plane.clone());
        let mut chain = inside(&self.pod.place.netns, async {
            let channel = grpc::channel(plane.address(), plane.connector()?);
            let headers = MetadataMap::from_headers(plane.headers()?);
            let request = Request::from_parts(headers, Extensions::default(), request);
            let answer = IstioCertificateServiceClient::new(channel).create_certificate(request).await?;
            Ok(answer.into_inner().cert_chain)
        })?;
        let roots = chain.pop().context("an empty chain")?;
        let inline = |text: &str| json!({ "inline_string": text });
        self.publish("ROOTCA", "validation_context", &json!({ "trusted_ca": inline(&roots) }))?;
        let certificate = json!({
            "certificate_chain": inline(&chain.concat()),
            "private_key": inline(&key.serialize_pem()),
        });
        self.publish("default", "tls_certificate", &certificate)
    }

    fn publish(&self, name: &str, kind: &str, secret: &Value) -> Result<()> {
        let secret = json!({ "resources": [{
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            "name": name,
            kind: secret,
        }] });
        let (staged, path) = (self.directory.join("staged"), self.secret(name));
        std::fs::write(&staged, serde_json::to_vec(&secret)?)?;
        Ok(std::fs::rename(staged, path)?)
    }

    fn secret(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }

    /// Starts Envoy, in place of the one before it.
    pub(crate) fn start(&mut self, testbed: &Testbed, config: &Value) -> Result<()> {
        self.kill()?;
        self.process = Some(start(testbed, &self.pod, config)?);
        Ok(())
    }

    /// Kills Envoy with SIGKILL, if it runs.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |mut process| process.kill_9())
    }

    /// What Envoy has printed, and its access log.
    pub(crate) fn log(&self) -> Result<&ztunnel_tests::process::Log> {
        Ok(self.process.as_ref().context("Envoy does not run")?.log())
    }

    /// One of Envoy's numbers.
    pub(crate) fn stat(&self, name: &str) -> Result<u64> {
        let url = format!("http://127.0.0.1:{ADMIN}/stats?filter=^{name}$");
        let answer = ztunnel_tests::testbed::curl(&self.pod.place, &[&url])?;
        let (_, value) = answer.body.split_once(": ").with_context(|| format!("no {name}"))?;
        Ok(value.trim().parse()?)
    }

    fn tls(&self) -> Value {
        let secret = |name: &str| {
            let source = json!({ "path": self.secret(name) });
            json!({
                "name": name,
                "sds_config": { "resource_api_version": "V3", "path_config_source": source },
            })
        };
        let of_the_mesh = json!([{ "san_type": "URI", "matcher": { "prefix": "spiffe://cluster.local/" } }]);
        json!({
            "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
            "alpn_protocols": ["h2"],
            "tls_certificate_sds_secret_configs": [secret("default")],
            "combined_validation_context": {
                "default_validation_context": { "match_typed_subject_alt_names": of_the_mesh },
                "validation_context_sds_secret_config": secret("ROOTCA"),
            },
        })
    }

    fn baggage(&self) -> String {
        let name = &self.pod.name;
        format!(
            "k8s.cluster.name=Kubernetes,k8s.namespace.name={MESHED},k8s.deployment.name={name},\
             service.name={name},service.version=v1"
        )
    }

    /// Ends tunnels, and hands what is in them to `main_internal`. Takes only connections that offer HTTP/2 (ALPN).
    fn connect_terminate(&self) -> Value {
        let state = |key: &str, factory: Option<&str>, format: &str, share: &str| {
            let mut state = json!({
                "object_key": key,
                "format_string": { "text_format_source": { "inline_string": format } },
                "shared_with_upstream": share,
            });
            if let Some(factory) = factory {
                state["factory_key"] = json!(factory);
            }
            state
        };
        let original = "envoy.filters.listener.original_dst";
        let states = json!({ "on_request_headers": [
            state(&format!("{original}.local_ip"), None, "%REQ(:AUTHORITY)%", "TRANSITIVE"),
            state(&format!("{original}.remote_ip"), None, "%DOWNSTREAM_REMOTE_ADDRESS%", "ONCE"),
            state("io.istio.peer_principal", Some("envoy.string"), "%DOWNSTREAM_PEER_URI_SAN%", "TRANSITIVE"),
        ] });
        let states = extension(
            "connect_authority",
            "envoy.extensions.filters.http.set_filter_state.v3.Config",
            states,
        );
        let baggage = json!([{ "header": { "key": "baggage", "value": self.baggage() } }]);
        let manager = connection_manager(json!({
            "stat_prefix": "connect_terminate",
            "codec_type": "HTTP2",
            "http2_protocol_options": {
                "allow_connect": true,
                "max_concurrent_streams": 100,
                "connection_keepalive": { "interval": "10s", "timeout": "20s" },
            },
            "upgrade_configs": [{ "upgrade_type": "CONNECT" }],
            "access_log": [access_log(TERMINATED)],
            "http_filters": [states, router()],
            "route_config": connect_route("main_internal", baggage),
        }));
        json!({
            "name": "connect_terminate",
            "address": everywhere(HBONE_PORT),
            "listener_filters": [extension(
                "envoy.filters.listener.tls_inspector",
                "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
                json!({}),
            )],
            "filter_chains": [{
                "filter_chain_match": { "application_protocols": ["h2"] },
                "filters": [manager],
                "transport_socket": tls_socket(Side::Server, self.tls()),
            }],
        })
    }

    /// Opens tunnels to the address it is given, on the port for them.
    fn connect_originate(&self, life: &str) -> [Value; 2] {
        let proxy = extension(
            "envoy.filters.network.tcp_proxy",
            "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            json!({
                "stat_prefix": "connect_originate",
                "cluster": "connect_originate",
                "access_log": [access_log(ORIGINATED)],
                "access_log_options": { "flush_access_log_on_connected": true },
                "tunneling_config": {
                    "hostname": "%DOWNSTREAM_LOCAL_ADDRESS%",
                    "headers_to_add": [{ "header": { "key": "baggage", "value": self.baggage() } }],
                    "propagate_response_headers": true,
                },
            }),
        );
        let listener = json!({
            "name": "connect_originate",
            "internal_listener": {},
            "listener_filters": [original_dst()],
            "filter_chains": [{ "filters": [proxy] }],
        });
        let cluster = json!({
            "name": "connect_originate",
            "type": "ORIGINAL_DST",
            "lb_policy": "CLUSTER_PROVIDED",
            "connect_timeout": "2s",
            "cleanup_interval": "60s",
            "original_dst_lb_config": { "upstream_port_override": HBONE_PORT },
            "typed_extension_protocol_options": http2(json!({ "max_connection_duration": life })),
            "transport_socket": tls_socket(Side::Client, self.tls()),
        });
        [listener, cluster]
    }

    fn bootstrap(&self, listeners: &[Value], clusters: &[Value]) -> Value {
        json!({
            "node": { "id": self.pod.name, "cluster": self.pod.name },
            "admin": { "address": address(Ipv4Addr::LOCALHOST.into(), ADMIN) },
            "bootstrap_extensions": [extension(
                "envoy.bootstrap.internal_listener",
                "envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
                json!({}),
            )],
            "static_resources": { "listeners": listeners, "clusters": clusters },
        })
    }

    /// Stands in front of services, each an address and the pod's address behind it, and of those pods themselves.
    /// Adds a header with its name to each request, and refuses the paths below `/secret` to one identity. What it
    /// opens lives no longer than `life`.
    pub(crate) fn waypoint(&self, routes: &[(SocketAddr, SocketAddr)], refused: &str, life: &str) -> Value {
        let deny = extension(
            "envoy.filters.http.rbac",
            "envoy.extensions.filters.http.rbac.v3.RBAC",
            json!({ "rules": { "action": "DENY", "policies": { "ns[demo]-policy[no-secret]-rule[0]": {
                "permissions": [{ "url_path": { "path": { "prefix": "/secret" } } }],
                "principals": [{ "filter_state": {
                    "key": "io.istio.peer_principal",
                    "string_match": { "exact": refused },
                } }],
            } } } }),
        );
        let mut chains = Vec::new();
        let [originate, tunnels] = self.connect_originate(life);
        let mut clusters = vec![internal_cluster("main_internal", "main_internal", None), tunnels];
        for (vip, endpoint) in routes {
            let name = format!("inbound-vip|{}|http|{}", vip.port(), vip.ip());
            let mut inbound = internal_cluster(&name, "connect_originate", Some(*endpoint));
            // Or one connection would be used for ever, and one tunnel for it.
            inbound["typed_extension_protocol_options"] = http1(json!({ "max_connection_duration": life }));
            clusters.push(inbound);
            chains.push(self.chain(Some(*vip), &name, &[deny.clone(), router()]));
            chains.push(self.chain(Some(*endpoint), "encap", &[deny.clone(), router()]));
        }
        clusters.push(internal_cluster("encap", "connect_originate", None));
        self.bootstrap(&[self.connect_terminate(), main_internal(&chains), originate], &clusters)
    }

    /// Takes plain HTTP on the entrance's port, and sends it to this pod.
    pub(crate) fn gateway(&self, to: SocketAddr) -> Value {
        let [originate, tunnels] = self.connect_originate("600s");
        let name = "outbound|80||server";
        let clusters = [internal_cluster(name, "connect_originate", Some(to)), tunnels];
        let listener = json!({
            "name": "entrance",
            "address": address(Ipv4Addr::LOCALHOST.into(), ENTRANCE),
            "filter_chains": [self.chain(None, name, &[router()])],
        });
        self.bootstrap(&[listener, originate], &clusters)
    }

    /// Takes tunnels for the application in its own pod.
    pub(crate) fn beside_application(&self) -> Value {
        let name = "inbound|8080||";
        let application = cluster(name, address(Ipv4Addr::LOCALHOST.into(), HTTP));
        let clusters = [internal_cluster("main_internal", "main_internal", None), application];
        let chains = [self.chain(None, name, &[router()])];
        self.bootstrap(&[self.connect_terminate(), main_internal(&chains)], &clusters)
    }

    /// HTTP to this address, to a cluster.
    fn chain(&self, to: Option<SocketAddr>, cluster: &str, filters: &[Value]) -> Value {
        let manager = connection_manager(json!({
            "stat_prefix": cluster,
            "http_filters": filters,
            "access_log": [access_log(SERVED)],
            "route_config": { "name": cluster, "virtual_hosts": [{
                "name": "all",
                "domains": ["*"],
                "request_headers_to_add": [{ "header": { "key": "x-via", "value": self.pod.name } }],
                "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": cluster } }],
            }] },
        }));
        let mut chain = json!({ "filters": [manager] });
        if let Some(to) = to {
            let length = if to.is_ipv4() { 32 } else { 128 };
            chain["filter_chain_match"] = json!({
                "prefix_ranges": [{ "address_prefix": to.ip().to_string(), "prefix_len": length }],
                "destination_port": to.port(),
            });
        }
        chain
    }
}

fn access_log(format: &str) -> Value {
    extension(
        "envoy.access_loggers.stdout",
        "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
        json!({ "log_format": { "text_format_source": { "inline_string": format } } }),
    )
}

fn original_dst() -> Value {
    extension(
        "envoy.filters.listener.original_dst",
        "envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
        json!({}),
    )
}

fn main_internal(chains: &[Value]) -> Value {
    json!({
        "name": "main_internal",
        "internal_listener": {},
        "listener_filters": [original_dst()],
        "filter_chains": chains,
    })
}

/// A cluster whose endpoint is a listener of the same Envoy: for this address, or for the one that goes along.
fn internal_cluster(name: &str, listener: &str, local: Option<SocketAddr>) -> Value {
    let mut internal = json!({ "server_listener_name": listener });
    let mut endpoint = json!({});
    let key = "envoy.filters.listener.original_dst";
    if let Some(local) = local {
        let text = format!("{}:{}", in_url(local.ip()), local.port());
        internal["endpoint_id"] = json!(text);
        endpoint["metadata"] = json!({ "filter_metadata": { key: { "local": text } } });
    }
    endpoint["endpoint"] = json!({ "address": { "envoy_internal_address": internal } });
    let raw = extension(
        "envoy.transport_sockets.raw_buffer",
        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer",
        json!({}),
    );
    json!({
        "name": name,
        "connect_timeout": "5s",
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [endpoint] }] },
        "transport_socket": extension(
            "envoy.transport_sockets.internal_upstream",
            "envoy.extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
            json!({
                "passthrough_metadata": [{ "kind": { "host": {} }, "name": key }],
                "transport_socket": raw,
            }),
        ),
    })
}
