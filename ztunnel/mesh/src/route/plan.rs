//! The plan for one outbound connection.

use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::model::addr::Authority;
use crate::model::addr::HBONE_PORT;
use crate::model::addr::HbonePeer;
use crate::model::addr::OriginalDst;
use crate::model::addr::canonical;
use crate::model::identity::SpiffeId;
use crate::model::refused::Refused;
use crate::model::service::BalanceMode;
use crate::model::service::GatewayAddress;
use crate::model::service::Service;
use crate::model::workload::Reach;
use crate::model::workload::Workload;
use crate::route::balance;
use crate::route::balance::At;
use crate::route::balance::Front;
use crate::route::balance::Picked;
use crate::route::balance::Purpose;
use crate::route::balance::Request;
use crate::route::gateway::Gateway;
use crate::route::gateway::is_before;
use crate::route::gateway::is_gateway;
use crate::route::gateway::resolve;
use crate::store::index::Mesh;

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
    /// Through a tunnel to the gateway of another network, and in that one to whoever serves the service there. That
    /// one must prove to be one of the service's own identities ([`Service::identities`]: there is one).
    DoubleHbone {
        /// Whom to dial: the gateway.
        gateway: HbonePeer,
        /// The identities acceptable of it.
        expect: Vec<SpiffeId>,
        /// The service the application dialled: it is asked for by its name.
        service: Arc<Service>,
        /// The service's port.
        port: u16,
        /// The destination, or the waypoint in front of it, as far as this network knows it.
        destination: Arc<Workload>,
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

/// What the mesh knows of where an outbound connection goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Planned {
    /// All.
    Known(Plan),
    /// All but the address: that is for a resolver to say.
    ByName(ByName),
}

/// An endpoint that has no address, but a name ([`Workload::hostname`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ByName {
    /// The endpoint.
    pub destination: Arc<Workload>,
    /// Its port.
    pub port: u16,
    /// The service the application dialled.
    pub service: Arc<Service>,
}

