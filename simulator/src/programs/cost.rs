//! How long an engine's steps take, and what a token of KV weighs: fitted to measured engines.
//!
//! A step that computes `p` prompt tokens, each against the context before it, and one token for each of `n` sequences whose
//! contexts sum to `c` takes `fixed + token * (p + attention * sum of contexts) + sequence * n + context * c` seconds.
//! `attention` is not fitted (measured prompts are short) but follows from the model's shape: operations per token and
//! context token over operations per token, `4 L H d / 2 N`.

use std::time::Duration;

/// Seconds of each part of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StepTimes {
    /// Every step: weights are read, kernels started.
    pub(crate) fixed: f64,
    /// A prompt token.
    pub(crate) token: f64,
    /// A sequence that decodes.
    pub(crate) sequence: f64,
    /// A token of context of a sequence that decodes.
    pub(crate) context: f64,
}

/// Median absolute errors over the part of the measurements that was held out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Residual {
    /// Of the time from arrival to the last token.
    pub(crate) end_to_end: f64,
    /// Of the time to the first token.
    pub(crate) first_token: f64,
    /// Of the time per further token.
    pub(crate) per_token: f64,
}

/// A model on an accelerator.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) name: &'static str,
    pub(crate) times: StepTimes,
    /// Operations per context token over operations per token.
    pub(crate) attention: f64,
    /// Operations per token, without attention.
    pub(crate) token_flops: f64,
    pub(crate) kv_bytes_per_token: u64,
    pub(crate) max_sequences: usize,
    pub(crate) max_batched_tokens: u64,
    pub(crate) residual: Residual,
}

impl Cost {
    /// All that were fitted.
    pub(crate) const ALL: [Self; 4] =
        [RTXPRO6000_LLAMA_8B, RTX4090_LLAMA_8B, RTXPRO6000_QWEN_30B_A3B, RTXPRO6000_QWEN_32B];

    /// The one of a name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cost| cost.name == name)
    }

    /// One step: prompt tokens, their contexts summed, sequences that decode, and their contexts summed.
    pub(crate) fn step(&self, prompt: f64, attended: f64, sequences: f64, context: f64) -> f64 {
        let t = self.times;
        t.fixed + t.token * (prompt + self.attention * attended) + t.sequence * sequences + t.context * context
    }

    /// So many steps in which only `sequences` decode, whose contexts sum to `context` at first.
    pub(crate) fn decode(&self, steps: f64, sequences: f64, context: f64) -> f64 {
        let grown = sequences * steps * (steps - 1.0) / 2.0;
        steps * self.step(0.0, 0.0, sequences, context) + self.times.context * grown
    }

    /// What computing `tokens` after `context` takes of an engine that computes nothing else.
    pub(crate) fn prefill(&self, context: u64, tokens: u64) -> Duration {
        let steps = tokens.div_ceil(self.max_batched_tokens) as f64;
        let work = self.times.token * self.work(context, tokens);
        Duration::from_secs_f64(steps.mul_add(self.times.fixed, work))
    }

    /// Operations of computing `tokens` after `context`.
    pub(crate) fn flops(&self, context: u64, tokens: u64) -> f64 {
        self.token_flops * self.work(context, tokens)
    }

    /// Computing `tokens` after `context`, in tokens without one.
    fn work(&self, context: u64, tokens: u64) -> f64 {
        let (before, tokens) = (context as f64, tokens as f64);
        tokens + self.attention * tokens * (before + tokens / 2.0)
    }
}

const RTXPRO6000_LLAMA_8B: Cost = Cost {
    name: "llama-3.1-8b-rtxpro6000",
    times: StepTimes { fixed: 9.064e-3, token: 4.0512e-5, sequence: 4.365e-5, context: 1e-7 },
    attention: 3.3e-5,
    token_flops: 1.6e10,
    kv_bytes_per_token: 131_072,
    max_sequences: 128,
    max_batched_tokens: 2048,
    residual: Residual { end_to_end: 0.0204, first_token: 0.0330, per_token: 0.0263 },
};

const RTX4090_LLAMA_8B: Cost = Cost {
    name: "llama-3.1-8b-rtx4090",
    times: StepTimes { fixed: 1.156e-2, token: 9.7551e-5, sequence: 6.8408e-5, context: 1.515e-7 },
    max_sequences: 256,
    residual: Residual { end_to_end: 0.0103, first_token: 0.0125, per_token: 0.0333 },
    ..RTXPRO6000_LLAMA_8B
};

const RTXPRO6000_QWEN_30B_A3B: Cost = Cost {
    name: "qwen3-30b-a3b-rtxpro6000",
    times: StepTimes { fixed: 2.01e-2, token: 6.6e-5, sequence: 9.0909e-5, context: 1e-7 },
    attention: 1.19e-4,
    token_flops: 6.6e9,
    kv_bytes_per_token: 98_304,
    residual: Residual { end_to_end: 0.0139, first_token: 0.2080, per_token: 0.0135 },
    ..RTXPRO6000_LLAMA_8B
};

const RTXPRO6000_QWEN_32B: Cost = Cost {
    name: "qwen3-32b-2xrtxpro6000",
    times: StepTimes { fixed: 2.3031e-2, token: 1.59075e-4, sequence: 1.30758e-4, context: 1.5e-7 },
    attention: 3.2e-5,
    token_flops: 6.56e10,
    kv_bytes_per_token: 262_144,
    residual: Residual { end_to_end: 0.0094, first_token: 0.0061, per_token: 0.0150 },
    ..RTXPRO6000_LLAMA_8B
};
