//! The two pods in two networks, with a gateway between them.

use ztunnel_mesh::model::addr::NetworkAddress;
use ztunnel_mesh::model::service::GatewayAddress;
use ztunnel_mesh::model::service::GatewayDestination;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::service::ServicePort;
use ztunnel_mesh::model::workload::Membership;

use super::*;
use crate::hbone::through::Through;
use crate::proxy::listing::Carrier;

/// The service `web` of the far network, as the near one has it.
const WEB: &str = "10.9.0.1:80";

fn networks(policies: Vec<Policy>, serves: &[&str], gateway: &str) -> Mesh {
    let far = |name: &str, address: &str| Workload {
        network: "far".into(),
        ..Workload::clone(&workload(name, address))
    };
    let at = |network: &str, ip: &str| NetworkAddress { network: network.into(), ip: ip.parse().unwrap() };
    let destination = GatewayDestination::Address(at("far", "10.0.0.9"));
    let web = Service {
        vips: vec![at("near", "10.9.0.1")],
        ports: vec![ServicePort { port: 80, target: 80 }],
        identities: serves.iter().map(|name| id(name)).collect(),
        ..Service::sample("test", "web")
    };
    let server = Workload {
        network_gateway: Some(Arc::new(GatewayAddress { destination, hbone_port: 15008 })),
        services: Box::new([Membership { service: web.key.clone(), ports: Arc::from([]) }]),
        ..far("server", SERVER)
    };
    let client = Workload { network: "near".into(), ..Workload::clone(&workload("client", CLIENT)) };
    let gateway = Workload { identity: id(gateway), ..far("gateway", "10.0.0.9") };
    let workloads = [client, server, gateway].map(Arc::new);
    Mesh::new(TrustDomain::default(), workloads, [Arc::new(web)], policies.into_iter().map(Arc::new))
}

