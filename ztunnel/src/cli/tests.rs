use std::io::Read as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::net::SocketAddr;
use std::net::TcpListener;

use serde_json::Value;
use serde_json::json;
use time::macros::utc_datetime;

use super::*;

fn dump() -> Value {
    json!({
        "workloads": [
            {"uid": "w2", "name": "web-2", "namespace": "shop", "workloadIps": ["10.0.0.2", "fd00::2"], "node": "n2",
             "protocol": "HBONE", "status": "Unhealthy", "waypoint": {"destination": "/10.96.0.9", "hboneMtlsPort": 15008}},
            {"uid": "w1", "name": "web-1", "namespace": "shop", "workloadIps": ["10.0.0.1"], "node": "n1",
             "protocol": "HBONE", "status": "Healthy", "waypoint": {"destination": "shop/wp.shop.svc.cluster.local"}},
            {"uid": "x", "name": "outside", "namespace": "bare", "hostname": "example.com", "protocol": "TCP",
             "status": "Healthy", "waypoint": {"destination": "shop/gone"}, "a key of tomorrow": 1},
        ],
        "services": [
            {"name": "wp", "namespace": "shop", "hostname": "wp.shop.svc.cluster.local", "vips": ["/10.96.0.9"]},
            {"name": "web", "namespace": "shop", "hostname": "web.shop.svc.cluster.local", "vips": ["net/10.96.0.1"],
             "endpoints": {"w1": {"workloadUid": "w1"}, "w2": {"workloadUid": "w2"}, "w3": {"workloadUid": "w3"}}},
        ],
        "policies": [{"name": "deny", "namespace": "shop", "scope": "Namespace", "action": "Deny", "rules": []}],
        "certificates": [
            {"identity": "spiffe://td/ns/shop/sa/web", "state": "Available",
             "certChain": [{"serialNumber": "255", "validFrom": "2026-01-01T00:00:00Z", "expirationTime": "2026-01-02T00:00:00Z"}],
             "rootCerts": [{"serialNumber": "16", "validFrom": "2025-01-01T00:00:00Z", "expirationTime": "2026-01-01T00:00:00Z"}]},
            {"identity": "spiffe://td/ns/bare/sa/x", "state": "Unavailable: nobody signs", "certChain": [], "rootCerts": []},
        ],
        "workloadState": {
            "u-1": {"state": "Up", "info": {"name": "web-1", "namespace": "shop"}, "connections": {
                "inbound": [{"src": "10.0.0.7:4000", "originalDst": null, "actualDst": "10.0.0.1:80", "protocol": "HBONE"}],
                "outbound": [{"src": "10.0.0.1:5000", "originalDst": "10.96.0.9:80", "actualDst": "[fd00::2]:15008", "protocol": "HBONE"}]}},
        },
    })
}

fn shown(what: What, filter: Filter, raw: bool, json: bool) -> String {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("dump.json");
    std::fs::write(&path, dump().to_string()).expect("written");
    let query = Query { what, source: Source::File(path), filter, raw, json };
    let mut out = Vec::new();
    show(&query, utc_datetime!(2026-01-01 12:00), &mut out).expect("shown");
    String::from_utf8(out).expect("text")
}

