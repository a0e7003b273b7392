//! What the connections of one pod share.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use http::HeaderValue;
use parking_lot::Mutex;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::store::MeshReader;
use ztunnel_mesh::store::index::Mesh;
use ztunnel_mesh::store::lookup::Lookup;
use ztunnel_mesh::store::lookup::UnknownWorkload;
use ztunnel_runtime::shutdown::Signal;

use crate::hbone::address::Baggage;
use crate::net::budget::Holder;
use crate::net::budget::Share;
use crate::net::socket::PodNetwork;
use crate::proxy::PodSpec;
use crate::proxy::bounds::CONNECTION_COST;
use crate::proxy::bounds::TUNNEL_COST;
use crate::proxy::handshakes::Handshakes;
use crate::proxy::handshakes::Source;
use crate::proxy::tunnels::Tunnels;

/// A pod whose connections are taken. It lives as long as one of them.
pub struct Pod {
    /// This incarnation.
    pub uid: PodUid,
    workload: Lookup,
    /// Set where it is this proxy's own pod.
    own: Option<Own>,
    /// Its network namespace.
    pub netns: (u64, u64),
    /// How to dial for it.
    pub network: Arc<dyn PodNetwork>,
    addresses: Vec<IpAddr>,
    stopped: Signal,
    /// Closes when what is still open of a removed pod is to be closed; `None` where that goes on to its end.
    closed: Option<Signal>,
    handing_over: Signal,
    connections: AtomicUsize,
    tunnels: AtomicUsize,
    /// Handshakes of peers.
    pub handshakes: Handshakes,
    /// Tunnels of peers, by who they are.
    pub peers: Tunnels,
    /// What it makes this process hold.
    share: Arc<Share>,
    /// Rendered once per version of the workload, not once per connection.
    baggage: Mutex<Option<(Arc<Workload>, HeaderValue)>>,
}

impl Pod {
    /// `stopped` drains when the pod is removed, `handing_over` when another process takes over; `closed` closes when a
    /// removed pod's connections are to end; `share` is charged for what is held for it.
    pub(super) fn new(
        spec: PodSpec,
        netns: (u64, u64),
        network: Arc<dyn PodNetwork>,
        stopped: Signal,
        closed: Option<Signal>,
        handing_over: Signal,
        share: Arc<Share>,
    ) -> Self {
        Self {
            uid: spec.uid,
            workload: Lookup::new(spec.workload),
            own: None,
            netns,
            network,
            addresses: spec.addresses,
            stopped,
            closed,
            handing_over,
            connections: AtomicUsize::new(0),
            tunnels: AtomicUsize::new(0),
            handshakes: Handshakes::default(),
            peers: Tunnels::default(),
            share,
            baggage: Mutex::new(None),
        }
    }

    /// The same pod, which is this proxy's own.
    pub(super) fn owned(self, own: Own) -> Self {
        Self { own: Some(own), ..self }
    }

    /// Who the pod is, where that is not for the mesh to say.
    pub fn identity(&self) -> Option<&SpiffeId> {
        self.own.as_ref().map(|own| &own.identity)
    }

    /// Whether peers may have `port`, as far as that does not depend on who asks.
    pub fn offers(&self, port: u16) -> bool {
        self.own.as_ref().is_none_or(|own| own.port == port)
    }

    /// The pod's workload, and the mesh that knows it. Waits a little for one that does not know it yet.
    pub async fn workload(&self, mesh: &MeshReader) -> Result<(Arc<Mesh>, Arc<Workload>), UnknownWorkload> {
        self.workload.find_workload(mesh).await
    }

    /// What the pod's workload is known by.
    pub(super) fn named(&self) -> &Named {
        self.workload.named()
    }

    /// When what is open of the removed pod is to be closed.
    pub(super) fn closed(&self) -> Option<Signal> {
        self.closed.clone()
    }

