//! The mesh, where it comes from, and what follows from it for this node.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::time::SystemTime;

use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio::time::sleep_until;
use ztunnel_control::changes::Changes;
use ztunnel_control::changes::Next;
use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_mesh::model::workload::Reach;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::source::status::Reload;
use ztunnel_mesh::store;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::MeshWriter;
use ztunnel_mesh::store::demand;
use ztunnel_mesh::store::index::Mesh;
use ztunnel_node::admin::ready::Blocker;
use ztunnel_node::admin::ready::Readiness;
use ztunnel_node::identity::worker::Identities;
use ztunnel_node::telemetry::Telemetry;
use ztunnel_node::xds::client;
use ztunnel_node::xds::client::Status;
use ztunnel_objects::file::Loaded;
use ztunnel_objects::file::Place;
use ztunnel_objects::local;
use ztunnel_runtime::shutdown;

use crate::app::error::RunError;
use crate::app::handover;
use crate::app::signals::Signals;
use crate::config::resolved::Run;
use crate::config::resolved::SelfPod;
use crate::config::resolved::Source;

/// What waits for the first mesh, by the name that operators know from Istio.
const READINESS: &str = "state manager";
/// Which workloads are this node's is looked up no more often: a control plane may push many times a second.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long the node agent is kept waiting for a first mesh: pods that start wait with it, and a daemon that serves
/// the pods beside this one loses half of their connections once this one listens.
const MESH_WITHIN: Duration = Duration::from_secs(2);

/// Who writes the mesh.
enum Feed {
    /// This, from what is read of the mesh file.
    File { changes: Box<Changes>, writer: Box<MeshWriter>, trust_domain: TrustDomain },
    /// The client of a control plane.
    Istiod {
        status: watch::Receiver<Status>,
        readiness: Readiness,
        blocker: Option<Blocker>,
        wishes: mpsc::Receiver<Reload>,
    },
    /// Nobody: it stays as it is.
    Nothing { _writer: Box<MeshWriter>, wishes: mpsc::Receiver<Reload> },
}

/// The mesh, and what follows from it for this node.
pub(super) struct MeshSource {
    feed: Feed,
    reader: MeshReader,
    /// What is there besides, whatever that source says.
    local: Arc<Mesh>,
    /// When the mesh that changed is to be looked at.
    due: Option<Instant>,
    looked: Instant,
    /// The network that pods should be in; empty where none is named, or once it was told that they are not.
    network: String,
    /// This proxy's own identity is not as the mesh says, and that has been told.
    doubted: bool,
    /// Somebody has said that what is in doubt is meant.
    confirmed: bool,
}

impl MeshSource {
    /// Begins to read the mesh. One from a file is there afterwards; `None` where the process ends.
    pub(super) async fn open(
        config: &Run,
        telemetry: &Telemetry,
        readiness: &Readiness,
        wishes: mpsc::Receiver<Reload>,
        signal: &shutdown::Signal,
    ) -> Result<Option<Self>, RunError> {
        let (mut writer, mut reader) = store::mesh();
        let local = Arc::new(match &config.local {
            Some(place) => local::load(place).map_err(RunError::Mesh)?,
            None => Mesh::default(),
        });
        if config.local.is_some() {
            let (workloads, services) = (local.workloads().len(), local.services_len());
            tracing::info!(workloads, services, policies = local.policies().len(), "local mesh applied");
            writer.publish(Mesh::clone(&local));
        }
        let feed = match &config.mesh {
            Source::File { path, strict } => {
                let node = Arc::clone(&config.places.node);
                let place = Place { path: path.clone(), node, strict: *strict };
                let opened = Changes::open(place, wishes, readiness.source(), signal.clone());
                let Some((changes, loaded)) = opened.await.map_err(RunError::Mesh)? else { return Ok(None) };
                let trust_domain = loaded.mesh.trust_domain().clone();
                publish(loaded, &mut writer);
                Feed::File { changes: Box::new(changes), writer: Box::new(writer), trust_domain }
            }
            Source::Istiod { client, on_demand } => {
                let blocker = Some(readiness.block(READINESS));
                let (config, signal) = (client.as_ref().clone(), signal.clone());
                let status = if *on_demand {
                    let (demand, demands) = demand::channel(demand::Config::default());
                    reader = reader.on_demand(demand);
                    client::start_on_demand(config, demands, writer, telemetry, signal)
                } else {
                    client::start(config, writer, telemetry, signal)
                };
                Feed::Istiod { status, readiness: readiness.clone(), blocker, wishes }
            }
            Source::Nothing => {
                if config.local.is_none() {
                    tracing::warn!(
                        "there is no source of the mesh (XDS_ADDRESS is empty): all connections are refused"
                    );
                    writer.publish(Mesh::default());
                }
                Feed::Nothing { _writer: Box::new(writer), wishes }
            }
        };
        let mut world = Self {
            feed,
            reader,
            local,
            due: None,
            looked: Instant::now(),
            network: config.network.clone(),
            doubted: false,
            confirmed: false,
        };
        world.tell();
        Ok(Some(world))
    }