#[test]
fn tables_have_the_columns_that_operators_know() {
    let every = || Filter::default();
    let cases = [
        (
            What::Workload,
            "NAMESPACE   POD NAME   ADDRESS            NODE   WAYPOINT   PROTOCOL\n\
             bare        outside    example.com               NA         TCP\n\
             shop        web-1      10.0.0.1           n1     wp         HBONE\n\
             shop        web-2      10.0.0.2,fd00::2   n2     wp         HBONE\n",
        ),
        (
            What::Service,
            "NAMESPACE   SERVICE NAME   SERVICE VIP   WAYPOINT   ENDPOINTS\n\
             shop        web            10.96.0.1     None       1/3\n\
             shop        wp             10.96.0.9     None       0/0\n",
        ),
        (
            What::Policy,
            "NAMESPACE   POLICY NAME   ACTION   SCOPE\n\
             shop        deny          Deny     Namespace\n",
        ),
        (
            What::Certificate,
            "CERTIFICATE NAME             TYPE   STATUS        VALID CERT   SERIAL NUMBER   NOT AFTER              NOT BEFORE\n\
             spiffe://td/ns/shop/sa/web   Leaf   Available     true         ff              2026-01-02T00:00:00Z   2026-01-01T00:00:00Z\n\
             spiffe://td/ns/shop/sa/web   Root   Available     false        10              2026-01-01T00:00:00Z   2025-01-01T00:00:00Z\n\
             spiffe://td/ns/bare/sa/x     Leaf   Unavailable   false\n",
        ),
        (
            What::Connections,
            "WORKLOAD     DIRECTION   LOCAL             REMOTE             REMOTE TARGET                  PROTOCOL\n\
             web-1.shop   Inbound     web-1.shop:80     10.0.0.7:4000                                     HBONE\n\
             web-1.shop   Outbound    web-1.shop:5000   web-2.shop:15008   wp.shop.svc.cluster.local:80   HBONE\n",
        ),
    ];
    for (what, expected) in &cases {
        assert_eq!(shown(*what, every(), false, false), *expected);
    }
    let all: Vec<_> = cases.iter().map(|(_, table)| *table).collect();
    assert_eq!(shown(What::All, every(), false, false), all.join("\n"));
    let raw = shown(What::Connections, every(), true, false);
    assert!(raw.contains("10.0.0.1:5000   [fd00::2]:15008   10.96.0.9:80"), "{raw}");
}

#[test]
fn a_filter_leaves_out_in_tables_and_json_alike() {
    let filter = |name: Option<&str>, namespace: Option<&str>, node: Option<&str>| Filter {
        name: name.map(str::to_owned),
        namespace: namespace.map(str::to_owned),
        node: node.map(str::to_owned),
    };
    for (what, filter, rows) in [
        (What::Workload, filter(None, Some("shop"), None), 2),
        (What::Workload, filter(None, None, Some("n1")), 1),
        (What::Workload, filter(Some("web-2"), Some("shop"), None), 1),
        (What::Service, filter(Some("web"), None, None), 1),
        (What::Policy, filter(None, Some("bare"), None), 0),
        (What::Certificate, filter(None, Some("bare"), None), 1),
    ] {
        let table = shown(what, filter.clone(), false, false);
        assert_eq!(table.lines().count() - 1, rows, "{what:?} {filter:?}: {table}");
        let part: Value = serde_json::from_str(&shown(what, filter.clone(), false, true)).expect("JSON");
        let entries =
            part.as_array().map_or_else(|| part.as_object().map_or(0, serde_json::Map::len), Vec::len);
        assert_eq!(entries, rows, "{what:?} {filter:?}: {part}");
    }
    // JSON is the daemon's own, keys and all.
    let all: Value = serde_json::from_str(&shown(What::All, Filter::default(), false, true)).expect("JSON");
    assert_eq!(all["workloads"], dump()["workloads"]);
    assert_eq!(all["workloadState"], dump()["workloadState"]);
}

#[test]
fn what_is_no_dump_is_said_to_be_none() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("dump.json");
    std::fs::write(&path, "{\"workloads\": 3}").expect("written");
    let query =
        |source| Query { what: What::All, source, filter: Filter::default(), raw: false, json: false };
    let asked = |source| show(&query(source), utc_datetime!(2026-01-01 12:00), &mut Vec::new());
    assert!(matches!(asked(Source::File(path)), Err(Error::Dump(_))));
    assert!(matches!(asked(Source::File(folder.path().join("none"))), Err(Error::File(..))));
}

