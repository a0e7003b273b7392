//! The network of a pod whose traffic a node agent's netfilter rules redirect.
//!
//! The rules know the daemon's sockets by their mark, which must be there before the first packet: an unmarked
//! connection would come back to the daemon. Answers to a delivered connection find their way back because the rules
//! remember the mark with the connection and route what belongs to it to `lo`.

use std::io;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use socket2::Domain;
use socket2::Protocol;
use socket2::SockRef;
use socket2::Socket;
use socket2::Type;
use ztunnel_mesh::model::addr::OriginalDst;

use crate::net::netns::Netns;
use crate::net::origdst::redirected_dst;
use crate::net::ports::Fronted;
use crate::net::ports::Ports;
use crate::net::ports::Tries;
use crate::net::socket::Begun;
use crate::net::socket::Delivery;
use crate::net::socket::Dial;
use crate::net::socket::Keepalive;
use crate::net::socket::LOCAL_CONGESTION;
use crate::net::socket::PodNetwork;
use crate::net::socket::connect_at_once;
use crate::net::socket::connecting;
use crate::net::socket::dial;
use crate::net::socket::insisting;
use crate::net::socket::set_congestion;

/// Whether applications see the client's own address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClientAddress {
    /// Where that is permitted; else they see an address of the pod.
    #[default]
    Preferred,
    /// A connection that cannot carry it fails.
    Required,
    /// They see an address of the pod.
    Hidden,
}

/// What every socket in such a pod is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The mark by which the rules know the daemon's own packets; 0 where there are none.
    pub mark: u32,
    /// Whether applications see their client.
    pub client_address: ClientAddress,
    /// Probes on idle connections, and how long what is sent may go without an acknowledgement.
    pub keepalive: Keepalive,
}

impl Default for Settings {
    fn default() -> Self {
        Self { mark: 0x539, client_address: ClientAddress::default(), keepalive: Keepalive::default() }
    }
}

impl Settings {
    /// Sets what dialled sockets need, and listeners hand down to what they accept.
    pub fn apply(&self, socket: &Socket) -> io::Result<()> {
        // Without one nothing has to be permitted.
        if self.mark != 0 {
            socket.set_mark(self.mark)?;
        }
        socket.set_tcp_nodelay(true)?;
        // An application that allows it, too, can then bind the port of this one.
        socket.set_reuse_address(true)?;
        self.keepalive.apply(SockRef::from(socket))
    }
}

/// Says once per process that applications don't see their clients.
static HIDDEN: AtomicBool = AtomicBool::new(false);

/// A redirected pod: its sockets live in its network namespace.
pub struct RedirectedPod {
    maker: Maker,
    tunnel_congestion: Option<String>,
    ports: Arc<Ports>,
}

/// Makes its sockets.
#[derive(Clone)]
struct Maker {
    netns: Arc<Netns>,
    settings: Arc<Settings>,
}

impl RedirectedPod {
    /// The pod whose namespace is `netns`. Tunnels get `tunnel_congestion`, where it is to differ from the system's.
    pub fn new(netns: Arc<Netns>, settings: Arc<Settings>, tunnel_congestion: Option<String>) -> Self {
        let ports = Arc::new(Ports::of(&netns));
        Self { maker: Maker { netns, settings }, tunnel_congestion, ports }
    }
}

impl Maker {
    fn leaving(&self, to: SocketAddr) -> io::Result<Socket> {
        let create = || Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), Some(Protocol::TCP));
        let socket = self.netns.run(create)??;
        self.settings.apply(&socket)?;
        Ok(socket)
    }

    fn delivering(&self, client: IpAddr, to: SocketAddr, tries: &mut Tries) -> io::Result<Socket> {
        let socket = self.leaving(to)?;
        set_congestion(&socket, LOCAL_CONGESTION);
        // A pod that calls itself is its own client.
        if client == to.ip() || self.settings.client_address == ClientAddress::Hidden {
            return Ok(socket);
        }
        match (assume(&socket, client, tries), self.settings.client_address) {
            (Ok(()), _) => Ok(socket),
            (Err(error), ClientAddress::Required) => Err(error),
            // All of its ports are in use: another address would not be its own.
            (Err(error), _) if error.kind() == io::ErrorKind::AddrNotAvailable => Err(error),
            (Err(error), _) => {
                if !HIDDEN.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%client, %error, "applications do not see their clients' addresses");
                }
                // A socket that is half prepared is not used.
                self.leaving(to)
            }
        }
    }
}

