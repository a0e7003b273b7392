//! A mesh written as Istio's `config_dump` shows it: workloads, services and policies, in YAML or JSON.
//!
//! ```yaml
//! workloads:
//! - uid: cluster1//Pod/shop/cart-1
//!   name: cart-1
//!   namespace: shop
//!   serviceAccount: cart
//!   workloadIps: [10.0.0.1]
//!   protocol: HBONE
//!   node: node-1
//!   services: {shop/cart.shop.svc.cluster.local: {80: 8080}}
//! services:
//! - name: cart
//!   namespace: shop
//!   hostname: cart.shop.svc.cluster.local
//!   vips: [/10.96.0.1]
//!   ports: {80: 8080}
//! policies:
//! - {name: viewers, namespace: shop, scope: Namespace, action: Allow, rules: [[[{principals: [{Exact: td/ns/a/sa/b}]}]]]}
//! ```
//!
//! What is left out is as in the dump, which leaves out the same. One thing is written in another place than there:
//! which ports a workload serves a service at is said at the workload. Every value that does not fit is an error with
//! its line, as is every field that is not known: a policy with a misspelt one would let in whom it does not.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;
use std::path::PathBuf;
use std::sync::Arc;

use ztunnel_mesh::dump::Given;
use ztunnel_mesh::dump::Memberships;
use ztunnel_mesh::dump::Misfit;
use ztunnel_mesh::dump::Policy;
use ztunnel_mesh::dump::Service;
use ztunnel_mesh::dump::Workload;
use ztunnel_mesh::model;
use ztunnel_mesh::model::identity::TrustDomain;
use ztunnel_mesh::store::index::Mesh;

use crate::decode::HINTS_MAX;
use crate::diagnostic::Diagnostic;
use crate::diagnostic::nearest;
use crate::file::BYTES_MAX;
use crate::file::display;
use crate::file::read_text;
use crate::yaml;
use crate::yaml::Node;
use crate::yaml::decoder::decode;

#[cfg(test)]
mod tests;

/// Where such a mesh is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In this file.
    File(PathBuf),
    /// In a variable of this name, which holds this text.
    Variable(&'static str, String),
}

/// Reads the mesh at `place`, all of it or nothing. Blocks.
pub fn load(place: &Place) -> Result<Mesh, Vec<Diagnostic>> {
    match place {
        Place::File(path) => {
            let name = display(path);
            let text = read_text(path, BYTES_MAX);
            let unread = |error| vec![Diagnostic::error(&name, 0, format!("cannot be read: {error}"))];
            read(&name, &text.map_err(unread)?)
        }
        Place::Variable(name, text) => read(&Arc::from(*name), text),
    }
}

/// Reads a mesh; `name` is what its text is called.
fn read(name: &Arc<str>, text: &str) -> Result<Mesh, Vec<Diagnostic>> {
    let said = |line, message: String| vec![Diagnostic::error(name, line, message)];
    let documents = yaml::documents(text).map_err(|(line, error)| said(line, error.to_string()))?;
    let root = match &documents[..] {
        [] => return Ok(Mesh::default()),
        [root] => root,
        [_, second, ..] => return Err(said(second.line, "a second document: write all in one".to_owned())),
    };
    let unknown = RefCell::default();
    let given: Given<'static> = decode(root, &unknown)
        .map_err(|error| vec![Diagnostic::error(name, error.line, error.to_string()).hint(error.hint)])?;
    let mut wrong = Vec::new();
    for field in unknown.into_inner() {
        let near =
            (wrong.len() < HINTS_MAX).then(|| nearest(&field.field, field.known.iter().copied())).flatten();
        let hint = near.map_or(String::new(), |known| format!("write {known} instead"));
        let message = format!("{} is not a field of {}", field.field, field.within);
        wrong.push(Diagnostic::error(name, field.line, message).hint(hint));
    }
    let mut reading = Reading { name, root, wrong };
    let workloads =
        reading.all("workloads", given.workloads.into_read(), workload, |known| Arc::clone(&known.uid));
    let services = reading.all("services", given.services.into_read(), service, |known| known.key.clone());
    let policies = reading.all("policies", given.policies.into_read(), policy, |known| known.key.clone());
    match reading.wrong.is_empty() {
        true => Ok(Mesh::new(TrustDomain::default(), workloads, services, policies)),
        false => Err(reading.wrong),
    }
}

/// What is wrong so far.
struct Reading<'a> {
    name: &'a Arc<str>,
    root: &'a Node,
    wrong: Vec<Diagnostic>,
}

impl Reading<'_> {
    /// Makes what a list holds, each of which has a name of its own.
    fn all<F, T, K: Hash + Eq + fmt::Display>(
        &mut self,
        list: &str,
        from: Vec<F>,
        make: fn(F) -> Result<T, Misfit>,
        key: fn(&T) -> K,
    ) -> Vec<Arc<T>> {
        let (mut all, mut seen) = (Vec::new(), HashSet::new());
        for (index, one) in from.into_iter().enumerate() {
            let made = make(one).and_then(|made| match seen.insert(key(&made)) {
                true => Ok(made),
                false => Err(Misfit::of_entry(format_args!("{} is there twice", key(&made)))),
            });
            match made {
                Ok(made) => all.push(Arc::new(made)),
                Err(misfit) => self.wrong.push(self.misfit(list, index, &misfit)),
            }
        }
        all
    }

    /// What is wrong with the entry `index` of `list`, at the line of what does not fit.
    fn misfit(&self, list: &str, index: usize, misfit: &Misfit) -> Diagnostic {
        let index = format!("[{index}]");
        let (mut shown, mut path) = (list.to_owned(), vec![list]);
        for segment in std::iter::once(&index).chain(&misfit.path) {
            let item = segment.strip_prefix('[').and_then(|item| item.strip_suffix(']'));
            shown.extend(item.is_none().then_some("."));
            shown.push_str(segment);
            path.push(item.unwrap_or(segment));
        }
        path.extend(misfit.key.as_deref());
        Diagnostic::error(self.name, self.root.line_of(&path), format!("{shown}: {misfit}"))
    }
}

/// A workload, with the names that its cluster gives those that have none.
fn workload(mut from: Workload<'static>) -> Result<model::workload::Workload, Misfit> {
    if let Memberships::Names(names) = &from.services
        && !names.is_empty()
    {
        return Err(Misfit::of_field("services", "expected a mapping, found a list"));
    }
    if from.cluster_id.is_empty() {
        from.cluster_id = "Kubernetes".into();
    }
    if from.uid.is_empty() {
        from.uid = format!("{}//Pod/{}/{}", from.cluster_id, from.namespace, from.name).into();
    }
    from.read()
}

fn service(from: Service<'static>) -> Result<model::service::Service, Misfit> {
    if !from.endpoints.is_empty() {
        return Err(Misfit::of_entry(
            "endpoints are not written here: name the service at its workloads (services)",
        ));
    }
    from.read()
}

fn policy(from: Policy<'static>) -> Result<model::policy::Policy, Misfit> {
    from.read()
}
