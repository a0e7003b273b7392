//! Between two pods of one node there is no wire: their connection is handed over inside the process instead of
//! being sent through a tunnel to ourselves.
//!
//! Everything else is as with a tunnel: the destination's limits, its policies with the source's identity, the live
//! re-authorization, both ends' reports, resets and closed halves. The rules by which a connection is handed over are in
//! [`ztunnel_mesh::route::same_node`] and `agree`; whatever does not fulfil all of them goes through a tunnel, and so fails as a
//! tunnel does if it must.
//!
//! A connection is handed over only to a pod whose traffic is redirected to this daemon now ([`crate::proxy::neighbours`]): not to
//! one that is being captured, withdrawn, or handed over to a successor. It is then delivered inside the pod's own
//! network namespace, over its loopback device; it cannot get anywhere else, also if the pod is withdrawn meanwhile.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::pin::pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::time::SystemTime;

use bytes::Bytes;
use tokio::time::Instant;
use tokio::time::Sleep;
use tokio::time::sleep;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::route::same_node::Tunnelled;
use ztunnel_runtime::shutdown::Signal;
use ztunnel_tls::configs::Credentials;
use ztunnel_tls::trust::Revocation;

use crate::hbone::stream::ResetCode;
use crate::hbone::stream::StreamError;
use crate::net::budget::Holder;
use crate::net::copy::CopyError;
use crate::net::copy::Holders;
use crate::net::copy::Meter;
use crate::net::copy::Relay;
use crate::net::copy::ResetUnlessDone;
use crate::proxy::admit;
use crate::proxy::admit::Delivered;
use crate::proxy::admit::DownstreamPeer;
use crate::proxy::admit::DownstreamRequest;
use crate::proxy::connect_error::ConnectError;
use crate::proxy::delivery::DeliveryError;
use crate::proxy::pod::Admitted;
use crate::proxy::pod::Pod;
use crate::proxy::reauthorization::Registered;
use crate::proxy::report::ConnectionReport;
use crate::proxy::shard::Entered;
use crate::proxy::shard::Shard;
use crate::proxy::upstream::LOOK_PERIOD;
use crate::proxy::upstream::Route;

/// Why two certificates would not be accepted in a handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NotAccepted {
    /// The two pods are of different trust domains, and no server accepts that.
    OtherTrustDomain,
    /// One of the two certificates is not valid now.
    NotValid,
    /// The two pods trust different roots, so one may not accept the other's certificate.
    OtherRoots,
}

/// Whether two pods' certificates would be accepted in a handshake between them at `now`: both are valid, of one
/// trust domain, and vouched for by the same roots, to which each is known to lead.
fn agree(one: &Credentials, other: &Credentials, now: SystemTime) -> Result<(), NotAccepted> {
    if !one.identity().shares_domain(other.identity()) {
        return Err(NotAccepted::OtherTrustDomain);
    }
    if ![one, other].iter().all(|held| held.validity().holds_at(now)) {
        return Err(NotAccepted::NotValid);
    }
    if one.roots().roots != other.roots().roots {
        return Err(NotAccepted::OtherRoots);
    }
    Ok(())
}

