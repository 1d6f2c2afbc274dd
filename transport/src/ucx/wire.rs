//! Addresses and descriptors as bytes.
//!
//! ```text
//! address     "KVUA" | protocol u16 | UCX major u16 | minor u16 | token 16 | greeting u64
//!             | worker address length u16 | key length u16 | worker address | key of the greeting | CRC-64 u64
//! descriptor  "KVUD" | token 16 | address u64 | length u64 | key length u16 | key | CRC-64 u64
//! ```
//! Little-endian. The CRC-64/NVME covers all bytes before it. UCX does not survive every address or key that is damaged:
//! these checks keep damage away from it. They do not keep out a peer that lies, which the cluster's authentication does.

use bytes::{Buf, BufMut, Bytes};
use kvtier_memory::checksum::checksum;

use crate::{Descriptor, Kind, MAX_ADDRESS_BYTES, TransportError};

/// Version of this file's formats and of what a reader may do with them.
const PROTOCOL: u16 = 1;
const ADDRESS_MAGIC: [u8; 4] = *b"KVUA";
const DESCRIPTOR_MAGIC: [u8; 4] = *b"KVUD";
const CRC_BYTES: usize = 8;
/// Bytes of an address before its variable parts.
const ADDRESS_HEAD_BYTES: usize = 4 + 6 + 16 + 8 + 4;
/// Bytes of a descriptor before its key.
const DESCRIPTOR_HEAD_BYTES: usize = 4 + 16 + 8 + 8 + 2;

/// Names one run of one transport; random.
pub(super) type Token = [u8; 16];

/// What a reader needs to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    /// UCX's major and minor version.
    pub(super) version: (u16, u16),
    pub(super) token: Token,
    /// UCX's address of the worker.
    pub(super) worker: Bytes,
    /// Where the peer's greeting lies, which proves that it is there and is who it says.
    pub(super) greeting: u64,
    pub(super) key: Bytes,
}

impl Address {
    /// As bytes; `None` when they would be too many.
    pub(super) fn encode(&self) -> Option<Bytes> {
        let mut out = Vec::with_capacity(ADDRESS_HEAD_BYTES + self.worker.len() + self.key.len() + CRC_BYTES);
        out.put_slice(&ADDRESS_MAGIC);
        out.put_u16_le(PROTOCOL);
        out.put_u16_le(self.version.0);
        out.put_u16_le(self.version.1);
        out.put_slice(&self.token);
        out.put_u64_le(self.greeting);
        out.put_u16_le(u16::try_from(self.worker.len()).ok()?);
        out.put_u16_le(u16::try_from(self.key.len()).ok()?);
        out.put_slice(&self.worker);
        out.put_slice(&self.key);
        Some(seal(out)).filter(|bytes| bytes.len() <= MAX_ADDRESS_BYTES)
    }

    /// From a peer's bytes, for a library of version `ours`.
    pub(super) fn decode(bytes: &[u8], ours: (u16, u16)) -> Result<Self, TransportError> {
        let bad = |what| TransportError::BadDescriptor { what };
        if bytes.len() > MAX_ADDRESS_BYTES {
            return Err(bad("an address that is too long"));
        }
        let Some(mut rest) = bytes.strip_prefix(&ADDRESS_MAGIC) else { return Err(bad("no UCX address")) };
        // First of all: what follows may differ between protocols.
        let protocol = rest.try_get_u16_le().map_err(|_| bad("a truncated address"))?;
        if protocol != PROTOCOL {
            return Err(version_error(format!("protocol {protocol}"), format!("protocol {PROTOCOL}")));
        }
        let body = unseal(bytes).ok_or(bad("a damaged address"))?;
        let mut rest = body.get(ADDRESS_MAGIC.len() + 2..).ok_or(bad("a truncated address"))?;
        if rest.len() + ADDRESS_MAGIC.len() + 2 < ADDRESS_HEAD_BYTES {
            return Err(bad("a truncated address"));
        }
        let version = (rest.get_u16_le(), rest.get_u16_le());
        if version != ours {
            let name = |(major, minor)| format!("UCX {major}.{minor}");
            return Err(version_error(name(version), name(ours)));
        }
        let token = take_token(&mut rest);
        let greeting = rest.get_u64_le();
        let (worker, key) = (usize::from(rest.get_u16_le()), usize::from(rest.get_u16_le()));
        if rest.len() != worker + key || worker == 0 || key == 0 {
            return Err(bad("an address with wrong lengths"));
        }
        let (worker, key) = rest.split_at(worker);
        let (worker, key) = (Bytes::copy_from_slice(worker), Bytes::copy_from_slice(key));
        Ok(Self { version, token, worker, greeting, key })
    }
}

