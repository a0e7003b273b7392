use std::collections::BTreeSet;

use ztunnel_mesh::model::addr::NetworkAddress;
use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_mesh::model::service::BalanceMode;
use ztunnel_mesh::model::service::LoadBalancing;
use ztunnel_mesh::model::service::ServiceKey;
use ztunnel_mesh::model::service::Visibility;
use ztunnel_mesh::model::workload::Membership;

use super::*;

const DOMAIN: &str = "cluster.local";

fn config() -> Config {
    Config::new(DOMAIN, None, true)
}

fn vip(text: &str) -> NetworkAddress {
    let (network, ip) = text.split_once('/').unwrap_or(("", text));
    NetworkAddress { network: network.into(), ip: ip.parse().unwrap() }
}

fn service(namespace: &str, hostname: &str, vips: &[&str]) -> Service {
    Service {
        key: ServiceKey::new(namespace, hostname),
        hostname: hostname.into(),
        vips: vips.iter().map(|text| vip(text)).collect(),
        ..Service::sample(namespace, "s")
    }
}

fn kubernetes(namespace: &str, name: &str, vips: &[&str]) -> Service {
    let service = service(namespace, &format!("{name}.{namespace}.svc.{DOMAIN}"), vips);
    Service { canonical: true, ..service }
}

/// A workload behind the service of this hostname in its namespace.
fn endpoint(name: &str, namespace: &str, hostname: &str, addresses: &[&str]) -> Workload {
    Workload {
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        services: [Membership { service: ServiceKey::new(namespace, hostname), ports: Arc::default() }]
            .into(),
        ..Workload::sample(namespace, name)
    }
}

fn mesh(services: impl IntoIterator<Item = Service>, workloads: impl IntoIterator<Item = Workload>) -> Mesh {
    let (services, workloads) = (services.into_iter().map(Arc::new), workloads.into_iter().map(Arc::new));
    Mesh::new(TrustDomain::default(), workloads, services, [])
}

/// A client in the namespace `shop`.
fn client() -> Workload {
    Workload::sample("shop", "client")
}

fn ask(mesh: &Mesh, name: &str, family: Family) -> Option<Found> {
    find(mesh, &config(), &client(), name, family, 7)
}

/// The answer as text: `<service's namespace>/<hostname> [(<alias of>)] <addresses>`.
fn told(found: Option<Found>) -> String {
    let Some(found) = found else { return "another resolver".to_owned() };
    let mut told = found.service.key.to_string();
    if let Some(name) = &found.alias_of {
        told += &format!(" ({name})");
    }
    let addresses: BTreeSet<_> = found.addresses.iter().map(ToString::to_string).collect();
    for address in addresses {
        told += &format!(" {address}");
    }
    told
}

#[test]
fn a_name_is_tried_as_it_stands_then_completed_then_without_its_search_domain() {
    let names = |name: &str| -> Vec<String> {
        let all = candidates(name, "shop", DOMAIN).into_iter();
        let told = |candidate: Candidate| match candidate.stripped {
            Some(stripped) => format!("{} ({stripped})", candidate.name),
            None => candidate.name,
        };
        all.map(told).collect()
    };
    assert_eq!(names("cart"), ["cart", "cart.shop.svc.cluster.local"]);
    assert_eq!(
        names("cart.shop"),
        ["cart.shop", "cart.shop.svc.cluster.local", "cart.shop.shop.svc.cluster.local"]
    );
    assert_eq!(names("a.cart.shop"), ["a.cart.shop", "a.cart.shop.svc.cluster.local"]);
    assert_eq!(
        names("cart.shop.svc"),
        ["cart.shop.svc", "cart.shop.svc.cluster.local", "cart.shop.svc.svc.cluster.local"]
    );
    assert_eq!(names("a.b.c.d"), ["a.b.c.d"]);
    assert_eq!(names("a.cart.shop.svc"), ["a.cart.shop.svc", "a.cart.shop.svc.cluster.local"]);
    // Each name once, with the search domain that is found first.
    assert_eq!(
        names("www.example.com.shop.svc.cluster.local"),
        [
            "www.example.com.shop.svc.cluster.local",
            "www.example.com (www.example.com)",
            "www.example.com.svc.cluster.local (www.example.com)",
            "www.example.com.shop (www.example.com.shop)",
            "www.example.com.shop.svc (www.example.com.shop.svc)",
        ]
    );
    assert_eq!(
        names("cart.shop.svc.cluster.local"),
        [
            "cart.shop.svc.cluster.local",
            "cart (cart)",
            "cart.shop (cart.shop)",
            "cart.shop.shop.svc.cluster.local (cart.shop)",
            "cart.shop.svc (cart.shop.svc)",
            "cart.shop.svc.svc.cluster.local (cart.shop.svc)",
        ]
    );
    // Only whole labels, and never nothing.
    assert_eq!(
        names("xcluster.local"),
        ["xcluster.local", "xcluster.local.svc.cluster.local", "xcluster.local.shop.svc.cluster.local"]
    );
    assert!(names("cluster.local").iter().all(|name| !name.is_empty()));
}

