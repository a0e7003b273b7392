//! Which process listens on a port of this machine, to name one that does not answer.

use std::fmt;
use std::fs;
use std::net::SocketAddr;

/// A process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listener {
    pid: u32,
    name: String,
    /// As proc(5) names it: `T` is stopped.
    state: char,
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.name)?;
        match self.state {
            'T' | 't' => write!(f, ", which is stopped: `kill -CONT {}` lets it go on", self.pid),
            'D' => f.write_str(", which waits for the kernel"),
            'Z' => f.write_str(", which has ended"),
            _ => Ok(()),
        }
    }
}

/// Who listens there, as far as this user may see it.
pub(super) fn listener(address: SocketAddr) -> Option<Listener> {
    let table = if address.is_ipv4() { "/proc/net/tcp" } else { "/proc/net/tcp6" };
    let inode = inode(&fs::read_to_string(table).ok()?, address.port())?;
    let wanted = format!("socket:[{inode}]");
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let holds = |pid: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        descriptors
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .any(|link| link.as_os_str() == &*wanted)
    };
    let pid = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(holds)?;
    named(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The socket that listens on `port`, by the text of `/proc/net/tcp`.
fn inode(table: &str, port: u16) -> Option<u64> {
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (_, local) = fields.get(1)?.rsplit_once(':')?;
        let listens = *fields.get(3)? == "0A" && u16::from_str_radix(local, 16).ok()? == port;
        listens.then(|| fields.get(9)?.parse().ok())?
    })
}

/// By the text of `/proc/<pid>/stat`.
fn named(pid: u32, stat: &str) -> Option<Listener> {
    // The name may have brackets and blanks in it.
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    Some(Listener { pid, name: name.to_owned(), state: rest.trim_start().chars().next()? })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn who_listens_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let found = super::listener(listener.local_addr().unwrap()).unwrap();
        assert_eq!(found.pid, std::process::id());
    }

    #[test]
    fn one_that_is_stopped_is_said_to_be() {
        let found = named(7, "7 (a (b) c) T 1 7").unwrap();
        assert_eq!(found.to_string(), "process 7 (a (b) c), which is stopped: `kill -CONT 7` lets it go on");
        assert_eq!(named(7, "7 (x) S 1").unwrap().to_string(), "process 7 (x)");
        assert_eq!(named(7, "nonsense"), None);
    }
}
