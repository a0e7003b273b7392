//! Services → virtual addresses, ports and the workloads behind them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::ContainerPort;
use k8s_openapi::api::core::v1::Service as ServiceObject;
use k8s_openapi::api::core::v1::ServiceSpec;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use ztunnel_mesh::model::addr::NetworkAddress;
use ztunnel_mesh::model::addr::canonical_ip;
use ztunnel_mesh::model::service::BalanceMode;
use ztunnel_mesh::model::service::HealthPolicy;
use ztunnel_mesh::model::service::LoadBalancing;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::service::ServiceKey;
use ztunnel_mesh::model::service::ServicePort;
use ztunnel_mesh::model::service::Visibility;
use ztunnel_mesh::model::workload::Membership;

use crate::diagnostic::Diagnostic;
use crate::kinds::Object;
use crate::kinds::Objects;
use crate::translate::CLUSTER_DOMAIN;
use crate::translate::pods::Built;
use crate::translate::pods::by_namespace;

/// A TCP port of a service: what the model keeps, and the name it may have to look for in each pod.
struct Port {
    port: ServicePort,
    named: Option<String>,
    /// Its index in the object.
    index: String,
}

/// The services of the mesh, in the order of the objects, and which of them each of `pods` is behind.
pub(super) fn services(
    objects: &Objects,
    pods: &[Built<'_>],
    diagnostics: &mut Vec<Diagnostic>,
) -> (Vec<Arc<Service>>, Vec<Vec<Membership>>) {
    let mut memberships = vec![Vec::new(); pods.len()];
    let index = by_namespace(pods.iter().map(|pod| &pod.object.namespace));
    let mut by_vip: HashMap<IpAddr, &Object<ServiceObject>> = HashMap::new();
    let pod_at: HashMap<IpAddr, &Built<'_>> = pods
        .iter()
        .filter(|pod| !pod.workload.host_network)
        .flat_map(|pod| pod.workload.addresses.iter().map(move |ip| (*ip, pod)))
        .collect();
    let mut services = Vec::with_capacity(objects.services.len());
    for object in &objects.services {
        let default = ServiceSpec::default();
        let spec = object.value.spec.as_ref().unwrap_or(&default);
        if spec.type_.as_deref() == Some("ExternalName") {
            let message = format!("service {}/{} is an ExternalName: skipped", object.namespace, object.name);
            diagnostics.push(Diagnostic::warning_at(&object.source, &["spec", "type"], message));
            continue;
        }
        let selector = spec.selector.as_ref().filter(|selector| !selector.is_empty());
        let Some(selector) = selector else {
            // Its endpoints are written by somebody else. Unknown to the mesh, its address is left to the node.
            let message = format!(
                "service {}/{} has no selector: it is skipped, and traffic to it passes unchanged",
                object.namespace, object.name
            );
            let hint = "write spec.selector with the labels of its pods";
            diagnostics.push(Diagnostic::warning_at(&object.source, &["spec"], message).hint(hint));
            continue;
        };
        let mut vips = vips(object, spec, diagnostics);
        vips.retain(|vip| {
            let first = *by_vip.entry(*vip).or_insert(object);
            let clash = match pod_at.get(vip) {
                _ if !std::ptr::eq(first, object) => {
                    Some(("service", &first.namespace, &first.name, &first.source))
                }
                Some(pod) => Some(("pod", &pod.object.namespace, &pod.object.name, &pod.object.source)),
                None => None,
            };
            if let Some((kind, namespace, name, source)) = clash {
                let message = format!(
                    "service {}/{} has the address {vip} of {kind} {namespace}/{name} ({}:{})",
                    object.namespace, object.name, source.file, source.line
                );
                let hint = "give one of them another address";
                let path = ["spec", if spec.cluster_ips.is_some() { "clusterIPs" } else { "clusterIP" }];
                diagnostics.push(Diagnostic::error_at(&object.source, &path, message).hint(hint));
            }
            clash.is_none()
        });
        let ports = ports(object, spec, diagnostics);
        let chosen: Vec<usize> = index
            .get(&object.namespace)
            .into_iter()
            .flatten()
            .copied()
            .filter(|pod| pods[*pod].object.has_labels(selector))
            .collect();
        let selected: Vec<&Built<'_>> = chosen.iter().map(|pod| &pods[*pod]).collect();
        if selected.is_empty() {
            let message = format!(
                "the selector of service {}/{} matches no pod of namespace {}",
                object.namespace, object.name, object.namespace
            );
            let hint = "write labels that its pods have";
            let path = ["spec", "selector"];
            diagnostics.push(Diagnostic::warning_at(&object.source, &path, message).hint(hint));
        }
        check_named(object, &ports, &selected, diagnostics);
        let any_health = spec.publish_not_ready_addresses.unwrap_or(false);
        let hostname = format!("{}.{}.svc.{CLUSTER_DOMAIN}", object.name, object.namespace);
        let key = ServiceKey::new(&object.namespace, &hostname);
        for (pod, built) in chosen.into_iter().zip(selected) {
            if !built.workload.addresses.is_empty() {
                let own = |port: &Port| Some((port.port.port, named_port(built, port.named.as_deref()?)?));
                let ports = ports.iter().filter_map(own).collect();
                memberships[pod].push(Membership { service: key.clone(), ports });
            }
        }
        let balancing = any_health.then(|| LoadBalancing {
            mode: BalanceMode::Any,
            scopes: Box::default(),
            health: HealthPolicy::AllowAll,
        });
        services.push(Arc::new(Service {
            hostname: Arc::from(key.hostname()),
            key,
            name: Arc::clone(&object.name),
            namespace: Arc::clone(&object.namespace),
            vips: vips.into_iter().map(|ip| NetworkAddress { network: Arc::default(), ip }).collect(),
            cidr_vips: Vec::new(),
            ports: ports.into_iter().map(|port| port.port).collect(),
            subject_alt_names: Vec::new(),
            identities: Vec::new(),
            waypoint: None,
            weighted_waypoints: Vec::new(),
            balancing,
            ip_families: None,
            canonical: true,
            visibility: Visibility::Public,
        }));
    }
    (services, memberships)
}

/// The TCP port of that name in a pod, in the order in which Kubernetes looks: containers, then sidecars.
fn named_port(pod: &Built<'_>, name: &str) -> Option<u16> {
    let spec = pod.object.value.spec.as_ref()?;
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let is_it =
        |port: &&ContainerPort| port.name.as_deref() == Some(name) && is_tcp(port.protocol.as_deref());
    let mut ports =
        spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    ports.find(is_it).and_then(|port| port_number(port.container_port))
}

fn check_named(
    object: &Object<ServiceObject>,
    ports: &[Port],
    selected: &[&Built<'_>],
    diagnostics: &mut Vec<Diagnostic>,
) {
    for port in ports {
        let Some(name) = port.named.as_deref() else { continue };
        if !selected.is_empty() && !selected.iter().any(|pod| named_port(pod, name).is_some()) {
            let message =
                format!("no pod of service {}/{} has a TCP port named {name}", object.namespace, object.name);
            let hint = format!("name a container port {name}, or write its number");
            let path = ["spec", "ports", &port.index, "targetPort"];
            diagnostics.push(Diagnostic::warning_at(&object.source, &path, message).hint(hint));
        }
    }
}

fn vips(
    object: &Object<ServiceObject>,
    spec: &ServiceSpec,
    diagnostics: &mut Vec<Diagnostic>,
) -> Vec<IpAddr> {
    let mut path = ["spec", "clusterIPs"];
    let mut texts: Vec<&str> = spec.cluster_ips.iter().flatten().map(String::as_str).collect();
    if texts.is_empty() {
        path = ["spec", "clusterIP"];
        texts.extend(spec.cluster_ip.as_deref());
    }
    let mut vips = Vec::with_capacity(texts.len());
    for text in texts {
        match text.parse().map(canonical_ip) {
            _ if matches!(text, "None" | "") => {}
            Ok(ip) if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() => {
                let message = format!("{text} cannot be the address of a service");
                diagnostics.push(Diagnostic::error_at(&object.source, &path, message));
            }
            Ok(ip) if vips.contains(&ip) => {}
            Ok(ip) => vips.push(ip),
            Err(_) => {
                let message = format!("{text:?} is not an address");
                let hint = "write an IPv4 or IPv6 address, or None for a headless service";
                diagnostics.push(Diagnostic::error_at(&object.source, &path, message).hint(hint));
            }
        }
    }
    vips
}

fn ports(object: &Object<ServiceObject>, spec: &ServiceSpec, diagnostics: &mut Vec<Diagnostic>) -> Vec<Port> {
    let mut ports: Vec<Port> = Vec::new();
    for (index, written) in spec.ports.iter().flatten().enumerate() {
        let index = index.to_string();
        let at = |field| [("spec"), "ports", index.as_str(), field];
        match written.protocol.as_deref() {
            protocol if is_tcp(protocol) => {}
            Some("UDP") => continue,
            Some(protocol) => {
                let message = format!("port {} of {protocol} is not carried: skipped", written.port);
                diagnostics.push(Diagnostic::warning_at(&object.source, &at("protocol"), message));
                continue;
            }
            None => {}
        }
        let Some(port) = port_number(written.port) else {
            let message = format!("{} is not a port", written.port);
            let hint = "write a number from 1 to 65535";
            diagnostics.push(Diagnostic::error_at(&object.source, &at("port"), message).hint(hint));
            continue;
        };
        if ports.iter().any(|known| known.port.port == port) {
            let message = format!("TCP port {port} is there twice");
            diagnostics.push(Diagnostic::error_at(&object.source, &at("port"), message));
            continue;
        }
        let (target, named) = match &written.target_port {
            None | Some(IntOrString::Int(0)) => (port, None),
            Some(IntOrString::Int(number)) => match port_number(*number) {
                Some(target) => (target, None),
                None => {
                    let message = format!("{number} is not a port");
                    let hint = "write a number from 1 to 65535";
                    diagnostics
                        .push(Diagnostic::error_at(&object.source, &at("targetPort"), message).hint(hint));
                    continue;
                }
            },
            Some(IntOrString::String(name)) if name.is_empty() => (port, None),
            Some(IntOrString::String(name)) if name.chars().all(|c| c.is_ascii_digit()) => {
                let message = format!("targetPort \"{name}\" is a text, so it would be the name of a port");
                let hint = format!("write {name} without quotes");
                diagnostics.push(Diagnostic::error_at(&object.source, &at("targetPort"), message).hint(hint));
                continue;
            }
            Some(IntOrString::String(name)) => (0, Some(name.clone())),
        };
        ports.push(Port { port: ServicePort { port, target }, named, index });
    }
    ports
}

fn is_tcp(protocol: Option<&str>) -> bool {
    matches!(protocol, None | Some("" | "TCP"))
}

fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port > 0)
}
