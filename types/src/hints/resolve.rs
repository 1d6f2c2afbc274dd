//! One answer from what all carriers said: field by field, and block by block.

use std::ops::Range;
use std::time::Duration;

use super::{DEFAULT_PRIORITY, DEFAULT_TTL, Part, Resume, Said, Span};
use crate::{BlockHints, RequestHints, SemanticType, Taint};

/// Consecutive blocks of which the same is said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Numbers of the blocks in their prefix.
    pub blocks: Range<u32>,
    /// What is said of them.
    pub hints: RequestHints,
    /// How long they shall not be evicted, where that was asked.
    pub pin: Option<Duration>,
}

/// What all carriers said, strongest first.
#[derive(Debug, Clone)]
pub struct Resolution<'a> {
    carriers: Vec<&'a Said>,
    prompt_tokens: u32,
}

impl<'a> Resolution<'a> {
    /// Of carriers, strongest first, for a prompt of so many tokens.
    #[must_use]
    pub fn new(carriers: Vec<&'a Said>, prompt_tokens: u32) -> Self {
        Self { carriers, prompt_tokens }
    }

    fn first<T>(&self, field: impl Fn(&'a Said) -> Option<T>) -> Option<T> {
        self.carriers.iter().copied().find_map(field)
    }

    /// Who asks, and what it says of itself; of its blocks, what it says of all of them.
    #[must_use]
    pub fn request(&self) -> RequestHints {
        self.hints_for(None)
    }

    /// When the program says that it will be back after the request.
    #[must_use]
    pub fn resume(&self) -> Option<Resume> {
        self.first(|said| said.expected_resume)
    }

    /// The same for the block of tokens `tokens`. A block that spans several parts takes the most durable type, all
    /// their taints, the highest priority and the longest time.
    #[must_use]
    pub fn block(&self, tokens: Range<u32>) -> RequestHints {
        self.hints_for(Some(&tokens))
    }

    /// Blocks of so many tokens, cut where what is said of them changes: as [`Self::block`] says of each, but looked at
    /// only where a part begins or ends.
    #[must_use]
    pub fn runs(&self, blocks: Range<u32>, block_tokens: u32) -> Vec<Run> {
        let edges = self.edges();
        let mut runs: Vec<Run> = Vec::new();
        let mut next = blocks.start;
        while next < blocks.end {
            let tokens = next.saturating_mul(block_tokens)..next.saturating_add(1).saturating_mul(block_tokens);
            // The same holds of the blocks behind it that no edge lies in, nor in the block before them.
            let edge = edges.get(edges.partition_point(|edge| *edge <= tokens.start)).copied().unwrap_or(u32::MAX);
            let alike = if edge == u32::MAX { blocks.end } else { edge / block_tokens.max(1) };
            let end = alike.clamp(next + 1, blocks.end);
            let (hints, pin) = (self.block(tokens.clone()), self.pin(&tokens));
            match runs.last_mut().filter(|run| run.hints == hints && run.pin == pin) {
                Some(run) => run.blocks.end = end,
                None => runs.push(Run { blocks: next..end, hints, pin }),
            }
            next = end;
        }
        runs
    }

    /// Where parts begin and end, in order.
    fn edges(&self) -> Vec<u32> {
        let spans = self.carriers.iter().flat_map(|said| &said.spans);
        let mut edges: Vec<u32> = spans
            .flat_map(|span| match &span.part {
                Part::Whole => [0, 0],
                Part::Tokens(range) => [range.start, range.end],
                Part::Output => [self.prompt_tokens, self.prompt_tokens],
            })
            .collect();
        edges.sort_unstable();
        edges.dedup();
        edges
    }

    /// Whether a block shall not be evicted, and how long.
    fn pin(&self, tokens: &Range<u32>) -> Option<Duration> {
        let covers = |span: &&Span| span.pin && self.covers(&span.part, Some(tokens));
        self.carriers.iter().flat_map(|said| &said.spans).filter(covers).filter_map(|span| span.ttl).max()
    }

    fn hints_for(&self, tokens: Option<&Range<u32>>) -> RequestHints {
        let text = |field: fn(&Said) -> &Option<String>| self.first(|s| field(s).clone()).unwrap_or_default();
        let priority = self.of_block(tokens, |spans| spans.filter_map(|s| s.priority).max());
        let ttl = self.of_block(tokens, |spans| spans.filter(|s| !s.pin).filter_map(|s| s.ttl).max());
        let claimed = priority.is_some() || ttl.is_some();
        RequestHints {
            block: BlockHints {
                program_id: text(|s| &s.program_id),
                semantic: self.of_block(tokens, most_durable).unwrap_or_default(),
                taints: self.of_block(tokens, all_taints).unwrap_or_default(),
            },
            session_id: text(|s| &s.session_id),
            parent_program_id: text(|s| &s.parent_program_id),
            agent_role: text(|s| &s.agent_role),
            blocks_parent: self.first(|s| s.blocks_parent),
            tolerations: self.first(|s| (!s.tolerations.is_empty()).then(|| s.tolerations.clone())).unwrap_or_default(),
            retain: claimed.then(|| (priority.unwrap_or(DEFAULT_PRIORITY), ttl.unwrap_or(DEFAULT_TTL))),
        }
    }

    /// A field of a block: of the first carrier that says it of a part with the block, or else of all blocks.
    fn of_block<T>(
        &self,
        tokens: Option<&Range<u32>>,
        field: impl Fn(&mut dyn Iterator<Item = &'a Span>) -> Option<T>,
    ) -> Option<T> {
        self.carriers.iter().find_map(|said| {
            let mut parts = said.spans.iter().filter(|s| s.part != Part::Whole && self.covers(&s.part, tokens));
            field(&mut parts).or_else(|| field(&mut said.spans.iter().filter(|s| s.part == Part::Whole)))
        })
    }

    fn covers(&self, part: &Part, tokens: Option<&Range<u32>>) -> bool {
        match (part, tokens) {
            (Part::Whole, _) => true,
            (_, None) => false,
            (Part::Tokens(range), Some(tokens)) => range.start < tokens.end && tokens.start < range.end,
            (Part::Output, Some(tokens)) => self.prompt_tokens < tokens.end,
        }
    }
}

fn most_durable(spans: &mut dyn Iterator<Item = &Span>) -> Option<SemanticType> {
    spans.filter_map(|span| span.semantic).reduce(SemanticType::more_durable)
}

fn all_taints(spans: &mut dyn Iterator<Item = &Span>) -> Option<Vec<Taint>> {
    let mut taints: Vec<Taint> = spans.flat_map(|span| span.taints.iter().cloned()).collect();
    taints.sort_unstable();
    taints.dedup();
    taints.truncate(Taint::MAX_PER_BLOCK);
    (!taints.is_empty()).then_some(taints)
}
