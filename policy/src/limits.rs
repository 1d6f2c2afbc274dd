//! Bounds of the core: every map, queue and call has one.

/// Attached processes at once; a node has a few engines of a few ranks.
pub const MAX_ATTACHMENTS: usize = 1024;
/// Leases of one attachment at once: vLLM runs at most about a thousand requests.
pub const MAX_LEASES_PER_ATTACHMENT: usize = 4096;
/// Keys in one lookup or reservation, all groups together: a million tokens of 16-token blocks.
pub const MAX_KEYS_PER_CALL: usize = 65_536;
/// Longest request id, in bytes.
pub const MAX_REQUEST_ID_BYTES: usize = 256;
/// Distinct (namespace, model, tenant, layout) seen since start.
pub const MAX_SCOPES: usize = 65_535;
/// Keys whose departure is remembered, to tell an evicted block from a novel one.
pub const GHOST_KEYS: usize = 262_144;
/// Candidates examined to find a victim that has another replica before one without is dropped.
pub const VICTIM_SCAN: usize = 32;
/// Blocks answered by one page of a listing.
pub const MAX_LIST_PAGE: usize = 1000;
