//! The application for a connection that came to its pod through a tunnel.

use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::model::addr::Authority;
use crate::model::addr::NetworkAddress;
use crate::model::addr::canonical;
use crate::model::service::Service;
use crate::model::workload::ApplicationProtocol;
use crate::model::workload::Workload;
use crate::route::gateway::is_before;
use crate::route::gateway::is_gateway;
use crate::route::meant::service_behind;
use crate::route::plan::RESERVED_PORTS;
use crate::store::index::Mesh;

/// What was asked for, where, by whom.
#[derive(Debug, Clone, Copy)]
pub struct InboundRequest<'a> {
    /// The client's address.
    pub client: IpAddr,
    /// The pod's address that was dialled.
    pub local: IpAddr,
    /// All of the pod's addresses.
    pub addresses: &'a [IpAddr],
    /// What the tunnel was asked for.
    pub authority: &'a Authority,
    /// The hostname of the service that the client says it meant.
    pub host: Option<&'a str>,
    /// The client's namespace.
    pub namespace: &'a str,
}

/// Where one inbound connection goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboundTarget {
    /// The application, as policies judge it.
    pub to: SocketAddr,
    /// The service that was asked for by its name or its address, or that the pod's port is a target of
    /// ([`service_behind`]).
    pub service: Option<Arc<Service>>,
    /// Where the client meant to go, for an application that is to be told so first (the PROXY protocol): a waypoint
    /// behind this proxy.
    pub announce: Option<SocketAddr>,
}

/// Why a connection goes nowhere in this pod.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotHere {
    /// The address is somebody else's.
    #[error("{0} is neither an address of this pod nor of what it is a waypoint for")]
    OtherAddress(SocketAddr),
    /// The address is the pod's, and not of the family in which the client came: the application could not see the
    /// client's own.
    #[error("{0} cannot be reached through the pod's address {1}, which is of another family")]
    OtherFamily(SocketAddr, IpAddr),
    /// It asked for a port of the proxy.
    #[error("attempted recursive call to ourselves: {0} is a port of the proxy")]
    SelfCall(SocketAddr),
    /// The mesh knows no service of that name.
    #[error("{0} is not the name of a service")]
    UnknownHost(Arc<str>),
    /// The pod is behind a service that the mesh does not have (yet).
    #[error("service {0} is not known (yet)")]
    UnknownService(Arc<str>),
    /// The service is served elsewhere.
    #[error("this pod is no endpoint of {0}")]
    NotAnEndpoint(Arc<str>),
    /// The pod does not serve that port of the service.
    #[error("this pod serves no port {port} of {hostname}")]
    NoPort {
        /// The service's name.
        hostname: Arc<str>,
        /// The port that was asked for.
        port: u16,
    },
    /// The application is to be told which address was meant, and the service has none.
    #[error("{0} has no address to tell the waypoint of")]
    NoAddress(Arc<str>),
    /// The application wants to be told of the connection in a way that this version does not know.
    #[error("the application wants to be told of connections in a way that this version does not know")]
    UnknownTunnel,
}

/// Where a connection goes that `workload`'s proxy was asked for. Pure.
///
/// It does not leave the pod. An address is the pod's own, or anybody's whose waypoint the pod is: then its
/// application is asked instead. A name is that of a service of which the pod is an endpoint; a waypoint that is told
/// which address was meant takes every service's.
pub fn inbound_target(
    mesh: &Mesh,
    workload: &Workload,
    asked: &InboundRequest<'_>,
) -> Result<InboundTarget, NotHere> {
    let tunnel = workload.application_tunnel;
    let tunnel_port = tunnel.and_then(|tunnel| tunnel.port);
    let announces = match tunnel.map(|tunnel| tunnel.protocol) {
        Some(ApplicationProtocol::Proxy) => true,
        Some(ApplicationProtocol::None) | None => false,
        Some(ApplicationProtocol::Unknown) => return Err(NotHere::UnknownTunnel),
    };
    let (to, service, meant) = match asked.authority {
        Authority::Address(meant) => {
            let meant = canonical(*meant);
            let own = meant.ip() == asked.local || asked.addresses.contains(&meant.ip());
            if !own && tunnel.is_none() && !is_waypoint_for(mesh, workload, meant.ip()) {
                return Err(NotHere::OtherAddress(meant));
            }
            let same_family = meant.is_ipv4() == asked.local.is_ipv4();
            if own && !same_family && tunnel.is_none() {
                return Err(NotHere::OtherFamily(meant, asked.local));
            }
            let service = if own {
                service_behind(mesh, workload, meant.port(), asked.host)
            } else {
                mesh.service_at(&workload.network, meant.ip(), Some(asked.namespace))
            };
            let ip = if own && same_family { meant.ip() } else { asked.local };
            let to = SocketAddr::new(ip, tunnel_port.unwrap_or_else(|| meant.port()));
            (to, service.map(Arc::clone), Some(meant))
        }
        Authority::Hostname { host, port } => {
            let (service, target) = named(mesh, workload, host, *port, tunnel_port)?;
            let meant = vip(service, &workload.network, asked.client).map(|ip| SocketAddr::new(ip, *port));
            (SocketAddr::new(asked.local, target), Some(Arc::clone(service)), meant)
        }
    };
    if RESERVED_PORTS.contains(&to.port()) {
        return Err(NotHere::SelfCall(to));
    }
    let announce = match (announces, meant, &service) {
        (false, ..) => None,
        (true, None, Some(service)) => return Err(NotHere::NoAddress(Arc::clone(&service.hostname))),
        (true, meant, _) => meant,
    };
    Ok(InboundTarget { to, service, announce })
}

