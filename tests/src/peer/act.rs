//! A program that plays sides of many connections, as it is told on its standard input.
#![expect(clippy::print_stdout, reason = "a program answers on standard output")]

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hickory_proto::op::Message;
use hickory_proto::rr::RecordType;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::script::{Came, LIMIT, Report, Script, Side, elapsed, failed, play};
use crate::combinations::axes::Server;
use crate::resolver;

/// For how long a server with a full queue does not accept, and one that restarts is away.
const AWAY: Duration = Duration::from_millis(700);
/// How often a client tries that waits for a server to come back.
const AGAIN: Duration = Duration::from_millis(50);

/// What to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Order {
    /// Be the server of one connection.
    Serve {
        /// The connection.
        id: usize,
        /// The port, on all addresses of a family.
        port: u16,
        /// The family.
        v6: bool,
        /// In which state.
        state: Server,
        /// What to say.
        script: Script,
    },
    /// Be the client.
    Connect {
        /// The connection.
        id: usize,
        /// Where to.
        to: Target,
        /// Try again until it is let in.
        again: bool,
        /// What to say.
        script: Script,
    },
    /// The client goes on after the pause.
    Go {
        /// The connection.
        id: usize,
    },
    /// The server need not wait for a client any more.
    Stop {
        /// The connection.
        id: usize,
    },
}

/// Where a client connects to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Target {
    /// An address.
    Address(SocketAddr),
    /// A name, which is looked up.
    Named {
        /// The name.
        name: String,
        /// Whether its IPv6 addresses are meant.
        v6: bool,
        /// The port.
        port: u16,
    },
}

/// What happened.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Event {
    /// A server can be connected to.
    Ready(usize),
    /// A client has come.
    Accepted(usize),
    /// All was said that is said before the pause.
    Exchanged(usize, Side),
    /// It is over.
    Done(usize, Side, Report),
}

/// What the program does: one order a line, one event a line, as JSON.
pub fn act() -> Result<()> {
    let (events, happened) = mpsc::channel::<Event>();
    thread::spawn(move || {
        for event in happened {
            let line = serde_json::to_string(&event).unwrap_or_else(|error| error.to_string());
            let mut out = std::io::stdout().lock();
            let _nobody_reads = writeln!(out, "{line}").and_then(|()| out.flush());
        }
    });
    let (mut clients, mut servers) =
        (HashMap::<usize, Sender<()>>::new(), HashMap::<usize, Sender<()>>::new());
    println!("acting");
    for line in std::io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?).context("an order")?;
        let events = events.clone();
        match order {
            Order::Go { id } => {
                if let Some(go) = clients.remove(&id) {
                    let _ended = go.send(());
                }
            }
            Order::Stop { id } => drop(servers.remove(&id)),
            Order::Serve { id, port, v6, state, script } => {
                let (stop, stopped) = mpsc::channel();
                servers.insert(id, stop);
                thread::spawn(move || {
                    let at = SocketAddr::new(any(v6), port);
                    let report = serve(id, at, state, &script, &events, &stopped).unwrap_or_else(broken);
                    let _ended = events.send(Event::Done(id, Side::Server, report));
                });
            }
            Order::Connect { id, to, again, script } => {
                let (go, held) = mpsc::channel();
                clients.insert(id, go);
                thread::spawn(move || {
                    let report = connect(id, &to, again, &script, &events, &held).unwrap_or_else(broken);
                    let _ended = events.send(Event::Done(id, Side::Client, report));
                });
            }
        }
    }
    Ok(())
}

fn broken(error: anyhow::Error) -> Report {
    Report { error: format!("{error:#}"), ..Report::new() }
}

