//! `Pin`, `Unpin`, `Retain`, `ListClaims`, `ReleaseClaims`.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::{ClaimAnswer, ClaimRequest, ClaimView, Claiming, MAX_CLAIMS_PAGE, Survey, Unclaiming};
use kvtier_proto::convert::{self, MAX_PRIORITY};
use kvtier_proto::v1;
use kvtier_storage::journal::Entry;
use kvtier_types::{BlockKey, ClaimBlock, ClaimKind, ClaimName, Outcome, TenantId, Tier};
use tonic::Status;

use super::durable;
use crate::claims::{entries, millis, settle};
use crate::node::Node;
use crate::services::caller::Caller;
use crate::services::targets::{self, Resolved};
use crate::services::wire_status;

/// Claims in one page when the caller does not say.
const DEFAULT_PAGE: usize = 50;
/// Claims named in one release.
const MAX_RELEASES: usize = 4096;
/// Blocks looked at in one call of the core.
const RESIDENT_STEP: usize = 1024;
/// What is between the parts of a page token: no part may hold it.
const SEPARATOR: char = '\0';

/// What both kinds of claim have in common.
struct Wanted<'a> {
    targets: &'a [v1::Target],
    request: ClaimRequest,
    dry_run: bool,
}

/// Hard claims.
pub(super) async fn pin(node: &Arc<Node>, caller: &Caller, m: &v1::PinRequest) -> Result<v1::ClaimReply, Status> {
    let tier = convert::tier("tier", m.tier).map_err(wire_status)?.unwrap_or(Tier::Host);
    let request = ClaimRequest {
        name: name(caller, &m.owner, &m.claim_id)?,
        revision: m.revision,
        kind: ClaimKind::Pin(tier),
        ttl: Duration::from_millis(m.ttl_ms),
    };
    make(node, caller, Wanted { targets: &m.targets, request, dry_run: m.dry_run }).await
}

/// Soft claims.
pub(super) async fn retain(node: &Arc<Node>, caller: &Caller, m: &v1::RetainRequest) -> Result<v1::ClaimReply, Status> {
    let priority = u8::try_from(m.priority.min(MAX_PRIORITY)).unwrap_or(u8::MAX);
    let request = ClaimRequest {
        name: name(caller, &m.owner, &m.claim_id)?,
        revision: m.revision,
        kind: ClaimKind::Retain(priority),
        ttl: Duration::from_millis(m.ttl_ms),
    };
    make(node, caller, Wanted { targets: &m.targets, request, dry_run: m.dry_run }).await
}

fn name(caller: &Caller, owner: &str, id: &str) -> Result<ClaimName, Status> {
    let most = ClaimName::MAX_PART_BYTES;
    for (field, part) in [("owner", owner), ("claim_id", id)] {
        convert::bounded(field, part, most).map_err(wire_status)?;
        if part.contains(SEPARATOR) {
            return Err(Status::invalid_argument(format!("{field} holds a zero byte")));
        }
    }
    if id.is_empty() {
        let what = "claim_id names the claim: give one";
        return Err(Status::invalid_argument(what));
    }
    Ok(ClaimName { tenant: caller.tenant.clone(), owner: owner.to_owned(), id: id.to_owned() })
}

async fn make(node: &Arc<Node>, caller: &Caller, wanted: Wanted<'_>) -> Result<v1::ClaimReply, Status> {
    let Wanted { targets, request, dry_run } = wanted;
    let resolved = targets::resolve(node, caller, targets)?;
    let keys: Vec<BlockKey> = resolved.iter().flat_map(Resolved::keys).copied().collect();
    let mut survey = Survey::new(request.kind, keys);
    while node.read_core(|core| core.survey(&mut survey)) {
        tokio::task::yield_now().await;
    }
    let most = node.config.claims.max_ttl.0;
    let shortened = request.ttl > most;
    let mut claiming = Claiming::new(request, survey, dry_run);
    // A dry run too: it reckons with claims that are whole.
    let _turn = node.claims_turn.lock().await;
    node.with_core_in_steps(|core, now| core.claim_some(now, &mut claiming));
    if let Some(claim) = claiming.live(node.now()) {
        settle(node).await;
        durable(node, entries(claim), "claimed now, but a restart may end it").await?;
    }
    let mut reply = reply(&resolved, claiming.answer());
    if shortened && reply.reason.is_empty() {
        reply.reason = format!("for {} s: longer than claims.max_ttl was asked", most.as_secs());
    }
    Ok(reply)
}

