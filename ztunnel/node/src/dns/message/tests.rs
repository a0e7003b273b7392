use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::sync::Arc;

use proptest::prelude::*;
use ztunnel_mesh::model::service::Service;

use super::*;

/// A query as clients make it.
fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn with_edns(mut message: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload).set_dnssec_ok(true);
    message.set_edns(edns);
    message
}

fn read_query(message: &Message) -> Box<Request> {
    match read(&message.to_vec().unwrap()) {
        Received::Query(request) => request,
        other => panic!("{other:?}"),
    }
}

fn refused(bytes: &[u8]) -> Message {
    match read(bytes) {
        Received::Refused(answer) => Message::from_vec(&answer).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn found(addresses: Vec<IpAddr>, alias_of: Option<&str>) -> Found {
    Found {
        service: Arc::new(Service::sample("shop", "cart")),
        alias_of: alias_of.map(str::to_owned),
        addresses,
        unsupported: false,
        exists: true,
        zone: None,
    }
}

fn v4(count: u32) -> Vec<IpAddr> {
    (0..count).map(|number| Ipv4Addr::from(0x0a00_0000 + number).into()).collect()
}

fn v6(count: u128) -> Vec<IpAddr> {
    (0..count).map(|number| Ipv6Addr::from((0xfd00 << 112) + number).into()).collect()
}

fn answered(message: &Message, found: &Found, transport: Transport) -> (Message, usize) {
    let bytes = read_query(message).answer(found, transport);
    (Message::from_vec(&bytes).unwrap(), bytes.len())
}

#[test]
fn a_question_is_read_whatever_its_case() {
    let request = read_query(&query("Cart.SHOP.", RecordType::AAAA));
    assert_eq!((&*request.name(), request.family()), ("cart.shop", Some(Family::V6)));
    assert_eq!(read_query(&query("a.b.", RecordType::A)).family(), Some(Family::V4));
    assert_eq!(read_query(&query("a.b.", RecordType::SRV)).family(), None);
    assert_eq!(read_query(&query(".", RecordType::A)).name(), "");
    let mut chaos = query("version.bind.", RecordType::A);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(read_query(&chaos).family(), None);
}

#[test]
fn what_is_no_request_is_refused() {
    assert!(matches!(read(&[]), Received::Nothing));
    assert!(matches!(read(&[0; 11]), Received::Nothing));
    let mut response = query("a.", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    assert!(matches!(read(&response.to_vec().unwrap()), Received::Nothing), "it would be answered in turn");
    let mut twice = query("a.", RecordType::A);
    twice.add_query(twice.queries[0].clone());
    let mut none = query("a.", RecordType::A);
    none.queries.clear();
    let whole = query("a.example.com.", RecordType::A).to_vec().unwrap();
    // A name that goes on in itself.
    let mut endless = query("a.", RecordType::A).to_vec().unwrap();
    endless.splice(12..15, [0xc0, 12]);
    for bytes in [twice.to_vec().unwrap(), none.to_vec().unwrap(), whole[..20].to_vec(), endless] {
        let answer = refused(&bytes);
        assert_eq!(answer.metadata.response_code, ResponseCode::FormErr, "{bytes:?}");
        assert_eq!(answer.metadata.message_type, MessageType::Response);
        assert_eq!(answer.metadata.id.to_be_bytes(), bytes[..2]);
    }
}

#[test]
fn a_long_message_of_pointers_is_not_read() {
    // A chain of pointers, and records whose names begin at its end.
    let mut bytes = query("a.", RecordType::A).to_vec().unwrap();
    let records = u16::try_from(3000).unwrap();
    bytes[6..8].copy_from_slice(&records.to_be_bytes());
    let first = bytes.len() + 11;
    bytes.extend([0, 0, 16, 0, 1, 0, 0, 0, 0, 0x3f, 0xfe]);
    bytes.push(0);
    while bytes.len() < first + 16_300 {
        let back = u16::try_from(bytes.len().saturating_sub(2).max(first)).unwrap();
        bytes.extend((0xc000 | back).to_be_bytes());
    }
    let last = u16::try_from(bytes.len() - 2).unwrap();
    while bytes.len() < 65_000 {
        bytes.extend((0xc000 | last).to_be_bytes());
        bytes.extend([0, 5, 0, 1, 0, 0, 0, 0, 0, 2]);
        bytes.extend((0xc000 | last).to_be_bytes());
    }
    let Received::Query(request) = read(&bytes) else { panic!("no query") };
    // It goes on to whoever was asked, and is no question for a name of the mesh that is answered.
    assert_eq!(request.fault(), Some(ResponseCode::FormErr));
}

#[test]
fn other_operations_are_not_looked_into() {
    for op_code in [OpCode::Status, OpCode::Notify, OpCode::Update, OpCode::Unknown(9)] {
        let mut bytes = Message::new(7, MessageType::Query, op_code).to_vec().unwrap();
        bytes.extend([0xff; 5]);
        let Received::Foreign(foreign) = read(&bytes) else { panic!("{op_code}") };
        let answer = Message::from_vec(&foreign.refuse(ResponseCode::NotImp)).unwrap();
        assert_eq!((answer.id, answer.op_code), (7, op_code));
        assert_eq!(answer.metadata.response_code, ResponseCode::NotImp);
    }
}

#[test]
fn an_answer_has_authority_the_question_and_the_addresses() {
    let asked = query("Cart.Shop.", RecordType::A);
    let (answer, _) = answered(&asked, &found(v4(2), None), Transport::Udp);
    assert_eq!(answer.id, asked.id);
    assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
    assert!(answer.metadata.recursion_desired && !answer.metadata.truncation);
    assert!(answer.queries[0].name().eq_case(asked.queries[0].name()), "as it was asked");
    let told: Vec<_> = answer.answers.iter().map(ToString::to_string).collect();
    assert_eq!(told, ["Cart.Shop. 30 IN A 10.0.0.0", "Cart.Shop. 30 IN A 10.0.0.1"]);
    assert!(answer.edns.is_none() && answer.authorities.is_empty());
    let (answer, _) = answered(&query("c.", RecordType::AAAA), &found(v6(1), None), Transport::Tcp);
    assert_eq!(answer.answers[0].to_string(), "c. 30 IN AAAA fd00::");
}

#[test]
fn a_name_found_without_its_search_domain_is_an_alias() {
    let asked = query("www.example.com.shop.svc.cluster.local.", RecordType::A);
    let (answer, _) = answered(&asked, &found(v4(1), Some("www.example.com")), Transport::Udp);
    let told: Vec<_> = answer.answers.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "www.example.com.shop.svc.cluster.local. 30 IN CNAME www.example.com.",
            "www.example.com. 30 IN A 10.0.0.0"
        ]
    );
}

#[test]
fn that_there_is_nothing_may_be_remembered_for_a_moment() {
    let (answer, _) = answered(&query("cart.shop.", RecordType::AAAA), &found(vec![], None), Transport::Udp);
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert!(answer.metadata.authoritative && answer.answers.is_empty());
    let [authority] = &answer.authorities[..] else { panic!("{answer:?}") };
    assert_eq!((authority.name.to_ascii(), authority.ttl), ("cart.shop.".to_owned(), NEGATIVE_TTL));
    let RData::SOA(soa) = &authority.data else { panic!("{authority}") };
    assert_eq!(soa.minimum, NEGATIVE_TTL);
    // A name that leaves no room for another label.
    let label = "a".repeat(63);
    let longest = format!("{label}.{label}.{label}.{}.", &label[..61]);
    let (answer, _) = answered(&query(&longest, RecordType::A), &found(vec![], None), Transport::Udp);
    assert_eq!(answer.authorities.len(), 1);
}

#[test]
fn who_speaks_edns_is_answered_in_it() {
    for (said, echoed) in [(4096, 4096), (100, 512)] {
        let asked = with_edns(query("c.", RecordType::A), said);
        let (answer, _) = answered(&asked, &found(v4(1), None), Transport::Udp);
        let edns = answer.edns.unwrap();
        assert_eq!((edns.max_payload(), edns.version()), (echoed, 0));
        assert!(edns.flags().dnssec_ok);
    }
    let mut asked = with_edns(query("c.", RecordType::A), 512);
    assert_eq!(read_query(&asked).fault(), None);
    asked.edns.as_mut().unwrap().set_version(1);
    assert_eq!(read_query(&asked).fault(), Some(ResponseCode::BADVERS));
    let bytes = read_query(&asked).refuse(ResponseCode::BADVERS);
    // The same number as BADSIG.
    let code = Message::from_vec(&bytes).unwrap().metadata.response_code;
    assert_eq!(u16::from(code), u16::from(ResponseCode::BADVERS));
    // What follows the question and cannot be read is nobody's fault until it has to be answered here.
    let mut torn = with_edns(query("c.", RecordType::A), 512).to_vec().unwrap();
    torn.truncate(torn.len() - 3);
    let Received::Query(request) = read(&torn) else { panic!("refused") };
    assert_eq!((request.fault(), &*request.name()), (Some(ResponseCode::FormErr), "c"));
}

#[test]
fn as_many_addresses_are_told_as_fit_and_that_there_are_more() {
    for (payload, limit) in [(None, 512), (Some(1232), 1232), (Some(4096), 4096), (Some(1), 512)] {
        for (kind, addresses) in [(RecordType::A, v4(1000)), (RecordType::AAAA, v6(1000))] {
            for alias in [None, Some("cart.shop")] {
                let asked = query("cart.shop.svc.cluster.local.", kind);
                let asked = match payload {
                    Some(payload) => with_edns(asked, payload),
                    None => asked,
                };
                let found = found(addresses.clone(), alias);
                let (answer, length) = answered(&asked, &found, Transport::Udp);
                assert!(answer.metadata.truncation);
                assert!(length <= limit && length + 28 > limit, "{length} of {limit}");
                assert_eq!(answer.edns.is_some(), payload.is_some());
                let (answer, _) = answered(&asked, &found, Transport::Tcp);
                assert!(!answer.metadata.truncation);
                assert_eq!(answer.answers.len(), 1000 + usize::from(alias.is_some()));
            }
        }
    }
    let (all, _) = answered(&query("c.", RecordType::AAAA), &found(v6(2000), Some("d")), Transport::Tcp);
    assert_eq!((all.answers.len(), all.metadata.truncation), (2001, false), "the most there are");
    let label = "a".repeat(60);
    let long = format!("{label}.{label}.{label}.");
    let found = found(v4(1), Some(&format!("b.{long}")));
    let (answer, length) = answered(&query(&long, RecordType::A), &found, Transport::Udp);
    assert!(length <= 512 && answer.answers.len() == 2, "{length}");
}

#[test]
fn an_answer_is_told_from_what_only_looks_like_one() {
    let asked = query("Cart.shop.", RecordType::A);
    let request = asked.to_vec().unwrap();
    let end = read_query(&asked).question_end();
    let mut answer = Message::response(asked.id, OpCode::Query);
    answer.add_query(asked.queries[0].clone());
    let of = |change: &dyn Fn(&mut Message)| {
        let mut answer = answer.clone();
        change(&mut answer);
        answers(&request, end, &answer.to_vec().unwrap())
    };
    assert!(of(&|_| {}));
    assert!(of(
        &|answer| answer.queries[0] = Query::query(Name::from_ascii("cart.shop.").unwrap(), RecordType::A)
    ));
    let failed = |answer: &mut Message| {
        answer.queries.clear();
        answer.metadata.response_code = ResponseCode::ServFail;
    };
    assert!(of(&failed), "an error without the question");
    assert!(!of(&|answer| answer.queries.clear()), "no error");
    assert!(!of(&|answer| {
        failed(answer);
        answer.add_answer(start_of(None, &Name::from_ascii("cart.shop.").unwrap()));
    }));
    assert!(!of(&|answer| answer.metadata.id = !asked.id));
    assert!(!of(&|answer| answer.metadata.message_type = MessageType::Query));
    assert!(!of(&|answer| answer.metadata.op_code = OpCode::Notify));
    assert!(!of(&|answer| {
        answer.queries[0].set_query_type(RecordType::AAAA);
    }));
    assert!(!of(
        &|answer| answer.queries[0] = Query::query(Name::from_ascii("cart.shoq.").unwrap(), RecordType::A)
    ));
    assert!(!answers(&request, end, &[]));
    assert!(!answers(&request, end, &request[..11]));
}

proptest! {
    #[test]
    fn whatever_comes_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _any = answers(&bytes, 12, &bytes);
        if let Received::Query(request) = read(&bytes) {
            let _name = request.name();
            prop_assert!(request.question_end() <= bytes.len());
            Message::from_vec(&request.refuse(ResponseCode::ServFail)).unwrap();
            for transport in [Transport::Udp, Transport::Tcp] {
                for found in [found(v4(100), None), found(vec![], None)] {
                    Message::from_vec(&request.answer(&found, transport)).unwrap();
                }
            }
        }
    }

    #[test]
    fn a_question_with_anything_behind_it_is_read(
        name in "([a-z0-9_][a-z0-9-]{0,20}\\.){1,8}",
        kind in any::<u16>(),
        behind in proptest::collection::vec(any::<u8>(), 0..100),
        additional in 0..3_u8,
    ) {
        let mut bytes = query(&name, kind.into()).to_vec().unwrap();
        bytes.extend(behind);
        bytes[11] = additional;
        let Received::Query(request) = read(&bytes) else { panic!("refused") };
        prop_assert_eq!(request.name() + ".", name);
        Message::from_vec(&request.answer(&found(v4(100), Some("a.b")), Transport::Udp)).unwrap();
    }
}

