//! Services: virtual addresses and the workloads behind them.

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::workload::Workload;

/// One workload behind a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Service port → port of this workload, where it differs from the service's own target
    /// (target ports given by name).
    pub ports: Vec<(u16, u16)>,
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// The port clients dial.
    pub port: u16,
    /// The port of the endpoints, unless an endpoint has its own; 0 when only endpoints know.
    pub target: u16,
}

/// A service as the mesh knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its full DNS name, `<name>.<namespace>.svc.<cluster domain>`.
    pub hostname: Arc<str>,
    /// Its virtual addresses, in canonical form. Empty for a headless service.
    pub vips: Vec<IpAddr>,
    /// Its TCP ports.
    pub ports: Vec<ServicePort>,
    /// The workloads behind it, healthy or not.
    pub endpoints: Vec<Endpoint>,
}

impl Service {
    /// The port of `endpoint` that serves this service's `port`; `None` if nothing does.
    pub fn target_port(&self, endpoint: &Endpoint, port: u16) -> Option<u16> {
        let known = self.ports.iter().find(|known| known.port == port)?;
        let own = endpoint.ports.iter().find(|(from, _)| *from == port);
        match own.map_or(known.target, |(_, to)| *to) {
            0 => None,
            target => Some(target),
        }
    }
}
