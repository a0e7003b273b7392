//! What is written down of a connection when it begins: whose it is, so that nothing a pod does to its sockets
//! later changes that.
//!
//! Runs when a socket is about to send its first packet, which every way to dial comes to, and when one is taken by
//! who listens, before it can send anything.

use aya_ebpf::bindings::{
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock, bpf_sock_ops,
};
use aya_ebpf::helpers::bpf_get_netns_cookie;
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use ztunnel_ebpf_abi::{
    Address, CAPTURE, CAPTURED, Counter, Flow, LocalFlow, MARK_MASK, PROBE, REPLY, SlotAddress, mapped,
};

use crate::maps::{ADDRESSES, DELIVERIES, NODE, PODS, PROBES, count, is_loopback, ownership, set_ownership};

/// What a program of this kind returns when it has nothing to answer.
const DONE: u32 = 1;
const AF_INET: u32 = 2;
const TCP_CLOSE: u32 = 7;

#[sock_ops]
pub fn record(ctx: SockOpsContext) -> u32 {
    let ops = ctx.ops;
    // SAFETY: the context is valid for the run of the program.
    let op = unsafe { (&raw const (*ops).op).read_volatile() };
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB
        && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
        && op != BPF_SOCK_OPS_STATE_CB
    {
        return DONE;
    }
    // SAFETY: as above.
    let sk = unsafe { (*ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return DONE;
    }
    match op {
        BPF_SOCK_OPS_TCP_CONNECT_CB => dials(&ctx, sk),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => is_taken(ops, sk),
        _ => changes(ops, sk),
    }
    DONE
}

/// A socket is about to send its SYN.
#[inline(always)]
fn dials(ctx: &SockOpsContext, sk: *mut bpf_sock) {
    let ops = ctx.ops;
    let owner = ownership(sk);
    // SAFETY: the helper takes the context.
    let netns = unsafe { bpf_get_netns_cookie(ops.cast()) };
    // SAFETY: the value is read at once; the daemon replaces entries, it does not write into them.
    let Some(pod) = (unsafe { PODS.get(&netns) }) else {
        if owner == PROBE && NODE.get(0).is_some_and(|node| node.host_cookie == netns) {
            probes(ctx);
        }
        return;
    };
    let slot = pod.slot;
    // Whatever the daemon does not vouch for stays in the pod; the connect hook does not see all of it.
    if owner == 0 && !set_ownership(sk, CAPTURED) {
        count(Counter::Unrecorded);
    }
    let (local, remote) = addresses(ops);
    if is_own(slot, &remote) && !is_own(slot, &local) {
        let (local_port, remote_port) = ports(ops);
        let flow = Flow { from: local, to: remote, from_port: local_port, to_port: remote_port };
        let delivery = LocalFlow { netns, flow, padding: 0 };
        if DELIVERIES.insert(&delivery, 1, 0).is_err() {
            count(Counter::Unrecorded);
            return;
        }
        // Nobody may take it: then it is forgotten when it ends, before a client comes by the same four numbers.
        let _heard = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
    }
}

/// The node dials a pod.
#[inline(always)]
fn probes(ctx: &SockOpsContext) {
    let (local, remote) = addresses(ctx.ops);
    let (local_port, remote_port) = ports(ctx.ops);
    let flow = Flow { from: local, to: remote, from_port: local_port, to_port: remote_port };
    if PROBES.insert(&flow, 1, 0).is_err() {
        count(Counter::Unrecorded);
        return;
    }
    // To hear of its end. Failing that it is forgotten when there are many others.
    let _heard = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
}

/// A listener has a new connection.
#[inline(always)]
fn is_taken(ops: *mut bpf_sock_ops, sk: *mut bpf_sock) {
    // SAFETY: the helper takes the context.
    let netns = unsafe { bpf_get_netns_cookie(ops.cast()) };
    // SAFETY: as in `dials`.
    let Some(pod) = (unsafe { PODS.get(&netns) }) else { return };
    let slot = pod.slot;
    let (local, remote) = addresses(ops);
    // The daemon's own listener for what the pod dials, or the pod talks to itself.
    if is_own(slot, &remote) {
        return;
    }
    let (local_port, remote_port) = ports(ops);
    let flow = Flow { from: remote, to: local, from_port: remote_port, to_port: local_port };
    let delivered = DELIVERIES.remove(&LocalFlow { netns, flow, padding: 0 }).is_ok();
    // SAFETY: a full socket, checked by the verifier.
    let mark = unsafe { (&raw const (*sk).mark).read_volatile() } & MARK_MASK;
    if (delivered || mark == REPLY || mark == CAPTURE) && !set_ownership(sk, CAPTURED) {
        count(Counter::Unrecorded);
    }
}

/// A socket of which it was asked for has another state.
#[inline(always)]
fn changes(ops: *mut bpf_sock_ops, sk: *mut bpf_sock) {
    // SAFETY: the context is valid for the run of the program.
    let state = unsafe { (&raw const (*ops).__bindgen_anon_1.args[1]).read_volatile() };
    if state != TCP_CLOSE {
        return;
    }
    let is_probe = ownership(sk) == PROBE;
    let (local, remote) = addresses(ops);
    let (local_port, remote_port) = ports(ops);
    let flow = Flow { from: local, to: remote, from_port: local_port, to_port: remote_port };
    if is_probe {
        let _forgotten = PROBES.remove(&flow);
    } else {
        // SAFETY: the helper takes the context.
        let netns = unsafe { bpf_get_netns_cookie(ops.cast()) };
        let _forgotten = DELIVERIES.remove(&LocalFlow { netns, flow, padding: 0 });
    }
}

#[inline(always)]
fn is_own(slot: u32, address: &Address) -> bool {
    is_loopback(address) || ADDRESSES.get_ptr(&SlotAddress { slot, address: *address }).is_some()
}

/// Local and remote port in host byte order.
#[inline(always)]
fn ports(ops: *mut bpf_sock_ops) -> (u16, u16) {
    // SAFETY: the context is valid for the run of the program.
    unsafe {
        let local = (&raw const (*ops).local_port).read_volatile();
        // In network byte order, in the first two of its four bytes as a number has them.
        let remote = u32::from_be((&raw const (*ops).remote_port).read_volatile());
        (local as u16, remote as u16)
    }
}

/// Local and remote address. All fields are read first, as in `lookup`.
#[inline(always)]
fn addresses(ops: *mut bpf_sock_ops) -> (Address, Address) {
    // SAFETY: the context is valid for the run of the program; it may be read by words only.
    unsafe {
        let family = (&raw const (*ops).family).read_volatile();
        let (local4, remote4) =
            ((&raw const (*ops).local_ip4).read_volatile(), (&raw const (*ops).remote_ip4).read_volatile());
        let (local6, remote6) = (words(&raw const (*ops).local_ip6), words(&raw const (*ops).remote_ip6));
        if family == AF_INET { (mapped(local4), mapped(remote4)) } else { (local6, remote6) }
    }
}

/// # Safety
/// `words` lies in the context.
#[inline(always)]
unsafe fn words(words: *const Address) -> Address {
    // SAFETY: the caller's promise.
    unsafe {
        [
            (&raw const (*words)[0]).read_volatile(),
            (&raw const (*words)[1]).read_volatile(),
            (&raw const (*words)[2]).read_volatile(),
            (&raw const (*words)[3]).read_volatile(),
        ]
    }
}
