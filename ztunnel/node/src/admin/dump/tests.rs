use std::time::Duration;
use std::time::SystemTime;

use serde_json::Value;
use ztunnel_mesh::model::addr::NetworkAddress;
use ztunnel_mesh::model::addr::NetworkCidr;
use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_mesh::model::policy::Action;
use ztunnel_mesh::model::policy::Clause;
use ztunnel_mesh::model::policy::Match;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::model::policy::PolicyKey;
use ztunnel_mesh::model::policy::Rule;
use ztunnel_mesh::model::policy::Scope;
use ztunnel_mesh::model::policy::ServiceAccountMatch;
use ztunnel_mesh::model::policy::StringMatch;
use ztunnel_mesh::model::service::BalanceMode;
use ztunnel_mesh::model::service::BalanceScope;
use ztunnel_mesh::model::service::GatewayAddress;
use ztunnel_mesh::model::service::GatewayDestination;
use ztunnel_mesh::model::service::HealthPolicy;
use ztunnel_mesh::model::service::IpFamilies;
use ztunnel_mesh::model::service::LoadBalancing;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::service::ServiceKey;
use ztunnel_mesh::model::service::ServicePort;
use ztunnel_mesh::model::service::Visibility;
use ztunnel_mesh::model::service::WeightedWaypoint;
use ztunnel_mesh::model::workload::ApplicationProtocol;
use ztunnel_mesh::model::workload::ApplicationTunnel;
use ztunnel_mesh::model::workload::Membership;
use ztunnel_mesh::model::workload::Reach;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::model::workload::WorkloadKind;
use ztunnel_tls::ca::IssueError;
use ztunnel_tls::testing::Pki;

use super::*;
use crate::identity::worker::Standing;
use crate::telemetry::testing::golden;

fn gateway(destination: GatewayDestination) -> Arc<GatewayAddress> {
    Arc::new(GatewayAddress { destination, hbone_port: 15008 })
}

fn address(network: &str, ip: &str) -> NetworkAddress {
    NetworkAddress { network: network.into(), ip: ip.parse().unwrap() }
}

fn key(namespace: &str, name: &str) -> PolicyKey {
    PolicyKey { namespace: namespace.into(), name: name.into() }
}

