//! Short runs; long ones are `kvtier-sim faults`.

use super::{Options, Sabotage, run};

fn options(seed: u64) -> Options {
    Options { seed, nodes: 4, steps: 300, faults: true, sabotage: None, verbose: false }
}

#[test]
fn a_quiet_cluster_shares_blocks_and_breaks_no_promise() {
    let outcome = run(Options { nodes: 2, faults: false, ..options(1) });
    assert_eq!(outcome.failure, None);
    assert!(outcome.stats.get("fetches from peers", "done") > 0, "{}", outcome.stats);
}

#[test]
fn twenty_seeds_break_no_promise() {
    for seed in 1..=20 {
        let outcome = run(options(seed));
        assert_eq!(outcome.failure, None, "seed {seed}");
    }
}

#[test]
fn a_run_is_a_function_of_its_seed() {
    let (first, second) = (run(options(7)), run(options(7)));
    assert_eq!((first.digest, first.events), (second.digest, second.events));
    assert_ne!(first.digest, run(options(8)).digest);
}

#[test]
fn every_planted_bug_is_caught_by_its_checker() {
    for (bug, checker) in [
        (Sabotage::IncarnationCheckSkipped, "dead-incarnations-ignored"),
        (Sabotage::LeaseReleasedEarly, "leases-respected"),
        (Sabotage::DigestDropped, "directory-converges"),
    ] {
        let caught = (1..=50).find_map(|seed| run(Options { sabotage: Some(bug), ..options(seed) }).failure);
        assert_eq!(caught.map(|f| f.checker), Some(checker), "{}", bug.name());
    }
}
