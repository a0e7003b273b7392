//! Two nodes, the link between them, and pods on each.
//!
//! ```text
//!   node-a (netns)                                   node-b (netns)
//!   br0 10.80.1.1/24 fd80:1::1/64                    br0 10.80.2.1/24 fd80:2::1/64
//!    ├ eth0 of pod (netns) 10.80.1.10 …               ├ eth0 of pod (netns) 10.80.2.10 …
//!    └ link0 10.80.0.1 fd80::1  ────────────────────  link0 10.80.0.2 fd80::2
//! ```
//! Everything is routed, nothing is translated. A pod's processes live in
//! `<cgroup root>/<run>/<node>/kubepods/<pod>`, the node's own in `…/<node>/system`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result, bail};

use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::place::Place;
use crate::process::sh;
use crate::run::{Run, end_here_if_interrupted};

/// The device of the link between the nodes, on both.
pub const LINK: &str = "link0";

/// The last byte of the address of a node's first pod.
const FIRST_POD: u16 = 10;

/// A node.
#[derive(Debug)]
pub struct Node {
    /// Its name in the mesh.
    pub name: String,
    /// Its number: the third byte of its pods' addresses.
    pub number: u8,
    /// Where its own processes run: the kubelet, the daemon.
    pub place: Place,
    /// The group that holds its pods' groups.
    pub kubepods: Cgroup,
    pods: AtomicU16,
}

/// A pod.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// The name of the node it is on.
    pub node: String,
    /// Where its processes run.
    pub place: Place,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Pod {
    /// Both addresses, IPv4 first.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// An address as it stands in a URL.
pub fn in_url(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

impl Node {
    /// Makes a node without links.
    pub fn create(run: &Run, name: &str, number: u8) -> Result<Self> {
        end_here_if_interrupted();
        let prefix = run.prefix();
        let group = Cgroup::create(format!("{prefix}/{name}"))?;
        let netns = Netns::create(&format!("{prefix}-{name}"))?;
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv6/conf/default/accept_dad", "0"),
        ] {
            netns.set_sysctl(key, value)?;
        }
        let bridge = ["link", "add", "br0", "address", &mac(number, GATEWAY), "type", "bridge"];
        netns.ip(&[&bridge[..], &["forward_delay", "0", "mcast_snooping", "0"]].concat())?;
        netns.ip(&["addr", "add", &format!("10.80.{number}.1/24"), "dev", "br0"])?;
        netns.ip(&["addr", "add", &format!("fd80:{number}::1/64"), "dev", "br0", "nodad"])?;
        keep_neighbours(&netns, "br0")?;
        netns.ip(&["link", "set", "br0", "up"])?;
        let place =
            Place { netns, cgroup: group.child("system")?, logs: run.path("logs"), outlive: run.is_kept() };
        let kubepods = group.child("kubepods")?;
        Ok(Self { name: name.to_owned(), number, place, kubepods, pods: AtomicU16::new(FIRST_POD) })
    }

    /// Joins two nodes and tells each the way to the other's pods.
    pub fn join(&self, other: &Self) -> Result<()> {
        let (a, b) = (self.place.netns.name(), other.place.netns.name());
        let args = ["link", "add", LINK, "netns", a, "type", "veth", "peer", "name", LINK, "netns", b];
        sh("ip", &args)?;
        for (here, there) in [(self, other), (other, self)] {
            let (own, far) = (here.number, there.number);
            let netns = &here.place.netns;
            netns.ip(&["addr", "add", &format!("10.80.0.{own}/24"), "dev", LINK])?;
            netns.ip(&["addr", "add", &format!("fd80::{own}/64"), "dev", LINK, "nodad"])?;
            keep_neighbours(netns, LINK)?;
            netns.ip(&["link", "set", LINK, "up"])?;
            netns.ip(&["route", "add", &format!("10.80.{far}.0/24"), "via", &format!("10.80.0.{far}")])?;
            netns.ip(&["route", "add", &format!("fd80:{far}::/64"), "via", &format!("fd80::{far}")])?;
        }
        Ok(())
    }

    /// Makes a pod on this node.
    pub fn add_pod(&self, run: &Run, name: &str) -> Result<Pod> {
        end_here_if_interrupted();
        // From the first one up, and then those below it; 1 is the node and 255 means all.
        let host = match self.pods.fetch_add(1, Ordering::Relaxed) {
            host if host < 255 => host,
            host if host - 253 < FIRST_POD => host - 253,
            _ => bail!("{} has no address left for {name}", self.name),
        };
        let number = self.number;
        let (v4, v6) = (format!("10.80.{number}.{host}"), format!("fd80:{number}::{host}"));
        let netns = Netns::create(&format!("{}-{name}", run.prefix()))?;
        let outer = format!("pod{host}");
        let node = self.place.netns.name();
        sh(
            "ip",
            &[
                "link",
                "add",
                &outer,
                "netns",
                node,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "address",
                &mac(number, host),
                "netns",
                netns.name(),
            ],
        )?;
        self.place.netns.ip(&["link", "set", &outer, "master", "br0", "up"])?;
        netns.ip(&["addr", "add", &format!("{v4}/24"), "dev", "eth0"])?;
        netns.ip(&["addr", "add", &format!("{v6}/64"), "dev", "eth0", "nodad"])?;
        keep_neighbours(&netns, "eth0")?;
        netns.ip(&["link", "set", "eth0", "up"])?;
        let gateway = format!("fd80:{number}::1");
        netns.ip(&["route", "add", "default", "via", &format!("10.80.{number}.1")])?;
        netns.ip(&["-6", "route", "add", "default", "via", &gateway])?;
        know(&netns, "eth0", &gateway, &mac(number, GATEWAY))?;
        know(&self.place.netns, "br0", &v6, &mac(number, host))?;
        let cgroup = self.kubepods.child(&format!("pod-{name}"))?;
        let place = Place { netns, cgroup, ..self.place.clone() };
        Ok(Pod {
            name: name.to_owned(),
            node: self.name.clone(),
            place,
            v4: v4.parse().with_context(|| v4.clone())?,
            v6: v6.parse().with_context(|| v6.clone())?,
        })
    }

    /// Where a process of a hostNetwork pod runs: the node's network, a pod's group.
    pub fn host_network_pod(&self) -> Result<Place> {
        Ok(self.place.with_cgroup(self.kubepods.child("pod-hostnetwork")?))
    }
}

/// The node itself, among the hosts of its pods' network.
const GATEWAY: u16 = 1;

/// The link-layer address of a host of a node's pods' network.
fn mac(node: u8, host: u16) -> String {
    format!("02:80:00:{node:02x}:{:02x}:{:02x}", host >> 8, host & 0xff)
}

/// Where this address is need not be asked for. The table of IPv6 neighbours is one for all network namespaces of a
/// machine: what many worlds at once make the kernel drop from it is not always found again.
fn know(netns: &Netns, device: &str, address: &str, mac: &str) -> Result<()> {
    netns.ip(&["neigh", "replace", address, "lladdr", mac, "dev", device, "nud", "permanent"])?;
    Ok(())
}

/// Whoever was found stays where it was for as long as a test takes: nothing moves here.
fn keep_neighbours(netns: &Netns, device: &str) -> Result<()> {
    for family in ["ipv4", "ipv6"] {
        netns.set_sysctl(&format!("{family}/neigh/{device}/base_reachable_time_ms"), "3600000")?;
    }
    Ok(())
}
