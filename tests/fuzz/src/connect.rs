//! What a CONNECT request and its response say: authority, `forwarded`, `baggage`, `traceparent`.
//!
//! What is read is written back so that it is read as the same, nothing that is written can be taken for more than one
//! header's one value, and what is said of the client cannot grow.

use std::net::SocketAddr;

use arbitrary::Unstructured;
use http::HeaderValue;
use ztunnel_node::hbone::address::Authority;
use ztunnel_node::hbone::address::Baggage;
use ztunnel_node::hbone::address::Forwarded;
use ztunnel_node::hbone::address::TraceParent;
use ztunnel_mesh::model::workload::WorkloadKind;

use crate::memory::bounded;

struct Say<'a> {
    client: (u8, [u8; 16], u16),
    host: &'a str,
    names: [Option<&'a str>; 6],
    kind: u8,
    trace: (u128, u64),
}

impl<'a> Say<'a> {
    fn new(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let (client, host, names) = u.arbitrary()?;
        let (kind, trace) = u.arbitrary()?;
        Ok(Self { client, host, names, kind, trace })
    }
}

fn authority(text: &str) {
    // As HTTP/2 hands it on.
    let Ok(uri) = http::uri::Authority::try_from(text) else {
        let _understood = Authority::parse(text);
        return;
    };
    match Authority::parse(uri.as_str()) {
        Ok(authority) => {
            let written = authority.to_string();
            assert_eq!(Authority::parse(&written).as_ref(), Ok(&authority), "{text:?} became {written:?}");
            http::uri::Authority::try_from(written.as_str()).expect("it can be asked for");
            match &authority {
                Authority::Address(address) => assert_ne!(address.port(), 0),
                Authority::Hostname { host, port } => {
                    assert!(*port != 0 && !host.is_empty() && host.len() <= 253);
                    assert!(written.parse::<SocketAddr>().is_err(), "an address is no name");
                }
            }
        }
        // Not longer than what was asked for, and no novel.
        Err(error) => assert!(error.0.chars().count() <= 256),
    }
}

fn header(text: &str) {
    if let Some(forwarded) = Forwarded::parse(text) {
        let written = forwarded.to_string();
        let again = Forwarded::parse(&written);
        assert_eq!(again, Some(forwarded.clone()), "{text:?} became {written:?}");
        one_value(&written);
        // Those who look at all elements find no other.
        assert_eq!(written.split([',', ';']).count(), 1 + usize::from(forwarded.host.is_some()));
    }
    let baggage = Baggage::parse(text);
    let written = baggage.to_string();
    one_value(&written);
    let again = Baggage::parse(&written);
    assert_eq!(again.to_string(), written, "{text:?}");
    let sayable =
        |value: &str| value.bytes().all(|byte| byte.is_ascii_graphic() && !b",;=\"\\".contains(&byte));
    let said = |value: Option<&str>| value.is_none_or(sayable);
    let Baggage { cluster, namespace, workload, canonical_name, canonical_revision, region, zone } = baggage;
    let texts =
        [cluster, namespace, canonical_name, canonical_revision, region, zone, workload.map(|(_, it)| it)];
    if texts.into_iter().all(said) {
        assert_eq!(again, baggage, "what can be said is said");
    }
    if let Some(parent) = TraceParent::parse(text) {
        assert_eq!(TraceParent::parse(&parent.to_string()), Some(parent));
    }
}

fn one_value(written: &str) {
    let value = HeaderValue::from_str(written).expect("it is a header's value");
    assert!(value.to_str().is_ok() && !written.contains(['\r', '\n', '\0']));
}

fn said(say: &Say<'_>) {
    let (family, octets, port) = say.client;
    let four: [u8; 4] = octets[..4].try_into().expect("there are sixteen");
    let client = match family % 2 {
        0 => SocketAddr::from((four, port)),
        _ => SocketAddr::from((octets, port)),
    };
    let forwarded = Forwarded { client, host: (!say.host.is_empty()).then_some(say.host) };
    let written = forwarded.to_string();
    one_value(&written);
    let read = Forwarded::parse(&written).expect("it says who the client is");
    assert_eq!(read.client, client);
    assert!(read.host.is_none() || read.host == forwarded.host);
    let kinds = [WorkloadKind::Deployment, WorkloadKind::CronJob, WorkloadKind::Pod, WorkloadKind::Job];
    let [cluster, namespace, name, canonical_name, canonical_revision, region] = say.names;
    let workload = name.map(|name| (kinds[usize::from(say.kind % 4)], name));
    let baggage =
        Baggage { cluster, namespace, workload, canonical_name, canonical_revision, region, zone: None };
    let written = baggage.to_string();
    one_value(&written);
    let read = Baggage::parse(&written);
    let kept = |read: Option<&str>, said: Option<&str>| assert!(read.is_none() || read == said);
    kept(read.cluster, cluster);
    kept(read.namespace, namespace);
    kept(read.canonical_name, canonical_name);
    kept(read.canonical_revision, canonical_revision);
    kept(read.region, region);
    assert!(read.zone.is_none() && (read.workload.is_none() || read.workload == workload));
    let parent = TraceParent::from_random(say.trace.0, say.trace.1);
    assert_eq!(TraceParent::parse(&parent.to_string()), Some(parent));
}

/// A text as each of them, or what a workload says of itself.
pub fn run(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else { return };
    match (how % 4, str::from_utf8(rest)) {
        (0, Ok(text)) => bounded(text.len(), 4, || authority(text)),
        (1 | 2, Ok(text)) => bounded(text.len(), 16, || header(text)),
        (3, _) => {
            if let Ok(say) = Say::new(&mut Unstructured::new(rest)) {
                bounded(rest.len(), 16, || said(&say));
            }
        }
        _ => {}
    }
}
