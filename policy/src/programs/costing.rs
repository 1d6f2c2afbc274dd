//! What a step would cost on each of many nodes, from where the blocks of its context lie.
//!
//! ```text
//! prefix      |- own host -|- own disk -|- other nodes -|- packs -|            computed
//! ends tried  0            1            2               3         4            of these the cheapest
//! ```
//! A hit is a prefix: after the first block that cannot be had whole, all shards of it, the rest is computed. How far it
//! pays to load is asked of [`split`] at each of the four ends, nearest sources first.
//!
//! *Bounds*: a block's index is below [`MAX_BLOCK_INDEX`], or it does not count. Nodes that hold nothing of the context share
//! one look at it; each other node looks at every block a few times.

use std::time::Duration;

use kvtier_types::{GroupSpec, Origin, Tier, prefix_step, usable_prefix};
use rustc_hash::FxHashMap;

use super::placement::{Candidate, Choice, Reason, place, split};

/// Tokens a second that an engine computes of a prompt, where nobody says: a model of about 8 billion parameters on one GPU.
pub const DEFAULT_PREFILL_TOKENS_PER_SECOND: u32 = 8_000;
/// Blocks of a prefix beyond which nothing counts: a million tokens of 16-token blocks.
pub const MAX_BLOCK_INDEX: u32 = 65_536;
/// Share of what is evicted to make room that somebody will want again: what goes is what ranks lowest.
const DISPLACED_WANTED: f64 = 0.1;
/// Sources, nearest first: each end of a prefix is what the first so many of them serve.
const NEAREST_FIRST: [Origin; 4] =
    [Origin::Tier(Tier::Host), Origin::Tier(Tier::Disk), Origin::Peer, Origin::Tier(Tier::Object)];
/// The place in [`NEAREST_FIRST`] of what cannot be had.
const NOWHERE: u8 = u8::MAX;

/// What loading takes, by [`Origin::index`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadRates {
    /// Nanoseconds a byte.
    pub nanos_per_byte: [f64; Origin::ALL.len()],
    /// Before the first byte, whatever the bytes.
    pub latency: [Duration; Origin::ALL.len()],
}

/// Where one shard of a block lies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShardPlaces {
    /// Nodes that have it, by number, each with the fastest tier that does.
    pub on: Vec<(u32, Tier)>,
    /// Whether a pack that every node can read has it.
    pub packed: bool,
}

/// Where one block of the context lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockPlaces {
    /// Index of its group in the layout.
    pub group: usize,
    /// Index of the block in the prefix.
    pub block: u32,
    /// Each of its shards.
    pub shards: Vec<ShardPlaces>,
}

/// A step: what its prompt is made of.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// The layout's groups.
    pub groups: &'a [GroupSpec],
    /// Bytes of a whole block, all its shards, of each group.
    pub block_bytes: &'a [u64],
    /// Tokens of the prompt; as many as the blocks have when zero.
    pub prompt_tokens: u32,
    /// The blocks of its context, in any order.
    pub blocks: &'a [BlockPlaces],
}

/// A node that could run it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Server {
    /// Its number, as [`ShardPlaces::on`] has it.
    pub node: u32,
    /// Until its engine turns to the step.
    pub queue: Duration,
    /// Tokens of a prompt that its engine computes a second; [`DEFAULT_PREFILL_TOKENS_PER_SECOND`] when zero.
    pub prefill_tokens_per_second: u32,
    /// Host memory that nothing lies in; `None` where that is not known.
    pub free_bytes: Option<u64>,
}

/// What the step costs on a node, and what of it comes from where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bill {
    /// The costs.
    pub candidate: Candidate,
    /// Tokens served from each source, by [`Origin::index`].
    pub served: [u32; Origin::ALL.len()],
    /// Tokens that are computed.
    pub recompute_tokens: u32,
    /// Tokens a second at which they are.
    pub prefill_tokens_per_second: u32,
}

impl Bill {
    /// Tokens that are loaded.
    #[must_use]
    pub fn served_tokens(&self) -> u32 {
        self.served.iter().sum()
    }
}