impl ByName {
    /// The plan, where the name stands for `addresses`: to any of the family of `wanted`, which was dialled, else to any.
    /// `roll` picks. `None` if there is no address.
    pub fn plan(&self, addresses: &[IpAddr], wanted: IpAddr, roll: u64) -> Option<Result<Plan, NoRoute>> {
        let same = || addresses.iter().filter(|ip| ip.is_ipv4() == wanted.is_ipv4());
        let nth = |count: usize| balance::below(roll, count as u64) as usize;
        let ip = same().nth(nth(same().count())).or_else(|| addresses.get(nth(addresses.len())))?;
        Some(to_workload(&self.destination, SocketAddr::new(*ip, self.port), Some(&self.service)))
    }
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
    /// What was dialled is in the mesh, and what the control plane says of it cannot be taken: it is not known how to
    /// speak to it, and it is not spoken to in the clear for that.
    #[error("{} is not dialled, as it was rejected when it came from the control plane: {}", .0.name, .0.reason)]
    Refused(Arc<Refused>),
    /// The service has waypoints in front of it, and none of them has any weight. Without one the connection goes
    /// nowhere.
    #[error("none of the waypoints of {hostname} has a weight")]
    NoWaypoint {
        /// The service's full name.
        hostname: Arc<str>,
    },
    /// It is served in another network that has a gateway the mesh does not know, or that nobody serves.
    #[error("unknown network gateway {}", .0.destination)]
    UnknownGateway(Arc<GatewayAddress>),
    /// It is served in another network, and nothing says who may serve it there. Nobody is believed then.
    #[error("no identity is known that {hostname} may have in another network")]
    NobodyExpected {
        /// The service's full name.
        hostname: Arc<str>,
    },
    /// It is served in another network, where services are asked for by name, and it has none that can be asked for.
    #[error("{hostname:?} is no name to ask another network for")]
    NoName {
        /// The service's full name.
        hostname: Arc<str>,
    },
    /// It could be served in another network only, to which there is no way.
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
/// that of the workload if its own was. One that dials what it is itself in front of is not sent to itself.
pub fn plan(mesh: &Mesh, source: &Workload, dst: OriginalDst, roll: u64) -> Result<Planned, NoRoute> {
    let wanted = canonical(dst.0);
    if RESERVED_PORTS.contains(&wanted.port()) && is_own(source, wanted.ip()) {
        return Err(NoRoute::SelfCall(wanted));
    }
    if let Some(refused) = mesh.refused_at(&source.network, wanted.ip(), Some(&source.namespace)) {
        return Err(NoRoute::Refused(Arc::clone(refused)));
    }
    if let Some(service) = mesh.service_at(&source.network, wanted.ip(), Some(&source.namespace)) {
        return match balance::front(service, roll) {
            Front::Waypoint(gateway) if !is_before(mesh, source, service) => {
                to_waypoint(mesh, source, gateway, wanted, Some(service), roll).map(Planned::Known)
            }
            Front::Waypoint(_) | Front::Nothing => to_service(mesh, source, service, wanted, roll),
            Front::Nobody => Err(NoRoute::NoWaypoint { hostname: Arc::clone(&service.hostname) }),
        };
    }
    to_address(mesh, source, wanted, None, roll).map(Planned::Known)
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
) -> Result<Planned, NoRoute> {
    if service.balance_mode() == BalanceMode::Passthrough {
        return to_address(mesh, source, wanted, Some(service), roll).map(Planned::Known);
    }
    let port = wanted.port();
    if service.port(port).is_none() {
        return Err(NoRoute::NoServicePort { hostname: Arc::clone(&service.hostname), port });
    }
    let endpoints = mesh.endpoints(&service.key);
    let request = Request { source, service, port, wanted: wanted.ip(), purpose: Purpose::Service };
    match balance::pick(endpoints, &request, roll) {
        Some(Picked { workload, at: At::Address(at) }) => {
            to_workload(workload, at, Some(service)).map(Planned::Known)
        }
        Some(Picked { workload, at: At::Name(port) }) => {
            let (destination, service) = (Arc::clone(workload), Arc::clone(service));
            Ok(Planned::ByName(ByName { destination, port, service }))
        }
        Some(Picked { workload, at: At::OtherNetwork }) => {
            double_hbone(mesh, source, workload, service, wanted, roll).map(Planned::Known)
        }
        None if endpoints.iter().any(|endpoint| is_out_of_reach(source, endpoint.workload())) => {
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
    let found = locate(mesh, source, gateway, wanted, Purpose::Waypoint, roll).ok_or_else(unknown)?;
    let Located { front, workload, at } = found;
    let Some(at) = at else {
        return match service {
            Some(service) => double_hbone(mesh, source, workload, service, wanted, roll),
            // There is no name to ask for.
            None => Err(NoRoute::OtherNetwork { hostname: Arc::from(gateway.destination.to_string()) }),
        };
    };
    Ok(Plan::Hbone {
        peer: HbonePeer(at),
        expect: acceptable(front, workload),
        target: wanted,
        destination: Arc::clone(workload),
        service: service.map(Arc::clone),
    })
}

/// The gateway of the network where `workload` is, which is asked for `service`.
fn double_hbone(
    mesh: &Mesh,
    source: &Workload,
    workload: &Arc<Workload>,
    service: &Arc<Service>,
    wanted: SocketAddr,
    roll: u64,
) -> Result<Plan, NoRoute> {
    let hostname = || Arc::clone(&service.hostname);
    let Some(gateway) = &workload.network_gateway else {
        return Err(NoRoute::OtherNetwork { hostname: hostname() });
    };
    if service.identities.is_empty() {
        return Err(NoRoute::NobodyExpected { hostname: hostname() });
    }
    if !Authority::is_host(&service.hostname) {
        return Err(NoRoute::NoName { hostname: hostname() });
    }
    let found = locate(mesh, source, gateway, wanted, Purpose::Gateway, roll);
    let Some(Located { front, workload: before, at: Some(at) }) = found else {
        return Err(NoRoute::UnknownGateway(Arc::clone(gateway)));
    };
    Ok(Plan::DoubleHbone {
        gateway: HbonePeer(at),
        expect: acceptable(front, before),
        service: Arc::clone(service),
        port: wanted.port(),
        destination: Arc::clone(workload),
    })
}

fn is_out_of_reach(source: &Workload, workload: &Workload) -> bool {
    workload.network != source.network && workload.network_gateway.is_none()
}

/// One of the workloads that a gateway is.
struct Located<'a> {
    /// The service they are behind, if it is one.
    front: Option<&'a Service>,
    workload: &'a Arc<Workload>,
    /// Its address; `None` if it is a waypoint in another network.
    at: Option<SocketAddr>,
}

/// `None` if the mesh does not know it, or nobody serves it.
fn locate<'a>(
    mesh: &'a Mesh,
    source: &Workload,
    gateway: &GatewayAddress,
    wanted: SocketAddr,
    purpose: Purpose,
    roll: u64,
) -> Option<Located<'a>> {
    let port = gateway.hbone_port;
    match resolve(mesh, gateway)? {
        Gateway::Service(front) => {
            let request = Request { source, service: front, port, wanted: wanted.ip(), purpose };
            let Picked { workload, at } = balance::pick(mesh.endpoints(&front.key), &request, roll)?;
            let at = match at {
                At::Address(at) => Some(at),
                At::Name(_) | At::OtherNetwork => None,
            };
            Some(Located { front: Some(&**front), workload, at })
        }
        // One without weight gets nothing, as among the endpoints of a service.
        Gateway::Workload(workload) if workload.capacity == 0 => None,
        Gateway::Workload(workload) => {
            let same_network = purpose == Purpose::Gateway || workload.network == source.network;
            let at = || balance::address(workload, wanted.ip(), None).map(|ip| SocketAddr::new(ip, port));
            let at = if same_network { Some(at()?) } else { None };
            Some(Located { front: None, workload, at })
        }
    }
}

/// The identities acceptable of `workload`: its own first, and what its service may present.
fn acceptable(service: Option<&Service>, workload: &Workload) -> Vec<SpiffeId> {
    let others = service.map(|service| &service.identities[..]).unwrap_or_default();
    let mut all = Vec::with_capacity(1 + others.len());
    all.push(workload.identity.clone());
    all.extend(others.iter().filter(|other| **other != workload.identity).cloned());
    all
}