/// Answers one request with `answer`; returns where, and the request's first line.
fn answering(answer: &'static str) -> (SocketAddr, std::thread::JoinHandle<String>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = listener.local_addr().expect("an address");
    let served = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut request = Vec::new();
        let mut buffer = [0; 1024];
        while !request.ends_with(b"\r\n\r\n") {
            let read = stream.read(&mut buffer).expect("a request");
            assert!(read > 0, "it broke off");
            request.extend_from_slice(&buffer[..read]);
        }
        stream.write_all(answer.as_bytes()).expect("answered");
        String::from_utf8_lossy(&request).lines().next().unwrap_or_default().to_owned()
    });
    (address, served)
}

#[test]
fn the_admin_port_is_asked_and_its_refusal_is_passed_on() {
    let mut out = Vec::new();
    let (address, served) = answering("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n");
    log(address, Some("info,access:debug oops"), true, &mut out).expect("answered");
    assert_eq!(out, b"ok\n");
    assert_eq!(served.join().expect("served"), "POST /logging?level=info,access:debug%20oops&reset HTTP/1.1");

    let (address, served) = answering("HTTP/1.1 400 Bad Request\r\nContent-Length: 7\r\n\r\nno such");
    let refused = log(address, None, false, &mut out).expect_err("refused");
    assert_eq!(refused.to_string(), "the daemon says 400 Bad Request: no such");
    assert_eq!(served.join().expect("served"), "POST /logging HTTP/1.1");

    let (address, served) = answering("SSH-2.0-nothing of the kind\r\n\r\n");
    assert!(matches!(log(address, None, false, &mut out), Err(Error::Client(ClientError::Http(..)))));
    served.join().expect("served");

    let (address, served) = answering("HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nhalf");
    assert!(matches!(log(address, None, false, &mut out), Err(Error::Client(ClientError::Body(_)))));
    served.join().expect("served");
    // Nobody is there any more.
    assert!(matches!(log(address, None, false, &mut out), Err(Error::Client(ClientError::Unreachable(..)))));
}

#[test]
fn a_daemon_that_does_not_answer_is_named() {
    // It connects, as the kernel takes connections for a process that is stopped, and says nothing.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let error =
        log(listener.local_addr().expect("an address"), None, false, &mut Vec::new()).expect_err("nothing");
    let said = error.to_string();
    assert!(
        said.contains("no answer") && said.contains(&format!("process {}", std::process::id())),
        "{said}"
    );
}

#[test]
fn a_name_that_nothing_has_is_an_error_with_what_may_be_meant() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("dump.json");
    std::fs::write(&path, dump().to_string()).expect("written");
    let asked = |what, name: &str, json| {
        let filter = Filter { name: Some(name.to_owned()), ..Filter::default() };
        let query = Query { what, source: Source::File(path.clone()), filter, raw: false, json };
        show(&query, utc_datetime!(2026-01-01 12:00), &mut Vec::new())
    };
    for json in [false, true] {
        let error = asked(What::Workload, "web-3", json).expect_err("no such").to_string();
        assert!(error.contains("no workload") && error.contains("web-"), "{error}");
        asked(What::Workload, "web-1", json).expect("there is one");
        asked(What::Connections, "web-1", json).expect("a pod of this node");
        assert!(asked(What::Connections, "nosuch", json).is_err());
        assert!(asked(What::All, "nosuch", json).is_err());
    }
}

#[test]
fn what_is_not_in_force_is_said_before_anything_else() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("dump.json");
    let mut dump = dump();
    dump["refused"] = json!([{"what": "x", "state": "held", "said": "x is held: why; do this"}]);
    std::fs::write(&path, dump.to_string()).expect("written");
    let query = Query {
        what: What::Policy,
        source: Source::File(path),
        filter: Filter::default(),
        raw: false,
        json: false,
    };
    let mut out = Vec::new();
    show(&query, utc_datetime!(2026-01-01 12:00), &mut out).expect("shown");
    let text = String::from_utf8(out).expect("text");
    assert_eq!(text.lines().next(), Some("Not in force: x is held: why; do this"));
}
