//! Taking a node back.

use super::Node;
use super::error::EnrolError;

impl Node {
    /// Becomes the owner again after a newer daemon died before it was ready. Follow with
    /// [`Node::capture`] for every pod: that daemon may have put its own listeners in.
    pub fn reclaim(&mut self) -> Result<(), EnrolError> {
        self.own(false).map_err(EnrolError::step("the owner of the node"))
    }
}
