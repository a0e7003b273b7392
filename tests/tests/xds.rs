//! The mesh from a control plane over the network, well and badly behaved. Needs no privileges.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use tokio::sync::watch;
use ztunnel_mesh::store::{MeshReader, demand, mesh};
use ztunnel_node::telemetry::line::Format;
use ztunnel_node::telemetry::{self, Telemetry, writer};
use ztunnel_node::xds::client::{self, Config, Identity, Status};
use ztunnel_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use ztunnel_proto::prost::Message;
use ztunnel_proto::{Any, security, workload};
use ztunnel_runtime::shutdown;
use ztunnel_tests::ca::Keys;
use ztunnel_tests::control_plane::{ControlPlane, Served};
use ztunnel_tls::grpc::{self, Roots, Token};

ztunnel_tests::enclosed!();

const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
/// What takes longer than this never comes: a test waits for many things in turn.
const PATIENCE: Duration = Duration::from_secs(300);

/// A client and what it made of what it was told.
struct Client {
    mesh: MeshReader,
    status: watch::Receiver<Status>,
    telemetry: Telemetry,
    _stop: shutdown::Trigger,
}

impl Client {
    fn start(config: Config) -> Self {
        Self::start_with(config, None)
    }

    fn start_with(config: Config, look_ups: Option<demand::Config>) -> Self {
        let (mesh_writer, mut mesh) = mesh();
        let (stop, signal) = shutdown::channel();
        let log = writer::start(Box::new(io::sink()), Format::Plain).expect("a log writer");
        let telemetry = Telemetry::new(telemetry::Config::default(), log);
        let status = match look_ups {
            None => client::start(config, mesh_writer, &telemetry, signal),
            Some(bounds) => {
                let (demand, demands) = demand::channel(bounds);
                mesh = mesh.on_demand(demand);
                client::start_on_demand(config, demands, mesh_writer, &telemetry, signal)
            }
        };
        Self { mesh, status, telemetry, _stop: stop }
    }

    async fn until(&mut self, what: impl FnMut(&Status) -> bool) -> Status {
        *self.status.wait_for(what).await.expect("the client runs")
    }

    async fn until_workloads(&mut self, count: usize) {
        while self.mesh.snapshot().workloads().len() != count {
            assert!(self.mesh.changed().await);
        }
    }

    fn metric(&self, start: &str) -> u64 {
        let all = self.telemetry.encode_metrics().expect("metrics");
        let line = all.lines().find(|line| line.starts_with(start));
        let line = line.unwrap_or_else(|| panic!("no {start} in\n{all}"));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    }
}

static KEYS: LazyLock<Arc<Keys>> = LazyLock::new(|| Keys::new("root"));

/// A port of the loopback.
fn at(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// `config`, with another way to talk to the control plane.
fn talking(config: Config, change: impl FnOnce(&mut grpc::Config)) -> Config {
    let mut config = config;
    change(&mut config.plane);
    config
}

fn config(plane: &ControlPlane) -> Config {
    Config {
        plane: grpc::Config {
            address: plane.address.to_string().parse().expect("an address"),
            roots: Roots::Pem(KEYS.root_pem()),
            alternate: None,
            token: Token::None,
            cluster: "c1".into(),
            headers: vec![(http::HeaderName::from_static("x-extra"), http::HeaderValue::from_static("1"))],
        },
        identity: Identity { pod: "z".into(), namespace: "istio-system".into(), ..Identity::default() },
        answer_timeout: PATIENCE,
        cache: None,
    }
}

fn test(body: impl Future<Output = ()>) {
    test_for(PATIENCE, body);
}

fn test_for(patience: Duration, body: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async { tokio::time::timeout(patience, body).await.expect("in time") });
}

fn resource(type_url: &str, name: &str, version: &str, message: impl Message) -> Resource {
    let any = Any { type_url: type_url.into(), value: message.encode_to_vec().into() };
    Resource { name: name.into(), version: version.into(), resource: Some(any), ..Resource::default() }
}

