//! What opens a stream to an HBONE peer, on a tunnel that many connections share.
//!
//! Used by [`outbound`](crate::proxy::outbound) and [`double_hbone`](crate::proxy::double_hbone). It knows neither.

use std::future::Future;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::HeaderValue;
use http::StatusCode;
use tokio::time::Instant;
use tokio::time::sleep;
use ztunnel_mesh::model::addr::ClientAddr;
use ztunnel_mesh::model::addr::HbonePeer;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_tls::configs::Credentials;

use crate::hbone::address::Forwarded;
use crate::hbone::address::TraceParent;
use crate::hbone::client::Answered;
use crate::hbone::client::Connect;
use crate::hbone::client::Driver;
use crate::hbone::client::Lease;
use crate::hbone::client::Opening;
use crate::hbone::client::connect;
use crate::hbone::client::handshake;
use crate::hbone::pool::Dialer;
use crate::hbone::pool::Dialled;
use crate::hbone::pool::Key;
use crate::hbone::stream::RecvHalf;
use crate::hbone::stream::SendHalf;
use crate::hbone::stream::StreamError;
use crate::net::copy::ResetUnlessDone;
use crate::proxy::connect_error::ConnectError;
use crate::proxy::pod::Pod;
use crate::proxy::relay::Early;
use crate::proxy::shard::Shard;

/// One connection through a tunnel: whose, from where, to whom.
pub(super) struct Route {
    pub(super) pod: Arc<Pod>,
    pub(super) source: Arc<Workload>,
    pub(super) client: ClientAddr,
    pub(super) peer: HbonePeer,
    pub(super) expect: Vec<SpiffeId>,
    pub(super) target: SocketAddr,
    pub(super) destination: Arc<Workload>,
    pub(super) service: Option<Arc<Service>>,
}

/// A stream that is connected.
pub(super) struct OpenStream {
    pub(super) lease: Lease,
    pub(super) halves: (SendHalf, RecvHalf),
    /// What was said on it already.
    pub(super) early: Early,
}

/// How many tunnels a stream is tried on. A peer that drains or dies may leave several behind, and each may be
/// met before the news of it.
pub(super) const TRIES_MAX: usize = 16;

/// How many tunnels that were dialled for a stream may refuse it before it is given up.
pub(super) const REFUSALS_MAX: usize = 3;

/// Opens a stream. Again on another tunnel if one did not take it, or if one that was there before broke before
/// anything of the application's was put on it: never if the peer may already have delivered some.
pub(super) async fn open(
    shard: &Arc<Shard>,
    route: &Route,
    application: &mut ResetUnlessDone,
) -> Result<OpenStream, ConnectError> {
    let peer = route.peer;
    let credentials =
        shard.identities.credentials(&route.source.identity).await.map_err(ConnectError::Identity)?;
    let baggage = route.pod.baggage(&route.source);
    let host = route.service.as_ref().map(|service| &*service.hostname);
    let connect = Connect {
        authority: route.target.into(),
        network: None,
        baggage: &baggage,
        forwarded: Forwarded { client: route.client.0, host },
        trace: TraceParent::from_random(rand::random(), rand::random()),
    };
    let key = Key {
        source: route.source.identity.clone(),
        netns: route.pod.netns,
        peer,
        expect: route.expect.clone(),
    };
    let dialer = TunnelDialer { shard, pod: &route.pod, peer, expect: &route.expect, first: credentials };
    let mut early = Early::default();
    let (mut tries, mut refused) = (0, 0);
    loop {
        tries += 1;
        let mut leased = shard.pool.lease(&key, &dialer).await.map_err(ConnectError::Dial)?;
        let after = shard.config.answer_timeout;
        let source = match ask(&mut leased.lease, &connect, application, Some(&mut early), after).await? {
            Answer::Connected(send, recv, _) => {
                return Ok(OpenStream { lease: leased.lease, halves: (send, recv), early });
            }
            Answer::Refused(status) => return Err(ConnectError::Refused { peer, status }),
            Answer::Silent => return Err(ConnectError::Silent { peer, after }),
            Answer::Unanswered(source) => source,
        };
        let again = match source {
            StreamError::NotTaken if leased.reused => true,
            // One that was dialled for this. A peer that refuses so many takes none at all for now.
            StreamError::NotTaken => {
                refused += 1;
                refused < REFUSALS_MAX
            }
            StreamError::Tunnel(_) => leased.reused && !early.is_taken(),
            StreamError::Finished | StreamError::Reset(_) => false,
        };
        if !again || tries >= TRIES_MAX {
            return Err(ConnectError::Unanswered { peer, source });
        }
        leased.lease.retire();
        early.rewind();
    }
}

