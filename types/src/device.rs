//! GPUs and the memory of them that a node keeps blocks in.

use std::fmt;

/// A GPU's identity, the same in every process that sees it: the 16 bytes of its UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId([u8; 16]);

impl DeviceId {
    /// Wraps the bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    /// As `nvidia-smi` prints it: `GPU-` and the UUID in its five groups.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        let groups = [0..4, 4..6, 6..8, 8..10, 10..16];
        groups.into_iter().try_for_each(|group| {
            f.write_str("-")?;
            self.0[group].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
        })
    }
}

/// Number of one of a node's devices, in the order of its configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber(u8);

impl DeviceNumber {
    /// Most devices of a node.
    pub const MAX: usize = 32;

    /// Wraps the number; `None` from [`Self::MAX`] on.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if (number as usize) < Self::MAX { Some(Self(number)) } else { None }
    }

    /// The number.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The device that an extent lies in; `None` for one of host memory.
    #[must_use]
    pub const fn of_extent(extent: u32) -> Option<Self> {
        if extent & DEVICE_EXTENT == 0 { None } else { Self::new(((extent >> DEVICE_SHIFT) & DEVICE_MASK) as u8) }
    }

    /// The number, among all extents of the node, of the device's extent `index`; `None` beyond [`MAX_DEVICE_EXTENTS`].
    #[must_use]
    pub const fn extent(self, index: u32) -> Option<u32> {
        if index < MAX_DEVICE_EXTENTS { Some(DEVICE_EXTENT | ((self.0 as u32) << DEVICE_SHIFT) | index) } else { None }
    }
}

/// ```text
/// extent | 1 bit: on a device | 5 bits: which | 26 bits: number of the extent there |
/// ```
const DEVICE_EXTENT: u32 = 1 << 31;
const DEVICE_SHIFT: u32 = 26;
const DEVICE_MASK: u32 = 31;
/// Extents that a device may have had: their numbers are not used twice in a daemon's life.
pub const MAX_DEVICE_EXTENTS: u32 = 1 << DEVICE_SHIFT;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_say_where_they_lie() {
        assert_eq!(DeviceNumber::of_extent(7), None);
        assert_eq!(DeviceNumber::of_extent(u32::MAX >> 1), None);
        let last = DeviceNumber::new(31).unwrap();
        for (device, index) in [(DeviceNumber::new(0).unwrap(), 0), (last, 5), (last, MAX_DEVICE_EXTENTS - 1)] {
            let extent = device.extent(index).unwrap();
            assert_eq!(DeviceNumber::of_extent(extent), Some(device));
        }
        assert_eq!(last.extent(MAX_DEVICE_EXTENTS), None);
        assert_eq!(DeviceNumber::new(32), None);
    }

    #[test]
    fn ids_read_as_nvidia_smi_prints_them() {
        let id = DeviceId::new(std::array::from_fn(|i| u8::try_from(i * 17).unwrap()));
        assert_eq!(id.to_string(), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }
}
