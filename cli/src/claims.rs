//! `kvtier pin`, `unpin`, `retain` and `claims`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvtier_proto::v1;
use serde::Serialize;

use crate::args::{ClaimArgs, ClaimsArgs, PinArgs, RetainArgs, UnpinArgs};
use crate::client::{Client, PAGE_BLOCKS};
use crate::error::CliError;
use crate::locate::outcome_text;
use crate::outcomes::{Outcomes, all_done, is_done};
use crate::report::Report;
use crate::status::tier_text;
use crate::table::{Align, Table, printable};
use crate::target::named;
use crate::units::{bytes_text, duration_text, millis};

#[derive(Debug, Serialize)]
struct Claimed {
    claim_id: String,
    owner: String,
    revision: u64,
    dry_run: bool,
    outcome: String,
    reason: String,
    claimed_bytes: u64,
    budget_bytes: u64,
    #[serde(flatten)]
    outcomes: Outcomes,
}

/// A claim as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Claim {
    pub(crate) claim_id: String,
    pub(crate) owner: String,
    pub(crate) tenant: String,
    pub(crate) revision: u64,
    pub(crate) kind: String,
    pub(crate) tier: String,
    pub(crate) priority: u32,
    pub(crate) remaining_ms: u64,
    pub(crate) blocks: u64,
    pub(crate) bytes: u64,
    pub(crate) resident_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Budget {
    tier: String,
    claimed_bytes: u64,
    budget_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Listed {
    claims: Vec<Claim>,
    budgets: Vec<Budget>,
    truncated: bool,
}

impl From<&v1::Claim> for Claim {
    fn from(c: &v1::Claim) -> Self {
        let kind = v1::ClaimKind::try_from(c.kind);
        Self {
            claim_id: c.claim_id.clone(),
            owner: c.owner.clone(),
            tenant: c.tenant.clone(),
            revision: c.revision,
            kind: kind.map_or_else(|_| format!("KIND {}", c.kind), |k| k.as_str_name().to_owned()),
            tier: if c.tier == 0 { String::new() } else { tier_text(c.tier) },
            priority: c.priority,
            remaining_ms: c.remaining_ms,
            blocks: c.blocks,
            bytes: c.bytes,
            resident_bytes: c.resident_bytes,
        }
    }
}

/// What was asked, for the report.
struct Asked<'a> {
    claim: &'a ClaimArgs,
    revision: u64,
    targets: &'a [v1::Target],
    dry_run: bool,
}

/// The revision given, or the time: whoever says nothing means to replace what was there.
fn revision(claim: &ClaimArgs) -> u64 {
    claim.revision.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, millis))
}

/// Pins blocks.
///
/// # Errors
/// What resolving targets and asking the daemon can fail with.
pub(crate) async fn pin(client: &mut Client, args: &PinArgs) -> Result<Report, CliError> {
    let targets = named(client, &args.targets).await?.targets();
    let asked = Asked { claim: &args.claim, revision: revision(&args.claim), targets: &targets, dry_run: args.dry_run };
    let message = v1::PinRequest {
        claim_id: args.claim.claim.clone(),
        owner: args.claim.owner.clone(),
        revision: asked.revision,
        targets: targets.clone(),
        tier: v1::Tier::from(args.tier).into(),
        ttl_ms: args.ttl.map(millis).unwrap_or_default(),
        dry_run: args.dry_run,
    };
    Ok(report(&client.pin(message).await?, &asked))
}

/// Takes blocks out of a claim, or ends it.
///
/// # Errors
/// What resolving targets and asking the daemon can fail with.
pub(crate) async fn unpin(client: &mut Client, args: &UnpinArgs) -> Result<Report, CliError> {
    let targets = named(client, &args.targets).await?.targets();
    let asked = Asked { claim: &args.claim, revision: revision(&args.claim), targets: &targets, dry_run: false };
    let message = v1::UnpinRequest {
        claim_id: args.claim.claim.clone(),
        owner: args.claim.owner.clone(),
        revision: asked.revision,
        targets: targets.clone(),
    };
    Ok(report(&client.unpin(message).await?, &asked))
}

/// Retains blocks.
///
/// # Errors
/// What resolving targets and asking the daemon can fail with.
pub(crate) async fn retain(client: &mut Client, args: &RetainArgs) -> Result<Report, CliError> {
    let targets = named(client, &args.targets).await?.targets();
    let asked = Asked { claim: &args.claim, revision: revision(&args.claim), targets: &targets, dry_run: args.dry_run };
    let message = v1::RetainRequest {
        claim_id: args.claim.claim.clone(),
        owner: args.claim.owner.clone(),
        revision: asked.revision,
        targets: targets.clone(),
        priority: args.priority,
        ttl_ms: args.ttl.map(millis).unwrap_or_default(),
        dry_run: args.dry_run,
    };
    Ok(report(&client.retain(message).await?, &asked))
}

fn report(reply: &v1::ClaimReply, asked: &Asked<'_>) -> Report {
    let claimed = Claimed {
        claim_id: asked.claim.claim.clone(),
        owner: asked.claim.owner.clone(),
        revision: asked.revision,
        dry_run: asked.dry_run,
        outcome: outcome_text(reply.outcome),
        reason: reply.reason.clone(),
        claimed_bytes: reply.claimed_bytes,
        budget_bytes: reply.budget_bytes,
        outcomes: Outcomes::new(&reply.outcomes, &[], asked.targets),
    };
    Report::new(text(&claimed), &claimed, is_done(reply.outcome()) && all_done(&reply.outcomes, &[]))
}

