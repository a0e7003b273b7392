//! Giving back the memory of a load that is over.
//!
//! The allocator keeps what was freed. It is given back once there has been work and now is none: the next load pays for
//! it with some hundred page faults of a microsecond. Pages of the program stay mapped: they are the page cache's, which
//! gives way by itself, and to unmap them would only make the process look smaller than it is.

#![expect(unsafe_code, reason = "malloc_trim(3) has no safe wrapper")]

use std::time::Duration;

use nix::time::ClockId;
use nix::time::clock_gettime;
use tokio::task::spawn_blocking;

/// Work after which there may be something to give back, as CPU time of the process.
const WORK: Duration = Duration::from_millis(100);
/// A look finds the process idle if it has used no more CPU time since the last. Looking after the kernel takes some
/// milliseconds by itself; traffic that takes no more counts as none.
const IDLE: Duration = Duration::from_millis(10);
/// Idle looks in a row after which a load counts as over: by then tunnels that are not needed any more have ended.
const IDLE_LOOKS: u32 = 3;
/// What was given back has to be fetched again: a load that pauses now and then pays for it no more often than this.
const BETWEEN: Duration = Duration::from_secs(60);

/// Looks from time to time whether there is something to give back.
#[derive(Debug, Default)]
pub struct Housekeeping {
    used: Duration,
    load: Load,
}

impl Housekeeping {
    /// To be called once in `interval`, in the context of a runtime. Does not block.
    pub fn look(&mut self, interval: Duration) {
        let Ok(used) = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID) else { return };
        let used = Duration::from(used);
        let since = used.saturating_sub(self.used);
        self.used = used;
        if self.load.is_over(since, interval) {
            // Takes milliseconds, and nobody waits for it.
            let _task = spawn_blocking(give_back);
        }
    }
}

/// Work since something was given back, and idle looks since.
#[derive(Debug)]
struct Load {
    work: Duration,
    idle: u32,
    /// How long nothing is given back.
    rest: Duration,
    /// Whether something was given back already.
    again: bool,
}

impl Default for Load {
    /// The start was work, however short it was. What comes after it is another load: there is no rest between.
    fn default() -> Self {
        Self { work: WORK, idle: 0, rest: Duration::ZERO, again: false }
    }
}

impl Load {
    /// Whether now is the time, after `used` CPU time in `interval`.
    fn is_over(&mut self, used: Duration, interval: Duration) -> bool {
        self.rest = self.rest.saturating_sub(interval);
        if used > IDLE {
            self.work += used;
            self.idle = 0;
            return false;
        }
        self.idle = self.idle.saturating_add(1);
        if self.work < WORK || self.idle < IDLE_LOOKS || !self.rest.is_zero() {
            return false;
        }
        if std::mem::replace(&mut self.again, true) {
            self.rest = BETWEEN;
        }
        self.work = Duration::ZERO;
        true
    }
}

fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_secs(2);

    /// The looks, of `uses` of CPU time in milliseconds, at which something is given back.
    fn given_back(uses: &[u64]) -> Vec<usize> {
        let mut load = Load::default();
        let is_over =
            |(index, used): (usize, &u64)| load.is_over(Duration::from_millis(*used), TICK).then_some(index);
        uses.iter().enumerate().filter_map(is_over).collect()
    }

    #[test]
    fn it_is_given_back_once_a_load_is_over() {
        assert_eq!(given_back(&[0; 100]), [2], "after the start");
        assert!(given_back(&[900; 100]).is_empty(), "the load goes on");
        assert!(given_back(&[30; 100]).is_empty(), "a light load, too");
        assert!(given_back(&[[900, 1, 1]; 30].concat()).is_empty(), "it only pauses");
        assert_eq!(given_back(&[900, 900, 10, 9, 0, 0, 0, 0]), [4]);
        assert_eq!(given_back(&[0, 0, 0, 900, 0, 0, 0, 0]), [2, 6], "the start and a load");
        assert_eq!(given_back(&[&[0; 3][..], &[10; 100]].concat()), [2], "idling is no work");
        assert_eq!(given_back(&[0, 0, 0, 30, 30, 30, 30, 0, 0, 0]), [2, 9], "little by little");
    }

    #[test]
    fn it_is_not_given_back_all_the_time() {
        // Bursts that are eight seconds apart, for four minutes.
        let found = given_back(&[[900, 0, 0, 0, 0]; 24].concat());
        assert!(found.len() > 3, "{found:?}");
        let rest = (BETWEEN.as_secs() / TICK.as_secs()) as usize;
        // The first one is for the start.
        assert!(found[1..].windows(2).all(|pair| pair[1] - pair[0] >= rest), "{found:?}");
    }
}
