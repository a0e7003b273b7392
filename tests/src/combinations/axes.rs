//! The axes of a connection, and which values go together.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! axes {
    ($($(#[$doc:meta])* $axis:ident { $($(#[$value_doc:meta])* $value:ident = $text:literal,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
            pub enum $axis { $($(#[$value_doc])* $value,)* }

            impl $axis {
                /// All values.
                pub const ALL: &'static [Self] = &[$(Self::$value,)*];
            }

            impl fmt::Display for $axis {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str(match self { $(Self::$value => $text,)* })
                }
            }
        )*
    };
}

axes! {
    /// Who captures pods' traffic, on both nodes.
    Capture {
        /// The daemon itself.
        Ebpf = "eBPF",
        /// A node agent with iptables.
        Iptables = "iptables",
        /// A node agent with nftables.
        Nft = "nft",
    }
    /// How the connection travels.
    Path {
        /// Between two nodes, both pods in the mesh.
        Tunnel = "tunnel",
        /// Between two pods of a node, both in the mesh.
        SameNode = "same node",
        /// From outside the mesh into it.
        PlainIn = "plain in",
        /// From the mesh to outside.
        PlainOut = "plain out",
        /// From a pod in the mesh to itself.
        Itself = "itself",
        /// Between two nodes, by way of a waypoint.
        Waypoint = "waypoint",
        /// To a pod of another network, through its gateway: a tunnel within a tunnel.
        Double = "double HBONE",
    }
    /// The address family.
    Family {
        /// IPv4.
        V4 = "IPv4",
        /// IPv6.
        V6 = "IPv6",
    }
    /// By what the client knows the server.
    Name {
        /// The pod's own address.
        PodIp = "pod IP",
        /// A service's virtual address.
        ClusterIp = "cluster IP",
        /// A service's name, which is looked up.
        HostName = "host name",
        /// The name of a service without a virtual address.
        Headless = "headless",
    }
    /// What the client finds there.
    Server {
        /// A server that accepts.
        Listening = "listening",
        /// Nobody at that port.
        ClosedPort = "closed port",
        /// A server that does not accept for a while, with its queue full.
        BacklogFull = "backlog full",
        /// A server that goes, and comes back at the same port.
        Restarting = "restarting",
        /// Nobody at that address, which the mesh still names.
        Gone = "gone",
    }
    /// Who speaks first.
    First {
        /// The client, and then the server.
        Client = "client first",
        /// The server, and then the client.
        Server = "server first",
        /// Both at once.
        Both = "both at once",
        /// Nobody says anything.
        Nobody = "nobody",
    }
    /// How it ends.
    End {
        /// The client closes its half, and the server what is left.
        ClientFin = "client FIN",
        /// The other way round.
        ServerFin = "server FIN",
        /// The client closes its half, and the server still sends.
        ClientHalf = "client's half",
        /// The other way round.
        ServerHalf = "server's half",
        /// The client resets it.
        ClientReset = "client RST",
        /// The server resets it.
        ServerReset = "server RST",
        /// Nobody ends it, and nothing goes over it for longer than anything in between waits; then the client does.
        LongIdle = "idle for long",
    }
    /// Whether it is idle meanwhile.
    Pause {
        /// It goes on at once.
        Brisk = "brisk",
        /// Nothing goes over it for a while, and then more.
        Idle = "idle",
    }
    /// What the mesh goes through.
    Mesh {
        /// Nothing.
        Stable = "stable",
        /// A policy denies the connection.
        Denied = "denied",
        /// A policy that denies it comes while it is open.
        DeniedMeanwhile = "denied meanwhile",
        /// A policy that does not concern it comes while it is open.
        OtherPolicyMeanwhile = "another policy meanwhile",
        /// Mutual TLS is demanded.
        Strict = "strict",
        /// The service has no endpoint.
        NoEndpoint = "no endpoint",
        /// Where the daemons read the mesh there is nothing for now.
        SourceAway = "source away",
        /// Something is there that the daemons reject, in place of what was good or beside it.
        Rejected = "rejected",
        /// What is said of the server was rejected from the first word on.
        NeverGood = "never good",
        /// The daemons have started anew while the source is away: they know what their predecessors have kept.
        Stale = "stale",
    }
    /// How much each side says.
    Size {
        /// Nothing.
        Nothing = "0",
        /// One byte.
        Byte = "1 B",
        /// Less than a segment.
        Line = "1 KiB",
        /// More than a stream's and a socket's buffers, both ways.
        Bulk = "1 MiB",
    }
    /// What there is little of.
    Limits {
        /// Nothing.
        Ample = "ample",
        /// Ports that clients choose from, in every pod: 32.
        FewPorts = "few ports",
        /// Descriptors: the daemons have none left.
        NoDescriptors = "no descriptors",
        /// Memory: others hold what they may.
        MemoryFull = "memory full",
    }
}

impl Size {
    /// In bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Byte => 1,
            Self::Line => 1 << 10,
            Self::Bulk => 1 << 20,
        }
    }
}

