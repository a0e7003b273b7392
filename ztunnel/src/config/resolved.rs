//! From what was typed to what each module is given.

use std::net::SocketAddr;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::capture;
use crate::config::raw;
use crate::net::redirected::ClientAddress;
use crate::net::redirected::Settings;
use crate::net::socket::Keepalive;
use crate::proxy;
use crate::telemetry::line::Format;
use crate::telemetry::logging::Filter;
use crate::telemetry::logging::InvalidFilter;

/// Why what was typed cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    /// No cgroup v2 hierarchy is mounted.
    #[error(
        "no cgroup v2 hierarchy is mounted: mount one (`mount -t cgroup2 none /sys/fs/cgroup`) or name it with --cgroup-root"
    )]
    NoCgroup2,
    /// A path that was named is not there.
    #[error("{flag} {path:?}: {source}")]
    Path {
        /// The flag that named it.
        flag: &'static str,
        /// What it named.
        path: PathBuf,
        /// Why it cannot be used.
        source: std::io::Error,
    },
    /// A node's name is part of file names.
    #[error("{0:?} is not a node name: use letters, digits, '.', '-' and '_' (--node)")]
    NodeName(String),
    /// RUST_LOG.
    #[error("RUST_LOG cannot be used")]
    Log(#[from] InvalidFilter),
    /// No threads, no traffic.
    #[error("--threads 0: the data plane needs at least one thread")]
    NoThreads,
}

/// The node's name, as typed or as the host is called.
pub fn node_name(typed: Option<&str>) -> Result<Arc<str>, Invalid> {
    let host = || nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let name = typed.map(str::to_owned).or_else(host).unwrap_or_default();
    let valid = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    if name.is_empty() || name.len() > 253 || name.starts_with('.') || !name.chars().all(valid) {
        return Err(Invalid::NodeName(name));
    }
    Ok(Arc::from(name))
}

/// Where things of one node are.
#[derive(Debug, Clone)]
pub struct Places {
    /// The node's name.
    pub node: Arc<str>,
    /// Where its daemons meet.
    pub run_dir: PathBuf,
    /// What capture is given.
    pub capture: capture::Config,
}

/// Completes `kernel` by what this machine has.
pub fn places(kernel: &raw::Kernel) -> Result<Places, Invalid> {
    places_with(kernel, None)
}

/// [`places`], with a cgroup to name where no hierarchy is mounted.
fn places_with(kernel: &raw::Kernel, instead: Option<&Path>) -> Result<Places, Invalid> {
    let node = node_name(kernel.node.as_deref())?;
    let named = |flag: &'static str, path: &Option<PathBuf>| match path {
        Some(path) => match std::fs::metadata(path) {
            Ok(_) => Ok(Some(path.clone())),
            Err(source) => Err(Invalid::Path { flag, path: path.clone(), source }),
        },
        None => Ok(None),
    };
    let cgroup_root = match named("--cgroup-root", &kernel.cgroup_root)? {
        Some(path) => path,
        None => cgroup2_mount(&std::fs::read_to_string("/proc/self/mounts").unwrap_or_default())
            .or_else(|| instead.map(Path::to_owned))
            .ok_or(Invalid::NoCgroup2)?,
    };
    let kubepods = match named("--kubepods-cgroup", &kernel.kubepods_cgroup)? {
        Some(path) => Some(path),
        // The two names kubelet uses, by its cgroup driver.
        None => ["kubepods.slice", "kubepods"]
            .into_iter()
            .map(|name| cgroup_root.join(name))
            .find(|path| path.is_dir()),
    };
    named("--host-netns", &Some(kernel.host_netns.clone()))?;
    Ok(Places {
        run_dir: kernel.run_dir.clone().unwrap_or_else(|| Path::new("/run/ztunnel").join(&*node)),
        capture: capture::Config {
            pin_dir: kernel
                .pin_dir
                .clone()
                // The bpf file system has no dots in its names.
                .unwrap_or_else(|| Path::new("/sys/fs/bpf/ztunnel").join(node.replace('.', "_"))),
            cgroup_root,
            kubepods,
            host_netns: kernel.host_netns.clone(),
        },
        node,
    })
}

