//! A step is ready: it goes to a node, and waits there for room.

use std::time::Duration;

use kvtier_policy::evict::survival::{CallFacts, StopReason};
use kvtier_policy::programs::{Candidate, Rank, place};
use kvtier_types::Instant;

use super::cache::DEVICE;
use super::decisions::Turn;
use super::engine::seconds;
use super::node::{BUS, DISK_READ, NETWORK, Node, Request};
use super::world::{NOWHERE, World};
use crate::rng::mix;

/// Nodes that are asked for what a step would cost there.
const CANDIDATES: usize = 16;
/// Steps on a node beside which a program's own node is too busy for it: one and a half times the average, and some.
const BUSY_SHARE: f64 = 1.5;
const BUSY_STEPS: f64 = 4.0;

impl World<'_> {
    /// A step is ready.
    pub(super) fn ready(&mut self, now: Instant, number: u32, at: u32) {
        let step = &self.work.programs[number as usize].steps[at as usize];
        if let Some(running) = self.running[number as usize].as_mut() {
            running.course.ready[at as usize] = Some(now);
        }
        let mut path = Vec::new();
        self.work.tree.path(step.end, &mut path);
        let prompt = self.work.tree.length(step.prompt) as usize;
        let home = self.home(number, at);
        let node = self.choose(&path[..prompt], home, (number, at));
        let was = self.lanes[step.lane as usize].node;
        self.lane_back(now, (number, at), (was, node));
        let lane = &mut self.lanes[step.lane as usize];
        (lane.node, lane.tip) = (node, step.end);
        let mut request = Request {
            program: number,
            step: at,
            node,
            path,
            ids: Vec::new(),
            prompt,
            hits: 0,
            arrived: now,
            admitted: now,
            began: now,
            loads: 0,
            wanted: 0,
        };
        let blocks = u32::try_from(prompt).expect("paths are short");
        let facts = CallFacts {
            program: Some(u64::from(step.lane) + 1),
            sub_agent: step.lane != self.work.programs[number as usize].lanes.0,
            stop: StopReason::Unknown,
            blocks,
            ..CallFacts::default()
        };
        let here = &mut self.nodes[node as usize];
        here.cache.number(&request.path, &mut request.ids);
        if !self.how.free_of_cost {
            for block in &request.path[..prompt] {
                here.cache.account(now, *block, (true, self.work.tree.semantic(*block)));
            }
            let key = now.as_nanos();
            here.cache.call(now, facts, (&request.path[..prompt], &request.ids[..prompt]), (key, &self.work.tree));
        }
        here.steps += 1;
        request.wanted = request.path.iter().filter(|block| here.cache.tier(**block) != Some(DEVICE)).count();
        here.waiting_blocks += request.wanted;
        let rank = self.rank(now, number, at);
        let id = self.new_request(request);
        self.nodes[node as usize].waiting.push((rank, id));
        self.admit(now, node);
    }

    /// Where a step's program is: its lane, or those it goes on from.
    fn home(&self, number: u32, at: u32) -> u32 {
        let program = &self.work.programs[number as usize];
        let step = &program.steps[at as usize];
        let own = self.lanes[step.lane as usize].node;
        if own != NOWHERE {
            return own;
        }
        // A branch goes on where its stem is; an agent of its own, where its program began.
        let before = step.after.last().map(|b| self.lanes[program.steps[*b as usize].lane as usize].node);
        before.unwrap_or(NOWHERE)
    }

    fn choose(&self, prompt: &[u32], home: u32, (number, at): (u32, u32)) -> u32 {
        if self.how.places { self.cheapest(prompt, home, (number, at)) } else { self.sticky(home) }
    }

    /// Where the program is, unless that is busy: then where the fewest steps are.
    fn sticky(&self, home: u32) -> u32 {
        let steps: u32 = self.nodes.iter().map(|node| node.steps).sum();
        let busy = BUSY_SHARE.mul_add(f64::from(steps) / self.nodes.len() as f64, BUSY_STEPS);
        if home != NOWHERE && f64::from(self.nodes[home as usize].steps) <= busy {
            return home;
        }
        let least = (0..).zip(&self.nodes).min_by_key(|(number, node)| (node.steps, *number));
        least.map_or(0, |(number, _)| number)
    }

    /// Where it costs least: of all nodes, or of its own and some by chance where there are many.
    fn cheapest(&self, prompt: &[u32], home: u32, (number, at): (u32, u32)) -> u32 {
        let all = u32::try_from(self.nodes.len()).expect("few nodes");
        let mut asked: Vec<u32> = Vec::with_capacity(CANDIDATES);
        if self.nodes.len() <= CANDIDATES {
            asked.extend(0..all);
        } else {
            asked.extend((home != NOWHERE).then_some(home));
            let salt = u64::from(number) << 32 | u64::from(at);
            let chosen = (0..CANDIDATES as u64).map(|n| mix(salt ^ mix(n)) % u64::from(all));
            asked.extend(chosen.map(|n| u32::try_from(n).expect("below the number of nodes")));
        }
        let candidates: Vec<Candidate> = asked.into_iter().map(|node| self.cost_on(node, prompt)).collect();
        place(&candidates, (home != NOWHERE).then_some(home)).map_or(0, |choice| choice.node)
    }

    /// What a step would cost on a node.
    fn cost_on(&self, number: u32, prompt: &[u32]) -> Candidate {
        let node = &self.nodes[number as usize];
        let shares = self.how.shares;
        let (found, hits) = node.found(prompt, |block| shares && self.store.has(block));
        let tokens = |blocks: usize| blocks as u64 * u64::from(self.config.block_tokens);
        let bytes = |blocks: usize| blocks as u64 * self.config.block_bytes();
        let [_, host, disk, store] = found;
        let mut load = Duration::ZERO;
        for (blocks, link) in [(host, &node.links[BUS]), (disk, &node.links[DISK_READ]), (store, &node.links[NETWORK])]
        {
            if blocks > 0 {
                load = load.max(link.wait(bytes(blocks)));
            }
        }
        if store > 0 {
            load = load.max(self.store_link.wait(bytes(store)));
        }
        let all = self.config.cost.prefill(0, tokens(prompt.len()));
        let recompute = self.config.cost.prefill(tokens(hits), tokens(prompt.len() - hits));
        if self.how.splits && load + recompute > all {
            let queue = self.queue_on(node, prompt.len() - found[0]);
            return Candidate { node: number, queue, recompute: all, load: Duration::ZERO, displaced: Duration::ZERO };
        }
        // Others wait for the memory that blocks take which are on no device here, as long as steps hold it.
        let fresh = (prompt.len() - found[DEVICE]) as f64 / node.cache.pools[DEVICE].capacity.max(1) as f64;
        let displaced = seconds(fresh * node.service);
        Candidate { node: number, queue: self.queue_on(node, prompt.len() - found[0]), recompute, load, displaced }
    }

    /// Until a step that brings so many blocks has room on a node, and its engine computes nothing else.
    fn queue_on(&self, node: &Node, blocks: usize) -> Duration {
        let backlog = node.engine.backlog() as f64 * self.config.cost.times.token;
        let pool = &node.cache.pools[0];
        let wanted = pool.busy + node.waiting_blocks + blocks;
        let excess = wanted.saturating_sub(pool.capacity) as f64 / pool.capacity.max(1) as f64;
        // A batch that grows slows everybody down.
        let slower = node.engine.decode_step() * 100.0;
        seconds(excess.mul_add(node.service, backlog) + slower)
    }

    /// When it is a step's turn.
    fn rank(&self, now: Instant, number: u32, at: u32) -> Rank {
        let Some(running) = self.running[number as usize].as_ref() else {
            return Rank::new(now.as_nanos(), Duration::ZERO, Duration::ZERO);
        };
        match self.how.turn {
            Turn::First => Rank::new(now.as_nanos(), Duration::ZERO, Duration::ZERO),
            Turn::Attained => Rank::new(now.as_nanos(), running.attained, Duration::ZERO),
            Turn::Remaining => {
                let steps = |count: usize| seconds(self.step_seconds * count as f64);
                let path = running.course.ended.len().saturating_sub(at as usize);
                Rank::new(now.as_nanos(), steps(running.left), steps(path))
            }
        }
    }
}
