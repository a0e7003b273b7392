//! A DNS server that answers every name with one address, and clients that ask.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::SOA;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;

use crate::place::Place;

/// The port of resolvers.
const PORT: u16 = 53;
/// How often the server looks whether it is to end.
const LOOK: u16 = 50;
/// How many messages a zone is.
pub const PARTS: usize = 3;
/// Longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// How a question is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// On a connection.
    Tcp,
}

/// Both.
pub const TRANSPORTS: [Transport; 2] = [Transport::Udp, Transport::Tcp];

/// Who asked what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// The client.
    pub from: IpAddr,
    /// The name, or the operation that was none for a name.
    pub what: String,
    /// How.
    pub transport: Transport,
}

#[derive(Debug, Default)]
struct State {
    silent: AtomicBool,
    /// How long an answer takes, in milliseconds.
    delay: AtomicU64,
    asked: Mutex<Vec<Asked>>,
    stop: AtomicBool,
}

/// A running server: names below `missing.` are not there, answers to those below `large.` do not fit into a datagram,
/// zones are transferred in [`PARTS`] messages, and other operations than queries succeed. It ends when dropped.
#[derive(Debug)]
pub struct Resolver {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

impl Resolver {
    /// Listens at `place` on each of `addresses`. The address of all names is `answer`.
    pub fn start(place: &Place, addresses: &[IpAddr], answer: Ipv4Addr) -> Result<Self> {
        let state = Arc::new(State::default());
        let bind = |ip: &IpAddr| -> Result<_> {
            let (udp, tcp) = (UdpSocket::bind((*ip, PORT))?, TcpListener::bind((*ip, PORT))?);
            udp.set_nonblocking(true)?;
            tcp.set_nonblocking(true)?;
            Ok((udp, tcp))
        };
        let sockets: Vec<_> =
            place.netns.enter(|| addresses.iter().map(bind).collect::<Result<_>>()).context("port 53")?;
        let state_ = Arc::clone(&state);
        let thread = std::thread::spawn(move || serve(&sockets, answer, &state_));
        Ok(Self { state, thread: Some(thread) })
    }

    /// Answers nothing from now on, or again.
    pub fn silent(&self, silent: bool) {
        self.state.silent.store(silent, Ordering::Relaxed);
    }

    /// Takes so long for each answer from now on.
    pub fn slow(&self, delay: Duration) {
        self.state.delay.store(delay.as_millis() as u64, Ordering::Relaxed);
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.state.asked.lock().clone()
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn serve(sockets: &[(UdpSocket, TcpListener)], address: Ipv4Addr, state: &State) {
    let mut buffer = [0; 65_535];
    while !state.stop.load(Ordering::Relaxed) {
        let mut polled: Vec<_> = sockets
            .iter()
            .flat_map(|(udp, tcp)| [udp.as_fd(), tcp.as_fd()])
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        // Nothing, or interrupted: there is nothing to read then.
        let _ready = poll(&mut polled, PollTimeout::from(LOOK));
        for (udp, tcp) in sockets {
            while let Ok((length, client)) = udp.recv_from(&mut buffer) {
                if let Some(answer) = reply(&buffer[..length], client, Transport::Udp, address, state) {
                    let _lost = udp.send_to(&answer, client);
                }
            }
            while let Ok((mut stream, client)) = tcp.accept() {
                // A client that says nothing is in the others' way for a while.
                let _gone = converse(&mut stream, client, address, state);
            }
        }
    }
}

fn converse(stream: &mut TcpStream, client: SocketAddr, address: Ipv4Addr, state: &State) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let message = receive(stream)?;
    let zone = Message::from_vec(&message)
        .is_ok_and(|message| message.queries.iter().any(|query| query.query_type() == RecordType::AXFR));
    if let Some(answer) = reply(&message, client, Transport::Tcp, address, state) {
        for _ in 0..if zone { PARTS } else { 1 } {
            stream.write_all(&framed(&answer))?;
        }
    }
    Ok(())
}

fn reply(
    bytes: &[u8],
    client: SocketAddr,
    transport: Transport,
    address: Ipv4Addr,
    state: &State,
) -> Option<Vec<u8>> {
    let question = Message::from_vec(bytes).ok()?;
    let name = question.queries.first().map(|query| query.name().clone());
    let what = match (&name, question.op_code) {
        (Some(name), OpCode::Query) => name.to_ascii(),
        (_, other) => other.to_string(),
    };
    let asked = Asked { from: client.ip().to_canonical(), what, transport };
    state.asked.lock().push(asked);
    if state.silent.load(Ordering::Relaxed) {
        return None;
    }
    std::thread::sleep(Duration::from_millis(state.delay.load(Ordering::Relaxed)));
    let mut answer = Message::response(question.id, question.op_code);
    answer.add_queries(question.queries.iter().cloned());
    let (Some(name), OpCode::Query) = (name, question.op_code) else { return answer.to_vec().ok() };
    let below = |zone: &str| Name::from_ascii(zone).is_ok_and(|zone| zone.zone_of(&name));
    let of = |last: u8| {
        let [a, b, c, _] = address.octets();
        let rdata = RData::A(Ipv4Addr::new(a, b, c, last).into());
        Record::from_rdata(name.clone(), 60, rdata)
    };
    if below("missing.") {
        answer.metadata.response_code = ResponseCode::NXDomain;
        let zone = Name::from_ascii("missing.").ok()?;
        let soa = SOA::new(zone.clone(), zone.clone(), 1, 1, 1, 1, 77);
        answer.add_authority(Record::from_rdata(zone, 77, RData::SOA(soa)));
    } else if below("large.") && transport == Transport::Udp {
        answer.metadata.truncation = true;
    } else if below("large.") {
        answer.add_answers((0..100).map(of));
    } else {
        answer.add_answer(of(address.octets()[3]));
        // Not an answer to the question, and not to become one.
        let more = Name::from_ascii("more.").ok()?;
        answer.add_additional(Record::from_rdata(more, 60, RData::A(address.into())));
    }
    answer.to_vec().ok()
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes(), message].concat()
}

fn receive(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// A question for a name, which a program of the pod asks.
pub fn question(name: &str, kind: RecordType) -> Result<Message> {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name)?, kind));
    Ok(message)
}

