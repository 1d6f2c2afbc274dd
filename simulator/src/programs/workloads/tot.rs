//! Tree of thought: each of the thoughts kept grows branches, a judge reads them all, and half survive.

use kvtier_policy::evict::survival::StopReason;
use kvtier_types::SemanticType;

use super::Author;
use super::author::Line;

/// Thoughts kept of each level.
const KEPT: usize = 2;
/// Tokens of a branch that the judge reads.
const SUMMARY_TOKENS: u32 = 200;

/// Writes one program.
pub(crate) fn write(author: &mut Author) {
    let tokens = author.sizes.first.whole(&mut author.rng);
    let mut judge = author.agent(0, tokens);
    author.call(&mut judge, &[], Author::at_once(), StopReason::Join);
    let mut kept: Vec<Line> = vec![judge];
    for level in 0..author.knobs.depth.max(1) {
        let mut thoughts = Vec::new();
        for parent in &kept {
            for _ in 0..author.knobs.branching.max(1) {
                thoughts.push(think(author, *parent, judge.step));
            }
        }
        let ends: Vec<u32> = thoughts.iter().filter_map(|line| line.step).collect();
        let tokens = SUMMARY_TOKENS * u32::try_from(thoughts.len()).expect("few thoughts");
        author.read(&mut judge, tokens, SemanticType::ReasoningBranch);
        let last = level + 1 >= author.knobs.depth.max(1);
        let stop = if last { StopReason::EndTurn } else { StopReason::Join };
        author.call(&mut judge, &ends, Author::at_once(), stop);
        while thoughts.len() > KEPT {
            let out = author.rng.index(thoughts.len());
            thoughts.remove(out);
        }
        kept = thoughts;
    }
}

/// A branch: it goes on from where its parent is, asks a tool now and then, and ends with a thought.
fn think(author: &mut Author, parent: Line, judged: Option<u32>) -> Line {
    let mut line = author.fork(parent);
    let tokens = author.new_tokens();
    author.read(&mut line, tokens, SemanticType::ReasoningBranch);
    let pause = author.pause(1);
    let after: Vec<u32> = judged.into_iter().collect();
    if pause.tool > 0 {
        author.call(&mut line, &after, Author::at_once(), StopReason::ToolUse);
        let tokens = author.new_tokens();
        author.read(&mut line, tokens, SemanticType::ToolResult);
        author.call(&mut line, &[], pause, StopReason::Join);
    } else {
        author.call(&mut line, &after, Author::at_once(), StopReason::Join);
    }
    line
}
