//! What is told of a connection: its bytes while it lasts, and how it ended.

use std::error::Error;

use crate::net::copy::Meter;
use crate::proxy::listing::Listed;
use crate::telemetry::OpenConnection;
use crate::telemetry::events::ResponseFlag;

/// A connection as telemetry knows it, counting what a relay moves, and listed among those that are open.
#[derive(Debug)]
pub struct ConnectionReport(pub OpenConnection, pub Listed);

impl Meter for ConnectionReport {
    fn up(&self, bytes: u64) {
        self.0.received(bytes);
    }

    fn down(&self, bytes: u64) {
        self.0.sent(bytes);
    }
}

/// What an error means to telemetry.
pub trait ConnectionError: Error {
    /// How it reads in the `response_flags` label.
    fn flag(&self) -> ResponseFlag;

    /// Whether one of the two applications reset the connection, as applications do: that is no failure.
    fn is_reset(&self) -> bool;
}

impl<E: ConnectionError> ConnectionError for &E {
    fn flag(&self) -> ResponseFlag {
        E::flag(self)
    }

    fn is_reset(&self) -> bool {
        E::is_reset(self)
    }
}

impl ConnectionReport {
    /// Tells how the connection ended.
    pub fn close<E: ConnectionError>(self, ended: Result<(), E>) {
        match ended {
            Err(error) if !error.is_reset() => self.0.close(error.flag(), Some(error_chain(&error))),
            Ok(()) | Err(_) => self.0.close(ResponseFlag::None, None),
        }
    }
}

/// An error with its causes, in one line.
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some errors tell their cause themselves.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
