//! Nodes as Istio's charts make them: istiod, its node agent, and a daemon that is told everything by the environment.

use std::net::SocketAddr;

use anyhow::Result;
use ztunnel_proto::workload;

use super::{BOTH, SERVICE_IPS, Testbed};
use crate::ca::{Authority, Caller, Keys};
use crate::daemon::Chart;
use crate::istiod::{self, Istiod};
use crate::mesh::{MESHED, ROOT};
use crate::redirect::Backend;

/// Where istiod's two services are: the first node's address on the link.
const HOST: [u8; 4] = [10, 80, 0, 1];
const DISCOVERY_PORT: u16 = 15012;
const AUTHORITY_PORT: u16 = 15013;

/// The two services of istiod.
#[derive(Debug)]
pub struct Istio {
    /// The mesh.
    pub discovery: Istiod,
    /// Certificates.
    pub authority: Authority,
}

impl Testbed {
    /// Has both nodes run as under Istio: the mesh and certificates from istiod, pods from a node agent, and daemons
    /// that are started as the chart starts them. Before the daemons start.
    pub fn under_istio(&mut self) -> Result<Istio> {
        self.under_istio_by(Backend::IptablesNft)
    }

    /// The same, with rules of this kind.
    pub fn under_istio_by(&mut self, backend: Backend) -> Result<Istio> {
        self.enrol_by_agent(&BOTH, backend)?;
        let keys = Keys::new("istiod");
        let at = |port| SocketAddr::from((HOST, port));
        let istio = self.a.place.netns.enter(|| {
            let authority = Authority::start(std::sync::Arc::clone(&keys), at(AUTHORITY_PORT))?;
            Ok(Istio { discovery: Istiod::start(&keys, at(DISCOVERY_PORT))?, authority })
        })?;
        for pod in self.meshed().into_iter().chain(&self.further) {
            istio.discovery.workload(istiod::workload(pod));
        }
        for pod in [&self.outsider, &self.outside] {
            istio.discovery.workload(workload::Workload {
                tunnel_protocol: workload::TunnelProtocol::None.into(),
                ..istiod::workload(pod)
            });
        }
        for on in BOTH {
            let name = self.node(on).name.clone();
            let root = self.run.path(format!("root-{name}"));
            // As the chart mounts them; the daemon's working directory is the root of its container.
            let (certificate, token) =
                (root.join("var/run/secrets/istio"), root.join("var/run/secrets/tokens"));
            std::fs::create_dir_all(&certificate)?;
            std::fs::create_dir_all(&token)?;
            std::fs::write(certificate.join("root-cert.pem"), keys.root_pem())?;
            std::fs::write(token.join("istio-token"), format!("{}\n", token_of(&name)))?;
            let own = identity(ROOT, "ztunnel");
            // Of every pod on its node, and it is one.
            let pods = self.meshed_on(on).into_iter().map(|pod| identity(MESHED, &pod.name));
            let impersonates = pods.chain([own.clone()]).collect();
            istio.authority.admit(&token_of(&name), Caller { identity: own, impersonates });
            let agent = self.agent(on)?.path().display().to_string();
            let setting = &mut self.settings[on as usize];
            std::fs::create_dir_all(&setting.meeting)?;
            let own = |variable: &str, value: &str| (variable.to_owned(), value.to_owned());
            let environment = vec![
                own("XDS_ADDRESS", &at(DISCOVERY_PORT).to_string()),
                own("CA_ADDRESS", &at(AUTHORITY_PORT).to_string()),
                own("ALT_XDS_HOSTNAME", "istiod.istio-system.svc"),
                own("ALT_CA_HOSTNAME", "istiod.istio-system.svc"),
                own("RUST_LOG", "info"),
                own("RUST_BACKTRACE", "1"),
                own("ISTIO_META_CLUSTER_ID", "Kubernetes"),
                own("INPOD_ENABLED", "true"),
                own("TERMINATION_GRACE_PERIOD_SECONDS", "15"),
                own("POD_NAME", &format!("ztunnel-{name}")),
                own("POD_NAMESPACE", "istio-system"),
                own("NODE_NAME", &name),
                own("INSTANCE_IP", "10.80.0.9"),
                own("SERVICE_ACCOUNT", "ztunnel"),
                own("ZTUNNEL_CPU_LIMIT", "2"),
                // Two nodes of a test share a directory for their agents.
                own("INPOD_UDS", &agent),
                own("ZTUNNEL_RUN_DIR", &setting.meeting.display().to_string()),
            ];
            setting.chart = Some(Chart { root, environment, image: None });
        }
        Ok(istio)
    }
}

/// The token of a node's proxy.
pub fn token_of(node: &str) -> String {
    format!("token-of-ztunnel-{node}")
}

/// What istiod calls a service account.
pub fn identity(namespace: &str, service_account: &str) -> String {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{service_account}")
}

/// A service with cluster IPs and the port of nginx, as istiod publishes it. Workloads say by themselves that they
/// are behind it.
pub fn service(name: &str) -> workload::Service {
    let octets = |text: &str| match text.parse() {
        Ok(std::net::IpAddr::V4(address)) => address.octets().to_vec(),
        Ok(std::net::IpAddr::V6(address)) => address.octets().to_vec(),
        Err(_) => Vec::new(),
    };
    let address = |ip: &&str| workload::NetworkAddress { address: octets(ip).into(), ..Default::default() };
    let http = u32::from(super::HTTP);
    workload::Service {
        name: name.to_owned(),
        namespace: MESHED.to_owned(),
        hostname: hostname(name),
        addresses: SERVICE_IPS.iter().map(address).collect(),
        ports: vec![workload::Port { service_port: 80, target_port: http, ..Default::default() }],
        canonical: true,
        ..workload::Service::default()
    }
}

/// `workload` behind the service of this name.
pub fn behind(mut workload: workload::Workload, service: &str) -> workload::Workload {
    let http = u32::from(super::HTTP);
    let ports = vec![workload::Port { service_port: 80, target_port: http, ..Default::default() }];
    workload.services.insert(format!("{MESHED}/{}", hostname(service)), workload::PortList { ports });
    workload
}

/// A service's full name.
pub fn hostname(service: &str) -> String {
    format!("{service}.{MESHED}.svc.cluster.local")
}
