//! `Capabilities`: what this node can do, and its bounds.

use std::sync::Arc;

use kvtier_policy::programs::graphs;
use kvtier_policy::{MAX_CHILDREN_PER_SIGNAL, MAX_EVENTS, MAX_HOLDERS, limits};
use kvtier_proto::{PROTOCOL_VERSION, v1};
use kvtier_types::hints::ACTIONS;
use kvtier_types::{Effect, SemanticType, Tier};

use super::watch::MAX_WATCHERS;
use crate::node::Node;
use crate::services::MAX_CANDIDATES;
use crate::services::targets::MAX_TARGET_KEYS;

/// Verbs of the services `KvCache` and `Programs` that are carried out.
const VERBS: [&str; 28] = [
    "Locate",
    "List",
    "Capabilities",
    "Watch",
    "Evict",
    "Move",
    "Prefetch",
    "Replicate",
    "CommitCheckpoint",
    "Pin",
    "Unpin",
    "Retain",
    "ListClaims",
    "ReleaseClaims",
    "GetOperation",
    "WaitOperation",
    "CancelOperation",
    "ListOperations",
    "Taint",
    "Untaint",
    "ApplyHints",
    "Signal",
    "ListPrograms",
    "Declare",
    "Progress",
    "GetGraph",
    "NextSteps",
    "Place",
];
/// Kinds of targets that are resolved.
const TARGET_KINDS: [&str; 4] = ["blocks", "session", "program", "tokens"];

/// What this node can do.
pub(super) fn capabilities(node: &Arc<Node>) -> v1::CapabilitiesReply {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<String>>();
    let below = [Tier::Disk, Tier::Object].into_iter().filter(|t| node.stores.get(*t).is_some());
    let device = node.devices.why_absent().is_none().then_some(Tier::Device);
    let tiers =
        device.into_iter().chain(std::iter::once(Tier::Host)).chain(below).map(|t| v1::Tier::from(t).into()).collect();
    let semantic = SemanticType::ALL.iter().filter(|t| **t != SemanticType::Unspecified);
    let budgets = &node.config.claims;
    let limits = [
        ("target_keys", MAX_TARGET_KEYS as u64),
        ("list_page", limits::MAX_LIST_PAGE as u64),
        ("programs", MAX_HOLDERS as u64),
        ("place_candidates", MAX_CANDIDATES as u64),
        ("children_per_signal", MAX_CHILDREN_PER_SIGNAL as u64),
        ("declared_steps_of_a_program", graphs::MAX_STEPS_PER_GRAPH as u64),
        ("declared_steps_of_a_tenant", graphs::MAX_TENANT_STEPS as u64),
        ("events_remembered", MAX_EVENTS as u64),
        ("watchers", MAX_WATCHERS as u64),
        ("claim_ttl_ms", u64::try_from(budgets.max_ttl.0.as_millis()).unwrap_or(u64::MAX)),
        ("claims", budgets.max_claims as u64),
    ];
    v1::CapabilitiesReply {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol_version: PROTOCOL_VERSION,
        verbs: names(&VERBS),
        tiers,
        semantic_types: semantic.map(|t| t.name().to_owned()).collect(),
        taint_effects: names(&Effect::NAMES),
        target_kinds: names(&TARGET_KINDS),
        hint_actions: names(&ACTIONS),
        limits: limits.into_iter().map(|(name, value)| v1::Limit { name: name.to_owned(), value }).collect(),
    }
}
