//! What operators, probes and scrapers ask over HTTP: metrics and readiness, each on its own port, and the admin port.
//!
//! Reads handles and changes nothing but the log's levels; what else is wished for, others do. The listeners are the caller's; nothing here knows a port.

pub mod body;
pub mod console;
pub mod dump;
pub mod profile;
pub mod quit;
pub mod ready;
pub mod server;
mod shares;
