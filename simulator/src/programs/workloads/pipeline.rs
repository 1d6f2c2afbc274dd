//! A pipeline of agents: each reads what the one before handed on; in the middle several read it at once, and one joins.

use kvtier_policy::evict::survival::StopReason;
use kvtier_types::SemanticType;

use super::Author;

/// Writes one program.
pub(crate) fn write(author: &mut Author) {
    let stages = author.knobs.depth.max(1);
    let turns = (author.sizes.turns.whole(&mut author.rng) / stages).max(2);
    let mut before: Vec<u32> = Vec::new();
    for stage in 0..stages {
        let parallel = if stage == stages / 2 { author.knobs.branching.max(1) } else { 1 };
        let mut ends = Vec::new();
        let tokens = author.sizes.first.whole(&mut author.rng) / 2;
        let mut agent = author.agent(u64::from(stage), tokens);
        // What was handed on: a document for each that handed something on.
        for _ in 0..before.len() {
            let tokens = 2 * author.new_tokens();
            author.read(&mut agent, tokens, SemanticType::Document);
        }
        if parallel > 1 {
            let read = author.call(&mut agent, &before, Author::at_once(), StopReason::Join);
            for _ in 0..parallel {
                let mut branch = author.fork(agent);
                let tokens = author.new_tokens();
                author.read(&mut branch, tokens, SemanticType::ReasoningBranch);
                branch.step = None;
                ends.push(author.tool_loop(&mut branch, turns, &[read], 1));
            }
        } else {
            ends.push(author.tool_loop(&mut agent, turns, &before, 1));
        }
        before = ends;
    }
}
