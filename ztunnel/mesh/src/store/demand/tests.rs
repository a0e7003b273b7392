//! Who asks, what is said to the source, and what is forgotten.

use std::pin::pin;

use futures_util::FutureExt;
use tokio::time::advance;

use super::*;
use crate::model::service::GatewayAddress;
use crate::model::service::GatewayDestination;
use crate::model::service::Service;
use crate::model::service::ServiceKey;
use crate::model::workload::Membership;
use crate::model::workload::Workload;
use crate::store::MeshChange;
use crate::store::MeshReader;
use crate::store::MeshWriter;
use crate::store::mesh;

const SHORT: Config = Config {
    wait: Duration::from_secs(1),
    absent_for: Duration::from_secs(60),
    names_max: 3,
    waiters_max: 2,
    unused_for: Duration::from_secs(1800),
    found_max: 8,
};
/// After it, use is recorded as of another time.
const EPOCH: Duration = Duration::from_secs(60);

fn names(all: &[&str]) -> Vec<Arc<str>> {
    all.iter().map(|name| Arc::from(*name)).collect()
}

fn requests(unsubscribe: &[&str], subscribe: &[&str]) -> Requests {
    Requests { unsubscribe: names(unsubscribe), subscribe: names(subscribe) }
}

fn next(demands: &mut Demands) -> Option<Requests> {
    demands.next().now_or_never()
}

#[tokio::test(start_paused = true)]
async fn one_name_is_asked_for_once_and_all_who_wait_are_told() {
    let (demand, mut demands) = channel(SHORT);
    assert!(demands.connected().is_empty());
    let (mut first, mut second) = (pin!(demand.look_up("n/1")), pin!(demand.look_up("n/1")));
    assert!(first.as_mut().now_or_never().is_none() && second.as_mut().now_or_never().is_none());
    assert_eq!(next(&mut demands), Some(requests(&[], &["n/1"])));
    assert_eq!(next(&mut demands), None);
    assert_eq!(demand.look_up("n/1").await, Err(NoAnswer::Busy), "two may wait");
    demands.is_there("uid", &["other/1".into(), "n/1".into()]);
    assert_eq!((first.await, second.await), (Ok(()), Ok(())));
    // Who had an old snapshot asks again, and it is not asked for again.
    assert_eq!(demand.look_up("n/1").await, Ok(()));
    assert_eq!(next(&mut demands), None);
    // It is gone, and another may have its address next.
    demands.is_gone("uid");
    assert!(demand.look_up("n/1").now_or_never().is_none());
    assert_eq!(next(&mut demands), Some(requests(&["n/1"], &["n/1"])));
}

#[tokio::test(start_paused = true)]
async fn without_an_answer_in_time_there_is_none_and_who_answers_late_is_heard() {
    let (demand, mut demands) = channel(SHORT);
    demands.connected();
    assert_eq!(demand.look_up("n/1").await, Err(NoAnswer::Late(SHORT.wait)));
    assert_eq!(demand.look_up("n/1").await, Err(NoAnswer::Late(SHORT.wait)));
    assert_eq!(next(&mut demands), Some(requests(&[], &["n/1"])), "asked for once");
    demands.is_gone("n/1");
    assert_eq!(demand.look_up("n/1").now_or_never(), Some(Ok(())));
    // It comes to be there: who asks finds it in the mesh.
    demands.is_there("n/1", &[]);
    assert_eq!(demand.look_up("n/1").now_or_never(), Some(Ok(())));
    assert_eq!(demands.tally().results(), [("answered", 0), ("known", 2), ("late", 2), ("busy", 0)]);
}

#[tokio::test(start_paused = true)]
async fn what_is_not_there_is_forgotten_after_a_while_but_not_without_a_source() {
    let (demand, mut demands) = channel(SHORT);
    demands.connected();
    for name in ["n/1", "n/2"] {
        assert!(demand.look_up(name).now_or_never().is_none());
    }
    next(&mut demands);
    demands.is_gone("n/1");
    demands.disconnected();
    advance(SHORT.absent_for * 2).await;
    assert_eq!(demand.look_up("n/1").now_or_never(), Some(Ok(())));
    // A new source is told what is wanted, and not what was to be said to the one before.
    assert!(demand.look_up("n/3").now_or_never().is_none());
    let mut wanted = demands.connected();
    wanted.sort_unstable();
    assert_eq!(wanted, names(&["n/1", "n/2", "n/3"]));
    let mut forgotten = next(&mut demands).expect("something").unsubscribe;
    forgotten.sort_unstable();
    assert_eq!(forgotten, names(&["n/1", "n/2"]));
    assert!(demand.look_up("n/1").now_or_never().is_none(), "asked for anew");
    assert_eq!(next(&mut demands), Some(requests(&[], &["n/1"])));
    // By itself, too.
    demands.is_gone("n/1");
    demands.is_gone("n/3");
    let mut forgotten = demands.next().await.unsubscribe;
    forgotten.sort_unstable();
    assert_eq!(forgotten, names(&["n/1", "n/3"]));
}