/// On one thread, which has one tunnel to the gateway then.
async fn start() -> Node {
    let config = Config { threads: 1, linger: Duration::from_millis(50), ..Config::default() };
    let mut node = Node::start_with(config).await;
    node.mesh.publish(networks(vec![], &["server"], "gateway"));
    node.toward(WEB);
    // Where the server's tunnel port is in this process.
    node.place("127.0.0.1:80", node.app.local_addr().unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    node.place("10.0.0.9:15008", listener.local_addr().unwrap());
    shutdown::spawn(gateway(listener, Arc::new(node.ca.certify(&id("gateway"))), node.hbone));
    node
}

/// Passes on to `to` what it cannot read, if the service was asked for.
async fn gateway(listener: TcpListener, own: Arc<Credentials>, to: SocketAddr) {
    while let Ok((socket, _)) = listener.accept().await {
        let tls = own.server_config();
        shutdown::spawn(async move {
            let config = hbone::Config::default();
            let Ok(accepted) = server::accept(socket, tls, &config).await else { return };
            let _ended = server::serve(accepted, &config, pending(), |incoming| {
                shutdown::spawn(async move {
                    if incoming.authority() != Authority::parse("web.test:80").ok()
                        || incoming.network().is_some()
                    {
                        return incoming.refuse(server::Refusal::BadRequest);
                    }
                    let (Ok(halves), Ok(mut pod)) = (incoming.connect(None), TcpStream::connect(to).await)
                    else {
                        return;
                    };
                    let _broken = tokio::io::copy_bidirectional(&mut Through::new(halves).0, &mut pod).await;
                });
            })
            .await;
        });
    }
}

#[tokio::test]
async fn a_connection_goes_through_a_tunnel_within_a_tunnel() {
    let node = start().await;
    for _ in 0..3 {
        let (mut client, mut server) = node.connect().await;
        say(&mut client, &mut server, b"question").await;
        say(&mut server, &mut client, b"answer").await;
        let carriers = node.plane.threads[0].shard.listing.all().into_iter().map(|open| open.carrier);
        let carriers: Vec<_> = carriers.collect();
        assert!(
            carriers.contains(&Carrier::DoubleHbone) && carriers.contains(&Carrier::Hbone),
            "{carriers:?}"
        );
        client.shutdown().await.unwrap();
        assert_eq!(ended(&mut server).await, b"");
        // The other direction is still open.
        say(&mut server, &mut client, b"more").await;
        drop(server);
        assert_eq!(ended(&mut client).await, b"");
    }
    assert_eq!(node.plane.threads[0].shard.pool.tunnels(), 1, "that to the gateway");
    let same = "client as client to server as server by web.test web test: mutual_tls".to_owned();
    assert_eq!(node.told(), [Some(same.clone()), Some(same)]);
    let told = [
        "connection complete",
        "dst.hbone_addr=web.test:80",
        "dst.service=\"web.test\"",
        // Of the client at the server's end and of the server at the client's: what each said of itself.
        "src.workload=\"client\"",
        "dst.workload=\"server\"",
        "src.identity=\"spiffe://cluster.local/ns/test/sa/client\"",
        "dst.identity=\"spiffe://cluster.local/ns/test/sa/server\"",
    ];
    let outbound = ["direction=\"outbound\"", "dst.addr=10.0.0.9:15008", "bytes_sent=8", "bytes_recv=10"];
    node.logged(&[&told[..], &outbound].concat()).await;
    node.logged(&[&told[..], &["direction=\"inbound\"", "bytes_sent=10", "bytes_recv=8"]].concat()).await;
}

#[tokio::test]
async fn last_words_are_heard_through_both_tunnels() {
    last_words(start().await).await;
}

#[tokio::test]
async fn who_waits_for_a_gateways_answer_gives_way() {
    let mut node = Node::start_with(stalled::narrow()).await;
    node.mesh.publish(networks(vec![], &["server"], "gateway"));
    node.toward(WEB);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    node.place("10.0.0.9:15008", listener.local_addr().unwrap());
    shutdown::spawn(stalled::mute_peer(listener, node.ca.certify(&id("gateway"))));
    stalled::who_waits_gives_way(node).await;
}

#[tokio::test]
async fn a_reset_goes_through_both_tunnels() {
    let node = start().await;
    let (mut client, mut server) = node.connect().await;
    say(&mut client, &mut server, b"question").await;
    reset_on_close(&client);
    drop(client);
    assert_reset(&mut server).await;

    let (mut client, server) = node.connect().await;
    reset_on_close(&server);
    drop(server);
    assert_reset(&mut client).await;
}

#[tokio::test]
async fn much_data_both_ways_arrives_whole_through_both_tunnels() {
    much_data(start().await).await;
}

#[tokio::test]
async fn the_policies_of_the_other_network_hold() {
    let mut node = start().await;
    let (mut client, mut server) = node.connect().await;
    say(&mut client, &mut server, b"question").await;
    let policies = vec![allow_only("cluster.local/ns/test/sa/other")];
    node.mesh.publish(networks(policies, &["server"], "gateway"));
    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
    node.logged(&["direction=\"inbound\"", "connection closed due to policy change"]).await;

    node.refused(node.outbound).await;
    node.logged(&["direction=\"inbound\"", "error", "allow policies exist, but none allowed"]).await;
    let why = "web.test refused the connection through its gateway: http status: 401";
    node.logged(&["direction=\"outbound\"", why]).await;
}

#[tokio::test]
async fn nobody_is_spoken_to_who_is_not_expected() {
    let mut node = start().await;
    for (serves, gateway, why) in [
        (&["other"][..], "gateway", "no tunnel to web.test through its gateway"),
        // The gateway may not serve it itself.
        (&["gateway"], "gateway", "no tunnel to web.test through its gateway"),
        (&[], "gateway", "no identity is known that web.test may have in another network"),
        (&["server"], "other", "the TLS handshake with HBONE peer 10.0.0.9:15008 failed"),
    ] {
        node.mesh.publish(networks(vec![], serves, gateway));
        node.refused(node.outbound).await;
        node.logged(&["direction=\"outbound\"", "error", why]).await;
    }
    node.mesh.publish(networks(vec![], &["other", "server"], "gateway"));
    let (mut client, mut server) = node.connect().await;
    say(&mut client, &mut server, b"question").await;
}
