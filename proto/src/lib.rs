//! Wire format of kvtier.v1: generated messages and services, and the one set of checked conversions to
//! [`kvtier_types`].
//!
//! Wire types stop at the daemon's services, the CLI and the connector: everything behind them speaks `kvtier-types`.
#![forbid(unsafe_code)]

pub mod convert;

/// Messages, clients and servers of package `kvtier.v1`.
pub mod v1 {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::all,
        clippy::pedantic,
        clippy::allow_attributes_without_reason,
        reason = "generated from kvtier/v1/*.proto, whose comments are the documentation"
    )]
    tonic::include_proto!("kvtier.v1");
}

/// Version of the engine and peer protocols; both ends must have the same.
pub const PROTOCOL_VERSION: u32 = 2;

/// Largest message either side accepts: a reply for 65,536 block shards fits.
pub const MAX_MESSAGE_BYTES: usize = 8 << 20;

/// Descriptors of every service, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kvtier.fds.bin"));
