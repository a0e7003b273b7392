//! Giving a node up, and taking it back.

use super::Node;
use super::error::EnrolError;

impl Node {
    /// Redirects new connections of and to every captured pod to nobody: they are refused until a daemon is
    /// back. What the listeners have queued stays theirs. Does nothing once a newer daemon owns the node.
    pub fn close(&mut self) {
        if !self.is_owner() {
            return;
        }
        for known in self.pods.values().filter(|known| known.active) {
            self.maps.clear_listeners(known.slot);
        }
    }

    /// Becomes the owner again after a newer daemon died before it was ready. Follow with
    /// [`Node::capture`] for every pod: that daemon may have put its own listeners in.
    pub fn reclaim(&mut self) -> Result<(), EnrolError> {
        self.own(false).map_err(|error| EnrolError::step("the owner of the node")(error))
    }
}
