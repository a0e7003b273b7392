//! Which build this is.

use ztunnel_mesh::dump::Version;

/// The version of this build. `istio` is the release of Istio it was installed with, or `unknown`.
pub fn version(istio: &str) -> Version {
    Version {
        version: env!("CARGO_PKG_VERSION").into(),
        git_revision: option_env!("ZTUNNEL_GIT_REVISION").unwrap_or("unknown").into(),
        rust_version: env!("ZTUNNEL_RUSTC").into(),
        build_profile: if cfg!(debug_assertions) { "debug" } else { "release" }.into(),
        build_status: option_env!("ZTUNNEL_BUILD_STATUS").unwrap_or("unknown").into(),
        istio_version: istio.to_owned(),
        crypto_provider: "tls-aws-lc".into(),
    }
}