/// Whether `workload` is the waypoint in front of whoever has `ip`.
fn is_waypoint_for(mesh: &Mesh, workload: &Workload, ip: IpAddr) -> bool {
    let network = &workload.network;
    let other = mesh.workload_at(network, ip).and_then(|other| other.waypoint.as_deref());
    other.is_some_and(|gateway| is_gateway(mesh, workload, gateway))
        || mesh.service_at(network, ip, None).is_some_and(|service| is_before(mesh, workload, service))
}

/// The service that is meant by `host`, and the port of `workload` that serves its `port`: `tunnel`, if every
/// connection is for that one.
fn named<'a>(
    mesh: &'a Mesh,
    workload: &Workload,
    host: &Arc<str>,
    port: u16,
    tunnel: Option<u16>,
) -> Result<(&'a Arc<Service>, u16), NotHere> {
    // Of several services of that name it is one of those that the pod serves: one of its own namespace first.
    let memberships = workload.services.iter().filter(|it| it.service.hostname() == &**host);
    let best = memberships.min_by_key(|it| {
        let canonical = mesh.service(it.service.as_str()).is_some_and(|service| service.canonical);
        (it.service.namespace() != &*workload.namespace, !canonical)
    });
    if let Some(membership) = best {
        let key = membership.service.as_str();
        let service = mesh.service(key).ok_or_else(|| NotHere::UnknownService(Arc::from(key)))?;
        let own = membership.ports.iter().find(|(from, _)| *from == port).map(|(_, to)| *to);
        let own = own.filter(|to| *to != 0);
        let target = || service.port(port).map(|known| known.target).filter(|target| *target != 0);
        let no_port = || NotHere::NoPort { hostname: Arc::clone(host), port };
        return Ok((service, tunnel.or(own).or_else(target).ok_or_else(no_port)?));
    }
    let service = mesh.service_by_hostname(host, Some(&workload.namespace));
    match (service, tunnel) {
        (Some(service), Some(tunnel)) => Ok((service, tunnel)),
        (Some(_), None) => Err(NotHere::NotAnEndpoint(Arc::clone(host))),
        (None, _) => Err(NotHere::UnknownHost(Arc::clone(host))),
    }
}

