//! System calls without a wrapper: the few `bpf(2)` commands aya does not offer in the form needed here (links by
//! descriptor, one map update without allocation), and mounts that nobody else sees.

#![expect(unsafe_code, reason = "system calls without a wrapper")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

const MAP_UPDATE_ELEM: libc::c_long = 2;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
const LINK_DETACH: libc::c_long = 34;

/// Where a program is attached (`enum bpf_attach_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Attach {
    Egress = 1,
    SockCreate = 2,
    SockOps = 3,
    Bind4 = 8,
    Bind6 = 9,
    Connect4 = 10,
    Connect6 = 11,
    SkLookup = 36,
    TcxEgress = 47,
}

/// What the kernel says of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinkState {
    /// The number of the link.
    pub id: u32,
    /// The attached program.
    pub program: u32,
    /// Cgroup id, namespace inode or device index; zero when what it was attached to is gone.
    pub target: u64,
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `T` is a prefix of `union bpf_attr` for the command (each caller's layout); the kernel treats
    // the rest as zero and reads and writes no more than the given size.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn descriptor(result: libc::c_long) -> OwnedFd {
    // SAFETY: the command returned a new descriptor; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(result as i32) }
}

#[repr(C)]
#[derive(Default)]
struct MapElement {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Sets a four byte value for a four byte key.
pub(super) fn map_update(map: BorrowedFd<'_>, key: u32, value: u32) -> io::Result<()> {
    let mut attributes = MapElement {
        map: map.as_raw_fd() as u32,
        key: std::ptr::from_ref(&key) as u64,
        value: std::ptr::from_ref(&value) as u64,
        ..MapElement::default()
    };
    bpf(MAP_UPDATE_ELEM, &mut attributes).map(drop)
}

#[repr(C)]
#[derive(Default)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

fn text(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Pins a link or program at `path`.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = text(path)?;
    let mut attributes = Object { path: path.as_ptr() as u64, fd: object.as_raw_fd() as u32, flags: 0 };
    bpf(OBJ_PIN, &mut attributes).map(drop)
}

/// Opens what is pinned at `path`.
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = text(path)?;
    let mut attributes = Object { path: path.as_ptr() as u64, ..Object::default() };
    bpf(OBJ_GET, &mut attributes).map(descriptor)
}

/// Makes a bpf file system that is mounted nowhere. What is pinned below [`inside`] of it lives as long as the
/// descriptor, so no longer than this process, whatever becomes of that.
pub(super) fn private_bpffs() -> io::Result<OwnedFd> {
    private_mount(c"bpf")
}

/// Makes a proc file system that is mounted nowhere. What it shows of the network is that of the namespace of whoever
/// looks.
pub(super) fn private_proc() -> io::Result<OwnedFd> {
    private_mount(c"proc")
}

fn private_mount(kind: &CStr) -> io::Result<OwnedFd> {
    const CREATE: libc::c_long = 6;
    const CLOSE_ON_EXEC: libc::c_long = 1;
    let nothing = std::ptr::null::<libc::c_char>();
    // SAFETY: plain system calls; the name is a C string, and the rest are numbers and null pointers. Descriptors
    // they return are new and nobody else's.
    unsafe {
        let made = |result: libc::c_long| {
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(descriptor(result)) }
        };
        let context = made(libc::syscall(libc::SYS_fsopen, kind.as_ptr(), CLOSE_ON_EXEC))?;
        if libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), CREATE, nothing, nothing, 0) < 0 {
            return Err(io::Error::last_os_error());
        }
        made(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOSE_ON_EXEC, 0))
    }
}

/// The path by which this process comes into a file system that is mounted nowhere.
pub(super) fn inside(file_system: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file_system.as_raw_fd()))
}

#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach: u32,
    flags: u32,
    relative: u32,
    padding: u32,
    revision: u64,
}

/// Attaches `program` to a cgroup or namespace (descriptor) or a device of this thread's namespace (index). On
/// a device it runs before all that are there.
pub(super) fn attach(program: BorrowedFd<'_>, target: u32, attach: Attach) -> io::Result<OwnedFd> {
    const BEFORE: u32 = 1 << 3;
    let mut attributes = LinkCreate {
        program: program.as_raw_fd() as u32,
        target,
        attach: attach as u32,
        flags: if attach == Attach::TcxEgress { BEFORE } else { 0 },
        ..LinkCreate::default()
    };
    bpf(LINK_CREATE, &mut attributes).map(descriptor)
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old: u32,
}

