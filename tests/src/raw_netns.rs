//! Namespaces, devices and processes made by hand, for tests that use capture as a library.
//!
//! A [`Net`] is a node with a bridge and pods on it. Names carry the process id and a number, and everything
//! is removed on drop, also after a panic.

#![expect(unsafe_code, reason = "setns for a thread of its own")]

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::enclosure;
use crate::run::DIRECTORY;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Runs a command that has to succeed; returns what it printed.
pub fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().expect("sh starts");
    assert!(
        output.status.success(),
        "{command}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A named network namespace.
#[derive(Debug, Clone)]
pub struct Ns(pub String);

impl Ns {
    /// A path that opens it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(crate::netns::DIRECTORY).join(&self.0)
    }

    /// Runs `ip <arguments>` inside.
    pub fn ip(&self, arguments: &str) -> String {
        run(&format!("ip -n {} {arguments}", self.0))
    }

    /// Runs a shell command inside.
    pub fn sh(&self, command: &str) -> String {
        let output = self.command(command).output().expect("sh starts");
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    }

    /// A shell command inside, not started yet.
    pub fn command(&self, command: &str) -> Command {
        // Not `ip netns exec`, which hides the cgroups behind mounts of its own.
        let mut shell = Command::new("nsenter");
        shell.arg(format!("--net={}", self.path().display())).args(["sh", "-c", command]);
        shell
    }

    /// Runs code on a new thread inside.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.path()).expect("the namespace exists");
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    // SAFETY: a descriptor of a namespace; only this thread moves.
                    assert_eq!(unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) }, 0, "setns");
                    inside()
                })
                .join()
        })
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// A pod: a namespace with `eth0` on the node's bridge.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Where it is.
    pub ns: Ns,
    /// Its IPv4 address.
    pub v4: IpAddr,
    /// Its IPv6 address.
    pub v6: IpAddr,
    /// The node's end of its device.
    pub veth: String,
}

/// A node and its pods.
#[derive(Debug)]
pub struct Net {
    /// The node's own namespace.
    pub node: Ns,
    id: String,
    pods: Vec<Ns>,
    children: Vec<Child>,
    /// Directory for pins, removed at the end.
    pub pins: PathBuf,
    cgroups: Vec<PathBuf>,
}

impl Net {
    /// A node with a bridge, 10.99.0.1 and fd99::1.
    pub fn new() -> Self {
        assert!(enclosure::is_inside(), "as root, and with `ztunnel_tests::enclosed!();`");
        let id = format!("zc{}n{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let node = Ns(format!("{id}-node"));
        run(&format!("ip netns add {}", node.0));
        let net = Self {
            pins: PathBuf::from(format!("{DIRECTORY}/{id}-pins")),
            node,
            id,
            pods: Vec::new(),
            children: Vec::new(),
            cgroups: Vec::new(),
        };
        // Link-local addresses are usable at once, as they are on a node that has been up for a while.
        net.node.sh("sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0");
        for setup in [
            "link set lo up",
            "link add br0 type bridge",
            "addr add 10.99.0.1/24 dev br0",
            "addr add fd99::1/64 dev br0 nodad",
            "link set br0 up",
        ] {
            net.node.ip(setup);
        }
        net.node.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        net
    }

    /// Adds a pod with 10.99.0.`n` and fd99::`n`.
    pub fn pod(&mut self, n: u8) -> Pod {
        let ns = Ns(format!("{}-p{n}", self.id));
        run(&format!("ip netns add {}", ns.0));
        self.pods.push(ns.clone());
        ns.sh("sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0");
        let veth = format!("v{n}");
        self.node.ip(&format!("link add {veth} type veth peer name eth0 netns {}", ns.0));
        self.node.ip(&format!("link set {veth} master br0 up"));
        for setup in [
            "link set lo up".to_owned(),
            format!("addr add 10.99.0.{n}/24 dev eth0"),
            format!("addr add fd99::{n}/64 dev eth0 nodad"),
            "link set eth0 up".to_owned(),
            "route add default via 10.99.0.1".to_owned(),
            "-6 route add default via fd99::1".to_owned(),
        ] {
            ns.ip(&setup);
        }
        let address = |text: String| text.parse().expect("an address");
        Pod { ns, v4: address(format!("10.99.0.{n}")), v6: address(format!("fd99::{n}")), veth }
    }

    /// Makes a cgroup below the root of cgroup v2.
    pub fn cgroup(&mut self, root: &std::path::Path, name: &str) -> PathBuf {
        let dir = root.join(format!("{}-{name}", self.id));
        std::fs::create_dir(&dir).expect("cgroup v2 is writable");
        self.cgroups.push(dir.clone());
        dir
    }

    /// Starts a process that is killed at the end.
    pub fn start(&mut self, mut command: Command) {
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
        self.children.push(child);
    }
}

impl Default for Net {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _gone = child.kill();
            let _reaped = child.wait();
        }
        for ns in self.pods.iter().chain([&self.node]) {
            let _removed = Command::new("ip").args(["netns", "del", &ns.0]).output();
        }
        for cgroup in self.cgroups.iter().rev() {
            let _removed = std::fs::remove_dir(cgroup);
        }
        if self.pins.exists() {
            let _unmounted = Command::new("umount").arg(&self.pins).output();
            let _removed = std::fs::remove_dir_all(&self.pins);
        }
    }
}
