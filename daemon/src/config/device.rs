//! What the device tier may take.

use kvtier_device::Backend;
use serde::Deserialize;

use super::{Config, ConfigError};
use crate::units::ByteSize;

/// What devices give memory out in.
const GRANULARITY: u64 = 2 << 20;

/// The device tier.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Device {
    /// Most memory of each GPU for blocks; none by default, and then there is no device tier.
    pub memory: ByteSize,
    /// Where devices come from: `cuda`, or `twin`, which is host memory, for tests.
    pub backend: String,
    /// Memory that is left free for engines: below it blocks give way, and only above twice as much more is taken.
    pub reserve: ByteSize,
    /// Size of an extent, the unit in which memory is taken and given back.
    pub extent: ByteSize,
    /// Most bytes a second that are copied to and from a device; as many as come where it is not set.
    pub bandwidth: Option<ByteSize>,
}

impl Default for Device {
    fn default() -> Self {
        Self {
            memory: ByteSize(0),
            backend: "cuda".into(),
            reserve: ByteSize(1 << 30),
            extent: ByteSize(256 << 20),
            bandwidth: None,
        }
    }
}

impl Config {
    /// Where devices come from.
    ///
    /// # Errors
    /// [`ConfigError::Field`] for an unknown backend.
    pub fn device_backend(&self) -> Result<Backend, ConfigError> {
        let bad =
            |e: kvtier_device::UnknownBackend| ConfigError::Field { field: "device.backend", reason: e.to_string() };
        self.device.backend.parse().map_err(bad)
    }

    pub(super) fn check_device(&self) -> Result<(), ConfigError> {
        let field = |field, reason: String| Err(ConfigError::Field { field, reason });
        let Device { memory, extent, bandwidth, .. } = &self.device;
        self.device_backend()?;
        if extent.0 == 0 || extent.0 > 1 << 30 || !extent.0.is_multiple_of(GRANULARITY) {
            return field("device.extent", format!("{extent} is not a multiple of 2 MiB of at most 1 GiB"));
        }
        if memory.0 > 0 && memory < extent {
            return field("device.memory", format!("{memory} is less than one extent of {extent}"));
        }
        if bandwidth.is_some_and(|rate| rate.0 == 0) {
            return field("device.bandwidth", "nothing could be copied: leave it out for as much as comes".into());
        }
        Ok(())
    }
}
