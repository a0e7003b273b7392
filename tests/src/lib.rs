//! Scenarios in network namespaces, and the harness they run in.

pub mod raw_netns;
