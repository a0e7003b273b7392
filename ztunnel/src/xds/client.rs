//! Carries a [`Session`] out: connects, keeps the stream, applies what comes, and starts again when it ends.

use std::collections::HashSet;
use std::error::Error;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::time::SystemTime;

use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::Instant;
use tonic::Code;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use ztunnel_proto::discovery::DeltaDiscoveryResponse;
use ztunnel_proto::discovery::Node;
use ztunnel_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use ztunnel_proto::prost::Message;
use ztunnel_proto::prost_types::ListValue;
use ztunnel_proto::prost_types::Struct;
use ztunnel_proto::prost_types::Value;
use ztunnel_proto::prost_types::value;

use crate::mesh::MeshWriter;
use crate::shutdown;
use crate::telemetry::Telemetry;
use crate::telemetry::metrics::Families;
use crate::telemetry::metrics::Source;
use crate::tls::grpc;
use crate::tls::grpc::Connector;
use crate::tls::grpc::ControlError;
use crate::tls::grpc::ControlPlane;
use crate::xds::backoff::Backoff;
use crate::xds::backoff::Ended;
use crate::xds::counts::Counts;
use crate::xds::counts::Reason;
use crate::xds::kept::Keeper;
use crate::xds::kept::Kept;
use crate::xds::session::Received;
use crate::xds::session::Session;

/// The largest response. The push of a whole mesh is one.
pub(super) const MESSAGE_MAX: usize = 200 * 1024 * 1024;
/// Resources that are applied before others on the thread get a turn: a few milliseconds' work.
const SLICE: usize = 512;
/// Requests on their way: two at the start, then one for each response, which is answered before the next is read.
const REQUESTS: usize = 4;

/// Bytes on their way: a push of a whole mesh is large.
const WINDOW: u32 = 4 * 1024 * 1024;

/// How often it is written down that the mesh is still the control plane's.
const CURRENT_EVERY: Duration = Duration::from_secs(15);

/// How long a new stream may stay without any response, unless said otherwise: a control plane that has just started
/// has much to do.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

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
}

/// How the mesh stands to the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// The first response of every type was accepted. Stays true.
    pub synced: bool,
    /// The mesh may be old since then: there has been no stream from that time on. `None` while there is one.
    pub stale_since: Option<Instant>,
    /// When the mesh was the control plane's, if it was kept from then, and not received since the start.
    pub kept: Option<SystemTime>,
    /// Resources that the control plane sent and this proxy rejected, in all.
    pub rejected: u64,
}

/// Starts the client on the runtime of the caller; it ends when the process does. It alone writes the mesh.
pub fn start(
    config: Config,
    cache: Option<PathBuf>,
    writer: MeshWriter,
    telemetry: &Telemetry,
    mut signal: shutdown::Signal,
) -> watch::Receiver<Status> {
    let counts = Arc::new(Counts::default());
    telemetry.register(Shown(Arc::clone(&counts)));
    let first = Status { synced: false, stale_since: Some(Instant::now()), kept: None, rejected: 0 };
    let (status, watched) = watch::channel(first);
    let session = Session::new(node(&config.identity));
    let Config { plane, answer_timeout, identity: _ } = config;
    let of = format!("{} {}", plane.address, plane.cluster);
    let plane = ControlPlane::new(plane);
    let mut client = Client { plane, answer_timeout, session, writer, counts, status, keeper: None };
    shutdown::spawn(async move {
        tokio::select! {
            () = async {
                if let Some(path) = cache {
                    client.restore(path, of).await;
                }
                client.run().await;
            } => {}
            // Whoever is still connected while the daemon drains stays under the newest policy.
            () = signal.closing() => {}
        }
    });
    watched
}

struct Shown(Arc<Counts>);

impl Source for Shown {
    fn collect(&self, families: &mut Families<'_>) -> fmt::Result {
        self.0.collect(families)
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
    plane: ControlPlane,
    answer_timeout: Duration,
    session: Session,
    writer: MeshWriter,
    counts: Arc<Counts>,
    status: watch::Sender<Status>,
    keeper: Option<Keeper>,
}

impl Client {
    /// Begins with the mesh that was kept at `path`, and keeps it there from now on.
    async fn restore(&mut self, path: PathBuf, of: String) {
        let (from, whose) = (path.clone(), of.clone());
        match spawn_blocking(move || Kept::open(&from, &whose)).await {
            Ok(Ok(Some(kept))) => self.replay(kept).await,
            Ok(Ok(None)) | Err(_) => {}
            Ok(Err(error)) => tracing::warn!(%error, path = %path.display(), "the kept mesh is of no use"),
        }
        match Keeper::start(path, of) {
            Ok(keeper) => {
                self.counts.unkept(keeper.lost());
                self.keeper = Some(keeper);
            }
            Err(error) => tracing::warn!(%error, "the mesh is not kept"),
        }
    }

