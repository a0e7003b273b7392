//! From when to when a certificate chain can be used.

use std::time::Duration;
use std::time::SystemTime;

/// A span of time with two ends, both of which count: before its first moment a certificate is as useless to peers as
/// after its last, and a clock that was set can leave it on either side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first moment.
    pub from: SystemTime,
    /// The first moment after it.
    pub until: SystemTime,
}

impl Validity {
    /// Whether the certificate can be used at `now`.
    pub fn holds_at(self, now: SystemTime) -> bool {
        !self.is_ahead(now) && !self.is_over(now)
    }

    /// Whether it can be used later only.
    pub fn is_ahead(self, now: SystemTime) -> bool {
        now < self.from
    }

    /// Whether it cannot be used any more.
    pub fn is_over(self, now: SystemTime) -> bool {
        self.until <= now
    }

    /// How long it lasts in all.
    pub fn life(self) -> Duration {
        self.until.duration_since(self.from).unwrap_or_default()
    }

    /// What is left of it at `now`.
    pub fn left(self, now: SystemTime) -> Duration {
        self.until.duration_since(now).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_moment_counts_and_the_last_does_not() {
        let second = |n| SystemTime::UNIX_EPOCH + Duration::from_secs(n);
        let validity = Validity { from: second(10), until: second(20) };
        for (now, [ahead, holds, over]) in [
            (9, [true, false, false]),
            (10, [false, true, false]),
            (19, [false, true, false]),
            (20, [false, false, true]),
        ] {
            let now = second(now);
            assert_eq!(
                [validity.is_ahead(now), validity.holds_at(now), validity.is_over(now)],
                [ahead, holds, over]
            );
        }
        assert_eq!(
            (validity.life(), validity.left(second(15))),
            (Duration::from_secs(10), Duration::from_secs(5))
        );
        assert_eq!(validity.left(second(25)), Duration::ZERO);
    }
}
