//! The addresses of a pod.

use std::io;
use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;
use ztunnel_mesh::model::addr::canonical_ip;
use ztunnel_node::net::netns::Netns;

/// The addresses in a network namespace, those of `lo` aside, in canonical form.
pub(super) fn addresses(netns: &Netns) -> io::Result<Vec<IpAddr>> {
    let found = netns.run(|| getifaddrs().map(Iterator::collect::<Vec<_>>))??;
    let mut addresses: Vec<IpAddr> = found
        .iter()
        .filter_map(|interface| {
            let address = interface.address.as_ref()?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::from(address.ip())))
        })
        .map(canonical_ip)
        .filter(|ip| !ip.is_loopback())
        .collect();
    addresses.dedup();
    Ok(addresses)
}
