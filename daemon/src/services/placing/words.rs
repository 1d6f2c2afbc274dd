//! A choice in one sentence, with the figures that decided it.

use std::time::Duration;

use kvtier_policy::programs::Bill;
use kvtier_proto::v1;

use super::nodes::Nodes;

/// Why a node was chosen.
pub(super) fn explain(
    nodes: &Nodes,
    bills: &[Bill],
    choice: usize,
    (reason, blind): (v1::PlaceReason, Option<&str>),
) -> String {
    let name = |at: usize| nodes.candidates[at].id.as_str();
    let (here, bill) = (name(choice), &bills[choice]);
    if let Some(why) = blind {
        return if nodes.current == Some(bill.candidate.node) {
            format!("{here} as before, since {why}")
        } else {
            format!("{here} has the shortest queue ({}), and {why}", time(bill.candidate.queue))
        };
    }
    let others = (0..bills.len()).filter(|at| *at != choice);
    let Some(next) = others.min_by_key(|at| bills[*at].candidate.cost()) else {
        return format!("{here} is the only candidate: {}", parts(bill));
    };
    let (there, other) = (name(next), &bills[next]);
    match reason {
        v1::PlaceReason::Stays => {
            format!("stays on {here}: {}; {there} is not better by more than a tenth: {}", parts(bill), parts(other))
        }
        v1::PlaceReason::State => {
            format!("the context is nearest to {here}: {}; next best is {there}: {}", parts(bill), parts(other))
        }
        _ => format!("{here} takes least with its queue: {}; next best is {there}: {}", parts(bill), parts(other)),
    }
}

/// The parts of a cost.
fn parts(bill: &Bill) -> String {
    let c = &bill.candidate;
    let mut text = format!(
        "{} (queue {}, load of {} tokens {}, {} tokens computed {}",
        time(c.cost()),
        time(c.queue),
        bill.served_tokens(),
        time(c.load),
        bill.recompute_tokens,
        time(c.recompute)
    );
    if !c.displaced.is_zero() {
        text.push_str(&format!(", displaced {}", time(c.displaced)));
    }
    text.push(')');
    text
}

/// A time as people read it, to three digits or a microsecond.
fn time(time: Duration) -> String {
    let micros = time.as_micros();
    match micros {
        0 => "0".to_owned(),
        1..1_000 => format!("{micros} us"),
        1_000..100_000 => format!("{:.1} ms", micros as f64 / 1e3),
        100_000..1_000_000 => format!("{} ms", micros / 1_000),
        _ => format!("{:.1} s", micros as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        let cases = [(0, "0"), (250, "250 us"), (12_340, "12.3 ms"), (512_900, "512 ms"), (2_300_000, "2.3 s")];
        for (micros, text) in cases {
            assert_eq!(time(Duration::from_micros(micros)), text);
        }
    }
}
