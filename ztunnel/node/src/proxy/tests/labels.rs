//! What the metrics of both ends say of one connection, on every way that it can take.

use ztunnel_mesh::model::service::GatewayAddress;
use ztunnel_mesh::model::service::GatewayDestination;

use super::*;
use crate::proxy::listing::Carrier;

const WEB: &str = "10.9.0.1";
const ADMIN: &str = "10.9.0.2";
const OUTSIDE: &str = "10.9.0.3";
const GUARDED: &str = "10.9.0.4";

/// The server is behind `web` and `admin`, at one port, behind `db`, which has no address of its own, and it is the
/// waypoint of `guarded`. `outside` is not in the mesh.
fn services() -> Mesh {
    let at = |ip: &str| NetworkAddress { network: "".into(), ip: ip.parse().unwrap() };
    let service = |name: &str, vip: Option<&str>, target: u16| Service {
        vips: vip.map(at).into_iter().collect(),
        ports: vec![ServicePort { port: 8000, target }],
        ..Service::sample("test", name)
    };
    let waypoint = GatewayAddress { destination: GatewayDestination::Address(at(SERVER)), hbone_port: 15008 };
    let services = [
        service("web", Some(WEB), 80),
        service("admin", Some(ADMIN), 80),
        service("db", None, 90),
        service("outside", Some(OUTSIDE), 443),
        Service { waypoint: Some(Arc::new(waypoint)), ..service("guarded", Some(GUARDED), 80) },
    ];
    let behind = |names: &[&str]| -> Box<[Membership]> {
        let key = |name: &&str| Service::sample("test", name).key;
        names.iter().map(|name| Membership { service: key(name), ports: Arc::from([]) }).collect()
    };
    let server = Workload {
        services: behind(&["admin", "db", "web"]),
        ..Workload::clone(&workload("server", SERVER))
    };
    let outside = Workload {
        reach: Reach::Plain,
        services: behind(&["outside"]),
        ..Workload::clone(&workload("outside", "10.0.0.3"))
    };
    let workloads = [workload("client", CLIENT), Arc::new(server), Arc::new(outside)];
    Mesh::new(TrustDomain::default(), workloads, services.map(Arc::new), [])
}

impl Node {
    /// What both ends have counted as opened: whom it goes from and to, by which service, and how it is secured.
    pub(super) fn told(&self) -> [Option<String>; 2] {
        let text = self.telemetry.encode_metrics().unwrap();
        ["source", "destination"].map(|reporter| {
            let start = format!("istio_tcp_connections_opened_total{{reporter=\"{reporter}\"");
            let mut lines = text.lines().filter(|line| line.starts_with(&start));
            let line = lines.next()?;
            assert!(lines.next().is_none(), "more than one series of {reporter}:\n{text}");
            let label = |name: &str| {
                let (_, rest) =
                    line.split_once(&format!("{name}=\"")).unwrap_or_else(|| panic!("no {name}: {line}"));
                let value = rest.split('"').next().unwrap_or_default();
                value.rsplit('/').next().unwrap_or_default()
            };
            let service =
                ["destination_service", "destination_service_name", "destination_service_namespace"];
            Some(format!(
                "{} as {} to {} as {} by {}: {}",
                label("source_workload"),
                label("source_principal"),
                label("destination_workload"),
                label("destination_principal"),
                service.map(label).join(" "),
                label("connection_security_policy"),
            ))
        })
    }
}