/// Puts another program in a link's place, atomically.
pub(super) fn replace(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = LinkUpdate {
        link: link.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        ..LinkUpdate::default()
    };
    bpf(LINK_UPDATE, &mut attributes).map(drop)
}

/// Detaches a pinned link now and removes its pin. Without that it would end only later, or not at all while
/// another daemon holds it too. What is gone already is fine.
pub(super) fn detach(path: &Path) -> io::Result<()> {
    if let Ok(link) = open(path) {
        let mut attributes = link.as_raw_fd() as u32;
        match bpf(LINK_DETACH, &mut attributes) {
            // What it was attached to is gone.
            Err(error)
                if !matches!(error.raw_os_error(), Some(libc::ENOLINK | libc::ENOENT | libc::EINVAL)) =>
            {
                return Err(error);
            }
            _ => {}
        }
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[repr(C)]
#[derive(Default)]
struct Query {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    target: [u32; 2],
    attach: u32,
    rest: [u32; 5],
}

/// What a link of the given kind is attached to now.
pub(super) fn link_state(link: BorrowedFd<'_>, attach: Attach) -> io::Result<LinkState> {
    let mut info = LinkInfo::default();
    let mut attributes = Query {
        fd: link.as_raw_fd() as u32,
        length: size_of::<LinkInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attributes)?;
    let target = match attach {
        Attach::SkLookup | Attach::TcxEgress => u64::from(info.target[0]),
        _ if cfg!(target_endian = "big") => u64::from(info.target[0]) << 32 | u64::from(info.target[1]),
        _ => u64::from(info.target[1]) << 32 | u64::from(info.target[0]),
    };
    Ok(LinkState { id: info.id, program: info.program, target })
}

#[repr(C)]
#[derive(Default)]
struct ProgramsQuery {
    device: u32,
    attach: u32,
    flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    padding: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

/// The numbers of the links on the way out of a device of this thread's namespace.
pub(super) fn links_of_device(device: u32) -> io::Result<Vec<u32>> {
    /// As many as the kernel allows on one device.
    const MOST: usize = 64;
    let (mut programs, mut links) = ([0u32; MOST], [0u32; MOST]);
    let mut attributes = ProgramsQuery {
        device,
        attach: Attach::TcxEgress as u32,
        programs: programs.as_mut_ptr() as u64,
        count: MOST as u32,
        links: links.as_mut_ptr() as u64,
        ..ProgramsQuery::default()
    };
    match bpf(PROG_QUERY, &mut attributes) {
        Ok(_) => Ok(links.into_iter().take(attributes.count as usize).filter(|id| *id != 0).collect()),
        // Nothing was ever attached there.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A link that is to be attached, pinned and held.
pub(super) struct Wanted<'a> {
    /// Its pin.
    pub path: &'a Path,
    /// Its hook.
    pub hook: Attach,
    /// What [`LinkState::target`] must be.
    pub target: u64,
    /// Give it the current program even if it is in order.
    pub renew: bool,
}

/// What [`ensure_link`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ensured {
    /// All was in order.
    Present,
    /// Only the pin was missing.
    Pinned,
    /// It was not attached.
    Attached,
}

/// Makes sure that a link is attached, pinned at its path and held in `held`. `program` is loaded only when it
/// is needed; `attach` is given it.
pub(super) fn ensure_link<E: From<io::Error>>(
    wanted: &Wanted<'_>,
    held: &mut Option<OwnedFd>,
    program: impl FnOnce() -> Result<OwnedFd, E>,
    attach: impl FnOnce(BorrowedFd<'_>) -> io::Result<OwnedFd>,
) -> Result<Ensured, E> {
    let alive =
        |link: &OwnedFd| link_state(link.as_fd(), wanted.hook).is_ok_and(|s| s.target == wanted.target);
    let pinned = open(wanted.path).ok().filter(alive);
    let (link, ensured) = match (pinned, held.take().filter(alive)) {
        (Some(link), _) | (None, Some(link)) if wanted.renew => {
            replace(link.as_fd(), program()?.as_fd())?;
            (link, if wanted.path.exists() { Ensured::Present } else { Ensured::Pinned })
        }
        (Some(link), _) => (link, Ensured::Present),
        (None, Some(link)) => (link, Ensured::Pinned),
        (None, None) => (attach(program()?.as_fd())?, Ensured::Attached),
    };
    if ensured != Ensured::Present {
        match std::fs::remove_file(wanted.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => pin(link.as_fd(), wanted.path)?,
        }
    }
    *held = Some(link);
    Ok(ensured)
}
