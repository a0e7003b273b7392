//! What the eBPF programs and the daemon agree on: marks, map keys and values, counters.
//!
//! Everything is `#[repr(C)]` with explicit padding. A change of any layout or of the meaning of a value
//! raises [`VERSION`]; maps of different versions live in different pin directories and never meet.

#![no_std]
#![cfg_attr(feature = "user", expect(unsafe_code, reason = "aya's `Pod` is an unsafe marker trait"))]

/// Version of everything in this crate; part of the pin directory's name.
pub const VERSION: u32 = 1;

/// Bits of a socket mark that belong to the mesh.
pub const MARK_MASK: u32 = 0xfff;
/// The daemon's own way out of a pod (the value Istio uses).
pub const BYPASS: u32 = 0x539;
/// The daemon's dial to the application, and the application's answers.
pub const REPLY: u32 = 0x53a;
/// A captured connection of the application.
pub const CAPTURE: u32 = 0x53c;

/// Routing table of an enrolled pod that sends marked packets to its loopback device.
pub const ROUTE_TABLE: u32 = 100;
/// The port HBONE peers dial.
pub const HBONE_PORT: u16 = 15008;

/// An IPv6 or IPv4-mapped address as four words in network byte order, as the kernel shows them.
pub type Address = [u32; 4];

/// The third word of an IPv4-mapped address.
pub const MAPPED: u32 = 0xffff_u32.to_be();

/// The IPv4-mapped form of an IPv4 address in network byte order.
pub const fn mapped(v4: u32) -> Address {
    [0, 0, MAPPED, v4]
}

/// Source of the node's own connections to enrolled pods (probes), IPv4: 169.254.7.127.
pub const PROBE_V4: Address = mapped(u32::from_ne_bytes([169, 254, 7, 127]));
/// The same, IPv6: fd16:9254:7127:1337:ffff:ffff:ffff:ffff.
pub const PROBE_V6: Address = [
    u32::from_ne_bytes([0xfd, 0x16, 0x92, 0x54]),
    u32::from_ne_bytes([0x71, 0x27, 0x13, 0x37]),
    u32::MAX,
    u32::MAX,
];

/// Most pods a node can capture.
pub const SLOTS: u32 = 1024;
/// The slot of pods for which there is none. It has no listeners and no addresses: they are closed.
pub const NO_SLOT: u32 = SLOTS;
/// Most addresses of one pod that the programs are told of: those the mesh knows first. Every pod has room for as many.
pub const ADDRESSES_PER_SLOT: u32 = 32;
/// Most addresses of one pod at which the node can reach it past the mesh.
pub const PROBED_PER_SLOT: u32 = 8;
/// Entries of `LISTENERS` that belong to one slot (the fourth is kept for DNS).
pub const LISTENERS_PER_SLOT: u32 = 4;
/// Offset in a slot: connections of the application.
pub const OUTBOUND: u32 = 0;
/// Offset in a slot: plaintext connections to the application.
pub const INBOUND: u32 = 1;
/// Offset in a slot: HBONE tunnels.
pub const HBONE: u32 = 2;

/// Value in `SOCKETS`: the daemon made this socket, it may leave the pod.
pub const VOUCHED: u32 = 1;
/// Value in `SOCKETS`: one end of a connection that stays in the pod: what an application dialled, what the daemon
/// delivers, or what an application took of that. None of its packets may leave the pod.
pub const CAPTURED: u32 = 2;
/// Value in `SOCKETS`: the node's own connection to a pod.
pub const PROBE: u32 = 3;

/// Value of `PODS`, keyed by netns cookie.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodEntry {
    /// Index of the pod in every other map.
    pub slot: u32,
    /// Zero; kept for later use.
    pub flags: u32,
}
const _: () = assert!(size_of::<PodEntry>() == 8);

/// Key of `ADDRESSES`: the pod in `slot` has `address`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SlotAddress {
    /// The pod.
    pub slot: u32,
    /// One of its own addresses.
    pub address: Address,
}
const _: () = assert!(size_of::<SlotAddress>() == 20);

/// Key of `PROBES`: a connection as its packets show it on their way from who dialled.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Who dialled.
    pub from: Address,
    /// Who was dialled.
    pub to: Address,
    /// The port of `from`, in host byte order.
    pub from_port: u16,
    /// The port of `to`, in host byte order.
    pub to_port: u16,
}
const _: () = assert!(size_of::<Flow>() == 36);

/// Key of `DELIVERIES`: a connection both ends of which are in one network namespace.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LocalFlow {
    /// Cookie of the namespace.
    pub netns: u64,
    /// The connection.
    pub flow: Flow,
    /// Zero.
    pub padding: u32,
}
const _: () = assert!(size_of::<LocalFlow>() == 48);

/// Most connections of the node's own to pods that are remembered: whoever has shaken hands no longer needs it, so
/// these are as many as can be about to. When more are, the oldest are forgotten and come in like anybody else.
pub const PROBES: u32 = 8192;
/// Most deliveries that are remembered until the application has taken them. When there are more, the oldest are
/// forgotten and known by their mark alone.
pub const DELIVERIES: u32 = 8192;

