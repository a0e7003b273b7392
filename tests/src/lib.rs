//! Nodes and pods made of network namespaces, and the scenarios run on them.
//!
//! The daemon under test is the real binary, one process per node; the programs in the pods are nginx, curl
//! and a small peer of our own for what they cannot do. Nothing here looks inside the daemon: a scenario knows
//! what a cluster could see – sockets, packets on the link, log lines, metrics, the kernel's tables.
//!
//! From the bottom up:
//!
//! * [`enclosure`]: what keeps a run and everybody else on the machine apart;
//! * [`netns`], [`cgroup`], [`place`], [`process`]: where a program runs, and running it there;
//! * [`topology`]: two nodes, their pods, and the link between them; [`run`] remembers what to remove;
//! * [`mesh`]: the Kubernetes and Istio objects that the embedded control plane reads;
//! * [`certificates`]: good and bad ones of the embedded authority;
//! * [`ca`], [`control_plane`], [`istiod`]: a certificate authority and a control plane that speak istiod's protocols;
//! * [`daemon`], [`testbed`]: the cast of the demo – both daemons, the pods and the programs in them;
//! * [`image`]: a daemon in a container of its image;
//! * [`agent`], [`redirect`]: a node agent, and the rules by which it redirects traffic;
//! * [`resolver`]: a DNS server and its clients;
//! * [`wire`], [`pcap`]: what was really sent between the nodes;
//! * [`memory`]: a limit on what a daemon may use;
//! * [`syscalls`]: what a daemon asked of the kernel for it;
//! * [`leftovers`]: what the machine looked like before, and what differs after;
//! * [`scenarios`]: each function is one claim and its evidence. `bin/demo.rs` prints them as a report, `tests/*.rs` runs
//!   the same functions as tests.
//!
//! `cargo xtask demo` and `cargo xtask bench` build `bin/demo.rs` and `bin/bench` and go on as them.

pub mod agent;
pub mod binaries;
pub mod ca;
pub mod certificates;
pub mod cgroup;
pub mod combinations;
pub mod control_plane;
pub mod daemon;
pub mod enclosure;
pub mod image;
pub mod istiod;
pub mod leftovers;
pub mod memory;
pub mod mesh;
pub mod netns;
pub mod pcap;
pub mod peer;
pub mod place;
pub mod poll;
pub mod process;
pub mod raw_netns;
pub mod redirect;
pub mod resolver;
pub mod run;
pub mod scenarios;
pub mod syscalls;
pub mod testbed;
pub mod topology;
pub mod wire;
