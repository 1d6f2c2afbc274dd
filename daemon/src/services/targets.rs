//! Targets of verbs: from what a caller names to block keys that it may control.

use std::convert::Infallible;
use std::sync::Arc;

use kvtier_policy::{HolderKind, Holdings, KnownSpace, prompt_keys};
use kvtier_proto::v1::target::Target;
use kvtier_proto::{convert, v1};
use kvtier_types::{BlockHints, BlockKey, HashAlgorithm, NamespaceId, Outcome, TenantId};
use tonic::Status;

use super::caller::Caller;
use super::wire_status;
use crate::node::Node;

/// Block keys in one call, all targets together.
pub(crate) const MAX_TARGET_KEYS: usize = 65_536;
/// Keys that one call of the core looks at: larger work goes on in further calls, with the lock let go in between.
pub(crate) const KEYS_PER_CORE_CALL: usize = 256;

/// A key that a target named.
#[derive(Debug, Clone)]
pub(crate) enum Named {
    /// The caller may control it, or nobody here knows it.
    Key(BlockKey),
    /// It belongs to somebody else.
    Refused(BlockKey),
}

/// What one target came to.
#[derive(Debug, Clone)]
pub(crate) struct Resolved {
    /// Index of the target in the call.
    pub(crate) target: u32,
    /// Its keys, in prefix order where it has one.
    pub(crate) named: Vec<Named>,
    /// It named keys one by one: each gets an outcome of its own.
    pub(crate) by_key: bool,
    /// Why the whole target came to nothing.
    pub(crate) failed: Option<(Outcome, String)>,
}

impl Resolved {
    /// The keys that the verb is to act upon.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &BlockKey> {
        self.named.iter().filter_map(|n| if let Named::Key(key) = n { Some(key) } else { None })
    }
}

/// Resolves the targets of a call.
///
/// # Errors
/// `INVALID_ARGUMENT` for what is no target, or too many keys.
pub(crate) fn resolve(node: &Arc<Node>, caller: &Caller, targets: &[v1::Target]) -> Result<Vec<Resolved>, Status> {
    let mut left = MAX_TARGET_KEYS;
    let mut out = Vec::with_capacity(targets.len());
    for (index, target) in (0..).zip(targets) {
        let caller = &caller.acting_for(&target.tenant)?;
        let resolved = match &target.target {
            Some(Target::Blocks(blocks)) => {
                let keys = convert::unpack_keys(&blocks.keys).map_err(wire_status)?;
                named(node, caller, index, (keys, true))
            }
            Some(Target::Tokens(tokens)) => tokens_of(node, caller, index, tokens)?,
            Some(Target::Program(program)) => program_of(node, caller, index, program)?,
            Some(Target::Session(session)) => session_of(node, caller, index, session)?,
            None => return Err(Status::invalid_argument(format!("target {index} is empty"))),
        };
        left = left.checked_sub(resolved.named.len()).ok_or_else(|| {
            Status::invalid_argument(format!("more than {MAX_TARGET_KEYS} blocks in one call: split it"))
        })?;
        out.push(resolved);
    }
    Ok(out)
}

/// The blocks of keys, as far as the caller may control them.
fn named(node: &Arc<Node>, caller: &Caller, target: u32, (keys, by_key): (Vec<BlockKey>, bool)) -> Resolved {
    let mut named = Vec::with_capacity(keys.len());
    for portion in keys.chunks(KEYS_PER_CORE_CALL) {
        named.extend(node.read_core(|core| {
            let controls = |key: &BlockKey| core.tenant_of(key).is_none_or(|tenant| caller.controls(tenant));
            let name = |key: &BlockKey| if controls(key) { Named::Key(*key) } else { Named::Refused(*key) };
            portion.iter().map(name).collect::<Vec<_>>()
        }));
    }
    Resolved { target, named, by_key, failed: None }
}

/// The blocks of a prompt, in every layout in which engines of its namespace were attached lately.
fn tokens_of(node: &Arc<Node>, caller: &Caller, target: u32, tokens: &v1::TokensTarget) -> Result<Resolved, Status> {
    match prompt_of(node, target, tokens)? {
        Ok((spaces, ids)) => Ok(named(node, caller, target, (prompt_keys(&spaces, &ids, &tokens.cache_salt), false))),
        Err(failed) => Ok(Resolved { target, named: Vec::new(), by_key: false, failed: Some(failed) }),
    }
}

