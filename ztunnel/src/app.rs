//! The composition root: builds each component once, joins them by channels, and carries out what the pure
//! machines decide.
//!
//! Two kinds of threads: this module's control runtime (mesh, certificates, enrolment, hand-over, metrics), and
//! the data plane's own threads. Nothing here is on the way of a byte.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::Signal as UnixSignal;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;
use tokio::time::Instant;
use tokio::time::MissedTickBehavior;
use ztunnel_control::authority::AuthorityError;
use ztunnel_control::changes::Changes;
use ztunnel_control::changes::Next;
use ztunnel_mesh::source::status;
use ztunnel_mesh::store;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::MeshWriter;
use ztunnel_node::admin::console::Console;
use ztunnel_node::admin::dump::Sources;
use ztunnel_node::admin::quit;
use ztunnel_node::admin::ready::Blocker;
use ztunnel_node::admin::ready::Readiness;
use ztunnel_node::capture;
use ztunnel_node::identity;
use ztunnel_node::identity::inheritance;
use ztunnel_node::identity::worker::Identities;
use ztunnel_node::proxy::DataPlane;
use ztunnel_node::telemetry;
use ztunnel_node::telemetry::Telemetry;
use ztunnel_node::telemetry::logging;
use ztunnel_node::telemetry::logging::Levels;
use ztunnel_node::telemetry::writer;
use ztunnel_objects::diagnostic::Diagnostic;
use ztunnel_objects::file::Loaded;
use ztunnel_objects::file::Place;
use ztunnel_runtime::shutdown;
use ztunnel_tls::provider::TooLate;

use crate::app::announcements::Announcements;
use crate::app::control::Control;
use crate::app::descriptors::Descriptors;
use crate::app::handover::Claim;
use crate::app::handover::Departing;
use crate::app::handover::Found;
use crate::app::handover::Outcome;
use crate::app::handover::Successors;
use crate::app::kernel::Kernel;
use crate::app::kernel::Reconciled;
use crate::app::memory::Housekeeping;
use crate::app::ports::Again;
use crate::app::ports::Ports;
use crate::app::undo::Before;
use crate::config::resolved::Run;
use crate::config::resolved::Source;

mod announcements;
pub mod certificates;
mod closed;
pub mod commands;
pub mod control;
pub mod descriptors;
pub mod handover;
pub mod inpod;
pub mod kernel;
pub mod lifecycle;
pub mod memory;
pub mod ports;
pub mod privileges;
mod repeats;
pub mod undo;
pub mod version;

/// How often the kernel is compared with what it should hold.
const RECONCILE_EVERY: Duration = Duration::from_secs(2);
/// How long a successor may take from its first word to its last.
const TAKE_OVER_WITHIN: Duration = Duration::from_secs(60);
/// How long the end of the process waits for its last log lines to be written.
const LOG_PATIENCE: Duration = Duration::from_secs(2);
/// How long the end of the process waits for the answer to who asked for it to leave.
const LAST_ANSWER: Duration = Duration::from_secs(1);
/// The socket at which daemons of one node meet.
const CONTROL_SOCKET: &str = "control.sock";

