use ztunnel_objects::local;

use super::control_plane::RootCert;
use super::control_plane::Token;
use super::*;

fn environment(variables: &[(&str, &str)]) -> BTreeMap<String, String> {
    variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn with_mesh(variables: &[(&str, &str)], mesh: &str) -> Result<Settings, Problems> {
    resolve(&environment(variables), Surroundings { mesh_config: Some(mesh), cores: 8 })
}

fn settings(variables: &[(&str, &str)]) -> Settings {
    resolve(&environment(variables), Surroundings { mesh_config: None, cores: 8 }).unwrap()
}

/// The one problem of the variables.
fn problem(variables: &[(&str, &str)]) -> String {
    let Problems(problems) =
        resolve(&environment(variables), Surroundings { mesh_config: None, cores: 8 }).unwrap_err();
    let [problem] = &problems[..] else { panic!("{variables:?}: {problems:?}") };
    problem.to_string()
}

fn shown<'a>(settings: &'a Settings, name: &str) -> (&'a str, Origin) {
    let shown: Vec<_> = settings.shown.iter().filter(|shown| shown.name == name).collect();
    let [shown] = shown[..] else { panic!("{name} is shown {} times", shown.len()) };
    (&shown.value, shown.origin)
}

#[test]
fn without_a_word_the_defaults_hold() {
    let settings = settings(&[]);
    assert!(settings.proxy_enabled && settings.dns.enabled && settings.in_pod.ipv6);
    assert_eq!(settings.own.cluster, "Kubernetes");
    assert_eq!(settings.own.cluster_domain, "cluster.local");
    assert_eq!(settings.drain_deadline, Duration::from_secs(5));
    assert_eq!((settings.admin_port, settings.stats_port), (15000, 15020));
    assert_eq!(settings.in_pod.packet_mark, 1337);
    assert_eq!(settings.in_pod.socket, PathBuf::from("/var/run/ztunnel/ztunnel.sock"));
    let control = &settings.control_plane;
    assert_eq!(control.discovery.as_ref().unwrap().address, "https://localhost:15012");
    assert_eq!(control.authority.root, RootCert::File("./var/run/secrets/istio/root-cert.pem".into()));
    assert_eq!(control.token, Token::File("./var/run/secrets/tokens/istio-token".into()));
    assert_eq!(control.secret_ttl, Duration::from_secs(86_400));
    let keepalive = &settings.data_plane.keepalive;
    assert_eq!((keepalive.time, keepalive.retries), (Duration::from_secs(180), 9));
    assert_eq!(settings.data_plane.hbone.client_streams_max, 100);
    assert_eq!(settings.mesh_cache, Some("/var/run/ztunnel/mesh.cache".into()));
    assert_eq!(settings.cert_cache, None, "no key on a disk unless somebody asks for it");
    assert!(settings.warnings.is_empty(), "{:?}", settings.warnings);
    assert_eq!(shown(&settings, "DNS_PROXY_ADDR"), ("127.0.0.1:15053 [::1]:15053", Origin::Default));
    assert_eq!(shown(&settings, "ISTIO_META_DNS_CAPTURE"), ("true", Origin::Default));
    assert!(settings.shown.iter().all(|shown| matches!(shown.origin, Origin::Default | Origin::Machine)));
}