/// Where exposed bytes lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) token: Token,
    /// Address of the first byte in the peer.
    pub(super) address: u64,
    /// Bytes.
    pub(super) len: u64,
    pub(super) key: Bytes,
}

impl Place {
    pub(super) fn encode(&self) -> Result<Descriptor, TransportError> {
        let mut out = Vec::with_capacity(DESCRIPTOR_HEAD_BYTES + self.key.len() + CRC_BYTES);
        out.put_slice(&DESCRIPTOR_MAGIC);
        out.put_slice(&self.token);
        out.put_u64_le(self.address);
        out.put_u64_le(self.len);
        let too_long = |_| TransportError::BadDescriptor { what: "a key that is too long" };
        out.put_u16_le(u16::try_from(self.key.len()).map_err(too_long)?);
        out.put_slice(&self.key);
        Descriptor::new(seal(out))
    }

    pub(super) fn decode(descriptor: &Descriptor) -> Result<Self, TransportError> {
        let bad = |what| TransportError::BadDescriptor { what };
        let bytes = descriptor.as_bytes();
        if !bytes.starts_with(&DESCRIPTOR_MAGIC) {
            return Err(bad("no UCX descriptor"));
        }
        let body = unseal(bytes).ok_or(bad("a damaged descriptor"))?;
        if body.len() < DESCRIPTOR_HEAD_BYTES {
            return Err(bad("a truncated descriptor"));
        }
        let mut rest = &body[DESCRIPTOR_MAGIC.len()..];
        let token = take_token(&mut rest);
        let (address, len, key) = (rest.get_u64_le(), rest.get_u64_le(), usize::from(rest.get_u16_le()));
        if rest.len() != key || key == 0 {
            return Err(bad("a descriptor with a wrong length"));
        }
        if address.checked_add(len).is_none() {
            return Err(bad("a descriptor beyond the address space"));
        }
        let at = body.len() - key;
        Ok(Self { token, address, len, key: bytes.slice(at..at + key) })
    }
}

fn version_error(theirs: String, ours: String) -> TransportError {
    TransportError::Version { kind: Kind::Ucx.name(), theirs, ours }
}

fn take_token(from: &mut &[u8]) -> Token {
    let mut token = Token::default();
    from.copy_to_slice(&mut token);
    token
}

fn seal(mut body: Vec<u8>) -> Bytes {
    let crc = checksum(&body);
    body.put_u64_le(crc);
    body.into()
}

/// What is before the CRC, if that is right.
fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (body, crc) = bytes.split_last_chunk::<CRC_BYTES>()?;
    (checksum(body) == u64::from_le_bytes(*crc)).then_some(body)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::{Address, Place};
    use crate::{Descriptor, TransportError};

    fn address() -> Address {
        let (worker, key) = (Bytes::from_static(b"worker"), Bytes::from_static(b"key"));
        Address { version: (1, 13), token: [7; 16], worker, greeting: 0x1000, key }
    }

    fn place() -> Place {
        Place { token: [9; 16], address: 0x2000, len: 4096, key: Bytes::from_static(b"another key") }
    }

    #[test]
    fn addresses_and_descriptors_come_back_as_they_were() {
        let bytes = address().encode().expect("it is short");
        assert_eq!(Address::decode(&bytes, (1, 13)).expect("it is ours"), address());
        assert_eq!(Place::decode(&place().encode().expect("it is short")).expect("it is ours"), place());
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let bytes = address().encode().expect("it is short");
        let error = Address::decode(&bytes, (1, 22)).expect_err("versions differ");
        assert!(
            matches!(&error, TransportError::Version { theirs, ours, .. } if theirs == "UCX 1.13" && ours == "UCX 1.22")
        );
        let mut bytes = bytes.to_vec();
        bytes[4] = 2;
        let error = Address::decode(&bytes, (1, 13)).expect_err("protocols differ");
        assert!(matches!(&error, TransportError::Version { theirs, .. } if theirs == "protocol 2"), "{error}");
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_refused() {
        let address = address().encode().expect("it is short");
        let place = place().encode().expect("it is short");
        for bytes in [&address, place.as_bytes()] {
            let mutated = (0..bytes.len()).map(|len| bytes.slice(..len)).chain((0..bytes.len() * 8).map(|bit| {
                let mut flipped = bytes.to_vec();
                flipped[bit / 8] ^= 1 << (bit % 8);
                flipped.into()
            }));
            for bytes in mutated {
                assert!(Address::decode(&bytes, (1, 13)).is_err(), "{bytes:?}");
                assert!(Place::decode(&Descriptor::new(bytes).expect("it is short")).is_err());
            }
        }
    }
}
