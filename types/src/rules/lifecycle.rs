//! What rules can say of a block: where it may lie, how long it lives, who goes first.

use std::fmt;
use std::time::Duration;

use crate::tier::Tier;

/// A set of tiers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TierSet(u8);

impl TierSet {
    /// Every tier.
    pub const ALL: Self = Self(0b1111);

    /// The set with `tier` in it.
    #[must_use]
    pub const fn with(self, tier: Tier) -> Self {
        Self(self.0 | 1 << tier.index())
    }

    /// Whether `tier` is in it.
    #[must_use]
    pub const fn has(self, tier: Tier) -> bool {
        self.0 & (1 << tier.index()) != 0
    }
}

impl FromIterator<Tier> for TierSet {
    fn from_iter<I: IntoIterator<Item = Tier>>(tiers: I) -> Self {
        tiers.into_iter().fold(Self::default(), Self::with)
    }
}

impl fmt::Display for TierSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> =
            Tier::ALL.into_iter().filter(|t| self.has(*t)).map(|t| format!("{:?}", t.name())).collect();
        write!(f, "[{}]", names.join(", "))
    }
}

/// Which slower tiers get copies, and whether the copy in host memory may go for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OffloadRule {
    /// Copies in these tiers.
    To(TierSet),
    /// Its copies are not removed from the tier they are in to make room; further copies are made all the same.
    Never,
}

impl Default for OffloadRule {
    fn default() -> Self {
        Self::To(TierSet::ALL)
    }
}

/// Copies on other nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Copies {
    /// So many.
    Some(u16),
    /// One on every node that is ready.
    All,
}

impl Default for Copies {
    fn default() -> Self {
        Self::Some(0)
    }
}

impl Copies {
    /// Whether any are wanted.
    #[must_use]
    pub fn any(self) -> bool {
        self != Self::Some(0)
    }
}

/// Place in the order of eviction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum EvictOrder {
    /// Before any other.
    First,
    /// As its ranking says.
    #[default]
    Normal,
}

/// When a block is written to the object store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WriteWhen {
    /// Once it was read.
    Read,
    /// At once.
    All,
    /// Never on our own account.
    Nothing,
}

/// What all rules together say of a block. The default is what a block without rules gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lifecycle {
    /// Where copies may lie.
    pub tiers: TierSet,
    /// Which slower tiers get copies.
    pub offload: OffloadRule,
    /// Copies on other nodes.
    pub replicate: Copies,
    /// How long it lives from when it is written, or learnt of.
    pub ttl: Option<Duration>,
    /// As a soft claim of that priority: 0 to 100.
    pub priority: Option<u8>,
    /// As a hard claim of the rules.
    pub pin: bool,
    /// Place in the order of eviction.
    pub evict: EvictOrder,
    /// When it is written to the object store; `None` as configured.
    pub write_behind: Option<WriteWhen>,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            tiers: TierSet::ALL,
            offload: OffloadRule::default(),
            replicate: Copies::default(),
            ttl: None,
            priority: None,
            pin: false,
            evict: EvictOrder::default(),
            write_behind: None,
        }
    }
}

/// One thing that a rule says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Setting {
    /// `tiers`
    Tiers(TierSet),
    /// `offload`
    Offload(OffloadRule),
    /// `replicate`
    Replicate(Copies),
    /// `ttl`
    Ttl(Duration),
    /// `priority`
    Priority(u8),
    /// `pin`
    Pin(bool),
    /// `evict`
    Evict(EvictOrder),
    /// `write_behind`
    WriteBehind(WriteWhen),
}

impl Setting {
    /// Names of the fields, in the order of [`Self::index`].
    pub const FIELDS: [&'static str; 8] =
        ["tiers", "offload", "replicate", "ttl", "priority", "pin", "evict", "write_behind"];

    /// Number of the field.
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Tiers(_) => 0,
            Self::Offload(_) => 1,
            Self::Replicate(_) => 2,
            Self::Ttl(_) => 3,
            Self::Priority(_) => 4,
            Self::Pin(_) => 5,
            Self::Evict(_) => 6,
            Self::WriteBehind(_) => 7,
        }
    }

    pub(super) const fn apply(self, to: &mut Lifecycle) {
        match self {
            Self::Tiers(tiers) => to.tiers = tiers,
            Self::Offload(offload) => to.offload = offload,
            Self::Replicate(copies) => to.replicate = copies,
            Self::Ttl(ttl) => to.ttl = Some(ttl),
            Self::Priority(priority) => to.priority = Some(priority),
            Self::Pin(pin) => to.pin = pin,
            Self::Evict(evict) => to.evict = evict,
            Self::WriteBehind(when) => to.write_behind = Some(when),
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tiers(tiers) | Self::Offload(OffloadRule::To(tiers)) => write!(f, "{tiers}"),
            Self::Offload(OffloadRule::Never) => f.write_str("never"),
            Self::Replicate(Copies::All) => f.write_str("all"),
            Self::Replicate(Copies::Some(n)) => write!(f, "{n}"),
            Self::Ttl(ttl) => f.write_str(&span_text(*ttl)),
            Self::Priority(priority) => write!(f, "{priority}"),
            Self::Pin(pin) => write!(f, "{pin}"),
            Self::Evict(EvictOrder::First) => f.write_str("first"),
            Self::Evict(EvictOrder::Normal) => f.write_str("normal"),
            Self::WriteBehind(WriteWhen::Read) => f.write_str("read"),
            Self::WriteBehind(WriteWhen::All) => f.write_str("all"),
            Self::WriteBehind(WriteWhen::Nothing) => f.write_str("none"),
        }
    }
}

/// A span in the largest unit that says it whole.
fn span_text(span: Duration) -> String {
    let millis = span.as_millis();
    let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s")];
    let whole = units.into_iter().find(|(unit, _)| millis > 0 && millis.is_multiple_of(*unit));
    whole.map_or_else(|| format!("{millis}ms"), |(unit, name)| format!("{}{name}", millis / unit))
}
