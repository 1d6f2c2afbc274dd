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
/// Nodes of a cluster that are known at once.
pub const MAX_NODES: usize = 4096;
/// Export leases of all peers at once.
pub const MAX_EXPORTS: usize = 4096;
/// Shards in one export or adoption.
pub const MAX_SHARDS_PER_EXPORT: usize = 1024;
/// Entries a call touches at most when it publishes: what remains is for the next call.
pub const MAX_TOUCHES_PER_CALL: usize = 1024;
/// Departed shards whose removal was not published yet; beyond, everything is published anew under another edition.
pub const MAX_UNPUBLISHED_REMOVALS: usize = 262_144;
/// Sources remembered for one shard.
pub const MAX_SOURCES: usize = 4;
/// Blocks marked by verb since start, and those that the journal kept.
pub const MAX_MARKS: usize = 262_144;
/// Blocks that wait for copies on other nodes.
pub const MAX_REPLICATIONS: usize = 65_536;
/// Blocks answered by one page of a listing.
pub const MAX_LIST_PAGE: usize = 1000;
/// Entries that one call of a listing looks at.
pub const MAX_LIST_SCAN: usize = 1024;
/// Namespaces with a layout that are remembered after their last engine left.
pub const MAX_KNOWN_SPACES: usize = 256;
/// Abandoned programs that are remembered, so that nothing they wrote comes back.
pub const MAX_CANCELLED: usize = 65_536;