#[test]
fn a_service_is_found_by_each_of_its_names() {
    let mesh = mesh([kubernetes("shop", "cart", &["10.96.0.1", "fd96::1"])], []);
    let (full, short) = ("shop/cart.shop.svc.cluster.local", "10.96.0.1");
    for (name, alias) in [
        ("cart.shop.svc.cluster.local", ""),
        ("cart.shop.svc", ""),
        ("cart.shop", ""),
        ("cart", ""),
        // What a resolver makes of a short name with its search domains.
        ("cart.shop.shop.svc.cluster.local", " (cart.shop)"),
        ("cart.shop.svc.shop.svc.cluster.local", " (cart.shop.svc)"),
        ("cart.shop.svc.cluster.local.shop.svc.cluster.local", " (cart.shop.svc.cluster.local)"),
        ("cart.svc.cluster.local", " (cart)"),
        ("cart.cluster.local", " (cart)"),
    ] {
        assert_eq!(told(ask(&mesh, name, Family::V4)), format!("{full}{alias} {short}"), "{name}");
    }
    assert_eq!(told(ask(&mesh, "cart", Family::V6)), format!("{full} fd96::1"));
    for name in ["cart.other.svc.cluster.local", "a.cart", "a.cart.shop.svc.cluster.local", "example.com", ""]
    {
        assert_eq!(told(ask(&mesh, name, Family::V4)), "another resolver", "{name}");
    }
}

#[test]
fn another_cluster_domain_is_completed_with() {
    let service = service("shop", "cart.shop.svc.example.org", &[]);
    let mesh = mesh([service], [endpoint("e", "shop", "cart.shop.svc.example.org", &["10.0.0.1"])]);
    let config = Config::new("Example.ORG.", None, true);
    let found = find(&mesh, &config, &client(), "cart", Family::V4, 0);
    assert_eq!(told(found), "shop/cart.shop.svc.example.org 10.0.0.1");
}

#[test]
fn wildcards_cover_what_is_below_them() {
    let mesh = mesh(
        [
            service("shop", "*.example.com", &["240.0.0.1"]),
            service("shop", "*.b.example.com", &["240.0.0.2"]),
            service("shop", "www.example.com", &["240.0.0.3"]),
            service("shop", "*", &["240.0.0.4"]),
            // They have no addresses to answer with.
            service("shop", "bare.example.com", &[]),
            service("shop", "*.c.example.com", &[]),
            Service {
                visibility: Visibility::Namespace,
                ..service("other", "hidden.example.com", &["240.0.0.5"])
            },
            service("shop", "www.d.example.com", &["240.0.0.6"]),
        ],
        [],
    );
    for (name, said) in [
        ("www.example.com", "shop/www.example.com 240.0.0.3"),
        ("a.example.com", "shop/*.example.com 240.0.0.1"),
        ("a.b.example.com", "shop/*.b.example.com 240.0.0.2"),
        ("x.a.b.example.com", "shop/*.b.example.com 240.0.0.2"),
        ("*.example.com", "shop/*.example.com 240.0.0.1"),
        // The name itself is not below the wildcard, and a bare one covers nothing.
        ("example.com", "another resolver"),
        // Closer than the wildcard is what is there as such, also for what is below it.
        ("x.www.example.com", "another resolver"),
        ("x.www.example.com.shop.svc.cluster.local", "another resolver"),
        ("bare.example.com", "another resolver"),
        ("x.bare.example.com", "another resolver"),
        ("a.c.example.com", "another resolver"),
        // What others hide covers nothing.
        ("hidden.example.com", "shop/*.example.com 240.0.0.1"),
        ("x.hidden.example.com", "shop/*.example.com 240.0.0.1"),
        // A name that is there only because others are below it hides nothing either.
        ("x.d.example.com", "shop/*.example.com 240.0.0.1"),
        ("elsewhere.org", "another resolver"),
        // With a search domain behind it, an exact name is an alias; one under a wildcard is not.
        ("www.example.com.shop.svc.cluster.local", "shop/www.example.com (www.example.com) 240.0.0.3"),
        ("a.example.com.shop.svc.cluster.local", "shop/*.example.com 240.0.0.1"),
    ] {
        assert_eq!(told(ask(&mesh, name, Family::V4)), said, "{name}");
    }
}

