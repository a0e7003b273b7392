//! The maps, all pinned by name and shared by every program.

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::bpf_sk_release;
use aya_ebpf::helpers::generated::{bpf_map_lookup_elem, bpf_sk_storage_get};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, SockMap};
use ztunnel_ebpf_abi::{
    ADDRESSES_PER_SLOT, Address, COUNTERS as COUNTER_ENTRIES, Counter, DELIVERIES as DELIVERY_ENTRIES, Flow,
    LISTENERS_PER_SLOT, LocalFlow, MAPPED, NodeConfig, OUTBOUND, PROBED_PER_SLOT, PROBES as PROBE_ENTRIES,
    PodEntry, Record, SLOTS, STATE_ENTRIES, SlotAddress,
};

/// Enrolled pods by netns cookie, and as many for which there is no slot.
#[map]
pub static PODS: HashMap<u64, PodEntry> = HashMap::pinned(2 * SLOTS, BPF_F_NO_PREALLOC);
/// Each pod's own addresses.
#[map]
pub static ADDRESSES: HashMap<SlotAddress, u32> =
    HashMap::pinned(SLOTS * ADDRESSES_PER_SLOT, BPF_F_NO_PREALLOC);
/// Addresses of all enrolled pods, as the node dials them; the value is the slot.
#[map]
pub static POD_IPS: HashMap<Address, u32> = HashMap::pinned(SLOTS * PROBED_PER_SLOT, BPF_F_NO_PREALLOC);
/// The daemon's listeners: slot * 4 + kind.
#[map]
pub static LISTENERS: SockMap = SockMap::pinned(SLOTS * LISTENERS_PER_SLOT, 0);
/// What the programs know of the host.
#[map]
pub static NODE: Array<NodeConfig> = Array::pinned(1, 0);
/// By reason.
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(COUNTER_ENTRIES, 0);
/// Connections of the node's own to pods, from their first packet to their end.
#[map]
pub static PROBES: LruHashMap<Flow, u32> = LruHashMap::pinned(PROBE_ENTRIES, 0);
/// Connections that begin and end in one pod with the address of somebody else, until they are taken.
#[map]
pub static DELIVERIES: LruHashMap<LocalFlow, u32> = LruHashMap::pinned(DELIVERY_ENTRIES, 0);
/// For the daemon alone: generation and such.
#[map]
static STATE: Array<u64> = Array::pinned(STATE_ENTRIES, 0);
/// For the daemon alone: which pods there are.
#[map]
static RECORDS: HashMap<u32, Record> = HashMap::pinned(SLOTS, BPF_F_NO_PREALLOC);
/// Whose socket it is: VOUCHED, CAPTURED or PROBE. A pod cannot write it.
#[btf_map]
static SOCKETS: SkStorage<u32> = SkStorage::new();

/// Keeps the two maps no program uses in the object.
#[inline(always)]
pub fn keep() {
    let _state = STATE.get_ptr(0);
    let _record = RECORDS.get_ptr(&0);
}

/// Whether a daemon listens for what the pod dials.
#[inline(always)]
pub fn is_served(slot: u32) -> bool {
    let key = slot * LISTENERS_PER_SLOT + OUTBOUND;
    let map = core::ptr::from_ref(&LISTENERS).cast_mut().cast();
    // SAFETY: the helper takes a map and a key of its size.
    let sk = unsafe { bpf_map_lookup_elem(map, (&raw const key).cast()) };
    if sk.is_null() {
        return false;
    }
    // SAFETY: a socket from a socket map is ours to release.
    unsafe { bpf_sk_release(sk) };
    true
}

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot belongs to this CPU; a lost update by an interrupting program costs one count.
        unsafe { *value += 1 }
    }
}

/// What is known of a socket: VOUCHED, CAPTURED, PROBE or nothing. `sk` is a full socket.
#[inline(always)]
pub fn ownership(sk: *mut bpf_sock) -> u32 {
    let storage = core::ptr::from_ref(&SOCKETS).cast_mut().cast();
    // SAFETY: the verifier has checked that `sk` is a full socket.
    let value = unsafe { bpf_sk_storage_get(storage, sk.cast(), core::ptr::null_mut(), 0) }.cast::<u32>();
    if value.is_null() {
        return 0;
    }
    // SAFETY: not null, and storage lives as long as its socket.
    unsafe { *value }
}

/// Writes what is known of a socket; false when there is no memory.
#[inline(always)]
pub fn set_ownership(sk: *mut bpf_sock, ownership: u32) -> bool {
    let storage = core::ptr::from_ref(&SOCKETS).cast_mut().cast();
    let mut initial = ownership;
    // SAFETY: as in `ownership`.
    let value = unsafe {
        bpf_sk_storage_get(storage, sk.cast(), (&raw mut initial).cast(), BPF_SK_STORAGE_GET_F_CREATE.into())
    }
    .cast::<u32>();
    if value.is_null() {
        return false;
    }
    // SAFETY: not null, and storage lives as long as its socket.
    unsafe { *value = ownership }
    true
}

/// 127.0.0.0/8, ::1 and the unspecified addresses, which mean the same to `connect`.
#[inline(always)]
pub fn is_loopback(address: &Address) -> bool {
    if address[0] != 0 || address[1] != 0 {
        return false;
    }
    if address[2] == MAPPED {
        return u32::from_be(address[3]) >> 24 == 127 || address[3] == 0;
    }
    address[2] == 0 && u32::from_be(address[3]) <= 1
}

/// fe80::/10.
#[inline(always)]
pub fn is_link_local(address: &Address) -> bool {
    u32::from_be(address[0]) & 0xffc0_0000 == 0xfe80_0000
}
