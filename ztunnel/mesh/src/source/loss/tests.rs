use super::*;

const NODE: &str = "/run/netns/";

/// A version in which each pod is named `namespace/name` with a letter before it: `+` is captured here, `~` enrolled on
/// another node, `-` told to leave, `n` out by its namespace, `?` unclear.
fn census(pods: &[&str]) -> Census {
    let pod = |text: &&str| {
        let (letter, name) = text.split_at(1);
        let stance = match letter {
            "+" => Stance::Here(PathBuf::from(format!("{NODE}{name}"))),
            "~" => Stance::Elsewhere,
            "-" => Stance::Told,
            "n" => Stance::ByNamespace,
            "?" => Stance::Unclear,
            other => panic!("{other}"),
        };
        (Arc::from(name), (PodUid(Arc::from(name)), stance))
    };
    let files = BTreeMap::from([(
        Arc::from("mesh.yaml"),
        // With a namespace.
        FileCensus { objects: pods.len() + 1, ..FileCensus::default() },
    )]);
    Census { pods: pods.iter().map(pod).collect(), files, ..Census::default() }
}

fn complete(census: Census) -> Census {
    Census { complete: true, ..census }
}

fn judged(before: &Census, after: &Census, gone: &[&str]) -> Verdict {
    Change::between(before, after, |netns| gone.iter().any(|name| netns == Path::new(NODE).join(name)))
        .judge()
}

#[test]
fn the_rule() {
    use Verdict::{Apply, Hold, Wait};
    let none: &[&str] = &[];
    for (why, before, after, gone, expected) in [
        ("nothing changes", &["+a", "+b"][..], &["+a", "+b"][..], none, Apply),
        ("one comes", &["+a"], &["+a", "+b"], none, Apply),
        ("all are told to leave", &["+a", "+b"], &["-a", "-b"], none, Apply),
        ("all are gone", &["+a", "+b"], &[], &["a", "b"], Apply),
        ("the last one is gone", &["+a"], &[], &["a"], Apply),
        ("the last one is missing", &["+a"], &[], none, Hold),
        ("all are missing", &["+a", "+b", "~c"], &[], none, Hold),
        ("most are missing", &["+a", "+b", "+c"], &["+c"], none, Hold),
        ("most are missing, of other nodes", &["~a", "~b", "+c"], &["+c"], none, Hold),
        ("most are unclear", &["+a", "+b", "+c"], &["?a", "?b", "+c"], none, Hold),
        ("one of two is missing", &["+a", "+b"], &["+b"], none, Wait),
        ("one of many is missing", &["+a", "+b", "+c"], &["+b", "+c"], none, Wait),
        ("one of many is missing, of another node", &["~a", "+b", "+c"], &["+b", "+c"], none, Apply),
        ("one of many is unclear", &["+a", "+b", "+c"], &["?a", "+b", "+c"], none, Wait),
        ("all are on another node", &["+a", "+b"], &["~a", "~b"], none, Apply),
        ("one of many is gone", &["+a", "+b", "+c"], &["+b", "+c"], &["a"], Apply),
        ("one namespace of many leaves", &["+a", "+b", "+c"], &["na", "+b", "+c"], none, Wait),
        (
            "one namespace of many leaves, of another node",
            &["~a", "+b", "+c"],
            &["na", "+b", "+c"],
            none,
            Apply,
        ),
        ("every namespace leaves", &["+a", "+b"], &["na", "nb"], none, Wait),
        ("one is told to, the other is missing", &["+a", "+b"], &["-a"], none, Hold),
        ("some are gone, of the others most are missing", &["+a", "+b", "+c"], &[], &["a", "b"], Hold),
    ] {
        assert_eq!(judged(&census(before), &census(after), gone), expected, "{why}");
    }
}

#[test]
fn a_source_that_is_complete_is_believed_after_a_while() {
    let before = census(&["+a", "+b", "+c"]);
    assert_eq!(judged(&before, &complete(census(&[])), &[]), Verdict::Wait);
    assert_eq!(judged(&before, &complete(census(&["+a"])), &[]), Verdict::Wait);
    assert_eq!(judged(&before, &complete(census(&["+a", "+b"])), &[]), Verdict::Apply);
}

#[test]
fn another_pod_in_the_same_namespace_is_no_loss() {
    let mut after = census(&[]);
    let here = Stance::Here(PathBuf::from("/run/netns/a"));
    after.pods.insert(Arc::from("renamed"), (PodUid(Arc::from("u2")), here));
    assert_eq!(judged(&census(&["+a"]), &after, &[]), Verdict::Apply);
}

