//! Watch: block events as they happen, from where a watcher left off.

use kvtier_proto::v1::{self, EventKind, SignalKind, Tier};
use kvtier_tests::rpc::Watch;
use kvtier_tests::{Engine, Prompt, Setup, Shape, daemon};

/// Reads on until as many events came.
fn events(watch: &mut Watch<'_>, count: usize) -> Vec<v1::BlockEvent> {
    let mut events = Vec::new();
    while events.len() < count {
        let reply = watch.next_reply().expect("a stream").expect("the stream goes on");
        assert!(!reply.lost);
        events.extend(reply.events);
    }
    events
}

#[test]
fn a_watcher_sees_what_happens_and_goes_on_where_it_was() {
    let shape = Shape::default();
    let mut daemon = daemon!(Setup::default());
    let mut engine = Engine::attach(&daemon, &shape);
    engine.speak_for("writer", "", "");
    let (first_begin, incarnation) = {
        let control = daemon.control();
        let mut watch = control.watch(v1::WatchRequest::default()).unwrap();
        let begin = watch.next_reply().unwrap().expect("an answer that says where it begins");
        assert!(begin.events.is_empty() && !begin.lost);
        engine.put_all(&Prompt::new("watched", 5));
        let seen = events(&mut watch, 10);
        let stored = |tier: Tier| {
            let of = |e: &&v1::BlockEvent| e.kind() == EventKind::BlockStored && e.tier() == tier;
            seen.iter().filter(of).count()
        };
        assert_eq!((stored(Tier::Host), stored(Tier::Disk)), (5, 5), "{seen:?}");
        assert!(seen.windows(2).all(|pair| pair[0].sequence < pair[1].sequence));
        assert!(seen.iter().all(|e| e.program_id == "writer" && e.bytes > 0 && e.key.len() == 32));
        (begin.sequence, begin.incarnation)
    };

    // From where it left off, and only what it asks for.
    let cancel =
        v1::SignalRequest { program_id: "writer".into(), kind: SignalKind::Cancellation.into(), ..Default::default() };
    assert_eq!(daemon.control().signal(cancel).unwrap().blocks, 5);
    let resume = v1::WatchRequest {
        incarnation,
        after_sequence: first_begin,
        kinds: vec![EventKind::BlockRemoved.into(), EventKind::ProgramEnded.into()],
        ..Default::default()
    };
    let resumed = events(&mut daemon.control().watch(resume.clone()).unwrap(), 11);
    assert!(resumed[..10].iter().all(|e| e.kind() == EventKind::BlockRemoved && e.reason == "abandoned"));
    assert_eq!((resumed[10].kind(), resumed[10].program_id.as_str()), (EventKind::ProgramEnded, "writer"));
    let other = v1::WatchRequest { model_contains: "no such model".into(), ..resume.clone() };
    assert!(daemon.control().watch(other).unwrap().next_reply().unwrap().unwrap().events.is_empty());

    // Another life: what happened before is lost to it, and it is told so.
    daemon.kill();
    daemon.restart();
    let mut watch = daemon.control().watch(resume).unwrap();
    let told = watch.next_reply().unwrap().unwrap();
    assert!(told.lost && told.incarnation > incarnation, "{told:?}");
}

#[test]
fn a_watcher_that_falls_behind_is_told_of_the_gap() {
    let shape = Shape::default();
    let daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &shape);
    let control = daemon.control();
    let begin = control.watch(v1::WatchRequest::default()).unwrap().next_reply().unwrap().unwrap();
    // A number beyond all that happened is of no use, whatever life it is from.
    let ahead = v1::WatchRequest { incarnation: begin.incarnation, after_sequence: u64::MAX, ..Default::default() };
    let mut watch = control.watch(ahead).unwrap();
    assert!(watch.next_reply().unwrap().unwrap().lost);
    engine.put_all(&Prompt::new("after the gap", 2));
    assert_eq!(events(&mut watch, 4).len(), 4, "it goes on from now");
    let unknown = v1::WatchRequest { kinds: vec![99], ..Default::default() };
    let refused = control.watch(unknown).and_then(|mut watch| watch.next_reply());
    assert_eq!(refused.unwrap_err().code(), tonic::Code::InvalidArgument);
}

#[test]
fn turns_are_told_to_those_who_ask_for_them() {
    let daemon = daemon!(Setup::default());
    let control = daemon.control();
    let request = v1::WatchRequest { kinds: vec![EventKind::TurnBegan.into()], ..Default::default() };
    let mut watch = control.watch(request).unwrap();
    watch.next_reply().unwrap().expect("an answer that says where it begins");
    let step = |id: &str, after: &[&str], tool_gap_ms| v1::GraphStep {
        step_id: id.into(),
        after: after.iter().map(|a| (*a).to_owned()).collect(),
        tool_gap_ms,
        ..Default::default()
    };
    let steps = vec![step("a", &[], 0), step("b", &["a"], 100)];
    let declared = v1::DeclareRequest { program_id: "plan".into(), steps, ..Default::default() };
    control.of_programs(async |mut client| client.declare(declared).await).expect("an answer");
    let mut next = || {
        let event = events(&mut watch, 1).remove(0);
        (event.program_id, event.graph, event.step_id, event.reason)
    };
    let told = |program: &str, graph: &str, step: &str, reason: &str| {
        (program.to_owned(), graph.to_owned(), step.to_owned(), reason.to_owned())
    };
    assert_eq!(next(), told("plan", "plan", "a", "ready"));
    let progress = v1::ProgressRequest { program_id: "plan".into(), ended: vec!["a".into()], ..Default::default() };
    control.of_programs(async |mut client| client.progress(progress).await).expect("an answer");
    assert_eq!(next(), told("plan", "plan", "b", "ready"), "once its tool is back");
    let signal = |kind: SignalKind, expected_resume_ms| {
        let program_id = "alone".to_owned();
        let signal = v1::SignalRequest { program_id, kind: kind.into(), expected_resume_ms, ..Default::default() };
        assert_eq!(control.signal(signal).expect("an answer").outcome(), v1::Outcome::Applied);
    };
    signal(SignalKind::ToolWait, 300);
    assert_eq!(next(), told("alone", "", "", "returns"));
    signal(SignalKind::Continuation, 0);
    assert_eq!(next(), told("alone", "", "", "goes_on"));
    let mut all = daemon.control().watch(v1::WatchRequest { incarnation: 0, ..Default::default() }).unwrap();
    assert!(all.next_reply().unwrap().unwrap().events.is_empty(), "they are for those who name them");
}
