//! What every daemon is made of, whoever enrols its pods.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::time::Instant;
use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_mesh::source::pod::Awaited;
use ztunnel_mesh::source::status;
use ztunnel_mesh::source::status::Reload;
use ztunnel_mesh::source::status::Reloader;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::index::Mesh;
use ztunnel_node::admin::console::Console;
use ztunnel_node::admin::dump::Sources;
use ztunnel_node::admin::quit;
use ztunnel_node::admin::quit::Quit;
use ztunnel_node::admin::ready::Readiness;
use ztunnel_node::dns::server::Dns;
use ztunnel_node::identity;
use ztunnel_node::identity::worker::Identities;
use ztunnel_node::net::bypass::Bypass;
use ztunnel_node::proxy::DataPlane;
use ztunnel_node::telemetry::Telemetry;
use ztunnel_node::telemetry::logging::Levels;
use ztunnel_runtime::shutdown;
use ztunnel_runtime::shutdown::Signal;
use ztunnel_runtime::shutdown::Trigger;
use ztunnel_tls::configs::Credentials;
use ztunnel_tls::trust::Trust;

use crate::app::certificates;
use crate::app::error::RunError;
use crate::app::ports;
use crate::app::ports::Admin;
use crate::app::ports::Again;
use crate::app::ports::Ports;
use crate::app::signals::Signals;
use crate::app::version;
use crate::config::resolved::Run;

/// How long the end of the process waits for the answer to who asked for it to leave.
const LAST_ANSWER: Duration = Duration::from_secs(1);

/// What is there before anything else.
pub(super) struct Base {
    pub(super) started: Instant,
    pub(super) config: Arc<Run>,
    pub(super) telemetry: Telemetry,
    pub(super) readiness: Readiness,
    pub(super) signals: Signals,
    pub(super) trigger: Trigger,
    pub(super) signal: Signal,
    levels: Levels,
    quit: Quit,
    reloader: Reloader,
}

impl Base {
    /// With what operators wish of the source of the mesh.
    pub(super) fn new(
        config: Run,
        telemetry: Telemetry,
        levels: Levels,
    ) -> Result<(Self, mpsc::Receiver<Reload>), RunError> {
        let (quit, asked) = quit::quit();
        let (trigger, signal) = shutdown::channel();
        let (reloader, wishes) = status::reloads();
        let base = Self {
            started: Instant::now(),
            config: Arc::new(config),
            telemetry,
            readiness: Readiness::new(),
            signals: Signals::new(asked)?,
            trigger,
            signal,
            levels,
            quit,
            reloader,
        };
        Ok((base, wishes))
    }

    /// Makes what judges peers. Before anything uses TLS.
    pub(super) fn trust(&self) -> Result<Trust, RunError> {
        certificates::trust(&self.config, &self.telemetry, &self.readiness, &self.signal)
    }

    /// Starts what asks for certificates, beginning with those that are there already.
    pub(super) fn identities(
        &self,
        trust_domain: &TrustDomain,
        trust: Trust,
        inherited: Vec<Credentials>,
    ) -> Result<Identities, RunError> {
        let authority = certificates::authority(&self.config, trust_domain)?;
        let identities = identity::worker::start_with(authority, trust, inherited, self.signal.clone());
        self.readiness.certificates(identities.clone());
        Ok(identities)
    }

    /// Starts the threads that move bytes. Their sockets get past what captures pods by `bypass`.
    pub(super) fn data_plane(
        &self,
        mesh: MeshReader,
        identities: &Identities,
        bypass: Arc<dyn Bypass>,
    ) -> Result<Arc<DataPlane>, RunError> {
        let (config, signal) = (self.config.proxy.clone(), self.signal.clone());
        DataPlane::start(config, mesh, identities.clone(), &self.telemetry, bypass, signal)
            .map(Arc::new)
            .map_err(|source| RunError::System("cannot start the data-plane threads", source))
    }