/// The pod to which the connection can be handed over. `None` when it is to take its way through a tunnel: there,
/// what is missing now is waited for, or fails.
///
/// The identity with which the connection is authorized is the source workload's own. What proves it over the wire is the
/// private key of its certificate; here the daemon itself accepted the connection from that pod, and holds that
/// key. So neither end's connection gets further than its certificates reach: one that the authority refuses, or that
/// has not been asked for yet, is waited for by way of the tunnel, and so are two that do not fit.
///
/// While the authority says nothing at all, neither yes nor no, the mesh alone says who the two pods are: it is the same
/// that tells whose certificates are to be asked for, and nothing of the connection leaves this process.
pub(super) fn neighbour(shard: &Shard, route: &Route) -> Option<Arc<Pod>> {
    let Route { client, peer, target, .. } = *route;
    let tunnelled = Tunnelled { client, peer, expect: &route.expect, target };
    // There is never a tunnel then, which would be one to itself: nothing is on any wire, nobody has to be believed, and
    // without a mesh the connection would not leave the pod either. So it is handed over whatever is true of certificates,
    // also while another daemon takes over, and where pods of one node are to have tunnels between them. Its policies hold.
    if tunnelled.leads_back(route.pod.addresses()) {
        return Some(Arc::clone(&route.pod));
    }
    if !shard.config.same_node || shard.signal.is_draining() {
        return None;
    }
    // Whether a certificate of this node was revoked is found out by the handshake.
    if !matches!(shard.identities.trust().revocation(), Revocation::Off) {
        return None;
    }
    // As it is now, and not as it was when the connection was planned.
    let destination = Arc::clone(shard.mesh.snapshot().workload(&route.destination.uid)?);
    let to = shard.neighbours.find(&destination).filter(|pod| !pod.is_leaving())?;
    let identity = destination.identity.clone();
    tunnelled.leads_to(route.pod.addresses(), to.addresses(), &identity).ok()?;
    let held = |identity| shard.identities.current(identity);
    match [&route.source.identity, &identity].map(held) {
        [Some(one), Some(other)] => agree(&one, &other, SystemTime::now()).ok()?,
        // Who has none may have it only because the authority is away.
        ends => {
            let known = [&route.source.identity, &identity].into_iter().zip(ends);
            let vouched = |(id, held): (&SpiffeId, Option<_>)| {
                held.is_some() || shard.identities.is_authority_silent(id)
            };
            let one_domain = route.source.identity.shares_domain(&identity);
            (one_domain && known.into_iter().all(vouched)).then_some(())?;
        }
    }
    Some(to)
}

/// What the two ends tell of a connection, counted together.
pub(super) struct Both {
    source: ConnectionReport,
    destination: ConnectionReport,
}

impl Meter for Both {
    fn up(&self, bytes: u64) {
        self.source.up(bytes);
        self.destination.up(bytes);
    }

    fn down(&self, bytes: u64) {
        self.source.down(bytes);
        self.destination.down(bytes);
    }
}

/// A connection between two pods of this daemon: all there is of it but the client's place among its pod's.
pub(super) struct SameNodeConnection {
    relay: Relay<Both>,
    registered: Registered,
    admitted: Admitted,
    ended: Result<(), DeliveryError>,
    /// When what is open of the destination is to be closed. Of the source, its task knows.
    closed: Option<Signal>,
    /// The destination's connection: a drain counts it as it would the stream of a tunnel.
    counted: Entered,
}

impl SameNodeConnection {
    /// Joins both ends.
    pub(super) fn new(
        application: ResetUnlessDone,
        client: Holder,
        source: ConnectionReport,
        opened: OtherEnd,
    ) -> Self {
        let OtherEnd { delivered, closed, counted } = opened;
        let Delivered { application: to, report: destination, registered, admitted, holder: server, .. } =
            delivered;
        let both = Both { source, destination };
        let relay = Relay::new(application, to, Holders::Both { client, server }, both);
        Self { relay, registered, admitted, ended: Ok(()), closed, counted }
    }

    /// Moves the bytes until both directions have ended, the destination's policies refuse it, or the destination
    /// is gone.
    pub(super) async fn run(&mut self) {
        let relayed = self.registered.run(&mut self.relay);
        self.ended = match unless_closed(&mut self.closed, relayed).await {
            Some(Ok(ended)) => ended.map_err(DeliveryError::Copy),
            Some(Err(closed)) => Err(DeliveryError::Closed(closed)),
            None => Err(DeliveryError::Copy(CopyError::Server(io::ErrorKind::ConnectionReset.into()))),
        };
    }

    /// Tells how it ended, for both ends. What was closed is dropped here, and so reset at both ends.
    pub(super) fn close(self) {
        let Self { relay, registered, admitted, ended, counted, .. } = self;
        let Both { source, destination } = relay.into_meter();
        source.close(match &ended {
            // Of that, the client's end of a tunnel learns no more than that its stream was reset.
            Err(DeliveryError::Closed(_)) => Ok(()),
            ended => ended.as_ref().copied(),
        });
        destination.close(ended);
        drop((registered, admitted, counted));
    }
}