/// What a request came to.
pub(super) enum Answer {
    /// A stream, to one that said this of itself.
    Connected(SendHalf, RecvHalf, Option<HeaderValue>),
    Refused(StatusCode),
    Silent,
    Unanswered(StreamError),
}

/// How long an application may be gone before it is noticed, where it is not being read.
pub(super) const LOOK_PERIOD: Duration = Duration::from_secs(1);

/// Asks for the stream and waits for the answer, `limit` at most. Meanwhile the application's first words are
/// sent, if there is an `early` to keep them: a peer delivers nothing before it has decided, and the round trip is
/// saved.
pub(super) async fn ask(
    lease: &mut Lease,
    connect: &Connect<'_>,
    application: &mut ResetUnlessDone,
    mut early: Option<&mut Early>,
    limit: Duration,
) -> Result<Answer, ConnectError> {
    let Opening { mut send, mut answer } = match lease.open(connect).await {
        Ok(opening) => opening,
        Err(error) => return Ok(Answer::Unanswered(error)),
    };
    let (deadline, period) = (Instant::now() + limit, LOOK_PERIOD.min(limit));
    let mut look = pin!(sleep(period));
    poll_fn(|cx| {
        if let Poll::Ready(answered) = answer.poll(cx) {
            return Poll::Ready(Ok(Some(answered)));
        }
        while look.as_mut().poll(cx).is_ready() {
            if Instant::now() >= deadline {
                return Poll::Ready(Ok(None));
            }
            // Once its first words were taken the application is not read, and its reset would go unseen.
            if let Ok(Some(error)) = application.socket.take_error() {
                return Poll::Ready(Err(error));
            }
            look.as_mut().reset(deadline.min(Instant::now() + period));
        }
        match &mut early {
            Some(early) => early.poll(&mut application.socket, &mut send, cx).map(Err),
            None => Poll::Pending,
        }
    })
    .await
    .map(|answered| match answered {
        Some(Ok(Answered::Connected { recv, baggage })) => Answer::Connected(send, recv, baggage),
        Some(Ok(Answered::Refused(status))) => Answer::Refused(status),
        Some(Err(error)) => Answer::Unanswered(error),
        None => Answer::Silent,
    })
    .map_err(ConnectError::Abandoned)
}

/// Dials the peer from inside the pod.
pub(super) struct TunnelDialer<'a> {
    pub(super) shard: &'a Arc<Shard>,
    pub(super) pod: &'a Arc<Pod>,
    pub(super) peer: HbonePeer,
    pub(super) expect: &'a [SpiffeId],
    /// Should the present ones have ended meanwhile.
    pub(super) first: Arc<Credentials>,
}

impl Dialer for TunnelDialer<'_> {
    fn credentials(&self) -> Arc<Credentials> {
        let current = self.shard.identities.current(self.first.identity());
        current.unwrap_or_else(|| Arc::clone(&self.first))
    }

    fn dial(&self, credentials: Arc<Credentials>) -> Pin<Box<dyn Future<Output = Dialled> + Send>> {
        let (peer, config) = (self.peer, Arc::clone(&self.shard.config));
        let trust = self.shard.identities.trust().clone();
        let (dial, tls) = (self.pod.network.tunnel(peer.0), credentials.client_config(self.expect));
        let holder = self.pod.tunnel_holder();
        let lane = self.shard.lanes.of_pod(&self.pod.uid);
        // The handshake is in no lane: there is one at a time, and who waits for it is not to wait for a turn after it.
        Box::pin(async move {
            let socket = connect(dial, peer, config.connect_timeout).await?;
            let (tunnel, driver) = handshake(socket, peer, tls, &config.hbone, &trust).await?;
            tunnel.charge_to(holder);
            Ok((tunnel, Driver::new(lane.run(driver))))
        })
    }

    fn over(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.pod.removed())
    }
}
