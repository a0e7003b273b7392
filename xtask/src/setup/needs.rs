//! What building, testing and the demo need, and how each is recognised.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use xtask::places;

/// Where Debian's LLVM of that version lives.
pub(crate) const LLVM: &str = "/usr/lib/llvm-22";

/// Something that must be on the machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    /// Its name.
    pub(crate) what: &'static str,
    /// What it is for.
    pub(crate) why: &'static str,
    /// How it gets here.
    pub(crate) remedy: Remedy,
    present: fn() -> bool,
}

/// How a need is met.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Remedy {
    /// Debian packages.
    Packages(&'static [&'static str]),
    /// A component of the installed Rust toolchain.
    Component(&'static str),
    /// Built from crates.io.
    BpfLinker,
    /// From PyPI, into `target/tools`.
    Envoy,
    /// Nothing that could be installed: what to do instead.
    Nothing(&'static str),
}

const NEEDS: &[Need] = &[
    Need {
        what: "a C compiler",
        why: "the TLS library has assembly and C in it",
        remedy: Remedy::Packages(&["gcc", "libc6-dev"]),
        present: || program("cc"),
    },
    Need {
        what: "cmake",
        why: "builds the C part of the TLS library where there is no ready-made build",
        remedy: Remedy::Packages(&["cmake", "make"]),
        present: || program("cmake"),
    },
    Need {
        what: "rustfmt",
        why: "cargo xtask ci checks the format",
        remedy: Remedy::Component("rustfmt"),
        present: || program("cargo-fmt"),
    },
    Need {
        what: "clippy",
        why: "cargo xtask ci runs the lints",
        remedy: Remedy::Component("clippy"),
        present: || program("cargo-clippy"),
    },
    Need {
        what: "a Rust compiler for eBPF",
        why: "the kernel side is built with build-std: Debian's rustc-web and its sources, or a rustup nightly with rust-src",
        remedy: Remedy::Packages(&["rustc-web", "rust-web-src"]),
        present: || ztunnel_ebpf_build::compiler().is_ok(),
    },
    Need {
        what: "LLVM 22",
        why: "bpf-linker is built against it",
        remedy: Remedy::Packages(&["llvm-22-dev", "libpolly-22-dev"]),
        present: || program("bpf-linker") || Path::new(LLVM).join("bin/llvm-config").exists(),
    },
    Need {
        what: "bpf-linker",
        why: "links the eBPF programs",
        remedy: Remedy::BpfLinker,
        present: || program("bpf-linker"),
    },
    Need {
        what: "ip and tc",
        why: "make the namespaces, links and routes of the demo's nodes and pods",
        remedy: Remedy::Packages(&["iproute2"]),
        present: || program("ip") && program("tc"),
    },
    Need {
        what: "nginx",
        why: "the unmodified server in the demo's pods",
        remedy: Remedy::Packages(&["nginx-light"]),
        present: || program("nginx"),
    },
    Need {
        what: "curl",
        why: "the unmodified client in the demo's pods",
        remedy: Remedy::Packages(&["curl"]),
        present: || program("curl"),
    },
    Need {
        what: "tcpdump",
        why: "shows what really goes over the link between the nodes",
        remedy: Remedy::Packages(&["tcpdump"]),
        present: || program("tcpdump"),
    },
    Need {
        what: "strace",
        why: "counts what a daemon asks of the kernel for a request and for a megabyte",
        remedy: Remedy::Packages(&["strace"]),
        present: || program("strace"),
    },
    Need {
        what: "wrk",
        why: "the benchmark's requests and new connections",
        remedy: Remedy::Packages(&["wrk"]),
        present: || program("wrk"),
    },
    Need {
        what: "iperf3",
        why: "the benchmark's streams",
        remedy: Remedy::Packages(&["iperf3"]),
        present: || program("iperf3"),
    },
    Need {
        what: "openssl",
        why: "makes the certificates of the benchmark's Envoys",
        remedy: Remedy::Packages(&["openssl"]),
        present: || program("openssl"),
    },
    Need {
        what: "iptables, both kinds",
        why: "the rules by which a node agent redirects pods' traffic",
        remedy: Remedy::Packages(&["iptables"]),
        present: || program("iptables-nft-restore") && program("iptables-legacy-restore"),
    },
    Need {
        what: "nft",
        why: "the same rules, of nftables",
        remedy: Remedy::Packages(&["nftables"]),
        present: || program("nft"),
    },
    Need {
        what: "ipset",
        why: "the pods that a node agent lets be probed",
        remedy: Remedy::Packages(&["ipset"]),
        present: || program("ipset"),
    },
    Need {
        what: "python3 with venv",
        why: "fetches Envoy from PyPI",
        remedy: Remedy::Packages(&["python3-venv"]),
        present: || envoy() || Path::new("/usr/lib/python3/dist-packages").exists() && python_venv(),
    },
    Need {
        what: "Envoy",
        why: "an independent implementation of the tunnel for the interoperability tests",
        remedy: Remedy::Envoy,
        present: envoy,
    },
    Need {
        what: "cgroup v2",
        why: "pods are told apart by their control group",
        remedy: Remedy::Nothing("mount it: mount -t cgroup2 none /sys/fs/cgroup"),
        present: || std::fs::read_to_string("/proc/mounts").is_ok_and(|mounts| has_cgroup2(&mounts)),
    },
    Need {
        what: "Linux 6.6 or newer",
        why: "the hooks the capture needs, tcx the newest of them",
        remedy: Remedy::Nothing("boot a newer kernel"),
        present: || kernel().is_none_or(|version| version >= (6, 6)),
    },
];

/// What this machine lacks.
pub(crate) fn missing() -> Vec<Need> {
    NEEDS.iter().filter(|need| !(need.present)()).copied().collect()
}

fn program(name: &str) -> bool {
    find_program(name).is_some()
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|folder| folder.join(name)).find(|file| file.is_file())
}

fn envoy() -> bool {
    places::envoy().is_ok()
}

/// Where and how often does not matter here; the harness takes the first.
fn has_cgroup2(mounts: &str) -> bool {
    mounts.lines().any(|line| line.split(' ').nth(2) == Some("cgroup2"))
}

fn python_venv() -> bool {
    let output =
        Command::new("python3").args(["-c", "import venv, ensurepip"]).stderr(Stdio::null()).status();
    output.is_ok_and(|status| status.success())
}

fn kernel() -> Option<(u32, u32)> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    parse_kernel(&release)
}

fn parse_kernel(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_read() {
        assert_eq!(parse_kernel("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(parse_kernel("5.4.0-150-generic\n"), Some((5, 4)));
        assert_eq!(parse_kernel("odd"), None);
        assert!(parse_kernel("5.15.1") >= Some((5, 15)));
    }

    #[test]
    fn control_groups_are_told_by_the_kind_of_mount() {
        assert!(has_cgroup2("tmpfs /run tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"));
        assert!(!has_cgroup2("cgroup2 /sys/fs/cgroup tmpfs rw 0 0\ncgroup /a/cgroup2 cgroup rw,cpu 0 0\n"));
    }

    #[test]
    fn programs_are_found_by_the_path_and_in_the_system_folders() {
        assert!(program("sh"));
        assert!(!program("no-such-program-anywhere"));
    }
}
