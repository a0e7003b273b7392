//! What memory is used for: live allocations by where they were made, in the format of pprof.
//!
//! Nothing is recorded unless somebody asks for it ([`activate`]), and only what is allocated from then on. Of that,
//! one byte in half a MiB on average is looked at, and with it the allocation it belongs to: each byte is as likely as
//! any other, so a profile can be scaled to what it stands for. What is looked at is kept with its stack until it is
//! freed. Memory that C code allocates by itself (the cryptography's, mostly) is not seen.
//!
//! By hand: jemalloc's profiler has to be prepared for when the process starts and writes to files only, and with it comes
//! another allocator for the whole process, of which nobody has shown that idle memory and the cost of an allocation stand.
//!
//! ```text
//!  allocated ─▶ is its byte in this allocation? ─ no ─▶ (nothing: some additions)
//!                                               └ yes ▶ stack, table, mark
//!  freed ─────▶ is a mark where it would be? ──── no ─▶ (nothing: a load)
//!                                            └── yes ─▶ table
//! ```

#![expect(
    clippy::disallowed_types,
    reason = "an allocator's lock must not allocate, as `parking_lot`'s may to wait"
)]

use std::cell::Cell;
use std::collections::HashMap;
use std::io::Write;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use flate2::Compression;
use flate2::write::GzEncoder;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use crate::admin::profile::Line;
use crate::admin::profile::Profile;

pub mod allocator;

#[cfg(test)]
pub(in crate::admin) mod tests;

/// Bytes from one that is looked at to the next, on average. What the heap profilers of Go and jemalloc use: the costs
/// are lost in those of allocating so much, and what matters in a heap of some MiB is seen.
const INTERVAL: f64 = (512 * 1024) as f64;
/// Allocations that are kept at most: 4 GiB of heap, for 4 MiB. More are counted only.
const LIVE_MAX: usize = 8192;
/// Frames that are kept of a stack, the nearest ones.
const DEPTH: usize = 64;
/// Marks of what is in the table.
const MARKS: usize = 1 << 15;

/// Why there is no heap profile.
#[derive(Debug, thiserror::Error)]
pub enum HeapError {
    /// Nobody asked for one.
    #[error(
        "heap profiling is not active; activate it by /debug/pprof/heap/profiling?activate=true, and ask \
         after what is to be seen was allocated"
    )]
    Inactive,
    /// Writing it panicked.
    #[error("the heap profile cannot be written")]
    Panicked,
}

/// Changed under the lock of the table only, which is there exactly if this is set. Memory comes to who frees it after
/// it came to who allocated it, so no look at this is older than that one's.
static ACTIVE: AtomicBool = AtomicBool::new(false);

static TABLE: Mutex<Option<Table>> = Mutex::new(None);

/// How many allocations of the table may be found at a place. Changed under its lock only. Not part of the table, as
/// it is read without.
static MARKED: [AtomicU8; MARKS] = [const { AtomicU8::new(0) }; MARKS];

/// How many threads have begun to draw numbers.
static THREADS: AtomicU64 = AtomicU64::new(0);

/// How many want nothing to be looked at for now.
static PAUSED: AtomicUsize = AtomicUsize::new(0);

/// One profile is written at a time.
static WRITING: Semaphore = Semaphore::const_new(1);

thread_local! {
    // Without a destructor, and made by the linker: an allocator may ask for it at any time.
    static THREAD: Thread = const {
        Thread { busy: Cell::new(false), until: Cell::new(0.0), random: Cell::new(0) }
    };
}

/// What a thread knows.
struct Thread {
    /// It is in here already: what is allocated and freed meanwhile is the profiler's own.
    busy: Cell<bool>,
    /// Bytes to be allocated until one is looked at.
    until: Cell<f64>,
    /// The state of its random numbers. 0: it has none yet.
    random: Cell<u64>,
}

/// While there is one, the thread is in here.
struct Busy;

impl Busy {
    /// Nothing if the thread is in here already.
    fn begin() -> Option<Self> {
        THREAD.with(|thread| (!thread.busy.replace(true)).then(|| Self))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        THREAD.with(|thread| thread.busy.set(false));
    }
}

/// What is live.
#[derive(Debug, Default)]
struct Table {
    live: HashMap<usize, Live>,
    /// How many more there would have been.
    missed: u64,
}

