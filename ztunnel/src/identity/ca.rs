//! The seam to whoever signs: a certificate authority, near or far.

use std::error::Error;
use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::model::identity::SpiffeId;
use crate::tls::configs::{Credentials, InvalidCredentials};

/// Makes certificates for workloads.
pub trait CertificateAuthority: Send + Sync + 'static {
    /// Makes a new key and has it certified for `identity`. The key never leaves the returned [`Credentials`].
    ///
    /// May be called for several identities at once, never for one identity twice at once. Dropping the future
    /// gives the request up. It must not block its thread for long: other requests are polled by the same task.
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Credentials, IssueError>>;
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The authority did not answer in an understandable way.
    #[error("the certificate authority cannot be reached")]
    Unreachable(#[source] Box<dyn Error + Send + Sync>),
    /// The authority does not want to certify this identity.
    #[error("the certificate authority refused: {reason}")]
    Refused {
        /// In the authority's words.
        reason: String,
    },
    /// Key or certificate could not be made.
    #[error("the certificate could not be made")]
    Signing(#[source] Box<dyn Error + Send + Sync>),
    /// What came back cannot be used.
    #[error("the certificate authority's answer cannot be used")]
    Invalid(#[from] InvalidCredentials),
    /// What came back has already ended.
    #[error(
        "the certificate authority's certificate has already expired: compare its clock with this node's"
    )]
    Expired,
    /// No answer in time.
    #[error("the certificate authority did not answer within {0:?}")]
    Deadline(Duration),
    /// The code that asks panicked; the panic's message has gone to standard error.
    #[error("asking the certificate authority failed by a defect of this program")]
    Panicked,
}
