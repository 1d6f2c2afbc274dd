//! Addresses and descriptors of the TCP transport.
//!
//! ```text
//! address     'T' | version u16 | instance 16 | count u8 | count x (length u8 | host:port)
//! descriptor  't' | version u16 | instance 16 | capability 16 | bytes u64
//! ```
//! The instance is drawn when a transport starts: a process that was restarted on the same port is another one.

use bytes::{BufMut, Bytes, BytesMut};

use super::wire::{Token, VERSION};
use crate::{Descriptor, Kind, TransportError};

/// Most hosts of one address.
const MAX_HOSTS: usize = 8;
const DESCRIPTOR_BYTES: usize = 43;

/// Where a node can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) instance: Token,
    /// `host:port`, tried in this order.
    pub(super) hosts: Vec<String>,
}

impl Address {
    pub(super) fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::new();
        bytes.put_u8(b'T');
        bytes.put_u16_le(VERSION);
        bytes.put_slice(&self.instance);
        let hosts = self.hosts.iter().filter_map(|host| Some((u8::try_from(host.len()).ok()?, host)));
        let hosts: Vec<_> = hosts.take(MAX_HOSTS).collect();
        bytes.put_u8(u8::try_from(hosts.len()).unwrap_or(u8::MAX));
        for (len, host) in hosts {
            bytes.put_u8(len);
            bytes.put_slice(host.as_bytes());
        }
        bytes.freeze()
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, TransportError> {
        let bad = |what| TransportError::BadDescriptor { what };
        let rest = versioned(bytes, b'T')?;
        let (instance, rest) = rest.split_first_chunk().ok_or(bad("the address is too short"))?;
        let (count, mut rest) = rest.split_first().ok_or(bad("the address is too short"))?;
        if *count == 0 || usize::from(*count) > MAX_HOSTS {
            return Err(bad("the address has no hosts or too many"));
        }
        let mut hosts = Vec::new();
        for _ in 0..*count {
            let (len, after) = rest.split_first().ok_or(bad("the address is too short"))?;
            let (host, after) = after.split_at_checked(usize::from(*len)).ok_or(bad("the address is too short"))?;
            let host = std::str::from_utf8(host).map_err(|_| bad("a host of the address is no text"))?;
            hosts.push(host.to_owned());
            rest = after;
        }
        if !rest.is_empty() {
            return Err(bad("the address is too long"));
        }
        Ok(Self { instance: *instance, hosts })
    }
}

/// What a descriptor says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exposed {
    pub(super) instance: Token,
    pub(super) capability: Token,
    pub(super) bytes: u64,
}

impl Exposed {
    pub(super) fn encode(self) -> Result<Descriptor, TransportError> {
        let mut bytes = BytesMut::with_capacity(DESCRIPTOR_BYTES);
        bytes.put_u8(b't');
        bytes.put_u16_le(VERSION);
        bytes.put_slice(&self.instance);
        bytes.put_slice(&self.capability);
        bytes.put_u64_le(self.bytes);
        Descriptor::new(bytes.freeze())
    }

    pub(super) fn decode(descriptor: &Descriptor) -> Result<Self, TransportError> {
        let rest = versioned(descriptor.as_bytes(), b't')?;
        let fields = (|| {
            let (instance, rest) = rest.split_first_chunk()?;
            let (capability, rest) = rest.split_first_chunk()?;
            let bytes = u64::from_le_bytes(rest.try_into().ok()?);
            Some(Self { instance: *instance, capability: *capability, bytes })
        })();
        fields.ok_or(TransportError::BadDescriptor { what: "the descriptor has another length" })
    }
}

/// What follows the kind and the version.
fn versioned(bytes: &[u8], kind: u8) -> Result<&[u8], TransportError> {
    let bad = TransportError::BadDescriptor { what: "not of the TCP transport" };
    let Some((head, rest)) = bytes.split_first_chunk::<3>() else { return Err(bad) };
    if head[0] != kind {
        return Err(bad);
    }
    other_version(u16::from_le_bytes([head[1], head[2]])).map_or(Ok(rest), Err)
}

/// The error for a peer of another version than ours.
pub(super) fn other_version(theirs: u16) -> Option<TransportError> {
    let kind = Kind::Tcp.name();
    let (theirs, ours) = (theirs != VERSION).then(|| (theirs.to_string(), VERSION.to_string()))?;
    Some(TransportError::Version { kind, theirs, ours })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::wire::token;

    #[test]
    fn addresses_and_descriptors_come_back_and_damage_is_told() {
        let address = Address { instance: token(), hosts: vec!["a.example:1".into(), "[::1]:65535".into()] };
        let bytes = address.encode();
        assert_eq!(Address::decode(&bytes).unwrap(), address);
        for len in 0..bytes.len() {
            assert!(Address::decode(&bytes[..len]).is_err(), "{len}");
        }
        let exposed = Exposed { instance: token(), capability: token(), bytes: 1 << 33 };
        let descriptor = exposed.encode().unwrap();
        assert_eq!((descriptor.as_bytes().len(), Exposed::decode(&descriptor).unwrap()), (DESCRIPTOR_BYTES, exposed));
        for len in 0..DESCRIPTOR_BYTES {
            let short = Descriptor::new(descriptor.as_bytes().slice(..len)).unwrap();
            assert!(matches!(Exposed::decode(&short), Err(TransportError::BadDescriptor { .. })), "{len}");
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = Address { instance: token(), hosts: vec!["a:1".into()] }.encode().to_vec();
        bytes[1] = 9;
        let error = Address::decode(&bytes).unwrap_err();
        assert!(matches!(&error, TransportError::Version { theirs, .. } if theirs == "9"), "{error}");
    }
}
