//! What the mesh says, carried out: published to the data plane, and pod by pod in the kernel.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::time::Instant;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::source::loss::Caution;
use ztunnel_mesh::source::loss::Census;
use ztunnel_mesh::source::loss::Change;
use ztunnel_mesh::source::loss::Verdict;
use ztunnel_mesh::source::pod::Awaited;
use ztunnel_mesh::source::pod::LocalPod;
use ztunnel_mesh::source::status::REMEDY;
use ztunnel_mesh::source::status::Source;
use ztunnel_mesh::source::status::Trouble;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::MeshWriter;
use ztunnel_node::admin::ready::Blocker;
use ztunnel_node::capture::error::EnrolError;
use ztunnel_node::capture::reconcile::Repair;
use ztunnel_node::enrol::pods::Action;
use ztunnel_node::enrol::pods::Event;
use ztunnel_node::enrol::pods::Pods;
use ztunnel_node::identity::worker::Identities;
use ztunnel_objects::diagnostic::Diagnostic;
use ztunnel_objects::file::Loaded;

use crate::app::kernel::Kernel;

/// How long the start waits for the local workloads' certificates, so that the first connections find them.
const WARM_UP: Duration = Duration::from_secs(2);
/// How long a start that failed takes to release what it captured.
const UNDO_WITHIN: Duration = Duration::from_secs(10);
/// Answers of the capture thread on their way: more than pods can be under way, because the capture thread and
/// the control runtime must not both wait for the other.
const EVENTS: usize = 2048;

/// Whose certificates this node needs.
fn local_identities(loaded: &Loaded) -> HashSet<SpiffeId> {
    let workloads = loaded.pods.iter().filter_map(|pod| loaded.mesh.workload(&pod.workload));
    workloads.map(|workload| workload.identity.clone()).collect()
}

/// What the mesh says, carried out.
pub struct Control {
    writer: MeshWriter,
    reader: MeshReader,
    /// Of the mesh in force.
    census: Census,
    /// Whether the pods that an earlier daemon captured, and that the mesh does not name, are withdrawn.
    earlier: Caution<()>,
    /// What withdrawn pods' open connections need stays, as an earlier daemon may still have some.
    held: bool,
    /// The pods that earlier daemons had captured when this one started.
    recorded: HashSet<PodUid>,
    source: Source,
    identities: Identities,
    kernel: Kernel,
    pods: Pods,
    /// Those that the newest version of the mesh wants.
    desired: Vec<LocalPod>,
    /// The pods that are not captured yet, for those who ask.
    waiting: watch::Sender<Arc<[Awaited]>>,
    events: mpsc::Sender<Event>,
    answers: mpsc::Receiver<Event>,
    wake: Option<Instant>,
    /// Held until every pod was captured for the first time.
    blocker: Option<Blocker>,
    serving: bool,
    /// The last change of the mesh is not yet carried out in the kernel.
    settling: bool,
    /// What was to be said about the version of the mesh in force.
    warned: HashSet<Diagnostic>,
}

impl Control {
    /// Carries out nothing yet. `blocker` is lifted when every pod was captured for the first time.
    pub fn new(
        (writer, reader): (MeshWriter, MeshReader),
        identities: Identities,
        kernel: Kernel,
        blocker: Blocker,
        source: Source,
    ) -> Self {
        let (events, answers) = mpsc::channel(EVENTS);
        Self {
            writer,
            reader,
            census: Census::default(),
            earlier: Caution::default(),
            held: false,
            recorded: HashSet::new(),
            source: source.of("the withdrawal of pods that an earlier daemon captured"),
            identities,
            kernel,
            pods: Pods::default(),
            desired: Vec::new(),
            waiting: watch::Sender::new(Arc::default()),
            events,
            answers,
            wake: None,
            blocker: Some(blocker),
            serving: false,
            settling: false,
            warned: HashSet::new(),
        }
    }

    /// For those who decide from the mesh.
    pub fn reader(&self) -> MeshReader {
        self.reader.clone()
    }

    /// The pods that should be captured and are not yet, now and from now on.
    pub fn waiting(&self) -> watch::Receiver<Arc<[Awaited]>> {
        self.waiting.subscribe()
    }