fn pod(number: usize) -> Resource {
    let uid = format!("c//Pod/shop/p{number}");
    let it = workload::Workload {
        uid: uid.clone(),
        name: format!("p{number}"),
        namespace: "shop".into(),
        addresses: vec![(number as u32 + 0x0a00_0000).to_be_bytes().to_vec().into()],
        tunnel_protocol: 1,
        ..Default::default()
    };
    let it = workload::Address { r#type: Some(workload::address::Type::Workload(it)) };
    resource(ADDRESS, &uid, &format!("v{number}"), it)
}

fn policy(name: &str) -> Resource {
    let it = security::Authorization { name: name.into(), namespace: "shop".into(), ..Default::default() };
    resource(AUTHORIZATION, &format!("shop/{name}"), "", it)
}

fn response(type_url: &str, nonce: &str, resources: Vec<Resource>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse { type_url: type_url.into(), nonce: nonce.into(), resources, ..Default::default() }
}

fn is_accepted(answer: &DeltaDiscoveryRequest, nonce: &str) -> bool {
    answer.response_nonce == nonce && answer.error_detail.is_none() && answer.node.is_none()
}

/// The two requests with which a client begins.
async fn begin(plane: &mut ControlPlane) -> (Served, [DeltaDiscoveryRequest; 2]) {
    let mut stream = plane.stream().await;
    let first = stream.request().await.expect("a request");
    let second = stream.request().await.expect("another one");
    assert_eq!([&*first.type_url, &*second.type_url], [ADDRESS, AUTHORIZATION]);
    (stream, [first, second])
}

#[test]
fn a_mesh_comes_over_a_stream_and_goes_on_over_the_next() {
    test(async {
        let mut plane = ControlPlane::start(at(0), KEYS.serving().into()).await;
        let token = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(token.path(), "first\n").expect("written");
        let token_file = Token::File(token.path().into());
        let mut client = Client::start(talking(config(&plane), |plane| plane.token = token_file));
        let (mut stream, first) = begin(&mut plane).await;
        assert_eq!(
            first[0].node.as_ref().expect("a node").id,
            "ztunnel~1.1.1.1~z.istio-system~istio-system.svc.cluster.local"
        );
        let header = |stream: &Served, name| {
            stream.headers.get(name).map(|value| value.to_str().expect("text").to_owned())
        };
        assert_eq!(header(&stream, "authorization").as_deref(), Some("Bearer first"));
        assert_eq!(header(&stream, "clusterid").as_deref(), Some("c1"));
        assert_eq!(header(&stream, "x-extra").as_deref(), Some("1"));
        // Policies first, then the addresses, in two parts and one of them twice.
        assert!(is_accepted(&stream.push(response(AUTHORIZATION, "n1", vec![policy("p")])).await, "n1"));
        assert!(!client.status.borrow().synced);
        assert!(is_accepted(&stream.push(response(ADDRESS, "n2", vec![pod(1)])).await, "n2"));
        assert!(is_accepted(&stream.push(response(ADDRESS, "n3", vec![pod(2), pod(3)])).await, "n3"));
        assert!(is_accepted(&stream.push(response(ADDRESS, "n3", vec![pod(2), pod(3)])).await, "n3"));
        let status = client.until(|status| status.synced).await;
        assert_eq!(status.stale_since, None);
        let mesh = client.mesh.snapshot();
        assert_eq!((mesh.workloads().len(), mesh.policies().len()), (3, 1));
        assert!(mesh.workload_at("", [10, 0, 0, 2].into()).is_some());

        std::fs::write(token.path(), "second").expect("written");
        drop(stream);
        client.until(|status| status.stale_since.is_some()).await;
        assert_eq!(client.mesh.snapshot().workloads().len(), 3, "what is known stays");
        let (mut stream, again) = begin(&mut plane).await;
        assert_eq!(header(&stream, "authorization").as_deref(), Some("Bearer second"));
        assert_eq!(again[0].initial_resource_versions.len(), 3);
        assert_eq!(again[0].initial_resource_versions["c//Pod/shop/p2"], "v2");
        assert_eq!(again[1].initial_resource_versions["shop/p"], "");
        let mut gone = response(ADDRESS, "n1", vec![]);
        gone.removed_resources = vec!["c//Pod/shop/p1".into(), "c//Pod/shop/p2".into()];
        assert!(is_accepted(&stream.push(gone).await, "n1"));
        client.until_workloads(1).await;
        assert_eq!(client.metric("istio_xds_connection_terminations_total{reason=\"Complete\"}"), 1);
        assert_eq!(client.metric(&format!("istio_xds_message_total{{url=\"{ADDRESS}\"}}")), 4);
        assert!(client.metric(&format!("istio_xds_message_bytes_total{{url=\"{ADDRESS}\"}}")) > 100);
        assert_eq!(client.metric("ztunnel_xds_connected"), 1);
    });
}

#[test]
fn what_is_bad_is_refused_again_and_again_and_nothing_else_suffers() {
    test(async {
        let mut plane = ControlPlane::start(at(0), KEYS.serving().into()).await;
        let mut client = Client::start(config(&plane));
        let (mut stream, _) = begin(&mut plane).await;
        let bad = || resource(ADDRESS, "bad", "1", workload::Address { r#type: None });
        for round in 0..20 {
            let nonce = round.to_string();
            let answer = stream.push(response(ADDRESS, &nonce, vec![bad(), pod(round)])).await;
            let error = answer.error_detail.expect("refused");
            assert_eq!(
                (answer.response_nonce, &*error.message),
                (nonce, "bad: the workload or service is missing")
            );
        }
        let answer = stream.push(response("type.googleapis.com/other", "n", vec![])).await;
        assert!(answer.error_detail.is_some() && answer.type_url == "type.googleapis.com/other");
        let status = client.until(|status| status.rejected == 20).await;
        assert!(!status.synced);
        assert_eq!(client.mesh.snapshot().workloads().len(), 20);
        assert_eq!(client.metric(&format!("ztunnel_xds_rejected_resources_total{{url=\"{ADDRESS}\"}}")), 20);
    });
}

#[test]
fn a_large_mesh_comes_in_one_message_and_breaks_in_the_middle_of_one() {
    test(async {
        let mut plane = ControlPlane::start(at(0), KEYS.serving().into()).await;
        let mut client = Client::start(config(&plane));
        let (mut stream, _) = begin(&mut plane).await;
        let all = |from: usize| (from..from + 20_000).map(pod).collect();
        assert!(is_accepted(&stream.push(response(ADDRESS, "n1", all(0))).await, "n1"));
        client.until_workloads(20_000).await;
        plane.break_after(300_000);
        stream.send(response(ADDRESS, "n2", all(20_000))).await;
        client.until(|status| status.stale_since.is_some()).await;
        assert_eq!(client.mesh.snapshot().workloads().len(), 20_000, "half a message is none");
        plane.break_after(usize::MAX);
        let (mut stream, first) = begin(&mut plane).await;
        assert_eq!(first[0].initial_resource_versions.len(), 20_000);
        assert!(is_accepted(&stream.push(response(ADDRESS, "n1", all(20_000))).await, "n1"));
        client.until_workloads(40_000).await;
    });
}

#[test]
fn a_hundred_megabytes_are_taken_at_once_and_more_than_twice_as_much_is_not() {
    test_for(PATIENCE * 5, async {
        const MIB: usize = 1 << 20;
        let large = |number: usize| {
            let Any { value, .. } = pod(number).resource.expect("a resource");
            let mut it = workload::Address::decode(value).expect("an address");
            if let Some(workload::address::Type::Workload(it)) = &mut it.r#type {
                it.canonical_revision = "r".repeat(MIB);
            }
            resource(ADDRESS, &format!("c//Pod/shop/p{number}"), "v1", it)
        };
        let all = |count: usize| (0..count).map(large).collect();
        let mut plane = ControlPlane::start(at(0), KEYS.serving().into()).await;
        // Nobody is taken for silent while all that is made.
        let config = Config { answer_timeout: PATIENCE * 5, ..config(&plane) };
        let mut client = Client::start(config);
        let (mut stream, _) = begin(&mut plane).await;
        assert!(is_accepted(&stream.push(response(ADDRESS, "n1", all(100))).await, "n1"));
        assert_eq!(client.mesh.snapshot().workloads().len(), 100);
        stream.send(response(ADDRESS, "n2", all(201))).await;
        assert!(stream.request().await.is_none(), "the client hangs up");
        let (mut stream, first) = begin(&mut plane).await;
        assert_eq!(first[0].initial_resource_versions.len(), 100, "what is known stays");
        assert_eq!(client.metric("istio_xds_connection_terminations_total{reason=\"Error\"}"), 1);
        assert!(is_accepted(&stream.push(response(ADDRESS, "n1", vec![pod(200)])).await, "n1"));
        client.until_workloads(101).await;
    });
}

#[test]
fn a_control_plane_that_hangs_hangs_up_or_refuses_is_asked_again_with_pauses() {
    test(async {
        let mut plane = ControlPlane::start(at(0), KEYS.serving().into()).await;
        let token = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(token.path(), "expired").expect("written");
        let token_file = Token::File(token.path().into());
        let impatient = Config { answer_timeout: Duration::from_millis(300), ..config(&plane) };
        let client = Client::start(talking(impatient, |plane| plane.token = token_file));
        while client.metric("istio_xds_connection_terminations_total{reason=\"ConnectionError\"}") < 2 {
            tokio::task::yield_now().await;
        }
        std::fs::write(token.path(), "good").expect("written");
        // It says nothing. A client that gives up so soon may even do so before it has said all.
        let mut stream = plane.stream().await;
        while stream.request().await.is_some() {}
        drop((client, stream));
        // It hangs up at once, several times. Who is patient waits no longer than it must.
        let mut plane = ControlPlane::start(at(0), KEYS.serving().into()).await;
        let mut client = Client::start(config(&plane));
        let started = Instant::now();
        let before = plane.connections();
        for _ in 0..4 {
            drop(begin(&mut plane).await);
        }
        let (mut stream, _) = begin(&mut plane).await;
        assert!(started.elapsed() > Duration::from_millis(10 + 20 + 40 + 80) / 2, "{:?}", started.elapsed());
        assert!(plane.connections() - before <= 6);
        assert!(is_accepted(&stream.push(response(ADDRESS, "n1", vec![pod(1)])).await, "n1"));
        // It goes away for a moment, in good order.
        stream.fail(tonic::Status::unavailable("transport is closing")).await;
        let (mut stream, _) = begin(&mut plane).await;
        assert_eq!(client.metric("istio_xds_connection_terminations_total{reason=\"Reconnect\"}"), 1);
        assert!(is_accepted(&stream.push(response(AUTHORIZATION, "n1", vec![])).await, "n1"));
        client.until(|status| status.synced).await;
        // It restarts.
        let port = plane.address.port();
        drop((stream, plane));
        client.until(|status| status.stale_since.is_some()).await;
        let mut plane = ControlPlane::start(at(port), KEYS.serving().into()).await;
        let (mut stream, first) = begin(&mut plane).await;
        assert_eq!(first[0].initial_resource_versions.len(), 1);
        assert!(is_accepted(&stream.push(response(ADDRESS, "n1", vec![pod(2)])).await, "n1"));
        client.until_workloads(2).await;
        assert!(client.status.borrow().synced);
    });
}

#[test]
fn on_demand_what_is_not_known_is_asked_for_and_then_there() {
    test(async {
        let mut plane = ControlPlane::start(at(0), KEYS.serving().into()).await;
        let mut client = Client::start_with(config(&plane), Some(demands(PATIENCE)));
        let (mut stream, first) = begin(&mut plane).await;
        assert_eq!(first[0].resource_names_subscribe, ["*"]);
        assert_eq!(first[0].resource_names_unsubscribe, ["*"]);
        stream.push(response(AUTHORIZATION, "n1", vec![])).await;
        client.until(|status| status.synced && status.confirmed).await;
        let mesh = client.mesh.clone();
        let demand = mesh.demand().expect("on demand");
        let named = |number: usize| Resource { aliases: vec![format!("/10.0.0.{number}")], ..pod(number) };

        let (found, ()) = tokio::join!(demand.look_up("/10.0.0.1"), async {
            let asked = stream.request().await.expect("a request");
            assert_eq!((&*asked.type_url, asked.node), (ADDRESS, None));
            assert_eq!(asked.resource_names_subscribe, ["/10.0.0.1"]);
            assert!(asked.resource_names_unsubscribe.is_empty());
            assert!(is_accepted(&stream.push(response(ADDRESS, "n2", vec![named(1)])).await, "n2"));
        });
        assert_eq!(found, Ok(()));
        assert!(mesh.snapshot().workload_at("", [10, 0, 0, 1].into()).is_some(), "it is there by then");

        // There is nobody at another one. While it is remembered nobody asks.
        let (gone, ()) = tokio::join!(demand.look_up("/10.0.0.9"), async {
            let asked = stream.request().await.expect("a request");
            assert_eq!(asked.resource_names_subscribe, ["/10.0.0.9"]);
            let mut none = response(ADDRESS, "n3", vec![]);
            none.removed_resources = vec!["/10.0.0.9".into()];
            assert!(is_accepted(&stream.push(none).await, "n3"));
        });
        assert_eq!(gone, Ok(()));
        assert_eq!(demand.look_up("/10.0.0.9").await, Ok(()));
        assert_eq!(client.metric("ztunnel_xds_look_ups_total{result=\"answered\"}"), 2);
        assert_eq!(client.metric("ztunnel_xds_look_ups_total{result=\"known\"}"), 1);

        // Who asks while there is no control plane is answered by the next one.
        drop(stream);
        client.until(|status| status.stale_since.is_some()).await;
        let (found, ()) = tokio::join!(demand.look_up("/10.0.0.2"), async {
            let (mut stream, first) = begin(&mut plane).await;
            let wanted = &first[0].initial_resource_versions;
            assert_eq!(wanted.get("c//Pod/shop/p1").map(String::as_str), Some("v1"));
            // It is in the first request, or comes after it.
            if !wanted.contains_key("/10.0.0.2") {
                let asked = stream.request().await.expect("a request");
                assert_eq!(asked.resource_names_subscribe, ["/10.0.0.2"]);
            }
            assert!(is_accepted(&stream.push(response(ADDRESS, "n1", vec![named(2)])).await, "n1"));
        });
        assert_eq!(found, Ok(()));
        client.until_workloads(2).await;
    });
}

#[test]
fn on_demand_what_is_not_there_is_unsubscribed_from_after_a_while() {
    test(async {
        let mut plane = ControlPlane::start(at(0), KEYS.serving().into()).await;
        let mut client = Client::start_with(config(&plane), Some(demands(Duration::from_millis(100))));
        let (mut stream, _) = begin(&mut plane).await;
        stream.push(response(AUTHORIZATION, "n1", vec![])).await;
        client.until(|status| status.synced && status.confirmed).await;
        let mesh = client.mesh.clone();
        let demand = mesh.demand().expect("on demand");
        let (gone, ()) = tokio::join!(demand.look_up("/10.0.0.9"), async {
            let asked = stream.request().await.expect("a request");
            assert_eq!(asked.resource_names_subscribe, ["/10.0.0.9"]);
            let mut none = response(ADDRESS, "n2", vec![]);
            none.removed_resources = vec!["/10.0.0.9".into()];
            assert!(is_accepted(&stream.push(none).await, "n2"));
        });
        assert_eq!(gone, Ok(()));
        let unsubscribing = stream.request().await.expect("a request");
        assert_eq!(unsubscribing.resource_names_unsubscribe, ["/10.0.0.9"]);
        assert!(unsubscribing.resource_names_subscribe.is_empty());
    });
}

/// Questions are answered as soon as the test does so, and what is not there is remembered for so long.
fn demands(absent_for: Duration) -> demand::Config {
    demand::Config { absent_for, wait: PATIENCE, ..demand::Config::default() }
}

#[test]
fn on_demand_what_nobody_uses_is_unsubscribed_from_and_stays_so_with_the_next_control_plane() {
    test(async {
        let folder = tempfile::tempdir().expect("a folder");
        let mut plane = ControlPlane::start(at(0), KEYS.serving().into()).await;
        let identity = Identity { node: "own".into(), ..config(&plane).identity };
        let kept = Some(folder.path().join("mesh"));
        let config = Config { identity, cache: kept, ..config(&plane) };
        // What is used is so again before that, however busy the machine is.
        let bounds = demand::Config { unused_for: Duration::from_secs(3), ..demand::Config::default() };
        let mut client = Client::start_with(config.clone(), Some(bounds));
        let (mut stream, _) = begin(&mut plane).await;
        stream.push(response(AUTHORIZATION, "n1", vec![])).await;
        let mesh = client.mesh.clone();
        let demand = mesh.demand().expect("on demand");
        let of_node = |number: usize, node: &str| {
            let Any { value, .. } = pod(number).resource.expect("a resource");
            let mut it = workload::Address::decode(value).expect("an address");
            if let Some(workload::address::Type::Workload(it)) = &mut it.r#type {
                it.node = node.into();
            }
            let aliases = vec![format!("/10.0.0.{number}")];
            Resource { aliases, ..resource(ADDRESS, &format!("c//Pod/shop/p{number}"), "v1", it) }
        };
        // Those of the node come by themselves. They stay, as does what is used.
        assert!(is_accepted(&stream.push(response(ADDRESS, "n2", vec![of_node(1, "own")])).await, "n2"));
        let (found, ()) = tokio::join!(demand.look_up("/10.0.0.2"), async {
            let asked = stream.request().await.expect("a request");
            assert_eq!(asked.resource_names_subscribe, ["/10.0.0.2"]);
            let both = vec![of_node(2, "far"), of_node(3, "far")];
            assert!(is_accepted(&stream.push(response(ADDRESS, "n3", both)).await, "n3"));
        });
        assert_eq!(found, Ok(()));
        let uses = async {
            loop {
                demand.touch("c//Pod/shop/p3");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let unsubscribing = async {
            let request = stream.request().await.expect("a request");
            let mut names = request.resource_names_unsubscribe;
            names.sort_unstable();
            assert!(request.resource_names_subscribe.is_empty());
            names
        };
        let names = tokio::select! {
            names = unsubscribing => names,
            () = uses => unreachable!("it goes on"),
        };
        assert_eq!(names, ["/10.0.0.2", "c//Pod/shop/p2"]);
        client.until_workloads(2).await;
        let snapshot = mesh.snapshot();
        assert!(
            snapshot.workload("c//Pod/shop/p1").is_some() && snapshot.workload("c//Pod/shop/p3").is_some()
        );

        // What was sent before the control plane heard of it is taken, and asked for again.
        let late = response(ADDRESS, "n4", vec![of_node(2, "far")]);
        stream.send(late).await;
        let (mut answered, mut asked) = (false, false);
        while !(answered && asked) {
            let request = stream.request().await.expect("a request");
            answered |= is_accepted(&request, "n4");
            asked |= request.resource_names_subscribe == ["c//Pod/shop/p2"];
        }
        // All but the node's own goes in the end.
        client.until_workloads(1).await;
        assert!(mesh.snapshot().workload("c//Pod/shop/p1").is_some());
        assert!(client.metric("ztunnel_xds_unsubscribed_total") >= 3);
        drop(stream);
        let (_stream, first) = begin(&mut plane).await;
        let wanted: Vec<_> = first[0].initial_resource_versions.keys().map(String::as_str).collect();
        assert_eq!(wanted, ["c//Pod/shop/p1"]);
        // Nor does the file have it.
        until_written(client).await;
        let mut client = Client::start_with(config, Some(demand::Config::default()));
        client.until(|status| status.synced).await;
        assert_eq!(client.mesh.snapshot().workloads().len(), 1);
    });
}

/// Ends the client, and waits until all it knew is in its file.
async fn until_written(client: Client) {
    let Client { telemetry, _stop: stop, .. } = client;
    stop.close();
    while !telemetry.encode_metrics().expect("metrics").contains("ztunnel_xds_cache_pending 0\n") {
        tokio::task::yield_now().await;
    }
}

#[test]
fn the_last_good_mesh_is_served_without_a_control_plane_and_put_right_by_the_next() {
    test(async {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = folder.path().join("mesh");
        let mut plane = ControlPlane::start(at(0), KEYS.serving().into()).await;
        let kept = || Some(cache.clone());
        let mut client = Client::start(Config { cache: kept(), ..config(&plane) });
        let (mut stream, first) = begin(&mut plane).await;
        assert!(first[0].initial_resource_versions.is_empty());
        assert_eq!(client.metric("ztunnel_xds_cache_loads_total{result=\"absent\"}"), 1);
        stream.push(response(ADDRESS, "n1", vec![pod(1), pod(2), pod(3)])).await;
        // Policies belong to a mesh, so there is none without: nothing may be written yet.
        assert!(!cache.exists());
        stream.push(response(AUTHORIZATION, "n2", vec![policy("p"), policy("q")])).await;
        client.until(|status| status.confirmed).await;
        let mut gone = response(ADDRESS, "n3", vec![]);
        gone.removed_resources = vec!["c//Pod/shop/p3".into()];
        stream.push(gone).await;
        until_written(client).await;
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&cache).expect("a file").permissions().mode() & 0o777, 0o600);
        let port = plane.address.port();
        let config = config(&plane);
        drop((stream, plane));

        // There is no control plane that it could be from.
        let mut client = Client::start(Config { cache: kept(), ..config.clone() });
        let status = client.until(|status| status.synced).await;
        assert!(!status.confirmed && status.stale_since.is_some());
        let mesh = client.mesh.snapshot();
        assert_eq!((mesh.workloads().len(), mesh.policies().len()), (2, 2));
        assert_eq!(client.metric("ztunnel_xds_cache_loads_total{result=\"whole\"}"), 1);

        let mut plane = ControlPlane::start(at(port), KEYS.serving().into()).await;
        let (mut stream, first) = begin(&mut plane).await;
        let versions = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(name, version)| (name.to_string(), version.to_string())).collect()
        };
        let held = versions(&[("c//Pod/shop/p1", "v1"), ("c//Pod/shop/p2", "v2")]);
        assert_eq!(first[0].initial_resource_versions, held);
        assert_eq!(first[1].initial_resource_versions, versions(&[("shop/p", ""), ("shop/q", "")]));
        // What went while nobody was told is gone now.
        let mut changed = response(ADDRESS, "n1", vec![pod(4)]);
        changed.removed_resources = vec!["c//Pod/shop/p1".into()];
        assert!(is_accepted(&stream.push(changed).await, "n1"));
        assert!(!client.status.borrow().confirmed, "not every type was heard of");
        let mut fewer = response(AUTHORIZATION, "n2", vec![policy("p")]);
        fewer.removed_resources = vec!["shop/q".into()];
        assert!(is_accepted(&stream.push(fewer).await, "n2"));
        let status = client.until(|status| status.confirmed).await;
        assert_eq!((status.stale_since, client.metric("ztunnel_xds_mesh_age_seconds")), (None, 0));
        let mesh = client.mesh.snapshot();
        assert!(mesh.workload("c//Pod/shop/p1").is_none() && mesh.workload("c//Pod/shop/p4").is_some());
        assert_eq!(mesh.policies().len(), 1);
        until_written(client).await;
        drop((stream, plane));

        // The file says the same.
        let mut client = Client::start(Config { cache: kept(), ..config.clone() });
        client.until(|status| status.synced).await;
        let mesh = client.mesh.snapshot();
        assert!(mesh.workload("c//Pod/shop/p1").is_none() && mesh.workload("c//Pod/shop/p4").is_some());
        assert_eq!((mesh.workloads().len(), mesh.policies().len()), (2, 1));
        drop(client);
        // That of another cluster is not believed.
        let other = talking(Config { cache: kept(), ..config }, |plane| plane.cluster = "c2".into());
        let client = Client::start(other);
        while client.metric("ztunnel_xds_cache_loads_total{result=\"foreign\"}") == 0 {
            tokio::task::yield_now().await;
        }
        assert!(!client.status.borrow().synced);
    });
}

