//! The worker under paused time, with a certificate authority that the test plays itself.

use futures_util::future::{BoxFuture, join_all};
use tokio::time::advance;
use ztunnel_tls::revocation::Lists;
use ztunnel_tls::testing::handshake;
use ztunnel_tls::testing::{Leaf, Pki, id};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A request that the test is to answer.
struct Call {
    id: SpiffeId,
    answer: oneshot::Sender<Result<Credentials, IssueError>>,
}

/// Hands every request to the test.
struct Scripted(mpsc::UnboundedSender<Call>);

impl CertificateAuthority for Scripted {
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Credentials, IssueError>> {
        async move {
            let (answer, answered) = oneshot::channel();
            self.0.send(Call { id: identity.clone(), answer }).expect("the test listens");
            answered.await.expect("the test answers or keeps the question")
        }
        .boxed()
    }
}

/// A node with its worker, and the authority's desk.
struct Node {
    identities: Identities,
    calls: mpsc::UnboundedReceiver<Call>,
    trigger: shutdown::Trigger,
    pki: Pki,
    wall: Arc<dyn Fn() -> SystemTime + Send + Sync>,
    /// How far the wall clock was set forward, in seconds.
    set_forward: Arc<std::sync::atomic::AtomicI64>,
    began: Instant,
}

impl Node {
    fn start() -> Self {
        Self::with_jitter(0.0)
    }

    fn with_jitter(jitter: f64) -> Self {
        Self::inheriting(jitter, |_pki, _wall| Vec::new())
    }

    fn inheriting(
        jitter: f64,
        inherited: impl FnOnce(&Pki, &Arc<dyn Fn() -> SystemTime + Send + Sync>) -> Vec<Credentials>,
    ) -> Self {
        let pki = Pki::new();
        let began = Instant::now();
        let set_forward = Arc::new(std::sync::atomic::AtomicI64::new(0));
        let wall: Arc<dyn Fn() -> SystemTime + Send + Sync> = {
            let set_forward = Arc::clone(&set_forward);
            Arc::new(move || {
                let set = set_forward.load(std::sync::atomic::Ordering::Relaxed);
                let seconds = 1_800_000_000_u64.saturating_add_signed(set);
                SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) + began.elapsed()
            })
        };
        let (sender, calls) = mpsc::unbounded_channel();
        let (trigger, signal) = shutdown::channel();
        let environment = Environment { wall: Arc::clone(&wall), jitter: Box::new(move || jitter) };
        let identities = start_in(
            environment,
            Arc::new(Scripted(sender)),
            Trust::default(),
            inherited(&pki, &wall),
            signal,
        );
        Self { identities, calls, trigger, pki, wall, set_forward, began }
    }

    /// The next request to the authority, however much time passes until then.
    async fn call(&mut self) -> Call {
        self.calls.recv().await.expect("the worker runs")
    }

    /// There is no request now.
    async fn no_call(&mut self) {
        settle().await;
        assert!(self.calls.try_recv().is_err(), "the authority was asked");
    }

    /// Certifies for a day from now.
    fn grant(&self, call: Call) {
        self.grant_for(call, DAY);
    }

    fn grant_for(&self, call: Call, life: Duration) {
        let now = (self.wall)();
        let credentials = self.pki.credentials(&call.id, now, now + life);
        assert!(call.answer.send(Ok(credentials)).is_ok(), "nobody waits for the answer");
    }

    /// In the background, a connection asks.
    fn ask(&self, who: &SpiffeId) -> tokio::task::JoinHandle<Result<Arc<Credentials>, Unavailable>> {
        let (identities, who) = (self.identities.clone(), who.clone());
        shutdown::spawn(async move { identities.credentials(&who).await })
    }

    /// Certifies for a day from so many seconds after now.
    fn grant_ahead(&self, call: Call, ahead: u64) -> String {
        let from = (self.wall)() + Duration::from_secs(ahead);
        let credentials = self.pki.credentials(&call.id, from, from + DAY);
        let serial = credentials.serial().to_owned();
        assert!(call.answer.send(Ok(credentials)).is_ok(), "nobody waits for the answer");
        serial
    }

    /// The clock is set forward by so many seconds, in all.
    fn set_clock(&self, seconds: i64) {
        self.set_forward.store(seconds, std::sync::atomic::Ordering::Relaxed);
    }

    fn retain(&self, ids: &[&SpiffeId]) {
        self.identities.retain(ids.iter().copied().cloned().collect());
    }

    /// Warms one identity up.
    async fn hold(&mut self, who: &SpiffeId) {
        self.retain(&[who]);
        let call = self.call().await;
        self.grant(call);
        settle().await;
        assert!(self.identities.current(who).is_some());
    }
}

