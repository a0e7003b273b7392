//! The control plane: what says which mesh there is, and who is who in it.
//!
//! | Module | Owns | May import |
//! |---|---|---|
//! | `authority` | the built-in certificate authority | |
//! | `watch` | a mesh file, loaded anew whenever it changes | |
//! | `changes` | which of its versions are carried out, and when | watch |
//!
//! A node's daemon has it inside where no server is wanted: `ztunnel run --mesh`.

pub mod authority;
pub mod changes;
pub mod watch;
