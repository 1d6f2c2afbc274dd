//! `kvtier programs` and `signal`.

use std::time::Duration;

use kvtier_proto::v1;
use serde::Serialize;

use crate::args::SignalArgs;
use crate::client::{Client, PAGE_BLOCKS};
use crate::error::CliError;
use crate::locate::outcome_text;
use crate::outcomes::{Outcomes, all_done, is_done};
use crate::report::Report;
use crate::table::{Align, Table, printable};
use crate::units::{bytes_text, duration_text, millis};

/// A program as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Program {
    pub(crate) program_id: String,
    pub(crate) parent_program_id: String,
    pub(crate) tenant: String,
    pub(crate) state: String,
    pub(crate) idle_ms: u64,
    pub(crate) blocks: u64,
    pub(crate) exclusive_blocks: u64,
    pub(crate) agent_role: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) blocks_parent: Option<bool>,
}

impl From<&v1::Program> for Program {
    fn from(p: &v1::Program) -> Self {
        Self {
            program_id: p.program_id.clone(),
            parent_program_id: p.parent_program_id.clone(),
            tenant: p.tenant.clone(),
            state: p.state.clone(),
            idle_ms: p.idle_ms,
            blocks: p.blocks,
            exclusive_blocks: p.exclusive_blocks,
            agent_role: p.agent_role.clone(),
            blocks_parent: p.blocks_parent,
        }
    }
}

#[derive(Debug, Serialize)]
struct Listed {
    programs: Vec<Program>,
    truncated: bool,
}

#[derive(Debug, Serialize)]
struct Signaled {
    outcome: String,
    reason: String,
    blocks: u64,
    bytes: u64,
    #[serde(flatten)]
    nodes: Outcomes,
}

/// Lists programs, those with most blocks first.
///
/// # Errors
/// What the daemon's answers can be.
pub(crate) async fn list(client: &mut Client, limit: u32) -> Result<Report, CliError> {
    let (wire, truncated) = every(client, limit).await?;
    let listed = Listed { programs: wire.iter().map(Program::from).collect(), truncated };
    let more = if truncated { "; there may be more: raise --limit" } else { "" };
    let text = match listed.programs.len() {
        0 => "no programs\n".to_owned(),
        n => format!("{}{n} programs{more}\n", table(&listed.programs).render(0)),
    };
    Ok(Report::new(text, &listed, true))
}

/// At most `limit` programs, those with most blocks first, and whether there may be more.
///
/// # Errors
/// What the daemon's answers can be.
pub(crate) async fn every(client: &mut Client, limit: u32) -> Result<(Vec<v1::Program>, bool), CliError> {
    let mut request = v1::ListProgramsRequest { page_size: limit.min(PAGE_BLOCKS), ..Default::default() };
    let mut programs: Vec<v1::Program> = Vec::new();
    let more = loop {
        let reply = client.list_programs(request.clone()).await?;
        programs.extend(reply.programs);
        if reply.next_page_token.is_empty() || programs.len() >= limit as usize {
            break !reply.next_page_token.is_empty();
        }
        if reply.next_page_token == request.page_token {
            return Err(CliError::BadAnswer { verb: "programs", what: "it sent one page token twice".to_owned() });
        }
        request.page_token = reply.next_page_token;
    };
    let truncated = more || programs.len() > limit as usize;
    programs.truncate(limit as usize);
    programs.sort_by(|a, b| b.blocks.cmp(&a.blocks).then_with(|| a.program_id.cmp(&b.program_id)));
    Ok((programs, truncated))
}

/// The table of programs.
pub(crate) fn table(programs: &[Program]) -> Table {
    let mut table = Table::new(&[
        ("PROGRAM", Align::Left),
        ("PARENT", Align::Left),
        ("TENANT", Align::Left),
        ("ROLE", Align::Left),
        ("STATE", Align::Left),
        ("IDLE", Align::Right),
        ("BLOCKS", Align::Right),
        ("ONLY ITS OWN", Align::Right),
    ]);
    for p in programs {
        table.row([
            &p.program_id,
            &p.parent_program_id,
            &p.tenant,
            &p.agent_role,
            &p.state,
            &duration_text(Duration::from_millis(p.idle_ms)),
            &p.blocks.to_string(),
            &p.exclusive_blocks.to_string(),
        ]);
    }
    table
}

/// Says what a program does.
///
/// # Errors
/// What the daemon's answers can be; [`CliError::Usage`] for a fork or a join without children.
pub(crate) async fn signal(client: &mut Client, args: &SignalArgs) -> Result<Report, CliError> {
    let message = v1::SignalRequest {
        program_id: args.program.clone(),
        parent_program_id: args.parent.clone().unwrap_or_default(),
        kind: args.kind.0.into(),
        children: args.children.clone(),
        expected_resume_ms: args.expected_resume.map(millis).unwrap_or_default(),
        tenant: args.tenant.clone().unwrap_or_default(),
        local_only: false,
    };
    let reply = client.signal(message).await?;
    let signaled = Signaled {
        outcome: outcome_text(reply.outcome),
        reason: reply.reason.clone(),
        blocks: reply.blocks,
        bytes: reply.bytes,
        nodes: Outcomes::new(&[], &reply.nodes, &[]),
    };
    let complete = is_done(reply.outcome()) && all_done(&[], &reply.nodes);
    Ok(Report::new(text(&args.program, &signaled), &signaled, complete))
}

/// Checks that a signal says all that its kind needs.
///
/// # Errors
/// [`CliError::Usage`].
pub(crate) fn plausible(args: &SignalArgs) -> Result<(), CliError> {
    let family = matches!(args.kind.0, v1::SignalKind::Fork | v1::SignalKind::Join);
    let usage = |text: &str| Err(CliError::Usage(text.to_owned()));
    match (family, args.children.is_empty()) {
        (true, true) => usage("a fork or a join has children: name each with --child"),
        (false, false) => usage("--child goes with a fork or a join only"),
        _ if args.expected_resume.is_some() && args.kind.0 != v1::SignalKind::ToolWait => {
            usage("--expected-resume goes with tool-wait only")
        }
        _ => Ok(()),
    }
}

fn text(program: &str, signaled: &Signaled) -> String {
    let reason = if signaled.reason.is_empty() { String::new() } else { format!(": {}", printable(&signaled.reason)) };
    let freed = if signaled.blocks > 0 {
        format!("freed here: {} blocks, {}\n", signaled.blocks, bytes_text(signaled.bytes))
    } else {
        String::new()
    };
    let nodes = signaled.nodes.rows(|_| false);
    format!("program {} {}{reason}\n{freed}{nodes}", printable(program), signaled.outcome)
}
