//! What came of a replay: a table for people, CSV for tools.

use std::fmt::Write as _;

use super::Policy;
use super::engine::Tally;

/// One policy at one capacity.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) policy: Policy,
    pub(crate) capacity: usize,
    pub(crate) host: Tally,
    /// Blocks that host memory had not, and the disk had.
    pub(crate) disk_hits: u64,
    /// Blocks written to the disk.
    pub(crate) offloaded: u64,
    /// Share of the way from LRU to Belady, where there is one.
    pub(crate) gap_closed: Option<f64>,
    pub(crate) bytes_per_token: u64,
    pub(crate) accesses_per_second: f64,
}

impl Row {
    fn share(&self, blocks: u64) -> f64 {
        blocks as f64 / self.host.blocks.max(1) as f64
    }

    /// Leading blocks of prompts that host memory had.
    pub(crate) fn prefix_hit(&self) -> f64 {
        self.share(self.host.hits)
    }

    fn block_hit(&self) -> f64 {
        self.share(self.host.here)
    }

    fn zero_recompute(&self) -> f64 {
        self.host.hits as f64 / self.host.ideal.max(1) as f64
    }

    /// What an object store that keeps everything would serve of the rest.
    fn object_hits(&self) -> u64 {
        self.host.ideal.saturating_sub(self.host.hits + self.disk_hits)
    }

    /// Bytes read from and written to disk, per token served from host memory or disk.
    fn moved_per_token(&self) -> f64 {
        let moved = (self.disk_hits + self.offloaded) as f64 * self.bytes_per_token as f64;
        moved / (self.host.hits + self.disk_hits).max(1) as f64
    }
}

/// All of a replay.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    pub(crate) trace: String,
    pub(crate) calls: usize,
    /// Blocks of all prompts.
    pub(crate) blocks: u64,
    /// Different ones.
    pub(crate) unique: u64,
    pub(crate) rows: Vec<Row>,
}

impl Report {
    /// For people: percentages.
    pub(crate) fn table(&self) -> String {
        let ideal = self.rows.first().map_or(0.0, |row| row.share(row.host.ideal));
        let mut text = format!(
            "{}: {} calls, {} block accesses, {} blocks, ideal prefix hit {:.2} %\n{:<20} {:>8} {:>10} {:>9} {:>10} {:>9} {:>9} {:>11} {:>9}\n",
            self.trace,
            self.calls,
            self.blocks,
            self.unique,
            100.0 * ideal,
            "policy",
            "blocks",
            "prefix hit",
            "zero rec.",
            "gap closed",
            "disk hit",
            "obj. hit",
            "moved B/tok",
            "M acc./s"
        );
        for row in &self.rows {
            let gap = row.gap_closed.map_or_else(|| "-".to_owned(), |gap| format!("{:.1}", 100.0 * gap));
            // Writing to a string does not fail.
            let _ignored = writeln!(
                text,
                "{:<20} {:>8} {:>10.2} {:>9.2} {gap:>10} {:>9.2} {:>9.2} {:>11.0} {:>9.2}",
                row.policy.name(),
                row.capacity,
                100.0 * row.prefix_hit(),
                100.0 * row.zero_recompute(),
                100.0 * row.share(row.disk_hits),
                100.0 * row.share(row.object_hits()),
                row.moved_per_token(),
                row.accesses_per_second / 1e6
            );
        }
        text
    }

    /// For tools: fractions. Equal runs give equal text.
    pub(crate) fn csv(&self) -> String {
        let mut text =
            "trace,policy,capacity_blocks,prefix_hit,block_hit,zero_recompute,gap_closed,ideal_hit,disk_hit,\
                        object_hit,evicted_blocks,offloaded_blocks,moved_bytes_per_token\n"
                .to_owned();
        for row in &self.rows {
            let gap = row.gap_closed.map_or_else(String::new, |gap| format!("{gap:.6}"));
            let _ignored = writeln!(
                text,
                "{},{},{},{:.6},{:.6},{:.6},{gap},{:.6},{:.6},{:.6},{},{},{:.1}",
                quoted(&self.trace),
                row.policy.name(),
                row.capacity,
                row.prefix_hit(),
                row.block_hit(),
                row.zero_recompute(),
                row.share(row.host.ideal),
                row.share(row.disk_hits),
                row.share(row.object_hits()),
                row.host.evicted,
                row.offloaded,
                row.moved_per_token(),
            );
        }
        text
    }
}

/// A field of CSV (RFC 4180).
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_commas_are_quoted() {
        assert_eq!(quoted("a.gz"), "a.gz");
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
    }
}
