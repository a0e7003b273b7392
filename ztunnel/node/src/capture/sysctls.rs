//! Settings of an enrolled pod's network namespace by which an answer carries the mark of what it answers.
//!
//! What an application accepted answers by its socket, which takes the mark of its connection (`tcp_fwmark_accept`).
//! Where there is no socket (nobody listens on the port, the connection is long gone) the kernel answers itself, and
//! takes the mark of the packet (`fwmark_reflect`). Without it such an answer to a delivery would leave the pod in clear,
//! for the client, and the delivery would wait for its time-out.
//!
//! Everything here works in the namespace of the calling thread.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use ztunnel_ebpf_abi::Record;

use super::sys;

const ROOT: &str = "/proc/sys";

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Setting {
    path: &'static str,
    name: &'static str,
    /// A kernel or a pod without IPv6 does not have it.
    optional: bool,
}

const ACCEPT: Setting =
    Setting { path: "net/ipv4/tcp_fwmark_accept", name: "the tcp_fwmark_accept setting", optional: false };
const REFLECT_V4: Setting =
    Setting { path: "net/ipv4/fwmark_reflect", name: "the fwmark_reflect setting", optional: false };
const REFLECT_V6: Setting =
    Setting { path: "net/ipv6/fwmark_reflect", name: "the IPv6 fwmark_reflect setting", optional: true };
const ALL: [Setting; 3] = [ACCEPT, REFLECT_V4, REFLECT_V6];

impl Setting {
    /// `None` where there is no such setting, and need not be.
    fn read(self) -> io::Result<Option<u32>> {
        match std::fs::read_to_string(Path::new(ROOT).join(self.path)) {
            Ok(text) => Ok(Some(text.trim().parse().unwrap_or(0))),
            Err(error) if self.optional && error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.said(error)),
        }
    }

    fn write(self, value: u32) -> io::Result<()> {
        let text = value.to_string();
        match std::fs::write(Path::new(ROOT).join(self.path), &text) {
            // In a container it is mounted for reading only, as a rule, while the settings themselves may be changed.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EROFS | libc::EACCES | libc::EPERM)) => {
                self.write_elsewhere(&text).map_err(|again| {
                    io::Error::new(
                        error.kind(),
                        format!(
                            "cannot write {ROOT}/{}: {error}; nor by a proc file system of its own: {again} \
                             (CAP_SYS_ADMIN lets the daemon mount one; or run it where {ROOT} can be written)",
                            self.path
                        ),
                    )
                })
            }
            Err(error) if self.optional && error.kind() == io::ErrorKind::NotFound => Ok(()),
            written => written.map_err(|error| self.said(error)),
        }
    }

    /// By a mount that is nowhere in the tree, and goes when it is closed.
    fn write_elsewhere(self, text: &str) -> io::Result<()> {
        let proc = sys::private_proc()?;
        std::fs::write(sys::inside(proc.as_fd()).join("sys").join(self.path), text)
    }

    fn said(self, error: io::Error) -> io::Error {
        io::Error::new(error.kind(), format!("{ROOT}/{}: {error}", self.path))
    }
}

/// What the settings were before, for a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Former {
    /// `tcp_fwmark_accept`
    accept: u32,
    /// `fwmark_reflect` of IPv4 and IPv6; `None` is left as it is.
    reflect: [Option<u8>; 2],
}

impl Former {
    /// As they are now.
    pub(super) fn look() -> io::Result<Self> {
        let byte = |value: u32| u8::try_from(value).unwrap_or(u8::MAX);
        Ok(Self {
            accept: ACCEPT.read()?.unwrap_or(0),
            reflect: [REFLECT_V4.read()?.map(byte), REFLECT_V6.read()?.map(byte)],
        })
    }

    /// As a record says.
    pub(super) fn of(record: &Record) -> Self {
        let [v4, v6, known, _] = record.fwmark_reflect.to_le_bytes();
        let reflect = [(known & 1 != 0).then_some(v4), (known & 2 != 0).then_some(v6)];
        Self { accept: record.fwmark_accept, reflect }
    }

