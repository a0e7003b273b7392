//! Whether there are file descriptors left: every connection is two or three, and without any the daemon looks well and
//! serves nobody. It is not ready then, and says why.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;

use nix::sys::resource::Resource::RLIMIT_NOFILE;
use ztunnel_node::admin::ready::Blocker;
use ztunnel_node::admin::ready::Readiness;

/// A daemon with a few pods has as many for itself.
const LIMIT_MIN: u64 = 256;
/// With fewer left than this the daemon is not ready.
const LEFT_MIN: u64 = 32;
/// With as many it is again.
const LEFT_AGAIN: u64 = 128;

const FEW: &str = "file descriptors (the limit is below 256: raise it, by ulimit -n or LimitNOFILE=)";
const NONE_LEFT: &str = "file descriptors (all are in use: raise the limit, by ulimit -n or LimitNOFILE=)";

/// Keeps the daemon from being ready while there are none.
#[derive(Debug)]
pub struct Descriptors {
    readiness: Readiness,
    limit: u64,
    blocker: Option<Blocker>,
}

impl Descriptors {
    /// Looks at the limit of this process.
    pub fn new(readiness: &Readiness) -> Self {
        let limit = nix::sys::resource::getrlimit(RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        let few = limit < LIMIT_MIN;
        if few {
            tracing::error!(
                limit,
                "too few file descriptors may be open: not ready (ulimit -n, LimitNOFILE=)"
            );
        }
        Self { readiness: readiness.clone(), limit, blocker: few.then(|| readiness.block(FEW)) }
    }

    /// Looks how many are left.
    pub fn look(&mut self) {
        if self.limit < LIMIT_MIN {
            return;
        }
        let left = match lowest_free() {
            Ok(lowest) => self.limit.saturating_sub(lowest),
            Err(error) if error.raw_os_error() == Some(libc::EMFILE) => 0,
            Err(_) => return,
        };
        match is_short(left, self.blocker.is_some()) {
            true if self.blocker.is_none() => {
                tracing::error!(limit = self.limit, left, "file descriptors run out: not ready");
                self.blocker = Some(self.readiness.block(NONE_LEFT));
            }
            false => {
                if let Some(blocker) = self.blocker.take() {
                    tracing::info!(left, "there are file descriptors again");
                    blocker.lift();
                }
            }
            true => {}
        }
    }
}

fn is_short(left: u64, was_short: bool) -> bool {
    left < if was_short { LEFT_AGAIN } else { LEFT_MIN }
}

/// All descriptors below it are in use, as the kernel gives the lowest.
fn lowest_free() -> io::Result<u64> {
    let another = io::stderr().as_fd().try_clone_to_owned()?;
    Ok(u64::try_from(another.as_raw_fd()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_does_not_flap() {
        assert!(is_short(31, false) && !is_short(32, false));
        assert!(is_short(127, true) && !is_short(128, true));
        assert!(lowest_free().unwrap() > 2);
    }
}
