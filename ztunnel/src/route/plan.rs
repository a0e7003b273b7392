//! The plan for one outbound connection.

use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::mesh::index::Mesh;
use crate::model::addr::HBONE_PORT;
use crate::model::addr::HbonePeer;
use crate::model::addr::NetworkAddress;
use crate::model::addr::OriginalDst;
use crate::model::addr::canonical;
use crate::model::identity::SpiffeId;
use crate::model::service::BalanceMode;
use crate::model::service::GatewayAddress;
use crate::model::service::GatewayDestination;
use crate::model::service::Service;
use crate::model::workload::Reach;
use crate::model::workload::Workload;
use crate::route::balance;
use crate::route::balance::Picked;
use crate::route::balance::Purpose;
use crate::route::balance::Request;

/// The ports of a captured pod on which the daemon itself listens: outbound, inbound, HBONE. Nothing may be
/// delivered there, or a connection would come back to the daemon for ever.
pub const RESERVED_PORTS: [u16; 3] = [15001, 15006, HBONE_PORT];

/// Where one outbound connection goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// Through a tunnel to `peer`, who must prove to be one of `expect`. Never in the clear.
    Hbone {
        /// Whom to dial.
        peer: HbonePeer,
        /// The identities acceptable of it.
        expect: Vec<SpiffeId>,
        /// What to ask it for: the address and port of the destination, or, of a waypoint, what was dialled.
        target: SocketAddr,
        /// The destination, or the waypoint in front of it.
        destination: Arc<Workload>,
        /// The service the application dialled, if it dialled one.
        service: Option<Arc<Service>>,
    },
    /// Over plain TCP: the destination is outside the mesh.
    Plain {
        /// Whom to dial.
        to: SocketAddr,
        /// The destination, if the mesh knows it.
        destination: Option<Arc<Workload>>,
        /// The service the application dialled, if it dialled one.
        service: Option<Arc<Service>>,
    },
}

/// Why a connection goes nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoRoute {
    /// The application dialled the daemon's own port in its pod.
    #[error("attempted recursive call to ourselves: {0} is a port of the proxy")]
    SelfCall(SocketAddr),
    /// The service is known, and it has no such port.
    #[error("service {hostname} has no port {port}")]
    NoServicePort {
        /// The service's full name.
        hostname: Arc<str>,
        /// The port the application dialled.
        port: u16,
    },
    /// The service is known, and nobody behind it can take the connection. It does not go to the address as it
    /// is: that could leave the mesh.
    #[error(
        "no healthy upstream: none of the {endpoints} endpoints of {hostname} is healthy and serves port {port}"
    )]
    NoHealthyUpstream {
        /// The service's full name.
        hostname: Arc<str>,
        /// The port the application dialled.
        port: u16,
        /// How many endpoints it has, healthy or not.
        endpoints: usize,
    },
    /// What was dialled has a waypoint in front of it that the mesh does not know, or that nobody serves. Without it
    /// the connection goes nowhere.
    #[error("unknown waypoint {}", .0.destination)]
    UnknownWaypoint(Arc<GatewayAddress>),
    /// It could be served in another network only, to which this proxy has no way.
    #[error("{hostname} is in another network, which cannot be reached")]
    OtherNetwork {
        /// The service's full name, or the waypoint's.
        hostname: Arc<str>,
    },
    /// The workload is reached by a protocol that this version does not know.
    #[error("workload {0} is reached by a protocol that this version does not know")]
    UnknownProtocol(Arc<str>),
}

/// Where the connection of `source` to `dst` goes. Pure: the same snapshot and `roll`, the same plan.
/// `roll` is the connection's one random number, used to balance.
///
/// A service's virtual address comes before a workload's own; what neither is passes through untouched. A waypoint in
/// front of what was dialled gets the connection in its place: that of the service if a virtual address was dialled,
/// that of the workload if its own was.
pub fn plan(mesh: &Mesh, source: &Workload, dst: OriginalDst, roll: u64) -> Result<Plan, NoRoute> {
    let wanted = canonical(dst.0);
    if RESERVED_PORTS.contains(&wanted.port()) && is_own(source, wanted.ip()) {
        return Err(NoRoute::SelfCall(wanted));
    }
    if let Some(service) = mesh.service_at(&source.network, wanted.ip(), Some(&source.namespace)) {
        return match balance::waypoint(service, roll) {
            Some(gateway) => to_waypoint(mesh, source, gateway, wanted, Some(service), roll),
            None => to_service(mesh, source, service, wanted, roll),
        };
    }
    to_address(mesh, source, wanted, None, roll)
}

fn is_own(source: &Workload, ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified() || source.addresses.contains(&ip)
}

/// What was dialled is no virtual address, or one that stands for itself.
fn to_address(
    mesh: &Mesh,
    source: &Workload,
    wanted: SocketAddr,
    service: Option<&Arc<Service>>,
    roll: u64,
) -> Result<Plan, NoRoute> {
    let Some(workload) = mesh.workload_at(&source.network, wanted.ip()) else {
        return Ok(Plan::Plain { to: wanted, destination: None, service: service.map(Arc::clone) });
    };
    match &workload.waypoint {
        Some(gateway) if !is_gateway(mesh, source, gateway) => {
            to_waypoint(mesh, source, gateway, wanted, service, roll)
        }
        _ => to_workload(workload, wanted, service),
    }
}

