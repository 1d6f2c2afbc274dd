//! CUDA and UCX: opened at run time, so their absence is a matter of the machine, not of the build.

use super::Finding;
use super::library::{CUDA, LibraryError, UCX, cuda_driver_version, ucx_version};
use super::root::Root;

pub(super) fn cuda(root: &Root) -> Finding {
    let driver = root.read("/proc/driver/nvidia/version").and_then(|text| text.lines().next().map(str::to_owned));
    judge_cuda(cuda_driver_version(), driver.as_deref())
}

fn judge_cuda(version: Result<i32, LibraryError>, driver: Option<&str>) -> Finding {
    let driver = driver.map(|line| format!("; {line}")).unwrap_or_default();
    let meaning = "no device tier; CPU engines are served from host memory";
    match version {
        Ok(0) => Finding::absent(
            "CUDA",
            format!("{CUDA} is there, but no driver{driver}"),
            (meaning, "load the NVIDIA driver"),
        ),
        Ok(version) => Finding::ok("CUDA", format!("up to {}.{}{driver}", version / 1_000, version % 1_000 / 10)),
        Err(error @ LibraryError::NotLoaded(_)) => Finding::absent(
            "CUDA",
            format!("{error}{driver}"),
            (meaning, "on a GPU node install the NVIDIA driver, in a container use the NVIDIA runtime"),
        ),
        Err(error) => {
            Finding::warn("CUDA", format!("{CUDA}: {error}{driver}"), (meaning, "reinstall the NVIDIA driver"))
        }
    }
}

pub(super) fn ucx() -> Finding {
    judge_ucx(ucx_version())
}

fn judge_ucx(version: Result<String, LibraryError>) -> Finding {
    let meaning = "blocks move between nodes over TCP, without RDMA";
    match version {
        Ok(version) => Finding::ok("UCX", version).meaning("peers must have the same major and minor version"),
        Err(error @ LibraryError::NotLoaded(_)) => Finding::absent(
            "UCX",
            error.to_string(),
            (meaning, "where there is an RDMA NIC install UCX (package libucx0, or the NIC vendor's)"),
        ),
        Err(error) => Finding::warn("UCX", format!("{UCX}: {error}"), (meaning, "reinstall UCX")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn cuda_versions_read_as_major_and_minor() {
        let finding = judge_cuda(Ok(12_080), Some("NVRM version: 570.1"));
        assert_eq!(finding.level, Level::Ok);
        assert_eq!(finding.found, "up to 12.8; NVRM version: 570.1");
        assert_eq!(judge_cuda(Ok(0), None).level, Level::Absent);
        assert_eq!(judge_cuda(Err(LibraryError::Call { name: "f", code: 999 }), None).level, Level::Warn);
    }

    #[test]
    fn a_broken_ucx_is_a_warning() {
        assert_eq!(judge_ucx(Ok("1.18.0".to_owned())).level, Level::Ok);
        assert_eq!(judge_ucx(Err(LibraryError::Symbol { name: "f" })).level, Level::Warn);
    }
}
