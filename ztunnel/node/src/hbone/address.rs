//! What a CONNECT request and its response say in their headers.
//!
//! Text in, values out, and back. Everything here may come from a stranger: parsing never fails loudly, a
//! header that makes no sense is as good as absent, except the authority, without which there is no request.

use std::fmt;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;

use http::HeaderName;

pub use ztunnel_mesh::model::addr::Authority;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::workload::Reach;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::model::workload::WorkloadKind;

/// The header in which a client says which network it is in, to a server that it reaches through a gateway.
pub const NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");

/// The `forwarded` header (RFC 7239): whose connection this is, and which service was meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarded<'a> {
    /// The application's own socket.
    pub client: SocketAddr,
    /// The host name of the service it dialled, if it dialled one.
    pub host: Option<&'a str>,
}

impl<'a> Forwarded<'a> {
    /// Reads the first element. `None` if it does not say whose connection it is.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (mut client, mut host) = (None, None);
        for pair in text.split(',').next()?.split(';') {
            let Some((key, value)) = pair.trim().split_once('=') else { continue };
            let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
            if key.eq_ignore_ascii_case("for") {
                client = value.parse().ok();
            } else if key.eq_ignore_ascii_case("host") && is_token(value) {
                host = Some(value);
            }
        }
        Some(Self { client: client?, host })
    }
}

impl fmt::Display for Forwarded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for=\"{}\"", self.client)?;
        match self.host {
            Some(host) if is_token(host) => write!(f, ";host={host}"),
            _ => Ok(()),
        }
    }
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_:".contains(&b))
}

/// The `baggage` header: which workload speaks. For telemetry only, as a peer can say what it likes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Baggage<'a> {
    /// `k8s.cluster.name`
    pub cluster: Option<&'a str>,
    /// `k8s.namespace.name`
    pub namespace: Option<&'a str>,
    /// `k8s.<kind>.name`
    pub workload: Option<(WorkloadKind, &'a str)>,
    /// `service.name`
    pub canonical_name: Option<&'a str>,
    /// `service.version`
    pub canonical_revision: Option<&'a str>,
    /// `cloud.region`
    pub region: Option<&'a str>,
    /// `cloud.availability_zone`
    pub zone: Option<&'a str>,
}

/// No name or label value of Kubernetes is longer (RFC 1123 §2.1).
const NAME_MAX: usize = 253;
/// No namespace, and no label's value (RFC 1123 §2).
const LABEL_MAX: usize = 63;

const KINDS: [(WorkloadKind, &str); 4] = [
    (WorkloadKind::Deployment, "k8s.deployment.name"),
    (WorkloadKind::CronJob, "k8s.cronjob.name"),
    (WorkloadKind::Pod, "k8s.pod.name"),
    (WorkloadKind::Job, "k8s.job.name"),
];

impl<'a> Baggage<'a> {
    /// What `workload` says of itself.
    pub fn of(workload: &'a Workload) -> Self {
        Self {
            cluster: present(&workload.cluster),
            namespace: present(&workload.namespace),
            workload: present(&workload.workload_name).map(|name| (workload.kind, name)),
            canonical_name: present(&workload.canonical_name),
            canonical_revision: present(&workload.canonical_revision),
            region: present(&workload.region),
            zone: present(&workload.zone),
        }
    }

    /// The workload that says this of itself and proved to be `who`, as far as telemetry is concerned: it is in no
    /// mesh this side knows of.
    pub fn describe(&self, who: &SpiffeId) -> Workload {
        let text = |said: Option<&str>| said.map_or_else(Arc::<str>::default, Arc::from);
        let (kind, owner) = self.workload.unzip();
        let kind = kind.unwrap_or(WorkloadKind::Pod);
        let nobody = Arc::<str>::default;
        Workload {
            uid: nobody(),
            name: if kind == WorkloadKind::Pod { text(owner) } else { nobody() },
            namespace: text(self.namespace.or_else(|| Some(who.namespace()))),
            identity: who.clone(),
            node: nobody(),
            cluster: text(self.cluster),
            network: nobody(),
            addresses: Vec::new(),
            hostname: nobody(),
            workload_name: text(owner),
            kind,
            canonical_name: text(self.canonical_name),
            canonical_revision: text(self.canonical_revision),
            region: text(self.region),
            zone: text(self.zone),
            subzone: nobody(),
            reach: Reach::Unknown,
            native_tunnel: false,
            application_tunnel: None,
            healthy: false,
            capacity: 0,
            host_network: false,
            waypoint: None,
            network_gateway: None,
            services: Box::default(),
            policies: Vec::new(),
        }
    }