/// The only value of `NODE`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NodeConfig {
    /// Cookie of the host's network namespace.
    pub host_cookie: u64,
    /// Cgroup under which the kubelet puts pods; zero when there is none.
    pub kubepods: u64,
    /// How deep below the root that cgroup is.
    pub kubepods_level: u32,
    /// Zero.
    pub padding: u32,
}
const _: () = assert!(size_of::<NodeConfig>() == 24);

/// Longest pod UID and longest netns path a [`Record`] holds, in bytes.
pub const TEXT_MAX: usize = 256;

/// Value of `RECORDS`, keyed by slot: what a later daemon needs to take over or clean up.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Record {
    /// Inode of the network namespace.
    pub netns_inode: u64,
    /// Its cookie.
    pub cookie: u64,
    /// What `tcp_fwmark_accept` was before.
    pub fwmark_accept: u32,
    /// One when the pod is withdrawn and only its open connections are left.
    pub withdrawn: u32,
    /// Bytes of `uid` in use.
    pub uid_len: u16,
    /// Bytes of `netns` in use.
    pub netns_len: u16,
    /// What `fwmark_reflect` was before: a byte for IPv4, one for IPv6, then which of them are known (bits 0 and 1).
    /// Zero where a daemon that leaves it alone made the record.
    pub fwmark_reflect: u32,
    /// The pod's UID.
    pub uid: [u8; TEXT_MAX],
    /// Path that opened the namespace.
    pub netns: [u8; TEXT_MAX],
}
const _: () = assert!(size_of::<Record>() == 32 + 2 * TEXT_MAX);

/// Index in `STATE`: number of the daemon that owns the maps; a higher one supersedes.
pub const STATE_GENERATION: u32 = 0;
/// Index in `STATE`: one when the daemon mounted the bpffs that holds the pins.
pub const STATE_MOUNTED: u32 = 1;
/// Entries of `STATE`.
pub const STATE_ENTRIES: u32 = 4;

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)+) => {
        /// What the programs count, by reason: the index in `COUNTERS`.
        #[repr(u32)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Counter { $($(#[$doc])* $variant,)+ }

        impl Counter {
            /// All of them, in the order of their index.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name metrics use.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }
    };
}

counters! {
    /// A connection was marked for capture.
    ConnectCaptured = "connect_captured",
    /// A socket of the daemon connected.
    ConnectVouched = "connect_vouched",
    /// A pod dialled itself or its loopback: left alone.
    ConnectLocal = "connect_local",
    /// A process of the node dialled a pod and was given the probe address.
    ConnectProbe = "connect_probe",
    /// Refused: the mark could not be set.
    RefusedMark = "refused_mark",
    /// Refused: the socket is bound to a device and could not be freed from it.
    RefusedDevice = "refused_device",
    /// Refused: no storage for the socket.
    RefusedStorage = "refused_storage",
    /// Refused: IPv6 link-local destinations cannot be captured.
    RefusedLinkLocal = "refused_link_local",
    /// Refused: a pod used the probe address.
    RefusedProbeAddress = "refused_probe_address",
    /// Refused: a pod dialled, and the daemon has no listener (it is not running).
    RefusedNoListener = "refused_no_listener",
    /// A multipath TCP socket was marked when it was made.
    MultipathMarked = "multipath_marked",
    /// A connection found the outbound listener.
    AcceptedOutbound = "accepted_outbound",
    /// A connection found the inbound plaintext listener.
    AcceptedInbound = "accepted_inbound",
    /// A connection found the HBONE listener.
    AcceptedHbone = "accepted_hbone",
    /// A probe went to the application.
    AcceptedProbe = "accepted_probe",
    /// Refused: the daemon has no listener (it is not running).
    DroppedNoListener = "dropped_no_listener",
    /// Refused: inbound to an IPv6 link-local address.
    DroppedLinkLocal = "dropped_link_local",
    /// Guard: a SYN that the daemon did not send.
    GuardSyn = "guard_syn",
    /// Guard: a captured connection lost its mark or its route.
    GuardLostMark = "guard_lost_mark",
    /// Guard: a TCP fragment whose flags cannot be seen.
    GuardFragment = "guard_fragment",
    /// Guard: too many VLAN tags.
    GuardVlan = "guard_vlan",
    /// Guard: headers too short or too many.
    GuardMalformed = "guard_malformed",
    /// A packet of a captured connection was about to leave the pod, and was stopped before it came to a device.
    LeaveCaptured = "leave_captured",
    /// No memory to write down whose a connection is: it is known by its mark alone.
    Unrecorded = "unrecorded",
    /// Refused: a connection inside of a pod of which neither end is an address the pod is known to have.
    DroppedUnknownAddress = "dropped_unknown_address",
}

/// Entries of `COUNTERS`.
pub const COUNTERS: u32 = Counter::ALL.len() as u32;

#[cfg(feature = "user")]
mod user {
    use super::{NodeConfig, PodEntry, Record, SlotAddress};

    // SAFETY: all four are `repr(C)`, `Copy`, made of integers only and without implicit padding.
    unsafe impl aya::Pod for PodEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for SlotAddress {}
    // SAFETY: as above.
    unsafe impl aya::Pod for NodeConfig {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Record {}
}
