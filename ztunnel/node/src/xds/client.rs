//! Carries a [`Session`] out: connects, keeps the stream, applies what comes, and starts again when it ends.

use std::error::Error;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Code;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use ztunnel_mesh::store::MeshWriter;
use ztunnel_mesh::store::demand::Demands;
use ztunnel_mesh::store::demand::Requests;
use ztunnel_mesh::store::demand::Tally;
use ztunnel_proto::discovery::DeltaDiscoveryRequest;
use ztunnel_proto::discovery::DeltaDiscoveryResponse;
use ztunnel_proto::discovery::Node;
use ztunnel_proto::discovery::Resource;
use ztunnel_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use ztunnel_proto::prost::Message;
use ztunnel_proto::prost_types::ListValue;
use ztunnel_proto::prost_types::Struct;
use ztunnel_proto::prost_types::Value;
use ztunnel_proto::prost_types::value;
use ztunnel_runtime::shutdown;
use ztunnel_tls::grpc;
use ztunnel_tls::grpc::Connector;
use ztunnel_tls::grpc::ControlError;
use ztunnel_tls::grpc::ControlPlane;

use crate::telemetry::Telemetry;
use crate::telemetry::metrics::Families;
use crate::telemetry::metrics::Sample;
use crate::telemetry::metrics::Source;
use crate::xds::backoff::Backoff;
use crate::xds::backoff::Ended;
use crate::xds::cache::Cache;
use crate::xds::convert::Rejected;
use crate::xds::counts::Counts;
use crate::xds::counts::Loaded;
use crate::xds::counts::Reason;
use crate::xds::session::Kind;
use crate::xds::session::Received;
use crate::xds::session::Session;
use crate::xds::session::Told;

/// The largest response. The push of a whole mesh is one.
const MESSAGE_MAX: usize = 200 * 1024 * 1024;
/// Resources that are applied before others on the thread get a turn: a few milliseconds' work.
const SLICE: usize = 512;
/// How long the file with the last good mesh may take to be read: no disk keeps a proxy from its control plane.
const CACHE_TIMEOUT: Duration = Duration::from_secs(5);
/// Requests on their way: two at the start, then one for each response, which is answered before the next is read.
const REQUESTS: usize = 4;
/// Names in one request: a server may refuse one that is larger than 4 MiB.
const NAMES: usize = 4096;

/// Bytes on their way: a push of a whole mesh is large.
const WINDOW: u32 = 4 * 1024 * 1024;
/// How long a new stream may stay without any response, unless said otherwise: a control plane that has just started
/// has much to do. Each stream that was given up for it has the next one waited for twice as long, up to
/// `PATIENCE_MAX` times: whoever always leaves the queue before its turn is never served, and the more are queued
/// the more begin again.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How many times as long at most.
const PATIENCE_MAX: u32 = 16;

/// What istiod and its tools show as the version of this proxy, and what istiod decides by: the Istio whose messages
/// this version understands, and then this version. Without it istiod takes a proxy for one of the far future.
const ISTIO_VERSION: &str = concat!("1.32.0-ztunnel.", env!("CARGO_PKG_VERSION"));

/// Who this proxy is to the control plane.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// The pod's address, if known.
    pub instance_ip: Option<String>,
    /// The pod's name.
    pub pod: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The node's name.
    pub node: String,
    /// Further facts by name (`CLUSTER_ID`, say).
    pub metadata: Vec<(String, serde_json::Value)>,
}

/// What the client is told at start.
#[derive(Debug, Clone)]
pub struct Config {
    /// The control plane, and how it is talked to.
    pub plane: grpc::Config,
    /// Who this is.
    pub identity: Identity,
    /// How long a new stream may stay without any response.
    pub answer_timeout: Duration,
    /// Where the last good mesh is kept, to be served at the next start until the control plane is there. The folder
    /// must be there, and its owner's alone; beside it a file of the same name with `.new` is made.
    pub cache: Option<PathBuf>,
}

