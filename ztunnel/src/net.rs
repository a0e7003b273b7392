//! Sockets and network namespaces: the thin layer over the kernel that the data path and capture share.

pub mod bypass;
pub mod netns;
