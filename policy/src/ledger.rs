//! The ledger: every looked-up token is counted once.
//!
//! A token that an engine asked about beyond its own prefix was served by a tier, or missed for one reason. The parts
//! sum to the whole (`the_parts_sum_to_the_whole`, and the core's model test).

use kvtier_types::Origin;

/// Why a looked-up token was not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MissReason {
    /// Nobody ever wrote it here, as far as is remembered.
    Novel,
    /// It was here and had to go.
    Evicted,
    /// It was here and its time ran out.
    Expired,
    /// Its bytes did not match their checksum.
    Corrupt,
    /// It was here but not in host memory before the deadline, or its load failed.
    Late,
    /// Recomputing was cheaper than loading.
    TooSlow,
    /// The reader may not have it.
    Denied,
    /// Somebody was still writing it.
    Busy,
    /// The tier that holds it, or the engine that asked, was gone.
    Unavailable,
    /// It was offered and the engine did not take it (the last token of a prompt is always computed, say).
    Declined,
}

impl MissReason {
    /// Every reason.
    pub const ALL: [Self; 10] = [
        Self::Novel,
        Self::Evicted,
        Self::Expired,
        Self::Corrupt,
        Self::Late,
        Self::TooSlow,
        Self::Denied,
        Self::Busy,
        Self::Unavailable,
        Self::Declined,
    ];

    /// The name in metrics and status.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Novel => "novel",
            Self::Evicted => "evicted",
            Self::Expired => "expired",
            Self::Corrupt => "corrupt",
            Self::Late => "late",
            Self::TooSlow => "too_slow",
            Self::Denied => "denied",
            Self::Busy => "busy",
            Self::Unavailable => "unavailable",
            Self::Declined => "declined",
        }
    }
}

/// What became of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Served(Origin),
    Missed(MissReason),
}

/// Token counts by fate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    served: [u64; Origin::ALL.len()],
    missed: [u64; MissReason::ALL.len()],
    looked_up: u64,
}

impl Ledger {
    pub(crate) fn count(&mut self, fate: Fate, tokens: u64) {
        self.looked_up += tokens;
        match fate {
            Fate::Served(origin) => self.served[origin.index()] += tokens,
            Fate::Missed(reason) => self.missed[reason as usize] += tokens,
        }
    }

    /// Tokens served from `origin`.
    #[must_use]
    pub fn served(&self, origin: impl Into<Origin>) -> u64 {
        self.served[origin.into().index()]
    }

    /// Tokens missed for `reason`.
    #[must_use]
    pub const fn missed(&self, reason: MissReason) -> u64 {
        self.missed[reason as usize]
    }

    /// Every token looked up and settled.
    #[must_use]
    pub const fn looked_up(&self) -> u64 {
        self.looked_up
    }

    /// Names and counts of all fates; their sum is [`Self::looked_up`].
    pub fn rows(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let served = Origin::ALL.into_iter().map(|o| (o.name(), self.served(o)));
        served.chain(MissReason::ALL.into_iter().map(|r| (r.name(), self.missed(r))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_sum_to_the_whole() {
        let mut ledger = Ledger::default();
        ledger.count(Fate::Served(kvtier_types::Tier::Disk.into()), 128);
        ledger.count(Fate::Missed(MissReason::Novel), 64);
        ledger.count(Fate::Missed(MissReason::Declined), 1);
        assert_eq!(ledger.looked_up(), 193);
        assert_eq!(ledger.rows().map(|(_, n)| n).sum::<u64>(), 193);
    }
}