/// How the mesh stands to the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// The mesh can be served: the first response of every type was accepted, or the last good mesh was found in the
    /// cache. Stays true.
    pub synced: bool,
    /// The first response of every type was accepted: nothing is only what the cache had. Stays true.
    pub confirmed: bool,
    /// The mesh may be old since then: there has been no stream from that time on. `None` while there is one. With a
    /// mesh from the cache this may be long before the process began.
    pub stale_since: Option<Instant>,
    /// Resources that the control plane sent and this proxy rejected, in all.
    pub rejected: u64,
}

/// Starts the client on the runtime of the caller; it ends when the process does. It alone writes the mesh.
pub fn start(
    config: Config,
    writer: MeshWriter,
    telemetry: &Telemetry,
    signal: shutdown::Signal,
) -> watch::Receiver<Status> {
    start_with(config, None, writer, telemetry, signal)
}

/// Like [`start`], but only those workloads and services are asked for that somebody demands, besides those that the
/// control plane sends anyway: those of the node. The mesh is then synced without the first of them.
pub fn start_on_demand(
    config: Config,
    demands: Demands,
    writer: MeshWriter,
    telemetry: &Telemetry,
    signal: shutdown::Signal,
) -> watch::Receiver<Status> {
    start_with(config, Some(demands), writer, telemetry, signal)
}

fn start_with(
    config: Config,
    demands: Option<Demands>,
    writer: MeshWriter,
    telemetry: &Telemetry,
    mut signal: shutdown::Signal,
) -> watch::Receiver<Status> {
    let counts = Arc::new(Counts::default());
    let first = Status { synced: false, confirmed: false, stale_since: Some(Instant::now()), rejected: 0 };
    let (status, watched) = watch::channel(first);
    let tally = demands.as_ref().map(Demands::tally);
    telemetry.register(Shown { counts: Arc::clone(&counts), status: watched.clone(), tally });
    let session = new_session(&config, demands.as_ref());
    // On demand there may be nothing to be said of addresses.
    let confirmed = [demands.is_some(), false];
    let plane = ControlPlane::new(config.plane.clone());
    let mut client =
        Client { config, plane, session, demands, writer, counts, status, cache: None, confirmed };
    shutdown::spawn(async move {
        tokio::select! {
            () = client.run() => {}
            // Whoever is still connected while the daemon drains stays under the newest policy.
            () = signal.closing() => {}
        }
    });
    watched
}

fn new_session(config: &Config, demands: Option<&Demands>) -> Session {
    let mut session = Session::new(node(&config.identity));
    if demands.is_some() {
        session.on_demand();
    }
    session
}

struct Shown {
    counts: Arc<Counts>,
    status: watch::Receiver<Status>,
    tally: Option<Arc<Tally>>,
}

impl Source for Shown {
    fn collect(&self, families: &mut Families<'_>) -> fmt::Result {
        self.counts.collect(families)?;
        if let Some(tally) = &self.tally {
            let results = tally.results();
            let labels = results.map(|(result, _)| [("result", result)]);
            let samples: [_; 4] =
                std::array::from_fn(|at| Sample { labels: &labels[at], value: results[at].1 });
            families.counter(
                "ztunnel_xds_look_ups",
                "Questions for what the mesh did not know.",
                &samples,
            )?;
            let sample = Sample { labels: &[], value: tally.unsubscribed() };
            let help = "Workloads and services that nobody used, and that are not subscribed to any more.";
            families.counter("ztunnel_xds_unsubscribed", help, &[sample])?;
        }
        let stale_since = self.status.borrow().stale_since;
        let value = stale_since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        let help = "Seconds since the mesh was last known to be that of the control plane; 0 while there is a stream.";
        families.gauge("ztunnel_xds_mesh_age_seconds", help, &[Sample { labels: &[], value }])
    }
}

