//! Which devices there are, and opening one.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::cuda::{self, CudaDevice};
use crate::twin::{TwinConfig, TwinDevice};
use crate::{Device, DeviceError};

/// Where devices come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// NVIDIA's driver, as far as it is there.
    #[default]
    Cuda,
    /// The twin: host memory that behaves as a device's. For tests: it is never faster than host memory.
    Twin,
}

/// The text names no backend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown device backend {0:?}: expected \"cuda\" or \"twin\"")]
pub struct UnknownBackend(pub String);

impl FromStr for Backend {
    type Err = UnknownBackend;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "cuda" => Ok(Self::Cuda),
            "twin" => Ok(Self::Twin),
            _ => Err(UnknownBackend(text.to_owned())),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cuda => "cuda",
            Self::Twin => "twin",
        })
    }
}

/// What a look for devices found.
#[derive(Debug)]
pub struct Found {
    /// Their numbers in this process, from 0.
    pub devices: u32,
    /// The driver's version as 1000 * major + 10 * minor; 0 for the twin.
    pub driver: u32,
}

/// Looks for devices. Takes no device memory.
///
/// # Errors
/// [`DeviceError::Absent`] with the reason where there is none, [`DeviceError::MissingSymbol`].
pub fn find(backend: Backend) -> Result<Found, DeviceError> {
    match backend {
        Backend::Cuda => cuda::find(),
        Backend::Twin => Ok(Found { devices: 1, driver: 0 }),
    }
}

/// Opens a device. A process's access to a GPU takes some hundred MiB of its memory, shared with the engine's where it is
/// the same process.
///
/// # Errors
/// As [`find`]; [`DeviceError::Call`], [`DeviceError::NoMemory`].
pub fn open(backend: Backend, ordinal: u32) -> Result<Arc<dyn Device>, DeviceError> {
    match backend {
        Backend::Cuda => Ok(Arc::new(CudaDevice::open(ordinal)?)),
        Backend::Twin => Ok(Arc::new(TwinDevice::new(TwinConfig { ordinal, ..TwinConfig::default() })?)),
    }
}