/// One end of a prefix: what loading up to there takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct End {
    tokens: u32,
    served: [u32; Origin::ALL.len()],
    bytes: [u64; Origin::ALL.len()],
}

/// A context, looked at from all nodes.
#[derive(Debug)]
pub struct Costing<'a> {
    step: Step<'a>,
    rates: LoadRates,
    /// Tokens between two possible ends of a prefix.
    stride: u32,
    /// Tokens that the blocks could serve at most.
    covered: u32,
    /// Positions of the blocks by group: those of one group are consecutive mostly.
    columns: Vec<Column>,
    /// What a node that has nothing has to do for each block.
    from_afar: Vec<u8>,
    /// Blocks that a node has some of, by their positions, each with where the node has all of its shards from.
    own: FxHashMap<u32, Vec<(usize, u8)>>,
    /// The ends of a node that has nothing.
    ends_from_afar: Vec<End>,
}

/// Positions of one group's blocks, by their index less the first.
#[derive(Debug, Default)]
struct Column {
    first: u32,
    at: Vec<Option<u32>>,
}

impl Column {
    fn get(&self, block: u32) -> Option<usize> {
        let at = block.checked_sub(self.first)?;
        self.at.get(at as usize).copied().flatten().map(|position| position as usize)
    }
}

impl<'a> Costing<'a> {
    /// Looks at a step's context. Blocks of groups that the layout does not have, and those from [`MAX_BLOCK_INDEX`] on, do
    /// not count.
    #[must_use]
    pub fn new(step: Step<'a>, rates: LoadRates) -> Self {
        let columns: Vec<Column> = (0..step.groups.len()).map(|group| column(step.blocks, group)).collect();
        let end = |(group, column): (&GroupSpec, &Column)| {
            let blocks = u64::from(column.first) + column.at.len() as u64;
            u32::try_from(blocks * u64::from(group.block_tokens)).unwrap_or(u32::MAX)
        };
        let covered = step.groups.iter().zip(&columns).map(end).max().unwrap_or(0);
        let from_afar = step.blocks.iter().map(|b| b.shards.iter().map(afar).max().unwrap_or(NOWHERE)).collect();
        let mut own: FxHashMap<u32, Vec<(usize, u8)>> = FxHashMap::default();
        for (at, block) in step.blocks.iter().enumerate() {
            for_holders(block, |node, source| own.entry(node).or_default().push((at, source)));
        }
        let stride = prefix_step(step.groups).unwrap_or(1).max(1);
        let mut this = Self { step, rates, stride, covered, columns, from_afar, own, ends_from_afar: Vec::new() };
        this.ends_from_afar = this.ends(&this.from_afar);
        this
    }

    /// Tokens of the step: those of the prompt, or as many as the blocks have.
    #[must_use]
    pub const fn tokens(&self) -> u32 {
        if self.step.prompt_tokens == 0 { self.covered } else { self.step.prompt_tokens }
    }

    /// What the step costs on a node.
    #[must_use]
    pub fn bill(&self, server: &Server) -> Bill {
        let rate = match server.prefill_tokens_per_second {
            0 => DEFAULT_PREFILL_TOKENS_PER_SECOND,
            rate => rate,
        };
        let compute = |end: &End| {
            let tokens = self.tokens().saturating_sub(end.tokens);
            Duration::from_secs_f64(f64::from(tokens) / f64::from(rate))
        };
        let own_ends;
        let ends = match self.own.get(&server.node) {
            None => &self.ends_from_afar,
            Some(_) => {
                own_ends = self.ends(&self.sources(server.node));
                &own_ends
            }
        };
        let mut end = End::default();
        for further in ends {
            let run = (further.tokens - end.tokens) / self.stride;
            let to = |loaded: u32| if loaded == 0 { &end } else { further };
            if split(run, |n| self.load(to(n)), |n| compute(to(n))) > 0 {
                end = *further;
            }
        }
        let recompute_tokens = self.tokens().saturating_sub(end.tokens);
        let candidate = Candidate {
            node: server.node,
            queue: server.queue,
            recompute: compute(&end),
            load: self.load(&end),
            displaced: self.displaced(&end, recompute_tokens, server.free_bytes),
        };
        Bill { candidate, served: end.served, recompute_tokens, prefill_tokens_per_second: rate }
    }

