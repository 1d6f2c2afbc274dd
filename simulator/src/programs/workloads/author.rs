//! Writes programs: what the four kinds have in common.

use std::time::Duration;

use kvtier_policy::evict::survival::StopReason;
use kvtier_types::SemanticType;

use super::super::dist::{uniform, whole};
use super::super::tree::{Program, ROOT, SHARED, Step, Tree, Work};
use super::presets::Sizes;
use super::{Knobs, Plan};
use crate::rng::Rng;

/// Longest context, in tokens.
const MAX_CONTEXT_TOKENS: u32 = 120_000;
/// Kinds of tools: each has its own usual time.
const TOOLS: u64 = 6;
/// Groups of programs that share what all of a kind do not.
const GROUPS: u64 = 4;

/// A line of steps that is being written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line {
    pub(crate) lane: u32,
    /// Where its context ends.
    pub(crate) tip: u32,
    /// Its last step.
    pub(crate) step: Option<u32>,
}

/// Something between two calls.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pause {
    pub(crate) gap: Duration,
    pub(crate) tool: u8,
}

/// Writes programs into one tree of blocks.
pub(crate) struct Author {
    pub(crate) rng: Rng,
    pub(crate) knobs: Knobs,
    pub(crate) sizes: Sizes,
    block_tokens: u32,
    tree: Tree,
    programs: Vec<Program>,
    lanes: u32,
    current: Program,
    /// Shared beginnings by role and group: tools and system prompt.
    beginnings: Vec<(u64, u32)>,
}

