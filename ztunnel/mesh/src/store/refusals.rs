//! What is there and could not be understood, by its addresses.

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::addr::NetworkAddress;
use crate::model::refused::Refused;
use crate::store::map::Map;
use crate::store::several::Several;

/// Nothing, as a rule.
#[derive(Debug, Clone, Default)]
pub(super) struct Refusals {
    by_name: Map<Arc<str>, Arc<Refused>>,
    by_address: Map<NetworkAddress, Several<Arc<Refused>>>,
    /// Those with ranges. They are looked through one by one.
    ranges: Arc<Vec<Arc<Refused>>>,
}

impl Refusals {
    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Refused>> {
        self.by_name.values()
    }

    /// One that has this address.
    pub(super) fn at(&self, network: &Arc<str>, ip: IpAddr) -> Option<&Arc<Refused>> {
        if self.by_address.is_empty() {
            return None;
        }
        let address = NetworkAddress { network: Arc::clone(network), ip };
        self.by_address.get(&address)?.as_slice().first()
    }

    /// One with a range that has this address.
    pub(super) fn spanning(&self, network: &str, ip: IpAddr) -> Option<&Arc<Refused>> {
        self.ranges.iter().find(|refused| refused.spans(network, ip))
    }

    pub(super) fn put(&mut self, new: Arc<Refused>) {
        if self.by_name.get(&new.name) == Some(&new) {
            return;
        }
        self.remove(&new.name);
        for address in &new.addresses {
            match self.by_address.get_mut(address) {
                None => {
                    self.by_address.insert(address.clone(), Several::One(Arc::clone(&new)));
                }
                Some(there) => there.put(Arc::clone(&new), |it| it.name == new.name, |it| it.name > new.name),
            }
        }
        if !new.ranges.is_empty() {
            Arc::make_mut(&mut self.ranges).push(Arc::clone(&new));
        }
        self.by_name.insert(Arc::clone(&new.name), new);
    }

    pub(super) fn remove(&mut self, name: &str) {
        // Nearly always there is none at all.
        if self.by_name.is_empty() {
            return;
        }
        let Some(old) = self.by_name.remove(name) else { return };
        for address in &old.addresses {
            let Some(there) = self.by_address.get(address) else { continue };
            match there.without(|it| it.name == old.name) {
                Some(left) => self.by_address.insert(address.clone(), left),
                None => self.by_address.remove(address),
            };
        }
        if !old.ranges.is_empty() {
            Arc::make_mut(&mut self.ranges).retain(|it| it.name != old.name);
        }
    }
}
