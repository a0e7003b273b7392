//! Which service or workload a gateway is: a waypoint, or the way to another network.

use std::sync::Arc;

use crate::model::addr::NetworkAddress;
use crate::model::service::GatewayAddress;
use crate::model::service::GatewayDestination;
use crate::model::service::Service;
use crate::model::workload::Workload;
use crate::store::index::Mesh;

/// What a gateway's address or name belongs to.
#[derive(Debug, Clone, Copy)]
pub enum Gateway<'a> {
    /// A service, of which each endpoint is one.
    Service(&'a Arc<Service>),
    /// A workload.
    Workload(&'a Arc<Workload>),
}

/// Finds a gateway; `None` if the mesh does not know it.
pub fn resolve<'a>(mesh: &'a Mesh, gateway: &GatewayAddress) -> Option<Gateway<'a>> {
    let (service, workload) = match &gateway.destination {
        GatewayDestination::Hostname(key) => {
            let by_name = || mesh.workload_by_hostname(key.hostname(), key.namespace());
            let service = match key.namespace() {
                "" => mesh.service_by_hostname(key.hostname(), None),
                _ => mesh.service(key.as_str()),
            };
            (service, if service.is_none() { by_name() } else { None })
        }
        GatewayDestination::Address(NetworkAddress { network, ip }) => {
            (mesh.service_at(network, *ip, None), mesh.workload_at(network, *ip))
        }
    };
    service.map(Gateway::Service).or_else(|| workload.map(Gateway::Workload))
}

/// Whether `workload` is that gateway, or one of several that are.
pub fn is_gateway(mesh: &Mesh, workload: &Workload, gateway: &GatewayAddress) -> bool {
    match resolve(mesh, gateway) {
        Some(Gateway::Service(service)) => mesh.endpoints(&service.key).find(&workload.uid).is_some(),
        Some(Gateway::Workload(found)) => found.uid == workload.uid,
        None => false,
    }
}

/// Whether `workload` is a waypoint in front of `service`.
pub fn is_before(mesh: &Mesh, workload: &Workload, service: &Service) -> bool {
    let weighted = service.weighted_waypoints.iter().map(|waypoint| &waypoint.gateway);
    weighted.chain(&service.waypoint).any(|gateway| is_gateway(mesh, workload, gateway))
}
