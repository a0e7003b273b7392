//! What the fuzz targets of `tests/fuzz` call that is private to a module. Not for anybody else.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::UnixTime;
use webpki::KeyUsage;
use ztunnel_proto::discovery::Resource;
use ztunnel_tls::revocation::Lists;

use crate::enrol::zds::link;
use crate::enrol::zds::link::Packet;
use crate::xds;

/// The next packet of a socket as those of a node agent are received.
pub fn receive_from_agent(socket: &OwnedFd) -> io::Result<Packet> {
    link::receive(socket)
}

/// What a file of the mesh cache holds: the number of each resource's kind, and the resource.
pub fn cached_mesh(file: &File, scope: &str) -> Result<Vec<(u8, Resource)>, Box<dyn Error>> {
    let kinds = xds::cached_mesh(file, scope)?.into_iter().zip(0..);
    Ok(kinds.flat_map(|(resources, kind)| resources.into_iter().map(move |it| (kind, it))).collect())
}

/// Whether `lists` let a client pass that shows `leaf`, which `root` has issued.
pub fn look_up(lists: &Lists, leaf: &[u8], root: &[u8], at: UnixTime) -> Result<bool, Box<dyn Error>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(root))?;
    let leaf = CertificateDer::from(leaf);
    Ok(lists.look_up(&leaf, &[], &roots, at, KeyUsage::client_auth()).is_ok())
}
