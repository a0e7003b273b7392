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
//! # What no module owns
//!
//! * **Threads.** The control runtime (one thread: sources, certificates, admin, enrolment) and the data-plane threads, one
//!   runtime each. Blocking calls of the kernel run on threads of their own (`spawn_blocking`).
//! * **Who waits for whom.** Data-plane threads wait for the control runtime only within bounds: for a first
//!   certificate, for a pod that its node agent knows before the mesh does, for what a mesh on demand does not have.
//!   The control runtime waits for a data-plane thread only to hand over and to drain.
//! * **Take-over.** A new daemon asks the running one ([`app`], `handover`), gets its listeners, pins and
//!   certificates, serves, and confirms; until it confirms the old one can take everything back.
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
