//! The way out of every socket: what belongs to a captured connection goes to loopback or nowhere.
//!
//! Whatever a pod does to its rules, routes and devices, and to the marks of its sockets, it comes by here: before
//! the packet is given to a device, and whether that is guarded or not.

use aya_ebpf::helpers::generated::bpf_sk_fullsock;
use aya_ebpf::macros::cgroup_skb;
use aya_ebpf::programs::SkBuffContext;
use ztunnel_ebpf_abi::{CAPTURED, Counter};

use crate::maps::{count, ownership};

const PASS: i32 = 1;
const DROP: i32 = 0;
const LOOPBACK_DEVICE: u32 = 1;

#[cgroup_skb(egress)]
pub fn leave(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context is valid for the run of the program.
    if unsafe { (&raw const (*skb).ifindex).read_volatile() } == LOOPBACK_DEVICE {
        return PASS;
    }
    // SAFETY: as above.
    let sk = unsafe { (*skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return PASS;
    }
    // SAFETY: not null.
    let sk = unsafe { bpf_sk_fullsock(sk) };
    if sk.is_null() || ownership(sk) != CAPTURED {
        return PASS;
    }
    count(Counter::LeaveCaptured);
    DROP
}
