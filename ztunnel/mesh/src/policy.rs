//! May this connection reach that workload? Pure: policies and verified facts in, a permit or a denial out.
//!
//! Knows the shape of policies and nothing of where they come from, of connections or of TLS: who calls
//! passes in what it verified. The only maker of a [`authorize::Permit`].

pub mod authorize;
pub mod matching;

#[cfg(test)]
mod tests;