    /// The blocks that a node needs to serve a prefix, by their position, each with where it has it from.
    #[must_use]
    pub fn needed(&self, node: u32, prefix_tokens: u32) -> Vec<(usize, Origin)> {
        let sources = self.sources(node);
        let mut needed = Vec::new();
        for (group, column) in self.step.groups.iter().zip(&self.columns) {
            let blocks = group.needed_blocks(prefix_tokens).filter_map(|block| column.get(block));
            needed.extend(blocks.filter_map(|at| Some((at, *NEAREST_FIRST.get(usize::from(sources[at]))?))));
        }
        needed
    }

    /// Where a node has each block from, as the place in [`NEAREST_FIRST`]: for all of its shards the furthest.
    fn sources(&self, node: u32) -> Vec<u8> {
        let mut sources = self.from_afar.clone();
        for (at, source) in self.own.get(&node).into_iter().flatten() {
            sources[*at] = *source;
        }
        sources
    }

    /// The prefixes that the nearest sources serve, one after the other, each longer than the one before.
    fn ends(&self, sources: &[u8]) -> Vec<End> {
        let most = self.tokens().min(self.covered);
        let mut ends: Vec<End> = Vec::new();
        for reach in 0..NEAREST_FIRST.len() {
            let had = |group: usize, block: u32| {
                self.columns[group].get(block).is_some_and(|at| usize::from(sources[at]) <= reach)
            };
            let tokens = usable_prefix(self.step.groups, 0, most, had);
            if tokens > ends.last().map_or(0, |end| end.tokens) {
                ends.push(self.end(sources, tokens));
            }
        }
        ends
    }

    fn end(&self, sources: &[u8], tokens: u32) -> End {
        let mut end = End { tokens, ..End::default() };
        let reference = self.step.groups.iter().position(|g| g.kind.needs_ancestors()).unwrap_or(0);
        for (index, (group, column)) in self.step.groups.iter().zip(&self.columns).enumerate() {
            let mut last = Origin::Tier(Tier::Host).index();
            let mut told = 0;
            for at in group.needed_blocks(tokens).filter_map(|block| column.get(block)) {
                let Some(origin) = NEAREST_FIRST.get(usize::from(sources[at])) else { continue };
                last = origin.index();
                end.bytes[last] += self.step.block_bytes.get(index).copied().unwrap_or(0);
                if index == reference {
                    end.served[last] += group.block_tokens;
                    told += group.block_tokens;
                }
            }
            if index == reference {
                // A window, or a state, stands for the tokens before it.
                end.served[last] += tokens.saturating_sub(told);
            }
        }
        end
    }

    fn load(&self, end: &End) -> Duration {
        let mut sum = Duration::ZERO;
        for (index, bytes) in end.bytes.iter().enumerate().filter(|(_, bytes)| **bytes > 0) {
            sum += self.rates.latency[index] + nanos(*bytes as f64 * self.rates.nanos_per_byte[index]);
        }
        sum
    }

    /// What others lose by what makes room: those of them that are wanted again come from disk.
    fn displaced(&self, end: &End, computed: u32, free_bytes: Option<u64>) -> Duration {
        let Some(free) = free_bytes else { return Duration::ZERO };
        let host = Origin::Tier(Tier::Host).index();
        let come = |(index, bytes): (usize, &u64)| if index == host { 0 } else { *bytes };
        let loaded: u64 = end.bytes.iter().enumerate().map(come).sum();
        let a_token = self.step.groups.iter().zip(self.step.block_bytes);
        let a_token: f64 = a_token.map(|(g, bytes)| *bytes as f64 / f64::from(g.block_tokens.max(1))).sum();
        let wanted = loaded as f64 + f64::from(computed) * a_token;
        let disk = self.rates.nanos_per_byte[Origin::Tier(Tier::Disk).index()];
        nanos((wanted - free as f64).max(0.0) * disk * DISPLACED_WANTED)
    }
}

