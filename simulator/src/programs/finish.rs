//! Engines make progress: blocks become readable, steps end, and what they leave behind is ranked.

use kvtier_policy::evict::survival::CallFacts;
use kvtier_types::Instant;

use super::cache::DEVICE;
use super::decisions::Key;
use super::engine::Progress;
use super::node::Request;
use super::tree::SHARED;
use super::world::World;

/// How long TTL keeps what waits for a tool longer than what does not.
const KEPT_NS: u64 = 60_000_000_000;
/// Share of the latest in running averages.
const LATEST: f64 = 0.05;

impl World<'_> {
    /// An engine may have ended what it was at.
    pub(super) fn engine(&mut self, now: Instant, number: u32, ended: &mut dyn FnMut()) {
        let node = &mut self.nodes[number as usize];
        if node.engine_wakes.is_some_and(|at| at <= now) {
            node.engine_wakes = None;
        }
        let mut progress = std::mem::take(&mut self.progress);
        self.nodes[number as usize].engine.finish(now, &mut progress);
        for event in progress.drain(..) {
            match event {
                Progress::First(id) => self.first_token(now, id),
                Progress::Done(id) => {
                    if self.done(now, id) {
                        ended();
                    }
                }
                Progress::Preempted(_) => unreachable!("memory is taken before a step begins"),
            }
        }
        self.progress = progress;
        self.admit(now, number);
    }

    fn first_token(&mut self, now: Instant, id: u32) {
        let request = self.requests[id as usize].take().expect("an engine names requests that it has");
        self.metrics.queued += request.admitted.since(request.arrived);
        self.metrics.loaded += request.began.since(request.admitted);
        self.metrics.computing += now.since(request.began);
        self.computed_now(now, &request, 0..request.prompt);
        self.requests[id as usize] = Some(request);
    }

    /// Blocks of a step can be read from now on.
    fn computed_now(&mut self, now: Instant, request: &Request, which: std::ops::Range<usize>) {
        let first = self.work.programs[request.program as usize].lanes.0;
        let mut come = 0;
        for at in which {
            let block = request.path[at];
            if !std::mem::replace(&mut self.computed[block as usize], true) {
                let owner = self.work.tree.owner(block);
                if owner != SHARED
                    && let Some(running) = self.running[request.program as usize].as_mut()
                {
                    running.live[(owner - first) as usize] += 1;
                }
                come += 1;
            }
            let cache = &mut self.nodes[request.node as usize].cache;
            if !self.how.free_of_cost && cache.pools[DEVICE].has(request.ids[at]) {
                cache.publish(now, block);
            }
        }
        if come > 0 {
            self.count_live(now, come, 0);
        }
    }

    /// A step has ended. Returns whether its program has.
    fn done(&mut self, now: Instant, id: u32) -> bool {
        let request = self.take_request(id);
        self.computed_now(now, &request, request.prompt..request.path.len());
        let (number, at) = (request.program, request.step);
        let step = &self.work.programs[number as usize].steps[at as usize];
        self.metrics.steps += 1;
        self.metrics.output_tokens += u64::from(step.output_tokens);
        self.metrics.decoding += now.since(request.began);
        let held = now.since(request.admitted).as_secs_f64();
        let taken = now.since(request.arrived).as_secs_f64();
        self.step_seconds = LATEST.mul_add(taken, (1.0 - LATEST) * self.step_seconds);
        if let Some(running) = self.running[number as usize].as_mut() {
            running.attained += now.since(request.began);
        }
        let node = &mut self.nodes[request.node as usize];
        node.service = LATEST.mul_add(held, (1.0 - LATEST) * node.service);
        node.steps -= 1;
        let over = self.step_ended(now, (number, at));
        if !self.how.free_of_cost {
            let returns_in = self.pause_begins(now, (number, at));
            let facts = CallFacts {
                program: Some(u64::from(step.lane) + 1),
                sub_agent: step.lane != self.work.programs[number as usize].lanes.0,
                stop: step.stop,
                returns_in,
                last: self.how.frees && step.last,
                blocks: u32::try_from(request.path.len()).expect("paths are short"),
            };
            self.leave(now, &request, facts);
        }
        self.look_ahead(now, number);
        if over {
            self.program_ended(now, number);
        }
        over
    }

    /// What a step used is not in use by it any more.
    fn leave(&mut self, now: Instant, request: &Request, facts: CallFacts) {
        let kept = self.how.key == Key::Kept && facts.stop == kvtier_policy::evict::survival::StopReason::ToolUse;
        let key = match self.how.key {
            Key::Kept if kept => now.as_nanos() + KEPT_NS,
            Key::LastUse | Key::Kept => now.as_nanos(),
            Key::Steps => super::foresight::steps_key(0, now),
            Key::NextUse => super::foresight::next_use_key(now),
        };
        let cache = &mut self.nodes[request.node as usize].cache;
        cache.call(now, facts, (&request.path, &request.ids), (key, &self.work.tree));
        for id in &request.ids {
            cache.release(*id, DEVICE);
        }
        cache.let_go(&request.ids);
        self.store.write(&request.path, &self.work.tree);
    }
}
