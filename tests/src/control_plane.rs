//! A control plane that does what a test says, on the wire formats of istiod.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use futures_util::Stream;
use futures_util::stream::poll_fn;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};
use ztunnel_proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use ztunnel_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

/// What is sent on a stream.
pub type Answer = Result<DeltaDiscoveryResponse, Status>;

/// A control plane that listens. Every stream is the test's to serve.
pub struct ControlPlane {
    /// Where it listens.
    pub address: SocketAddr,
    streams: mpsc::Receiver<Served>,
    /// How many more bytes it writes before its connections break.
    allowance: Arc<AtomicUsize>,
    connections: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

/// One stream of a client.
pub struct Served {
    /// The headers of the call.
    pub headers: MetadataMap,
    requests: Streaming<DeltaDiscoveryRequest>,
    answers: mpsc::Sender<Answer>,
}

impl Served {
    /// The client's next request; nothing once it is gone.
    pub async fn request(&mut self) -> Option<DeltaDiscoveryRequest> {
        self.requests.message().await.ok().flatten()
    }

    /// Sends a response.
    pub async fn send(&self, response: DeltaDiscoveryResponse) {
        self.answers.send(Ok(response)).await.expect("the stream is served");
    }

    /// Sends a response and gives the answer to it.
    pub async fn push(&mut self, response: DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
        self.send(response).await;
        self.request().await.expect("the client answers")
    }

    /// What comes, and where to send what goes.
    pub fn split(self) -> (Streaming<DeltaDiscoveryRequest>, mpsc::Sender<Answer>) {
        (self.requests, self.answers)
    }

    /// Ends the stream with an error.
    pub async fn fail(self, status: Status) {
        self.answers.send(Err(status)).await.expect("the stream is served");
    }
}

impl ControlPlane {
    /// Listens on this IPv4 address (port 0: any).
    pub async fn start(address: SocketAddr, tls: Arc<ServerConfig>) -> Self {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("an option");
        socket.bind(address).expect("the port is free");
        let listener = socket.listen(16).expect("it can listen");
        let address = listener.local_addr().expect("it has an address");
        let (accepted, mut incoming) = mpsc::channel(16);
        let allowance = Arc::new(AtomicUsize::new(usize::MAX));
        let connections = Arc::new(AtomicUsize::new(0));
        let accept = accept(listener, tls, Arc::clone(&allowance), Arc::clone(&connections), accepted);
        let mut tasks = JoinSet::new();
        tasks.spawn(accept);
        let (sender, streams) = mpsc::channel(16);
        let service = AggregatedDiscoveryServiceServer::new(Script(sender))
            .max_encoding_message_size(usize::MAX)
            .max_decoding_message_size(usize::MAX);
        let incoming = poll_fn(move |cx| incoming.poll_recv(cx));
        let serve = async move {
            let _ended = Server::builder().add_service(service).serve_with_incoming(incoming).await;
        };
        tasks.spawn(serve);
        Self { address, streams, allowance, connections, _tasks: tasks }
    }

    /// The next stream of a client.
    pub async fn stream(&mut self) -> Served {
        self.streams.recv().await.expect("it serves")
    }

    /// How many connections there have been.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Breaks its connections after so many more bytes.
    pub fn break_after(&self, bytes: usize) {
        self.allowance.store(bytes, Ordering::Relaxed);
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.break_after(0);
    }
}

async fn accept(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    allowance: Arc<AtomicUsize>,
    connections: Arc<AtomicUsize>,
    accepted: mpsc::Sender<io::Result<Wire>>,
) {
    loop {
        let Ok((socket, _)) = listener.accept().await else { return };
        connections.fetch_add(1, Ordering::Relaxed);
        // A client that does not like the certificate is none.
        let Ok(inner) = TlsAcceptor::from(Arc::clone(&tls)).accept(socket).await else { continue };
        let wire = Wire { inner, allowance: Arc::clone(&allowance) };
        if accepted.send(Ok(wire)).await.is_err() {
            return;
        }
    }
}

struct Script(mpsc::Sender<Served>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Script {
    type DeltaAggregatedResourcesStream = Pin<Box<dyn Stream<Item = Answer> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let headers = request.metadata().clone();
        if headers.get("authorization").is_some_and(|token| token == "Bearer expired") {
            return Err(Status::unauthenticated("the token has expired"));
        }
        let (answers, mut queue) = mpsc::channel(16);
        let served = Served { headers, requests: request.into_inner(), answers };
        self.0.send(served).await.map_err(|_| Status::unavailable("it stops"))?;
        Ok(Response::new(Box::pin(poll_fn(move |cx| queue.poll_recv(cx)))))
    }
}

/// A connection that may break in the middle of a message.
struct Wire {
    inner: TlsStream<TcpStream>,
    allowance: Arc<AtomicUsize>,
}

impl Connected for Wire {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let allowed = self.allowance.load(Ordering::Relaxed).min(bytes.len());
        if allowed == 0 && !bytes.is_empty() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, &bytes[..allowed]))?;
        if self.allowance.load(Ordering::Relaxed) != usize::MAX {
            self.allowance.fetch_sub(written, Ordering::Relaxed);
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
