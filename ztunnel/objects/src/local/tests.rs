use serde_json::Value as Json;
use ztunnel_mesh::model::policy;
use ztunnel_mesh::model::policy::StringMatch;
use ztunnel_mesh::model::service::BalanceScope;
use ztunnel_mesh::model::service::GatewayDestination;
use ztunnel_mesh::model::service::HealthPolicy as Health;
use ztunnel_mesh::model::service::IpFamilies;
use ztunnel_mesh::model::workload::ApplicationProtocol;
use ztunnel_mesh::model::workload::Reach;
use ztunnel_mesh::model::workload::WorkloadKind;
use ztunnel_mesh::store::index::Mesh;

use super::*;

fn said(text: &str) -> Vec<String> {
    match read(&Arc::from("m.yaml"), text) {
        Ok(_) => Vec::new(),
        Err(wrong) => wrong.iter().map(ToString::to_string).collect(),
    }
}

fn taken(text: &str) -> Mesh {
    read(&Arc::from("m.yaml"), text).unwrap_or_else(|wrong| panic!("{wrong:?}"))
}

const FULL: &str = r#"
workloads:
- uid: c1//Pod/shop/cart-1
  workloadIps: [10.0.0.1, "2001:db8::1"]
  waypoint: {destination: shop/way.example, hboneMtlsPort: 15009}
  networkGateway: {destination: net2/192.0.2.1}
  protocol: HBONE
  networkMode: Standard
  name: cart-1
  namespace: shop
  trustDomain: example.org
  serviceAccount: cart
  network: net1
  workloadName: cart
  workloadType: cronjob
  canonicalName: cart-app
  canonicalRevision: v1
  hostname: cart-1.example
  node: node-1
  nativeTunnel: true
  applicationTunnel: {protocol: PROXY, port: 15088}
  authorizationPolicies: [shop/viewer]
  status: Unhealthy
  clusterId: c1
  locality: {region: r1, zone: z1, subzone: s1}
  services:
    shop/cart.shop.svc.cluster.local: {80: 8080, "81": 0}
  capacity: 3
- {name: bare, namespace: shop, services: {}}
services:
- name: cart
  namespace: shop
  hostname: cart.shop.svc.cluster.local
  vips: [net1/10.96.0.1, "/2001:db8::2", 10.96.0.2]
  cidrVips: [{network: net1, cidr: 10.97.1.1/16}]
  ports: {80: 8080}
  endpoints: {}
  subjectAltNames: ["spiffe://td/ns/a/sa/b", cart.example]
  waypoint: {destination: net1/10.0.0.9, hboneMtlsPort: 0}
  weightedWaypoints: [{destination: {destination: shop/w.example, hboneMtlsPort: 15008}, weight: 7}]
  loadBalancer: {routingPreferences: [Network, Zone], mode: Failover, healthPolicy: AllowAll}
  ipFamilies: IPv6
  canonical: true
  visibility: Namespace
policies:
- name: viewer
  namespace: shop
  scope: WorkloadSelector
  action: Deny
  dryRun: true
  rules:
  - - - namespaces: [{Exact: a}]
        notNamespaces: [{Prefix: b}]
        principals: [{Suffix: c}]
        notPrincipals: [{Presence: []}]
        serviceAccounts: [{namespace: a, serviceAccount: b}]
        sourceIps: [10.0.0.0/8]
        destinationPorts: [80]
        notDestinationPorts: [81]
"#;

