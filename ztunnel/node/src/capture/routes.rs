//! Policy routing of an enrolled pod, its addresses and devices: what there should be, what there is.
//!
//! Everything here works in the namespace of the calling thread.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use ztunnel_ebpf_abi::{CAPTURE, MARK_MASK, REPLY, ROUTE_TABLE};

use super::netlink::Netlink;

/// The loopback device of every namespace.
const LOOPBACK: u32 = 1;

/// One address family of a pod and its primary address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Family {
    /// Which.
    pub family: AddressFamily,
    /// The source of captured connections, when the pod has an address.
    pub primary: Option<IpAddr>,
}

/// The families in use here: IPv4 always, IPv6 unless the kernel or the loopback device has none.
pub(super) fn families(addresses: &[IpAddr]) -> Vec<Family> {
    let v4 = Family { family: AddressFamily::Inet, primary: addresses.iter().find(|a| a.is_ipv4()).copied() };
    let v6 =
        Family { family: AddressFamily::Inet6, primary: addresses.iter().find(|a| a.is_ipv6()).copied() };
    let disabled = std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6");
    if disabled.is_ok_and(|value| value.trim() == "0") { vec![v4, v6] } else { vec![v4] }
}

/// One of our rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    priority: u32,
    mark: u32,
    action: RuleAction,
    name: &'static str,
}

const RULES: [Rule; 3] = [
    Rule {
        priority: 100,
        mark: CAPTURE,
        action: RuleAction::ToTable,
        name: "the rule for captured connections",
    },
    Rule {
        priority: 101,
        mark: CAPTURE,
        action: RuleAction::Unreachable,
        name: "the rule that refuses the rest",
    },
    Rule { priority: 102, mark: REPLY, action: RuleAction::ToTable, name: "the rule for replies" },
];

impl Rule {
    fn message(&self, family: AddressFamily) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = family;
        message.header.action = self.action;
        message.attributes = vec![
            RuleAttribute::Priority(self.priority),
            RuleAttribute::FwMark(self.mark),
            RuleAttribute::FwMask(MARK_MASK),
        ];
        if self.action == RuleAction::ToTable {
            message.header.table = ROUTE_TABLE as u8;
            message.attributes.push(RuleAttribute::Table(ROUTE_TABLE));
        }
        message
    }

    fn is(&self, message: &RuleMessage) -> bool {
        let has = |attribute: &RuleAttribute| message.attributes.contains(attribute);
        message.header.action == self.action
            && has(&RuleAttribute::Priority(self.priority))
            && has(&RuleAttribute::FwMark(self.mark))
            && has(&RuleAttribute::FwMask(MARK_MASK))
            && (self.action != RuleAction::ToTable || message.header.table == ROUTE_TABLE as u8)
    }
}

fn route(family: &Family) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family.family,
        table: ROUTE_TABLE as u8,
        protocol: RouteProtocol::Static,
        scope: if family.family == AddressFamily::Inet { RouteScope::Host } else { RouteScope::Universe },
        kind: RouteType::Local,
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Oif(LOOPBACK)];
    if let Some(primary) = family.primary {
        message.attributes.push(RouteAttribute::PrefSource(RouteAddress::from(primary)));
    }
    message
}

fn is_our_route(message: &RouteMessage) -> bool {
    message.header.kind == RouteType::Local
        && message.header.destination_prefix_length == 0
        && message.attributes.contains(&RouteAttribute::Table(ROUTE_TABLE))
        && message.attributes.contains(&RouteAttribute::Oif(LOOPBACK))
}

/// Adds what is missing and names it.
pub(super) fn ensure(netlink: &mut Netlink, families: &[Family]) -> io::Result<Vec<&'static str>> {
    let mut added = Vec::new();
    let rules = rules(netlink)?;
    for family in families {
        // The route first: without it a rule would refuse what could go on.
        if !has_route(netlink, family)? {
            let message = RouteNetlinkMessage::NewRoute(route(family));
            present(netlink.change(message, NLM_F_CREATE | NLM_F_EXCL))?;
            added.push("the route in table 100");
        }
        for rule in RULES {
            if !rules.iter().any(|found| found.header.family == family.family && rule.is(found)) {
                let message = RouteNetlinkMessage::NewRule(rule.message(family.family));
                present(netlink.change(message, NLM_F_CREATE | NLM_F_EXCL))?;
                added.push(rule.name);
            }
        }
    }
    Ok(added)
}

