//! Ctrl-C takes the run down too.
#![expect(unsafe_code, reason = "a signal handler; it only writes one byte to a pipe")]

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;

use anyhow::{Context, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::{ACTIVE, take_down};

static WAKE: AtomicI32 = AtomicI32::new(-1);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Does not return once a signal has come: this process is about to end, and must not make anything new.
pub(super) fn wait_for_end() {
    while INTERRUPTED.load(Ordering::Acquire) {
        thread::park();
    }
}

extern "C" fn wake(signal: libc::c_int) {
    let byte = signal as u8;
    // SAFETY: `write` may be called in a signal handler; the byte lives on this stack, and the pipe is never
    // closed.
    unsafe { libc::write(WAKE.load(Ordering::Relaxed), std::ptr::from_ref(&byte).cast(), 1) };
}

/// From here on SIGINT, SIGTERM and SIGHUP take down the runs of this process before they end it.
pub(super) fn clean_up_on_signals() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = install());
    result
}

fn install() -> Result<()> {
    let (reader, writer) = nix::unistd::pipe().context("cannot make a pipe")?;
    let writer: &'static OwnedFd = Box::leak(Box::new(writer));
    WAKE.store(writer.as_raw_fd(), Ordering::Relaxed);
    thread::spawn(move || {
        let mut byte = [0; 1];
        if std::fs::File::from(reader).read_exact(&mut byte).is_ok() {
            INTERRUPTED.store(true, Ordering::Release);
            eprintln!("\ninterrupted: taking everything down");
            let active = ACTIVE.lock().clone();
            for prefix in &active {
                if let Err(error) = take_down(prefix) {
                    eprintln!("{prefix}: {error:#}");
                }
            }
            // What another thread was just making is there by now.
            let _told_above: Vec<_> = active.iter().map(|prefix| take_down(prefix)).collect();
            std::process::exit(128 + i32::from(byte[0]));
        }
    });
    let action = SigAction::new(SigHandler::Handler(wake), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler does nothing but write one byte.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("cannot handle {signal}"))?;
    }
    Ok(())
}