#[test]
fn of_several_services_the_clients_own_the_canonical_the_preferred_the_first_is_meant() {
    let at = |namespace: &str, vip: &str| service(namespace, "api.example.com", &[vip]);
    let canonical = |namespace: &str, vip: &str| Service { canonical: true, ..at(namespace, vip) };
    let hidden =
        |namespace: &str, vip: &str| Service { visibility: Visibility::Namespace, ..at(namespace, vip) };
    let cases: [(&str, Vec<Service>, Option<&str>, &str); 7] = [
        ("the first", vec![at("a", "1.0.0.1"), at("b", "1.0.0.2")], None, "a"),
        ("preferred", vec![at("a", "1.0.0.1"), at("b", "1.0.0.2")], Some("b"), "b"),
        (
            "canonical",
            vec![at("a", "1.0.0.1"), at("b", "1.0.0.2"), canonical("c", "1.0.0.3")],
            Some("b"),
            "c",
        ),
        ("own", vec![canonical("a", "1.0.0.1"), at("shop", "1.0.0.2")], Some("a"), "shop"),
        ("not what is hidden", vec![hidden("a", "1.0.0.1"), at("b", "1.0.0.2")], Some("a"), "b"),
        ("own, though hidden", vec![at("a", "1.0.0.1"), hidden("shop", "1.0.0.2")], None, "shop"),
        // It can only be answered for by what it does not have.
        (
            "not without addresses",
            vec![service("shop", "api.example.com", &[]), at("b", "1.0.0.2")],
            None,
            "b",
        ),
    ];
    for (case, services, preferred, namespace) in cases {
        let config = Config::new(DOMAIN, preferred, true);
        let found = find(&mesh(services, []), &config, &client(), "api.example.com", Family::V4, 0);
        assert_eq!(&*found.unwrap().service.namespace, namespace, "{case}");
    }
    let alone = mesh([hidden("a", "1.0.0.1")], []);
    assert_eq!(told(ask(&alone, "api.example.com", Family::V4)), "another resolver");
}

#[test]
fn the_addresses_are_those_of_the_clients_network() {
    let vips = ["10.96.0.1", "east/10.96.0.2", "east/fd96::2"];
    let mesh = mesh([kubernetes("shop", "cart", &vips)], []);
    let east = Workload { network: "east".into(), ..client() };
    for (client, family, said) in [
        (&client(), Family::V4, " 10.96.0.1"),
        (&client(), Family::V6, ""),
        (&east, Family::V4, " 10.96.0.2"),
        (&east, Family::V6, " fd96::2"),
    ] {
        let found = find(&mesh, &config(), client, "cart", family, 0);
        assert_eq!(told(found), format!("shop/cart.shop.svc.cluster.local{said}"));
    }
}

#[test]
fn a_headless_service_is_answered_for_by_its_endpoints() {
    let host = "db.shop.svc.cluster.local";
    let ready = |name: &str, addresses: &[&str]| endpoint(name, "shop", host, addresses);
    let mesh_of = |service: Service| {
        mesh(
            [service],
            [
                ready("a", &["10.0.0.1", "10.0.0.9", "fd00::1"]),
                ready("b", &["10.0.0.2"]),
                ready("none", &[]),
                Workload { healthy: false, ..ready("sick", &["10.0.0.3"]) },
                Workload { network: "east".into(), ..ready("far", &["10.0.0.4"]) },
            ],
        )
    };
    let headless = kubernetes("shop", "db", &[]);
    let mesh = mesh_of(headless.clone());
    assert_eq!(told(ask(&mesh, "db", Family::V4)), "shop/db.shop.svc.cluster.local 10.0.0.1 10.0.0.2");
    assert_eq!(told(ask(&mesh, "db", Family::V6)), "shop/db.shop.svc.cluster.local fd00::1");
    let balancing =
        LoadBalancing { mode: BalanceMode::Any, scopes: Box::default(), health: HealthPolicy::AllowAll };
    let mesh = mesh_of(Service { balancing: Some(balancing), ..headless });
    assert_eq!(
        told(ask(&mesh, "db", Family::V4)),
        "shop/db.shop.svc.cluster.local 10.0.0.1 10.0.0.2 10.0.0.3"
    );
}

#[test]
fn what_is_found_and_has_nothing_is_found() {
    let found = |service: Service, family| ask(&mesh([service], []), "cart", family).expect("found");
    let v4 = kubernetes("shop", "cart", &["10.96.0.1"]);
    assert!(found(v4, Family::V6).addresses.is_empty());
    let both = kubernetes("shop", "cart", &["10.96.0.1", "fd96::1"]);
    for (families, family, said) in [
        (IpFamilies::V4Only, Family::V4, Some("10.96.0.1")),
        (IpFamilies::V4Only, Family::V6, None),
        (IpFamilies::V6Only, Family::V4, None),
        (IpFamilies::V6Only, Family::V6, Some("fd96::1")),
        (IpFamilies::Dual, Family::V6, Some("fd96::1")),
    ] {
        let found = found(Service { ip_families: Some(families), ..both.clone() }, family);
        let addresses: Vec<_> = said.iter().map(|text| text.parse::<IpAddr>().unwrap()).collect();
        assert_eq!((found.addresses, found.unsupported), (addresses, said.is_none()), "{families:?}");
    }
    let config = Config::new(DOMAIN, None, false);
    let found = find(&mesh([both], []), &config, &client(), "cart", Family::V6, 0).expect("found");
    assert!(found.addresses.is_empty() && found.unsupported, "IPv6 is switched off");
}

