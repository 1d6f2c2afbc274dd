//! Fits the cost model to measured requests, and tells how far off it is on those it was not fitted to.
//!
//! The engine model runs the requests as they arrived. Fitted is the first half by arrival, held out the second.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use kvtier_types::Instant;
use serde::Deserialize;

use super::cost::{Cost, Residual, StepTimes};
use super::engine::{Engine, Job, Progress, seconds};

/// Fits cost models.
#[derive(Debug, Clone, clap::Args)]
pub struct CalibrateArgs {
    /// A folder of measured set-ups: each a folder with `meta.json` and `requests.jsonl`.
    #[arg(long)]
    data: PathBuf,
    /// Only tell how far off the built-in models are.
    #[arg(long)]
    check: bool,
}

/// A measured request: times in seconds.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct Measured {
    input_toks: u64,
    output_toks: u64,
    queued_ts: f64,
    first_token_ts: f64,
    last_token_ts: f64,
}

/// How the measured engines were set up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) engines: usize,
    pub(crate) memory_tokens: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Meta {
    engine_kwargs: Kwargs,
    kv_cache: Option<KvCache>,
}

#[derive(Debug, Deserialize)]
struct Kwargs {
    data_parallel_size: usize,
}

#[derive(Debug, Deserialize)]
struct KvCache {
    num_kv_tokens: Option<u64>,
}

/// Folders of measurements, and which model each is of.
const SETUPS: [(&str, &str); 4] = [
    ("RTXPRO6000_Llama-3.1-8B", "llama-3.1-8b-rtxpro6000"),
    ("RTX4090_Llama-3.1-8B", "llama-3.1-8b-rtx4090"),
    ("RTXPRO6000_Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b-rtxpro6000"),
    ("RTXPRO6000_Qwen3-32B", "qwen3-32b-2xrtxpro6000"),
];

impl CalibrateArgs {
    /// Fits, and prints coefficients and errors.
    ///
    /// # Errors
    /// Measurements that cannot be read.
    pub fn run(&self) -> Result<()> {
        let mut text = String::from("median absolute errors, held out (fitted): end to end, first token, per token\n");
        for (folder, name) in SETUPS {
            let (setup, requests) = read(&self.data.join(folder))?;
            let mut cost = Cost::named(name).context("a model without a cost")?;
            if !self.check {
                cost = fit(cost, setup, &requests);
            }
            let timings = simulate(&cost, setup, &requests);
            let half = requests.len() / 2;
            let (fitted, held) =
                (residual(&requests[..half], &timings[..half]), residual(&requests[half..], &timings[half..]));
            writeln!(
                text,
                "{name:<26} {:.2} % ({:.2} %)  {:.2} % ({:.2} %)  {:.2} % ({:.2} %)  {:?}",
                100.0 * held.end_to_end,
                100.0 * fitted.end_to_end,
                100.0 * held.first_token,
                100.0 * fitted.first_token,
                100.0 * held.per_token,
                100.0 * fitted.per_token,
                cost.times
            )?;
        }
        print!("{text}");
        Ok(())
    }
}

/// Reads one set-up.
fn read(folder: &Path) -> Result<(Setup, Vec<Measured>)> {
    let text = |name: &str| {
        let path = folder.join(name);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let meta: Meta = serde_json::from_str(&text("meta.json")?).context("meta.json")?;
    let setup = Setup {
        engines: meta.engine_kwargs.data_parallel_size.max(1),
        memory_tokens: meta.kv_cache.and_then(|kv| kv.num_kv_tokens),
    };
    Ok((setup, parse(&text("requests.jsonl")?)?))
}

/// Requests from lines of JSON, in the order in which they were queued.
pub(crate) fn parse(lines: &str) -> Result<Vec<Measured>> {
    let parse = |line| serde_json::from_str(line).context("requests.jsonl");
    let mut requests: Vec<Measured> = lines.lines().map(parse).collect::<Result<_>>()?;
    ensure!(requests.len() > 1, "no requests");
    requests.sort_by(|a, b| a.queued_ts.total_cmp(&b.queued_ts));
    let first = requests[0].queued_ts;
    for request in &mut requests {
        request.queued_ts -= first;
        request.first_token_ts -= first;
        request.last_token_ts -= first;
        ensure!(request.output_toks > 0 && request.input_toks > 0, "a request without tokens");
    }
    Ok(requests)
}

/// When the first and the last token of a request came.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Timing {
    first: Instant,
    last: Instant,
}

struct Replica {
    engine: Engine,
    waiting: VecDeque<Job>,
}

impl Replica {
    fn admit(&mut self, now: Instant) {
        while let Some(job) = self.waiting.pop_front_if(|job| self.engine.has_room(job.missing)) {
            self.engine.join(now, job);
        }
    }
}

