//! Reading the tree. Whatever is missing or odd is left out, never an error.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::net::Ipv6Addr;
use std::path::Path;

use super::{Device, Gid, GidKind, Inventory, LinkLayer, MAX_DEVICES, MAX_GIDS, MAX_PORTS, Port, PortState};

/// Longest file that is read: sysfs shows one page.
const MAX_FILE_BYTES: u64 = 4096;
/// Most oddities kept.
const MAX_ODDITIES: usize = 32;

/// Looks at the tree under `root`, which is [`super::SYSFS`] but in tests.
#[must_use]
pub fn discover(root: &Path) -> Inventory {
    let mut odd = Oddities(Vec::new());
    let class = root.join("class/infiniband");
    let names = entries(&class, MAX_DEVICES, &mut odd);
    let devices = names.into_iter().map(|name| device(&class.join(&name), name, &mut odd)).collect();
    Inventory { devices, peer_memory: root.join("module/nvidia_peermem").is_dir(), oddities: odd.0 }
}

/// What was not understood.
struct Oddities(Vec<String>);

impl Oddities {
    fn note(&mut self, path: &Path, what: &str) {
        if self.0.len() < MAX_ODDITIES {
            self.0.push(format!("{}: {what}", path.display()));
        }
    }
}

fn device(path: &Path, name: String, odd: &mut Oddities) -> Device {
    // -1 where the machine has one node.
    let numa_node = text(&path.join("device/numa_node"), odd).and_then(|node| node.parse().ok());
    let interfaces = entries(&path.join("device/net"), MAX_PORTS, odd);
    let ports = path.join("ports");
    let mut numbers: Vec<u32> = Vec::new();
    for entry in entries(&ports, MAX_PORTS, odd) {
        match entry.parse() {
            Ok(number) => numbers.push(number),
            Err(_) => odd.note(&ports.join(entry), "no port number"),
        }
    }
    numbers.sort_unstable();
    let ports = numbers.into_iter().map(|number| port(&ports.join(number.to_string()), number, odd)).collect();
    Device { name, numa_node, interfaces, ports }
}

fn port(path: &Path, number: u32, odd: &mut Oddities) -> Port {
    let mut read = |file: &str| {
        let found = text(&path.join(file), odd);
        found.unwrap_or_default()
    };
    let (state, link_layer, rate) = (read("state"), read("link_layer"), read("rate"));
    let port = Port {
        number,
        state: parse_state(&state),
        link_layer: parse_link_layer(&link_layer),
        rate_mbit: parse_rate_mbit(&rate),
        gids: gids(path, odd),
    };
    if port.state == PortState::Unknown {
        odd.note(&path.join("state"), &format!("{state:?}"));
    }
    if port.link_layer == LinkLayer::Unknown {
        odd.note(&path.join("link_layer"), &format!("{link_layer:?}"));
    }
    port
}

fn gids(port: &Path, odd: &mut Oddities) -> Vec<Gid> {
    let mut gids = Vec::new();
    for entry in entries(&port.join("gids"), MAX_GIDS, odd) {
        let path = port.join("gids").join(&entry);
        let Some(written) = text(&path, odd) else { continue };
        match (entry.parse(), written.parse::<Ipv6Addr>()) {
            (Ok(index), Ok(address)) if !is_unused(address) => {
                let attribute = |kind: &str| quiet_text(&port.join("gid_attrs").join(kind).join(&entry));
                let kind = attribute("types").map_or(GidKind::Unknown, |kind| parse_gid_kind(&kind));
                gids.push(Gid { index, address, kind, interface: attribute("ndevs") });
            }
            (Ok(_), Ok(_)) => {}
            _ => odd.note(&path, &format!("{written:?}")),
        }
    }
    gids.sort_by_key(|gid: &Gid| gid.index);
    gids
}

/// Entries that were never filled: zero, or the default prefix alone.
fn is_unused(address: Ipv6Addr) -> bool {
    address.segments()[4..] == [0; 4]
}

/// Such as `4: ACTIVE`.
fn parse_state(text: &str) -> PortState {
    match text.split_once(':').map(|(number, _)| number.trim()) {
        Some("4") => PortState::Active,
        Some("0" | "1" | "2" | "3" | "5") => PortState::Down,
        _ => PortState::Unknown,
    }
}

fn parse_link_layer(text: &str) -> LinkLayer {
    match text {
        "InfiniBand" => LinkLayer::InfiniBand,
        "Ethernet" => LinkLayer::Ethernet,
        _ => LinkLayer::Unknown,
    }
}

/// Such as `100 Gb/sec (4X EDR)` or `2.5 Gb/sec (1X SDR)`.
fn parse_rate_mbit(text: &str) -> Option<u64> {
    let (number, _) = text.split_once(" Gb/sec")?;
    let (whole, tenths) = number.split_once('.').unwrap_or((number, "0"));
    let (whole, tenths): (u64, u64) = (whole.parse().ok()?, tenths.get(..1)?.parse().ok()?);
    whole.checked_mul(1000)?.checked_add(tenths * 100)
}

fn parse_gid_kind(text: &str) -> GidKind {
    match text {
        "IB/RoCE v1" => GidKind::Unrouted,
        "RoCE v2" => GidKind::RoceV2,
        _ => GidKind::Unknown,
    }
}

/// Names in a directory, sorted; none if it is not there.
fn entries(path: &Path, most: usize, odd: &mut Oddities) -> Vec<String> {
    let found = match fs::read_dir(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            odd.note(path, &error.to_string());
            return Vec::new();
        }
    };
    let mut names: Vec<_> = found.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    // Numbers by value, so that the bound keeps the first ones.
    names.sort_by_key(|name| (name.parse::<u32>().ok(), name.clone()));
    if names.len() > most {
        odd.note(path, &format!("{} entries, the first {most} are looked at", names.len()));
        names.truncate(most);
    }
    names
}

/// A file's text without the spaces around it; notes what cannot be read.
fn text(path: &Path, odd: &mut Oddities) -> Option<String> {
    match read(path) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => {
            odd.note(path, &error.to_string());
            None
        }
    }
}

/// As [`text`]: attributes of empty table entries answer `EINVAL`, which is nothing to note.
fn quiet_text(path: &Path) -> Option<String> {
    read(path).ok()
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE_BYTES).read_to_string(&mut text)?;
    Ok(text.trim().to_owned())
}
