//! What the node agent asks for, carried out.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::Instant;
use tokio::time::sleep_until;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::model::workload::Workload;
use ztunnel_mesh::source::pod::Awaited;
use ztunnel_mesh::source::status::Source;
use ztunnel_mesh::source::status::Trouble;
use ztunnel_node::capture;
use ztunnel_node::capture::Listeners;
use ztunnel_node::dns;
use ztunnel_node::enrol::zds::AgentPod;
use ztunnel_node::enrol::zds::link::Happened;
use ztunnel_node::enrol::zds::link::Link;
use ztunnel_node::enrol::zds::machine::Action;
use ztunnel_node::enrol::zds::machine::Event;
use ztunnel_node::enrol::zds::machine::Machine;
use ztunnel_node::enrol::zds::message;
use ztunnel_node::net::redirected::Settings;
use ztunnel_node::proxy;
use ztunnel_node::proxy::DataPlane;

use crate::app::addresses::addresses;
use crate::app::handover::HandedPod;
use crate::app::repeats::Repeats;
use crate::config::resolved::Zds;

/// Answers on their way: one per pod at most, and a node has fewer.
const ANSWERS: usize = 2048;

/// What a call of [`Agent::next`] was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Pods came or went.
    Pods,
    /// Nothing that changes which pods there are.
    Other,
}

/// Where a pod's connections arrive, and its questions for names, where these are redirected.
#[derive(Debug, Clone)]
struct Sockets {
    listeners: Arc<Listeners>,
    dns: Option<Arc<dns::server::Sockets>>,
}

/// How the capture of a pod ended: with its sockets, or why not.
type Answer = (AgentPod, Result<Sockets, String>);

/// The connection to the agent, the machine behind it, and the pods that are served.
pub(super) struct Agent {
    machine: Machine<AgentPod>,
    link: Link,
    reconciled: bool,
    /// Where it is told that the agent's list is not carried out.
    source: Source,
    zds: Zds,
    settings: Arc<Settings>,
    node: Arc<str>,
    cluster: Arc<str>,
    data_plane: Arc<DataPlane>,
    /// Where names are resolved for pods.
    dns: Option<Arc<dns::server::Dns>>,
    /// What is served, for the next daemon.
    served: HashMap<PodUid, HandedPod>,
    /// Sockets by network namespace that came from the daemon before this one, until they are used.
    inherited: HashMap<(u64, u64), Sockets>,
    answers: (mpsc::Sender<Answer>, mpsc::Receiver<Answer>),
    /// What was told of pods that cannot be served.
    repeats: Repeats,
    /// The pods that are not served yet, for those who ask.
    awaited: watch::Sender<Arc<[Awaited]>>,
}

impl Agent {
    /// Does nothing yet. The pods that are not served yet are told to `awaited`: none for now.
    pub(super) fn new(
        zds: Zds,
        node: Arc<str>,
        data_plane: Arc<DataPlane>,
        dns: Option<Arc<dns::server::Dns>>,
        source: Source,
        awaited: watch::Sender<Arc<[Awaited]>>,
    ) -> Self {
        // What another agent had to say is of no interest any more.
        awaited.send_replace(Arc::default());
        let source = source.of("the node agent's list of pods");
        source.cleared();
        Self {
            machine: Machine::default(),
            link: Link::new(zds.socket.clone()),
            reconciled: false,
            source,
            settings: Arc::new(zds.listeners.settings.clone()),
            cluster: Arc::from(&*zds.cluster),
            zds,
            node,
            data_plane,
            dns,
            served: HashMap::new(),
            inherited: HashMap::new(),
            answers: mpsc::channel(ANSWERS),
            repeats: Repeats::default(),
            awaited,
        }
    }

    /// Serves the pods of the daemon before this one, on its sockets.
    pub(super) fn inherit(&mut self, pods: Vec<HandedPod>) {
        for HandedPod { pod, listeners, dns } in pods {
            self.inherited.insert(pod.netns.id(), Sockets { listeners, dns });
            self.step(Event::Inherited(pod));
        }
    }

    /// Waits until each pod that is wanted was tried, but not for long.
    pub(super) async fn settled(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut left = self.machine.pending();
        while left > 0 {
            let answer = tokio::time::timeout_at(deadline, self.answers.1.recv()).await;
            let Ok(Some(answer)) = answer else { return };
            self.answered(answer);
            left -= 1;
        }
    }

    /// Waits until the agent's snapshot is carried out.
    pub(super) async fn reconciled(&mut self) {
        while !self.reconciled {
            self.next().await;
        }
        // What the agent does not know is not this node's any more.
        self.inherited.clear();
    }