    /// The first version of the mesh: returns when every pod was tried once, so that a predecessor is let go only
    /// when there is somebody in its place.
    pub async fn start(&mut self, loaded: Loaded) {
        let identities = local_identities(&loaded);
        self.recorded = self.kernel.recorded().await.into_iter().map(|(uid, _)| uid).collect();
        self.apply(loaded).await;
        self.warm_up(identities).await;
        self.settle().await;
    }

    /// From here on nobody else changes the kernel. What earlier daemons captured and the mesh no longer names is
    /// withdrawn, unless that is in doubt; if one of them is still `departing`, what its open connections need stays for
    /// now.
    pub async fn own(&mut self, departing: bool) {
        self.held = departing;
        self.kernel.hold(departing).await;
        let change = self.earlier_change().await;
        match self.earlier.offer((), change, Instant::now()) {
            Some(()) => self.withdraw_earlier().await,
            None => {
                self.tell_earlier(true);
                tracing::warn!(
                    "pods that an earlier daemon captured, and that the mesh does not name, stay captured and closed"
                );
            }
        }
    }

    /// No earlier daemon is left: nor shall be what they left.
    pub async fn sweep(&mut self) {
        self.held = false;
        self.kernel.hold(false).await;
        if self.earlier.doubt().is_none() {
            self.kernel.sweep(self.pods.known().cloned().collect()).await;
        }
    }

    /// Whatever is in doubt is meant.
    pub async fn confirm(&mut self) {
        if self.earlier.confirm().is_some() {
            self.withdraw_earlier().await;
        }
    }

    async fn withdraw_earlier(&mut self) {
        self.source.cleared();
        self.kernel.withdraw_others(self.pods.known().cloned().collect()).await;
        if !self.held {
            self.sweep().await;
        }
    }

    async fn judge_earlier_again(&mut self) {
        let change = self.earlier_change().await;
        match self.earlier.again(|()| change, Instant::now()) {
            Some(()) => self.withdraw_earlier().await,
            None => self.tell_earlier(false),
        }
    }

    async fn earlier_change(&self) -> Change {
        let recorded = self.kernel.recorded().await;
        let exist: HashSet<PodUid> =
            recorded.iter().filter(|(_, exists)| *exists).map(|(uid, _)| uid.clone()).collect();
        let captured = recorded.into_iter().map(|(uid, _)| uid);
        Change::since_last_daemon(captured, &self.census, |uid| !exist.contains(uid))
    }

    fn tell_earlier(&self, new: bool) {
        let Some((change, verdict)) = self.earlier.doubt() else { return };
        let trouble = if verdict == Verdict::Hold { Trouble::Held } else { Trouble::Waiting };
        self.source.refused(trouble, vec![change.to_string()], new);
        if new && trouble == Trouble::Held {
            tracing::error!(reason = %change, "{} is held; {REMEDY}", self.source.what());
        }
    }

    /// Releases what no earlier daemon had captured, and waits a while for that: the start has failed.
    pub async fn withdraw_new(&mut self) {
        let new: HashSet<PodUid> =
            self.pods.known().filter(|uid| !self.recorded.contains(*uid)).cloned().collect();
        for uid in &new {
            self.step(Event::Unwanted(uid.clone())).await;
        }
        let released = async {
            while self.pods.known().any(|uid| new.contains(uid)) {
                let event = self.next().await;
                self.step(event).await;
            }
        };
        if tokio::time::timeout(UNDO_WITHIN, released).await.is_err() {
            tracing::error!("not every pod could be released; `ztunnel uninstall` opens them");
        }
    }

    /// From now on the daemon serves: it is ready as soon as no pod is missing.
    pub fn serving(&mut self, started: Instant) {
        self.serving = true;
        let (pods, pending) = (self.pods.captured(), self.pods.pending());
        tracing::info!(pods, pending, after = ?started.elapsed(), "serving");
        self.lift_when_settled();
    }

