//! Which endpoint of a service, and which of its addresses.

use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::model::service::BalanceMode;
use crate::model::service::BalanceScope;
use crate::model::service::GatewayAddress;
use crate::model::service::HealthPolicy;
use crate::model::service::IpFamilies;
use crate::model::service::LoadBalancing;
use crate::model::service::Service;
use crate::model::workload::Workload;
use crate::store::endpoints::Endpoint;
use crate::store::endpoints::Endpoints;

/// How many endpoints are drawn before all are looked at. Where a quarter of the places can be chosen, fewer than
/// one connection in two hundred looks at all.
const DRAWS: u64 = 20;

/// What an endpoint is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To serve a port of the service.
    Service,
    /// To be the waypoint that the service is. Its HBONE port need not be a port of the service.
    Waypoint,
    /// To be the gateway that the service is, which is dialled whatever network it is said to be in.
    Gateway,
}

/// What an endpoint of a service is wanted for, by whom.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The client.
    pub source: &'a Workload,
    /// The service.
    pub service: &'a Service,
    /// Its port.
    pub port: u16,
    /// The address that was dialled.
    pub wanted: IpAddr,
    /// What for.
    pub purpose: Purpose,
}

/// The endpoint that was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Picked<'a> {
    /// The workload.
    pub workload: &'a Arc<Workload>,
    /// Where it is.
    pub at: At,
}

/// Where an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// At this address and port.
    Address(SocketAddr),
    /// At this port of an address that its name stands for: it has none of its own.
    Name(u16),
    /// In another network, where it is its gateway's to find it.
    OtherNetwork,
}

/// One endpoint that can take the connection. `roll` picks: with a uniformly random one the chances of the candidates
/// are as their capacities. `None` when there is no candidate.
///
/// A candidate may be chosen in its state of health, serves the port and has an address of a family that the service
/// uses, or none but a name, or is in another network that has a gateway. Where the service prefers endpoints near the
/// client, it is one of the nearest.
pub fn pick<'a>(endpoints: &'a Endpoints, request: &Request<'_>, roll: u64) -> Option<Picked<'a>> {
    if endpoints.capacity_max() == 0 {
        return None;
    }
    let scoped = request.service.balancing.as_ref().filter(|balancing| is_scoped(balancing));
    let mut draw = roll;
    if scoped.is_none() {
        // An endpoint drawn at random and taken if it can be has the same chances as one drawn from those that can
        // be taken, and the others need no look.
        for tries in 0..DRAWS {
            let slot = below(draw, endpoints.slots() as u64) as usize;
            let capacity_max = endpoints.capacity_max();
            let drawn = endpoints.slot(slot).filter(|endpoint| {
                let capacity = endpoint.workload().capacity;
                capacity >= capacity_max || below(mix(!draw), capacity_max.into()) < u64::from(capacity)
            });
            if let Some(picked) = drawn.and_then(|endpoint| candidate(endpoint, request)) {
                return Some(picked);
            }
            draw = mix(roll.wrapping_add(tries));
        }
    }
    // Exact: first how much there is to choose from, then which.
    let rank = |endpoint: &Endpoint| {
        scoped.map_or(Some(0), |balancing| rank(balancing, request.source, endpoint.workload()))
    };
    let ranked = || {
        endpoints.iter().filter(|endpoint| endpoint.workload().capacity > 0).filter_map(|endpoint| {
            let rank = rank(endpoint)?;
            candidate(endpoint, request).map(|picked| (rank, picked))
        })
    };
    let (mut best, mut weight) = (0, 0_u64);
    for (rank, picked) in ranked() {
        let capacity = u64::from(picked.workload.capacity);
        match rank.cmp(&best) {
            std::cmp::Ordering::Greater => (best, weight) = (rank, capacity),
            std::cmp::Ordering::Equal => weight += capacity,
            std::cmp::Ordering::Less => {}
        }
    }
    let mut left = below(draw, weight);
    ranked().filter(|(rank, _)| *rank == best).map(|(_, picked)| picked).find(|picked| {
        let capacity = u64::from(picked.workload.capacity);
        let here = left < capacity;
        left = left.saturating_sub(capacity);
        here
    })
}

/// Spreads a random number over `0..end` (0 if that is empty) without a division and without bias worth naming.
pub(super) fn below(roll: u64, end: u64) -> u64 {
    ((u128::from(roll) * u128::from(end)) >> 64) as u64
}

