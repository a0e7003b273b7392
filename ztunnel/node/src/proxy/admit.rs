//! What becomes of a request for an application of a pod: from a tunnel ([`inbound`](crate::proxy::inbound)), or from
//! another pod of this node ([`same_node`](crate::proxy::same_node)). It knows neither.

use std::future::Future;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use ztunnel_mesh::model::addr::Authority;
use ztunnel_mesh::model::addr::ClientAddr;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::policy::authorize::Permit;
use ztunnel_mesh::route::inbound_target::InboundRequest;
use ztunnel_mesh::route::inbound_target::InboundTarget;
use ztunnel_mesh::route::inbound_target::NotHere;
use ztunnel_mesh::route::inbound_target::inbound_target;
use ztunnel_mesh::store::gap::NEW_WITHIN;
use ztunnel_mesh::store::index::Mesh;
use ztunnel_mesh::store::lookup::UnknownWorkload;

use crate::hbone::address::Baggage;
use crate::hbone::server::Refusal;
use crate::hbone::stream::StreamError;
use crate::net::budget::Holder;
use crate::net::budget::Shed;
use crate::net::copy::ResetUnlessDone;
use crate::net::proxy_header;
use crate::proxy::Config;
use crate::proxy::delivery::DeliveryError;
use crate::proxy::delivery::deliver;
use crate::proxy::pod::Admitted;
use crate::proxy::pod::Pod;
use crate::proxy::pod::TooMany;
use crate::proxy::reauthorization::Admission;
use crate::proxy::reauthorization::Facts;
use crate::proxy::reauthorization::Registered;
use crate::proxy::reauthorization::TunnelId;
use crate::proxy::relay::Received;
use crate::proxy::relay::RelayError;
use crate::proxy::report::ConnectionError;
use crate::proxy::report::ConnectionReport;
use crate::proxy::shard::Shard;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::ResponseFlag;
use crate::telemetry::events::Security;

/// Who asks for an application of a pod.
#[derive(Clone, Copy)]
pub(super) struct DownstreamPeer<'a> {
    /// Where it comes from.
    pub(super) client: ClientAddr,
    /// The address of the pod that it asked, with the HBONE port.
    pub(super) local: SocketAddr,
    /// Who it proved to be.
    pub(super) identity: &'a SpiffeId,
    /// Where it proved that; `None` within this node.
    pub(super) tunnel: Option<TunnelId>,
}

/// An application that was dialled for a downstream peer who may have it, and what goes with the connection.
pub(super) struct Delivered {
    /// The application.
    pub(super) application: ResetUnlessDone,
    /// What the downstream peer had said before it was dialled.
    pub(super) first: Received,
    /// Whose it is.
    pub(super) workload: Arc<Workload>,
    /// What is told of it on this side.
    pub(super) report: ConnectionReport,
    /// Authorized again whenever the mesh changes.
    pub(super) registered: Registered,
    /// Its place among the pod's connections.
    pub(super) admitted: Admitted,
    /// Charged for what it holds.
    pub(super) holder: Holder,
}

/// A downstream peer, while the application is being dialled for it.
pub(super) trait DownstreamRequest {
    /// Which workload it says it is, as text of the `baggage` header: for telemetry, as it can say what it likes.
    fn baggage(&self) -> Option<&str>;

    /// Which network it says it is in, which one does that came through a gateway.
    fn network(&self) -> Option<&str>;

    /// Which service it says it meant, by its hostname.
    fn host(&self) -> Option<&str>;

    /// Its workload, where that is known for sure.
    fn workload(&self) -> Option<&Arc<Workload>> {
        None
    }

