//! This proxy's own pod as a server of the mesh: who scrapes its metrics from a pod that is enrolled comes by a tunnel.

use std::error::Error;
use std::sync::Arc;

use ztunnel_node::capture;
use ztunnel_node::net::netns::Netns;
use ztunnel_node::net::redirected::ClientAddress;
use ztunnel_node::net::redirected::Settings;
use ztunnel_node::proxy::DataPlane;
use ztunnel_node::proxy::PodSpec;
use ztunnel_node::proxy::pod::Own;

use crate::app::addresses::addresses;
use crate::config::resolved::Run;
use crate::config::resolved::SelfPod;

/// Takes tunnels to the metrics port, in the network namespace of this process. Its successor may share the port.
pub(super) fn serve(
    own: &SelfPod,
    config: &Run,
    data_plane: &DataPlane,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    // No rules of a node agent are here, so nothing needs a mark, and no client is impersonated: no route would lead
    // the answers back.
    let settings = Settings {
        mark: 0,
        client_address: ClientAddress::Hidden,
        keepalive: config.proxy.keepalive.clone(),
    };
    let ipv6 = config.metrics_addr.is_ipv6();
    let listening = capture::rules::Config { share_ports: true, ipv6, settings: settings.clone() };
    let listener = capture::rules::bind_here(&listening)?;
    let netns = Arc::new(Netns::current()?);
    let spec =
        PodSpec { uid: own.uid.clone(), workload: own.workload.clone(), addresses: addresses(&netns)? };
    let offered = Own { identity: own.identity.clone(), port: config.metrics_addr.port() };
    data_plane.add_own(spec, offered, listener, netns, Arc::new(settings))?;
    Ok(())
}
