//! `connect` and `bind` of every process of the node.
//!
//! A pod's connection is marked for capture, a node process that dials a pod gets the probe address.

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::{
    bpf_bind, bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_getsockopt, bpf_set_retval,
    bpf_setsockopt,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use ztunnel_ebpf_abi::{
    Address, CAPTURE, CAPTURED, Counter, MAPPED, MARK_MASK, PROBE, PROBE_V4, PROBE_V6, SlotAddress, VOUCHED,
    mapped,
};

use crate::maps::{
    ADDRESSES, NODE, POD_IPS, PODS, count, is_link_local, is_loopback, is_served, ownership, set_ownership,
};
use crate::ports;

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const SOCK_STREAM: u32 = 1;
const TCP: u32 = 6;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
const SO_MARK: i32 = 36;
const EADDRNOTAVAIL: i32 = 99;
const ECONNREFUSED: i32 = 111;
/// How deep in the kernel's cgroups a node's own root may be.
const NODE_DEPTH_MAX: u32 = 8;

#[repr(C)]
struct SockaddrIn {
    family: u16,
    port: u16,
    address: u32,
    zero: [u32; 2],
}

#[repr(C)]
struct SockaddrIn6 {
    family: u16,
    port: u16,
    flow: u32,
    address: Address,
    scope: u32,
}

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the context is valid for the run of the program.
    let to = mapped(unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() });
    connect(ctx.sock_addr, &to, AF_INET)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect(ctx.sock_addr, &user_ip6(ctx.sock_addr), AF_INET6)
}

#[cgroup_sock_addr(bind4)]
pub fn bind4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the context is valid for the run of the program.
    let address = mapped(unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() });
    bind(ctx.sock_addr, &address)
}

#[cgroup_sock_addr(bind6)]
pub fn bind6(ctx: SockAddrContext) -> i32 {
    bind(ctx.sock_addr, &user_ip6(ctx.sock_addr))
}

#[inline(always)]
fn connect(ctx: *mut bpf_sock_addr, to: &Address, family: u16) -> i32 {
    if !is_tcp(ctx) {
        return ALLOW;
    }
    // SAFETY: the helper takes the context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    // SAFETY: the value is read at once; the daemon replaces entries, it does not write into them.
    match unsafe { PODS.get(&cookie) } {
        Some(pod) => from_pod(ctx, pod.slot, to, family),
        None => from_elsewhere(ctx, cookie, to, family),
    }
}

#[inline(always)]
fn from_pod(ctx: *mut bpf_sock_addr, slot: u32, to: &Address, family: u16) -> i32 {
    let own = SlotAddress { slot, address: *to };
    if is_loopback(to) || ADDRESSES.get_ptr(&own).is_some() {
        if ports::is_met(ctx, to, family == AF_INET) {
            // SAFETY: the helper takes a number: what the kernel says of a connection that is there already.
            unsafe { bpf_set_retval(-EADDRNOTAVAIL) };
            return REFUSE;
        }
        count(Counter::ConnectLocal);
        return ALLOW;
    }
    // SAFETY: connect hooks have a full socket.
    let sk = unsafe { (*ctx).__bindgen_anon_1.sk };
    if ownership(sk) == VOUCHED {
        count(Counter::ConnectVouched);
        return ALLOW;
    }
    let mut mark = 0u32;
    if !get_mark(ctx, &mut mark) {
        return refuse(Counter::RefusedMark);
    }
    if is_link_local(to) {
        return refuse(Counter::RefusedLinkLocal);
    }
    if !is_served(slot) {
        // The lookup would find nobody, and for IPv4 the kernel sends no reset from an address that is not
        // the pod's: the application would wait for its time-out.
        // SAFETY: the helper takes a number; without it the error would be EPERM.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
        return refuse(Counter::RefusedNoListener);
    }
    if !set_mark(ctx, (mark & !MARK_MASK) | CAPTURE) {
        return refuse(Counter::RefusedMark);
    }
    if !free_from_device(ctx, sk) {
        return refuse(Counter::RefusedDevice);
    }
    if !set_ownership(sk, CAPTURED) {
        return refuse(Counter::RefusedStorage);
    }
    count(Counter::ConnectCaptured);
    ALLOW
}

#[inline(always)]
fn from_elsewhere(ctx: *mut bpf_sock_addr, cookie: u64, to: &Address, family: u16) -> i32 {
    let Some(node) = NODE.get(0) else { return ALLOW };
    if cookie != node.host_cookie || POD_IPS.get_ptr(to).is_none() {
        return ALLOW;
    }
    if in_pod_cgroup(node.kubepods, node.kubepods_level) {
        // Host-networked pods are no part of the node: they come in like anybody else. `bind` keeps them off
        // the probe address; a socket bound earlier is caught here.
        // SAFETY: connect hooks have a full socket.
        let sk = unsafe { (*ctx).__bindgen_anon_1.sk };
        return if is_probe(&source(sk)) { refuse(Counter::RefusedProbeAddress) } else { ALLOW };
    }
    // A socket that is bound already keeps its address and gets no exemption, nor does one that cannot be
    // remembered.
    if bind_probe(ctx, to[2] == MAPPED && to[0] == 0 && to[1] == 0, family) {
        // SAFETY: connect hooks have a full socket.
        let sk = unsafe { (*ctx).__bindgen_anon_1.sk };
        if set_ownership(sk, PROBE) {
            count(Counter::ConnectProbe);
        }
    }
    ALLOW
}