    /// What it has said without waiting for the answer: nothing, or a piece, or that it is gone.
    fn first_words(&mut self, cx: &mut Context<'_>) -> Option<Result<Bytes, StreamError>>;

    /// How many bytes of what it has said are kept.
    fn kept(&mut self, _cx: &mut Context<'_>) -> usize {
        0
    }

    /// Waits for it to give up.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<StreamError>;
}

/// Why a stream was not delivered, or ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum StreamFailure {
    /// It asked for something else than an address or a name, and a port.
    #[error("not a CONNECT to an address or a name with a port")]
    BadRequest,
    /// What it asked for is not to be had in this pod.
    #[error(transparent)]
    NotHere(NotHere),
    /// It asked for what this proxy's own pod does not offer.
    #[error("{0} is not offered to peers")]
    NotOffered(SocketAddr),
    /// The pod has too many connections.
    #[error(transparent)]
    TooMany(TooMany),
    /// The mesh does not know the pod.
    #[error(transparent)]
    UnknownWorkload(UnknownWorkload),
    /// Policy, or the application.
    #[error(transparent)]
    Delivery(#[from] DeliveryError),
    /// The client gave up while the application was being dialled.
    #[error("the client gave up before it was connected")]
    Abandoned(#[source] StreamError),
    /// It broke later.
    #[error(transparent)]
    Relay(RelayError),
    /// It had to give way before it was connected.
    #[error(transparent)]
    Shed(Shed),
}

impl StreamFailure {
    /// What the client is told; nothing once it was connected, or is gone.
    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::BadRequest | Self::NotHere(NotHere::OtherAddress(_) | NotHere::OtherFamily(..)) => {
                Some(Refusal::BadRequest)
            }
            Self::Delivery(DeliveryError::Denied(_) | DeliveryError::Closed(_)) => Some(Refusal::Denied),
            Self::NotHere(
                NotHere::SelfCall(_)
                | NotHere::UnknownHost(_)
                | NotHere::UnknownService(_)
                | NotHere::NotAnEndpoint(_)
                | NotHere::NoPort { .. }
                | NotHere::NoAddress(_)
                | NotHere::UnknownTunnel,
            )
            | Self::NotOffered(_)
            | Self::TooMany(_)
            | Self::UnknownWorkload(_)
            | Self::Shed(_)
            | Self::Delivery(
                DeliveryError::Connect { .. } | DeliveryError::Timeout { .. } | DeliveryError::Shed(_),
            ) => Some(Refusal::Unavailable),
            Self::Delivery(DeliveryError::Copy(_)) | Self::Abandoned(_) | Self::Relay(_) => None,
        }
    }
}

impl ConnectionError for StreamFailure {
    fn flag(&self) -> ResponseFlag {
        match self {
            Self::Delivery(error) => error.flag(),
            Self::NotHere(_) | Self::NotOffered(_) | Self::TooMany(_) | Self::UnknownWorkload(_) => {
                ResponseFlag::Connect
            }
            Self::BadRequest | Self::Abandoned(_) | Self::Relay(_) | Self::Shed(_) => ResponseFlag::None,
        }
    }

    fn is_reset(&self) -> bool {
        match self {
            Self::Relay(error) => error.is_reset(),
            Self::Delivery(error) => error.is_reset(),
            Self::Abandoned(_) => true,
            Self::BadRequest
            | Self::NotHere(_)
            | Self::NotOffered(_)
            | Self::TooMany(_)
            | Self::UnknownWorkload(_)
            | Self::Shed(_) => false,
        }
    }
}

/// The client's workload. One that came through a gateway is not found by its address, which is the gateway's; of it
/// there is only what it says, as there is of one that the mesh does not know.
fn source(
    mesh: &Mesh,
    own_network: &str,
    workload: &Workload,
    facts: &Facts,
    request: &impl DownstreamRequest,
) -> Option<Arc<Workload>> {
    if let Some(known) = request.workload() {
        return Some(Arc::clone(known));
    }
    let elsewhere = request.network().is_some_and(|network| !network.eq_ignore_ascii_case(own_network));
    let known = if elsewhere { None } else { mesh.workload_at(&workload.network, facts.source) };
    known.cloned().or_else(|| {
        let (baggage, identity) = request.baggage().zip(facts.identity.as_ref())?;
        Some(Arc::new(Baggage::parse(baggage).describe(identity)))
    })
}