/// Chooses among what nodes would cost, as [`place`] does; where the context makes no difference, the queue did.
#[must_use]
pub fn choose(bills: &[Bill], current: Option<u32>) -> Option<Choice> {
    let candidates: Vec<Candidate> = bills.iter().map(|bill| bill.candidate).collect();
    let choice = place(&candidates, current)?;
    let state = |c: &Candidate| c.recompute + c.load;
    let same = candidates.windows(2).all(|pair| state(&pair[0]) == state(&pair[1]));
    let reason = if choice.reason == Reason::State && same { Reason::Queue } else { choice.reason };
    Some(Choice { reason, ..choice })
}

/// A time of so many nanoseconds; more than a number holds is as good as for ever.
fn nanos(nanos: f64) -> Duration {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the cast saturates")]
    Duration::from_nanos(nanos as u64)
}

fn place_in(origin: Origin) -> u8 {
    let at = NEAREST_FIRST.iter().position(|o| *o == origin);
    at.and_then(|at| u8::try_from(at).ok()).unwrap_or(NOWHERE)
}

/// The place of a tier of a node's own; what an engine holds on its device is as near as host memory.
fn place_of(tier: Tier) -> u8 {
    place_in(Origin::Tier(tier.max(Tier::Host)))
}

/// Where a node that has nothing of a shard has it from.
fn afar(shard: &ShardPlaces) -> u8 {
    if shard.on.iter().any(|(_, tier)| *tier < Tier::Object) {
        place_in(Origin::Peer)
    } else if shard.packed {
        place_in(Origin::Tier(Tier::Object))
    } else {
        NOWHERE
    }
}

/// Tells of every node that has some shard of a block where it has the block from: for all of its shards the furthest. One
/// look at each copy: many nodes may have a block.
fn for_holders(block: &BlockPlaces, mut tell: impl FnMut(u32, u8)) {
    let mut copies: Vec<(u32, usize, Tier)> = Vec::new();
    for (shard, places) in block.shards.iter().enumerate() {
        copies.extend(places.on.iter().map(|(node, tier)| (*node, shard, *tier)));
    }
    copies.sort_unstable();
    let near = |places: &ShardPlaces| places.on.iter().filter(|(_, tier)| *tier < Tier::Object).count();
    // Of each shard: where it is had from by those who have nothing of it, and how many have it nearer than packs.
    let shards: Vec<(u8, usize)> = block.shards.iter().map(|places| (afar(places), near(places))).collect();
    for of_node in copies.chunk_by(|one, next| one.0 == next.0) {
        let mut rest = of_node;
        let mut furthest = 0;
        for (shard, (from_afar, near)) in shards.iter().enumerate() {
            let (own, others) = rest.split_at(rest.partition_point(|copy| copy.1 == shard));
            rest = others;
            let source = match own.first() {
                None => *from_afar,
                Some((_, _, tier)) => {
                    let elsewhere = own.iter().filter(|copy| copy.2 < Tier::Object).count() < *near;
                    place_of(*tier).min(if elsewhere { place_in(Origin::Peer) } else { NOWHERE })
                }
            };
            furthest = furthest.max(source);
        }
        tell(of_node[0].0, furthest);
    }
}

fn column(blocks: &[BlockPlaces], group: usize) -> Column {
    let of_group = || {
        let counts = |(_, b): &(u32, &BlockPlaces)| b.group == group && b.block < MAX_BLOCK_INDEX;
        (0..).zip(blocks).filter(counts)
    };
    let Some(first) = of_group().map(|(_, b)| b.block).min() else { return Column::default() };
    let last = of_group().map(|(_, b)| b.block).max().unwrap_or(first);
    let mut at = vec![None; (last - first + 1) as usize];
    for (position, block) in of_group() {
        at[(block.block - first) as usize] = Some(position);
    }
    Column { first, at }
}

#[cfg(test)]
mod tests;
