//! All segments of a node: who is in them, how old they are, and what became of them.
//!
//! *Bounds*: a segment lives as long as a block, here or remembered as a ghost, is in it; ages advance in amortized O(1);
//! programs are bounded by [`MAX_PROGRAMS`]; the log of changes by [`MAX_CHANGES`].

use std::collections::VecDeque;
use std::time::Duration;

use kvtier_types::{Instant, SemanticType};

use super::class::{Classes, Features, MAX_USES, octave, returns_bucket};
use super::curve::{AGES, ends};
use super::segment::{CallFacts, Cell, Change, Pause, Segment, SegmentId, Standing};
use crate::evict::RecentKeys;

/// Programs remembered at once.
const MAX_PROGRAMS: usize = 16_384;
/// Steps of growing older in one call.
const MAX_STEPS: usize = 1024;
/// Changes kept for rankings to take in; one that is further behind looks at everything anew.
const MAX_CHANGES: usize = 16_384;

/// A program's latest call.
#[derive(Debug, Clone, Default)]
struct Program {
    seen: Option<Instant>,
    /// Average pause, in seconds.
    pause: Option<f64>,
    segments: Vec<(SegmentId, u32)>,
}

#[derive(Debug, Default)]
struct OpenCall {
    facts: CallFacts,
    features: Features,
    now: Instant,
    segments: Vec<SegmentId>,
    run: Option<Run>,
}

/// Blocks in a row that were in one segment and are in one now: counted at once.
#[derive(Debug, Clone, Copy)]
struct Run {
    former: SegmentId,
    semantic: SemanticType,
    segment: SegmentId,
    blocks: u32,
}

/// All segments of a node, and what was learnt from them.
#[derive(Debug)]
pub struct Segments {
    slots: Vec<Segment>,
    free: Vec<u32>,
    /// Segments of each age, oldest first, with the generation they were put in with.
    aging: Vec<VecDeque<(u32, u32)>>,
    ends: [Duration; AGES],
    classes: Classes,
    programs: rustc_hash::FxHashMap<u64, Program>,
    program_order: RecentKeys<u64>,
    call: OpenCall,
    /// Segments left empty during the open call: rankings may name them until it ends.
    emptied: Vec<u32>,
    changes: VecDeque<Change>,
    first_change: u64,
    now: Instant,
}

impl Default for Segments {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            aging: vec![VecDeque::new(); AGES],
            ends: ends(),
            classes: Classes::default(),
            programs: rustc_hash::FxHashMap::default(),
            program_order: RecentKeys::new(MAX_PROGRAMS),
            call: OpenCall::default(),
            emptied: Vec::new(),
            changes: VecDeque::new(),
            first_change: 0,
            now: Instant::ZERO,
        }
    }
}

impl Segments {
    /// Lets time pass: segments grow older, in at most so many steps a call that what is left over waits for the next.
    pub fn advance(&mut self, now: Instant) {
        self.now = self.now.max(now);
        let mut steps = MAX_STEPS;
        for age in 0..AGES - 1 {
            while let Some(&(at, generation)) = self.aging[age].front() {
                let segment = &mut self.slots[at as usize];
                let gone = segment.generation != generation || segment.standing == Standing::Ended;
                if !gone && self.now.since(segment.touched) < self.ends[age] {
                    break;
                }
                if steps == 0 {
                    return;
                }
                steps -= 1;
                self.aging[age].pop_front();
                if gone {
                    continue;
                }
                segment.age += 1;
                let (class, older) = (segment.class, segment.age);
                let open = segment.blocks as f32 / segment.size as f32;
                self.classes.count_reached(class, older, open);
                self.await_age(at, older, generation);
                self.note(Change::Place(SegmentId(at)));
            }
        }
    }

    /// A segment waits to grow older; at the last age it does not.
    fn await_age(&mut self, at: u32, age: u8, generation: u32) {
        if usize::from(age) < AGES - 1 {
            self.aging[usize::from(age)].push_back((at, generation));
        }
    }

    /// Between calls: segments grow older, and what was left empty is free.
    pub fn rest(&mut self, now: Instant) {
        self.end_run();
        self.advance(now);
        self.free_emptied();
    }

