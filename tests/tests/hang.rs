//! A daemon that is stopped in its tracks: every call of the connector ends within its own deadline.

use std::time::{Duration, Instant};

use kvtier::jobs::JobPoll;
use kvtier::jobs::job::{Fate, Kind, Transfer};
use kvtier_proto::v1::StatusReply;
use kvtier_tests::daemon::SLACK;
use kvtier_tests::wait::until;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};

fn setup() -> Setup {
    // Heartbeats every 200 ms.
    Setup { limits: "attachment_ttl = \"1s\"".into(), ..Setup::default() }
}

fn engine(daemon: &Daemon) -> Engine {
    let mut engine = Engine::attach(daemon, &Shape { call_timeout_ms: 300, ..Shape::default() });
    engine.deadline = Duration::from_millis(400);
    engine
}

/// Runs something and fails when it takes longer than `limit`, and what a busy machine adds.
fn timed<T>(what: &str, limit: Duration, run: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let result = run();
    let took = began.elapsed();
    assert!(took < limit + SLACK, "{what} took {took:?}");
    result
}

#[test]
fn lookups_reservations_and_jobs_end_and_come_back() {
    let daemon = daemon!(setup());
    let engine = engine(&daemon);
    let prompt = Prompt::new("before", 20);
    engine.put_all(&prompt);
    assert_eq!(engine.get(&prompt).whole(), Some(320));
    daemon.freeze();
    // Before anybody can have noticed, and after everybody has.
    for _ in 0..2 {
        let (request, hit) = timed("a lookup", engine.deadline, || engine.lookup(&prompt));
        assert_eq!(hit.tokens, 0);
        engine.release(&request, 0, 0);
        let fresh = Prompt::new("during", 4);
        let put = timed("a put", Duration::from_millis(300) + engine.deadline, || engine.put(&fresh));
        assert_eq!((put.granted, put.busy), (0, 4));
        engine.wait_detached();
    }
    daemon.thaw();
    engine.wait_attached();
    assert_eq!(engine.get(&prompt).whole(), Some(320), "what it had, it has");
    assert_eq!(engine.put_all(&Prompt::new("after", 4)).granted, 4);
}

#[test]
fn a_load_whose_extent_cannot_be_mapped_ends_lost() {
    let daemon = daemon!(setup());
    let writer = engine(&daemon);
    let prompt = Prompt::new("mapped", 20);
    writer.put_all(&prompt);
    let reader = engine(&daemon);
    let (request, hit) = reader.lookup(&prompt);
    assert_eq!(hit.tokens, 320);
    let frames = reader.frames(&request, 0, 0, hit.tokens);
    daemon.freeze();
    let transfers = frames.iter().zip(0..).map(|((_, frame), slot)| Transfer { frame: *frame, block_id: slot });
    let (session, _) = reader.worker(0);
    let kind = Kind::Load { request_id: request.clone() };
    let fates = timed("a load", reader.deadline, || reader.run_job(session, kind, transfers.collect()));
    assert!(fates.iter().all(|fate| *fate == Fate::Lost), "{fates:?}");
    timed("closing", Duration::from_secs(5), || reader.close());
    // Frames mapped before stay readable: they are memory, and their daemon is not dead.
    daemon.thaw();
    // It may have been detached for its silence, and hear of that only now.
    until("the writer to find its blocks", || (writer.get(&prompt).whole() == Some(320)).then_some(()));
    daemon.wait_status("the reader's leases to be gone", |status| status.attachments.len() == 2);
}

#[test]
fn a_save_whose_extent_cannot_be_mapped_is_cancelled_at_once() {
    let daemon = daemon!(setup());
    let engine = engine(&daemon);
    let hashes = Prompt::new("never written", 8).block_hashes(16);
    let (states, frames) = engine.reserve(0, 0, hashes, None).expect("the daemon answers");
    assert_eq!(states, [1; 8]);
    daemon.freeze();
    let transfers = frames.iter().flatten().zip(0..).map(|(frame, slot)| Transfer { frame: *frame, block_id: slot });
    let (session, _) = engine.worker(0);
    let job = session.submit_job(Kind::Save, transfers.collect(), (Duration::from_secs(60), 0)).expect("a valid job");
    // Long enough for the threads to ask for the extent, and far too short for that to fail.
    assert_eq!(session.wait_job(job, Duration::from_millis(100), 8), Ok(JobPoll::Pending));
    let began = Instant::now();
    assert!(session.cancel_job(job));
    let over = session.wait_job(job, Duration::from_secs(60), 8);
    let took = began.elapsed();
    assert!(matches!(over, Ok(JobPoll::Over(_))), "{over:?}");
    assert!(took < Duration::from_secs(2), "cancelling took {took:?}");
    daemon.thaw();
    let is_given_back = |status: &StatusReply| status.attachments.iter().all(|a| a.reservations == 0);
    daemon.wait_status("the frames to be given back", is_given_back);
}

#[test]
fn a_release_outlives_a_stall_that_is_longer_than_any_call() {
    // Heartbeats are rare enough for nobody to be detached.
    let daemon = daemon!(Setup::default());
    let engine = engine(&daemon);
    let prompt = Prompt::new("leased", 4);
    engine.put_all(&prompt);
    let (request, hit) = engine.lookup(&prompt);
    assert_eq!(hit.tokens, 64);
    let leases = |status: &StatusReply| status.attachments.iter().map(|a| a.leases).sum::<u32>();
    assert_eq!(leases(&daemon.status()), 1);
    daemon.freeze();
    engine.release(&request, 64, 0);
    // Not to wait for something: a call and its tries take less.
    std::thread::sleep(Duration::from_millis(2500));
    daemon.thaw();
    daemon.wait_status("the lease to end", |status| leases(status) == 0);
    assert_eq!((engine.counter("attached"), engine.counter("reports_dropped")), (2, 0), "while all stay attached");
}

#[test]
fn closing_a_session_on_a_stopped_daemon_keeps_to_its_deadline() {
    let daemon = daemon!(setup());
    let engine = engine(&daemon);
    let prompt = Prompt::new("closing", 4);
    engine.put_all(&prompt);
    daemon.freeze();
    let put = engine.put(&Prompt::new("never answered", 4));
    assert_eq!(put.saved, 0);
    timed("closing", Duration::from_millis(100), || {
        engine.scheduler().close(Duration::from_millis(100));
        engine.worker(0).0.close(Duration::from_millis(100));
    });
    let (_, hit) = timed("a lookup after the close", engine.deadline, || engine.lookup(&prompt));
    assert_eq!(hit.tokens, 0);
    daemon.thaw();
    daemon.wait_status("the attachments to be reaped", |status| status.attachments.is_empty());
}

#[test]
fn a_new_session_does_not_wait_for_a_stopped_daemon() {
    let daemon = daemon!(setup());
    daemon.freeze();
    let shape = Shape { call_timeout_ms: 300, ..Shape::default() };
    let engine = timed("opening", Duration::ZERO, || Engine::open(&daemon.socket().to_string_lossy(), &shape));
    let (_, hit) = timed("a lookup", Duration::ZERO, || engine.lookup(&Prompt::new("new", 4)));
    assert_eq!(hit.tokens, 0);
    daemon.thaw();
    engine.wait_attached();
    engine.put_all(&Prompt::new("new", 4));
}
