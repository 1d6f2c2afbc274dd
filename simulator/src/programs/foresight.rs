//! What is done for the future: state is brought before its program is back, and what has none goes.

use std::time::Duration;

use kvtier_policy::evict::survival::StopReason;
use kvtier_policy::programs::Kind;
use kvtier_types::Instant;

use super::cache::{DISK, HOST};
use super::decisions::{Key, Told};
use super::forecast::{announced, forecast, steps_until};
use super::node::{DISK_READ, Load, NETWORK};
use super::tree::{ROOT, Step};
use super::world::{Event, NOWHERE, World};

/// Steps until a use, at most.
const MOST_STEPS: u64 = 1024;
/// Changes of a next use that are worth looking at.
const WORTH_NS: u64 = 100_000_000;
/// Kinds of pauses beyond those of tools.
const JOINS: u64 = 1000;
const UNTOLD: u64 = 2000;
/// Returns of which the late quantile is so many times the early one are not bet on.
const UNSURE: f64 = 30.0;

/// Pauses of a number are alike; all programs of a run are one tenant's.
const fn alike(number: u64) -> Kind {
    // Zero stands for all of a tenant together.
    Kind { tenant: 0, what: number + 1 }
}

/// The key of blocks that are used after so many steps; those with more go first, then those used before.
pub(super) fn steps_key(until: u32, now: Instant) -> u64 {
    ((MOST_STEPS - u64::from(until).min(MOST_STEPS)) << 50) + now.as_nanos()
}

/// The key of blocks that are used next then.
pub(super) const fn next_use_key(at: Instant) -> u64 {
    (u64::MAX / 2).saturating_sub(at.as_nanos())
}