    /// A call begins: blocks it uses follow, then [`Segments::end_call`].
    pub fn begin_call(&mut self, now: Instant, facts: CallFacts) {
        self.advance(now);
        let mut features = Features {
            stop: facts.stop,
            sub_agent: facts.sub_agent,
            returns: facts.returns_in.map_or(0, returns_bucket),
            length: length_bucket(facts.blocks),
            ..Features::default()
        };
        if let Some(name) = facts.program {
            // Who has not been seen for longest is forgotten; what it left goes by its age alone.
            if let (_, Some(oldest)) = self.program_order.put(name, name) {
                self.programs.remove(&oldest);
            }
            let program = self.programs.entry(name).or_default();
            if let Some(seen) = program.seen {
                let pause = self.now.since(seen).as_secs_f64();
                program.pause = Some(program.pause.map_or(pause, |p| 0.4f64.mul_add(pause, 0.6 * p)));
            }
            program.seen = Some(self.now);
            features.idleness = program.pause.map_or(0, |p| octave(p, 1.0, 12));
        }
        let mut segments = std::mem::take(&mut self.call.segments);
        segments.clear();
        self.call = OpenCall { facts, features, now: self.now, segments, run: None };
    }

    /// A call goes on: what it uses joins what its program's latest call used. Of a program that is not known it is a call
    /// of its own.
    pub fn continue_call(&mut self, now: Instant, facts: CallFacts) {
        let Some(name) = facts.program.filter(|name| self.programs.contains_key(name)) else {
            return self.begin_call(now, facts);
        };
        self.advance(now);
        let mut open: Vec<SegmentId> = Vec::new();
        for (id, generation) in &self.programs[&name].segments {
            let segment = &self.slots[id.0 as usize];
            if segment.generation == *generation && segment.standing == Standing::Open {
                open.push(*id);
            }
        }
        // Nothing tells it from the call that it belongs to but the blocks it adds.
        let like = open.last().map(|id| self.slots[id.0 as usize].features);
        let features = Features {
            semantic: SemanticType::default(),
            shared: false,
            orphan: false,
            uses: 0,
            ..like.unwrap_or(Features {
                sub_agent: facts.sub_agent,
                length: length_bucket(facts.blocks),
                ..Features::default()
            })
        };
        self.call = OpenCall { facts, features, now: self.now, segments: open, run: None };
    }

    /// A program says that it waits: for what, and for how long. What it used last is of another class from then on.
    pub fn pause(&mut self, name: u64, pause: Pause) {
        let Some(program) = self.programs.get(&name) else { return };
        for (id, generation) in program.segments.clone() {
            let segment = &mut self.slots[id.0 as usize];
            let features = segment.features;
            let is_own = segment.generation == generation && segment.standing == Standing::Open;
            if !is_own || features.shared || features.orphan {
                continue;
            }
            let returns = pause.returns_in.map_or(0, returns_bucket);
            segment.features = Features { stop: pause.stop, returns, ..features };
            let class = self.classes.number(segment.features);
            if class != segment.class {
                segment.class = class;
                let open = segment.blocks as f32 / segment.size.max(1) as f32;
                self.classes.count_reached(class, segment.age, open);
                self.note(Change::Place(id));
            }
        }
    }

    /// The call uses a block that was in `former`, or that nothing is known of. Returns the segment it is in now.
    pub fn use_block(&mut self, former: SegmentId, semantic: SemanticType) -> SegmentId {
        if let Some(run) = self.call.run.as_mut().filter(|run| run.former == former && run.semantic == semantic) {
            run.blocks += 1;
            return run.segment;
        }
        if self.call.segments.contains(&former) {
            // Twice in one call is once.
            return former;
        }
        self.end_run();
        let features = self.features_after(former, semantic);
        let segment = self.segment(features);
        self.call.run = Some(Run { former, semantic, segment, blocks: 1 });
        segment
    }

    /// What is known of blocks that were in `former` until the open call used them.
    fn features_after(&self, former: SegmentId, semantic: SemanticType) -> Features {
        let call = Features { semantic, ..self.call.features };
        if former == SegmentId::NONE {
            return call;
        }
        let segment = &self.slots[former.0 as usize];
        if let Some(program) = self.call.facts.program {
            return Features { shared: segment.features.shared || program != segment.program, ..call };
        }
        // Where programs are not known, what a block went through itself stands in for what its program is at.
        let pause = self.call.now.since(segment.touched).as_secs_f64();
        Features {
            shared: segment.features.shared,
            uses: (segment.features.uses + 1).min(MAX_USES),
            idleness: octave(pause, 0.5, 12),
            length: 0,
            ..call
        }
    }

