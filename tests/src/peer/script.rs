//! What two programs say to each other over one connection, and what each of them saw.
//!
//! Both sides know the script. What a side reports is so little that it is the same with and without a mesh: how far it
//! came, whether every byte was the right one, how the other side ended, and the addresses.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use socket2::SockRef;

use crate::combinations::axes::{End, First, Pause};

/// How long a side waits for the other: longer than anything in between does.
pub const LIMIT: Duration = Duration::from_secs(20);
/// How long nothing goes over an idle connection.
const IDLE: Duration = Duration::from_millis(1200);
/// How long nothing goes over one that is idle for long: longer than it takes to probe it (TCP keepalive, as the
/// combinations set it) and a tunnel that carries it (HTTP/2 pings).
const LONG_IDLE: Duration = Duration::from_secs(12);

/// The two sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// Who connects.
    Client,
    /// Who accepts.
    Server,
}

/// What is said and how it ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script {
    /// Occurs in everything that is said, so often that every packet has it.
    pub marker: String,
    /// Who speaks first.
    pub first: First,
    /// How much each says, in bytes.
    pub size: usize,
    /// Whether nothing is said for a while.
    pub pause: Pause,
    /// Whether the client waits in that pause until it is told to go on.
    pub held: bool,
    /// How it ends.
    pub end: End,
}

/// How far a side came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Came {
    /// Nowhere: refused, or reset before a byte of the other side came.
    Refused,
    /// Nowhere: nobody is there.
    Unreachable,
    /// Nowhere: closed in order before a byte of the other side came.
    ClosedEarly,
    /// Everything was said; then or meanwhile it broke.
    Broken,
    /// To its end.
    Through,
    /// Waited in vain.
    TimedOut,
}

/// How the other side ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seen {
    /// Not at all: this side has reset it, or it never came so far.
    Nothing,
    /// In order.
    Fin,
    /// By a reset.
    Reset,
    /// By something else.
    Else,
}

/// What a side saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// How far it came.
    pub came: Came,
    /// How the other side ended.
    pub end: Seen,
    /// What it said and got, in bytes.
    pub sent: usize,
    /// What it got.
    pub received: usize,
    /// Whether every byte was the right one.
    pub equal: bool,
    /// Its own address.
    pub local: Option<SocketAddr>,
    /// The other's.
    pub remote: Option<SocketAddr>,
    /// When it had come so far, from the start, in milliseconds.
    pub after_ms: u64,
    /// How often the client has tried.
    pub attempts: u64,
    /// What went wrong, in words.
    pub error: String,
}

impl Report {
    /// One that has seen nothing yet.
    pub fn new() -> Self {
        Self {
            came: Came::TimedOut,
            end: Seen::Nothing,
            sent: 0,
            received: 0,
            equal: true,
            local: None,
            remote: None,
            after_ms: 0,
            attempts: 1,
            error: String::new(),
        }
    }
}

impl Default for Report {
    fn default() -> Self {
        Self::new()
    }
}

/// Plays one side to its end. `exchanged` is called when all was said; a held client then waits for `go`.
pub fn play(
    script: &Script,
    side: Side,
    (stream, remote): (&TcpStream, SocketAddr),
    begun: Instant,
    exchanged: impl FnOnce(),
    go: &Receiver<()>,
) -> Report {
    let mut report = Report { local: stream.local_addr().ok(), remote: Some(remote), ..Report::new() };
    let mut part = Part { script, side, stream, report: &mut report };
    let _for_every_read = stream.set_read_timeout(Some(LIMIT));
    let _for_every_write = stream.set_write_timeout(Some(LIMIT));
    let all = part.exchange().and_then(|()| {
        exchanged();
        part.report.after_ms = elapsed(begun);
        part.pause(go)?;
        part.report.came = Came::Through;
        part.end()
    });
    if let Err(error) = all {
        report.error = error.to_string();
        if report.came != Came::Through {
            report.came = failed(&error, report.received);
        }
        if report.after_ms == 0 {
            report.after_ms = elapsed(begun);
        }
        report.end = ended(&error);
    }
    report
}

