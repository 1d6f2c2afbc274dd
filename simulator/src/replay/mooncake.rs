//! Mooncake's traces: one request a line, with a time in milliseconds and the numbers of its prefix-chained 512-token blocks.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvtier_policy::evict::survival::StopReason;
use kvtier_types::{Instant, SemanticType};
use rustc_hash::FxHashMap;
use serde::Deserialize;

use super::trace::{LineReader, Trace, TraceCall};

/// Tokens of a block.
const BLOCK_TOKENS: u32 = 512;

#[derive(Debug, Deserialize)]
struct Request {
    timestamp: f64,
    hash_ids: Vec<u64>,
}

/// Reads requests.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    numbers: FxHashMap<u64, u32>,
}

impl LineReader for Reader {
    fn block_tokens(&self) -> u32 {
        BLOCK_TOKENS
    }

    fn line(&mut self, line: &str, trace: &mut Trace) -> Result<()> {
        let request: Request = serde_json::from_str(line).context("not a request")?;
        let at = request.timestamp;
        ensure!((0.0..1e12).contains(&at), "timestamp {at} is not one");
        let start = trace.blocks.len();
        for id in request.hash_ids {
            let number = if let Some(known) = self.numbers.get(&id) {
                *known
            } else {
                let number = trace.new_block(SemanticType::Unspecified)?;
                self.numbers.insert(id, number);
                number
            };
            trace.blocks.push(number);
        }
        trace.calls.push(TraceCall {
            at: Instant::ZERO + Duration::from_secs_f64(at / 1000.0),
            program: None,
            sub_agent: false,
            stop: StopReason::Unknown,
            last: false,
            next_after: None,
            blocks: start..trace.blocks.len(),
        });
        Ok(())
    }
}
