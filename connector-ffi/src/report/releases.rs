//! Releases on their way to the daemon. A lost one would keep its blocks in place for as long as the engine lives, since
//! heartbeats renew leases: so none is dropped, and each is told until the daemon answers or its attachment ends.
//!
//! # Bounds
//! One for each lookup that the daemon was asked; no further ones are asked while too many wait
//! (`a_daemon_that_takes_no_releases_is_asked_for_no_more_leases`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::v1;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};

use super::RETRY_PAUSE;
use crate::counters::Counters;
use crate::link::Attachment;
use crate::lookup::table::Settlement;
use crate::shared::Shared;

/// Longest pause between two tries: short beside a lease.
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// A request that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedRequest {
    /// Attachment that holds its lease.
    pub epoch: u64,
    /// Its name.
    pub request_id: String,
    /// Its tokens.
    pub settlement: Settlement,
}

/// Those whose release the daemon has not answered yet.
#[derive(Debug, Default)]
pub(super) struct Releases {
    /// The first is being told. It stays until that has ended: whoever waits for its end looks here.
    waiting: Mutex<VecDeque<EndedRequest>>,
    arrived: Notify,
    told: Notify,
}

impl Releases {
    pub(super) fn push(&self, ended: EndedRequest) {
        self.waiting.lock().push_back(ended);
        self.arrived.notify_one();
    }

    pub(super) fn count(&self) -> usize {
        self.waiting.lock().len()
    }

    /// Completes when what waits is as asked.
    pub(super) async fn until(&self, is_so: impl Fn(&VecDeque<EndedRequest>) -> bool) {
        loop {
            let told = self.told.notified();
            if is_so(&self.waiting.lock()) {
                return;
            }
            told.await;
        }
    }

    async fn first(&self) -> EndedRequest {
        loop {
            let first = self.waiting.lock().front().cloned();
            match first {
                Some(first) => return first,
                None => self.arrived.notified().await,
            }
        }
    }

    /// The first was told, or is to be told again: after the others, so that one that fails holds none of them up.
    fn end_first(&self, again: bool) {
        let mut waiting = self.waiting.lock();
        let first = waiting.pop_front();
        waiting.extend(first.filter(|_| again));
        drop(waiting);
        self.told.notify_waiters();
    }

    /// Tells all that come. `tell` makes one call, or answers `None` when the attachment is gone, and the lease with it.
    async fn tell_all<F>(&self, counters: &Counters, mut tell: impl FnMut(&EndedRequest) -> Option<F>)
    where
        F: Future<Output = Result<(), Status>>,
    {
        let mut pause = RETRY_PAUSE;
        loop {
            let first = self.first().await;
            let (told, again) = match tell(&first) {
                None => (false, false),
                Some(call) => match call.await {
                    Ok(()) => (true, false),
                    Err(status) => (false, !is_final(status.code())),
                },
            };
            self.end_first(again);
            if again {
                sleep(pause).await;
                pause = (pause * 2).min(MAX_PAUSE);
                continue;
            }
            pause = RETRY_PAUSE;
            if !told {
                counters.reports_dropped.one();
            }
        }
    }
}

/// Tells releases for as long as the session lives. Owned by its runtime.
pub async fn run(shared: Arc<Shared>) {
    let limit = shared.spec.call_timeout;
    let tell = |ended: &EndedRequest| {
        let attachment = shared.link.current().filter(|attachment| attachment.epoch == ended.epoch)?;
        Some(call(attachment, ended.clone(), limit))
    };
    shared.reports.releases.tell_all(&shared.counters, tell).await;
}

async fn call(attachment: Arc<Attachment>, ended: EndedRequest, limit: Duration) -> Result<(), Status> {
    let request = v1::ReleaseRequest {
        attachment: attachment.token_bytes(),
        request_id: ended.request_id,
        local_tokens: ended.settlement.local_tokens,
        claimed_tokens: ended.settlement.claimed_tokens,
        lost_tokens: ended.settlement.lost_tokens,
    };
    let mut client = attachment.client.clone();
    match timeout(limit, client.release(request)).await {
        Ok(reply) => reply.map(drop),
        Err(_) => Err(Status::deadline_exceeded("the daemon did not answer")),
    }
}

/// Whether it is the daemon's word on this release, which another try would not change. What a broken connection looks like
/// is none: the attachment ends with it, or it is mended.
const fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::NotFound
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented
            | Code::OutOfRange
    )
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use kvtier_types::BlockKey;

    use super::*;
    use crate::frame::FrameRef;
    use crate::report::Reports;

    const LONG: Duration = Duration::from_secs(30);

    fn ended(request_id: &str) -> EndedRequest {
        EndedRequest { epoch: 1, request_id: request_id.to_owned(), settlement: Settlement::default() }
    }

    fn stall() -> Option<Result<(), Status>> {
        Some(Err(Status::unavailable("a stall")))
    }

    /// Tells what waits until nothing does; `end` says how each call ends.
    async fn tell(reports: &Reports, mut end: impl FnMut(&str) -> Option<Result<(), Status>>) {
        let told = async {
            tokio::select! {
                () = reports.releases.tell_all(&reports.counters, |first| end(&first.request_id).map(ready)) => {}
                () = reports.releases.until(VecDeque::is_empty) => {}
            }
        };
        timeout(LONG, told).await.expect("all is told");
    }

    #[tokio::test]
    async fn a_release_is_told_whatever_else_waits_and_however_often_telling_it_fails() {
        let (reports, _queue) = Reports::new(Arc::default());
        let frame = FrameRef::from_wire(BlockKey::new([1; 32]), 0, 0, &v1::Frame::default());
        (0..20_000).for_each(|_| reports.abandon(1, &[frame]));
        assert!(reports.counters.seals_dropped.get() > 0, "there is no room for as many");
        reports.release(ended("r"));
        let mut tries = 0;
        tell(&reports, |request_id| {
            assert_eq!(request_id, "r");
            tries += 1;
            if tries > 5 { Some(Ok(())) } else { stall() }
        })
        .await;
        assert_eq!((tries, reports.counters.reports_dropped.get()), (6, 0));
    }

    #[tokio::test]
    async fn one_that_fails_holds_no_other_up_and_a_refused_one_ends() {
        let (reports, _queue) = Reports::new(Arc::default());
        ["stuck", "refused", "gone", "fine"].into_iter().for_each(|name| reports.release(ended(name)));
        assert_eq!(reports.releases_waiting(), 4);
        let mut told: Vec<String> = Vec::new();
        let mut stalls = 1;
        tell(&reports, |request_id| {
            told.push(request_id.to_owned());
            match request_id {
                "stuck" if stalls > 0 => {
                    stalls -= 1;
                    stall()
                }
                "refused" => Some(Err(Status::failed_precondition("unknown attachment"))),
                "gone" => None,
                _ => Some(Ok(())),
            }
        })
        .await;
        assert_eq!(told, ["stuck", "refused", "gone", "fine", "stuck"]);
        assert_eq!((reports.releases_waiting(), reports.counters.reports_dropped.get()), (0, 2));
    }

    #[tokio::test]
    async fn whoever_looks_the_same_request_up_again_waits_for_its_release() {
        let (reports, _queue) = Reports::new(Arc::default());
        reports.release(ended("again"));
        timeout(LONG, reports.released("another")).await.expect("nothing of it waits");
        assert!(timeout(Duration::from_millis(10), reports.released("again")).await.is_err());
        let both = async { tokio::join!(reports.released("again"), tell(&reports, |_| Some(Ok(())))) };
        timeout(LONG, both).await.expect("it is told");
    }
}