/// The layouts in which blocks of a prompt may lie, the latest attached first, and its tokens; or why its blocks cannot be
/// named.
///
/// # Errors
/// `INVALID_ARGUMENT` for what is no prompt.
#[expect(clippy::type_complexity, reason = "a refusal of the call, or of this target, or what it names")]
pub(super) fn prompt_of(
    node: &Arc<Node>,
    target: u32,
    tokens: &v1::TokensTarget,
) -> Result<Result<(Vec<KnownSpace>, Vec<u32>), (Outcome, String)>, Status> {
    let (words, rest) = tokens.token_ids.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(Status::invalid_argument(format!("target {target}: token_ids are 4 bytes each")));
    }
    let namespace = match tokens.namespace_id.len() {
        0 => None,
        _ => {
            let bad = |_| Status::invalid_argument(format!("target {target}: a namespace_id has 32 bytes"));
            Some(NamespaceId::from_slice(&tokens.namespace_id).map_err(bad)?)
        }
    };
    let failed = |outcome, reason: String| Ok(Err((outcome, reason)));
    let spaces = node.read_core(|core| core.known_spaces(&tokens.model, namespace.as_ref()));
    let Some(first) = spaces.first() else {
        let what = namespace.map_or_else(|| format!("model {:?}", tokens.model), |id| format!("namespace {id}"));
        return failed(Outcome::Missing, format!("no engine was attached here with {what} since the start"));
    };
    let algorithm = first.namespace.hash_algorithm;
    if algorithm != HashAlgorithm::Sha256Cbor {
        let reason = format!(
            "blocks of {} are named by {algorithm}, which cannot be computed from tokens: name block keys, or start its engine with --prefix-caching-hash-algo sha256_cbor",
            first.namespace.model
        );
        return failed(Outcome::Unsupported, reason);
    }
    let most = MAX_TARGET_KEYS.saturating_mul(first.namespace.hash_block_tokens as usize);
    if words.len() > most {
        return Err(Status::invalid_argument(format!("target {target}: {} tokens, at most {most}", words.len())));
    }
    let ids: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    Ok(Ok((spaces, ids)))
}

/// The tenants whose programs or sessions a caller may mean.
pub(super) fn tenant(caller: &Caller) -> Option<&TenantId> {
    (!caller.operator).then_some(&caller.tenant)
}

/// What a program holds here.
fn program_of(
    node: &Arc<Node>,
    caller: &Caller,
    target: u32,
    named_so: &v1::ProgramTarget,
) -> Result<Resolved, Status> {
    let most = BlockHints::MAX_PROGRAM_ID_BYTES;
    let id = convert::bounded("program_id", &named_so.program_id, most).map_err(wire_status)?;
    let which = (named_so.descendants, named_so.exclusive);
    let names = node.read_core(|core| core.holders_named(HolderKind::Program, id, tenant(caller)));
    let mut keys = Vec::new();
    for name in &names {
        keys.extend(gather(node, Holdings::of_program(name, which)).unwrap_or_default());
        enough(target, &keys)?;
    }
    Ok(named(node, caller, target, (keys, false)))
}

/// Gathers what somebody holds, in steps that leave others their turn. `None` where blocks of it are asked for by tokens, and how
/// many they have is not known.
pub(crate) fn gather(node: &Node, mut holdings: Holdings) -> Option<Vec<BlockKey>> {
    let Ok(()) = node.read_core_in_steps(|core| Ok::<bool, Infallible>(core.gather(&mut holdings)));
    holdings.keys()
}

/// What is too much for one call is not gathered any further.
fn enough(target: u32, keys: &[BlockKey]) -> Result<(), Status> {
    if keys.len() > MAX_TARGET_KEYS {
        let reason = format!("target {target}: more than {MAX_TARGET_KEYS} blocks in one call: name a tenant");
        return Err(Status::invalid_argument(reason));
    }
    Ok(())
}

