//! A node whose pods are enrolled by a node agent, which redirects their traffic itself.
//!
//! The other half of the composition: the mesh says who is who, the agent says which pods there are, and nothing is
//! loaded into the kernel. A new daemon is given the pods and the sockets of the one before it, if that is one of
//! ours; both listen on the same sockets until the old one stops. Beside another daemon it listens on ports of its
//! own, which share the number.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio::time::MissedTickBehavior;

use crate::admin::ready::Blocker;
use crate::admin::ready::Readiness;
use crate::app::CONTROL_SOCKET;
use crate::app::RunError;
use crate::app::Signals;
use crate::app::TAKE_OVER_WITHIN;
use crate::app::gone;
use crate::app::handover;
use crate::app::handover::Claim;
use crate::app::handover::Found;
use crate::app::handover::HandedPod;
use crate::app::handover::Outcome;
use crate::app::handover::Successors;
use crate::app::inpod::agent::Agent;
use crate::app::inpod::agent::Step;
use crate::app::make_run_dir;
use crate::app::memory::Housekeeping;
use crate::app::ports;
use crate::app::ports::Admin;
use crate::app::report_rejected;
use crate::capture;
use crate::config::resolved::Run;
use crate::config::resolved::Zds;
use crate::identity;
use crate::identity::worker::Identities;
use crate::mesh;
use crate::mesh::MeshReader;
use crate::mesh::MeshWriter;
use crate::model::identity::SpiffeId;
use crate::model::identity::TrustDomain;
use crate::net::bypass::Unguarded;
use crate::proxy::DataPlane;
use crate::shutdown;
use crate::standalone::authority::Authority;
use crate::standalone::file::Loaded;
use crate::standalone::watch;
use crate::standalone::watch::Updates;
use crate::telemetry::Telemetry;

mod agent;

/// What waits for the agent's snapshot, by the name that operators know from Istio.
const READINESS: &str = "workload proxy manager";
/// How long a predecessor is kept waiting for the agent's snapshot. Its pods are served by both meanwhile.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(5);
/// How long a predecessor is kept waiting for its pods to be taken over.
const INHERIT_WITHIN: Duration = Duration::from_secs(20);
/// How often it is looked whether there is memory to give back.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// The mesh, and what follows from it for this node.
struct World {
    writer: MeshWriter,
    reader: MeshReader,
    trust_domain: TrustDomain,
    identities: Identities,
}

impl World {
    fn publish(&mut self, loaded: Loaded) {
        let (new, old) = (loaded.mesh.trust_domain(), &self.trust_domain);
        if new != old {
            tracing::error!(%new, %old, "the changed mesh file is not applied: its trust domain is another one");
            return;
        }
        for warning in &loaded.warnings {
            tracing::debug!(%warning, "mesh file");
        }
        let (workloads, services) = (loaded.mesh.workloads().count(), loaded.mesh.services().count());
        let policies = loaded.mesh.policies().count();
        self.writer.publish(loaded.mesh);
        tracing::info!(workloads, services, policies, "mesh applied");
    }

    /// Asks for the certificates of the pods that are enrolled, and for no others.
    fn retain_identities(&self, agent: &Agent) {
        let mesh = self.reader.snapshot();
        let ids: HashSet<SpiffeId> = mesh
            .workloads()
            .filter(|workload| agent.serves(workload))
            .map(|workload| workload.identity.clone())
            .collect();
        self.identities.retain(ids);
    }
}

/// Ready only while the agent's snapshot is carried out.
struct Ready {
    readiness: Readiness,
    blocker: Option<Blocker>,
}

impl Ready {
    fn new(readiness: &Readiness) -> Self {
        Self { readiness: readiness.clone(), blocker: Some(readiness.block(READINESS)) }
    }

    fn follow(&mut self, agent: &Agent) {
        if !agent.is_reconciled() {
            self.blocker.get_or_insert_with(|| self.readiness.block(READINESS));
        } else if let Some(blocker) = self.blocker.take() {
            blocker.lift();
            tracing::info!(pods = agent.captured(), pending = agent.pending(), "ready");
        }
    }
}

