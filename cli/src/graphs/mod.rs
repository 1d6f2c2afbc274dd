//! `kvtier graph`: what programs declare that they will do.

mod file;
mod next;
mod otel;
mod spans;

use std::time::Duration;

use kvtier_proto::v1;
use kvtier_types::DIGEST_BYTES;
use serde::Serialize;

use crate::args::{DeclareArgs, GraphCommand};
use crate::client::Client;
use crate::error::CliError;
use crate::files::read_file;
use crate::locate::outcome_text;
use crate::outcomes::{Outcomes, all_done, is_done};
use crate::report::Report;
use crate::table::{Align, Table, printable};
use crate::units::duration_text;

pub(crate) use next::next;

/// Steps before one that a table names.
const NAMED: usize = 3;

/// A program's outcome as JSON.
#[derive(Debug, Serialize)]
struct Told {
    program_id: String,
    outcome: String,
    reason: String,
    steps: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
    #[serde(flatten)]
    nodes: Outcomes,
}

/// Asks the daemon what a command wants.
///
/// # Errors
/// What the daemon's answers can be; [`CliError::File`] for files that cannot be used.
pub(crate) async fn graph(client: &mut Client, command: &GraphCommand) -> Result<Report, CliError> {
    match command {
        GraphCommand::Declare(args) => declare(client, args).await,
        GraphCommand::Show { program, tenant } => show(client, program, tenant.as_ref()).await,
        GraphCommand::Progress { program, began, ended, tenant } => {
            let message = v1::ProgressRequest {
                program_id: program.clone(),
                tenant: tenant.clone().unwrap_or_default(),
                began: began.clone(),
                ended: ended.clone(),
                local_only: false,
            };
            let reply = client.progress(message).await?;
            Ok(told(
                &[Told {
                    program_id: program.clone(),
                    outcome: outcome_text(reply.outcome),
                    reason: reply.reason.clone(),
                    steps: reply.steps,
                    revision: None,
                    nodes: Outcomes::new(&[], &reply.nodes, &[]),
                }],
                is_done(reply.outcome()) && all_done(&[], &reply.nodes),
            ))
        }
        GraphCommand::Remove { program, tenant } => {
            let tenant = tenant.clone().unwrap_or_default();
            let message = v1::DeclareRequest { program_id: program.clone(), tenant, ..Default::default() };
            let (told_of, done) = declare_one(client, message).await?;
            Ok(told(&[told_of], done))
        }
    }
}

/// What `graph declare` would declare. Needs no daemon.
///
/// # Errors
/// [`CliError::File`] and [`CliError::Usage`].
pub(crate) fn dry_run(args: &DeclareArgs) -> Result<Report, CliError> {
    let programs = programs(args)?;
    let mut table = Table::new(&[("PROGRAM", Align::Left), ("STEPS", Align::Right), ("TAKES", Align::Right)]);
    for program in &programs {
        let takes = program.steps.iter().map(|s| s.expected_ms).fold(0, u64::saturating_add);
        table.row([&program.program_id, &program.steps.len().to_string(), &span(takes)]);
    }
    Ok(Report::new(table.render(0), &programs.iter().map(file::Program::from).collect::<Vec<_>>(), true))
}

/// The programs of the file on a command line.
fn programs(args: &DeclareArgs) -> Result<Vec<v1::DeclareRequest>, CliError> {
    let mut programs = match (&args.file, &args.otel) {
        (Some(path), _) => file::parse(&read_file(path)?).map_err(|reason| CliError::file(path, reason))?,
        (None, Some(path)) => {
            let text = read_file(path)?;
            let found = spans::read(&text).map_err(|reason| CliError::file(path, reason))?;
            let (programs, notes) = otel::programs(found);
            for note in notes {
                eprintln!("kvtier: {}: {}", path.display(), printable(&note));
            }
            programs
        }
        (None, None) => Vec::new(),
    };
    if programs.is_empty() {
        return Err(CliError::Usage("there is no program in the file: nothing to declare".to_owned()));
    }
    if let Some(id) = &args.program {
        let [program] = programs.as_mut_slice() else {
            return Err(CliError::Usage(format!("--program names one program, the file has {}", programs.len())));
        };
        // Branches are named below their program.
        let (old, new) = (format!("{}/", program.program_id), format!("{id}/"));
        for step in &mut program.steps {
            if let Some(branch) = step.program_id.strip_prefix(&old) {
                step.program_id = format!("{new}{branch}");
            }
        }
        program.program_id.clone_from(id);
    }
    for program in programs.iter_mut().filter(|_| args.tenant.is_some()) {
        program.tenant = args.tenant.clone().unwrap_or_default();
    }
    Ok(programs)
}

