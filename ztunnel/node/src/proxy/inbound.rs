//! Tunnels that peers dial to a pod, and the streams on them.

use std::error::Error;
use std::fmt;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;

use bytes::Bytes;
use ztunnel_mesh::model::addr::ClientAddr;
use ztunnel_mesh::model::addr::canonical;
use ztunnel_mesh::store::lookup::UnknownWorkload;
use ztunnel_runtime::shutdown;
use ztunnel_tls::trust::Side;
use ztunnel_tls::verify;
use ztunnel_tls::verify::NoIdentity;
use ztunnel_tls::verify::VerifiedPeer;

use crate::hbone::server;
use crate::hbone::server::Incoming;
use crate::hbone::server::ServeError;
use crate::hbone::stream::StreamError;
use crate::identity::worker::Unavailable;
use crate::net::copy::ResetUnlessDone;
use crate::proxy::admit::Delivered;
use crate::proxy::admit::DownstreamPeer;
use crate::proxy::admit::DownstreamRequest;
use crate::proxy::admit::StreamFailure;
use crate::proxy::admit::admit;
use crate::proxy::delivery::DeliveryError;
use crate::proxy::pod::Admitted;
use crate::proxy::pod::Pod;
use crate::proxy::reauthorization::Registered;
use crate::proxy::reauthorization::TunnelId;
use crate::proxy::relay::Application;
use crate::proxy::relay::Read;
use crate::proxy::relay::Relay;
use crate::proxy::report::ConnectionReport;
use crate::proxy::report::error_chain;
use crate::proxy::shard::Counted;
use crate::proxy::shard::Entered;
use crate::proxy::shard::Shard;
use crate::proxy::tunnels;
use crate::proxy::turns::Lane;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Reporter;

/// Why a connection to the HBONE port became no tunnel.
#[derive(Debug, thiserror::Error)]
enum NoTunnel {
    #[error(transparent)]
    UnknownWorkload(UnknownWorkload),
    #[error(transparent)]
    Identity(Unavailable),
    #[error("the pod already has {0} tunnels, the most it may have")]
    TooManyTunnels(usize),
    #[error("the pod has {0} handshakes in progress, the most it may have, or the client its part of them")]
    TooManyHandshakes(usize),
    #[error(
        "the handshake made room for others: the pod may have {0} in progress, and the client a part of them"
    )]
    HandshakeTaken(usize),
    #[error("the client already has its part of the {0} tunnels the pod may have")]
    TooManyOfOne(usize),
    #[error(transparent)]
    Serve(ServeError),
    #[error("the client proved no identity")]
    NoIdentity(#[source] NoIdentity),
}

/// A tunnel, as its streams see it.
pub(super) struct Tunnel {
    _admitted: (Admitted, tunnels::Place),
    client: ClientAddr,
    /// The address of the pod that was dialled, with the HBONE port.
    local: SocketAddr,
    peer: VerifiedPeer,
    id: TunnelId,
}

impl Tunnel {
    fn downstream(&self) -> DownstreamPeer<'_> {
        let tunnel = Some(self.id);
        DownstreamPeer { client: self.client, local: self.local, identity: self.peer.id(), tunnel }
    }
}

/// Serves one connection to `pod`'s HBONE port, its streams in the lane `streams`. `counted` lives as long.
pub(super) async fn serve(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    (socket, client): (TcpStream, ClientAddr),
    streams: Lane,
    counted: Counted,
) {
    let Ok(local) = socket.local_addr().map(canonical) else { return };
    let Ok(socket) = tokio::net::TcpStream::from_std(socket) else { return };
    let (tunnel, accepted) = match Box::pin(accept(&shard, &pod, socket, client, local)).await {
        Ok(accepted) => accepted,
        Err(error) => {
            let addresses = Addresses { source: client.0, destination: local, hbone: None };
            return shard.telemetry.refused_early(addresses, Reporter::Destination, &Explained(&error));
        }
    };
    let tunnel = Arc::new(tunnel);
    let drain = drain(&shard, &pod);
    let serving = server::serve(accepted, &shard.config.hbone, drain, |incoming| {
        let (shard_, pod, tunnel) = (Arc::clone(&shard), Arc::clone(&pod), Arc::clone(&tunnel));
        let counted = shard.count.connection();
        shutdown::spawn(streams.clone().run(stream(shard_, pod, (tunnel, incoming), counted)));
    });
    let trust = shard.identities.trust();
    let served = tokio::select! {
        served = serving => served,
        () = trust.revoked(&tunnel.peer, Side::Client) => {
            tracing::warn!(client = %client.0, peer = %tunnel.peer.id(), pod = %pod.uid, "tunnel closed: a certificate of the peer was revoked");
            // Before any of the streams has a turn to notice that its tunnel is gone.
            shard.reauthorization.revoke(tunnel.id);
            Ok(())
        }
    };
    if let Err(error) = served {
        tracing::debug!(client = %client.0, pod = %pod.uid, error = &error as &dyn Error, "tunnel broke");
    }
    drop(counted);
}

