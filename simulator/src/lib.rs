//! `kvtier-simulator`: the daemon's own policy core over virtual time.
#![forbid(unsafe_code)]