#[test]
fn a_file_that_was_emptied_or_cut_is_held_whatever_it_held() {
    let file =
        |objects, empty_list, marked| FileCensus { objects, empty_list, marked, ..FileCensus::default() };
    let files = |a: &FileCensus, b: FileCensus| Census {
        files: BTreeMap::from([(Arc::from("a.yaml"), a.clone()), (Arc::from("b.yaml"), b)]),
        ..census(&["+a", "+b", "+c"])
    };
    let (pods, policies) = (file(3, false, false), file(2, false, false));
    let before = files(&pods, policies);
    assert_eq!(judged(&before, &files(&pods, file(0, false, false)), &[]), Verdict::Hold);
    assert_eq!(judged(&before, &files(&pods, file(0, true, false)), &[]), Verdict::Apply, "an empty list");
    assert_eq!(judged(&before, &files(&pods, file(1, false, false)), &[]), Verdict::Apply, "one is left");
    assert_eq!(
        judged(&before, &files(&file(5, false, false), file(0, false, false)), &[]),
        Verdict::Apply,
        "moved"
    );
    let marked = files(&pods, file(2, false, true));
    assert_eq!(judged(&marked, &files(&pods, file(1, false, false)), &[]), Verdict::Hold, "its mark is gone");
    assert_eq!(judged(&marked, &files(&pods, file(1, false, true)), &[]), Verdict::Apply);
}

/// A version of one file with this text, and these pods.
fn written(pods: &[&str], text: &str) -> Census {
    let file = FileCensus { objects: 3, outline: Outline::of(text), ..FileCensus::default() };
    Census { files: BTreeMap::from([(Arc::from("mesh.yaml"), file)]), ..census(pods) }
}

#[test]
fn a_file_of_which_the_end_is_missing_releases_nobody() {
    use Verdict::{Apply, Hold, Wait};
    let whole = "ns\n---\na\n---\nb\n---\nc\n  label: x\n";
    let before = written(&["+a", "+b", "+c"], whole);
    let same: &[&str] = &["+a", "+b", "+c"];
    for (why, text, after, gone, expected) in [
        ("one of many is missing, and the end", "ns\n---\na\n---\nb\n", &["+a", "+b"][..], &[][..], Hold),
        ("it is gone", "ns\n---\na\n---\nb\n", &["+a", "+b"], &["c"], Apply),
        ("it is told to", "ns\n---\na\n---\nb\n---\nc\n", &["+a", "+b", "-c"], &[], Apply),
        ("one in the midst is missing", "ns\n---\na\n---\nc\n  label: x\n", &["+a", "+c"], &[], Wait),
        ("the label of one is missing", "ns\n---\na\n---\nb\n---\nc\n", &["+a", "+b", "?c"], &[], Hold),
        ("that of its namespace is", "ns\n---\na\n---\nb\n---\nc\n", &["+a", "+b", "nc"], &[], Hold),
        ("what is missing is no pod", "ns\n---\na\n---\nb\n---\nc\n", same, &[], Apply),
        ("a line is cut", "ns\n---\na\n---\nb\n---\nc\n  la", same, &[], Hold),
        ("the last line is not ended any more", whole.trim_end(), same, &[], Apply),
        ("written anew, and cut", "NS\n---\na\n---\nb\n---\n", &["+a", "+b"], &[], Wait),
        ("written anew, and a line is cut", "NS\n---\na\n---\nb\n--", &["+a", "+b"], &[], Hold),
        ("an end mark says that it is meant", "ns\n---\na\n---\nb\n...\n", &["+a", "+b"], &[], Wait),
    ] {
        assert_eq!(judged(&before, &written(after, text), gone), expected, "{why}");
    }
}

#[test]
fn a_start_with_a_file_that_does_not_end_releases_nobody() {
    let captured = || ["a", "b", "c"].map(|name| PodUid(Arc::from(name)));
    let judged = |now: &Census| Change::since_last_daemon(captured(), now, |_| false).judge();
    assert_eq!(judged(&written(&["+a", "+b"], "ns\n---\na\n---\nb")), Verdict::Hold);
    assert_eq!(judged(&written(&["+a", "+b"], "ns\n---\na\n---\nb\n")), Verdict::Wait);
    assert_eq!(judged(&written(&["+a", "+b", "+c"], "ns")), Verdict::Apply);
}

#[test]
fn most_policies_wait_a_little_and_the_last_one_does_not() {
    let with = |policies: &[&str]| Census {
        policies: policies.iter().map(|name| Arc::from(*name)).collect(),
        ..census(&["+a"])
    };
    assert_eq!(judged(&with(&["a"]), &with(&[]), &[]), Verdict::Apply);
    assert_eq!(judged(&with(&["a", "b"]), &with(&["a"]), &[]), Verdict::Apply);
    assert_eq!(judged(&with(&["a", "b"]), &with(&[]), &[]), Verdict::Wait);
}

