//! Messages of a control plane, made of arbitrary bytes: mostly well-formed, with few names and addresses, so that they
//! have to do with each other.

use arbitrary::Result;
use arbitrary::Unstructured;
use bytes::Bytes;
use ztunnel_proto::security;
use ztunnel_proto::workload as wire;

/// One of a few.
pub fn pick<'a>(u: &mut Unstructured<'_>, from: &[&'a str]) -> Result<&'a str> {
    u.choose(from).copied()
}

/// A short list.
pub fn few<'a, T>(
    u: &mut Unstructured<'a>,
    most: usize,
    mut one: impl FnMut(&mut Unstructured<'a>) -> Result<T>,
) -> Result<Vec<T>> {
    let count = u.int_in_range(0..=most)?;
    (0..count).map(|_| one(u)).collect()
}

/// A list that is often empty.
fn rarely<'a, T>(
    u: &mut Unstructured<'a>,
    one: impl FnMut(&mut Unstructured<'a>) -> Result<T>,
) -> Result<Vec<T>> {
    if u.ratio(2, 3)? { Ok(Vec::new()) } else { few(u, 3, one) }
}

fn some<'a, T>(
    u: &mut Unstructured<'a>,
    one: impl FnOnce(&mut Unstructured<'a>) -> Result<T>,
) -> Result<Option<T>> {
    if u.ratio(2, 3)? { Ok(None) } else { one(u).map(Some) }
}

/// One of the values of an enumeration, and rarely none of them.
fn enumerator(u: &mut Unstructured<'_>, last: i32) -> Result<i32> {
    if u.ratio(1, 16)? { u.arbitrary() } else { u.int_in_range(0..=last) }
}

/// A short word, and rarely anything.
pub fn word(u: &mut Unstructured<'_>) -> Result<String> {
    if u.ratio(1, 16)? {
        return Ok(u.arbitrary::<&str>()?.to_owned());
    }
    pick(u, &["", "a", "b", "shop", "cart", "td", "x.y", "A_b"]).map(str::to_owned)
}

/// The names of networks.
pub const NETWORKS: [&str; 3] = ["", "n", "m"];
/// The namespaces there are.
pub const NAMESPACES: [&str; 3] = ["a", "b", "shop"];
/// The host names there are.
pub const HOSTS: [&str; 4] = ["x", "y.shop", "z.example", ""];

/// An address, and rarely not.
pub fn address(u: &mut Unstructured<'_>) -> Result<Bytes> {
    let last = u.int_in_range(0..=3_u8)?;
    Ok(match u.int_in_range(0..=15)? {
        0..=8 => Bytes::from(vec![10, 0, 0, last]),
        9..=11 => {
            let mut six = vec![0; 16];
            (six[0], six[15]) = (0xfd, last);
            Bytes::from(six)
        }
        12..=14 => {
            let mut mapped = vec![0; 10];
            mapped.extend([0xff, 0xff, 10, 0, 0, last]);
            Bytes::from(mapped)
        }
        _ => Bytes::from(u.arbitrary::<&[u8]>()?.to_vec()),
    })
}

fn port(u: &mut Unstructured<'_>) -> Result<u32> {
    if u.ratio(1, 16)? { u.arbitrary() } else { Ok(*u.choose(&[0, 1, 80, 8080, 15008, 65535])?) }
}

fn ports(u: &mut Unstructured<'_>) -> Result<Vec<wire::Port>> {
    rarely(u, |u| Ok(wire::Port { service_port: port(u)?, target_port: port(u)?, app_protocol: 0 }))
}

fn network_address(u: &mut Unstructured<'_>) -> Result<wire::NetworkAddress> {
    let network = pick(u, &NETWORKS)?.to_owned();
    let length = some(u, |u| if u.ratio(1, 8)? { u.arbitrary() } else { u.int_in_range(0..=32) })?;
    Ok(wire::NetworkAddress { network, address: address(u)?, length })
}

fn gateway(u: &mut Unstructured<'_>) -> Result<wire::GatewayAddress> {
    use wire::gateway_address::Destination;
    let destination = match u.int_in_range(0..=8)? {
        0..=3 => Some(Destination::Hostname(wire::NamespacedHostname {
            namespace: pick(u, &NAMESPACES)?.to_owned(),
            hostname: pick(u, &HOSTS)?.to_owned(),
        })),
        4..=7 => Some(Destination::Address(network_address(u)?)),
        _ => None,
    };
    Ok(wire::GatewayAddress { destination, hbone_mtls_port: port(u)? })
}

/// The names of workloads.
pub const UIDS: [&str; 6] = ["c//Pod/a/1", "c//Pod/a/2", "c//Pod/shop/3", "vm/4", "a/x", ""];
/// The names of services.
pub const SERVICES: [&str; 4] = ["a/x", "b/x", "shop/y.shop", "a/z.example"];
/// The names of policies.
pub const POLICIES: [&str; 4] = ["a/one", "a/two", "shop/one", "one"];

/// A workload.
pub fn workload(u: &mut Unstructured<'_>) -> Result<wire::Workload> {
    let services = rarely(u, |u| {
        let name = pick(u, &["a/x", "b/x", "shop/y.shop", "a/z.example", "odd"])?.to_owned();
        Ok((name, wire::PortList { ports: ports(u)? }))
    })?;
    Ok(wire::Workload {
        uid: if u.ratio(1, 16)? { word(u)? } else { pick(u, &UIDS)?.to_owned() },
        name: word(u)?,
        namespace: pick(u, &NAMESPACES)?.to_owned(),
        addresses: few(u, 3, address)?,
        network: pick(u, &NETWORKS)?.to_owned(),
        tunnel_protocol: enumerator(u, 2)?,
        trust_domain: if u.ratio(1, 8)? { word(u)? } else { String::new() },
        service_account: if u.ratio(1, 8)? { word(u)? } else { String::new() },
        waypoint: some(u, gateway)?,
        node: word(u)?,
        workload_type: enumerator(u, 3)?,
        native_tunnel: u.arbitrary()?,
        authorization_policies: rarely(u, |u| Ok(pick(u, &POLICIES)?.to_owned()))?,
        status: enumerator(u, 1)?,
        network_gateway: some(u, gateway)?,
        hostname: pick(u, &HOSTS)?.to_owned(),
        services: services.into_iter().collect(),
        application_tunnel: some(u, |u| {
            Ok(wire::ApplicationTunnel { protocol: enumerator(u, 1)?, port: port(u)? })
        })?,
        network_mode: enumerator(u, 1)?,
        capacity: some(u, |u| u.arbitrary())?,
        ..wire::Workload::default()
    })
}

/// A service.
pub fn service(u: &mut Unstructured<'_>) -> Result<wire::Service> {
    Ok(wire::Service {
        name: word(u)?,
        namespace: pick(u, &NAMESPACES)?.to_owned(),
        hostname: pick(u, &HOSTS)?.to_owned(),
        addresses: few(u, 3, network_address)?,
        ports: ports(u)?,
        subject_alt_names: rarely(u, |u| {
            Ok(pick(u, &["spiffe://td/ns/a/sa/b", "spiffe://", "//////", "dns"])?.to_owned())
        })?,
        waypoint: some(u, gateway)?,
        load_balancing: some(u, |u| {
            Ok(wire::LoadBalancing {
                routing_preference: rarely(u, |u| enumerator(u, 6))?,
                mode: enumerator(u, 3)?,
                health_policy: enumerator(u, 1)?,
            })
        })?,
        ip_families: enumerator(u, 3)?,
        canonical: u.arbitrary()?,
        weighted_waypoints: rarely(u, |u| {
            Ok(wire::WeightedWaypoint { destination: some(u, gateway)?, weight: u.arbitrary()? })
        })?,
        visibility: enumerator(u, 1)?,
        ..wire::Service::default()
    })
}

fn text_match(u: &mut Unstructured<'_>) -> Result<security::StringMatch> {
    use security::string_match::MatchType;
    let text = |u: &mut Unstructured<'_>| {
        pick(u, &["", "a", "shop", "sh", "op", "td/ns/a/sa/cart", "td/", "cart"]).map(str::to_owned)
    };
    Ok(security::StringMatch {
        match_type: match u.int_in_range(0..=8)? {
            0..=2 => Some(MatchType::Exact(text(u)?)),
            3..=4 => Some(MatchType::Prefix(text(u)?)),
            5..=6 => Some(MatchType::Suffix(text(u)?)),
            7 => Some(MatchType::Presence(())),
            _ => None,
        },
    })
}

