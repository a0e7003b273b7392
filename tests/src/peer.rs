//! What `ztunnel-peer` does inside a pod: a line server, a client that holds one connection, a load of new
//! connections, and the loads of the benchmark that no packaged program makes. It runs as a program of its own
//! because a control group holds processes, not threads.

pub mod act;
pub mod crowd;
pub mod enclosed;
pub mod first;
pub mod hold;
mod http;
pub mod load;
pub mod open;
pub mod script;
pub mod serve;
pub mod stall;