    async fn replay(&mut self, kept: Kept) {
        let at = kept.at;
        let (mut kept, mut responses) = (Some(kept), 0_usize);
        while let Some(mut open) = kept.take() {
            let Ok((open, next)) = spawn_blocking(move || {
                let next = open.next();
                (open, next)
            })
            .await
            else {
                return;
            };
            let Some(response) = next else { break };
            kept = Some(open);
            responses += 1;
            if let Received::Push(mut push) = self.session.receive(response) {
                while !push.is_done() {
                    let changes = self.session.advance(&mut push, SLICE);
                    self.writer.draft(changes);
                    tokio::task::yield_now().await;
                }
            }
        }
        if responses == 0 {
            return;
        }
        self.writer.release();
        self.counts.current_at(at);
        self.status.send_modify(|status| status.kept = Some(at));
        let (workloads, services) = (self.writer.mesh().workloads().len(), self.writer.mesh().services_len());
        let age = at.elapsed().unwrap_or_default();
        tracing::info!(
            workloads,
            services,
            ?age,
            "serving the mesh as it was kept, until the control plane answers"
        );
    }

    async fn run(&mut self) {
        let mut backoff = Backoff::default();
        loop {
            let mut responses = 0_u64;
            let Err(interrupted) = self.connection(&mut responses).await;
            self.counts.connected(false);
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

    /// One connection, from its first to its last moment.
    async fn connection(&mut self, responses: &mut u64) -> Result<std::convert::Infallible, Interrupted> {
        let connector = self.plane.connector()?;
        let headers = self.plane.headers()?;
        let (requests, mut queue) = mpsc::channel(REQUESTS);
        for first in self.session.open() {
            // There is room for the first ones.
            let _full = requests.try_send(first);
        }
        let stream = futures_util::stream::poll_fn(move |cx| queue.poll_recv(cx));
        let mut request = tonic::Request::new(stream);
        *request.metadata_mut() = MetadataMap::from_headers(headers);
        let channel = connect(&self.plane, connector).await.map_err(Interrupted::Connect)?;
        let mut client =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MESSAGE_MAX);
        let silent = self.answer_timeout;
        let until = Instant::now() + silent;
        let stream = tokio::time::timeout_at(until, client.delta_aggregated_resources(request))
            .await
            .map_err(|_elapsed| Interrupted::Silent(silent))?
            .map_err(|status| Interrupted::Refused(Box::new(status)))?;
        let mut stream = stream.into_inner();
        tracing::info!(address = %self.plane.address(), "connected to the control plane");
        self.counts.connected(true);
        loop {
            let message = match *responses {
                0 => tokio::time::timeout_at(until, stream.message())
                    .await
                    .map_err(|_elapsed| Interrupted::Silent(silent))?,
                _ => loop {
                    tokio::select! {
                        message = stream.message() => break message,
                        () = tokio::time::sleep(CURRENT_EVERY) => self.current(),
                    }
                },
            };
            let response = message.map_err(|status| Interrupted::Broken(Box::new(status)))?;
            let response = response.ok_or(Interrupted::Complete)?;
            *responses += 1;
            let answer = self.apply(response).await;
            if requests.send(answer).await.is_err() {
                return Err(Interrupted::Complete);
            }
        }
    }

    /// The mesh is the control plane's now.
    fn current(&self) {
        if self.session.is_synced() {
            self.counts.current_at(SystemTime::now());
            if let Some(keeper) = &self.keeper {
                keeper.current();
            }
        }
    }

    /// Applies a response as a unit, and in slices: others on the thread are not held up.
    async fn apply(
        &mut self,
        response: DeltaDiscoveryResponse,
    ) -> ztunnel_proto::discovery::DeltaDiscoveryRequest {
        let bytes = response.encoded_len();
        let (resources, removed) = (response.resources.len(), response.removed_resources.len());
        let mut kept = self.keeper.is_some().then(|| response.clone());
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
            tokio::task::yield_now().await;
        }
        self.writer.release();
        self.counts.unknown_values(self.session.unknown_values());
        let rejected = push.rejected().len();
        if rejected > 0 {
            self.counts.rejected(kind, rejected);
            for (name, reason) in push.rejected().iter().take(10) {
                tracing::warn!(kind = kind.type_url(), name, %reason, "resource rejected");
            }
        }
        if let (Some(keeper), Some(mut accepted)) = (&self.keeper, kept.take()) {
            let bad: HashSet<&str> = push.rejected().iter().map(|(name, _)| name.as_str()).collect();
            accepted.resources.retain(|resource| !bad.contains(resource.name.as_str()));
            keeper.response(accepted);
        }
        tracing::debug!(kind = kind.type_url(), resources, removed, rejected, bytes, "response applied");
        let answer = self.session.finish(push);
        let synced = self.session.is_synced();
        self.current();
        self.status.send_if_modified(|status| {
            let before = *status;
            status.synced = synced;
            status.stale_since = None;
            status.rejected += rejected as u64;
            *status != before
        });
        answer
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
        assert_eq!(names, ["CLUSTER_ID", "INSTANCE_IPS", "NAME", "NAMESPACE", "NODE_NAME", "X"]);
        assert_eq!(fields["CLUSTER_ID"].kind, Some(value::Kind::StringValue("c1".into())));
        assert!(matches!(&fields["X"].kind, Some(value::Kind::StructValue(it)) if it.fields.len() == 1));
        let ip = node(&Identity { instance_ip: Some("10.0.0.1".into()), ..identity });
        assert!(ip.id.starts_with("ztunnel~10.0.0.1~"));
    }
}
