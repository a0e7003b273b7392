//! Addresses that say what they are.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;

/// Where a captured connection was going when the application opened it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OriginalDst(pub SocketAddr);

/// The address a connection came from, as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientAddr(pub SocketAddr);

/// The socket address of a peer that terminates HBONE tunnels (port 15008 as a rule).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HbonePeer(pub SocketAddr);

/// The name of a host in the one spelling in which it is kept.
pub fn lower(host: &str) -> Cow<'_, str> {
    match host.bytes().any(|byte| byte.is_ascii_uppercase()) {
        true => Cow::Owned(host.to_ascii_lowercase()),
        false => Cow::Borrowed(host),
    }
}

/// What a tunnel is asked for: the `:authority` of a CONNECT.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    /// `10.0.0.1:8080` or `[fd00::1]:8080`.
    Address(SocketAddr),
    /// `name.example:8080`: a port of the service of that name.
    Hostname {
        /// The name.
        host: Arc<str>,
        /// The port.
        port: u16,
    },
}

/// The text is not an authority with a port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an address or a name with a port")]
pub struct InvalidAuthority(pub String);

impl Authority {
    /// Reads an authority. The port must be there and not 0. A name is in lower case then, as the mesh has it.
    pub fn parse(text: &str) -> Result<Self, InvalidAuthority> {
        let invalid = || InvalidAuthority(text.chars().take(256).collect());
        if let Ok(address) = text.parse::<SocketAddr>() {
            return if address.port() == 0 { Err(invalid()) } else { Ok(Self::Address(address)) };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        // The shape of the digits is checked, as `parse` takes "+1" for a number.
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let port = port.parse::<u16>().ok().filter(|port| digits && *port != 0).ok_or_else(invalid)?;
        if !Self::is_host(host) {
            return Err(invalid());
        }
        Ok(Self::Hostname { host: Arc::from(lower(host)), port })
    }

    /// Whether `host` is a name that can be asked for.
    pub fn is_host(host: &str) -> bool {
        let valid = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
        !host.is_empty() && host.len() <= 253 && host.bytes().all(valid)
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl From<SocketAddr> for Authority {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

/// The unique name of one incarnation of a pod (its Kubernetes UID, or the name it was given
/// in a mesh file).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(pub Arc<str>);

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for PodUid {
    fn from(uid: &str) -> Self {
        Self(Arc::from(uid))
    }
}

/// An address in one of the mesh's networks. Two networks may use the same addresses.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// The network's name; empty for the one that has none.
    pub network: Arc<str>,
    /// The address, in canonical form.
    pub ip: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

/// A range of addresses in one of the mesh's networks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkCidr {
    /// The network's name; empty for the one that has none.
    pub network: Arc<str>,
    /// The range.
    pub range: IpNet,
}

/// The port HBONE peers listen on.
pub const HBONE_PORT: u16 = 15008;

/// An address as the rest of the daemon compares it: an IPv4-mapped IPv6 address is the IPv4
/// address it maps, as a dual-stack socket reports the former for the latter.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(canonical_ip(addr.ip()), addr.port())
}

/// [`canonical`] for an address without a port.
pub fn canonical_ip(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}