/// Asks `server`, from a socket at `place`.
pub fn ask(place: &Place, server: IpAddr, message: &Message, transport: Transport) -> Result<Message> {
    let bytes = message.to_vec()?;
    let answer = place.netns.enter(|| match transport {
        Transport::Udp => by_datagram(&unbound(server)?, server, &bytes, PATIENCE),
        Transport::Tcp => {
            let mut stream = TcpStream::connect((server, PORT))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(&framed(&bytes))?;
            Ok(receive(&mut stream)?)
        }
    });
    let answer = Message::from_vec(&answer.with_context(|| format!("{transport:?} to {server}"))?)?;
    ensure!(answer.id == message.id, "another answer: {answer}");
    ensure!(answer.message_type == MessageType::Response, "{answer}");
    Ok(answer)
}

/// Has `server` transfer a zone: all messages until it closes the connection.
pub fn transfer(place: &Place, server: IpAddr, zone: &str) -> Result<Vec<Message>> {
    let bytes = question(zone, RecordType::AXFR)?.to_vec()?;
    place.netns.enter(|| {
        let mut stream = TcpStream::connect((server, PORT))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&framed(&bytes))?;
        let mut parts = Vec::new();
        loop {
            match receive(&mut stream) {
                Ok(message) => parts.push(Message::from_vec(&message)?),
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(parts),
                Err(error) => return Err(error.into()),
            }
        }
    })
}

/// A socket for datagrams to a server of this family.
pub fn unbound(server: IpAddr) -> Result<UdpSocket> {
    let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    Ok(UdpSocket::bind(any)?)
}

/// Asks from this socket. An answer counts only if it comes from whom it was asked of.
pub fn by_datagram(socket: &UdpSocket, server: IpAddr, bytes: &[u8], patience: Duration) -> Result<Vec<u8>> {
    socket.set_read_timeout(Some(patience))?;
    socket.send_to(bytes, (server, PORT))?;
    let mut buffer = vec![0; 65_535];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => {
                ensure!(from == SocketAddr::from((server, PORT)), "an answer of {from} instead of {server}");
                // A late answer to an earlier question is none to this one.
                if buffer[..length].starts_with(&bytes[..2]) {
                    buffer.truncate(length);
                    return Ok(buffer);
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The addresses of an answer, as text and in order.
pub fn addresses(answer: &Message) -> Vec<String> {
    let mut all: Vec<String> = answer
        .answers
        .iter()
        .filter_map(|record| match &record.data {
            RData::A(address) => Some(address.to_string()),
            RData::AAAA(address) => Some(address.to_string()),
            _ => None,
        })
        .collect();
    all.sort();
    all
}
