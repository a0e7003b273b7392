//! Hearing of changes in pods' network namespaces.
//!
//! One socket for all pods. It is in a network namespace of its own, which is empty and in which every pod's
//! namespace has a number; a socket may ask to be told what is announced in all namespaces with a number in its
//! own. So nothing is to be seen in the host's namespace, what goes on there is not heard, and a pod costs no
//! descriptor.
//!
//! Needs CAP_NET_BROADCAST beside the rest; without it the reconciler looks for itself.

use std::collections::HashSet;
use std::io;
use std::io::IoSliceMut;
use std::os::fd::AsFd as _;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::nsid::NsidAttribute;
use netlink_packet_route::nsid::NsidMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, NetlinkAddr, recvmsg, setsockopt, sockopt};

use super::netlink::Netlink;
use crate::net::netns::Netns;

/// What is announced of what the reconciler looks at (`enum rtnetlink_groups`): devices, addresses, routes and rules
/// of both families.
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];
/// The control message with the number of the namespace (linux/netlink.h).
const LISTEN_ALL_NSID: libc::c_int = 8;
/// Let the kernel choose a number.
const ANY: i32 = -1;

/// See the module.
pub(super) struct Changes {
    /// Says what is announced.
    announcements: Socket,
    /// Gives numbers.
    numbers: Netlink,
}

/// What has been announced since the last time.
#[derive(Debug, PartialEq, Eq, Default)]
pub(super) struct Heard {
    /// Something in these namespaces.
    pub namespaces: HashSet<i32>,
    /// More than the socket could hold: it may be anything.
    pub more: bool,
}

/// What waits to be heard, in bytes as the kernel counts them: some thousand announcements. Who makes more of them at
/// once has the others' looked for with the next turn of all.
const WAITING: usize = 1 << 20;

impl Changes {
    /// Makes the namespace and listens in it.
    pub(super) fn open() -> io::Result<Self> {
        // A thread that has left its namespace does nothing else any more.
        let opened = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let mut announcements = Socket::new(NETLINK_ROUTE)?;
            announcements.bind(&SocketAddr::new(0, 0))?;
            // A limit of the system's may not allow it: then fewer wait.
            let _limited = setsockopt(&announcements, sockopt::RcvBufForce, &WAITING);
            announcements.set_listen_all_namespaces(true)?;
            GROUPS.iter().try_for_each(|group| announcements.add_membership(*group))?;
            Ok(Self { announcements, numbers: Netlink::open()? })
        });
        opened.join().unwrap_or_else(|_panic| Err(io::Error::other("the thread has panicked")))
    }

    /// Hears of `netns` from now on; returns its number, which it keeps as long as it lives.
    pub(super) fn listen(&mut self, netns: &Netns) -> io::Result<i32> {
        let message = |more: Option<NsidAttribute>| {
            let mut message = NsidMessage::default();
            message.attributes = vec![NsidAttribute::Fd(netns.as_fd().as_raw_fd() as u32)];
            message.attributes.extend(more);
            message
        };
        match self.numbers.change(RouteNetlinkMessage::NewNsId(message(Some(NsidAttribute::Id(ANY)))), 0) {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
            _ => {}
        }
        let RouteNetlinkMessage::NewNsId(answer) =
            self.numbers.get(RouteNetlinkMessage::GetNsId(message(None)))?
        else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let id = answer.attributes.iter().find_map(|attribute| match attribute {
            NsidAttribute::Id(id) if *id >= 0 => Some(*id),
            _ => None,
        });
        id.ok_or_else(|| io::Error::other("a network namespace was given no number"))
    }

    /// Becomes readable when something is announced.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.announcements.as_fd().try_clone_to_owned()
    }

    /// What has been announced since the last call. Does not wait, nor go on for ever.
    pub(super) fn heard(&self) -> Heard {
        let mut heard = Heard::default();
        // What it says is looked up afterwards: that anything was said is enough, so it may be cut off.
        let mut start = [0; 64];
        let mut control = nix::cmsg_space!(libc::c_int);
        for _ in 0..WAITING / 256 {
            let mut into = [IoSliceMut::new(&mut start)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
            match recvmsg::<NetlinkAddr>(self.announcements.as_raw_fd(), &mut into, Some(&mut control), flags)
            {
                Ok(message) => {
                    heard.namespaces.extend(message.cmsgs().into_iter().flatten().filter_map(namespace));
                }
                Err(Errno::EAGAIN) => return heard,
                Err(Errno::EINTR) => {}
                // It is said once, before what did fit.
                Err(Errno::ENOBUFS) => heard.more = true,
                Err(_) => {
                    heard.more = true;
                    return heard;
                }
            }
        }
        // It is said faster than it can be heard.
        heard.more = true;
        heard
    }
}