/// Keeps pods off the probe address, lets multipath listeners lose the mark `create` gave them, and applications bind
/// beside the daemon's connections.
#[inline(always)]
fn bind(ctx: *mut bpf_sock_addr, address: &Address) -> i32 {
    if !is_tcp(ctx) {
        return ALLOW;
    }
    // SAFETY: the helper takes the context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    if PODS.get_ptr(&cookie).is_some() {
        let mut mark = 0u32;
        // SAFETY: bind hooks have a full socket.
        let sk = unsafe { (*ctx).__bindgen_anon_1.sk };
        if get_mark(ctx, &mut mark) && mark & MARK_MASK == CAPTURE && ownership(sk) == 0 {
            set_mark(ctx, mark & !MARK_MASK);
        }
        ports::share(ctx);
        return ALLOW;
    }
    let Some(node) = NODE.get(0) else { return ALLOW };
    if cookie == node.host_cookie && is_probe(address) && in_pod_cgroup(node.kubepods, node.kubepods_level) {
        return refuse(Counter::RefusedProbeAddress);
    }
    ALLOW
}

#[inline(always)]
fn refuse(why: Counter) -> i32 {
    count(why);
    REFUSE
}

#[inline(always)]
fn is_tcp(ctx: *mut bpf_sock_addr) -> bool {
    // SAFETY: the context is valid for the run of the program.
    unsafe {
        (&raw const (*ctx).type_).read_volatile() == SOCK_STREAM
            && (&raw const (*ctx).protocol).read_volatile() == TCP
    }
}

#[inline(always)]
fn user_ip6(ctx: *mut bpf_sock_addr) -> Address {
    // SAFETY: the context is valid for the run of the program.
    unsafe {
        let words = &raw const (*ctx).user_ip6;
        [
            (&raw const (*words)[0]).read_volatile(),
            (&raw const (*words)[1]).read_volatile(),
            (&raw const (*words)[2]).read_volatile(),
            (&raw const (*words)[3]).read_volatile(),
        ]
    }
}

/// The local address a socket is bound to.
#[inline(always)]
fn source(sk: *mut bpf_sock) -> Address {
    // SAFETY: a full socket, checked by the verifier.
    unsafe {
        if (&raw const (*sk).family).read_volatile() == u32::from(AF_INET) {
            return mapped((&raw const (*sk).src_ip4).read_volatile());
        }
        let words = &raw const (*sk).src_ip6;
        [
            (&raw const (*words)[0]).read_volatile(),
            (&raw const (*words)[1]).read_volatile(),
            (&raw const (*words)[2]).read_volatile(),
            (&raw const (*words)[3]).read_volatile(),
        ]
    }
}

#[inline(always)]
fn is_probe(address: &Address) -> bool {
    equal(address, &PROBE_V4) || equal(address, &PROBE_V6)
}

#[inline(always)]
fn equal(a: &Address, b: &Address) -> bool {
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}

/// Whether the process is below the cgroup of pods. How deep that is, is known from the root that the daemon sees, which
/// is not the kernel's when the whole node is in a container.
#[inline(always)]
fn in_pod_cgroup(kubepods: u64, level: u32) -> bool {
    let mut more = 0;
    while kubepods != 0 && more < NODE_DEPTH_MAX {
        // SAFETY: the helper only reads the current task.
        if unsafe { bpf_get_current_ancestor_cgroup_id((level + more) as i32) } == kubepods {
            return true;
        }
        more += 1;
    }
    false
}

#[inline(always)]
fn get_mark(ctx: *mut bpf_sock_addr, mark: &mut u32) -> bool {
    // SAFETY: four bytes for a four byte option.
    unsafe { bpf_getsockopt(ctx.cast(), SOL_SOCKET, SO_MARK, core::ptr::from_mut(mark).cast(), 4) == 0 }
}

#[inline(always)]
fn set_mark(ctx: *mut bpf_sock_addr, mark: u32) -> bool {
    let mut mark = mark;
    // SAFETY: as above.
    unsafe { bpf_setsockopt(ctx.cast(), SOL_SOCKET, SO_MARK, (&raw mut mark).cast(), 4) == 0 }
}

/// Undoes `SO_BINDTODEVICE`: a bound socket would not follow the capture route.
#[inline(always)]
fn free_from_device(ctx: *mut bpf_sock_addr, sk: *mut bpf_sock) -> bool {
    // SAFETY: a full socket, checked by the verifier.
    if unsafe { (&raw const (*sk).bound_dev_if).read_volatile() } == 0 {
        return true;
    }
    let mut nothing = 0u32;
    // SAFETY: an empty name of four bytes.
    unsafe { bpf_setsockopt(ctx.cast(), SOL_SOCKET, SO_BINDTODEVICE, (&raw mut nothing).cast(), 4) == 0 }
}

#[inline(always)]
fn bind_probe(ctx: *mut bpf_sock_addr, v4: bool, family: u16) -> bool {
    if family == AF_INET {
        let mut from = SockaddrIn { family: AF_INET, port: 0, address: PROBE_V4[3], zero: [0; 2] };
        // SAFETY: a whole sockaddr_in.
        return unsafe { bpf_bind(ctx, (&raw mut from).cast(), 16) == 0 };
    }
    let address = if v4 { PROBE_V4 } else { PROBE_V6 };
    let mut from = SockaddrIn6 { family: AF_INET6, port: 0, flow: 0, address, scope: 0 };
    // SAFETY: a whole sockaddr_in6.
    unsafe { bpf_bind(ctx, (&raw mut from).cast(), 28) == 0 }
}
