//! The eBPF programs. Each is short and total: when something is missing or fails, the connection is refused.
//!
//! `connect`, `create`, `record` and `leave` run once per node (cgroup root), `lookup` in each enrolled pod's
//! namespace, `guard` on each of its devices. They share the maps of `maps`, which the daemon pins.

#![no_std]
#![no_main]

mod connect;
mod create;
mod guard;
mod leave;
mod lookup;
mod maps;
mod ports;
mod record;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