#[test]
fn each_address_comes_first_at_times_and_there_are_not_too_many() {
    let host = "db.shop.svc.cluster.local";
    let pods = |count: usize| -> Vec<Workload> {
        let address = |at: usize| format!("10.{}.{}.1", at / 256, at % 256);
        (0..count).map(|at| endpoint(&format!("e{at}"), "shop", host, &[&*address(at)])).collect()
    };
    let three = mesh([kubernetes("shop", "db", &[])], pods(3));
    let first = |roll| find(&three, &config(), &client(), "db", Family::V4, roll).unwrap().addresses[0];
    let firsts: BTreeSet<_> = (0..64).map(first).collect();
    assert_eq!(firsts.len(), 3);
    let many = mesh([kubernetes("shop", "db", &[])], pods(3000));
    let answer = |roll| -> BTreeSet<IpAddr> {
        find(&many, &config(), &client(), "db", Family::V4, roll).unwrap().addresses.into_iter().collect()
    };
    assert_eq!(answer(1).len(), ADDRESSES_MAX, "each once");
    assert_ne!(answer(1), answer(2), "others the next time");
}

#[test]
fn a_headless_service_is_there_as_long_as_somebody_is_ready() {
    let host = "db.shop.svc.cluster.local";
    let at = |addresses: &[&str]| endpoint("db-0", "shop", host, addresses);
    let any =
        LoadBalancing { mode: BalanceMode::Any, scopes: Box::default(), health: HealthPolicy::AllowAll };
    let headless = kubernetes("shop", "db", &[]);
    let tolerant = Service { balancing: Some(any), ..headless.clone() };
    let sick = |addresses: &[&str]| Workload { healthy: false, ..at(addresses) };
    let far = Workload { network: "far".into(), ..at(&["10.0.0.1"]) };
    for (case, service, endpoints, exists) in [
        ("nobody", &headless, vec![], false),
        ("not ready", &headless, vec![sick(&["10.0.0.1"])], false),
        ("not ready, which does not matter", &tolerant, vec![sick(&["10.0.0.1"])], true),
        ("of the other family", &headless, vec![at(&["fd00::1"])], true),
        ("in another network", &headless, vec![far], true),
        ("ready", &headless, vec![at(&["10.0.0.1"])], true),
        ("a virtual address needs nobody", &kubernetes("shop", "db", &["10.96.0.1"]), vec![], true),
    ] {
        let mesh = mesh([service.clone()], endpoints);
        for (name, alias) in [(host, None), ("db", None), ("db.shop.shop.svc.cluster.local", Some("db.shop"))]
        {
            let found = ask(&mesh, name, Family::V4).expect("found");
            assert_eq!(found.exists, exists, "{case}: {name}");
            // The name that was asked for is what is not there.
            assert_eq!(found.alias_of.as_deref(), alias.filter(|_| exists), "{case}: {name}");
            let zone = (name != "db" && found.alias_of.is_none()).then_some(DOMAIN);
            assert_eq!(found.zone.as_deref(), zone, "{case}: {name}");
            let has = has(&mesh, &config(), &client(), name);
            assert_eq!(has, exists.then(|| (name != "db").then(|| DOMAIN.into())), "{case}: {name}");
        }
    }
}

#[test]
fn what_a_service_is_called_is_compared_without_case() {
    let mesh = mesh(
        [
            Service {
                hostname: "api.example.com".into(),
                ..service("shop", "API.Example.COM", &["240.0.0.1"])
            },
            kubernetes("shop", "cart", &["10.96.0.1"]),
        ],
        [],
    );
    assert_eq!(told(ask(&mesh, "api.example.com", Family::V4)), "shop/api.example.com 240.0.0.1");
    for (name, has_it) in [
        ("api.example.com", true),
        ("cart", true),
        ("cart.shop.svc.cluster.local", true),
        ("www.example.com", false),
        ("_http._tcp.cart.shop.svc.cluster.local", false),
        ("1.0.96.10.in-addr.arpa", false),
    ] {
        assert_eq!(has(&mesh, &config(), &client(), name).is_some(), has_it, "{name}");
    }
}