#[tokio::test]
async fn both_ends_tell_the_same_as_istio_on_every_way() {
    const NO_SERVICE: &str = "unknown unknown unknown";
    let tunnelled = |service: &str| format!("client as client to server as server by {service}: mutual_tls");
    let (web, admin, db) = ("web.test web test", "admin.test admin test", "db.test db test");
    let near = format!("client as client to server as server by {web}: unknown");
    for (way, dst, source, destination) in [
        // That it came to nothing is told of the service all the same.
        (
            "a port that the service does not have",
            format!("{WEB}:8001"),
            Some(format!("client as unknown to unknown as unknown by {web}: unknown")),
            None,
        ),
        // The server knows which of its services has the port, the client only that no service was dialled.
        ("a pod's address", SERVICE.to_owned(), Some(tunnelled(NO_SERVICE)), Some(tunnelled(admin))),
        ("a headless service", "10.0.0.2:90".to_owned(), Some(tunnelled(NO_SERVICE)), Some(tunnelled(db))),
        (
            "no service's port",
            "10.0.0.2:91".to_owned(),
            Some(tunnelled(NO_SERVICE)),
            Some(tunnelled(NO_SERVICE)),
        ),
        // Of two with the same port, the client says which.
        ("a virtual address", format!("{WEB}:8000"), Some(tunnelled(web)), Some(tunnelled(web))),
        ("the other one", format!("{ADMIN}:8000"), Some(tunnelled(admin)), Some(tunnelled(admin))),
        (
            "a waypoint",
            format!("{GUARDED}:80"),
            Some(tunnelled("guarded.test guarded test")),
            Some(tunnelled("guarded.test guarded test")),
        ),
        // Nothing is encrypted where there is no wire.
        ("the same node", format!("{WEB}:8000"), Some(near.clone()), Some(near)),
        (
            "plain, to what the mesh knows",
            format!("{OUTSIDE}:8000"),
            Some("client as unknown to outside as outside by outside.test outside test: unknown".to_owned()),
            None,
        ),
        (
            "plain, to what it does not know",
            "93.184.216.34:443".to_owned(),
            Some(format!("client as unknown to unknown as unknown by {NO_SERVICE}: unknown")),
            None,
        ),
        (
            "plain, to the pod",
            SERVICE.to_owned(),
            None,
            Some(format!("unknown as unknown to server as server by {admin}: unknown")),
        ),
    ] {
        let config = Config { threads: 1, linger: Duration::from_millis(50), ..Config::default() };
        let mut node = if way == "the same node" {
            Node::start_same_node(config).await
        } else {
            Node::start_with(config).await
        };
        node.mesh.publish(services());
        let app = node.app.local_addr().unwrap();
        // Where the server's tunnel port is in this process there is the waypoint, too.
        for place in ["10.0.0.2:90", "10.0.0.2:91", "10.0.0.3:443", "93.184.216.34:443", "127.0.0.1:80"] {
            node.place(place, app);
        }
        node.toward(&dst);
        let at = if way == "plain, to the pod" { node.inbound } else { node.outbound };
        if way.starts_with("a port that") {
            node.refused(at).await;
            assert_eq!(node.told(), [source, destination], "{way}");
            continue;
        }
        let mut client = TcpStream::connect(at).await.unwrap();
        let (mut server, _) = timeout(PATIENCE, node.app.accept()).await.expect("delivered").unwrap();
        say(&mut client, &mut server, b"hello").await;
        assert_eq!(node.told(), [source, destination], "{way}");
        // What is open is shown as what it is: where there is no wire there is no tunnel.
        let open: Vec<_> = node.plane.threads[0].shard.listing.all();
        let tunnelled = !way.starts_with("plain") && way != "the same node";
        let carrier = if tunnelled { Carrier::Hbone } else { Carrier::Tcp };
        assert!(!open.is_empty() && open.iter().all(|open| open.carrier == carrier), "{way}: {open:?}");
        let to_tunnel_port = open.iter().any(|open| open.actual.port() == HBONE_PORT);
        assert_eq!(to_tunnel_port, tunnelled, "{way}: {open:?}");
        // Whom nobody proved to be is not in the log.
        let proved = !way.starts_with("plain");
        drop((client, server));
        node.logged(&["connection complete"]).await;
        let log = String::from_utf8(node.log.0.lock().clone()).unwrap();
        assert_eq!(log.contains("dst.identity"), proved, "{way}: {log}");
    }
}
