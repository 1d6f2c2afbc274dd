//! Sessions of a coding agent as programs: their prompts, answers and pauses as recorded, everything else as it comes.

use std::io::BufRead;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvtier_policy::evict::survival::StopReason;
use kvtier_types::SemanticType;
use rustc_hash::FxHashMap;

use super::super::engine::seconds;
use super::super::tree::{Program, ROOT, SHARED, Step, Tree, Work};
use crate::sessions::{self, Request, SMALL_TOKENS, Session};

/// Longest pause that is kept: nobody waits for a session that is resumed the next day.
const MAX_PAUSE: Duration = Duration::from_secs(600);
/// Longest prompt that is taken, in recorded blocks; the rest of a session that grows beyond is left out.
const MAX_PROMPT: u64 = 1_875;

/// Tools and system prompt, in tokens, and whose lane it is.
#[derive(Debug, Clone, Copy)]
struct Agent {
    tools: u64,
    system: u64,
    lane: u32,
}

#[derive(Debug)]
struct Reader {
    work: Work,
    /// Recorded blocks in one of ours.
    small: u64,
    /// Blocks of tools and system prompts, by counts and position.
    shared: FxHashMap<(u64, u64, u64), u32>,
    own: FxHashMap<u64, u32>,
}

/// Reads at most `most` sessions.
///
/// # Errors
/// The file cannot be read, or a line is not a session: the message says which.
pub(crate) fn read(path: &Path, block_tokens: u32, most: usize) -> Result<Work> {
    parse(sessions::open(path)?, block_tokens, most).with_context(|| format!("{}", path.display()))
}

fn parse(lines: impl BufRead, block_tokens: u32, most: usize) -> Result<Work> {
    ensure!(block_tokens.is_multiple_of(SMALL_TOKENS), "blocks of sessions are multiples of {SMALL_TOKENS} tokens");
    let mut reader = Reader {
        work: Work { block_tokens, ..Work::default() },
        small: u64::from(block_tokens / SMALL_TOKENS),
        shared: FxHashMap::default(),
        own: FxHashMap::default(),
    };
    for (number, line) in (1..).zip(lines.lines()).take(most) {
        let line = line.with_context(|| format!("line {number}: cannot read it"))?;
        let session = Session::parse(&line).with_context(|| format!("line {number}"))?;
        reader.session(&session);
    }
    ensure!(!reader.work.programs.is_empty(), "no sessions in it");
    Ok(reader.work)
}

impl Reader {
    fn session(&mut self, session: &Session) {
        self.own.clear();
        let first = self.work.lanes;
        let agent = self.agent(session.tool_tokens, session.system_tokens);
        let mut program = Program::default();
        self.requests(&session.requests, agent, (&mut program, None));
        program.lanes = (first, self.work.lanes);
        let mut later = rustc_hash::FxHashSet::default();
        for step in program.steps.iter_mut().rev() {
            step.last = later.insert(step.lane);
        }
        if !program.steps.is_empty() {
            self.work.programs.push(program);
        }
    }

    fn agent(&mut self, tools: u64, system: u64) -> Agent {
        self.work.lanes += 1;
        Agent { tools, system, lane: self.work.lanes - 1 }
    }

    /// Calls one after another, the first after `after`. Returns the last.
    fn requests(
        &mut self,
        requests: &[Request],
        agent: Agent,
        (program, after): (&mut Program, Option<u32>),
    ) -> Option<u32> {
        let mut before = after;
        let mut stop = StopReason::Unknown;
        for request in requests {
            if request.is_sub_agent() {
                let sub = self.agent(request.tool_tokens, request.system_tokens);
                before = self.requests(&request.requests, sub, (program, before));
                continue;
            }
            if request.runs.iter().map(|(_, count)| count).sum::<u64>() > MAX_PROMPT {
                break;
            }
            let Some(prompt) = self.prompt(&request.runs, agent) else { continue };
            let tool = u8::from(stop == StopReason::ToolUse);
            stop = request.stop();
            program.steps.push(Step {
                lane: agent.lane,
                after: before.into_iter().collect(),
                gap: seconds(request.think_time).min(MAX_PAUSE),
                tool,
                prompt,
                // The answer's blocks are the next prompt's, which says what of it was kept.
                end: prompt,
                output_tokens: request.out.max(1),
                stop,
                last: false,
            });
            before = Some(u32::try_from(program.steps.len() - 1).expect("few steps"));
        }
        before
    }

    fn prompt(&mut self, runs: &[(u64, u64)], agent: Agent) -> Option<u32> {
        let mut tip = ROOT;
        let mut before = 0_u64;
        for (first, count) in runs {
            let end = before + count;
            for position in before / self.small..end / self.small {
                let last = (position + 1) * self.small - 1;
                tip = self.block(tip, (position, first.checked_add(last - before)?), agent);
            }
            before = end;
        }
        (tip != ROOT).then_some(tip)
    }

    fn block(&mut self, tip: u32, (position, id): (u64, u64), agent: Agent) -> u32 {
        let end = (position + 1) * u64::from(self.work.block_tokens);
        let tree: &mut Tree = &mut self.work.tree;
        let mut grow = |semantic, owner| tree.grow(tip, 1, semantic, owner);
        if end <= agent.tools {
            let key = (agent.tools, u64::MAX, position);
            return *self.shared.entry(key).or_insert_with(|| grow(SemanticType::ToolDefinition, SHARED));
        }
        if end <= agent.tools + agent.system {
            let key = (agent.tools, agent.system, position);
            return *self.shared.entry(key).or_insert_with(|| grow(SemanticType::SystemPrompt, SHARED));
        }
        *self.own.entry(id).or_insert_with(|| grow(SemanticType::ConversationTurn, agent.lane))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_become_programs() {
        let line = r#"{"block_size":64,"tool_tokens":256,"system_tokens":0,"requests":[
            {"type":"n","stop":"tool_use","out":5,"think_time":0,"runs":[[1,8]]},
            {"type":"subagent","tool_tokens":0,"system_tokens":0,"requests":[{"type":"n","out":3,"runs":[[100,4]]}]},
            {"type":"n","stop":"end_turn","out":7,"think_time":2.5,"runs":[[1,10]]}]}"#
            .replace('\n', " ");
        let work = parse(format!("{line}\n{line}\n").as_bytes(), 128, 10).unwrap();
        assert_eq!((work.programs.len(), work.lanes), (2, 4));
        let steps = &work.programs[0].steps;
        assert_eq!(steps.iter().map(|s| s.after.clone()).collect::<Vec<_>>(), [vec![], vec![0], vec![1]]);
        assert_eq!((steps[2].gap, steps[2].tool, steps[2].last), (Duration::from_millis(2500), 1, true));
        assert_eq!(work.tree.length(steps[2].prompt), 5);
        // Two blocks of tools are shared by both sessions.
        assert_eq!(work.tree.cut(steps[0].prompt, 2), work.tree.cut(work.programs[1].steps[0].prompt, 2));
        assert_eq!(work.tree.len(), 2 + 2 * (3 + 2));
    }
}
