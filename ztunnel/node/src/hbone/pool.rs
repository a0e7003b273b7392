//! Which tunnel a new stream goes over.
//!
//! One pool per data-plane thread. A tunnel belongs to a [`Key`]: nothing else may be on it. One dial at a time
//! per key: who comes meanwhile waits for it and shares its failure. A tunnel takes streams while it has room,
//! and again when some have ended; when all are full another is dialled beside them. One is as good as full while its
//! peer takes nothing any more on any stream, as what waits on some may hold up all others there.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use parking_lot::MutexGuard;
use tokio::sync::oneshot;
use ztunnel_mesh::model::addr::HbonePeer;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_runtime::shutdown;
use ztunnel_tls::configs::Credentials;

use crate::hbone::client::DialError;
use crate::hbone::client::Driver;
use crate::hbone::client::Lease;
use crate::hbone::client::Tunnel;

/// What streams must have in common to share a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// Who the source is: the peer sees one identity per tunnel.
    pub source: SpiffeId,
    /// The network namespace of the pod: the peer sees one client address per tunnel.
    pub netns: (u64, u64),
    /// Who is dialled.
    pub peer: HbonePeer,
    /// Who must answer.
    pub expect: Vec<SpiffeId>,
}

/// What a dial comes to.
pub type Dialled = Result<(Arc<Tunnel>, Driver), DialError>;

/// Makes the dial for a key.
pub trait Dialer: Sync {
    /// The credentials to dial with as of now. A tunnel made with others keeps its streams and gets no new ones:
    /// newer ones exist only when the older are due for renewal.
    fn credentials(&self) -> Arc<Credentials>;

    /// Dials with `credentials`. It runs apart from who asked, as others wait for it as well.
    fn dial(&self, credentials: Arc<Credentials>) -> Pin<Box<dyn Future<Output = Dialled> + Send>>;

    /// Resolves when the source is going: from then on a tunnel without streams is closed. Each keeps the source's
    /// network namespace alive.
    fn over(&self) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// Tunnels that a peer may have let run full before further streams share them nevertheless.
pub const EXHAUSTED_MAX: usize = 8;

/// How often one request may find that others were quicker before it gives up.
const ROUNDS_MAX: usize = 16;

/// The tunnels of one thread. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Pool {
    peers: Arc<Mutex<HashMap<Key, Peer>>>,
    waiters_max: usize,
    spare_timeout: Duration,
}

#[derive(Debug, Default)]
struct Peer {
    tunnels: Vec<(Arc<Credentials>, Arc<Tunnel>)>,
    /// Whether [`Pool::thin_out`] runs.
    thinning: bool,
    /// While a dial is under way: who waits for it.
    dialling: Option<Vec<oneshot::Sender<Shared>>>,
}

/// What all who waited for a dial are told.
type Shared = Result<(), Arc<DialError>>;

/// A stream's room, and whether the tunnel was there before.
#[derive(Debug)]
pub struct Leased {
    /// The room.
    pub lease: Lease,
    /// Whether the tunnel was dialled earlier, and so may have died unnoticed.
    pub reused: bool,
}

enum Next {
    Leased(Lease),
    Wait(oneshot::Receiver<Shared>),
    Busy(usize),
}