    /// Carries out what happens next. Cancel-safe.
    pub(super) async fn next(&mut self) -> Step {
        let wake = self.machine.wake();
        let due = async {
            match wake {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // A sender is kept here, so there is always another answer to wait for.
            Some(answer) = self.answers.1.recv() => self.answered(answer),
            happened = self.link.next(self.machine.owes()) => self.happened(happened),
            () = due => self.step(Event::Tick),
        }
    }

    /// What is in doubt is meant.
    pub(super) fn confirm(&mut self) {
        self.step(Event::Confirmed);
    }

    /// Asks the agent for a new snapshot.
    pub(super) fn reconnect(&mut self) {
        self.link.close();
        self.reconciled = false;
        self.step(Event::Disconnected);
    }

    /// Whether `workload` is a pod that is served here.
    pub(super) fn serves(&self, workload: &Workload) -> bool {
        // Few pods, many workloads: most are of another node.
        (*workload.node == *self.node || workload.node.is_empty())
            && self.machine.wanted().any(|pod| self.named(pod).is(workload))
    }

    /// Whether everything is as the agent's last snapshot says, and it is there.
    pub(super) fn is_reconciled(&self) -> bool {
        self.reconciled
    }

    /// Pods that are served.
    pub(super) fn captured(&self) -> usize {
        self.machine.captured()
    }

    /// Pods that should be.
    pub(super) fn pending(&self) -> usize {
        self.machine.pending()
    }

    /// Everything that is served, for the next daemon.
    pub(super) fn handed(&self) -> Vec<HandedPod> {
        self.served.values().cloned().collect()
    }

    fn happened(&mut self, happened: Happened) -> Step {
        match happened {
            Happened::Connected => self.step(Event::Connected),
            Happened::Received(packet) => {
                let message = message::request(packet);
                if let Err(rejected) = &message {
                    tracing::warn!(error = %rejected, "a request of the node agent is refused");
                }
                self.step(Event::Message(message))
            }
            Happened::Lost(error) => {
                tracing::warn!(%error, "the node agent is gone; its pods are served as before");
                self.reconciled = false;
                self.step(Event::Disconnected)
            }
        }
    }

    fn answered(&mut self, (pod, result): Answer) -> Step {
        let uid = pod.uid.clone();
        match result {
            Ok(Sockets { listeners, dns }) => {
                tracing::info!(pod = %uid, name = %pod.name, namespace = %pod.namespace, "pod captured");
                self.repeats.forget(&uid.0);
                self.served.insert(uid.clone(), HandedPod { pod, listeners, dns });
                self.step(Event::Captured(uid))
            }
            Err(error) => {
                if self.repeats.is_news(&format!("{uid}: {error}"), Instant::now()) {
                    tracing::error!(pod = %uid, name = %pod.name, namespace = %pod.namespace, error, "pod not captured, trying again");
                }
                self.step(Event::CaptureFailed(uid, error))
            }
        }
    }

    fn step(&mut self, event: Event<AgentPod>) -> Step {
        let (mut events, mut step) = (VecDeque::from([event]), Step::Other);
        while let Some(event) = events.pop_front() {
            for action in self.machine.step(event, Instant::now()) {
                match action {
                    Action::Hello => self.send(&message::hello(), &mut events),
                    Action::Ack(answer) => {
                        if let Err(error) = &answer
                            && self.repeats.is_news(error, Instant::now())
                        {
                            tracing::warn!(error, "the node agent is told of an error");
                        }
                        self.send(&message::ack(&answer), &mut events);
                    }
                    Action::Close => {
                        self.link.close();
                        self.reconciled = false;
                    }
                    Action::Capture(pod) => {
                        step = Step::Pods;
                        self.capture(pod);
                    }
                    Action::Release(uid) => {
                        step = Step::Pods;
                        self.release(&uid);
                        events.push_back(Event::Released(uid));
                    }
                    Action::Reconciled => {
                        self.reconciled = true;
                        self.link.proved();
                        tracing::info!(pods = self.machine.captured(), "every pod is as the node agent says");
                    }
                }
            }
        }
        match self.machine.doubt() {
            Some((change, _)) => {
                let new = self.source.refusal().is_none();
                if new {
                    tracing::warn!(reason = %change, "the node agent's list is carried out if it stays so for a while");
                }
                self.source.refused(Trouble::Waiting, vec![change.to_string()], new);
            }
            None => self.source.cleared(),
        }
        if self.machine.pending() > 0 || !self.awaited.borrow().is_empty() {
            self.awaited.send_replace(self.machine.waiting().map(|pod| self.awaited_as(pod)).collect());
        }
        step
    }

    fn awaited_as(&self, pod: &AgentPod) -> Awaited {
        let [namespace, name] = [&pod.namespace, &pod.name].map(Arc::clone);
        Awaited { uid: pod.uid.clone(), namespace, name, workload: self.named(pod) }
    }

    fn send(&mut self, bytes: &[u8], events: &mut VecDeque<Event<AgentPod>>) {
        if let Err(error) = self.link.send(bytes) {
            tracing::warn!(%error, "the node agent does not listen");
            self.reconciled = false;
            events.push_back(Event::Disconnected);
        }
    }

    fn named(&self, pod: &AgentPod) -> Named {
        let AgentPod { name, namespace, service_account, .. } = pod;
        let [name, namespace, service_account] = [name, namespace, service_account].map(Arc::clone);
        let [node, cluster] = [&self.node, &self.cluster].map(Arc::clone);
        Named::Pod { name, namespace, service_account, node, cluster }
    }

    fn capture(&mut self, pod: AgentPod) {
        let known = self.served.get(&pod.uid).filter(|served| served.pod.netns.id() == pod.netns.id());
        let sockets = self.inherited.remove(&pod.netns.id()).or_else(|| {
            known.map(|served| Sockets { listeners: Arc::clone(&served.listeners), dns: served.dns.clone() })
        });
        let (data_plane, dns) = (Arc::clone(&self.data_plane), self.dns.clone());
        let zds = self.zds.clone();
        let (settings, workload) = (Arc::clone(&self.settings), self.named(&pod));
        let answers = self.answers.0.clone();
        // It enters the pod's namespace, which may take its time; the answer comes by the channel.
        let _task = spawn_blocking(move || {
            let result = serve(&pod, workload, sockets, &zds, settings, &data_plane, dns.as_deref());
            // The agent may be dropped by now: the daemon stops.
            let _gone = answers.blocking_send((pod, result));
        });
    }

    fn release(&mut self, uid: &PodUid) {
        self.served.remove(uid);
        if let Some(dns) = &self.dns {
            dns.remove_pod(uid);
        }
        if self.data_plane.remove_pod(uid).is_some() {
            tracing::info!(pod = %uid, "pod released");
        }
    }
}

/// Listens in the pod, unless the sockets are there, and takes what it sends from now on.
fn serve(
    pod: &AgentPod,
    workload: Named,
    known: Option<Sockets>,
    zds: &Zds,
    settings: Arc<Settings>,
    data_plane: &DataPlane,
    dns: Option<&dns::server::Dns>,
) -> Result<Sockets, String> {
    let (listeners, names) = known.map(|known| (known.listeners, known.dns)).unzip();
    // A daemon before this one may not have had these.
    let names = match (&zds.dns, names.flatten()) {
        (None, _) => None,
        (Some(_), Some(names)) => Some(names),
        (Some(config), None) => {
            Some(Arc::new(dns::server::bind(&pod.netns, config).map_err(|error| chain(&error))?))
        }
    };
    let listeners = match listeners {
        Some(listeners) => listeners,
        None => Arc::new(capture::rules::bind(&pod.netns, &zds.listeners).map_err(|error| chain(&error))?),
    };
    let addresses =
        addresses(&pod.netns).map_err(|error| format!("its addresses cannot be read: {error}"))?;
    let asking = dns::server::PodSpec { uid: pod.uid.clone(), workload: workload.clone() };
    let spec = proxy::PodSpec { uid: pod.uid.clone(), workload, addresses };
    let taken = proxy::Listeners {
        outbound: Arc::clone(&listeners.outbound),
        inbound: Arc::clone(&listeners.inbound),
        hbone: Arc::clone(&listeners.hbone),
    };
    // What fails leaves nothing served: the next attempt binds the same ports.
    if let (Some(dns), Some(names)) = (dns, &names) {
        dns.add_pod(asking, names, Arc::clone(&pod.netns))
            .map_err(|error| format!("the pod's DNS sockets are not taken: {error}"))?;
    }
    if let Err(error) = data_plane.add_redirected_pod(spec, taken, Arc::clone(&pod.netns), settings) {
        if let Some(dns) = dns {
            dns.remove_pod(&pod.uid);
        }
        return Err(format!("the data plane does not take the pod's listeners: {error}"));
    }
    data_plane.neighbour(&pod.uid);
    Ok(Sockets { listeners, dns: names })
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
