//! A run as one page that needs nothing else: what was the same for all, the table, and plots.

use std::fmt::Write as _;

use super::plots::{Bars, bars, curves};
use super::report::Report;

const STYLE: &str = "body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1c2430}\
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}pre{background:#f4f6f8;padding:.8rem;overflow-x:auto;border-radius:6px}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}\
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e3e7ec;white-space:nowrap}th:first-child,td:first-child{text-align:left}\
svg{width:100%;height:auto}.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1.5rem}";

/// The page.
pub(crate) fn page(report: &Report) -> String {
    let title = format!("kvtier-sim: {} on {} nodes", report.setting.workload.name(), report.setting.nodes);
    let mut text = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{title}</title>\n<style>{STYLE}</style>\n<h1>{title}</h1>\n<p>Closed loop: a hit makes the next step \
         earlier, and tools start when a step has ended. All policies have the same tiers, links and costs.</p>\n<pre>{}</pre>\n",
        escaped(&report.configuration())
    );
    if let Some(gain) = report.gain("kvtier-hints") {
        let _ignored =
            writeln!(text, "<p>Completion p50 of <b>lru-shared</b> over <b>kvtier-hints</b>: <b>{gain:.2}</b>.</p>");
    }
    text.push_str("<div class=\"plots\">\n");
    for (heading, bars_of) in plots() {
        let _ignored = writeln!(text, "<section><h2>{heading}</h2>{}</section>", bars(report, &bars_of));
    }
    let completions: Vec<(&str, &[f64])> = report.rows.iter().map(|r| (r.name, r.completions.as_slice())).collect();
    let _ignored = writeln!(text, "<section><h2>Programs ended within (s)</h2>{}</section>", curves(&completions));
    text.push_str("</div>\n<h2>All figures</h2>\n");
    table(&mut text, report);
    types(&mut text, report);
    text.push_str("</html>\n");
    text
}

fn plots() -> Vec<(&'static str, Bars)> {
    vec![
        (
            "Completion time, p50 and p95 (s)",
            Bars { figures: &["completion_p50_s", "completion_p95_s"], stacked: false, percent: false },
        ),
        (
            "Stretch over a cache without costs, p50 and p95",
            Bars { figures: &["stretch_p50", "stretch_p95"], stacked: false, percent: false },
        ),
        (
            "Where a step's time goes (s)",
            Bars {
                figures: &["step_queue_s", "step_load_s", "step_prefill_s", "step_decode_s"],
                stacked: true,
                percent: false,
            },
        ),
        (
            "Where prompt tokens come from (%)",
            Bars {
                figures: &["served_device", "served_host", "served_disk", "served_store", "computed"],
                stacked: true,
                percent: true,
            },
        ),
        (
            "Utilization (%)",
            Bars {
                figures: &["engine_utilization", "disk_utilization", "network_utilization", "store_utilization"],
                stacked: false,
                percent: true,
            },
        ),
        (
            "Prefetch: precision, recall, late (%)",
            Bars {
                figures: &["prefetch_precision", "prefetch_recall", "prefetch_late"],
                stacked: false,
                percent: true,
            },
        ),
    ]
}

fn table(text: &mut String, report: &Report) {
    text.push_str("<table><tr><th>figure</th>");
    for row in &report.rows {
        let _ignored = write!(text, "<th>{}</th>", row.name);
    }
    text.push_str("</tr>\n");
    let names = report.rows.first().map(|row| row.figures.as_slice()).unwrap_or_default();
    for (name, _) in names {
        let _ignored = write!(text, "<tr><td>{name}</td>");
        for row in &report.rows {
            let _ignored = write!(text, "<td>{}</td>", figure(row.figure(name)));
        }
        text.push_str("</tr>\n");
    }
    text.push_str("</table>\n");
}

/// Useful occupancy by meaning.
fn types(text: &mut String, report: &Report) {
    text.push_str("<h2>Useful occupancy by meaning</h2>\n<p>Block-seconds in device and host that ended in a use, over all of them.</p>\n<table><tr><th>type</th>");
    for row in &report.rows {
        let _ignored = write!(text, "<th>{}</th>", row.name);
    }
    text.push_str("</tr>\n");
    let mut kinds: Vec<&str> = report.rows.iter().flat_map(|row| row.useful.iter().map(|(kind, _)| *kind)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    for kind in kinds {
        let _ignored = write!(text, "<tr><td>{kind}</td>");
        for row in &report.rows {
            let share = row.useful.iter().find(|(k, _)| *k == kind).map(|(_, share)| *share);
            let _ignored =
                write!(text, "<td>{}</td>", share.map_or_else(|| "-".to_owned(), |s| format!("{:.1} %", 100.0 * s)));
        }
        text.push_str("</tr>\n");
    }
    text.push_str("</table>\n");
}

fn figure(value: f64) -> String {
    if value == 0.0 {
        "0".to_owned()
    } else if value.abs() >= 1e5 {
        format!("{value:.3e}")
    } else if value.abs() >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.3}")
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