/// One value of each axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "each is called as its axis")]
pub struct Combination {
    pub capture: Capture,
    pub path: Path,
    pub family: Family,
    pub name: Name,
    pub server: Server,
    pub first: First,
    pub end: End,
    pub pause: Pause,
    pub mesh: Mesh,
    pub size: Size,
    pub limits: Limits,
}

/// How many values each axis has, in the order of [`Combination`]'s fields.
pub const LENGTHS: [usize; 11] = [
    Capture::ALL.len(),
    Path::ALL.len(),
    Family::ALL.len(),
    Name::ALL.len(),
    Server::ALL.len(),
    First::ALL.len(),
    End::ALL.len(),
    Pause::ALL.len(),
    Mesh::ALL.len(),
    Size::ALL.len(),
    Limits::ALL.len(),
];

impl Combination {
    /// By the number of the value on each axis.
    pub fn of(values: &[u8; LENGTHS.len()]) -> Self {
        let at = |axis: usize| usize::from(values[axis]);
        Self {
            capture: Capture::ALL[at(0)],
            path: Path::ALL[at(1)],
            family: Family::ALL[at(2)],
            name: Name::ALL[at(3)],
            server: Server::ALL[at(4)],
            first: First::ALL[at(5)],
            end: End::ALL[at(6)],
            pause: Pause::ALL[at(7)],
            mesh: Mesh::ALL[at(8)],
            size: Size::ALL[at(9)],
            limits: Limits::ALL[at(10)],
        }
    }

    /// Whether the client's traffic is captured.
    pub fn client_in_mesh(&self) -> bool {
        self.path != Path::PlainIn
    }

    /// Whether the server's traffic is captured.
    pub fn server_in_mesh(&self) -> bool {
        self.path != Path::PlainOut
    }

    /// Why it makes no sense, if it does not.
    pub fn excluded(&self) -> Option<&'static str> {
        RULES.iter().find(|(_, nonsense)| nonsense(self)).map(|(why, _)| *why)
    }
}

impl fmt::Display for Combination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { capture, path, family, name, server, first, end, pause, mesh, size, limits } = self;
        write!(
            f,
            "{capture}, {path}, {family}, {name}, {server}, {first}, {end}, {pause}, {mesh}, {size}, {limits}"
        )
    }
}

