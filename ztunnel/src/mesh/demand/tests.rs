//! Who asks, what is said to the source, and what is forgotten.

use std::pin::pin;

use futures_util::FutureExt;
use tokio::time::advance;

use super::*;

const SHORT: Config = Config {
    wait: Duration::from_secs(1),
    absent_for: Duration::from_secs(60),
    names_max: 3,
    waiters_max: 2,
};

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
