//! What operators, probes and scrapers ask over HTTP: metrics and readiness, each on its own port.
//!
//! Reads handles and changes nothing. The listeners are the caller's; nothing here knows a port.

pub mod ready;
pub mod server;