/// Another random number from one: the finalizer of SplitMix64.
fn mix(roll: u64) -> u64 {
    let z = roll.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn candidate<'a>(endpoint: &'a Endpoint, request: &Request<'_>) -> Option<Picked<'a>> {
    let Request { source, service, port, wanted, purpose } = *request;
    let workload = endpoint.workload();
    let healthy = workload.healthy || service.health_policy() == HealthPolicy::AllowAll;
    if !healthy {
        return None;
    }
    let target = target_port(endpoint, service, port, purpose)?;
    if purpose != Purpose::Gateway && workload.network != source.network {
        return workload.network_gateway.as_ref().map(|_| Picked { workload, at: At::OtherNetwork });
    }
    // Who stands in for others is found by an address: names are for what is outside of the mesh.
    if purpose == Purpose::Service && workload.addresses.is_empty() && !workload.hostname.is_empty() {
        return Some(Picked { workload, at: At::Name(target) });
    }
    let ip = address(workload, wanted, service.ip_families)?;
    Some(Picked { workload, at: At::Address(SocketAddr::new(ip, target)) })
}

/// The port of `endpoint` that serves the service's `port`; `None` if nothing does. Its own, else the service's
/// target, else, of a waypoint, the same one.
fn target_port(endpoint: &Endpoint, service: &Service, port: u16, purpose: Purpose) -> Option<u16> {
    let known = service.port(port);
    if known.is_none() && purpose != Purpose::Waypoint {
        return None;
    }
    let target = known.map(|known| known.target).filter(|target| *target != 0);
    let tunnel = endpoint.workload().application_tunnel.map(|_| port);
    endpoint.own_port(port).or(target).or(tunnel)
}

/// Whether endpoints differ by where they are.
fn is_scoped(balancing: &LoadBalancing) -> bool {
    matches!(balancing.mode, BalanceMode::Strict | BalanceMode::Failover) && !balancing.scopes.is_empty()
}

/// How near an endpoint is, the nearer the greater; `None` if it is not near enough. It is the number of scopes that
/// both have in common, counted up to the first that they do not. Where the network is the first of them, everyone in
/// the client's is nearer than anyone in another, and those elsewhere are told apart by the other scopes.
fn rank(balancing: &LoadBalancing, source: &Workload, workload: &Workload) -> Option<usize> {
    let in_common = |scope: &BalanceScope| match scope {
        BalanceScope::Region => source.region == workload.region,
        BalanceScope::Zone => source.zone == workload.zone,
        BalanceScope::Subzone => source.subzone == workload.subzone,
        // Its name is unique in its cluster only.
        BalanceScope::Node => source.node == workload.node && source.cluster == workload.cluster,
        BalanceScope::Cluster => source.cluster == workload.cluster,
        BalanceScope::Network => source.network == workload.network,
        BalanceScope::Unknown => false,
    };
    let scopes = &balancing.scopes;
    let rank = scopes.iter().take_while(|scope| in_common(scope)).count();
    if balancing.mode == BalanceMode::Strict && rank < scopes.len() {
        return None;
    }
    match scopes.split_first() {
        Some((BalanceScope::Network, _)) if rank > 0 => Some(rank + scopes.len() - 1),
        Some((BalanceScope::Network, others)) => {
            Some(others.iter().take_while(|scope| in_common(scope)).count())
        }
        _ => Some(rank),
    }
}

/// What is in front of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front<'a> {
    /// Nothing.
    Nothing,
    /// This waypoint.
    Waypoint(&'a Arc<GatewayAddress>),
    /// Waypoints none of which has any weight: nobody may be dialled, and not the service itself either.
    Nobody,
}

/// The waypoint in front of a service, if it has one. Of several, `roll` picks by their weights.
pub fn front(service: &Service, roll: u64) -> Front<'_> {
    let weighted = &service.weighted_waypoints;
    if weighted.is_empty() {
        return service.waypoint.as_ref().map_or(Front::Nothing, Front::Waypoint);
    }
    // The endpoint is chosen with the roll itself, so the choices are independent.
    let total: u64 = weighted.iter().map(|waypoint| u64::from(waypoint.weight)).sum();
    let mut left = below(mix(roll), total);
    let picked = weighted.iter().find(|waypoint| {
        let weight = u64::from(waypoint.weight);
        let here = left < weight;
        left = left.saturating_sub(weight);
        here
    });
    picked.map_or(Front::Nobody, |waypoint| Front::Waypoint(&waypoint.gateway))
}

/// The address to dial `workload` at when the application dialled `wanted`: that one if it is the workload's own, else
/// the first allowed of the same family, else the first allowed. `None` when it has none.
pub fn address(workload: &Workload, wanted: IpAddr, families: Option<IpFamilies>) -> Option<IpAddr> {
    let own = &workload.addresses;
    if own.contains(&wanted) {
        return Some(wanted);
    }
    let allowed = || own.iter().filter(|ip| families.is_none_or(|families| families.allows(**ip)));
    allowed().find(|ip| ip.is_ipv4() == wanted.is_ipv4()).or_else(|| allowed().next()).copied()
}
