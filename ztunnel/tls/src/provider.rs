//! The cryptography of the process, and what it has to comply with.

use std::sync::{Arc, LazyLock, OnceLock};

use rustls::NamedGroup;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};

/// The cryptography of the mesh: TLS 1.3 with AES-GCM, key exchange hybrid with ML-KEM where the peer can.
///
/// AES-128 comes first. Both ends take the client's order, the shorter key costs about a quarter less
/// per byte, and who wants 256 bits can still have them by offering them first; peers that only know one of the two still meet.
/// X25519MLKEM768 comes first so that traffic recorded today stays unreadable later; rustls sends the X25519
/// share along with it, so an older peer costs no additional round trip.
static PROVIDER: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| Arc::new(provider_for(COMPLIANCE.get().copied().unwrap_or_default())));

pub(crate) fn provider_for(compliance: Compliance) -> CryptoProvider {
    let kx_groups = match compliance {
        Compliance::None => vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        Compliance::Pqc => vec![kx_group::X25519MLKEM768],
    };
    CryptoProvider {
        cipher_suites: vec![cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384],
        kx_groups,
        ..aws_lc_rs::default_provider()
    }
}

static COMPLIANCE: OnceLock<Compliance> = OnceLock::new();

/// What the cryptography of the process has to comply with (`COMPLIANCE_POLICY`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compliance {
    /// Nothing beyond the house's own choice.
    #[default]
    None,
    /// Key exchange is X25519MLKEM768 or there is none: a peer without it is refused.
    Pqc,
}

/// Has the whole process comply. Before its first TLS configuration, or else it comes too late, which is said.
pub fn comply(compliance: Compliance) -> Result<(), TooLate> {
    COMPLIANCE.set(compliance).map_err(|_| TooLate)?;
    let hybrid = |group: &&dyn SupportedKxGroup| group.name() == NamedGroup::X25519MLKEM768;
    let complies = compliance == Compliance::None || PROVIDER.kx_groups.iter().all(hybrid);
    if complies { Ok(()) } else { Err(TooLate) }
}

/// TLS was used before it was said what it has to comply with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the compliance policy comes too late: TLS is in use already")]
pub struct TooLate;

/// The cryptography of every TLS connection of the process, those to the control plane included.
pub(crate) fn provider() -> &'static Arc<CryptoProvider> {
    &PROVIDER
}
