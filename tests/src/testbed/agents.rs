//! Nodes whose pods a node agent enrols.

use anyhow::{Context, Result};

use super::{On, Testbed};
use crate::agent::NodeAgent;
use crate::redirect::{self, Backend};
use crate::topology::Pod;

impl Testbed {
    /// Has a node agent enrol the pods of these nodes, with rules of its own. Before the daemons start.
    pub fn enrol_by_agent(&mut self, nodes: &[On], backend: Backend) -> Result<()> {
        for on in nodes.iter().copied() {
            let pods: Vec<Pod> = self.meshed_on(on).into_iter().cloned().collect();
            let pods: Vec<&Pod> = pods.iter().collect();
            for pod in &pods {
                redirect::pod(pod, backend).with_context(|| format!("rules in {}", pod.name))?;
            }
            redirect::probes(self.node(on), &pods, backend).context("rules for probes")?;
            let path = self.run.path(format!("agent-{}.sock", self.node(on).name));
            let agent = NodeAgent::start(path, &pods)?;
            self.settings[on as usize].agent = Some(agent.path().to_owned());
            self.agents[on as usize] = Some(agent);
        }
        Ok(())
    }

    /// The node agent of a node.
    pub fn agent(&self, on: On) -> Result<&NodeAgent> {
        self.agents[on as usize].as_ref().with_context(|| format!("no node agent on {on:?}"))
    }

    /// Ends the node agent of a node, or starts it again.
    pub fn replace_agent(&mut self, on: On, agent: Option<NodeAgent>) {
        self.agents[on as usize] = None;
        self.agents[on as usize] = agent;
    }

    /// The pods of a node that are in the mesh.
    pub fn meshed_on(&self, on: On) -> Vec<&Pod> {
        let name = &self.node(on).name;
        self.meshed().into_iter().chain(&self.further).filter(|pod| pod.node == *name).collect()
    }

    /// Takes back what was done to pods' rules and routes.
    pub(super) fn undo_redirection(&mut self) -> Result<()> {
        for on in super::BOTH {
            if self.settings[on as usize].agent.is_none() {
                continue;
            }
            self.agents[on as usize] = None;
            for pod in self.meshed_on(on) {
                redirect::undo(pod)?;
            }
        }
        Ok(())
    }
}
