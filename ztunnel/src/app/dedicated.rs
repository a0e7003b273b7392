//! A proxy of one workload: in the network namespace of this process, without a node agent.
//!
//! Whoever starts it redirects the workload's traffic, by rules that know this process by its user, its group or its
//! mark; or nobody does, and it serves tunnels only. It has no place to meet a daemon after it, but may share its ports
//! with one.

use std::convert::Infallible;
use std::sync::Arc;

use tokio::sync::watch;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_node::admin::ready::Readiness;
use ztunnel_node::capture;
use ztunnel_node::identity::worker::Identities;
use ztunnel_node::net::bypass::Unguarded;
use ztunnel_node::net::netns::Netns;
use ztunnel_node::proxy;
use ztunnel_node::proxy::DataPlane;
use ztunnel_node::telemetry::Telemetry;
use ztunnel_node::telemetry::logging::Levels;
use ztunnel_runtime::shutdown::Trigger;

use crate::app::addresses::addresses;
use crate::app::base::Base;
use crate::app::base::Planes;
use crate::app::base::make_run_dir;
use crate::app::certificates;
use crate::app::daemon::Daemon;
use crate::app::daemon::Enrolment;
use crate::app::error::RunError;
use crate::app::lifecycle::Event;
use crate::app::lifecycle::Sockets;
use crate::app::meeting::Meeting;
use crate::app::ports::Ports;
use crate::app::source::MeshSource;
use crate::config::resolved::Dedicated;
use crate::config::resolved::Run;
use crate::config::resolved::Source;

/// What waits for the listeners, by the name that operators know from Istio.
const READINESS: &str = "proxy";

/// The one workload.
struct One {
    source: MeshSource,
    identities: Identities,
    dedicated: Dedicated,
    readiness: Readiness,
    /// It was told that the daemon is ready.
    is_ready: bool,
    /// Certificates are kept until the process ends: nobody follows who could ask for them.
    _kept: Trigger,
}

impl One {
    fn retain_identities(&mut self) {
        let serves = |workload: &Workload| self.dedicated.workload.is(workload);
        self.source.retain_identities(&self.identities, serves, None);
    }

    /// Says so when the daemon is ready: when it listens, the mesh may still be missing.
    fn tell_ready(&mut self) {
        if !self.is_ready && self.readiness.pending().is_empty() {
            self.is_ready = true;
            tracing::info!("ready");
        }
    }
}

impl Enrolment for One {
    const SOCKETS: Sockets = Sockets::Shared;
    const STOPPING: &'static str = "stopping: the workload is refused until a proxy is back";
    type Work = bool;

    async fn next(&mut self) -> bool {
        self.source.next().await
    }

    async fn carry_out(&mut self, more: bool) -> Option<Event> {
        if !more {
            return Some(Event::SourceEnded);
        }
        self.retain_identities();
        self.tell_ready();
        None
    }

    async fn look(&mut self) -> Option<Event> {
        // Readiness may change without the mesh.
        self.tell_ready();
        None
    }

    async fn go_on_yielding(&mut self) -> Infallible {
        // Nobody asks.
        std::future::pending().await
    }

    async fn go_on_draining(&mut self) -> Infallible {
        while self.source.next().await {}
        std::future::pending().await
    }
}

/// Serves such a workload.
pub(super) async fn serve(
    config: Run,
    dedicated: Dedicated,
    telemetry: Telemetry,
    levels: Levels,
) -> Result<(), RunError> {
    let (mut base, wishes) = Base::new(config, telemetry, levels)?;
    let config = Arc::clone(&base.config);
    if let Source::Istiod { client, .. } = &config.mesh
        && let Some(directory) = client.cache.as_ref().and_then(|cache| cache.parent())
    {
        make_run_dir(directory)?;
    }
    let ports = Ports::bind(&config)?;
    let blocker = base.readiness.block(READINESS);
    let trust = base.trust()?;
    let opened = MeshSource::open(&config, &base.telemetry, &base.readiness, wishes, &base.signal);
    let Some(mut source) = opened.await? else { return Ok(()) };
    let kept = config.cert_cache.as_deref().map(certificates::kept_at).unwrap_or_default();
    let identities = base.identities(&source.trust_domain(), trust, kept)?;
    let kept = certificates::keep(&config, &identities);
    let data_plane = base.data_plane(source.reader(), &identities, Arc::new(Unguarded))?;
    // Nobody is waited for but the one.
    let (_nobody, waiting) = watch::channel(Arc::default());
    let mut front = base.front((source.reader(), source.local()), &identities, &data_plane, waiting);
    front.answer(ports)?;

    let planes = Planes { data_plane, dns: None };
    if !source.first_mesh(None, &mut base.signals).await {
        base.end_early(&planes).await;
        return Ok(());
    }
    let readiness = base.readiness.clone();
    let mut one =
        One { source, identities: identities.clone(), dedicated, readiness, is_ready: false, _kept: kept };
    one.retain_identities();
    listen(&one.dedicated, &planes.data_plane)?;
    blocker.lift();
    tracing::info!(workload = %one.dedicated.workload, after = ?base.started.elapsed(), "serving one workload");
    one.tell_ready();
    Daemon::new(base, one, planes, front, Meeting::new(None, identities)).run().await;
    Ok(())
}

/// Listens for the workload, and takes its connections from now on.
fn listen(dedicated: &Dedicated, data_plane: &DataPlane) -> Result<(), RunError> {
    let here = |source| RunError::System("cannot see the network namespace", source);
    let netns = Arc::new(Netns::current().map_err(here)?);
    let bound = capture::rules::bind(&netns, &dedicated.listeners)?;
    let spec = proxy::PodSpec {
        uid: dedicated.uid.clone(),
        workload: dedicated.workload.clone(),
        addresses: addresses(&netns).map_err(here)?,
    };
    let listeners = proxy::Listeners {
        outbound: Arc::clone(&bound.outbound),
        inbound: Arc::clone(&bound.inbound),
        hbone: Arc::clone(&bound.hbone),
    };
    let settings = Arc::new(dedicated.listeners.settings.clone());
    data_plane.add_redirected_pod(spec, listeners, netns, settings).map_err(here)
}
