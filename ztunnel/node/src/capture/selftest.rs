//! Does capture work on this kernel? Tried for real, in a namespace that is thrown away.
//!
//! A namespace without a name gets a pair of devices and is enrolled with pins in a file system that is mounted nowhere;
//! one connection must arrive at the daemon's listener with its original destination, and one SYN from a packet socket
//! must be stopped by the guard.

#![expect(unsafe_code, reason = "a packet socket")]

use std::error::Error;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use ztunnel_ebpf_abi::Counter;
use ztunnel_mesh::model::addr::PodUid;

use super::netlink::Netlink;
use super::pins::Pins;
use super::reconcile::chain;
use super::{Config, Node, PodSpec, sys};

/// What the self-test found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Whether capture works here.
    pub works: bool,
    /// One line: what was shown, or what is missing.
    pub reason: String,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

type Failure = Box<dyn Error + Send + Sync>;

const POD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const ELSEWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), 80);
/// For a connection within one namespace. A machine that is busy may still take its time.
const PATIENCE: Duration = Duration::from_secs(5);

/// Captures a connection and refuses a packet in a throw-away namespace, and leaves nothing behind, not even when it is
/// killed. Independent of a daemon that may be running on the node.
pub fn self_test(config: &Config) -> Verdict {
    if let Err(error) = Pins::new(&config.pin_dir).remove_dead_self_tests() {
        tracing::warn!(%error, "something is left of a self-test that was killed");
    }
    // On a thread of its own, whose namespace ends with it.
    let outcome = std::thread::scope(|scope| scope.spawn(|| in_new_netns(config)).join());
    match outcome {
        Ok(Ok(())) => {
            let reason =
                "capture works: a connection was redirected and a packet past it was refused".to_owned();
            Verdict { works: true, reason }
        }
        Ok(Err(error)) => {
            Verdict { works: false, reason: format!("capture does not work: {}", chain(&*error)) }
        }
        Err(_panic) => {
            Verdict { works: false, reason: "capture does not work: the self-test failed".to_owned() }
        }
    }
}

/// Pins that end with this. Closing the file system that holds them would do, but in its own time.
struct Pinned(Pins, #[expect(dead_code, reason = "holds the file system")] OwnedFd);

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove_all() {
            tracing::debug!(%error, "the programs of the self-test end with its file system");
        }
    }
}

fn in_new_netns(config: &Config) -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWNET)
        .map_err(|error| format!("cannot make a network namespace (CAP_SYS_ADMIN?): {error}"))?;
    let device = devices().map_err(|error| format!("cannot make a veth pair (CONFIG_VETH?): {error}"))?;
    let file_system = sys::private_bpffs()
        .map_err(|error| format!("cannot make a bpf file system (CAP_SYS_ADMIN?): {error}"))?;
    let pin_dir = sys::inside(file_system.as_fd());
    let _pinned = Pinned(Pins::new(&pin_dir), file_system);
    // Its own namespace is the host as well, so that the real one is left alone.
    let netns = PathBuf::from(format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid()));
    let config = Config { pin_dir, host_netns: netns.clone(), ..config.clone() };
    try_capture(&config, netns, device)
}

fn try_capture(config: &Config, netns: PathBuf, device: u32) -> Result<(), Failure> {
    let mut node = Node::open(config.clone())?;
    let pod = PodSpec { uid: PodUid::from("self-test"), netns, addresses: vec![IpAddr::V4(POD)] };
    let captured = node.bind(&pod)?;
    node.capture(&pod, &captured)?;

    let client = TcpStream::connect_timeout(&ELSEWHERE, PATIENCE)
        .map_err(|error| format!("a connection was not captured: {error}"))?;
    // The listener does not wait, and may know of the connection later than its client.
    let outbound = &captured.listeners.outbound;
    let mut polled = [PollFd::new(outbound.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(PATIENCE)?;
    let (accepted, _) = poll(&mut polled, patience)
        .map_err(io::Error::from)
        .and_then(|_| outbound.accept())
        .map_err(|error| format!("a captured connection did not reach the listener: {error}"))?;
    let destination = accepted.local_addr()?;
    if ztunnel_mesh::model::addr::canonical(destination) != ELSEWHERE {
        return Err(format!("a captured connection lost its destination: {destination}").into());
    }
    drop((accepted, client));

    let before = node.counters().of(Counter::GuardSyn);
    send_syn(device).map_err(|error| format!("cannot try the guard: {error}"))?;
    if node.counters().of(Counter::GuardSyn) == before {
        return Err("the guard let a packet of a packet socket pass (CONFIG_NET_XGRESS, Linux 6.6?)".into());
    }
    Ok(())
}

/// A veth pair with both ends here; returns the index of the one that has the address.
fn devices() -> io::Result<u32> {
    let mut netlink = Netlink::open()?;
    let mut up = LinkMessage::default();
    up.header.index = 1;
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    netlink.change(RouteNetlinkMessage::SetLink(up.clone()), 0)?;
    let mut peer = LinkMessage::default();
    peer.attributes.push(LinkAttribute::IfName("peer".to_owned()));
    let mut pair = LinkMessage::default();
    pair.header.index = 10;
    pair.attributes = vec![
        LinkAttribute::IfName("pod".to_owned()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    netlink.change(RouteNetlinkMessage::NewLink(pair), NLM_F_CREATE | NLM_F_EXCL)?;
    for device in super::routes::devices(&mut netlink)? {
        up.header.index = device.index;
        netlink.change(RouteNetlinkMessage::SetLink(up.clone()), 0)?;
    }
    let mut address = AddressMessage::default();
    address.header.family = AddressFamily::Inet;
    address.header.prefix_len = 24;
    address.header.index = 10;
    address.attributes =
        vec![AddressAttribute::Local(IpAddr::V4(POD)), AddressAttribute::Address(IpAddr::V4(POD))];
    netlink.change(RouteNetlinkMessage::NewAddress(address), NLM_F_CREATE | NLM_F_EXCL)?;
    Ok(10)
}

/// Sends a whole Ethernet frame with a SYN in it.
fn send_syn(device: u32) -> io::Result<()> {
    // SAFETY: a plain system call; the descriptor is new and ours.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let mut frame = [0u8; 54];
    frame[..6].fill(0xff);
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    frame[14..24].copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6]);
    frame[26..30].copy_from_slice(&POD.octets());
    frame[30..34].copy_from_slice(&[198, 51, 100, 1]);
    frame[46] = 0x50;
    frame[47] = 0x02;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0x0800_u16.to_be(),
        sll_ifindex: device as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0xff; 8],
    };
    // SAFETY: buffer and address are valid for their sizes. The guard's refusal may surface as ENOBUFS, which
    // is what is wanted; the counter decides.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            std::ptr::from_ref(&address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if sent >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENOBUFS) { Ok(()) } else { Err(error) }
}