/// Deliveries to one application on behalf of one client.
struct Delivering {
    maker: Maker,
    tries: Tries,
    client: IpAddr,
    to: SocketAddr,
}

impl Delivering {
    /// Begins a connection, from a port that is free.
    fn dial(&mut self) -> io::Result<Begun> {
        loop {
            let socket = self.maker.delivering(self.client, self.to, &mut self.tries)?;
            match connect_at_once(socket, self.to, &mut Bytes::new()) {
                Err(error) if self.tries.again(&error) => {}
                begun => return begun,
            }
        }
    }
}

/// Makes what `socket` dials come from `client`, whose address nobody here has.
fn assume(socket: &Socket, client: IpAddr, tries: &mut Tries) -> io::Result<()> {
    if client.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
        socket.set_freebind_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
        socket.set_freebind_v6(true)?;
    }
    tries.bind(socket)
}

impl PodNetwork for RedirectedPod {
    fn original_dst(&self, accepted: &TcpStream) -> io::Result<OriginalDst> {
        redirected_dst(accepted)
    }

    fn leave(&self, to: SocketAddr) -> Dial {
        dial(self.maker.leaving(to), to)
    }

    fn tunnel(&self, to: SocketAddr) -> Dial {
        let socket = self.maker.leaving(to);
        if let (Ok(socket), Some(congestion)) = (&socket, &self.tunnel_congestion) {
            set_congestion(socket, congestion);
        }
        dial(socket, to)
    }

    fn fronted(&self, client: SocketAddr, port: u16) -> Option<Fronted> {
        Some(self.ports.fronted(client, port))
    }

    /// Nothing is said with the dial: it says itself how it went.
    fn deliver(&self, client: IpAddr, to: SocketAddr, _first: &mut Bytes) -> io::Result<Delivery> {
        let (maker, tries) = (self.maker.clone(), self.ports.tries(client, to));
        let bound = client != to.ip() && maker.settings.client_address != ClientAddress::Hidden;
        let mut delivering = Delivering { maker, tries, client, to };
        Ok(match delivering.dial()? {
            Begun::Connected(application) => Delivery::Connected(application),
            Begun::Waiting(socket) if bound => {
                Delivery::Waiting(Box::pin(insisting(socket, move || delivering.dial())))
            }
            Begun::Waiting(socket) => Delivery::Waiting(Box::pin(connecting(socket))),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_socket_carries_its_settings() {
        let keepalive = Keepalive { user_timeout: true, ..Keepalive::default() };
        let settings = Settings { keepalive, ..Settings::default() };
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        settings.apply(&socket).expect("needs CAP_NET_ADMIN");
        assert_eq!(socket.mark().unwrap(), 0x539);
        assert!(socket.tcp_nodelay().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(180));
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(180 + 9 * 180)));
    }

    #[test]
    fn a_client_is_impersonated_unless_that_is_switched_off() {
        let (client, to) = ("192.0.2.7".parse().unwrap(), "127.0.0.1:80".parse().unwrap());
        let local = |client_address| {
            let settings = Arc::new(Settings { client_address, ..Settings::default() });
            let pod = RedirectedPod::new(Arc::new(Netns::current().unwrap()), settings, None);
            let mut tries = pod.ports.tries(client, to);
            let socket = pod.maker.delivering(client, to, &mut tries).expect("needs CAP_NET_ADMIN");
            socket.local_addr().unwrap().as_socket().unwrap().ip()
        };
        assert_eq!(local(ClientAddress::Preferred), client);
        assert_eq!(local(ClientAddress::Required), client);
        assert!(local(ClientAddress::Hidden).is_unspecified());
    }
}
