//! The thread that owns what is in the kernel.
//!
//! Everything it does blocks (netlink, `bpf(2)`, entering network namespaces), and everything about one pod must
//! happen in order, so it is one thread with one queue of commands, and the control runtime never waits in it.
//! A pod's listeners go to the data plane before its traffic is redirected to them: a captured connection always
//! finds somebody who accepts.

use std::collections::HashMap;
use std::collections::HashSet;
use std::error::Error;
use std::io;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::sync::watch;
use tokio::time::Instant;
use ztunnel_mesh::model::addr::PodUid;
use ztunnel_mesh::model::workload::Named;
use ztunnel_mesh::source::pod::LocalPod;
use ztunnel_node::capture::Captured;
use ztunnel_node::capture::Node;
use ztunnel_node::capture::PodSpec;
use ztunnel_node::capture::error::EnrolError;
use ztunnel_node::capture::error::WithdrawError;
use ztunnel_node::capture::reconcile::Repair;
use ztunnel_node::enrol::pods::Event;
use ztunnel_node::proxy;
use ztunnel_node::proxy::DataPlane;
use ztunnel_node::proxy::Leaving;

/// Commands that may wait. Twice as many pods as a node has; a sender waits when it is full.
const QUEUE: usize = 1024;

enum Command {
    Capture(LocalPod, mpsc::Sender<Event>),
    Release(PodUid, mpsc::Sender<Event>),
    Reconcile(oneshot::Sender<Reconciled>),
    Announced(oneshot::Sender<(Reconciled, Option<Instant>)>),
    Recorded(oneshot::Sender<Vec<(PodUid, bool)>>),
    WithdrawOthers(HashSet<PodUid>),
    Hold(bool),
    Sweep(HashSet<PodUid>),
    Yield(oneshot::Sender<()>),
    Reclaim(oneshot::Sender<Result<(), EnrolError>>),
    LetGo(oneshot::Sender<()>),
    TakeBack(oneshot::Sender<Result<Vec<PodUid>, EnrolError>>),
    Close(oneshot::Sender<()>),
    End,
}

/// What a look at the kernel gave.
#[derive(Debug)]
pub enum Reconciled {
    /// It is as it should be, after these repairs; these pods are not what they were and must be captured again.
    Repaired {
        /// What was repaired, and what was not.
        repairs: Vec<Repair>,
        /// Pods whose network namespace is gone or another one.
        lost: Vec<PodUid>,
    },
    /// Another daemon owns the node now.
    Superseded,
}

/// The handle of that thread. When it is dropped, the thread ends and leaves the kernel as it is.
#[derive(Debug, Clone)]
pub struct Kernel {
    commands: mpsc::Sender<Command>,
    closed: watch::Receiver<usize>,
}

impl Kernel {
    /// Starts the thread with a node that this daemon owns.
    pub fn start(node: Node, data_plane: Arc<DataPlane>) -> io::Result<Self> {
        let (commands, receiver) = mpsc::channel(QUEUE);
        let (published, closed) = watch::channel(0);
        let worker = Worker {
            node,
            data_plane,
            pods: HashMap::new(),
            leaving: HashMap::new(),
            failed: HashMap::new(),
            unbound: HashSet::new(),
            closed: published,
            yielded: false,
            hold: false,
        };
        std::thread::Builder::new().name("capture".to_owned()).spawn(move || worker.run(receiver))?;
        Ok(Self { commands, closed })
    }

    /// How many pods cannot be captured, and are closed.
    pub fn closed(&self) -> watch::Receiver<usize> {
        self.closed.clone()
    }

    /// Captures `pod`; the answer comes as an event.
    pub async fn capture(&self, pod: LocalPod, answer: mpsc::Sender<Event>) {
        self.send(Command::Capture(pod, answer)).await;
    }

    /// Releases the pod; the answer comes as an event.
    pub async fn release(&self, uid: PodUid, answer: mpsc::Sender<Event>) {
        self.send(Command::Release(uid, answer)).await;
    }

    /// Compares the kernel with what it should hold, and repairs it.
    pub async fn reconcile(&self) -> Reconciled {
        self.ask(Command::Reconcile).await.unwrap_or(Reconciled::Superseded)
    }

