//! A proxy of one workload: in the network namespace of this process, without a node agent.
//!
//! Whoever starts it redirects the workload's traffic, by rules that know this process by its user, its group or its
//! mark; or nobody does, and it serves tunnels only. It has no place to meet a daemon after it, but may share its ports
//! with one.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio::time::MissedTickBehavior;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::source::status;
use ztunnel_node::admin::console::Console;
use ztunnel_node::admin::dump::Sources;
use ztunnel_node::admin::quit;
use ztunnel_node::admin::ready::Readiness;
use ztunnel_node::capture;
use ztunnel_node::identity;
use ztunnel_node::net::bypass::Unguarded;
use ztunnel_node::net::netns::Netns;
use ztunnel_node::proxy;
use ztunnel_node::proxy::DataPlane;
use ztunnel_node::telemetry::Telemetry;
use ztunnel_node::telemetry::logging::Levels;
use ztunnel_runtime::shutdown;

use crate::app::LAST_ANSWER;
use crate::app::RunError;
use crate::app::Signals;
use crate::app::certificates;
use crate::app::descriptors::Descriptors;
use crate::app::inpod::LOOK_EVERY;
use crate::app::inpod::agent::addresses;
use crate::app::inpod::drain;
use crate::app::inpod::first_mesh;
use crate::app::inpod::world::World;
use crate::app::make_run_dir;
use crate::app::memory::Housekeeping;
use crate::app::ports;
use crate::app::ports::Ports;
use crate::app::version;
use crate::config::resolved::Alone;
use crate::config::resolved::Run;
use crate::config::resolved::Source;

/// What waits for the listeners, by the name that operators know from Istio.
const READINESS: &str = "proxy";

/// [`crate::app::run`] for such a workload.
pub async fn serve(config: Run, alone: Alone, telemetry: Telemetry, levels: Levels) -> Result<(), RunError> {
    let started = Instant::now();
    let (quit, asked) = quit::quit();
    let mut signals = Signals::new(asked)?;
    let (trigger, signal) = shutdown::channel();
    if let Source::Istiod { client, .. } = &config.mesh
        && let Some(directory) = client.cache.as_ref().and_then(|cache| cache.parent())
    {
        make_run_dir(directory)?;
    }

    let reserved = Ports::bind(&config)?;
    let (reloader, wishes) = status::reloads();
    let readiness = Readiness::new();
    let blocker = readiness.block(READINESS);
    // Before anything uses TLS.
    let trust = certificates::trust(&config, &telemetry, &readiness, &signal)?;
    let Some(mut world) = World::open(&config, &telemetry, &readiness, wishes, &signal).await? else {
        return Ok(());
    };
    let authority = certificates::authority(&config, &world.trust_domain())?;
    let kept = config.cert_cache.as_deref().map(certificates::kept_at).unwrap_or_default();
    let identities = identity::worker::start_with(authority, trust, kept, signal.clone());
    readiness.certificates(identities.clone());
    let _kept_until_the_end = certificates::keep(&config, &identities);
    let data_plane = DataPlane::start(
        config.proxy.clone(),
        world.reader(),
        identities.clone(),
        &telemetry,
        Arc::new(Unguarded),
        signal.clone(),
    );
    let data_plane = Arc::new(
        data_plane.map_err(|source| RunError::System("cannot start the data-plane threads", source))?,
    );
    // Nobody is waited for but the one.
    let waiting = watch::Sender::new(Arc::default());
    ports::register_components(&telemetry, &data_plane, waiting.subscribe(), identities.clone());
    ports::register_source(&telemetry, readiness.source());
    let sources = Sources {
        mesh: world.reader(),
        local: world.local(),
        identities: identities.clone(),
        data_plane: Arc::clone(&data_plane),
        waiting: waiting.subscribe(),
        source: readiness.source(),
        settings: config.settings.clone().into(),
        version: version::version("unknown"),
    };
    let console = Console::new(sources, levels, telemetry.clone(), quit, reloader);
    let admin = reserved.serve(&telemetry, &readiness, console, signal.clone())?;

    let serves = |workload: &Workload| alone.workload.is(workload);
    if !first_mesh(&mut world, None, &mut signals).await {
        tracing::info!("stopping: told to, before there was a mesh");
        trigger.close();
        // Who asked over HTTP is answered.
        let _late = tokio::time::timeout(LAST_ANSWER, signals.quit.answered()).await;
        data_plane.join();
        return Ok(());
    }
    world.retain_identities(&identities, serves, None);
    listen(&alone, &data_plane)?;
    blocker.lift();
    tracing::info!(workload = %alone.workload, after = ?started.elapsed(), "serving one workload");
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut housekeeping = Housekeeping::default();
    let mut descriptors = Descriptors::new(&readiness);
    let mut ready = false;
    loop {
        // The mesh may still be missing.
        if !ready && readiness.pending().is_empty() {
            ready = true;
            tracing::info!("ready");
        }
        tokio::select! {
            more = world.next() => match more {
                true => world.retain_identities(&identities, serves, None),
                false => break,
            },
            // Also for readiness, which may change without the mesh.
            _ = look.tick() => {
                housekeeping.look(LOOK_EVERY);
                descriptors.look();
            }
            () = signals.next() => break,
        }
    }
    drop(admin);
    tracing::info!("stopping: the workload is refused until a proxy is back");
    drain(&config, (&data_plane, None), &trigger, world, &mut signals, &mut true).await;
    tracing::info!("stopped");
    Ok(())
}

/// Listens for the workload, and takes its connections from now on.
fn listen(alone: &Alone, data_plane: &DataPlane) -> Result<(), RunError> {
    let here = |source| RunError::System("cannot see the network namespace", source);
    let netns = Arc::new(Netns::current().map_err(here)?);
    let bound = capture::rules::bind(&netns, &alone.listeners)?;
    let spec = proxy::PodSpec {
        uid: alone.uid.clone(),
        workload: alone.workload.clone(),
        addresses: addresses(&netns).map_err(here)?,
    };
    let listeners = proxy::Listeners {
        outbound: Arc::clone(&bound.outbound),
        inbound: Arc::clone(&bound.inbound),
        hbone: Arc::clone(&bound.hbone),
    };
    let settings = Arc::new(alone.listeners.settings.clone());
    data_plane.add_redirected_pod(spec, listeners, netns, settings).map_err(here)
}
