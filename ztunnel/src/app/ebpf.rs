//! A node whose pods are captured by programs in the kernel, as a mesh file says.

use std::convert::Infallible;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use ztunnel_control::changes::Changes;
use ztunnel_control::changes::Next;
use ztunnel_mesh::store;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::MeshWriter;
use ztunnel_node::admin::ready::Blocker;
use ztunnel_node::capture;
use ztunnel_node::enrol::pods;
use ztunnel_node::identity::worker::Identities;
use ztunnel_node::proxy::DataPlane;
use ztunnel_node::telemetry::Telemetry;
use ztunnel_node::telemetry::logging::Levels;
use ztunnel_objects::file::Loaded;
use ztunnel_objects::file::Place;
use ztunnel_runtime::shutdown;

use crate::app::announcements::Announcements;
use crate::app::base::Base;
use crate::app::base::Planes;
use crate::app::base::make_run_dir;
use crate::app::certificates;
use crate::app::closed;
use crate::app::control::Control;
use crate::app::daemon::Daemon;
use crate::app::daemon::Enrolment;
use crate::app::daemon::NotTakenBack;
use crate::app::error::RunError;
use crate::app::handover::Found;
use crate::app::handover::HandedPod;
use crate::app::handover::Predecessor;
use crate::app::kernel::Kernel;
use crate::app::kernel::Reconciled;
use crate::app::lifecycle::Event;
use crate::app::lifecycle::Sockets;
use crate::app::meeting::CONTROL_SOCKET;
use crate::app::meeting::Meeting;
use crate::app::ports;
use crate::app::ports::Ports;
use crate::app::privileges;
use crate::app::undo::Before;
use crate::config::resolved::Run;
use crate::config::resolved::Source;

/// What captures the pods.
struct Node {
    changes: Changes,
    control: Control,
    kernel: Kernel,
    announcements: Announcements,
}

/// What there is to be done.
enum Work {
    /// The mesh file has changed, or somebody has said that what is in doubt is meant.
    Source(Option<Next>),
    /// The capture thread has answered, or a pod is to be tried again.
    Pods(pods::Event),
    /// The kernel has announced something of a pod.
    Announced,
}

impl Node {
    async fn reconciled(&mut self, reconciled: Reconciled) -> Option<Event> {
        match reconciled {
            Reconciled::Repaired { repairs, lost } => {
                self.control.reconciled(repairs, lost).await;
                None
            }
            Reconciled::Superseded => Some(Event::Superseded),
        }
    }
}

impl Enrolment for Node {
    const SOCKETS: Sockets = Sockets::Swapped;
    const STOPPING: &'static str = "stopping: captured pods are closed until a daemon is back";
    type Work = Work;

    async fn next(&mut self) -> Work {
        tokio::select! {
            next = self.changes.next() => Work::Source(next),
            event = self.control.next() => Work::Pods(event),
            () = self.announcements.next() => Work::Announced,
        }
    }

    async fn carry_out(&mut self, work: Work) -> Option<Event> {
        match work {
            Work::Source(Some(Next::Apply(loaded))) => self.control.apply(*loaded).await,
            Work::Source(Some(Next::Confirmed)) => self.control.confirm().await,
            Work::Source(None) => return Some(Event::SourceEnded),
            Work::Pods(event) => self.control.step(event).await,
            Work::Announced => {
                let (reconciled, again) = self.kernel.reconcile_announced().await;
                self.announcements.answered(again);
                return self.reconciled(reconciled).await;
            }
        }
        None
    }

    async fn look(&mut self) -> Option<Event> {
        let reconciled = self.kernel.reconcile().await;
        self.reconciled(reconciled).await
    }

    async fn go_on_yielding(&mut self) -> Infallible {
        self.go_on_draining().await
    }

    async fn go_on_draining(&mut self) -> Infallible {
        while let Some(next) = self.changes.next().await {
            if let Next::Apply(loaded) = next {
                self.control.publish(*loaded);
            }
        }
        std::future::pending().await
    }

    async fn yield_pods(&mut self) -> Vec<HandedPod> {
        self.kernel.yield_node().await;
        Vec::new()
    }

    async fn reclaim(&mut self) {
        if let Err(error) = self.kernel.reclaim().await {
            tracing::error!(%error, "some pods could not be taken back, trying again");
        }
        self.control.resume().await;
    }

    async fn close(&mut self) {
        self.kernel.close().await;
    }

    async fn detach(&mut self) {
        self.kernel.end().await;
    }

    async fn let_go(&mut self) {
        self.kernel.let_go().await;
    }