/// [`super::run`] for such a node.
pub async fn serve(config: Run, zds: Zds, telemetry: Telemetry) -> Result<(), RunError> {
    let started = Instant::now();
    let mut signals = Signals::new()?;
    let (trigger, signal) = shutdown::channel();
    capture::rules::check(&zds.listeners)?;
    let run_dir = &config.places.run_dir;
    make_run_dir(run_dir)?;

    let mut updates = watch::watch(config.mesh.clone(), config.places.node.to_string(), signal.clone());
    let loaded = match updates.next().await {
        Some(Ok(loaded)) => loaded,
        Some(Err(diagnostics)) => return Err(RunError::Mesh(diagnostics)),
        None => return Ok(()),
    };
    let trust_domain = loaded.mesh.trust_domain().clone();
    let authority = Authority::open(&config.state_dir, &config.places.node, &trust_domain)?;
    let identities = identity::worker::start(Arc::new(authority), signal.clone());
    let (writer, reader) = mesh::mesh();
    let mut world = World { writer, reader: reader.clone(), trust_domain, identities: identities.clone() };
    // Decisions first: a pod that is served finds its workload.
    world.publish(loaded);
    let pins = &config.places.capture.pin_dir;
    if pins.exists() {
        let path = pins.display();
        tracing::warn!(%path, "this node also has pods that programs capture; `ztunnel uninstall` opens them");
    }
    let readiness = Readiness::new();
    let mut ready = Ready::new(&readiness);

    let data_plane = DataPlane::start(
        config.proxy.clone(),
        reader,
        identities,
        &telemetry,
        Arc::new(Unguarded),
        signal.clone(),
    );
    let data_plane = Arc::new(
        data_plane.map_err(|source| RunError::System("cannot start the data-plane threads", source))?,
    );
    ports::register_proxies(&telemetry, &data_plane);
    let mut agent = Agent::new(zds, Arc::clone(&config.places.node), Arc::clone(&data_plane));

    let socket = run_dir.join(CONTROL_SOCKET);
    let predecessor = match handover::ask(&socket).await {
        Found::Nobody => None,
        Found::Yielded(mut predecessor) => {
            match predecessor.pods().await {
                Ok(pods) => {
                    let (pid, pods_) = (&predecessor.pid, pods.len());
                    tracing::info!(pid, pods = pods_, "taking over from a running daemon");
                    agent.inherit(pods);
                    agent.settled(INHERIT_WITHIN).await;
                    world.retain_identities(&agent);
                }
                Err(error) => tracing::warn!(%error, "the running daemon does not hand its pods over"),
            }
            Some(predecessor)
        }
        Found::Late(predecessor) => {
            tracing::warn!("the running daemon does not answer; starting beside it");
            Some(predecessor)
        }
        Found::Stranger(error) => {
            tracing::warn!(%error, path = %socket.display(), "not a daemon of ours; starting beside it");
            None
        }
    };
    if predecessor.is_some() {
        // Until then the agent's next pod would find nobody.
        let within = tokio::time::timeout(SNAPSHOT_WITHIN, agent.reconciled()).await;
        if within.is_err() {
            tracing::warn!("no snapshot of the node agent yet; its pods are those of the daemon before");
        }
    }
    let admin = Admin::start(&config, &telemetry, &readiness, signal.clone())?;
    let mut departing = match predecessor {
        Some(predecessor) => Some(predecessor.done().await),
        None => None,
    };
    let successors = Successors::listen(&socket).map_err(|source| RunError::Path {
        what: "the control socket",
        path: socket.clone(),
        source,
    })?;
    tracing::info!(pods = agent.captured(), after = ?started.elapsed(), "serving");
    world.retain_identities(&agent);
    ready.follow(&agent);

    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut housekeeping = Housekeeping::default();
    let end = loop {
        tokio::select! {
            update = updates.next() => match update {
                Some(Ok(loaded)) => {
                    world.publish(loaded);
                    world.retain_identities(&agent);
                }
                Some(Err(diagnostics)) => report_rejected(&diagnostics),
                None => break End::Signal,
            },
            step = agent.next() => follow(step, &agent, &world, &mut ready),
            _ = look.tick() => housekeeping.look(LOOK_EVERY),
            () = gone(&mut departing) => departing = None,
            mut claim = successors.next() => {
                let pods = agent.handed();
                match claimed(&mut claim, &pods, &mut agent, &mut world, &mut ready, &mut updates, &mut signals).await {
                    Outcome::Done => break End::HandedOver(claim),
                    Outcome::Abandoned if !successors.is_current() => break End::Superseded,
                    Outcome::Abandoned => {
                        tracing::warn!("the daemon that was taking over is gone; this one goes on");
                        drop(claim);
                        // What the agent has told that one, it must tell this one.
                        agent.reconnect();
                    }
                }
            }
            () = signals.next() => break End::Signal,
        }
    };
    drop(admin);
    // Its hold on the listeners: the data plane has its own, and lets go of them after its linger.
    drop(agent);
    // A daemon that starts from now on finds nobody who would not answer it, and has ports of its own.
    drop(successors);
    let mut told = matches!(end, End::Signal);
    // Held to the end of the process: see `Claim::bye`.
    let mut held = None;
    match end {
        // Until the linger is over the listeners share their ports with whoever else has them.
        End::Signal => tracing::info!("stopping: pods are refused until a daemon is back"),
        End::Superseded => tracing::warn!("stopping: another daemon owns the node"),
        End::HandedOver(mut claim) => {
            tracing::info!("stopping: the node is handed over");
            // Before anybody is told that the node's streams are to go elsewhere.
            data_plane.hand_over_sockets();
            claim.bye().await;
            held = Some(claim);
        }
    }
    trigger.drain();
    let deadline = tokio::time::sleep(config.drain_deadline);
    tokio::pin!(deadline);
    loop {
        tokio::select! {
            () = data_plane.drained() => break,
            () = &mut deadline => {
                let open = data_plane.live().connections;
                tracing::warn!(open, "the drain deadline has passed; closing what is open");
                break;
            }
            // Whoever is still connected stays under the newest policy.
            update = updates.next() => if let Some(Ok(loaded)) = update { world.publish(loaded) },
            () = signals.next() => {
                if told {
                    tracing::warn!("told twice to stop; closing what is open");
                    break;
                }
                told = true;
                tracing::info!("told to stop: stopping already, once the open connections have ended");
            }
        }
    }
    trigger.close();
    data_plane.join();
    drop((held, departing));
    tracing::info!("stopped");
    Ok(())
}