/// What the chart sets (an installation without any value given).
#[test]
fn the_charts_environment_is_understood() {
    let settings = settings(&[
        ("CA_ADDRESS", "istiod.istio-system.svc:15012"),
        ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
        ("RUST_LOG", "info"),
        ("RUST_BACKTRACE", "1"),
        ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
        ("INPOD_ENABLED", "true"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("POD_NAME", "ztunnel-abc"),
        ("POD_NAMESPACE", "istio-system"),
        ("NODE_NAME", "node-1"),
        ("INSTANCE_IP", "10.1.0.7"),
        ("SERVICE_ACCOUNT", "ztunnel"),
        ("ISTIO_META_ENABLE_HBONE", "true"),
        ("ZTUNNEL_CPU_LIMIT", "8"),
        ("ZTUNNEL_RESOURCE_CPU_REQUEST", "200m"),
        ("KUBERNETES_SERVICE_HOST", "10.0.0.1"),
    ]);
    assert!(settings.warnings.is_empty(), "{:?}", settings.warnings);
    assert_eq!(settings.control_plane.authority.address, "https://istiod.istio-system.svc:15012");
    assert_eq!(settings.drain_deadline, Duration::from_secs(25));
    let origin = Origin::Variable("TERMINATION_GRACE_PERIOD_SECONDS");
    assert_eq!(shown(&settings, "CONNECTION_TERMINATION_DEADLINE"), ("25s", origin));
    assert_eq!(settings.own.metadata["ENABLE_HBONE"], "true");
    assert_eq!(settings.data_plane.threads, 2);
    assert_eq!((&*settings.own.node, &*settings.own.pod), ("node-1", "ztunnel-abc"));
}

/// Every variable of Istio's, with a value that is not its default: each has its effect, which is shown with its origin,
/// or a warning that says why it has none.
#[test]
fn no_variable_is_passed_over() {
    let variables = [
        ("ENABLE_PROXY", "true"),
        ("PROXY_MODE", "shared"),
        ("PROXY_WORKLOAD_INFO", "a/b/c"),
        ("NETWORK", "net1"),
        ("NODE_NAME", "node-1"),
        ("CLUSTER_ID", "c1"),
        ("CLUSTER_DOMAIN", "example.local"),
        ("TRUST_DOMAIN", "example.org"),
        ("XDS_ADDRESS", "xds:1"),
        ("CA_ADDRESS", "ca:1"),
        ("XDS_ROOT_CA", "SYSTEM"),
        ("CA_ROOT_CA", "SYSTEM"),
        ("ALT_XDS_HOSTNAME", "xds.example"),
        ("ALT_CA_HOSTNAME", "ca.example"),
        ("AUTH_TOKEN", "/token"),
        ("XDS_HEADER_x", "1"),
        ("CA_HEADER_x", "1"),
        ("XDS_ON_DEMAND", "true"),
        ("LOCAL_XDS_PATH", "/m.yaml"),
        ("PREFERED_SERVICE_NAMESPACE", "shop"),
        ("SECRET_TTL", "1h"),
        ("FAKE_CA", "false"),
        ("ISTIO_META_DNS_CAPTURE", "false"),
        ("ISTIO_META_DNS_PROXY_ADDR", "127.0.0.1:53"),
        ("ISTIO_META_ENABLE_HBONE", "true"),
        ("ISTIO_META_ISTIO_VERSION", "1.30.0"),
        ("ISTIO_METAJSON_X", "[1]"),
        ("INSTANCE_IP", "10.0.0.9"),
        ("POD_NAME", "ztunnel-x"),
        ("POD_NAMESPACE", "istio-system"),
        ("SERVICE_ACCOUNT", "ztunnel"),
        ("INPOD_UDS", "/z.sock"),
        ("INPOD_PORT_REUSE", "false"),
        ("INPOD_ENABLED", "false"),
        ("PACKET_MARK", "7"),
        ("ENABLE_ORIG_SRC", "false"),
        ("KEEPALIVE_ENABLED", "false"),
        ("KEEPALIVE_TIME", "1m"),
        ("KEEPALIVE_INTERVAL", "1m"),
        ("KEEPALIVE_RETRIES", "3"),
        ("USER_TIMEOUT_ENABLED", "true"),
        ("IPV6_ENABLED", "false"),
        ("HTTP2_STREAM_WINDOW_SIZE", "65535"),
        ("HTTP2_CONNECTION_WINDOW_SIZE", "65535"),
        ("HTTP2_FRAME_SIZE", "16384"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "7"),
        ("POOL_UNUSED_RELEASE_TIMEOUT", "1m"),
        ("CONNECTION_TERMINATION_DEADLINE", "7s"),
        ("ZTUNNEL_WORKER_THREADS", "3"),
        ("UNSTABLE_ENABLE_SOCKS5", "true"),
        ("LOCALHOST_APP_TUNNEL", "true"),
        ("ENABLE_RESPONSE_BAGGAGE", "false"),
        ("CRL_PATH", "/crl.pem"),
        ("TLS12_ENABLED", "true"),
        ("COMPLIANCE_POLICY", "pqc"),
        ("AUTHZ_POLICY_INFO_LOGGING", "true"),
        ("RUST_LOG", "debug"),
        ("LOG_FORMAT", "json"),
    ];
    let settings = settings(&variables);
    for (name, _) in variables {
        let warned = settings.warnings.iter().any(|said| said.name == name);
        let shown = settings.shown.iter().filter(|shown| shown.name == name).collect::<Vec<_>>();
        let in_force = matches!(shown[..], [shown] if shown.origin == Origin::Environment);
        assert!(in_force || warned, "{name}: {shown:?}");
    }
    // These are what others follow from.
    for (variable, follows) in [
        ("TERMINATION_GRACE_PERIOD_SECONDS", "CONNECTION_TERMINATION_DEADLINE"),
        ("ISTIO_META_CLUSTER_ID", "CLUSTER_ID"),
    ] {
        let settings = self::settings(&[(variable, "30")]);
        assert_eq!(shown(&settings, follows).1, Origin::Variable(variable));
    }
    let asked = self::settings(&[("TLS12_ENABLED", "true")]);
    assert_eq!(shown(&asked, "TLS12_ENABLED"), ("false", Origin::Default), "what is in force");
}

/// What the chart sets where every value that becomes a variable is given.
#[test]
fn the_charts_values_are_understood() {
    let settings = settings(&[
        ("CA_ADDRESS", "istiod-canary.istio-system.svc:15012"),
        ("XDS_ADDRESS", "istiod-canary.istio-system.svc:15012"),
        ("LOG_FORMAT", "json"),
        ("NETWORK", "net1"),
        ("RUST_LOG", "info"),
        ("RUST_BACKTRACE", "1"),
        ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
        ("INPOD_ENABLED", "true"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("POD_NAME", "ztunnel-abc"),
        ("POD_NAMESPACE", "istio-system"),
        ("NODE_NAME", "node-1"),
        ("INSTANCE_IP", "10.1.0.7"),
        ("SERVICE_ACCOUNT", "ztunnel"),
        ("ISTIO_META_DNS_CAPTURE", "false"),
        ("ISTIO_META_ENABLE_HBONE", "true"),
        ("ZTUNNEL_CPU_LIMIT", "4"),
        ("ZTUNNEL_RESOURCE_CPU_LIMIT", "2"),
        ("ZTUNNEL_RESOURCE_CPU_REQUEST", "200m"),
        ("CRL_PATH", "/var/run/secrets/istio/crl/ca-crl.pem"),
        ("KUBERNETES_SERVICE_HOST", "10.0.0.1"),
    ]);
    assert_eq!(settings.warnings, []);
    assert_eq!(settings.data_plane.threads, 2);
    assert_eq!(shown(&settings, "NETWORK"), ("net1", Origin::Environment));
}

#[test]
fn durations_and_numbers_have_their_effect() {
    let settings = settings(&[
        ("KEEPALIVE_TIME", "1h30m"),
        ("KEEPALIVE_INTERVAL", "10s"),
        ("KEEPALIVE_RETRIES", "3"),
        ("KEEPALIVE_ENABLED", "false"),
        ("USER_TIMEOUT_ENABLED", "true"),
        ("POOL_UNUSED_RELEASE_TIMEOUT", "5m"),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "7"),
        ("HTTP2_STREAM_WINDOW_SIZE", "4194304"),
        ("HTTP2_FRAME_SIZE", "16384"),
        ("PACKET_MARK", "0x539"),
        ("ENABLE_ORIG_SRC", "true"),
        ("SECRET_TTL", "12h"),
        ("ENABLE_RESPONSE_BAGGAGE", "false"),
        ("LOCALHOST_APP_TUNNEL", "false"),
        ("LOG_FORMAT", "json"),
        ("RUST_LOG", "info,access=off"),
        ("CONNECTION_TERMINATION_DEADLINE", ""),
    ]);
    let config = &settings.data_plane;
    assert_eq!(
        config.keepalive,
        Keepalive {
            enabled: false,
            time: Duration::from_secs(5400),
            interval: Duration::from_secs(10),
            retries: 3,
            user_timeout: true,
        }
    );
    assert_eq!(config.hbone.idle_timeout, Duration::from_secs(300));
    assert_eq!((config.hbone.client_streams_max, config.hbone.stream_window), (7, 4 << 20));
    assert_eq!(settings.in_pod.packet_mark, 1337);
    assert_eq!(settings.in_pod.original_source, Some(true));
    assert!(!config.response_baggage && !config.localhost_app_tunnel);
    assert_eq!(
        (settings.log_format, settings.log_filter.to_string()),
        (Format::Json, "info,access=off".into())
    );
    assert_eq!(shown(&settings, "KEEPALIVE_TIME"), ("1h 30m", Origin::Environment));
}

#[test]
fn the_drain_ends_before_kubernetes_kills() {
    for (period, deadline) in [("30", 25), ("11", 6), ("10", 9), ("2", 1), ("1", 1), ("0", 1)] {
        let settings = settings(&[("TERMINATION_GRACE_PERIOD_SECONDS", period)]);
        assert_eq!(settings.drain_deadline, Duration::from_secs(deadline), "{period}");
    }
    let both =
        settings(&[("TERMINATION_GRACE_PERIOD_SECONDS", "30"), ("CONNECTION_TERMINATION_DEADLINE", "3s")]);
    assert_eq!(both.drain_deadline, Duration::from_secs(3));
}

#[test]
fn threads_follow_what_is_said_first() {
    const LIMIT: (&str, &str) = ("ZTUNNEL_RESOURCE_CPU_LIMIT", "3");
    const CONCURRENCY: (&str, &str) = ("PROXY_CONFIG", "concurrency: 5");
    for (variables, threads) in [
        (&[][..], 2),
        (&[("ZTUNNEL_WORKER_THREADS", "6"), LIMIT, CONCURRENCY], 6),
        (&[("ZTUNNEL_WORKER_THREADS", "0")], 8),
        (&[("ZTUNNEL_WORKER_THREADS", "30%")], 3),
        (&[("ZTUNNEL_WORKER_THREADS", "1%")], 1),
        (&[("ZTUNNEL_WORKER_THREADS", "50%"), ("ZTUNNEL_CPU_LIMIT", "32")], 16),
        (&[CONCURRENCY, LIMIT], 5),
        (&[("PROXY_CONFIG", "concurrency: 0")], 8),
        (&[LIMIT], 3),
        (&[("ZTUNNEL_RESOURCE_CPU_LIMIT", "1500m")], 2),
        (&[LIMIT, ("ZTUNNEL_RESOURCE_CPU_REQUEST", "4")], 4),
        (&[("ZTUNNEL_RESOURCE_CPU_REQUEST", "200m")], 2),
        (&[("ZTUNNEL_RESOURCE_CPU_REQUEST", "5")], 5),
        (&[("ZTUNNEL_CPU_LIMIT", "64")], 16),
        (&[("ZTUNNEL_CPU_LIMIT", "0")], 2),
    ] {
        assert_eq!(settings(variables).data_plane.threads, threads, "{variables:?}");
    }
}

#[test]
fn the_control_plane_is_found_in_order() {
    const HOST: (&str, &str) = ("KUBERNETES_SERVICE_HOST", "10.0.0.1");
    const CONFIG: (&str, &str) = ("PROXY_CONFIG", "{discoveryAddress: 'config:1'}");
    let mesh = "defaultConfig:\n  discoveryAddress: mesh:2\n";
    for (variables, address, origin) in [
        (&[][..], "https://mesh:2", Origin::MeshConfig),
        (&[HOST], "https://mesh:2", Origin::MeshConfig),
        (&[CONFIG], "https://config:1", Origin::ProxyConfig),
        (&[CONFIG, ("XDS_ADDRESS", "https://env:3")], "https://env:3", Origin::Environment),
    ] {
        let settings = with_mesh(variables, mesh).unwrap();
        assert_eq!(settings.control_plane.discovery.as_ref().unwrap().address, address);
        assert_eq!(shown(&settings, "XDS_ADDRESS"), (address, origin));
    }
    let in_cluster = settings(&[HOST]);
    assert_eq!(in_cluster.control_plane.discovery.unwrap().address, "https://istiod.istio-system.svc:15012");
    let off = settings(&[("XDS_ADDRESS", "")]);
    assert_eq!(off.control_plane.discovery, None);
}

#[test]
fn proxy_config_is_merged_over_the_mesh() {
    let mesh = "accessLogFile: /dev/stdout\ndefaultConfig:\n  proxyAdminPort: 1\n  statsPort: 2\n  \
                proxyMetadata:\n    ISTIO_META_CLUSTER_ID: mesh\n    OTHER: x\n";
    let config = "statsPort: 3\nproxyMetadata: {ISTIO_META_DNS_CAPTURE: 'false'}\n";
    let settings = with_mesh(&[("PROXY_CONFIG", config)], mesh).unwrap();
    assert_eq!((settings.admin_port, settings.stats_port), (1, 3));
    assert_eq!(shown(&settings, "proxyAdminPort"), ("1", Origin::MeshConfig));
    assert!(!settings.dns.enabled);
    assert_eq!(settings.own.cluster, "mesh");
    let metadata = &settings.own.metadata;
    assert_eq!((&metadata["CLUSTER_ID"], &metadata["OTHER"]), (&"mesh".into(), &"x".into()));

    let env =
        [("PROXY_CONFIG", config), ("ISTIO_META_CLUSTER_ID", "env"), ("ISTIO_META_DNS_CAPTURE", "true")];
    let settings = with_mesh(&env, mesh).unwrap();
    assert_eq!(settings.own.cluster, "env");
    assert!(settings.dns.enabled);
}

#[test]
fn metadata_may_be_json() {
    let settings = settings(&[("ISTIO_METAJSON_LABELS", "{\"a\":[1]}"), ("CLUSTER_ID", "c1")]);
    assert_eq!(settings.own.metadata["LABELS"]["a"][0], 1);
    assert_eq!(settings.own.cluster, "c1");
}

#[test]
fn secrets_are_kept() {
    let settings = settings(&[
        ("AUTH_TOKEN", "eyJh.bGci.OiJS"),
        ("XDS_HEADER_x-tenant", "hush"),
        ("XDS_ROOT_CA", "SYSTEM"),
        ("CA_ROOT_CA", "-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----\n"),
        ("ALT_XDS_HOSTNAME", "other.example"),
    ]);
    let control = &settings.control_plane;
    assert_eq!(control.token, Token::Literal("eyJh.bGci.OiJS".into()));
    let discovery = control.discovery.as_ref().unwrap();
    assert_eq!(discovery.headers[0].0, "x-tenant");
    assert_eq!(discovery.root, RootCert::System);
    assert!(matches!(control.authority.root, RootCert::Pem(_)));
    assert_eq!(discovery.alternative_name.as_deref(), Some("other.example"));
    let told = format!("{settings:?}");
    for secret in ["bGci", "hush"] {
        assert!(!told.contains(secret), "{secret} is told");
    }
}

#[test]
fn what_cannot_be_used_is_named_with_what_can() {
    for (variables, said) in [
        (&[("ENABLE_PROXY", "yes")][..], "ENABLE_PROXY=\"yes\": use true or false"),
        (&[("KEEPALIVE_TIME", "soon")], "KEEPALIVE_TIME=\"soon\": use a duration such as 10s, 5m or 1h30m"),
        (&[("SECRET_TTL", "-1s")], "SECRET_TTL=\"-1s\": use a duration such as 10s, 5m or 1h30m"),
        (&[("KEEPALIVE_RETRIES", "0")], "KEEPALIVE_RETRIES=\"0\": use a whole number from 1 to 4294967295"),
        (
            &[("ZTUNNEL_WORKER_THREADS", "150%")],
            "ZTUNNEL_WORKER_THREADS=\"150%\": use a number, a percentage of the cores such as 25%, or 0 for all cores",
        ),
        (
            &[("ZTUNNEL_CPU_LIMIT", "many")],
            "ZTUNNEL_CPU_LIMIT=\"many\": use a number of processor cores such as 2, 0.5 or 500m",
        ),
        (&[("HTTP2_FRAME_SIZE", "1")], "HTTP2_FRAME_SIZE=\"1\": use a whole number from 16384 to 16777215"),
        (&[("LOG_FORMAT", "xml")], "LOG_FORMAT=\"xml\": use plain or json"),
        (
            &[("RUST_LOG", "info,access=loud")],
            "RUST_LOG=\"info,access=loud\": use a list of <level> and <target>=<level>, such as info,access=off",
        ),
        (
            &[("CA_ADDRESS", "ftp://x:1")],
            "CA_ADDRESS=\"ftp://x:1\": use <host>:<port> or https://<host>:<port>",
        ),
        (&[("XDS_ADDRESS", "a b")], "XDS_ADDRESS=\"a b\": use <host>:<port> or https://<host>:<port>"),
        (
            &[("DNS_PROXY_ADDR", "x")],
            "DNS_PROXY_ADDR=\"x\": use an address with its port, such as 127.0.0.1:15053 or [::1]:15053",
        ),
        (
            &[("ISTIO_META_DNS_PROXY_ADDR", "[::]:53")],
            "ISTIO_META_DNS_PROXY_ADDR=\"[::]:53\": use an address with its port, such as 127.0.0.1:15053 or [::1]:15053",
        ),
        (&[("ISTIO_META_DNS_CAPTURE", "on")], "ISTIO_META_DNS_CAPTURE=\"on\": use true or false"),
        (&[("PROXY_MODE", "dual")], "PROXY_MODE=\"dual\": use shared or dedicated"),
        (
            &[("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "shop/cart")],
            "PROXY_WORKLOAD_INFO=\"shop/cart\": use <namespace>/<name>/<service account>: \
             the workload that is proxied (PROXY_MODE=dedicated)",
        ),
        (
            &[("PROXY_CONFIG", "statsPort: 70000")],
            "PROXY_CONFIG: statsPort=\"70000\": use a whole number from 0 to 65535",
        ),
        (&[("PROXY_CONFIG", "[1]")], "PROXY_CONFIG=\"\": use one YAML mapping"),
        (
            &[("XDS_ON_DEMAND", "true")],
            "XDS_ON_DEMAND=\"true\": names are answered from the whole mesh: set ISTIO_META_DNS_CAPTURE=false as well, and ambient.dnsCapture=false for istio-cni",
        ),
        (
            &[("ENABLE_PROXY", "false"), ("ISTIO_META_DNS_CAPTURE", "false")],
            "ENABLE_PROXY=\"false\": pods' TCP is always proxied: leave it out",
        ),
        (
            &[("LOCAL_XDS", "x"), ("LOCAL_XDS_PATH", "y")],
            "LOCAL_XDS_PATH=\"y\": with LOCAL_XDS it is not known which counts: leave one out",
        ),
        (
            &[("FAKE_CA", "true")],
            "FAKE_CA=\"true\": certificates nobody vouches for are for tests: leave it out",
        ),
        (&[("COMPLIANCE_POLICY", "fips")], "COMPLIANCE_POLICY=\"fips\": use pqc"),
    ] {
        assert_eq!(problem(variables), said);
    }
    for (variables, name) in [
        (("ISTIO_METAJSON_X", "{"), "ISTIO_METAJSON_X"),
        (("PROXY_CONFIG", "a: b: c"), "PROXY_CONFIG"),
        (("TRUST_DOMAIN", "A B"), "TRUST_DOMAIN"),
        (("PROXY_MODE", "dedicated"), "PROXY_WORKLOAD_INFO"),
        (("CA_HEADER_a b", "c"), "CA_HEADER_a b"),
    ] {
        let said = problem(&[variables]);
        assert!(said.starts_with(&format!("{name}=")), "{said}");
    }
}

#[test]
fn one_workload_may_be_proxied_alone() {
    let dedicated = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "shop/cart-1/cart")];
    let with = |more: &[(&'static str, &'static str)]| settings(&[&dedicated[..], more].concat());
    let alone = with(&[]);
    let workload = alone.dedicated.as_ref().unwrap();
    assert_eq!(
        [&*workload.namespace, &*workload.name, &*workload.service_account],
        ["shop", "cart-1", "cart"]
    );
    // Nobody else's rules, so nothing to be known by, and no way back for what has another's address.
    assert_eq!((alone.in_pod.packet_mark, alone.in_pod.original_source), (0, Some(false)));
    assert_eq!(alone.mesh_cache, None);
    let marked = with(&[("PACKET_MARK", "0x539"), ("ZTUNNEL_MESH_CACHE", "/m")]);
    assert_eq!((marked.in_pod.packet_mark, marked.in_pod.original_source), (0x539, None));
    assert_eq!(marked.mesh_cache, Some("/m".into()));
    assert_eq!(with(&[("ZTUNNEL_CERT_CACHE", "/c")]).cert_cache, Some("/c".into()));
    assert_eq!(with(&[("ENABLE_ORIG_SRC", "true")]).in_pod.original_source, Some(true));
    let said = |settings: Settings| settings.warnings.last().map(ToString::to_string).unwrap_or_default();
    assert!(said(with(&[("INPOD_UDS", "/x")])).starts_with("INPOD_UDS=/x has no effect: "));
    let shared = settings(&[("PROXY_WORKLOAD_INFO", "a/b/c")]);
    assert_eq!((&shared.dedicated, shared.in_pod.packet_mark), (&None, 1337));
    assert!(said(shared).starts_with("PROXY_WORKLOAD_INFO=a/b/c has no effect: "));
}

#[test]
fn a_mesh_may_be_given_besides() {
    let given = |variables: &[_]| settings(variables).control_plane.local;
    assert_eq!(given(&[]), None);
    assert_eq!(given(&[("LOCAL_XDS_PATH", "/m.yaml")]), Some(local::Place::File("/m.yaml".into())));
    let text = "workloads: []";
    assert_eq!(given(&[("LOCAL_XDS", text)]), Some(local::Place::Variable("LOCAL_XDS", text.to_owned())));
    let shown = settings(&[("LOCAL_XDS", text)]).shown;
    let shown = shown.iter().find(|shown| shown.name == "LOCAL_XDS").unwrap();
    assert_eq!((&*shown.value, shown.origin), ("(13 bytes)", Origin::Environment));
}

#[test]
fn all_mistakes_are_told_at_once() {
    let variables = environment(&[("ENABLE_PROXY", "1"), ("IPV6_ENABLED", "0"), ("PACKET_MARK", "x")]);
    let error = resolve(&variables, Surroundings { mesh_config: None, cores: 1 }).unwrap_err();
    let told = error.to_string();
    for name in ["ENABLE_PROXY", "IPV6_ENABLED", "PACKET_MARK"] {
        assert!(told.contains(name), "{told}");
    }
}

#[test]
fn what_has_no_effect_is_said() {
    let variables = [
        ("UNSTABLE_ENABLE_SOCKS5", "true"),
        ("TLS12_ENABLED", "false"),
        ("PREFERED_SERVICE_NAMESPACE", "shop"),
        ("ISTIO_META_DNS_CAPTURE", "false"),
    ];
    let warnings = settings(&variables).warnings;
    let names: Vec<_> = warnings.iter().map(|warning| warning.name).collect();
    assert_eq!(names, ["PREFERED_SERVICE_NAMESPACE", "UNSTABLE_ENABLE_SOCKS5"]);
    assert_eq!(
        warnings[1].to_string(),
        "UNSTABLE_ENABLE_SOCKS5=true has no effect: there is no SOCKS5 listener"
    );
}