    /// Counts the blocks of the open run.
    fn end_run(&mut self) {
        let Some(run) = self.call.run.take() else { return };
        if run.former != SegmentId::NONE {
            let former = &self.slots[run.former.0 as usize];
            if former.standing == Standing::Open {
                self.classes.count_used(former.class, former.age, run.blocks as f32 / former.size as f32);
            }
            self.take_out(run.former, run.blocks);
        }
        let segment = &mut self.slots[run.segment.0 as usize];
        if segment.blocks == 0 && segment.size > 0 {
            // It was left empty in this call: it grows older again.
            let (age, generation) = (segment.age, segment.generation);
            self.await_age(run.segment.0, age, generation);
        }
        let segment = &mut self.slots[run.segment.0 as usize];
        segment.blocks += run.blocks;
        segment.size = segment.size.max(segment.blocks);
    }

    /// The segment of the open call with these features.
    fn segment(&mut self, features: Features) -> SegmentId {
        let same = |id: &&SegmentId| self.slots[id.0 as usize].features == features;
        if let Some(id) = self.call.segments.iter().rev().find(same) {
            return *id;
        }
        let id = self.fresh(features, self.call.facts.program.unwrap_or(0), self.call.now);
        self.call.segments.push(id);
        id
    }

    /// A segment without blocks.
    fn fresh(&mut self, features: Features, program: u64, touched: Instant) -> SegmentId {
        let class = self.classes.number(features);
        let fresh = Segment {
            generation: 0,
            class,
            age: 0,
            standing: Standing::Open,
            features,
            program,
            touched,
            blocks: 0,
            size: 0,
        };
        let at = if let Some(at) = self.free.pop() {
            let slot = &mut self.slots[at as usize];
            *slot = Segment { generation: slot.generation, ..fresh };
            at
        } else {
            self.slots.push(fresh);
            u32::try_from(self.slots.len() - 1).expect("fewer segments than block ids")
        };
        self.aging[0].push_back((at, self.slots[at as usize].generation));
        self.classes.count_reached(class, 0, 1.0);
        SegmentId(at)
    }

    /// A block comes that no call uses, of a segment like that of the block before it.
    pub fn beside(&mut self, parent: SegmentId, semantic: SemanticType) -> SegmentId {
        self.end_run();
        let like = |segment: &Segment| {
            segment.blocks > 0
                && segment.standing == Standing::Open
                && segment.features.semantic == semantic
                && !segment.features.orphan
        };
        let at = match self.slots.get(parent.0 as usize) {
            Some(segment) if parent != SegmentId::NONE && like(segment) => parent,
            _ => self.fresh(Features { semantic, ..Features::default() }, 0, self.now),
        };
        let segment = &mut self.slots[at.0 as usize];
        segment.blocks += 1;
        segment.size = segment.size.max(segment.blocks);
        at
    }

    /// A block of the segment is not even remembered any more.
    pub fn leave(&mut self, id: SegmentId) {
        if id != SegmentId::NONE {
            self.end_run();
            self.take_out(id, 1);
        }
    }

    fn take_out(&mut self, id: SegmentId, blocks: u32) {
        let segment = &mut self.slots[id.0 as usize];
        segment.blocks -= blocks;
        if segment.blocks == 0 {
            segment.generation = segment.generation.wrapping_add(1);
            self.emptied.push(id.0);
        }
    }

    /// The call has ended: what its program left behind is orphaned, and all of it if the program ends.
    pub fn end_call(&mut self) {
        self.end_run();
        let Some(name) = self.call.facts.program else {
            self.refit();
            return;
        };
        let used: Vec<(SegmentId, u32)> = self
            .call
            .segments
            .iter()
            .filter(|id| self.slots[id.0 as usize].blocks > 0)
            .map(|id| (*id, self.slots[id.0 as usize].generation))
            .collect();
        let program = self.programs.entry(name).or_default();
        let former = std::mem::replace(&mut program.segments, used);
        for (id, generation) in former {
            if self.call.segments.contains(&id) {
                continue;
            }
            let segment = &mut self.slots[id.0 as usize];
            if segment.generation == generation && !segment.features.shared && !segment.features.orphan {
                segment.features.orphan = true;
                segment.class = self.classes.number(segment.features);
                let open = segment.blocks as f32 / segment.size as f32;
                self.classes.count_reached(segment.class, segment.age, open);
                self.note(Change::Place(id));
            }
        }
        if self.call.facts.last {
            self.end_program(name);
        }
        self.refit();
    }

