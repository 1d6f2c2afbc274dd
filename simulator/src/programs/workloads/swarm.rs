//! A hierarchical swarm: an orchestrator hands out tasks in rounds, its workers do them with tools, or hand them on.

use kvtier_policy::evict::survival::StopReason;
use kvtier_types::SemanticType;

use super::Author;

/// Rounds of an orchestrator.
const ROUNDS: u32 = 3;

/// Writes one program.
pub(crate) fn write(author: &mut Author) {
    let depth = author.knobs.depth.max(1);
    let turns = author.sizes.turns.whole(&mut author.rng);
    orchestrate(author, depth, turns, &[]);
}

/// An orchestrator that has so many levels below it. Returns its last step.
fn orchestrate(author: &mut Author, depth: u32, turns: u32, after: &[u32]) -> u32 {
    let tokens = author.sizes.first.whole(&mut author.rng);
    let mut line = author.agent(u64::from(depth) * 8, tokens);
    let mut asked = author.call(&mut line, after, Author::at_once(), StopReason::Join);
    for round in 0..ROUNDS {
        let mut answers = Vec::new();
        for worker in 0..author.knobs.branching.max(1) {
            answers.push(work(author, (depth, worker), turns, asked));
            let tokens = author.new_tokens();
            author.read(&mut line, tokens, SemanticType::ToolResult);
        }
        let stop = if round + 1 == ROUNDS { StopReason::EndTurn } else { StopReason::Join };
        asked = author.call(&mut line, &answers, Author::at_once(), stop);
    }
    asked
}

fn work(author: &mut Author, (depth, worker): (u32, u32), turns: u32, after: u32) -> u32 {
    if depth > 1 && worker == 0 {
        return orchestrate(author, depth - 1, turns.div_ceil(2), &[after]);
    }
    let tokens = author.sizes.first.whole(&mut author.rng) / 2;
    // Workers of one role share tools and system prompt.
    let mut line = author.agent(u64::from(depth) * 8 + 1 + u64::from(worker % 2), tokens);
    author.tool_loop(&mut line, (turns / 6).max(2), &[after], 1)
}
