//! Notices that somebody has set the node's clock.
//!
//! Certificates begin and end by the time of day, and a clock that is set can take all of them out of their time in one
//! moment. To look for that every second would wake an idle node for nothing; the kernel tells.

use std::io;
use std::sync::LazyLock;
use std::thread;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::ClockId;
use nix::sys::timerfd::Expiration;
use nix::sys::timerfd::TimerFd;
use nix::sys::timerfd::TimerFlags;
use nix::sys::timerfd::TimerSetTimeFlags;
use tokio::sync::watch;

/// Far enough away never to come: in seconds since 1970, the year 2242.
const NEVER: i64 = 1 << 33;

/// Counts how often the clock was set, on a thread of its own that sleeps until then. One for the process.
static SET: LazyLock<watch::Sender<u64>> = LazyLock::new(|| {
    let times = watch::Sender::new(0);
    let told = times.clone();
    let watching = timer().and_then(|timer| {
        let watch = move || watch(&timer, &told);
        thread::Builder::new().name("clock".to_owned()).spawn(watch)
    });
    if let Err(error) = watching {
        tracing::warn!(%error, "cannot watch the clock: that it was set is noticed within a minute");
    }
    times
});

/// Learns of every change of the clock that is not its passing.
pub(super) fn changes() -> watch::Receiver<u64> {
    SET.subscribe()
}

fn watch(timer: &TimerFd, told: &watch::Sender<u64>) {
    loop {
        match timer.wait() {
            Ok(()) => told.send_modify(|times| *times += 1),
            Err(Errno::EINTR) => {}
            Err(error) => {
                tracing::warn!(%error, "the clock is watched no longer");
                return;
            }
        }
    }
}

/// A timer that never ends, and whose waiting does when the clock is set.
fn timer() -> io::Result<TimerFd> {
    let timer = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_CLOEXEC)?;
    timer.set(
        Expiration::OneShot(TimeSpec::new(NEVER, 0)),
        TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET,
    )?;
    Ok(timer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_lets_the_clock_be_watched() {
        let timer = timer().unwrap();
        assert!(timer.get().unwrap().is_some(), "it waits");
        assert!(!changes().has_changed().unwrap());
    }
}
