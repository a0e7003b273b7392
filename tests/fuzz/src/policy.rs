//! Authorization policies: what a message says of a connection, worked out with the three values true, false and not
//! known, and what the daemon decides from what it made of the message.
//!
//! What is understood is judged exactly so. What is not understood never widens: nobody is let in by a policy that may
//! not match, and nobody escapes one that may.

use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::Arc;

use arbitrary::Unstructured;
use bytes::Bytes;
use ztunnel_mesh::store::MeshChange;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::policy::Policy;
use ztunnel_mesh::policy::authorize::Denial;
use ztunnel_mesh::policy::authorize::Inbound;
use ztunnel_mesh::policy::authorize::authorize;
use ztunnel_node::xds::convert::Converter;
use ztunnel_proto::prost::Message;
use ztunnel_proto::security as wire;
use ztunnel_proto::security::string_match::MatchType;

use crate::memory::bounded;

/// True, false, or not known.
type Known = Option<bool>;

fn all(of: impl IntoIterator<Item = Known>) -> Known {
    of.into_iter().fold(Some(true), |sum, one| match (sum, one) {
        (Some(false), _) | (_, Some(false)) => Some(false),
        (None, _) | (_, None) => None,
        (Some(true), Some(true)) => Some(true),
    })
}

fn any(of: impl IntoIterator<Item = Known>) -> Known {
    all(of.into_iter().map(|one| one.map(|known| !known))).map(|none| !none)
}

fn texts(wanted: &wire::StringMatch, value: &str) -> Known {
    Some(match wanted.match_type.as_ref()? {
        MatchType::Exact(text) => value == text,
        MatchType::Prefix(text) => value.starts_with(text.as_str()),
        MatchType::Suffix(text) => value.ends_with(text.as_str()),
        MatchType::Presence(()) => !value.is_empty(),
    })
}

