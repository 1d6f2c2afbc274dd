//! Memory: how much, in which pages, on which nodes.

use rustix::fs::statvfs;

use super::Finding;
use super::root::Root;
use crate::units::bytes_text;

/// Below this the arena is too small to be worth its daemon.
const WANTED_AVAILABLE_BYTES: u64 = 1 << 30;
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages";

pub(super) fn total(root: &Root) -> Finding {
    let meminfo = root.read("/proc/meminfo").unwrap_or_default();
    let (Some(total), Some(available)) = (field(&meminfo, "MemTotal:"), field(&meminfo, "MemAvailable:")) else {
        return Finding::absent("memory", "unknown", ("its size cannot be checked against the arena's", "mount /proc"));
    };
    let mut found = format!("{} available of {}", bytes_text(available), bytes_text(total));
    let limit = root.number("/sys/fs/cgroup/memory.max");
    if let Some(limit) = limit {
        found.push_str(&format!(", cgroup limit {}", bytes_text(limit)));
    }
    if available.min(limit.unwrap_or(u64::MAX)) < WANTED_AVAILABLE_BYTES {
        let advice = "free memory, raise the limit, or make the host tier smaller";
        return Finding::warn("memory", found, ("the arena is charged to the daemon and may not fit", advice));
    }
    Finding::ok("memory", found)
}

/// A field of a meminfo file, in bytes.
fn field(meminfo: &str, name: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.split_once(name).map(|(_, rest)| rest))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

pub(super) fn huge_pages(root: &Root) -> Finding {
    let sizes: Vec<(u64, u64, u64)> =
        root.list(HUGE_PAGES).iter().filter_map(|name| huge_page_size(root, name)).collect();
    let found: Vec<String> =
        sizes.iter().map(|(bytes, free, total)| format!("{free} free of {total} of {}", bytes_text(*bytes))).collect();
    let meaning = "the arena takes transparent pages, else plain ones, which are slower to touch and to copy";
    let advice = "sysctl -w vm.nr_hugepages=N with N times 2 MiB at least the host tier's size, early after boot";
    if sizes.is_empty() {
        return Finding::absent("huge pages", "not supported", (meaning, "use a kernel with CONFIG_HUGETLBFS"));
    }
    if sizes.iter().all(|(_, free, _)| *free == 0) {
        return Finding::absent("huge pages", found.join(", "), (meaning, advice));
    }
    Finding::ok("huge pages", found.join(", "))
}

fn huge_page_size(root: &Root, name: &str) -> Option<(u64, u64, u64)> {
    let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    let free = root.number(format!("{HUGE_PAGES}/{name}/free_hugepages"))?;
    let total = root.number(format!("{HUGE_PAGES}/{name}/nr_hugepages"))?;
    Some((kib.checked_mul(1024)?, free, total))
}

pub(super) fn transparent_pages(root: &Root) -> Finding {
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let setting = root.read(path).unwrap_or_default();
    let chosen = setting.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(word, _)| word);
    let meaning =
        "without huge pages the arena is in 4 KiB pages: touching it is about 6 times slower, copying 1.3 times";
    match chosen {
        Some("never" | "deny") => Finding::warn(
            "transparent pages",
            format!("shmem_enabled is {}", chosen.unwrap_or_default()),
            (meaning, "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        ),
        Some(word) => Finding::ok("transparent pages", format!("shmem_enabled is {word}")),
        None => Finding::absent(
            "transparent pages",
            "not supported",
            (meaning, "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE"),
        ),
    }
}

pub(super) fn shared_memory(root: &Root) -> Finding {
    let meaning = "kvtierd does not need it (its arena has no name), but vLLM's processes do";
    match statvfs(root.path("/dev/shm")) {
        Ok(fs) if fs.f_blocks > 0 => {
            let bytes = |blocks: u64| bytes_text(blocks.saturating_mul(fs.f_frsize));
            Finding::ok("/dev/shm", format!("{} free of {}", bytes(fs.f_bavail), bytes(fs.f_blocks)))
        }
        _ => Finding::absent("/dev/shm", "not mounted", (meaning, "mount a tmpfs on /dev/shm")),
    }
}

pub(super) fn numa(root: &Root) -> Finding {
    let dir = "/sys/devices/system/node";
    let is_node = |name: &&String| name.strip_prefix("node").is_some_and(|n| n.parse::<u32>().is_ok());
    let mut nodes: Vec<String> = Vec::new();
    for name in root.list(dir).iter().filter(is_node) {
        let memory = root.read(format!("{dir}/{name}/meminfo")).and_then(|text| field(&text, "MemTotal:"));
        let cpus = root.read(format!("{dir}/{name}/cpulist")).filter(|list| !list.is_empty());
        let memory = memory.map_or_else(|| "memory unknown".to_owned(), bytes_text);
        nodes.push(format!("{name}: {memory}, cpus {}", cpus.unwrap_or_else(|| "none".to_owned())));
    }
    match nodes.len() {
        0 => Finding::absent("NUMA", "unknown", ("extents are not placed by node", "mount /sys")),
        1 => Finding::ok("NUMA", nodes.join("; ")),
        _ => Finding::ok("NUMA", nodes.join("; ")).meaning("run one engine per node with its memory bound to it"),
    }
}
