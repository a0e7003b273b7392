//! The plan for one outbound connection.

use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::mesh::index::Mesh;
use crate::model::addr::HBONE_PORT;
use crate::model::addr::HbonePeer;
use crate::model::addr::OriginalDst;
use crate::model::addr::canonical;
use crate::model::identity::SpiffeId;
use crate::model::service::Service;
use crate::model::workload::Reach;
use crate::model::workload::Workload;
use crate::route::balance;

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
        /// What to ask it for: the address and port of the destination.
        target: SocketAddr,
        /// The destination.
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
}

/// Where the connection of `source` to `dst` goes. Pure: the same snapshot and `roll`, the same plan.
/// `roll` is the connection's one random number, used to balance.
///
/// A service's virtual address comes before a workload's own; what neither is passes through untouched.
pub fn plan(mesh: &Mesh, source: &Workload, dst: OriginalDst, roll: u64) -> Result<Plan, NoRoute> {
    let wanted = canonical(dst.0);
    if RESERVED_PORTS.contains(&wanted.port()) && is_own(source, wanted.ip()) {
        return Err(NoRoute::SelfCall(wanted));
    }
    if let Some(service) = mesh.service_at(wanted.ip()) {
        return to_service(service, wanted, roll);
    }
    Ok(match mesh.workload_at(wanted.ip()) {
        Some(workload) => to_workload(workload, wanted, None),
        None => Plan::Plain { to: wanted, destination: None, service: None },
    })
}

fn is_own(source: &Workload, ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified() || source.addresses.contains(&ip)
}

fn to_service(service: &Arc<Service>, wanted: SocketAddr, roll: u64) -> Result<Plan, NoRoute> {
    let port = wanted.port();
    if !service.ports.iter().any(|known| known.port == port) {
        return Err(NoRoute::NoServicePort { hostname: Arc::clone(&service.hostname), port });
    }
    let chosen = balance::pick(service, port, roll).and_then(|(endpoint, target)| {
        let ip = balance::address(&endpoint.workload, wanted.ip())?;
        Some((&endpoint.workload, SocketAddr::new(ip, target)))
    });
    match chosen {
        Some((workload, target)) => Ok(to_workload(workload, target, Some(service))),
        None => Err(NoRoute::NoHealthyUpstream {
            hostname: Arc::clone(&service.hostname),
            port,
            endpoints: service.endpoints.len(),
        }),
    }
}

fn to_workload(workload: &Arc<Workload>, target: SocketAddr, service: Option<&Arc<Service>>) -> Plan {
    let destination = Arc::clone(workload);
    let service = service.map(Arc::clone);
    match workload.reach {
        Reach::Hbone => Plan::Hbone {
            peer: HbonePeer(SocketAddr::new(target.ip(), HBONE_PORT)),
            expect: vec![workload.identity.clone()],
            target,
            destination,
            service,
        },
        Reach::Plain => Plan::Plain { to: target, destination: Some(destination), service },
    }
}
