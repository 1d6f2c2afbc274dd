//! The guard of eviction: plays the node's calls on small shadows of host memory, off the core's lock, and has the core
//! follow the ranking that does best there.
//!
//! *Bounds*: the core queues so many calls and drops the oldest beyond; a guard that falls behind judges by what it gets.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::GuardEvent;
use kvtier_policy::evict::{Contender, Guard};
use tokio::time::interval;

use crate::node::Node;

/// Calls of blocks of another size in a row after which the guard begins anew with those.
const MAX_OTHERS: u32 = 1000;
/// How often it takes in what happened.
const EVERY: Duration = Duration::from_millis(100);

/// Runs until the node stops; nothing to do where eviction is not guarded.
pub(crate) async fn run(node: Arc<Node>) {
    if !node.read_core(|core| core.eviction().is_guarded()) {
        return;
    }
    let mut ticks = interval(EVERY);
    let mut shadows = Shadows::default();
    loop {
        tokio::select! {
            () = node.stopping.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let events = node.with_core(|core, _| core.take_guard_events());
        if events.is_empty() {
            continue;
        }
        let before = shadows.leader();
        let played = tokio::task::spawn_blocking(move || {
            shadows.play(events);
            shadows
        });
        let Ok(played) = played.await else {
            tracing::error!("the guard of eviction died: survival ranking goes on without it");
            node.with_core(|core, _| core.follow(Contender::Survival));
            return;
        };
        shadows = played;
        let leader = shadows.leader();
        if leader != before {
            tracing::info!(from = before.name(), to = leader.name(), "eviction follows another ranking");
            node.with_core(|core, _| core.follow(leader));
        }
    }
}

/// Shadows of host memory, once a call told how many blocks it holds.
#[derive(Default)]
struct Shadows {
    guard: Option<(u64, Guard)>,
    /// Calls of blocks of another size in a row.
    others: u32,
}

impl Shadows {
    fn play(&mut self, events: Vec<GuardEvent>) {
        for event in events {
            match (event, &mut self.guard) {
                (GuardEvent::Call(call, room), None) => {
                    let mut guard = Guard::new(room);
                    guard.call(&call);
                    self.guard = Some((room, guard));
                }
                // Blocks of another size take another share of the room: they are not to be compared.
                (GuardEvent::Call(call, room), Some((of, guard))) if room == *of => {
                    self.others = 0;
                    guard.call(&call);
                }
                (GuardEvent::Call(..), Some(_)) => {
                    self.others += 1;
                    if self.others >= MAX_OTHERS {
                        // The engine that it knew is gone.
                        *self = Self::default();
                    }
                }
                (GuardEvent::Pause(program, pause), Some((_, guard))) => guard.pause(program, pause),
                (GuardEvent::End(program), Some((_, guard))) => guard.end_program(program),
                _ => {}
            }
        }
    }

    fn leader(&self) -> Contender {
        self.guard.as_ref().map_or(Contender::Survival, |(_, guard)| guard.leader())
    }
}
