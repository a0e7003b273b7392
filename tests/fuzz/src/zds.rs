//! A node agent that sends what it likes, with descriptors of what it likes, while the kernel side answers in any
//! order.
//!
//! Each message gets one answer, one of 1024 bytes at most; a pod is enrolled until it is withdrawn; the daemon does
//! not hold more than it may; and when all is dropped, no descriptor is left open.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::sync::LazyLock;
use std::time::Duration;

use arbitrary::Result;
use arbitrary::Unstructured;
use rustix::net::AddressFamily;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use tokio::time::Instant;
use ztunnel_node::enrol::zds::AgentPod;
use ztunnel_node::enrol::zds::link::Packet;
use ztunnel_node::enrol::zds::machine::Action;
use ztunnel_node::enrol::zds::machine::Event;
use ztunnel_node::enrol::zds::machine::Machine;
use ztunnel_node::enrol::zds::machine::PODS_MAX;
use ztunnel_node::enrol::zds::machine::Rejected;
use ztunnel_node::enrol::zds::machine::Request;
use ztunnel_node::enrol::zds::message;
use ztunnel_node::enrol::zds::message::MESSAGE_MAX;
use ztunnel_node::fuzzing;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_proto::prost::Message;
use ztunnel_proto::workload::zds::AddWorkload;
use ztunnel_proto::workload::zds::DelWorkload;
use ztunnel_proto::workload::zds::KeepWorkload;
use ztunnel_proto::workload::zds::SnapshotSent;
use ztunnel_proto::workload::zds::WorkloadInfo;
use ztunnel_proto::workload::zds::WorkloadRequest;
use ztunnel_proto::workload::zds::workload_request::Payload;

use crate::wire::pick;

const UIDS: [&str; 4] = ["u1", "u2", "u3", ""];

/// A namespace of the network, another namespace, and something else. The second has another number than the first;
/// that it is not of the network is found out when it is entered.
static HANDLES: LazyLock<[File; 3]> = LazyLock::new(|| {
    ["/proc/self/ns/net", "/proc/self/ns/uts", "/dev/null"].map(|path| File::open(path).expect("it is there"))
});
static SOCKETS: LazyLock<(OwnedFd, OwnedFd)> = LazyLock::new(|| {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a pair")
});

/// The number the next descriptor gets: another one when one was left open.
fn next_number() -> i32 {
    File::open("/dev/null").expect("it is there").as_raw_fd()
}

fn bytes(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let uid = if u.ratio(1, 16)? { crate::wire::word(u)? } else { pick(u, &UIDS)?.to_owned() };
    let payload = match u.int_in_range(0..=15)? {
        0 => return Ok(u.arbitrary::<&[u8]>()?.to_vec()),
        1..=6 => {
            let name = |u: &mut Unstructured<'_>| pick(u, &["n", "shop", "n", "a b", ""]).map(str::to_owned);
            let info = WorkloadInfo { name: name(u)?, namespace: name(u)?, service_account: name(u)? };
            Payload::Add(AddWorkload { uid, workload_info: u.ratio(7, 8)?.then_some(info) })
        }
        7..=9 => Payload::Keep(KeepWorkload { uid }),
        10..=12 => Payload::Del(DelWorkload { uid }),
        _ => Payload::SnapshotSent(SnapshotSent {}),
    };
    let mut bytes = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
    if u.ratio(1, 16)? {
        bytes.resize(u.int_in_range(0..=2 * MESSAGE_MAX)?, u.arbitrary()?);
    }
    Ok(bytes)
}

/// Over a socket, as it comes from an agent.
fn over_a_socket(bytes: &[u8], handles: &[&File]) -> Option<Packet> {
    let (ours, theirs) = &*SOCKETS;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let handles: Vec<_> = handles.iter().map(|file| file.as_fd()).collect();
    if !handles.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&handles)));
    }
    rustix::net::sendmsg(theirs, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
        .expect("there is room");
    match fuzzing::receive_from_agent(ours) {
        Ok(packet) => {
            assert!(packet.truncated || packet.bytes == bytes && packet.descriptors.len() == handles.len());
            // There is room for four descriptors, and perhaps for a few more.
            assert!(!packet.truncated || bytes.len() > MESSAGE_MAX || handles.len() > 4);
            Some(packet)
        }
        // An empty packet without anything is how the end of a connection looks.
        Err(_) => {
            assert!(bytes.is_empty() && handles.is_empty());
            None
        }
    }
}

/// What the agent and the kernel side should have come to.
#[derive(Default)]
struct Told {
    /// The agent is there, and this many of its messages are not answered.
    connected: bool,
    unanswered: usize,
    capturing: BTreeSet<PodUid>,
    releasing: BTreeSet<PodUid>,
    /// Pods that were enrolled and not withdrawn.
    enrolled: BTreeSet<PodUid>,
}

