//! Workloads.

use std::net::IpAddr;
use std::sync::Arc;

use ztunnel_mesh::model::addr::HBONE_PORT;
use ztunnel_mesh::model::addr::NetworkAddress;
use ztunnel_mesh::model::addr::canonical_ip;
use ztunnel_mesh::model::addr::lower;
use ztunnel_mesh::model::refused::Refused;
use ztunnel_mesh::model::service::GatewayAddress;
use ztunnel_mesh::model::service::GatewayDestination;
use ztunnel_mesh::model::service::ServiceKey;
use ztunnel_mesh::model::workload::ApplicationProtocol;
use ztunnel_mesh::model::workload::ApplicationTunnel;
use ztunnel_mesh::model::workload::Membership;
use ztunnel_mesh::model::workload::Reach;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::model::workload::WorkloadKind;
use ztunnel_proto::workload as wire;

use crate::xds::convert::Converter;
use crate::xds::convert::Distinct;
use crate::xds::convert::Rejected;
use crate::xds::convert::policy_key;

impl Converter {
    pub(super) fn workload(&mut self, from: &wire::Workload) -> Result<Workload, Rejected> {
        if from.uid.is_empty() {
            return Err(Rejected::Missing("the uid"));
        }
        let reach = match wire::TunnelProtocol::try_from(from.tunnel_protocol) {
            Ok(wire::TunnelProtocol::None) => Reach::Plain,
            Ok(wire::TunnelProtocol::Hbone) => Reach::Hbone,
            Ok(wire::TunnelProtocol::LegacyIstioMtls) => {
                return Err(Rejected::Unsupported("tunnel protocol LEGACY_ISTIO_MTLS"));
            }
            Err(_) => self.unknown(Reach::Unknown),
        };
        let healthy = match wire::WorkloadStatus::try_from(from.status) {
            Ok(status) => status == wire::WorkloadStatus::Healthy,
            Err(_) => self.unknown(false),
        };
        let host_network = match wire::NetworkMode::try_from(from.network_mode) {
            Ok(mode) => mode == wire::NetworkMode::HostNetwork,
            // Found by its address, it is at least not spoken to in another way than it asks for.
            Err(_) => self.unknown(false),
        };
        let kind = match wire::WorkloadType::try_from(from.workload_type) {
            Ok(wire::WorkloadType::Deployment) => WorkloadKind::Deployment,
            Ok(wire::WorkloadType::Cronjob) => WorkloadKind::CronJob,
            Ok(wire::WorkloadType::Pod) => WorkloadKind::Pod,
            Ok(wire::WorkloadType::Job) => WorkloadKind::Job,
            Err(_) => self.unknown(WorkloadKind::Deployment),
        };
        let application_tunnel = match &from.application_tunnel {
            Some(tunnel) => Some(self.application_tunnel(tunnel)?),
            None => None,
        };
        let mut policies = Vec::with_capacity(from.authorization_policies.len());
        for name in &from.authorization_policies {
            let key = policy_key(&mut self.interner, name).ok_or_else(|| Rejected::Name(name.clone()))?;
            policies.push(key);
        }
        let waypoint = self.some_gateway(from.waypoint.as_ref())?;
        let network_gateway = self.some_gateway(from.network_gateway.as_ref())?;
        let mut addresses = Distinct::with_capacity(from.addresses.len());
        for bytes in &from.addresses {
            addresses.push(ip(bytes)?);
        }
        let or = |text: &str, default| if text.is_empty() { default } else { text }.to_owned();
        let trust_domain = or(&from.trust_domain, "cluster.local");
        let account = or(&from.service_account, "default");
        let identity = self.interner.identity(&trust_domain, &from.namespace, &account)?;
        let services = self.memberships(from)?;
        let locality = from.locality.as_ref();
        let text = &mut |text: &str| self.interner.text(text);
        Ok(Workload {
            uid: Arc::from(from.uid.as_str()),
            name: Arc::from(from.name.as_str()),
            namespace: text(&from.namespace),
            identity,
            node: text(&from.node),
            cluster: text(if from.cluster_id.is_empty() { "Kubernetes" } else { &from.cluster_id }),
            network: text(&from.network),
            addresses: addresses.list,
            hostname: text(&lower(&from.hostname)),
            workload_name: text(&from.workload_name),
            kind,
            canonical_name: text(&from.canonical_name),
            canonical_revision: text(&from.canonical_revision),
            region: text(locality.map_or("", |locality| &locality.region)),
            zone: text(locality.map_or("", |locality| &locality.zone)),
            subzone: text(locality.map_or("", |locality| &locality.subzone)),
            reach,
            native_tunnel: from.native_tunnel,
            application_tunnel,
            healthy,
            capacity: from.capacity.unwrap_or(1),
            host_network,
            waypoint,
            network_gateway,
            services,
            policies,
        })
    }

