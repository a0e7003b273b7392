//! DNS messages (RFC 1035, EDNS: RFC 6891), as far as they have to be understood.
//!
//! Of what is only forwarded nothing but the header and the question is read, so that whatever else it carries goes on
//! as it came.

use std::net::IpAddr;

use hickory_proto::op::Edns;
use hickory_proto::op::Header;
use hickory_proto::op::Message;
use hickory_proto::op::MessageType;
use hickory_proto::op::Metadata;
use hickory_proto::op::OpCode;
use hickory_proto::op::Query;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::DNSClass;
use hickory_proto::rr::Name;
use hickory_proto::rr::RData;
use hickory_proto::rr::Record;
use hickory_proto::rr::RecordType;
use hickory_proto::rr::rdata::CNAME;
use hickory_proto::rr::rdata::SOA;
use hickory_proto::serialize::binary::BinDecodable;
use hickory_proto::serialize::binary::BinDecoder;

use crate::dns::answer::Family;
use crate::dns::answer::Found;

/// How long an answer may be kept, in seconds.
const TTL: u32 = 30;
/// How long it may be kept that there is none. Short: pods wait for the first endpoint of a service.
const NEGATIVE_TTL: u32 = 5;
/// Of a message without EDNS, over UDP.
const UDP_MAX: u16 = 512;
/// Over TCP.
const TCP_MAX: u16 = u16::MAX;
/// The length of a header, and fields in its third byte.
const HEADER: usize = 12;
const RESPONSE: u8 = 0x80;
const OP_CODE: u8 = 0x78;
/// The response code, in the fourth byte.
const RESPONSE_CODE: u8 = 0x0f;
const TRUNCATED: u8 = 0x02;
/// The lengths of a name that is said already, of what is between a record's name and its data, and of the record by
/// which EDNS is spoken, without options.
const POINTER: usize = 2;
const FIELDS: usize = 10;
const OPT: usize = 11;

/// How a question came, and its answer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// On a connection.
    Tcp,
}

impl Transport {
    /// The value of the `request_protocol` label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// What came.
#[derive(Debug)]
pub enum Received {
    /// Nothing that could be answered.
    Nothing,
    /// Something that is refused: with these bytes.
    Refused(Vec<u8>),
    /// Something else than a query (RFC 2136's updates, say), which only its server understands.
    Foreign(Foreign),
    /// A query.
    Query(Box<Request>),
}

/// A request that is none for names.
#[derive(Debug)]
pub struct Foreign(Metadata);

/// A query with one question.
#[derive(Debug)]
pub struct Request {
    metadata: Metadata,
    question: Query,
    /// Where the question ends in the message.
    question_end: usize,
    edns: Option<Edns>,
    /// Whether the rest of the message could be read.
    whole: bool,
}

/// Reads a message of a client.
pub fn read(bytes: &[u8]) -> Received {
    let mut decoder = BinDecoder::new(bytes);
    let Ok(header) = Header::read(&mut decoder) else { return Received::Nothing };
    // An answer to an answer would be answered: two servers, or one and itself, would go on for ever.
    if header.message_type == MessageType::Response {
        return Received::Nothing;
    }
    if header.op_code != OpCode::Query {
        return Received::Foreign(Foreign(header.metadata));
    }
    if header.counts.queries != 1 {
        return Received::Refused(bare(&header, ResponseCode::FormErr));
    }
    let Ok(question) = Query::read(&mut decoder) else {
        return Received::Refused(bare(&header, ResponseCode::FormErr));
    };
    let question_end = decoder.index();
    // Nothing but EDNS and perhaps a signature goes with a question for addresses. What else does is not read, as names that
    // point from one to the next would take a time for it that grows with the square of the message's length.
    let counts = &header.counts;
    let plain = counts.answers == 0 && counts.authorities == 0 && counts.additionals <= 2;
    let (edns, whole) = match plain.then(|| Message::from_vec(bytes)) {
        Some(Ok(message)) => (message.edns, true),
        Some(Err(_)) | None => (None, false),
    };
    Received::Query(Box::new(Request { metadata: header.metadata, question, question_end, edns, whole }))
}

/// A header alone, as an answer.
fn bare(request: &Metadata, code: ResponseCode) -> Vec<u8> {
    encode(&Message::error_msg(request.id, request.op_code, code))
}

fn encode(message: &Message) -> Vec<u8> {
    // It fails for what is larger than a message can be, of which there is none here.
    message.to_vec().unwrap_or_default()
}

impl Foreign {
    /// An answer that says only this.
    pub fn refuse(&self, code: ResponseCode) -> Vec<u8> {
        bare(&self.0, code)
    }
}

impl Request {
    /// The name asked for, in lower case and without the dot at its end.
    pub fn name(&self) -> String {
        let mut name = self.question.name().to_ascii();
        if name.ends_with('.') {
            name.pop();
        }
        name.make_ascii_lowercase();
        name
    }