fn namespace(message: ControlMessageOwned) -> Option<i32> {
    let ControlMessageOwned::Unknown(message) = message else { return None };
    let header = message.cmsg_header;
    let data = message.data_bytes.first_chunk()?;
    (header.cmsg_level == libc::SOL_NETLINK && header.cmsg_type == LISTEN_ALL_NSID)
        .then(|| i32::from_ne_bytes(*data))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only<const N: usize>(namespaces: [i32; N]) -> Heard {
        Heard { namespaces: HashSet::from(namespaces), more: false }
    }

    fn fresh() -> Netns {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
            Netns::current().expect("open")
        });
        made.join().expect("no panic")
    }

    fn run(netns: &Netns, arguments: &[&str]) {
        let status = netns.run(|| std::process::Command::new("ip").args(arguments).status());
        assert!(status.expect("enter").expect("ip").success(), "{arguments:?}");
    }

    #[test]
    fn each_namespace_is_heard_by_its_number_and_no_other() {
        let mut changes = Changes::open().expect("needs root");
        let [one, two, unknown] = [fresh(), fresh(), fresh()];
        let (a, b) = (changes.listen(&one).expect("listen"), changes.listen(&two).expect("listen"));
        assert_ne!(a, b);
        assert_eq!(changes.listen(&one).expect("again"), a, "a namespace keeps its number");
        assert_eq!(changes.heard(), only([]));

        run(&two, &["rule", "add", "priority", "7", "table", "7"]);
        run(&unknown, &["rule", "add", "priority", "7", "table", "7"]);
        assert_eq!(changes.heard(), only([b]));
        assert_eq!(changes.heard(), only([]), "each is told once");

        for (what, arguments) in [
            ("a device", ["link", "set", "lo", "up"].as_slice()),
            ("an address", &["addr", "add", "10.1.2.3/32", "dev", "lo"]),
            ("a route", &["route", "add", "local", "default", "dev", "lo", "table", "7"]),
            ("a route that goes", &["route", "flush", "table", "7"]),
            ("a rule of IPv6", &["-6", "rule", "add", "priority", "7", "table", "7"]),
            ("a route of IPv6", &["-6", "route", "add", "local", "default", "dev", "lo", "table", "7"]),
            ("an address of IPv6", &["-6", "addr", "add", "fd00::7/128", "dev", "lo"]),
        ] {
            run(&one, arguments);
            assert_eq!(changes.heard(), only([a]), "{what}");
        }
    }

    #[test]
    fn too_much_is_told_from_nothing() {
        let mut changes = Changes::open().expect("needs root");
        let one = fresh();
        changes.listen(&one).expect("listen");
        one.run(|| {
            let mut script = String::new();
            for number in 1000..9000 {
                script += &format!("rule add priority {number} table 7\n");
            }
            let mut ip = std::process::Command::new("ip")
                .args(["-batch", "-"])
                .stdin(std::process::Stdio::piped())
                .spawn()?;
            io::Write::write_all(ip.stdin.as_mut().expect("piped"), script.as_bytes())?;
            ip.wait()
        })
        .expect("enter")
        .expect("ip");
        assert!(changes.heard().more);
    }
}