/// What an answer says besides addresses: its code, and the authority of a negative answer.
fn negative(bytes: &[u8]) -> (ResponseCode, Vec<String>) {
    let answer = Message::from_vec(bytes).unwrap();
    assert!(answer.answers.is_empty() && answer.metadata.authoritative, "{answer}");
    let told = |record: &Record| match &record.data {
        // Kept no longer than both say (RFC 2308 §5).
        RData::SOA(soa) => format!("{} {} {} {}", record.name, record.ttl, soa.minimum, soa.mname),
        other => panic!("{other:?}"),
    };
    (answer.metadata.response_code, answer.authorities.iter().map(told).collect())
}

#[test]
fn what_is_not_there_is_told_with_the_zone_that_says_so() {
    let asked = read_query(&with_edns(query("DB.shop.svc.cluster.local.", RecordType::A), 1232));
    let in_cluster = vec!["cluster.local. 5 5 ns.cluster.local.".to_owned()];
    let nobody = Found { exists: false, zone: Some("cluster.local".into()), ..found(vec![], None) };
    for transport in [Transport::Udp, Transport::Tcp] {
        let answer = asked.answer(&nobody, transport);
        assert_eq!(negative(&answer), (ResponseCode::NXDomain, in_cluster.clone()));
        assert!(is_no_such_name(&answer));
    }
    let nothing = Found { exists: true, ..nobody };
    let answer = asked.answer(&nothing, Transport::Udp);
    assert_eq!(negative(&answer), (ResponseCode::NoError, in_cluster.clone()));
    assert!(!is_no_such_name(&answer));
    assert_eq!(negative(&asked.nothing(Some("cluster.local"))), (ResponseCode::NoError, in_cluster));
    // Outside of the cluster's domain nobody knows where a zone begins.
    let own = vec!["api.example.com. 5 5 ns.api.example.com.".to_owned()];
    let asked = read_query(&query("api.example.com.", RecordType::TXT));
    assert_eq!(negative(&asked.nothing(None)), (ResponseCode::NoError, own));
    assert!(!is_no_such_name(&[]));
}