/// Runs the requests on modelled engines.
pub(crate) fn simulate(cost: &Cost, setup: Setup, requests: &[Measured]) -> Vec<Timing> {
    let replica = || Replica { engine: Engine::new(*cost, setup.memory_tokens), waiting: VecDeque::new() };
    let mut replicas: Vec<Replica> = (0..setup.engines).map(|_| replica()).collect();
    let mut timings = vec![Timing::default(); requests.len()];
    let arrival = |request: &Measured| Instant::ZERO + seconds(request.queued_ts);
    let mut next = 0;
    let mut now = Instant::ZERO;
    let mut progress = Vec::new();
    loop {
        let step = (0..replicas.len()).filter_map(|r| replicas[r].engine.next(now).map(|at| (at, r))).min();
        let arrives = requests.get(next).map(arrival);
        match (step, arrives) {
            (None, None) => return timings,
            (step, Some(at)) if step.is_none_or(|(ends, _)| at < ends) => {
                now = at;
                let to = replicas.iter_mut().min_by_key(|r| 4 * r.waiting.len() + r.engine.running());
                let replica = to.expect("there is an engine");
                let (missing, output) = (requests[next].input_toks, requests[next].output_toks);
                let id = u32::try_from(next).expect("few requests");
                replica.waiting.push_back(Job { id, context: 0, missing, output });
                replica.admit(now);
                next += 1;
            }
            (Some((at, r)), _) => {
                now = at;
                replicas[r].engine.finish(now, &mut progress);
                for event in progress.drain(..) {
                    match event {
                        Progress::First(id) if timings[id as usize].first == Instant::ZERO => {
                            timings[id as usize].first = now;
                        }
                        Progress::First(_) => {}
                        Progress::Done(id) => timings[id as usize].last = now,
                        Progress::Preempted(job) => replicas[r].waiting.push_front(job),
                    }
                }
                replicas[r].admit(now);
            }
            (None, Some(_)) => unreachable!("the guard above takes every arrival without a step"),
        }
    }
}

/// End to end, first token, and per further token, in seconds.
fn durations(request: &Measured, first: f64, last: f64) -> [f64; 3] {
    let further = (request.output_toks - 1).max(1) as f64;
    [last - request.queued_ts, first - request.queued_ts, (last - first) / further]
}

fn errors(request: &Measured, timing: &Timing) -> [f64; 3] {
    let secs = |at: Instant| at.since(Instant::ZERO).as_secs_f64();
    let real = durations(request, request.first_token_ts, request.last_token_ts);
    let ours = durations(request, secs(timing.first), secs(timing.last));
    std::array::from_fn(|i| (ours[i] - real[i]).abs() / real[i].max(1e-9))
}

/// Median absolute relative errors.
pub(crate) fn residual(requests: &[Measured], timings: &[Timing]) -> Residual {
    let all: Vec<[f64; 3]> = requests.iter().zip(timings).map(|(r, t)| errors(r, t)).collect();
    let median = |i: usize| {
        let mut values: Vec<f64> = all.iter().map(|e| e[i]).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(0.0)
    };
    Residual { end_to_end: median(0), first_token: median(1), per_token: median(2) }
}

/// What is minimized: errors of the first half.
fn loss(cost: &Cost, setup: Setup, requests: &[Measured]) -> f64 {
    let timings = simulate(cost, setup, requests);
    let half = requests.len() / 2;
    let each = requests[..half].iter().zip(&timings).map(|(r, t)| errors(r, t));
    each.map(|[end, first, token]| end + 0.5 * token + 0.3 * first.min(1.0)).sum()
}

/// Coordinate descent on the logarithms of the coefficients.
fn fit(cost: Cost, setup: Setup, requests: &[Measured]) -> Cost {
    let with = |times: [f64; 4]| {
        let [fixed, token, sequence, context] = times;
        Cost { times: StepTimes { fixed, token, sequence, context }, ..cost }
    };
    let t = cost.times;
    let mut best = [t.fixed, t.token, t.sequence, t.context];
    let mut least = loss(&cost, setup, requests);
    for step in [1.5, 1.2, 1.1, 1.05, 1.02, 1.01, 1.005] {
        let mut improved = true;
        while improved {
            improved = false;
            for coordinate in 0..best.len() {
                for factor in [step, 1.0 / step] {
                    let mut tried = best;
                    tried[coordinate] *= factor;
                    let loss = loss(&with(tried), setup, requests);
                    if loss < least * 0.9999 {
                        (best, least, improved) = (tried, loss, true);
                    }
                }
            }
        }
    }
    with(best)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn one_request_alone_takes_what_its_steps_take() {
        let cost = Cost::ALL[0];
        let request =
            Measured { input_toks: 5000, output_toks: 11, queued_ts: 0.0, first_token_ts: 1.0, last_token_ts: 2.0 };
        let timing = simulate(&cost, Setup { engines: 1, memory_tokens: None }, &[request])[0];
        let prefill = cost.prefill(0, 5000);
        let first = timing.first.since(Instant::ZERO);
        assert!(first.abs_diff(prefill) < Duration::from_micros(100), "{first:?} {prefill:?}");
        let decode = timing.last.since(timing.first).as_secs_f64();
        assert!((decode - cost.decode(10.0, 1.0, 5001.0)).abs() < 1e-6);
    }
}