fn reply(resolved: &[Resolved], answer: ClaimAnswer) -> v1::ClaimReply {
    v1::ClaimReply {
        outcome: v1::Outcome::from(answer.outcome).into(),
        reason: answer.reason.to_owned(),
        outcomes: targets::outcomes(resolved, answer.outcomes),
        claimed_bytes: answer.claimed_bytes,
        budget_bytes: answer.budget_bytes,
    }
}

/// Ends a claim, or lets it hold less.
pub(super) async fn unpin(node: &Arc<Node>, caller: &Caller, m: &v1::UnpinRequest) -> Result<v1::ClaimReply, Status> {
    let name = name(caller, &m.owner, &m.claim_id)?;
    let resolved = targets::resolve(node, caller, &m.targets)?;
    let keys: Vec<BlockKey> = resolved.iter().flat_map(Resolved::keys).copied().collect();
    let named = (!m.targets.is_empty()).then_some(keys);
    let is_named = named.is_some();
    let mut unclaiming = Unclaiming::new(name.clone(), m.revision, named);
    let _turn = node.claims_turn.lock().await;
    node.with_core_in_steps(|core, _| core.unclaim_some(&mut unclaiming));
    let outcomes = unclaiming.outcomes();
    let applied = outcomes.iter().any(|(outcome, _)| *outcome == Outcome::Applied);
    if applied {
        settle(node).await;
        let live = node.with_core(|core, now| core.claim_view(now, &name));
        let entries = live.map_or_else(|| vec![Entry::ClaimEnded(name)], entries);
        durable(node, entries, "let go now, but a restart may bring the claim back").await?;
    }
    let nothing = (Outcome::Missing, "no block was named that the claim holds");
    let (outcome, reason) = if applied { (Outcome::Applied, "") } else { outcomes.first().copied().unwrap_or(nothing) };
    let outcomes = if is_named { targets::outcomes(&resolved, outcomes) } else { Vec::new() };
    let outcome = v1::Outcome::from(outcome).into();
    Ok(v1::ClaimReply { outcome, reason: reason.to_owned(), outcomes, ..Default::default() })
}

/// A page of claims: the caller's own; for operators, everybody's.
pub(super) async fn list(
    node: &Arc<Node>,
    caller: &Caller,
    m: &v1::ListClaimsRequest,
) -> Result<v1::ListClaimsReply, Status> {
    let tenant = tenant_asked(caller, &m.tenant)?;
    let after = if m.page_token.is_empty() { None } else { Some(of_token(&m.page_token)?) };
    let limit = if m.page_size == 0 { DEFAULT_PAGE } else { (m.page_size as usize).min(MAX_CLAIMS_PAGE) };
    let of = (tenant.as_ref(), m.owner.as_str());
    let (mut claims, mut more, mut last) = (Vec::new(), true, after);
    // One by one: a claim may hold many blocks, all of which are copied under the core's lock.
    while more && claims.len() < limit {
        let page;
        (page, more) = node.with_core(|core, now| core.claims_after(now, last.as_ref(), of, 1));
        let Some(claim) = page.into_iter().next() else { break };
        last = Some(claim.name.clone());
        let resident_bytes = resident_bytes(node, &claim).await;
        claims.push(wire(claim, resident_bytes));
    }
    let next = last.filter(|_| more).map(|name| token(&name)).unwrap_or_default();
    let budget = |tier: Tier| {
        let (claimed_bytes, budget_bytes) = node.read_core(|core| core.claimed(tier));
        v1::ClaimBudget { tier: v1::Tier::from(tier).into(), claimed_bytes, budget_bytes }
    };
    let budgets = [Tier::Host, Tier::Disk].map(budget).to_vec();
    Ok(v1::ListClaimsReply { claims, next_page_token: next.into(), budgets })
}