    /// The same for the pods of which the kernel has announced something; and when to ask again for the others of them.
    pub async fn reconcile_announced(&self) -> (Reconciled, Option<Instant>) {
        self.ask(Command::Announced).await.unwrap_or((Reconciled::Superseded, None))
    }

    /// The pods that this or an earlier daemon captured, and whether their network namespaces still exist.
    pub async fn recorded(&self) -> Vec<(PodUid, bool)> {
        self.ask(Command::Recorded).await.unwrap_or_default()
    }

    /// Makes new connections plain of pods that an earlier daemon captured and that are not among `keep`.
    pub async fn withdraw_others(&self, keep: HashSet<PodUid>) {
        self.send(Command::WithdrawOthers(keep)).await;
    }

    /// While `hold` is true, what withdrawn pods' open connections need stays in the kernel: another daemon may
    /// have such connections.
    pub async fn hold(&self, hold: bool) {
        self.send(Command::Hold(hold)).await;
    }

    /// Removes what a dead daemon left for pods that are not among `keep`.
    pub async fn sweep(&self, keep: HashSet<PodUid>) {
        self.send(Command::Sweep(keep)).await;
    }

    /// Stops changing the kernel; when this returns nothing is under way.
    pub async fn yield_node(&self) {
        let _ended = self.ask(Command::Yield).await;
    }

    /// Takes the node back after a successor that died, and every pod's traffic with it.
    pub async fn reclaim(&self) -> Result<(), EnrolError> {
        self.ask(Command::Reclaim).await.unwrap_or(Ok(()))
    }

    /// Lets the listeners of all pods go, once a successor serves them.
    pub async fn let_go(&self) {
        let _ended = self.ask(Command::LetGo).await;
    }

    /// Takes the node back from a successor that served it and died, with new listeners in every pod. Returns the pods
    /// for which that failed.
    pub async fn take_back(&self) -> Result<Vec<PodUid>, EnrolError> {
        self.ask(Command::TakeBack).await.unwrap_or(Ok(Vec::new()))
    }

    /// Redirects new connections to nobody: they are refused until a daemon is back.
    pub async fn close(&self) {
        let _ended = self.ask(Command::Close).await;
    }

    /// Ends the thread and leaves the kernel as it is. Nothing asked for afterwards is done.
    pub async fn end(&self) {
        self.send(Command::End).await;
    }

    async fn send(&self, command: Command) {
        // The thread is gone after `end`, when nothing is to be changed any more.
        let _ended = self.commands.send(command).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (answer, receiver) = oneshot::channel();
        self.send(command(answer)).await;
        receiver.await.ok()
    }
}