    /// What is asked for of it.
    pub fn record_type(&self) -> RecordType {
        self.question.query_type()
    }

    /// The class of what is asked for.
    pub fn class(&self) -> DNSClass {
        self.question.query_class()
    }

    /// The addresses asked for, if it is addresses.
    pub fn family(&self) -> Option<Family> {
        match (self.question.query_class(), self.question.query_type()) {
            (DNSClass::IN, RecordType::A) => Some(Family::V4),
            (DNSClass::IN, RecordType::AAAA) => Some(Family::V6),
            _ => None,
        }
    }

    /// Whether the answer is a zone: as many messages as it takes.
    pub fn is_transfer(&self) -> bool {
        matches!(self.question.query_type(), RecordType::AXFR | RecordType::IXFR)
    }

    /// Where the question ends in the message.
    pub fn question_end(&self) -> usize {
        self.question_end
    }

    /// An answer without records.
    pub fn refuse(&self, code: ResponseCode) -> Vec<u8> {
        encode(&self.response(code))
    }

    /// What is wrong with a question for a name of the mesh, if something is.
    pub fn fault(&self) -> Option<ResponseCode> {
        match &self.edns {
            _ if !self.whole => Some(ResponseCode::FormErr),
            Some(edns) if edns.version() > 0 => Some(ResponseCode::BADVERS),
            _ => None,
        }
    }

    /// The answer for a name that is there, and has nothing of what is asked for. `zone` is what is answered for, if not
    /// the name alone.
    pub fn nothing(&self, zone: Option<&str>) -> Vec<u8> {
        self.without_records(ResponseCode::NoError, zone)
    }

    fn without_records(&self, code: ResponseCode, zone: Option<&str>) -> Vec<u8> {
        let mut message = self.response(code);
        message.metadata.authoritative = true;
        message.add_authority(start_of(zone, self.question.name()));
        encode(&message)
    }

    /// The answer for a name of the mesh. Of addresses that do not fit some are left out, and that is said.
    pub fn answer(&self, found: &Found, transport: Transport) -> Vec<u8> {
        if !found.exists {
            return self.without_records(ResponseCode::NXDomain, found.zone.as_deref());
        }
        let mut message = self.response(ResponseCode::NoError);
        message.metadata.authoritative = true;
        let asked = self.question.name();
        let question_end = HEADER + asked.iter().map(|label| label.len() + 1).sum::<usize>() + 1 + 4;
        let (owner, owner_at) = match found.alias_of.as_deref().map(Name::from_ascii) {
            Some(Ok(mut canonical)) => {
                canonical.set_fqdn(true);
                let alias = RData::CNAME(CNAME(canonical.clone()));
                message.add_answer(Record::from_rdata(asked.clone(), TTL, alias));
                // Behind a pointer to the question and the fields of the record.
                (canonical, question_end + POINTER + FIELDS)
            }
            // A part of a name that was read is a name.
            Some(Err(_)) | None => (asked.clone(), HEADER),
        };
        if found.addresses.is_empty() {
            message.add_authority(start_of(found.zone.as_deref(), &owner));
        }
        let (mut bytes, limit) = (encode(&message), usize::from(self.limit(transport)));
        if bytes.len() > limit {
            return encode(&message.truncate());
        }
        // All records of addresses point to one name, wherever they are: the encoder does so for the first ones only.
        let (mut records, mut count) = (Vec::new(), message.answers.len() as u16);
        for ip in &found.addresses {
            let (kind, octets): (RecordType, &[u8]) = match ip {
                IpAddr::V4(ip) => (RecordType::A, &ip.octets()),
                IpAddr::V6(ip) => (RecordType::AAAA, &ip.octets()),
            };
            if bytes.len() + records.len() + POINTER + FIELDS + octets.len() > limit {
                bytes[2] |= TRUNCATED;
                break;
            }
            records.extend((0xc000 | owner_at as u16).to_be_bytes());
            records.extend(u16::from(kind).to_be_bytes());
            records.extend(u16::from(DNSClass::IN).to_be_bytes());
            records.extend(TTL.to_be_bytes());
            records.extend((octets.len() as u16).to_be_bytes());
            records.extend(octets);
            count += 1;
        }
        bytes[6..8].copy_from_slice(&count.to_be_bytes());
        // They come before what the message ends with.
        let at = bytes.len() - if self.edns.is_some() { OPT } else { 0 };
        if !records.is_empty() {
            bytes.splice(at..at, records);
        }
        bytes
    }

