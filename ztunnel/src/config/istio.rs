//! Istio's environment → what each module is given: `ztunnel proxy`.

use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use ztunnel_mesh::dump::Setting;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::workload::Named;
use ztunnel_node::capture;
use ztunnel_node::dns;
use ztunnel_node::identity::istiod;
use ztunnel_node::net::redirected;
use ztunnel_node::net::redirected::ClientAddress;
use ztunnel_node::net::socket::Keepalive;
use ztunnel_node::xds::client;
use ztunnel_tls::grpc;
use ztunnel_tls::grpc::InvalidAddress;

use crate::config::env::Dedicated;
use crate::config::env::Dns;
use crate::config::env::InPod;
use crate::config::env::Ineffective;
use crate::config::env::Own;
use crate::config::env::Settings;
use crate::config::env::control_plane::RootCert;
use crate::config::env::control_plane::Server;
use crate::config::env::control_plane::Token;
use crate::config::resolved;
use crate::config::resolved::Invalid;
use crate::config::resolved::Run;
use crate::config::resolved::SelfPod;
use crate::config::resolved::Source;
use crate::config::resolved::Zds;

/// The port of readiness, which Istio does not let be changed.
const READINESS_PORT: u16 = 15021;

/// Completes `settings` by what this machine has.
pub fn run(settings: Settings) -> Result<Run, Invalid> {
    let Settings { own, control_plane, in_pod, mut data_plane, dns, .. } = settings;
    data_plane.network =
        Some(Arc::from(own.network.as_str())).filter(|network: &Arc<str>| !network.is_empty());
    let plane = |server: &Server| plane(server, &control_plane.token, &own.cluster);
    let authority = plane(&control_plane.authority).map_err(Invalid::Authority)?;
    let mesh = match &control_plane.discovery {
        Some(server) => Source::Istiod {
            client: Box::new(client::Config {
                plane: plane(server).map_err(Invalid::Discovery)?,
                identity: identity(&own),
                answer_timeout: client::ANSWER_TIMEOUT,
                cache: settings.mesh_cache,
            }),
            on_demand: control_plane.on_demand,
        },
        None => Source::Nothing,
    };
    if let Some(name) = &data_plane.hbone.congestion {
        resolved::check_congestion(name)?;
    }
    let any = |port| -> SocketAddr {
        match in_pod.ipv6 && Path::new("/proc/net/if_inet6").exists() {
            true => (Ipv6Addr::UNSPECIFIED, port).into(),
            false => (Ipv4Addr::UNSPECIFIED, port).into(),
        }
    };
    let listeners = listeners(&in_pod, &data_plane.keepalive);
    let impersonate = settings.dedicated.is_none();
    // A mesh that is written by hand need not say in which cluster it is.
    let cluster = if control_plane.discovery.is_some() { own.cluster.clone() } else { String::new() };
    let (zds, dedicated, self_pod) = match settings.dedicated {
        Some(workload) => (None, Some(dedicated(workload, &own.node, &cluster, listeners)), None),
        None => {
            let dns = dns_in_pods(&dns, &listeners, &own.cluster_domain);
            let self_pod = self_pod(&own, &cluster)?;
            (Some(Zds { socket: in_pod.socket.clone(), listeners, cluster, dns }), None, self_pod)
        }
    };
    let mut warnings: Vec<String> = settings.warnings.iter().map(Ineffective::to_string).collect();
    if dedicated.is_some() && dns.enabled {
        let why =
            "ISTIO_META_DNS_CAPTURE=true has no effect: a proxy of one workload does not answer its DNS";
        warnings.push(why.to_owned());
    }
    if dedicated.is_none() && !dns.enabled {
        let why = "pods' DNS is not answered (ISTIO_META_DNS_CAPTURE=false): istio-cni must not redirect it either \
                   (ambient.dnsCapture=false, AMBIENT_DNS_CAPTURE), or names resolve in no enrolled pod";
        warnings.push(why.to_owned());
    }
    let kernel =
        resolved::unused_kernel(Some(own.node).filter(|node| !node.is_empty()), in_pod.run_dir.clone());
    Ok(Run {
        places: resolved::places_without_capture(&kernel)?,
        mesh,
        local: control_plane.local,
        // Of the embedded authority, which is not used.
        state_dir: in_pod.run_dir.clone(),
        authority: Some(istiod::Config {
            planes: vec![authority],
            life: control_plane.secret_ttl,
            // A proxy of one workload is that workload, as its token says.
            impersonate,
        }),
        crl: settings.demands.crl,
        cert_cache: settings.cert_cache,
        compliance: settings.demands.compliance,
        drain_deadline: settings.drain_deadline,
        metrics_addr: any(settings.stats_port),
        ready_addr: any(READINESS_PORT),
        zds,
        dedicated,
        network: own.network,
        self_pod,
        admin_port: settings.admin_port,
        settings: settings.shown.iter().map(Setting::from).collect(),
        kept_running: true,
        warnings,
        proxy: data_plane,
        log_format: settings.log_format,
        access_log_rate: settings.access_log_rate,
        log_filter: settings.log_filter,
    })
}