#[test]
fn a_large_mesh_is_kept_and_served_again_at_once() {
    test(async {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = folder.path().join("mesh");
        let mut plane = ControlPlane::start(at(0), KEYS.serving().into()).await;
        let config = Config { cache: Some(cache.clone()), ..config(&plane) };
        let mut client = Client::start(config.clone());
        let (mut stream, _) = begin(&mut plane).await;
        stream.push(response(AUTHORIZATION, "n1", vec![policy("p")])).await;
        let all: Vec<_> = (0..20_000).map(pod).collect();
        let weight: usize = all.iter().map(Message::encoded_len).sum();
        stream.push(response(ADDRESS, "n2", all)).await;
        client.until(|status| status.confirmed).await;
        until_written(client).await;
        assert!(
            std::fs::metadata(&cache).expect("a file").len() < weight as u64,
            "no more than was received"
        );
        drop((stream, plane));
        let mut client = Client::start(config);
        client.until(|status| status.synced).await;
        assert_eq!(client.mesh.snapshot().workloads().len(), 20_000);
    });
}

#[test]
fn a_file_that_is_damaged_is_not_used_and_made_anew() {
    test(async {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = folder.path().join("mesh");
        let mut plane = ControlPlane::start(at(0), KEYS.serving().into()).await;
        let kept = || Some(cache.clone());
        for round in 0..2 {
            let mut client = Client::start(Config { cache: kept(), ..config(&plane) });
            let (mut stream, first) = begin(&mut plane).await;
            assert!(first[0].initial_resource_versions.is_empty());
            assert_eq!(client.metric("ztunnel_xds_cache_loads_total{result=\"damaged\"}"), round);
            assert!(!client.status.borrow().synced);
            stream.push(response(AUTHORIZATION, "n1", vec![policy("p")])).await;
            stream.push(response(ADDRESS, "n2", vec![pod(1)])).await;
            client.until(|status| status.synced).await;
            until_written(client).await;
            let mut bytes = std::fs::read(&cache).expect("a file");
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&cache, bytes).expect("written");
        }
    });
}

