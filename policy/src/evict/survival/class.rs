//! Classes of segments: features that tell apart what is used again soon from what is not.

use std::time::Duration;

use kvtier_types::SemanticType;
use rustc_hash::FxHashMap;

use super::curve::{AGES, Curve};

/// Classes at once.
pub const MAX_CLASSES: usize = 256;
/// Chance of a use at each age before anything was seen: equal on a logarithmic scale, which ranks as LRU does.
const PRIOR: f64 = 0.05;
/// The same for what its program went on without.
const ORPHAN_PRIOR: f64 = 1e-3;

/// Uses of a block that are told apart: beyond a few, its pauses say more than their number.
pub(super) const MAX_USES: u8 = 5;

/// Why a model call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum StopReason {
    /// Nobody said.
    #[default]
    Unknown,
    /// It called a tool: the program goes on when that returns.
    ToolUse,
    /// It answered a person.
    EndTurn,
    /// It waits for branches of its own program.
    Join,
}

/// What is known of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Features {
    pub(super) semantic: SemanticType,
    pub(super) stop: StopReason,
    pub(super) sub_agent: bool,
    /// More than one program uses it.
    pub(super) shared: bool,
    /// Its program went on without it.
    pub(super) orphan: bool,
    /// How often its blocks were used before, up to [`MAX_USES`], where no program is known.
    pub(super) uses: u8,
    /// The usual pause of its program, in octaves; without a program the last pause of its blocks, in double octaves. 0
    /// unknown.
    pub(super) idleness: u8,
    /// The announced return, in half octaves; 0 unknown.
    pub(super) returns: u8,
    /// The length of the call, in octaves.
    pub(super) length: u8,
}

impl Features {
    /// What matters of them: a feature that says nothing beside another is left out, so that classes stay few.
    fn essential(self) -> Self {
        let plain = Self { semantic: self.semantic, uses: self.uses, ..Self::default() };
        if self.shared {
            return Self { shared: true, ..plain };
        }
        if self.orphan {
            return Self { orphan: true, sub_agent: self.sub_agent, stop: self.stop, ..plain };
        }
        let idleness = if self.returns > 0 { 0 } else { self.idleness };
        Self { idleness, ..self }
    }

    /// The same with less detail, for when there are too many classes.
    fn coarser(self) -> Self {
        Self { length: 0, idleness: self.idleness / 2, uses: 0, ..self }
    }

    const fn pool(self) -> usize {
        if self.shared {
            1
        } else if self.orphan {
            2
        } else {
            0
        }
    }
}

/// Octaves of seconds: 1 up to one second, one more for each doubling.
pub(super) fn octave(seconds: f64, per_octave: f64, most: u8) -> u8 {
    let mut octave = 1;
    let step = per_octave.recip().exp2();
    let mut bound = 1.0;
    while octave < most && seconds > bound {
        bound *= step;
        octave += 1;
    }
    octave
}

/// The bucket of an announced return.
pub(super) fn returns_bucket(after: Duration) -> u8 {
    octave(after.as_secs_f64(), 2.0, 24)
}

/// All classes, and the pooled curves they lean on.
#[derive(Debug)]
pub(super) struct Classes {
    numbers: FxHashMap<Features, u8>,
    curves: Vec<(usize, Curve)>,
    pooled: [Curve; 3],
    next_fit: usize,
}

impl Default for Classes {
    fn default() -> Self {
        let mut classes = Self {
            numbers: FxHashMap::default(),
            curves: Vec::new(),
            pooled: [Curve::new(), Curve::new(), Curve::new()],
            next_fit: 0,
        };
        // Number 0 takes what fits nowhere else.
        classes.number(Features::default());
        classes
    }
}

impl Classes {
    /// The class of so many features.
    pub(super) fn number(&mut self, features: Features) -> u8 {
        let features = features.essential();
        for candidate in [features, features.coarser()] {
            if let Some(number) = self.numbers.get(&candidate) {
                return *number;
            }
            // The last quarter is kept for coarse classes.
            let room = if candidate == features { MAX_CLASSES * 3 / 4 } else { MAX_CLASSES };
            if self.curves.len() < room {
                let number = u8::try_from(self.curves.len()).expect("there are at most 256 classes");
                let mut curve = Curve::new();
                curve.fit(&self.prior(candidate.pool()));
                self.curves.push((candidate.pool(), curve));
                self.numbers.insert(candidate, number);
                return number;
            }
        }
        0
    }

    fn prior(&self, pool: usize) -> [f64; AGES] {
        let prior = if pool == 2 { ORPHAN_PRIOR } else { PRIOR };
        self.pooled[pool].hazards(&[prior; AGES])
    }

    pub(super) fn count_reached(&mut self, class: u8, age: u8, weight: f32) {
        let (pool, curve) = &mut self.curves[usize::from(class)];
        curve.count_reached(age, weight);
        self.pooled[*pool].count_reached(age, weight);
    }

    pub(super) fn count_used(&mut self, class: u8, age: u8, weight: f32) {
        let (pool, curve) = &mut self.curves[usize::from(class)];
        curve.count_used(age, weight);
        self.pooled[*pool].count_used(age, weight);
    }

    /// Uses per second to be had from a segment.
    pub(super) fn index(&self, class: u8, age: u8) -> f32 {
        self.curves[usize::from(class)].1.index(age)
    }

    /// Refits one class that needs it, in turn. Returns which.
    pub(super) fn fit_next(&mut self) -> Option<u8> {
        let count = self.curves.len();
        let number = (0..count).map(|step| (self.next_fit + step) % count).find(|n| self.curves[*n].1.stale)?;
        self.next_fit = (number + 1) % count;
        let pool = self.curves[number].0;
        let prior = self.prior(pool);
        let curve = &mut self.curves[number].1;
        curve.fade();
        curve.fit(&prior);
        self.pooled[pool].fade();
        u8::try_from(number).ok()
    }

    /// Classes so far.
    pub(super) fn len(&self) -> usize {
        self.curves.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_bounded_and_late_ones_are_coarse() {
        let mut classes = Classes::default();
        let mut seen = std::collections::BTreeSet::new();
        for length in 0..40 {
            for idleness in 0..40 {
                seen.insert(classes.number(Features { length, idleness, ..Features::default() }));
            }
        }
        assert!(classes.len() <= MAX_CLASSES && seen.len() <= MAX_CLASSES);
        let late = |length| Features { length, idleness: 200, ..Features::default() };
        assert_eq!(classes.number(late(99)), classes.number(late(98)));
    }

    #[test]
    fn a_class_without_data_follows_its_pool() {
        let mut classes = Classes::default();
        let known = classes.number(Features { length: 1, ..Features::default() });
        for _ in 0..1000 {
            classes.count_reached(known, 0, 1.0);
            classes.count_reached(known, 1, 1.0);
            classes.count_used(known, 1, 0.9);
        }
        let fresh = classes.number(Features { length: 2, ..Features::default() });
        assert!(classes.index(fresh, 0) > 1.0, "most of the pool is used within half a second");
    }
}
