//! A declaration that was checked: steps in an order in which none comes before those that it waits for.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvtier_types::{DIGEST_BYTES, SemanticType};

use super::shared::{MAX_SHARED_KEYS, SharedContext};

/// Steps of one program.
pub const MAX_STEPS_PER_GRAPH: usize = 4096;
/// Steps that one step waits for.
pub const MAX_BEFORE: usize = 64;
/// Bytes of a step's id, of its program's and of its kind, each.
pub const MAX_STEP_NAME_BYTES: usize = 128;
/// Bytes of one declaration, so that it fits one frame of the journal.
pub const MAX_GRAPH_BYTES: usize = 768 << 10;
/// Longest that a step or a gap is reckoned with.
pub const LONGEST_STEP: Duration = Duration::from_secs(7 * 86_400);

/// Bytes of a step beside its names, and of a name beside its text, as messages encode them at most.
const STEP_BYTES: usize = 48;
const NAME_BYTES: usize = 4;
/// The same of what a step shares, beside its program's name or its keys.
const SHARED_BYTES: usize = 24;
/// Steps of a circle that are named.
const NAMED: usize = 8;

/// A declared step.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Step {
    /// Its name, unique in its graph.
    pub id: String,
    /// The branch that runs it; empty for the declared program itself.
    pub program: String,
    /// Ids of the steps that end before it begins.
    pub after: Vec<String>,
    /// How long engines take for it, where that is known.
    pub expected: Option<Duration>,
    /// How long tools run between the last of those before it and it.
    pub gap: Duration,
    /// Tokens of its context, zero when unknown.
    pub tokens: u32,
    /// Steps of one kind take alike.
    pub kind: String,
    /// What the context is that it shares with others.
    pub shares: SemanticType,
    /// Which part of whose context that is; all up to the last block of the type when nothing is said here.
    pub shared: Option<SharedContext>,
}

/// Why a declaration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadGraph {
    /// More steps than one program may have.
    #[error("{0} steps, at most {MAX_STEPS_PER_GRAPH} a program: declare parts of it as programs of their own")]
    TooManySteps(usize),
    /// A declaration that is too long.
    #[error("the steps have {0} bytes in all, at most {MAX_GRAPH_BYTES}: shorten ids and kinds")]
    TooLong(usize),
    /// A name that cannot be one.
    #[error("step {at} has {what} of {bytes} bytes, it may have {least} to {MAX_STEP_NAME_BYTES} and no zero byte")]
    BadName {
        /// Number of the step in the declaration, from zero.
        at: usize,
        /// Which of its names.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// The least that it may have.
        least: usize,
    },
    /// Two steps of one id.
    #[error("two steps are called {0:?}: ids are unique in a program")]
    Twice(String),
    /// More steps before one than are allowed.
    #[error("step {step:?} waits for {count} steps, at most {MAX_BEFORE}: put a step between that waits for some")]
    TooManyBefore {
        /// Which step.
        step: String,
        /// For how many it waits.
        count: usize,
    },
    /// A step waits for one that was not declared.
    #[error("step {step:?} waits for {after:?}, which is not declared")]
    Unknown {
        /// Which step.
        step: String,
        /// What it names.
        after: String,
    },
    /// A part of a context that is none.
    #[error("step {step:?} shares {what}")]
    BadShared {
        /// Which step.
        step: String,
        /// What is wrong with it.
        what: String,
    },
    /// Steps wait for each other.
    #[error("steps wait for each other: {}", .0.join(" -> "))]
    Circle(Vec<String>),
}

/// Checked steps.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    steps: Vec<Step>,
    /// For each step those that it waits for, all of lower numbers.
    before: Vec<Vec<u32>>,
    /// For each step those that wait for it.
    next: Vec<Vec<u32>>,
    bytes: usize,
}

impl Plan {
    /// Checks steps and puts them in order.
    ///
    /// # Errors
    /// What is wrong with the first that cannot be used.
    pub fn new(mut steps: Vec<Step>) -> Result<Self, BadGraph> {
        for step in &mut steps {
            step.gap = step.gap.min(LONGEST_STEP);
            step.expected = step.expected.map(|expected| expected.min(LONGEST_STEP));
        }
        if steps.len() > MAX_STEPS_PER_GRAPH {
            return Err(BadGraph::TooManySteps(steps.len()));
        }
        for (at, step) in steps.iter().enumerate() {
            check_names(at, step)?;
        }
        let bytes = steps.iter().map(bytes_of).sum();
        if bytes > MAX_GRAPH_BYTES {
            return Err(BadGraph::TooLong(bytes));
        }
        let before = numbers(&steps)?;
        let order = order(&steps, &before)?;
        Ok(Self::in_order(steps, &before, &order, bytes))
    }

    fn in_order(steps: Vec<Step>, before: &[Vec<u32>], order: &[u32], bytes: usize) -> Self {
        let mut place = vec![0; order.len()];
        for (to, from) in (0..).zip(order) {
            place[*from as usize] = to;
        }
        let mut sorted: Vec<Option<Step>> = steps.into_iter().map(Some).collect();
        let mut plan = Self { bytes, next: vec![Vec::new(); order.len()], ..Self::default() };
        for (number, from) in (0..).zip(order) {
            let of_step: Vec<u32> = before[*from as usize].iter().map(|b| place[*b as usize]).collect();
            for earlier in &of_step {
                plan.next[*earlier as usize].push(number);
            }
            plan.before.push(of_step);
            plan.steps.extend(sorted[*from as usize].take());
        }
        plan
    }

