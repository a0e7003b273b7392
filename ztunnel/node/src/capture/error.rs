//! What can fail, by operation.

use std::io;
use std::path::PathBuf;

use ztunnel_mesh::model::addr::PodUid;

/// Why a node cannot capture at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Built with `ZTUNNEL_EBPF_SKIP=1`.
    #[error("this build has no eBPF programs: build it again without ZTUNNEL_EBPF_SKIP")]
    NoPrograms,
    /// The pin directory cannot be used.
    #[error("cannot keep pins in {}: it must be on a bpf file system, or be a place to mount one", path.display())]
    Pins {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel does not take the programs.
    #[error(
        "the kernel refused the programs (Linux 6.6 with BTF, and CAP_BPF and CAP_NET_ADMIN, are needed)"
    )]
    Load(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A program cannot be attached to the cgroup.
    #[error("cannot attach {program} to the cgroup {}: it must be the root of cgroup v2", cgroup.display())]
    Attach {
        /// Which.
        program: &'static str,
        /// Where.
        cgroup: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host's network namespace cannot be used.
    #[error("cannot use the host's network namespace {}", path.display())]
    HostNetns {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A pinned map cannot be used.
    #[error("cannot use the map {map}; `ztunnel uninstall` removes all pins")]
    Map {
        /// Which.
        map: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Why a pod is not captured (or not wholly: it is then closed, not open).
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// Its namespace cannot be entered.
    #[error("cannot enter the network namespace {} (is the pod gone?)", path.display())]
    Netns {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The UID or the path does not fit into a record.
    #[error("the uid and the netns path of a pod must not be longer than 256 bytes")]
    TooLong,
    /// All slots are taken.
    #[error("the node captures 1024 pods already")]
    Full,
    /// A listener cannot be bound.
    #[error("cannot listen in the pod (no free port from 65100 to 65535?)")]
    Listen(#[source] io::Error),
    /// A step in the kernel failed.
    #[error("cannot set up {step} in the pod")]
    Step {
        /// Which.
        step: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The pod has more devices than are guarded.
    #[error("the pod has {found} devices and at most {most} are guarded: it is closed until it has fewer")]
    TooManyDevices {
        /// How many it has.
        found: usize,
        /// How many it may have.
        most: usize,
    },
    /// Too many devices were taken out of the pod into other namespaces, where their guards are kept.
    #[error(
        "{elsewhere} devices of the pod were taken into other network namespaces, and {refused} more are not guarded: \
         it is closed until some of these {elsewhere} are deleted"
    )]
    TooManyElsewhere {
        /// How many are elsewhere.
        elsewhere: usize,
        /// How many have no guard for that.
        refused: usize,
    },
    /// Devices that are still to be guarded: call again.
    #[error("{0} devices of the pod are still to be guarded")]
    Unguarded(usize),
    /// `capture` without `bind`.
    #[error("pod {0} was not bound before")]
    NotBound(PodUid),
    /// A newer daemon has taken over.
    #[error("a newer daemon has taken over this node")]
    Superseded,
}

impl EnrolError {
    pub(super) fn step<E>(step: &'static str) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        move |source| Self::Step { step, source: source.into() }
    }
}

/// Why something of a pod is left behind.
#[derive(Debug, thiserror::Error)]
pub enum WithdrawError {
    /// No such pod.
    #[error("pod {0} is not captured")]
    Unknown(PodUid),
    /// A step in the kernel failed.
    #[error("cannot remove {step} of the pod")]
    Step {
        /// Which.
        step: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A newer daemon has taken over.
    #[error("a newer daemon has taken over this node")]
    Superseded,
}

impl WithdrawError {
    pub(super) fn step<E>(step: &'static str) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        move |source| Self::Step { step, source: source.into() }
    }
}
