//! The way out of an enrolled pod: TCP leaves it in the daemon's connections or not at all.
//!
//! Whatever did not meet the connect hook (a raw or packet socket, forwarded traffic, a TCP stack of its own)
//! is stopped at its SYN; a captured connection that lost its mark is stopped at once. Connections that were
//! open before enrolment go on. Everything but TCP passes.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_hdr_start_off::{BPF_HDR_START_MAC, BPF_HDR_START_NET};
use aya_ebpf::helpers::generated::{bpf_sk_fullsock, bpf_skb_load_bytes_relative};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ztunnel_ebpf_abi::{CAPTURED, Counter, VOUCHED};

use crate::maps::{count, ownership};

/// The next program of the device decides (`TCX_NEXT`).
const PASS: i32 = -1;
/// `TC_ACT_SHOT`.
const DROP: i32 = 2;

const TCP: u8 = 6;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// For Ethernet devices. The frame itself is read: a packet socket may lie about its protocol.
#[classifier]
pub fn guard(ctx: TcContext) -> i32 {
    let mut at = 12;
    let mut tags = 0;
    while tags < 3 {
        let Some([a, b]) = load::<2>(&ctx, at, BPF_HDR_START_MAC) else { return PASS };
        match u16::from_be_bytes([a, b]) {
            0x8100 | 0x88a8 | 0x9100 => at += 4,
            0x0800 => return v4(&ctx, at + 2, BPF_HDR_START_MAC),
            0x86dd => return v6(&ctx, at + 2, BPF_HDR_START_MAC),
            _ => return PASS,
        }
        tags += 1;
    }
    drop_because(Counter::GuardVlan)
}

/// For devices without a link-layer header.
#[classifier]
pub fn guard_ip(ctx: TcContext) -> i32 {
    let Some([first]) = load::<1>(&ctx, 0, BPF_HDR_START_NET) else { return PASS };
    match first >> 4 {
        4 => v4(&ctx, 0, BPF_HDR_START_NET),
        6 => v6(&ctx, 0, BPF_HDR_START_NET),
        _ => PASS,
    }
}

#[inline(always)]
fn v4(ctx: &TcContext, at: u32, base: u32) -> i32 {
    let Some(header) = load::<20>(ctx, at, base) else { return drop_because(Counter::GuardMalformed) };
    if header[9] != TCP {
        return PASS;
    }
    let length = u32::from(header[0] & 0x0f) * 4;
    if length < 20 {
        return drop_because(Counter::GuardMalformed);
    }
    if u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0 {
        return drop_because(Counter::GuardFragment);
    }
    tcp(ctx, at + length, base)
}

#[inline(always)]
fn v6(ctx: &TcContext, at: u32, base: u32) -> i32 {
    let Some([mut next]) = load::<1>(ctx, at + 6, base) else { return drop_because(Counter::GuardMalformed) };
    let mut at = at + 40;
    let mut headers = 0;
    while headers < 7 {
        if next == TCP {
            return tcp(ctx, at, base);
        }
        // Hop-by-hop, routing, fragment, authentication, destination options; anything else is no TCP.
        if next != 0 && next != 43 && next != 44 && next != 51 && next != 60 {
            return PASS;
        }
        let Some(header) = load::<4>(ctx, at, base) else { return drop_because(Counter::GuardMalformed) };
        at += match next {
            44 => {
                if u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0 {
                    return if header[0] == TCP || is_extension(header[0]) {
                        drop_because(Counter::GuardFragment)
                    } else {
                        PASS
                    };
                }
                8
            }
            51 => (u32::from(header[1]) + 2) * 4,
            _ => (u32::from(header[1]) + 1) * 8,
        };
        next = header[0];
        headers += 1;
    }
    drop_because(Counter::GuardMalformed)
}

#[inline(always)]
fn is_extension(next: u8) -> bool {
    next == 0 || next == 43 || next == 44 || next == 51 || next == 60
}

#[inline(always)]
fn tcp(ctx: &TcContext, at: u32, base: u32) -> i32 {
    let Some([flags]) = load::<1>(ctx, at + 13, base) else { return drop_because(Counter::GuardMalformed) };
    let owner = owner(ctx);
    if owner == VOUCHED {
        return PASS;
    }
    if owner == CAPTURED {
        return drop_because(Counter::GuardLostMark);
    }
    if flags & (SYN | ACK) == SYN {
        return drop_because(Counter::GuardSyn);
    }
    PASS
}

#[inline(always)]
fn owner(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid for the run of the program.
    let sk = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    if sk.is_null() {
        return 0;
    }
    // SAFETY: not null.
    let sk = unsafe { bpf_sk_fullsock(sk) };
    if sk.is_null() {
        return 0;
    }
    ownership(sk)
}

#[inline(always)]
fn load<const N: usize>(ctx: &TcContext, at: u32, base: u32) -> Option<[u8; N]> {
    let mut bytes = [0u8; N];
    // SAFETY: the buffer has N bytes.
    let failed =
        unsafe { bpf_skb_load_bytes_relative(ctx.as_ptr(), at, bytes.as_mut_ptr().cast(), N as u32, base) };
    if failed == 0 { Some(bytes) } else { None }
}

#[inline(always)]
fn drop_because(why: Counter) -> i32 {
    count(why);
    DROP
}