    /// The steps, none before those that it waits for.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// For each step the numbers of those that it waits for, all lower than its own.
    #[must_use]
    pub fn before(&self) -> &[Vec<u32>] {
        &self.before
    }

    /// For each step the numbers of those that wait for it.
    #[must_use]
    pub fn next(&self) -> &[Vec<u32>] {
        &self.next
    }

    /// Bytes of the declaration as a message, at most.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

fn check_names(at: usize, step: &Step) -> Result<(), BadGraph> {
    let names = [("an id", &step.id, 1), ("a program_id", &step.program, 0), ("a kind", &step.kind, 0)];
    for (what, text, least) in names {
        if text.len() < least || text.len() > MAX_STEP_NAME_BYTES || text.contains('\0') {
            return Err(BadGraph::BadName { at, what, bytes: text.len(), least });
        }
    }
    if step.after.len() > MAX_BEFORE {
        return Err(BadGraph::TooManyBefore { step: step.id.clone(), count: step.after.len() });
    }
    step.shared.as_ref().map_or(Ok(()), |shared| check_shared(at, step, shared))
}

fn check_shared(at: usize, step: &Step, shared: &SharedContext) -> Result<(), BadGraph> {
    let bad = |what: String| Err(BadGraph::BadShared { step: step.id.clone(), what });
    match shared {
        SharedContext::Tokens { program, .. } if program.len() > MAX_STEP_NAME_BYTES || program.contains('\0') => {
            Err(BadGraph::BadName { at, what: "a program_id of what it shares", bytes: program.len(), least: 0 })
        }
        SharedContext::Tokens { start, end, .. } if *end != 0 && start >= end => {
            bad(format!("tokens {start} to {end}, which are none"))
        }
        SharedContext::Blocks(keys) if keys.is_empty() || keys.len() > MAX_SHARED_KEYS => {
            bad(format!("{} blocks, it may name 1 to {MAX_SHARED_KEYS}: the last of each group", keys.len()))
        }
        _ => Ok(()),
    }
}

fn bytes_of(step: &Step) -> usize {
    let names = [&step.id, &step.program, &step.kind].into_iter().chain(&step.after);
    let shared = match &step.shared {
        None => 0,
        Some(SharedContext::Tokens { program, .. }) => SHARED_BYTES + program.len(),
        Some(SharedContext::Blocks(keys)) => SHARED_BYTES + keys.len() * DIGEST_BYTES,
    };
    STEP_BYTES + shared + names.map(|name| NAME_BYTES + name.len()).sum::<usize>()
}

/// For each step the numbers of those that it waits for, as they are declared, each once.
fn numbers(steps: &[Step]) -> Result<Vec<Vec<u32>>, BadGraph> {
    let mut by_id: BTreeMap<&str, u32> = BTreeMap::new();
    for (number, step) in (0..).zip(steps) {
        if by_id.insert(&step.id, number).is_some() {
            return Err(BadGraph::Twice(step.id.clone()));
        }
    }
    let of_step = |step: &Step| {
        let number = |after: &String| {
            let unknown = || BadGraph::Unknown { step: step.id.clone(), after: after.clone() };
            by_id.get(after.as_str()).copied().ok_or_else(unknown)
        };
        Ok(step.after.iter().map(number).collect::<Result<BTreeSet<u32>, BadGraph>>()?.into_iter().collect())
    };
    steps.iter().map(of_step).collect()
}

/// The steps' numbers, none before those that it waits for; else as they are declared.
fn order(steps: &[Step], before: &[Vec<u32>]) -> Result<Vec<u32>, BadGraph> {
    let mut missing: Vec<usize> = before.iter().map(Vec::len).collect();
    let mut next: Vec<Vec<u32>> = vec![Vec::new(); steps.len()];
    for (number, of_step) in (0..).zip(before) {
        for earlier in of_step {
            next[*earlier as usize].push(number);
        }
    }
    let mut free: BTreeSet<u32> = (0..).zip(&missing).filter(|(_, count)| **count == 0).map(|(n, _)| n).collect();
    let mut order = Vec::with_capacity(steps.len());
    while let Some(number) = free.pop_first() {
        order.push(number);
        for later in &next[number as usize] {
            missing[*later as usize] -= 1;
            if missing[*later as usize] == 0 {
                free.insert(*later);
            }
        }
    }
    if order.len() == steps.len() { Ok(order) } else { Err(BadGraph::Circle(circle(steps, before, &missing))) }
}

/// The ids of steps that wait for each other, the first one again at the end.
fn circle(steps: &[Step], before: &[Vec<u32>], missing: &[usize]) -> Vec<String> {
    let stuck = |n: &u32| missing[*n as usize] > 0;
    // Whoever is stuck waits for somebody who is, so that this walk comes back to where it was.
    let mut seen = BTreeMap::new();
    let mut walk = Vec::new();
    let mut at = (0..).zip(missing).find(|(_, count)| **count > 0).map(|(n, _)| n);
    while let Some(number) = at.filter(|n| !seen.contains_key(n)) {
        seen.insert(number, walk.len());
        walk.push(number);
        at = before[number as usize].iter().copied().find(stuck);
    }
    let from = at.and_then(|number| seen.get(&number).copied()).unwrap_or(0);
    // Said in the order in which they would run.
    let mut ids: Vec<String> = walk[from..].iter().rev().map(|n| steps[*n as usize].id.clone()).collect();
    let first = ids.first().cloned().unwrap_or_default();
    if ids.len() > NAMED {
        let left = ids.len() - NAMED;
        ids.truncate(NAMED);
        ids.push(format!("{left} more"));
    }
    ids.push(first);
    ids
}
