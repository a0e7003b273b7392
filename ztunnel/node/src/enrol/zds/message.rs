//! The wire format: packets to requests, answers to packets.

use std::sync::Arc;

use ztunnel_mesh::model::addr::PodUid;
use ztunnel_proto::prost::Message;
use ztunnel_proto::workload::zds::Ack;
use ztunnel_proto::workload::zds::AddWorkload;
use ztunnel_proto::workload::zds::Version;
use ztunnel_proto::workload::zds::WorkloadRequest;
use ztunnel_proto::workload::zds::WorkloadResponse;
use ztunnel_proto::workload::zds::ZdsHello;
use ztunnel_proto::workload::zds::workload_request;
use ztunnel_proto::workload::zds::workload_response;

use crate::enrol::zds::AgentPod;
use crate::enrol::zds::link::Packet;
use crate::enrol::zds::machine::Rejected;
use crate::enrol::zds::machine::Request;
use crate::net::netns::Netns;

/// The most bytes of one message, either way: the agent reads no more of an answer.
pub const MESSAGE_MAX: usize = 1024;
/// The most bytes of an error's text: the rest of the answer takes less than the difference.
const ERROR_MAX: usize = 900;

/// The first message of a connection.
pub fn hello() -> Vec<u8> {
    ZdsHello { version: Version::V1.into() }.encode_to_vec()
}

/// The answer to a request. A long error is cut.
pub fn ack(result: &Result<(), String>) -> Vec<u8> {
    let error = match result {
        Ok(()) => String::new(),
        Err(error) => cut(error, ERROR_MAX).to_owned(),
    };
    let payload = Some(workload_response::Payload::Ack(Ack { error }));
    WorkloadResponse { payload }.encode_to_vec()
}

fn cut(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}

/// What the agent asks for. Descriptors that belong nowhere are closed.
pub fn request(packet: Packet) -> Result<Request<AgentPod>, Rejected> {
    let Packet { bytes, mut descriptors, truncated } = packet;
    if truncated {
        let error = format!("a message of more than {MESSAGE_MAX} bytes or of several descriptors");
        return Err(Rejected::Protocol(error));
    }
    let message = WorkloadRequest::decode(&*bytes)
        .map_err(|error| Rejected::Protocol(format!("not a WorkloadRequest: {error}")))?;
    // A kind that this daemon does not know is for the agent to do without.
    let payload =
        message.payload.ok_or_else(|| Rejected::Message("a request of an unknown kind".to_owned()))?;
    let netns = descriptors.pop();
    if !descriptors.is_empty() {
        return Err(Rejected::Message("more than one descriptor".to_owned()));
    }
    match (payload, netns) {
        (workload_request::Payload::Add(add), Some(netns)) => {
            let netns = Netns::from_fd(netns)
                .map_err(|error| Rejected::Message(format!("the descriptor {error}")))?;
            self::add(add, netns).map(Request::Add)
        }
        (workload_request::Payload::Add(_), None) => {
            Err(Rejected::Message("Add without a network namespace".to_owned()))
        }
        (_, Some(_)) => Err(Rejected::Message("a descriptor with another request than Add".to_owned())),
        (workload_request::Payload::Keep(keep), None) => uid(keep.uid).map(Request::Keep),
        (workload_request::Payload::Del(del), None) => uid(del.uid).map(Request::Del),
        (workload_request::Payload::SnapshotSent(_), None) => Ok(Request::SnapshotSent),
    }
}

fn add(add: AddWorkload, netns: Netns) -> Result<AgentPod, Rejected> {
    let uid = uid(add.uid)?;
    let names = add.workload_info.ok_or_else(|| Rejected::Message("Add without workload_info".to_owned()))?;
    for (name, field) in
        [(&names.name, "name"), (&names.namespace, "namespace"), (&names.service_account, "service_account")]
    {
        if name.is_empty() {
            return Err(Rejected::Message(format!("Add without {field}")));
        }
        if !is_name(name) {
            return Err(Rejected::Message(format!("{field} is not a name of Kubernetes")));
        }
    }
    Ok(AgentPod {
        uid,
        name: Arc::from(names.name),
        namespace: Arc::from(names.namespace),
        service_account: Arc::from(names.service_account),
        netns: Arc::new(netns),
    })
}

fn uid(uid: String) -> Result<PodUid, Rejected> {
    match uid.is_empty() {
        true => Err(Rejected::Message("a request without a uid".to_owned())),
        false if !is_name(&uid) => Err(Rejected::Message("the uid is not one of Kubernetes".to_owned())),
        false => Ok(PodUid(Arc::from(uid))),
    }
}

