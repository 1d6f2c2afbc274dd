//! The kernel and io_uring.

use std::io;

use io_uring::IoUring;
use rustix::io::Errno;

use super::Finding;
use super::root::Root;

/// Oldest kernel with everything the disk tier uses of io_uring.
const WANTED_KERNEL: (u32, u32) = (5, 15);
/// Entries of the ring that is set up as a trial.
const TRIAL_ENTRIES: u32 = 8;

pub(super) fn version(root: &Root) -> Finding {
    let Some(release) = root.read("/proc/sys/kernel/osrelease") else {
        return Finding::absent("kernel", "unknown", ("kvtierd needs Linux", "mount /proc"));
    };
    let mut parts = release.split(['.', '-']).map(|part| part.parse::<u32>().ok());
    match (parts.next().flatten(), parts.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) < WANTED_KERNEL => {
            let advice = format!("use a kernel of at least {}.{}", WANTED_KERNEL.0, WANTED_KERNEL.1);
            Finding::warn("kernel", release, ("older than what kvtierd is tested with", &advice))
        }
        _ => Finding::ok("kernel", release),
    }
}

const FALLBACK: &str =
    "the disk tier uses a pool of threads: the same bandwidth with large blocks, 5 to 15 times the CPU";

/// The sysctl, and a trial: a sandbox may bar what the sysctl allows.
pub(super) fn io_uring(root: &Root) -> Finding {
    let setting = root.read("/proc/sys/kernel/io_uring_disabled");
    let trial = IoUring::new(TRIAL_ENTRIES).map(drop);
    judge_io_uring(setting.as_deref(), trial)
}

fn judge_io_uring(setting: Option<&str>, trial: io::Result<()>) -> Finding {
    let shown = format!("kernel.io_uring_disabled={}", setting.unwrap_or("(not there)"));
    let error = match trial {
        Ok(()) if matches!(setting, Some("1" | "2")) => {
            let advice = "sysctl -w kernel.io_uring_disabled=0, or run kvtierd as root or in kernel.io_uring_group";
            return Finding::warn("io_uring", format!("works here, but {shown}"), (FALLBACK, advice));
        }
        Ok(()) => return Finding::ok("io_uring", format!("works ({shown})")),
        Err(error) => error,
    };
    let advice = match Errno::from_io_error(&error) {
        Some(Errno::PERM) if matches!(setting, Some("1" | "2")) => "sysctl -w kernel.io_uring_disabled=0",
        Some(Errno::PERM) => {
            "a sandbox bars it: allow io_uring_setup, io_uring_enter and io_uring_register in the seccomp profile"
        }
        Some(Errno::NOSYS) => {
            "the kernel has none, or a sandbox hides it: use a kernel with CONFIG_IO_URING and a seccomp profile that allows it"
        }
        Some(Errno::NOMEM) => "raise the locked memory limit (RLIMIT_MEMLOCK)",
        _ => "see the kernel log",
    };
    Finding::absent("io_uring", format!("{error} ({shown})"), (FALLBACK, advice))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn io_uring_is_judged_by_trial_and_setting() {
        let denied = || Err(Errno::PERM.into());
        for (setting, trial, level, word) in [
            (Some("0"), Ok(()), Level::Ok, ""),
            (None, Ok(()), Level::Ok, ""),
            (Some("1"), Ok(()), Level::Warn, "sysctl"),
            (Some("2"), denied(), Level::Absent, "sysctl"),
            (Some("0"), denied(), Level::Absent, "seccomp"),
            (None, Err(Errno::NOSYS.into()), Level::Absent, "CONFIG_IO_URING"),
            (Some("0"), Err(Errno::NOMEM.into()), Level::Absent, "RLIMIT_MEMLOCK"),
        ] {
            let finding = judge_io_uring(setting, trial);
            assert_eq!(finding.level, level, "{finding:?}");
            assert!(finding.advice.contains(word), "{finding:?}");
        }
    }
}