#[derive(Debug)]
struct Live {
    size: usize,
    stack: Box<[usize]>,
}

/// For what one place allocated. Fractions: what was looked at stands for others.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Use {
    objects: f64,
    bytes: f64,
}

impl Table {
    fn insert(&mut self, address: usize, live: Live) {
        let mark = mark(address);
        let marked = mark.load(Ordering::Relaxed);
        if self.live.len() >= LIVE_MAX || marked == u8::MAX {
            self.missed += 1;
        } else if self.live.insert(address, live).is_none() {
            mark.store(marked + 1, Ordering::Relaxed);
        }
    }

    fn remove(&mut self, address: usize) {
        if self.live.remove(&address).is_some() {
            let mark = mark(address);
            mark.store(mark.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
        }
    }

    /// By stack, the nearest frame first.
    fn uses(&self) -> HashMap<Box<[usize]>, Use> {
        let mut uses: HashMap<Box<[usize]>, Use> = HashMap::new();
        for live in self.live.values() {
            let stands_for = stands_for(live.size);
            let (objects, bytes) = (stands_for, stands_for * live.size as f64);
            match uses.get_mut(&live.stack) {
                Some(known) => {
                    known.objects += objects;
                    known.bytes += bytes;
                }
                None => {
                    uses.insert(live.stack.clone(), Use { objects, bytes });
                }
            }
        }
        uses
    }
}

/// Where memory at this address is marked.
fn mark(address: usize) -> &'static AtomicU8 {
    // Fibonacci hashing: the high bits of the product depend on all of the address.
    let hash = (address as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    &MARKED[(hash >> (u64::BITS - MARKS.ilog2())) as usize]
}

/// How many allocations of a size one of them that was looked at stands for.
fn stands_for(size: usize) -> f64 {
    let seen = -(-(size as f64) / INTERVAL).exp_m1();
    if seen > 0.0 { 1.0 / seen } else { 0.0 }
}

/// Bytes until one is looked at, from a number that is uniformly distributed over all.
fn distance(random: u64) -> f64 {
    // In (0, 1], 53 bits of it.
    let part = ((random >> 11) + 1) as f64 / (1_u64 << 53) as f64;
    -part.ln() * INTERVAL
}

/// The next of the random numbers whose state this is: splitmix64.
fn next_random(state: &Cell<u64>) -> u64 {
    let next = state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
    state.set(next);
    let mixed = (next ^ (next >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// While there is one, no allocation is looked at: a signal's handler that allocates must not walk the stack it interrupted.
#[derive(Debug)]
pub struct Paused(());

/// Looks at no allocations until what is returned is dropped.
pub fn pause() -> Paused {
    PAUSED.fetch_add(1, Ordering::Relaxed);
    Paused(())
}

impl Drop for Paused {
    fn drop(&mut self) {
        PAUSED.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether allocations are looked at.
#[inline]
pub fn is_active() -> bool {
    ACTIVE.load(Ordering::Relaxed)
}

/// Looks at allocations from now on.
pub fn activate() {
    with_table(|table| {
        table.get_or_insert_default();
        ACTIVE.store(true, Ordering::Relaxed);
    });
}

/// Forgets what was looked at, and gives the memory for it back.
pub fn deactivate() {
    with_table(|table| {
        ACTIVE.store(false, Ordering::Relaxed);
        for address in table.take().unwrap_or_default().live.into_keys() {
            mark(address).store(0, Ordering::Relaxed);
        }
    });
}

/// What allocates in here is not looked at, and what is freed in here must not have been.
fn with_table<T>(act: impl FnOnce(&mut Option<Table>) -> T) -> T {
    // Only the allocator's functions are ever called from in here.
    let _busy = Busy::begin();
    let mut table: MutexGuard<'_, _> = TABLE.lock().unwrap_or_else(PoisonError::into_inner);
    act(&mut table)
}

/// To be called with what was just allocated (0: nothing was), before anybody has it.
#[inline(never)]
fn allocated(address: usize, size: usize) {
    if address == 0 || PAUSED.load(Ordering::Relaxed) != 0 {
        return;
    }
    let Some(busy) = Busy::begin() else { return };
    let look = THREAD.with(|thread| {
        if thread.random.get() == 0 {
            let nth = THREADS.fetch_add(1, Ordering::Relaxed);
            // Any that is not zero; the numbers of two threads are a long way apart.
            thread.random.set(nth << 32 | 1);
            thread.until.set(distance(next_random(&thread.random)));
        }
        let until = thread.until.get() - size as f64;
        let look = until <= 0.0;
        thread.until.set(if look { distance(next_random(&thread.random)) } else { until });
        look
    });
    if look {
        let mut frames = [0; DEPTH];
        let depth = allocator::stack(&mut frames);
        let stack = Box::from(&frames[..depth]);
        if let Some(table) = TABLE.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            table.insert(address, Live { size, stack });
        }
    }
    drop(busy);
}

/// To be called with what is about to be freed, while nobody else can have it.
#[inline]
fn freed(address: usize) {
    if mark(address).load(Ordering::Relaxed) != 0 {
        forget(address);
    }
}

#[cold]
fn forget(address: usize) {
    let Some(busy) = Busy::begin() else { return };
    if let Some(table) = TABLE.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        table.remove(address);
    }
    drop(busy);
}

/// What is live of what was allocated since [`activate`]: a profile, compressed by gzip.
pub async fn profile() -> Result<Vec<u8>, HeapError> {
    let turn = WRITING.acquire().await.expect("the semaphore is never closed");
    // Finding the names of all frames takes its time.
    let written = spawn_blocking(move || {
        let profile = write(SystemTime::now());
        drop(turn);
        profile
    });
    written.await.map_err(|_| HeapError::Panicked)?
}

fn write(now: SystemTime) -> Result<Vec<u8>, HeapError> {
    let (uses, missed) = with_table(|table| {
        table.as_ref().map(|table| (table.uses(), table.missed)).ok_or(HeapError::Inactive)
    })?;
    let mut profile =
        Profile::new([("inuse_objects", "count"), ("inuse_space", "bytes")], ("space", "bytes"), now);
    profile.period(INTERVAL as i64);
    profile.shown_first("inuse_space");
    if missed > 0 {
        profile.comment(&format!("{missed} samples are missing: there were too many"));
    }
    let mut names = HashMap::new();
    for (stack, used) in uses {
        for at in &stack {
            names.entry(*at).or_insert_with(|| named(*at));
        }
        let frames = stack.iter().map(|at| &names[at]).skip_while(|lines| lines.iter().all(allocates));
        let locations: Vec<u64> = frames.map(|lines| profile.location(lines)).collect();
        profile.add(locations, [used.objects.round() as i64, used.bytes.round() as i64]);
    }
    // What was read to find them is as large as the program.
    backtrace::clear_symbol_cache();
    let mut compressed = GzEncoder::new(Vec::new(), Compression::default());
    let written = compressed.write_all(&profile.finish()).and_then(|()| compressed.finish());
    Ok(written.expect("writing to memory does not fail"))
}

/// The functions at an instruction, those that were inlined first.
fn named(at: usize) -> Vec<Line> {
    let mut lines = Vec::new();
    backtrace::resolve(std::ptr::without_provenance_mut(at), |symbol| {
        let Some(name) = symbol.name() else { return };
        lines.push(Line {
            // Without the hash.
            name: format!("{name:#}"),
            system_name: name.as_str().unwrap_or_default().to_owned(),
            file: symbol.filename().map(|file| file.to_string_lossy().into_owned()).unwrap_or_default(),
            line: symbol.lineno().unwrap_or_default(),
        });
    });
    if lines.is_empty() {
        lines.push(Line { name: format!("{at:#x}"), ..Line::default() });
    }
    lines
}

/// How functions begin that are between the allocator and those who want memory of it.
const ALLOCATES: [&str; 9] = [
    "backtrace::",
    "ztunnel::admin::profile::heap::allocat",
    "<ztunnel::admin::profile::heap::allocator::",
    "__rust",
    "alloc::alloc::",
    "<alloc::alloc::",
    "alloc::raw_vec::",
    "<alloc::raw_vec::",
    "<std::alloc::",
];

fn allocates(line: &Line) -> bool {
    ALLOCATES.iter().any(|start| line.name.starts_with(start))
}
