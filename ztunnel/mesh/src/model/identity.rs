//! Workload identities in their SPIFFE form.

use std::cmp::Ordering;
use std::fmt;
use std::hash::Hash;
use std::hash::Hasher;
use std::str::FromStr;
use std::sync::Arc;

/// The domain whose roots vouch for an identity, `cluster.local` unless said otherwise.
///
/// Its spelling is kept, as certificates are asked for and issued with it, and means nothing: `Corp.example` is
/// `corp.example` (SPIFFE ID standard §2.1, RFC 3986 §6.2.2.1).
#[derive(Debug, Clone)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Accepts what the SPIFFE ID standard §2.1 accepts, letters, digits, `.`, `-`, `_`, in any case: Istio lets a mesh
    /// be named with capitals, and names it so in certificates.
    pub fn new(name: &str) -> Result<Self, InvalidSpiffeId> {
        let valid = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        if name.is_empty() || name.len() > 255 || !name.chars().all(valid) {
            return Err(InvalidSpiffeId::TrustDomain(name.to_owned()));
        }
        Ok(Self(Arc::from(name)))
    }

    /// The domain's name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl PartialEq for TrustDomain {
    fn eq(&self, other: &Self) -> bool {
        self.0.eq_ignore_ascii_case(&other.0)
    }
}

impl Eq for TrustDomain {}

impl Default for TrustDomain {
    fn default() -> Self {
        Self(Arc::from("cluster.local"))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is not a SPIFFE ID of a workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSpiffeId {
    /// Not `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[error("{0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Form(String),
    /// The trust domain has a character it may not have, or is empty.
    #[error("{0:?} is not a trust domain: use letters, digits, '.', '-' and '_'")]
    TrustDomain(String),
    /// The namespace or service account has a character it may not have, or is empty.
    #[error("{0:?} is not a namespace or service account name")]
    Segment(String),
}

/// Who a workload is: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
///
/// One allocation, compared and hashed as a whole, because it is a key of every tunnel pool. Its spelling is kept, that
/// of the trust domain means nothing: see [`TrustDomain`].
#[derive(Clone)]
pub struct SpiffeId {
    uri: Arc<str>,
    // Byte offsets into `uri`: derived from it, so they take no part in what a reader sees.
    trust_domain_end: u16,
    namespace_end: u16,
}

const SCHEME: &str = "spiffe://";

impl SpiffeId {
    /// Composes an identity; the names are checked.
    pub fn new(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, InvalidSpiffeId> {
        for segment in [namespace, service_account] {
            // SPIFFE ID §2.2 path characters, without "." and ".." as whole segments.
            let valid = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
            if segment.is_empty()
                || segment.len() > 253
                || segment.chars().all(|c| c == '.')
                || !segment.chars().all(valid)
            {
                return Err(InvalidSpiffeId::Segment(segment.to_owned()));
            }
        }
        let uri = format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}");
        let trust_domain_end = SCHEME.len() + trust_domain.as_str().len();
        let namespace_end = trust_domain_end + "/ns/".len() + namespace.len();
        Ok(Self {
            uri: Arc::from(uri),
            trust_domain_end: trust_domain_end as u16,
            namespace_end: namespace_end as u16,
        })
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// Whether `other` is of the same trust domain.
    pub fn shares_domain(&self, other: &Self) -> bool {
        self.trust_domain().eq_ignore_ascii_case(other.trust_domain())
    }

    /// What follows the trust domain: `/ns/<namespace>/sa/<service account>`.
    pub fn path(&self) -> &str {
        &self.uri[usize::from(self.trust_domain_end)..]
    }

    /// The URI without `spiffe://`: the form in which policies name principals.
    pub fn principal(&self) -> &str {
        &self.uri[SCHEME.len()..]
    }

    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..usize::from(self.trust_domain_end)]
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.uri[usize::from(self.trust_domain_end) + "/ns/".len()..usize::from(self.namespace_end)]
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &str {
        &self.uri[usize::from(self.namespace_end) + "/sa/".len()..]
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        // Nearly always the spelling is the same, and often the allocation.
        Arc::ptr_eq(&self.uri, &other.uri)
            || self.uri == other.uri
            || (self.path() == other.path() && self.shares_domain(other))
    }
}

impl Eq for SpiffeId {}

impl Hash for SpiffeId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.trust_domain().bytes().for_each(|byte| state.write_u8(byte.to_ascii_lowercase()));
        self.path().hash(state);
    }
}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> Ordering {
        let domain =
            |id: &Self| id.trust_domain().bytes().map(|byte| byte.to_ascii_lowercase()).collect::<Vec<_>>();
        domain(self).cmp(&domain(other)).then_with(|| self.path().cmp(other.path()))
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || InvalidSpiffeId::Form(text.to_owned());
        let path = text.strip_prefix(SCHEME).ok_or_else(form)?;
        let mut parts = path.split('/');
        let mut part = || parts.next();
        let (Some(trust_domain), Some("ns"), Some(namespace), Some("sa"), Some(service_account), None) =
            (part(), part(), part(), part(), part(), part())
        else {
            return Err(form());
        };
        Self::new(&TrustDomain::new(trust_domain)?, namespace, service_account)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_gives_back_its_parts() {
        let id: SpiffeId = "spiffe://td.example/ns/shop/sa/cart".parse().unwrap();
        assert_eq!(id.trust_domain(), "td.example");
        assert_eq!(id.namespace(), "shop");
        assert_eq!(id.service_account(), "cart");
        assert_eq!(id.principal(), "td.example/ns/shop/sa/cart");
        assert_eq!(id.to_string(), "spiffe://td.example/ns/shop/sa/cart");
    }

    #[test]
    fn the_case_of_a_trust_domain_is_kept_and_means_nothing() {
        let id = |text: &str| text.parse::<SpiffeId>().unwrap();
        let (shouted, spoken) =
            (id("spiffe://Corp.Example/ns/shop/sa/cart"), id("spiffe://corp.example/ns/shop/sa/cart"));
        assert_eq!(shouted.as_str(), "spiffe://Corp.Example/ns/shop/sa/cart");
        assert_eq!(shouted, spoken);
        assert_eq!(shouted.cmp(&spoken), Ordering::Equal);
        assert_eq!(std::collections::HashSet::from([shouted.clone(), spoken]).len(), 1);
        assert_eq!(TrustDomain::new("TD").unwrap(), TrustDomain::new("td").unwrap());
        for other in [
            "spiffe://corp.example/ns/Shop/sa/cart",
            "spiffe://corp.example/ns/shop/sa/Cart",
            "spiffe://corp/ns/shop/sa/cart",
        ] {
            assert_ne!(shouted, id(other), "{other}");
            assert_ne!(shouted.cmp(&id(other)), Ordering::Equal, "{other}");
        }
    }

    #[test]
    fn what_is_not_an_identity_is_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://td",
            "https://td/ns/a/sa/b",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/ns//sa/b",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns/a/b/c",
            "spiffe:///ns/a/sa/b",
            "spiffe://td/ns/a\0b/sa/c",
            "spiffe://td/ns/../sa/c",
            "spiffe://td/ns/a%2fb/sa/c",
            "spiffe://td/ns/a/sa/c?x=1",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text:?} was accepted");
        }
    }
}
