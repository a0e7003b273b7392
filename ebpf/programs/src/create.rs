//! Sockets that never reach the connect hook.
//!
//! Multipath TCP connects its subflows inside the kernel. Marked when it is made, such a socket takes the
//! capture route and falls back to plain TCP at the daemon's listener. `bind` takes the mark off listeners.

use aya_ebpf::helpers::bpf_get_netns_cookie;
use aya_ebpf::macros::cgroup_sock;
use aya_ebpf::programs::SockContext;
use ztunnel_ebpf_abi::{CAPTURE, Counter};

use crate::maps::{PODS, count};

const MPTCP: u32 = 262;

#[cgroup_sock(sock_create)]
pub fn create(ctx: SockContext) -> i32 {
    // SAFETY: the context is valid for the run of the program.
    if unsafe { (&raw const (*ctx.sock).protocol).read_volatile() } != MPTCP {
        return 1;
    }
    // SAFETY: the helper takes the context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.sock.cast()) };
    if PODS.get_ptr(&cookie).is_some() {
        // SAFETY: `mark` may be written at creation.
        unsafe { (&raw mut (*ctx.sock).mark).write_volatile(CAPTURE) }
        count(Counter::MultipathMarked);
    }
    1
}
