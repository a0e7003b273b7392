//! What of a dump is not simply a value: lists and maps that are made as they are written, and held once they are read.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;
use serde::Serializer;
use serde::de::Error;
use serde::de::MapAccess;
use serde::de::SeqAccess;
use serde::de::Visitor;
use serde::de::value::MapAccessDeserializer;
use serde::de::value::SeqAccessDeserializer;

use crate::dump::Endpoint;
use crate::dump::RefusedResource;
use crate::dump::Text;
use crate::model;
use crate::store;
use crate::store::index::Mesh;

/// A list of a dump.
pub enum List<'a, T> {
    /// What was read.
    Read(Vec<T>),
    /// What this mesh has, made one at a time as it is written, in the order of its unique names.
    Of(&'a Mesh),
}

/// What a mesh has many of.
pub trait Part<'a>: Sized {
    /// All of a mesh, in the order of their unique names.
    fn all(mesh: &'a Mesh) -> impl Iterator<Item = Self>;
}

impl<T> List<'_, T> {
    /// What was read: nothing of a list that is written.
    pub fn read(&self) -> &[T] {
        match self {
            Self::Read(read) => read,
            Self::Of(_) => &[],
        }
    }

    /// The same, to keep.
    pub fn into_read(self) -> Vec<T> {
        match self {
            Self::Read(read) => read,
            Self::Of(_) => Vec::new(),
        }
    }
}

impl<'a> List<'a, RefusedResource<'a>> {
    pub(super) fn has_no_refusals(&self) -> bool {
        match self {
            Self::Read(read) => read.is_empty(),
            Self::Of(mesh) => mesh.refused().len() == 0,
        }
    }
}

impl<T> Default for List<'_, T> {
    fn default() -> Self {
        Self::Read(Vec::new())
    }
}

impl<'a, T: Part<'a> + Serialize> Serialize for List<'a, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Read(read) => serializer.collect_seq(read),
            Self::Of(mesh) => serializer.collect_seq(T::all(mesh)),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<'_, T> {
    /// A list that is left open (`workloads:`) is an empty one.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::Read(Option::deserialize(deserializer)?.unwrap_or_default()))
    }
}

/// Endpoints under the unique names of their workloads.
pub enum Endpoints<'a> {
    /// What was read.
    Read(BTreeMap<Text<'a>, Endpoint<'a>>),
    /// These, of that service, if it is known. Made one at a time as they are written.
    Of(Option<&'a model::service::Service>, &'a store::endpoints::Endpoints),
}

impl<'a> Endpoints<'a> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Read(read) => read.len(),
            Self::Of(_, endpoints) => endpoints.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What was read: nothing of those that are written.
    pub fn read(&self) -> impl Iterator<Item = (&Text<'a>, &Endpoint<'a>)> {
        match self {
            Self::Read(read) => Some(read.iter()),
            Self::Of(..) => None,
        }
        .into_iter()
        .flatten()
    }
}

impl Default for Endpoints<'_> {
    fn default() -> Self {
        Self::Read(BTreeMap::new())
    }
}

impl Serialize for Endpoints<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Read(read) => serializer.collect_map(read),
            // They are kept in the order of the names.
            Self::Of(service, endpoints) => serializer.collect_map(
                endpoints.iter().map(|known| (&*known.workload().uid, Endpoint::of(*service, known))),
            ),
        }
    }
}

impl<'de> Deserialize<'de> for Endpoints<'_> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Deserialize::deserialize(deserializer).map(Self::Read)
    }
}

/// The endpoints of services that are not known, under the services' names.
pub enum Staged<'a> {
    /// What was read.
    Read(BTreeMap<Text<'a>, Endpoints<'a>>),
    /// What this mesh has.
    Of(&'a Mesh),
}

impl<'a> Staged<'a> {
    /// What was read: nothing of those that are written.
    pub fn read(&self) -> impl Iterator<Item = (&Text<'a>, &Endpoints<'a>)> {
        match self {
            Self::Read(read) => Some(read.iter()),
            Self::Of(_) => None,
        }
        .into_iter()
        .flatten()
    }
}

impl Default for Staged<'_> {
    fn default() -> Self {
        Self::Read(BTreeMap::new())
    }
}

impl Serialize for Staged<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Read(read) => serializer.collect_map(read),
            Self::Of(mesh) => {
                let mut all: Vec<_> = mesh.staged().collect();
                all.sort_unstable_by_key(|(key, _)| *key);
                let all = all.into_iter();
                serializer.collect_map(all.map(|(key, known)| (key.as_str(), Endpoints::Of(None, known))))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Staged<'_> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Deserialize::deserialize(deserializer).map(Self::Read)
    }
}

/// The services that a workload is behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Memberships<'a> {
    /// As a dump has them: their names. The ports are at the services.
    Names(Vec<Text<'a>>),
    /// As they are written by hand: with the ports, service port → port of the workload.
    Ports(BTreeMap<Text<'a>, BTreeMap<Port, u16>>),
}

impl Memberships<'_> {
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Names(names) => names.is_empty(),
            Self::Ports(services) => services.is_empty(),
        }
    }
}

impl Default for Memberships<'_> {
    fn default() -> Self {
        Self::Names(Vec::new())
    }
}

impl<'de> Deserialize<'de> for Memberships<'_> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Memberships<'static>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, names: A) -> Result<Self::Value, A::Error> {
                Deserialize::deserialize(SeqAccessDeserializer::new(names)).map(Memberships::Names)
            }

            fn visit_map<A: MapAccess<'de>>(self, services: A) -> Result<Self::Value, A::Error> {
                Deserialize::deserialize(MapAccessDeserializer::new(services)).map(Memberships::Ports)
            }
        }

        deserializer.deserialize_any(Either)
    }
}

/// A port that is a key: a text where it is read, and compared as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Port(pub u16);

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Key;

        impl Visitor<'_> for Key {
            type Value = Port;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Port, E> {
                let wrong = |_| E::custom(format_args!("{text:?} is not a port"));
                text.parse().map(Port).map_err(wrong)
            }
        }

        deserializer.deserialize_str(Key)
    }
}
