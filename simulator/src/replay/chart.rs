//! Prefix hits over capacity as a picture (SVG): a line for each policy, the ideal as a dashed one.

use std::fmt::Write as _;

use super::Policy;
use super::report::{Report, Row};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
/// Told apart by people who see colors differently (Okabe and Ito).
const COLORS: [&str; 7] = ["#0072B2", "#E69F00", "#009E73", "#000000", "#D55E00", "#CC79A7", "#56B4E9"];

/// Draws a report.
pub(crate) fn svg(report: &Report) -> String {
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{LEFT}\" y=\"24\" \
         font-size=\"15\">{}: prefix hit (%) over host capacity (blocks)</text>\n",
        escaped(&report.trace)
    );
    let Some(scale) = Scale::of(report) else { return text + "</svg>\n" };
    axes(&mut text, &scale);
    let mut policies: Vec<Policy> = report.rows.iter().map(|row| row.policy).collect();
    policies.sort_unstable();
    policies.dedup();
    for (at, policy) in policies.iter().enumerate() {
        let mut rows: Vec<&Row> = report.rows.iter().filter(|row| row.policy == *policy).collect();
        rows.sort_unstable_by_key(|row| row.capacity);
        line(&mut text, &scale, (at, &rows));
    }
    text + "</svg>\n"
}

struct Scale {
    /// Logarithms of the least and the largest capacity.
    from: f64,
    to: f64,
    /// The largest share shown.
    top: f64,
    ideal: f64,
    capacities: Vec<usize>,
}

impl Scale {
    fn of(report: &Report) -> Option<Self> {
        let mut capacities: Vec<usize> = report.rows.iter().map(|row| row.capacity).collect();
        capacities.sort_unstable();
        capacities.dedup();
        let (first, last) = (*capacities.first()? as f64, *capacities.last()? as f64);
        let host = report.rows.first()?.host;
        let ideal = host.ideal as f64 / host.blocks.max(1) as f64;
        // One capacity alone is drawn in the middle.
        let (from, to) = if first < last { (first.ln(), last.ln()) } else { (first.ln() - 1.0, first.ln() + 1.0) };
        Some(Self { from, to, top: (ideal * 10.0).ceil().max(1.0) / 10.0, ideal, capacities })
    }

    fn x(&self, capacity: usize) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * ((capacity as f64).ln() - self.from) / (self.to - self.from)
    }

    fn y(&self, share: f64) -> f64 {
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share / self.top
    }
}

fn axes(text: &mut String, scale: &Scale) {
    let right = WIDTH - RIGHT;
    for step in 0..=5 {
        let share = scale.top * f64::from(step) / 5.0;
        let y = scale.y(share);
        let _ignored = writeln!(
            text,
            "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\n<text x=\"{:.1}\" \
             y=\"{:.1}\" text-anchor=\"end\">{:.0}</text>",
            LEFT - 6.0,
            y + 4.0,
            100.0 * share
        );
    }
    for capacity in &scale.capacities {
        let _ignored = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{capacity}</text>",
            scale.x(*capacity),
            HEIGHT - BOTTOM + 18.0
        );
    }
    let y = scale.y(scale.ideal);
    let _ignored = writeln!(
        text,
        "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#888\" stroke-dasharray=\"4 4\"/>\n<text \
         x=\"{:.1}\" y=\"{:.1}\" fill=\"#888\">ideal</text>",
        right + 6.0,
        y - 4.0
    );
}

fn line(text: &mut String, scale: &Scale, (at, rows): (usize, &[&Row])) {
    let color = COLORS[at % COLORS.len()];
    let points: Vec<(f64, f64)> = rows.iter().map(|row| (scale.x(row.capacity), scale.y(row.prefix_hit()))).collect();
    let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ignored =
        writeln!(text, "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"2\" points=\"{}\"/>", path.join(" "));
    for (x, y) in &points {
        let _ignored = writeln!(text, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{color}\"/>");
    }
    let y = TOP + 60.0 + 18.0 * at as f64;
    let name = rows.first().map_or("", |row| row.policy.name());
    let _ignored =
        writeln!(text, "<text x=\"{:.1}\" y=\"{y:.1}\" fill=\"{color}\">&#9632; {name}</text>", WIDTH - RIGHT + 40.0);
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
