//! Giving back the memory of a load that is over.
//!
//! The allocator keeps what was freed, and the process keeps pages of the program mapped that only its start or the
//! load needed. Both are given back once there has been work and now is none: the next load pays for it with some
//! hundred page faults of a microsecond.

#![expect(unsafe_code, reason = "malloc_trim(3) and madvise(2) have no safe wrapper")]

use std::time::Duration;

use nix::time::ClockId;
use nix::time::clock_gettime;

/// Work after which there may be something to give back, as CPU time of the process.
const WORK: Duration = Duration::from_millis(100);
/// With less than this share of one CPU the process counts as idle.
const IDLE_SHARE: u32 = 50;
/// How many idle looks after the first something is given back once more: tunnels that are not needed any more end
/// a few seconds after their last stream.
const AGAIN_AFTER: u32 = 3;

/// Looks from time to time whether there is something to give back.
#[derive(Debug, Default)]
pub struct Housekeeping {
    used: Duration,
    load: Load,
}

impl Housekeeping {
    /// To be called once in `interval`.
    pub fn look(&mut self, interval: Duration) {
        let Ok(used) = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID) else { return };
        let used = Duration::from(used);
        let since = used.saturating_sub(self.used);
        self.used = used;
        if self.load.is_over(since, interval) {
            give_back();
        }
    }
}

/// Work since something was given back, and idle looks since.
#[derive(Debug)]
struct Load {
    work: Duration,
    again_in: Option<u32>,
}

impl Default for Load {
    /// The start was work, however short it was.
    fn default() -> Self {
        Self { work: WORK, again_in: None }
    }
}

impl Load {
    /// Whether now is the time, after `used` CPU time in `interval`.
    fn is_over(&mut self, used: Duration, interval: Duration) -> bool {
        self.work += used;
        if used > interval / IDLE_SHARE {
            return false;
        }
        if self.work >= WORK {
            self.work = Duration::ZERO;
            self.again_in = Some(AGAIN_AFTER);
            return true;
        }
        let Some(looks) = self.again_in else { return false };
        self.again_in = looks.checked_sub(1).filter(|left| *left > 0);
        self.again_in.is_none()
    }
}

fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
    let Ok(maps) = std::fs::read_to_string("/proc/self/smaps") else { return };
    for (start, length) in program_pages(&maps) {
        // SAFETY: the mapping is private, of a file, not writable and has no page that differs from the file (see
        // `program_pages`): what is dropped is read from the file again when it is touched.
        unsafe {
            libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED);
        }
    }
}

/// Address and length of the mappings of files in which nothing can be lost, from the text of `/proc/self/smaps`
/// (proc_pid_smaps(5)): they are not writable, and no page is the process' own. Relocated data, read-only or not, and
/// a debugger's breakpoints are such pages.
fn program_pages(maps: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut candidate = None;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let read_only = words.next().is_some_and(|flags| flags == "r-xp" || flags == "r--p");
            let of_a_file = words.nth(2).is_some_and(|inode| inode != "0");
            let hex = |text| usize::from_str_radix(text, 16).ok();
            candidate = match (hex(start), hex(end)) {
                (Some(start), Some(end)) if read_only && of_a_file && start < end => {
                    Some((start, end - start))
                }
                _ => None,
            };
        } else if first == "Anonymous:" && words.next() == Some("0") {
            found.extend(candidate.take());
        }
    }
    found
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
    fn after_a_load_it_is_given_back_at_once_and_once_more() {
        assert_eq!(given_back(&[0, 0, 0, 0, 0, 0]), [0, 3], "after the start");
        assert!(given_back(&[900, 900, 900]).is_empty(), "the load goes on");
        assert_eq!(given_back(&[900, 10, 10, 10, 10, 10]), [1, 4]);
        assert_eq!(given_back(&[900, 10, 900, 10, 0, 0, 0, 0]), [1, 3, 6], "the second load starts anew");
        assert_eq!(given_back(&[0, 30, 30, 30, 30, 30, 0, 0, 0]), [0, 3, 4, 7], "little by little");
    }

    #[test]
    fn only_pages_of_files_are_dropped_that_hold_nothing_of_the_process() {
        let map = |range: &str, flags: &str, inode: &str, anonymous: &str| {
            format!(
                "{range} {flags} 00000000 fe:00 {inode}    /usr/bin/ztunnel\nSize: 8 kB\nRss: 8 kB\n\
                 Anonymous: {anonymous} kB\nAnonHugePages: 0 kB\nVmFlags: rd ex mr\n"
            )
        };
        let maps = [
            map("1000-3000", "r-xp", "77", "0"),
            map("3000-4000", "r--p", "77", "0"),
            map("4000-5000", "r--p", "77", "4"),
            map("5000-6000", "rw-p", "77", "0"),
            map("6000-7000", "r--p", "0", "0"),
            map("7000-8000", "r--s", "77", "0"),
        ];
        assert_eq!(program_pages(&maps.concat()), [(0x1000, 0x2000), (0x3000, 0x1000)]);
    }

    #[test]
    fn the_process_goes_on_without_them() {
        give_back();
        let mut maps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
        assert!(!program_pages(&maps).is_empty(), "the program itself");
        maps.truncate(100);
        let _cut_off = program_pages(&maps);
    }
}