impl Told {
    fn heed(&mut self, actions: Vec<Action<AgentPod>>) {
        for action in actions {
            match action {
                Action::Hello => assert!(self.connected),
                Action::Ack(result) => {
                    assert!(self.unanswered > 0, "an answer to nothing: {result:?}");
                    self.unanswered -= 1;
                    assert!(message::ack(&result).len() <= MESSAGE_MAX);
                }
                Action::Close => (self.connected, self.unanswered) = (false, 0),
                Action::Capture(pod) => {
                    assert!(!self.releasing.contains(&pod.uid), "it is being released");
                    self.capturing.insert(pod.uid);
                }
                Action::Release(uid) => {
                    assert!(!self.capturing.contains(&uid), "it is being captured");
                    self.releasing.insert(uid);
                }
                Action::Reconciled => {}
            }
        }
    }
}

fn step(
    u: &mut Unstructured<'_>,
    machine: &mut Machine<AgentPod>,
    told: &mut Told,
    now: Instant,
) -> Result<()> {
    let first = |pods: &BTreeSet<PodUid>, last: bool| {
        if last { pods.last().cloned() } else { pods.first().cloned() }
    };
    let last = u.arbitrary()?;
    let event = match u.int_in_range(0..=15)? {
        0 => {
            (told.connected, told.unanswered) = (true, 0);
            Event::Connected
        }
        1 if u.ratio(1, 4)? => {
            (told.connected, told.unanswered) = (false, 0);
            Event::Disconnected
        }
        1..=3 => {
            let Some(uid) = first(&told.capturing, last) else { return Ok(()) };
            told.capturing.remove(&uid);
            Event::Captured(uid)
        }
        4 => {
            let Some(uid) = first(&told.capturing, last) else { return Ok(()) };
            told.capturing.remove(&uid);
            Event::CaptureFailed(uid, crate::wire::word(u)?)
        }
        5..=6 => {
            let Some(uid) = first(&told.releasing, last) else { return Ok(()) };
            told.releasing.remove(&uid);
            Event::Released(uid)
        }
        7 => Event::Tick,
        _ => {
            let bytes = bytes(u)?;
            let handles: Vec<&File> = match u.int_in_range(0..=15)? {
                0..=8 => vec![&HANDLES[0]],
                9..=12 => Vec::new(),
                13 => vec![&HANDLES[1]],
                14 => vec![&HANDLES[2]],
                _ => (0..u.int_in_range(2..=6)?).map(|_| &HANDLES[0]).collect(),
            };
            let Some(packet) = over_a_socket(&bytes, &handles) else { return Ok(()) };
            let request = message::request(packet);
            if let Err(Rejected::Message(text) | Rejected::Protocol(text)) = &request {
                assert!(!text.is_empty());
            }
            if told.connected {
                told.unanswered += 1;
                // One that comes before the last was answered gets the one answer to both.
                told.unanswered = told.unanswered.min(1);
                match &request {
                    Ok(Request::Add(pod)) if !machine.owes() => drop(told.enrolled.insert(pod.uid.clone())),
                    Ok(Request::Del(uid)) if !machine.owes() => drop(told.enrolled.remove(uid)),
                    Ok(Request::SnapshotSent) => told.enrolled.clear(),
                    _ => {}
                }
            }
            Event::Message(request)
        }
    };
    let actions = machine.step(event, now);
    told.heed(actions);
    assert_eq!(machine.owes(), told.unanswered > 0, "what is not answered is owed");
    let wanted: BTreeSet<PodUid> = machine.wanted().map(|pod| pod.uid.clone()).collect();
    assert!(wanted.is_superset(&told.enrolled), "a pod was withdrawn that nobody withdrew");
    assert!(wanted.len() <= PODS_MAX && machine.captured() + machine.pending() >= wanted.len());
    assert!(machine.failures() <= wanted.len(), "reasons are kept for pods that are gone");
    Ok(())
}

/// Up to 64 events.
pub fn run(data: &[u8]) {
    let (_, _) = (&*HANDLES, &*SOCKETS);
    let before = next_number();
    {
        let mut u = Unstructured::new(data);
        let mut machine = Machine::default();
        let mut told = Told::default();
        let mut now = Instant::now();
        for _ in 0..64 {
            let Ok(wait) = u.int_in_range(0..=4_u64) else { break };
            now += Duration::from_secs(wait);
            if u.is_empty() || step(&mut u, &mut machine, &mut told, now).is_err() {
                break;
            }
        }
    }
    assert_eq!(next_number(), before, "a descriptor was left open");
}
