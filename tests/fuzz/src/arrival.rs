//! What a CONNECT request comes to: a mesh, a pod in it, and what its proxy is asked for.
//!
//! No connection leaves the pod or reaches the proxy itself, a name leads to a service of that name which the pod serves,
//! and an application is told of the address that was meant if, and only if, that is how it takes connections.

use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use arbitrary::Result;
use arbitrary::Unstructured;
use bytes::Bytes;
use ztunnel_node::hbone::address::Authority;
use ztunnel_mesh::store::MeshChange;
use ztunnel_mesh::store::mesh;
use ztunnel_mesh::model::workload::ApplicationProtocol;
use ztunnel_mesh::route::inbound_target::InboundRequest;
use ztunnel_mesh::route::inbound_target::inbound_target;
use ztunnel_mesh::route::plan::RESERVED_PORTS;
use ztunnel_node::xds::convert::Converter;
use ztunnel_proto::prost::Message;
use ztunnel_proto::workload::Address;
use ztunnel_proto::workload::address::Type;

use crate::wire;
use crate::wire::few;
use crate::wire::pick;

fn changes(u: &mut Unstructured<'_>) -> Result<Vec<MeshChange>> {
    let mut converter = Converter::default();
    let mut changes = Vec::new();
    let all = few(u, 6, |u| {
        Ok(if u.arbitrary()? { Type::Workload(wire::workload(u)?) } else { Type::Service(wire::service(u)?) })
    })?;
    for one in all {
        changes.extend(converter.address(Bytes::from(Address { r#type: Some(one) }.encode_to_vec())));
    }
    Ok(changes)
}

fn authority(u: &mut Unstructured<'_>) -> Result<String> {
    let host = match u.int_in_range(0..=7)? {
        0..=3 => {
            pick(u, &["10.0.0.0", "10.0.0.1", "10.0.0.2", "10.0.0.3", "[fd00::1]", "[::ffff:10.0.0.1]"])?
        }
        4..=6 => pick(u, &wire::HOSTS)?,
        _ => u.arbitrary()?,
    };
    let port: u16 =
        if u.ratio(1, 8)? { u.arbitrary()? } else { *u.choose(&[1, 80, 8080, 15001, 15006, 15008])? };
    Ok(format!("{host}:{port}"))
}

fn asked(u: &mut Unstructured<'_>) -> Result<()> {
    let (mut writer, reader) = mesh();
    writer.apply(changes(u)?);
    let mesh = reader.snapshot();
    let mut workloads: Vec<_> = mesh.workloads().collect();
    workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
    for workload in workloads {
        let (Ok(authority), local) = (
            Authority::parse(&authority(u)?),
            *u.choose(&workload.addresses).unwrap_or(&IpAddr::from([10, 9, 9, 9])),
        ) else {
            continue;
        };
        let client = *u.choose(&["10.0.0.1", "fd00::1"])?;
        let client: IpAddr = client.parse().expect("an address");
        let addresses = &workload.addresses;
        let (host, namespace) = (Some(*u.choose(&wire::HOSTS)?), &*workload.namespace);
        let asked = InboundRequest { client, local, addresses, authority: &authority, host, namespace };
        let tunnel = workload.application_tunnel;
        let Ok(target) = inbound_target(&mesh, workload, &asked) else { continue };
        let what = || format!("{authority:?} of {workload:?} became {target:?}");
        assert!(target.to.ip() == local || workload.addresses.contains(&target.to.ip()), "{}", what());
        assert!(!RESERVED_PORTS.contains(&target.to.port()), "{}", what());
        let announces = tunnel.is_some_and(|tunnel| tunnel.protocol == ApplicationProtocol::Proxy);
        assert_eq!(target.announce.is_some(), announces, "{}", what());
        assert!(tunnel.is_none_or(|tunnel| tunnel.protocol != ApplicationProtocol::Unknown), "{}", what());
        let port = tunnel.and_then(|tunnel| tunnel.port);
        assert!(port.is_none_or(|port| port == target.to.port()), "{}", what());
        match (&authority, &target.service) {
            (Authority::Address(address), service) => {
                let known = |service: &Arc<_>| mesh.service(service.key.as_str()) == Some(service);
                assert!(service.as_ref().is_none_or(known), "{}", what());
                assert!(port.is_some() || target.to.port() == address.port(), "{}", what());
                let meant = SocketAddr::new(address.ip().to_canonical(), address.port());
                assert!(target.announce.is_none_or(|told| told == meant), "{}", what());
            }
            (Authority::Hostname { host, .. }, Some(service)) => {
                assert!(
                    *service.hostname == **host && mesh.service(service.key.as_str()) == Some(service),
                    "{}",
                    what()
                );
                let serves = workload.services.iter().any(|it| it.service == service.key);
                assert!(serves || port.is_some(), "{}", what());
                assert_ne!(target.to.port(), 0);
            }
            _ => panic!("{}", what()),
        }
        let again = inbound_target(&mesh, &Arc::clone(workload), &asked);
        assert_eq!(again.as_ref(), Ok(&target));
    }
    Ok(())
}

/// A mesh of a few workloads and services, each of which is asked for something.
pub fn run(data: &[u8]) {
    let _enough_bytes = asked(&mut Unstructured::new(data));
}