    /// Reads what is known and passes over the rest, what is longer than names of Kubernetes are included.
    pub fn parse(text: &'a str) -> Self {
        let mut baggage = Self::default();
        for member in text.split(',') {
            let Some((key, value)) = member.split_once('=') else { continue };
            // Properties (W3C Baggage §3.2.1) are not for us.
            let Some(value) = present(value.split(';').next().unwrap_or_default().trim()) else { continue };
            let key = key.trim();
            // Of these only names of clusters and workloads are longer than a label.
            let is_label = key == "k8s.namespace.name" || !key.starts_with("k8s.");
            if value.len() > if is_label { LABEL_MAX } else { NAME_MAX } {
                continue;
            }
            match key {
                "k8s.cluster.name" => baggage.cluster = Some(value),
                "k8s.namespace.name" => baggage.namespace = Some(value),
                "service.name" => baggage.canonical_name = Some(value),
                "service.version" => baggage.canonical_revision = Some(value),
                "cloud.region" => baggage.region = Some(value),
                "cloud.availability_zone" => baggage.zone = Some(value),
                other => {
                    if let Some((kind, _)) = KINDS.iter().find(|(_, key)| *key == other) {
                        baggage.workload = Some((*kind, value));
                    }
                }
            }
        }
        baggage
    }
}

/// The members in the order every peer writes them; what is not known, or could not be said without changing
/// the meaning of the header, is left out.
impl fmt::Display for Baggage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.workload.and_then(|(kind, name)| {
            let (_, key) = KINDS.iter().find(|(known, _)| *known == kind)?;
            Some((*key, name))
        });
        let (kind_key, kind_name) = kind.unzip();
        let members = [
            ("k8s.cluster.name", self.cluster),
            ("k8s.namespace.name", self.namespace),
            (kind_key.unwrap_or_default(), kind_name),
            ("service.name", self.canonical_name),
            ("service.version", self.canonical_revision),
            ("cloud.region", self.region),
            ("cloud.availability_zone", self.zone),
        ];
        let mut first = true;
        for (key, value) in members {
            let Some(value) = value else { continue };
            let sayable = |b: u8| b.is_ascii_graphic() && !b",;=\"\\".contains(&b);
            if value.is_empty() || !value.bytes().all(sayable) {
                continue;
            }
            if !first {
                f.write_char(',')?;
            }
            first = false;
            write!(f, "{key}={value}")?;
        }
        Ok(())
    }
}

fn present(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// The `traceparent` header (W3C Trace Context, version 00), which ties the two ends of a connection together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    /// The whole connection.
    pub trace: u128,
    /// One hop of it.
    pub span: u64,
}

impl TraceParent {
    /// A new trace from 24 random bytes. The header does not allow zeros, so those become ones.
    pub fn from_random(trace: u128, span: u64) -> Self {
        Self { trace: trace.max(1), span: span.max(1) }
    }

    /// Reads the header; `None` if it is malformed or of a version whose meaning is not known.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let hex = |part: &str, length: usize| {
            part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        if version != "00" || parts.next().is_some() || !hex(flags, 2) || !hex(trace, 32) || !hex(span, 16) {
            return None;
        }
        let trace = u128::from_str_radix(trace, 16).ok().filter(|trace| *trace != 0)?;
        let span = u64::from_str_radix(span, 16).ok().filter(|span| *span != 0)?;
        Some(Self { trace, span })
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-00", self.trace, self.span)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::Strategy;
    use proptest::prelude::any;
    use proptest::prop_assert_eq;
    use proptest::proptest;

    use super::*;

    #[test]
    fn who_speaks_is_known_as_far_as_it_says() {
        let who: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
        let described = |text: &str| Baggage::parse(text).describe(&who);
        let pod =
            described("k8s.cluster.name=C,k8s.namespace.name=other,k8s.pod.name=cart-1,service.name=cart");
        assert_eq!((&*pod.name, &*pod.workload_name, &*pod.namespace), ("cart-1", "cart-1", "other"));
        assert_eq!((&*pod.cluster, &*pod.canonical_name, &pod.identity), ("C", "cart", &who));
        let owned = described("k8s.deployment.name=cart");
        assert_eq!((&*owned.name, &*owned.workload_name, &*owned.namespace), ("", "cart", "shop"));
        // What no name can be is none.
        let long = "x".repeat(NAME_MAX + 1);
        assert_eq!(&*described(&format!("k8s.cluster.name={long}")).cluster, "");
        assert_eq!(described(&format!("k8s.cluster.name={}", &long[1..])).cluster.len(), NAME_MAX);
        let label = &long[..LABEL_MAX];
        assert_eq!(&*described(&format!("service.name={label}")).canonical_name, label);
        assert_eq!(&*described(&format!("service.name={label}x")).canonical_name, "");
        assert_eq!(described("nonsense;=,").reach, Reach::Unknown);
    }