/// Removes all of it; what is not there is fine.
pub(super) fn remove(netlink: &mut Netlink) -> io::Result<()> {
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let family = Family { family, primary: None };
        for rule in RULES {
            absent(netlink.change(RouteNetlinkMessage::DelRule(rule.message(family.family)), 0))?;
        }
        absent(netlink.change(RouteNetlinkMessage::DelRoute(route(&family)), 0))?;
    }
    Ok(())
}

fn rules(netlink: &mut Netlink) -> io::Result<Vec<RuleMessage>> {
    let list = netlink.dump(RouteNetlinkMessage::GetRule(RuleMessage::default()))?;
    Ok(list
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewRule(rule) => Some(rule),
            _ => None,
        })
        .collect())
}

fn has_route(netlink: &mut Netlink, family: &Family) -> io::Result<bool> {
    let mut filter = RouteMessage::default();
    filter.header.address_family = family.family;
    filter.header.table = ROUTE_TABLE as u8;
    match netlink.dump(RouteNetlinkMessage::GetRoute(filter)) {
        Ok(list) => Ok(list
            .iter()
            .any(|message| matches!(message, RouteNetlinkMessage::NewRoute(route) if is_our_route(route)))),
        // The table does not exist yet.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn present(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

fn absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ESRCH | libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::ENODEV)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Whether what is sent to `ip` has a way out of here. What cannot be found out is taken to have one.
pub(super) fn leads_to(netlink: &mut Netlink, ip: IpAddr) -> bool {
    let mut message = RouteMessage::default();
    message.header.address_family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.destination_prefix_length = if ip.is_ipv4() { 32 } else { 128 };
    message.attributes = vec![RouteAttribute::Destination(RouteAddress::from(ip))];
    match netlink.get(RouteNetlinkMessage::GetRoute(message)) {
        Ok(RouteNetlinkMessage::NewRoute(route)) => {
            !matches!(route.header.kind, RouteType::Unreachable | RouteType::BlackHole | RouteType::Prohibit)
        }
        Ok(_) => true,
        Err(error) => !matches!(
            error.raw_os_error(),
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL)
        ),
    }
}

/// A device of the pod that leads out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Device {
    /// Its index.
    pub index: u32,
    /// Whether frames have an Ethernet header.
    pub ethernet: bool,
}

/// All devices but loopback, in the order of their numbers.
pub(super) fn devices(netlink: &mut Netlink) -> io::Result<Vec<Device>> {
    let mut found = Vec::new();
    netlink.each(RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
        if let RouteNetlinkMessage::NewLink(link) = message
            && !link.header.flags.contains(LinkFlags::Loopback)
        {
            let ethernet = link.header.link_layer_type == LinkLayerType::Ether;
            found.push(Device { index: link.header.index, ethernet });
        }
    })?;
    found.sort_unstable_by_key(|device| device.index);
    Ok(found)
}

/// The addresses of all devices, without loopback and IPv6 link-local ones.
pub(super) fn addresses(netlink: &mut Netlink) -> io::Result<Vec<IpAddr>> {
    let mut found = Vec::new();
    netlink.each(RouteNetlinkMessage::GetAddress(AddressMessage::default()), |message| {
        let RouteNetlinkMessage::NewAddress(address) = message else { return };
        // IPv4 has both; on a point-to-point device `Address` is the other end.
        let local = address.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(ip) => Some(*ip),
            _ => None,
        });
        let ip = local.or_else(|| {
            address.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            })
        });
        match ip {
            Some(IpAddr::V6(v6)) if v6.is_unicast_link_local() => {}
            Some(ip) if !ip.is_loopback() => found.push(ip),
            _ => {}
        }
    })?;
    Ok(found)
}

fn address_message(address: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.prefix_len = if address.is_ipv4() { 32 } else { 128 };
    message.header.scope = AddressScope::Host;
    message.header.flags = AddressHeaderFlags::Nodad;
    message.header.index = LOOPBACK;
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}

/// Gives the loopback device an address; false when it had it.
pub(super) fn add_loopback_address(netlink: &mut Netlink, address: IpAddr) -> io::Result<bool> {
    match netlink.change(RouteNetlinkMessage::NewAddress(address_message(address)), NLM_F_CREATE | NLM_F_EXCL)
    {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes it away again; what is not there is fine.
pub(super) fn remove_loopback_address(netlink: &mut Netlink, address: IpAddr) -> io::Result<()> {
    match netlink.change(RouteNetlinkMessage::DelAddress(address_message(address)), 0) {
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
        other => absent(other),
    }
}
