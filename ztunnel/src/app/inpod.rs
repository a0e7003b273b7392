//! A node whose pods are enrolled by a node agent, which redirects their traffic itself.
//!
//! The other half of the composition: the mesh says who is who, the agent says which pods there are, and nothing is
//! loaded into the kernel. A new daemon is given the pods and the sockets of the one before it, if that is one of
//! ours; both listen on the same sockets until the old one stops. Beside another daemon it listens on ports of its
//! own, which share the number.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio::time::MissedTickBehavior;
use tokio::time::sleep_until;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::source::status;
use ztunnel_node::admin::console::Console;
use ztunnel_node::admin::dump::Sources;
use ztunnel_node::admin::quit;
use ztunnel_node::admin::ready::Blocker;
use ztunnel_node::admin::ready::Readiness;
use ztunnel_node::capture;
use ztunnel_node::dns::server::Dns;
use ztunnel_node::identity;
use ztunnel_node::identity::inheritance;
use ztunnel_node::identity::worker::Identities;
use ztunnel_node::net::bypass::Unguarded;
use ztunnel_node::proxy::DataPlane;
use ztunnel_node::telemetry::Telemetry;
use ztunnel_node::telemetry::logging::Levels;
use ztunnel_runtime::shutdown;
use ztunnel_runtime::shutdown::Trigger;

use crate::app::CONTROL_SOCKET;
use crate::app::LAST_ANSWER;
use crate::app::RunError;
use crate::app::Signals;
use crate::app::TAKE_OVER_WITHIN;
use crate::app::at;
use crate::app::certificates;
use crate::app::descriptors::Descriptors;
use crate::app::gone;
use crate::app::handover;
use crate::app::handover::Claim;
use crate::app::handover::Found;
use crate::app::handover::HandedPod;
use crate::app::handover::Outcome;
use crate::app::handover::Successors;
use crate::app::inpod::agent::Agent;
use crate::app::inpod::agent::Step;
use crate::app::inpod::world::World;
use crate::app::make_run_dir;
use crate::app::memory::Housekeeping;
use crate::app::ports;
use crate::app::ports::Again;
use crate::app::ports::Ports;
use crate::app::version;
use crate::config::resolved::OwnPod;
use crate::config::resolved::Run;
use crate::config::resolved::Source;
use crate::config::resolved::Zds;

mod agent;
pub mod alone;
mod own;
mod world;

/// What waits for the agent's snapshot, by the name that operators know from Istio.
const READINESS: &str = "workload proxy manager";
/// How long a predecessor is kept waiting for the agent's snapshot. Its pods are served by both meanwhile.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(5);
/// How long a predecessor is kept waiting for its pods to be taken over.
const INHERIT_WITHIN: Duration = Duration::from_secs(20);
/// How long the node agent is kept waiting for a first mesh: pods that start wait with it, and a daemon that serves
/// the pods beside this one loses half of their connections once this one listens.
const MESH_WITHIN: Duration = Duration::from_secs(2);
/// How often it is looked whether there is memory to give back.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How often a daemon that has handed over looks whether somebody serves the node, and how many looks in a row find
/// nobody before it believes that.
const ALONE_EVERY: Duration = Duration::from_secs(1);
const ALONE_LOOKS: u32 = 3;

/// Everything that goes on while the node is served.
struct Node {
    world: World,
    agent: Agent,
    identities: Identities,
    own: Option<OwnPod>,
    ready: Ready,
}

impl Node {
    /// Asks for the certificates that are needed here.
    fn retain_identities(&mut self) {
        let serves = |workload: &Workload| self.agent.serves(workload);
        self.world.retain_identities(&self.identities, serves, self.own.as_ref());
    }

