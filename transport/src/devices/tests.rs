use super::*;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A fake sysfs.
struct Tree(TempDir);

impl Tree {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, path: &str, text: impl AsRef<[u8]>) -> &Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    fn port(&self, device: &str, [state, layer, rate]: [&str; 3]) -> &Self {
        let port = format!("class/infiniband/{device}/ports/1");
        self.file(&format!("{port}/state"), format!("{state}\n"));
        self.file(&format!("{port}/link_layer"), format!("{layer}\n"));
        self.file(&format!("{port}/rate"), format!("{rate}\n"))
    }

    fn gid(&self, device: &str, index: u32, [address, kind, interface]: [&str; 3]) -> &Self {
        let port = format!("class/infiniband/{device}/ports/1");
        self.file(&format!("{port}/gids/{index}"), format!("{address}\n"));
        self.file(&format!("{port}/gid_attrs/types/{index}"), format!("{kind}\n"));
        self.file(&format!("{port}/gid_attrs/ndevs/{index}"), format!("{interface}\n"))
    }

    fn discover(&self) -> Inventory {
        discover(self.0.path())
    }
}

const LINK_LOCAL: &str = "fe80:0000:0000:0000:ba3f:d2ff:fe00:0001";
const MAPPED: &str = "0000:0000:0000:0000:0000:ffff:0a00:0105";

#[test]
fn a_healthy_roce_port_is_usable_by_its_routed_address() {
    let tree = Tree::new();
    tree.port("mlx5_0", ["4: ACTIVE", "Ethernet", "400 Gb/sec (4X NDR)"])
        .gid("mlx5_0", 0, [LINK_LOCAL, "IB/RoCE v1", "ens1"])
        .gid("mlx5_0", 1, [LINK_LOCAL, "RoCE v2", "ens1"])
        .gid("mlx5_0", 2, [MAPPED, "IB/RoCE v1", "ens1"])
        .gid("mlx5_0", 10, [MAPPED, "RoCE v2", "ens1"])
        .gid("mlx5_0", 11, ["0000:0000:0000:0000:0000:0000:0000:0000", "", ""])
        .file("class/infiniband/mlx5_0/device/numa_node", "1\n")
        .file("class/infiniband/mlx5_0/device/net/ens1/mtu", "9000\n")
        .file("module/nvidia_peermem/version", "580\n");
    let found = tree.discover();
    let (device, port) = found.usable_ports().next().unwrap();
    assert_eq!(
        (device.numa_node, &device.interfaces[..], port.rate_mbit),
        (Some(1), &["ens1".to_owned()][..], Some(400_000))
    );
    let gid = port.roce_gid().unwrap();
    assert_eq!((gid.index, gid.address.to_ipv4_mapped().unwrap().to_string().as_str()), (10, "10.0.1.5"));
    assert_eq!((port.gids.len(), gid.interface.as_deref()), (4, Some("ens1")));
    assert_eq!((found.peer_memory, &found.oddities[..]), (true, &[][..]));
    let told = found.to_string();
    let expected =
        "mlx5_0 port 1: Ethernet, active, 400 Gb/s, RoCE v2 by GID 10 (::ffff:10.0.1.5), NUMA node 1, ens1\n";
    assert_eq!(told, format!("{expected}nvidia_peermem is loaded\n"));
}

#[test]
fn an_infiniband_port_needs_no_roce_address() {
    let tree = Tree::new();
    tree.port("mlx5_1", ["4: ACTIVE", "InfiniBand", "2.5 Gb/sec (1X SDR)"])
        .file("class/infiniband/mlx5_1/device/numa_node", "-1\n");
    let found = tree.discover();
    let (device, port) = found.usable_ports().next().unwrap();
    assert_eq!((device.numa_node, port.rate_mbit, found.peer_memory), (None, Some(2500), false));
    assert!(found.to_string().starts_with("mlx5_1 port 1: InfiniBand, active, 2500 Mb/s\n"), "{found}");
}

#[test]
fn ports_that_are_down_or_have_no_roce_v2_address_are_not_usable() {
    let tree = Tree::new();
    for (n, state) in ["1: DOWN", "2: INIT", "3: ARMED", "5: ACTIVE_DEFER"].into_iter().enumerate() {
        tree.port(&format!("down_{n}"), [state, "InfiniBand", "100 Gb/sec"]);
    }
    tree.port("v1_only", ["4: ACTIVE", "Ethernet", "25 Gb/sec"]).gid("v1_only", 0, [MAPPED, "IB/RoCE v1", "e"]);
    let found = tree.discover();
    assert_eq!((found.devices.len(), found.usable_ports().count()), (5, 0));
    assert!(found.to_string().contains("v1_only port 1: Ethernet, active, 25 Gb/s, no RoCE v2 address"), "{found}");
    assert_eq!(found.oddities, Vec::<String>::new());
}

#[test]
fn garbage_is_noted_and_harms_nothing_else() {
    let tree = Tree::new();
    tree.port("odd", ["\u{1F980}", "Token Ring", "fast"]).gid("odd", 0, ["not an address", "RoCE v9", "e"]);
    tree.file("class/infiniband/odd/ports/one/state", "4: ACTIVE");
    tree.file("class/infiniband/odd/device/numa_node", [0xff, 0xfe]);
    tree.file("class/infiniband/file", "no directory");
    tree.file("class/infiniband/long/ports/1/rate", "9".repeat(100_000));
    tree.port("right", ["4: ACTIVE", "InfiniBand", "100 Gb/sec (4X EDR)"]);
    let found = tree.discover();
    assert_eq!(found.usable_ports().map(|(device, _)| device.name.as_str()).collect::<Vec<_>>(), ["right"]);
    let odd = found.devices.iter().find(|device| device.name == "odd").unwrap();
    assert_eq!((odd.numa_node, odd.ports.len()), (None, 1));
    assert_eq!((odd.ports[0].state, odd.ports[0].link_layer), (PortState::Unknown, LinkLayer::Unknown));
    assert_eq!((odd.ports[0].rate_mbit, odd.ports[0].gids.len()), (None, 0));
    assert!(found.oddities.len() >= 5, "{:?}", found.oddities);
    assert!(found.to_string().contains("not understood: "));
}

#[test]
fn tables_beyond_the_bounds_are_cut() {
    let tree = Tree::new();
    for n in 0..MAX_DEVICES + 3 {
        tree.port(&format!("d{n}"), ["4: ACTIVE", "InfiniBand", "1 Gb/sec"]);
    }
    let found = tree.discover();
    assert_eq!((found.devices.len(), found.oddities.len()), (MAX_DEVICES, 1));
}

#[test]
fn a_machine_without_devices_has_none() {
    let found = Tree::new().discover();
    assert_eq!(found, Inventory::default());
    assert_eq!(found.to_string(), "no RDMA devices: blocks move over TCP\n");
    let _this_machine_is_no_reason_to_panic = discover(Path::new(SYSFS));
}