impl Call {
    fn refuse(self) {
        let refused = IssueError::Refused { reason: "not today".to_owned() };
        assert!(self.answer.send(Err(refused)).is_ok(), "nobody waits for the answer");
    }
}

/// Lets everything run that can, without time passing.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

fn account(name: &str) -> SpiffeId {
    id(&format!("spiffe://td.example/ns/shop/sa/{name}"))
}

#[tokio::test(start_paused = true)]
async fn connections_that_wait_for_one_identity_share_one_request() {
    let mut node = Node::start();
    let who = account("a");
    let waiting: Vec<_> = (0..100).map(|_| node.ask(&who)).collect();
    let call = node.call().await;
    assert_eq!(call.id, who);
    node.no_call().await;
    node.grant(call);
    let first = node.identities.credentials(&who).await.unwrap();
    for credentials in join_all(waiting).await {
        assert!(Arc::ptr_eq(&credentials.unwrap().unwrap(), &first));
    }
    node.no_call().await;
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_around_half_of_its_life() {
    for (jitter, expected) in [(0.0, 12.0), (1.0, 13.2), (-1.0, 10.8)] {
        let mut node = Node::with_jitter(jitter);
        let who = account("a");
        node.hold(&who).await;
        let old = node.identities.current(&who).unwrap();
        let call = node.call().await;
        let hours = node.began.elapsed().as_secs_f64() / 3600.0;
        assert!((hours - expected).abs() < 0.001, "renewed after {hours} hours");
        let meanwhile = node.identities.credentials(&who).await.unwrap();
        assert!(Arc::ptr_eq(&meanwhile, &old), "the old one serves until the new one is there");
        node.grant(call);
        settle().await;
        assert_ne!(node.identities.current(&who).unwrap().serial(), old.serial());
    }
}

#[tokio::test(start_paused = true)]
async fn failures_back_off_while_the_old_certificate_serves() {
    for (jitter, first) in [
        (0.0, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 150.0, 150.0]),
        (1.0, [1.2, 2.4, 4.8, 9.6, 19.2, 38.4, 76.8, 150.0, 150.0, 150.0]),
    ] {
        let mut node = Node::with_jitter(jitter);
        let who = account("a");
        node.hold(&who).await;
        let mut call = node.call().await;
        for expected in first {
            call.refuse();
            let refused = Instant::now();
            settle().await;
            assert!(node.identities.credentials(&who).await.is_ok());
            assert!(node.identities.failure(&who).is_some());
            call = node.call().await;
            let delay = refused.elapsed().as_secs_f64();
            assert!((delay - expected).abs() < 0.01, "asked again after {delay} s, not {expected}");
        }
        node.grant(call);
        settle().await;
        assert!(node.identities.failure(&who).is_none());
        let granted = Instant::now();
        node.call().await.refuse();
        assert!(granted.elapsed() > 11 * HOUR);
        let refused = Instant::now();
        node.call().await;
        assert!(refused.elapsed() < 2 * Duration::from_secs(1), "an earlier outage is forgotten");
    }
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_ended_is_not_served_and_the_reason_is_told_at_once() {
    let mut node = Node::start();
    let who = account("a");
    node.hold(&who).await;
    let end = node.identities.current(&who).unwrap().not_after();
    while (node.wall)() < end {
        assert!(node.identities.current(&who).is_some());
        node.call().await.refuse();
        settle().await;
    }
    assert!(node.identities.current(&who).is_none());
    assert_eq!(node.identities.list().len(), 1, "a dump shows what ended");
    let asked = Instant::now();
    let error = node.identities.credentials(&who).await.unwrap_err();
    assert_eq!(asked.elapsed(), Duration::ZERO);
    assert!(matches!(error, Unavailable::Failed { .. }), "{error:?}");
    let call = node.call().await;
    assert!(asked.elapsed() <= Duration::from_secs(150));
    node.grant(call);
    settle().await;
    assert!(node.identities.credentials(&who).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_connection_outwaits_a_short_outage_and_hears_of_a_long_one() {
    let mut node = Node::start();
    let (lucky, unlucky) = (account("lucky"), account("unlucky"));
    let waiting = node.ask(&lucky);
    node.call().await.refuse();
    node.call().await.refuse();
    let call = node.call().await;
    node.grant(call);
    assert!(waiting.await.unwrap().is_ok());

    let (asked, waiting) = (Instant::now(), node.ask(&unlucky));
    for _ in 0..3 {
        node.call().await.refuse();
    }
    let error = waiting.await.unwrap().unwrap_err();
    assert_eq!(asked.elapsed().as_secs(), 3);
    assert_eq!(error.to_string(), "no certificate for spiffe://td.example/ns/shop/sa/unlucky");
    let source = std::error::Error::source(&error).expect("the reason is given");
    assert_eq!(source.to_string(), "the certificate authority refused: not today");
    // Nobody keeps asking for an identity that is not retained; the next connection may.
    advance(HOUR).await;
    node.no_call().await;
    drop(node.ask(&unlucky));
    assert_eq!(node.call().await.id, unlucky);
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_does_not_answer_costs_5_s_and_is_given_up_after_a_minute() {
    let mut node = Node::start();
    let who = account("a");
    node.retain(&[&who]);
    let (asked, waiting) = (Instant::now(), node.ask(&who));
    let _silent = node.call().await;
    let error = waiting.await.unwrap().unwrap_err();
    assert_eq!(asked.elapsed(), WAIT_DEADLINE);
    assert!(matches!(error, Unavailable::Late { .. }), "{error:?}");
    assert!(error.to_string().ends_with("within 5s"), "{error}");
    settle().await;
    let failure = node.identities.failure(&who).expect("those who ask are told");
    assert!(matches!(*failure, IssueError::Unanswered(WAIT_DEADLINE)), "{failure:?}");
    let call = node.call().await;
    assert_eq!(asked.elapsed().as_secs(), 61);
    let failure = node.identities.failure(&who).expect("the request was given up");
    assert!(matches!(*failure, IssueError::Deadline(ISSUE_DEADLINE)), "{failure:?}");
    node.grant(call);
    settle().await;
    assert!(node.identities.current(&who).is_some());
}

/// The slower an authority is, the fewer requests it gets; and each of them counts.
#[tokio::test(start_paused = true)]
async fn a_slow_authority_is_waited_for_and_not_besieged() {
    let (mut most, hour) = (usize::MAX, 3600);
    for takes in [1, 6, 20, 50, 70] {
        let mut node = Node::start();
        let who = account("a");
        node.retain(&[&who]);
        let (mut asked, mut under_way, began) = (0, None, Instant::now());
        // Connections come all the time.
        while began.elapsed() < Duration::from_secs(hour) {
            drop(node.ask(&who));
            settle().await;
            if let Ok(call) = node.calls.try_recv() {
                asked += 1;
                under_way = Some((call, Instant::now()));
            }
            if let Some((call, _)) = under_way.take_if(|(_, since)| since.elapsed().as_secs() >= takes) {
                let now = (node.wall)();
                let _given_up = call.answer.send(Ok(node.pki.credentials(&call.id, now, now + DAY)));
            }
            advance(Duration::from_secs(1)).await;
        }
        assert!(asked <= most, "at {takes} s it is asked {asked} times, when it was faster {most} times");
        most = asked.max(60);
        if takes < 60 {
            assert_eq!(asked, 1, "at {takes} s");
            assert!(node.identities.current(&who).is_some());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_is_not_valid_yet_is_held_back_while_the_old_one_is() {
    let mut node = Node::start();
    let who = account("a");
    node.hold(&who).await;
    let old = node.identities.current(&who).unwrap();
    let call = node.call().await;
    let (serial, began) = (node.grant_ahead(call, 3600), Instant::now());
    settle().await;
    while began.elapsed() < HOUR {
        let current = node.identities.current(&who).expect("one of them is valid");
        assert_eq!(current.serial(), old.serial(), "after {:?}", began.elapsed());
        assert_eq!(node.identities.shortage(), None);
        advance(Duration::from_secs(10)).await;
    }
    settle().await;
    assert_eq!(node.identities.current(&who).unwrap().serial(), serial);
    node.no_call().await;
}

#[tokio::test(start_paused = true)]
async fn a_first_certificate_that_is_not_valid_yet_waits_for_its_time_and_the_reason_is_told() {
    let mut node = Node::start();
    let who = account("a");
    node.retain(&[&who]);
    let waiting = node.ask(&who);
    let mut serials = Vec::new();
    let began = Instant::now();
    // The authority's clock is 20 s ahead; it is asked again with growing delays, at 0, 1, 3, 7 and 15 s.
    for _ in 0..5 {
        let call = node.call().await;
        serials.push(node.grant_ahead(call, 20));
        settle().await;
        assert!(node.identities.current(&who).is_none());
        assert!(node.identities.usable().is_empty());
    }
    assert_eq!(began.elapsed().as_secs(), 15);
    let error = waiting.await.unwrap().unwrap_err();
    let source = std::error::Error::source(&error).expect("the reason is given").to_string();
    assert!(source.contains("valid only in 2"), "{source}");
    assert!(source.contains("compare its clock"), "{source}");
    let shortage = node.identities.shortage().expect("nobody has one");
    assert!(shortage.is_total() && shortage.reason.starts_with(who.as_str()), "{shortage:?}");
    // The first one's time has come, whatever came after it.
    advance(Duration::from_secs(21).saturating_sub(began.elapsed())).await;
    settle().await;
    assert_eq!(node.identities.current(&who).unwrap().serial(), serials[0]);
    assert_eq!(node.identities.shortage(), None);
}

#[tokio::test(start_paused = true)]
async fn certificates_made_while_the_clock_was_ahead_are_replaced_as_soon_as_it_is_right() {
    let mut node = Node::start();
    let who = account("a");
    node.hold(&who).await;
    node.set_clock(2 * 86_400);
    let ahead = node.identities.shortage().expect("the certificate has ended, for all this node knows");
    assert!(ahead.reason.contains("has ended"), "{ahead:?}");
    let waiting = node.ask(&who);
    let call = node.call().await;
    node.grant(call);
    assert!(waiting.await.unwrap().is_ok());
    assert_eq!(node.identities.shortage(), None);
    node.set_clock(0);
    assert!(node.identities.current(&who).is_none(), "peers would not accept it");
    assert!(node.identities.usable().is_empty(), "nor does the next daemon get it");
    let shortage = node.identities.shortage().expect("it is of no use");
    assert!(shortage.reason.contains("not valid yet: is the clock right?"), "{shortage:?}");
    // Also where no connection comes and the kernel does not tell that the clock was set.
    let set = Instant::now();
    let call = node.call().await;
    assert!(set.elapsed() <= LOOK_MAX, "{:?}", set.elapsed());
    node.grant(call);
    settle().await;
    assert!(node.identities.current(&who).is_some());
    assert_eq!(node.identities.shortage(), None);
}

#[tokio::test(start_paused = true)]
async fn only_some_without_a_certificate_are_counted_and_new_ones_are_not() {
    let mut node = Node::start();
    let (good, bad) = (account("good"), account("bad"));
    node.retain(&[&good, &bad]);
    settle().await;
    assert_eq!(node.identities.shortage(), None, "they are new");
    for _ in 0..2 {
        let call = node.call().await;
        if call.id == good { node.grant(call) } else { call.refuse() }
    }
    settle().await;
    let shortage = node.identities.shortage().unwrap();
    assert_eq!((shortage.lacking, shortage.of, shortage.is_total()), (1, 2, false));
    assert!(shortage.reason.contains("sa/bad") && shortage.reason.contains("not today"), "{shortage:?}");
}

#[tokio::test(start_paused = true)]
async fn at_most_eight_requests_are_under_way_and_a_connection_goes_first() {
    let mut node = Node::start();
    let many: Vec<_> = (0..20).map(|n| account(&format!("w{n:02}"))).collect();
    node.retain(&many.iter().collect::<Vec<_>>());
    let mut under_way = Vec::new();
    for expected in &many[..8] {
        let call = node.call().await;
        assert_eq!(&call.id, expected);
        under_way.push(call);
    }
    node.no_call().await;
    let (waiting, new) = (node.ask(&many[19]), node.ask(&account("new")));
    settle().await;
    let mut order = Vec::new();
    for call in under_way {
        node.grant(call);
        let call = node.call().await;
        order.push(call.id.clone());
        node.grant(call);
        let call = node.call().await;
        order.push(call.id.clone());
        node.grant(call);
        settle().await;
        if order.len() == 4 {
            break;
        }
    }
    let expected = [&many[19], &account("new"), &many[8], &many[9]];
    assert_eq!(order.iter().collect::<Vec<_>>(), expected);
    assert!(waiting.await.unwrap().is_ok());
    assert!(new.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn what_is_not_retained_is_forgotten() {
    let mut node = Node::start();
    let (stays, goes) = (account("stays"), account("goes"));
    node.retain(&[&stays, &goes]);
    for _ in 0..2 {
        let call = node.call().await;
        node.grant(call);
    }
    settle().await;
    let held: Vec<_> = node.identities.list().iter().map(|held| held.identity().clone()).collect();
    assert_eq!(held, [goes.clone(), stays.clone()]);
    node.retain(&[&stays]);
    settle().await;
    assert!(node.identities.current(&goes).is_none());
    let call = node.call().await;
    assert_eq!(call.id, stays);
    node.grant(call);
    node.no_call().await;
    assert_eq!(node.identities.list().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_leaves_during_its_request_is_not_published() {
    let mut node = Node::start();
    let who = account("a");
    node.retain(&[&who]);
    let call = node.call().await;
    node.retain(&[]);
    settle().await;
    node.grant(call);
    settle().await;
    assert!(node.identities.list().is_empty());

    // Gone and back again: the first request counts.
    node.retain(&[&who]);
    let call = node.call().await;
    node.retain(&[]);
    settle().await;
    node.retain(&[&who]);
    node.no_call().await;
    node.grant(call);
    settle().await;
    assert!(node.identities.current(&who).is_some());
}

#[tokio::test(start_paused = true)]
async fn an_identity_nobody_retains_is_certified_once() {
    let mut node = Node::start();
    let who = account("a");
    let waiting = node.ask(&who);
    let call = node.call().await;
    node.grant(call);
    assert!(waiting.await.unwrap().is_ok());
    for _ in 0..25 {
        advance(HOUR).await;
        node.no_call().await;
    }
    assert!(node.identities.list().is_empty());
    // Had it been retained before, it would have been renewed; it can still become so.
    node.hold(&who).await;
    assert_eq!(node.call().await.id, who);
}

#[tokio::test(start_paused = true)]
async fn answers_that_cannot_be_used_are_failures() {
    let mut node = Node::start();
    let (who, other) = (account("a"), account("b"));
    let now = (node.wall)();
    let wrong = node.pki.credentials(&other, now, now + DAY);
    let ended = node.pki.credentials(&who, now - DAY, now);
    node.retain(&[&who]);
    for (answer, expected) in [(wrong, "answer cannot be used"), (ended, "has already expired")] {
        assert!(node.call().await.answer.send(Ok(answer)).is_ok());
        settle().await;
        let failure = node.identities.failure(&who).unwrap().to_string();
        assert!(failure.contains(expected), "{failure}");
        assert!(node.identities.list().is_empty());
    }
    let call = node.call().await;
    assert_eq!(call.id, who);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_late_in_its_life_is_not_renewed_in_a_loop() {
    let mut node = Node::start();
    let who = account("a");
    node.retain(&[&who]);
    // An authority that gives the same certificate again and again.
    let (from, until) = ((node.wall)() - 23 * HOUR, (node.wall)() + HOUR);
    let mut asked = 0;
    while (node.wall)() < until - Duration::from_secs(30) {
        let call = node.call().await;
        asked += 1;
        if (node.wall)() < until {
            assert!(call.answer.send(Ok(node.pki.credentials(&who, from, until))).is_ok());
        }
    }
    assert!((5..20).contains(&asked), "asked {asked} times");
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_forward_is_noticed() {
    let mut node = Node::start();
    let who = account("a");
    node.hold(&who).await;
    node.set_clock(13 * 3600);
    let set = Instant::now();
    let call = node.call().await;
    assert!(set.elapsed() <= Duration::from_secs(60));
    node.grant(call);
    settle().await;
    node.set_clock(50 * 3600);
    assert!(node.identities.current(&who).is_none(), "an ended certificate is not served for a moment");
    let waiting = node.ask(&who);
    let call = node.call().await;
    node.grant(call);
    assert!(waiting.await.unwrap().is_ok());
}

struct Panicking;

impl CertificateAuthority for Panicking {
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Credentials, IssueError>> {
        assert!(identity.service_account() != "a", "expected by the test");
        std::future::ready(Err(IssueError::Refused { reason: "no panic".to_owned() })).boxed()
    }
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_panics_does_not_take_the_worker_along() {
    let (_trigger, signal) = shutdown::channel();
    let identities = start(Arc::new(Panicking), Trust::default(), signal);
    for (name, expected) in [("a", "a defect of this program"), ("b", "no panic")] {
        let error = identities.credentials(&account(name)).await.unwrap_err();
        assert!(chain(&error).contains(expected), "{}", chain(&error));
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_is_served_and_the_end_is_told() {
    let mut node = Node::start();
    node.trigger.drain();
    let (who, late) = (account("a"), account("late"));
    let waiting = node.ask(&who);
    let call = node.call().await;
    node.grant(call);
    assert!(waiting.await.unwrap().is_ok());
    let waiting = node.ask(&late);
    let _silent = node.call().await;
    node.trigger.close();
    assert!(matches!(waiting.await.unwrap(), Err(Unavailable::Stopped(_))));
    assert!(matches!(node.identities.credentials(&late).await, Err(Unavailable::Stopped(_))));
    assert!(node.identities.current(&who).is_some(), "what is held can still be used");
}

#[tokio::test(start_paused = true)]
async fn too_many_waiting_connections_are_refused_and_those_that_left_make_room() {
    let mut node = Node::start();
    let who = account("a");
    let waiting: Vec<_> = (0..WAITING_MAX).map(|_| node.ask(&who)).collect();
    let call = node.call().await;
    while node.identities.questions.capacity() < QUESTIONS_MAX {
        tokio::task::yield_now().await;
    }
    settle().await;
    let error = node.identities.credentials(&who).await.unwrap_err();
    assert!(matches!(error, Unavailable::Busy(_)), "{error:?}");
    for refused in join_all(waiting).await {
        assert!(matches!(refused.unwrap(), Err(Unavailable::Late { .. })));
    }
    let waiting = node.ask(&who);
    settle().await;
    node.grant(call);
    assert!(waiting.await.unwrap().is_ok());
}

#[tokio::test]
async fn asking_adds_little_to_the_future_of_a_connection() {
    let node = Node::start();
    let size = size_of_val(&node.identities.credentials(&account("a")));
    assert!(size <= 192, "{size} bytes");
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_is_away_for_an_hour_costs_no_connection_and_is_not_besieged() {
    let mut node = Node::start();
    let many: Vec<_> = (0..30).map(|n| account(&format!("w{n:02}"))).collect();
    node.retain(&many.iter().collect::<Vec<_>>());
    for _ in &many {
        let call = node.call().await;
        node.grant(call);
    }
    settle().await;
    // The renewals become due, and nobody answers them any more.
    let first = node.call().await;
    let began = Instant::now();
    assert!(began.duration_since(node.began) > 11 * HOUR);
    first.refuse();
    let mut asked = 1;
    while began.elapsed() < HOUR {
        let call = node.call().await;
        for who in &many {
            assert!(node.identities.current(who).is_some(), "{who} has a certificate that has not ended");
            assert!(node.identities.credentials(who).await.is_ok());
        }
        asked += 1;
        call.refuse();
    }
    // Each backs off to 150 s: 8 attempts in the first 255 s, 22 in what is left.
    assert!((30 * 25..30 * 35).contains(&asked), "asked {asked} times");
    // It is back: within the longest delay everybody has a new certificate.
    let back = Instant::now();
    let mut renewed = HashSet::new();
    while renewed.len() < many.len() {
        let call = node.call().await;
        renewed.insert(call.id.clone());
        node.grant(call);
        settle().await;
    }
    assert!(back.elapsed() <= Duration::from_secs(151), "{:?}", back.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_connection_pulls_a_retry_forward_but_many_do_not_besiege_the_authority() {
    let mut node = Node::start();
    let who = account("a");
    node.retain(&[&who]);
    for _ in 0..9 {
        node.call().await.refuse();
    }
    settle().await;
    // The next attempt is 150 s off; a connection comes a minute later and has it made at once.
    advance(Duration::from_secs(60)).await;
    let (asked, waiting) = (Instant::now(), node.ask(&who));
    let call = node.call().await;
    assert_eq!(asked.elapsed(), Duration::ZERO);
    call.refuse();
    assert!(matches!(waiting.await.unwrap(), Err(Unavailable::Failed { .. })));
    // The next ones hear of the failure at once, and only every 5 s is there another attempt.
    let (began, mut calls) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(60) {
        let waiting: Vec<_> = (0..100).map(|_| node.ask(&who)).collect();
        settle().await;
        if let Ok(call) = node.calls.try_recv() {
            calls += 1;
            call.refuse();
        }
        drop(waiting);
        advance(Duration::from_millis(500)).await;
    }
    assert!((9..=12).contains(&calls), "asked {calls} times in a minute");
    node.ask(&who);
    let call = node.call().await;
    node.grant(call);
    settle().await;
    assert!(node.identities.current(&who).is_some());
}

impl Node {
    /// Certifies for a day from now, under another root.
    fn grant_under(&self, pki: &Pki, call: Call) {
        let now = (self.wall)();
        assert!(call.answer.send(Ok(pki.credentials(&call.id, now, now + DAY))).is_ok(), "nobody waits");
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_root_is_trusted_at_once_and_shown_later() {
    let mut node = Node::start();
    let (one, other) = (account("a"), account("b"));
    node.retain(&[&one, &other]);
    for _ in 0..2 {
        let call = node.call().await;
        node.grant(call);
    }
    settle().await;
    let old = node.identities.current(&one).unwrap();
    let new = Pki::named("new root");
    let trusts = |pki: &Pki| node.identities.trust().roots().roots.contains(&pki.roots().roots[0]);
    assert!(!trusts(&new));
    let call = node.calls.recv().await.unwrap();
    let (first, began) = (call.id.clone(), Instant::now());
    node.grant_under(&new, call);
    settle().await;
    assert!(trusts(&new) && trusts(&node.pki), "peers of both sides are accepted");
    let call = node.calls.recv().await.unwrap();
    assert_ne!(call.id, first);
    assert!(began.elapsed() <= Duration::from_secs(61), "the other follows, whenever it was due");
    node.grant_under(&new, call);
    settle().await;
    for who in [&one, &other] {
        let shown = node.identities.current(who).unwrap();
        assert!(shown.leads_to(&node.pki.roots()), "peers that only know the old root are still met");
    }
    advance(5 * HOUR).await;
    settle().await;
    assert!(Arc::ptr_eq(&node.identities.current(&one).unwrap(), &old));
    advance(HOUR + Duration::from_secs(120)).await;
    settle().await;
    for who in [&one, &other] {
        let shown = node.identities.current(who).unwrap();
        assert!(shown.leads_to(&new.roots()) && !shown.leads_to(&node.pki.roots()));
    }
    // What is held back goes with its identity.
    assert!(node.calls.try_recv().is_err(), "nothing was asked for twice");
}

#[tokio::test(start_paused = true)]
async fn a_root_beside_the_old_one_changes_nothing_that_is_shown() {
    let mut node = Node::start();
    let who = account("a");
    node.hold(&who).await;
    let call = node.call().await;
    let mut both = rustls::RootCertStore::clone(&node.pki.roots());
    both.extend(Pki::named("new root").roots().roots.iter().cloned());
    let (chain, key) = node.pki.certify(Leaf {
        not_before: (node.wall)(),
        not_after: (node.wall)() + DAY,
        ..Leaf::of(who.as_str())
    });
    let credentials = Credentials::new(who.clone(), chain, key, Arc::new(both)).unwrap();
    let serial = credentials.serial().to_owned();
    assert!(call.answer.send(Ok(credentials)).is_ok());
    settle().await;
    assert_eq!(node.identities.current(&who).unwrap().serial(), serial);
    assert_eq!(node.identities.trust().roots().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_peer_of_an_unknown_root_has_the_authority_asked_but_not_again_and_again() {
    let mut node = Node::start();
    let who = account("a");
    node.hold(&who).await;
    let new = Pki::named("new root");
    let (chain, key) = new.certify(Leaf::of(account("b").as_str()));
    let stranger = Credentials::new(account("b"), chain, key, new.roots()).unwrap();
    let meet = |node: &Node| {
        let client = node.identities.current(&who).unwrap().client_config(&[account("b")]);
        handshake(client, stranger.server_config()).client.map(drop)
    };
    for _ in 0..10 {
        meet(&node).unwrap_err();
        settle().await;
    }
    let call = node.call().await;
    assert!(node.began.elapsed() < Duration::from_secs(60), "long before it is due");
    node.grant(call);
    for _ in 0..10 {
        meet(&node).unwrap_err();
        node.no_call().await;
    }
    advance(Duration::from_secs(301)).await;
    meet(&node).unwrap_err();
    let call = node.call().await;
    node.grant_under(&new, call);
    settle().await;
    let trusted = node.identities.trust().roots();
    assert!(trusted.roots.contains(&new.roots().roots[0]));
}

#[tokio::test(start_paused = true)]
async fn a_certificate_of_our_own_that_was_revoked_is_replaced() {
    let mut node = Node::start();
    let (who, other) = (account("a"), account("b"));
    node.retain(&[&who, &other]);
    for _ in 0..2 {
        let call = node.call().await;
        node.grant(call);
    }
    settle().await;
    let revoked = node.identities.current(&who).unwrap();
    let lists = node.pki.revoking(&[&revoked.chain()[0]]);
    node.identities.trust().revoke(Lists::parse(&lists).unwrap());
    let asked = Instant::now();
    let call = node.call().await;
    assert_eq!((&call.id, asked.elapsed()), (&who, Duration::ZERO));
    node.grant(call);
    settle().await;
    assert_ne!(node.identities.current(&who).unwrap().serial(), revoked.serial());
    node.no_call().await;
}

#[tokio::test(start_paused = true)]
async fn what_an_earlier_daemon_left_serves_until_it_is_due() {
    let (who, gone, ended, early) = (account("a"), account("gone"), account("ended"), account("early"));
    let left = |pki: &Pki, wall: &Arc<dyn Fn() -> SystemTime + Send + Sync>| {
        let now = wall();
        vec![
            pki.credentials(&who, now - 2 * HOUR, now + 22 * HOUR),
            pki.credentials(&gone, now - 2 * HOUR, now + 22 * HOUR),
            pki.credentials(&ended, now - DAY, now),
            pki.credentials(&early, now + HOUR, now + DAY),
        ]
    };
    let mut node = Node::inheriting(0.0, left);
    assert!(node.identities.credentials(&who).await.is_ok(), "at once");
    assert!(node.identities.current(&ended).is_none());
    assert_eq!(node.identities.list().len(), 2, "what is not valid now is not taken over");
    node.retain(&[&who]);
    settle().await;
    assert!(node.identities.current(&gone).is_none(), "no workload has it any more");
    let call = node.call().await;
    assert_eq!(call.id, who);
    let hours = node.began.elapsed().as_secs_f64() / 3600.0;
    assert!((hours - 10.0).abs() < 0.001, "renewed after {hours} hours");
    call.refuse();
    settle().await;
    assert!(node.identities.current(&who).is_some());
}

struct Brief(Scripted);

impl CertificateAuthority for Brief {
    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Credentials, IssueError>> {
        self.0.issue(identity)
    }

    fn life(&self) -> Option<Duration> {
        Some(HOUR)
    }
}

#[test]
fn only_certificates_that_live_longer_than_is_asked_for_now_are_renewed_for_it() {
    let minutes = |n: u64| Duration::from_secs(n * 60);
    for (life, asked, longer) in [
        (24 * HOUR, HOUR, true),
        // What authorities add, or take away.
        (24 * HOUR + minutes(2), 24 * HOUR, false),
        (HOUR, 24 * HOUR, false),
        (minutes(65), HOUR, false),
        (minutes(70), HOUR, true),
    ] {
        assert_eq!(is_longer(life, asked), longer, "{life:?} {asked:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_shorter_life_asked_for_holds_for_what_an_earlier_daemon_left_within_a_minute() {
    let (pki, who, began) = (Pki::new(), account("a"), Instant::now());
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let wall = Arc::new(move || start + began.elapsed());
    let environment = Environment { wall, jitter: Box::new(|| 1.0) };
    let (sender, mut calls) = mpsc::unbounded_channel();
    let left = vec![pki.credentials(&who, start - HOUR, start + 23 * HOUR)];
    let (_trigger, signal) = shutdown::channel();
    let ca = Arc::new(Brief(Scripted(sender)));
    let identities = start_in(environment, ca, Trust::default(), left, signal);
    identities.retain([who.clone()].into());
    let call = calls.recv().await.unwrap();
    assert!(began.elapsed() <= Duration::from_secs(61), "{:?}", began.elapsed());
    assert!(identities.current(&who).is_some(), "the old one serves until then");
    assert_eq!(call.id, who);
}