/// Runs `future` unless the destination is closed first, which drops it.
async fn unless_closed<T>(closed: &mut Option<Signal>, future: impl Future<Output = T>) -> Option<T> {
    let Some(closed) = closed else { return Some(future.await) };
    tokio::select! {
        biased;
        () = closed.closing() => None,
        done = future => Some(done),
    }
}

/// The other end of a connection.
pub(super) struct OtherEnd {
    delivered: Delivered,
    closed: Option<Signal>,
    counted: Entered,
}

/// Asks for the connection at `to`, as the other end of a tunnel would, and is answered as through one.
pub(super) async fn open(
    shard: &Shard,
    to: &Arc<Pod>,
    route: &Route,
    application: &mut ResetUnlessDone,
) -> Result<OtherEnd, ConnectError> {
    let counted = shard.count.connection();
    let downstream = DownstreamPeer {
        client: route.client,
        local: route.peer.0,
        identity: &route.source.identity,
        tunnel: None,
    };
    let host = route.service.as_ref().map(|service| &*service.hostname);
    let look = pin!(sleep(LOOK_PERIOD));
    let mut neighbour = Neighbour { application, source: &route.source, host, look, error: None };
    let mut closed = to.closed();
    let admitted = admit::admit(shard, to, downstream, Some(route.target.into()), &mut neighbour);
    match unless_closed(&mut closed, admitted).await {
        Some(Ok(delivered)) => Ok(OtherEnd { delivered, closed, counted }),
        Some(Err(Some(refusal))) => Err(ConnectError::Refused { peer: route.peer, status: refusal.status() }),
        Some(Err(None)) | None => Err(ConnectError::Abandoned(
            neighbour.error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
        )),
    }
}

/// The application that dialled, while the other one is being dialled for it.
struct Neighbour<'a> {
    application: &'a ResetUnlessDone,
    /// Whose it is, and the service it dialled.
    source: &'a Arc<Workload>,
    host: Option<&'a str>,
    look: Pin<&'a mut Sleep>,
    error: Option<io::Error>,
}

impl DownstreamRequest for Neighbour<'_> {
    /// It has not been read: its words go from socket to socket later.
    fn first_words(&mut self, _cx: &mut Context<'_>) -> Option<Result<Bytes, StreamError>> {
        None
    }

    /// It is known by itself.
    fn baggage(&self) -> Option<&str> {
        None
    }

    fn network(&self) -> Option<&str> {
        None
    }

    fn host(&self) -> Option<&str> {
        self.host
    }

    fn workload(&self) -> Option<&Arc<Workload>> {
        Some(self.source)
    }

    /// Waits for it to reset its connection. It is not read, so it has to be asked now and then.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        while self.look.as_mut().poll(cx).is_ready() {
            if let Ok(Some(error)) = self.application.socket.take_error() {
                self.error = Some(error);
                return Poll::Ready(StreamError::Reset(ResetCode::CANCEL));
            }
            self.look.as_mut().reset(Instant::now() + LOOK_PERIOD);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::hbone::tests::TestCa;
    use crate::hbone::tests::id;

    #[test]
    fn certificates_must_be_acceptable_to_each_other_now() {
        let (ca, other) = (TestCa::new(), TestCa::new());
        let (client, server) = (ca.certify(&id("client")), ca.certify(&id("server")));
        let now = client.not_before().max(server.not_before());
        assert_eq!(agree(&client, &server, now), Ok(()));
        assert_eq!(agree(&client, &client, now), Ok(()));
        let end = client.not_after().min(server.not_after());
        assert_eq!(agree(&client, &server, end), Err(NotAccepted::NotValid));
        let early = client.not_before() - Duration::from_secs(1);
        assert_eq!(agree(&client, &server, early), Err(NotAccepted::NotValid));
        assert_eq!(agree(&client, &other.certify(&id("server")), now), Err(NotAccepted::OtherRoots));
        let foreign = "spiffe://elsewhere/ns/test/sa/server".parse().unwrap();
        assert_eq!(agree(&client, &ca.certify(&foreign), now), Err(NotAccepted::OtherTrustDomain));
    }
}
