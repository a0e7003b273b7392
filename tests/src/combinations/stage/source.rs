//! Where the daemons have the mesh from, and what it goes through there: files of Kubernetes' objects, or istiod.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, ensure};
use ztunnel_proto::security::{self, Authorization};
use ztunnel_proto::workload::{self, gateway_address};

use super::cast::{self, BEYOND, GUARDED, Services};
use super::envoy;
use crate::combinations::axes::{Family, Mesh};
use crate::istiod::{self, ADDRESS, AUTHORIZATION, Change};
use crate::mesh::{MESHED, PLAIN};
use crate::poll::{PATIENCE, eventually};
use crate::process::Process;
use crate::redirect::Backend;
use crate::testbed::istio::{Istio, identity};
use crate::testbed::{BOTH, On, Testbed};
use crate::topology::Pod;
use crate::wire::HBONE_PORT;

/// The network of everybody but one, and that one's.
const NEAR: &str = "near";
const FAR: &str = "far";
const GATEWAY_NAMESPACE: &str = "istio-system";
const GATEWAY: &str = "gateway";
/// An object that no daemon takes, and with it none of what is written beside it.
const BROKEN: &str =
    "apiVersion: v1\nkind: Service\nmetadata:\n  name: broken\n  namespace: demo\nspec: [no, object]\n";

/// Where the mesh is.
pub(super) enum Source {
    /// In the testbed's files.
    Files,
    /// In istiod.
    Istiod(Box<Published>),
}

/// What istiod says, and who stands between pods.
pub(super) struct Published {
    // Ends before the pods it is in.
    _envoys: [Process; 2],
    istio: Istio,
    /// The pod in front of another one.
    pub(super) way: Pod,
    /// The pod in front of a network.
    pub(super) gate: Pod,
    /// The pod behind the first.
    pub(super) guarded: Pod,
    /// The pod behind the second.
    pub(super) beyond: Pod,
    /// Whom policies select.
    servers: Vec<workload::Workload>,
}

impl Source {
    /// Denies a service account at all servers in the mesh.
    pub(super) fn deny(&self, testbed: &Testbed, account: &str) -> Result<()> {
        match self {
            Self::Files => {
                for app in [&testbed.server, &testbed.near] {
                    testbed.mesh.deny(&format!("no-{}", app.name), &app.name, account)?;
                }
                testbed.wait_carried_out()
            }
            Self::Istiod(published) => published.select(&denial(account)),
        }
    }

    /// Back to no policy.
    pub(super) fn no_policies(&self, testbed: &Testbed) -> Result<()> {
        match self {
            Self::Files => {
                testbed.mesh.no_policies()?;
                testbed.wait_carried_out()
            }
            Self::Istiod(published) => published.select_nobody(),
        }
    }

    /// Has the mesh be so before connections are made.
    pub(super) fn prepare(&mut self, testbed: &mut Testbed, mesh: Mesh) -> Result<()> {
        match (self, mesh) {
            (Self::Files, Mesh::Strict) => {
                testbed.mesh.peer_authentication("STRICT")?;
                testbed.wait_carried_out()
            }
            (Self::Files, Mesh::SourceAway) => {
                let files = testbed.mesh.path();
                Ok(std::fs::rename(files, files.with_extension("away"))?)
            }
            (Self::Files, Mesh::Rejected) => {
                let logs = BOTH.map(|on| testbed.setting(on).log());
                let marks = logs.each_ref().map(|log| log.mark());
                testbed.mesh.write("broken", BROKEN)?;
                for (log, mark) in logs.iter().zip(marks) {
                    log.wait_line(mark, PATIENCE, "the broken object", |line| line.contains("broken"))?;
                }
                Ok(())
            }
            (Self::Istiod(published), Mesh::Strict) => published.select(&strict()),
            (Self::Istiod(published), Mesh::SourceAway) => {
                published.istio.discovery.stop();
                Ok(())
            }
            (Self::Istiod(published), Mesh::Rejected) => {
                let bad: Vec<Change> = published.servers.iter().map(bad).collect();
                published.istio.discovery.push(&bad)
            }
            (Self::Istiod(published), Mesh::NeverGood) => {
                let server = published.servers.first().context("no server")?;
                published.istio.discovery.push(&[Change::remove(ADDRESS, &server.uid)])?;
                published.istio.discovery.push(&[bad(server)])
            }
            (Self::Istiod(published), Mesh::Stale) => {
                published.istio.discovery.stop();
                for on in BOTH {
                    testbed.kill_daemon(on)?;
                }
                BOTH.into_iter().try_for_each(|on| testbed.start_daemon(on))
            }
            (source, Mesh::Denied) => source.deny(testbed, "client"),
            _ => Ok(()),
        }
    }