    /// A program ended: what only it used will not be used again.
    pub fn end_program(&mut self, name: u64) {
        let Some(program) = self.programs.remove(&name) else { return };
        self.program_order.take(name);
        for (id, generation) in program.segments {
            let segment = &mut self.slots[id.0 as usize];
            if segment.generation == generation && !segment.features.shared && keeps_no_others(segment.features) {
                segment.standing = Standing::Ended;
                self.note(Change::Place(id));
            }
        }
    }

    /// Whether more than one program uses, or may use, the blocks of a segment.
    #[must_use]
    pub fn is_shared(&self, id: SegmentId) -> bool {
        id != SegmentId::NONE && {
            let features = self.slots[id.0 as usize].features;
            features.shared || !keeps_no_others(features)
        }
    }

    fn free_emptied(&mut self) {
        self.emptied.sort_unstable();
        self.emptied.dedup();
        let slots = &self.slots;
        self.free.extend(self.emptied.drain(..).filter(|at| slots[*at as usize].blocks == 0));
    }

    fn refit(&mut self) {
        self.free_emptied();
        if let Some(class) = self.classes.fit_next() {
            self.note(Change::Class(class));
        }
    }

    fn note(&mut self, change: Change) {
        self.changes.push_back(change);
        if self.changes.len() > MAX_CHANGES {
            self.changes.pop_front();
            self.first_change += 1;
        }
    }

    /// Changes from number `from` on, `None` when some of them are not known any more; and the number after the last.
    pub(super) fn changes_since(&self, from: u64) -> (Option<impl Iterator<Item = Change>>, u64) {
        let end = self.first_change + self.changes.len() as u64;
        let skip = from.checked_sub(self.first_change).and_then(|skip| usize::try_from(skip).ok());
        (skip.map(|skip| self.changes.iter().skip(skip).copied()), end)
    }

    /// Uses per second to be had from a segment; of none, nothing.
    pub(crate) fn worth(&self, id: SegmentId) -> f64 {
        f64::from(self.cell(id).value)
    }

    /// Where a segment stands.
    pub(super) fn cell(&self, id: SegmentId) -> Cell {
        if id == SegmentId::NONE {
            return Cell { key: 0, value: 0.0 };
        }
        let segment = &self.slots[id.0 as usize];
        if segment.standing == Standing::Ended {
            return Cell { key: 1, value: 0.0 };
        }
        let key = u32::from(segment.class) << 16 | u32::from(segment.age) << 8 | 2;
        Cell { key, value: self.value(key) }
    }

    /// The value of a cell.
    pub(super) fn value(&self, key: u32) -> f32 {
        if key & 2 == 0 {
            return 0.0;
        }
        let [_, class, age, _] = key.to_be_bytes();
        self.classes.index(class, age)
    }

    /// Value of a segment, and the cell it stands in.
    #[cfg(test)]
    pub(crate) fn rank_of(&self, id: SegmentId) -> (f32, u32) {
        let cell = self.cell(id);
        (cell.value, cell.key)
    }

    /// Blocks in all segments.
    #[cfg(test)]
    pub(crate) fn blocks(&self) -> usize {
        self.slots.iter().map(|segment| segment.blocks as usize).sum()
    }

    /// Segments at present, and classes so far.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        (self.slots.len() - self.free.len(), self.classes.len())
    }
}

/// Types that other programs are expected to use too.
const fn keeps_no_others(features: Features) -> bool {
    !matches!(features.semantic, SemanticType::SystemPrompt | SemanticType::ToolDefinition)
}

/// The length of a call in octaves of blocks.
fn length_bucket(blocks: u32) -> u8 {
    u8::try_from((blocks + 1).ilog2().saturating_sub(4).min(5)).unwrap_or(0)
}