/// A workload that has everything a workload can have, and one that has nothing.
fn workloads() -> Vec<Arc<Workload>> {
    let cart = ServiceKey::new("shop", "cart.shop.svc.cluster.local");
    let gone = ServiceKey::new("shop", "later.shop.svc.cluster.local");
    let full = Workload {
        uid: "c1//Pod/shop/cart-1".into(),
        node: "node-1".into(),
        cluster: "c1".into(),
        network: "net1".into(),
        addresses: vec!["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        hostname: "cart-1.example".into(),
        workload_name: "cart".into(),
        kind: WorkloadKind::Job,
        canonical_name: "cart-app".into(),
        canonical_revision: "v1".into(),
        region: "r1".into(),
        zone: "z1".into(),
        native_tunnel: true,
        application_tunnel: Some(ApplicationTunnel {
            protocol: ApplicationProtocol::Proxy,
            port: Some(15088),
        }),
        capacity: 3,
        waypoint: Some(gateway(GatewayDestination::Hostname(ServiceKey::new("shop", "way.example")))),
        network_gateway: Some(gateway(GatewayDestination::Address(address("net2", "192.0.2.1")))),
        services: Box::new([
            Membership { service: gone, ports: Arc::from([(90, 9090)]) },
            Membership { service: cart, ports: Arc::from([(81, 8181)]) },
        ]),
        policies: vec![key("shop", "viewer")],
        ..Workload::sample("shop", "cart-1")
    };
    let bare = Workload {
        uid: "c1//Pod/shop/bare".into(),
        workload_name: "".into(),
        kind: WorkloadKind::Deployment,
        canonical_name: "".into(),
        reach: Reach::Plain,
        healthy: false,
        host_network: true,
        ..Workload::sample("shop", "bare")
    };
    vec![Arc::new(full), Arc::new(bare)]
}

fn services() -> Vec<Arc<Service>> {
    let full = Service {
        vips: vec![address("net1", "10.96.0.1"), address("", "2001:db8::96")],
        cidr_vips: vec![NetworkCidr { network: "net1".into(), range: "240.0.0.0/8".parse().unwrap() }],
        ports: vec![ServicePort { port: 80, target: 8080 }, ServicePort { port: 81, target: 0 }],
        subject_alt_names: vec!["spiffe://cluster.local/ns/shop/sa/cart".into()],
        waypoint: Some(gateway(GatewayDestination::Address(address("net1", "10.96.0.9")))),
        weighted_waypoints: vec![WeightedWaypoint {
            gateway: gateway(GatewayDestination::Hostname(ServiceKey::new("shop", "way.example"))),
            weight: 90,
        }],
        balancing: Some(LoadBalancing {
            mode: BalanceMode::Failover,
            scopes: Box::new([BalanceScope::Network, BalanceScope::Region, BalanceScope::Zone]),
            health: HealthPolicy::OnlyHealthy,
        }),
        ip_families: Some(IpFamilies::Dual),
        canonical: true,
        visibility: Visibility::Namespace,
        key: ServiceKey::new("shop", "cart.shop.svc.cluster.local"),
        hostname: "cart.shop.svc.cluster.local".into(),
        ..Service::sample("shop", "cart")
    };
    vec![Arc::new(full), Arc::new(Service::sample("shop", "bare"))]
}

fn policies() -> Vec<Arc<Policy>> {
    let full = Match {
        namespaces: vec![StringMatch::Exact("a".into())],
        not_namespaces: vec![StringMatch::Prefix("b".into())],
        principals: vec![StringMatch::Suffix("c".into())],
        not_principals: vec![StringMatch::Presence],
        service_accounts: vec![ServiceAccountMatch { namespace: "d".into(), name: "e".into() }],
        not_service_accounts: vec![ServiceAccountMatch { namespace: "f".into(), name: "g".into() }],
        source_ips: vec!["10.0.0.0/8".parse().unwrap()],
        not_source_ips: vec!["2001:db8::/32".parse().unwrap()],
        destination_ips: vec!["10.1.0.0/16".parse().unwrap()],
        not_destination_ips: vec!["10.1.1.1/32".parse().unwrap()],
        destination_ports: vec![80, 443],
        not_destination_ports: vec![22],
    };
    let clause = Clause { matches: vec![full, Match::default()] };
    vec![
        Arc::new(Policy {
            key: key("shop", "viewer"),
            scope: Scope::WorkloadSelector,
            action: Action::Deny,
            dry_run: true,
            rules: vec![Rule { clauses: vec![clause] }, Rule::default()],
        }),
        Arc::new(Policy {
            key: key("istio-system", "all"),
            scope: Scope::Global,
            action: Action::Allow,
            dry_run: false,
            rules: Vec::new(),
        }),
    ]
}

pub(crate) fn sample_mesh() -> Mesh {
    Mesh::new(TrustDomain::default(), workloads(), services(), policies())
}

fn connection(original: Option<Original>, carrier: Carrier) -> dump::Connection {
    view(Connection {
        pod: "p".into(),
        reporter: Reporter::Source,
        source: "10.0.0.1:40000".parse().unwrap(),
        original,
        actual: "[2001:db8::2]:15008".parse().unwrap(),
        carrier,
    })
}

fn pods() -> BTreeMap<String, dump::WorkloadState> {
    let info = |name: &str| dump::WorkloadInfo {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        service_account: "cart".to_owned(),
    };
    let dialled = Original::Address(ztunnel_mesh::model::addr::OriginalDst("10.96.0.1:80".parse().unwrap()));
    let connections = dump::Connections {
        inbound: vec![
            connection(None, Carrier::Tcp),
            connection(Some(Original::Host("cart.shop".into())), Carrier::Hbone),
        ],
        outbound: vec![connection(Some(dialled), Carrier::DoubleHbone)],
    };
    BTreeMap::from([
        (
            "pod-1".to_owned(),
            dump::WorkloadState { state: "Up".into(), connections, info: Some(info("cart-1")) },
        ),
        (
            "pod-2".to_owned(),
            dump::WorkloadState {
                state: "Pending".into(),
                connections: dump::Connections::default(),
                info: Some(info("cart-2")),
            },
        ),
    ])
}

pub(crate) fn version() -> dump::Version {
    dump::Version {
        version: "1.0.0".into(),
        git_revision: "unknown".into(),
        rust_version: "rustc 1.95.0".into(),
        build_profile: "release".into(),
        build_status: "unknown".into(),
        istio_version: "1.30.0".to_owned(),
        crypto_provider: "tls-aws-lc".into(),
    }
}

fn written(mesh: &Mesh) -> String {
    let certificate = dump::Certificate {
        pem: "LS0tLS1CRUdJTg==".to_owned(),
        serial_number: "4660".to_owned(),
        valid_from: "2026-01-01T00:00:00Z".to_owned(),
        expiration_time: "2026-01-02T00:00:00Z".to_owned(),
    };
    let setting = |name: &str, value: &str, origin: &str| dump::Setting {
        name: name.to_owned(),
        value: value.to_owned(),
        origin: origin.to_owned(),
    };
    let local = Mesh::new(TrustDomain::default(), workloads().pop(), services().pop(), policies().pop());
    let settings = [setting("CLUSTER_ID", "c1", "environment"), setting("--drain-deadline", "5s", "default")];
    let document = dump::Dump {
        workload_state: pods(),
        certificates: vec![dump::Certificates {
            identity: "spiffe://cluster.local/ns/shop/sa/cart".to_owned(),
            state: "Available".to_owned(),
            cert_chain: vec![certificate.clone()],
            root_certs: vec![certificate],
        }],
        version: version(),
        ..super::settings(dump::Dump::of(mesh, &local), &settings)
    };
    let mut out = Vec::new();
    write(&document, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn the_document_is_istios() {
    golden("config_dump.json", &written(&sample_mesh()));
}

/// What the types of `istioctl`, which is not forgiving, would not take.
#[test]
fn no_list_is_null_and_no_number_a_text() {
    fn no_null(value: &Value, path: &str) {
        match value {
            // The one field that may be.
            Value::Null => assert!(path.ends_with("/originalDst"), "{path} is null"),
            Value::Array(items) => items.iter().for_each(|item| no_null(item, path)),
            Value::Object(map) => {
                map.iter().for_each(|(key, value)| no_null(value, &format!("{path}/{key}")))
            }
            _ => {}
        }
    }
    let document: Value = serde_json::from_str(&written(&sample_mesh())).unwrap();
    no_null(&document, "");
    let empty: Value = serde_json::from_str(&written(&Mesh::default())).unwrap();
    for key in ["workloads", "services", "policies", "certificates"] {
        assert!(empty[key].is_array() && document[key].is_array(), "{key}");
    }
    assert!(document["workloads"][0]["capacity"].is_u64());
    assert!(document["services"][1]["ipFamilies"].is_string());
    assert!(document["services"][0].get("ipFamilies").is_none());
    let ports = document["services"][1]["ports"].as_object().unwrap();
    assert!(ports.keys().all(|port| port.parse::<u16>().is_ok()) && ports["80"].is_u64());
}

#[test]
fn a_big_mesh_is_written_in_pieces() {
    /// Remembers the largest piece.
    struct Pieces(usize, usize);
    impl Write for Pieces {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            self.1 = self.1.max(bytes.len());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let many = (0..5_000).map(|number| {
        let mut workload = Workload::sample("shop", &format!("w{number}"));
        workload.canonical_name = "app".into();
        Arc::new(workload)
    });
    let mesh = Mesh::new(TrustDomain::default(), many, [], []);
    let mut pieces = Pieces(0, 0);
    serde_json::to_writer_pretty(&mut pieces, &dump::List::<dump::Workload<'_>>::Of(&mesh)).unwrap();
    assert!(pieces.0 > 1_000_000 && pieces.1 < 1_000, "{} bytes, {} at once", pieces.0, pieces.1);
}

#[test]
fn certificates_are_told_with_their_chain_and_roots() {
    let pki = Pki::new();
    let (from, day) =
        (SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600), Duration::from_secs(86_400));
    let id: ztunnel_mesh::model::identity::SpiffeId =
        "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
    let root = pki.certify(ztunnel_tls::testing::Leaf::of(id.as_str())).0.remove(1);
    let credentials = pki.credentials(&id, from, from + day).with_root_certificates(Arc::from([root]));
    let serial = credentials.serial().replace(':', "");
    let standing = |credentials, failure| Standing { identity: id.clone(), credentials, failure };
    let failure = || Some(Arc::new(IssueError::Expired));
    let views = certificates::certificates(&[
        standing(Some(Arc::new(credentials)), failure()),
        standing(None, None),
        standing(None, failure()),
    ]);
    let states: Vec<_> = views.iter().map(|view| &*view.state).collect();
    assert_eq!(states, ["Available", "Initializing", &format!("Unavailable: {}", IssueError::Expired)]);
    let leaf = &views[0].cert_chain[0];
    assert_eq!((&*leaf.valid_from, &*leaf.expiration_time), ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"));
    assert!(leaf.serial_number.bytes().all(|digit| digit.is_ascii_digit()));
    let mut hex = String::new();
    let mut decimal: Vec<u8> = leaf.serial_number.bytes().map(|digit| digit - b'0').collect();
    // Long division, as the number is larger than any integer here.
    while !decimal.is_empty() {
        let mut rest = 0_u32;
        for digit in &mut decimal {
            let value = rest * 10 + u32::from(*digit);
            (*digit, rest) = ((value / 16) as u8, value % 16);
        }
        hex.insert(0, char::from_digit(rest, 16).unwrap());
        let zeros = decimal.iter().take_while(|digit| **digit == 0).count();
        decimal.drain(..zeros);
    }
    assert_eq!(hex.trim_start_matches('0'), serial.trim_start_matches('0'));
    use base64::Engine as _;
    let pem = base64::engine::general_purpose::STANDARD.decode(&leaf.pem).unwrap();
    let pem = String::from_utf8(pem).unwrap();
    assert!(pem.starts_with("-----BEGIN CERTIFICATE-----\nM"), "{pem}");
    assert!(pem.ends_with("\n-----END CERTIFICATE-----\n") && pem.lines().all(|line| line.len() <= 64));
    assert_eq!((views[0].cert_chain.len(), views[0].root_certs.len()), (2, 1));
}
