//! What is not answered here goes on to a resolver, and its answer back, both as they came.
//!
//! The resolver is the one the pod asked: its own configuration counts, as without this proxy. Where that is not known
//! (a pod that asks the proxy by its address), it is one of this process's own `resolv.conf`. Each request has a socket
//! of its own, in the pod's network namespace and with the mark by which the rules let it pass.

use std::io;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use socket2::Domain;
use socket2::Protocol;
use socket2::Socket;
use socket2::Type;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;
use tokio::net::TcpStream;
use tokio::net::UdpSocket;
use tokio::time::Instant;
use tokio::time::timeout;
use tokio::time::timeout_at;

use crate::dns::message;
use crate::net::netns::Netns;

/// So long an answer is waited for: as long as clients do, which ask twice and wait five seconds each time, as a rule. What
/// comes after that nobody hears. Until then a resolver that is slow is none that is away, and only its client knows when
/// it has waited long enough: it is told nothing, as the resolver tells it nothing.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A datagram that is not answered within this time is sent again, to the next resolver if there are several.
const AGAIN_AFTER: Duration = Duration::from_secs(2);
/// The port of resolvers.
const PORT: u16 = 53;
/// Larger datagrams are cut, and then no answer.
const DATAGRAM_MAX: usize = u16::MAX as usize;
/// How long the own `resolv.conf` is believed.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Why a request was not answered by another resolver.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Nobody to ask is known.
    #[error("no resolver is known")]
    NoResolver,
    /// None has answered in time.
    #[error("no answer in time")]
    TimedOut,
    /// None can be asked.
    #[error("{0}")]
    Failed(io::Error),
}

/// The resolvers of this process.
#[derive(Debug)]
pub struct Own {
    path: PathBuf,
    known: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
}

impl Own {
    /// Those that the file at `path` names. It is read when asked for.
    pub fn new(path: PathBuf) -> Self {
        Self { path, known: Mutex::new(None) }
    }

    /// The resolvers, the first one first.
    pub fn resolvers(&self) -> Vec<SocketAddr> {
        let mut known = self.known.lock();
        if let Some((read, resolvers)) = &*known
            && read.elapsed() < READ_AGAIN_AFTER
        {
            return resolvers.clone();
        }
        let resolvers = match std::fs::read(&self.path) {
            Ok(text) => resolvers(&text),
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "the resolvers cannot be read");
                Vec::new()
            }
        };
        *known = Some((Instant::now(), resolvers.clone()));
        resolvers
    }
}

/// The resolvers that the text of a `resolv.conf` names. Loopback is another one in a pod. What cannot be read of it
/// is left out.
fn resolvers(text: &[u8]) -> Vec<SocketAddr> {
    let (config, _errors) = resolv_conf::Config::parse_with_errors(text);
    let all = config.nameservers.into_iter().map(IpAddr::from);
    all.filter(|ip| !ip.is_loopback()).map(|ip| SocketAddr::new(ip, PORT)).collect()
}

/// The network of a pod, as requests go out of it.
#[derive(Debug)]
pub struct Outside<'a> {
    /// Where the sockets are.
    pub netns: &'a Netns,
    /// Their mark.
    pub mark: u32,
}

