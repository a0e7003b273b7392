//! What `ztunnel-peer` does inside a pod: a line server, a client that holds one connection, and a load of new
//! connections. It runs as a program of its own because a control group holds processes, not threads.

pub mod hold;
pub mod load;
pub mod serve;