#[test]
fn everything_that_a_dump_shows_can_be_written() {
    let mesh = taken(FULL);
    let cart = mesh.workload("c1//Pod/shop/cart-1").unwrap();
    assert_eq!(cart.identity.as_str(), "spiffe://example.org/ns/shop/sa/cart");
    assert_eq!((cart.reach, cart.healthy, cart.kind), (Reach::Hbone, false, WorkloadKind::CronJob));
    assert_eq!((&*cart.subzone, cart.capacity, cart.addresses.len()), ("s1", 3, 2));
    let waypoint = cart.waypoint.as_ref().unwrap();
    assert_eq!((waypoint.destination.to_string().as_str(), waypoint.hbone_port), ("shop/way.example", 15009));
    let gateway = cart.network_gateway.as_ref().unwrap();
    assert!(
        matches!(&gateway.destination, GatewayDestination::Address(it) if it.to_string() == "net2/192.0.2.1")
    );
    assert_eq!(gateway.hbone_port, 15008, "the usual one where none is said");
    let tunnel = cart.application_tunnel.unwrap();
    assert_eq!((tunnel.protocol, tunnel.port), (ApplicationProtocol::Proxy, Some(15088)));
    assert_eq!(*cart.services[0].ports, [(80, 8080), (81, 0)]);
    assert_eq!(cart.policies[0].to_string(), "shop/viewer");

    let bare = mesh.workload("Kubernetes//Pod/shop/bare").unwrap();
    assert_eq!(bare.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/default");
    assert_eq!((bare.reach, bare.healthy, bare.capacity), (Reach::Plain, true, 1));

    let service = mesh.service("shop/cart.shop.svc.cluster.local").unwrap();
    let vips: Vec<_> = service.vips.iter().map(ToString::to_string).collect();
    assert_eq!(vips, ["net1/10.96.0.1", "/2001:db8::2", "/10.96.0.2"]);
    assert_eq!(service.cidr_vips[0].range.to_string(), "10.97.0.0/16");
    assert_eq!((service.subject_alt_names.len(), service.identities.len()), (2, 1));
    assert!(matches!(service.waypoint.as_ref().unwrap().destination, GatewayDestination::Address(_)));
    assert_eq!(service.weighted_waypoints[0].weight, 7);
    let balancing = service.balancing.as_ref().unwrap();
    assert_eq!(*balancing.scopes, [BalanceScope::Network, BalanceScope::Zone]);
    assert_eq!((balancing.health, service.ip_families), (Health::AllowAll, Some(IpFamilies::V6Only)));
    assert_eq!(mesh.endpoints(&service.key).iter().count(), 1);

    let policy = mesh.policies().next().unwrap();
    assert_eq!((policy.scope, policy.action), (policy::Scope::WorkloadSelector, policy::Action::Deny));
    let matching = &policy.rules[0].clauses[0].matches[0];
    assert_eq!(matching.namespaces, [StringMatch::Exact("a".into())]);
    assert_eq!(matching.not_namespaces, [StringMatch::Prefix("b".into())]);
    assert_eq!(matching.principals, [StringMatch::Suffix("c".into())]);
    assert_eq!(matching.not_principals, [StringMatch::Presence]);
    assert_eq!((&*matching.destination_ports, &*matching.not_destination_ports), (&[80][..], &[81][..]));
    assert!(policy.dry_run);
}

/// What `admin::dump` writes, with the ports where they are written by hand.
#[test]
fn what_a_dump_has_shown_can_be_read_again() {
    let dump = include_str!("../../../../tests/golden/config_dump.json");
    let mut dump: Json = serde_json::from_str(dump).unwrap();
    for workload in dump["workloads"].as_array_mut().unwrap() {
        let services = workload.as_object_mut().unwrap().remove("services").unwrap_or_default();
        let names = services.as_array().into_iter().flatten();
        let map = names.map(|name| (name.as_str().unwrap().to_owned(), serde_json::json!({"81": 8181})));
        workload["services"] = Json::Object(map.collect());
    }
    for service in dump["services"].as_array_mut().unwrap() {
        service["endpoints"] = serde_json::json!({});
    }
    let (workloads, services, policies) = (&dump["workloads"], &dump["services"], &dump["policies"]);
    let text = serde_json::json!({"workloads": workloads, "services": services, "policies": policies});
    let mesh = taken(&text.to_string());
    let count = |list: &Json| list.as_array().unwrap().len();
    assert_eq!(mesh.workloads().len(), count(workloads));
    assert_eq!(mesh.services().count(), count(services));
    assert_eq!(mesh.policies().len(), count(policies));
}

#[test]
fn nothing_is_a_mesh_too() {
    for text in ["", "# nothing\n", "{}", "workloads:\nservices: []\n"] {
        assert_eq!(taken(text).workloads().len(), 0, "{text:?}");
    }
}

#[test]
fn what_is_wrong_is_named_with_its_line_and_its_field() {
    for (text, expected) in [
        ("workloads:\n- name: a\n", &["m.yaml:2: error: workloads[0]: missing field `namespace`"][..]),
        (
            "workloads:\n- name: a\n  namespace: b\n  workloadIps: [10.0.0.1,\n    10.0.0]\n",
            &["m.yaml:5: error: workloads[0].workloadIps[1]: \"10.0.0\" is not an IP address"],
        ),
        (
            "workloads:\n- {name: a, namespace: b,\n   adress: 1, protocol: HBONE}\nworkload: []\n",
            &[
                "m.yaml:3: error: adress is not a field of a workload",
                "m.yaml:4: error: workload is not a field of the mesh (write workloads instead)",
            ],
        ),
        (
            "workloads:\n- {name: a, namespace: b, services: {\n  cart: {80: 80}}}\n",
            &["m.yaml:3: error: workloads[0].services: \"cart\" is not <namespace>/<hostname>"],
        ),
        (
            "workloads:\n- {name: a, namespace: b, services: {\n  b/cart: {0: 80}}}\n",
            &["m.yaml:3: error: workloads[0].services.b/cart: \"0\" is not a port"],
        ),
        (
            "workloads:\n- {name: a, namespace: b/c}\n- {name: a, namespace: b}\n- {name: a, namespace: b}\n",
            &[
                "m.yaml:2: error: workloads[0]: \"b/c\" is not a namespace or service account name",
                "m.yaml:4: error: workloads[2]: Kubernetes//Pod/b/a is there twice",
            ],
        ),
        (
            "services:\n- {name: a, namespace: b, hostname: \"\"}\n",
            &["m.yaml:2: error: services[0]: \"b/\" is not <namespace>/<hostname>"],
        ),
        (
            "services:\n- {name: a, namespace: b, hostname: c, endpoints: {x: {workloadUid: x}}}\n",
            &[
                "m.yaml:2: error: services[0]: endpoints are not written here: name the service at its workloads (services)",
            ],
        ),
        (
            "policies:\n- name: a\n  namespace: b\n  scope: Namespace\n  rules: []\n",
            &["m.yaml:2: error: policies[0]: missing field `action`"],
        ),
        (
            "policies:\n- name: a\n  namespace: b\n  scope: Namespace\n  action: Allow\n  rules:\n  - - - principals:\n        - {Exact: a, Prefix: b}\n",
            &[
                "m.yaml:8: error: policies[0].rules[0][0][0].principals[0]: expected one of {Exact: x}, {Prefix: x}, {Suffix: x} and {Presence: []}",
            ],
        ),
        (
            "policies:\n- {name: a, namespace: b, scope: Namespace, action: Allow,\n   rules: [[[{principal: [{Exact: a}]}]]]}\n",
            &["m.yaml:3: error: principal is not a field of a match (write principals instead)"],
        ),
        ("a: 1\n---\nb: 2\n", &["m.yaml:3: error: a second document: write all in one"]),
        ("- name: a\n", &["m.yaml:1: error: expected a mapping, found a list (remove the leading \"- \")"]),
    ] {
        assert_eq!(said(text), expected, "{text}");
    }
    let protocol = said("workloads:\n- {name: a, namespace: b, protocol: GRE}\n").join("\n");
    assert!(
        protocol.starts_with("m.yaml:2: error: workloads[0].protocol: unknown variant `GRE`"),
        "{protocol}"
    );
    let missing = load(&Place::File("/nothing/here.yaml".into())).unwrap_err();
    assert!(missing[0].to_string().starts_with("/nothing/here.yaml: error: cannot be read: "), "{missing:?}");
    let variable = load(&Place::Variable("LOCAL_XDS", "a: [".to_owned())).unwrap_err();
    assert!(variable[0].to_string().starts_with("LOCAL_XDS:2: error: not YAML"), "{variable:?}");
}
