//! Which socket takes a new connection in an enrolled pod.
//!
//! Runs only when no established socket matches, so never per packet. It sees no mark: the device the packet
//! came by and the addresses decide.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::sk_action::{SK_DROP, SK_PASS};
use aya_ebpf::bindings::{BPF_SK_LOOKUP_F_NO_REUSEPORT, bpf_sk_lookup};
use aya_ebpf::macros::sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use ztunnel_ebpf_abi::{
    Address, Counter, Flow, HBONE, HBONE_PORT, INBOUND, LISTENERS_PER_SLOT, OUTBOUND, SlotAddress, mapped,
};

use crate::maps::{ADDRESSES, LISTENERS, PROBES, count, is_link_local, is_loopback, keep};

/// The pod this instance is attached to; written at load time.
#[unsafe(no_mangle)]
static SLOT: u32 = 0;

const TCP: u32 = 6;
const AF_INET: u32 = 2;
const LOOPBACK_DEVICE: u32 = 1;
/// There is no packet: a program asks who would be met.
const NO_DEVICE: u32 = 0;

#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    // SAFETY: the context is valid for the run of the program.
    if unsafe { (&raw const (*lookup).protocol).read_volatile() } != TCP {
        return SK_PASS;
    }
    keep();
    // SAFETY: read-only data, written before the program was loaded.
    let slot = unsafe { (&raw const SLOT).read_volatile() };
    let (local, remote) = addresses(lookup);
    let own_local = ADDRESSES.get_ptr(&SlotAddress { slot, address: local }).is_some();
    // SAFETY: as above.
    let device = unsafe { (&raw const (*lookup).ingress_ifindex).read_volatile() };
    if device == NO_DEVICE {
        return SK_PASS;
    }
    if device == LOOPBACK_DEVICE {
        // To itself, or the daemon's dial to the application.
        if own_local || is_loopback(&local) {
            return SK_PASS;
        }
        // The pod may have addresses that are not known, more than there is room for. What is delivered to one of
        // them must not be taken for what the pod dials, and delivered again.
        if ADDRESSES.get_ptr(&SlotAddress { slot, address: remote }).is_none() {
            count(Counter::DroppedUnknownAddress);
            return SK_DROP;
        }
        return assign(&ctx, slot, OUTBOUND, Counter::AcceptedOutbound);
    }
    // To one of its own addresses the kernel names the device that has it, not loopback.
    if own_local && equal(&local, &remote)
        || ADDRESSES.get_ptr(&SlotAddress { slot, address: remote }).is_some()
    {
        return SK_PASS;
    }
    if is_link_local(&local) {
        count(Counter::DroppedLinkLocal);
        return SK_DROP;
    }
    // SAFETY: as above.
    let port = unsafe { (&raw const (*lookup).local_port).read_volatile() };
    if port == u32::from(HBONE_PORT) {
        return assign(&ctx, slot, HBONE, Counter::AcceptedHbone);
    }
    // The node has written down what it dials: no address, which anybody may send, is enough.
    // SAFETY: as above.
    let remote_port = u16::from_be(unsafe { (&raw const (*lookup).remote_port).read_volatile() });
    let flow = Flow { from: remote, to: local, from_port: remote_port, to_port: port as u16 };
    if PROBES.get_ptr(&flow).is_some() {
        count(Counter::AcceptedProbe);
        return SK_PASS;
    }
    assign(&ctx, slot, INBOUND, Counter::AcceptedInbound)
}

#[inline(always)]
fn assign(ctx: &SkLookupContext, slot: u32, kind: u32, counter: Counter) -> u32 {
    debug_assert!(!ctx.as_ptr().is_null());
    let flags = u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT);
    match LISTENERS.redirect_sk_lookup(ctx, slot * LISTENERS_PER_SLOT + kind, flags) {
        Ok(()) => {
            count(counter);
            SK_PASS
        }
        Err(_) => {
            count(Counter::DroppedNoListener);
            SK_DROP
        }
    }
}

/// Local and remote address. All fields are read first (those of the other family are zero): reads in branches
/// are merged into one with a computed offset, which the verifier does not allow.
#[inline(always)]
fn addresses(lookup: *mut bpf_sk_lookup) -> (Address, Address) {
    // SAFETY: the context is valid for the run of the program; it may be read by words only.
    unsafe {
        let family = (&raw const (*lookup).family).read_volatile();
        let (local4, remote4) = (
            (&raw const (*lookup).local_ip4).read_volatile(),
            (&raw const (*lookup).remote_ip4).read_volatile(),
        );
        let (local6, remote6) =
            (words(&raw const (*lookup).local_ip6), words(&raw const (*lookup).remote_ip6));
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

#[inline(always)]
fn equal(a: &Address, b: &Address) -> bool {
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}
