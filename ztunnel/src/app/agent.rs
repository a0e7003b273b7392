//! A node whose pods are enrolled by a node agent, which redirects their traffic itself.
//!
//! The mesh says who is who, the agent says which pods there are, and nothing is loaded into the kernel. A new daemon is
//! given the pods and the sockets of the one before it, if that is one of ours; both listen on the same sockets until the
//! old one stops. Beside another daemon it listens on ports of its own, which share the number.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_node::admin::ready::Blocker;
use ztunnel_node::admin::ready::Readiness;
use ztunnel_node::capture;
use ztunnel_node::dns::server::Dns;
use ztunnel_node::identity::worker::Identities;
use ztunnel_node::net::bypass::Unguarded;
use ztunnel_node::telemetry::Telemetry;
use ztunnel_node::telemetry::logging::Levels;

use crate::app::agent::pods::Agent;
use crate::app::agent::pods::Step;
use crate::app::base::Base;
use crate::app::base::Planes;
use crate::app::base::make_run_dir;
use crate::app::certificates;
use crate::app::daemon::Daemon;
use crate::app::daemon::Enrolment;
use crate::app::daemon::NotTakenBack;
use crate::app::error::RunError;
use crate::app::handover::Found;
use crate::app::handover::HandedPod;
use crate::app::handover::Predecessor;
use crate::app::lifecycle::Event;
use crate::app::lifecycle::Sockets;
use crate::app::meeting::CONTROL_SOCKET;
use crate::app::meeting::Meeting;
use crate::app::ports::Ports;
use crate::app::self_pod;
use crate::app::source::MeshSource;
use crate::config::resolved::Run;
use crate::config::resolved::Source;
use crate::config::resolved::Zds;

mod pods;

/// What waits for the agent's snapshot, by the name that operators know from Istio.
const READINESS: &str = "workload proxy manager";
/// How long a predecessor is kept waiting for the agent's snapshot. Its pods are served by both meanwhile.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(5);
/// How long a predecessor is kept waiting for its pods to be taken over.
const INHERIT_WITHIN: Duration = Duration::from_secs(20);

/// Everything that goes on while the node is served.
struct Node {
    source: MeshSource,
    agent: Agent,
    identities: Identities,
    /// For the next connection to the agent.
    new_agent: Box<dyn Fn() -> Agent>,
    planes: Planes,
    config: Arc<Run>,
    ready: Ready,
}

impl Node {
    /// Asks for the certificates that are needed here.
    fn retain_identities(&mut self) {
        let serves = |workload: &Workload| self.agent.serves(workload);
        self.source.retain_identities(&self.identities, serves, self.config.self_pod.as_ref());
    }

    /// Carries out what happens next. False where the process ends. Cancel-safe.
    async fn step(&mut self) -> bool {
        let step = tokio::select! {
            more = self.source.next() => match more {
                true => Step::Pods,
                false => return false,
            },
            step = self.agent.next() => step,
        };
        if self.source.take_confirmed() {
            self.agent.confirm();
        }
        if step == Step::Pods {
            self.retain_identities();
        }
        self.ready.follow(&self.agent);
        true
    }

    /// Serves the pods of another daemon, or of this one before it handed them over.
    async fn inherit(&mut self, pods: Vec<HandedPod>) {
        self.agent.inherit(pods);
        self.agent.settled(INHERIT_WITHIN).await;
        self.retain_identities();
    }

    /// Asks the daemon before this one for its pods, and serves them.
    async fn take_over(&mut self, found: Found) -> Option<Predecessor> {
        let predecessor = match found {
            Found::Nobody => return None,
            Found::Yielded(mut predecessor) => {
                match predecessor.pods().await {
                    Ok(pods) => {
                        let (pid, pods_) = (&predecessor.pid, pods.len());
                        tracing::info!(pid, pods = pods_, "taking over from a running daemon");
                        self.inherit(pods).await;
                    }
                    Err(error) => tracing::warn!(%error, "the running daemon does not hand its pods over"),
                }
                predecessor
            }
            Found::Late(predecessor) => {
                tracing::warn!("the running daemon does not answer; starting beside it");
                predecessor
            }
            Found::Stranger(error) => {
                let path = self.config.places.run_dir.join(CONTROL_SOCKET);
                tracing::warn!(%error, path = %path.display(), "not a daemon of ours; starting beside it");
                return None;
            }
        };
        // Until then the agent's next pod would find nobody.
        if tokio::time::timeout(SNAPSHOT_WITHIN, self.agent.reconciled()).await.is_err() {
            tracing::warn!("no snapshot of the node agent yet; its pods are those of the daemon before");
        }
        Some(predecessor)
    }

    /// Serves this proxy's own pod, if it is a server of the mesh.
    fn serve_self(&self) {
        if let Some(this) = &self.config.self_pod
            && let Err(error) = self_pod::serve(this, &self.config, &self.planes.data_plane)
        {
            tracing::warn!(
                error = &*error,
                "metrics are not to be had through a tunnel (HBONE), but directly"
            );
        }
    }
}