/// A root, as PEM, and a server's configuration with a certificate of it for this name.
fn certified(name: &str) -> (String, Arc<ServerConfig>) {
    let key = || KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "root");
    let root = CertifiedIssuer::self_signed(params, key()).expect("a root");
    let own = key();
    let leaf =
        CertificateParams::new([name.to_owned()]).expect("a name").signed_by(&own, &root).expect("signed");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], own.serialize_der().try_into().expect("a key"))
        .expect("a certificate");
    config.alpn_protocols = vec![b"h2".to_vec()];
    (root.pem(), Arc::new(config))
}

#[test]
fn only_a_control_plane_that_the_root_vouches_for_is_believed() {
    test(async {
        let (root, tls) = certified("localhost");
        let (other, _) = certified("localhost");
        let mut plane = ControlPlane::start(at(0), tls).await;
        let folder = tempfile::tempdir().expect("a folder");
        let file: PathBuf = folder.path().join("root-cert.pem");
        let address = format!("https://localhost:{}", plane.address.port()).parse().expect("an address");
        let secure = talking(config(&plane), |plane| {
            (plane.address, plane.roots) = (address, Roots::File(file.clone()));
        });
        // No file, then the wrong root, then the right one: read again for every connection.
        let client = Client::start(secure);
        while client.metric("istio_xds_connection_terminations_total{reason=\"Error\"}") < 2 {
            tokio::task::yield_now().await;
        }
        assert_eq!(plane.connections(), 0);
        std::fs::write(&file, other).expect("written");
        while client.metric("istio_xds_connection_terminations_total{reason=\"ConnectionError\"}") < 2 {
            tokio::task::yield_now().await;
        }
        std::fs::write(&file, root).expect("written");
        let (mut stream, _) = begin(&mut plane).await;
        assert!(is_accepted(&stream.push(response(ADDRESS, "n1", vec![pod(1)])).await, "n1"));
    });
}

#[test]
fn another_name_is_believed_only_if_it_was_configured() {
    test(async {
        let (root, tls) = certified("istiod.istio-system.svc");
        let mut plane = ControlPlane::start(at(0), tls).await;
        let address: grpc::Address =
            format!("https://localhost:{}", plane.address.port()).parse().expect("an address");
        let config = config(&plane);
        let with = |alt: Option<&str>| {
            talking(config.clone(), |plane| {
                (plane.address, plane.roots) = (address.clone(), Roots::Pem(root.clone()));
                plane.alternate = alt.map(str::to_owned);
            })
        };
        for wrong in [None, Some("istiod.other.svc")] {
            let client = Client::start(with(wrong));
            while client.metric("istio_xds_connection_terminations_total{reason=\"ConnectionError\"}") < 1 {
                tokio::task::yield_now().await;
            }
        }
        let right = with(Some("istiod.istio-system.svc"));
        let _client = Client::start(right);
        begin(&mut plane).await;
    });
}
