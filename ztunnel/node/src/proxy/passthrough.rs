//! Plain connections to a pod: from outside the mesh, authorized without an identity, delivered as they are.

use std::fmt;
use std::net::TcpStream;
use std::sync::Arc;

use bytes::Bytes;
use ztunnel_mesh::model::addr::ClientAddr;
use ztunnel_mesh::model::addr::OriginalDst;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::route::meant::service_behind;
use ztunnel_mesh::route::plan::NoRoute;
use ztunnel_mesh::route::plan::RESERVED_PORTS;
use ztunnel_mesh::store::lookup::UnknownWorkload;

use crate::net::copy;
use crate::net::copy::Holders;
use crate::net::copy::ResetUnlessDone;
use crate::net::ports::Fronted;
use crate::proxy::delivery::DeliveryError;
use crate::proxy::delivery::deliver;
use crate::proxy::pod::Admitted;
use crate::proxy::pod::Pod;
use crate::proxy::pod::TooMany;
use crate::proxy::reauthorization::Admission;
use crate::proxy::reauthorization::Facts;
use crate::proxy::reauthorization::Registered;
use crate::proxy::report::ConnectionReport;
use crate::proxy::shard::Counted;
use crate::proxy::shard::Shard;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;

/// A connection in both directions: all there is of it.
struct EstablishedPlain {
    relay: copy::Relay<ConnectionReport>,
    registered: Registered,
    admitted: Admitted,
    /// Keeps its source port from deliveries.
    fronted: Option<Fronted>,
}

/// Serves one plain connection to `pod`. `counted` lives as long.
pub(super) async fn serve(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    (socket, client): (TcpStream, ClientAddr),
    counted: Counted,
) {
    // On the heap, and gone once connected: what is relayed must not carry the room its dial needed.
    let Some(mut connected) = Box::pin(establish(shard, pod, socket, client)).await else { return };
    let EstablishedPlain { relay, registered, .. } = &mut connected;
    let ended = match registered.run(relay).await {
        Ok(ended) => ended.map_err(DeliveryError::Copy),
        Err(closed) => Err(DeliveryError::Closed(closed)),
    };
    // What was closed is dropped here, and so reset.
    connected.relay.into_meter().close(ended);
    drop((connected.registered, connected.admitted, connected.fronted, counted));
}

/// Decides and dials. `None` when it came to nothing, which has been told then.
async fn establish(
    shard: Arc<Shard>,
    pod: Arc<Pod>,
    socket: TcpStream,
    client: ClientAddr,
) -> Option<EstablishedPlain> {
    let dst = pod.network.original_dst(&socket);
    let front = ResetUnlessDone::new(tokio::net::TcpStream::from_std(socket).ok()?);
    let refuse = |dst: OriginalDst, error: &dyn fmt::Display| {
        let addresses = Addresses { source: client.0, destination: dst.0, hbone: None };
        shard.telemetry.refused_early(addresses, Reporter::Destination, error);
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
    let holder = pod.connection_holder_for(client.0.ip());
    if RESERVED_PORTS.contains(&dst.0.port()) {
        return refuse(dst, &NoRoute::SelfCall(dst.0));
    }
    let fronted = pod.network.fronted(client.0, dst.0.port());
    let uid = match holder.run(pod.workload(&shard.mesh)).await {
        Ok(Ok((_, workload))) => Arc::clone(&workload.uid),
        Ok(Err(unknown)) => return refuse(dst, &unknown),
        Err(shed) => return refuse(dst, &shed),
    };
    let facts =
        Facts { workload: Arc::clone(&uid), identity: None, source: client.0.ip(), destination: dst.0 };
    let mut registered = shard.reauthorization.register(facts.clone(), None);
    let admission = match holder.run(shard.reauthorization.admit(&shard.mesh, &facts)).await {
        Ok(Some(admission)) => admission,
        Ok(None) => return refuse(dst, &UnknownWorkload(Named::Uid(uid))),
        Err(shed) => return refuse(dst, &shed),
    };
    let Admission { mesh, workload, decided: permit } = admission;
    let source = mesh.workload_at(&workload.network, client.0.ip()).cloned();
    let parties = Parties {
        source,
        // Who came is not known, and who was reached is.
        destination_identity: Some(workload.identity.clone()),
        service: service_behind(&mesh, &workload, dst.0.port(), None).cloned(),
        destination: Some(workload),
        ..Parties::unknown(Reporter::Destination)
    };
    drop(mesh);
    let addresses = Addresses { source: client.0, destination: dst.0, hbone: None };
    let report = shard.report(&pod, parties, addresses, None, dst.0);
    let delivered = match permit {
        Ok(permit) => {
            let mut first = Bytes::new();
            let delivered = deliver(permit, &shard, &pod, client.0, dst.0, &mut first);
            match registered.run(holder.run(delivered)).await {
                Ok(delivered) => delivered.unwrap_or_else(|shed| Err(DeliveryError::Shed(shed))),
                Err(closed) => Err(closed.into()),
            }
        }
        Err(denial) => Err(denial.into()),
    };
    match delivered {
        Ok(application) => {
            let relay =
                copy::Relay::new(front, ResetUnlessDone::new(application), Holders::One(holder), report);
            Some(EstablishedPlain { relay, registered, admitted, fronted })
        }
        Err(error) => {
            report.close(Err(error));
            None
        }
    }
}
