//! What capture needs of the host: its namespace, the probe addresses, where pods' processes are.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use ztunnel_ebpf_abi::NodeConfig;

use super::Config;
use super::listeners::current_netns_cookie;
use super::netlink::Netlink;
use super::routes;
use crate::net::netns::Netns;

/// Source addresses of the node's own connections to enrolled pods. They live on the host's loopback device.
pub const PROBE_ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 7, 127)),
    IpAddr::V6(Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff)),
];

/// Where kubelets put pods, by cgroup driver and nesting.
const KUBEPODS: [&str; 4] =
    ["kubepods.slice", "kubepods", "kubelet.slice/kubelet-kubepods.slice", "kubelet/kubepods"];

/// What the programs are told of the host.
pub(super) fn describe(config: &Config, host: &Netns) -> io::Result<NodeConfig> {
    let host_cookie = host.run(current_netns_cookie)??;
    let (kubepods, kubepods_level) = kubepods(config).unwrap_or((0, 0));
    Ok(NodeConfig { host_cookie, kubepods, kubepods_level, padding: 0 })
}

/// Id and depth of the cgroup of pods. Without one every process of the host's namespace counts as the node's.
fn kubepods(config: &Config) -> Option<(u64, u32)> {
    let dir: PathBuf = match &config.kubepods {
        Some(dir) => config.cgroup_root.join(dir),
        None => KUBEPODS.iter().map(|name| config.cgroup_root.join(name)).find(|dir| dir.is_dir())?,
    };
    let level = dir.strip_prefix(&config.cgroup_root).ok()?.components().count();
    Some((dir.metadata().ok()?.ino(), level as u32))
}

/// Adds the probe addresses and names those that were missing. A host without IPv6 has one.
pub(super) fn add_probe_addresses(host: &Netns) -> io::Result<Vec<IpAddr>> {
    host.run(|| {
        let mut netlink = Netlink::open()?;
        let mut added = Vec::new();
        for address in PROBE_ADDRESSES {
            match routes::add_loopback_address(&mut netlink, address) {
                Ok(true) => added.push(address),
                Ok(false) => {}
                // disable_ipv6 answers with EACCES.
                Err(_) if address.is_ipv6() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(added)
    })?
}

/// The probe addresses to which a pod has no route: it cannot answer what comes from there. Runs in its namespace.
pub(super) fn unanswered(pod: &[IpAddr]) -> io::Result<Vec<IpAddr>> {
    let mut netlink = Netlink::open()?;
    let has_family = |probe: &IpAddr| pod.iter().any(|ip| ip.is_ipv4() == probe.is_ipv4());
    let probes = PROBE_ADDRESSES.into_iter().filter(has_family);
    Ok(probes.filter(|probe| !routes::leads_to(&mut netlink, *probe)).collect())
}

/// The probe addresses to which a pod with these addresses has no route, of the namespace that `netns` opens.
pub fn unanswered_in(netns: &Path, pod: &[IpAddr]) -> io::Result<Vec<IpAddr>> {
    Netns::open(netns)?.run(|| unanswered(pod))?
}

/// Takes the probe addresses away.
pub(super) fn remove_probe_addresses(host: &Netns) -> io::Result<()> {
    host.run(|| {
        let mut netlink = Netlink::open()?;
        PROBE_ADDRESSES.iter().try_for_each(|address| routes::remove_loopback_address(&mut netlink, *address))
    })?
}

/// The mount point of cgroup v2, from `/proc/mounts`.
pub fn cgroup_root() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (point, kind) = (fields.nth(1)?, fields.next()?);
        (kind == "cgroup2").then(|| Path::new(point).to_owned())
    })
}
