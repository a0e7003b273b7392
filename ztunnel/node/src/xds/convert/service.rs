//! Services.

use std::sync::Arc;

use ipnet::IpNet;
use ztunnel_mesh::model::addr::NetworkAddress;
use ztunnel_mesh::model::addr::NetworkCidr;
use ztunnel_mesh::model::refused::Refused;
use ztunnel_mesh::model::service::BalanceMode;
use ztunnel_mesh::model::service::BalanceScope;
use ztunnel_mesh::model::service::HealthPolicy;
use ztunnel_mesh::model::service::IpFamilies;
use ztunnel_mesh::model::service::LoadBalancing;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::service::ServiceKey;
use ztunnel_mesh::model::service::ServicePort;
use ztunnel_mesh::model::service::Visibility;
use ztunnel_mesh::model::service::WeightedWaypoint;
use ztunnel_proto::workload as wire;
use ztunnel_proto::workload::load_balancing;

use crate::xds::convert::Converter;
use crate::xds::convert::Distinct;
use crate::xds::convert::Rejected;
use crate::xds::convert::workload::ip;
use crate::xds::convert::workload::port;
use crate::xds::convert::workload::port_or_zero;

/// Where a service is found.
enum Vip {
    One(NetworkAddress),
    Range(NetworkCidr),
}

impl Converter {
    pub(super) fn service(&mut self, from: &wire::Service) -> Result<Service, Rejected> {
        let name = format!("{}/{}", from.namespace, from.hostname);
        let key = ServiceKey::parse(self.interner.text(&name)).ok_or(Rejected::Name(name))?;
        let hostname = self.interner.text(key.hostname());
        let (mut vips, mut cidr_vips) = (Distinct::with_capacity(0), Distinct::with_capacity(0));
        for address in &from.addresses {
            match self.vip(address)? {
                Vip::One(address) => vips.push(address),
                Vip::Range(range) => cidr_vips.push(range),
            }
        }
        let mut ports = Vec::with_capacity(from.ports.len());
        for known in &from.ports {
            ports.push(ServicePort {
                port: port(known.service_port)?,
                target: port_or_zero(known.target_port)?,
            });
        }
        let mut weighted_waypoints = Vec::with_capacity(from.weighted_waypoints.len());
        for waypoint in &from.weighted_waypoints {
            let gateway = waypoint.destination.as_ref();
            let gateway = gateway.ok_or(Rejected::Missing("the destination of a waypoint"))?;
            let (gateway, weight) = (self.gateway(gateway)?, waypoint.weight);
            weighted_waypoints.push(WeightedWaypoint { gateway, weight });
        }
        let subject_alt_names: Vec<Arc<str>> =
            from.subject_alt_names.iter().map(|name| self.interner.text(name)).collect();
        let identities = subject_alt_names.iter().filter_map(|name| name.parse().ok()).collect();
        let ip_families = match wire::IpFamilies::try_from(from.ip_families) {
            Ok(wire::IpFamilies::Automatic) => None,
            Ok(wire::IpFamilies::Ipv4Only) => Some(IpFamilies::V4Only),
            Ok(wire::IpFamilies::Ipv6Only) => Some(IpFamilies::V6Only),
            Ok(wire::IpFamilies::Dual) => Some(IpFamilies::Dual),
            Err(_) => self.unknown(None),
        };
        let visibility = match wire::service::Visibility::try_from(from.visibility) {
            Ok(wire::service::Visibility::Public) => Visibility::Public,
            Ok(wire::service::Visibility::Namespace) => Visibility::Namespace,
            Err(_) => self.unknown(Visibility::Public),
        };
        let balancing = match &from.load_balancing {
            Some(balancing) => Some(self.balancing(balancing)?),
            None => None,
        };
        Ok(Service {
            key,
            name: self.interner.text(&from.name),
            namespace: self.interner.text(&from.namespace),
            hostname,
            vips: vips.list,
            cidr_vips: cidr_vips.list,
            ports,
            subject_alt_names,
            identities,
            waypoint: self.some_gateway(from.waypoint.as_ref())?,
            weighted_waypoints,
            balancing,
            ip_families,
            canonical: from.canonical,
            visibility,
        })
    }

    fn vip(&mut self, from: &wire::NetworkAddress) -> Result<Vip, Rejected> {
        let network = self.interner.text(&from.network);
        let ip = ip(&from.address)?;
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        Ok(match from.length {
            Some(length) if length > bits => return Err(Rejected::Prefix(length)),
            Some(length) if length < bits => {
                let range = IpNet::new(ip, length as u8).map_err(|_| Rejected::Prefix(length))?.trunc();
                Vip::Range(NetworkCidr { network, range })
            }
            _ => Vip::One(NetworkAddress { network, ip }),
        })
    }

    /// Where a service is that was rejected.
    pub(super) fn refused_service(&mut self, from: &wire::Service, refused: &mut Refused) {
        for address in &from.addresses {
            match self.vip(address) {
                Ok(Vip::One(address)) => refused.addresses.push(address),
                Ok(Vip::Range(range)) => refused.ranges.push(range),
                Err(_) => {}
            }
        }
    }

    fn balancing(&mut self, from: &wire::LoadBalancing) -> Result<LoadBalancing, Rejected> {
        let mode = match load_balancing::Mode::try_from(from.mode) {
            Ok(load_balancing::Mode::UnspecifiedMode) => BalanceMode::Any,
            Ok(load_balancing::Mode::Strict) => BalanceMode::Strict,
            Ok(load_balancing::Mode::Failover) => BalanceMode::Failover,
            Ok(load_balancing::Mode::Passthrough) => BalanceMode::Passthrough,
            Err(_) => self.unknown(BalanceMode::Any),
        };
        let mut scopes = Vec::with_capacity(from.routing_preference.len());
        for scope in &from.routing_preference {
            scopes.push(match load_balancing::Scope::try_from(*scope) {
                Ok(load_balancing::Scope::UnspecifiedScope) => {
                    return Err(Rejected::Unsupported("scope UNSPECIFIED_SCOPE"));
                }
                Ok(load_balancing::Scope::Region) => BalanceScope::Region,
                Ok(load_balancing::Scope::Zone) => BalanceScope::Zone,
                Ok(load_balancing::Scope::Subzone) => BalanceScope::Subzone,
                Ok(load_balancing::Scope::Node) => BalanceScope::Node,
                Ok(load_balancing::Scope::Cluster) => BalanceScope::Cluster,
                Ok(load_balancing::Scope::Network) => BalanceScope::Network,
                Err(_) => self.unknown(BalanceScope::Unknown),
            });
        }
        let health = match load_balancing::HealthPolicy::try_from(from.health_policy) {
            Ok(load_balancing::HealthPolicy::OnlyHealthy) => HealthPolicy::OnlyHealthy,
            Ok(load_balancing::HealthPolicy::AllowAll) => HealthPolicy::AllowAll,
            Err(_) => self.unknown(HealthPolicy::OnlyHealthy),
        };
        Ok(LoadBalancing { mode, scopes: scopes.into_boxed_slice(), health })
    }
}