/// Enrolment by a node agent.
#[derive(Debug, Clone)]
pub struct Zds {
    /// Where it listens.
    pub socket: PathBuf,
    /// How to listen in the pods.
    pub listeners: capture::rules::Config,
}

fn zds(typed: &raw::Zds) -> Option<Zds> {
    let settings = Settings {
        mark: typed.packet_mark,
        client_address: match typed.orig_src {
            None => ClientAddress::Preferred,
            Some(true) => ClientAddress::Required,
            Some(false) => ClientAddress::Hidden,
        },
        keepalive: typed.keepalive.then_some(Keepalive {
            time: typed.keepalive_time,
            interval: typed.keepalive_interval,
            retries: typed.keepalive_retries,
        }),
        user_timeout: typed.user_timeout,
    };
    let listeners = capture::rules::Config { share_ports: typed.port_reuse, ipv6: typed.ipv6, settings };
    Some(Zds { socket: typed.zds.clone()?, listeners })
}

/// Everything `ztunnel run` needs.
#[derive(Debug, Clone)]
pub struct Run {
    /// Where things of this node are.
    pub places: Places,
    /// The mesh file or directory.
    pub mesh: PathBuf,
    /// Where the embedded authority keeps its root.
    pub state_dir: PathBuf,
    /// How long open connections may go on once the daemon is to end.
    pub drain_deadline: Duration,
    /// Where metrics are served.
    pub metrics_addr: SocketAddr,
    /// Where readiness is served.
    pub ready_addr: SocketAddr,
    /// Enrolment by a node agent; `None` where the mesh says which pods are captured.
    pub zds: Option<Zds>,
    /// What the data plane is given.
    pub proxy: proxy::Config,
    /// How log lines look.
    pub log_format: Format,
    /// Which there are.
    pub log_filter: Filter,
}

/// Completes `typed` by what this machine has.
pub fn run(typed: &raw::Run) -> Result<Run, Invalid> {
    let zds = zds(&typed.zds);
    let places = match zds {
        // Capture is not used, so what it would need may be missing.
        Some(_) => places_with(&typed.kernel, Some(Path::new("/")))?,
        None => places(&typed.kernel)?,
    };
    let mut proxy = proxy::Config { near: !typed.encrypt_same_node, ..proxy::Config::default() };
    proxy.threads = typed.threads.unwrap_or(proxy.threads);
    proxy.hbone.congestion = Some(typed.tunnel_congestion.clone()).filter(|name| name != "system");
    if proxy.threads == 0 {
        return Err(Invalid::NoThreads);
    }
    Ok(Run {
        places,
        mesh: typed.mesh.clone(),
        state_dir: typed.state_dir.clone(),
        drain_deadline: typed.drain_deadline,
        metrics_addr: typed.metrics_addr,
        ready_addr: typed.ready_addr,
        zds,
        proxy,
        log_format: match typed.log_format {
            raw::LogFormat::Plain => Format::Plain,
            raw::LogFormat::Json => Format::Json,
        },
        log_filter: match std::env::var("RUST_LOG") {
            Ok(text) if !text.is_empty() => text.parse()?,
            _ => Filter::default(),
        },
    })
}

/// The first cgroup v2 mount point in the text of `/proc/self/mounts` (proc(5)).
fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_device, dir, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(dir))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hybrid_hierarchy_is_found() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_mount(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup2_mount("tmpfs /tmp tmpfs rw 0 0\n"), None);
    }

    #[test]
    fn a_node_name_is_part_of_paths() {
        assert!(node_name(Some("node-1.example")).is_ok());
        for name in ["", "..", "a/b", "a b", ".hidden"] {
            assert!(node_name(Some(name)).is_err(), "{name:?} was accepted");
        }
    }
}
