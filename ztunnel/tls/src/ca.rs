//! The seam to whoever signs: a certificate authority, near or far.

use std::error::Error;
use std::time::Duration;

use futures_util::future::BoxFuture;
use ztunnel_mesh::model::identity::SpiffeId;

use crate::configs::{Credentials, InvalidCredentials};

/// Makes certificates for workloads.
pub trait CertificateAuthority: Send + Sync + 'static {
    /// Makes a new key and has it certified for `identity`. The key never leaves the returned [`Credentials`].
    ///
    /// May be called for several identities at once, never for one identity twice at once. Dropping the future
    /// gives the request up. It must not block its thread for long: other requests are polled by the same task.
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Credentials, IssueError>>;

    /// How long certificates are asked to be valid; `None` where that is not for this side to say.
    fn life(&self) -> Option<Duration> {
        None
    }
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
    /// What came back can be used later only.
    #[error(
        "the certificate authority's certificate is valid only in {}: compare its clock with this node's",
        humantime::format_duration(*.0)
    )]
    NotYetValid(Duration),
    /// No answer in time: the request was given up.
    #[error("the certificate authority did not answer within {0:?}")]
    Deadline(Duration),
    /// No answer yet: the request goes on.
    #[error("the certificate authority has not answered for {0:?}, and is waited for")]
    Unanswered(Duration),
    /// The code that asks panicked; the panic's message has gone to standard error.
    #[error("asking the certificate authority failed by a defect of this program")]
    Panicked,
}

impl IssueError {
    /// Whether the authority has said nothing at all: neither yes nor no, nor anything that cannot be used.
    pub fn is_silence(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Deadline(_) | Self::Unanswered(_) => true,
            Self::Refused { .. }
            | Self::Signing(_)
            | Self::Invalid(_)
            | Self::Expired
            | Self::NotYetValid(_)
            | Self::Panicked => false,
        }
    }
}
