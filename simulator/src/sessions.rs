//! Recorded sessions of a coding agent, one a line: calls with the blocks of their prompts run-length coded, sub-agents nested.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use kvtier_policy::evict::survival::StopReason;
use serde::Deserialize;

/// Tokens of a recorded block.
pub(crate) const SMALL_TOKENS: u32 = 64;

/// One session.
#[derive(Debug, Deserialize)]
pub(crate) struct Session {
    block_size: u32,
    #[serde(default)]
    pub(crate) tool_tokens: u64,
    #[serde(default)]
    pub(crate) system_tokens: u64,
    pub(crate) requests: Vec<Request>,
}

/// A model call, or a sub-agent with calls of its own.
#[derive(Debug, Deserialize)]
pub(crate) struct Request {
    /// Seconds since its session began, or its agent.
    pub(crate) t: Option<f64>,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    stop: String,
    #[serde(default)]
    pub(crate) out: u32,
    #[serde(default)]
    pub(crate) think_time: f64,
    /// First block and how many, one run after another.
    #[serde(default)]
    pub(crate) runs: Vec<(u64, u64)>,
    #[serde(default)]
    pub(crate) tool_tokens: u64,
    #[serde(default)]
    pub(crate) system_tokens: u64,
    #[serde(default)]
    pub(crate) requests: Vec<Self>,
}

impl Session {
    /// Reads a line.
    ///
    /// # Errors
    /// It is not a session, or one with blocks of another size.
    pub(crate) fn parse(line: &str) -> Result<Self> {
        let session: Self = serde_json::from_str(line).context("not a session")?;
        ensure!(session.block_size == SMALL_TOKENS, "blocks of {} tokens, not {SMALL_TOKENS}", session.block_size);
        Ok(session)
    }
}

impl Request {
    /// Whether it is a sub-agent.
    pub(crate) fn is_sub_agent(&self) -> bool {
        self.kind == "subagent"
    }

    /// Why the call ended.
    pub(crate) fn stop(&self) -> StopReason {
        match self.stop.as_str() {
            "tool_use" => StopReason::ToolUse,
            "end_turn" => StopReason::EndTurn,
            _ => StopReason::Unknown,
        }
    }
}

/// Opens a file of lines, packed with gzip if its name says so.
///
/// # Errors
/// It cannot be opened.
pub(crate) fn open(path: &Path) -> Result<impl BufRead> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let zipped = path.extension().is_some_and(|e| e == "gz");
    let reader: Box<dyn Read> = if zipped { Box::new(flate2::read::MultiGzDecoder::new(file)) } else { Box::new(file) };
    Ok(BufReader::new(reader))
}