/// The tenant whose claims are meant: of others than operators, their own.
fn tenant_asked(caller: &Caller, tenant: &str) -> Result<Option<TenantId>, Status> {
    if !caller.operator {
        return Ok(Some(caller.tenant.clone()));
    }
    if tenant.is_empty() {
        return Ok(None);
    }
    TenantId::new(tenant).map(Some).map_err(|error| Status::invalid_argument(error.to_string()))
}

async fn resident_bytes(node: &Arc<Node>, claim: &ClaimView) -> u64 {
    let tier = match claim.kind {
        ClaimKind::Pin(tier) => tier,
        ClaimKind::Retain(_) => Tier::Host,
    };
    let mut sum = 0;
    for step in claim.blocks.chunks(RESIDENT_STEP) {
        sum += node.read_core(|core| core.resident_bytes(tier, step));
        tokio::task::yield_now().await;
    }
    sum
}

fn wire(claim: ClaimView, resident_bytes: u64) -> v1::Claim {
    let (kind, tier, priority) = match claim.kind {
        ClaimKind::Pin(tier) => (v1::ClaimKind::Pin, v1::Tier::from(tier), 0),
        ClaimKind::Retain(priority) => (v1::ClaimKind::Retain, v1::Tier::Unspecified, priority),
    };
    v1::Claim {
        claim_id: claim.name.id,
        owner: claim.name.owner,
        tenant: claim.name.tenant.to_string(),
        revision: claim.revision,
        kind: kind.into(),
        tier: tier.into(),
        priority: priority.into(),
        remaining_ms: millis(claim.remaining),
        blocks: claim.blocks.len() as u64,
        bytes: claim.blocks.iter().map(|block: &ClaimBlock| block.bytes).sum(),
        resident_bytes,
    }
}

fn token(name: &ClaimName) -> Vec<u8> {
    format!("{}{SEPARATOR}{}{SEPARATOR}{}", name.tenant, name.owner, name.id).into_bytes()
}

fn of_token(token: &[u8]) -> Result<ClaimName, Status> {
    let bad = || Status::invalid_argument("page_token is not one this daemon gave out");
    let text = std::str::from_utf8(token).map_err(|_| bad())?;
    let mut parts = text.splitn(3, SEPARATOR);
    let mut part = || parts.next().ok_or_else(bad);
    let tenant = TenantId::new(part()?).map_err(|_| bad())?;
    Ok(ClaimName { tenant, owner: part()?.to_owned(), id: part()?.to_owned() })
}

/// Ends claims whoever made them.
pub(super) async fn release(
    node: &Arc<Node>,
    caller: &Caller,
    m: &v1::ReleaseClaimsRequest,
) -> Result<v1::ReleaseClaimsReply, Status> {
    if !caller.operator {
        return Err(Status::permission_denied("only operators release claims of others: use Unpin for your own"));
    }
    if m.owner.is_empty() && m.claim_ids.is_empty() {
        return Err(Status::invalid_argument("name an owner, or claim ids"));
    }
    if m.claim_ids.len() > MAX_RELEASES {
        return Err(Status::invalid_argument(format!("more than {MAX_RELEASES} claim ids: split the call")));
    }
    let tenant = tenant_asked(caller, &m.tenant)?;
    let _turn = node.claims_turn.lock().await;
    let ended = node.with_core(|core, _| core.release_claims(tenant.as_ref(), &m.owner, &m.claim_ids));
    settle(node).await;
    let released = ended.len() as u64;
    if released > 0 {
        tracing::info!(released, owner = m.owner, "claims released by an operator");
    }
    let entries = ended.into_iter().map(Entry::ClaimEnded).collect();
    durable(node, entries, "released now, but a restart may bring the claims back").await?;
    Ok(v1::ReleaseClaimsReply { released })
}