/// The address of `service` that a waypoint is told of: of the pod's own network and of the client's family, if there
/// is one, else of IPv4.
fn vip(service: &Service, network: &str, client: IpAddr) -> Option<IpAddr> {
    let rank = |vip: &&NetworkAddress| {
        (*vip.network != *network, vip.ip.is_ipv4() != client.is_ipv4(), !vip.ip.is_ipv4())
    };
    service.vips.iter().min_by_key(rank).map(|vip| vip.ip)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::identity::TrustDomain;
    use crate::model::service::GatewayAddress;
    use crate::model::service::GatewayDestination;
    use crate::model::service::ServiceKey;
    use crate::model::service::ServicePort;
    use crate::model::service::WeightedWaypoint;
    use crate::model::workload::ApplicationTunnel;
    use crate::model::workload::Membership;

    const POD: &str = "10.0.0.2";

    fn address(network: &str, ip: &str) -> NetworkAddress {
        NetworkAddress { network: Arc::from(network), ip: ip.parse().unwrap() }
    }

    /// The pod is its waypoint.
    fn gateway(destination: GatewayDestination) -> Arc<GatewayAddress> {
        Arc::new(GatewayAddress { destination, hbone_port: 15008 })
    }

    fn service(name: &str, vips: &[&str]) -> Service {
        Service {
            vips: vips.iter().map(|ip| address("", ip)).collect(),
            ports: vec![ServicePort { port: 80, target: 8080 }, ServicePort { port: 90, target: 0 }],
            ..Service::sample("shop", name)
        }
    }

    /// * the pod (10.0.0.2, fd00::2) is behind `own`, with 90 at 9090, and behind `later`, which is not known yet;
    /// * `foreign` (10.9.0.2) has other endpoints;
    /// * `guarded` (10.9.0.3) and, by its weight, `weighted` (10.9.0.4) have the pod as their waypoint;
    /// * so has the workload 10.0.0.5, by the pod's service; `other` (10.0.0.6) has another one;
    /// * `headless` has no address; `v6` has one of each family.
    fn target_of(asked: &str, tunnel: Option<(ApplicationProtocol, Option<u16>)>) -> String {
        let own = GatewayDestination::Address(address("", POD));
        let other = GatewayDestination::Address(address("", "10.0.0.9"));
        let waypoint = GatewayDestination::Hostname(Service::sample("shop", "own").key);
        let weighted = WeightedWaypoint { gateway: gateway(own.clone()), weight: 1 };
        let services = [
            service("own", &["10.9.0.1"]),
            service("foreign", &["10.9.0.2"]),
            Service { waypoint: Some(gateway(own)), ..service("guarded", &["10.9.0.3"]) },
            Service { weighted_waypoints: vec![weighted], ..service("weighted", &["10.9.0.4"]) },
            service("headless", &[]),
            service("v6", &["fd09::1", "10.9.0.7"]),
        ];
        let member = |name: &str, ports: &[(u16, u16)]| Membership {
            service: ServiceKey::new("shop", &format!("{name}.shop")),
            ports: Arc::from(ports),
        };
        let at = |name: &str, ip: &str| Workload {
            addresses: vec![ip.parse().unwrap()],
            ..Workload::sample("shop", name)
        };
        let pod = Workload {
            services: Box::new([member("own", &[(90, 9090), (91, 15006)]), member("later", &[(80, 80)])]),
            application_tunnel: tunnel.map(|(protocol, port)| ApplicationTunnel { protocol, port }),
            ..at("pod", POD)
        };
        let behind = Workload { waypoint: Some(gateway(waypoint)), ..at("behind", "10.0.0.5") };
        let elsewhere = Workload { waypoint: Some(gateway(other)), ..at("other", "10.0.0.6") };
        let workloads = [pod.clone(), behind, elsewhere, at("stranger", "10.0.0.9")].map(Arc::new);
        let mesh = Mesh::new(TrustDomain::default(), workloads, services.map(Arc::new), []);
        let authority = Authority::parse(asked).unwrap();
        let addresses = [POD, "fd00::2"].map(|ip| ip.parse().unwrap());
        let (client, local) = ("10.0.0.1".parse().unwrap(), POD.parse().unwrap());
        let asked = InboundRequest {
            client,
            local,
            addresses: &addresses,
            authority: &authority,
            host: None,
            namespace: "shop",
        };
        match inbound_target(&mesh, &pod, &asked) {
            Ok(InboundTarget { to, service, announce }) => {
                let service = service.map_or(String::new(), |service| format!(" of {}", service.name));
                format!("{to}{service}{}", announce.map_or(String::new(), |at| format!(" for {at}")))
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn an_ordinary_pod_takes_what_is_for_itself() {
        for (asked, expect) in [
            ("10.0.0.2:81", "10.0.0.2:81"),
            // The client's family is that of the address it has dialled.
            (
                "[fd00::2]:81",
                "[fd00::2]:81 cannot be reached through the pod's address 10.0.0.2, which is of another family",
            ),
            // By an address it is known by the port.
            ("10.0.0.2:8080", "10.0.0.2:8080 of own"),
            ("10.0.0.2:9090", "10.0.0.2:9090 of own"),
            ("[::ffff:10.0.0.2]:81", "10.0.0.2:81"),
            ("own.shop:80", "10.0.0.2:8080 of own"),
            ("Own.SHOP:80", "10.0.0.2:8080 of own"),
            ("own.shop:90", "10.0.0.2:9090 of own"),
            // As a waypoint without a tunnel of its own: its application takes the port that was meant.
            ("10.9.0.3:80", "10.0.0.2:80 of guarded"),
            ("10.9.0.4:80", "10.0.0.2:80 of weighted"),
            ("10.0.0.5:80", "10.0.0.2:80"),
            // Somebody else's.
            ("10.9.0.1:80", "10.9.0.1:80 is neither an address of this pod nor of what it is a waypoint for"),
            ("10.9.0.2:80", "10.9.0.2:80 is neither an address of this pod nor of what it is a waypoint for"),
            ("10.0.0.6:80", "10.0.0.6:80 is neither an address of this pod nor of what it is a waypoint for"),
            (
                "192.0.2.1:80",
                "192.0.2.1:80 is neither an address of this pod nor of what it is a waypoint for",
            ),
            (
                "127.0.0.1:80",
                "127.0.0.1:80 is neither an address of this pod nor of what it is a waypoint for",
            ),
            ("foreign.shop:80", "this pod is no endpoint of foreign.shop"),
            ("guarded.shop:80", "this pod is no endpoint of guarded.shop"),
            ("nobody.shop:80", "nobody.shop is not the name of a service"),
            ("later.shop:80", "service shop/later.shop is not known (yet)"),
            ("own.shop:81", "this pod serves no port 81 of own.shop"),
            // The proxy's own ports.
            (
                "10.0.0.2:15008",
                "attempted recursive call to ourselves: 10.0.0.2:15008 is a port of the proxy",
            ),
            ("own.shop:91", "attempted recursive call to ourselves: 10.0.0.2:15006 is a port of the proxy"),
            (
                "10.9.0.3:15001",
                "attempted recursive call to ourselves: 10.0.0.2:15001 is a port of the proxy",
            ),
        ] {
            assert_eq!(target_of(asked, None), expect, "{asked}");
        }
    }

    #[test]
    fn an_application_tunnel_takes_what_is_for_others_at_its_port() {
        let none = (ApplicationProtocol::None, Some(15088));
        for (asked, expect) in [
            ("10.0.0.2:81", "10.0.0.2:15088"),
            ("[fd00::2]:81", "10.0.0.2:15088"),
            ("192.0.2.1:80", "10.0.0.2:15088"),
            ("own.shop:80", "10.0.0.2:15088 of own"),
            ("own.shop:81", "10.0.0.2:15088 of own"),
            ("foreign.shop:80", "10.0.0.2:15088 of foreign"),
            ("nobody.shop:80", "nobody.shop is not the name of a service"),
        ] {
            assert_eq!(target_of(asked, Some(none)), expect, "{asked}");
        }
        let no_port = (ApplicationProtocol::None, None);
        assert_eq!(target_of("192.0.2.1:80", Some(no_port)), "10.0.0.2:80");
        assert_eq!(target_of("foreign.shop:80", Some(no_port)), "this pod is no endpoint of foreign.shop");
        let reserved = (ApplicationProtocol::None, Some(15006));
        let own = "attempted recursive call to ourselves: 10.0.0.2:15006 is a port of the proxy";
        assert_eq!(target_of("10.0.0.2:80", Some(reserved)), own);
    }

    #[test]
    fn a_waypoint_behind_the_proxy_is_told_what_was_meant() {
        let proxy = (ApplicationProtocol::Proxy, Some(15088));
        for (asked, expect) in [
            ("10.0.0.2:81", "10.0.0.2:15088 for 10.0.0.2:81"),
            ("10.9.0.3:80", "10.0.0.2:15088 of guarded for 10.9.0.3:80"),
            ("guarded.shop:80", "10.0.0.2:15088 of guarded for 10.9.0.3:80"),
            // Of the client's family.
            ("v6.shop:80", "10.0.0.2:15088 of v6 for 10.9.0.7:80"),
            ("headless.shop:80", "headless.shop has no address to tell the waypoint of"),
        ] {
            assert_eq!(target_of(asked, Some(proxy)), expect, "{asked}");
        }
        let unknown = (ApplicationProtocol::Unknown, Some(15088));
        let why = "the application wants to be told of connections in a way that this version does not know";
        assert_eq!(target_of("10.0.0.2:80", Some(unknown)), why);
    }
}