async fn declare(client: &mut Client, args: &DeclareArgs) -> Result<Report, CliError> {
    let (mut all, mut complete) = (Vec::new(), true);
    for program in programs(args)? {
        let (one, done) = declare_one(client, program).await?;
        complete &= done;
        all.push(one);
    }
    Ok(told(&all, complete))
}

async fn declare_one(client: &mut Client, message: v1::DeclareRequest) -> Result<(Told, bool), CliError> {
    let program_id = message.program_id.clone();
    let reply = client.declare(message).await?;
    let done = is_done(reply.outcome()) && all_done(&[], &reply.nodes);
    let one = Told {
        program_id,
        outcome: outcome_text(reply.outcome),
        reason: reply.reason.clone(),
        steps: reply.steps,
        revision: Some(reply.revision),
        nodes: Outcomes::new(&[], &reply.nodes, &[]),
    };
    Ok((one, done))
}

fn told(all: &[Told], complete: bool) -> Report {
    let mut text = String::new();
    for one in all {
        let reason = if one.reason.is_empty() { String::new() } else { format!(": {}", printable(&one.reason)) };
        text += &format!("program {} {}, {} steps{reason}\n", printable(&one.program_id), one.outcome, one.steps);
        text += &one.nodes.rows(|_| false);
    }
    match all {
        [one] => Report::new(text, one, complete),
        _ => Report { text, json: serde_json::json!({ "programs": all }), complete },
    }
}

async fn show(client: &mut Client, program: &str, tenant: Option<&String>) -> Result<Report, CliError> {
    let tenant = tenant.cloned().unwrap_or_default();
    let reply = client.get_graph(v1::GetGraphRequest { program_id: program.to_owned(), tenant }).await?;
    let graphs: Vec<file::Graph> = reply.graphs.iter().map(file::Graph::from).collect();
    let text = if graphs.is_empty() {
        format!("nothing is declared of program {}\n", printable(program))
    } else {
        reply.graphs.iter().map(graph_text).collect()
    };
    Ok(Report { text, json: serde_json::json!({ "graphs": graphs }), complete: !graphs.is_empty() })
}

fn graph_text(graph: &v1::Graph) -> String {
    let mut table = Table::new(&[
        ("STEP", Align::Left),
        ("STATE", Align::Left),
        ("TAKES", Align::Right),
        ("TO THE END", Align::Right),
        ("AFTER", Align::Left),
        ("RUN BY", Align::Left),
        ("KIND", Align::Left),
        ("SHARES", Align::Left),
    ]);
    for state in &graph.steps {
        let Some(step) = &state.step else { continue };
        let mut after = step.after[..step.after.len().min(NAMED)].join(", ");
        if step.after.len() > NAMED {
            after += &format!(" and {} more", step.after.len() - NAMED);
        }
        let (takes, rank) = (span(state.takes_ms), span(state.rank_ms));
        let shares = shares(step);
        table.row([&step.step_id, &state.state, &takes, &rank, &after, &step.program_id, &step.kind, &shares]);
    }
    format!(
        "program {} of {}, revision {}: {} of {} steps ended, {} taken, {} left, {} to the end\n{}",
        printable(&graph.program_id),
        printable(&graph.tenant),
        graph.revision,
        graph.ended,
        graph.steps.len(),
        span(graph.attained_ms),
        span(graph.remaining_ms),
        span(graph.critical_path_ms),
        table.render(2)
    )
}

/// What a step shares with others, in a few words.
fn shares(step: &v1::GraphStep) -> String {
    let semantic = step.shares();
    let kind = if semantic == v1::SemanticType::Unspecified { "" } else { semantic.as_str_name() };
    let part = step.shared_context.as_ref().map(|shared| {
        let of = if shared.program_id.is_empty() { String::new() } else { format!(" of {}", shared.program_id) };
        match (shared.keys.len() / DIGEST_BYTES, shared.start_token, shared.end_token) {
            (0, 0, 0) => format!("all{of}"),
            (0, start, 0) => format!("tokens from {start}{of}"),
            (0, start, end) => format!("tokens {start}..{end}{of}"),
            (1, ..) => "up to a block".to_owned(),
            (blocks, ..) => format!("up to {blocks} blocks"),
        }
    });
    [kind.to_owned(), part.unwrap_or_default()].into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(", ")
}

fn span(ms: u64) -> String {
    duration_text(Duration::from_millis(ms))
}
