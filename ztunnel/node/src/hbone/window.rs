//! How much a peer may send on a stream before it is delivered, when memory gets short.

use std::time::Duration;

use tokio::time::Instant;

use crate::net::budget::Pressure;

/// A stream's window while more than a quarter of the memory is used.
const SMALL: u32 = 256 * 1024;

/// The same while it is more than half: what HTTP/2 begins with.
const SMALLEST: u32 = 65_535;

/// How long it stays so after there is enough again.
const RELAX_AFTER: Duration = Duration::from_secs(1);

/// The windows of a tunnel's streams.
#[derive(Debug)]
pub(super) struct Windows {
    full: u32,
    now: Pressure,
    since: Option<Instant>,
}

impl Windows {
    /// `full` while there is enough.
    pub(super) fn new(full: u32) -> Self {
        Self { full, now: Pressure::None, since: None }
    }

    /// The windows at this pressure.
    fn size(&self, pressure: Pressure) -> u32 {
        match pressure {
            Pressure::None => self.full,
            Pressure::Some => self.full.min(SMALL),
            Pressure::Much => self.full.min(SMALLEST),
        }
    }

    /// Tells the peer by `tell` if they are to be others. It may say that this must wait.
    pub(super) fn adapt(&mut self, pressure: Pressure, tell: impl FnOnce(u32) -> bool) {
        let relaxes = pressure < self.now;
        if pressure == self.now || relaxes && self.since.is_some_and(|since| since.elapsed() < RELAX_AFTER) {
            return;
        }
        if tell(self.size(pressure)) {
            self.now = pressure;
            self.since = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn windows_get_smaller_at_once_and_larger_later() {
        let mut windows = Windows::new(1 << 20);
        let mut told = Vec::new();
        let mut adapt = |windows: &mut Windows, pressure, can| {
            windows.adapt(pressure, |size| {
                told.push(size);
                can
            });
        };
        adapt(&mut windows, Pressure::None, true);
        adapt(&mut windows, Pressure::Much, false);
        adapt(&mut windows, Pressure::Some, true);
        adapt(&mut windows, Pressure::Much, true);
        adapt(&mut windows, Pressure::None, true);
        tokio::time::advance(RELAX_AFTER).await;
        adapt(&mut windows, Pressure::None, true);
        adapt(&mut windows, Pressure::None, true);
        assert_eq!(told, [SMALLEST, SMALL, SMALLEST, 1 << 20]);
    }
}
