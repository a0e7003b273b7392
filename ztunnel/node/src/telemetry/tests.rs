//! Telemetry as the data path and a scraper see it.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use ztunnel_mesh::model::addr::Authority;

use crate::telemetry::Config;
use crate::telemetry::LocalTelemetry;
use crate::telemetry::Telemetry;
use crate::telemetry::access_log;
use crate::telemetry::events::AccessRecord;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Closed;
use crate::telemetry::events::Opened;
use crate::telemetry::events::Parties;
use crate::telemetry::events::RefusedEarly;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::ResponseFlag;
use crate::telemetry::events::Security;
use crate::telemetry::line::Format;
use crate::telemetry::metrics::Distribution;
use crate::telemetry::metrics::Families;
use crate::telemetry::metrics::Sample;
use crate::telemetry::testing::addresses;
use crate::telemetry::testing::golden;
use crate::telemetry::testing::logged;
use crate::telemetry::testing::parties;
use crate::telemetry::testing::telemetry;
use crate::telemetry::testing::workload;

fn silent() -> Telemetry {
    telemetry(Config { access_log: LevelFilter::OFF, ..Config::default() }).0
}

/// The samples of the traffic metrics, without what comes after them.
fn traffic(telemetry: &Telemetry) -> String {
    let text = telemetry.encode_metrics().unwrap();
    text.split_once("# HELP process_open_fds").unwrap().0.to_owned()
}

/// The value of the only sample whose line starts with `name{` and has all of `labels`.
fn value(telemetry: &Telemetry, name: &str, labels: &[&str]) -> Option<u64> {
    let text = telemetry.encode_metrics().unwrap();
    let mut found = text.lines().filter(|line| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    });
    let line = found.next()?;
    assert!(found.next().is_none(), "more than one sample of {name} with {labels:?}");
    Some(line.rsplit(' ').next().unwrap().parse().unwrap())
}

fn open(local: &LocalTelemetry, reporter: Reporter) -> crate::telemetry::OpenConnection {
    local.open(parties(reporter), addresses())
}

const T_BEFORE_FLAGS: &str = "reporter=\"source\",\
    source_workload=\"a\",source_canonical_service=\"a-app\",source_canonical_revision=\"v1\",\
    source_workload_namespace=\"shop\",source_principal=\"spiffe://cluster.local/ns/shop/sa/a\",\
    source_app=\"a-app\",source_version=\"v1\",source_cluster=\"Kubernetes\",\
    destination_service=\"b.shop.svc.cluster.local\",destination_service_namespace=\"shop\",\
    destination_service_name=\"b\",destination_workload=\"b\",destination_canonical_service=\"b-app\",\
    destination_canonical_revision=\"v1\",destination_workload_namespace=\"shop\",\
    destination_principal=\"spiffe://cluster.local/ns/shop/sa/b\",destination_app=\"b-app\",\
    destination_version=\"v1\",destination_cluster=\"Kubernetes\",request_protocol=\"tcp\",response_flags=\"";
const T_AFTER_FLAGS: &str = "\",connection_security_policy=\"mutual_tls\",\
    source_region=\"r1\",source_zone=\"unknown\",destination_region=\"r1\",destination_zone=\"unknown\"";

#[test]
fn the_metrics_text_is_istios() {
    let telemetry = silent();
    let local = telemetry.local();
    open(&local, Reporter::Source).close(ResponseFlag::None, None);
    let failing = open(&local, Reporter::Source);
    failing.received(84);
    failing.sent(175);
    failing.close(ResponseFlag::Connect, Some("no".to_owned()));

    let t = |flag: &str| format!("{{{T_BEFORE_FLAGS}{flag}{T_AFTER_FLAGS}}}");
    let (fine, connect) = (t("-"), t("CONNECT"));
    assert_eq!(
        traffic(&telemetry),
        format!(
            "# HELP istio_tcp_connections_opened TCP connections opened.\n\
             # TYPE istio_tcp_connections_opened counter\n\
             istio_tcp_connections_opened_total{fine} 2\n\
             # HELP istio_tcp_connections_closed TCP connections closed.\n\
             # TYPE istio_tcp_connections_closed counter\n\
             istio_tcp_connections_closed_total{fine} 1\n\
             istio_tcp_connections_closed_total{connect} 1\n\
             # HELP istio_tcp_connections_failed TCP connections that failed.\n\
             # TYPE istio_tcp_connections_failed counter\n\
             istio_tcp_connections_failed_total{connect} 1\n\
             # HELP istio_tcp_received_bytes Bytes received from clients.\n\
             # TYPE istio_tcp_received_bytes counter\n\
             istio_tcp_received_bytes_total{fine} 84\n\
             # HELP istio_tcp_sent_bytes Bytes sent to clients.\n\
             # TYPE istio_tcp_sent_bytes counter\n\
             istio_tcp_sent_bytes_total{fine} 175\n"
        )
    );
}

