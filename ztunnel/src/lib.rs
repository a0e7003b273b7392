//! The node proxy of an ambient mesh: one daemon per node gives every enrolled pod mutual TLS, layer-4
//! authorization and telemetry, without a sidecar.
//!
//! # The crates
//!
//! | Crate | Directory | Holds | May depend on |
//! |---|---|---|---|
//! | `ztunnel_mesh` | `ztunnel/mesh` | the model, snapshots, routes, policies: pure, no I/O | |
//! | `ztunnel_runtime` | `ztunnel/runtime` | how a process ends, files it reads | |
//! | `ztunnel_tls` | `ztunnel/tls` | mutual TLS, roots, revocation, the only maker of a `VerifiedPeer` | mesh, runtime |
//! | `ztunnel_objects` | `ztunnel/objects` | Kubernetes and Istio objects, read and translated to the mesh | mesh, runtime |
//! | `ztunnel_control` | `ztunnel/control` | the control plane: certificate authority, mesh files as a source | mesh, runtime, tls, objects |
//! | `ztunnel_node` | `ztunnel/node` | the data plane of a node | mesh, runtime, tls |
//! | `ztunnel` | `ztunnel` | the program: command line, configuration, composition | all |
//!
//! The control plane and the data plane do not know each other: what they share is the mesh, and TLS. What a log line
//! names, `ztunnel_node::xds::client`, is the file that wrote it: `ztunnel/node/src/xds/client.rs`.
//!
//! # How one connection crosses them
//!
//! A pod dials. Its socket is redirected to a listener of the daemon inside the pod (`ztunnel_node::capture`), whose
//! accept loop runs on the data-plane thread that the pod belongs to (`ztunnel_node::proxy`). The proxy takes one
//! snapshot of the mesh (`ztunnel_mesh::store`), asks it for a plan (`ztunnel_mesh::route`), dials or reuses a tunnel
//! with the pod's certificate (`ztunnel_node::hbone`, `ztunnel_node::identity`, `ztunnel_tls`), and copies bytes until
//! both sides have ended (`ztunnel_node::net`). On the server's node the tunnel's peer is verified (`ztunnel_tls`), the
//! policies decide (`ztunnel_mesh::policy`), the application is dialled with the client's address, and both nodes write
//! a line and count (`ztunnel_node::telemetry`).
//!
//! ```text
//!  node A                                                         node B
//! ┌──────────────────────────────────────────┐                   ┌──────────────────────────────────────────┐
//! │ pod: curl ──connect──▶ [cgroup/connect]  │                   │  [sk_lookup] ──▶ HBONE listener          │
//! │                         mark the socket  │                   │       ▲                │ mutual TLS      │
//! │        lo ◀── route by mark ─┘           │                   │       │                │ who is it?      │
//! │        │                                 │                   │       │                │ policy: may it? │
//! │   [sk_lookup] ──▶ outbound listener      │                   │       │                ▼                 │
//! │                      │ where to?         │  TLS 1.3, :15008  │       │      dial the pod's nginx from   │
//! │                      │ as whom?          │  HTTP/2 CONNECT   │       │      the client's own address    │
//! │                      ▼                   │                   │       │                │                 │
//! │  [guard] ◀── tunnel, from the pod's own ─┼──────────────────▶┼───────┘                ▼                 │
//! │              address                     │                   │               nginx sees curl's address  │
//! └──────────────────────────────────────────┘                   └──────────────────────────────────────────┘
//! ```
//!
//! With eBPF capture `getsockname()` on an accepted connection *is* the original destination, so nothing is looked up or
//! translated back, and nothing is rewritten: per packet there is one look at whose its socket is (118 ns by the count of
//! a loaded machine). The guard on the pod's devices lets a SYN pass only from a socket of the daemon's own: what slips
//! past the connect hook, by whatever way, is refused instead of leaving in clear. Between two pods of one node there is
//! no wire: the daemon hands the bytes over itself, under the same identities, policies and reports.
//!
//! # What no module owns
//!
//! * **Threads.** The control runtime (one thread: sources, certificates, admin, enrolment) and the data-plane threads, one
//!   runtime each. Blocking calls of the kernel run on threads of their own (`spawn_blocking`).
//! * **Who waits for whom.** Data-plane threads wait for the control runtime only within bounds: for a first
//!   certificate, for a pod that its node agent knows before the mesh does, for what a mesh on demand does not have.
//!   The control runtime waits for a data-plane thread only to hand over and to drain.
//! * **Take-over.** [`app::lifecycle`] decides it. A new daemon asks the running one (`app::handover`), gets its listeners, pins and
//!   certificates, serves, and confirms. With eBPF capture it binds listeners of its own in each pod and swaps them into
//!   the pinned socket map one by one: a connection attempt finds the old listener or the new one, never none. If the new
//!   daemon dies before it is ready, or later while the old one still drains, the old one takes everything back.
//! * **Loss of a source.** Losing the source of the mesh or of certificates stops change, not traffic (until certificates
//!   expire), also when the daemon is replaced meanwhile.
//!
//! # Code map of this crate
//!
//! | Module | Owns | May import |
//! |---|---|---|
//! | `cli` | the command line's view of a running daemon: asks `admin`, prints tables or JSON | |
//! | `config` | what was typed → each module's own `Config`, checked once | |
//! | `app` | composition root: builds, joins, hands over, drains | config |
//!
//! `main.rs` chooses the subcommand; [`app::run()`] builds every component once and joins them.

pub mod app;
pub mod cli;
pub mod config;
