//! Opens the devices of the configuration; what cannot be opened is absent, with the reason.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use kvtier_device::{Backend, Device, DeviceError, Methods, Pace};
use kvtier_types::DeviceNumber;
use parking_lot::Mutex;

use super::pool::Pool;
use super::{DeviceTier, Gpu, Reached};
use crate::config::Config;

/// Longest that looking for devices and opening them may take: a driver that hangs costs the tier, not the node.
const OPEN_DEADLINE: Duration = Duration::from_secs(30);
/// Set in generations of devices' frames and in none of host memory's.
pub(crate) const DEVICE_GENERATION: u64 = 1 << 63;
/// Where a device's number is in its generations.
const NUMBER_SHIFT: u32 = 58;

/// Opens all devices of a backend: those that could be, and why others could not.
pub(crate) type Opener = Box<dyn FnOnce(Backend) -> (Opened, String) + Send>;

/// The tier as configured. `first_generation` is of frames of host memory.
pub(crate) async fn open(config: &Config, first_generation: u64, opener: Opener) -> anyhow::Result<DeviceTier> {
    if config.device.memory.0 == 0 {
        let absent = "not configured: device.memory says how much of each GPU it may take".to_owned();
        return Ok(DeviceTier { gpus: Vec::new(), absent });
    }
    let backend = config.device_backend()?;
    let opening = tokio::task::spawn_blocking(move || opener(backend));
    let (devices, absent) = match tokio::time::timeout(OPEN_DEADLINE, opening).await {
        Ok(opened) => opened?,
        Err(_) => (Vec::new(), format!("the {backend} driver did not answer within {} s", OPEN_DEADLINE.as_secs())),
    };
    if !absent.is_empty() {
        tracing::error!(reason = absent, "{}", if devices.is_empty() { "no device tier" } else { "not all devices" });
    }
    let sizes = (config.device.memory.0, config.device.extent.0);
    let bandwidth = config.device.bandwidth.map(|rate| rate.0);
    let gpu = |(number, device): (DeviceNumber, Arc<dyn Device>)| {
        let first = first_generation_of(first_generation, number);
        tracing::info!(device = number.index(), id = %device.facts().id, name = device.facts().name, "device tier open");
        Arc::new(Gpu {
            number,
            methods: Methods::plain(&*device),
            pace: Pace::new(bandwidth),
            pool: Pool::new(number, first, sizes),
            reached: Mutex::new(Reached::default()),
            coming: Mutex::new(None),
            late: AtomicU32::new(0),
            lost: Mutex::new(None),
            device,
        })
    };
    Ok(DeviceTier { gpus: devices.into_iter().map(gpu).collect(), absent })
}

/// Random as that of host memory is, and told apart from it and from those of other devices.
fn first_generation_of(host: u64, device: DeviceNumber) -> u64 {
    let low = host & ((1 << NUMBER_SHIFT) - 1);
    DEVICE_GENERATION | ((device.index() as u64) << NUMBER_SHIFT) | low.max(1)
}

pub(crate) type Opened = Vec<(DeviceNumber, Arc<dyn Device>)>;

/// Those that there are.
pub(crate) fn open_all(backend: Backend) -> (Opened, String) {
    let found = match kvtier_device::find(backend) {
        Ok(found) => found,
        Err(error) => return (Vec::new(), error.to_string()),
    };
    let (mut devices, mut failed) = (Opened::new(), Vec::new());
    for (number, ordinal) in (0..).map_while(DeviceNumber::new).zip(0..found.devices) {
        match kvtier_device::open(backend, ordinal) {
            Ok(device) => devices.push((number, device)),
            Err(error) => failed.push(no_device(ordinal, &error)),
        }
    }
    (devices, failed.join("; "))
}

fn no_device(ordinal: u32, error: &DeviceError) -> String {
    format!("device {ordinal}: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_of_devices_are_nobody_elses() {
        for host in [0, 1, u64::MAX, 0x1234_5678 << 32] {
            let of = |n| first_generation_of(host, DeviceNumber::new(n).unwrap());
            assert!((0..32).all(|n| of(n) & DEVICE_GENERATION != 0 && of(n) >> NUMBER_SHIFT == 32 + u64::from(n)));
        }
    }
}
