//! The node proxy of an ambient mesh: one daemon per node gives every enrolled pod mutual TLS, layer-4
//! authorization and telemetry, without a sidecar.
//!
//! # Bird's eye view
//!
//! ```text
//! istiod ─────xds──────▶ mesh
//! mesh file ─standalone─▶ mesh ──snapshot──▶ route ───Plan──▶┐
//! authority ──identity──▶ credentials ───────────────────────┤
//! enrol ──▶ app ──capture──▶ listeners ─────────▶ proxy ─────┼─▶ hbone ─▶ net ─▶ wire
//!                                    policy ──Permit────────▶┘     │
//!                                                                  └─▶ telemetry ─▶ log, metrics
//! admin ── reads every handle, is read by none
//! ```
//!
//! One captured connection asks five questions, each answered by a module that needs none of the others: *who is
//! it* ([`tls`], [`mesh`]), *where should it go* ([`route`]), *may it* ([`policy`]), *move the bytes* ([`proxy`],
//! [`hbone`], [`net`]), *tell what happened* ([`telemetry`]).
//!
//! # Entry points
//!
//! `main.rs` chooses the subcommand; [`app::run()`] builds every component once and joins them. To follow one
//! connection, start at `proxy::outbound` (the client's node) and `proxy::inbound` (the server's).
//!
//! # Code map
//!
//! | Module | Owns | May import |
//! |---|---|---|
//! | `model` | the vocabulary: plain immutable data | |
//! | `shutdown` | the drain signal, and the place tasks are spawned | |
//! | `mesh` | single writer of the mesh, snapshots for readers, questions for what it does not have | model |
//! | `policy` | pure: policies + verified facts → `Permit` or `Denial` | model |
//! | `route` | pure: snapshot + source + original destination → `Plan` | model, mesh |
//! | `tls` | rustls configurations, roots and revocation, SPIFFE verification; the only maker of `VerifiedPeer` | model |
//! | `net` | network namespaces, socket options, source-preserving dial, byte copying | model, shutdown |
//! | `telemetry` | one type per fact; log line and metric from the same value | model |
//! | `identity` | keys and renewal by priority; publishes credentials per identity | model, tls, shutdown, *proto* |
//! | `xds` | the mesh from a control plane: a discovery session, and what its messages mean | model, mesh, tls, telemetry, shutdown, *proto* |
//! | `enrol` | who is enrolled: a pure state machine and what feeds it | model, net, *proto* |
//! | `capture` | how a pod's traffic reaches us: programs, pins, rules, routes, listeners | model, net |
//! | `hbone` | CONNECT tunnels over HTTP/2: encode, accept, dial, reuse | model, net, tls, shutdown |
//! | `dns` | names: answers for the mesh's from the snapshot, forwards the rest | model, mesh, net, telemetry, shutdown |
//! | `proxy` | one connection from accept to last byte | model, mesh, route, policy, identity, tls, hbone, net, telemetry, shutdown |
//! | `standalone` | the embedded control plane: a mesh file and a certificate authority | model, mesh, identity, tls, enrol, shutdown |
//! | `api` | serialisable views for humans and tools; nothing else derives `Serialize` | |
//! | `cli` | the command line's view of a running daemon: asks `admin`, prints tables or JSON | |
//! | `admin` | HTTP: metrics, readiness, dumps, the log's levels, profiles | model, mesh, telemetry, identity, enrol, proxy, api, shutdown |
//! | `config` | what was typed → each module's own `Config`, checked once | model, net, tls, identity, xds, capture, dns, proxy, standalone, telemetry, api |
//! | `app` | composition root: builds, joins, hands over, drains | model, mesh, tls, net, telemetry, identity, xds, enrol, capture, dns, proxy, standalone, api, admin, config, shutdown |
//! | `fuzzing` | what fuzz targets call that is private; only with the feature of that name | enrol, tls, xds, *proto* |
//!
//! `cargo xtask tidy` holds the imports against this table and refuses what it does not allow, what it allows and nobody
//! needs, and new circles between files of a module (`xtask/src/tidy/circles.rs` has the old ones). *proto* is the crate
//! of wire formats: they are translated where they come in and go no further.
//!
//! # Invariants
//!
//! * `model`, `route` and `policy` never await and never read the clock.
//! * Only `tls` makes a `VerifiedPeer`, only `policy` a `Permit`. Bytes reach an application, tunnelled or plain,
//!   only with a `Permit` in hand.
//! * A captured connection is never sent in the clear to a peer whose plan said HBONE, whatever fails. To a pod whose
//!   traffic is redirected to the same daemon it is not sent at all, but handed over (`proxy::near`).
//! * What the kernel holds stays when the daemon dies, and is closed while nobody serves it.
//! * Losing the source of the mesh or of certificates stops change, not traffic (until certificates expire), also
//!   when the daemon is replaced meanwhile.
//! * Nothing the data-plane threads run waits for the control runtime, except bounded waits for a first
//!   certificate, for a pod that its node agent knows before the mesh does, and, if the mesh is on demand, for what it
//!   does not have.
//! * Nothing but `api` views is serialised: dumps do not freeze the model.
//! * A panic does not poison a lock: each change under one is one step, so what is there is whole.

pub mod admin;
pub mod api;
pub mod app;
pub mod capture;
pub mod cli;
pub mod config;
pub mod dns;
pub mod enrol;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod hbone;
pub mod identity;
pub mod mesh;
pub mod model;
pub mod net;
pub mod policy;
pub mod proxy;
pub mod route;
pub mod shutdown;
pub mod standalone;
pub mod telemetry;
pub mod tls;
pub mod xds;
