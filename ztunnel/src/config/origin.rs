//! What is in force, and why: the one record of settings, whether flags, variables or files gave them.

use std::fmt;

use ztunnel_mesh::dump::Setting;

/// Where a value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said anything.
    Default,
    /// A flag.
    CommandLine,
    /// The environment variable of its name, or that of its flag.
    Environment,
    /// Another environment variable, from which it follows.
    Variable(&'static str),
    /// The YAML in the environment variable `PROXY_CONFIG`.
    ProxyConfig,
    /// `defaultConfig` of the mesh configuration file.
    MeshConfig,
    /// The machine it runs on.
    Machine,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Default => "default",
            Self::CommandLine => "command line",
            Self::Environment => "environment",
            Self::Variable(name) => name,
            Self::ProxyConfig => "PROXY_CONFIG",
            Self::MeshConfig => "mesh config",
            Self::Machine => "machine",
        })
    }
}

/// A setting as it is shown: what is in force, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The flag or variable it is known by.
    pub name: String,
    /// The value, or what may be told of it.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
}

impl From<&Shown> for Setting {
    fn from(shown: &Shown) -> Self {
        let Shown { name, value, origin } = shown;
        Self { name: name.clone(), value: value.clone(), origin: origin.to_string() }
    }
}