impl World<'_> {
    fn salt(&self, number: u32, at: usize) -> u64 {
        self.config.seed ^ (u64::from(number) << 32) ^ at as u64
    }

    /// When the steps of a program that are not ready will be, as far as is told.
    fn forecast(&self, now: Instant, number: u32) -> Option<Vec<Option<Instant>>> {
        if self.how.told == Told::Nothing {
            return None;
        }
        let program = &self.work.programs[number as usize];
        let running = self.running[number as usize].as_ref()?;
        let takes = Duration::from_secs_f64(self.step_seconds);
        let pause = |at: usize, step: &Step| {
            let told = announced(self.how.told, step, self.salt(number, at)).unwrap_or_default();
            if self.how.told == Told::Exactly { told } else { self.corrected(step, told) }
        };
        Some(forecast((program, &running.course), now, pause, |_| takes))
    }

    /// An announced pause, as such pauses were.
    fn corrected(&self, step: &Step, told: Duration) -> Duration {
        self.durations
            .expect(alike(step.tool.into()), Some(told), Duration::ZERO)
            .map_or(told, |expected| expected.usual)
    }

    /// A lane's step has ended: its pause begins. Returns when it is said to be back.
    pub(super) fn pause_begins(&mut self, now: Instant, (number, at): (u32, u32)) -> Option<Duration> {
        let program = &self.work.programs[number as usize];
        let step = &program.steps[at as usize];
        if step.last {
            return None;
        }
        let next = program.steps.iter().skip(at as usize + 1).position(|s| s.lane == step.lane)? + at as usize + 1;
        let joins = program.steps[next].after.len() > 1 || step.stop == StopReason::Join;
        let told = self.how.told != Told::Nothing;
        let kind = match step.stop {
            _ if told && joins => JOINS,
            _ if told => u64::from(program.steps[next].tool),
            StopReason::ToolUse => UNTOLD,
            StopReason::Join => UNTOLD + 1,
            StopReason::EndTurn => UNTOLD + 2,
            StopReason::Unknown => UNTOLD + 3,
        };
        let says = if joins {
            self.forecast(now, number).and_then(|begins| begins[next]).map(|begins| begins.since(now))
        } else {
            announced(self.how.told, &program.steps[next], self.salt(number, next))
        };
        let lane = &mut self.lanes[step.lane as usize];
        (lane.paused, lane.kind, lane.says) = (Some(now), kind, says);
        if self.how.prefetches {
            self.wait(now, step.lane);
        }
        says
    }

    /// Plans to bring a lane's state back in time.
    fn wait(&mut self, now: Instant, lane: u32) {
        let known = self.lanes[lane as usize];
        let expected = if self.how.told == Told::Exactly {
            known.says.map(|says| kvtier_policy::programs::Return { early: says, usual: says, late: says })
        } else {
            self.durations.expect(alike(known.kind), known.says, Duration::ZERO)
        };
        let Some(expected) = expected else { return };
        if expected.late.as_secs_f64() > UNSURE * expected.early.as_secs_f64().max(0.05) {
            return;
        }
        let node = &mut self.nodes[known.node as usize];
        let bytes = u64::from(self.work.tree.length(known.tip)) * self.config.block_bytes();
        let transfer = node.links[DISK_READ].wait(bytes);
        node.proactive.wait(now, u64::from(lane), (expected, transfer));
        self.wake_proactive(known.node);
    }

    fn wake_proactive(&mut self, node: u32) {
        if let Some(at) = self.nodes[node as usize].proactive.next() {
            let wakes = &mut self.nodes[node as usize].proactive_wakes;
            if wakes.is_none_or(|before| at < before) {
                *wakes = Some(at);
                self.at(at, Event::Due(node));
            }
        }
    }

    /// State is due to be brought, or to be given up.
    pub(super) fn due(&mut self, now: Instant, number: u32) {
        self.nodes[number as usize].proactive_wakes = None;
        while let Some(lane) = self.nodes[number as usize].proactive.due(now) {
            self.prefetch(now, number, lane);
        }
        let node = &self.nodes[number as usize];
        let given_up: Vec<u64> = node.pins.keys().copied().filter(|lane| !node.proactive.holds(*lane)).collect();
        for lane in given_up {
            self.unpin(number, lane);
        }
        self.wake_proactive(number);
    }

    /// Brings to host memory what a lane will read and what is further away.
    fn prefetch(&mut self, now: Instant, number: u32, lane: u64) {
        let known = self.lanes[usize::try_from(lane).expect("lanes are few")];
        let mut path = std::mem::take(&mut self.path);
        self.work.tree.path(known.tip, &mut path);
        let node = &mut self.nodes[number as usize];
        let mut far = 0;
        for block in &path {
            match node.cache.tier(*block) {
                Some(DISK) => far += 1,
                Some(_) => {}
                None if self.how.shares && self.store.has(*block) => far += 1,
                None => break,
            }
        }
        if far > 0 && node.proactive.begin(lane, far * self.config.block_bytes()) {
            self.bring(now, number, (lane, &path));
        }
        self.path = path;
    }

    fn bring(&mut self, now: Instant, number: u32, (lane, path): (u64, &[u32])) {
        let mut ids = std::mem::take(&mut self.ids);
        let node = &mut self.nodes[number as usize];
        node.cache.number(path, &mut ids);
        let (mut disk, mut store, mut pinned) = (Vec::new(), Vec::new(), Vec::new());
        for (at, block) in path.iter().enumerate() {
            let from = match node.cache.tier(*block) {
                Some(DISK) => &mut disk,
                Some(_) => continue,
                None if self.how.shares && self.store.has(*block) => &mut store,
                None => break,
            };
            let entry = node.cache.entry((path, &ids), at);
            if !node.cache.bring(now, (ids[at], entry), HOST, &self.work.tree) {
                break;
            }
            node.cache.publish_in(now, *block, HOST);
            from.push(ids[at]);
            pinned.push(*block);
        }
        let mut held = Vec::new();
        node.cache.number(&pinned, &mut held);
        node.pins.entry(lane).or_default().extend(held);
        node.cache.let_go(&ids);
        for (ids, from) in [(disk, DISK_READ), (store, NETWORK)] {
            if !ids.is_empty() {
                let load = Load { node: number, links: 0, ids, waiters: Vec::new(), lane: Some(lane) };
                self.load(now, (number, from), load);
            }
        }
        self.ids = ids;
    }

    /// What was prefetched for a lane is held for it no more.
    pub(super) fn unpin(&mut self, number: u32, lane: u64) {
        let node = &mut self.nodes[number as usize];
        if let Some(ids) = node.pins.remove(&lane) {
            for id in &ids {
                node.cache.release(*id, HOST);
            }
            node.cache.let_go(&ids);
        }
    }

    /// A lane is back, on a node that may be another than before.
    pub(super) fn lane_back(&mut self, now: Instant, (number, at): (u32, u32), (was, node): (u32, u32)) {
        let lane = self.work.programs[number as usize].steps[at as usize].lane;
        let known = &mut self.lanes[lane as usize];
        let Some(paused) = known.paused.take() else { return };
        self.durations.observe(alike(known.kind), known.says, now.since(paused));
        if was != NOWHERE {
            self.nodes[was as usize].proactive.back(u64::from(lane), was == node);
            if was != node {
                self.unpin(was, u64::from(lane));
            }
        }
    }

    /// A step of a program ended: what nobody will read again goes, and the rest is ranked by what is told.
    pub(super) fn look_ahead(&mut self, now: Instant, number: u32) {
        self.free(now, number);
        match self.how.key {
            Key::LastUse | Key::Kept => {}
            Key::Steps | Key::NextUse => self.rekey(now, number),
        }
    }

    /// Lanes that no step left reads, and whose end nobody waits for, have no future.
    fn free(&mut self, now: Instant, number: u32) {
        let program = &self.work.programs[number as usize];
        let Some(running) = self.running[number as usize].as_mut() else { return };
        let mut freed = Vec::new();
        let ended = |step: &u32| running.course.ended[*step as usize].is_some();
        for (at, readers) in running.readers.iter().enumerate() {
            if !running.freed[at] && readers.iter().all(ended) {
                freed.push(at);
            }
        }
        let mut gone = 0;
        for at in &freed {
            running.freed[*at] = true;
            gone += u64::from(std::mem::take(&mut running.live[*at]));
        }
        self.count_live(now, 0, gone);
        if !self.how.frees {
            return;
        }
        for at in freed {
            let lane = program.lanes.0 + u32::try_from(at).expect("few lanes");
            let known = self.lanes[lane as usize];
            if known.node == NOWHERE {
                continue;
            }
            let node = &mut self.nodes[known.node as usize];
            node.proactive.ended(u64::from(lane));
            let mut block = known.tip;
            while block != ROOT && self.work.tree.owner(block) == lane {
                node.cache.forget(now, block, self.work.tree.semantic(block));
                block = self.work.tree.parent(block);
            }
            self.unpin(known.node, u64::from(lane));
        }
    }

    /// Ranks a program's lanes by when they are used next.
    fn rekey(&mut self, now: Instant, number: u32) {
        let Some(running) = self.running[number as usize].as_ref() else { return };
        let program = &self.work.programs[number as usize];
        let lanes: Vec<(usize, u64)> = if self.how.key == Key::Steps {
            let until = steps_until(program, &running.course);
            let key = |readers: &[u32]| {
                let next =
                    readers.iter().filter(|s| running.course.ended[**s as usize].is_none()).map(|s| until[*s as usize]);
                next.min().map_or(0, |steps| steps_key(steps, now))
            };
            running.readers.iter().map(|readers| key(readers)).enumerate().collect()
        } else {
            let Some(begins) = self.forecast(now, number) else { return };
            let key = |readers: &[u32]| {
                let next = readers.iter().filter(|s| running.course.ended[**s as usize].is_none());
                next.map(|s| begins[*s as usize].unwrap_or(now)).min().map_or(0, next_use_key)
            };
            running.readers.iter().map(|readers| key(readers)).enumerate().collect()
        };
        for (at, key) in lanes {
            let Some(running) = self.running[number as usize].as_mut() else { return };
            if running.keys[at].abs_diff(key) < WORTH_NS || running.freed[at] {
                continue;
            }
            running.keys[at] = key;
            let lane = program.lanes.0 + u32::try_from(at).expect("few lanes");
            let known = self.lanes[lane as usize];
            if known.node == NOWHERE {
                continue;
            }
            let node = &mut self.nodes[known.node as usize];
            let mut block = known.tip;
            while block != ROOT && self.work.tree.owner(block) == lane {
                node.cache.rekey(block, key);
                block = self.work.tree.parent(block);
            }
        }
    }
}