fn plane(server: &Server, token: &Token, cluster: &str) -> Result<grpc::Config, InvalidAddress> {
    Ok(grpc::Config {
        address: server.address.parse()?,
        roots: match &server.root {
            RootCert::File(path) => grpc::Roots::File(path.clone()),
            RootCert::System => grpc::Roots::System,
            RootCert::Pem(text) => grpc::Roots::Pem(text.clone()),
        },
        alternate: server.alternative_name.clone(),
        token: match token {
            Token::File(path) => grpc::Token::File(path.clone()),
            Token::Literal(text) => grpc::Token::Literal(text.clone()),
        },
        cluster: cluster.to_owned(),
        headers: server.headers.clone(),
    })
}

fn identity(own: &Own) -> client::Identity {
    client::Identity {
        instance_ip: Some(own.instance_ip.clone()).filter(|ip| !ip.is_empty()),
        pod: own.pod.clone(),
        namespace: own.namespace.clone(),
        node: own.node.clone(),
        metadata: own.metadata.clone().into_iter().collect(),
    }
}

/// This proxy's own pod, if it is told which that is.
fn self_pod(own: &Own, cluster: &str) -> Result<Option<SelfPod>, Invalid> {
    let Own { pod, namespace, service_account, node, .. } = own;
    if [pod, namespace, service_account].into_iter().any(String::is_empty) {
        return Ok(None);
    }
    let identity = SpiffeId::new(&own.trust_domain, namespace, service_account).map_err(Invalid::Own)?;
    let uid = PodUid(format!("{namespace}/{pod}").into());
    let [name, namespace, service_account, node, cluster] =
        [&**pod, namespace, service_account, node, cluster].map(Arc::from);
    let workload = Named::Pod { name, namespace, service_account, node, cluster };
    Ok(Some(SelfPod { uid, workload, identity }))
}

fn dedicated(
    workload: Dedicated,
    node: &str,
    cluster: &str,
    listeners: capture::rules::Config,
) -> resolved::Dedicated {
    let Dedicated { namespace, name, service_account } = workload;
    let uid = PodUid(format!("{namespace}/{name}").into());
    let [name, namespace, service_account] = [name, namespace, service_account].map(Arc::from);
    // Where no node is named, that of the workload is not asked for.
    let [node, cluster] = [node, cluster].map(Arc::from);
    let workload = Named::Pod { name, namespace, service_account, node, cluster };
    resolved::Dedicated { uid, workload, listeners }
}

fn listeners(in_pod: &InPod, keepalive: &Keepalive) -> capture::rules::Config {
    let settings = redirected::Settings {
        mark: in_pod.packet_mark,
        client_address: match in_pod.original_source {
            None => ClientAddress::Preferred,
            Some(true) => ClientAddress::Required,
            Some(false) => ClientAddress::Hidden,
        },
        keepalive: keepalive.clone(),
    };
    capture::rules::Config { share_ports: in_pod.port_reuse, ipv6: in_pod.ipv6, settings }
}

