//! Which service a connection was meant for that came to a workload by an address.
//!
//! For telemetry alone: nothing is decided by it. The mesh says which services the workload is behind, and at which of
//! its ports; the client's own word only picks among those.

use std::sync::Arc;

use crate::model::service::BalanceMode;
use crate::model::service::Service;
use crate::model::workload::Membership;
use crate::model::workload::Workload;
use crate::store::index::Mesh;

/// The service of which `port` of `workload` is a target. Of several it is the one that the client has `said`, by its
/// hostname, else one of the workload's own namespace, else the canonical one, else the first by name.
pub fn service_behind<'a>(
    mesh: &'a Mesh,
    workload: &Workload,
    port: u16,
    said: Option<&str>,
) -> Option<&'a Arc<Service>> {
    let behind = workload.services.iter().filter_map(|membership| {
        let service = mesh.service(membership.service.as_str())?;
        serves(service, membership, port).then_some(service)
    });
    behind.min_by_key(|service| {
        let is_said = said.is_some_and(|said| service.hostname.eq_ignore_ascii_case(said));
        (!is_said, service.namespace != workload.namespace, !service.canonical)
    })
}

/// Whether a client of `service` may be led to `port` of the workload of this membership.
fn serves(service: &Service, membership: &Membership, port: u16) -> bool {
    // What is dialled is where it goes.
    if service.balance_mode() == BalanceMode::Passthrough {
        return service.port(port).is_some();
    }
    let own = |port: u16| membership.ports.iter().find(|(from, to)| *from == port && *to != 0);
    membership.ports.iter().any(|(_, to)| *to == port)
        || service.ports.iter().any(|known| own(known.port).is_none() && known.target == port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::identity::TrustDomain;
    use crate::model::service::HealthPolicy;
    use crate::model::service::LoadBalancing;
    use crate::model::service::ServiceKey;
    use crate::model::service::ServicePort;

    fn service(namespace: &str, name: &str, ports: &[(u16, u16)]) -> Service {
        let ports = ports.iter().map(|(port, target)| ServicePort { port: *port, target: *target }).collect();
        Service { ports, ..Service::sample(namespace, name) }
    }

    fn member(namespace: &str, name: &str, ports: &[(u16, u16)]) -> Membership {
        let service = ServiceKey::new(namespace, &format!("{name}.{namespace}"));
        Membership { service, ports: Arc::from(ports) }
    }

    #[test]
    fn the_service_is_one_of_the_workloads_own_by_target_port() {
        let passthrough = LoadBalancing {
            mode: BalanceMode::Passthrough,
            scopes: Box::default(),
            health: HealthPolicy::OnlyHealthy,
        };
        let mesh = Mesh::new(
            TrustDomain::default(),
            [],
            [
                service("shop", "web", &[(80, 8080), (443, 8443)]),
                service("shop", "admin", &[(80, 8080), (81, 9000)]),
                // Each endpoint has its own port for 80.
                service("shop", "named", &[(80, 0)]),
                service("other", "shared", &[(80, 7000)]),
                Service { canonical: true, ..service("there", "shared", &[(80, 7000)]) },
                Service { balancing: Some(passthrough), ..service("shop", "direct", &[(6000, 6001)]) },
                service("shop", "strangers", &[(80, 5000), (90, 8080)]),
            ]
            .map(Arc::new),
            [],
        );
        let workload = Workload {
            services: Box::new([
                member("other", "shared", &[]),
                member("shop", "admin", &[(81, 9001)]),
                member("shop", "direct", &[]),
                member("shop", "named", &[(80, 8081)]),
                // Not known (yet).
                member("shop", "unheard", &[(80, 4000)]),
                member("shop", "web", &[(80, 8080), (443, 0)]),
                member("there", "shared", &[]),
            ]),
            ..Workload::sample("shop", "web-1")
        };
        for (port, said, expect) in [
            // Of two the first by name, unless the client says which.
            (8080, None, Some("shop/admin.shop")),
            (8080, Some("web.shop"), Some("shop/web.shop")),
            (8080, Some("WEB.shop"), Some("shop/web.shop")),
            (8080, Some("admin.shop"), Some("shop/admin.shop")),
            // What it says is only believed of what is there: not of another port, nor of somebody else's service.
            (8443, Some("admin.shop"), Some("shop/web.shop")),
            (8080, Some("strangers.shop"), Some("shop/admin.shop")),
            (5000, Some("strangers.shop"), None),
            (8443, None, Some("shop/web.shop")),
            // The endpoint's own port instead of the service's.
            (9001, None, Some("shop/admin.shop")),
            (9000, None, None),
            (8081, None, Some("shop/named.shop")),
            (7000, None, Some("there/shared.there")),
            (6000, None, Some("shop/direct.shop")),
            (6001, None, None),
            (4000, None, None),
            (80, None, None),
        ] {
            let found = service_behind(&mesh, &workload, port, said);
            assert_eq!(found.map(|service| service.key.as_str()), expect, "{port}, said {said:?}");
        }
    }
}
