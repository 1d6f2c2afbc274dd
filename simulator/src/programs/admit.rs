//! A step gets room on the device: what is elsewhere is loaded, the rest is computed.

use kvtier_policy::evict::KnownId;
use kvtier_policy::programs::split;
use kvtier_types::Instant;

use super::cache::{DEVICE, DISK, HOST};
use super::engine::Job;
use super::node::{BUS, DISK_READ, Load, NETWORK, STORE};
use super::world::{Event, World};

/// Where the leading blocks of a prompt are.
#[derive(Debug, Default)]
struct Sources {
    host: Vec<usize>,
    disk: Vec<usize>,
    store: Vec<usize>,
    /// Loads that bring some of them already.
    under_way: Vec<u32>,
    device: u64,
    hits: usize,
}

impl World<'_> {
    /// Admits those whose turn it is while there is room.
    pub(super) fn admit(&mut self, now: Instant, number: u32) {
        loop {
            let node = &self.nodes[number as usize];
            let first = node.waiting.iter().enumerate().min_by_key(|(_, (rank, id))| (*rank, *id));
            let Some((at, (_, id))) = first.map(|(at, waiting)| (at, *waiting)) else { break };
            if !self.try_admit(now, id) {
                break;
            }
            self.nodes[number as usize].waiting.swap_remove(at);
        }
        self.wake_engine(now, number);
    }

    fn try_admit(&mut self, now: Instant, id: u32) -> bool {
        let request = self.requests[id as usize].take().expect("who waits is there");
        let number = request.node as usize;
        let node = &self.nodes[number];
        let fits = if self.how.free_of_cost {
            node.engine.has_room(0)
        } else {
            let pool = &node.cache.pools[DEVICE];
            let fresh = request.ids.iter().filter(|id| !pool.in_use(**id)).count();
            // What is larger than all memory runs alone.
            node.engine.has_room(0) && (fresh <= pool.room() || pool.busy == 0)
        };
        self.requests[id as usize] = Some(request);
        if fits {
            self.begin(now, id);
        }
        fits
    }

    fn begin(&mut self, now: Instant, id: u32) {
        let mut request = self.requests[id as usize].take().expect("who waits is there");
        request.admitted = now;
        let node = request.node;
        self.nodes[node as usize].waiting_blocks -= request.wanted;
        let sources =
            if self.how.free_of_cost { self.ideal(&request.path[..request.prompt]) } else { self.sources(&request) };
        request.hits = sources.hits;
        self.count(&request.path[..request.prompt], &sources);
        if !self.how.free_of_cost {
            self.take_room(now, &request);
            for at in &sources.under_way {
                self.loads[*at as usize].waiters.push(id);
                for link in &mut self.nodes[node as usize].links {
                    link.hasten(*at);
                }
                self.store_link.hasten(*at);
            }
            request.loads = u32::try_from(sources.under_way.len()).expect("few loads");
            for (blocks, from) in [(&sources.host, BUS), (&sources.disk, DISK_READ), (&sources.store, NETWORK)] {
                if !blocks.is_empty() {
                    request.loads += 1;
                    let ids = blocks.iter().map(|at| request.ids[*at]).collect();
                    self.load(now, (node, from), Load { node, links: 0, ids, waiters: vec![id], lane: None });
                }
            }
            self.unpin(node, u64::from(self.work.programs[request.program as usize].steps[request.step as usize].lane));
        }
        let ready = request.loads == 0;
        self.requests[id as usize] = Some(request);
        if ready {
            self.compute(now, id);
        }
    }

    /// What a cache without bounds and costs finds.
    fn ideal(&self, prompt: &[u32]) -> Sources {
        let hits = prompt.iter().take_while(|block| self.computed[**block as usize]).count();
        Sources { hits, device: hits as u64, ..Sources::default() }
    }

    fn sources(&self, request: &super::node::Request) -> Sources {
        let node = &self.nodes[request.node as usize];
        let mut sources = Sources::default();
        for (at, block) in request.path[..request.prompt].iter().enumerate() {
            let under_way = node.under_way.get(&request.ids[at]);
            match node.cache.tier(*block) {
                Some(tier) => {
                    match tier {
                        HOST => sources.host.push(at),
                        DISK => sources.disk.push(at),
                        _ => sources.device += 1,
                    }
                    if let Some(load) = under_way.filter(|load| !sources.under_way.contains(load)) {
                        sources.under_way.push(*load);
                    }
                }
                None if self.how.shares && self.store.has(*block) => sources.store.push(at),
                None => break,
            }
            sources.hits = at + 1;
        }
        if self.how.splits && sources.under_way.is_empty() {
            self.split(request, &mut sources);
        }
        sources
    }

    /// Leaves out loads that take longer than computing does.
    fn split(&self, request: &super::node::Request, sources: &mut Sources) {
        let node = &self.nodes[request.node as usize];
        let tokens = |blocks: usize| blocks as u64 * u64::from(self.config.block_tokens);
        let slow = sources.disk.len() + sources.store.len();
        let Some(first) = sources.disk.first().into_iter().chain(sources.store.first()).min().copied() else { return };
        let bytes = |blocks: usize| blocks as u64 * self.config.block_bytes();
        let load = |blocks: u32| {
            if blocks == 0 {
                return std::time::Duration::ZERO;
            }
            let mut wait = std::time::Duration::ZERO;
            if !sources.disk.is_empty() {
                wait = wait.max(node.links[DISK_READ].wait(bytes(sources.disk.len())));
            }
            if !sources.store.is_empty() {
                let stored = bytes(sources.store.len());
                wait = wait.max(node.links[NETWORK].wait(stored)).max(self.store_link.wait(stored));
            }
            wait
        };
        let recompute = |blocks: u32| {
            let kept = if blocks == 0 { first } else { sources.hits };
            self.config.cost.prefill(tokens(kept), tokens(request.prompt - kept))
        };
        let slow = u32::try_from(slow).expect("paths are short");
        if split(slow, load, recompute) == 0 {
            sources.hits = first;
            sources.host.retain(|at| *at < first);
            sources.disk.clear();
            sources.store.clear();
            sources.device = sources.device.min(first as u64);
        }
    }

    /// Counts where the tokens of a prompt come from.
    fn count(&mut self, prompt: &[u32], sources: &Sources) {
        let block = u64::from(self.config.block_tokens);
        let metrics = &mut self.metrics;
        let (host, disk, store) = (sources.host.len() as u64, sources.disk.len() as u64, sources.store.len() as u64);
        metrics.served.host += host * block;
        metrics.served.disk += disk * block;
        metrics.served.store += store * block;
        metrics.served.device += (sources.hits as u64 - host - disk - store) * block;
        metrics.served.computed += (prompt.len() - sources.hits) as u64 * block;
        metrics.demanded_bytes += (disk + store) * self.config.block_bytes();
        let ideal = prompt.iter().take_while(|b| self.computed[**b as usize]).count();
        metrics.ideal_tokens += ideal as u64 * block;
        if ideal > sources.hits {
            let again = (ideal - sources.hits) as u64 * block;
            metrics.recomputed_tokens += again;
            metrics.recomputed_flops += self.config.cost.flops(sources.hits as u64 * block, again);
        }
    }

    /// All blocks of a step are on the device and in use from now on.
    fn take_room(&mut self, now: Instant, request: &super::node::Request) {
        let tree = &self.work.tree;
        let cache = &mut self.nodes[request.node as usize].cache;
        // First what is there, so that it does not make room for the rest.
        let there: Vec<bool> = request.ids.iter().map(|id| cache.pools[DEVICE].has(*id)).collect();
        for (id, there) in request.ids.iter().zip(&there) {
            if *there {
                cache.pools[DEVICE].hold(*id);
            }
        }
        for (at, id) in request.ids.iter().enumerate() {
            if !there[at] {
                let entry = cache.entry((&request.path, &request.ids), at);
                // What is larger than all memory goes on without being kept.
                let _fits = cache.bring(now, (*id, entry), DEVICE, tree);
            }
        }
    }

    /// Starts a load over a link of a node, and over the storage's where it is from there.
    pub(super) fn load(&mut self, now: Instant, (number, from): (u32, usize), load: Load) -> u32 {
        let speculative = load.lane.is_some();
        let bytes = load.ids.len() as u64 * self.config.block_bytes();
        let ids: Vec<KnownId> = load.ids.clone();
        let at = self.new_load(Load { links: if from == NETWORK { 2 } else { 1 }, ..load });
        for id in ids {
            self.nodes[number as usize].under_way.insert(id, at);
        }
        self.metrics.link_bytes[from] += bytes;
        let link = &mut self.nodes[number as usize].links[from];
        link.push(now, at, bytes, speculative);
        if let Some(next) = link.next() {
            self.at(next, Event::Link(number, from));
        }
        if from == NETWORK {
            self.metrics.link_bytes[STORE] += bytes;
            self.store_link.push(now, at, bytes, speculative);
            if let Some(next) = self.store_link.next() {
                self.at(next, Event::Link(0, STORE));
            }
        }
        at
    }

    /// A link may have carried something.
    pub(super) fn link(&mut self, now: Instant, number: u32, which: usize) {
        let link = if which == STORE { &mut self.store_link } else { &mut self.nodes[number as usize].links[which] };
        let Some(done) = link.finish(now) else { return };
        if let Some(next) = link.next() {
            self.at(next, Event::Link(number, which));
        }
        let load = &mut self.loads[done as usize];
        load.links -= 1;
        if load.links > 0 {
            return;
        }
        let load = self.take_load(done);
        let node = &mut self.nodes[load.node as usize];
        for id in &load.ids {
            if node.under_way.get(id) == Some(&done) {
                node.under_way.remove(id);
            }
        }
        if let Some(lane) = load.lane {
            node.proactive.arrived(lane);
        }
        for waiter in load.waiters {
            let request = self.request(waiter);
            request.loads -= 1;
            if request.loads == 0 {
                self.compute(now, waiter);
            }
        }
        self.wake_engine(now, load.node);
    }

    /// All that a step reads is there: the engine computes the rest.
    fn compute(&mut self, now: Instant, id: u32) {
        let block = u64::from(self.config.block_tokens);
        let output = {
            let request = self.requests[id as usize].as_ref().expect("who waits is there");
            let program = &self.work.programs[request.program as usize];
            u64::from(program.steps[request.step as usize].output_tokens.max(1))
        };
        let request = self.request(id);
        request.began = now;
        let (prompt, hits) = (request.prompt as u64 * block, request.hits as u64 * block);
        let context = hits.min(prompt - 1);
        let node = request.node;
        self.nodes[node as usize].engine.join(now, Job { id, context, missing: prompt - context, output });
        self.wake_engine(now, node);
    }
}
