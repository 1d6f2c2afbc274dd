//! Where to run a step: what it would cost on each node, and the least of that.
//!
//! `cost(node) = queue + recompute(what is nowhere near) + load(what is near) + value displaced`. A step stays where its
//! program is unless another node is better by more than [`STICK_SHARE`].

use std::time::Duration;

/// By how much another node must be better.
pub const STICK_SHARE: f64 = 0.1;

/// What a step would cost on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// The node's number, the caller's.
    pub node: u32,
    /// Until the node's engine turns to it.
    pub queue: Duration,
    /// Computing what is not loaded.
    pub recompute: Duration,
    /// Loading what is loaded.
    pub load: Duration,
    /// What others lose by what is evicted for it.
    pub displaced: Duration,
}

impl Candidate {
    /// All of it.
    #[must_use]
    pub fn cost(&self) -> Duration {
        self.queue + self.recompute + self.load + self.displaced
    }
}

/// Why a node was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The program is there, and nowhere is it much better.
    Stays,
    /// Its state is there.
    State,
    /// It would wait elsewhere.
    Queue,
}

/// A node chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// Which.
    pub node: u32,
    /// What it costs there.
    pub cost: Duration,
    /// Why.
    pub reason: Reason,
}

/// Chooses among candidates; `current` is where the program is. Of equal ones the first. `None` if there is none.
#[must_use]
pub fn place(candidates: &[Candidate], current: Option<u32>) -> Option<Choice> {
    let best = candidates.iter().min_by_key(|c| c.cost())?;
    if let Some(here) = candidates.iter().find(|c| Some(c.node) == current) {
        let worth = here.cost().mul_f64(1.0 - STICK_SHARE);
        if here.node == best.node || best.cost() >= worth {
            return Some(Choice { node: here.node, cost: here.cost(), reason: Reason::Stays });
        }
    }
    let state = |c: &Candidate| c.recompute + c.load;
    let least = candidates.iter().map(state).min()?;
    let reason = if state(best) <= least { Reason::State } else { Reason::Queue };
    Some(Choice { node: best.node, cost: best.cost(), reason })
}

/// How many of the leading blocks of a run to load where the rest is computed: loading the first `n` takes
/// `load(n)`, computing what is after them `recompute(n)`.
///
/// All or nothing: with costs that are about linear the best is at an end.
#[must_use]
pub fn split(blocks: u32, load: impl Fn(u32) -> Duration, recompute: impl Fn(u32) -> Duration) -> u32 {
    if load(blocks) + recompute(blocks) <= load(0) + recompute(0) { blocks } else { 0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop, proptest};

    use super::*;

    const fn candidate(node: u32, queue: u64, recompute: u64) -> Candidate {
        let ms = Duration::from_millis;
        Candidate { node, queue: ms(queue), recompute: ms(recompute), load: ms(0), displaced: ms(0) }
    }

    #[test]
    fn the_least_cost_wins_and_says_why() {
        let nodes = [candidate(0, 500, 100), candidate(1, 10, 400), candidate(2, 0, 2000)];
        let choice = place(&nodes, None).unwrap();
        assert_eq!((choice.node, choice.reason), (1, Reason::Queue));
        assert_eq!(place(&nodes[..1], None).unwrap().reason, Reason::State);
        assert_eq!(place(&[], None), None);
    }

    #[test]
    fn a_program_stays_for_a_tenth() {
        let nodes = [candidate(0, 0, 105), candidate(1, 0, 100)];
        assert_eq!(
            place(&nodes, Some(0)).unwrap(),
            Choice { node: 0, cost: Duration::from_millis(105), reason: Reason::Stays }
        );
        assert_eq!(place(&[candidate(0, 0, 200), nodes[1]], Some(0)).unwrap().node, 1);
    }

    #[test]
    fn what_loads_slower_than_it_computes_is_computed() {
        let ms = |n: u32| Duration::from_millis(u64::from(n));
        assert_eq!(split(10, |n| ms(2 * n), |n| ms(3 * (10 - n))), 10);
        assert_eq!(split(10, |n| ms(4 * n), |n| ms(3 * (10 - n))), 0);
    }

    proptest! {
        /// Nobody is chosen that is worse than the best by more than sticking allows.
        #[test]
        fn never_much_worse_than_the_best(costs in prop::collection::vec((0_u64..1000, 0_u64..1000), 1..100), here in 0_u32..100) {
            let nodes: Vec<Candidate> = (0..).zip(&costs).map(|(n, (q, r))| candidate(n, *q, *r)).collect();
            let choice = place(&nodes, Some(here)).unwrap();
            let best = nodes.iter().map(Candidate::cost).min().unwrap();
            assert!(choice.cost.mul_f64(1.0 - STICK_SHARE) <= best + Duration::from_nanos(2));
        }
    }
}
