//! How long to wait before the next connection. Pure: the random number comes in.

use std::time::Duration;

/// After one failure.
pub const FIRST: Duration = Duration::from_millis(10);
/// After many.
pub const LAST: Duration = Duration::from_secs(15);

/// How a connection ended, as far as the next one is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It did its work and was closed, perhaps by a control plane that moves its clients elsewhere.
    Served,
    /// It never came to anything.
    Failed,
}

/// Waiting times that grow while nothing works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl Backoff {
    /// How long to wait now; between half and one and a half of a time that doubles with each failure, so that the
    /// clients of a control plane that restarts do not come back all at once. Never nothing at all.
    pub fn after(&mut self, ended: Ended, roll: u64) -> Duration {
        if ended == Ended::Served {
            self.0 = FIRST;
        }
        let base = self.0;
        self.0 = (base * 2).min(LAST);
        base / 2 + base.mul_f64(roll as f64 / u64::MAX as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_grows_with_failures_and_starts_again_with_success() {
        let mut backoff = Backoff::default();
        let half = u64::MAX / 2;
        let mut waits = |ended| backoff.after(ended, half).as_millis();
        let failures: Vec<u128> = (0..13).map(|_| waits(Ended::Failed)).collect();
        assert_eq!(failures, [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 15000, 15000]);
        assert_eq!([waits(Ended::Served), waits(Ended::Served), waits(Ended::Failed)], [10, 10, 20]);
    }

    #[test]
    fn no_two_clients_wait_alike_and_none_not_at_all() {
        let wait = |roll| Backoff(LAST).after(Ended::Failed, roll);
        assert_eq!([wait(0), wait(u64::MAX)], [LAST / 2, LAST + LAST / 2]);
        assert_eq!(Backoff::default().after(Ended::Served, 0), FIRST / 2);
    }
}
