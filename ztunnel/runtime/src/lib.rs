//! What every process of this project has, whatever it is for.
//!
//! | Module | Owns | May import |
//! |---|---|---|
//! | `shutdown` | the drain signal, and the place tasks are spawned | |
//! | `files` | reading files that others wrote, within bounds | |

pub mod files;
pub mod shutdown;