#[test]
fn without_metadata_every_label_is_unknown_and_there_is_no_locality() {
    let telemetry = silent();
    telemetry
        .local()
        .open(Parties::unknown(Reporter::Destination), addresses())
        .close(ResponseFlag::None, None);
    let text = traffic(&telemetry);
    let line = text.lines().find(|line| line.starts_with("istio_tcp_connections_opened_total")).unwrap();
    assert!(line.contains("reporter=\"destination\",source_workload=\"unknown\""), "{line}");
    assert!(line.contains("destination_cluster=\"unknown\",request_protocol=\"tcp\""), "{line}");
    assert!(line.ends_with("response_flags=\"-\",connection_security_policy=\"unknown\"} 1"), "{line}");
}

#[test]
fn bytes_count_while_the_connection_is_open() {
    let telemetry = silent();
    let connection = open(&telemetry.local(), Reporter::Source);
    connection.received(10);
    connection.sent(5);
    connection.sent(5);
    assert_eq!(connection.bytes(), (10, 10));
    assert_eq!(value(&telemetry, "istio_tcp_received_bytes_total", &[]), Some(10));
    assert_eq!(value(&telemetry, "istio_tcp_sent_bytes_total", &[]), Some(10));
    assert_eq!(value(&telemetry, "istio_tcp_connections_closed_total", &[]), Some(0));
    connection.close(ResponseFlag::None, None);
    assert_eq!(value(&telemetry, "istio_tcp_connections_closed_total", &[]), Some(1));
}

#[test]
fn threads_count_apart_and_are_shown_together() {
    const CONNECTIONS: u64 = 1_000;
    let telemetry = silent();
    let all_parties = [parties(Reporter::Source), parties(Reporter::Source)];
    thread::scope(|scope| {
        for _ in 0..4 {
            let local = telemetry.local();
            let all_parties = &all_parties;
            scope.spawn(move || {
                for parties in all_parties.iter().cycle().take(CONNECTIONS as usize) {
                    let connection = local.open(parties.clone(), addresses());
                    connection.received(3);
                    connection.close(ResponseFlag::None, None);
                }
            });
        }
    });
    assert_eq!(value(&telemetry, "istio_tcp_connections_opened_total", &[]), Some(4 * CONNECTIONS));
    assert_eq!(value(&telemetry, "istio_tcp_received_bytes_total", &[]), Some(4 * 3 * CONNECTIONS));
}

/// A call to `name`, from and to nobody else known.
fn to(name: &str) -> Parties {
    Parties { destination: Some(workload(name, "shop")), ..Parties::unknown(Reporter::Source) }
}

#[test]
fn beyond_the_limit_connections_are_counted_without_their_labels() {
    let (telemetry, _) =
        telemetry(Config { series_max: 2, access_log: LevelFilter::OFF, ..Config::default() });
    let local = telemetry.local();
    let open: Vec<_> = ["a", "b", "c", "d"].map(|name| local.open(to(name), addresses())).into();
    let opened = |label: &str| value(&telemetry, "istio_tcp_connections_opened_total", &[label]);
    assert_eq!(opened("destination_workload=\"a\""), Some(1));
    assert_eq!(opened("destination_workload=\"b\""), Some(1));
    assert_eq!(opened("destination_workload=\"c\""), None);
    assert_eq!(opened("destination_workload=\"unknown\""), Some(2));
    assert_eq!(value(&telemetry, "ztunnel_metrics_overflowed_connections_total", &[]), Some(2));

    // Who really is unknown shares the overflow's series: no label set is shown twice.
    let unknown = local.open(Parties::unknown(Reporter::Source), addresses());
    assert_eq!(opened("destination_workload=\"unknown\""), Some(3));
    drop((open, unknown));
}

#[test]
fn idle_series_that_were_scraped_give_way() {
    let (telemetry, _) =
        telemetry(Config { series_max: 1, access_log: LevelFilter::OFF, ..Config::default() });
    let local = telemetry.local();
    let (first, second) = (to("a"), to("b"));
    local.open(first.clone(), addresses()).close(ResponseFlag::None, None);
    let opened = |label: &str| value(&telemetry, "istio_tcp_connections_opened_total", &[label]);

    // Not scraped yet, so it stays, and the other one overflows.
    let connection = local.open(second.clone(), addresses());
    assert_eq!(opened("destination_workload=\"a\""), Some(1));
    assert_eq!(opened("destination_workload=\"b\""), None);
    connection.close(ResponseFlag::None, None);

    // Scraped (just above) and idle: it gives way.
    let connection = local.open(second, addresses());
    assert_eq!(opened("destination_workload=\"a\""), None);
    assert_eq!(opened("destination_workload=\"b\""), Some(1));

    // What the thread remembered of the first one does not count where nobody looks; the second one is in use.
    local.open(first, addresses()).close(ResponseFlag::None, None);
    assert_eq!(opened("destination_workload=\"b\""), Some(1));
    assert_eq!(opened("destination_workload=\"unknown\""), Some(2));
    connection.close(ResponseFlag::None, None);
}

