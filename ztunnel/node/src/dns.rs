//! Names, resolved for pods: services of the mesh from the snapshot, everything else by the resolver the pod asked.
//!
//! A node agent's rules redirect what a pod sends to port 53 to a port of its loopback. Here is the other end: names of
//! the mesh are answered ([`answer`]), and what is not one goes on, as it came, to where the pod had sent it
//! ([`forward`]), be that the cluster's resolver, a cache on the node, or one that the pod's own `resolv.conf` names.
//! Nothing is kept between two questions: caches are behind and before this one.
//!
//! It runs on a thread of its own, so that a pod that asks much is in nobody's way but other pods' questions.

pub mod answer;
pub mod counts;
pub mod forward;
pub mod message;
mod pod;
pub mod server;