/// Why a pod is not captured.
#[derive(Debug, thiserror::Error)]
enum CaptureError {
    /// Another daemon is taking the node over.
    #[error("the node is being handed over")]
    Yielded,
    /// The kernel.
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    /// The data plane.
    #[error("the data plane does not take the pod's listeners")]
    Listeners(#[source] io::Error),
}

struct Worker {
    node: Node,
    data_plane: Arc<DataPlane>,
    /// Captured pods, with what a reclaim needs to bring their traffic back; of those that a successor serves, nothing.
    pods: HashMap<PodUid, (LocalPod, PodSpec, Option<Captured>)>,
    /// Withdrawn pods with connections that are still open.
    leaving: HashMap<PodUid, Leaving>,
    /// Pods whose last capture failed, and how: the same failure is not logged at every try.
    failed: HashMap<PodUid, String>,
    /// Those of them that are there and for which nothing is prepared.
    unbound: HashSet<PodUid>,
    /// For whoever asks how many pods are closed.
    closed: watch::Sender<usize>,
    /// Another daemon changes the kernel now.
    yielded: bool,
    /// Another daemon may still have connections of withdrawn pods.
    hold: bool,
}

impl Worker {
    fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        while let Some(command) = commands.blocking_recv() {
            match command {
                Command::Capture(pod, answer) => {
                    let uid = pod.uid.clone();
                    let event = match self.capture(&pod) {
                        Ok(()) => {
                            self.failed.remove(&uid);
                            self.unbound.remove(&uid);
                            tracing::info!(pod = %uid, namespace = %pod.namespace, name = %pod.name, "pod captured");
                            Event::Captured(uid)
                        }
                        Err(error) => {
                            if matches!(&error, CaptureError::Enrol(error) if !is_absent(error)) {
                                self.unbound.insert(uid.clone());
                            }
                            let error = chain(&error);
                            if self.failed.get(&uid) != Some(&error) {
                                tracing::error!(pod = %uid, error, "pod not captured, trying again every second");
                                self.failed.insert(uid.clone(), error);
                            }
                            Event::CaptureFailed(uid)
                        }
                    };
                    // Whoever asked may be draining by now.
                    let _gone = answer.blocking_send(event);
                }
                Command::Release(uid, answer) => {
                    let event = match self.withdraw(&uid) {
                        Ok(()) => {
                            tracing::info!(pod = %uid, "pod released");
                            Event::Released(uid)
                        }
                        Err(error) => {
                            tracing::error!(pod = %uid, error = chain(&error), "pod not released, trying again");
                            Event::ReleaseFailed(uid)
                        }
                    };
                    let _gone = answer.blocking_send(event);
                }
                Command::Reconcile(answer) => {
                    let _gone = answer.send(self.reconcile());
                }
                Command::Announced(answer) => {
                    let _gone = answer.send(self.reconcile_announced());
                }
                Command::Recorded(answer) => {
                    let _gone = answer.send(self.node.recorded());
                }
                Command::WithdrawOthers(keep) => self.withdraw_others(&keep),
                Command::Hold(hold) => self.hold = hold,
                Command::Sweep(keep) => {
                    for pod in self.node.sweep(&keep) {
                        tracing::info!(%pod, "removed what an earlier daemon left of a pod");
                    }
                }
                Command::Yield(answer) => {
                    self.yielded = true;
                    self.data_plane.no_neighbours();
                    let _gone = answer.send(());
                }
                Command::Reclaim(answer) => {
                    let _gone = answer.send(self.reclaim());
                }
                Command::LetGo(answer) => {
                    self.yielded = true;
                    self.node.let_go();
                    self.pods.values_mut().for_each(|(_, _, captured)| *captured = None);
                    let _gone = answer.send(());
                }
                Command::TakeBack(answer) => {
                    let _gone = answer.send(self.take_back());
                }
                Command::End => return,
                Command::Close(answer) => {
                    self.yielded = true;
                    self.data_plane.no_neighbours();
                    self.node.close_all();
                    let _gone = answer.send(());
                }
            }
            self.publish_closed();
        }
    }

    fn publish_closed(&self) {
        let unbound = self.unbound.iter().filter(|uid| !self.node.is_closed(uid)).count();
        let closed = self.node.closed() + unbound;
        self.closed.send_if_modified(|published| std::mem::replace(published, closed) != closed);
    }

    fn capture(&mut self, pod: &LocalPod) -> Result<(), CaptureError> {
        if self.yielded {
            return Err(CaptureError::Yielded);
        }
        let spec =
            PodSpec { uid: pod.uid.clone(), netns: pod.netns.clone(), addresses: pod.addresses.clone() };
        let captured = self.node.bind(&spec)?;
        let served = proxy::PodSpec {
            uid: pod.uid.clone(),
            workload: Named::Uid(Arc::clone(&pod.workload)),
            addresses: pod.addresses.clone(),
        };
        let listeners = proxy::Listeners {
            outbound: Arc::clone(&captured.listeners.outbound),
            inbound: Arc::clone(&captured.listeners.inbound),
            hbone: Arc::clone(&captured.listeners.hbone),
        };
        self.data_plane
            .add_pod(served, listeners, Arc::clone(&captured.netns))
            .map_err(CaptureError::Listeners)?;
        self.node.capture(&spec, &captured)?;
        self.data_plane.neighbour(&pod.uid);
        self.leaving.remove(&pod.uid);
        self.pods.insert(pod.uid.clone(), (pod.clone(), spec, Some(captured)));
        Ok(())
    }