fn dns_in_pods(
    dns: &Dns,
    listeners: &capture::rules::Config,
    cluster_domain: &str,
) -> Option<dns::server::Config> {
    let preferred = dns.preferred_namespace.as_deref();
    let names = || dns::answer::Config::new(cluster_domain, preferred, listeners.ipv6);
    let completed =
        || dns::server::Config { address: dns.address, ..resolved::dns_in_pods(names(), listeners) };
    dns.enabled.then(completed)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::env;
    use crate::config::env::Surroundings;

    fn configured(variables: &[(&str, &str)]) -> Result<Run, Invalid> {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let variables = variables.iter().map(own).collect();
        run(env::resolve(&variables, Surroundings { mesh_config: None, cores: 4 })?)
    }

    #[test]
    fn the_charts_environment_is_everything_that_is_needed() {
        let run = configured(&[
            ("CA_ADDRESS", "istiod-canary.istio-system.svc:15012"),
            ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
            ("ISTIO_META_CLUSTER_ID", "east"),
            ("NODE_NAME", "node-1"),
            ("POD_NAME", "ztunnel-x"),
            ("POD_NAMESPACE", "istio-system"),
            ("INSTANCE_IP", "10.0.0.9"),
            ("SERVICE_ACCOUNT", "ztunnel"),
            ("TRUST_DOMAIN", "example.org"),
            ("XDS_HEADER_x-tenant", "one"),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
            ("PACKET_MARK", "7"),
            ("IPV6_ENABLED", "false"),
            ("CRL_PATH", "/crl.pem"),
            ("COMPLIANCE_POLICY", "pqc"),
            ("ZTUNNEL_ENCRYPT_SAME_NODE", "true"),
        ]);
        let run = run.unwrap();
        let Source::Istiod { client, on_demand: false } = &run.mesh else { panic!("{:?}", run.mesh) };
        assert_eq!(client.plane.address.to_string(), "https://istiod.istio-system.svc:15012");
        assert_eq!(client.plane.cluster, "east");
        assert_eq!(client.plane.headers.len(), 1);
        assert_eq!(client.plane.token, grpc::Token::File("./var/run/secrets/tokens/istio-token".into()));
        assert_eq!(client.cache, Some("/var/run/ztunnel/mesh.cache".into()));
        assert_eq!(client.identity.instance_ip.as_deref(), Some("10.0.0.9"));
        let authority = run.authority.as_ref().unwrap();
        assert_eq!(authority.planes[0].address.to_string(), "https://istiod-canary.istio-system.svc:15012");
        assert!(authority.impersonate && authority.planes[0].headers.is_empty());
        assert_eq!(&*run.places.node, "node-1");
        let own = run.self_pod.as_ref().unwrap();
        assert_eq!(own.identity.as_str(), "spiffe://example.org/ns/istio-system/sa/ztunnel");
        assert_eq!(own.workload.to_string(), "ztunnel.istio-system (ztunnel-x)");
        assert_eq!(run.places.run_dir, Path::new("/var/run/ztunnel"));
        let zds = run.zds.as_ref().unwrap();
        assert_eq!(zds.socket, Path::new("/var/run/ztunnel/ztunnel.sock"));
        assert_eq!(zds.listeners.settings.mark, 7);
        let dns = zds.dns.as_ref().unwrap();
        assert_eq!((dns.mark, dns.ipv6, dns.address), (7, false, None));
        assert_eq!(dns.names, dns::answer::Config::new("cluster.local", None, false));
        assert_eq!((run.ready_addr.to_string(), run.admin_port), ("0.0.0.0:15021".to_owned(), 15000));
        assert_eq!(run.drain_deadline, Duration::from_secs(25));
        assert_eq!(run.crl.as_deref(), Some(Path::new("/crl.pem")));
        assert_eq!(run.compliance, ztunnel_tls::provider::Compliance::Pqc);
        assert!(!run.proxy.same_node);
    }

    #[test]
    fn dns_is_as_the_variables_say() {
        let dns = |variables: &[(&str, &str)]| {
            let all = [&[("NODE_NAME", "n")], variables].concat();
            configured(&all).unwrap().zds.unwrap().dns
        };
        assert_eq!(dns(&[("ISTIO_META_DNS_CAPTURE", "false")]), None);
        let other = dns(&[
            ("CLUSTER_DOMAIN", "example.org"),
            ("PREFERED_SERVICE_NAMESPACE", "shop"),
            ("DNS_PROXY_ADDR", "127.0.0.1:53"),
        ]);
        let other = other.unwrap();
        assert_eq!(other.names, dns::answer::Config::new("example.org", Some("shop"), true));
        assert_eq!(other.address, Some("127.0.0.1:53".parse().unwrap()));
        assert_eq!(dns(&[]).unwrap().mark, 1337);
    }

    #[test]
    fn an_empty_address_is_no_control_plane() {
        let run = configured(&[("XDS_ADDRESS", ""), ("NODE_NAME", "n"), ("ZTUNNEL_MESH_CACHE", "")]).unwrap();
        assert!(matches!(run.mesh, Source::Nothing));
        assert_eq!(run.self_pod, None, "it does not know its own pod");
    }

    #[test]
    fn a_workload_of_its_own_is_who_it_is() {
        let run = configured(&[
            ("PROXY_MODE", "dedicated"),
            ("PROXY_WORKLOAD_INFO", "shop/cart-1/cart"),
            ("POD_NAME", "ztunnel-x"),
            ("POD_NAMESPACE", "istio-system"),
            ("SERVICE_ACCOUNT", "ztunnel"),
        ]);
        let run = run.unwrap();
        assert!(run.zds.is_none() && run.self_pod.is_none() && !run.authority.unwrap().impersonate);
        let dedicated = run.dedicated.unwrap();
        assert_eq!(dedicated.workload.to_string(), "cart.shop (cart-1)");
        assert_eq!(dedicated.listeners.settings.client_address, ClientAddress::Hidden);
        assert_eq!(dedicated.listeners.settings.mark, 0);
    }

    #[test]
    fn nothing_is_asked_in_clear() {
        for name in ["XDS_ADDRESS", "CA_ADDRESS"] {
            let error = configured(&[(name, "http://istiod:15010"), ("NODE_NAME", "n")]).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