    async fn sweep(&mut self) {
        self.control.sweep().await;
    }

    async fn take_back(&mut self, _pods: Vec<HandedPod>, departing: bool) -> Result<(), NotTakenBack> {
        self.control.take_back(departing).await.map_err(|error| {
            tracing::error!(error = &error as &dyn Error, "the node stays closed");
            NotTakenBack
        })
    }
}

/// Serves such a node.
pub(super) async fn serve(config: Run, telemetry: Telemetry, levels: Levels) -> Result<(), RunError> {
    let (base, wishes) = Base::new(config, telemetry, levels)?;
    let config = Arc::clone(&base.config);
    privileges::check()?;
    make_run_dir(&config.places.run_dir)?;
    let Source::File { path, strict } = &config.mesh else { return Err(RunError::NoPods) };
    // Before anything is captured: what is in the way of them is in the way of everything.
    let ports = Ports::bind(&config)?;
    let place = Place { path: path.clone(), node: Arc::clone(&config.places.node), strict: *strict };
    let opened = Changes::open(place, wishes, base.readiness.source(), base.signal.clone());
    let Some((changes, loaded)) = opened.await.map_err(RunError::Mesh)? else { return Ok(()) };

    let trust = base.trust()?;
    let socket = config.places.run_dir.join(CONTROL_SOCKET);
    let inherited = certificates::inherited(&socket, config.cert_cache.as_deref()).await;
    let identities = base.identities(loaded.mesh.trust_domain(), trust, inherited)?;
    let pods_pending = base.readiness.block("workload proxy manager");
    let verdict = capture::selftest::self_test(&config.places.capture);
    if !verdict.works {
        return Err(RunError::SelfTest(verdict.to_string()));
    }
    tracing::info!(%verdict, "capture self-test");

    // From here on the node's other daemon, if there is one, changes nothing any more.
    let mut meeting = Meeting::new(Some(socket.clone()), identities.clone());
    let predecessor = take_over(meeting.ask().await, &socket);
    let before = Before::look(&config.places.capture);
    let begun = begin(&base, changes, (loaded, store::mesh()), (identities.clone(), pods_pending)).await;
    let (mut node, data_plane) = begun.inspect_err(|_| before.restore())?;
    let mut front =
        base.front((node.control.reader(), Arc::default()), &identities, &data_plane, node.control.waiting());
    if let Err(error) = front.answer(ports) {
        before.restore_from(&mut node.control, &node.kernel, predecessor.is_some()).await;
        return Err(error);
    }
    meeting.finish(predecessor).await;
    if let Err(error) = meeting.take_place() {
        before.restore_from(&mut node.control, &node.kernel, false).await;
        return Err(error);
    }
    front.keep();
    node.control.own(meeting.predecessor.is_some()).await;
    node.control.serving(base.started);
    Daemon::new(base, node, Planes { data_plane, dns: None }, front, meeting).run().await;
    Ok(())
}

/// The daemon that is to be told when its pods are served here.
fn take_over(found: Found, socket: &Path) -> Option<Predecessor> {
    match found {
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
    }
}

/// Opens the kernel's side, starts the data plane, and captures the pods. What fails here has captured nothing yet.
async fn begin(
    base: &Base,
    changes: Changes,
    (loaded, (writer, reader)): (Loaded, (MeshWriter, MeshReader)),
    (identities, pods_pending): (Identities, Blocker),
) -> Result<(Node, Arc<DataPlane>), RunError> {
    let mut node = capture::Node::open(base.config.places.capture.clone())?;
    if !node.knows_pods() {
        tracing::warn!(
            "no cgroup of pods was found: every process in the node's network namespace counts as the node's own, \
             whose probes pass (see --kubepods-cgroup)"
        );
    }
    let data_plane = base.data_plane(reader.clone(), &identities, node.own_sockets())?;
    let counters = node.counter_reader()?;
    let devices_left = node.devices_left();
    let announcements = Announcements::new(node.announcements());
    let kernel = Kernel::start(node, Arc::clone(&data_plane))
        .map_err(|source| RunError::System("cannot start the capture thread", source))?;
    ports::register_capture(&base.telemetry, counters, devices_left, kernel.closed());
    shutdown::spawn(closed::blocks(kernel.closed(), base.readiness.clone()));
    let source = base.readiness.source();
    let mut control = Control::new((writer, reader), identities, kernel.clone(), pods_pending, source);
    control.start(loaded).await;
    Ok((Node { changes, control, kernel, announcements }, data_plane))
}