impl Pool {
    /// An empty pool. At most `waiters_max` requests wait for one dial; further ones fail at once. A tunnel without
    /// streams is closed after `spare_timeout` while there is another with room.
    pub fn new(waiters_max: usize, spare_timeout: Duration) -> Self {
        Self { peers: Arc::default(), waiters_max, spare_timeout }
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<Key, Peer>> {
        self.peers.lock()
    }

    /// Room for a stream under `key`; a tunnel is dialled if there is none.
    pub async fn lease(&self, key: &Key, dialer: &dyn Dialer) -> Result<Leased, Arc<DialError>> {
        let mut reused = true;
        for _round in 0..ROUNDS_MAX {
            match self.next(key, dialer) {
                Next::Leased(lease) => return Ok(Leased { lease, reused }),
                Next::Busy(waiting) => return Err(Arc::new(DialError::Busy { peer: key.peer, waiting })),
                Next::Wait(dialled) => {
                    reused = false;
                    // The sender is dropped only with the runtime, and this future with it.
                    if let Ok(Err(error)) = dialled.await {
                        // One on which nothing moves for now is better than none.
                        return match self.any(key) {
                            Some(lease) => Ok(Leased { lease, reused: true }),
                            None => Err(error),
                        };
                    }
                }
            }
        }
        Err(Arc::new(DialError::NoRoom { peer: key.peer }))
    }

    fn any(&self, key: &Key) -> Option<Lease> {
        self.peers().get(key)?.tunnels.iter().find_map(|(_, tunnel)| tunnel.lease())
    }

    fn next(&self, key: &Key, dialer: &dyn Dialer) -> Next {
        let credentials = dialer.credentials();
        let mut peers = self.peers();
        if !peers.contains_key(key) {
            peers.insert(key.clone(), Peer::default());
        }
        let peer = peers.get_mut(key).expect("it was put there if it was not");
        peer.tunnels.retain(|(made_with, tunnel)| {
            if !Arc::ptr_eq(made_with, &credentials) {
                tunnel.retire();
            }
            tunnel.is_open()
        });
        // The first with room, so that those that are not needed run empty and can be closed.
        let exhausted = peer.tunnels.iter().filter(|(_, tunnel)| tunnel.is_exhausted()).count();
        let mut fit = peer.tunnels.iter().filter(|(_, tunnel)| !tunnel.is_exhausted());
        if let Some(lease) = fit.find_map(|(_, tunnel)| tunnel.lease()) {
            return Next::Leased(lease);
        }
        if exhausted >= EXHAUSTED_MAX
            && let Some(lease) = peer.tunnels.iter().find_map(|(_, tunnel)| tunnel.lease())
        {
            return Next::Leased(lease);
        }
        let (sender, receiver) = oneshot::channel();
        match &mut peer.dialling {
            Some(waiters) if waiters.len() >= self.waiters_max => return Next::Busy(waiters.len()),
            Some(waiters) => waiters.push(sender),
            None => {
                peer.dialling = Some(vec![sender]);
                let (dial, over) = (dialer.dial(Arc::clone(&credentials)), dialer.over());
                let (pool, key) = (self.clone(), key.clone());
                shutdown::spawn(async move { pool.run(key, credentials, dial, over).await });
            }
        }
        Next::Wait(receiver)
    }

    /// Dials, tells who waits, and stays with the tunnel until it is closed.
    async fn run(
        &self,
        key: Key,
        made_with: Arc<Credentials>,
        dial: impl Future<Output = Dialled>,
        over: Pin<Box<dyn Future<Output = ()> + Send>>,
    ) {
        let mut dialled = dial.await;
        let waiters = {
            let mut peers = self.peers();
            let peer = peers.entry(key.clone()).or_default();
            if let Ok((tunnel, _)) = &mut dialled {
                peer.tunnels.push((made_with, Arc::clone(tunnel)));
                if peer.tunnels.len() > 1 && !std::mem::replace(&mut peer.thinning, true) {
                    let (pool, key) = (self.clone(), key.clone());
                    shutdown::spawn(async move { pool.thin_out(key).await });
                }
            }
            peer.dialling.take().unwrap_or_default()
        };
        match dialled {
            Ok((tunnel, mut driver)) => {
                for waiter in waiters {
                    let _gone = waiter.send(Ok(()));
                }
                let ended = tokio::select! {
                    ended = &mut driver => ended,
                    () = over => {
                        tunnel.retire_when_idle();
                        driver.await
                    }
                };
                if let Err(error) = ended {
                    tracing::debug!(peer = %key.peer.0, error = &error as &dyn std::error::Error, "tunnel broke");
                }
                self.forget(&key, Some(&tunnel));
            }
            Err(error) => {
                let error = Arc::new(error);
                for waiter in waiters {
                    let _gone = waiter.send(Err(Arc::clone(&error)));
                }
                self.forget(&key, None);
            }
        }
    }

    /// Closes tunnels that no longer are needed beside others, until there is one.
    async fn thin_out(&self, key: Key) {
        loop {
            tokio::time::sleep(self.spare_timeout).await;
            let mut peers = self.peers();
            let Some(peer) = peers.get_mut(&key) else { return };
            if peer.tunnels.len() < 2 {
                peer.thinning = false;
                return;
            }
            // The one the next stream would take stays.
            let next =
                peer.tunnels.iter().position(|(_, tunnel)| tunnel.has_room() && !tunnel.is_exhausted());
            for (index, (_, tunnel)) in peer.tunnels.iter().enumerate() {
                if next.is_some_and(|next| next != index) {
                    tunnel.retire_if_idle(self.spare_timeout);
                }
            }
        }
    }

    fn forget(&self, key: &Key, ended: Option<&Arc<Tunnel>>) {
        let mut peers = self.peers();
        let Some(peer) = peers.get_mut(key) else { return };
        peer.tunnels.retain(|(_, tunnel)| !ended.is_some_and(|ended| Arc::ptr_eq(ended, tunnel)));
        if peer.tunnels.is_empty() && peer.dialling.is_none() {
            peers.remove(key);
        }
    }

    /// Takes no new streams on any tunnel there is: each closes when its last stream has ended.
    pub fn retire_all(&self) {
        for peer in self.peers().values() {
            for (_, tunnel) in &peer.tunnels {
                tunnel.retire();
            }
        }
    }

    /// How many tunnels there are.
    pub fn tunnels(&self) -> usize {
        self.peers().values().map(|peer| peer.tunnels.len()).sum()
    }
}

#[cfg(test)]
impl Pool {
    /// The tunnel, where there is one.
    pub(crate) fn only_tunnel(&self) -> Arc<Tunnel> {
        let peers = self.peers();
        let mut all = peers.values().flat_map(|peer| &peer.tunnels);
        let (Some((_, only)), None) = (all.next(), all.next()) else { panic!("not one tunnel") };
        Arc::clone(only)
    }
}
