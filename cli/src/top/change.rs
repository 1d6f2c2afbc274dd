//! What happened between two looks at a daemon's counters.

use std::collections::BTreeMap;
use std::time::Duration;

use kvtier_proto::v1;
use kvtier_types::Origin;

/// What counters grew by, and in what time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) span: Duration,
    /// Since the daemon's start, rather than between two looks.
    pub(super) whole: bool,
    pub(super) looked_up: u64,
    /// Looked-up tokens by what became of them, in the daemon's order.
    pub(super) ledger: Vec<(String, u64)>,
    /// Blocks loaded, by where they came from.
    pub(super) loaded: BTreeMap<String, u64>,
    /// Bytes read and served, by transport.
    pub(super) transports: BTreeMap<String, (u64, u64)>,
    /// Verbs, claims, rules and eviction, by name, in the daemon's order.
    pub(super) policy: Vec<(String, u64)>,
}

impl Change {
    /// All there was since the daemon's start.
    pub(super) fn since_start(now: &v1::StatusReply) -> Self {
        let change = Self::between(&v1::StatusReply::default(), now, Duration::from_millis(now.uptime_ms));
        Self { whole: true, ..change }
    }

    /// What there was between two looks; of a daemon that started again in between, what there was since.
    pub(super) fn between(before: &v1::StatusReply, now: &v1::StatusReply, span: Duration) -> Self {
        let restarted = before.incarnation != now.incarnation && before.incarnation != 0;
        if restarted {
            return Self::since_start(now);
        }
        let transport = |t: &v1::TransportStatus| {
            let before = before.transports.iter().find(|b| b.kind == t.kind);
            let (read, served) = before.map_or((0, 0), |b| (b.read_bytes, b.served_bytes));
            (t.kind.clone(), (t.read_bytes.saturating_sub(read), t.served_bytes.saturating_sub(served)))
        };
        Self {
            span,
            whole: false,
            looked_up: now.looked_up_tokens.saturating_sub(before.looked_up_tokens),
            ledger: grown(&before.ledger, &now.ledger),
            loaded: grown(&before.blocks_loaded, &now.blocks_loaded).into_iter().collect(),
            transports: now.transports.iter().map(transport).collect(),
            policy: grown(&before.policy, &now.policy),
        }
    }

    /// Looked-up tokens that were served, from anywhere.
    pub(super) fn hits(&self) -> u64 {
        self.ledger.iter().filter(|(name, _)| is_hit(name)).fold(0u64, |sum, (_, n)| sum.saturating_add(*n))
    }

    /// `n` within the span, per second.
    pub(super) fn per_second(&self, n: u64) -> u64 {
        let millis = self.span.as_millis().max(1);
        u64::try_from(u128::from(n) * 1_000 / millis).unwrap_or(u64::MAX)
    }
}

/// Whether a part of the ledger was served rather than missed.
pub(super) fn is_hit(name: &str) -> bool {
    Origin::ALL.iter().any(|origin| origin.name() == name)
}

fn grown(before: &[v1::Count], now: &[v1::Count]) -> Vec<(String, u64)> {
    let was: BTreeMap<&str, u64> = before.iter().map(|c| (c.name.as_str(), c.value)).collect();
    let by = |c: &v1::Count| c.value.saturating_sub(was.get(c.name.as_str()).copied().unwrap_or(0));
    now.iter().map(|c| (c.name.clone(), by(c))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(incarnation: u64, host: u64, novel: u64) -> v1::StatusReply {
        let count = |name: &str, value| v1::Count { name: name.to_owned(), value };
        v1::StatusReply {
            incarnation,
            uptime_ms: 10_000,
            ledger: vec![count("host", host), count("novel", novel)],
            looked_up_tokens: host + novel,
            ..v1::StatusReply::default()
        }
    }

    #[test]
    fn hits_are_what_was_served_between_two_looks() {
        let change = Change::between(&status(1, 100, 50), &status(1, 400, 150), Duration::from_secs(2));
        assert_eq!((change.looked_up, change.hits(), change.whole), (400, 300, false));
        assert_eq!(change.per_second(change.looked_up), 200);
    }

    #[test]
    fn a_daemon_that_started_again_counts_from_there() {
        let change = Change::between(&status(1, 100, 50), &status(2, 40, 10), Duration::from_secs(2));
        assert_eq!((change.looked_up, change.hits(), change.whole), (50, 40, true));
        assert_eq!(change.span, Duration::from_secs(10));
    }

    #[test]
    fn no_time_and_no_tokens_are_no_division_by_zero() {
        let change = Change::since_start(&v1::StatusReply::default());
        assert_eq!((change.per_second(5), change.hits()), (5_000, 0));
    }
}
