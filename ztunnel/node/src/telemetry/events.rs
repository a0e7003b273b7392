//! What happened to a connection: one type per fact. A fact counts itself and logs itself from the same
//! fields, so that log and metrics cannot disagree.
//!
//! Does not know how a line or a metric is written: see [`crate::telemetry::access_log`] and
//! [`crate::telemetry::series`].

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use std::time::SystemTime;

use tracing::Level;
use ztunnel_mesh::model::addr::Authority;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::workload::Workload;

/// Which end of the connection tells: the client's proxy or the server's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reporter {
    /// The proxy of the pod that dialled: outbound.
    Source,
    /// The proxy of the pod that was dialled: inbound.
    Destination,
}

impl Reporter {
    /// Both, in the order of their discriminants.
    pub const ALL: [Self; 2] = [Self::Source, Self::Destination];

    /// The value of the `reporter` label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    /// The value of the access log's `direction`.
    pub fn direction(self) -> &'static str {
        match self {
            Self::Source => "outbound",
            Self::Destination => "inbound",
        }
    }
}

/// How a connection ended, as Istio's `response_flags` label has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResponseFlag {
    /// `-`: nothing to remark.
    None,
    /// `DENY`: an authorization policy refused or cut it.
    Denied,
    /// `CONNECT`: the upstream could not be reached, or refused the tunnel.
    Connect,
    /// `TLS_FAILURE`: the TLS handshake failed.
    TlsFailure,
    /// `H2_HANDSHAKE_FAILURE`: the HTTP/2 handshake failed.
    H2Handshake,
    /// `NETWORK_POLICY`: the HBONE port timed out, as it does when a network policy blocks it.
    NetworkPolicy,
    /// `IDENTITY_ERROR`: no certificate for the source or destination.
    Identity,
    /// `CERT_REVOKED`: a certificate of the peer was revoked, before the connection or while it was open.
    Revoked,
}

impl ResponseFlag {
    /// All flags, in the order of their discriminants.
    pub const ALL: [Self; 8] = [
        Self::None,
        Self::Denied,
        Self::Connect,
        Self::TlsFailure,
        Self::H2Handshake,
        Self::NetworkPolicy,
        Self::Identity,
        Self::Revoked,
    ];

    /// The value of the `response_flags` label.
    pub fn label(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Denied => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2Handshake => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::Identity => "IDENTITY_ERROR",
            Self::Revoked => "CERT_REVOKED",
        }
    }
}

/// What vouches for the client of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Security {
    /// Nothing: it came, or goes, in clear.
    Plain,
    /// Mutual TLS.
    MutualTls,
    /// This daemon, which took the connection from one of its pods and gave it to another: it holds the keys of both,
    /// and there was no wire on which anybody could have used them.
    WithinNode,
}

impl Security {
    /// The value of the `connection_security_policy` label. Istio has two; what is not encrypted is not
    /// `mutual_tls`.
    pub fn label(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Plain | Self::WithinNode => "unknown",
        }
    }
}

/// Who is at the ends of a connection. What is not known is `None`: it is left out of the log, and `unknown` in
/// the metrics.
#[derive(Debug, Clone)]
pub struct Parties {
    /// Who tells.
    pub reporter: Reporter,
    /// The client.
    pub source: Option<Arc<Workload>>,
    /// The client's identity, where it was proved (or, in its own proxy, used).
    pub source_identity: Option<SpiffeId>,
    /// The server.
    pub destination: Option<Arc<Workload>>,
    /// The server's identity: the one it proved or was expected to prove, or, of a connection in clear, the one that
    /// the mesh knows it by. Of that the log says nothing.
    pub destination_identity: Option<SpiffeId>,
    /// The service the client dialled, or, where only the server's end is known, the one that it must have.
    pub service: Option<Arc<Service>>,
    /// What vouches for the client.
    pub security: Security,
}

impl Parties {
    /// Nobody known yet but who tells.
    pub fn unknown(reporter: Reporter) -> Self {
        Self {
            reporter,
            source: None,
            source_identity: None,
            destination: None,
            destination_identity: None,
            service: None,
            security: Security::Plain,
        }
    }
}

/// The addresses of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// Where it came from.
    pub source: SocketAddr,
    /// Whom the TCP connection goes to: port 15008 of the peer for a tunnelled one.
    pub destination: SocketAddr,
    /// What the tunnel was asked for (`:authority`), for a tunnelled one.
    pub hbone: Option<Authority>,
}

/// A connection was opened: its parties are known and it is counted.
#[derive(Debug, Clone)]
pub struct Opened {
    /// When.
    pub at: SystemTime,
    /// Between whom.
    pub parties: Parties,
    /// From where to where.
    pub addresses: Addresses,
}

/// An opened connection ended.
#[derive(Debug)]
pub struct Closed {
    /// When.
    pub at: SystemTime,
    /// Between whom it was.
    pub parties: Parties,
    /// From where to where.
    pub addresses: Addresses,
    /// Bytes that came from the client.
    pub received: u64,
    /// Bytes that went to the client.
    pub sent: u64,
    /// How long it was open.
    pub duration: Duration,
    /// How it ended.
    pub flag: ResponseFlag,
    /// What went wrong, if something did.
    pub error: Option<String>,
}

/// A connection was refused before it was known whose it is. It is logged, and not counted in the traffic
/// metrics, which need the parties.
#[derive(Debug)]
pub struct RefusedEarly {
    /// When.
    pub at: SystemTime,
    /// Who tells.
    pub reporter: Reporter,
    /// From where to where.
    pub addresses: Addresses,
    /// Why.
    pub error: String,
}

/// One line of the access log, not yet written out.
#[derive(Debug)]
pub enum AccessRecord {
    /// `connection opened`, at debug level.
    Opened(Opened),
    /// `connection complete`, at info level, or at error level with an error.
    Closed(Closed),
    /// `connection failed`, at warn level.
    RefusedEarly(RefusedEarly),
}

impl AccessRecord {
    /// Whose connection it was.
    pub fn source(&self) -> SocketAddr {
        match self {
            Self::Opened(opened) => opened.addresses.source,
            Self::Closed(closed) => closed.addresses.source,
            Self::RefusedEarly(refused) => refused.addresses.source,
        }
    }

    /// The level the line has, and with which it is filtered.
    pub fn level(&self) -> Level {
        match self {
            Self::Opened(_) => Level::DEBUG,
            Self::Closed(closed) => closed.level(),
            Self::RefusedEarly(_) => Level::WARN,
        }
    }
}

impl Closed {
    fn level(&self) -> Level {
        if self.error.is_none() && self.flag == ResponseFlag::None { Level::INFO } else { Level::ERROR }
    }
}