/// The latest context of a session, or a part of it, as far as it is here.
fn session_of(node: &Arc<Node>, caller: &Caller, target: u32, session: &v1::SessionTarget) -> Result<Resolved, Status> {
    let (start, end) = (session.start_token, session.end_token);
    if end > 0 && end <= start {
        return Err(Status::invalid_argument(format!("target {target}: tokens {start} to {end} are none")));
    }
    let most = BlockHints::MAX_PROGRAM_ID_BYTES;
    let id = convert::bounded("session_id", &session.session_id, most).map_err(wire_status)?;
    let names = node.read_core(|core| core.holders_named(HolderKind::Session, id, tenant(caller)));
    let mut keys = Vec::new();
    for name in &names {
        let Some(of) = gather(node, Holdings::of_session(name, (start, end))) else {
            let reason =
                "no engine was attached since the start, so how many tokens a block has is not known: name no tokens";
            let failed = Some((Outcome::Unsupported, reason.to_owned()));
            return Ok(Resolved { target, named: Vec::new(), by_key: false, failed });
        };
        keys.extend(of);
        enough(target, &keys)?;
    }
    Ok(named(node, caller, target, (keys, false)))
}

/// The same targets for other nodes, which take the word of this one: they say whose they are.
pub(crate) fn passed_on(caller: &Caller, targets: &[v1::Target]) -> Vec<v1::Target> {
    let name = |target: &v1::Target| {
        let tenant = if caller.operator { target.tenant.clone() } else { caller.tenant.to_string() };
        v1::Target { tenant, ..target.clone() }
    };
    targets.iter().map(name).collect()
}

/// Shapes outcomes for the wire. `done` has one for each key of [`Resolved::keys`], in order.
pub(crate) fn outcomes<R: Into<String>>(
    resolved: &[Resolved],
    done: impl IntoIterator<Item = (Outcome, R)>,
) -> Vec<v1::TargetOutcome> {
    let mut done = done.into_iter();
    let mut out = Vec::new();
    for one in resolved {
        let per_key: Vec<v1::TargetOutcome> = one
            .named
            .iter()
            .map(|named| match named {
                Named::Key(key) => {
                    let (outcome, reason) =
                        done.next().map_or((Outcome::Missing, String::new()), |(o, r)| (o, r.into()));
                    wire(one.target, Some(key), outcome, reason)
                }
                Named::Refused(key) => {
                    wire(one.target, Some(key), Outcome::Rejected, "it belongs to another tenant".into())
                }
            })
            .collect();
        match &one.failed {
            Some((outcome, reason)) => out.push(wire(one.target, None, *outcome, reason.clone())),
            None if one.by_key => out.extend(per_key),
            None => out.push(summary(one.target, &per_key)),
        }
    }
    out
}

fn wire(target: u32, key: Option<&BlockKey>, outcome: Outcome, reason: String) -> v1::TargetOutcome {
    v1::TargetOutcome {
        key: key.map(|k| k.as_bytes().to_vec()).unwrap_or_default().into(),
        outcome: v1::Outcome::from(outcome).into(),
        reason,
        target,
        blocks: u64::from(key.is_some() && matches!(outcome, Outcome::Applied | Outcome::Accepted)),
        bytes: 0,
    }
}

/// One outcome for all blocks of a target: the one that most of them had, with how many were done.
fn summary(target: u32, per_key: &[v1::TargetOutcome]) -> v1::TargetOutcome {
    if per_key.is_empty() {
        return wire(target, None, Outcome::Missing, "nothing here belongs to it".into());
    }
    let mut counts: Vec<(i32, usize, &str)> = Vec::new();
    for one in per_key {
        match counts.iter_mut().find(|(outcome, _, _)| *outcome == one.outcome) {
            Some((_, count, _)) => *count += 1,
            None => counts.push((one.outcome, 1, &one.reason)),
        }
    }
    let most = counts.iter().max_by_key(|(_, count, _)| *count).copied().unwrap_or_default();
    let names: Vec<String> = counts
        .iter()
        .map(|(outcome, count, _)| {
            let name = v1::Outcome::try_from(*outcome).map_or("UNKNOWN", |o| o.as_str_name());
            format!("{count} {name}")
        })
        .collect();
    let reason = if counts.len() > 1 { names.join(", ") } else { most.2.to_owned() };
    v1::TargetOutcome {
        outcome: most.0,
        reason,
        target,
        blocks: per_key.iter().map(|o| o.blocks).sum(),
        ..Default::default()
    }
}
