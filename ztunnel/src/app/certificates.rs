//! What is demanded of peers' certificates, as configured, and what is told about it.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use ztunnel_control::authority::Authority;
use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_node::admin::ready::Readiness;
use ztunnel_node::identity::crl;
use ztunnel_node::identity::inheritance;
use ztunnel_node::identity::istiod::Istiod;
use ztunnel_node::identity::kept;
use ztunnel_node::identity::worker::Identities;
use ztunnel_node::telemetry::Telemetry;
use ztunnel_node::telemetry::metrics::Families;
use ztunnel_node::telemetry::metrics::Sample;
use ztunnel_runtime::shutdown;
use ztunnel_runtime::shutdown::Signal;
use ztunnel_runtime::shutdown::Trigger;
use ztunnel_tls::ca::CertificateAuthority;
use ztunnel_tls::configs::Credentials;
use ztunnel_tls::provider;
use ztunnel_tls::provider::Compliance;
use ztunnel_tls::trust::Revocation;
use ztunnel_tls::trust::Side;
use ztunnel_tls::trust::Trust;

use crate::app::error::RunError;
use crate::app::handover;
use crate::config::resolved::Run;

/// Makes what judges peers, before anything uses TLS. While revocation lists are asked for and missing, the daemon is
/// not ready.
pub fn trust(
    config: &Run,
    telemetry: &Telemetry,
    ready: &Readiness,
    signal: &Signal,
) -> Result<Trust, RunError> {
    provider::comply(config.compliance)?;
    if config.compliance == Compliance::Pqc {
        tracing::info!(
            "key exchange is X25519MLKEM768 only (COMPLIANCE_POLICY): peers without it are refused"
        );
    }
    let Some(path) = &config.crl else { return Ok(Trust::default()) };
    let trust = Trust::new(crl::open(path));
    let status = crl::watch(path.clone(), trust.clone(), signal.clone());
    if let Revocation::Missing(_) = trust.revocation() {
        let blocker = ready.block("certificate revocation lists");
        let mut changes = trust.revocations();
        shutdown::spawn(async move {
            // It fails only when nobody could load any list any more, and then the process ends.
            if changes.changed().await.is_ok() {
                blocker.lift();
            }
        });
    }
    register(telemetry, trust.clone(), status);
    Ok(trust)
}

/// Who certifies the node's workloads, as configured. The embedded authority does so in `trust_domain`.
pub fn authority(
    config: &Run,
    trust_domain: &TrustDomain,
) -> Result<Arc<dyn CertificateAuthority>, RunError> {
    Ok(match &config.authority {
        Some(authority) => Arc::new(Istiod::new(authority.clone())),
        None => Arc::new(Authority::open(&config.state_dir, &config.places.node, trust_domain)?),
    })
}

/// What the daemon that serves the node now leaves to this one, if there is one; else what the last one kept.
pub async fn inherited(socket: &Path, cache: Option<&Path>) -> Vec<Credentials> {
    let Some(bytes) = handover::credentials(socket).await else {
        return cache.map(kept_at).unwrap_or_default();
    };
    match inheritance::decode(&bytes) {
        Ok(inherited) => {
            tracing::info!(certificates = inherited.len(), "taken over from the running daemon");
            inherited
        }
        Err(error) => {
            tracing::warn!(%error, "the authority is asked for all certificates");
            Vec::new()
        }
    }
}

/// What an earlier daemon has kept in the file at `path`.
pub fn kept_at(path: &Path) -> Vec<Credentials> {
    match kept::load(path) {
        Ok(kept) => {
            tracing::info!(certificates = kept.len(), path = %path.display(), "kept certificates read");
            kept
        }
        Err(error) => {
            let path = path.display();
            tracing::warn!(%path, error = &error as &dyn Error, "the kept certificates are not used");
            Vec::new()
        }
    }
}

/// From now on certificates are kept where they are to be, until what is returned is dropped: then they are the next
/// daemon's.
#[must_use]
pub fn keep(config: &Run, identities: &Identities) -> Trigger {
    let (until, signal) = shutdown::channel();
    if let Some(path) = &config.cert_cache {
        kept::keep(path.clone(), identities.clone(), signal);
    }
    until
}

fn register(telemetry: &Telemetry, trust: Trust, status: Arc<crl::Status>) {
    telemetry.register(move |families: &mut Families<'_>| {
        let samples = [
            Sample { labels: &[("reporter", "source")], value: trust.rejections(Side::Server) },
            Sample { labels: &[("reporter", "destination")], value: trust.rejections(Side::Client) },
        ];
        let help = "Peers refused or cut off by certificate revocation lists.";
        families.counter("istio_crl_policy_rejections", help, &samples)?;
        // Whoever is connected is judged by every new list, as long as lists are asked for at all.
        let help = "Connections whose peers' certificates are not looked up again when the lists change.";
        let untracked = [[("reporter", "source")], [("reporter", "destination")]];
        let untracked = [0, 1].map(|reporter| Sample { labels: &untracked[reporter], value: 0 });
        families.counter("istio_crl_untracked_connections", help, &untracked)?;
        let help = "Loads of certificate revocation lists that failed; the last good ones stayed in force.";
        let failures = [Sample { labels: &[], value: status.failures() }];
        families.counter("ztunnel_crl_load_failures", help, &failures)?;
        let (entries, next) = match trust.revocation() {
            Revocation::Lists(lists) => (lists.entries() as f64, lists.next_update()),
            Revocation::Off | Revocation::Missing(_) => (0.0, None),
        };
        let help = "Certificates that the revocation lists in force name.";
        families.gauge("ztunnel_crl_entries", help, &[Sample { labels: &[], value: entries }])?;
        let seconds = next.and_then(|next| next.duration_since(std::time::SystemTime::UNIX_EPOCH).ok());
        let next: Vec<_> = seconds.iter().map(|at| Sample { labels: &[], value: at.as_secs_f64() }).collect();
        let help =
            "When the first of the revocation lists in force was to be replaced, in seconds since 1970.";
        families.gauge("ztunnel_crl_next_update_seconds", help, &next)
    });
}