/// One rule: why, and whether it excludes a combination.
type Rule = (&'static str, fn(&Combination) -> bool);

/// What makes no sense, or is the same as another combination.
pub const RULES: &[Rule] = &[
    ("what there is little of is looked at alone", |it| {
        it.limits != Limits::Ample
            && (it.mesh != Mesh::Stable
                || it.server != Server::Listening
                || matches!(it.path, Path::Itself | Path::Waypoint | Path::Double))
    }),
    ("what is idle for long is so while nothing happens", |it| {
        it.end == End::LongIdle
            && (it.mesh, it.server, it.pause, it.limits)
                != (Mesh::Stable, Server::Listening, Pause::Brisk, Limits::Ample)
    }),
    (
        "with eBPF capture the mesh is written as Kubernetes' objects: without waypoints and other networks",
        |it| it.capture == Capture::Ebpf && matches!(it.path, Path::Waypoint | Path::Double),
    ),
    ("files are taken all or none, and a daemon does not start without them", |it| {
        it.capture == Capture::Ebpf && matches!(it.mesh, Mesh::NeverGood | Mesh::Stale)
    }),
    ("an address of another network is not reached but by a service", |it| {
        it.path == Path::Double && !matches!(it.name, Name::ClusterIp | Name::HostName)
    }),
    ("who is behind a waypoint sees the waypoint: it judges clients by itself", |it| {
        it.path == Path::Waypoint && matches!(it.mesh, Mesh::Denied) | meanwhile(it.mesh)
    }),
    ("what Envoy makes of a reset, and of a server that ends first, is Envoy's", |it| {
        it.path == Path::Waypoint && !matches!(it.end, End::ClientFin | End::ClientHalf | End::LongIdle)
    }),
    ("who holds most gives way where memory is full: it may be the one with much on its way", |it| {
        it.limits == Limits::MemoryFull && it.size == Size::Bulk
    }),
    ("what was never good is dialled from another node, and no name leads to it alone", |it| {
        it.mesh == Mesh::NeverGood
            && (it.path != Path::Tunnel || it.server != Server::Listening || it.name == Name::Headless)
    }),
    ("nobody who says nothing says so much", |it| (it.first == First::Nobody) != (it.size == Size::Nothing)),
    ("names are looked up only where a node agent redirects questions", |it| {
        matches!(it.name, Name::HostName | Name::Headless) && it.capture == Capture::Ebpf
    }),
    ("outside the mesh nobody translates a cluster IP or knows a name", |it| {
        it.path == Path::PlainIn && it.name != Name::PodIp
    }),
    ("where no connection comes about nothing is said, and nothing ends", |it| {
        no_connection(it)
            && (it.first, it.end, it.pause, it.size)
                != (First::Client, End::ClientFin, Pause::Brisk, Size::Byte)
    }),
    ("a server that comes late or again is an ordinary one afterwards", |it| {
        matches!(it.server, Server::BacklogFull | Server::Restarting)
            && (it.end, it.pause) != (End::ClientFin, Pause::Brisk)
    }),
    ("who says nothing does not notice that nobody is there yet", |it| {
        it.server == Server::Restarting && it.first == First::Nobody
    }),
    ("a reset right behind the handshake comes before or after the other side has the connection", |it| {
        it.first == First::Nobody && matches!(it.end, End::ClientReset | End::ServerReset)
    }),
    ("a pod that is gone dials nobody, and knows no caller on its node", |it| {
        it.server == Server::Gone && !matches!(it.path, Path::Tunnel | Path::PlainOut)
    }),
    ("a headless service of a pod that is gone has no other name for it", |it| {
        it.server == Server::Gone && it.name == Name::Headless
    }),
    ("policies are the business of a server in the mesh that is reached", |it| {
        policy(it.mesh) && (!it.server_in_mesh() || it.server != Server::Listening)
    }),
    ("a pod is not kept from itself", |it| policy(it.mesh) && it.path == Path::Itself),
    ("who has no identity is denied none, but kept out by STRICT", |it| {
        it.path == Path::PlainIn && matches!(it.mesh, Mesh::Denied | Mesh::DeniedMeanwhile)
    }),
    ("what comes meanwhile comes while it is idle", |it| {
        meanwhile(it.mesh) && (it.pause != Pause::Idle || it.end != End::ClientFin)
    }),
    ("only a service has endpoints, and what has none is not looked for", |it| {
        it.mesh == Mesh::NoEndpoint
            && (!matches!(it.name, Name::ClusterIp | Name::HostName)
                || it.server != Server::Listening
                || it.path != Path::Tunnel)
    }),
];

/// Whether the client is to be told that there is nobody, or that it may not.
pub fn no_connection(it: &Combination) -> bool {
    matches!(it.server, Server::ClosedPort | Server::Gone)
        || matches!(it.mesh, Mesh::Denied | Mesh::NoEndpoint | Mesh::NeverGood)
        || it.limits == Limits::NoDescriptors
        || (it.mesh == Mesh::Strict && it.path == Path::PlainIn)
}

fn policy(mesh: Mesh) -> bool {
    matches!(mesh, Mesh::Denied | Mesh::Strict) || meanwhile(mesh)
}

/// Whether something happens while the connection is open.
pub fn meanwhile(mesh: Mesh) -> bool {
    matches!(mesh, Mesh::DeniedMeanwhile | Mesh::OtherPolicyMeanwhile)
}
