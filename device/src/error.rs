//! What can go wrong with a device: one variant per thing a caller does differently.

/// An error of this crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// There is no device to open: no library, no driver, or no GPU. Go on without.
    #[error("{why}")]
    Absent {
        /// Why, and what to do about it.
        why: String,
    },
    /// The library lacks a function: the driver is older than what this needs.
    #[error("the CUDA driver lacks {name}: install a newer one")]
    MissingSymbol {
        /// The function.
        name: &'static str,
    },
    /// This device or driver cannot do it; the rest works.
    #[error("{what} is not supported here")]
    Unsupported {
        /// What it cannot do.
        what: &'static str,
    },
    /// Too little device memory is free.
    #[error("no {bytes} bytes of device memory are free")]
    NoMemory {
        /// Bytes asked for.
        bytes: u64,
    },
    /// Too much is under way: later.
    #[error("too much is under way on the device")]
    Busy,
    /// The request makes no sense: a bug of the caller's.
    #[error("the device refuses a work: {what}")]
    Invalid {
        /// Which rule it breaks.
        what: &'static str,
    },
    /// A call of the driver failed; the device still works.
    #[error("{call} failed: {name} ({code})")]
    Call {
        /// The function.
        call: &'static str,
        /// The driver's number.
        code: i32,
        /// The driver's name for it.
        name: String,
    },
    /// The device, or this process's access to it, is lost: nothing more of it will work in this process.
    #[error("the device is lost: {call} answered {name} ({code})")]
    Lost {
        /// The function that told it.
        call: &'static str,
        /// The driver's number.
        code: i32,
        /// The driver's name for it.
        name: String,
    },
}
