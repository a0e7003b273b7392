//! What the connections of one pod share.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::Weak;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http::HeaderValue;
use tokio::time::timeout;

use crate::hbone::address::Baggage;
use crate::mesh::MeshReader;
use crate::mesh::index::Mesh;
use crate::model::addr::PodUid;
use crate::model::identity::SpiffeId;
use crate::model::workload::Named;
use crate::model::workload::Workload;
use crate::net::socket::PodNetwork;
use crate::proxy::PodSpec;
use crate::shutdown::Signal;

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
    /// Closes when what is still open of a removed pod is to be cut; `None` where that goes on to its end.
    cut: Option<Signal>,
    handing_over: Signal,
    connections: AtomicUsize,
    tunnels: AtomicUsize,
    handshakes: AtomicUsize,
    /// Rendered once per version of the workload, not once per connection.
    baggage: Mutex<Option<(Arc<Workload>, HeaderValue)>>,
}

impl Pod {
    /// `stopped` drains when the pod is removed, `handing_over` when another process takes over; `cut` closes when a
    /// removed pod's connections are to end.
    pub(super) fn new(
        spec: PodSpec,
        netns: (u64, u64),
        network: Arc<dyn PodNetwork>,
        stopped: Signal,
        cut: Option<Signal>,
        handing_over: Signal,
    ) -> Self {
        Self {
            uid: spec.uid,
            workload: Lookup::new(spec.workload),
            own: None,
            netns,
            network,
            addresses: spec.addresses,
            stopped,
            cut,
            handing_over,
            connections: AtomicUsize::new(0),
            tunnels: AtomicUsize::new(0),
            handshakes: AtomicUsize::new(0),
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

    /// The unique name of the pod's workload. Waits a little for a mesh that does not know it yet.
    pub async fn workload(&self, mesh: &MeshReader) -> Result<Arc<str>, UnknownWorkload> {
        self.workload.find(mesh).await
    }

    /// What the pod's workload is known by.
    pub(super) fn named(&self) -> &Named {
        &self.workload.named
    }

    /// When what is open of the removed pod is to be cut.
    pub(super) fn cut(&self) -> Option<Signal> {
        self.cut.clone()
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

    /// One more tunnel to the pod, unless `max` are open.
    pub fn admit_tunnel(self: &Arc<Self>, max: usize) -> Option<Admitted> {
        Admitted::new(self, |pod| &pod.tunnels, max)
    }

    /// One more handshake, unless `max` are in progress.
    pub fn admit_handshake(self: &Arc<Self>, max: usize) -> Option<Admitted> {
        Admitted::new(self, |pod| &pod.handshakes, max)
    }

    /// The `baggage` of the pod's `workload`.
    pub fn baggage(&self, workload: &Arc<Workload>) -> HeaderValue {
        let mut cached = self.baggage.lock().unwrap_or_else(PoisonError::into_inner);
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

/// The mesh does not know the pod.
#[derive(Debug, thiserror::Error)]
#[error("failed to fetch information about local workload: {0}")]
pub struct UnknownWorkload(pub Named);

/// A connection waits no longer for its pod to become known to the mesh.
const LOOKUP_WITHIN: Duration = Duration::from_secs(5);

/// Finds a pod's workload, and remembers which it is.
struct Lookup {
    named: Named,
    found: Mutex<Found>,
}

#[derive(Default)]
struct Found {
    uid: Option<Arc<str>>,
    /// The mesh in which it was not found: it is looked through once.
    missing_in: Weak<Mesh>,
}

impl Lookup {
    fn new(named: Named) -> Self {
        Self { named, found: Mutex::default() }
    }

    async fn find(&self, mesh: &MeshReader) -> Result<Arc<str>, UnknownWorkload> {
        if let Named::Uid(uid) = &self.named {
            return Ok(Arc::clone(uid));
        }
        if let Some(uid) = self.find_in(&mesh.snapshot()) {
            return Ok(uid);
        }
        // A handle of its own remembers from when on it looks: no version falls between.
        let mut mesh = mesh.clone();
        let wait = async {
            loop {
                if let Some(uid) = self.find_in(&mesh.snapshot()) {
                    return Some(uid);
                }
                if !mesh.changed().await {
                    return None;
                }
            }
        };
        let found = timeout(LOOKUP_WITHIN, wait).await.ok().flatten();
        found.ok_or_else(|| UnknownWorkload(self.named.clone()))
    }

    fn find_in(&self, mesh: &Arc<Mesh>) -> Option<Arc<str>> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(uid) = &found.uid
            && mesh.workload(uid).is_some_and(|workload| self.named.is(workload))
        {
            return Some(Arc::clone(uid));
        }
        // While the weak reference is there no other mesh has the same address.
        if std::ptr::eq(found.missing_in.as_ptr(), Arc::as_ptr(mesh)) {
            return None;
        }
        found.uid = mesh
            .workloads()
            .find(|workload| self.named.is(workload))
            .map(|workload| Arc::clone(&workload.uid));
        if found.uid.is_none() {
            found.missing_in = Arc::downgrade(mesh);
        }
        found.uid.clone()
    }
}

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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use crate::mesh::mesh;
    use crate::model::identity::TrustDomain;

    use super::*;

    fn workload(uid: &str, name: &str, account: &str, node: &str) -> Arc<Workload> {
        let identity = SpiffeId::new(&TrustDomain::default(), "shop", account).unwrap();
        let sample = Workload::sample("shop", name);
        Arc::new(Workload { uid: uid.into(), identity, node: node.into(), ..sample })
    }

    fn of(workloads: impl IntoIterator<Item = Arc<Workload>>) -> Mesh {
        Mesh::new(TrustDomain::default(), workloads, [], [])
    }

    fn lookup() -> Lookup {
        let [name, namespace, service_account, node] = ["cart-1", "shop", "cart", "n1"].map(Arc::from);
        Lookup::new(Named::Pod { name, namespace, service_account, node })
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_pod_of_that_name_account_and_node_is_meant() {
        let (mut writer, reader) = mesh();
        let others =
            [("a", "cart-2", "cart", "n1"), ("b", "cart-1", "other", "n1"), ("c", "cart-1", "cart", "n2")];
        let others = others.map(|(uid, name, account, node)| workload(uid, name, account, node));
        writer.publish(of(others.clone()));
        let error = lookup().find(&reader).await.unwrap_err();
        assert!(error.to_string().contains("cart.shop (cart-1)"), "{error}");
        writer.publish(of(others.into_iter().chain([workload("d", "cart-1", "cart", "n1")])));
        assert_eq!(&*lookup().find(&reader).await.unwrap(), "d");
    }

    #[tokio::test(start_paused = true)]
    async fn a_workload_that_comes_late_is_waited_for() {
        let (mut writer, reader) = mesh();
        let lookup = lookup();
        let (found, ()) = tokio::join!(lookup.find(&reader), async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            writer.publish(of([]));
            tokio::time::sleep(Duration::from_secs(2)).await;
            writer.publish(of([workload("d", "cart-1", "cart", "n1")]));
        });
        assert_eq!(&*found.unwrap(), "d");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_found_is_looked_for_again_once_it_is_another() {
        let (mut writer, reader) = mesh();
        let lookup = lookup();
        let mut seen = HashSet::new();
        for uid in ["d", "e"] {
            writer.publish(of([workload(uid, "cart-1", "cart", "n1")]));
            for _ in 0..2 {
                seen.insert(lookup.find(&reader).await.unwrap());
            }
        }
        writer.publish(of([workload("e", "cart-1", "thief", "n1")]));
        assert!(lookup.find(&reader).await.is_err(), "another account under the same uid");
        assert_eq!(seen.len(), 2);
    }
}