/// Whether `text` has only characters that names and UIDs of Kubernetes may have: they go into log lines.
fn is_name(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use proptest::collection::vec;
    use proptest::prelude::any;
    use proptest::proptest;
    use ztunnel_proto::workload::zds::DelWorkload;
    use ztunnel_proto::workload::zds::KeepWorkload;
    use ztunnel_proto::workload::zds::SnapshotSent;
    use ztunnel_proto::workload::zds::WorkloadInfo;
    use ztunnel_proto::workload::zds::workload_request::Payload;

    use super::*;

    fn namespace() -> OwnedFd {
        File::open("/proc/self/ns/net").unwrap().into()
    }

    fn packet(payload: Payload, descriptors: Vec<OwnedFd>) -> Packet {
        let bytes = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
        Packet { bytes, descriptors, truncated: false }
    }

    fn info() -> Option<WorkloadInfo> {
        let [name, namespace, service_account] = ["cart-1", "shop", "cart"].map(str::to_owned);
        Some(WorkloadInfo { name, namespace, service_account })
    }

    fn add(workload_info: Option<WorkloadInfo>) -> Payload {
        Payload::Add(AddWorkload { uid: "u1".to_owned(), workload_info })
    }

    #[test]
    fn requests_are_understood() {
        let Ok(Request::Add(pod)) = request(packet(add(info()), vec![namespace()])) else { panic!("no pod") };
        assert_eq!(
            (&*pod.uid.0, &*pod.name, &*pod.namespace, &*pod.service_account),
            ("u1", "cart-1", "shop", "cart")
        );
        assert_eq!(pod.netns.id(), Netns::current().unwrap().id());
        let keep = Payload::Keep(KeepWorkload { uid: "u1".to_owned() });
        assert_eq!(request(packet(keep, vec![])), Ok(Request::Keep(PodUid::from("u1"))));
        let del = Payload::Del(DelWorkload { uid: "u1".to_owned() });
        assert_eq!(request(packet(del, vec![])), Ok(Request::Del(PodUid::from("u1"))));
        let sent = Payload::SnapshotSent(SnapshotSent {});
        assert_eq!(request(packet(sent, vec![])), Ok(Request::SnapshotSent));
    }

    #[test]
    fn the_bytes_are_those_of_other_daemons() {
        assert_eq!(hello(), [0x08, 1]);
        assert_eq!(ack(&Ok(())), [0x0a, 0]);
        assert_eq!(ack(&Err("no".to_owned())), [0x0a, 4, 0x0a, 2, b'n', b'o']);
        // DelWorkload's uid is field 2.
        let del = Packet { bytes: vec![0x12, 3, 0x12, 1, b'x'], descriptors: vec![], truncated: false };
        assert_eq!(request(del), Ok(Request::Del(PodUid::from("x"))));
    }

    #[test]
    fn what_cannot_be_done_is_refused_and_what_is_not_understood_ends_the_connection() {
        let plain: OwnedFd = File::open("/dev/null").unwrap().into();
        let nameless = Some(WorkloadInfo { name: String::new(), ..info().unwrap() });
        let keep = || Payload::Keep(KeepWorkload { uid: "u1".to_owned() });
        for (packet, why) in [
            (packet(add(info()), vec![]), "Add without a network namespace"),
            (packet(add(info()), vec![namespace(), namespace()]), "more than one descriptor"),
            (packet(add(info()), vec![plain]), "the descriptor is not a network namespace"),
            (packet(add(None), vec![namespace()]), "Add without workload_info"),
            (packet(add(nameless), vec![namespace()]), "Add without name"),
            (packet(keep(), vec![namespace()]), "a descriptor with another request than Add"),
            (packet(Payload::Del(DelWorkload::default()), vec![]), "a request without a uid"),
            (
                packet(Payload::Del(DelWorkload { uid: "a b".to_owned() }), vec![]),
                "the uid is not one of Kubernetes",
            ),
            (
                Packet { bytes: vec![0x7a, 0], descriptors: vec![], truncated: false },
                "a request of an unknown kind",
            ),
        ] {
            assert_eq!(request(packet), Err(Rejected::Message(why.to_owned())));
        }
        let garbage = Packet { bytes: vec![0xff; 9], descriptors: vec![], truncated: false };
        assert!(matches!(request(garbage), Err(Rejected::Protocol(_))));
        let cut = Packet { truncated: true, ..packet(add(info()), vec![namespace()]) };
        assert!(matches!(request(cut), Err(Rejected::Protocol(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_bounded(bytes in vec(any::<u8>(), 0..MESSAGE_MAX), error in ".{0,2000}") {
            let _understood = request(Packet { bytes, descriptors: vec![], truncated: false });
            assert!(ack(&Err(error)).len() <= MESSAGE_MAX);
        }
    }
}
