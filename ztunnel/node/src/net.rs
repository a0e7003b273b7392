//! Sockets as the data path needs them.
//!
//! Owns socket options and marks, the original destination of a captured connection, dials that keep a
//! client's address, entering a network namespace, moving bytes between two sockets, and the budget of
//! what is held meanwhile. Knows addresses; does not know workloads, tunnels or policies.

pub mod budget;
pub mod buffer;
pub mod bypass;
pub mod conntrack;
pub mod copy;
pub mod netns;
pub mod origdst;
pub mod ports;
pub mod proxy_header;
pub mod redirected;
pub mod reserve;
pub mod socket;
pub mod splice;