/// Bit by bit.
fn in_range(range: &wire::Address, ip: IpAddr) -> Known {
    let bits =
        |bytes: &[u8]| bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
    let six: Vec<u8> = match range.address.len() {
        4 => bits(&[&[0; 10][..], &[0xff; 2], &range.address].concat()),
        16 => bits(&range.address),
        _ => return None,
    };
    let mapped =
        range.address.len() == 4 || range.address[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
    let length = match (range.address.len(), range.length) {
        (4, length @ 0..=32) => length + 96,
        // A range that is wider than all IPv4 addresses and has one of them in it is of neither family.
        (16, 0..96) if mapped => return None,
        (16, length @ 0..=128) => length,
        _ => return None,
    };
    let theirs: Vec<u8> = match ip {
        IpAddr::V4(four) => bits(&four.to_ipv6_mapped().octets()),
        IpAddr::V6(six) => bits(&six.octets()),
    };
    // The families are apart: no range of IPv6 has addresses of IPv4 in it.
    Some(mapped == ip.is_ipv4() && six[..length as usize] == theirs[..length as usize])
}

fn fields<T>(wanted: &[T], unwanted: &[T], hit: impl Fn(&T) -> Known) -> Known {
    let positive = if wanted.is_empty() { Some(true) } else { any(wanted.iter().map(&hit)) };
    all([positive, any(unwanted.iter().map(&hit)).map(|hit| !hit)])
}

fn matches(one: &wire::Match, about: &Inbound<'_>) -> Known {
    if *one == wire::Match::default() {
        return Some(false);
    }
    let id = about.identity;
    let namespace = |it: &wire::StringMatch| texts(it, id.map_or("", SpiffeId::namespace));
    let principal = |it: &wire::StringMatch| match (id, &it.match_type) {
        (Some(id), _) => texts(it, id.principal()),
        (None, known) => known.as_ref().map(|_| false),
    };
    let account = |it: &wire::ServiceAccountMatch| {
        Some(
            id.is_some_and(|id| id.namespace() == it.namespace && id.service_account() == it.service_account),
        )
    };
    let (source, destination) = (about.source.to_canonical(), about.destination.ip().to_canonical());
    // What is no port may be meant in a way that is not known.
    let port = |it: &u32| u16::try_from(*it).ok().map(|port| port == about.destination.port());
    all([
        one.extensions.is_empty().then_some(true),
        fields(&one.namespaces, &one.not_namespaces, namespace),
        fields(&one.principals, &one.not_principals, principal),
        fields(&one.service_accounts, &one.not_service_accounts, account),
        fields(&one.source_ips, &one.not_source_ips, |it| in_range(it, source)),
        fields(&one.destination_ips, &one.not_destination_ips, |it| in_range(it, destination)),
        fields(&one.destination_ports, &one.not_destination_ports, port),
    ])
}

fn says(policy: &wire::Authorization, about: &Inbound<'_>) -> Known {
    any(policy.rules.iter().map(|rule| {
        all(rule.clauses.iter().map(|clause| match clause.matches.is_empty() {
            true => Some(true),
            false => any(clause.matches.iter().map(|one| matches(one, about))),
        }))
    }))
}

fn check(wire: &wire::Authorization, policy: &Arc<Policy>, understood: bool, about: &Inbound<'_>) {
    let decided = authorize(std::iter::once(policy), None, about).last();
    let said = says(wire, about);
    let what =
        || format!("{wire:?}\nof {about:?}\nsays {said:?}, became {policy:?}\nand decided {decided:?}");
    if wire.dry_run {
        assert!(decided.as_ref().is_ok_and(|permit| permit.policy().is_none()), "{}", what());
        return;
    }
    match (wire::Action::try_from(wire.action), &decided) {
        (Ok(wire::Action::Allow), Ok(permit)) => {
            assert!(permit.policy() == Some(&policy.key) && said == Some(true), "{}", what());
        }
        (Ok(wire::Action::Allow), Err(Denial::NoneAllowed)) => {
            assert!(!understood || said == Some(false), "{}", what());
        }
        // Any other action denies.
        (Ok(wire::Action::Deny) | Err(_), Ok(_)) => assert!(said == Some(false), "{}", what()),
        (Ok(wire::Action::Deny) | Err(_), Err(Denial::Denied(by))) => {
            assert!(*by == policy.key && (!understood || said == Some(true)), "{}", what());
        }
        _ => panic!("{}", what()),
    }
}

/// Either a message as such, or one that is made of the bytes.
pub fn run(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else { return };
    let wire = match how % 8 {
        0 => wire::Authorization::decode(rest).ok(),
        _ => crate::wire::authorization(&mut Unstructured::new(rest)).ok(),
    };
    let Some(wire) = wire else { return };
    let bytes = wire.encode_to_vec();
    let mut converter = Converter::default();
    let taken = bounded(bytes.len(), 128, || converter.authorization(Bytes::from(bytes)));
    let named = !wire.name.is_empty() && !wire.namespace.is_empty();
    assert_eq!(taken.is_ok(), named, "every policy with a name is taken");
    let Ok(MeshChange::Policy(policy)) = taken else { return };
    let understood = converter.unknown_values() == 0;
    let ids: Vec<SpiffeId> = ["spiffe://td/ns/a/sa/cart", "spiffe://td/ns/shop/sa/x"]
        .iter()
        .map(|id| id.parse().expect("an identity"))
        .collect();
    let identities = [None, Some(&ids[0]), Some(&ids[1])];
    let ips = ["10.0.0.1", "10.0.0.2", "fd00::1", "::ffff:10.0.0.1", "::1"]
        .map(|ip| ip.parse().expect("an address"));
    for identity in identities {
        for source in ips {
            for (ip, port) in [(ips[0], 80), (ips[2], 8080), (ips[3], 1)] {
                let destination = SocketAddr::new(ip, port);
                check(&wire, &policy, understood, &Inbound { identity, source, destination });
            }
        }
    }
}
