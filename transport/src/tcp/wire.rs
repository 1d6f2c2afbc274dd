//! What goes over a stream: a hello each way, then requests one way and replies, in their order, the other way.
//!
//! ```text
//! hello    magic 8 | version u16 | status u16 | 0 u32 | instance 16
//! request  id u64 | capability 16 | offset u64 | length u32 | 0 u32
//! reply    id u64 | status u32 | length u32 | bytes (only when the status is OK)
//! ```
//! Integers are little-endian.

/// Which layout this is. Both ends must have the same.
pub(super) const VERSION: u16 = 1;
pub(super) const MAGIC: [u8; 8] = *b"kvtiertp";
pub(super) const HELLO_BYTES: usize = 32;
pub(super) const REQUEST_BYTES: usize = 40;
pub(super) const REPLY_BYTES: usize = 16;

/// A random name that is also the right to use it.
pub(super) type Token = [u8; 16];

/// A fresh token.
pub(super) fn token() -> Token {
    let mut token = Token::default();
    let filled = rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty());
    assert_eq!(filled, Ok(token.len()), "the kernel fills requests of up to 256 bytes whole");
    token
}

/// The server's answer to a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Welcome {
    Ok,
    /// Another process answers at this address now.
    OtherInstance,
    /// It has all the connections that it allows.
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) version: u16,
    pub(super) welcome: Welcome,
    pub(super) instance: Token,
}

impl Hello {
    pub(super) fn new(welcome: Welcome, instance: Token) -> Self {
        Self { version: VERSION, welcome, instance }
    }

    pub(super) fn encode(self) -> [u8; HELLO_BYTES] {
        let status: u16 = match self.welcome {
            Welcome::Ok => 0,
            Welcome::OtherInstance => 1,
            Welcome::Full => 2,
        };
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.version.to_le_bytes());
        bytes[10..12].copy_from_slice(&status.to_le_bytes());
        bytes[16..].copy_from_slice(&self.instance);
        bytes
    }

    /// `None` for anything else than a hello of some version.
    pub(super) fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let version = u16::from_le_bytes(take(bytes, 8));
        let welcome = match u16::from_le_bytes(take(bytes, 10)) {
            0 => Welcome::Ok,
            1 => Welcome::OtherInstance,
            2 => Welcome::Full,
            // A later version may know more.
            _ if version != VERSION => Welcome::Ok,
            _ => return None,
        };
        let hello = Self { version, welcome, instance: take(bytes, 16) };
        (bytes[..8] == MAGIC).then_some(hello)
    }
}

/// Asks for `len` bytes at `offset` of what `capability` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) id: u64,
    pub(super) capability: Token,
    pub(super) offset: u64,
    pub(super) len: u32,
}

impl Request {
    pub(super) fn encode(self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..8].copy_from_slice(&self.id.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.capability);
        bytes[24..32].copy_from_slice(&self.offset.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// Any bytes are a request; those with padding that is not zero are damaged.
    pub(super) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let request = Self {
            id: u64::from_le_bytes(take(bytes, 0)),
            capability: take(bytes, 8),
            offset: u64::from_le_bytes(take(bytes, 24)),
            len: u32::from_le_bytes(take(bytes, 32)),
        };
        (bytes[36..] == [0; 4]).then_some(request)
    }
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// The bytes follow.
    Ok,
    /// Nothing is exposed under that capability (any more).
    Gone,
    /// The range is outside of what is exposed.
    Range,
}

/// The head of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) id: u64,
    pub(super) status: Status,
    pub(super) len: u32,
}

impl Reply {
    pub(super) fn encode(self) -> [u8; REPLY_BYTES] {
        let status: u32 = match self.status {
            Status::Ok => 0,
            Status::Gone => 1,
            Status::Range => 2,
        };
        let mut bytes = [0; REPLY_BYTES];
        bytes[..8].copy_from_slice(&self.id.to_le_bytes());
        bytes[8..12].copy_from_slice(&status.to_le_bytes());
        bytes[12..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; REPLY_BYTES]) -> Option<Self> {
        let status = match u32::from_le_bytes(take(bytes, 8)) {
            0 => Status::Ok,
            1 => Status::Gone,
            2 => Status::Range,
            _ => return None,
        };
        Some(Self { id: u64::from_le_bytes(take(bytes, 0)), status, len: u32::from_le_bytes(take(bytes, 12)) })
    }
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the offsets are constants inside of fixed layouts")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_comes_back() {
        for welcome in [Welcome::Ok, Welcome::OtherInstance, Welcome::Full] {
            let hello = Hello::new(welcome, token());
            assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        }
        let request = Request { id: u64::MAX - 1, capability: token(), offset: 1 << 40, len: 77 };
        assert_eq!(Request::decode(&request.encode()), Some(request));
        for status in [Status::Ok, Status::Gone, Status::Range] {
            let reply = Reply { id: 3, status, len: u32::MAX };
            assert_eq!(Reply::decode(&reply.encode()), Some(reply));
        }
    }

    #[test]
    fn damage_is_told() {
        let hello = Hello::new(Welcome::Ok, token()).encode();
        for at in 0..8 {
            let mut damaged = hello;
            damaged[at] ^= 1;
            assert_eq!(Hello::decode(&damaged), None);
        }
        assert_eq!(Reply::decode(&[0xff; REPLY_BYTES]), None);
        assert_eq!(Request::decode(&[0xff; REQUEST_BYTES]), None);
        assert_ne!(token(), token());
    }
}
