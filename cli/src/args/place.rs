//! The arguments of `kvtier place`.

use std::str::FromStr;
use std::time::Duration;

use kvtier_types::NodeId;

use super::target::TargetArgs;
use crate::units::parse_duration;

/// Which step to place, and where it may go.
#[derive(Debug, clap::Args)]
pub struct PlaceArgs {
    /// The program whose step it is; its latest context is meant when no targets are named.
    #[arg(value_name = "PROGRAM")]
    pub step_of: String,
    /// The blocks of the step's context, instead.
    #[command(flatten)]
    pub targets: TargetArgs,
    /// Tokens of the step's prompt; as many as its context has without it.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub prompt_tokens: u32,
    /// A node that it may run on, with its queue in milliseconds and what its engine computes of a prompt, in tokens a
    /// second: node-1, node-1:250 or node-1:250:8000. May be given several times; all nodes that take requests without it.
    #[arg(long = "candidate", value_name = "NODE[:QUEUE_MS[:TOKENS_PER_S]]")]
    pub candidates: Vec<CandidateArg>,
    /// Where its last step ran: it stays there unless another node is better by more than a tenth.
    #[arg(long, value_name = "NODE", value_parser = NodeId::new)]
    pub current: Option<NodeId>,
    /// Begin to bring there what it needs.
    #[arg(long)]
    pub start: bool,
    /// How long the daemon may take to find out what lies where, at most 1s.
    #[arg(long, value_name = "SPAN", value_parser = parse_duration, default_value = "250ms")]
    pub deadline: Duration,
}

/// A node that a step may run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CandidateArg {
    /// Its name.
    pub node: NodeId,
    /// Until its engine turns to the step.
    pub queue_ms: u32,
    /// What its engine computes of a prompt; zero for what the daemon takes for usual.
    pub tokens_per_second: u32,
}

/// A text that is no candidate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected NODE, NODE:QUEUE_MS or NODE:QUEUE_MS:TOKENS_PER_S, such as node-1:250:8000")]
pub struct BadCandidate;

impl FromStr for CandidateArg {
    type Err = BadCandidate;

    fn from_str(s: &str) -> Result<Self, BadCandidate> {
        let mut parts = s.split(':');
        let node = NodeId::new(parts.next().unwrap_or_default()).map_err(|_| BadCandidate)?;
        let mut number = || parts.next().map_or(Ok(0), |text| text.parse().map_err(|_| BadCandidate));
        let (queue_ms, tokens_per_second) = (number()?, number()?);
        if parts.next().is_some() { Err(BadCandidate) } else { Ok(Self { node, queue_ms, tokens_per_second }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_have_a_queue_and_a_rate_if_they_say_so() {
        for (text, queue_ms, tokens_per_second) in [("a", 0, 0), ("a:250", 250, 0), ("a:250:8000", 250, 8_000)] {
            let node = NodeId::new("a").unwrap();
            assert_eq!(text.parse(), Ok(CandidateArg { node, queue_ms, tokens_per_second }));
        }
        for text in ["", ":1", "a:", "a:x", "a:1:", "a:1:2:3", "a b", "a:-1", "a:4294967296"] {
            assert_eq!(text.parse::<CandidateArg>(), Err(BadCandidate), "{text}");
        }
    }
}
