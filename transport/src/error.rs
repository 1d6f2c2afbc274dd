//! What can go wrong between nodes: one variant per thing a caller does differently.

/// A transport's error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The peer no longer exposes what the descriptor names: its lease ended, or it was restarted.
    #[error("the peer no longer exposes these bytes")]
    Gone,
    /// The exposed frame and the buffer differ in length.
    #[error("the peer exposes {exposed} bytes, {wanted} were wanted")]
    Length {
        /// Bytes exposed.
        exposed: u64,
        /// Bytes wanted.
        wanted: u64,
    },
    /// The descriptor or address is not one of this transport.
    #[error("bad descriptor or address: {what}")]
    BadDescriptor {
        /// What is wrong.
        what: &'static str,
    },
    /// The peer speaks another version.
    #[error(
        "the peer speaks version {theirs} of the {kind} transport, this node {ours}: install one kvtier release on all nodes"
    )]
    Version {
        /// Transport.
        kind: &'static str,
        /// The peer's version.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// The peer is dead, or the link to it was cut.
    #[error("the link to the peer is down")]
    LinkDown {
        /// Why, where it is known.
        #[source]
        source: Option<std::io::Error>,
    },
    /// Not done by its deadline.
    #[error("not done by its deadline")]
    Deadline,
    /// Cancelled by its caller.
    #[error("cancelled")]
    Cancelled,
    /// The transport cannot be had on this machine.
    #[error("{kind} is not available: {reason}")]
    Unavailable {
        /// Transport.
        kind: &'static str,
        /// Why, and what to do.
        reason: String,
    },
    /// A bound was reached.
    #[error("too many {what} (at most {max})")]
    Limit {
        /// Of what.
        what: &'static str,
        /// The bound.
        max: usize,
    },
}
