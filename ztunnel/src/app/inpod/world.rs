//! The mesh, where it comes from, and what follows from it for this node.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use std::time::SystemTime;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio::time::sleep_until;

use crate::admin::ready::Blocker;
use crate::admin::ready::Readiness;
use crate::app::RunError;
use crate::app::inpod::agent::Agent;
use crate::app::report_rejected;
use crate::config::resolved::OwnPod;
use crate::config::resolved::Run;
use crate::config::resolved::Source;
use crate::identity::worker::Identities;
use crate::mesh;
use crate::mesh::MeshReader;
use crate::mesh::MeshWriter;
use crate::mesh::demand;
use crate::mesh::index::Mesh;
use crate::model::identity::TrustDomain;
use crate::model::workload::Reach;
use crate::model::workload::Workload;
use crate::shutdown;
use crate::standalone::file::Loaded;
use crate::standalone::local;
use crate::standalone::watch as file;
use crate::standalone::watch::Updates;
use crate::telemetry::Telemetry;
use crate::xds::client;
use crate::xds::client::Status;

/// What waits for the first mesh, by the name that operators know from Istio.
const READINESS: &str = "state manager";
/// Which workloads are this node's is looked up no more often: a control plane may push many times a second.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Who writes the mesh.
enum Feed {
    /// This, from what is read of the mesh file.
    File { updates: Updates, writer: Box<MeshWriter>, trust_domain: TrustDomain },
    /// The client of a control plane.
    Istiod { status: watch::Receiver<Status>, readiness: Readiness, blocker: Option<Blocker> },
    /// Nobody: it stays as it is.
    Nothing { _writer: Box<MeshWriter> },
}

/// The mesh, and what follows from it for this node.
pub(super) struct World {
    feed: Feed,
    reader: MeshReader,
    /// What is there besides, whatever that source says.
    local: Arc<Mesh>,
    /// When the mesh that changed is to be looked at.
    due: Option<Instant>,
    looked: Instant,
    /// This proxy's own identity is not as the mesh says, and that has been told.
    doubted: bool,
}

impl World {
    /// Begins to read the mesh. One from a file is there afterwards; `None` where the process ends.
    pub(super) async fn open(
        config: &Run,
        telemetry: &Telemetry,
        readiness: &Readiness,
        signal: &shutdown::Signal,
    ) -> Result<Option<Self>, RunError> {
        let (mut writer, mut reader) = mesh::mesh();
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
            Source::File(path) => {
                let node = config.places.node.to_string();
                let mut updates = file::watch(path.clone(), node, signal.clone());
                let loaded = match updates.next().await {
                    Some(Ok(loaded)) => loaded,
                    Some(Err(diagnostics)) => return Err(RunError::Mesh(diagnostics)),
                    None => return Ok(None),
                };
                let trust_domain = loaded.mesh.trust_domain().clone();
                publish(loaded, &mut writer);
                Feed::File { updates, writer: Box::new(writer), trust_domain }
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
                Feed::Istiod { status, readiness: readiness.clone(), blocker }
            }
            Source::Nothing => {
                if config.local.is_none() {
                    tracing::warn!(
                        "there is no source of the mesh (XDS_ADDRESS is empty): all connections are refused"
                    );
                    writer.publish(Mesh::default());
                }
                Feed::Nothing { _writer: Box::new(writer) }
            }
        };
        let mut world = Self { feed, reader, local, due: None, looked: Instant::now(), doubted: false };
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
                    if !fed {
                        return false;
                    }
                    self.tell();
                }
            }
        }
    }

    /// Tells those who ask whether there is a mesh, and whether it is as it is now.
    fn tell(&mut self) {
        let Feed::Istiod { status, readiness, blocker } = &mut self.feed else { return };
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

    /// Asks for the certificates of the pods that are enrolled, for that of this proxy's `own` pod if peers dial
    /// tunnels to it, and for no others.
    pub(super) fn retain_identities(&mut self, identities: &Identities, agent: &Agent, own: Option<&OwnPod>) {
        let mesh = self.reader.snapshot();
        let mut ids = HashSet::new();
        for workload in mesh.workloads() {
            if agent.serves(workload) {
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

    /// Says so if peers expect another identity of this proxy than it has.
    fn compare(&mut self, own: &OwnPod, workload: &Workload) {
        if own.identity != workload.identity && !std::mem::replace(&mut self.doubted, true) {
            let (here, mesh) = (&own.identity, &workload.identity);
            tracing::warn!(%here, %mesh, "this proxy's identity is another one in the mesh, so peers will refuse it: see TRUST_DOMAIN");
        }
    }
}

/// Waits for the source, and does what it asks for. False where it is no more.
async fn fed(feed: &mut Feed) -> bool {
    match feed {
        Feed::File { updates, writer, trust_domain } => match updates.next().await {
            Some(Ok(loaded)) => {
                let (new, old) = (loaded.mesh.trust_domain(), &*trust_domain);
                if new == old {
                    publish(loaded, writer);
                } else {
                    tracing::error!(%new, %old, "the changed mesh file is not applied: its trust domain is another one");
                }
                true
            }
            Some(Err(diagnostics)) => {
                report_rejected(&diagnostics);
                true
            }
            None => false,
        },
        Feed::Istiod { status, .. } => status.changed().await.is_ok(),
        Feed::Nothing { .. } => std::future::pending().await,
    }
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