fn to_service(
    mesh: &Mesh,
    source: &Workload,
    service: &Arc<Service>,
    wanted: SocketAddr,
    roll: u64,
) -> Result<Plan, NoRoute> {
    if service.balance_mode() == BalanceMode::Passthrough {
        return to_address(mesh, source, wanted, Some(service), roll);
    }
    let port = wanted.port();
    if service.port(port).is_none() {
        return Err(NoRoute::NoServicePort { hostname: Arc::clone(&service.hostname), port });
    }
    let endpoints = mesh.endpoints(&service.key);
    let request = Request { source, service, port, wanted: wanted.ip(), purpose: Purpose::Service };
    match balance::pick(endpoints, &request, roll) {
        Some(Picked { workload, at }) => to_workload(workload, at, Some(service)),
        None if endpoints.iter().any(|endpoint| endpoint.workload().network != source.network) => {
            Err(NoRoute::OtherNetwork { hostname: Arc::clone(&service.hostname) })
        }
        None => Err(NoRoute::NoHealthyUpstream {
            hostname: Arc::clone(&service.hostname),
            port,
            endpoints: endpoints.len(),
        }),
    }
}

/// The workload itself at `target`.
fn to_workload(
    workload: &Arc<Workload>,
    target: SocketAddr,
    service: Option<&Arc<Service>>,
) -> Result<Plan, NoRoute> {
    let destination = Arc::clone(workload);
    let service = service.map(Arc::clone);
    match workload.reach {
        Reach::Hbone => Ok(Plan::Hbone {
            peer: HbonePeer(SocketAddr::new(target.ip(), HBONE_PORT)),
            expect: acceptable(service.as_deref(), workload),
            target,
            destination,
            service,
        }),
        Reach::Plain => Ok(Plan::Plain { to: target, destination: Some(destination), service }),
        Reach::Unknown => Err(NoRoute::UnknownProtocol(Arc::clone(&workload.uid))),
    }
}

/// The waypoint, which is asked for what was dialled.
fn to_waypoint(
    mesh: &Mesh,
    source: &Workload,
    gateway: &Arc<GatewayAddress>,
    wanted: SocketAddr,
    service: Option<&Arc<Service>>,
    roll: u64,
) -> Result<Plan, NoRoute> {
    let unknown = || NoRoute::UnknownWaypoint(Arc::clone(gateway));
    let (front, workload, at) = match resolve(mesh, gateway).ok_or_else(unknown)? {
        Gateway::Service(front) => {
            let port = gateway.hbone_port;
            let purpose = Purpose::Waypoint;
            let request = Request { source, service: front, port, wanted: wanted.ip(), purpose };
            let picked = balance::pick(mesh.endpoints(&front.key), &request, roll).ok_or_else(unknown)?;
            (Some(&**front), picked.workload, picked.at)
        }
        Gateway::Workload(workload) => {
            let ip = balance::address(workload, wanted.ip(), None).ok_or_else(unknown)?;
            (None, workload, SocketAddr::new(ip, gateway.hbone_port))
        }
    };
    if workload.network != source.network {
        let GatewayAddress { destination, .. } = &**gateway;
        return Err(NoRoute::OtherNetwork { hostname: Arc::from(destination.to_string()) });
    }
    Ok(Plan::Hbone {
        peer: HbonePeer(at),
        expect: acceptable(front, workload),
        target: wanted,
        destination: Arc::clone(workload),
        service: service.map(Arc::clone),
    })
}

/// The identities acceptable of `workload`: its own first, and what its service may present.
fn acceptable(service: Option<&Service>, workload: &Workload) -> Vec<SpiffeId> {
    let others = service.map(|service| &service.identities[..]).unwrap_or_default();
    let mut all = Vec::with_capacity(1 + others.len());
    all.push(workload.identity.clone());
    all.extend(others.iter().filter(|other| **other != workload.identity).cloned());
    all
}

/// What a gateway's address or name belongs to.
enum Gateway<'a> {
    Service(&'a Arc<Service>),
    Workload(&'a Arc<Workload>),
}

fn resolve<'a>(mesh: &'a Mesh, gateway: &GatewayAddress) -> Option<Gateway<'a>> {
    let (service, workload) = match &gateway.destination {
        GatewayDestination::Hostname(key) => {
            let by_name = || mesh.workload_by_hostname(key.hostname(), key.namespace());
            let service = mesh.service(key.as_str());
            (service, if service.is_none() { by_name() } else { None })
        }
        GatewayDestination::Address(NetworkAddress { network, ip }) => {
            (mesh.service_at(network, *ip, None), mesh.workload_at(network, *ip))
        }
    };
    service.map(Gateway::Service).or_else(|| workload.map(Gateway::Workload))
}

/// Whether `source` is that gateway, or one of several that are.
fn is_gateway(mesh: &Mesh, source: &Workload, gateway: &GatewayAddress) -> bool {
    match resolve(mesh, gateway) {
        Some(Gateway::Service(service)) => mesh.endpoints(&service.key).find(&source.uid).is_some(),
        Some(Gateway::Workload(workload)) => workload.uid == source.uid,
        None => false,
    }
}
