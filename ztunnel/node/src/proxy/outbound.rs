//! What a pod dials: through a tunnel to a peer in the mesh, or on as it is.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::sync::Arc;

use tokio::time::Instant;
use tokio::time::timeout;
use ztunnel_mesh::model::addr::Authority;
use ztunnel_mesh::model::addr::ClientAddr;
use ztunnel_mesh::model::addr::OriginalDst;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::route::plan::NoRoute;
use ztunnel_mesh::route::plan::Plan;
use ztunnel_mesh::route::plan::Planned;
use ztunnel_mesh::route::plan::plan;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::demand::Demand;
use ztunnel_mesh::store::gap::NEW_WITHIN;

use crate::hbone::address::Baggage;
use crate::hbone::client::Lease;
use crate::net::budget::Holder;
use crate::net::copy;
use crate::net::copy::CopyError;
use crate::net::copy::Holders;
use crate::net::copy::ResetUnlessDone;
use crate::proxy::connect_error::ConnectError;
use crate::proxy::double_hbone;
use crate::proxy::names::NoAddress;
use crate::proxy::pod::Admitted;
use crate::proxy::pod::Pod;
use crate::proxy::pod::TooMany;
use crate::proxy::relay::Application;
use crate::proxy::relay::EARLY_MAX;
use crate::proxy::relay::Relay;
use crate::proxy::relay::RelayError;
use crate::proxy::report::ConnectionError;
use crate::proxy::report::ConnectionReport;
use crate::proxy::same_node;
use crate::proxy::shard::Counted;
use crate::proxy::shard::Shard;
use crate::proxy::upstream;
use crate::proxy::upstream::OpenStream;
use crate::proxy::upstream::Route;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::ResponseFlag;
use crate::telemetry::events::Security;

/// Why a pod's connection ended before its end, once it was connected.
#[derive(Debug, thiserror::Error)]
enum BrokenConnection {
    /// The peer is no longer who it was.
    #[error("connection closed because a certificate of the HBONE peer was revoked")]
    Revoked,
    /// It broke inside a tunnel.
    #[error(transparent)]
    Relay(RelayError),
    /// It broke outside of one.
    #[error(transparent)]
    Copy(CopyError),
}

impl ConnectionError for BrokenConnection {
    fn flag(&self) -> ResponseFlag {
        match self {
            Self::Revoked => ResponseFlag::Revoked,
            Self::Relay(_) | Self::Copy(_) => ResponseFlag::None,
        }
    }

    fn is_reset(&self) -> bool {
        match self {
            Self::Revoked => false,
            Self::Relay(error) => error.is_reset(),
            Self::Copy(error) => error.is_reset(),
        }
    }
}

/// A connection in both directions: all there is of it.
enum Established {
    /// Through a tunnel, whose room it holds; and that of the tunnel around it, where there is one.
    Tunnelled { relay: Relay<ConnectionReport>, lease: Lease, around: Option<Box<Lease>>, admitted: Admitted },
    /// On as it is.
    Plain { relay: copy::Relay<ConnectionReport>, admitted: Admitted },
    /// To another pod of this daemon.
    SameNode { connection: Box<same_node::SameNodeConnection>, admitted: Admitted },
}

/// Serves one connection that `pod` attempt. `counted` lives as long.
pub(super) async fn serve(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    (socket, client): (TcpStream, ClientAddr),
    counted: Counted,
) {
    // On the heap, and gone once connected: what is relayed must not carry the room its dial needed.
    let Some(mut connected) = Box::pin(establish(shard, pod, socket, client)).await else { return };
    // In place, as moving it would reserve its room twice.
    let ended = match &mut connected {
        Established::Tunnelled { relay, .. } => relay.await.map_err(BrokenConnection::Relay),
        Established::Plain { relay, .. } => relay.await.map_err(BrokenConnection::Copy),
        // It knows itself how it ended: for both ends.
        Established::SameNode { connection, .. } => {
            connection.run().await;
            Ok(())
        }
    };
    match connected {
        Established::Tunnelled { relay, lease, around, admitted } => {
            let is_revoked = || lease.is_revoked() || around.as_ref().is_some_and(|lease| lease.is_revoked());
            let ended = ended.map_err(|error| if is_revoked() { BrokenConnection::Revoked } else { error });
            relay.into_meter().close(ended);
            drop((lease, around, admitted));
        }
        Established::Plain { relay, admitted } => {
            relay.into_meter().close(ended);
            drop(admitted);
        }
        Established::SameNode { connection, admitted } => {
            connection.close();
            drop(admitted);
        }
    }
    drop(counted);
}