    fn withdraw_others(&mut self, keep: &HashSet<PodUid>) {
        for uid in self.node.taken_over().pods {
            if keep.contains(&uid) || self.pods.contains_key(&uid) {
                continue;
            }
            match self.node.withdraw(&uid) {
                Ok(()) => tracing::info!(pod = %uid, "pod of an earlier daemon withdrawn"),
                Err(error) => {
                    tracing::warn!(pod = %uid, error = chain(&error), "a pod of an earlier daemon stays captured");
                }
            }
        }
    }

    /// New connections are plain from here on; open ones go on, and what they need in the kernel stays.
    fn withdraw(&mut self, uid: &PodUid) -> Result<(), WithdrawError> {
        self.data_plane.no_neighbour(uid);
        let late =
            self.node.listen_for_the_late(uid).and_then(|hbone| self.data_plane.take_tunnels(uid, hbone));
        if let Err(error) = late {
            // The application has the port, say, or the pod is gone.
            tracing::debug!(pod = %uid, %error, "peers that do not know yet that the pod is released are refused");
        }
        match self.node.withdraw(uid) {
            // Nothing of it is in the kernel.
            Ok(()) | Err(WithdrawError::Unknown(_)) => {}
            Err(error) => return Err(error),
        }
        self.pods.remove(uid);
        self.failed.remove(uid);
        self.unbound.remove(uid);
        if let Some(leaving) = self.data_plane.remove_pod(uid) {
            self.leaving.insert(uid.clone(), leaving);
        }
        self.release_ended();
        Ok(())
    }

    /// Removes the rest of withdrawn pods whose last connection has ended.
    fn release_ended(&mut self) {
        if self.hold {
            return;
        }
        let ended: Vec<PodUid> = self
            .leaving
            .iter()
            .filter(|(_, leaving)| leaving.is_over())
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in ended {
            match self.node.forget(&uid) {
                Ok(()) => {
                    self.leaving.remove(&uid);
                }
                Err(error) => {
                    tracing::warn!(pod = %uid, error = chain(&error), "something is left of a pod, trying again");
                }
            }
        }
    }

    fn reconcile(&mut self) -> Reconciled {
        if self.yielded {
            return Reconciled::Repaired { repairs: Vec::new(), lost: Vec::new() };
        }
        if !self.node.is_owner() {
            return Reconciled::Superseded;
        }
        self.release_ended();
        repaired(self.node.reconcile_changed())
    }

    fn reconcile_announced(&mut self) -> (Reconciled, Option<Instant>) {
        if self.yielded {
            return (repaired(Vec::new()), None);
        }
        if !self.node.is_owner() {
            return (Reconciled::Superseded, None);
        }
        let (repairs, again) = self.node.reconcile_announced();
        (repaired(repairs), again.map(Instant::from_std))
    }

    fn reclaim(&mut self) -> Result<(), EnrolError> {
        self.node.reclaim()?;
        self.yielded = false;
        let mut result = Ok(());
        for (spec, captured) in self.pods.values().filter_map(|(_, spec, held)| Some((spec, held.as_ref()?)))
        {
            // One pod that fails must not keep the others closed.
            match self.node.capture(spec, captured) {
                Ok(()) => self.data_plane.neighbour(&spec.uid),
                Err(error) => result = Err(error),
            }
        }
        result
    }
}

impl Worker {
    fn take_back(&mut self) -> Result<Vec<PodUid>, EnrolError> {
        self.node.reclaim()?;
        self.yielded = false;
        self.data_plane.serve_again();
        let pods: Vec<LocalPod> = self.pods.values().map(|(pod, ..)| pod.clone()).collect();
        let mut failed = Vec::new();
        for pod in pods {
            // One pod that fails must not keep the others closed.
            if let Err(error) = self.capture(&pod) {
                tracing::error!(pod = %pod.uid, error = chain(&error), "pod not taken back");
                failed.push(pod.uid);
            }
        }
        Ok(failed)
    }
}

fn repaired(repairs: Vec<Repair>) -> Reconciled {
    let lost = repairs.iter().filter(|repair| repair.lost).filter_map(|repair| repair.pod.clone()).collect();
    Reconciled::Repaired { repairs, lost }
}

/// Whether it is about a pod that is not there, or not yet: nothing of it is open.
fn is_absent(error: &EnrolError) -> bool {
    matches!(error, EnrolError::Netns { .. } | EnrolError::Superseded)
}

/// An error with its causes, for a log line.
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
