//! RDMA devices and ports of this machine, as sysfs tells them: nothing is opened, no library is needed.
//!
//! ```text
//! class/infiniband/<device>/device/numa_node, device/net/<interface>
//! class/infiniband/<device>/ports/<n>/state, rate, link_layer, gids/<i>, gid_attrs/types/<i>, gid_attrs/ndevs/<i>
//! module/nvidia_peermem                          the driver lets NICs reach GPU memory
//! ```
//! (Linux, `Documentation/ABI/stable/sysfs-class-infiniband`.)
//!
//! *Bounds*: [`MAX_DEVICES`], [`MAX_PORTS`], [`MAX_GIDS`], files of at most 4 KiB.

mod sysfs;
#[cfg(feature = "verbs")]
pub mod verbs;

use std::fmt;
use std::net::Ipv6Addr;

pub use sysfs::discover;

/// Where sysfs is mounted.
pub const SYSFS: &str = "/sys";
/// Most devices that are looked at.
pub const MAX_DEVICES: usize = 64;
/// Most ports of one device that are looked at.
pub const MAX_PORTS: usize = 16;
/// Most entries of one port's GID table that are looked at.
pub const MAX_GIDS: usize = 256;

/// What the machine has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// By name.
    pub devices: Vec<Device>,
    /// Whether `nvidia_peermem` is loaded: NICs can then register GPU memory without dmabuf.
    pub peer_memory: bool,
    /// What was there and could not be understood, for humans.
    pub oddities: Vec<String>,
}

/// An RDMA device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// As the kernel calls it, such as `mlx5_0`.
    pub name: String,
    /// NUMA node it is attached to, where the machine has several.
    pub numa_node: Option<u32>,
    /// Its network interfaces, by name.
    pub interfaces: Vec<String>,
    /// By number.
    pub ports: Vec<Port>,
}

/// A port of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// From 1.
    pub number: u32,
    /// Whether it carries traffic.
    pub state: PortState,
    /// What it is joined to.
    pub link_layer: LinkLayer,
    /// Megabits per second.
    pub rate_mbit: Option<u64>,
    /// Entries of its GID table that are in use, by index.
    pub gids: Vec<Gid>,
}

/// State of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortState {
    /// Carries traffic.
    Active,
    /// Does not, whatever the step it is at.
    Down,
    /// The kernel says something else.
    Unknown,
}

/// What a port is joined to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkLayer {
    /// An InfiniBand fabric.
    InfiniBand,
    /// Ethernet: RDMA is RoCE then.
    Ethernet,
    /// The kernel says something else.
    Unknown,
}

/// An address of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gid {
    /// Its index in the table, which UCX calls `GID_INDEX`.
    pub index: u32,
    /// IPv6, or IPv4 mapped into it.
    pub address: Ipv6Addr,
    /// How packets to it are framed.
    pub kind: GidKind,
    /// The interface it comes from.
    pub interface: Option<String>,
}

/// How packets are framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GidKind {
    /// InfiniBand, or RoCE v1 on Ethernet, which cannot be routed.
    Unrouted,
    /// RoCE v2: over UDP.
    RoceV2,
    /// The kernel says something else.
    Unknown,
}

impl Port {
    /// Whether blocks can move over it: it is active, and on Ethernet it has an address for RoCE v2.
    #[must_use]
    pub fn usable(&self) -> bool {
        self.state == PortState::Active
            && match self.link_layer {
                LinkLayer::InfiniBand => true,
                LinkLayer::Ethernet => self.roce_gid().is_some(),
                LinkLayer::Unknown => false,
            }
    }

    /// The address to use for RoCE v2: one that routers carry before a link-local one.
    #[must_use]
    pub fn roce_gid(&self) -> Option<&Gid> {
        let routed = self.gids.iter().filter(|gid| gid.kind == GidKind::RoceV2);
        routed.min_by_key(|gid| (gid.address.is_unicast_link_local(), gid.index))
    }
}

impl Inventory {
    /// Ports that blocks can move over, with their devices.
    pub fn usable_ports(&self) -> impl Iterator<Item = (&Device, &Port)> {
        let ports = self.devices.iter().flat_map(|device| device.ports.iter().map(move |port| (device, port)));
        ports.filter(|(_, port)| port.usable())
    }
}

/// One line for each port, for operators.
impl fmt::Display for Inventory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.devices.is_empty() {
            writeln!(f, "no RDMA devices: blocks move over TCP")?;
        }
        for device in &self.devices {
            if device.ports.is_empty() {
                writeln!(f, "{}: no ports", device.name)?;
            }
            for port in &device.ports {
                write!(f, "{} port {port}", device.name)?;
                if let Some(node) = device.numa_node {
                    write!(f, ", NUMA node {node}")?;
                }
                if !device.interfaces.is_empty() {
                    write!(f, ", {}", device.interfaces.join(" "))?;
                }
                writeln!(f)?;
            }
        }
        if !self.devices.is_empty() {
            writeln!(f, "nvidia_peermem is {}", if self.peer_memory { "loaded" } else { "not loaded" })?;
        }
        self.oddities.iter().try_for_each(|odd| writeln!(f, "not understood: {odd}"))
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layer = match self.link_layer {
            LinkLayer::InfiniBand => "InfiniBand",
            LinkLayer::Ethernet => "Ethernet",
            LinkLayer::Unknown => "unknown link",
        };
        let state = match self.state {
            PortState::Active => "active",
            PortState::Down => "down",
            PortState::Unknown => "in an unknown state",
        };
        write!(f, "{}: {layer}, {state}", self.number)?;
        match self.rate_mbit {
            Some(rate) if rate.is_multiple_of(1000) => write!(f, ", {} Gb/s", rate / 1000)?,
            Some(rate) => write!(f, ", {rate} Mb/s")?,
            None => {}
        }
        match (self.link_layer, self.roce_gid()) {
            (LinkLayer::Ethernet, Some(gid)) => write!(f, ", RoCE v2 by GID {} ({})", gid.index, gid.address),
            (LinkLayer::Ethernet, None) => write!(f, ", no RoCE v2 address"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