    /// Waits for what is next to be done here: an answer of the capture thread, or the time of a retry.
    pub async fn next(&mut self) -> Event {
        let due = async {
            match self.wake {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let again = self.earlier.wake();
        let doubtful = async {
            match again {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = doubtful => Event::Tick,
            // `events` is kept here, so there is always another answer to wait for.
            Some(event) = self.answers.recv() => event,
            () = due => {
                self.wake = None;
                Event::Tick
            }
        }
    }

    /// Publishes a version of the mesh without touching the kernel: whoever is still connected to a daemon that
    /// stops stays under the newest policy.
    pub fn publish(&mut self, loaded: Loaded) {
        self.writer.publish(loaded.mesh);
        (self.desired, self.census) = (loaded.pods, loaded.census);
    }

    /// Takes the node back from a daemon that served it and died; `departing` as for [`Self::own`]. What the mesh has
    /// wanted since then is carried out. Pods that cannot be taken back stay closed and are tried again; an error is
    /// that of the node as a whole.
    pub async fn take_back(&mut self, departing: bool) -> Result<(), EnrolError> {
        for uid in self.kernel.take_back().await? {
            self.step(Event::CaptureFailed(uid)).await;
        }
        self.resume().await;
        self.own(departing).await;
        Ok(())
    }

    /// Carries out what the mesh has come to want while another daemon changed the kernel.
    pub async fn resume(&mut self) {
        self.settling = true;
        self.step(Event::Desired(self.desired.clone())).await;
    }

    /// Brings a new version of the mesh into force: decisions first, so that a pod that is captured by it already
    /// finds its workload.
    pub async fn apply(&mut self, loaded: Loaded) {
        self.identities.retain(local_identities(&loaded));
        // What was said when the last version was applied needs no repetition.
        for warning in loaded.warnings.iter().filter(|warning| !self.warned.contains(warning)) {
            tracing::warn!(%warning, "mesh file");
        }
        self.warned = loaded.warnings.into_iter().collect();
        let mesh = &loaded.mesh;
        let (workloads, services) = (mesh.workloads().len(), mesh.services_len());
        let (policies, local) = (mesh.policies().len(), loaded.pods.len());
        self.writer.publish(loaded.mesh);
        self.census = loaded.census;
        tracing::info!(workloads, services, policies, local, "mesh applied");
        self.settling = true;
        self.desired.clone_from(&loaded.pods);
        self.step(Event::Desired(loaded.pods)).await;
    }

    /// Advances enrolment by one event.
    pub async fn step(&mut self, event: Event) {
        if self.earlier.wake().is_some_and(|at| at <= Instant::now()) {
            self.judge_earlier_again().await;
        }
        let told = matches!(event, Event::Desired(_));
        let actions = self.pods.step(event, Instant::now());
        if told || self.waiting.borrow().len() != self.pods.pending() {
            self.waiting.send_replace(self.pods.waiting().map(Awaited::from).collect());
        }
        for action in actions {
            match action {
                Action::Capture(pod) => self.kernel.capture(pod, self.events.clone()).await,
                Action::Release(uid) => self.kernel.release(uid, self.events.clone()).await,
                Action::WakeAt(at) => self.wake = Some(at),
            }
        }
        if self.settling && self.pods.is_settled() {
            self.settling = false;
            tracing::info!(captured = self.pods.captured(), "every pod is as the mesh says");
        }
        self.lift_when_settled();
    }

    /// Says what was found in the kernel, and captures pods again that are not what they were.
    pub async fn reconciled(&mut self, repairs: Vec<Repair>, lost: Vec<PodUid>) {
        for repair in repairs {
            tracing::warn!(%repair, "the kernel was not as it should be");
        }
        for uid in lost {
            self.step(Event::Lost(uid)).await;
        }
    }

    fn lift_when_settled(&mut self) {
        if self.serving
            && self.pods.pending() == 0
            && let Some(blocker) = self.blocker.take()
        {
            blocker.lift();
            tracing::info!(pods = self.pods.captured(), "ready");
        }
    }

    /// Waits until every pod was tried once, so that a predecessor is let go when there is somebody in its place.
    async fn settle(&mut self) {
        let mut left = self.pods.known().count();
        while left > 0 {
            let Some(event) = self.answers.recv().await else { return };
            left -= 1;
            self.step(event).await;
        }
    }

    /// Waits a little for the certificates of this node's workloads.
    async fn warm_up(&self, ids: HashSet<SpiffeId>) {
        let all = async {
            for id in &ids {
                if let Err(error) = self.identities.credentials(id).await {
                    tracing::warn!(%error, "a workload starts without a certificate");
                }
            }
        };
        if tokio::time::timeout(WARM_UP, all).await.is_err() {
            tracing::warn!("not every workload has a certificate yet");
        }
    }
}