impl Outside<'_> {
    fn socket(&self, to: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
        let create = || Socket::new(Domain::for_address(to), kind.nonblocking(), Some(protocol));
        let socket = self.netns.run(create)??;
        socket.set_mark(self.mark)?;
        Ok(socket)
    }

    async fn datagrams(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.socket(to, Type::DGRAM, Protocol::UDP)?;
        // A port nobody can guess: the kernel chooses it at random.
        let any: SocketAddr = match to {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        socket.bind(&any.into())?;
        let socket = UdpSocket::from_std(socket.into())?;
        socket.connect(to).await?;
        Ok(socket)
    }

    /// A connection to a resolver.
    pub async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.socket(to, Type::STREAM, Protocol::TCP)?;
        socket.set_tcp_nodelay(true)?;
        TcpSocket::from_std_stream(socket.into()).connect(to).await
    }

    /// Sends `request` in a datagram to the resolvers, and returns the first answer of one. The next one is asked when the
    /// one before has failed or not answered for a while; that is listened to all the same.
    pub async fn over_udp(
        &self,
        resolvers: &[SocketAddr],
        request: &[u8],
        question_end: usize,
    ) -> Result<Vec<u8>, ForwardError> {
        let deadline = Instant::now() + ANSWER_WITHIN;
        // One alone is asked again.
        let again = resolvers.len() == 1;
        let (mut asked, mut further) = (FuturesUnordered::new(), resolvers.iter());
        let mut last = ForwardError::NoResolver;
        loop {
            if let Some(resolver) = further.next() {
                asked.push(self.asking(*resolver, request, question_end, again));
            }
            let until = match further.len() {
                0 => deadline,
                _ => deadline.min(Instant::now() + AGAIN_AFTER),
            };
            match timeout_at(until, asked.next()).await {
                Ok(Some(Ok(answer))) => return Ok(answer),
                Ok(Some(Err(error))) => last = ForwardError::Failed(error),
                Ok(None) => return Err(last),
                Err(_elapsed) if until == deadline => return Err(ForwardError::TimedOut),
                Err(_elapsed) => {}
            }
        }
    }

    async fn asking(
        &self,
        resolver: SocketAddr,
        request: &[u8],
        question_end: usize,
        again: bool,
    ) -> io::Result<Vec<u8>> {
        let socket = self.datagrams(resolver).await?;
        // On the same socket, so that a late answer to the first is one.
        if again && let Ok(answer) = timeout(AGAIN_AFTER, ask(&socket, request, question_end)).await {
            return answer;
        }
        ask(&socket, request, question_end).await
    }

    /// The same over a connection.
    pub async fn over_tcp(
        &self,
        resolvers: &[SocketAddr],
        request: &[u8],
        question_end: usize,
    ) -> Result<Vec<u8>, ForwardError> {
        let deadline = Instant::now() + ANSWER_WITHIN;
        let mut last = ForwardError::NoResolver;
        for resolver in resolvers {
            let asking = async {
                let mut stream = self.connect(*resolver).await?;
                write_message(&mut stream, request).await?;
                loop {
                    let answer = read_message(&mut stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
                    if message::answers(request, question_end, &answer) {
                        return io::Result::Ok(answer);
                    }
                }
            };
            last = match timeout_at(deadline, asking).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => ForwardError::Failed(error),
                Err(_elapsed) => return Err(ForwardError::TimedOut),
            };
        }
        Err(last)
    }
}

async fn ask(socket: &UdpSocket, request: &[u8], question_end: usize) -> io::Result<Vec<u8>> {
    socket.send(request).await?;
    loop {
        socket.readable().await?;
        // Room only once there is something to read.
        let mut answer = vec![0; DATAGRAM_MAX];
        match socket.try_recv(&mut answer) {
            Ok(length) if message::answers(request, question_end, &answer[..length]) => {
                answer.truncate(length);
                answer.shrink_to_fit();
                return Ok(answer);
            }
            // Not what was asked: as if it had not come.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Reads a message as it is sent on connections; `None` at the end of the connection.
pub async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    let first = stream.read(&mut length).await?;
    if first == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut length[first..]).await?;
    let length = usize::from(u16::from_be_bytes(length));
    let mut bytes = Vec::new();
    // Room only for what comes: the length alone costs nothing.
    let read = stream.take(length as u64).read_to_end(&mut bytes).await?;
    if read < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(bytes))
}

/// Writes a message as it is sent on connections.
pub async fn write_message(stream: &mut (impl AsyncWrite + Unpin), message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // In one piece: a packet with the length alone would be one for nothing.
    let mut bytes = Vec::with_capacity(2 + message.len());
    bytes.extend(length.to_be_bytes());
    bytes.extend(message);
    stream.write_all(&bytes).await
}

#[cfg(test)]
mod tests;
