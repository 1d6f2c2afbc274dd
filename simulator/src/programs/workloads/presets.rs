//! Sizes and times of programs, as published.

use super::super::dist::LogNormal;

/// Where sizes and times are from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Preset {
    /// Recorded sessions of a coding agent: 24.5 k tokens at first, 704 (p90 4,032) new and 221 (p90 894) generated a
    /// call; 8.6 s (p90 71 s) of a tool.
    ClaudeCode,
    /// Exgentic v2: prompts of 49.1 k tokens, 659 generated, 21.9 turns, 13.0 s between them, of which most share their
    /// beginning.
    Exgentic,
    /// llm-d-benchmark, agentic code generation, at an eighth of its prompt and turns: a run of the whole takes hours.
    AgenticCode,
    /// aiperf, inference day 2026: layers of shared prompts, 4,000 tokens new and 800 generated a turn.
    InferenceDay,
}

/// Sizes in tokens, times in seconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// The first prompt, with what is shared.
    pub(crate) first: LogNormal,
    /// New tokens of each later call.
    pub(crate) new: LogNormal,
    /// Generated tokens.
    pub(crate) output: LogNormal,
    /// Model calls of a loop.
    pub(crate) turns: LogNormal,
    /// How long a tool runs.
    pub(crate) tool: LogNormal,
    /// Between calls without a tool.
    pub(crate) think: LogNormal,
}

impl Preset {
    /// Its name in commands and reports.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::ClaudeCode => "claude-code",
            Self::Exgentic => "exgentic",
            Self::AgenticCode => "agentic-code",
            Self::InferenceDay => "inference-day",
        }
    }

    /// Its sizes.
    pub(crate) fn sizes(self) -> Sizes {
        let think = LogNormal::new(0.3, 1.0, (0.05, 5.0));
        let turns = LogNormal::of_mean(21.9, 23.4, (3.0, 100.0));
        match self {
            Self::ClaudeCode => Sizes {
                first: LogNormal::new(24_500.0, 50_000.0, (4_000.0, 90_000.0)),
                new: LogNormal::new(704.0, 4_032.0, (64.0, 30_000.0)),
                output: LogNormal::new(221.0, 894.0, (16.0, 4_000.0)),
                turns,
                tool: LogNormal::new(8.6, 71.0, (0.2, 300.0)),
                think,
            },
            Self::Exgentic => Sizes {
                first: LogNormal::new(44_600.0, 60_000.0, (8_000.0, 90_000.0)),
                new: LogNormal::new(400.0, 1_500.0, (32.0, 8_000.0)),
                output: LogNormal::of_mean_median(659.0, 400.0, (16.0, 4_000.0)),
                turns,
                tool: LogNormal::of_mean_median(13.0, 3.0, (0.2, 300.0)),
                think,
            },
            Self::AgenticCode => Sizes {
                first: LogNormal::of_mean(23_000.0, 29_200.0, (4_250.0, 90_000.0)),
                new: LogNormal::of_mean(1_500.0, 1_200.0, (64.0, 30_000.0)),
                output: LogNormal::of_mean(425.0, 825.0, (16.0, 4_000.0)),
                turns: LogNormal::of_mean(67.0, 40.0, (3.0, 200.0)),
                tool: LogNormal::of_mean(15.0, 55.0, (1.0, 100.0)),
                think,
            },
            Self::InferenceDay => Sizes {
                first: LogNormal::new(47_000.0, 66_000.0, (32_000.0, 90_000.0)),
                new: LogNormal::of_mean_median(6_000.0, 4_000.0, (64.0, 30_000.0)),
                output: LogNormal::of_mean_median(1_000.0, 800.0, (16.0, 4_000.0)),
                turns: LogNormal::new(10.0, 20.0, (5.0, 40.0)),
                tool: LogNormal::of_mean_median(5.0, 2.0, (0.2, 100.0)),
                think: LogNormal::of_mean_median(30.0, 15.0, (1.0, 300.0)),
            },
        }
    }
}