/// Decides and dials. `None` when it came to nothing, which has been told then.
async fn establish(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    socket: TcpStream,
    client: ClientAddr,
) -> Option<Established> {
    let dst = pod.network.original_dst(&socket);
    let application = ResetUnlessDone::new(tokio::net::TcpStream::from_std(socket).ok()?);
    let refuse = |dst: OriginalDst, error: &dyn fmt::Display| {
        let addresses = Addresses { source: client.0, destination: dst.0, hbone: None };
        shard.telemetry.refused_early(addresses, Reporter::Source, error);
        None
    };
    let dst = match dst {
        Ok(dst) => dst,
        Err(error) => return refuse(OriginalDst(client.0), &error),
    };
    let Some(admitted) = pod.admit(shard.config.pod_connections_max) else {
        shard.count.turn_away();
        return refuse(dst, &TooMany(shard.config.pod_connections_max));
    };
    let holder = pod.connection_holder();
    // What the application says before it is connected.
    holder.set(EARLY_MAX);
    // What is captured never goes to the pod itself, so this dialled the listener.
    if dst.0.ip().is_loopback() || pod.has(dst.0.ip()) {
        return refuse(dst, &NoRoute::SelfCall(dst.0));
    }
    let (mesh, source) = match holder.run(pod.workload(&shard.mesh)).await {
        Ok(Ok(found)) => found,
        Ok(Err(unknown)) => return refuse(dst, &unknown),
        Err(shed) => return refuse(dst, &shed),
    };
    let roll = rand::random();
    let planned = plan(&mesh, &source, dst, roll).map_err(ConnectError::NoRoute);
    drop(mesh);
    let planned = unless_shed(&holder, complete(&shard, &source, dst, roll, planned)).await;
    let (shard_, pod_, source_) = (Arc::clone(&shard), Arc::clone(&pod), Arc::clone(&source));
    let attempt =
        Attempt { shard: shard_, pod: pod_, client, dst, source: source_, application, holder, admitted };
    match planned {
        Ok(Plan::Hbone { peer, expect, target, destination, service }) => {
            let route = Route { pod, source, client, peer, expect, target, destination, service };
            attempt.through_a_tunnel(route).await
        }
        Ok(Plan::DoubleHbone { gateway, expect, service, port, destination }) => {
            let asked = Authority::Hostname { host: Arc::clone(&service.hostname), port };
            let route = double_hbone::Route { pod, source, client, gateway, expect, service, asked };
            attempt.through_a_gateway(route, destination).await
        }
        Ok(Plan::Plain { to, destination, service }) => attempt.directly(to, destination, service).await,
        Err(ConnectError::NoRoute(error @ NoRoute::SelfCall(_))) => refuse(dst, &error),
        Err(error) => {
            attempt.nowhere(error);
            None
        }
    }
}

/// A connection that a pod has dialled, until it is connected.
struct Attempt {
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    client: ClientAddr,
    dst: OriginalDst,
    source: Arc<Workload>,
    application: ResetUnlessDone,
    holder: Holder,
    admitted: Admitted,
}

impl Attempt {
    /// Who takes part as far as the source goes, in a connection that is secured.
    fn parties(&self) -> Parties {
        Parties {
            reporter: Reporter::Source,
            source: Some(Arc::clone(&self.source)),
            source_identity: Some(self.source.identity.clone()),
            destination: None,
            destination_identity: None,
            service: None,
            security: Security::MutualTls,
        }
    }

    /// Tells that it is open from now on, to `destination`.
    fn open(&self, parties: Parties, destination: SocketAddr, hbone: Option<Authority>) -> ConnectionReport {
        let addresses = Addresses { source: self.client.0, destination, hbone };
        self.shard.report(&self.pod, parties, addresses, Some(self.dst), destination)
    }

    /// Connected: `opened` is where to, and `around` the tunnel around that one's.
    fn relay(self, opened: OpenStream, around: Option<Box<Lease>>, report: ConnectionReport) -> Established {
        let OpenStream { lease, halves, early } = opened;
        report.0.received(early.bytes() as u64);
        let application = (self.application, Application::Client);
        let relay = Relay::new(application, halves, early.into_read(), self.holder, report);
        Established::Tunnelled { relay, lease, around, admitted: self.admitted }
    }