#[tokio::test(start_paused = true)]
async fn a_closed_connection_is_one_line() {
    let (telemetry, written) = telemetry(Config::default());
    let mut connection = open(&telemetry.local(), Reporter::Destination);
    connection
        .reaches("10.0.0.9:15008".parse().unwrap(), Some(Authority::Address("10.0.0.9:80".parse().unwrap())));
    connection.received(1);
    tokio::time::advance(Duration::from_millis(7)).await;
    connection.close(ResponseFlag::Denied, Some("explicitly denied by: shop/no".to_owned()));
    let text = logged(&telemetry, &written);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("\terror\taccess\tconnection complete\t"), "{text}");
    assert!(text.contains(" dst.addr=10.0.0.9:15008 dst.hbone_addr=10.0.0.9:80 "), "{text}");
    assert!(
        text.ends_with(
            "bytes_sent=0 bytes_recv=1 duration=\"7ms\" error=\"explicitly denied by: shop/no\"\n"
        ),
        "{text}"
    );
}

#[test]
fn a_dropped_connection_is_closed() {
    let (telemetry, written) = telemetry(Config::default());
    drop(open(&telemetry.local(), Reporter::Source));
    assert_eq!(value(&telemetry, "istio_tcp_connections_closed_total", &["response_flags=\"-\""]), Some(1));
    let text = logged(&telemetry, &written);
    assert!(text.contains("\terror\taccess\t") && text.ends_with("error=\"dropped\"\n"), "{text}");
}

#[test]
fn an_early_refusal_is_a_line_and_no_metric() {
    let (telemetry, written) = telemetry(Config::default());
    telemetry.local().refused_early(addresses(), Reporter::Source, &"no such pod");
    let text = logged(&telemetry, &written);
    assert!(text.contains("\twarn\taccess\tconnection failed\t"), "{text}");
    assert_eq!(value(&telemetry, "istio_tcp_connections_opened_total", &[]), None);
}

#[test]
fn the_access_log_keeps_to_its_level() {
    let lines = |access_log| {
        let (telemetry, written) = telemetry(Config { access_log, ..Config::default() });
        let local = telemetry.local();
        open(&local, Reporter::Source).close(ResponseFlag::None, None);
        open(&local, Reporter::Source).close(ResponseFlag::Connect, Some("no".to_owned()));
        local.refused_early(addresses(), Reporter::Source, &"no");
        logged(&telemetry, &written).lines().count()
    };
    assert_eq!(lines(LevelFilter::OFF), 0);
    assert_eq!(lines(LevelFilter::ERROR), 1);
    assert_eq!(lines(LevelFilter::WARN), 2);
    assert_eq!(lines(LevelFilter::INFO), 3);
    assert_eq!(lines(LevelFilter::DEBUG), 5);
}

/// What a scraper gets; where it differs from one process to the next, with a fixed value.
#[test]
fn the_scrape_is_as_recorded() {
    let telemetry =
        telemetry(Config { access_log: LevelFilter::OFF, version: "1.0.0", ..Config::default() }).0;
    let local = telemetry.local();
    let outbound = open(&local, Reporter::Source);
    outbound.received(84);
    outbound.sent(175);
    outbound.close(ResponseFlag::None, None);
    open(&local, Reporter::Destination).close(ResponseFlag::Denied, Some("no".to_owned()));
    local.open(Parties::unknown(Reporter::Source), addresses()).close(ResponseFlag::Revoked, None);
    let _socket = local.accepted(Reporter::Destination);
    local.refused_early(addresses(), Reporter::Source, &"no");
    let seconds: [(f64, u64); 7] =
        [(0.0005, 1), (0.001, 0), (0.01, 0), (0.1, 2), (1.0, 0), (5.0, 0), (f64::INFINITY, 1)];
    telemetry.register(move |families: &mut Families<'_>| {
        let labels: &[(&str, &str)] = &[
            ("request_query_type", "A"),
            ("request_protocol", "udp"),
            ("source_canonical_service", "a-app"),
            ("source_canonical_revision", "v1"),
        ];
        let sample = Distribution { labels, sum: 0.25, buckets: &seconds };
        families.histogram("istio_dns_upstream_request_duration_seconds", "How long.", &[sample])
    });
    let scraped = telemetry.encode_metrics().unwrap();
    let fixed = scraped.lines().map(|line| match line.split_once(' ') {
        Some((name @ ("process_open_fds" | "process_max_fds"), _)) => format!("{name} 0\n"),
        _ => format!("{line}\n"),
    });
    golden("metrics.txt", &fixed.collect::<String>());
}