    #[test]
    fn authorities() {
        for text in ["10.0.0.1:8080", "[fd00::1]:8080", "web.shop.svc.cluster.local:80", "a_b-c:65535"] {
            assert_eq!(Authority::parse(text).map(|a| a.to_string()).as_deref(), Ok(text));
        }
        for text in [
            "",
            ":",
            ":80",
            "web",
            "web:",
            "web:0",
            "web:65536",
            "web:+80",
            "web:8a",
            "10.0.0.1",
            "10.0.0.1:0",
            "fd00::1",
            "[fd00::1]",
            "[fd00::1]:",
            "a b:80",
            "user@web:80",
            "web:80/path",
            "web:80:80",
            "é:80",
        ] {
            assert!(Authority::parse(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn forwarded() {
        for (text, client, host) in [
            ("for=\"1.2.3.4:56789\"", "1.2.3.4:56789", None),
            (
                "for=\"[fd00::2]:5678\";host=web.shop.svc.cluster.local",
                "[fd00::2]:5678",
                Some("web.shop.svc.cluster.local"),
            ),
        ] {
            let expect = Forwarded { client: client.parse().unwrap(), host };
            assert_eq!(Forwarded::parse(text), Some(expect.clone()));
            assert_eq!(expect.to_string(), text);
        }
        let first = Forwarded::parse("For=1.2.3.4:5;proto=https; Host=\"web:80\", for=6.7.8.9:1");
        assert_eq!(first, Some(Forwarded { client: "1.2.3.4:5".parse().unwrap(), host: Some("web:80") }));
        for text in ["", "for=", "for=_hidden", "for=\"1.2.3.4\"", "host=web", "for=\"1.2.3.4:5"] {
            assert_eq!(Forwarded::parse(text), None, "{text:?}");
        }
        let unsafe_host = Forwarded { client: "1.2.3.4:5".parse().unwrap(), host: Some("a;b\r\n") };
        assert_eq!(unsafe_host.to_string(), "for=\"1.2.3.4:5\"");
    }

    #[test]
    fn baggage() {
        let text = "k8s.cluster.name=C,k8s.namespace.name=NS,k8s.deployment.name=W,service.name=CN,\
                    service.version=CR,cloud.region=R,cloud.availability_zone=Z";
        let all = Baggage {
            cluster: Some("C"),
            namespace: Some("NS"),
            workload: Some((WorkloadKind::Deployment, "W")),
            canonical_name: Some("CN"),
            canonical_revision: Some("CR"),
            region: Some("R"),
            zone: Some("Z"),
        };
        assert_eq!(Baggage::parse(text), all);
        assert_eq!(all.to_string(), text);
        let some = Baggage::parse("x=y, k8s.job.name = j ;p=1,service.version=,junk,=,k8s.node.name=n");
        assert_eq!(some, Baggage { workload: Some((WorkloadKind::Job, "j")), ..Baggage::default() });
        assert_eq!(Baggage::default().to_string(), "");
        let odd = Baggage { cluster: Some("a,b"), namespace: Some("n"), ..Baggage::default() };
        assert_eq!(odd.to_string(), "k8s.namespace.name=n");
    }

    #[test]
    fn traceparents() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
        let parsed = TraceParent::parse(text).unwrap();
        assert_eq!(parsed.to_string(), text);
        for text in [
            "",
            "00",
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
            "00-00000000000000000000000000000000-b7ad6b7169203331-00",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-00",
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-x",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        ] {
            assert_eq!(TraceParent::parse(text), None, "{text:?}");
        }
        assert_eq!(TraceParent::from_random(0, 0), TraceParent { trace: 1, span: 1 });
    }

    proptest! {
        #[test]
        fn garbage_never_panics(text in any::<String>()) {
            let _authority = Authority::parse(&text);
            let _forwarded = Forwarded::parse(&text);
            let _baggage = Baggage::parse(&text);
            let _trace = TraceParent::parse(&text);
        }

        #[test]
        fn what_is_written_is_read_back(
            client in any::<SocketAddr>(),
            host in "[a-z0-9.-]{1,40}",
            port in 1_u16..,
            names in proptest::collection::vec("[!#-+./-:<>-Z^-~-]{1,20}", 7),
            kind in (0_usize..4).prop_map(|i| KINDS[i].0),
            trace in 1_u128..,
            span in 1_u64..,
        ) {
            // A zone has no place in a header, and the flow label never travels.
            let client = SocketAddr::new(client.ip(), client.port());
            let forwarded = Forwarded { client, host: Some(&host) };
            let text = forwarded.to_string();
            prop_assert_eq!(Forwarded::parse(&text), Some(forwarded.clone()));
            let address = Authority::Address(SocketAddr::new(client.ip(), port));
            prop_assert_eq!(Authority::parse(&address.to_string()), Ok(address));
            let baggage = Baggage {
                cluster: Some(&names[0]),
                namespace: Some(&names[1]),
                workload: Some((kind, &names[2])),
                canonical_name: Some(&names[3]),
                canonical_revision: Some(&names[4]),
                region: Some(&names[5]),
                zone: Some(&names[6]),
            };
            let text = baggage.to_string();
            prop_assert_eq!(Baggage::parse(&text), baggage.clone());
            let parent = TraceParent { trace, span };
            prop_assert_eq!(TraceParent::parse(&parent.to_string()), Some(parent));
        }
    }
}