impl Enrolment for Node {
    const SOCKETS: Sockets = Sockets::Shared;
    const STOPPING: &'static str = "stopping: pods are refused until a daemon is back";
    type Work = bool;

    async fn next(&mut self) -> bool {
        self.step().await
    }

    async fn carry_out(&mut self, more: bool) -> Option<Event> {
        (!more).then_some(Event::SourceEnded)
    }

    async fn go_on_yielding(&mut self) -> Infallible {
        while self.step().await {}
        std::future::pending().await
    }

    async fn go_on_draining(&mut self) -> Infallible {
        while self.source.next().await {}
        std::future::pending().await
    }

    async fn yield_pods(&mut self) -> Vec<HandedPod> {
        self.agent.handed()
    }

    async fn reclaim(&mut self) {
        // What the agent has told the successor, it must tell this daemon.
        self.agent.reconnect();
    }

    async fn detach(&mut self) {
        // Its hold on the listeners: the data plane has its own, and lets go of them after its linger.
        self.agent = (self.new_agent)();
    }

    async fn take_back(&mut self, pods: Vec<HandedPod>, _departing: bool) -> Result<(), NotTakenBack> {
        self.planes.data_plane.serve_again();
        self.planes.dns.iter().for_each(|dns| dns.serve_again());
        self.inherit(pods).await;
        self.ready.follow(&self.agent);
        self.serve_self();
        Ok(())
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

/// Serves such a node.
pub(super) async fn serve(
    config: Run,
    zds: Zds,
    telemetry: Telemetry,
    levels: Levels,
) -> Result<(), RunError> {
    let (mut base, wishes) = Base::new(config, telemetry, levels)?;
    let config = Arc::clone(&base.config);
    capture::rules::check(&zds.listeners)?;
    let ports = Ports::bind(&config)?;
    make_run_dir(&config.places.run_dir)?;
    let ready = Ready::new(&base.readiness);
    let trust = base.trust()?;
    // Decisions first: a pod that is served finds its workload.
    let opened = MeshSource::open(&config, &base.telemetry, &base.readiness, wishes, &base.signal);
    let Some(source) = opened.await? else { return Ok(()) };
    let socket = config.places.run_dir.join(CONTROL_SOCKET);
    let inherited = certificates::inherited(&socket, config.cert_cache.as_deref()).await;
    let identities = base.identities(&source.trust_domain(), trust, inherited)?;
    warn_of_captured_pods(&config);

    let planes = planes(&base, &zds, &source, &identities)?;
    // Of whichever agent is the last.
    let (awaited, waiting) = watch::channel(Arc::default());
    let mut front = base.front((source.reader(), source.local()), &identities, &planes.data_plane, waiting);
    let new_agent = {
        let (node, origin, planes) =
            (Arc::clone(&config.places.node), base.readiness.source(), planes.clone());
        move || {
            let Planes { data_plane, dns } = planes.clone();
            Agent::new(zds.clone(), Arc::clone(&node), data_plane, dns, origin.clone(), awaited.clone())
        }
    };
    let mut node = Node {
        source,
        agent: new_agent(),
        new_agent: Box::new(new_agent),
        identities: identities.clone(),
        planes: planes.clone(),
        config: Arc::clone(&config),
        ready,
    };
    // Who waits for a control plane says so; its ports are not those of the daemon before it, which is another pod.
    let mut reserved = Some(ports);
    if matches!(config.mesh, Source::Istiod { .. } | Source::Nothing)
        && let Some(ports) = reserved.take()
    {
        front.answer(ports)?;
    }
    if !node.source.first_mesh(Some(&socket), &mut base.signals).await {
        base.end_early(&planes).await;
        return Ok(());
    }

    let mut meeting = Meeting::new(Some(socket), identities);
    let predecessor = node.take_over(meeting.ask().await).await;
    if let Some(ports) = reserved {
        front.answer(ports)?;
    }
    node.serve_self();
    meeting.finish(predecessor).await;
    meeting.take_place()?;
    front.keep();
    tracing::info!(pods = node.agent.captured(), after = ?base.started.elapsed(), "serving");
    node.retain_identities();
    node.ready.follow(&node.agent);
    Daemon::new(base, node, planes, front, meeting).run().await;
    Ok(())
}

/// Starts what moves bytes, and what answers for names.
fn planes(base: &Base, zds: &Zds, source: &MeshSource, identities: &Identities) -> Result<Planes, RunError> {
    let data_plane = base.data_plane(source.reader(), identities, Arc::new(Unguarded))?;
    let start = |names| Dns::start(names, source.reader(), &base.telemetry, base.signal.clone());
    let dns = zds.dns.clone().map(start).transpose();
    let dns = dns.map_err(|source| RunError::System("cannot start the thread for DNS", source))?;
    Ok(Planes { data_plane, dns: dns.map(Arc::new) })
}

fn warn_of_captured_pods(config: &Run) {
    let pins = &config.places.capture.pin_dir;
    if pins.exists() {
        let path = pins.display();
        tracing::warn!(%path, "this node also has pods that programs capture; `ztunnel uninstall` opens them");
    }
}