    /// Whether the pod was redirected and no longer is: no rule brings answers to a client's address back to the sockets
    /// here.
    pub fn is_unrouted(&self) -> bool {
        self.closed.as_ref().is_some_and(Signal::is_draining)
    }

    /// Waits for that; for ever where nothing depends on somebody else's rules.
    pub async fn unrouted(&self) {
        match self.closed() {
            Some(mut closed) => closed.draining().await,
            None => std::future::pending().await,
        }
    }

    /// Whether `ip` is an address of the pod.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.addresses.contains(&ip)
    }

    /// All of them.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Waits for the pod's removal, without keeping the pod meanwhile.
    pub fn removed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut stopped = self.stopped.clone();
        async move { stopped.draining().await }
    }

    /// Whether it was removed, or another process takes over.
    pub fn is_leaving(&self) -> bool {
        self.stopped.is_draining() || self.handing_over.is_draining()
    }

    /// Waits for another process to take over.
    pub async fn handed_over(&self) {
        self.handing_over.clone().draining().await;
    }

    /// Waits for another process to take over on the same listening sockets.
    pub async fn sockets_handed_over(&self) {
        self.handing_over.clone().closing().await;
    }

    /// One more connection, unless `max` are open.
    pub fn admit(self: &Arc<Self>, max: usize) -> Option<Admitted> {
        Admitted::new(self, |pod| &pod.connections, max)
    }

    /// Who is charged for one more connection that the pod dials.
    pub fn connection_holder(&self) -> Holder {
        self.share.holder(CONNECTION_COST)
    }

    /// The same for one connection or stream that `source` dials of the pod.
    pub fn connection_holder_for(&self, source: IpAddr) -> Holder {
        self.share.holder_for(Source::from(source).address(), CONNECTION_COST)
    }

    /// Who is charged for one more tunnel that is dialled for the pod.
    pub fn tunnel_holder(&self) -> Holder {
        self.share.holder(TUNNEL_COST)
    }

    /// The same for one that `source` dials.
    pub fn tunnel_holder_for(&self, source: IpAddr) -> Holder {
        self.share.holder_for(Source::from(source).address(), TUNNEL_COST)
    }

    /// One more tunnel to the pod, unless `max` are open.
    pub fn admit_tunnel(self: &Arc<Self>, max: usize) -> Option<Admitted> {
        Admitted::new(self, |pod| &pod.tunnels, max)
    }

    /// The `baggage` of the pod's `workload`.
    pub fn baggage(&self, workload: &Arc<Workload>) -> HeaderValue {
        let mut cached = self.baggage.lock();
        if let Some((rendered, value)) = &*cached
            && Arc::ptr_eq(rendered, workload)
        {
            return value.clone();
        }
        let text = Baggage::of(workload).to_string();
        // Baggage writes visible ASCII only.
        let value = HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""));
        *cached = Some((Arc::clone(workload), value.clone()));
        value
    }
}

/// What is different in this proxy's own pod, in which no application runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    /// Who it is, whatever the mesh says.
    pub identity: SpiffeId,
    /// The one port that peers may have.
    pub port: u16,
}

/// A pod has too many connections.
#[derive(Debug, thiserror::Error)]
#[error("the pod already has {0} connections, the most it may have")]
pub struct TooMany(pub usize);

/// A place among those a pod may have, given back when dropped.
pub struct Admitted {
    pod: Arc<Pod>,
    which: fn(&Pod) -> &AtomicUsize,
}

impl Admitted {
    fn new(pod: &Arc<Pod>, which: fn(&Pod) -> &AtomicUsize, max: usize) -> Option<Self> {
        // Two threads may both see the last place; then both give it back.
        if which(pod).fetch_add(1, Ordering::Relaxed) >= max {
            which(pod).fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Self { pod: Arc::clone(pod), which })
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        (self.which)(&self.pod).fetch_sub(1, Ordering::Relaxed);
    }
}
