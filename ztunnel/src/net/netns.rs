//! Network namespaces, and doing things inside one.
//!
//! A socket belongs to the namespace it was created in, for ever. So the daemon enters a pod's namespace only
//! for the moment of creating one.
#![expect(
    unsafe_code,
    reason = "setns(2) has no safe wrapper that takes a borrowed descriptor and keeps errno"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A network namespace, kept open.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    id: (u64, u64),
}

impl Netns {
    /// Opens the namespace that `path` names (`/run/netns/x`, `/proc/<pid>/ns/net`).
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let meta = file.metadata()?;
        Ok(Self { id: (meta.dev(), meta.ino()), fd: file.into() })
    }

    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Device and inode: two handles with the same pair are the same namespace.
    pub fn id(&self) -> (u64, u64) {
        self.id
    }

    /// Runs `f` with the calling thread inside this namespace. Needs CAP_SYS_ADMIN.
    ///
    /// If the thread cannot go back the process aborts: it would create its next sockets in some pod.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let home = Self::current()?;
        if home.id == self.id {
            return Ok(f());
        }
        enter(&self.fd)?;
        let back = Return(&home.fd);
        let result = f();
        drop(back);
        Ok(result)
    }
}

/// Goes back to a namespace when dropped, so also when the closure panics.
struct Return<'a>(&'a OwnedFd);

impl Drop for Return<'_> {
    fn drop(&mut self) {
        if enter(self.0).is_err() {
            std::process::abort();
        }
    }
}

fn enter(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: `fd` is open for as long as it is borrowed; setns changes nothing but the calling thread.
    let done = unsafe { libc::setns(fd.as_raw_fd(), libc::CLONE_NEWNET) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