/// How far a side came that met this error.
pub fn failed(error: &std::io::Error, received: usize) -> Came {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Came::TimedOut,
        _ if received > 0 => Came::Broken,
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Came::Unreachable,
        ErrorKind::UnexpectedEof => Came::ClosedEarly,
        _ => Came::Refused,
    }
}

fn ended(error: &std::io::Error) -> Seen {
    match error.kind() {
        ErrorKind::UnexpectedEof => Seen::Fin,
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Seen::Reset,
        _ => Seen::Else,
    }
}

/// Milliseconds since then, and never none.
pub fn elapsed(begun: Instant) -> u64 {
    (begun.elapsed().as_millis() as u64).max(1)
}

struct Part<'a> {
    script: &'a Script,
    side: Side,
    stream: &'a TcpStream,
    report: &'a mut Report,
}

impl Part<'_> {
    fn exchange(&mut self) -> std::io::Result<()> {
        let size = self.script.size;
        let speaks_first = match self.script.first {
            First::Nobody => return Ok(()),
            First::Both => {
                let (script, side, stream) = (self.script, self.side, self.stream);
                return thread::scope(|scope| {
                    let writer = scope.spawn(move || say(script, side, 0, size, stream));
                    let read = self.hear(0, size);
                    let wrote = writer.join().unwrap_or_else(|_| Err(ErrorKind::Other.into()));
                    // Of a reset the kernel tells whoever asks first, and the other one sees an end.
                    if let (Err(read), Err(wrote)) = (&read, &wrote)
                        && read.kind() == ErrorKind::UnexpectedEof
                    {
                        return Err(wrote.kind().into());
                    }
                    read?;
                    wrote?;
                    self.report.sent += size;
                    Ok(())
                });
            }
            First::Client => Side::Client,
            First::Server => Side::Server,
        };
        if self.side == speaks_first {
            self.say(0, size)?;
            self.hear(0, size)
        } else {
            self.hear(0, size)?;
            self.say(0, size)
        }
    }

    fn pause(&mut self, go: &Receiver<()>) -> std::io::Result<()> {
        if self.script.pause == Pause::Brisk {
            return Ok(());
        }
        if self.side == Side::Client {
            if self.script.held {
                go.recv_timeout(4 * LIMIT).map_err(std::io::Error::other)?;
            } else {
                thread::sleep(IDLE);
            }
            self.say(1, 1)?;
            self.hear(1, 1)
        } else {
            // Longer than a pause that somebody else ends.
            let _set = self.stream.set_read_timeout(Some(4 * LIMIT));
            self.hear(1, 1)?;
            let _set = self.stream.set_read_timeout(Some(LIMIT));
            self.say(1, 1)
        }
    }

    fn end(&mut self) -> std::io::Result<()> {
        let ends = match self.script.end {
            End::ClientFin | End::ClientHalf | End::ClientReset | End::LongIdle => Side::Client,
            End::ServerFin | End::ServerHalf | End::ServerReset => Side::Server,
        };
        let size = self.script.size;
        match (self.script.end, self.side == ends) {
            (End::LongIdle, true) => {
                thread::sleep(LONG_IDLE);
                self.say(3, size.min(1))?;
                self.hear(3, size.min(1))?;
                self.stream.shutdown(Shutdown::Write)?;
                self.hear_end()
            }
            (End::LongIdle, false) => {
                self.hear(3, size.min(1))?;
                self.say(3, size.min(1))?;
                self.hear_end()?;
                self.stream.shutdown(Shutdown::Write)
            }
            (End::ClientReset | End::ServerReset, true) => {
                // A reset throws away what is still on its way: it comes when all has been heard.
                self.hear(3, size.min(1))?;
                // It is closed when the caller drops it.
                SockRef::from(self.stream).set_linger(Some(Duration::ZERO))
            }
            (End::ClientReset | End::ServerReset, false) => {
                self.say(3, size.min(1))?;
                self.hear_end()
            }
            (End::ClientHalf | End::ServerHalf, true) => {
                self.stream.shutdown(Shutdown::Write)?;
                self.hear(2, size)?;
                self.hear_end()
            }
            (End::ClientHalf | End::ServerHalf, false) => {
                self.hear_end()?;
                self.say(2, size)?;
                self.stream.shutdown(Shutdown::Write)
            }
            (_, true) => {
                self.stream.shutdown(Shutdown::Write)?;
                self.hear_end()
            }
            (_, false) => {
                self.hear_end()?;
                self.stream.shutdown(Shutdown::Write)
            }
        }
    }

    fn say(&mut self, part: u8, size: usize) -> std::io::Result<()> {
        say(self.script, self.side, part, size, self.stream)?;
        self.report.sent += size;
        Ok(())
    }

    fn hear(&mut self, part: u8, size: usize) -> std::io::Result<()> {
        let from = if self.side == Side::Client { Side::Server } else { Side::Client };
        let expected = text(self.script, from, part, size);
        let (mut stream, mut at, mut chunk) = (self.stream, 0, vec![0; 64 << 10]);
        while at < size {
            let wanted = chunk.len().min(size - at);
            let read = stream.read(&mut chunk[..wanted])?;
            if read == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            self.report.equal &= chunk[..read] == expected[at..at + read];
            self.report.received += read;
            at += read;
        }
        Ok(())
    }

    fn hear_end(&mut self) -> std::io::Result<()> {
        let mut stream = self.stream;
        let mut byte = [0; 1];
        if stream.read(&mut byte)? > 0 {
            self.report.equal = false;
            return Err(std::io::Error::other("more was said than the script has"));
        }
        self.report.end = Seen::Fin;
        Ok(())
    }
}

