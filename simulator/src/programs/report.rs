//! What came of a run: as a table, as JSON and as CSV.

use std::fmt::Write as _;
use std::time::Duration;

use kvtier_types::SemanticType;
use serde_json::{Map, Value, json};

use super::config::Config;
use super::decisions::Decisions;
use super::metrics::Metrics;
use super::run::Setting;
use super::workloads::Knobs;

/// A run.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) setting: Setting,
    pub(crate) knobs: Knobs,
    pub(crate) config: Config,
    pub(crate) live_blocks: f64,
    /// Completions of a cache without costs, in seconds.
    pub(crate) free: Vec<f64>,
    pub(crate) rows: Vec<Row>,
}

/// A policy's figures: names are those of the JSON.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// In the order of the JSON's names.
    pub(crate) figures: Vec<(&'static str, f64)>,
    /// Useful occupancy by meaning, where there is any.
    pub(crate) useful: Vec<(&'static str, f64)>,
    /// Completions in seconds, sorted.
    pub(crate) completions: Vec<f64>,
}

/// The value at a share of a sorted list.
pub(crate) fn quantile(sorted: &[f64], q: f64) -> f64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
    let at = (q * sorted.len() as f64) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn over(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

impl Row {
    pub(crate) fn new(how: Decisions, metrics: &Metrics, (free, config): (&Metrics, &Config)) -> Self {
        let secs = |d: &Duration| d.as_secs_f64();
        let completions = sorted(metrics.completions.iter().flatten().map(secs));
        let pairs = metrics.completions.iter().flatten().zip(free.completions.iter().flatten());
        let stretch = sorted(pairs.map(|(ours, best)| over(secs(ours), secs(best))));
        let mut row = Self { name: how.name, figures: Vec::new(), useful: Vec::new(), completions };
        row.completion(metrics, &stretch);
        row.reuse(metrics);
        row.movement(metrics, config);
        row.speculation(metrics);
        for (kind, (useful, all)) in
            SemanticType::ALL.iter().zip(metrics.occupancy.useful.iter().zip(metrics.occupancy.all))
        {
            if all > 0.0 {
                row.useful.push((kind.name(), useful / all));
            }
        }
        let all: f64 = metrics.occupancy.all.iter().sum();
        row.put("useful_occupancy", over(metrics.occupancy.useful.iter().sum(), all));
        row
    }

    fn put(&mut self, name: &'static str, value: f64) {
        self.figures.push((name, value));
    }

    fn completion(&mut self, metrics: &Metrics, stretch: &[f64]) {
        let count = self.completions.len() as f64;
        self.put("completion_p50_s", quantile(&self.completions, 0.5));
        self.put("completion_p95_s", quantile(&self.completions, 0.95));
        self.put("completion_mean_s", over(self.completions.iter().sum(), count));
        self.put("stretch_p50", quantile(stretch, 0.5));
        self.put("stretch_p95", quantile(stretch, 0.95));
        // Jain's index of the stretch: one if all programs are slowed down alike.
        let (sum, squares): (f64, f64) = (stretch.iter().sum(), stretch.iter().map(|s| s * s).sum());
        self.put("fairness_jain", over(sum * sum, stretch.len() as f64 * squares));
        self.put("programs", count);
        self.put("programs_per_hour", 3600.0 * metrics.programs_per_second);
        self.put("makespan_s", metrics.ends.as_secs_f64());
        let each = |d: Duration| over(d.as_secs_f64(), metrics.steps as f64);
        self.put("step_queue_s", each(metrics.queued));
        self.put("step_load_s", each(metrics.loaded));
        self.put("step_prefill_s", each(metrics.computing));
        self.put("step_decode_s", each(metrics.decoding.saturating_sub(metrics.computing)));
    }

    fn reuse(&mut self, metrics: &Metrics) {
        let served = metrics.served;
        self.put("zero_recompute", over(served.hits().min(metrics.ideal_tokens) as f64, metrics.ideal_tokens as f64));
        self.put("recomputed_tokens", metrics.recomputed_tokens as f64);
        self.put("recomputed_tflops", metrics.recomputed_flops / 1e12);
        let share = |tokens: u64| over(tokens as f64, served.all() as f64);
        self.put("served_device", share(served.device));
        self.put("served_host", share(served.host));
        self.put("served_disk", share(served.disk));
        self.put("served_store", share(served.store));
        self.put("computed", share(served.computed));
    }

    fn movement(&mut self, metrics: &Metrics, config: &Config) {
        let tokens = served_tokens(metrics);
        let names = ["bus_bytes_per_token", "disk_bytes_per_token", "network_bytes_per_token", "store_bytes_per_token"];
        for (name, bytes) in names.into_iter().zip(metrics.link_bytes) {
            self.put(name, over(bytes as f64, tokens));
        }
        let bytes = config.block_bytes() as f64;
        self.put("host_written_bytes_per_token", over(metrics.written.to_host as f64 * bytes, tokens));
        self.put("disk_written_bytes_per_token", over(metrics.written.to_disk as f64 * bytes, tokens));
        self.put("store_written_bytes_per_token", over(metrics.stored_blocks as f64 * bytes, tokens));
        let time = metrics.ends.as_secs_f64();
        let nodes = f64::from(config.nodes);
        self.put("engine_utilization", over(metrics.engine_busy.as_secs_f64(), time * nodes));
        let names = ["bus_utilization", "disk_utilization", "network_utilization"];
        for (name, busy) in names.into_iter().zip(metrics.link_busy) {
            self.put(name, over(busy.as_secs_f64(), time * nodes));
        }
        self.put("store_utilization", over(metrics.link_busy[3].as_secs_f64(), time));
    }

    fn speculation(&mut self, metrics: &Metrics) {
        let spent = metrics.spent;
        let used = (spent.useful_bytes + spent.late_bytes) as f64;
        self.put("prefetch_precision", over(used, used + spent.wasted_bytes as f64));
        self.put(
            "prefetch_recall",
            over(spent.useful_bytes as f64, spent.useful_bytes as f64 + metrics.demanded_bytes as f64),
        );
        self.put("prefetch_late", over(spent.late_bytes as f64, used));
        self.put("prefetch_bytes", used + spent.wasted_bytes as f64);
    }

    /// A figure by its name in the JSON.
    pub(crate) fn figure(&self, name: &str) -> f64 {
        self.figures.iter().find(|(n, _)| *n == name).map_or(0.0, |(_, value)| *value)
    }
}

fn served_tokens(metrics: &Metrics) -> f64 {
    (metrics.served.all() + metrics.output_tokens) as f64
}

/// Columns of the table: heading, figure, factor, digits.
const COLUMNS: [(&str, &str, f64, usize); 16] = [
    ("p50 s", "completion_p50_s", 1.0, 1),
    ("p95 s", "completion_p95_s", 1.0, 1),
    ("mean s", "completion_mean_s", 1.0, 1),
    ("stretch", "stretch_p50", 1.0, 2),
    ("fair", "fairness_jain", 1.0, 2),
    ("progs/h", "programs_per_hour", 1.0, 0),
    ("ZR", "zero_recompute", 1.0, 3),
    ("dev %", "served_device", 100.0, 1),
    ("host %", "served_host", 100.0, 1),
    ("disk %", "served_disk", 100.0, 1),
    ("store %", "served_store", 100.0, 1),
    ("queue s", "step_queue_s", 1.0, 2),
    ("load s", "step_load_s", 1.0, 2),
    ("prefill s", "step_prefill_s", 1.0, 2),
    ("decode s", "step_decode_s", 1.0, 2),
    ("engine %", "engine_utilization", 100.0, 0),
];

impl Report {
    /// What all policies have in common, as lines.
    pub(crate) fn configuration(&self) -> String {
        let (s, c, k) = (&self.setting, &self.config, &self.knobs);
        let gb = |blocks: usize| blocks as f64 * c.block_bytes() as f64 / 1e9;
        let residual = c.cost.residual;
        let mut text = format!(
            "{} on {} nodes, seed {}, preset {}: overlap {}, branching {}, tools {}, depth {}\n",
            s.workload.name(),
            c.nodes,
            s.seed,
            s.preset.name(),
            k.overlap,
            k.branching,
            k.tools,
            k.depth
        );
        let _ignored = writeln!(
            text,
            "engine {} (held-out median errors: end to end {:.1} %, first token {:.1} %, per token {:.1} %), blocks of {} tokens",
            c.cost.name,
            100.0 * residual.end_to_end,
            100.0 * residual.first_token,
            100.0 * residual.per_token,
            c.block_tokens
        );
        let _ignored = writeln!(
            text,
            "of each node: device {:.1} GB, host {:.1} GB (together {:.0} % of the live working set, {:.0} GB in all), disk {:.1} GB; \
             shared storage {:.0} GB",
            gb(c.capacity[0]),
            gb(c.capacity[1]),
            100.0 * s.pressure,
            self.live_blocks * c.block_bytes() as f64 / 1e9,
            gb(c.capacity[2]),
            gb(c.store_blocks)
        );
        let _ignored = writeln!(
            text,
            "links in GB/s: bus {}, disk {} ({} written), network {}, storage {} for all; programs: {}",
            c.bus_gb,
            c.disk_gb,
            c.disk_write_gb,
            c.network_gb,
            c.store_gb,
            if c.population > 0 { format!("{} at once", c.population) } else { format!("{} an hour and node", s.rate) }
        );
        text
    }

    /// For a terminal.
    pub(crate) fn table(&self) -> String {
        let mut text = self.configuration();
        let _ignored = write!(text, "{:<20}", "policy");
        for (heading, ..) in COLUMNS {
            let _ignored = write!(text, "{heading:>10}");
        }
        text.push('\n');
        for row in &self.rows {
            let _ignored = write!(text, "{:<20}", row.name);
            for (_, name, factor, digits) in COLUMNS {
                let _ignored = write!(text, "{:>10.digits$}", factor * row.figure(name));
            }
            text.push('\n');
        }
        if let Some(gain) = self.gain("kvtier-hints") {
            let _ignored = writeln!(text, "completion p50, lru-shared over kvtier-hints: {gain:.2}");
        }
        text
    }

    /// Completion p50 of LRU with shared storage over that of a policy.
    pub(crate) fn gain(&self, name: &str) -> Option<f64> {
        let p50 = |name: &str| self.rows.iter().find(|row| row.name == name).map(|row| row.figure("completion_p50_s"));
        Some(over(p50("lru-shared")?, p50(name)?))
    }

    /// All figures.
    pub(crate) fn json(&self) -> Value {
        let policy = |row: &Row| {
            let mut figures: Map<String, Value> =
                row.figures.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
            let useful: Map<String, Value> =
                row.useful.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
            figures.insert("useful_occupancy_by_type".to_owned(), Value::Object(useful));
            (row.name.to_owned(), Value::Object(figures))
        };
        let (s, c, k) = (&self.setting, &self.config, &self.knobs);
        json!({
            "workload": s.workload.name(),
            "seed": s.seed,
            "nodes": s.nodes,
            "preset": s.preset.name(),
            "knobs": {"overlap": k.overlap, "branching": k.branching, "tools": k.tools, "depth": k.depth},
            "config": {
                "model": c.cost.name,
                "held_out_error_end_to_end": c.cost.residual.end_to_end,
                "block_tokens": c.block_tokens,
                "block_bytes": c.block_bytes(),
                "pressure": s.pressure,
                "live_blocks": self.live_blocks,
                "device_blocks": c.capacity[0],
                "host_blocks": c.capacity[1],
                "disk_blocks": c.capacity[2],
                "store_blocks": c.store_blocks,
                "bus_gb": c.bus_gb,
                "disk_gb": c.disk_gb,
                "disk_write_gb": c.disk_write_gb,
                "network_gb": c.network_gb,
                "store_gb": c.store_gb,
                "population": c.population,
            },
            "free_completion_p50_s": quantile(&sorted(self.free.iter().copied()), 0.5),
            "policies": self.rows.iter().map(policy).collect::<Map<String, Value>>(),
        })
    }

    /// A line for each policy.
    pub(crate) fn csv(&self) -> String {
        let mut text = String::from("workload,seed,policy");
        if let Some(row) = self.rows.first() {
            row.figures.iter().for_each(|(name, _)| text.extend([",", name]));
        }
        text.push('\n');
        for row in &self.rows {
            let _ignored = write!(text, "{},{},{}", self.setting.workload.name(), self.setting.seed, row.name);
            for (_, value) in &row.figures {
                let _ignored = write!(text, ",{value}");
            }
            text.push('\n');
        }
        text
    }
}
