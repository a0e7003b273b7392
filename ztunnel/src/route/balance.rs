//! Which endpoint of a service, and which of its addresses.

use std::net::IpAddr;

use crate::model::service::Endpoint;
use crate::model::service::Service;
use crate::model::workload::Workload;

/// One endpoint of `service` that can take a connection to its `port`, with the port to use there. `roll` picks:
/// a uniformly random one gives each candidate the same share. `None` when there is no candidate.
///
/// A candidate is healthy, serves the port and has an address.
pub fn pick(service: &Service, port: u16, roll: u64) -> Option<(&Endpoint, u16)> {
    let candidates = || {
        service.endpoints.iter().filter_map(|endpoint| {
            let usable = endpoint.workload.healthy && !endpoint.workload.addresses.is_empty();
            usable.then(|| service.target_port(endpoint, port)).flatten().map(|target| (endpoint, target))
        })
    };
    let count = candidates().count();
    // The high half of the product spreads the roll over 0..count without a division and without bias worth
    // naming. It is below `count`, hence a usize.
    let index = (u128::from(roll) * count as u128) >> 64;
    candidates().nth(index as usize)
}

/// The address to dial `workload` at when the application dialled `wanted`: that one if it is the workload's own,
/// else the first of the same family, else the first. `None` when it has none.
pub fn address(workload: &Workload, wanted: IpAddr) -> Option<IpAddr> {
    let own = &workload.addresses;
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == wanted.is_ipv4();
    own.iter()
        .find(|ip| **ip == wanted)
        .or_else(|| own.iter().find(same_family))
        .or_else(|| own.first())
        .copied()
}