/// Decides where it goes, by `mesh`. A service that the pod is behind and that the mesh does not have is asked for if it
/// can be, and waited for: then a later mesh decides.
async fn find_target(
    shard: &Shard,
    (mesh, workload): (Arc<Mesh>, Arc<Workload>),
    asked: &InboundRequest<'_>,
) -> Result<InboundTarget, StreamFailure> {
    let found = inbound_target(&mesh, &workload, asked);
    // What is waited for now is a later one.
    drop(mesh);
    let Err(NotHere::UnknownService(name)) = &found else { return found.map_err(StreamFailure::NotHere) };
    if let Some(demand) = shard.mesh.demand() {
        let _unanswered = demand.look_up(name).await;
    }
    let uid = &workload.uid;
    let known = shard.mesh.find_within(NEW_WITHIN, |mesh| {
        let Some(workload) = mesh.workload(uid) else {
            return Some(Err(StreamFailure::UnknownWorkload(UnknownWorkload(Named::Uid(Arc::clone(uid))))));
        };
        match inbound_target(mesh, workload, asked) {
            Err(NotHere::UnknownService(_)) => None,
            found => Some(found.map_err(StreamFailure::NotHere)),
        }
    });
    known.await.unwrap_or_else(|| found.map_err(StreamFailure::NotHere))
}

/// Decides and dials. `asked` is what was asked for, if that makes sense. What it came to when it came to nothing has
/// been told then, and the answer to the downstream peer is the error: none to one that is gone.
pub(super) async fn admit(
    shard: &Shard,
    pod: &Arc<Pod>,
    downstream: DownstreamPeer<'_>,
    asked: Option<Authority>,
    request: &mut impl DownstreamRequest,
) -> Result<Delivered, Option<Refusal>> {
    let refuse = |asked: Option<Authority>, failure: StreamFailure| {
        let addresses =
            Addresses { source: downstream.client.0, destination: downstream.local, hbone: asked };
        shard.telemetry.refused_early(addresses, Reporter::Destination, &failure);
        Err(failure.refusal())
    };
    let Some(authority) = asked else { return refuse(None, StreamFailure::BadRequest) };
    let limit = shard.config.pod_connections_max;
    let Some(admitted) = pod.admit(limit) else {
        shard.count.turn_away();
        return refuse(Some(authority), StreamFailure::TooMany(TooMany(limit)));
    };
    let holder = pod.connection_holder_for(downstream.client.0.ip());
    let (mesh, workload) = match holder.run(pod.workload(&shard.mesh)).await {
        Ok(Ok(found)) => found,
        Ok(Err(unknown)) => return refuse(Some(authority), StreamFailure::UnknownWorkload(unknown)),
        Err(shed) => return refuse(Some(authority), StreamFailure::Shed(shed)),
    };
    let (client, local) = (downstream.client.0.ip(), downstream.local.ip());
    let asked = InboundRequest {
        client,
        local,
        addresses: pod.addresses(),
        authority: &authority,
        host: request.host(),
        namespace: downstream.identity.namespace(),
    };
    let uid = Arc::clone(&workload.uid);
    let found = holder.run(find_target(shard, (mesh, workload), &asked)).await;
    let InboundTarget { to, service, announce } =
        match found.unwrap_or_else(|shed| Err(StreamFailure::Shed(shed))) {
            Ok(target) => target,
            Err(failure) => return refuse(Some(authority), failure),
        };
    if !pod.offers(to.port()) {
        return refuse(Some(authority), StreamFailure::NotOffered(to));
    }
    let facts = Facts {
        workload: Arc::clone(&uid),
        identity: Some(downstream.identity.clone()),
        source: client,
        destination: to,
    };
    let mut registered = shard.reauthorization.register(facts.clone(), downstream.tunnel);
    let admission = match holder.run(shard.reauthorization.admit(&shard.mesh, &facts)).await {
        Ok(Some(admission)) => admission,
        Ok(None) => {
            let unknown = StreamFailure::UnknownWorkload(UnknownWorkload(Named::Uid(uid)));
            return refuse(Some(authority), unknown);
        }
        Err(shed) => return refuse(Some(authority), StreamFailure::Shed(shed)),
    };
    let Admission { mesh, workload, decided: permit } = admission;
    let parties = Parties {
        reporter: Reporter::Destination,
        source: source(&mesh, shard.config.network_of(&workload), &workload, &facts, request),
        source_identity: facts.identity.clone(),
        destination: Some(Arc::clone(&workload)),
        destination_identity: Some(workload.identity.clone()),
        service,
        security: if downstream.tunnel.is_some() { Security::MutualTls } else { Security::WithinNode },
    };
    drop(mesh);
    let addresses =
        Addresses { source: downstream.client.0, destination: downstream.local, hbone: Some(authority) };
    let report = shard.report(pod, parties, addresses, None, to);
    let mut first = Received::default();
    let upstream = Upstream::new(&shard.config, &downstream, to, announce);
    let delivered = match permit {
        Ok(permit) => registered
            .run(dial(permit, shard, pod, upstream, (request, &mut first), &holder))
            .await
            .unwrap_or_else(|closed| Err(DeliveryError::from(closed).into())),
        Err(denial) => Err(DeliveryError::from(denial).into()),
    };
    match delivered {
        Ok(application) => {
            let application = ResetUnlessDone::new(application);
            Ok(Delivered { application, first, workload, report, registered, admitted, holder })
        }
        Err(failure) => {
            let refusal = failure.refusal();
            report.close(Err(failure));
            Err(refusal)
        }
    }
}

