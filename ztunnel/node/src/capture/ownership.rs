//! Taking a node back.

use super::error::EnrolError;
use super::{Links, Node};

impl Node {
    /// Becomes the owner again after a newer daemon died before it was ready. Follow with
    /// [`Node::capture`] for every pod: that daemon may have put its own listeners in.
    pub fn reclaim(&mut self) -> Result<(), EnrolError> {
        self.own(false).map_err(EnrolError::step("the owner of the node"))
    }

    /// Keeps nothing open of what is in the kernel, now that it is a newer daemon's: what is pinned stays. Should that one
    /// die, `reclaim` and bind every pod anew.
    pub fn let_go(&mut self) {
        self.links.clear();
        self.unslotted.clear();
        for known in self.pods.values_mut() {
            known.listeners = None;
            known.links = Links::default();
        }
    }
}
