//! Pods that cannot be captured: they are closed, so that they do not go on in clear.

use std::collections::HashSet;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use ztunnel_ebpf_abi::{NO_SLOT, PodEntry};
use ztunnel_mesh::model::addr::PodUid;

use super::maps::absent;
use super::reconcile::chain;
use super::sys::{self, Attach};
use super::{Node, programs};
use crate::net::netns::Netns;

/// A pod for which there is no slot.
#[derive(Debug)]
pub(super) struct Unslotted {
    /// Of its namespace.
    cookie: u64,
    /// What refuses connections to it; none while that could not be attached.
    lookup: Option<OwnedFd>,
    /// One way at least could not be closed, the last time.
    failing: bool,
}

impl Unslotted {
    fn new(cookie: u64) -> Self {
        Self { cookie, lookup: None, failing: false }
    }
}

impl Node {
    /// Closes a pod that cannot be captured: it does not go on in clear.
    pub(super) fn shut(&mut self, uid: &PodUid) {
        let Some(known) = self.pods.get_mut(uid) else { return };
        known.closed = true;
        known.listeners = None;
        let (slot, cookie) = (known.slot, known.cookie);
        self.maps.clear_listeners(slot);
        // Either may be what failed; then the other closes one way at least.
        if let Err(error) = self.maps.pods.insert(cookie, PodEntry { slot, flags: 0 }, 0) {
            tracing::error!(pod = %uid, %error, "what the pod dials cannot be stopped");
        }
        if let Err(error) = self.attach_lookup(uid) {
            tracing::error!(pod = %uid, error = chain(&error), "what is dialled to the pod cannot be stopped");
        }
    }

    /// The same for one that there is no slot for: it is known by its namespace alone, and closed as long as we live.
    /// What fails of it is tried again whenever the pod is, and whatever of it is done is undone when it is let go.
    pub(super) fn shut_without_slot(&mut self, uid: &PodUid, netns: &Netns, cookie: u64) {
        if self.unslotted.get(uid).is_some_and(|known| known.cookie != cookie) {
            self.open_without_slot(uid);
        }
        let known = self.unslotted.entry(uid.clone()).or_insert_with(|| Unslotted::new(cookie));
        let entry = PodEntry { slot: NO_SLOT, flags: 0 };
        let marked = match self.maps.pods.get(&cookie, 0) {
            Ok(found) if found == entry => Ok(()),
            _ => self.maps.pods.insert(cookie, entry, 0),
        };
        known.lookup.take_if(|link| {
            !sys::link_state(link.as_fd(), Attach::SkLookup).is_ok_and(|state| state.target == netns.id().1)
        });
        let lookup = match known.lookup.take() {
            Some(lookup) => Ok(lookup),
            None => (self.loader.object(NO_SLOT))
                .and_then(|mut object| programs::load(&mut object, "steer"))
                .and_then(|program| {
                    Ok(sys::attach(program.as_fd(), netns.as_fd().as_raw_fd() as u32, Attach::SkLookup)?)
                }),
        };
        // Of what goes on failing it is said once.
        let told = std::mem::replace(&mut known.failing, marked.is_err() || lookup.is_err());
        if let Err(error) = marked
            && !told
        {
            tracing::error!(pod = %uid, %error, "what the pod dials cannot be stopped");
        }
        match lookup {
            Ok(lookup) => known.lookup = Some(lookup),
            Err(error) if !told => {
                tracing::error!(pod = %uid, %error, "what is dialled to the pod cannot be stopped");
            }
            Err(_) => {}
        }
    }

    /// Opens a pod that there was no slot for; false if it is none.
    pub(super) fn open_without_slot(&mut self, uid: &PodUid) -> bool {
        let Some(known) = self.unslotted.remove(uid) else { return false };
        if let Err(error) = absent(self.maps.pods.remove(&known.cookie)) {
            tracing::warn!(pod = %uid, %error, "the pod stays closed");
        }
        true
    }

    /// How many pods are closed because they cannot be captured.
    pub fn closed(&self) -> usize {
        self.pods.values().filter(|known| known.closed).count()
    }

    /// Whether this one is.
    pub fn is_closed(&self, uid: &PodUid) -> bool {
        self.pods.get(uid).is_some_and(|known| known.closed)
    }

    /// Removes entries of pods that an earlier daemon had no slot for.
    pub(super) fn open_strangers(&mut self) {
        let ours: HashSet<u64> = self.unslotted.values().map(|known| known.cookie).collect();
        let entries: Vec<_> = self.maps.pods.iter().flatten().collect();
        for (cookie, _) in
            entries.iter().filter(|(cookie, entry)| entry.slot == NO_SLOT && !ours.contains(cookie))
        {
            if let Err(error) = absent(self.maps.pods.remove(cookie)) {
                tracing::warn!(%error, "a pod that there was no slot for stays closed");
            }
        }
    }
}
