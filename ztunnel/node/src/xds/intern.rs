//! One copy of what many resources say: names of namespaces, nodes, services, identities.

use std::collections::HashMap;
use std::collections::HashSet;
use std::fmt::Write;
use std::hash::Hash;
use std::sync::Arc;

use ztunnel_mesh::model::identity::InvalidSpiffeId;
use ztunnel_mesh::model::identity::SpiffeId;
use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_mesh::model::service::GatewayAddress;

/// The pool looks for values that nobody has any more when it has this many, or twice those that were left.
const PURGE_MIN: usize = 4096;

/// Shared values of one kind. Those that nobody else has are forgotten now and then.
#[derive(Debug)]
struct Pool<T: ?Sized> {
    values: HashSet<Arc<T>>,
    purge_at: usize,
}

impl<T: ?Sized + Hash + Eq> Default for Pool<T> {
    fn default() -> Self {
        Self { values: HashSet::new(), purge_at: PURGE_MIN }
    }
}

impl<T: ?Sized + Hash + Eq> Pool<T> {
    fn share<'a>(&mut self, value: &'a T) -> Arc<T>
    where
        Arc<T>: From<&'a T>,
    {
        match self.values.get(value) {
            Some(shared) => Arc::clone(shared),
            None => self.add(Arc::from(value)),
        }
    }

    fn add(&mut self, value: Arc<T>) -> Arc<T> {
        if self.values.len() >= self.purge_at {
            self.values.retain(|value| Arc::strong_count(value) > 1);
            self.purge_at = PURGE_MIN.max(self.values.len() * 2);
        }
        self.values.insert(Arc::clone(&value));
        value
    }
}

/// The shared values of a whole mesh.
#[derive(Debug, Default)]
pub(super) struct Interner {
    texts: Pool<str>,
    ports: Pool<[(u16, u16)]>,
    gateways: Pool<GatewayAddress>,
    identities: HashMap<Box<str>, SpiffeId>,
    domains: HashMap<Box<str>, TrustDomain>,
    key: String,
}

impl Interner {
    pub(super) fn text(&mut self, text: &str) -> Arc<str> {
        self.texts.share(text)
    }

    pub(super) fn ports(&mut self, ports: &[(u16, u16)]) -> Arc<[(u16, u16)]> {
        self.ports.share(ports)
    }

    pub(super) fn gateway(&mut self, gateway: GatewayAddress) -> Arc<GatewayAddress> {
        match self.gateways.values.get(&gateway) {
            Some(shared) => Arc::clone(shared),
            None => self.gateways.add(Arc::new(gateway)),
        }
    }

    pub(super) fn identity(
        &mut self,
        trust_domain: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<SpiffeId, InvalidSpiffeId> {
        self.key.clear();
        let _never_fails = write!(self.key, "{trust_domain}/{namespace}/{service_account}");
        if let Some(known) = self.identities.get(self.key.as_str()) {
            return Ok(known.clone());
        }
        let domain = match self.domains.get(trust_domain) {
            Some(domain) => domain,
            None => {
                let domain = TrustDomain::new(trust_domain)?;
                self.domains.entry(Box::from(trust_domain)).or_insert(domain)
            }
        };
        let new = SpiffeId::new(domain, namespace, service_account)?;
        // Whether others have one of these is not known, so all are forgotten together. Nothing is lost but sharing.
        if self.identities.len() >= 16 * PURGE_MIN {
            self.identities.clear();
            self.domains.clear();
        }
        self.identities.insert(Box::from(self.key.as_str()), new.clone());
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_same_is_shared_and_what_is_gone_forgotten() {
        let mut interner = Interner::default();
        let first = interner.text("shop");
        assert!(Arc::ptr_eq(&first, &interner.text("shop")));
        for number in 0..3 * PURGE_MIN {
            interner.text(&number.to_string());
        }
        assert!(interner.texts.values.len() <= PURGE_MIN);
        assert!(Arc::ptr_eq(&first, &interner.text("shop")), "it is still in use");
        let id = interner.identity("td", "shop", "cart").unwrap();
        assert_eq!(id.as_str(), interner.identity("td", "shop", "cart").unwrap().as_str());
        assert!(interner.identity("t/d", "shop", "cart").is_err());
    }
}