#[tokio::test(start_paused = true)]
async fn there_are_only_so_many_names() {
    let (demand, mut demands) = channel(SHORT);
    demands.connected();
    let mut waiting: Vec<_> = ["n/1", "n/2", "n/3"].map(|name| Box::pin(demand.look_up(name))).into();
    for it in &mut waiting {
        assert!(it.as_mut().now_or_never().is_none());
        advance(Duration::from_millis(1)).await;
    }
    assert_eq!(demand.look_up("n/4").now_or_never(), Some(Err(NoAnswer::Busy)), "all are waited for");
    next(&mut demands);
    demands.is_gone("n/2");
    assert!(demand.look_up("n/4").now_or_never().is_none());
    advance(Duration::from_millis(1)).await;
    assert_eq!(
        next(&mut demands),
        Some(requests(&["n/2"], &["n/4"])),
        "what is known not to be there makes room"
    );
    // What was found takes none.
    demands.is_there("n/1", &[]);
    assert!(demand.look_up("n/5").now_or_never().is_none());
    advance(Duration::from_millis(1)).await;
    assert_eq!(next(&mut demands), Some(requests(&[], &["n/5"])));
    // What was never said is not taken back.
    assert!(demand.look_up("n/6").now_or_never().is_none());
    advance(Duration::from_millis(1)).await;
    assert!(demand.look_up("n/7").now_or_never().is_none());
    let said = next(&mut demands).expect("something");
    assert_eq!((said.subscribe.len(), said.unsubscribe.len()), (2, 2));
}

/// Both ends, and the mesh between them, as the client of a control plane keeps it.
struct Plane {
    demand: Demand,
    demands: Demands,
    writer: MeshWriter,
    reader: MeshReader,
}

impl Plane {
    fn new(config: Config) -> Self {
        let (demand, mut demands) = channel(config);
        let (writer, reader) = mesh();
        demands.connected();
        Self { demand, demands, writer, reader }
    }

    /// Asks for what is not there, and is answered.
    fn find(&mut self, asked: &str, found: Workload) {
        let demand = self.demand.clone();
        let mut waiting = pin!(demand.look_up(asked));
        assert!(waiting.as_mut().now_or_never().is_none(), "{asked} was not asked for");
        let uid = Arc::clone(&found.uid);
        self.writer.apply([MeshChange::Workload(Arc::new(found))]);
        self.demands.is_there(&uid, &[asked.to_owned()]);
        assert_eq!(waiting.now_or_never(), Some(Ok(())));
    }

    fn comes(&mut self, change: MeshChange) {
        let name = match &change {
            MeshChange::Workload(it) => it.uid.to_string(),
            MeshChange::Service(it) => it.key.as_str().to_owned(),
            other => panic!("{other:?}"),
        };
        self.writer.apply([change]);
        self.demands.is_there(&name, &[]);
    }

    fn unsubscribe_unused(&mut self) -> Vec<String> {
        let unused = self.demands.unused(self.writer.mesh(), "own");
        self.demands.unsubscribe(&unused);
        self.writer.apply(unused.iter().map(|name| MeshChange::RemoveAddress(Arc::from(&**name))));
        unused.iter().map(|name| name.to_string()).collect()
    }

    /// Time goes on by so many epochs. Gives what was unsubscribed from, in order.
    fn pass(&mut self, epochs: u32) -> Vec<String> {
        let mut gone = Vec::new();
        for _ in 0..epochs {
            self.demands.next_epoch();
            gone.extend(self.unsubscribe_unused());
        }
        gone
    }
}

fn pod(name: &str, services: &[&str]) -> Workload {
    let member = |name: &&str| Membership {
        service: ServiceKey::new("shop", &format!("{name}.shop")),
        ports: Arc::default(),
    };
    Workload {
        node: Arc::from("far"),
        services: services.iter().map(member).collect(),
        ..Workload::sample("shop", name)
    }
}