/// Why the daemon does not start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The mesh has errors, and there is no last good one yet.
    #[error("the mesh file has errors:\n{}", lines(.0))]
    Mesh(Vec<Diagnostic>),
    /// Only a mesh file says which pods programs are to capture.
    #[error("a mesh of a control plane does not say which pods to capture: a node agent has to (--zds)")]
    NoPods,
    /// A directory or a socket of the daemon cannot be used.
    #[error("{what} {path:?} cannot be made (run as root, or name another directory with --run-dir)")]
    Path {
        /// What it is for.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An address cannot be listened on.
    #[error(
        "cannot listen on {address} ({what}): name another one with {flag}, or see who has it with \
         `ss -ltnp sport = :{port}`; the node is as it was", port = address.port()
    )]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What for.
        what: &'static str,
        /// What would name another one.
        flag: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The certificate authority.
    #[error("the certificate authority does not start")]
    Authority(#[from] AuthorityError),
    /// A port is not free.
    #[error(transparent)]
    Bind(#[from] capture::rules::BindError),
    /// A privilege is missing.
    #[error(transparent)]
    NotPermitted(#[from] capture::rules::NotPermitted),
    /// What TLS has to comply with.
    #[error("COMPLIANCE_POLICY")]
    Compliance(#[from] TooLate),
    /// So are these.
    #[error(transparent)]
    Privileges(#[from] privileges::Missing),
    /// The kernel.
    #[error("capture does not start")]
    Capture(#[from] capture::error::OpenError),
    /// The self-test.
    #[error("{0}")]
    SelfTest(String),
    /// The log.
    #[error("cannot set up the log")]
    Log(#[from] logging::AlreadyInstalled),
    /// Threads, signals, file descriptors.
    #[error("{0}")]
    System(&'static str, #[source] io::Error),
}

fn lines(diagnostics: &[Diagnostic]) -> String {
    diagnostics.iter().map(|diagnostic| format!("  {diagnostic}\n")).collect()
}

/// Serves the node until a signal, or until another daemon has taken over and every connection has ended.
pub fn run(config: Run) -> Result<(), RunError> {
    let log = writer::start_limited(Box::new(io::stdout()), config.log_format, config.access_log_rate)
        .map_err(|source| RunError::System("cannot start the log writer", source))?;
    let levels = logging::install(&config.log_filter, config.log_format, log.clone())?;
    let access_log = config.log_filter.access_log();
    let telemetry = Telemetry::new(telemetry::Config { access_log, ..telemetry::Config::default() }, log);
    raise_open_files();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), node = %config.places.node, "starting");
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let result = serve_on_a_runtime(config, telemetry.clone(), levels);
    // Whoever reads the log sees the end of it.
    telemetry.log().flush(LOG_PATIENCE);
    result
}

fn serve_on_a_runtime(config: Run, telemetry: Telemetry, levels: Levels) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| RunError::System("cannot start the control runtime", source))?;
    runtime.block_on(async {
        match (config.zds.clone(), config.alone.clone()) {
            (Some(zds), _) => inpod::serve(config, zds, telemetry, levels).await,
            (None, Some(alone)) => inpod::alone::serve(config, alone, telemetry, levels).await,
            (None, None) => serve(config, telemetry, levels).await,
        }
    })
}

/// Every connection is two or three sockets: the default soft limit is for programs that use select(2).
fn raise_open_files() {
    use nix::sys::resource::Resource::RLIMIT_NOFILE;
    if let Ok((_soft, hard)) = nix::sys::resource::getrlimit(RLIMIT_NOFILE)
        && let Err(error) = nix::sys::resource::setrlimit(RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, "the limit of open files stays low");
    }
}

async fn serve(config: Run, telemetry: Telemetry, levels: Levels) -> Result<(), RunError> {
    let started = Instant::now();
    let (quit, asked) = quit::quit();
    let mut signals = Signals::new(asked)?;
    let (trigger, signal) = shutdown::channel();

    privileges::check()?;
    let run_dir = &config.places.run_dir;
    make_run_dir(run_dir)?;

    let Source::File { path, strict } = &config.mesh else { return Err(RunError::NoPods) };
    // Before anything is captured: what is in the way of them is in the way of everything.
    let ports = Ports::bind(&config)?;
    let ready = Readiness::new();
    let (reloader, wishes) = status::reloads();
    let place = Place { path: path.clone(), node: Arc::clone(&config.places.node), strict: *strict };
    let opened = Changes::open(place, wishes, ready.source(), signal.clone());
    let Some((mut changes, loaded)) = opened.await.map_err(RunError::Mesh)? else { return Ok(()) };

    let trust_domain = loaded.mesh.trust_domain().clone();
    let authority = certificates::authority(&config, &trust_domain)?;
    let trust = certificates::trust(&config, &telemetry, &ready, &signal)?;
    let socket = run_dir.join(CONTROL_SOCKET);
    let inherited = certificates::inherited(&socket, config.cert_cache.as_deref()).await;
    let identities = identity::worker::start_with(authority, trust, inherited, signal.clone());
    ready.certificates(identities.clone());
    let left = identities.clone();
    let (writer, reader) = store::mesh();
    let pods_pending = ready.block("workload proxy manager");

    let verdict = capture::selftest::self_test(&config.places.capture);
    if !verdict.works {
        return Err(RunError::SelfTest(verdict.to_string()));
    }
    tracing::info!(%verdict, "capture self-test");

    // From here on the node's other daemon, if there is one, changes nothing any more.
    let predecessor = match handover::ask(&socket).await {
        Found::Nobody => None,
        Found::Yielded(predecessor) => {
            tracing::info!(pid = predecessor.pid, "taking over from a running daemon");
            Some(predecessor)
        }
        Found::Late(predecessor) => {
            tracing::warn!("the running daemon does not answer; taking over without it");
            Some(predecessor)
        }
        Found::Stranger(error) => {
            tracing::warn!(%error, path = %socket.display(), "not a daemon of ours; taking over without it");
            None
        }
    };

    let before = Before::look(&config.places.capture);
    let begun = begin(
        &config,
        (loaded, writer, reader),
        (identities.clone(), pods_pending, &ready),
        &telemetry,
        &signal,
    );
    let Serving { data_plane, kernel, mut control, mut announcements } = match begun.await {
        Ok(serving) => serving,
        Err(error) => {
            before.restore();
            return Err(error);
        }
    };
    let sources = Sources {
        mesh: control.reader(),
        local: Arc::default(),
        identities,
        data_plane: Arc::clone(&data_plane),
        waiting: control.waiting(),
        source: ready.source(),
        settings: config.settings.clone().into(),
        version: version::version("unknown"),
    };
    let console = Console::new(sources, levels, telemetry.clone(), quit, reloader);
    let serve_admin = |ports: Ports| ports.serve(&telemetry, &ready, console.clone(), signal.clone());
    let mut admin = match serve_admin(ports) {
        Ok(admin) => Some(admin),
        Err(error) => {
            before.restore_from(&mut control, &kernel, predecessor.is_some()).await;
            return Err(error);
        }
    };
    let mut departing = match predecessor {
        Some(predecessor) => Some(predecessor.done().await),
        None => None,
    };
    let listen = || {
        let left = left.clone();
        Successors::listen(&socket, Box::new(move || inheritance::encode(&left.usable())))
    };
    let mut successors = match listen() {
        Ok(successors) => successors,
        Err(source) => {
            before.restore_from(&mut control, &kernel, false).await;
            return Err(RunError::Path { what: "the control socket", path: socket, source });
        }
    };
    let mut kept = Some(certificates::keep(&config, &left));
    control.own(departing.is_some()).await;
    control.serving(started);

    let mut reconcile = tokio::time::interval(RECONCILE_EVERY);
    reconcile.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut housekeeping = Housekeeping::default();
    let mut descriptors = Descriptors::new(&ready);
    // Connections that go on after a hand-over are served until this daemon's own end; and if the daemon that took over
    // dies before, so is everything else again.
    let (mut told, mut until, mut held) = (false, None, Vec::new());
    let mut again = Again::default();
    loop {
        let end = loop {
            tokio::select! {
                next = changes.next() => match next {
                    Some(Next::Apply(loaded)) => control.apply(*loaded).await,
                    Some(Next::Confirmed) => control.confirm().await,
                    None => break End::Signal,
                },
                event = control.next() => control.step(event).await,
                _ = reconcile.tick() => match kernel.reconcile().await {
                    Reconciled::Repaired { repairs, lost } => {
                        housekeeping.look(RECONCILE_EVERY);
                        control.reconciled(repairs, lost).await;
                        descriptors.look();
                    }
                    Reconciled::Superseded => break End::Superseded,
                },
                () = announcements.next() => match kernel.reconcile_announced().await {
                    (Reconciled::Repaired { repairs, lost }, again) => {
                        announcements.answered(again);
                        control.reconciled(repairs, lost).await;
                    }
                    (Reconciled::Superseded, _) => break End::Superseded,
                },
                () = gone(&mut departing) => {
                    departing = None;
                    control.sweep().await;
                }
                mut claim = successors.next() => {
                    kernel.yield_node().await;
                    match claimed(&mut claim, &mut control, &mut changes, &mut signals, &mut told).await {
                        Outcome::Done => break End::HandedOver(claim),
                        // Another successor has come and gone by since then, or rather has stayed.
                        Outcome::Abandoned if !successors.is_current() => break End::Superseded,
                        Outcome::Abandoned => {
                            tracing::warn!("the daemon that was taking over is gone; this one goes on");
                            // It must not be told that all is well should it wake up.
                            drop(claim);
                            if let Err(error) = kernel.reclaim().await {
                                tracing::error!(%error, "some pods could not be taken back, trying again");
                            }
                            control.resume().await;
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
        let (mut claim, closed) = (None, matches!(end, End::Signal));
        match end {
            End::Signal => {
                told = true;
                tracing::info!("stopping: captured pods are closed until a daemon is back");
                if let Some(departing) = &mut departing {
                    departing.leave().await;
                }
                kernel.close().await;
            }
            End::Superseded => tracing::warn!("stopping: another daemon owns the node"),
            End::HandedOver(mut taken) => {
                tracing::info!("stopping: the node is handed over");
                taken.bye().await;
                // The data plane has its own hold on the listeners, and lets go of them after its linger.
                kernel.let_go().await;
                claim = Some(taken);
            }
        }
        if claim.is_none() {
            kernel.end().await;
            trigger.drain();
        }
        match closed {
            // Nobody comes any more: what is queued is taken, and that is all.
            true => data_plane.hand_over_sockets(),
            false => data_plane.stop_accepting(),
        }
        let deadline = until.unwrap_or_else(|| Instant::now() + config.drain_deadline);
        // Whether another daemon than the one that took over has called since.
        let mut called = false;
        let is_orphan = {
            let orphaned = orphaned(claim.as_mut(), &successors, &socket);
            tokio::pin!(orphaned);
            loop {
                tokio::select! {
                    () = data_plane.drained() => break false,
                    () = tokio::time::sleep_until(deadline) => {
                        tracing::warn!(open = data_plane.live().connections, "the drain deadline has passed; closing what is open");
                        break false;
                    }
                    () = &mut orphaned, if !called => break true,
                    // Whoever is still connected stays under the newest policy.
                    next = changes.next() => if let Some(Next::Apply(loaded)) = next { control.publish(*loaded) },
                    // A daemon that starts now learns that this one still has connections.
                    mut claim = successors.next() => {
                        called = true;
                        shutdown::spawn(async move {
                            if claim.outcome(&[]).await == Outcome::Done {
                                claim.bye().await;
                                // Held to the end of the process.
                                std::future::pending::<()>().await;
                            }
                        });
                    }
                    () = signals.next() => {
                        if told {
                            tracing::warn!("told twice to stop; closing what is open");
                            break false;
                        }
                        // Whoever replaced this daemon stops it now: that is no reason to cut connections off.
                        told = true;
                        tracing::info!("told to stop: stopping already, once the open connections have ended");
                    }
                }
            }
        };
        // To the end of the process: see `Claim::bye`.
        held.extend(claim);
        if !is_orphan {
            break;
        }
        tracing::warn!("the daemon that had taken over has died; taking the node back");
        // First the place where others ask: who starts now is to find this one.
        if !successors.is_current() {
            match listen() {
                Ok(listening) => successors = listening,
                Err(error) => {
                    tracing::error!(error = &error as &dyn std::error::Error, "the node stays closed");
                    break;
                }
            }
        }
        until = told.then_some(deadline);
        if let Err(error) = control.take_back(departing.is_some()).await {
            tracing::error!(error = &error as &dyn std::error::Error, "the node stays closed");
            break;
        }
        admin = again.attempt(|| Ports::bind(&config).and_then(&serve_admin));
        kept = Some(certificates::keep(&config, &left));
    }
    kernel.end().await;
    trigger.drain();
    trigger.close();
    if tokio::time::timeout(LAST_ANSWER, signals.quit.answered()).await.is_err() {
        tracing::debug!("who asked to stop was not answered in time");
    }
    data_plane.join();
    // Whoever waits for this daemon to be gone must not take that for the end of the one before it.
    if departing.is_some() && tokio::time::timeout(config.drain_deadline, gone(&mut departing)).await.is_err()
    {
        tracing::warn!("the daemon before this one is still there");
    }
    if let Some(departing) = &mut departing {
        departing.leave().await;
    }
    drop((held, successors));
    tracing::info!("stopped");
    Ok(())
}

/// What serves the node.
struct Serving {
    data_plane: Arc<DataPlane>,
    kernel: Kernel,
    control: Control,
    announcements: Announcements,
}

/// Opens the kernel's side, starts the data plane, and captures the pods. What fails here has captured nothing yet.
async fn begin(
    config: &Run,
    (loaded, writer, reader): (Loaded, MeshWriter, MeshReader),
    (identities, pods_pending, ready): (Identities, Blocker, &Readiness),
    telemetry: &Telemetry,
    signal: &shutdown::Signal,
) -> Result<Serving, RunError> {
    let mut node = capture::Node::open(config.places.capture.clone())?;
    if !node.knows_pods() {
        tracing::warn!(
            "no cgroup of pods was found: every process in the node's network namespace counts as the node's own, \
             whose probes pass (see --kubepods-cgroup)"
        );
    }
    let data_plane = DataPlane::start(
        config.proxy.clone(),
        reader.clone(),
        identities.clone(),
        telemetry,
        node.vouch(),
        signal.clone(),
    );
    let data_plane = Arc::new(
        data_plane.map_err(|source| RunError::System("cannot start the data-plane threads", source))?,
    );
    let counters = node.counter_reader()?;
    let devices_left = node.devices_left();
    let announcements = Announcements::new(node.announcements());
    let kernel = Kernel::start(node, Arc::clone(&data_plane))
        .map_err(|source| RunError::System("cannot start the capture thread", source))?;
    let source = ready.source();
    ports::register_capture(telemetry, counters, devices_left, kernel.closed());
    ports::register_source(telemetry, source.clone());
    shutdown::spawn(closed::blocks(kernel.closed(), ready.clone()));
    let mut control =
        Control::new((writer, reader), identities.clone(), kernel.clone(), pods_pending, source, &loaded);
    ports::register_components(telemetry, &data_plane, control.waiting(), identities);
    control.start(loaded).await;
    Ok(Serving { data_plane, kernel, control, announcements })
}

/// Who can write to it can tell the daemon to leave.
fn make_run_dir(path: &Path) -> Result<(), RunError> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| RunError::Path {
        what: "the run directory",
        path: path.to_owned(),
        source,
    })
}

/// Why the daemon stops serving.
enum End {
    /// It was told to, and nobody has taken over.
    Signal,
    /// Another daemon took over without a word.
    Superseded,
    /// Another daemon took over, and waits for the ports.
    HandedOver(Claim),
}

/// Waits until a successor serves the node, or is gone, or has taken too long.
async fn claimed(
    claim: &mut Claim,
    control: &mut Control,
    changes: &mut Changes,
    signals: &mut Signals,
    told: &mut bool,
) -> Outcome {
    let deadline = tokio::time::sleep(TAKE_OVER_WITHIN);
    tokio::pin!(deadline);
    let outcome = claim.outcome(&[]);
    tokio::pin!(outcome);
    loop {
        tokio::select! {
            outcome = &mut outcome => return outcome,
            // This daemon still serves, under the newest policy.
            next = changes.next() => if let Some(Next::Apply(loaded)) = next { control.publish(*loaded) },
            () = &mut deadline => {
                tracing::error!("the daemon that was taking over does not get ready; taking the node back");
                return Outcome::Abandoned;
            }
            // Told to stop in the middle: the successor has what it has, and takes the rest.
            () = signals.next() => {
                *told = true;
                return Outcome::Done;
            }
        }
    }
}

/// Waits until the daemon that took over has died, and nobody is in its place. For ever if that was not so then, or if
/// there is none.
async fn orphaned(claim: Option<&mut Claim>, successors: &Successors, socket: &Path) {
    let died = match claim {
        Some(claim) => claim.died().await,
        None => std::future::pending().await,
    };
    // It may have died before it had a place of its own; then this is the one where others ask.
    if !died || (!successors.is_current() && handover::is_served(socket).await) {
        std::future::pending().await
    }
}

/// Waits for that time, if there is one.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Waits for the end of the daemon before this one; for ever if there is none.
async fn gone(departing: &mut Option<Departing>) {
    match departing {
        Some(departing) => departing.gone().await,
        None => std::future::pending().await,
    }
}

/// SIGTERM, SIGINT and the request over HTTP, which mean the same.
struct Signals {
    terminate: UnixSignal,
    interrupt: UnixSignal,
    quit: quit::Asked,
}

impl Signals {
    fn new(quit: quit::Asked) -> Result<Self, RunError> {
        let listen =
            |kind| signal(kind).map_err(|source| RunError::System("cannot listen to signals", source));
        let (terminate, interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
        Ok(Self { terminate, interrupt, quit })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = self.quit.asked() => {}
        }
    }
}
