//! Istio's environment → what each module is given: `ztunnel proxy`.

use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::path::Path;

use crate::api::Setting;
use crate::capture;
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
use crate::config::resolved::Source;
use crate::config::resolved::Zds;
use crate::identity::istiod;
use crate::net::redirected;
use crate::net::redirected::ClientAddress;
use crate::net::socket::Keepalive;
use crate::tls::grpc;
use crate::tls::grpc::InvalidAddress;
use crate::xds::client;

/// The port of readiness, which Istio does not let be changed.
const READINESS_PORT: u16 = 15021;

/// Completes `settings` by what this machine has.
pub fn run(settings: Settings) -> Result<Run, Invalid> {
    let Settings { own, control_plane, in_pod, data_plane, .. } = settings;
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
    let any = |port| -> SocketAddr {
        match in_pod.ipv6 && Path::new("/proc/net/if_inet6").exists() {
            true => (Ipv6Addr::UNSPECIFIED, port).into(),
            false => (Ipv4Addr::UNSPECIFIED, port).into(),
        }
    };
    let kernel =
        resolved::unused_kernel(Some(own.node).filter(|node| !node.is_empty()), in_pod.run_dir.clone());
    Ok(Run {
        places: resolved::places_without_capture(&kernel)?,
        mesh,
        // Of the embedded authority, which is not used.
        state_dir: in_pod.run_dir.clone(),
        authority: Some(istiod::Config {
            planes: vec![authority],
            life: control_plane.secret_ttl,
            impersonate: true,
        }),
        crl: settings.demands.crl,
        compliance: settings.demands.compliance,
        drain_deadline: settings.drain_deadline,
        metrics_addr: any(settings.stats_port),
        ready_addr: any(READINESS_PORT),
        zds: Some(zds(in_pod, &data_plane.keepalive)),
        admin_port: settings.admin_port,
        settings: settings.shown.iter().map(Setting::from).collect(),
        warnings: settings.warnings.iter().map(Ineffective::to_string).collect(),
        proxy: data_plane,
        log_format: settings.log_format,
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

fn zds(in_pod: InPod, keepalive: &Keepalive) -> Zds {
    let settings = redirected::Settings {
        mark: in_pod.packet_mark,
        client_address: match in_pod.original_source {
            None => ClientAddress::Preferred,
            Some(true) => ClientAddress::Required,
            Some(false) => ClientAddress::Hidden,
        },
        keepalive: keepalive.clone(),
    };
    let listeners = capture::rules::Config { share_ports: in_pod.port_reuse, ipv6: in_pod.ipv6, settings };
    Zds { socket: in_pod.socket, listeners }
}
