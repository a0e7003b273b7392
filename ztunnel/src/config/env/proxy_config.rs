//! Istio's `ProxyConfig`, as far as a node proxy heeds it: from the environment, over the mesh configuration.

use std::collections::BTreeMap;
use std::sync::Arc;

use ztunnel_objects::yaml;
use ztunnel_objects::yaml::Node;
use ztunnel_objects::yaml::Value;

use crate::config::env::reader::Problem;
use crate::config::origin::Origin;

/// Where the mesh configuration is mounted, from the working directory.
pub const MESH_CONFIG_PATH: &str = "./etc/istio/config/mesh";

/// What was said, each with where it was said.
#[derive(Debug, Default)]
pub(super) struct ProxyConfig {
    pub(super) discovery_address: Option<(String, Origin)>,
    pub(super) admin_port: Option<(u16, Origin)>,
    pub(super) stats_port: Option<(u16, Origin)>,
    pub(super) concurrency: Option<(usize, Origin)>,
    pub(super) metadata: BTreeMap<String, (String, Origin)>,
}

impl ProxyConfig {
    /// `proxy_config` over `defaultConfig` of `mesh_config`. A document that cannot be read is a problem, and counts
    /// as empty.
    pub(super) fn merged(
        proxy_config: Option<&str>,
        mesh_config: Option<&str>,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let mut merged = Self::default();
        if let Some(mesh) = mesh_config.and_then(|text| document(MESH_CONFIG_PATH, text, problems))
            && let Some(defaults) = mesh.entry("defaultConfig")
        {
            merged.take(MESH_CONFIG_PATH, &defaults.value, Origin::MeshConfig, problems);
        }
        if let Some(config) = proxy_config.and_then(|text| document("PROXY_CONFIG", text, problems)) {
            merged.take("PROXY_CONFIG", &config, Origin::ProxyConfig, problems);
        }
        merged
    }

    fn take(&mut self, source: &str, config: &Node, origin: Origin, problems: &mut Vec<Problem>) {
        if let Some(address) = config.text("discoveryAddress") {
            self.discovery_address = Some((address.to_owned(), origin));
        }
        let mut number = |key: &str, max: usize| {
            let text = config.text(key)?;
            let number = text.parse::<usize>().ok().filter(|number| *number <= max);
            if number.is_none() {
                let accepted = format!("use a whole number from 0 to {max}");
                problems.push(Problem { name: format!("{source}: {key}"), value: text.to_owned(), accepted });
            }
            Some((number?, origin))
        };
        let port = |(number, origin): (usize, Origin)| Some((u16::try_from(number).ok()?, origin));
        let ports = usize::from(u16::MAX);
        self.admin_port = number("proxyAdminPort", ports).and_then(port).or(self.admin_port);
        self.stats_port = number("statsPort", ports).and_then(port).or(self.stats_port);
        self.concurrency = number("concurrency", 4096).or(self.concurrency);
        let Some(metadata) = config.entry("proxyMetadata").filter(|entry| !entry.value.is_null()) else {
            return;
        };
        let Value::Map(entries) = &metadata.value.value else {
            let (name, value) = (format!("{source}: proxyMetadata"), String::new());
            problems.push(Problem { name, value, accepted: "use a mapping of names to texts".to_owned() });
            return;
        };
        for entry in entries {
            match metadata.value.text(&entry.key) {
                Some(text) => {
                    self.metadata.insert(entry.key.to_string(), (text.to_owned(), origin));
                }
                None => problems.push(Problem {
                    name: format!("{source}: proxyMetadata: {}", entry.key),
                    value: String::new(),
                    accepted: "use a text".to_owned(),
                }),
            }
        }
    }
}

/// The one document of `text`.
fn document(source: &str, text: &str, problems: &mut Vec<Problem>) -> Option<Arc<Node>> {
    let refuse = |accepted: String| Problem { name: source.to_owned(), value: String::new(), accepted };
    match yaml::documents(text) {
        Ok(documents) => {
            let mut documents = documents.into_iter();
            let first = documents.next()?;
            if documents.next().is_some() || !matches!(first.value, Value::Map(_)) {
                problems.push(refuse("use one YAML mapping".to_owned()));
                return None;
            }
            Some(first)
        }
        Err((line, error)) => {
            problems.push(refuse(format!("use YAML: line {line}: {error}")));
            None
        }
    }
}