#[test]
fn what_an_earlier_daemon_captured_is_judged_likewise() {
    let uids = |names: &[&str]| names.iter().map(|name| PodUid(Arc::from(*name))).collect::<Vec<_>>();
    let judged = |captured: &[&str], now: &Census, gone: &[&str]| {
        let gone = uids(gone);
        Change::since_last_daemon(uids(captured), now, |uid| gone.contains(uid)).judge()
    };
    assert_eq!(judged(&[], &census(&[]), &[]), Verdict::Apply);
    assert_eq!(judged(&["a", "b"], &census(&["+a", "+b"]), &[]), Verdict::Apply);
    assert_eq!(judged(&["a", "b"], &census(&["-a", "-b"]), &[]), Verdict::Apply);
    assert_eq!(judged(&["a", "b"], &census(&["+c"]), &[]), Verdict::Hold);
    assert_eq!(judged(&["a", "b"], &census(&["+c"]), &["a", "b"]), Verdict::Apply);
    assert_eq!(judged(&["a", "b", "c"], &census(&["+a", "+b"]), &[]), Verdict::Wait);
}

#[test]
fn an_agents_list_is_complete() {
    let uids = |names: &[&str]| names.iter().map(|name| PodUid(Arc::from(*name))).collect::<BTreeSet<_>>();
    let judged = |enrolled: &[&str], listed: &[&str]| Change::of_list(&uids(enrolled), &uids(listed)).judge();
    assert_eq!(judged(&["a", "b"], &["a", "b", "c"]), Verdict::Apply);
    assert_eq!(judged(&["a", "b"], &["a"]), Verdict::Apply);
    assert_eq!(judged(&["a", "b"], &[]), Verdict::Wait);
    assert_eq!(judged(&["a"], &["b"]), Verdict::Wait);
}

#[test]
fn what_is_doubtful_is_said_in_words() {
    let change = |before: &[&str], after: &[&str]| {
        Change::between(&census(before), &census(after), |_| false).to_string()
    };
    assert_eq!(
        change(&["+shop/a", "+shop/b", "~c", "~d"], &[]),
        "4 of 4 pods would leave the mesh (c, d, shop/a, ...), and nothing says that they are to"
    );
    assert_eq!(change(&["+a", "+b"], &["na", "nb"]), "2 of 2 pods would leave the mesh (a, b)");
    assert_eq!(
        change(&["+a"], &[]),
        "1 of 1 pod would leave the mesh (a), and nothing says that they are to"
    );
}

/// Offers `after` in place of `before`.
fn offer(
    caution: &mut Caution<&'static str>,
    name: &'static str,
    after: &Census,
    now: Instant,
) -> Option<&'static str> {
    let before = census(&["+a", "+b", "+c"]);
    caution.offer(name, Change::between(&before, after, |_| false), now)
}

#[tokio::test(start_paused = true)]
async fn what_waits_is_carried_out_once_it_has_stayed_so() {
    let (mut caution, start) = (Caution::default(), Instant::now());
    let same = |_: &&str| Change::between(&census(&["+a", "+b", "+c"]), &census(&["+a", "+b"]), |_| false);
    assert_eq!(offer(&mut caution, "without c", &census(&["+a", "+b"]), start), None);
    assert!(caution.wake().unwrap() <= start + STABLE);
    assert_eq!(caution.again(same, start + STABLE / 2), None);
    // Something else that loses another one begins anew; something that loses the same does not.
    assert_eq!(offer(&mut caution, "without a", &census(&["+b", "+c"]), start + STABLE / 2), None);
    assert_eq!(offer(&mut caution, "without a, anew", &census(&["+b", "+c", "+d"]), start + STABLE), None);
    assert_eq!(caution.again(same, start + STABLE), None);
    assert_eq!(caution.again(same, start + STABLE * 3 / 2), Some("without a, anew"));
    assert_eq!(caution.wake(), None);
    // A source that changes all the time is not waited for without end.
    let mut begun = start;
    let losses = [&["+a", "+b"][..], &["+b", "+c"]];
    let taken = (0..).find(|turn| {
        begun += STABLE / 2;
        offer(&mut caution, "ever", &census(losses[turn % 2]), begun).is_some()
    });
    assert!(taken.is_some_and(|turns| turns <= 12), "{taken:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_held_is_held_until_it_is_confirmed_or_not_in_doubt_any_more() {
    let (mut caution, now) = (Caution::default(), Instant::now());
    let nothing = census(&[]);
    let all =
        |gone: bool| move |_: &&str| Change::between(&census(&["+a", "+b", "+c"]), &census(&[]), |_| gone);
    assert_eq!(offer(&mut caution, "nothing", &nothing, now), None);
    assert_eq!(caution.doubt().map(|(_, verdict)| verdict), Some(Verdict::Hold));
    assert_eq!(caution.again(all(false), now + STABLE * 100), None);
    assert_eq!(caution.confirm(), Some("nothing"));
    assert_eq!(caution.confirm(), None);

    assert_eq!(offer(&mut caution, "nothing", &nothing, now), None);
    assert_eq!(caution.again(all(true), now + STABLE), Some("nothing"), "the pods are gone");

    assert_eq!(offer(&mut caution, "nothing", &nothing, now), None);
    let whole = census(&["+a", "+b", "+c", "+d"]);
    assert_eq!(offer(&mut caution, "whole", &whole, now), Some("whole"));
    assert!(caution.doubt().is_none());
}
