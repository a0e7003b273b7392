//! Pods whose traffic a node agent's own rules redirect: istio-cni's, in iptables or nftables.
//!
//! The agent has put rules into the pod that send what it dials to port 15001, plain connections to it to 15006, and
//! let 15008 pass. Here is only the other end: listeners on these ports, in the pod's network namespace. They may
//! share the ports with another daemon's, so that one can replace the other. Nothing is loaded into the kernel.

use std::io;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::sync::Arc;

use socket2::Domain;
use socket2::Socket;
use socket2::Type;

use crate::capture::Listeners;
use crate::net::netns::Netns;
use crate::net::redirected::ClientAddress;
use crate::net::redirected::Settings;

/// Where the rules send what the pod dials.
pub const OUTBOUND_PORT: u16 = 15001;
/// Where the rules send plain connections to the pod.
pub const INBOUND_PORT: u16 = 15006;
/// Where peers dial tunnels to the pod.
pub const HBONE_PORT: u16 = 15008;

const BACKLOG: i32 = 4096;

/// How the listeners are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Whether other daemons may have the same ports.
    pub share_ports: bool,
    /// Whether to listen on IPv6 as well.
    pub ipv6: bool,
    /// What accepted sockets inherit.
    pub settings: Settings,
}

impl Default for Config {
    fn default() -> Self {
        Self { share_ports: true, ipv6: true, settings: Settings::default() }
    }
}

/// Why a pod has no listeners.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Its network namespace cannot be entered.
    #[error("cannot enter the pod's network namespace")]
    Netns(#[source] io::Error),
    /// A port cannot be had.
    #[error("cannot listen on port {port} in the pod{}", hint(.source))]
    Listen {
        /// Which.
        port: u16,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => " (a process of the pod, or a daemon that does not share it, has it)",
        _ => "",
    }
}

/// Why pods cannot be served at all.
#[derive(Debug, thiserror::Error)]
#[error("{what} is not permitted: the container needs {capability}")]
pub struct NotPermitted {
    what: &'static str,
    capability: &'static str,
    source: io::Error,
}

/// Tries what serving a pod takes, so that a daemon that cannot fails at its start and says why.
pub fn check(config: &Config) -> Result<(), NotPermitted> {
    let refused = |what, capability| move |source| NotPermitted { what, capability, source };
    let enter = || {
        let netns = std::fs::File::open("/proc/thread-self/ns/net")?;
        // Into the namespace where this thread is already.
        nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
    };
    enter().map_err(refused("entering a network namespace", "CAP_SYS_ADMIN"))?;
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)
        .map_err(refused("making a socket", "network sockets"))?;
    config
        .settings
        .apply(&socket)
        .map_err(refused("marking a socket (SO_MARK)", "CAP_NET_ADMIN or CAP_NET_RAW"))?;
    if config.settings.client_address == ClientAddress::Required {
        let transparent = socket.set_ip_transparent_v4(true);
        transparent.map_err(refused("keeping clients' addresses (IP_TRANSPARENT)", "CAP_NET_RAW"))?;
    }
    Ok(())
}

/// Binds the three listeners in `netns`.
pub fn bind(netns: &Netns, config: &Config) -> Result<Listeners, BindError> {
    let bind = || {
        // Plain connections last: who finds a tunnel's port open finds the others open, too.
        let hbone = listen(HBONE_PORT, config)?;
        let inbound = listen(INBOUND_PORT, config)?;
        let outbound = listen(OUTBOUND_PORT, config)?;
        Ok(Listeners { outbound, inbound, hbone })
    };
    netns.run(bind).map_err(BindError::Netns)?
}

/// Listens for tunnels where this thread is: in the network namespace of the daemon.
pub fn bind_here(config: &Config) -> Result<Arc<TcpListener>, BindError> {
    listen(HBONE_PORT, config)
}

fn listen(port: u16, config: &Config) -> Result<Arc<TcpListener>, BindError> {
    try_listen(port, config).map(Arc::new).map_err(|source| BindError::Listen { port, source })
}

fn try_listen(port: u16, config: &Config) -> io::Result<TcpListener> {
    let ipv4 = || Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None);
    let (socket, any): (_, SocketAddr) = match config.ipv6 {
        true => match Socket::new(Domain::IPV6, Type::STREAM.nonblocking(), None) {
            Ok(socket) => {
                socket.set_only_v6(false)?;
                (socket, (Ipv6Addr::UNSPECIFIED, port).into())
            }
            // A kernel without IPv6.
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                (ipv4()?, (Ipv4Addr::UNSPECIFIED, port).into())
            }
            Err(error) => return Err(error),
        },
        false => (ipv4()?, (Ipv4Addr::UNSPECIFIED, port).into()),
    };
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(config.share_ports)?;
    config.settings.apply(&socket)?;
    // Serves agents whose rules use TPROXY; with redirection nothing needs it.
    if config.settings.client_address != ClientAddress::Hidden {
        let transparent = match any {
            SocketAddr::V4(_) => socket.set_ip_transparent_v4(true),
            SocketAddr::V6(_) => {
                socket.set_ip_transparent_v6(true).and_then(|()| socket.set_ip_transparent_v4(true))
            }
        };
        if config.settings.client_address == ClientAddress::Required {
            transparent?;
        }
    }
    socket.bind(&any.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use nix::sched::CloneFlags;
    use nix::sched::unshare;

    use super::*;

    fn fresh() -> Netns {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
            Netns::current().expect("open")
        })
        .join()
        .expect("no panic")
    }

    #[test]
    fn root_may_serve_pods() {
        check(&Config::default()).expect("needs root");
    }

    #[test]
    fn two_daemons_can_listen_in_one_pod() {
        let (netns, config) = (fresh(), Config::default());
        let first = bind(&netns, &config).expect("the first");
        let second = bind(&netns, &config).expect("the second");
        for (listener, port) in
            [(&first.outbound, OUTBOUND_PORT), (&first.inbound, INBOUND_PORT), (&second.hbone, HBONE_PORT)]
        {
            assert_eq!(listener.local_addr().expect("bound").port(), port);
        }
    }

    #[test]
    fn a_port_that_the_pod_has_itself_is_named() {
        let netns = fresh();
        let _taken =
            netns.run(|| TcpListener::bind(("0.0.0.0", INBOUND_PORT))).expect("enter").expect("bind");
        let error = bind(&netns, &Config::default()).expect_err("it is taken");
        assert!(
            error.to_string().starts_with("cannot listen on port 15006 in the pod (a process"),
            "{error}"
        );
    }

    #[test]
    fn without_ipv6_only_ipv4_is_listened_on() {
        let config = Config { ipv6: false, ..Config::default() };
        let listeners = bind(&fresh(), &config).expect("bind");
        assert!(listeners.hbone.local_addr().expect("bound").is_ipv4());
    }
}
