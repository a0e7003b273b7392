//! The embedded control plane: a mesh directory and a certificate authority, no server needed.

pub mod authority;
