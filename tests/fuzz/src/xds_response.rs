//! A response of a control plane as bytes. Each resource in it is taken or named with the reason why not, what is taken
//! is in the mesh afterwards, and what is removed is not.

use std::collections::BTreeSet;

use arbitrary::Result;
use arbitrary::Unstructured;
use bytes::Bytes;
use ztunnel_mesh::store::MeshChange;
use ztunnel_mesh::store::mesh;
use ztunnel_node::xds::session::Received;
use ztunnel_node::xds::session::Session;
use ztunnel_proto::discovery::DeltaDiscoveryResponse;
use ztunnel_proto::discovery::Node;
use ztunnel_proto::prost::Message;

use crate::memory::bounded;
use crate::xds_mesh::push;
use crate::xds_mesh::seen;

/// The longest reasons that are told, with room for the last of them.
const TOLD_MAX: usize = 64 * 1024;

/// A well-formed response in which some bytes are others, or are missing.
fn damaged(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut bytes = push(u)?.encode_to_vec();
    for _ in 0..u.int_in_range(0..=3)? {
        if let Some(last) = bytes.len().checked_sub(1) {
            bytes[u.int_in_range(0..=last)?] = u.arbitrary()?;
        }
    }
    if u.ratio(1, 16)? {
        bytes.truncate(u.int_in_range(0..=bytes.len())?);
    }
    Ok(bytes)
}

/// One response on a new session, either as such or one that is made of the bytes.
pub fn run(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else { return };
    match how % 4 {
        0 => received(rest),
        _ => {
            if let Ok(bytes) = damaged(&mut Unstructured::new(rest)) {
                received(&bytes);
            }
        }
    }
}

fn received(data: &[u8]) {
    // What prost makes of it is not ours: an empty resource is two bytes on the wire.
    let Ok(response) = DeltaDiscoveryResponse::decode(Bytes::copy_from_slice(data)) else { return };
    let brought = response.resources.len();
    let mut session = Session::new(Node::default());
    session.keep_accepted();
    let (mut writer, reader) = mesh();
    let took = bounded(data.len(), 512, || {
        let mut push = match session.receive(response) {
            Received::Push(push) => push,
            Received::Refused(answer) => {
                assert!(answer.error_detail.is_some());
                return None;
            }
        };
        let mut changes = Vec::new();
        while !push.is_done() {
            changes.extend(session.advance(&mut push, 16));
        }
        let accepted = push.take_accepted();
        // What is refused is kept, too.
        let refused = changes.iter().filter(|change| matches!(change, MeshChange::Refuse(_))).count();
        assert_eq!(
            accepted.iter().filter(|it| it.resource.is_some()).count() - refused + push.rejected().len(),
            brought
        );
        let rejected: BTreeSet<String> = push.rejected().iter().map(|(name, _)| name.clone()).collect();
        let held = session.held(push.kind());
        let answer = session.finish(push);
        let told = answer.error_detail.map_or(String::new(), |it| it.message);
        assert_eq!(told.is_empty(), rejected.is_empty());
        assert!(told.len() <= TOLD_MAX.max(8 * data.len()), "{} bytes of reasons", told.len());
        assert!(held <= brought);
        writer.apply(changes.clone());
        Some(changes)
    });
    let Some(changes) = took else { return };
    let mesh = reader.snapshot();
    let mut puts: Vec<&MeshChange> = Vec::new();
    let mut removes = false;
    for change in &changes {
        match change {
            MeshChange::Workload(_) | MeshChange::Service(_) | MeshChange::Policy(_) => puts.push(change),
            _ => removes = true,
        }
    }
    if !removes {
        // The last of each name is the one that is there.
        let mut names = BTreeSet::new();
        for put in puts.into_iter().rev() {
            match put {
                MeshChange::Workload(it) if names.insert(it.uid.to_string()) => {
                    assert_eq!(mesh.workload(&it.uid), Some(it));
                }
                MeshChange::Service(it) if names.insert(format!("s {}", it.key)) => {
                    assert_eq!(mesh.service(it.key.as_str()), Some(it));
                }
                MeshChange::Policy(it) if names.insert(format!("p {}", it.key)) => {
                    assert!(mesh.policies().any(|there| there == it));
                }
                _ => {}
            }
        }
    }
    let all = mesh.workloads().len() + mesh.services_len() + mesh.policies().len();
    assert!(all <= brought);
    assert!(seen(&mesh).len() >= all);
}