    fn limit(&self, transport: Transport) -> u16 {
        match (transport, &self.edns) {
            (Transport::Tcp, _) => TCP_MAX,
            (Transport::Udp, Some(edns)) => edns.max_payload().max(UDP_MAX),
            (Transport::Udp, None) => UDP_MAX,
        }
    }

    fn response(&self, code: ResponseCode) -> Message {
        let mut message = Message::error_msg(self.metadata.id, self.metadata.op_code, code);
        message.metadata.recursion_desired = self.metadata.recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.checking_disabled = self.metadata.checking_disabled;
        message.add_query(self.question.clone());
        if let Some(asked) = &self.edns {
            let mut edns = Edns::new();
            edns.set_max_payload(asked.max_payload().max(UDP_MAX));
            edns.set_dnssec_ok(asked.flags().dnssec_ok);
            message.set_edns(edns);
        }
        message
    }
}

/// Lets resolvers remember for a moment that `name` is not there, or what it has not (RFC 2308 §3): the start of its
/// `zone`. Where that is not known the name is one of its own.
fn start_of(zone: Option<&str>, name: &Name) -> Record {
    let mut owner = zone.and_then(|zone| Name::from_ascii(zone).ok()).unwrap_or_else(|| name.clone());
    owner.set_fqdn(true);
    let server =
        Name::from_ascii("ns").and_then(|ns| ns.append_name(&owner)).unwrap_or_else(|_| owner.clone());
    let contact =
        Name::from_ascii("nobody").and_then(|who| who.append_name(&owner)).unwrap_or_else(|_| owner.clone());
    let soa = SOA::new(server, contact, 1, 3600, 600, 86_400, NEGATIVE_TTL);
    Record::from_rdata(owner, NEGATIVE_TTL, RData::SOA(soa))
}

/// Whether an answer says that there is no such name.
pub fn is_no_such_name(answer: &[u8]) -> bool {
    answer.get(3).is_some_and(|byte| byte & RESPONSE_CODE == ResponseCode::NXDomain.low())
}

/// Whether `answer` may be one to `request`, of which `question_end` bytes are the header and the question; 0 for one
/// without a question.
pub fn answers(request: &[u8], question_end: usize, answer: &[u8]) -> bool {
    let (Some(asked), Some(said)) = (request.first_chunk::<HEADER>(), answer.first_chunk::<HEADER>()) else {
        return false;
    };
    let same = asked[..2] == said[..2] && (asked[2] ^ said[2]) & OP_CODE == 0 && said[2] & RESPONSE != 0;
    if !same || question_end == 0 {
        return same;
    }
    // An error may be answered without the question, and then has no answers either.
    if said[4..6] == [0, 0] {
        return said[3] & RESPONSE_CODE != 0 && said[6..8] == [0, 0];
    }
    match (request.get(HEADER..question_end), answer.get(HEADER..question_end)) {
        (Some(asked), Some(answered)) => asked.eq_ignore_ascii_case(answered),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