fn say(script: &Script, side: Side, part: u8, size: usize, mut stream: &TcpStream) -> std::io::Result<()> {
    stream.write_all(&text(script, side, part, size))
}

/// What a side says in a part of the script: no two say the same, and every 100 bytes are different.
fn text(script: &Script, side: Side, part: u8, size: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(size + 100);
    while text.len() < size {
        let line = format!("{} {side:?} {part} {:08}\n", script.marker, text.len());
        text.extend_from_slice(line.as_bytes());
    }
    text.truncate(size);
    text
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::mpsc;

    use super::*;

    /// What client and server saw of a script.
    fn played(script: &Script) -> [Report; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let to = listener.local_addr().expect("it is bound");
        let (_sender, go) = mpsc::channel();
        thread::scope(|scope| {
            let server = scope.spawn(move || {
                let (_sender, go) = mpsc::channel();
                let (stream, from) = listener.accept().expect("a client");
                play(script, Side::Server, (&stream, from), Instant::now(), || {}, &go)
            });
            let client = {
                let stream = TcpStream::connect(to).expect("a server");
                play(script, Side::Client, (&stream, to), Instant::now(), || {}, &go)
            };
            [client, server.join().expect("no panic")]
        })
    }

    #[test]
    fn every_script_comes_to_its_end() {
        for first in First::ALL {
            // What is idle for long is like the first, and takes long.
            for end in End::ALL.iter().filter(|end| **end != End::LongIdle) {
                let size = if *first == First::Nobody { 0 } else { 200_000 };
                let script = Script {
                    marker: "unit".to_owned(),
                    first: *first,
                    size,
                    pause: Pause::Brisk,
                    held: false,
                    end: *end,
                };
                let [client, server] = played(&script);
                for report in [&client, &server] {
                    assert_eq!(report.came, Came::Through, "{script:?} {report:?}");
                    assert!(report.equal, "{script:?} {report:?}");
                }
                let expected = match end {
                    End::ClientReset => [Seen::Nothing, Seen::Reset],
                    End::ServerReset => [Seen::Reset, Seen::Nothing],
                    _ => [Seen::Fin, Seen::Fin],
                };
                assert_eq!([client.end, server.end], expected, "{script:?}");
            }
        }
    }
}