impl Author {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self {
            rng: Rng::new(plan.seed),
            knobs: plan.knobs,
            sizes: plan.preset.sizes(),
            block_tokens: plan.block_tokens,
            tree: Tree::default(),
            programs: Vec::new(),
            lanes: 0,
            current: Program::default(),
            beginnings: Vec::new(),
        }
    }

    pub(crate) fn begin(&mut self) {
        self.current = Program { arrives: Duration::ZERO, steps: Vec::new(), lanes: (self.lanes, self.lanes) };
    }

    pub(crate) fn finish(&mut self) {
        let mut program = std::mem::take(&mut self.current);
        program.lanes.1 = self.lanes;
        let mut later = rustc_hash::FxHashSet::default();
        for step in program.steps.iter_mut().rev() {
            step.last = later.insert(step.lane);
        }
        self.programs.push(program);
    }

    pub(crate) fn work(self) -> Work {
        Work { tree: self.tree, programs: self.programs, lanes: self.lanes, block_tokens: self.block_tokens }
    }

    fn blocks(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens).max(1)
    }

    /// An agent of a role begins: tools and system prompt that others of its role and group have too, then its task.
    pub(crate) fn agent(&mut self, role: u64, tokens: u32) -> Line {
        let lane = self.lanes;
        self.lanes += 1;
        let shared = self.blocks(whole(f64::from(tokens) * self.knobs.overlap));
        let own = self.blocks(tokens.saturating_sub(shared * self.block_tokens));
        let kind = role * GROUPS + self.rng.below(GROUPS);
        let mut tip = self.beginning(kind, shared);
        tip = self.tree.grow(tip, own, SemanticType::ConversationTurn, lane);
        Line { lane, tip, step: None }
    }

    /// The first so many blocks of a kind's common beginning, which grows as far as anybody needs it.
    fn beginning(&mut self, kind: u64, blocks: u32) -> u32 {
        let at = self.beginnings.iter().position(|(k, _)| *k == kind).unwrap_or_else(|| {
            self.beginnings.push((kind, ROOT));
            self.beginnings.len() - 1
        });
        let tip = self.beginnings[at].1;
        let length = self.tree.length(tip);
        if length >= blocks {
            return self.tree.cut(tip, blocks);
        }
        // A third are tools, the rest the system prompt.
        let semantic = if length == 0 { SemanticType::ToolDefinition } else { SemanticType::SystemPrompt };
        let first = if length == 0 { blocks.div_ceil(3) } else { 0 };
        let tip = self.tree.grow(tip, first, semantic, SHARED);
        let tip = self.tree.grow(tip, blocks - length - first, SemanticType::SystemPrompt, SHARED);
        self.beginnings[at].1 = tip;
        tip
    }

    /// Another line that goes on from where this one is.
    pub(crate) fn fork(&mut self, line: Line) -> Line {
        let lane = self.lanes;
        self.lanes += 1;
        Line { lane, ..line }
    }

    /// A line reads so many tokens.
    pub(crate) fn read(&mut self, line: &mut Line, tokens: u32, semantic: SemanticType) {
        let room = (MAX_CONTEXT_TOKENS / self.block_tokens).saturating_sub(self.tree.length(line.tip));
        let blocks = self.blocks(tokens).min(room);
        line.tip = self.tree.grow(line.tip, blocks, semantic, line.lane);
    }

    /// A line calls the model, after `pause` and after other steps. Returns the step.
    pub(crate) fn call(&mut self, line: &mut Line, after: &[u32], pause: Pause, stop: StopReason) -> u32 {
        let output_tokens = self.sizes.output.whole(&mut self.rng);
        let prompt = line.tip;
        let semantic =
            if stop == StopReason::Join { SemanticType::ReasoningBranch } else { SemanticType::ConversationTurn };
        // An answer's last tokens share a block with what is read next.
        let blocks = output_tokens / self.block_tokens;
        line.tip = self.tree.grow(prompt, blocks, semantic, line.lane);
        let mut after = after.to_vec();
        after.extend(line.step);
        after.sort_unstable();
        after.dedup();
        let step = Step {
            lane: line.lane,
            after,
            gap: pause.gap,
            tool: pause.tool,
            prompt,
            end: line.tip,
            output_tokens,
            stop,
            last: false,
        };
        self.current.steps.push(step);
        let number = u32::try_from(self.current.steps.len() - 1).expect("few steps");
        line.step = Some(number);
        number
    }

    /// No pause.
    pub(crate) const fn at_once() -> Pause {
        Pause { gap: Duration::ZERO, tool: 0 }
    }

    /// A pause between two calls: a tool, as often as they are called, or a moment. With several tools at once the
    /// slowest counts.
    pub(crate) fn pause(&mut self, tools_at_once: u32) -> Pause {
        if uniform(&mut self.rng) >= self.knobs.tools {
            return Pause { gap: self.sizes.think.duration(&mut self.rng), tool: 0 };
        }
        let tool = self.rng.below(TOOLS);
        // Tools differ: their medians lie a factor of about two apart, around the preset's.
        let usual = (tool as f64 - (TOOLS - 1) as f64 / 2.0) * 0.8;
        let mut dist = self.sizes.tool;
        dist.median *= usual.exp();
        // What differs between tools does not differ within them.
        let sigma = dist.p90_ratio.ln();
        dist.p90_ratio = (sigma * sigma - 3.07).max(0.3 * sigma * sigma).sqrt().exp();
        let gap = (0..tools_at_once.max(1)).map(|_| dist.duration(&mut self.rng)).max().unwrap_or_default();
        Pause { gap, tool: u8::try_from(tool + 1).expect("few tools") }
    }

    /// New tokens of a call.
    pub(crate) fn new_tokens(&mut self) -> u32 {
        self.sizes.new.whole(&mut self.rng)
    }

    /// Why a call ends after which `pause` follows.
    pub(crate) const fn stop(pause: Pause) -> StopReason {
        if pause.tool > 0 { StopReason::ToolUse } else { StopReason::Unknown }
    }

    /// A loop of calls and tools of a line: `turns` more calls, the first after `after`. Returns its last step.
    pub(crate) fn tool_loop(&mut self, line: &mut Line, turns: u32, after: &[u32], at_once: u32) -> u32 {
        let mut before = Self::at_once();
        let mut after = after.to_vec();
        let mut last = 0;
        for turn in 0..turns.max(1) {
            let pause = self.pause(at_once);
            let stop = if turn + 1 >= turns { StopReason::EndTurn } else { Self::stop(pause) };
            last = self.call(line, &after, before, stop);
            after.clear();
            before = pause;
            if turn + 1 < turns {
                for _ in 0..at_once.max(1) {
                    let tokens = self.new_tokens();
                    self.read(line, tokens, SemanticType::ToolResult);
                }
            }
        }
        last
    }
}