    /// Joins what operators ask with those who know: the mesh, what was given besides, and which pods are `waiting`.
    pub(super) fn front(
        &self,
        (mesh, local): (MeshReader, Arc<Mesh>),
        identities: &Identities,
        data_plane: &Arc<DataPlane>,
        waiting: watch::Receiver<Arc<[Awaited]>>,
    ) -> Front {
        let (telemetry, source) = (self.telemetry.clone(), self.readiness.source());
        ports::register_source(&telemetry, source.clone());
        ports::register_components(&telemetry, data_plane, waiting.clone(), identities.clone());
        let sources = Sources {
            mesh,
            local,
            identities: identities.clone(),
            data_plane: Arc::clone(data_plane),
            waiting,
            source,
            settings: self.config.settings.clone().into(),
            version: version::version("unknown"),
        };
        let (levels, quit, reloader) = (self.levels.clone(), self.quit.clone(), self.reloader.clone());
        Front {
            config: Arc::clone(&self.config),
            readiness: self.readiness.clone(),
            signal: self.signal.clone(),
            console: Console::new(sources, levels, telemetry.clone(), quit, reloader),
            identities: identities.clone(),
            telemetry,
            admin: None,
            again: Again::default(),
            kept: None,
        }
    }

    /// Ends a daemon that was told to stop before it served.
    pub(super) async fn end_early(mut self, planes: &Planes) {
        tracing::info!("stopping: told to, before there was a mesh");
        end(&self.trigger, &mut self.signals, planes).await;
    }
}

/// What moves bytes and answers for names.
#[derive(Clone)]
pub(super) struct Planes {
    pub(super) data_plane: Arc<DataPlane>,
    pub(super) dns: Option<Arc<Dns>>,
}

impl Planes {
    /// Waits until nothing is open.
    pub(super) fn drained(&self) -> impl Future<Output = ()> + 'static {
        let (data_plane, dns) = (self.data_plane.drained(), self.dns.clone());
        async move {
            data_plane.await;
            if let Some(dns) = dns {
                dns.drained().await;
            }
        }
    }

    /// Accepts nothing any more, at once.
    pub(super) fn hand_over_sockets(&self) {
        self.data_plane.hand_over_sockets();
        self.dns.iter().for_each(|dns| dns.hand_over_sockets());
    }

    /// Waits for the threads to end, once they are told to.
    fn join(&self) {
        self.data_plane.join();
        self.dns.iter().for_each(|dns| dns.join());
    }
}

/// Ends what moves bytes, with whatever is still open.
pub(super) async fn end(trigger: &Trigger, signals: &mut Signals, planes: &Planes) {
    trigger.close();
    // Who asked over HTTP is answered.
    if tokio::time::timeout(LAST_ANSWER, signals.quit.answered()).await.is_err() {
        tracing::debug!("who asked to stop was not answered in time");
    }
    planes.join();
}

/// What operators ask, and what is kept on a disk, while the daemon serves.
pub(super) struct Front {
    config: Arc<Run>,
    telemetry: Telemetry,
    readiness: Readiness,
    console: Console,
    signal: Signal,
    identities: Identities,
    admin: Option<Admin>,
    again: Again,
    kept: Option<Trigger>,
}

impl Front {
    /// Answers at these ports from now on.
    pub(super) fn answer(&mut self, ports: Ports) -> Result<(), RunError> {
        self.admin = Some(self.serve(ports)?);
        Ok(())
    }

    /// Answers at the ports that were given up, as soon as they can be had.
    pub(super) fn answer_again(&mut self) {
        let mut again = std::mem::take(&mut self.again);
        self.admin = again.attempt(|| Ports::bind(&self.config).and_then(|ports| self.serve(ports)));
        self.again = again;
    }

    /// When to try that again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.again.due()
    }

    /// Keeps certificates where they are to be kept.
    pub(super) fn keep(&mut self) {
        self.kept = Some(certificates::keep(&self.config, &self.identities));
    }

    /// Answers nobody and keeps nothing any more.
    pub(super) fn stop(&mut self) {
        self.admin = None;
        self.again.give_up();
        self.kept = None;
    }

    fn serve(&self, ports: Ports) -> Result<Admin, RunError> {
        ports.serve(&self.telemetry, &self.readiness, self.console.clone(), self.signal.clone())
    }
}

/// Makes a directory. Who can write to it can tell the daemon to leave.
pub(super) fn make_run_dir(path: &Path) -> Result<(), RunError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source: io::Error| RunError::Path {
        what: "the run directory",
        path: PathBuf::from(path),
        source,
    })
}