    /// To a peer of this network, or to a pod of this node in its place.
    async fn through_a_tunnel(mut self, route: Route) -> Option<Established> {
        let mut parties = Parties {
            destination: Some(Arc::clone(&route.destination)),
            destination_identity: route.expect.first().cloned(),
            service: route.service.clone(),
            ..self.parties()
        };
        let neighbour = same_node::neighbour(&self.shard, &route);
        if neighbour.is_some() {
            parties.security = Security::WithinNode;
        }
        let report = self.open(parties, route.peer.0, Some(route.target.into()));
        let Some(to) = neighbour else {
            let opened = upstream::open(&self.shard, &route, &mut self.application);
            return match unless_shed(&self.holder, opened).await {
                Ok(opened) => Some(self.relay(opened, None, report)),
                Err(error) => not_connected(report, error),
            };
        };
        let opened = same_node::open(&self.shard, &to, &route, &mut self.application);
        match unless_shed(&self.holder, opened).await {
            Ok(opened) => {
                let connection =
                    same_node::SameNodeConnection::new(self.application, self.holder, report, opened);
                Some(Established::SameNode { connection: Box::new(connection), admitted: self.admitted })
            }
            Err(error) => not_connected(report, error),
        }
    }

    /// To another network, to what that one knows as `destination` here.
    async fn through_a_gateway(
        mut self,
        route: double_hbone::Route,
        destination: Arc<Workload>,
    ) -> Option<Established> {
        let began = Instant::now();
        // What is told of it afterwards is what it says of itself.
        if let Some(demand) = self.shard.mesh.demand() {
            demand.touch(&destination.uid);
        }
        let mut parties = Parties {
            destination: Some(destination),
            service: Some(Arc::clone(&route.service)),
            ..self.parties()
        };
        let gateway = route.gateway.0;
        // In a box of its own: few connections go there.
        let opened = Box::pin(double_hbone::open(&self.shard, &route, &mut self.application));
        match unless_shed(&self.holder, opened).await {
            Ok(double_hbone::DoubleStream { around, opened, baggage }) => {
                // Who it is, only those know who are there.
                let who = opened.lease.peer();
                parties.destination_identity = who.cloned();
                if let (Some(text), Some(who)) = (&baggage, who) {
                    let said = Baggage::parse(text.to_str().unwrap_or_default());
                    parties.destination = Some(Arc::new(said.describe(who)));
                }
                let mut report = self.open(parties, gateway, Some(route.asked));
                report.0.began(began);
                Some(self.relay(opened, Some(Box::new(around)), report))
            }
            Err(error) => {
                if let ConnectError::DoubleHboneRefused { who, .. } = &error {
                    parties.destination_identity.clone_from(who);
                }
                let mut report = self.open(parties, gateway, Some(route.asked));
                report.0.began(began);
                not_connected(report, error)
            }
        }
    }

    /// To whoever is at `to`, without a tunnel.
    async fn directly(
        self,
        to: SocketAddr,
        destination: Option<Arc<Workload>>,
        service: Option<Arc<Service>>,
    ) -> Option<Established> {
        let (source, unknown) = (Some(Arc::clone(&self.source)), Parties::unknown(Reporter::Source));
        let destination_identity = destination.as_ref().map(|destination| destination.identity.clone());
        let parties = Parties { source, destination, destination_identity, service, ..unknown };
        let report = self.open(parties, to, None);
        match unless_shed(&self.holder, dial(&self.shard, &self.pod, to)).await {
            Ok(server) => {
                let server = ResetUnlessDone::new(server);
                let relay = copy::Relay::new(self.application, server, Holders::One(self.holder), report);
                Some(Established::Plain { relay, admitted: self.admitted })
            }
            Err(error) => not_connected(report, error),
        }
    }

    /// There is no plan.
    fn nowhere(self, error: ConnectError) {
        let (mesh, ip) = (self.shard.mesh.snapshot(), self.dst.0.ip().to_canonical());
        let service = mesh.service_at(&self.source.network, ip, Some(&self.source.namespace)).cloned();
        let source = Some(Arc::clone(&self.source));
        let parties = Parties { source, service, ..Parties::unknown(Reporter::Source) };
        self.open(parties, self.dst.0, None).close(Err(error));
    }
}

