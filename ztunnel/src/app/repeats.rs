//! What goes wrong again and again is told when it begins, when it becomes another, and now and then.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// The same is told again after so long.
const AGAIN_AFTER: Duration = Duration::from_secs(60);

/// Messages that are remembered. With more, which come from as many failing pods, all are told again.
const MESSAGES: usize = 1024;

/// What was told lately.
#[derive(Debug, Default)]
pub(super) struct Repeats(HashMap<String, Instant>);

impl Repeats {
    /// Whether `message` is to be told at `now`; then it was.
    pub(super) fn is_news(&mut self, message: &str, now: Instant) -> bool {
        if let Some(told) = self.0.get(message)
            && now.duration_since(*told) < AGAIN_AFTER
        {
            return false;
        }
        if self.0.len() >= MESSAGES {
            self.0.clear();
        }
        self.0.insert(message.to_owned(), now);
        true
    }

    /// What has `part` in it is news when it comes again.
    pub(super) fn forget(&mut self, part: &str) {
        self.0.retain(|message, _| !message.contains(part));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_told_once_a_minute() {
        let (mut repeats, start) = (Repeats::default(), Instant::now());
        let mut at =
            |second: u64, message: &str| repeats.is_news(message, start + Duration::from_secs(second));
        assert!(at(0, "a: port in use"));
        assert!((1..60).all(|second| !at(second, "a: port in use")));
        assert!(at(30, "a: no such namespace"), "another reason");
        assert!(at(30, "b: port in use"), "another pod");
        assert!(at(60, "a: port in use"));
        repeats.forget("a: ");
        assert!(repeats.is_news("a: port in use", start + Duration::from_secs(61)), "it was well meanwhile");
        for number in 0..3 * MESSAGES {
            repeats.is_news(&number.to_string(), start);
        }
        assert!(repeats.0.len() <= MESSAGES);
    }
}
