use std::fs;
use std::path::Path;

use super::*;

/// A root directory with these files.
fn fake_root(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn find<'a>(findings: &'a [Finding], check: &str) -> &'a Finding {
    findings.iter().find(|f| f.check == check).unwrap_or_else(|| panic!("no finding {check} in {findings:#?}"))
}

const SERVER: [(&str, &str); 23] = [
    ("proc/sys/kernel/osrelease", "6.8.0-45-generic\n"),
    ("proc/sys/kernel/io_uring_disabled", "0\n"),
    ("proc/meminfo", "MemTotal:       1056000000 kB\nMemFree: 1 kB\nMemAvailable:   900000000 kB\n"),
    ("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06\nGCC version: x\n"),
    ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "1024\n"),
    ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "1000\n"),
    ("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "0\n"),
    ("sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages", "0\n"),
    ("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [advise] never deny force\n"),
    ("sys/devices/system/node/node0/meminfo", "Node 0 MemTotal:       528000000 kB\n"),
    ("sys/devices/system/node/node0/cpulist", "0-63\n"),
    ("sys/devices/system/node/node1/meminfo", "Node 1 MemTotal:       528000000 kB\n"),
    ("sys/devices/system/node/node1/cpulist", "64-127\n"),
    ("sys/devices/system/node/possible", "0-1\n"),
    ("sys/class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE\n"),
    ("sys/class/infiniband/mlx5_0/ports/1/rate", "400 Gb/sec (4X NDR)\n"),
    ("sys/class/infiniband/mlx5_0/ports/1/link_layer", "InfiniBand\n"),
    ("sys/class/infiniband/mlx5_1/ports/1/state", "1: DOWN\n"),
    ("sys/class/infiniband/mlx5_1/ports/1/rate", "40 Gb/sec (4X QDR)\n"),
    ("sys/class/infiniband/mlx5_1/ports/1/link_layer", "Ethernet\n"),
    ("sys/class/infiniband/mlx5_2/ports/1/state", "2: INIT\n"),
    ("sys/class/infiniband/mlx5_2/ports/1/link_layer", "InfiniBand\n"),
    ("sys/module/nvidia_peermem/refcnt", "0\n"),
];

#[test]
fn a_well_equipped_server_is_described() {
    let root = fake_root(&SERVER);
    fs::create_dir_all(root.path().join("var/lib/kvtier")).unwrap();
    let findings = examine(root.path(), Path::new("/var/lib/kvtier"));
    for (check, found) in [
        ("kernel", "6.8.0-45-generic"),
        ("huge pages", "0 free of 0 of 1.0 GiB, 1000 free of 1024 of 2.0 MiB"),
        ("transparent pages", "shmem_enabled is advise"),
        ("NUMA", "node0: 503.5 GiB, cpus 0-63; node1: 503.5 GiB, cpus 64-127"),
        ("RDMA mlx5_0/1", "ACTIVE, 400 Gb/sec (4X NDR), InfiniBand"),
        ("nvidia_peermem", "loaded"),
    ] {
        assert_eq!(find(&findings, check).found, found);
        assert_eq!(find(&findings, check).level, Level::Ok, "{check}");
    }
    assert!(find(&findings, "memory").found.ends_with("of 1007.0 GiB"));
    assert_eq!(find(&findings, "data directory").level, Level::Ok);
    let down = find(&findings, "RDMA mlx5_1/1");
    assert_eq!((down.level, down.found.as_str()), (Level::Warn, "DOWN, 40 Gb/sec (4X QDR), Ethernet"));
    let waiting = find(&findings, "RDMA mlx5_2/1");
    assert_eq!((waiting.level, waiting.found.as_str()), (Level::Warn, "INIT, unknown, InfiniBand"));
    assert!(waiting.advice.contains("opensm"));
}

#[test]
fn an_empty_root_is_all_absent_with_a_meaning_and_no_panic() {
    let root = fake_root(&[]);
    let findings = examine(root.path(), Path::new("/var/lib/kvtier"));
    for check in ["kernel", "memory", "huge pages", "transparent pages", "NUMA", "RDMA", "data directory"] {
        let finding = find(&findings, check);
        assert_eq!(finding.level, Level::Absent, "{finding:?}");
        assert!(!finding.meaning.is_empty() && !finding.advice.is_empty(), "{finding:?}");
    }
}

#[test]
fn garbage_in_files_is_no_panic() {
    let root = fake_root(&[
        ("proc/sys/kernel/osrelease", "x.y"),
        ("proc/meminfo", "MemTotal: 99999999999999999999 kB\nMemAvailable: kB\n"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "many"),
        ("sys/kernel/mm/hugepages/other/nr_hugepages", "1"),
        ("sys/kernel/mm/transparent_hugepage/shmem_enabled", "]always["),
        ("sys/devices/system/node/nodex/cpulist", "0"),
        ("sys/class/infiniband/hfi1_0", ""),
        ("sys/class/infiniband/rxe0/ports/1/state", ""),
    ]);
    let findings = examine(root.path(), Path::new("/d"));
    assert_eq!(find(&findings, "RDMA hfi1_0").found, "no ports");
    assert_eq!(find(&findings, "RDMA rxe0/1").found, "unknown, unknown, unknown");
    assert_eq!(find(&findings, "memory").level, Level::Absent);
}

#[test]
fn settings_that_cost_speed_are_warnings() {
    let root = fake_root(&[
        ("proc/sys/kernel/osrelease", "4.18.0-553.el8"),
        ("proc/meminfo", "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n"),
        ("sys/fs/cgroup/memory.max", "536870912\n"),
        ("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size advise [never] deny force"),
    ]);
    let findings = examine(root.path(), Path::new("/d"));
    for check in ["kernel", "memory", "transparent pages"] {
        assert_eq!(find(&findings, check).level, Level::Warn, "{check}");
    }
    assert!(find(&findings, "memory").found.ends_with("cgroup limit 512.0 MiB"));
}

#[test]
fn the_report_has_a_line_each_and_stable_json() {
    let findings = [
        Finding::ok("kernel", "6.8"),
        Finding::warn("huge pages", "0 free\u{7}", ("slower", "sysctl\n-w")),
        Finding::absent("RDMA", "none", ("TCP", "nothing")),
    ];
    let report = report(&findings);
    assert!(report.complete);
    assert_eq!(
        report.text,
        "ok      kernel             6.8\n\
         warn    huge pages         0 free?\n\
         \x20                    means slower\n\
         \x20                   change sysctl -w\n\
         absent  RDMA               none\n\
         \x20                    means TCP\n\
         \x20                   change nothing\n"
    );
    assert_eq!(
        report.json["findings"][1],
        serde_json::json!({
            "check": "huge pages", "level": "warn", "found": "0 free\u{7}", "meaning": "slower", "advice": "sysctl\n-w"
        })
    );
}

#[tokio::test]
async fn a_daemon_that_is_not_there_is_absent() {
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("kvtierd.sock"));
    let findings = daemon(&address, Duration::from_secs(5)).await;
    let [finding] = findings.as_slice() else { panic!("{findings:?}") };
    assert_eq!(finding.level, Level::Absent);
    assert!(finding.advice.contains("kvtierd --config"), "{finding:?}");
}
