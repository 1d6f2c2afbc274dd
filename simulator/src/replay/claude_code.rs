//! Sessions of a coding agent as a trace.
//!
//! Session i begins at i times the spacing. Blocks of 512 tokens are every eighth of the trace's 64-token blocks; those that
//! lie within tools and system prompt are the same in every session with equal counts of such tokens.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kvtier_types::{Instant, SemanticType};
use rustc_hash::FxHashMap;

use super::trace::{LineReader, Trace, TraceCall};
use crate::sessions::{Request, Session};

/// Trace blocks in one of ours.
const SMALL_BLOCKS: u64 = 8;
/// Tokens of a block of the replay.
const BLOCK_TOKENS: u32 = 512;
/// Longest prompt that is believed, in trace blocks: 64 million tokens.
const MAX_PROMPT_BLOCKS: u64 = 1_000_000;

/// Tools and system prompt of an agent.
#[derive(Debug, Clone, Copy)]
struct Agent {
    tools: u64,
    system: u64,
    program: u64,
    sub_agent: bool,
}

/// Reads sessions.
#[derive(Debug)]
pub(crate) struct Reader {
    spacing: Duration,
    sessions: u32,
    programs: u64,
    /// Blocks of tools and system prompts: token counts of both (system 0 for tools alone), and position.
    shared: FxHashMap<(u64, u64, u64), u32>,
    /// Blocks of this session.
    own: FxHashMap<u64, u32>,
}

impl Reader {
    pub(crate) fn new(spacing: Duration) -> Self {
        Self { spacing, sessions: 0, programs: 0, shared: FxHashMap::default(), own: FxHashMap::default() }
    }

    fn agent(&mut self, tools: u64, system: u64, sub_agent: bool) -> Agent {
        self.programs += 1;
        Agent { tools, system, program: self.programs, sub_agent }
    }

    fn requests(&mut self, requests: &[Request], from: f64, agent: Agent, trace: &mut Trace) -> Result<()> {
        for (index, request) in requests.iter().enumerate() {
            self.request(request, from, agent, trace).with_context(|| format!("request {index}"))?;
        }
        Ok(())
    }

    fn request(&mut self, request: &Request, from: f64, agent: Agent, trace: &mut Trace) -> Result<()> {
        let t = request.t.context("it has no time t")?;
        let at = from + t;
        ensure!(at.is_finite() && (0.0..1e9).contains(&at), "time {t} is not one");
        if request.is_sub_agent() {
            let sub = self.agent(request.tool_tokens, request.system_tokens, true);
            return self.requests(&request.requests, at, sub, trace);
        }
        let start = trace.blocks.len();
        self.blocks(&request.runs, agent, trace)?;
        trace.calls.push(TraceCall {
            at: Instant::ZERO + Duration::from_secs_f64(at),
            program: Some(agent.program),
            sub_agent: agent.sub_agent,
            stop: request.stop(),
            last: false,
            next_after: None,
            blocks: start..trace.blocks.len(),
        });
        Ok(())
    }

    /// Appends the whole blocks of a prompt.
    fn blocks(&mut self, runs: &[(u64, u64)], agent: Agent, trace: &mut Trace) -> Result<()> {
        let mut before = 0_u64;
        for &(first, count) in runs {
            let end = before.checked_add(count).filter(|end| *end <= MAX_PROMPT_BLOCKS);
            let Some(end) = end else { bail!("a prompt of more than {MAX_PROMPT_BLOCKS} blocks") };
            ensure!(first.checked_add(count).is_some(), "run [{first},{count}] overflows");
            // Our block ends where a trace block ends whose number of predecessors is 7 more than a multiple of 8.
            for position in before / SMALL_BLOCKS..end / SMALL_BLOCKS {
                let last = (position + 1) * SMALL_BLOCKS - 1;
                let block = self.block(position, first + (last - before), agent, trace)?;
                trace.blocks.push(block);
            }
            before = end;
        }
        Ok(())
    }

    fn block(&mut self, position: u64, id: u64, agent: Agent, trace: &mut Trace) -> Result<u32> {
        let end = (position + 1) * u64::from(BLOCK_TOKENS);
        let (key, semantic) = if end <= agent.tools {
            ((agent.tools, u64::MAX, position), SemanticType::ToolDefinition)
        } else if end <= agent.tools + agent.system {
            ((agent.tools, agent.system, position), SemanticType::SystemPrompt)
        } else {
            if let Some(known) = self.own.get(&id) {
                return Ok(*known);
            }
            let number = trace.new_block(SemanticType::Unspecified)?;
            self.own.insert(id, number);
            return Ok(number);
        };
        if let Some(known) = self.shared.get(&key) {
            return Ok(*known);
        }
        let number = trace.new_block(semantic)?;
        self.shared.insert(key, number);
        Ok(number)
    }
}

impl LineReader for Reader {
    fn block_tokens(&self) -> u32 {
        BLOCK_TOKENS
    }

    fn line(&mut self, line: &str, trace: &mut Trace) -> Result<()> {
        let session = Session::parse(line)?;
        let from = self.spacing.as_secs_f64() * f64::from(self.sessions);
        self.sessions += 1;
        self.own.clear();
        let agent = self.agent(session.tool_tokens, session.system_tokens, false);
        self.requests(&session.requests, from, agent, trace)
    }
}