    /// For a record: `fwmark_accept` and `fwmark_reflect`.
    pub(super) fn packed(&self) -> (u32, u32) {
        let [v4, v6] = self.reflect;
        let known = u8::from(v4.is_some()) | u8::from(v6.is_some()) << 1;
        (self.accept, u32::from_le_bytes([v4.unwrap_or(0), v6.unwrap_or(0), known, 0]))
    }

    /// What is still to be noted in a record that was made without `fwmark_reflect`: it has not been changed then.
    pub(super) fn missing_in(&self, record: &Record) -> Option<Record> {
        let (_, fwmark_reflect) = self.packed();
        (record.fwmark_reflect == 0).then_some(Record { fwmark_reflect, ..*record })
    }

    /// Makes them so again. Those that already are are not written.
    pub(super) fn restore(&self) -> io::Result<()> {
        let [v4, v6] = self.reflect.map(|value| value.map(u32::from));
        for (setting, value) in [(ACCEPT, Some(self.accept)), (REFLECT_V4, v4), (REFLECT_V6, v6)] {
            if let Some(value) = value
                && setting.read()?.is_some_and(|now| now != value)
            {
                setting.write(value)?;
            }
        }
        Ok(())
    }
}

/// Switches on what is off, and names it.
pub(super) fn ensure() -> io::Result<Vec<&'static str>> {
    let mut added = Vec::new();
    for setting in ALL {
        if setting.read()?.is_some_and(|now| now != 1) {
            setting.write(1)?;
            added.push(setting.name);
        }
    }
    Ok(added)
}

/// The settings of one pod, open to be asked again and again from wherever.
#[derive(Debug)]
pub(super) struct Opened {
    accept: File,
    reflect: Vec<File>,
}

impl Opened {
    /// Those of the namespace that this thread is in.
    pub(super) fn open() -> io::Result<Self> {
        let open = |setting: Setting| File::open(Path::new(ROOT).join(setting.path));
        let mut reflect = vec![open(REFLECT_V4)?];
        reflect.extend(open(REFLECT_V6).ok());
        Ok(Self { accept: open(ACCEPT)?, reflect })
    }

    /// Whether they are on. With `call`, which counts up, one of those that concern refusals alone is looked at each time.
    pub(super) fn are_on(&self, call: u32) -> bool {
        let turn = self.reflect.get(call as usize % self.reflect.len());
        reads_one(&self.accept) && turn.is_none_or(reads_one)
    }
}

fn reads_one(sysctl: &File) -> bool {
    let mut value = [0; 4];
    sysctl.read_at(&mut value, 0).is_ok_and(|length| value.get(..length) == Some(b"1\n"))
}

#[cfg(test)]
mod tests {
    use ztunnel_ebpf_abi::TEXT_MAX;

    use super::*;

    fn record((fwmark_accept, fwmark_reflect): (u32, u32)) -> Record {
        Record {
            netns_inode: 0,
            cookie: 0,
            fwmark_accept,
            withdrawn: 0,
            uid_len: 0,
            netns_len: 0,
            fwmark_reflect,
            uid: [0; TEXT_MAX],
            netns: [0; TEXT_MAX],
        }
    }

    #[test]
    fn a_record_says_what_was_before() {
        for reflect in [[None, None], [Some(0), None], [Some(1), Some(0)], [Some(255), Some(7)]] {
            let former = Former { accept: 1, reflect };
            assert_eq!(Former::of(&record(former.packed())), former);
        }
    }

    #[test]
    fn what_an_older_daemon_did_not_note_is_noted_once() {
        let former = Former { accept: 1, reflect: [Some(0), Some(1)] };
        let old = record((0, 0));
        assert_eq!(Former::of(&old).reflect, [None, None], "it has changed nothing there");
        let noted = former.missing_in(&old).unwrap();
        assert_eq!(Former::of(&noted), Former { accept: 0, ..former }, "of the rest it knew better");
        assert_eq!(Former { accept: 1, reflect: [Some(1), Some(1)] }.missing_in(&noted).map(|_| ()), None);
    }
}
