//! RDMA devices as sysfs shows them: no library is needed to see what a node has.
//!
//! ```text
//! /sys/class/infiniband/<device>/ports/<n>/{state, rate, link_layer}        state is "4: ACTIVE", rate "100 Gb/sec (4X EDR)"
//! ```

use super::Finding;
use super::root::Root;

const DEVICES: &str = "/sys/class/infiniband";
/// Module by which a NIC reads GPU memory.
const PEER_MEMORY: &str = "/sys/module/nvidia_peermem";

pub(super) fn examine(root: &Root) -> Vec<Finding> {
    let devices = root.list(DEVICES);
    if devices.is_empty() {
        let meaning = "blocks move between nodes over TCP";
        let advice = "nothing, unless the node has an RDMA NIC: then load its driver and mount /sys";
        return vec![Finding::absent("RDMA", "no devices", (meaning, advice))];
    }
    let mut findings: Vec<Finding> = devices.iter().flat_map(|device| ports(root, device)).collect();
    findings.push(peer_memory(root));
    findings
}

fn ports(root: &Root, device: &str) -> Vec<Finding> {
    let dir = format!("{DEVICES}/{device}/ports");
    let ports = root.list(&dir);
    if ports.is_empty() {
        let advice = "see the kernel log of its driver";
        return vec![Finding::warn(&format!("RDMA {device}"), "no ports", ("the device is of no use", advice))];
    }
    ports.iter().map(|port| judge_port(root, device, &format!("{dir}/{port}"), port)).collect()
}

fn judge_port(root: &Root, device: &str, dir: &str, port: &str) -> Finding {
    let attribute = |name: &str| root.read(format!("{dir}/{name}")).filter(|text| !text.is_empty());
    let unknown = || "unknown".to_owned();
    // "4: ACTIVE": the word is for people, and so is our line.
    let state =
        attribute("state").map_or_else(unknown, |s| s.split_once(": ").map_or(s.clone(), |(_, word)| word.to_owned()));
    let rate = attribute("rate").unwrap_or_else(unknown);
    let link = attribute("link_layer").unwrap_or_else(unknown);
    let check = format!("RDMA {device}/{port}");
    let found = format!("{state}, {rate}, {link}");
    match state.as_str() {
        "ACTIVE" if link == "Ethernet" => {
            Finding::ok(&check, found).meaning("RoCE: the fabric must be lossless or the NIC set up for loss")
        }
        "ACTIVE" => Finding::ok(&check, found),
        "INIT" if link == "InfiniBand" => {
            Finding::warn(&check, found, ("the port waits for a subnet manager", "start one (opensm) on the fabric"))
        }
        _ => Finding::warn(&check, found, ("the port carries nothing", "check the cable, the switch and `ip link`")),
    }
}

fn peer_memory(root: &Root) -> Finding {
    if root.path(PEER_MEMORY).is_dir() {
        return Finding::ok("nvidia_peermem", "loaded");
    }
    let meaning = "device blocks go through host memory, unless driver and NIC do it by dma-buf";
    Finding::absent("nvidia_peermem", "not loaded", (meaning, "modprobe nvidia_peermem on a GPU node"))
}
