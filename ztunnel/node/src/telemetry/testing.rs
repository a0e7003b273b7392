//! What the tests of telemetry share: parties, and a log that ends in memory.

use std::io;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use ztunnel_mesh::model::addr::Authority;
use ztunnel_mesh::model::service::Service;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::model::workload::WorkloadKind;

use crate::telemetry::Config;
use crate::telemetry::Telemetry;
use crate::telemetry::events::Addresses;
use crate::telemetry::events::Parties;
use crate::telemetry::events::Reporter;
use crate::telemetry::events::Security;
use crate::telemetry::line::Format;
use crate::telemetry::writer;

/// A pod `<name>-1` of the deployment `name`.
pub(crate) fn workload(name: &str, namespace: &str) -> Arc<Workload> {
    Arc::new(Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}-1").into(),
        name: format!("{name}-1").into(),
        namespace: namespace.into(),
        identity: format!("spiffe://cluster.local/ns/{namespace}/sa/{name}").parse().unwrap(),
        node: "node-1".into(),
        cluster: "Kubernetes".into(),
        addresses: vec!["10.0.0.1".parse().unwrap()],
        workload_name: name.into(),
        kind: WorkloadKind::Deployment,
        canonical_name: format!("{name}-app").into(),
        canonical_revision: "v1".into(),
        region: "r1".into(),
        ..Workload::sample(namespace, name)
    })
}

/// `a` of the namespace `shop` calls the service of `b` there, over mutual TLS.
pub(crate) fn parties(reporter: Reporter) -> Parties {
    let (source, destination) = (workload("a", "shop"), workload("b", "shop"));
    Parties {
        reporter,
        source_identity: Some(source.identity.clone()),
        destination_identity: Some(destination.identity.clone()),
        source: Some(source),
        destination: Some(destination),
        service: Some(Arc::new(Service {
            name: "b".into(),
            namespace: "shop".into(),
            hostname: "b.shop.svc.cluster.local".into(),
            ..Service::sample("shop", "b")
        })),
        security: Security::MutualTls,
    }
}

pub(crate) fn addresses() -> Addresses {
    Addresses {
        source: "[::ffff:10.0.0.1]:4242".parse().unwrap(),
        destination: "10.0.0.2:15008".parse().unwrap(),
        hbone: Some(Authority::Address("10.0.0.2:8080".parse().unwrap())),
    }
}

/// What was written to a log.
#[derive(Debug, Clone, Default)]
pub(crate) struct Written(Arc<Mutex<Vec<u8>>>);

impl Written {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().clone()).unwrap()
    }
}

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Telemetry that logs into memory.
pub(crate) fn telemetry(config: Config) -> (Telemetry, Written) {
    let written = Written::default();
    let log = writer::start(Box::new(written.clone()), Format::Plain).unwrap();
    (Telemetry::new(config, log), written)
}

/// What was logged, once it is written.
pub(crate) fn logged(telemetry: &Telemetry, written: &Written) -> String {
    assert!(telemetry.log().flush(Duration::from_secs(10)), "the writer is stuck");
    written.text()
}

/// Compares `actual` with the file `tests/golden/<name>`, or writes it there if `UPDATE_GOLDEN` is set.
pub(crate) fn golden(name: &str, actual: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    for (number, (expected, actual)) in expected.lines().zip(actual.lines()).enumerate() {
        assert_eq!(actual, expected, "{name}, line {}", number + 1);
    }
    assert_eq!(actual, expected, "{name}");
}
