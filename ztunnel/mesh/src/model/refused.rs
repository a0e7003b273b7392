//! What the control plane speaks of and this proxy could not take.

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::addr::NetworkAddress;
use crate::model::addr::NetworkCidr;

/// A workload or service of which no version could be taken. It is known that it is there, and not how it is to be
/// spoken to: whether it is in the mesh, what is in front of it. So nobody speaks to it, which what is unknown would
/// allow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Its unique name, as the control plane has it.
    pub name: Arc<str>,
    /// Its addresses, as far as they could be read.
    pub addresses: Vec<NetworkAddress>,
    /// Its address ranges, as far as they could be read.
    pub ranges: Vec<NetworkCidr>,
    /// What is wrong with it.
    pub reason: Arc<str>,
}

impl Refused {
    /// Whether one of its ranges has `ip` in `network`.
    pub fn spans(&self, network: &str, ip: IpAddr) -> bool {
        self.ranges.iter().any(|cidr| *cidr.network == *network && cidr.range.contains(&ip))
    }
}