fn text(claimed: &Claimed) -> String {
    let dry = if claimed.dry_run { "dry run: " } else { "" };
    let reason = if claimed.reason.is_empty() { String::new() } else { format!(": {}", printable(&claimed.reason)) };
    let budget = if claimed.budget_bytes > 0 {
        format!(
            "{} holds {} of the {} it may pin there\n",
            printable(&claimed.owner),
            bytes_text(claimed.claimed_bytes),
            bytes_text(claimed.budget_bytes)
        )
    } else {
        String::new()
    };
    let rows = claimed.outcomes.rows(|_| false);
    format!("{rows}{dry}claim {} {}{reason}\n{budget}", printable(&claimed.claim_id), claimed.outcome)
}

/// Lists or releases claims.
///
/// # Errors
/// What the daemon's answers can be; [`CliError::Usage`] when all of an owner's would be released unconfirmed.
pub(crate) async fn claims(client: &mut Client, args: &ClaimsArgs) -> Result<Report, CliError> {
    if args.release { release(client, args).await } else { list(client, args).await }
}

/// Checks that all of an owner's claims were meant.
///
/// # Errors
/// [`CliError::Usage`].
pub(crate) fn confirmed(args: &ClaimsArgs) -> Result<(), CliError> {
    if !args.release || args.yes || !args.claims.is_empty() {
        return Ok(());
    }
    let owner = args.owner.as_deref().unwrap_or_default();
    Err(CliError::Usage(format!("this releases every claim of {}: say --yes, or name claims", printable(owner))))
}

async fn release(client: &mut Client, args: &ClaimsArgs) -> Result<Report, CliError> {
    let message = v1::ReleaseClaimsRequest {
        owner: args.owner.clone().unwrap_or_default(),
        tenant: args.tenant.clone().unwrap_or_default(),
        claim_ids: args.claims.clone(),
    };
    let released = client.release_claims(message).await?.released;
    #[derive(Serialize)]
    struct Released {
        released: u64,
    }
    let complete = released >= args.claims.len() as u64;
    Ok(Report::new(format!("{released} claims released\n"), &Released { released }, complete))
}

async fn list(client: &mut Client, args: &ClaimsArgs) -> Result<Report, CliError> {
    let limit = args.limit as usize;
    let mut request = v1::ListClaimsRequest {
        owner: args.owner.clone().unwrap_or_default(),
        tenant: args.tenant.clone().unwrap_or_default(),
        page_size: args.limit.min(PAGE_BLOCKS),
        ..v1::ListClaimsRequest::default()
    };
    let mut claims: Vec<v1::Claim> = Vec::new();
    let (budgets, more) = loop {
        let reply = client.list_claims(request.clone()).await?;
        claims.extend(reply.claims);
        if reply.next_page_token.is_empty() || claims.len() >= limit {
            break (reply.budgets, !reply.next_page_token.is_empty());
        }
        if reply.next_page_token == request.page_token {
            return Err(CliError::BadAnswer { verb: "claims", what: "it sent one page token twice".to_owned() });
        }
        request.page_token = reply.next_page_token;
    };
    let truncated = more || claims.len() > limit;
    claims.truncate(limit);
    let budget = |b: &v1::ClaimBudget| Budget {
        tier: tier_text(b.tier),
        claimed_bytes: b.claimed_bytes,
        budget_bytes: b.budget_bytes,
    };
    let listed = Listed {
        claims: claims.iter().map(Claim::from).collect(),
        budgets: budgets.iter().map(budget).collect(),
        truncated,
    };
    Ok(Report::new(list_text(&listed), &listed, true))
}

fn list_text(listed: &Listed) -> String {
    let more = if listed.truncated { "; there may be more: raise --limit" } else { "" };
    let mut out = match listed.claims.len() {
        0 => "no claims\n".to_owned(),
        n => format!("{}{n} claims{more}\n", table(&listed.claims).render(0)),
    };
    for b in listed.budgets.iter().filter(|b| b.budget_bytes > 0) {
        let (claimed, budget) = (bytes_text(b.claimed_bytes), bytes_text(b.budget_bytes));
        out += &format!("pinned in {}: {claimed} of at most {budget}\n", b.tier);
    }
    out
}

/// The table of claims.
pub(crate) fn table(claims: &[Claim]) -> Table {
    let mut table = Table::new(&[
        ("CLAIM", Align::Left),
        ("OWNER", Align::Left),
        ("TENANT", Align::Left),
        ("KIND", Align::Left),
        ("TIER", Align::Left),
        ("PRIORITY", Align::Right),
        ("ENDS IN", Align::Right),
        ("BLOCKS", Align::Right),
        ("BYTES", Align::Right),
        ("RESIDENT", Align::Right),
    ]);
    for c in claims {
        table.row([
            &c.claim_id,
            &c.owner,
            &c.tenant,
            &c.kind,
            &c.tier,
            &c.priority.to_string(),
            &duration_text(Duration::from_millis(c.remaining_ms)),
            &c.blocks.to_string(),
            &bytes_text(c.bytes),
            &bytes_text(c.resident_bytes),
        ]);
    }
    table
}