/// Each kind of line, in both formats.
#[test]
fn the_access_log_is_as_recorded() {
    for (format, name) in [(Format::Plain, "access_log.txt"), (Format::Json, "access_log.json")] {
        let mut out = String::new();
        for record in records() {
            access_log::write(&mut out, format, &record);
        }
        golden(name, &out);
    }
}

fn records() -> Vec<AccessRecord> {
    let at = std::time::SystemTime::UNIX_EPOCH + Duration::from_micros(1_767_225_600_000_042);
    let closed = |parties: Parties, addresses, flag, error: Option<&str>| {
        AccessRecord::Closed(Closed {
            at,
            parties,
            addresses,
            received: 84,
            sent: 175,
            duration: Duration::from_micros(2_900),
            flag,
            error: error.map(str::to_owned),
        })
    };
    let plain = Addresses { destination: "10.0.0.2:8080".parse().unwrap(), hbone: None, ..addresses() };
    let unencrypted =
        Parties { source_identity: None, security: Security::Plain, ..parties(Reporter::Destination) };
    vec![
        closed(parties(Reporter::Source), addresses(), ResponseFlag::None, None),
        closed(parties(Reporter::Destination), addresses(), ResponseFlag::None, None),
        closed(unencrypted, plain.clone(), ResponseFlag::Denied, Some("explicitly denied by: shop/x")),
        closed(
            Parties::unknown(Reporter::Source),
            plain.clone(),
            ResponseFlag::Connect,
            Some("refused\n\"x\""),
        ),
        AccessRecord::Opened(Opened { at, parties: parties(Reporter::Source), addresses: addresses() }),
        AccessRecord::RefusedEarly(RefusedEarly {
            at,
            reporter: Reporter::Destination,
            addresses: plain,
            error: "unknown source".to_owned(),
        }),
    ]
}

#[test]
fn accepted_sockets_are_open_until_dropped() {
    let telemetry = silent();
    let local = telemetry.local();
    let sockets = |reporter| value(&telemetry, "istio_tcp_sockets_open", &[reporter]);
    let (one, two) = (local.accepted(Reporter::Destination), local.accepted(Reporter::Destination));
    assert_eq!(sockets("destination"), Some(2));
    assert_eq!(sockets("source"), Some(0));
    drop((one, two));
    assert_eq!(sockets("destination"), Some(0));
}

#[test]
fn the_process_and_its_build_are_shown() {
    let telemetry = silent();
    let version = format!("tag=\"{}\"", env!("CARGO_PKG_VERSION"));
    assert_eq!(value(&telemetry, "istio_build", &["component=\"ztunnel\"", &version]), Some(1));
    assert!(value(&telemetry, "process_open_fds", &[]).is_some_and(|open| open > 2));
    assert!(value(&telemetry, "process_max_fds", &[]).is_some_and(|max| max > 2));
}

#[test]
fn other_components_show_their_numbers() {
    let telemetry = silent();
    let dropped = Arc::new(std::sync::atomic::AtomicU64::new(0));
    telemetry.register({
        let dropped = Arc::clone(&dropped);
        move |families: &mut Families<'_>| -> fmt::Result {
            let value = dropped.load(std::sync::atomic::Ordering::Relaxed);
            let labels = [("verdict", "drop"), ("reason", "say \"no\"")];
            families.counter("ztunnel_capture_packets", "Packets.", &[Sample { labels: &labels, value }])?;
            families.gauge(
                "workload_manager_active_proxy_count",
                "Pods.",
                &[Sample { labels: &[], value: 0.5 }],
            )
        }
    });
    dropped.store(7, std::sync::atomic::Ordering::Relaxed);
    let text = telemetry.encode_metrics().unwrap();
    assert!(
        text.ends_with(
            "# HELP ztunnel_capture_packets Packets.\n# TYPE ztunnel_capture_packets counter\n\
             ztunnel_capture_packets_total{verdict=\"drop\",reason=\"say \\\"no\\\"\"} 7\n\
             # HELP workload_manager_active_proxy_count Pods.\n\
             # TYPE workload_manager_active_proxy_count gauge\n\
             workload_manager_active_proxy_count 0.5\n# EOF\n"
        ),
        "{text}"
    );
}
