//! A trace in memory: model calls in the order in which they begin, each with the blocks of its prompt.

use std::io::BufRead;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kvtier_policy::evict::survival::StopReason;
use kvtier_types::{Instant, SemanticType};

use super::{Format, claude_code, mooncake};
use crate::sessions;

/// One model call.
#[derive(Debug, Clone)]
pub(crate) struct TraceCall {
    pub(crate) at: Instant,
    /// Its program's number, if the trace has programs. Never zero.
    pub(crate) program: Option<u64>,
    pub(crate) sub_agent: bool,
    pub(crate) stop: StopReason,
    /// The program's last call.
    pub(crate) last: bool,
    /// When the program's next call begins: only for policies that are told the future.
    pub(crate) next_after: Option<Duration>,
    pub(crate) blocks: Range<usize>,
}

/// All of a trace.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    pub(crate) calls: Vec<TraceCall>,
    /// Blocks of all calls: numbers of distinct blocks.
    pub(crate) blocks: Vec<u32>,
    /// What each distinct block means.
    pub(crate) semantics: Vec<SemanticType>,
    /// Tokens of a block.
    pub(crate) block_tokens: u32,
}

impl Trace {
    /// Blocks of a call.
    pub(crate) fn blocks_of(&self, call: &TraceCall) -> &[u32] {
        &self.blocks[call.blocks.clone()]
    }

    /// A new distinct block.
    pub(crate) fn new_block(&mut self, semantic: SemanticType) -> Result<u32> {
        let number = u32::try_from(self.semantics.len()).context("more than four billion distinct blocks")?;
        self.semantics.push(semantic);
        Ok(number)
    }

    /// Puts calls in the order of their beginning, and tells each what follows it in its program.
    fn finish(&mut self) {
        self.calls.sort_by_key(|call| call.at);
        let mut next = rustc_hash::FxHashMap::default();
        for call in self.calls.iter_mut().rev() {
            let Some(program) = call.program else { continue };
            let after = next.insert(program, call.at);
            call.next_after = after.map(|next: Instant| next.since(call.at));
            call.last = after.is_none();
        }
    }
}

/// Reads a trace.
///
/// # Errors
/// The file cannot be read, or a line of it is not of the format: the message says which.
pub(crate) fn read(path: &Path, format: Format, spacing: Duration) -> Result<Trace> {
    parse(sessions::open(path)?, format, spacing).with_context(|| format!("{}", path.display()))
}

/// Reads a trace from lines of JSON.
pub(crate) fn parse(mut lines: impl BufRead, format: Format, spacing: Duration) -> Result<Trace> {
    let mut trace = Trace::default();
    let mut reader: Box<dyn LineReader> = match format {
        Format::ClaudeCode => Box::new(claude_code::Reader::new(spacing)),
        Format::Mooncake => Box::new(mooncake::Reader::default()),
    };
    trace.block_tokens = reader.block_tokens();
    let mut line = String::new();
    let mut number = 0_usize;
    loop {
        line.clear();
        number += 1;
        if lines.read_line(&mut line).with_context(|| format!("line {number}: cannot read it"))? == 0 {
            break;
        }
        if !line.trim().is_empty() {
            reader.line(&line, &mut trace).with_context(|| format!("line {number}"))?;
        }
    }
    if trace.calls.is_empty() {
        bail!("no model calls in it");
    }
    trace.finish();
    Ok(trace)
}

/// Understands the lines of one format.
pub(crate) trait LineReader {
    /// Tokens of a block of the replay.
    fn block_tokens(&self) -> u32;
    /// Takes in one line.
    fn line(&mut self, line: &str, trace: &mut Trace) -> Result<()>;
}
