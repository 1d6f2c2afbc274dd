//! An engine to be killed: attaches, takes leases and reservations, says so, and waits for its end.
//!
//! Usage: `kvtier-test-engine SOCKET PROMPT LEASED_BLOCKS RESERVED_BLOCKS`. Prints `leased N reserved N` once it holds
//! them, and ends with its standard input.
#![forbid(unsafe_code)]

use std::io::{Read, Write};

use anyhow::Context;
use kvtier_tests::{Engine, Prompt, Shape};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, prompt, leased, reserved] = &args[..] else { anyhow::bail!("usage: see the head of this program") };
    let engine = Engine::open(socket, &Shape::default());
    engine.wait_attached();
    let (_request, hit) = engine.lookup(&Prompt::new(prompt.clone(), leased.parse().context("leased blocks")?));
    let fresh = Prompt::new(format!("{prompt}-never-sealed"), reserved.parse().context("reserved blocks")?);
    let (states, _frames) = engine.reserve(0, 0, fresh.block_hashes(16), None).context("no answer")?;
    let granted = states.iter().filter(|state| **state == 1).count();
    println!("leased {} reserved {granted}", hit.tokens / 16);
    std::io::stdout().flush()?;
    let _ended = std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