    /// For those who decide from the mesh.
    pub(super) fn reader(&self) -> MeshReader {
        self.reader.clone()
    }

    /// What was given besides, as it was given.
    pub(super) fn local(&self) -> Arc<Mesh> {
        Arc::clone(&self.local)
    }

    /// The trust domain of the mesh file.
    pub(super) fn trust_domain(&self) -> TrustDomain {
        match &self.feed {
            Feed::File { trust_domain, .. } => trust_domain.clone(),
            Feed::Istiod { .. } | Feed::Nothing { .. } => TrustDomain::default(),
        }
    }

    /// Whether there is a mesh to decide from: of the control plane, or what was kept of it.
    pub(super) fn is_known(&self) -> bool {
        match &self.feed {
            Feed::File { .. } | Feed::Nothing { .. } => true,
            Feed::Istiod { status, .. } => status.borrow().synced,
        }
    }

    /// Whether that is of the control plane itself.
    fn is_current(&self) -> bool {
        match &self.feed {
            Feed::File { .. } | Feed::Nothing { .. } => true,
            Feed::Istiod { status, .. } => status.borrow().confirmed,
        }
    }

    /// Waits until the mesh is known from the control plane itself. Cancel-safe.
    pub(super) async fn current(&mut self) {
        while !self.is_current() {
            if !self.next().await {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits for a first mesh: for as long as another daemon serves the node, which need not stop for one that could not;
    /// else only a little. It would answer at `socket`. False where this one is told to stop.
    pub(super) async fn first_mesh(&mut self, socket: Option<&Path>, signals: &mut Signals) -> bool {
        let mut look = Instant::now() + MESH_WITHIN;
        loop {
            tokio::select! {
                () = self.current() => return true,
                () = signals.next() => return false,
                // What was kept of it is better than nothing, and not as good as what it is about to say.
                () = sleep_until(look) => {
                    if self.is_known() {
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

    /// Waits for what the mesh changes for this node. False where the process ends. Cancel-safe.
    pub(super) async fn next(&mut self) -> bool {
        loop {
            let due = self.due;
            let look = async {
                match due {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.reader.changed(), if due.is_none() => {
                    if !changed {
                        return false;
                    }
                    self.due = Some(Instant::now().max(self.looked + LOOK_EVERY));
                }
                () = look => {
                    (self.due, self.looked) = (None, Instant::now());
                    return true;
                }
                fed = fed(&mut self.feed) => {
                    match fed {
                        Fed::Changed => self.tell(),
                        Fed::Confirmed => {
                            self.confirmed = true;
                            return true;
                        }
                        Fed::Ended => return false,
                    }
                }
            }
        }
    }

    /// Whether somebody has said meanwhile that what is in doubt is meant.
    pub(super) fn take_confirmed(&mut self) -> bool {
        std::mem::take(&mut self.confirmed)
    }

    /// Tells those who ask whether there is a mesh, and whether it is as it is now.
    fn tell(&mut self) {
        let Feed::Istiod { status, readiness, blocker, .. } = &mut self.feed else { return };
        let now = *status.borrow_and_update();
        if now.synced
            && let Some(blocker) = blocker.take()
        {
            blocker.lift();
        }
        let kept = now.synced && !now.confirmed;
        let since = now.stale_since.filter(|_| kept).map(|since| SystemTime::now() - since.elapsed());
        readiness.stale(since);
    }

    /// Asks for the certificates of the workloads that are served here, for that of this proxy's `own` pod if peers dial
    /// tunnels to it, and for no others.
    pub(super) fn retain_identities(
        &mut self,
        identities: &Identities,
        serves: impl Fn(&Workload) -> bool,
        own: Option<&SelfPod>,
    ) {
        let mesh = self.reader.snapshot();
        let mut ids = HashSet::new();
        for workload in mesh.workloads() {
            if serves(workload) {
                self.locate(workload);
                ids.insert(workload.identity.clone());
            }
            if let Some(own) = own.filter(|own| own.workload.is(workload)) {
                if workload.reach == Reach::Hbone {
                    ids.insert(own.identity.clone());
                }
                self.compare(own, workload);
            }
        }
        identities.retain(ids);
    }

    /// Says so if a workload of this proxy is in another network than that it was told of.
    fn locate(&mut self, workload: &Workload) {
        if !self.network.is_empty() && self.network != *workload.network {
            let (told, mesh) = (std::mem::take(&mut self.network), &workload.network);
            tracing::warn!(told, %mesh, workload = %workload.uid, "NETWORK is not what the mesh says of a pod served here: the mesh counts");
        }
    }

    /// Says so if peers expect another identity of this proxy than it has.
    fn compare(&mut self, own: &SelfPod, workload: &Workload) {
        if own.identity != workload.identity && !std::mem::replace(&mut self.doubted, true) {
            let (here, mesh) = (&own.identity, &workload.identity);
            tracing::warn!(%here, %mesh, "this proxy's identity is another one in the mesh, so peers will refuse it: see TRUST_DOMAIN");
        }
    }
}

/// What came of waiting for the source.
enum Fed {
    Changed,
    /// What is in doubt elsewhere is meant.
    Confirmed,
    Ended,
}

/// Waits for the source, and does what it asks for.
async fn fed(feed: &mut Feed) -> Fed {
    match feed {
        Feed::File { changes, writer, trust_domain: _ } => match changes.next().await {
            Some(Next::Apply(loaded)) => {
                publish(*loaded, writer);
                Fed::Changed
            }
            Some(Next::Confirmed) => Fed::Confirmed,
            None => Fed::Ended,
        },
        Feed::Istiod { status, wishes, .. } => tokio::select! {
            changed = status.changed() => match changed {
                Ok(()) => Fed::Changed,
                Err(_ended) => Fed::Ended,
            },
            Some(wish) = wishes.recv() => without_files(wish),
        },
        Feed::Nothing { wishes, .. } => match wishes.recv().await {
            Some(wish) => without_files(wish),
            None => std::future::pending().await,
        },
    }
}

fn without_files(wish: Reload) -> Fed {
    let said = match wish.force {
        true => "what is in doubt is carried out",
        false => "there is no mesh file here: the control plane says what changes",
    };
    // Whoever wished may be gone.
    let _gone = wish.answer.send(Ok(said.to_owned()));
    if wish.force { Fed::Confirmed } else { Fed::Changed }
}

fn publish(loaded: Loaded, writer: &mut MeshWriter) {
    for warning in &loaded.warnings {
        tracing::debug!(%warning, "mesh file");
    }
    let (workloads, services) = (loaded.mesh.workloads().count(), loaded.mesh.services().count());
    let policies = loaded.mesh.policies().count();
    writer.publish(loaded.mesh);
    tracing::info!(workloads, services, policies, "mesh applied");
}