/// How the application is dialled.
struct Upstream {
    /// Whom it sees as its client.
    client: SocketAddr,
    to: SocketAddr,
    /// What it is told before anything else.
    header: Vec<u8>,
}

impl Upstream {
    /// To the application at `to`, which is to be told that the downstream peer meant to go to `announce`.
    fn new(
        config: &Config,
        downstream: &DownstreamPeer<'_>,
        to: SocketAddr,
        announce: Option<SocketAddr>,
    ) -> Self {
        let client = downstream.client.0;
        let Some(meant) = announce else { return Self { client, to, header: Vec::new() } };
        let header = proxy_header::encode(client, meant, downstream.identity.as_str());
        if !config.localhost_app_tunnel {
            return Self { client, to, header };
        }
        let loopback: IpAddr =
            if to.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        Self { client: SocketAddr::new(loopback, 0), to: SocketAddr::new(loopback, to.port()), header }
    }
}

/// Dials the application, unless the downstream peer gives up meanwhile. What that one has said already goes with it,
/// after what the application is to be told first.
async fn dial(
    permit: Permit,
    shard: &Shard,
    pod: &Pod,
    upstream: Upstream,
    (request, first): (&mut impl DownstreamRequest, &mut Received),
    holder: &Holder,
) -> Result<tokio::net::TcpStream, StreamFailure> {
    // Policy has decided: from here on what the downstream peer says may be looked at.
    if let Some(said) = poll_fn(|cx| Poll::Ready(request.first_words(cx))).await {
        first.unsent = said.map_err(StreamFailure::Abandoned)?;
    }
    let header = upstream.header.len();
    if header > 0 {
        first.unsent = Bytes::from([&upstream.header[..], &first.unsent].concat());
    }
    let all = first.unsent.len();
    let mut dialled = {
        let mut dial = pin!(deliver(permit, shard, pod, upstream.client, upstream.to, &mut first.unsent));
        poll_fn(|cx| {
            if let Poll::Ready(dialled) = dial.as_mut().poll(cx) {
                return Poll::Ready(dialled.map_err(StreamFailure::from));
            }
            holder.set(all + request.kept(cx));
            if let Poll::Ready(shed) = holder.poll_shed(cx) {
                return Poll::Ready(Err(StreamFailure::Shed(shed)));
            }
            request.poll_gone(cx).map(|gone| Err(StreamFailure::Abandoned(gone)))
        })
        .await
    }?;
    // What the downstream peer has said is counted, and what was told of it is not: nothing of that may be left over.
    while all - first.unsent.len() < header {
        let failed = |source| DeliveryError::Connect { to: upstream.to, source };
        if dialled.write_buf(&mut first.unsent).await.map_err(failed)? == 0 {
            return Err(failed(io::ErrorKind::WriteZero.into()).into());
        }
    }
    first.sent = all - first.unsent.len() - header;
    Ok(dialled)
}