    /// Carries out what happens next. False where the process ends. Cancel-safe.
    async fn next(&mut self) -> bool {
        let step = tokio::select! {
            more = self.world.next() => match more {
                true => Step::Pods,
                false => return false,
            },
            step = self.agent.next() => step,
        };
        if self.world.take_confirmed() {
            self.agent.confirm();
        }
        if step == Step::Pods {
            self.retain_identities();
        }
        self.ready.follow(&self.agent);
        true
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
pub async fn serve(config: Run, zds: Zds, telemetry: Telemetry, levels: Levels) -> Result<(), RunError> {
    let started = Instant::now();
    let (quit, asked) = quit::quit();
    let mut signals = Signals::new(asked)?;
    let (trigger, signal) = shutdown::channel();
    capture::rules::check(&zds.listeners)?;
    let reserved = Ports::bind(&config)?;
    let (reloader, wishes) = status::reloads();
    let run_dir = &config.places.run_dir;
    make_run_dir(run_dir)?;

    let readiness = Readiness::new();
    let ready = Ready::new(&readiness);
    // Before anything uses TLS.
    let trust = certificates::trust(&config, &telemetry, &readiness, &signal)?;
    // Decisions first: a pod that is served finds its workload.
    let Some(world) = World::open(&config, &telemetry, &readiness, wishes, &signal).await? else {
        return Ok(());
    };
    let authority = certificates::authority(&config, &world.trust_domain())?;
    let socket = run_dir.join(CONTROL_SOCKET);
    let inherited = certificates::inherited(&socket, config.cert_cache.as_deref()).await;
    let identities = identity::worker::start_with(authority, trust, inherited, signal.clone());
    readiness.certificates(identities.clone());
    let pins = &config.places.capture.pin_dir;
    if pins.exists() {
        let path = pins.display();
        tracing::warn!(%path, "this node also has pods that programs capture; `ztunnel uninstall` opens them");
    }

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
    let dns = match &zds.dns {
        Some(names) => {
            let dns = Dns::start(names.clone(), world.reader(), &telemetry, signal.clone());
            let dns = dns.map_err(|source| RunError::System("cannot start the thread for DNS", source))?;
            Some(Arc::new(dns))
        }
        None => None,
    };
    // Of whichever agent is the last.
    let (awaited, waiting) = watch::channel(Arc::default());
    let new_agent = || {
        let (node, data_plane) = (Arc::clone(&config.places.node), Arc::clone(&data_plane));
        Agent::new(zds.clone(), node, data_plane, dns.clone(), readiness.source(), awaited.clone())
    };
    let agent = new_agent();
    ports::register_source(&telemetry, readiness.source());
    ports::register_components(&telemetry, &data_plane, waiting.clone(), identities.clone());
    let sources = Sources {
        mesh: world.reader(),
        local: world.local(),
        identities: identities.clone(),
        data_plane: Arc::clone(&data_plane),
        waiting,
        source: readiness.source(),
        settings: config.settings.clone().into(),
        version: version::version("unknown"),
    };
    let console = Console::new(sources, levels, telemetry.clone(), quit, reloader);
    let serve_admin = |ports: Ports| ports.serve(&telemetry, &readiness, console.clone(), signal.clone());
    let own = config.own.clone();
    let mut node = Node { world, agent, identities: identities.clone(), own, ready };

    // Who waits for a control plane says so; its ports are not those of the daemon before it, which is another pod.
    let (mut admin, mut reserved) = match &config.mesh {
        Source::Istiod { .. } | Source::Nothing => (Some(serve_admin(reserved)?), None),
        Source::File { .. } => (None, Some(reserved)),
    };
    if !first_mesh(&mut node.world, Some(&socket), &mut signals).await {
        tracing::info!("stopping: told to, before there was a mesh");
        trigger.close();
        // Who asked over HTTP is answered.
        let _late = tokio::time::timeout(LAST_ANSWER, signals.quit.answered()).await;
        data_plane.join();
        dns.iter().for_each(|dns| dns.join());
        return Ok(());
    }
    let predecessor = match handover::ask(&socket).await {
        Found::Nobody => None,
        Found::Yielded(mut predecessor) => {
            match predecessor.pods().await {
                Ok(pods) => {
                    let (pid, pods_) = (&predecessor.pid, pods.len());
                    tracing::info!(pid, pods = pods_, "taking over from a running daemon");
                    node.agent.inherit(pods);
                    node.agent.settled(INHERIT_WITHIN).await;
                    node.retain_identities();
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
        let within = tokio::time::timeout(SNAPSHOT_WITHIN, node.agent.reconciled()).await;
        if within.is_err() {
            tracing::warn!("no snapshot of the node agent yet; its pods are those of the daemon before");
        }
    }
    if let Some(reserved) = reserved.take() {
        admin = Some(serve_admin(reserved)?);
    }
    let serve_own = || {
        if let Some(own) = &config.own
            && let Err(error) = own::serve(own, &config, &data_plane)
        {
            tracing::warn!(
                error = &*error,
                "metrics are not to be had through a tunnel (HBONE), but directly"
            );
        }
    };
    serve_own();
    let mut departing = match predecessor {
        Some(predecessor) => Some(predecessor.done().await),
        None => None,
    };
    let listen = || {
        let left = identities.clone();
        let legacy = Box::new(move || inheritance::encode(&left.usable()));
        Successors::listen(&socket, legacy).map_err(|source| RunError::Path {
            what: "the control socket",
            path: socket.clone(),
            source,
        })
    };
    let mut successors = listen()?;
    let mut kept = Some(certificates::keep(&config, &identities));
    tracing::info!(pods = node.agent.captured(), after = ?started.elapsed(), "serving");
    node.retain_identities();
    node.ready.follow(&node.agent);

    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut housekeeping = Housekeeping::default();
    let mut descriptors = Descriptors::new(&readiness);
    // Connections that go on after a hand-over are served until this daemon's own end; and if the daemon that took over
    // dies before, so is everything else again.
    let (mut told, mut until, mut held) = (false, None, Vec::new());
    let mut again = Again::default();
    loop {
        let end = loop {
            tokio::select! {
                more = node.next() => if !more {
                    break End::Signal;
                },
                _ = look.tick() => {
                    housekeeping.look(LOOK_EVERY);
                    descriptors.look();
                }
                () = gone(&mut departing) => departing = None,
                mut claim = successors.next() => {
                    let pods = node.agent.handed();
                    match claimed(&mut claim, &pods, &mut node, &mut signals, &mut told).await {
                        Outcome::Done => break End::HandedOver(claim, pods),
                        Outcome::Abandoned if !successors.is_current() => break End::Superseded,
                        Outcome::Abandoned => {
                            tracing::warn!("the daemon that was taking over is gone; this one goes on");
                            drop(claim);
                            // What the agent has told that one, it must tell this one.
                            node.agent.reconnect();
                        }
                    }
                }
                () = at(again.due()) => admin = again.attempt(|| Ports::bind(&config).and_then(&serve_admin)),
                () = signals.next() => break End::Signal,
                () = at(until) => break End::Signal,
            }
        };
        drop(admin.take());
        again.give_up();
        drop(kept.take());
        // Its hold on the listeners: the data plane has its own, and lets go of them after its linger.
        node.agent = new_agent();
        // A daemon that starts from now on finds nobody who would not answer it, and has ports of its own.
        drop(successors);
        let (mut claim, mut handed) = (None, Vec::new());
        match end {
            // Until the linger is over the listeners share their ports with whoever else has them.
            End::Signal => {
                told = true;
                tracing::info!("stopping: pods are refused until a daemon is back");
                if let Some(departing) = &mut departing {
                    departing.leave().await;
                }
            }
            End::Superseded => tracing::warn!("stopping: another daemon owns the node"),
            End::HandedOver(mut taken, pods) => {
                tracing::info!("stopping: the node is handed over");
                // Before anybody is told that the node's streams are to go elsewhere.
                data_plane.hand_over_sockets();
                dns.iter().for_each(|dns| dns.hand_over_sockets());
                taken.bye().await;
                if taken.has_all_pods() {
                    // Should the other daemon die, what connects meanwhile waits at the sockets that both have.
                    handed = pods;
                }
                claim = Some(taken);
            }
        }
        if handed.is_empty() {
            trigger.drain();
        }
        let deadline = until.unwrap_or_else(|| Instant::now() + config.drain_deadline);
        let watched = claim.as_mut().filter(|_| !handed.is_empty());
        let drained = drained(
            (&data_plane, dns.as_deref()),
            (&mut node.world, &mut signals, &mut told),
            deadline,
            orphaned(watched, &mut handed, &socket),
        );
        let is_orphan = matches!(drained.await, Drained::Orphaned);
        // To the end of the process: see `Claim::bye`.
        held.extend(claim);
        if !is_orphan {
            break;
        }
        tracing::warn!("the daemon that had taken over has died; taking the node back");
        // First the place where others ask: who starts now is to find this one.
        match listen() {
            Ok(listening) => successors = listening,
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "the pods stay refused");
                break;
            }
        }
        until = told.then_some(deadline);
        data_plane.serve_again();
        dns.iter().for_each(|dns| dns.serve_again());
        node.agent.inherit(handed);
        node.agent.settled(INHERIT_WITHIN).await;
        node.retain_identities();
        node.ready.follow(&node.agent);
        serve_own();
        admin = again.attempt(|| Ports::bind(&config).and_then(&serve_admin));
        kept = Some(certificates::keep(&config, &identities));
    }
    close((&data_plane, dns.as_deref()), &trigger, &mut signals).await;
    if let Some(departing) = &mut departing {
        departing.leave().await;
    }
    drop((held, departing));
    if config.kept_running && !told {
        stay(&socket, &mut signals).await;
    }
    tracing::info!("stopped");
    Ok(())
}

/// Lets what is open end, for as long as that may take, and ends the data plane. `told`: whether the daemon was told to
/// stop already, and whether it is then.
async fn drain(
    config: &Run,
    planes: (&DataPlane, Option<&Dns>),
    trigger: &Trigger,
    mut world: World,
    signals: &mut Signals,
    told: &mut bool,
) {
    trigger.drain();
    let deadline = Instant::now() + config.drain_deadline;
    drained(planes, (&mut world, signals, told), deadline, std::future::pending()).await;
    close(planes, trigger, signals).await;
}

/// How a drain ended.
enum Drained {
    /// Nothing is open any more, or not for longer.
    Over,
    /// The daemon that had taken over is gone, and nobody is in its place.
    Orphaned,
}

/// Lets what is open end, until `deadline` at most, or until `orphaned` says that somebody has to serve again.
async fn drained(
    (data_plane, dns): (&DataPlane, Option<&Dns>),
    (world, signals, told): (&mut World, &mut Signals, &mut bool),
    deadline: Instant,
    orphaned: impl Future<Output = ()>,
) -> Drained {
    let drained = async {
        data_plane.drained().await;
        if let Some(dns) = dns {
            dns.drained().await;
        }
    };
    tokio::pin!(drained, orphaned);
    loop {
        tokio::select! {
            () = &mut drained => return Drained::Over,
            () = &mut orphaned => return Drained::Orphaned,
            () = sleep_until(deadline) => {
                let open = data_plane.live().connections;
                tracing::warn!(open, "the drain deadline has passed; closing what is open");
                return Drained::Over;
            }
            // Whoever is still connected stays under the newest policy.
            true = world.next() => {}
            () = signals.next() => {
                if *told {
                    tracing::warn!("told twice to stop; closing what is open");
                    return Drained::Over;
                }
                *told = true;
                tracing::info!("told to stop: stopping already, once the open connections have ended");
            }
        }
    }
}

/// Ends the data plane, with whatever is still open.
async fn close((data_plane, dns): (&DataPlane, Option<&Dns>), trigger: &Trigger, signals: &mut Signals) {
    trigger.drain();
    trigger.close();
    if tokio::time::timeout(LAST_ANSWER, signals.quit.answered()).await.is_err() {
        tracing::debug!("who asked to stop was not answered in time");
    }
    data_plane.join();
    if let Some(dns) = dns {
        dns.join();
    }
}

/// Waits until the daemon that took over has died, and nobody is in its place. For ever if that was not so then, or if
/// there is none.
async fn orphaned(claim: Option<&mut Claim>, handed: &mut Vec<HandedPod>, socket: &Path) {
    let died = match claim {
        Some(claim) => claim.died().await,
        None => std::future::pending().await,
    };
    if !died || handover::is_served(socket).await {
        // Nobody here will accept what waits at these sockets.
        handed.clear();
        std::future::pending().await
    }
}

/// Why the daemon stops serving.
enum End {
    /// It was told to, and nobody has taken over.
    Signal,
    /// Another daemon has its place at the control socket.
    Superseded,
    /// Another daemon took over, and waits for the ports; with what it could have of this one.
    HandedOver(Claim, Vec<HandedPod>),
}

/// Kubernetes starts what has ended again, and that would take the node back from the daemon it was handed to. Waits to
/// be told to stop, or until nobody serves the node any more.
async fn stay(socket: &Path, signals: &mut Signals) {
    tracing::info!("handed over: waiting to be told to stop");
    let mut alone = 0;
    while alone < ALONE_LOOKS {
        tokio::select! {
            () = signals.next() => return,
            () = tokio::time::sleep(ALONE_EVERY) => {
                alone = if handover::is_served(socket).await { 0 } else { alone + 1 };
            }
        }
    }
    tracing::warn!("the daemon that had taken over is gone: ending, to be started again");
}

/// Waits for a first mesh: for as long as another daemon serves the node, which need not stop for one that could not;
/// else only a little. It would answer at `socket`. False where this one is told to stop.
async fn first_mesh(world: &mut World, socket: Option<&Path>, signals: &mut Signals) -> bool {
    let mut look = Instant::now() + MESH_WITHIN;
    loop {
        tokio::select! {
            () = world.current() => return true,
            () = signals.next() => return false,
            // What was kept of it is better than nothing, and not as good as what it is about to say.
            () = sleep_until(look) => {
                if world.is_known() {
                    return true;
                }
                let served = match socket {
                    Some(socket) => handover::is_served(socket).await,
                    None => false,
                };
                if !served {
                    tracing::warn!("no mesh yet: what pods send is refused until the control plane answers");
                    return true;
                }
                tracing::info!("no mesh yet: the running daemon goes on");
                look = Instant::now() + MESH_WITHIN;
            }
        }
    }
}

/// Waits until a successor serves the node, or is gone, or has taken too long. This daemon goes on meanwhile.
async fn claimed(
    claim: &mut Claim,
    pods: &[HandedPod],
    node: &mut Node,
    signals: &mut Signals,
    told: &mut bool,
) -> Outcome {
    let deadline = tokio::time::sleep(TAKE_OVER_WITHIN);
    tokio::pin!(deadline);
    let outcome = claim.outcome(pods);
    tokio::pin!(outcome);
    loop {
        tokio::select! {
            outcome = &mut outcome => return outcome,
            true = node.next() => {}
            () = &mut deadline => {
                tracing::error!("the daemon that was taking over does not get ready; going on");
                return Outcome::Abandoned;
            }
            // Told to stop in the middle: the successor has what it has.
            () = signals.next() => {
                *told = true;
                return Outcome::Done;
            }
        }
    }
}
