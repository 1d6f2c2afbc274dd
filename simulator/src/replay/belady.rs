//! Belady's rule over prefixes: what is used again last goes first. A block is used whenever one below it is, so the block
//! that is used last of all never has one below it that stays.

use std::collections::BinaryHeap;

use kvtier_policy::evict::Found;

use super::trace::Trace;

const NEVER: u32 = u32::MAX;

/// Replays a trace; `each` is told what every call finds, and what was evicted for it.
pub(crate) fn replay(trace: &Trace, capacity: usize, mut each: impl FnMut(Found, u64)) {
    let next = next_uses(trace);
    let mut next_of = vec![NEVER; trace.semantics.len()];
    let mut here = vec![false; trace.semantics.len()];
    let mut used_in = vec![NEVER; trace.semantics.len()];
    let mut heap: BinaryHeap<(u32, u32, u32)> = BinaryHeap::new();
    let mut count = 0_usize;
    // What a call uses may go only once it has ended.
    let mut fresh = Vec::new();
    for (number, call) in (0_u32..).zip(&trace.calls) {
        let blocks = trace.blocks_of(call);
        let hits = blocks.iter().take_while(|b| here[**b as usize]).count();
        let mut found = Found { hits, here: blocks.iter().filter(|b| here[**b as usize]).count(), taken_in: 0 };
        let mut evicted = 0_u64;
        for block in blocks {
            used_in[*block as usize] = number;
        }
        for (depth, (block, at)) in (0_u32..).zip(blocks.iter().zip(call.blocks.clone())) {
            let index = *block as usize;
            if !here[index] {
                if count == capacity {
                    if !evict(&mut heap, &mut here, (&next_of, &used_in), number) {
                        break;
                    }
                    count -= 1;
                    evicted += 1;
                }
                here[index] = true;
                count += 1;
                found.taken_in += 1;
            }
            next_of[index] = next[at];
            fresh.push((next[at], depth, *block));
        }
        heap.extend(fresh.drain(..));
        each(found, evicted);
    }
}

/// Drops the block used again last that the call does not use.
fn evict(heap: &mut BinaryHeap<(u32, u32, u32)>, here: &mut [bool], of: (&[u32], &[u32]), call: u32) -> bool {
    let (next_of, used_in) = of;
    while let Some((next, depth, block)) = heap.pop() {
        let index = block as usize;
        if !here[index] || next_of[index] != next {
            continue;
        }
        if used_in[index] == call {
            // Blocks this call comes to later are used soonest of all: nothing else is left.
            heap.push((next, depth, block));
            return false;
        }
        here[index] = false;
        return true;
    }
    false
}

/// For each access, the number of the call that uses its block next.
fn next_uses(trace: &Trace) -> Vec<u32> {
    let mut next = vec![NEVER; trace.blocks.len()];
    let mut later = vec![NEVER; trace.semantics.len()];
    for (index, call) in trace.calls.iter().enumerate().rev() {
        let number = u32::try_from(index).unwrap_or(NEVER - 1);
        for at in call.blocks.clone() {
            let block = trace.blocks[at] as usize;
            next[at] = std::mem::replace(&mut later[block], number);
        }
    }
    next
}