/// Why the daemon stops serving.
enum End {
    /// It was told to, and nobody has taken over.
    Signal,
    /// Another daemon has its place at the control socket.
    Superseded,
    /// Another daemon took over, and waits for the ports.
    HandedOver(Claim),
}

fn follow(step: Step, agent: &Agent, world: &World, ready: &mut Ready) {
    if step == Step::Pods {
        world.retain_identities(agent);
    }
    ready.follow(agent);
}

/// Waits until a successor serves the node, or is gone, or has taken too long. This daemon goes on meanwhile.
async fn claimed(
    claim: &mut Claim,
    pods: &[HandedPod],
    agent: &mut Agent,
    world: &mut World,
    ready: &mut Ready,
    updates: &mut Updates,
    signals: &mut Signals,
) -> Outcome {
    let deadline = tokio::time::sleep(TAKE_OVER_WITHIN);
    tokio::pin!(deadline);
    let outcome = claim.outcome(pods);
    tokio::pin!(outcome);
    loop {
        tokio::select! {
            outcome = &mut outcome => return outcome,
            update = updates.next() => if let Some(Ok(loaded)) = update {
                world.publish(loaded);
                world.retain_identities(agent);
            },
            step = agent.next() => follow(step, agent, world, ready),
            () = &mut deadline => {
                tracing::error!("the daemon that was taking over does not get ready; going on");
                return Outcome::Abandoned;
            }
            // Told to stop in the middle: the successor has what it has.
            () = signals.next() => return Outcome::Done,
        }
    }
}
