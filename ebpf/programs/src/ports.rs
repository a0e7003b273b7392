//! The ports of an enrolled pod: what the daemon has open there does not keep an application from binding.
//!
//! A captured connection has a socket of the daemon's in the pod, whose local port is the one that was dialled. By
//! the kernel's rules such a socket stands in nobody's way as long as both sides allow their addresses to be used
//! again and it does not listen. The daemon's do allow it; here an application does, whether it asked for that or not.
//! Of two sockets that listen on one port the second is still refused.
//!
//! The daemon's connection to an application has the client's address, and a source port that the daemon has chosen.
//! The client may have a connection of its own from that port, to the same port of the pod: then the application's end
//! of the one and whoever has the other would be one and the same to the kernel, which does not look for that.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::{bpf_sk_release, bpf_skc_lookup_tcp};
use aya_ebpf::helpers::{bpf_getsockopt, bpf_setsockopt};
use ztunnel_ebpf_abi::{Address, MARK_MASK, REPLY};

const SOL_SOCKET: i32 = 1;
const SO_REUSEADDR: i32 = 2;
const SO_MARK: i32 = 36;
/// `BPF_TCP_TIME_WAIT` and `BPF_TCP_LISTEN`.
const TIME_WAIT: u32 = 6;
const LISTEN: u32 = 10;
/// `BPF_F_CURRENT_NETNS`.
const CURRENT_NETNS: u64 = u64::MAX;

/// Lets a socket of an enrolled pod bind the port it asks for beside the daemon's connections.
///
/// One that leaves the choice to the kernel is given a free port anyway. Where the option cannot be set the kernel
/// judges as it would have: that closes nothing and opens nothing.
#[inline(always)]
pub fn share(ctx: *mut bpf_sock_addr) {
    // SAFETY: the context is valid for the run of the program.
    if unsafe { (&raw const (*ctx).user_port).read_volatile() } == 0 {
        return;
    }
    let mut on = 1u32;
    // SAFETY: four bytes for a four byte option.
    let _unset = unsafe { bpf_setsockopt(ctx.cast(), SOL_SOCKET, SO_REUSEADDR, (&raw mut on).cast(), 4) };
}

/// Whether a delivery of the daemon's, which is bound to a port and about to connect to `to`, would meet somebody else's
/// connection at the other end. What the pod says to itself is its own affair. `is_v4` is known when this is compiled:
/// the verifier does not allow what reads of both families' addresses, in branches, are merged into.
#[inline(always)]
pub fn is_met(ctx: *mut bpf_sock_addr, to: &Address, is_v4: bool) -> bool {
    // SAFETY: connect hooks have a full socket, and the context is valid for the run of the program.
    let (sk, port) =
        unsafe { ((*ctx).__bindgen_anon_1.sk, (&raw const (*ctx).user_port).read_volatile() as u16) };
    // SAFETY: a full socket, checked by the verifier.
    let bound = unsafe { (&raw const (*sk).src_port).read_volatile() };
    let mut mark = 0u32;
    // SAFETY: four bytes for a four byte option.
    let marked = unsafe { bpf_getsockopt(ctx.cast(), SOL_SOCKET, SO_MARK, (&raw mut mark).cast(), 4) } == 0;
    if bound == 0 || !marked || mark & MARK_MASK != REPLY {
        return false;
    }
    let ports = [(bound as u16).to_be(), port];
    if is_v4 {
        // SAFETY: as above.
        let from = unsafe { (&raw const (*sk).src_ip4).read_volatile() };
        return meets(ctx, &TupleV4 { from, to: to[3], ports });
    }
    // SAFETY: as above.
    let from = unsafe {
        let words = &raw const (*sk).src_ip6;
        [
            (&raw const (*words)[0]).read_volatile(),
            (&raw const (*words)[1]).read_volatile(),
            (&raw const (*words)[2]).read_volatile(),
            (&raw const (*words)[3]).read_volatile(),
        ]
    };
    meets(ctx, &TupleV6 { from, to: *to, ports })
}

/// Who is asked for, as the kernel wants it.
#[repr(C)]
struct TupleV4 {
    from: u32,
    to: u32,
    ports: [u16; 2],
}

#[repr(C)]
struct TupleV6 {
    from: Address,
    to: Address,
    ports: [u16; 2],
}

#[inline(always)]
fn meets<T>(ctx: *mut bpf_sock_addr, tuple: &T) -> bool {
    let tuple = core::ptr::from_ref(tuple).cast_mut().cast();
    // SAFETY: a whole tuple, which the helper only reads.
    let met = unsafe { bpf_skc_lookup_tcp(ctx.cast(), tuple, size_of::<T>() as u32, CURRENT_NETNS, 0) };
    if met.is_null() {
        return false;
    }
    // SAFETY: not null; it is ours to release.
    let state = unsafe {
        let state = (&raw const (*met).state).read_volatile();
        bpf_sk_release(met.cast());
        state
    };
    // A listener is whom it is looking for, and to what is over the kernel opens a new connection.
    state != LISTEN && state != TIME_WAIT
}