    /// Where a workload is that was rejected. In its node's network it is not found by its address.
    pub(super) fn refused_workload(&mut self, from: &wire::Workload, refused: &mut Refused) {
        if from.network_mode == i32::from(wire::NetworkMode::HostNetwork) {
            return;
        }
        let network = self.interner.text(&from.network);
        let readable = from.addresses.iter().filter_map(|bytes| ip(bytes).ok());
        refused.addresses.extend(readable.map(|ip| NetworkAddress { network: Arc::clone(&network), ip }));
    }

    fn memberships(&mut self, from: &wire::Workload) -> Result<Box<[Membership]>, Rejected> {
        let mut services = Vec::with_capacity(from.services.len());
        let mut mapped = Vec::new();
        for (name, ports) in &from.services {
            let service = ServiceKey::parse(self.interner.text(name));
            let service = service.ok_or_else(|| Rejected::Name(name.clone()))?;
            mapped.clear();
            for known in &ports.ports {
                mapped.push((port(known.service_port)?, port_or_zero(known.target_port)?));
            }
            services.push(Membership { service, ports: self.interner.ports(&mapped) });
        }
        // The wire has no order, and equal resources should be equal.
        services.sort_unstable_by(|a, b| a.service.cmp(&b.service));
        // Two that are spelled differently are one.
        services.dedup_by(|a, b| a.service == b.service);
        Ok(services.into_boxed_slice())
    }

    fn application_tunnel(&mut self, from: &wire::ApplicationTunnel) -> Result<ApplicationTunnel, Rejected> {
        let protocol = match wire::application_tunnel::Protocol::try_from(from.protocol) {
            Ok(wire::application_tunnel::Protocol::None) => ApplicationProtocol::None,
            Ok(wire::application_tunnel::Protocol::Proxy) => ApplicationProtocol::Proxy,
            Err(_) => self.unknown(ApplicationProtocol::Unknown),
        };
        let port = Some(port_or_zero(from.port)?).filter(|port| *port != 0);
        Ok(ApplicationTunnel { protocol, port })
    }

    pub(super) fn some_gateway(
        &mut self,
        from: Option<&wire::GatewayAddress>,
    ) -> Result<Option<Arc<GatewayAddress>>, Rejected> {
        from.map(|from| self.gateway(from)).transpose()
    }

    pub(super) fn gateway(&mut self, from: &wire::GatewayAddress) -> Result<Arc<GatewayAddress>, Rejected> {
        use wire::gateway_address::Destination;
        let destination = match &from.destination {
            Some(Destination::Hostname(name)) => {
                let text = format!("{}/{}", name.namespace, name.hostname);
                let key = ServiceKey::parse_gateway(self.interner.text(&text)).ok_or(Rejected::Name(text))?;
                GatewayDestination::Hostname(key)
            }
            Some(Destination::Address(address)) => GatewayDestination::Address(NetworkAddress {
                network: self.interner.text(&address.network),
                ip: ip(&address.address)?,
            }),
            None => return Err(Rejected::Missing("the destination of a gateway")),
        };
        let hbone_port = match port_or_zero(from.hbone_mtls_port)? {
            0 => HBONE_PORT,
            port => port,
        };
        Ok(self.interner.gateway(GatewayAddress { destination, hbone_port }))
    }
}

/// An address in its canonical form.
pub(super) fn ip(bytes: &[u8]) -> Result<IpAddr, Rejected> {
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let ip = four.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from));
    ip.map(canonical_ip).map_err(|_| Rejected::Address(bytes.len()))
}

/// A port that may be left out.
pub(super) fn port_or_zero(number: u32) -> Result<u16, Rejected> {
    u16::try_from(number).map_err(|_| Rejected::Port(number))
}

/// A port.
pub(super) fn port(number: u32) -> Result<u16, Rejected> {
    port_or_zero(number).ok().filter(|port| *port != 0).ok_or(Rejected::Port(number))
}
