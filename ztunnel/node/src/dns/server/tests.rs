use std::io::Read;
use std::io::Write;
use std::net::TcpStream as StdStream;

use hickory_proto::op::Message;
use hickory_proto::op::Query;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::Name;
use hickory_proto::rr::RecordType;
use tokio::time::timeout;
use ztunnel_mesh::model::addr::NetworkAddress;
use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::store::MeshWriter;
use ztunnel_mesh::store::index::Mesh;
use ztunnel_mesh::store::mesh;

use super::*;
use crate::dns::pod::PIPELINE_MAX;
use crate::telemetry;
use crate::telemetry::line::Format;
use crate::telemetry::writer;

/// Longer than anything here takes.
const SOON: Duration = Duration::from_secs(30);

/// A thread that answers one pod on the loopback of this namespace.
struct Node {
    dns: Dns,
    sockets: Sockets,
    telemetry: Telemetry,
    trigger: Trigger,
    mesh: MeshReader,
    _writer: MeshWriter,
}

fn uid() -> PodUid {
    PodUid::from("client-1")
}

fn config() -> Config {
    Config {
        address: Some("127.0.0.1:0".parse().unwrap()),
        resolv_conf: PathBuf::from("/nothing/here"),
        ..Config::new(answer::Config::new("cluster.local", None, true))
    }
}

fn start(mesh: &MeshReader, config: Config) -> (Dns, Telemetry, Trigger) {
    let log = writer::start(Box::new(io::sink()), Format::Plain).unwrap();
    let telemetry = Telemetry::new(telemetry::Config::default(), log);
    let (trigger, signal) = shutdown::channel();
    (Dns::start(config, mesh.clone(), &telemetry, signal).unwrap(), telemetry, trigger)
}

fn add(dns: &Dns, sockets: &Sockets, workload: &str) {
    let spec = PodSpec { uid: uid(), workload: Named::Uid(workload.into()) };
    dns.add_pod(spec, sockets, Arc::new(Netns::current().unwrap())).unwrap();
}

impl Node {
    fn start(config: Config) -> Self {
        let (mut writer, mesh) = mesh();
        let vip = NetworkAddress { network: "".into(), ip: "10.96.0.1".parse().unwrap() };
        let hostname = "cart.shop.svc.cluster.local".into();
        let service = Service { hostname, vips: vec![vip], ..Service::sample("shop", "cart") };
        let client = Workload::sample("shop", "client");
        writer.publish(Mesh::new(TrustDomain::default(), [Arc::new(client)], [Arc::new(service)], []));
        let sockets = bind(&Netns::current().unwrap(), &config).expect("needs root");
        let (dns, telemetry, trigger) = start(&mesh, config);
        add(&dns, &sockets, "client");
        Self { dns, sockets, telemetry, trigger, mesh, _writer: writer }
    }

    fn metric(&self, name: &str) -> u64 {
        let text = self.telemetry.encode_metrics().unwrap();
        let values = text.lines().filter(|line| line.starts_with(name));
        values.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    }

    fn udp(&self) -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(self.sockets.0[0].udp.local_addr().unwrap()).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket
    }

    fn tcp(&self) -> StdStream {
        let stream = StdStream::connect(self.sockets.0[0].tcp.local_addr().unwrap()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.trigger.close();
        self.dns.join();
    }
}

fn question(name: &str) -> Message {
    let mut message = Message::query();
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message
}

fn by_udp(socket: &UdpSocket, question: &Message) -> Message {
    socket.send(&question.to_vec().unwrap()).unwrap();
    let mut buffer = [0; 65_535];
    let length = socket.recv(&mut buffer).expect("an answer");
    Message::from_vec(&buffer[..length]).unwrap()
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes(), message].concat()
}

fn next(stream: &mut StdStream) -> Message {
    let mut length = [0; 2];
    stream.read_exact(&mut length).expect("an answer");
    let mut bytes = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut bytes).unwrap();
    Message::from_vec(&bytes).unwrap()
}

