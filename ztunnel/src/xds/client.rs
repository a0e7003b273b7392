//! Carries a [`Session`] out: connects, keeps the stream, applies what comes, and starts again when it ends.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Code;
use tonic::metadata::AsciiMetadataKey;
use tonic::metadata::AsciiMetadataValue;
use tonic::metadata::MetadataMap;
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
use crate::tls::control;
use crate::tls::control::Roots;
use crate::tls::control::RootsError;
use crate::xds::backoff::Backoff;
use crate::xds::backoff::Ended;
use crate::xds::connect::connect;
use crate::xds::counts::Counts;
use crate::xds::counts::Reason;
use crate::xds::session::Received;
use crate::xds::session::Session;

/// The largest response. The push of a whole mesh is one.
const MESSAGE_MAX: usize = 200 * 1024 * 1024;
/// Resources that are applied before others on the thread get a turn: a few milliseconds' work.
const SLICE: usize = 512;
/// Requests on their way: two at the start, then one for each response, which is answered before the next is read.
const REQUESTS: usize = 4;

/// Where the token is that says who this node is.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// In this file, which is read for every new connection. Without the file there is no token.
    File(PathBuf),
    /// This is it.
    Literal(String),
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Literal(_) => f.write_str("a literal"),
        }
    }
}

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
    /// The control plane: `https://host:port`. With `http` there is no TLS, and nobody is verified.
    pub address: Uri,
    /// Who vouches for it.
    pub roots: Roots,
    /// A DNS name that its certificate may have in place of the address's.
    pub alt_hostname: Option<String>,
    /// The token to present.
    pub token: Option<Token>,
    /// The cluster of this node.
    pub cluster_id: String,
    /// Headers to add to the call.
    pub headers: Vec<(String, String)>,
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
    /// Resources that the control plane sent and this proxy rejected, in all.
    pub rejected: u64,
}

/// Starts the client on the runtime of the caller; it ends when the process does. It alone writes the mesh.
pub fn start(
    config: Config,
    writer: MeshWriter,
    telemetry: &Telemetry,
    mut signal: shutdown::Signal,
) -> watch::Receiver<Status> {
    let counts = Arc::new(Counts::default());
    telemetry.register(Shown(Arc::clone(&counts)));
    let first = Status { synced: false, stale_since: Some(Instant::now()), rejected: 0 };
    let (status, watched) = watch::channel(first);
    let session = Session::new(node(&config.identity));
    let mut client = Client { config, session, writer, counts, status };
    shutdown::spawn(async move {
        tokio::select! {
            () = client.run() => {}
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
    Roots(RootsError),
    #[error("cannot read the token")]
    Token(#[source] io::Error),
    #[error("{0:?} cannot be sent as a header")]
    Header(String),
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
            Self::Roots(_) | Self::Token(_) | Self::Header(_) | Self::Broken(_) | Self::Silent(_) => {
                Reason::Error
            }
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
    session: Session,
    writer: MeshWriter,
    counts: Arc<Counts>,
    status: watch::Sender<Status>,
}

impl Client {
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
        let config = &self.config;
        let tls = match config.address.scheme_str() {
            Some("http") => None,
            _ => {
                let also = config.alt_hostname.as_deref();
                Some(control::client_config(&config.roots, also).map_err(Interrupted::Roots)?)
            }
        };
        let (requests, mut queue) = mpsc::channel(REQUESTS);
        for first in self.session.open() {
            // There is room for the first ones.
            let _full = requests.try_send(first);
        }
        let stream = futures_util::stream::poll_fn(move |cx| queue.poll_recv(cx));
        let mut request = tonic::Request::new(stream);
        headers(config, request.metadata_mut())?;
        let channel = connect(&config.address, tls).await.map_err(Interrupted::Connect)?;
        let mut client =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MESSAGE_MAX);
        let silent = config.answer_timeout;
        let until = Instant::now() + silent;
        let stream = tokio::time::timeout_at(until, client.delta_aggregated_resources(request))
            .await
            .map_err(|_elapsed| Interrupted::Silent(silent))?
            .map_err(|status| Interrupted::Refused(Box::new(status)))?;
        let mut stream = stream.into_inner();
        tracing::info!(address = %config.address, "connected to the control plane");
        self.counts.connected(true);
        loop {
            let message = match *responses {
                0 => tokio::time::timeout_at(until, stream.message())
                    .await
                    .map_err(|_elapsed| Interrupted::Silent(silent))?,
                _ => stream.message().await,
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

    /// Applies a response as a unit, and in slices: others on the thread are not held up.
    async fn apply(
        &mut self,
        response: DeltaDiscoveryResponse,
    ) -> ztunnel_proto::discovery::DeltaDiscoveryRequest {
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
        tracing::debug!(kind = kind.type_url(), resources, removed, rejected, bytes, "response applied");
        let answer = self.session.finish(push);
        let synced = self.session.is_synced();
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

/// The headers of the call: the token, the cluster, and what else was configured.
fn headers(config: &Config, headers: &mut MetadataMap) -> Result<(), Interrupted> {
    let mut insert = |name: &str, value: &str, secret: bool| {
        let key = AsciiMetadataKey::from_bytes(name.to_ascii_lowercase().as_bytes());
        let key = key.map_err(|_| Interrupted::Header(name.to_owned()))?;
        let value = AsciiMetadataValue::try_from(value);
        let mut value = value.map_err(|_| Interrupted::Header(name.to_owned()))?;
        value.set_sensitive(secret);
        headers.insert(key, value);
        Ok(())
    };
    let token = match &config.token {
        None => None,
        Some(Token::Literal(token)) => Some(token.clone()),
        Some(Token::File(path)) => match std::fs::read_to_string(path) {
            Ok(token) => Some(token),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Interrupted::Token(error)),
        },
    };
    if let Some(token) = token {
        insert("authorization", &format!("Bearer {}", token.trim()), true)?;
    }
    insert("clusterid", &config.cluster_id, false)?;
    config.headers.iter().try_for_each(|(name, value)| insert(name, value, false))
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
