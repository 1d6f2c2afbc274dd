//! What engines took for a program so far, as far as the core sees it: from a call's lookup to the last block that it wrote,
//! or to the signal that ended it.
//!
//! Calls of one program that overlap count once: it is the time in which something of it was served. Time that a signal adds
//! is bounded by [`MAX_SILENCE`], since a signal that comes late says nothing of engines.

use std::time::Duration;

use kvtier_types::Instant;

/// Longest time between a call's last block and the signal that ends it that counts as the engine's.
const MAX_SILENCE: Duration = Duration::from_secs(30);

/// A call as it is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Call {
    began: Instant,
    last: Instant,
}

/// What engines took for a program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Service {
    ended: Duration,
    call: Option<Call>,
    waits: Option<Instant>,
}

impl Service {
    /// A call begins: the one before it is over, and took so long.
    pub(crate) fn begin(&mut self, now: Instant) -> Duration {
        let took = self.close();
        self.waits = None;
        self.call = Some(Call { began: now, last: now });
        took
    }

    /// The call wrote something.
    pub(crate) fn goes_on(&mut self, now: Instant) {
        if let Some(call) = &mut self.call {
            call.last = call.last.max(now);
        }
    }

    /// The program says that its call ended. Answers with what it took.
    pub(crate) fn end(&mut self, now: Instant) -> Duration {
        if let Some(call) = &mut self.call
            && now.since(call.last) <= MAX_SILENCE
        {
            call.last = call.last.max(now);
        }
        self.waits = None;
        self.close()
    }

    /// The program says that it is about to call.
    pub(crate) fn wait(&mut self, now: Instant) -> Duration {
        self.waits = Some(now);
        self.close()
    }

    /// Whether a call is under way, or was not said to be over.
    pub(crate) const fn is_served(&self) -> bool {
        self.call.is_some()
    }

    fn close(&mut self) -> Duration {
        let took = self.call.take().map_or(Duration::ZERO, |call| call.last.since(call.began));
        self.ended = self.ended.saturating_add(took);
        took
    }

    /// What engines took so far.
    pub(crate) fn attained(&self) -> Duration {
        self.call.map_or(self.ended, |call| self.ended.saturating_add(call.last.since(call.began)))
    }

    /// Since when it said that it is about to call, and did not.
    pub(crate) const fn waits(&self) -> Option<Instant> {
        self.waits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: u64) -> Instant {
        Instant::from_nanos(secs * 1_000_000_000)
    }

    #[test]
    fn service_is_from_lookup_to_the_last_block_or_the_signal() {
        let mut service = Service::default();
        service.begin(at(0));
        service.goes_on(at(4));
        assert_eq!(service.attained(), Duration::from_secs(4));
        service.end(at(5));
        assert_eq!(service.attained(), Duration::from_secs(5));
        service.wait(at(20));
        assert_eq!((service.attained(), service.waits()), (Duration::from_secs(5), Some(at(20))));
        service.begin(at(21));
        service.goes_on(at(23));
        assert_eq!(service.waits(), None);
        service.end(at(500));
        assert_eq!(service.attained(), Duration::from_secs(7), "a late signal says nothing of engines");
        service.begin(at(600));
        service.begin(at(601));
        service.goes_on(at(602));
        assert_eq!(service.attained(), Duration::from_secs(8));
    }
}
