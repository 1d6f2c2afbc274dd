//! ReAct: one agent calls tools in a loop, and hands a part of its task to another if it may delegate.

use kvtier_policy::evict::survival::StopReason;
use kvtier_types::SemanticType;

use super::Author;

/// Writes one program.
pub(crate) fn write(author: &mut Author) {
    let tokens = author.sizes.first.whole(&mut author.rng);
    let turns = author.sizes.turns.whole(&mut author.rng);
    let branching = author.knobs.branching;
    let mut line = author.agent(0, tokens);
    if author.knobs.depth == 0 {
        author.tool_loop(&mut line, turns, &[], branching);
        return;
    }
    author.tool_loop(&mut line, turns.div_ceil(2), &[], branching);
    let asks = author.call(&mut line, &[], Author::at_once(), StopReason::Join);
    let depth = author.knobs.depth;
    let answer = delegate(author, (depth, turns.div_ceil(3)), asks);
    let tokens = author.new_tokens();
    author.read(&mut line, tokens, SemanticType::ToolResult);
    author.tool_loop(&mut line, turns / 2, &[answer], branching);
}

/// Another agent does a part, and hands a part of that on. Returns its last step.
fn delegate(author: &mut Author, (depth, turns): (u32, u32), after: u32) -> u32 {
    let tokens = author.sizes.first.whole(&mut author.rng) / 2;
    let mut line = author.agent(u64::from(depth), tokens);
    let mut last = author.tool_loop(&mut line, turns, &[after], 1);
    if depth > 1 {
        last = delegate(author, (depth - 1, turns.div_ceil(2)), last);
        let tokens = author.new_tokens();
        author.read(&mut line, tokens, SemanticType::ToolResult);
        last = author.tool_loop(&mut line, 1, &[last], 1);
    }
    last
}
