//! Giving back the memory of a load that is over.
//!
//! The allocator keeps what was freed, and the process keeps pages of the program mapped that only its start or the
//! load needed. Both are given back once there has been work and now is none: the next load pays for it with some
//! hundred page faults of a microsecond.

#![expect(unsafe_code, reason = "malloc_trim(3) and madvise(2) have no safe wrapper")]

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
    // SAFETY: `drop_segments` is what dl_iterate_phdr(3) calls, and needs no data of its own.
    unsafe {
        libc::dl_iterate_phdr(Some(drop_segments), std::ptr::null_mut());
    }
}

/// Drops the pages of one loaded object that hold nothing but its file.
unsafe extern "C" fn drop_segments(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: for the time of the call `info` describes an object that is loaded.
    let info = unsafe { &*info };
    if info.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: so many headers are there, for as long as the object is loaded.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    // SAFETY: sysconf(3) may be called at any time, from any thread.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let Some(page) = u64::try_from(page).ok().filter(|page| page.is_power_of_two()) else { return 0 };
    for (start, length) in program_pages(info.dlpi_addr, headers, page) {
        // SAFETY: the pages are of a segment that is not writable and that the linker did not write to either (see
        // `program_pages`), and it cannot be unmapped before this function returns, as dl_iterate_phdr(3) and
        // dlclose(3) exclude each other. What is dropped is read from the file again when it is touched. Only a
        // debugger may have written there: its breakpoints are lost, the program is not.
        unsafe {
            libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED);
        }
    }
    0
}

/// Address and length of the whole pages of what was loaded from a file to `base` and is never written to: segments
/// that are not writable, and of which nothing is relocated. Linkers make no relocations elsewhere unless told to
/// (`-z notext`).
fn program_pages(base: u64, headers: &[libc::Elf64_Phdr], page: u64) -> impl Iterator<Item = (usize, usize)> {
    let end = |header: &libc::Elf64_Phdr| header.p_vaddr.saturating_add(header.p_memsz);
    let relocated = move |header: &libc::Elf64_Phdr| {
        let relro = headers.iter().filter(|other| other.p_type == libc::PT_GNU_RELRO);
        relro.into_iter().any(|relro| header.p_vaddr < end(relro) && relro.p_vaddr < end(header))
    };
    let load = headers.iter().filter(|header| header.p_type == libc::PT_LOAD);
    load.filter(|header| header.p_flags & libc::PF_W == 0)
        .filter(move |header| !relocated(header))
        .filter_map(move |header| {
            let start = base.checked_add(header.p_vaddr)?;
            let end = start.checked_add(header.p_filesz)? / page * page;
            let start = start.checked_next_multiple_of(page)?;
            let length = end.checked_sub(start).filter(|length| *length > 0)?;
            Some((usize::try_from(start).ok()?, usize::try_from(length).ok()?))
        })
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

    #[test]
    fn only_what_is_never_written_to_is_dropped() {
        let header = |p_type, p_flags, p_vaddr, p_memsz| libc::Elf64_Phdr {
            p_type,
            p_flags,
            p_offset: 0,
            p_vaddr,
            p_paddr: p_vaddr,
            p_filesz: p_memsz,
            p_memsz,
            p_align: 0x1000,
        };
        let (load, relro) = (libc::PT_LOAD, libc::PT_GNU_RELRO);
        let (r, rx, rw) = (libc::PF_R, libc::PF_R | libc::PF_X, libc::PF_R | libc::PF_W);
        let headers = [
            header(load, r, 0, 0x1_8000),
            header(load, rx, 0x2_8000, 0x3_0000),
            header(load, r, 0x8_0000, 0x8000),
            header(load, rw, 0xa_0000, 0x2_0000),
            header(load, r, 0xd_0000, 0x2_0000),
            header(relro, r, 0xe_f000, 0x1000),
            header(libc::PT_NOTE, r, 0x10_0000, 0x2_0000),
        ];
        let found: Vec<_> = program_pages(0x4000_0000, &headers, 0x1_0000).collect();
        assert_eq!(found, [(0x4000_0000, 0x1_0000), (0x4003_0000, 0x2_0000)]);
        let header = header(load, r, u64::MAX, u64::MAX);
        assert_eq!(program_pages(1, &[header], 0x1000).count(), 0, "not an object that can be loaded");
    }

    #[test]
    fn the_process_goes_on_without_them() {
        // Relocated at the start, read-only since then.
        static RELOCATED: [&str; 2] = ["one", "other"];
        give_back();
        assert_eq!(std::hint::black_box(&RELOCATED).concat(), "oneother");
    }
}
