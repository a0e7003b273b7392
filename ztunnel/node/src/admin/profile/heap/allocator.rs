//! The process's allocator: the C library's, and a word to the profiler if it is active.

#![expect(
    unsafe_code,
    reason = "an allocator is unsafe to be and to ask, and so is looking at one's own stack"
)]

use std::alloc::GlobalAlloc;
use std::alloc::Layout;
use std::alloc::System;

use crate::admin::profile::heap;

/// Allocates as [`System`] does. Of it the program makes its `#[global_allocator]`, without which a heap profile is
/// empty. While no profile is wanted it costs a load and a branch.
#[derive(Debug)]
pub struct Sampled;

// SAFETY: all memory is `System`'s, given out and taken back as it asks for; what is done besides uses no memory but
// its own, and does not unwind.
unsafe impl GlobalAlloc for Sampled {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller promises what `System` asks for.
        let memory = unsafe { System.alloc(layout) };
        if heap::is_active() {
            heap::allocated(memory.addr(), layout.size());
        }
        memory
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller promises what `System` asks for.
        let memory = unsafe { System.alloc_zeroed(layout) };
        if heap::is_active() {
            heap::allocated(memory.addr(), layout.size());
        }
        memory
    }

    #[inline]
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // Before somebody else may be given it.
        if heap::is_active() {
            heap::freed(memory.addr());
        }
        // SAFETY: the caller promises what `System` asks for, from whom the memory is.
        unsafe { System.dealloc(memory, layout) }
    }

    #[inline]
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if heap::is_active() {
            heap::freed(memory.addr());
        }
        // SAFETY: the caller promises what `System` asks for, from whom the memory is.
        let memory = unsafe { System.realloc(memory, layout, size) };
        if heap::is_active() {
            heap::allocated(memory.addr(), size);
        }
        memory
    }
}

/// Where this thread is: the instructions it will return to, the nearest first, as many as there is room for. Gives
/// their number. Allocates nothing of its own.
pub(super) fn stack(frames: &mut [usize]) -> usize {
    let mut depth = 0;
    // SAFETY: there is nothing to be synchronized where the unwinder of the platform's own library walks the stack,
    // which is everywhere but on Windows.
    unsafe {
        backtrace::trace_unsynchronized(|frame| match (frame.ip().addr(), frames.get_mut(depth)) {
            // Where a thread began, and nobody returns to.
            (0, _) | (_, None) => false,
            (at, Some(next)) => {
                *next = at;
                depth += 1;
                true
            }
        });
    }
    depth
}
