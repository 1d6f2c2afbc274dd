//! Plots as inline SVG: bars by policy, and curves of completions.

use std::fmt::Write as _;

use super::report::Report;

const WIDTH: f64 = 560.0;
const LEFT: f64 = 140.0;
const RIGHT: f64 = 60.0;
/// Told apart by people who see colors differently (Okabe and Ito).
const COLORS: [&str; 9] =
    ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#999999"];

/// Bars of some figures, for each policy.
pub(crate) struct Bars {
    pub(crate) figures: &'static [&'static str],
    /// One after another in one bar, or one bar each.
    pub(crate) stacked: bool,
    pub(crate) percent: bool,
}

/// Draws bars.
pub(crate) fn bars(report: &Report, of: &Bars) -> String {
    let factor = if of.percent { 100.0 } else { 1.0 };
    let values =
        |row: &super::report::Row| of.figures.iter().map(|name| factor * row.figure(name)).collect::<Vec<f64>>();
    let extent =
        |values: &[f64]| if of.stacked { values.iter().sum() } else { values.iter().copied().fold(0.0, f64::max) };
    let most = report.rows.iter().map(|row| extent(&values(row))).fold(1e-9, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) / most;
    let thick: f64 = if of.stacked { 18.0 } else { 9.0 };
    let pitch = if of.stacked { 26.0 } else { thick.mul_add(of.figures.len() as f64, 10.0) };
    let height = pitch.mul_add(report.rows.len() as f64, 30.0);
    let mut text = begin(height);
    for (row, top) in report.rows.iter().zip((0..).map(|n| pitch * f64::from(n) + 26.0)) {
        let _ignored = write!(
            text,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            top + pitch / 2.0,
            row.name
        );
        let mut x = LEFT;
        for (at, value) in values(row).into_iter().enumerate() {
            let y = if of.stacked { top } else { thick.mul_add(at as f64, top) };
            let width = value * scale;
            let _ignored = write!(
                text,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{}\"/>",
                thick - 1.0,
                COLORS[at % COLORS.len()]
            );
            if of.stacked {
                x += width;
            } else {
                let _ignored = write!(
                    text,
                    "<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"9\">{value:.1}</text>",
                    x + width + 4.0,
                    y + thick - 1.0
                );
            }
        }
        if of.stacked {
            let _ignored = write!(
                text,
                "<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"9\">{:.1}</text>",
                x + 4.0,
                top + 13.0,
                extent(&values(row))
            );
        }
    }
    legend(&mut text, of.figures);
    text + "</svg>"
}

fn begin(height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" font-family=\"sans-serif\" font-size=\"11\">"
    )
}

fn legend(text: &mut String, names: &[&str]) {
    let mut x = 4.0;
    for (at, name) in names.iter().enumerate() {
        let short = name.strip_prefix("step_").or_else(|| name.strip_prefix("served_")).unwrap_or(name);
        let _ignored =
            write!(text, "<text x=\"{x:.0}\" y=\"14\" fill=\"{}\">&#9632; {short}</text>", COLORS[at % COLORS.len()]);
        x += 6.2f64.mul_add(short.len() as f64, 24.0);
    }
}

/// Draws the shares of programs that ended within a time, of sorted lists.
pub(crate) fn curves(lists: &[(&str, &[f64])]) -> String {
    const HEIGHT: f64 = 300.0;
    let most = lists.iter().filter_map(|(_, values)| values.last()).copied().fold(1e-9, f64::max);
    let mut text = begin(HEIGHT);
    let (bottom, top) = (HEIGHT - 24.0, 10.0);
    for step in 0..=4 {
        let (share, y) = (25 * step, (bottom - top).mul_add(-f64::from(step) / 4.0, bottom));
        let x = (WIDTH - 40.0 - RIGHT).mul_add(f64::from(step) / 4.0, 40.0);
        let _ignored = write!(
            text,
            "<line x1=\"40\" x2=\"{:.0}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/><text x=\"34\" y=\"{:.1}\" \
             text-anchor=\"end\">{share} %</text><text x=\"{x:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{:.0}</text>",
            WIDTH - RIGHT,
            y + 4.0,
            HEIGHT - 8.0,
            most * f64::from(step) / 4.0
        );
    }
    for (at, (name, values)) in lists.iter().enumerate() {
        let color = COLORS[at % COLORS.len()];
        // A hundred points draw any of them.
        let points = (0..=100_u32).filter(|_| !values.is_empty()).map(|percent| {
            let share = f64::from(percent) / 100.0;
            let x = (WIDTH - 40.0 - RIGHT).mul_add(super::report::quantile(values, share) / most, 40.0);
            format!("{x:.1},{:.1}", (bottom - top).mul_add(-share, bottom))
        });
        let points: Vec<String> = points.collect();
        let _ignored = write!(
            text,
            "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"1.6\" points=\"{}\"/><text x=\"{:.0}\" y=\"{:.0}\" \
             fill=\"{color}\" text-anchor=\"end\">{name}</text>",
            points.join(" "),
            WIDTH - RIGHT,
            14.0f64.mul_add(-(at as f64), bottom - 8.0)
        );
    }
    text + "</svg>"
}
