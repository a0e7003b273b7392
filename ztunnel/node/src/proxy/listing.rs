//! Which connections are open, for those who ask: the data path only enters and leaves.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use parking_lot::MutexGuard;
use slab::Slab;
use ztunnel_mesh::model::addr::OriginalDst;
use ztunnel_mesh::model::addr::PodUid;

use crate::telemetry::events::Reporter;

/// Entries copied before the thread that owns them gets its turn.
const BATCH: usize = 256;

/// One open connection or stream of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// Whose it is.
    pub pod: PodUid,
    /// Whether it leaves the pod (source) or comes to it (destination).
    pub reporter: Reporter,
    /// Where it came from.
    pub source: SocketAddr,
    /// What the client meant, if that is known.
    pub original: Option<Original>,
    /// Where it goes: the peer for one that leaves the pod, the application for one that comes to it.
    pub actual: SocketAddr,
    /// What carries it outside of the pod.
    pub carrier: Carrier,
}

/// What carries a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// Nothing but itself.
    Tcp,
    /// A tunnel.
    Hbone,
    /// A tunnel within a tunnel to the gateway of another network.
    DoubleHbone,
}

/// What a client dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Original {
    /// This address.
    Address(OriginalDst),
    /// An address of the service of this name.
    Host(Arc<str>),
}

/// The open connections of one thread.
#[derive(Debug, Clone, Default)]
pub struct Listing(Arc<Mutex<Slab<Connection>>>);

impl Listing {
    /// The connection is open until the answer is dropped.
    pub fn enter(&self, connection: Connection) -> Listed {
        let key = self.entries().insert(connection);
        Listed { listing: self.clone(), key }
    }

    /// All that are open. What comes and goes meanwhile may be in it or not.
    pub fn all(&self) -> Vec<Connection> {
        let mut all = Vec::with_capacity(self.entries().len());
        let mut from = 0;
        loop {
            let entries = self.entries();
            // Keys are given out densely, so this bounds what is looked at, too.
            if from >= entries.capacity() {
                return all;
            }
            all.extend((from..from + BATCH).filter_map(|key| entries.get(key)).cloned());
            from += BATCH;
        }
    }

    fn entries(&self) -> MutexGuard<'_, Slab<Connection>> {
        self.0.lock()
    }
}

/// An open connection; no longer one when dropped.
#[derive(Debug)]
#[must_use]
pub struct Listed {
    listing: Listing,
    key: usize,
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut entries = self.listing.entries();
        entries.try_remove(self.key);
        if entries.is_empty() && entries.capacity() > BATCH {
            // A crowd that has left keeps no room.
            entries.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(port: u16) -> Connection {
        Connection {
            pod: PodUid::from("pod"),
            reporter: Reporter::Source,
            source: SocketAddr::from(([10, 0, 0, 1], port)),
            original: None,
            actual: SocketAddr::from(([10, 0, 0, 2], 80)),
            carrier: Carrier::Tcp,
        }
    }

    #[test]
    fn connections_are_listed_while_they_are_open() {
        let listing = Listing::default();
        let many = 3 * BATCH as u16;
        let mut open: Vec<_> = (0..many).map(|port| listing.enter(connection(port))).collect();
        assert_eq!(listing.all().len(), usize::from(many));
        // Every other one, so that there are gaps.
        let mut index = 0;
        open.retain(|_| {
            index += 1;
            index % 2 == 0
        });
        let mut ports: Vec<_> = listing.all().iter().map(|connection| connection.source.port()).collect();
        ports.sort_unstable();
        assert_eq!(ports, (0..many).filter(|port| port % 2 == 1).collect::<Vec<_>>());
        drop(open);
        assert!(listing.all().is_empty() && listing.entries().capacity() <= BATCH);
    }
}
