//! Network namespaces by descriptor, and running code inside one.

use std::cell::Cell;
use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Weak};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{FsType, fstatfs};
use parking_lot::Mutex;

const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// An open network namespace; it lives at least as long as this.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    id: (u64, u64),
}

impl Netns {
    /// Opens the namespace at `path`. A path that is no namespace (a bind mount that is gone leaves an empty
    /// file) is `InvalidInput`.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::from_file(File::open(path)?)
    }

    /// The namespace that `fd` is a handle of. What is no namespace is `InvalidInput`.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Self::from_file(fd.into())
    }

    fn from_file(file: File) -> io::Result<Self> {
        if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a network namespace"));
        }
        let metadata = file.metadata()?;
        Ok(Self { fd: file.into(), id: (metadata.dev(), metadata.ino()) })
    }

    /// The namespace of this thread.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The namespace of this thread, by one descriptor for all threads that are in it.
    fn current_shared() -> io::Result<Arc<Self>> {
        let current = Self::current()?;
        let mut homes = HOMES.lock();
        homes.retain(|home| home.strong_count() > 0);
        if let Some(home) = homes.iter().filter_map(Weak::upgrade).find(|home| home.id == current.id) {
            return Ok(home);
        }
        let home = Arc::new(current);
        homes.push(Arc::downgrade(&home));
        Ok(home)
    }

    /// Device and inode: equal for two handles of the same namespace.
    pub fn id(&self) -> (u64, u64) {
        self.id
    }

    /// Runs `inside` with this thread in the namespace. What it opens (sockets, `/proc/sys/net`) belongs there.
    /// The process ends if the thread cannot come back: it would work in a pod unknowingly.
    pub fn run<T>(&self, inside: impl FnOnce() -> T) -> io::Result<T> {
        if INSIDE.get() {
            // Within another `run` this thread is not at home, and has to come back to where it is.
            return self.run_from(&Self::current()?, inside);
        }
        HOME.with(|home| match home.get() {
            Some(home) => self.run_from(home, inside),
            None => {
                let current = Self::current_shared()?;
                self.run_from(home.get_or_init(|| current), inside)
            }
        })
    }

    fn run_from<T>(&self, home: &Self, inside: impl FnOnce() -> T) -> io::Result<T> {
        if home.id == self.id {
            return Ok(inside());
        }
        let _back = Back { home, nested: INSIDE.replace(true) };
        setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
        Ok(inside())
    }
}

/// What the threads' [`HOME`]s point to: one, but in tests.
static HOMES: Mutex<Vec<Weak<Netns>>> = Mutex::new(Vec::new());

thread_local! {
    /// Where this thread is when it is not inside [`Netns::run`]: opened once, because every dial comes by here.
    static HOME: OnceCell<Arc<Netns>> = const { OnceCell::new() };
    /// Whether it is inside.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Returns on drop, so that a panic inside does not leave the thread there either.
struct Back<'a> {
    home: &'a Netns,
    /// Whether that is inside another namespace than the thread's own.
    nested: bool,
}

impl Drop for Back<'_> {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.home.fd, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "cannot leave a pod's network namespace");
            std::process::abort();
        }
        INSIDE.set(self.nested);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_within_a_run_comes_back_to_where_it_was() {
        let fresh = || {
            std::thread::spawn(|| {
                nix::sched::unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
                Netns::current().expect("open")
            })
            .join()
            .expect("no panic")
        };
        let (outer, inner) = (fresh(), fresh());
        let home = Netns::current().expect("open").id();
        let here = || Netns::current().expect("open").id();
        let seen = outer.run(|| (here(), inner.run(here).expect("enter"), here())).expect("enter");
        assert_eq!(seen, (outer.id(), inner.id(), outer.id()));
        assert_eq!(here(), home);
    }

    #[test]
    fn threads_at_home_in_one_namespace_share_a_descriptor() {
        let home = || Arc::as_ptr(&Netns::current_shared().expect("open")) as usize;
        let held = Netns::current_shared().expect("open");
        assert_eq!(std::thread::spawn(home).join().expect("no panic"), Arc::as_ptr(&held) as usize);
        let elsewhere = std::thread::spawn(move || {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
            home()
        });
        assert_ne!(elsewhere.join().expect("no panic"), Arc::as_ptr(&held) as usize);
    }

    #[test]
    fn the_current_namespace_has_one_identity() {
        let (a, b) =
            (Netns::current().expect("open"), Netns::open(Path::new("/proc/self/ns/net")).expect("open"));
        assert_eq!(a.id(), b.id());
        assert_eq!(a.run(|| 7).expect("no switch"), 7);
    }

    #[test]
    fn a_plain_file_is_refused() {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        assert_eq!(Netns::open(file.path()).expect_err("no namespace").kind(), io::ErrorKind::InvalidInput);
    }
}