fn range(u: &mut Unstructured<'_>) -> Result<security::Address> {
    let length = match u.int_in_range(0..=8)? {
        0..=4 => *u.choose(&[0, 8, 24, 31, 32, 96, 104, 127, 128])?,
        5..=7 => u.int_in_range(0..=129)?,
        _ => u.arbitrary()?,
    };
    Ok(security::Address { address: address(u)?, length })
}

fn account(u: &mut Unstructured<'_>) -> Result<security::ServiceAccountMatch> {
    Ok(security::ServiceAccountMatch {
        namespace: pick(u, &["a", "shop", ""])?.to_owned(),
        service_account: pick(u, &["cart", "x", ""])?.to_owned(),
    })
}

fn one_match(u: &mut Unstructured<'_>) -> Result<security::Match> {
    Ok(security::Match {
        namespaces: rarely(u, text_match)?,
        not_namespaces: rarely(u, text_match)?,
        principals: rarely(u, text_match)?,
        not_principals: rarely(u, text_match)?,
        source_ips: rarely(u, range)?,
        not_source_ips: rarely(u, range)?,
        destination_ips: rarely(u, range)?,
        not_destination_ips: rarely(u, range)?,
        destination_ports: rarely(u, port)?,
        not_destination_ports: rarely(u, port)?,
        service_accounts: rarely(u, account)?,
        not_service_accounts: rarely(u, account)?,
        extensions: if u.ratio(1, 16)? { vec![wire::Extension::default()] } else { Vec::new() },
    })
}

/// An authorization policy.
pub fn authorization(u: &mut Unstructured<'_>) -> Result<security::Authorization> {
    Ok(security::Authorization {
        name: pick(u, &["one", "two", "one", "two", "one", ""])?.to_owned(),
        namespace: pick(u, &NAMESPACES)?.to_owned(),
        scope: enumerator(u, 2)?,
        action: enumerator(u, 1)?,
        rules: few(u, 3, |u| {
            Ok(security::Rule {
                clauses: few(u, 3, |u| Ok(security::Clause { matches: few(u, 3, one_match)? }))?,
            })
        })?,
        dry_run: u.ratio(1, 8)?,
        extensions: Vec::new(),
    })
}