async fn accept(
    shard: &Shard,
    pod: &Arc<Pod>,
    socket: tokio::net::TcpStream,
    client: ClientAddr,
    local: SocketAddr,
) -> Result<(Tunnel, server::Accepted), NoTunnel> {
    let turn_away = |socket, why: fn(usize) -> NoTunnel, limit| {
        shard.count.turn_away();
        drop(ResetUnlessDone::new(socket));
        Err(why(limit))
    };
    let limit = shard.config.pod_tunnels_max;
    let Some(admitted) = pod.admit_tunnel(limit) else {
        return turn_away(socket, NoTunnel::TooManyTunnels, limit);
    };
    let limit = shard.config.pod_handshakes_max;
    let Some(mut handshake) = pod.handshakes.enter(client.0.ip(), limit) else {
        return turn_away(socket, NoTunnel::TooManyHandshakes, limit);
    };
    let shaken = tokio::select! {
        biased;
        () = handshake.taken() => {
            shard.count.turn_away();
            return Err(NoTunnel::HandshakeTaken(limit));
        }
        shaken = shake(shard, pod, socket, client) => shaken,
    };
    let (accepted, peer) = shaken?;
    let limit = shard.config.pod_tunnels_max;
    let Some(place) = pod.peers.enter(peer.id(), accepted.activity(), limit) else {
        shard.count.turn_away();
        accepted.reset();
        return Err(NoTunnel::TooManyOfOne(limit));
    };
    let id = shard.reauthorization.tunnel();
    Ok((Tunnel { _admitted: (admitted, place), client, local, peer, id }, accepted))
}

async fn shake(
    shard: &Shard,
    pod: &Arc<Pod>,
    socket: tokio::net::TcpStream,
    client: ClientAddr,
) -> Result<(server::Accepted, VerifiedPeer), NoTunnel> {
    let holder = pod.tunnel_holder_for(client.0.ip());
    let (_, workload) = pod.workload(&shard.mesh).await.map_err(NoTunnel::UnknownWorkload)?;
    let identity = pod.identity().unwrap_or(&workload.identity);
    let credentials = shard.identities.credentials(identity).await.map_err(NoTunnel::Identity)?;
    let accepted = server::accept(socket, credentials.server_config(), &shard.config.hbone)
        .await
        .map_err(NoTunnel::Serve)?;
    let peer = shard.identities.trust().verified_peer(accepted.tls()).map_err(NoTunnel::NoIdentity)?;
    accepted.charge_to(holder);
    Ok((accepted, peer))
}

/// An error with its causes, and what they mean to whoever runs the mesh.
struct Explained<'a>(&'a NoTunnel);

impl fmt::Display for Explained<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&error_chain(self.0))?;
        match self.0 {
            NoTunnel::Serve(ServeError::Tls(io)) => match io.get_ref().and_then(|e| e.downcast_ref()) {
                Some(error) => write!(f, ": {}", verify::cause(error)),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }
}

async fn drain(shard: &Shard, pod: &Pod) {
    let mut signal = shard.signal.clone();
    tokio::select! {
        () = signal.draining() => {}
        () = pod.removed() => {}
        () = pod.handed_over() => {}
    }
}

/// A stream and its application: all there is of the connection.
struct EstablishedStream {
    relay: Relay<ConnectionReport>,
    registered: Registered,
    admitted: Admitted,
}

/// Serves one stream. `counted` lives as long.
pub(super) async fn stream(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    (tunnel, incoming): (Arc<Tunnel>, Incoming),
    counted: Entered,
) {
    // On the heap, and gone once connected: what is relayed must not carry the room its dial needed.
    let Some(mut connected) = Box::pin(establish(shard, pod, tunnel, incoming)).await else { return };
    let EstablishedStream { relay, registered, .. } = &mut connected;
    let ended = match registered.run(relay).await {
        Ok(ended) => ended.map_err(StreamFailure::Relay),
        Err(closed) => Err(DeliveryError::from(closed).into()),
    };
    // What was closed is dropped here, and so reset at both ends.
    connected.relay.into_meter().close(ended);
    drop((connected.registered, connected.admitted, counted));
}

/// Decides, dials and answers. `None` when it came to nothing, which has been told then.
async fn establish(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    tunnel: Arc<Tunnel>,
    mut incoming: Incoming,
) -> Option<EstablishedStream> {
    let asked = incoming.authority();
    let delivered = match admit(&shard, &pod, tunnel.downstream(), asked, &mut incoming).await {
        Ok(delivered) => delivered,
        Err(refusal) => {
            if let Some(refusal) = refusal {
                incoming.refuse(refusal);
            }
            return None;
        }
    };
    let Delivered { application, first, workload, report, registered, admitted, holder } = delivered;
    let baggage = shard.config.response_baggage.then(|| pod.baggage(&workload));
    match incoming.connect(baggage) {
        Ok(halves) => {
            let application = (application, Application::Server);
            let relay = Relay::new(application, halves, Read::default(), holder, report).after(first);
            Some(EstablishedStream { relay, registered, admitted })
        }
        Err(error) => {
            report.close(Err(StreamFailure::Abandoned(error)));
            None
        }
    }
}

impl DownstreamRequest for Incoming {
    fn baggage(&self) -> Option<&str> {
        Self::baggage(self)
    }

    fn network(&self) -> Option<&str> {
        Self::network(self)
    }

    fn host(&self) -> Option<&str> {
        self.forwarded().and_then(|forwarded| forwarded.host)
    }

    fn first_words(&mut self, cx: &mut Context<'_>) -> Option<Result<Bytes, StreamError>> {
        Self::first_words(self, cx)
    }

    fn kept(&mut self, cx: &mut Context<'_>) -> usize {
        Self::kept(self, cx)
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        Self::poll_gone(self, cx)
    }
}