/// The node of a session: what istiod knows a ztunnel by.
fn node(identity: &Identity) -> Node {
    let Identity { instance_ip, pod, namespace, node, metadata } = identity;
    // istiod wants an address here and does not use it.
    let ip = instance_ip.as_deref().unwrap_or("1.1.1.1");
    let text = |text: &str| Value { kind: Some(value::Kind::StringValue(text.to_owned())) };
    let mut fields = std::collections::BTreeMap::from([
        ("NAME".to_owned(), text(pod)),
        ("NAMESPACE".to_owned(), text(namespace)),
        ("INSTANCE_IPS".to_owned(), text(ip)),
        ("NODE_NAME".to_owned(), text(node)),
        ("ISTIO_VERSION".to_owned(), text(ISTIO_VERSION)),
    ]);
    fields.extend(metadata.iter().map(|(name, value)| (name.clone(), wire_value(value))));
    Node {
        id: format!("ztunnel~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local"),
        metadata: Some(Struct { fields }),
        ..Node::default()
    }
}

fn wire_value(json: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match json {
        Json::Null => value::Kind::NullValue(0),
        Json::Bool(it) => value::Kind::BoolValue(*it),
        Json::Number(it) => value::Kind::NumberValue(it.as_f64().unwrap_or_default()),
        Json::String(it) => value::Kind::StringValue(it.clone()),
        Json::Array(all) => {
            value::Kind::ListValue(ListValue { values: all.iter().map(wire_value).collect() })
        }
        Json::Object(all) => value::Kind::StructValue(Struct {
            fields: all.iter().map(|(name, value)| (name.clone(), wire_value(value))).collect(),
        }),
    };
    Value { kind: Some(kind) }
}