/// Whether the other side has closed the connection, without a word.
fn is_closed(stream: &mut StdStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(read) => read == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

fn code(answer: &Message) -> ResponseCode {
    answer.metadata.response_code
}

#[test]
fn names_of_the_mesh_are_answered_and_nothing_stops_that() {
    let node = Node::start(config());
    let (socket, mut stream) = (node.udp(), node.tcp());
    for garbage in [&[][..], &[0], &[7; 12], &[0xff; 600], &[1, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12]] {
        node.udp().send(garbage).unwrap();
        stream.write_all(&framed(garbage)).unwrap();
    }
    let mut response = question("cart.");
    response.metadata.message_type = hickory_proto::op::MessageType::Response;
    // Answered, it would be answered in turn: the next answer is to the next question.
    socket.send(&response.to_vec().unwrap()).unwrap();
    let answer = by_udp(&socket, &question("cart."));
    assert_eq!(answer.answers[0].to_string(), "cart. 30 IN A 10.96.0.1");
    // Answers to some of the garbage come first.
    let asked = question("cart.shop.");
    stream.write_all(&framed(&asked.to_vec().unwrap())).unwrap();
    let answer = loop {
        let answer = next(&mut stream);
        if answer.id == asked.id && code(&answer) == ResponseCode::NoError {
            break answer;
        }
        assert_eq!(code(&answer), ResponseCode::FormErr);
    };
    assert_eq!(answer.answers[0].to_string(), "cart.shop. 30 IN A 10.96.0.1");
    let labels = |transport: &str| {
        format!(
            "istio_dns_requests_total{{request_query_type=\"a\",request_protocol=\"{transport}\",\
             source_canonical_service=\"client\",source_canonical_revision=\"unknown\"}}"
        )
    };
    assert_eq!((node.metric(&labels("udp")), node.metric(&labels("tcp"))), (1, 1));
    assert!(node.metric("ztunnel_dns_messages_refused_total") >= 3);
}

#[test]
fn what_nobody_can_answer_is_servfail_and_what_nobody_asked_for_notimp() {
    let node = Node::start(config());
    let asked = question("example.com.");
    assert_eq!(code(&by_udp(&node.udp(), &asked)), ResponseCode::ServFail);
    let mut update =
        Message::new(7, hickory_proto::op::MessageType::Query, hickory_proto::op::OpCode::Update);
    assert_eq!(code(&by_udp(&node.udp(), &update)), ResponseCode::NotImp);
    let mut stream = node.tcp();
    update.metadata.id = 8;
    for message in [&asked, &update] {
        stream.write_all(&framed(&message.to_vec().unwrap())).unwrap();
    }
    let codes: HashMap<u16, ResponseCode> =
        (0..2).map(|_| next(&mut stream)).map(|answer| (answer.id, code(&answer))).collect();
    assert_eq!((codes[&asked.id], codes[&8]), (ResponseCode::ServFail, ResponseCode::NotImp));
    assert_eq!(node.metric("istio_dns_upstream_failures_total"), 2);
    // A pod that the mesh does not know.
    add(&node.dns, &node.sockets, "nobody");
    assert_eq!(code(&by_udp(&node.udp(), &question("cart."))), ResponseCode::ServFail);
}

#[test]
fn there_is_room_for_so_much_and_more_is_refused_and_counted() {
    let node = Node::start(Config { requests_max: 0, connections_max: 1, ..config() });
    let socket = node.udp();
    assert_eq!(code(&by_udp(&socket, &question("example.com."))), ResponseCode::ServFail);
    assert_eq!(node.metric("ztunnel_dns_requests_turned_away_total"), 1);
    assert_eq!(code(&by_udp(&socket, &question("cart."))), ResponseCode::NoError, "this needs none");
    let mut first = node.tcp();
    first.write_all(&framed(&question("cart.").to_vec().unwrap())).unwrap();
    next(&mut first);
    assert!(is_closed(&mut node.tcp()), "there is one");
    assert_eq!(node.metric("ztunnel_dns_requests_turned_away_total"), 2);
}

#[test]
fn slow_clients_are_left() {
    let node = Node::start(Config { client_within: Duration::from_millis(50), ..config() });
    for beginning in [&[][..], &[0], &[0, 20, 1, 2, 3]] {
        let mut stream = node.tcp();
        stream.write_all(beginning).unwrap();
        assert!(is_closed(&mut stream));
    }
}

#[test]
fn many_questions_on_one_connection_are_all_answered() {
    let node = Node::start(config());
    let mut stream = node.tcp();
    let all: Vec<Message> = (0..3 * PIPELINE_MAX).map(|_| question("cart.")).collect();
    let bytes: Vec<u8> = all.iter().flat_map(|one| framed(&one.to_vec().unwrap())).collect();
    stream.write_all(&bytes).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answered: Vec<u16> = all.iter().map(|_| next(&mut stream).id).collect();
    let mut asked: Vec<u16> = all.iter().map(|one| one.id).collect();
    answered.sort_unstable();
    asked.sort_unstable();
    assert_eq!(answered, asked);
    assert!(is_closed(&mut stream));
}

#[tokio::test]
async fn a_successor_answers_on_the_same_sockets() {
    let node = Node::start(config());
    let socket = node.udp();
    let (next_one, telemetry, trigger) = start(&node.mesh, config());
    by_udp(&socket, &question("cart."));
    node.dns.hand_over_sockets();
    timeout(SOON, node.dns.drained()).await.expect("it has nothing to do");
    // Nobody reads now, and nothing is lost.
    let asked = question("cart.");
    socket.send(&asked.to_vec().unwrap()).unwrap();
    let mut stream = node.tcp();
    stream.write_all(&framed(&asked.to_vec().unwrap())).unwrap();
    add(&next_one, &node.sockets, "client");
    let mut buffer = [0; 512];
    let length = socket.recv(&mut buffer).expect("an answer");
    assert_eq!(Message::from_vec(&buffer[..length]).unwrap().id, asked.id);
    assert_eq!(next(&mut stream).id, asked.id);
    assert!(telemetry.encode_metrics().unwrap().contains("request_protocol=\"tcp\""));
    trigger.close();
    next_one.join();
}

#[tokio::test]
async fn a_removed_pod_has_nothing_left() {
    let node = Node::start(config());
    let mut stream = node.tcp();
    stream.write_all(&framed(&question("cart.").to_vec().unwrap())).unwrap();
    next(&mut stream);
    node.dns.remove_pod(&uid());
    timeout(SOON, node.dns.drained()).await.expect("everything of it has ended");
    assert!(is_closed(&mut stream));
}

#[test]
fn both_loopback_addresses_are_listened_on_and_the_port_may_be_shared() {
    let netns = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("needs root");
        Netns::current().unwrap()
    });
    let netns = netns.join().unwrap();
    let config = Config { address: None, ..config() };
    let first = bind(&netns, &config).unwrap();
    let second = bind(&netns, &config).unwrap();
    for sockets in [&first, &second] {
        let addresses: Vec<_> = sockets.0.iter().map(|bound| bound.udp.local_addr().unwrap()).collect();
        // A loopback that is down has no IPv6 address yet.
        assert_eq!(addresses[0], "127.0.0.1:15053".parse().unwrap());
        assert!(addresses[1..].iter().all(|address| *address == "[::1]:15053".parse().unwrap()));
    }
    let alone = Config { share_ports: false, ..config };
    let error = bind(&netns, &alone).unwrap_err();
    assert_eq!(error.to_string(), "cannot listen for DNS on 127.0.0.1:15053 in the pod");
}