    /// Takes that back.
    pub(super) fn undo(&mut self, testbed: &Testbed, mesh: Mesh) -> Result<()> {
        match (self, mesh) {
            (Self::Files, Mesh::SourceAway) => {
                let files = testbed.mesh.path();
                std::fs::rename(files.with_extension("away"), files)?;
                testbed.wait_carried_out()
            }
            (Self::Files, Mesh::Rejected) => {
                testbed.mesh.remove("broken")?;
                testbed.wait_carried_out()
            }
            (Self::Istiod(published), Mesh::SourceAway | Mesh::Stale) => {
                let discovery = &mut published.istio.discovery;
                testbed.a.place.netns.enter(|| discovery.restart())?;
                eventually(PATIENCE, || {
                    let answered = discovery.answered();
                    ensure!(answered == BOTH.len(), "{answered} daemons are back");
                    Ok(())
                })
            }
            (Self::Istiod(published), Mesh::Rejected | Mesh::NeverGood) => {
                let good: Vec<Change> = published.servers.iter().cloned().map(Change::workload).collect();
                published.istio.discovery.push(&good)
            }
            (_, Mesh::Stable | Mesh::NoEndpoint) => Ok(()),
            (source, _) => source.no_policies(testbed),
        }
    }
}

impl Published {
    /// Has a testbed be one of istiod's, with all that is to be in it. Before the daemons start.
    pub(super) fn publish(
        testbed: &mut Testbed,
        backend: Backend,
        services: &Services,
        bystander: &Pod,
    ) -> Result<Self> {
        let [guarded, beyond] = [testbed.add_meshed(On::B, GUARDED)?, testbed.add_meshed(On::B, BEYOND)?];
        let [way, gate] = [testbed.b.add_pod(&testbed.run, "way")?, testbed.b.add_pod(&testbed.run, "gate")?];
        let istio = testbed.under_istio_by(backend)?;
        // Idle connections are probed sooner, and what may be held is soon held.
        for (name, value) in [
            ("KEEPALIVE_TIME", "2s"),
            ("KEEPALIVE_INTERVAL", "1s"),
            ("KEEPALIVE_RETRIES", "3"),
            ("ZTUNNEL_BUFFER_MEMORY", super::BUFFERS),
        ] {
            testbed.start_with_variable(name, value);
        }
        for pod in [&testbed.outsider, &testbed.outside] {
            istio.discovery.remove(ADDRESS, &istiod::workload(pod).uid);
        }
        let behind = |workload: workload::Workload| member(services, workload);
        let servers = vec![
            behind(at_home(&testbed.server)),
            behind(at_home(&testbed.near)),
            behind(workload::Workload {
                network: FAR.to_owned(),
                network_gateway: gateway(FAR, gate.v4),
                ..at_home(&beyond)
            }),
        ];
        let nobody = |name: &str, at: fn(Family) -> IpAddr| workload::Workload {
            uid: format!("Kubernetes//Pod/{MESHED}/{name}"),
            name: name.to_owned(),
            addresses: [Family::V4, Family::V6].map(|family| octets(at(family)).into()).to_vec(),
            service_account: name.to_owned(),
            workload_name: name.to_owned(),
            canonical_name: name.to_owned(),
            ..at_home(&testbed.server)
        };
        let mut workloads = servers.clone();
        workloads.extend([at_home(&testbed.client), at_home(&testbed.other)]);
        workloads.push(behind(workload::Workload { waypoint: gateway(NEAR, way.v4), ..at_home(&guarded) }));
        workloads.push(workload::Workload { native_tunnel: true, ..at_home(&way) });
        workloads.push(workload::Workload {
            uid: format!("NetworkGateway/{FAR}/{}/{HBONE_PORT}", gate.v4),
            name: GATEWAY.to_owned(),
            namespace: GATEWAY_NAMESPACE.to_owned(),
            network: FAR.to_owned(),
            service_account: GATEWAY.to_owned(),
            addresses: vec![gate.v4.octets().to_vec().into()],
            tunnel_protocol: workload::TunnelProtocol::Hbone.into(),
            ..workload::Workload::default()
        });
        workloads.push(behind(nobody("ghost", cast::ghost)));
        workloads.push(behind(outside(nobody("nobody", cast::nobody))));
        for pod in [&testbed.outsider, &testbed.outside, bystander] {
            workloads.push(behind(outside(at_home(pod))));
        }
        workloads.into_iter().for_each(|workload| istio.discovery.workload(workload));
        for name in services.names() {
            for mut service in published(services, name) {
                if name == GUARDED && !service.addresses.is_empty() {
                    service.waypoint = gateway(NEAR, way.v4);
                }
                if name == BEYOND {
                    service.subject_alt_names = vec![identity(MESHED, BEYOND)];
                }
                istio.discovery.service(service);
            }
        }
        let routes = [(Family::V4, guarded.v4.into()), (Family::V6, guarded.v6.into())]
            .map(|(family, pod)| (services.vip(GUARDED, family), pod));
        let passes = envoy::waypoint(testbed, &istio, &way, &identity(MESHED, &way.name), &routes)?;
        let carries = envoy::gateway(testbed, &istio, &gate, &identity(GATEWAY_NAMESPACE, GATEWAY), &beyond)?;
        let envoys = [envoy::start(testbed, &way, &passes)?, envoy::start(testbed, &gate, &carries)?];
        for envoy in &envoys {
            let listening = |pod: &Pod| {
                pod.place
                    .netns
                    .enter(|| Ok(std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, HBONE_PORT)).map(drop)?))
            };
            for pod in [&way, &gate] {
                eventually(PATIENCE, || listening(pod)).with_context(|| envoy.log().tail(3))?;
            }
        }
        Ok(Self { _envoys: envoys, istio, way, gate, guarded, beyond, servers })
    }

    /// Has this policy select every server, in one push: istiod's order.
    fn select(&self, policy: &Authorization) -> Result<()> {
        let key = format!("{}/{}", policy.namespace, policy.name);
        let selected = |server: &workload::Workload| {
            let authorization_policies = vec![key.clone()];
            Change::workload(workload::Workload { authorization_policies, ..server.clone() })
        };
        let mut changes: Vec<Change> = self.servers.iter().map(selected).collect();
        changes.push(Change::policy(policy.clone()));
        self.istio.discovery.push(&changes)
    }

    fn select_nobody(&self) -> Result<()> {
        let mut changes: Vec<Change> = self.servers.iter().cloned().map(Change::workload).collect();
        for policy in [denial("client"), denial("nobody"), strict()] {
            changes.push(Change::remove(AUTHORIZATION, &format!("{}/{}", policy.namespace, policy.name)));
        }
        self.istio.discovery.push(&changes)
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn at_home(pod: &Pod) -> workload::Workload {
    workload::Workload { network: NEAR.to_owned(), ..istiod::workload(pod) }
}

/// The same workload outside the mesh.
fn outside(workload: workload::Workload) -> workload::Workload {
    workload::Workload {
        uid: format!("Kubernetes//Pod/{PLAIN}/{}", workload.name),
        namespace: PLAIN.to_owned(),
        tunnel_protocol: workload::TunnelProtocol::None.into(),
        ..workload
    }
}

fn gateway(network: &str, ip: Ipv4Addr) -> Option<workload::GatewayAddress> {
    let address = workload::NetworkAddress {
        network: network.to_owned(),
        address: ip.octets().to_vec().into(),
        ..workload::NetworkAddress::default()
    };
    let destination = Some(gateway_address::Destination::Address(address));
    Some(workload::GatewayAddress { destination, hbone_mtls_port: HBONE_PORT.into() })
}

fn port_list(services: &Services, name: &str) -> Vec<workload::Port> {
    let port = |target: u16| workload::Port {
        service_port: services.port(name, target).into(),
        target_port: target.into(),
        ..workload::Port::default()
    };
    cast::ports().map(port).collect()
}

/// The workload behind the services of its name.
fn member(services: &Services, mut workload: workload::Workload) -> workload::Workload {
    let name = workload.name.clone();
    if !services.names().any(|known| known == name) {
        return workload;
    }
    for host in [services.host(&name), services.headless_host(&name)] {
        let key = format!("{}/{host}", services.namespace(&name));
        workload.services.insert(key, workload::PortList { ports: port_list(services, &name) });
    }
    workload
}

/// Both services of a name.
fn published(services: &Services, name: &str) -> [workload::Service; 2] {
    let service =
        |prefix: &str, hostname: String, addresses: Vec<workload::NetworkAddress>| workload::Service {
            name: format!("{prefix}-{name}"),
            namespace: services.namespace(name).to_owned(),
            hostname,
            addresses,
            ports: port_list(services, name),
            canonical: true,
            ..workload::Service::default()
        };
    let vips = [Family::V4, Family::V6].map(|family| workload::NetworkAddress {
        network: NEAR.to_owned(),
        address: octets(services.vip(name, family)).into(),
        ..workload::NetworkAddress::default()
    });
    [
        service("by-name", services.host(name), vips.to_vec()),
        service("headless", services.headless_host(name), Vec::new()),
    ]
}

/// A version of a workload that every daemon rejects.
fn bad(workload: &workload::Workload) -> Change {
    let tunnel_protocol = workload::TunnelProtocol::LegacyIstioMtls.into();
    Change::workload(workload::Workload { tunnel_protocol, ..workload.clone() })
}

fn policy(namespace: &str, name: &str, matching: security::Match) -> Authorization {
    Authorization {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        scope: security::Scope::WorkloadSelector.into(),
        action: security::Action::Deny.into(),
        rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![matching] }] }],
        ..Authorization::default()
    }
}

fn denial(account: &str) -> Authorization {
    let exact = security::string_match::MatchType::Exact(format!("cluster.local/ns/{MESHED}/sa/{account}"));
    let principals = vec![security::StringMatch { match_type: Some(exact) }];
    policy(MESHED, &format!("no-{account}"), security::Match { principals, ..security::Match::default() })
}

/// What istiod makes of a namespace that is STRICT.
fn strict() -> Authorization {
    let presence = security::string_match::MatchType::Presence(());
    let not_principals = vec![security::StringMatch { match_type: Some(presence) }];
    let matching = security::Match { not_principals, ..security::Match::default() };
    policy("istio-system", "istio_converted_static_strict", matching)
}