/// Why a connection ended, or did not come to be.
#[derive(Debug, thiserror::Error)]
enum Interrupted {
    #[error(transparent)]
    Unusable(#[from] ControlError),
    #[error("cannot connect")]
    Connect(#[source] tonic::transport::Error),
    #[error("the control plane refused the stream: {0}")]
    Refused(Box<tonic::Status>),
    #[error("the stream broke: {0}")]
    Broken(Box<tonic::Status>),
    #[error("the control plane said nothing in {0:?}")]
    Silent(Duration),
    #[error("the control plane ended the stream")]
    Complete,
}

impl Interrupted {
    fn reason(&self) -> Reason {
        match self {
            Self::Connect(_) | Self::Refused(_) => Reason::ConnectionError,
            Self::Broken(status) if is_leaving(status) => Reason::Reconnect,
            Self::Complete => Reason::Complete,
            Self::Unusable(_) | Self::Broken(_) | Self::Silent(_) => Reason::Error,
        }
    }
}

/// Whether this is how a control plane or the network goes away, rather than an answer to what was said.
fn is_leaving(status: &tonic::Status) -> bool {
    let text = status.message();
    match status.code() {
        Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => true,
        Code::Unavailable => text.contains("transport is closing") || text.contains("received prior goaway"),
        _ => false,
    }
}

struct Client {
    config: Config,
    plane: ControlPlane,
    session: Session,
    /// What is asked for, if not everything is.
    demands: Option<Demands>,
    writer: MeshWriter,
    counts: Arc<Counts>,
    status: watch::Sender<Status>,
    cache: Option<Cache>,
    /// Of which types the first response was accepted.
    confirmed: [bool; 2],
}

impl Client {
    async fn run(&mut self) {
        if let Some(path) = self.config.cache.clone() {
            self.restore(path).await;
        }
        let (mut backoff, mut patience) = (Backoff::default(), 1);
        loop {
            let mut responses = 0_u64;
            let silent = self.config.answer_timeout * patience;
            let Err(interrupted) = self.connection(silent, &mut responses).await;
            patience = match interrupted {
                Interrupted::Silent(_) => (patience * 2).min(PATIENCE_MAX),
                _ if responses > 0 => 1,
                _ => patience,
            };
            if let Some(demands) = &mut self.demands {
                demands.disconnected();
            }
            self.connected(false);
            self.status.send_modify(|status| {
                status.stale_since.get_or_insert_with(Instant::now);
            });
            let reason = interrupted.reason();
            self.counts.ended(reason);
            // One that brought nothing did not serve, however it ended: a control plane that accepts and hangs up must
            // not keep both sides busy.
            let served = responses > 0 && matches!(reason, Reason::Reconnect | Reason::Complete);
            let wait = backoff.after(if served { Ended::Served } else { Ended::Failed }, rand::random());
            match served {
                true => tracing::info!(
                    error = &interrupted as &dyn Error,
                    again_in = ?wait,
                    "control plane disconnected"
                ),
                false => {
                    tracing::warn!(error = &interrupted as &dyn Error, again_in = ?wait, "no control plane");
                }
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// Begins with the last good mesh, if there is one, and keeps it from now on.
    async fn restore(&mut self, path: PathBuf) {
        let (cache, stored) =
            match Cache::open(path, self.config.plane.cluster.clone(), Arc::clone(&self.counts)) {
                Ok(opened) => opened,
                Err(error) => {
                    tracing::warn!(error = &error as &dyn Error, "the mesh will not be kept");
                    return;
                }
            };
        match tokio::time::timeout(CACHE_TIMEOUT, stored).await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(stored))) => {
                let age = stored.age;
                match self.replay(stored.resources).await {
                    Ok(()) => {
                        tracing::info!(?age, "the mesh is the last one known until there is a control plane");
                        self.status.send_modify(|status| {
                            status.synced = true;
                            status.stale_since = Instant::now().checked_sub(age).or(status.stale_since);
                        });
                    }
                    Err((name, reason)) => {
                        tracing::warn!(name, %reason, "the mesh cache is not used");
                        self.counts.cache_loaded(Loaded::Rejected);
                        self.session = new_session(&self.config, self.demands.as_ref());
                        cache.disown();
                    }
                }
            }
            Ok(Err(_)) | Err(_) => {
                tracing::warn!("the mesh cache is not used: it could not be read in time");
                self.counts.cache_loaded(Loaded::Unreadable);
                cache.disown();
            }
        }
        self.session.keep_accepted();
        self.cache = Some(cache);
    }

    /// Takes all of this as if it had been received, or nothing: a mesh without one of its policies would allow what it
    /// does not.
    async fn replay(&mut self, resources: [Vec<Resource>; 2]) -> Result<(), (String, Rejected)> {
        let (mut changes, mut told) = (Vec::new(), Vec::new());
        for (kind, resources) in Kind::ALL.into_iter().zip(resources) {
            let type_url = kind.type_url().to_owned();
            let response = DeltaDiscoveryResponse { type_url, resources, ..Default::default() };
            // It is of a known type.
            let Received::Push(mut push) = self.session.receive(response) else { continue };
            while !push.is_done() {
                changes.extend(self.session.advance(&mut push, SLICE));
                // A workload that is rejected is refused, as when it came; a policy cannot be.
                if push.kind() == Kind::Authorization
                    && let Some(rejected) = push.take_rejected()
                {
                    return Err(rejected);
                }
                tokio::task::yield_now().await;
            }
            told.extend(push.take_told());
            self.session.finish(push);
        }
        let mut changes = changes.into_iter();
        while changes.len() > 0 {
            self.writer.draft(changes.by_ref().take(SLICE));
            tokio::task::yield_now().await;
        }
        self.writer.release_whole();
        self.tell(told);
        Ok(())
    }

    /// Tells those who ask. The mesh is already as it says.
    fn tell(&self, told: Vec<Told>) {
        let Some(demands) = &self.demands else { return };
        for told in told {
            match told {
                Told::There(name, aliases) => demands.is_there(&name, &aliases),
                Told::Gone(name) => demands.is_gone(&name),
            }
        }
    }

    fn connected(&self, connected: bool) {
        self.counts.connected(connected);
        if let Some(cache) = &self.cache {
            cache.connected(connected);
        }
    }

    /// One connection, from its first to its last moment; without a response it is given up after `silent`.
    async fn connection(
        &mut self,
        silent: Duration,
        responses: &mut u64,
    ) -> Result<std::convert::Infallible, Interrupted> {
        let connector = self.plane.connector()?;
        let headers = self.plane.headers()?;
        let (requests, mut queue) = mpsc::channel(REQUESTS);
        let wanted = self.demands.as_mut().map(Demands::connected).unwrap_or_default();
        for first in self.session.open(wanted.iter().map(|name| &**name)) {
            // There is room for the first ones.
            let _full = requests.try_send(first);
        }
        let stream = futures_util::stream::poll_fn(move |cx| queue.poll_recv(cx));
        let mut request = tonic::Request::new(stream);
        *request.metadata_mut() = MetadataMap::from_headers(headers);
        let channel = connect(&self.plane, connector).await.map_err(Interrupted::Connect)?;
        let mut client =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MESSAGE_MAX);
        let until = Instant::now() + silent;
        let stream = tokio::time::timeout_at(until, client.delta_aggregated_resources(request))
            .await
            .map_err(|_elapsed| Interrupted::Silent(silent))?
            .map_err(|status| Interrupted::Refused(Box::new(status)))?;
        let mut stream = stream.into_inner();
        tracing::info!(address = %self.plane.address(), "connected to the control plane");
        self.connected(true);
        loop {
            let epoch_ends = self.demands.as_ref().map(Demands::epoch_ends);
            let message = tokio::select! {
                message = stream.message() => message,
                () = at(epoch_ends) => {
                    self.demands.as_mut().into_iter().for_each(Demands::next_epoch);
                    self.unsubscribe_unused().await;
                    continue;
                }
                () = tokio::time::sleep_until(until), if *responses == 0 => {
                    return Err(Interrupted::Silent(silent));
                }
                wanted = next(&mut self.demands) => {
                    for request in self.ask(wanted) {
                        if requests.send(request).await.is_err() {
                            return Err(Interrupted::Complete);
                        }
                    }
                    continue;
                }
            };
            let response = message.map_err(|status| Interrupted::Broken(Box::new(status)))?;
            let response = response.ok_or(Interrupted::Complete)?;
            *responses += 1;
            let answer = self.apply(response).await;
            if requests.send(answer).await.is_err() {
                return Err(Interrupted::Complete);
            }
            if self.demands.as_ref().is_some_and(Demands::is_crowded) {
                self.unsubscribe_unused().await;
            }
        }
    }

    /// What is said for these wishes.
    fn ask(&self, wanted: Requests) -> Vec<DeltaDiscoveryRequest> {
        let names = |names: &[Arc<str>]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let Requests { unsubscribe, subscribe } = wanted;
        let no_longer = unsubscribe.chunks(NAMES).map(|all| self.session.subscribe(Vec::new(), names(all)));
        let newly = subscribe.chunks(NAMES).map(|all| self.session.subscribe(names(all), Vec::new()));
        no_longer.chain(newly).collect()
    }

    /// Unsubscribes from what nobody uses any more. Nothing if it is not known which node this is: what its pods are judged by
    /// could not be told from the rest.
    async fn unsubscribe_unused(&mut self) {
        let node = &self.config.identity.node;
        let Some(demands) = self.demands.as_mut().filter(|_| !node.is_empty()) else { return };
        let unused = demands.unused(self.writer.mesh(), node);
        if unused.is_empty() {
            return;
        }
        demands.unsubscribe(&unused);
        for slice in unused.chunks(SLICE) {
            let (changes, gone) = self.session.unsubscribe(slice);
            self.writer.draft(changes);
            if let Some(cache) = &self.cache {
                cache.note(Kind::Address, gone);
            }
            tokio::task::yield_now().await;
        }
        self.writer.release();
        if let Some(cache) = self.cache.as_ref().filter(|_| self.session.is_synced()) {
            cache.settle();
        }
        tracing::debug!(resources = unused.len(), "what nobody uses is not asked for any more");
    }

    /// Applies a response as a unit, and in slices: others on the thread are not held up.
    async fn apply(&mut self, response: DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
        let bytes = response.encoded_len();
        let (resources, removed) = (response.resources.len(), response.removed_resources.len());
        let mut push = match self.session.receive(response) {
            Received::Push(push) => push,
            Received::Refused(answer) => {
                tracing::warn!(type_url = answer.type_url, "the control plane sent what was not asked for");
                return answer;
            }
        };
        let kind = push.kind();
        self.counts.received(kind, bytes);
        while !push.is_done() {
            let changes = self.session.advance(&mut push, SLICE);
            self.writer.draft(changes);
            if let Some(cache) = &self.cache {
                cache.note(kind, push.take_accepted());
            }
            tokio::task::yield_now().await;
        }
        self.writer.release();
        self.tell(push.take_told());
        self.counts.unknown_values(self.session.unknown_values());
        self.counts.refused(self.session.refused());
        let rejected = push.rejected().len();
        if rejected > 0 {
            self.counts.rejected(kind, rejected);
            for (name, reason) in push.rejected().iter().take(10) {
                let kept = match (self.session.has_none(kind, name), kind) {
                    (false, _) => "the version before",
                    (true, Kind::Address) => "its addresses: they are not dialled until a good version comes",
                    (true, Kind::Authorization) => "nothing",
                };
                tracing::warn!(kind = kind.type_url(), name, %reason, kept, "resource rejected");
            }
        }
        tracing::debug!(kind = kind.type_url(), resources, removed, rejected, bytes, "response applied");
        let answer = self.session.finish(push);
        let synced = self.session.is_synced();
        if synced && !self.status.borrow().synced {
            // The first mesh: there was nothing between whose parts anybody could decide.
            self.writer.release_whole();
        }
        if let Some(cache) = self.cache.as_ref().filter(|_| synced) {
            cache.settle();
        }
        self.confirmed[kind as usize] |= answer.error_detail.is_none();
        let confirmed = self.confirmed == [true; 2];
        self.status.send_if_modified(|status| {
            let before = *status;
            status.synced = synced;
            status.confirmed = confirmed;
            status.stale_since = None;
            status.rejected += rejected as u64;
            *status != before
        });
        answer
    }
}

/// What is wanted next; never anything if nothing is on demand.
async fn next(demands: &mut Option<Demands>) -> Requests {
    match demands {
        Some(demands) => demands.next().await,
        None => std::future::pending().await,
    }
}

/// Waits until then; for ever if there is no such time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// A connection for a stream: what it carries is large now and then.
async fn connect(plane: &ControlPlane, connector: Connector) -> Result<Channel, tonic::transport::Error> {
    grpc::endpoint(plane.address())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .connect_with_connector(connector)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_is_named_as_istiod_expects_it() {
        let metadata = vec![
            ("CLUSTER_ID".to_owned(), serde_json::json!("c1")),
            ("X".to_owned(), serde_json::json!({"a": [1, true, null]})),
        ];
        let identity = Identity {
            instance_ip: None,
            pod: "ztunnel-1".into(),
            namespace: "istio-system".into(),
            node: "n1".into(),
            metadata,
        };
        let named = node(&identity);
        assert_eq!(named.id, "ztunnel~1.1.1.1~ztunnel-1.istio-system~istio-system.svc.cluster.local");
        let fields = named.metadata.unwrap().fields;
        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            ["CLUSTER_ID", "INSTANCE_IPS", "ISTIO_VERSION", "NAME", "NAMESPACE", "NODE_NAME", "X"]
        );
        assert_eq!(fields["CLUSTER_ID"].kind, Some(value::Kind::StringValue("c1".into())));
        assert!(matches!(&fields["X"].kind, Some(value::Kind::StructValue(it)) if it.fields.len() == 1));
        let ip = node(&Identity { instance_ip: Some("10.0.0.1".into()), ..identity });
        assert!(ip.id.starts_with("ztunnel~10.0.0.1~"));
    }
}