fn behind(waypoint: &str, workload: Workload) -> Workload {
    let destination = GatewayDestination::Hostname(ServiceKey::new("shop", &format!("{waypoint}.shop")));
    Workload { waypoint: Some(Arc::new(GatewayAddress { destination, hbone_port: 15008 })), ..workload }
}

#[tokio::test(start_paused = true)]
async fn what_nobody_uses_is_unsubscribed_from_and_asked_for_anew() {
    let mut plane = Plane::new(SHORT);
    for name in ["a", "b"] {
        plane.find(&format!("n/{name}"), pod(name, &[]));
    }
    // What came by itself, and what is this node's own.
    plane.comes(MeshChange::Workload(Arc::new(pod("c", &[]))));
    plane.comes(MeshChange::Workload(Arc::new(Workload { node: Arc::from("own"), ..pod("own", &[]) })));
    next(&mut plane.demands);
    assert!(plane.pass(EPOCHS - 1).is_empty());
    plane.demand.touch("b");
    let mut gone = plane.pass(1);
    gone.sort_unstable();
    assert_eq!(gone, ["a", "c"]);
    let mut said = next(&mut plane.demands).expect("something");
    said.unsubscribe.sort_unstable();
    assert_eq!(said, requests(&["a", "c", "n/a"], &[]));
    let mesh = plane.reader.snapshot();
    assert!(mesh.workload("a").is_none() && mesh.workload("b").is_some() && mesh.workload("own").is_some());
    assert_eq!(plane.demands.tally().unsubscribed(), 2);
    // Asked for anew.
    plane.find("n/a", pod("a", &[]));
    assert_eq!(plane.pass(EPOCHS - 1), ["b"]);
    assert_eq!(plane.pass(EPOCHS), ["a"]);
    assert!(plane.pass(3 * EPOCHS).is_empty(), "what is this node's own stays");
}

#[tokio::test(start_paused = true)]
async fn time_without_a_source_does_not_count() {
    let mut plane = Plane::new(SHORT);
    plane.find("n/a", pod("a", &[]));
    assert_eq!(plane.demands.epoch_ends(), Instant::now() + EPOCH);
    plane.demands.disconnected();
    advance(SHORT.unused_for * 3).await;
    plane.demands.connected();
    assert!(plane.demands.epoch_ends() < Instant::now());
    assert!(plane.pass(1).is_empty());
    assert_eq!(plane.demands.epoch_ends(), Instant::now() + EPOCH);
}

#[tokio::test(start_paused = true)]
async fn what_others_rely_on_is_used_as_they_are() {
    let mut plane = Plane::new(Config { found_max: 100, ..SHORT });
    let service = |name: &str| MeshChange::Service(Arc::new(Service::sample("shop", name)));
    plane.comes(service("cart"));
    plane.comes(service("way"));
    plane.comes(service("idle"));
    plane.comes(MeshChange::Workload(Arc::new(behind("way", pod("cart-1", &["cart"])))));
    plane.comes(MeshChange::Workload(Arc::new(pod("cart-2", &["cart"]))));
    plane.comes(MeshChange::Workload(Arc::new(pod("way-1", &["way"]))));
    plane.comes(MeshChange::Workload(Arc::new(pod("idle-1", &["idle"]))));
    // The service alone: its endpoints stay, but nobody went through the waypoint of one.
    plane.pass(EPOCHS / 2);
    plane.demand.touch("shop/cart.shop");
    let mut gone = plane.pass(EPOCHS / 2);
    assert!(gone[..2].iter().all(|name| name.contains('/')), "services go first: {gone:?}");
    gone.sort_unstable();
    assert_eq!(gone, ["idle-1", "shop/idle.shop", "shop/way.shop", "way-1"]);
    // An endpoint, and with it what is in front of it.
    plane.comes(service("way"));
    plane.comes(MeshChange::Workload(Arc::new(pod("way-1", &["way"]))));
    plane.pass(EPOCHS / 3);
    plane.demand.touch("cart-1");
    let mut gone = plane.pass(EPOCHS - EPOCHS / 3);
    gone.sort_unstable();
    assert_eq!(gone, ["cart-2", "shop/cart.shop"]);
    let mut gone = plane.pass(EPOCHS);
    gone.sort_unstable();
    assert_eq!(gone, ["cart-1", "shop/way.shop", "way-1"]);
}

