//! When the steps of a program will come, from its graph and what is told of it.

use std::time::Duration;

use kvtier_types::Instant;

use super::decisions::Told;
use super::dist::normal;
use super::tree::{Program, Step};
use crate::rng::{Rng, mix};

/// How far a program is.
#[derive(Debug, Clone)]
pub(crate) struct Course {
    /// When each step ended.
    pub(crate) ended: Vec<Option<Instant>>,
    /// When each step became ready.
    pub(crate) ready: Vec<Option<Instant>>,
}

/// What is told of a step's pause.
pub(crate) fn announced(told: Told, step: &Step, salt: u64) -> Option<Duration> {
    let mut rng = Rng::new(mix(salt));
    let factor = match told {
        Told::Nothing => return None,
        Told::Noisy(sigma) => (sigma * normal(&mut rng)).exp(),
        Told::Tenfold if rng.chance(500) => 10.0,
        Told::Tenfold => 0.1,
        Told::Exactly => 1.0,
    };
    Some(step.gap.mul_f64(factor))
}

/// When each step that is not ready will be, as far as is told: `None` for those that are.
pub(crate) fn forecast(
    (program, course): (&Program, &Course),
    now: Instant,
    pause: impl Fn(usize, &Step) -> Duration,
    takes: impl Fn(&Step) -> Duration,
) -> Vec<Option<Instant>> {
    let mut ends: Vec<Instant> = Vec::with_capacity(program.steps.len());
    let mut begins = vec![None; program.steps.len()];
    for (at, step) in program.steps.iter().enumerate() {
        let end = match (course.ended[at], course.ready[at]) {
            (Some(ended), _) => ended,
            (None, Some(ready)) => (ready + takes(step)).max(now),
            (None, None) => {
                let before = step.after.iter().map(|b| ends[*b as usize]).max().unwrap_or(now);
                let ready = (before + pause(at, step)).max(now);
                begins[at] = Some(ready);
                ready + takes(step)
            }
        };
        ends.push(end);
    }
    begins
}

/// Steps until each step that is not ready is: its longest way from those that run.
pub(crate) fn steps_until(program: &Program, course: &Course) -> Vec<u32> {
    let mut until: Vec<u32> = Vec::with_capacity(program.steps.len());
    for (at, step) in program.steps.iter().enumerate() {
        let before = step.after.iter().map(|b| until[*b as usize]).max().unwrap_or(0);
        until.push(if course.ended[at].is_some() { 0 } else { before + 1 });
    }
    until
}

#[cfg(test)]
mod tests {
    use kvtier_policy::evict::survival::StopReason;

    use super::*;

    fn step(after: &[u32], gap: u64) -> Step {
        Step {
            lane: 0,
            after: after.to_vec(),
            gap: Duration::from_secs(gap),
            tool: 0,
            prompt: 0,
            end: 0,
            output_tokens: 1,
            stop: StopReason::Unknown,
            last: false,
        }
    }

    #[test]
    fn a_join_comes_after_the_slowest() {
        let steps = vec![step(&[], 0), step(&[0], 1), step(&[0], 30), step(&[1, 2], 2)];
        let program = Program { steps, ..Program::default() };
        let now = Instant::ZERO + Duration::from_secs(100);
        let course =
            Course { ended: vec![Some(now), None, None, None], ready: vec![Some(Instant::ZERO), None, None, None] };
        let begins = forecast((&program, &course), now, |_, s| s.gap, |_| Duration::from_secs(5));
        let secs: Vec<Option<u64>> = begins.iter().map(|b| b.map(|b| b.since(now).as_secs())).collect();
        assert_eq!(secs, [None, Some(1), Some(30), Some(37)]);
        assert_eq!(steps_until(&program, &course), [0, 1, 1, 2]);
    }
}