#[cfg(test)]
mod tests {
    use ztunnel_mesh::model::identity::TrustDomain;

    use super::*;

    /// A downstream peer that says this of itself.
    struct Says(Option<&'static str>);

    impl DownstreamRequest for Says {
        fn baggage(&self) -> Option<&str> {
            Some("k8s.pod.name=elsewhere")
        }

        fn network(&self) -> Option<&str> {
            self.0
        }

        fn host(&self) -> Option<&str> {
            None
        }

        fn first_words(&mut self, _cx: &mut Context<'_>) -> Option<Result<Bytes, StreamError>> {
            None
        }

        fn poll_gone(&mut self, _cx: &mut Context<'_>) -> Poll<StreamError> {
            Poll::Pending
        }
    }

    #[test]
    fn a_client_that_came_through_a_gateway_is_not_known_by_its_address() {
        let network = |name: &str| Some(Arc::from(name));
        let told = |own: Option<Arc<str>>, says| {
            let config = Config { network: own, ..Config::default() };
            let at = |name: &str, ip: &str| Workload {
                network: "mesh".into(),
                addresses: vec![ip.parse().unwrap()],
                ..Workload::sample("shop", name)
            };
            let [here, pod] = [at("here", "10.0.0.1"), at("pod", "10.0.0.2")].map(Arc::new);
            let mesh = Mesh::new(TrustDomain::default(), [here, Arc::clone(&pod)], [], []);
            let facts = Facts {
                workload: Arc::clone(&pod.uid),
                identity: Some("spiffe://cluster.local/ns/shop/sa/elsewhere".parse().unwrap()),
                source: "10.0.0.1".parse().unwrap(),
                destination: "10.0.0.2:80".parse().unwrap(),
            };
            let source = source(&mesh, config.network_of(&pod), &pod, &facts, &Says(says)).unwrap();
            source.workload_name.to_string()
        };
        for (own, says, expect) in [
            (None, None, "here"),
            (None, Some("MESH"), "here"),
            (None, Some("far"), "elsewhere"),
            // Where this proxy is told its network, that is what it compares with, whatever the mesh says of the pod.
            (network("told"), None, "here"),
            (network("told"), Some("Told"), "here"),
            (network("told"), Some("mesh"), "elsewhere"),
        ] {
            assert_eq!(told(own.clone(), says), expect, "{own:?} {says:?}");
        }
    }

    #[test]
    fn a_waypoint_is_dialled_at_the_loopback_unless_that_is_switched_off() {
        let identity = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
        let check = |to: &str, announce: Option<&str>, localhost: bool, expect: [&str; 2]| {
            let config = Config { localhost_app_tunnel: localhost, ..Config::default() };
            let client = ClientAddr("10.0.0.1:4000".parse().unwrap());
            let downstream = DownstreamPeer {
                client,
                local: "10.0.0.2:15008".parse().unwrap(),
                identity: &identity,
                tunnel: None,
            };
            let announce: Option<SocketAddr> = announce.map(|at| at.parse().unwrap());
            let upstream = Upstream::new(&config, &downstream, to.parse().unwrap(), announce);
            assert_eq!([upstream.client, upstream.to].map(|at| at.to_string()), expect, "{to}");
            let header = announce.map(|at| proxy_header::encode(client.0, at, identity.as_str()));
            assert_eq!(upstream.header, header.unwrap_or_default(), "{to}");
        };
        check("10.0.0.2:80", None, true, ["10.0.0.1:4000", "10.0.0.2:80"]);
        check("10.0.0.2:15088", Some("10.9.0.1:80"), true, ["127.0.0.1:0", "127.0.0.1:15088"]);
        check("[fd00::2]:15088", Some("[fd09::1]:80"), true, ["[::1]:0", "[::1]:15088"]);
        check("10.0.0.2:15088", Some("10.9.0.1:80"), false, ["10.0.0.1:4000", "10.0.0.2:15088"]);
    }
}