/// Tells how the connection failed.
fn not_connected(report: ConnectionReport, error: ConnectError) -> Option<Established> {
    report.close(Err(error));
    None
}

/// Waits for what a connection needs to be made, unless it has to give way meanwhile.
async fn unless_shed<T>(
    holder: &Holder,
    future: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    holder.run(future).await.unwrap_or_else(|shed| Err(ConnectError::Shed(shed)))
}

/// Finds out what `planned` lacks.
async fn complete(
    shard: &Shard,
    source: &Workload,
    dst: OriginalDst,
    roll: u64,
    planned: Result<Planned, ConnectError>,
) -> Result<Plan, ConnectError> {
    let planned = match shard.mesh.demand() {
        Some(demand) => resolve(demand, &shard.mesh, source, dst, planned).await,
        None => planned,
    };
    let planned = if is_missing(&planned) {
        later(&shard.mesh, &source.uid, dst, roll, planned).await
    } else {
        planned
    };
    let by_name = match planned? {
        Planned::Known(plan) => return Ok(plan),
        Planned::ByName(by_name) => by_name,
    };
    let host = &by_name.destination.hostname;
    let unnamed = |source| ConnectError::Name { host: Arc::clone(host), source };
    let addresses = shard.names.look_up(host, source).await.map_err(unnamed)?;
    let plan = by_name.plan(&addresses, dst.0.ip().to_canonical(), roll);
    plan.ok_or_else(|| unnamed(NoAddress::Nothing))?.map_err(ConnectError::NoRoute)
}

/// How often a plan is made again: the destination may be unknown, then its waypoint.
const LOOK_UPS_MAX: usize = 3;

/// Asks for what the mesh does not have, as long as a plan lacks something else then.
async fn resolve(
    demand: &Demand,
    mesh: &MeshReader,
    source: &Workload,
    dst: OriginalDst,
    mut planned: Result<Planned, ConnectError>,
) -> Result<Planned, ConnectError> {
    let mut asked = None;
    for _ in 0..LOOK_UPS_MAX {
        let name = match &planned {
            Ok(Planned::Known(Plan::Plain { to, destination: None, .. })) => {
                format!("{}/{}", source.network, to.ip())
            }
            Err(ConnectError::NoRoute(
                NoRoute::UnknownWaypoint(gateway) | NoRoute::UnknownGateway(gateway),
            )) => gateway.destination.to_string(),
            _ => break,
        };
        if asked.as_ref() == Some(&name) {
            break;
        }
        if let Err(source) = demand.look_up(&name).await {
            return Err(ConnectError::Unresolved { name, source });
        }
        planned = plan(&mesh.snapshot(), source, dst, rand::random()).map_err(ConnectError::NoRoute);
        asked = Some(name);
    }
    // The plan speaks of the waypoint in front of it, if it has one.
    if let Some(dialled) = mesh.snapshot().workload_at(&source.network, dst.0.ip().to_canonical()) {
        demand.touch(&dialled.uid);
    }
    planned
}

/// Whether a plan lacks a waypoint or gateway that the mesh names. It may not have come yet.
fn is_missing(planned: &Result<Planned, ConnectError>) -> bool {
    matches!(planned, Err(ConnectError::NoRoute(NoRoute::UnknownWaypoint(_) | NoRoute::UnknownGateway(_))))
}

/// Waits for what `planned` lacks.
async fn later(
    mesh: &MeshReader,
    source: &str,
    dst: OriginalDst,
    roll: u64,
    planned: Result<Planned, ConnectError>,
) -> Result<Planned, ConnectError> {
    let complete = mesh.find_within(NEW_WITHIN, |mesh| {
        let planned = plan(mesh, mesh.workload(source)?, dst, roll).map_err(ConnectError::NoRoute);
        (!is_missing(&planned)).then_some(planned)
    });
    complete.await.unwrap_or(planned)
}

async fn dial(shard: &Shard, pod: &Pod, to: SocketAddr) -> Result<tokio::net::TcpStream, ConnectError> {
    let after = shard.config.connect_timeout;
    timeout(after, pod.network.leave(to))
        .await
        .map_err(|_elapsed| ConnectError::Timeout { to, after })?
        .map_err(|source| ConnectError::Connect { to, source })
}
