//! How much one source may fill the access log: whoever opens connections without end would otherwise bury what others
//! did, and fill the disk. What is left out is counted, and said once a second.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

/// For how many seconds' worth of lines a source may be ahead.
const BURST_SECONDS: f64 = 5.0;

/// How many sources are told apart; all others share one allowance.
const SOURCES_MAX: usize = 4096;

/// How many sources a further one looks at for one whose place it can have. It is a few, as all lines wait for it; more
/// than one, so that of those that are gone the places are free soon.
const LOOKS: usize = 4;

/// How often it is said what was left out.
pub(super) const SAY_EVERY: Duration = Duration::from_secs(1);

/// How many sources are named each time; of the others it is said how much it was.
const NAMED_MAX: usize = 8;

#[derive(Debug, Clone, Copy)]
struct Allowance {
    lines: f64,
    at: Instant,
    left_out: u64,
}

/// The allowances of all sources. Only the writer's thread has it.
#[derive(Debug)]
pub(super) struct Limiter {
    /// Lines a second; `None`: as many as come.
    rate: Option<f64>,
    sources: HashMap<Option<IpAddr>, Allowance>,
    /// Those that are told apart; whose turn it is to be looked at first.
    turns: VecDeque<IpAddr>,
    said: Option<Instant>,
    pending: bool,
}

/// What was left out of one source; of several where none is named.
pub(super) type LeftOut = (Option<IpAddr>, u64);

impl Limiter {
    /// `rate` lines a second of each source; 0: as many as come.
    pub(super) fn new(rate: u32) -> Self {
        let rate = (rate > 0).then(|| f64::from(rate));
        Self { rate, sources: HashMap::new(), turns: VecDeque::new(), said: None, pending: false }
    }

    /// Whether a line about what `source` did is written.
    pub(super) fn admits(&mut self, source: IpAddr, now: Instant) -> bool {
        let Some(rate) = self.rate else { return true };
        let full = rate * BURST_SECONDS;
        let source = source.to_canonical();
        let mut key = Some(source);
        if !self.sources.contains_key(&key) {
            if self.turns.len() >= SOURCES_MAX {
                self.make_room(rate, now);
            }
            match self.turns.len() < SOURCES_MAX {
                true => self.turns.push_back(source),
                false => key = None,
            }
        }
        let allowance = self.sources.entry(key).or_insert(Allowance { lines: full, at: now, left_out: 0 });
        allowance.lines = (allowance.lines + (now - allowance.at).as_secs_f64() * rate).min(full);
        allowance.at = now;
        let admits = allowance.lines >= 1.0;
        if admits {
            allowance.lines -= 1.0;
        } else {
            allowance.left_out += 1;
            self.pending = true;
        }
        admits
    }

    /// Forgets those of a few sources that have their whole allowance again: they are as if they had never been there.
    /// Returns at how many it looked.
    fn make_room(&mut self, rate: f64, now: Instant) -> usize {
        let looks = LOOKS.min(self.turns.len());
        for _ in 0..looks {
            let Some(source) = self.turns.pop_front() else { continue };
            let whole = |known: &Allowance| {
                let lines = known.lines + (now - known.at).as_secs_f64() * rate;
                known.left_out == 0 && lines >= rate * BURST_SECONDS
            };
            if self.sources.get(&Some(source)).is_none_or(whole) {
                self.sources.remove(&Some(source));
            } else {
                self.turns.push_back(source);
            }
        }
        looks
    }

    /// Whether there is something to be said, now or soon.
    pub(super) fn is_pending(&self) -> bool {
        self.pending
    }

    /// What was left out since this was last asked, those of whom it was most first; nothing if that was just now.
    pub(super) fn left_out(&mut self, now: Instant) -> Vec<LeftOut> {
        if !self.pending || self.said.is_some_and(|said| now < said + SAY_EVERY) {
            return Vec::new();
        }
        self.said = Some(now);
        self.pending = false;
        let mut all: Vec<LeftOut> = Vec::new();
        for (source, allowance) in &mut self.sources {
            match std::mem::take(&mut allowance.left_out) {
                0 => {}
                lines => all.push((*source, lines)),
            }
        }
        all.sort_by_key(|(source, lines)| (std::cmp::Reverse(*lines), *source));
        let others: u64 = all.iter().skip(NAMED_MAX).map(|(_, lines)| lines).sum();
        all.truncate(NAMED_MAX);
        all.extend((others > 0).then_some((None, others)));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u32) -> IpAddr {
        IpAddr::from(std::net::Ipv4Addr::from(0x0a00_0000 + last))
    }

    #[tokio::test(start_paused = true)]
    async fn one_source_does_not_bury_the_others() {
        let (mut limiter, now) = (Limiter::new(10), Instant::now());
        let written = (0..1000).filter(|_| limiter.admits(ip(1), now)).count();
        assert_eq!(written, 50, "five seconds' worth");
        assert!(limiter.admits(ip(2), now));
        assert!(limiter.is_pending());
        assert_eq!(limiter.left_out(now), [(Some(ip(1)), 950)]);
        assert!(!limiter.is_pending());
        let later = now + Duration::from_millis(500);
        let written = (0..1000).filter(|_| limiter.admits(ip(1), later)).count();
        assert_eq!(written, 5);
        assert_eq!(limiter.left_out(later), [], "once a second");
        assert_eq!(limiter.left_out(now + SAY_EVERY), [(Some(ip(1)), 995)]);
    }

    #[tokio::test(start_paused = true)]
    async fn sources_without_end_share_what_is_left() {
        let (mut limiter, now) = (Limiter::new(1), Instant::now());
        for source in 0..2 * SOURCES_MAX as u32 {
            limiter.admits(ip(source), now);
        }
        assert!(limiter.sources.len() <= SOURCES_MAX + 1);
        let left_out = limiter.left_out(now);
        assert_eq!(left_out, [(None, SOURCES_MAX as u64 - 5)]);
        // They are forgotten once they could begin anew, so that each further one has an allowance of its own.
        let later = now + Duration::from_secs(60);
        for source in 0..SOURCES_MAX as u32 {
            let written = (0..10).filter(|_| limiter.admits(ip(100_000 + source), later)).count();
            assert_eq!(written, 5, "source {source}");
        }
        assert_eq!(limiter.turns.len(), SOURCES_MAX);
        assert!(limiter.sources.len() <= SOURCES_MAX + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_further_source_looks_at_few_others() {
        let (mut limiter, now) = (Limiter::new(1), Instant::now());
        for source in 0..SOURCES_MAX as u32 {
            limiter.admits(ip(source), now);
        }
        // None of them has its whole allowance, and each is looked at in its turn.
        let first = limiter.turns.front().copied();
        for _ in 0..SOURCES_MAX / LOOKS {
            assert_eq!(limiter.make_room(1.0, now), LOOKS);
        }
        assert_eq!((limiter.turns.front().copied(), limiter.turns.len()), (first, SOURCES_MAX));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_rate_everything_is_written() {
        let (mut limiter, now) = (Limiter::new(0), Instant::now());
        assert!((0..100_000).all(|_| limiter.admits(ip(1), now)));
        assert!(!limiter.is_pending());
    }
}
