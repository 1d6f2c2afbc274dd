//! Limits of this process. kvtierd's own are those of its unit or container: run the doctor there to see them.

use std::fs;

use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::units::bytes_text;

/// Locked memory that registering the disk tier's buffers takes at the least.
const WANTED_LOCKED_BYTES: u64 = 256 << 20;
/// Open files for engines, extents and log segments.
const WANTED_OPEN_FILES: u64 = 4_096;
/// Bit of CAP_IPC_LOCK in a capability mask, see capabilities(7).
const CAP_IPC_LOCK: u32 = 14;

pub(super) fn locked_memory() -> Finding {
    judge_locked_memory(getrlimit(Resource::Memlock).current, may_lock_memory())
}

fn judge_locked_memory(limit: Option<u64>, exempt: bool) -> Finding {
    let shown = limit.map_or_else(|| "unlimited".to_owned(), bytes_text);
    if exempt {
        return Finding::ok("RLIMIT_MEMLOCK", format!("{shown}, but this process is exempt (CAP_IPC_LOCK)"));
    }
    if limit.is_none_or(|bytes| bytes >= WANTED_LOCKED_BYTES) {
        return Finding::ok("RLIMIT_MEMLOCK", shown);
    }
    let meaning = "buffers cannot be registered with io_uring (more CPU per read), nor with CUDA or a NIC";
    Finding::warn(
        "RLIMIT_MEMLOCK",
        shown,
        (meaning, "LimitMEMLOCK=infinity in the unit, or the IPC_LOCK capability for the container"),
    )
}

fn may_lock_memory() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find_map(effective_capabilities).is_some_and(|mask| mask >> CAP_IPC_LOCK & 1 == 1)
}

fn effective_capabilities(line: &str) -> Option<u64> {
    u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok()
}

pub(super) fn open_files() -> Finding {
    judge_open_files(getrlimit(Resource::Nofile).current)
}

fn judge_open_files(limit: Option<u64>) -> Finding {
    match limit {
        Some(files) if files < WANTED_OPEN_FILES => Finding::warn(
            "RLIMIT_NOFILE",
            files.to_string(),
            (
                "many engines and log segments may run out of descriptors",
                "LimitNOFILE=65536 in the unit, or ulimit -n 65536",
            ),
        ),
        Some(files) => Finding::ok("RLIMIT_NOFILE", files.to_string()),
        None => Finding::ok("RLIMIT_NOFILE", "unlimited"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn locked_memory_is_judged_by_limit_and_capability() {
        for (limit, exempt, level) in [
            (None, false, Level::Ok),
            (Some(8 << 20), false, Level::Warn),
            (Some(8 << 20), true, Level::Ok),
            (Some(WANTED_LOCKED_BYTES), false, Level::Ok),
        ] {
            assert_eq!(judge_locked_memory(limit, exempt).level, level);
        }
        assert_eq!(effective_capabilities("CapEff:\t0000000000004000"), Some(1 << CAP_IPC_LOCK));
        assert_eq!(effective_capabilities("CapPrm:\t0000000000004000"), None);
    }

    #[test]
    fn open_files_are_judged_by_limit() {
        assert_eq!(judge_open_files(Some(1_024)).level, Level::Warn);
        assert_eq!(judge_open_files(Some(65_536)).level, Level::Ok);
        assert_eq!(judge_open_files(None).level, Level::Ok);
    }
}
