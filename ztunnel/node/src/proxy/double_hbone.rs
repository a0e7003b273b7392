//! To another network there is no way but through its gateway: a tunnel to it, which many connections share, and in
//! a stream of that one a tunnel of the connection's own to whoever serves it there.
//!
//! The gateway learns which service is meant and sees nothing else: what the application says goes on the inner tunnel
//! only, once the one at its other end has proved to be one of those the service may be served by. Both ends must be
//! expected by name; there is no plan without.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use tokio::time::timeout;
use ztunnel_mesh::model::addr::Authority;
use ztunnel_mesh::model::addr::ClientAddr;
use ztunnel_mesh::model::addr::HbonePeer;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_runtime::shutdown;

use crate::hbone::address::Forwarded;
use crate::hbone::address::TraceParent;
use crate::hbone::client::Connect;
use crate::hbone::client::DialError;
use crate::hbone::client::Lease;
use crate::hbone::client::handshake_within;
use crate::hbone::pool::Dialer;
use crate::hbone::pool::Key;
use crate::hbone::stream::RecvHalf;
use crate::hbone::stream::SendHalf;
use crate::hbone::stream::StreamError;
use crate::hbone::through::Through;
use crate::net::copy::ResetUnlessDone;
use crate::proxy::connect_error::ConnectError;
use crate::proxy::pod::Pod;
use crate::proxy::relay::Early;
use crate::proxy::shard::Shard;
use crate::proxy::upstream::Answer;
use crate::proxy::upstream::OpenStream;
use crate::proxy::upstream::REFUSALS_MAX;
use crate::proxy::upstream::TRIES_MAX;
use crate::proxy::upstream::TunnelDialer;
use crate::proxy::upstream::ask;

/// One connection to another network: whose, from where, through whom, to what.
pub(super) struct Route {
    pub(super) pod: Arc<Pod>,
    pub(super) source: Arc<Workload>,
    pub(super) client: ClientAddr,
    pub(super) gateway: HbonePeer,
    /// Who the gateway may be.
    pub(super) expect: Vec<SpiffeId>,
    pub(super) service: Arc<Service>,
    /// The service and its port by name, for both tunnels.
    pub(super) asked: Authority,
}

/// A connection that is served there.
pub(super) struct DoubleStream {
    /// Room on the gateway's tunnel.
    pub(super) around: Lease,
    /// The stream within.
    pub(super) opened: OpenStream,
    /// What its peer said of itself, if that is believed.
    pub(super) baggage: Option<HeaderValue>,
}

/// When an inner tunnel has ended, the other side of the stream that carried it has so long to end, too.
const TAIL_WITHIN: Duration = Duration::from_secs(10);

/// Opens both.
pub(super) async fn open(
    shard: &Arc<Shard>,
    route: &Route,
    application: &mut ResetUnlessDone,
) -> Result<DoubleStream, ConnectError> {
    let credentials =
        shard.identities.credentials(&route.source.identity).await.map_err(ConnectError::Identity)?;
    let baggage = route.pod.baggage(&route.source);
    let connect = Connect {
        authority: route.asked.clone(),
        baggage: &baggage,
        forwarded: Forwarded { client: route.client.0, host: Some(&route.service.hostname) },
        trace: TraceParent::from_random(rand::random(), rand::random()),
        network: None,
    };
    let dialer = TunnelDialer {
        shard,
        pod: &route.pod,
        peer: route.gateway,
        expect: &route.expect,
        first: credentials,
    };
    let (around, halves) = reach(shard, route, &connect, &dialer, application).await?;

    let (through, tail) = Through::new(halves);
    let config = &shard.config;
    let failed = |source| ConnectError::DoubleHbone { host: Arc::clone(&route.service.hostname), source };
    let tls = dialer.credentials().client_config(&route.service.identities);
    let trust = shard.identities.trust();
    let shaken = handshake_within(through, route.gateway, tls, &config.hbone, trust).await;
    let (tunnel, driver) = shaken.map_err(failed)?;
    tunnel.charge_to(route.pod.tunnel_holder());
    let gateway = route.gateway.0;
    shutdown::spawn(shard.lanes.of_pod(&route.pod.uid).run(async move {
        match driver.await {
            // A stream that is dropped now would be reset, and the gateway may not have passed all of it on.
            Ok(()) => drop(timeout(TAIL_WITHIN, tail.ended()).await),
            Err(error) => {
                tracing::debug!(%gateway, error = &error as &dyn Error, "tunnel through a gateway broke");
            }
        }
    }));
    let mut lease = tunnel.lease().ok_or_else(|| failed(DialError::NoRoom { peer: route.gateway }))?;
    // It is the connection's own, and ends with it.
    tunnel.retire();
    let connect = Connect { network: Some(config.network_of(&route.source)), ..connect };
    let mut early = Early::default();
    let (peer, after) = (route.gateway, config.answer_timeout);
    match ask(&mut lease, &connect, application, Some(&mut early), after).await? {
        Answer::Connected(send, recv, said) => Ok(DoubleStream {
            around,
            opened: OpenStream { lease, halves: (send, recv), early },
            baggage: said.filter(|_| config.response_baggage),
        }),
        Answer::Refused(status) => {
            let (host, who) = (Arc::clone(&route.service.hostname), lease.peer().cloned());
            Err(ConnectError::DoubleHboneRefused { host, status, who })
        }
        Answer::Silent => Err(ConnectError::Silent { peer, after }),
        Answer::Unanswered(source) => Err(ConnectError::Unanswered { peer, source }),
    }
}

/// Opens the stream at the gateway. Again on another tunnel if one did not take it or broke: nothing of the
/// application's is on it yet.
async fn reach(
    shard: &Arc<Shard>,
    route: &Route,
    connect: &Connect<'_>,
    dialer: &TunnelDialer<'_>,
    application: &mut ResetUnlessDone,
) -> Result<(Lease, (SendHalf, RecvHalf)), ConnectError> {
    let peer = route.gateway;
    let key = Key {
        source: route.source.identity.clone(),
        netns: route.pod.netns,
        peer,
        expect: route.expect.clone(),
    };
    let after = shard.config.answer_timeout;
    let (mut tries, mut refused) = (0, 0);
    loop {
        tries += 1;
        let mut leased = shard.pool.lease(&key, dialer).await.map_err(ConnectError::Dial)?;
        let source = match ask(&mut leased.lease, connect, application, None, after).await? {
            Answer::Connected(send, recv, _) => return Ok((leased.lease, (send, recv))),
            Answer::Refused(status) => return Err(ConnectError::Refused { peer, status }),
            Answer::Silent => return Err(ConnectError::Silent { peer, after }),
            Answer::Unanswered(source) => source,
        };
        let again = match source {
            StreamError::NotTaken if leased.reused => true,
            StreamError::NotTaken => {
                refused += 1;
                refused < REFUSALS_MAX
            }
            StreamError::Tunnel(_) => leased.reused,
            StreamError::Finished | StreamError::Reset(_) => false,
        };
        if !again || tries >= TRIES_MAX {
            return Err(ConnectError::Unanswered { peer, source });
        }
        leased.lease.retire();
    }
}
