//! The data plane of one node: every enrolled pod's connections, from the kernel to the wire and back.
//!
//! # Bird's eye view
//!
//! ```text
//! control plane ──xds──▶ mesh ──snapshot──▶ route ───Plan──▶┐
//! authority ──identity──▶ credentials ──────────────────────┤
//! enrol ──▶ capture ──▶ listeners ───────────────▶ proxy ───┼─▶ hbone ─▶ net ─▶ wire
//!                                   policy ──Permit────────▶┘     │
//!                                                                 └─▶ telemetry ─▶ log, metrics
//! admin ── reads every handle, is read by none
//! ```
//!
//! One captured connection asks five questions, each answered by something that needs none of the others: *who is it*
//! ([`ztunnel_tls`], [`ztunnel_mesh::store`]), *where should it go* ([`ztunnel_mesh::route`]), *may it*
//! ([`ztunnel_mesh::policy`]), *move the bytes* ([`proxy`], [`hbone`], [`net`]), *tell what happened* ([`telemetry`]).
//! To follow one, start at `proxy::outbound` (the client's node) and `proxy::inbound` (the server's).
//!
//! # Code map
//!
//! | Module | Owns | May import |
//! |---|---|---|
//! | `net` | network namespaces, socket options, source-preserving dial, byte copying | |
//! | `telemetry` | one type per fact; log line and metric from the same value | |
//! | `identity` | keys and renewal by priority; publishes credentials per identity | *proto* |
//! | `xds` | the mesh from a control plane: a discovery session, and what its messages mean | telemetry, *proto* |
//! | `enrol` | who is enrolled: a pure state machine and what feeds it | net, *proto* |
//! | `capture` | how a pod's traffic reaches us: programs, pins, rules, routes, listeners | net |
//! | `hbone` | CONNECT tunnels over HTTP/2: encode, accept, dial, reuse | net |
//! | `dns` | names: answers for the mesh's from the snapshot, forwards the rest | net, telemetry |
//! | `proxy` | one connection from accept to last byte | identity, hbone, net, telemetry |
//! | `admin` | HTTP: metrics, readiness, dumps, the log's levels, profiles | telemetry, identity, proxy, *proto* |
//! | `fuzzing` | what fuzz targets call that is private; only with the feature of that name | enrol, xds, *proto* |
//!
//! `cargo xtask tidy` compares the imports with this table: what it does not allow, and what it allows for nobody.
//! *proto* is the crate of wire formats: they are translated where they come in, and made where they go out (profiles),
//! and go no further.
//!
//! # Invariants
//!
//! * Bytes reach an application, tunnelled or plain, only with a `Permit` in hand.
//! * A captured connection is never sent in the clear to a peer whose plan said HBONE, whatever fails. To a pod whose
//!   traffic is redirected to the same daemon it is not sent at all, but handed over (`proxy::same_node`).
//! * What the kernel holds stays when the daemon dies, and is closed while nobody serves it.
//! * Nothing the data-plane threads run waits for the control runtime, except bounded waits for a first
//!   certificate, for a pod that its node agent knows before the mesh does, and, if the mesh is on demand, for what it
//!   does not have.
//! * Nothing but the schema of dumps ([`ztunnel_mesh::dump`]) is serialised: what tools read does not freeze the model.
//! * A panic does not poison a lock: each change under one is one step, so what is there is whole.

pub mod admin;
pub mod capture;
pub mod dns;
pub mod enrol;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod hbone;
pub mod identity;
pub mod net;
pub mod proxy;
pub mod telemetry;
pub mod xds;