#[tokio::test(start_paused = true)]
async fn of_too_much_the_least_recently_used_goes_but_nothing_that_is_in_use() {
    let mut plane = Plane::new(SHORT);
    for nth in 0..SHORT.found_max {
        plane.find(&format!("n/{nth}"), pod(&nth.to_string(), &[]));
        assert!(plane.pass(1).is_empty());
    }
    assert!(!plane.demands.is_crowded());
    plane.demand.touch("0");
    plane.comes(MeshChange::Workload(Arc::new(pod("8", &[]))));
    assert!(plane.demands.is_crowded());
    assert_eq!(plane.unsubscribe_unused(), ["1", "2"], "and some room is made");
    assert!(!plane.demands.is_crowded());

    // All in use: it is more then, to a point.
    for nth in 100.. {
        let demand = plane.demand.clone();
        let asked = demand.look_up(&format!("n/{nth}")).now_or_never();
        if asked == Some(Err(NoAnswer::Busy)) {
            break;
        }
        plane.comes(MeshChange::Workload(Arc::new(pod(&nth.to_string(), &[]))));
        if plane.demands.is_crowded() {
            plane.unsubscribe_unused();
        }
        plane.demands.is_gone(&format!("n/{nth}"));
    }
    assert_eq!(plane.reader.snapshot().workloads().len(), SHORT.found_max * CROWD);
    assert!(!plane.demands.is_crowded(), "it was looked for in vain");
    plane.pass(2);
    assert_eq!(plane.reader.snapshot().workloads().len(), SHORT.found_max - 1);
    advance(SHORT.absent_for).await;
    assert!(plane.demand.look_up("n/other").now_or_never().is_none(), "there is room again");
}

#[tokio::test(start_paused = true)]
async fn what_comes_after_it_was_unsubscribed_from_is_subscribed_to_again() {
    let mut plane = Plane::new(SHORT);
    plane.find("n/a", pod("a", &[]));
    assert_eq!(plane.pass(EPOCHS), ["a"]);
    next(&mut plane.demands);
    // It was on its way.
    plane.comes(MeshChange::Workload(Arc::new(pod("a", &[]))));
    assert_eq!(next(&mut plane.demands), Some(requests(&[], &["a"])));
    plane.comes(MeshChange::Workload(Arc::new(pod("a", &[]))));
    assert_eq!(next(&mut plane.demands), None, "once");
    // Another source was never told.
    assert_eq!(plane.pass(EPOCHS), ["a"]);
    plane.demands.disconnected();
    assert!(plane.demands.connected().is_empty(), "it is not wanted");
    plane.comes(MeshChange::Workload(Arc::new(pod("a", &[]))));
    assert_eq!(next(&mut plane.demands), None);
}

#[tokio::test(start_paused = true)]
async fn memory_does_not_grow_with_names_that_come_and_go() {
    let bounds = Config { found_max: 100, names_max: 16, ..SHORT };
    let mut plane = Plane::new(bounds);
    for nth in 0..100_000 {
        plane.find(&format!("n/{nth}"), pod(&nth.to_string(), &["cart"]));
        if nth % 8 == 0 {
            // One that is not there, either.
            assert!(plane.demand.look_up(&format!("none/{nth}")).now_or_never().is_none());
            plane.demands.is_gone(&format!("none/{nth}"));
        }
        next(&mut plane.demands);
        if plane.demands.is_crowded() {
            plane.unsubscribe_unused();
        }
        if nth % 20 == 0 {
            advance(EPOCH).await;
            plane.pass(1);
        }
    }
    let table = plane.demands.shared.lock();
    // What is in use may be a little more.
    let max = bounds.found_max + 40;
    assert!(table.there.len() <= max && table.found <= max, "{} {}", table.there.len(), table.found);
    assert!(table.entries.len() <= max + bounds.names_max, "{}", table.entries.len());
    // Those of some minutes.
    assert!(
        table.unsubscribed.len() <= 300 && table.unsubscribed.capacity() < 2000,
        "{}",
        table.unsubscribed.len()
    );
    assert!(table.there.capacity() < 1000 && table.entries.capacity() < 1000);
    assert_eq!(plane.reader.snapshot().workloads().len(), table.there.len());
    assert_eq!(plane.reader.snapshot().staged().count(), 1);
    assert_eq!(table.requests, Requests::default());
}
