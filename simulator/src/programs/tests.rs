//! Whole runs, small ones.

use clap::Parser as _;

use super::calibrate::{Setup, parse, residual, simulate};
use super::cost::Cost;
use super::report::Report;
use super::run::Setting;
use super::{html, report};
use crate::replay::progress::Progress;

#[derive(Debug, clap::Parser)]
struct Line {
    #[command(flatten)]
    setting: Setting,
}

fn small(args: &str) -> Report {
    let usual = "x --nodes 2 --population 3 --programs 12 --block-tokens 512";
    let line = format!("{usual} {args}");
    let setting = Line::try_parse_from(line.split_whitespace()).unwrap().setting;
    setting.run(&mut Progress::new(1)).unwrap()
}

#[test]
fn same_seed_same_bytes() {
    let args = "--workload tot --seed 3 --policy lru-shared,kvtier-hints,kvtier-noisy-hints,oracle";
    let (one, two) = (small(args), small(args));
    assert_eq!(one.json().to_string(), two.json().to_string());
    assert_eq!((one.table(), one.csv()), (two.table(), two.csv()));
    assert_eq!(html::page(&one), html::page(&two));
    let other = small(&args.replace("--seed 3", "--seed 4"));
    assert_ne!(one.json().to_string(), other.json().to_string());
}

/// Every program ends, under every policy, and what was served adds up; nobody is faster than a cache without costs by
/// more than a step's chance.
#[test]
fn every_program_ends_under_every_policy() {
    for workload in ["react", "swarm", "pipeline"] {
        let report = small(&format!("--workload {workload} --pressure 0.3"));
        assert_eq!(report.rows.len(), 9);
        for row in &report.rows {
            assert_eq!((row.name, row.figure("programs")), (row.name, 12.0), "{workload}");
            let parts = ["served_device", "served_host", "served_disk", "served_store", "computed"];
            let sum: f64 = parts.iter().map(|part| row.figure(part)).sum();
            assert!((sum - 1.0).abs() < 1e-9, "{workload} {}: {sum}", row.name);
            assert!(row.figure("stretch_p50") > 0.8, "{workload} {}", row.name);
        }
        let lru = report.rows.iter().find(|row| row.name == "lru").unwrap();
        assert!(lru.figure("served_store") <= 0.0, "lru has no shared storage");
    }
}

#[test]
fn the_report_has_every_name_that_is_promised() {
    let report = small("--workload react --seed 1");
    let json = report.json();
    for name in
        ["lru", "lru-shared", "s3fifo", "ttl", "steps", "kvtier", "kvtier-hints", "kvtier-noisy-hints", "oracle"]
    {
        for figure in ["completion_p50_s", "completion_p95_s", "zero_recompute"] {
            assert!(json["policies"][name][figure].is_number(), "{name} {figure}");
        }
    }
    assert_eq!((json["workload"].as_str(), json["seed"].as_u64()), (Some("react"), Some(1)));
    let page = html::page(&report);
    assert!(page.contains("<svg") && !page.contains("src=") && !page.contains("href="), "nothing is loaded");
    assert!(report::quantile(&[1.0, 2.0, 3.0], 0.5) > 1.5);
}

/// The built-in model against the measurements it was not fitted to (LLMServingSim, MIT: see the licence beside them).
#[test]
fn the_cost_model_is_within_five_percent_of_what_was_measured() {
    let requests = parse(include_str!("measured/rtxpro6000_llama_8b.jsonl")).unwrap();
    let cost = Cost::named("llama-3.1-8b-rtxpro6000").unwrap();
    let timings = simulate(&cost, Setup { engines: 1, memory_tokens: None }, &requests);
    let half = requests.len() / 2;
    let found = residual(&requests[half..], &timings[half..]);
    assert!(found.end_to_end <= 0.05, "{found:?}");
    assert!((found.end_to_end - cost.residual.end_to_end).abs() < 0.002, "{found:?}");
}