/// Every address of a family.
fn any(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

fn serve(
    id: usize,
    at: SocketAddr,
    state: Server,
    script: &Script,
    events: &Sender<Event>,
    stopped: &Receiver<()>,
) -> Result<Report> {
    let begun = Instant::now();
    let mut listener = listen(at, if state == Server::BacklogFull { 0 } else { 64 })?;
    let loopback: IpAddr = if at.is_ipv6() { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    let mut fillers = Vec::new();
    match state {
        Server::BacklogFull => {
            // A queue of no length takes one; over the loopback nobody is in the way.
            fillers.push(TcpStream::connect_timeout(&SocketAddr::new(loopback, at.port()), LIMIT)?);
            let _ended = events.send(Event::Ready(id));
            thread::sleep(AWAY);
        }
        Server::Restarting => {
            let _ended = events.send(Event::Ready(id));
            drop(listener);
            thread::sleep(AWAY);
            listener = listen(at, 64).context("after the restart")?;
        }
        _ => {
            let _ended = events.send(Event::Ready(id));
        }
    }
    loop {
        let Some((stream, from)) = accept(&listener, stopped)? else {
            return Ok(Report { came: Came::Refused, error: "nobody came".to_owned(), ..Report::new() });
        };
        if from.ip() == loopback {
            continue;
        }
        let _ended = events.send(Event::Accepted(id));
        let (_go, never) = mpsc::channel();
        let exchanged = || {
            let _ended = events.send(Event::Exchanged(id, Side::Server));
        };
        return Ok(play(script, Side::Server, (&stream, from), begun, exchanged, &never));
    }
}

fn listen(at: SocketAddr, backlog: i32) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, None)?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&at.into()).with_context(|| format!("cannot bind {at}"))?;
    socket.listen(backlog)?;
    Ok(socket.into())
}

/// Waits for a client until nobody is to come any more.
fn accept(listener: &TcpListener, stopped: &Receiver<()>) -> Result<Option<(TcpStream, SocketAddr)>> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, from)) => {
                stream.set_nonblocking(false)?;
                return Ok(Some((stream, from)));
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if stopped.try_recv() == Err(TryRecvError::Disconnected) {
                    return Ok(None);
                }
                thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn connect(
    id: usize,
    to: &Target,
    again: bool,
    script: &Script,
    events: &Sender<Event>,
    go: &Receiver<()>,
) -> Result<Report> {
    let begun = Instant::now();
    let to = match to {
        Target::Address(to) => *to,
        Target::Named { name, v6, port } => SocketAddr::new(look_up(name, *v6)?, *port),
    };
    for attempts in 1.. {
        let report = Report { attempts, ..attempt(id, to, script, events, go, begun) };
        if !(again && matches!(report.came, Came::Refused | Came::ClosedEarly) && begun.elapsed() < LIMIT) {
            return Ok(report);
        }
        thread::sleep(AGAIN);
    }
    bail!("tried for ever")
}

fn attempt(
    id: usize,
    to: SocketAddr,
    script: &Script,
    events: &Sender<Event>,
    go: &Receiver<()>,
    begun: Instant,
) -> Report {
    let stream = match TcpStream::connect_timeout(&to, LIMIT) {
        Ok(stream) => stream,
        Err(error) => {
            let (came, after_ms) = (failed(&error, 0), elapsed(begun));
            return Report { came, after_ms, error: error.to_string(), ..Report::new() };
        }
    };
    let exchanged = || {
        let _ended = events.send(Event::Exchanged(id, Side::Client));
    };
    // As the socket says it; one that was reset meanwhile does not.
    let remote = stream.peer_addr().unwrap_or(to);
    play(script, Side::Client, (&stream, remote), begun, exchanged, go)
}

/// Any resolver: questions are redirected.
const RESOLVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 53));

/// The first address of a name.
fn look_up(name: &str, v6: bool) -> Result<IpAddr> {
    let kind = if v6 { RecordType::AAAA } else { RecordType::A };
    let question = resolver::question(&format!("{name}."), kind)?.to_vec()?;
    let answer = resolver::by_datagram(&resolver::unbound(RESOLVER)?, RESOLVER, &question, LIMIT)
        .with_context(|| format!("nobody answers for {name}"))?;
    let answer = Message::from_vec(&answer)?;
    let found = resolver::addresses(&answer);
    let first = found.first().with_context(|| format!("{name} has no {kind}: {}", answer.response_code))?;
    Ok(first.parse()?)
}
