//! The machine, as far as it explains the numbers.

use std::fmt;
use std::fs::read_to_string;
use std::thread::available_parallelism;

use serde::Serialize;

/// Assumed where the system does not say: rather too large, so that working sets are too.
const DEFAULT_CACHE_BYTES: u64 = 64 << 20;

/// What the numbers were taken on.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) last_level_cache_bytes: u64,
    pub(crate) kernel: String,
    /// Whether shared memory can have transparent huge pages.
    pub(crate) shmem_huge_pages: String,
    /// Load averages at the start: what else was running.
    pub(crate) load: String,
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processor, cores, last_level_cache_bytes, kernel, shmem_huge_pages, load } = self;
        let cache = last_level_cache_bytes >> 20;
        write!(f, "{processor}, {cores} cores, last-level cache {cache} MiB, Linux {kernel}, shmem huge pages ")?;
        write!(f, "{shmem_huge_pages}, load {load}")
    }
}

/// Reads it from the system.
pub(crate) fn describe() -> Machine {
    let cpuinfo = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).and_then(|l| l.split_once(": "));
    let policy = read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let chosen = policy.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("unknown", |(c, _)| c);
    let load = read_to_string("/proc/loadavg").unwrap_or_default();
    Machine {
        processor: model.map_or("unknown processor", |(_, name)| name).to_owned(),
        cores: available_parallelism().map_or(1, usize::from),
        last_level_cache_bytes: last_level_cache().unwrap_or(DEFAULT_CACHE_BYTES),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        shmem_huge_pages: chosen.to_owned(),
        load: load.split_whitespace().take(3).collect::<Vec<_>>().join(" "),
    }
}

/// The largest cache of the first core.
fn last_level_cache() -> Option<u64> {
    let caches = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    let sizes = caches.flatten().filter_map(|c| read_to_string(c.path().join("size")).ok());
    sizes.filter_map(|size| size.trim().strip_suffix('K')?.parse::<u64>().ok()).max().map(|kib| kib << 10)
}

/// Bytes of this process that are in memory.
pub(crate) fn resident_bytes() -> u64 {
    let statm = read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|p| p.parse::<u64>().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
