//! Prometheus metrics and health over HTTP.
//!
//! Values are read from the core and the stores when asked: there is no second set of counters to disagree with.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use kvtier_policy::evict::Contender;
use kvtier_policy::{Core, TierUse};
use kvtier_storage::BlockStore;
use kvtier_transport::TransportStats;
use kvtier_types::{Origin, SemanticType, Tier};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::node::Node;
use crate::services;

/// Connections at once.
const MAX_CONNECTIONS: usize = 64;
/// Longest a client may take to send its request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves `/metrics` and `/healthz` until the node stops.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(node: Arc<Node>, address: SocketAddr) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    let of_task = Arc::clone(&node);
    node.tasks.spawn(async move {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                () = of_task.stopping.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let (Ok((stream, _)), Ok(permit)) = (accepted, Arc::clone(&permits).try_acquire_owned()) else { continue };
            let of_connection = Arc::clone(&of_task);
            tokio::spawn(async move {
                let _permit = permit;
                let service = service_fn(move |request| answer(Arc::clone(&of_connection), request));
                let http = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), service);
                if let Err(error) = http.await {
                    tracing::debug!(%error, "metrics connection");
                }
            });
        }
    });
    Ok(bound)
}

async fn answer(node: Arc<Node>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, body) = match request.uri().path() {
        "/metrics" => (StatusCode::OK, exposition(&node)),
        "/healthz" => (StatusCode::OK, "ok\n".to_owned()),
        "/readyz" if node.is_draining() => (StatusCode::SERVICE_UNAVAILABLE, "draining\n".to_owned()),
        "/readyz" => (StatusCode::OK, "ready\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "try /metrics, /healthz or /readyz\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let text = hyper::header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, text);
    Ok(response)
}

/// Writes the Prometheus text format.
#[derive(Default)]
struct Page(String);

impl Page {
    fn family<'a>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        samples: impl IntoIterator<Item = (&'a str, &'a str, u64)>,
    ) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
        for (label, value, count) in samples {
            if label.is_empty() {
                self.line(format_args!("{name} {count}"));
            } else {
                self.line(format_args!("{name}{{{label}=\"{value}\"}} {count}"));
            }
        }
    }

    /// A family with two labels.
    fn pairs<'a>(
        &mut self,
        (name, kind, help): (&str, &str, &str),
        labels: (&str, &str),
        samples: impl Iterator<Item = ((&'a str, &'a str), u64)>,
    ) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
        for ((first, second), count) in samples {
            self.line(format_args!("{name}{{{}=\"{first}\",{}=\"{second}\"}} {count}", labels.0, labels.1));
        }
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{line}").expect("writing to a string does not fail");
    }
}

/// Every metric of the node.
#[must_use]
pub fn exposition(node: &Arc<Node>) -> String {
    let mut page = Page::default();
    node.read_core(|core| {
        core_counters(&mut page, core);
        core_gauges(&mut page, core);
        claims(&mut page, core);
        marks(&mut page, core);
    });
    operations(&mut page, node);
    programs(&mut page, node);
    eviction(&mut page, node);
    ahead(&mut page, node);
    rules(&mut page, node);
    memory(&mut page, node);
    stores(&mut page, node);
    hints(&mut page, node);
    cluster(&mut page, node);
    let hold = u64::try_from(node.take_longest_hold().as_micros()).unwrap_or(u64::MAX);
    let help = "Longest time the core's lock was held since the last scrape.";
    page.family("kvtier_core_lock_hold_max_microseconds", "gauge", help, [("", "", hold)]);
    page.family("kvtier_incarnation", "gauge", "Number of this start.", [("", "", node.incarnation)]);
    page.0
}

fn by_tier(counts: [u64; Tier::ALL.len()]) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
    Tier::ALL.into_iter().map(move |t| ("tier", t.name(), counts[t.index()]))
}

fn core_counters(page: &mut Page, core: &Core) {
    let c = core.counts();
    let ledger = core.ledger().rows().map(|(fate, n)| ("fate", fate, n));
    let help = "Looked-up tokens by what became of them; they sum to kvtier_looked_up_tokens_total.";
    page.family("kvtier_tokens_total", "counter", help, ledger);
    let looked_up = core.ledger().looked_up();
    page.family("kvtier_looked_up_tokens_total", "counter", "Tokens looked up and settled.", [("", "", looked_up)]);
    let help = "Block shards loaded by engines, by where they came from.";
    let loaded = Origin::ALL.into_iter().map(|o| ("origin", o.name(), c.loaded[o.index()]));
    page.family("kvtier_blocks_loaded_total", "counter", help, loaded);
    page.family("kvtier_blocks_sealed_total", "counter", "Block shards sealed.", [("", "", c.sealed)]);
    let reserved = ["granted", "present", "busy"].into_iter().zip(c.reserved).map(|(a, n)| ("answer", a, n));
    page.family("kvtier_reservations_total", "counter", "Blocks reserved, by answer.", reserved);
    page.family("kvtier_evicted_total", "counter", "Copies dropped to make room.", by_tier(c.evicted));
    page.family("kvtier_moved_total", "counter", "Copies made, by target tier.", by_tier(c.moved));
    page.family(
        "kvtier_move_failures_total",
        "counter",
        "Copies that failed, by target tier.",
        by_tier(c.move_failures),
    );
    page.family("kvtier_corrupt_blocks_total", "counter", "Copies whose bytes did not match.", [("", "", c.corrupt)]);
    page.family("kvtier_lost_loads_total", "counter", "Loads that failed otherwise.", [("", "", c.lost)]);
    let help = "Attachments let go: detached, silent, or their stream closed.";
    page.family("kvtier_attachments_ended_total", "counter", help, [("", "", c.reaped)]);
    let reaped = c.reaped_reservations;
    page.family("kvtier_reservations_reaped_total", "counter", "Frames reserved and never sealed.", [("", "", reaped)]);
    page.family("kvtier_leases_expired_total", "counter", "Leases nobody released.", [("", "", c.expired_leases)]);
}

fn core_gauges(page: &mut Page, core: &Core) {
    let (entries, bytes) = core.catalog_size();
    page.family("kvtier_catalog_entries", "gauge", "Block shards known.", [("", "", entries as u64)]);
    page.family("kvtier_catalog_bytes", "gauge", "Memory of the catalog itself.", [("", "", bytes as u64)]);
    page.family(
        "kvtier_attachments",
        "gauge",
        "Engine processes attached.",
        [("", "", core.attachments().len() as u64)],
    );
    let pending = [
        ("direction", "down", core.pending_offloads() as u64),
        ("direction", "up", core.pending_onboards() as u64),
        ("direction", "device", core.pending_device_copies() as u64),
    ];
    page.family("kvtier_movements_pending", "gauge", "Movements queued or under way.", pending);
}

fn claims(page: &mut Page, core: &Core) {
    let held = core.claims_held().map(|(kind, count)| ("kind", kind, count));
    page.family("kvtier_claims", "gauge", "Claims that live; for hints and stems, the blocks they hold.", held);
    let tiers = [Tier::Host, Tier::Disk];
    let bytes = |pick: fn((u64, u64)) -> u64| tiers.map(|t| ("tier", t.name(), pick(core.claimed(t))));
    page.family("kvtier_claimed_bytes", "gauge", "Bytes that hard claims hold.", bytes(|(claimed, _)| claimed));
    page.family("kvtier_claim_budget_bytes", "gauge", "The most they may hold.", bytes(|(_, budget)| budget));
    let counts = core.claim_counts();
    let rows = [
        ("what", "made", counts.made),
        ("what", "clipped", counts.clipped),
        ("what", "rejected", counts.rejected),
        ("what", "expired", counts.expired),
        ("what", "released", counts.released),
    ];
    page.family("kvtier_claim_calls_total", "counter", "What became of claims.", rows);
}

fn operations(page: &mut Page, node: &Node) {
    let (running, counts) = node.operations.counts();
    page.family("kvtier_operations_running", "gauge", "Long work of verbs under way.", [("", "", running as u64)]);
    let ended = ["done", "cancelled", "expired"].into_iter().zip(counts.ended).map(|(state, n)| ("state", state, n));
    page.family("kvtier_operations_total", "counter", "Operations that ended.", ended);
    let blocks = ["done", "failed"].into_iter().zip(counts.blocks).map(|(end, n)| ("end", end, n));
    page.family("kvtier_operation_blocks_total", "counter", "Blocks of operations that ended.", blocks);
}

fn ahead(page: &mut Page, node: &Node) {
    let (spent, outstanding) = node.ahead.spent();
    let fates = [
        ("useful", spent.useful_bytes),
        ("late", spent.late_bytes),
        ("wasted", spent.wasted_bytes),
        ("refused", spent.refused_bytes),
    ];
    let help = "Bytes brought up before programs returned, by what became of them.";
    page.family("kvtier_prefetch_bytes_total", "counter", help, fates.map(|(fate, bytes)| ("fate", fate, bytes)));
    let help = "Bytes brought up ahead that nobody has used yet.";
    page.family("kvtier_prefetch_outstanding_bytes", "gauge", help, [("", "", outstanding)]);
    let spread = node.read_core(Core::spread_counts);
    let fates = [
        ("useful", spread.useful_bytes),
        ("late", spread.late_bytes),
        ("wasted", spread.wasted_bytes),
        ("refused", spread.refused_bytes),
    ];
    let help = "Bytes that other nodes had copied here ahead of their use, by what became of them.";
    page.family("kvtier_spread_here_bytes_total", "counter", help, fates.map(|(fate, bytes)| ("fate", fate, bytes)));
    let help = "Bytes so copied that lie in host memory and nobody has read yet.";
    page.family("kvtier_spread_unread_bytes", "gauge", help, [("", "", spread.unread_bytes)]);
}

fn eviction(page: &mut Page, node: &Node) {
    let ((segments, classes), leader, guarded) =
        node.read_core(|core| (core.segments(), core.leader(), core.eviction().is_guarded()));
    let help = "Segments of blocks that were last used together.";
    page.family("kvtier_segments", "gauge", help, [("", "", segments as u64)]);
    let help = "Classes of segments that eviction tells apart.";
    page.family("kvtier_segment_classes", "gauge", help, [("", "", classes as u64)]);
    let may_lead = Contender::ALL.into_iter().filter(|contender| guarded || *contender == leader);
    let leads = may_lead.map(|contender| ("policy", contender.name(), u64::from(contender == leader)));
    page.family("kvtier_eviction_policy", "gauge", "1 for the ranking that host memory follows.", leads);
}

fn programs(page: &mut Page, node: &Node) {
    let (known, c) = node.read_core(Core::program_counts);
    page.family("kvtier_programs", "gauge", "Programs and sessions known.", [("", "", known as u64)]);
    let kinds = ["tool_wait", "continuation", "fork", "join", "compaction", "completion", "cancellation"];
    let signals = kinds.into_iter().zip(c.signals).map(|(kind, n)| ("kind", kind, n));
    page.family("kvtier_signals_total", "counter", "Signals of programs taken in.", signals);
    let help = "Block shards that only an abandoned program held: freed.";
    page.family("kvtier_program_freed_blocks_total", "counter", help, [("", "", c.freed)]);
    page.family("kvtier_program_freed_bytes_total", "counter", "Their bytes.", [("", "", c.freed_bytes)]);
    let help = "Block shards that only completed programs held, or contexts that were rewritten: they go first.";
    page.family("kvtier_program_faded_blocks_total", "counter", help, [("", "", c.faded)]);
    let graphs = node.graphs.counts();
    let help = "Programs that declared their steps.";
    page.family("kvtier_declared_programs", "gauge", help, [("", "", graphs.graphs as u64)]);
    let steps = [("waiting", graphs.waiting), ("running", graphs.running), ("ended", graphs.ended)];
    let steps = steps.map(|(state, count)| ("state", state, count as u64));
    page.family("kvtier_declared_steps", "gauge", "Their steps, by how far they are.", steps);
    let placed = node.placements.counts().map(|(reason, n)| ("reason", reason, n));
    page.family("kvtier_placements_total", "counter", "Steps placed, by why there.", placed);
    let watchers = services::watchers(&node.watchers);
    page.family("kvtier_watchers", "gauge", "Streams of block events.", [("", "", watchers)]);
    let events = node.read_core(Core::last_event);
    page.family("kvtier_events_total", "counter", "Block events.", [("", "", events)]);
}

fn marks(page: &mut Page, core: &Core) {
    let tiers = [Tier::Host, Tier::Disk];
    let kept = tiers.map(|t| ("tier", t.name(), core.kept_use(t).bytes));
    page.family("kvtier_kept_bytes", "gauge", "Bytes that taints and rules keep from making room.", kept);
    let marks = core.marks() as u64;
    page.family("kvtier_marked_blocks", "gauge", "Blocks of which something was said by verb.", [("", "", marks)]);
    let waiting = core.pending_replications() as u64;
    let help = "Block shards that wait for copies on other nodes.";
    page.family("kvtier_replications_pending", "gauge", help, [("", "", waiting)]);
    let c = core.counts();
    page.family(
        "kvtier_expired_blocks_total",
        "counter",
        "Block shards whose time ran out.",
        [("", "", c.expired_blocks)],
    );
    let help = "Times that a budget did not take a copy which taints or rules would keep.";
    page.family("kvtier_keeps_clipped_total", "counter", help, [("", "", c.clipped_keeps)]);
    let uses = SemanticType::ALL.into_iter().flat_map(|s| Tier::ALL.map(|t| (s, t, core.type_use(s, t))));
    let uses: Vec<_> = uses.filter(|(_, _, of)| of.copies > 0).collect();
    let rows = |pick: fn(&TierUse) -> u64| uses.iter().map(move |(s, t, of)| ((s.name(), t.name()), pick(of)));
    let labels = ("type", "tier");
    page.pairs(("kvtier_type_copies", "gauge", "Copies by meaning and tier."), labels, rows(|of| of.copies));
    page.pairs(("kvtier_type_bytes", "gauge", "Their bytes."), labels, rows(|of| of.bytes));
}

fn rules(page: &mut Page, node: &Node) {
    let state = node.rules.state();
    let help = "Times that rules were put in force since start.";
    page.family("kvtier_rules_generation", "gauge", help, [("", "", state.generation)]);
    let help = "1 while the rules file has a mistake and the rules stay as they were.";
    page.family("kvtier_rules_refused", "gauge", help, [("", "", u64::from(!state.refused.is_empty()))]);
}

fn memory(page: &mut Page, node: &Node) {
    let stats = node.arena.stats();
    let rows = [
        ("kind", "capacity", stats.capacity_bytes),
        ("kind", "resident", stats.resident_bytes),
        ("kind", "used", stats.used_bytes),
    ];
    page.family("kvtier_host_bytes", "gauge", "Host memory for blocks.", rows);
    devices(page, node);
    page.family("kvtier_host_pinned_frames", "gauge", "Frames under I/O.", [("", "", stats.pinned_frames)]);
}

fn devices(page: &mut Page, node: &Node) {
    let stats: Vec<_> = node.devices.gpus().iter().map(|gpu| (gpu.number.index().to_string(), gpu)).collect();
    let rows = stats.iter().flat_map(|(number, gpu)| {
        let stats = gpu.pool.stats();
        let kinds =
            [("capacity", stats.capacity_bytes), ("resident", stats.resident_bytes), ("used", stats.used_bytes)];
        kinds.map(|(kind, bytes)| ((number.as_str(), kind), bytes))
    });
    let help = "Memory of devices for blocks.";
    page.pairs(("kvtier_device_bytes", "gauge", help), ("device", "kind"), rows);
    let lost = stats.iter().map(|(number, gpu)| ("device", number.as_str(), u64::from(gpu.is_lost())));
    page.family("kvtier_device_lost", "gauge", "1 for a device that is gone, or this process's access to it.", lost);
}

fn hints(page: &mut Page, node: &Node) {
    let names = [
        ("kvtier_hints_applied_total", "Hints of clients that were taken, by action."),
        ("kvtier_hints_clipped_total", "Hints of clients that were taken in part, by action."),
        ("kvtier_hints_rejected_total", "Hints of clients that were not valid or not trusted, by action."),
        ("kvtier_hints_ignored_total", "Hints of clients that nobody here carries out, by action."),
    ];
    for (fate, (name, help)) in names.into_iter().enumerate() {
        let rows = node.hints.counts.of(fate).map(|(kind, count)| ("action", kind, count));
        page.family(name, "counter", help, rows);
    }
    let help = "Runs of blocks that requests asked to keep and that found no room.";
    page.family("kvtier_hints_not_held_total", "counter", help, [("", "", node.hints.counts.runs_not_held())]);
}

fn stores(page: &mut Page, node: &Node) {
    let disk = node.stores.disk.as_deref().map(|d| ("disk", d.usage()));
    let object = node.stores.object.as_deref().map(|o| ("object", o.usage()));
    let usages: Vec<_> = disk.into_iter().chain(object).collect();
    let column = |pick: fn(&kvtier_storage::Usage) -> u64| {
        usages.iter().map(move |(tier, usage)| ("tier", *tier, pick(usage))).collect::<Vec<_>>()
    };
    page.family("kvtier_store_capacity_bytes", "gauge", "Most bytes of a store.", column(|u| u.capacity_bytes));
    page.family("kvtier_store_used_bytes", "gauge", "Bytes in use, dead ones included.", column(|u| u.used_bytes));
    page.family("kvtier_store_live_bytes", "gauge", "Bytes of living records.", column(|u| u.live_bytes));
    page.family("kvtier_store_pending_writes", "gauge", "Writes under way.", column(|u| u.pending_writes));
    let disk = node.stores.disk.as_deref().is_some_and(|disk| disk.health().is_ok());
    let tiers = [
        ("disk", node.config.disk.enabled, disk),
        ("object", node.config.object.enabled, node.stores.object.is_some()),
    ];
    let open =
        tiers.into_iter().filter(|(_, configured, _)| *configured).map(|(tier, _, open)| ("tier", tier, open.into()));
    page.family("kvtier_store_open", "gauge", "1 for each configured store that is open and takes writes.", open);
}

fn cluster(page: &mut Page, node: &Node) {
    let Some(cluster) = node.cluster.as_ref().filter(|_| !node.config.cluster.is_embedded()) else { return };
    let away = u64::from(cluster.directory_state().away.is_some());
    page.family("kvtier_directory_away", "gauge", "1 while the directory does not answer.", [("", "", away)]);
    let (unpublished, counts) = node.read_core(Core::publication_state);
    let help = "Changes the directory was not told of yet.";
    page.family("kvtier_unpublished_changes", "gauge", help, [("", "", unpublished as u64)]);
    page.family("kvtier_published_changes_total", "counter", "Changes published.", [("", "", counts.changes)]);
    let help = "Times everything was published anew.";
    page.family("kvtier_published_anew_total", "counter", help, [("", "", counts.anew)]);
    let nodes = cluster.records().len() as u64;
    page.family("kvtier_cluster_nodes", "gauge", "Nodes that live, this one included.", [("", "", nodes)]);
    let (waiting, bytes, dropped) = cluster.outbox.size();
    let help = "Verbs that nodes which are away were not told yet, each counted once a node.";
    page.family("kvtier_outbox_verbs", "gauge", help, [("", "", waiting as u64)]);
    page.family("kvtier_outbox_bytes", "gauge", "Bytes of verbs that wait for nodes.", [("", "", bytes as u64)]);
    let help = "Verbs that a node will not be told: too much waited for it, or for too long.";
    page.family("kvtier_outbox_dropped_total", "counter", help, [("", "", dropped)]);
    let help = "Bytes of shared prefixes that were seen to have copies on other nodes, by reason.";
    let spread = cluster.spread.bytes().map(|(reason, bytes)| ("reason", reason, bytes));
    page.family("kvtier_spread_bytes_total", "counter", help, spread);
    let counts = node.read_core(|core| services::cluster_counts(node, core));
    let rows = counts.into_iter().map(|(name, n)| ("what", name, n));
    page.family("kvtier_cluster_blocks_total", "counter", "Block shards exchanged with other nodes.", rows);
    let stats: Vec<_> = cluster.transports.iter().map(|(kind, t)| (kind, t.map(|t| t.stats()))).collect();
    let column = |pick: fn(&TransportStats) -> u64| {
        let rows = stats.iter().filter_map(move |(kind, s)| s.as_ref().ok().map(|s| ("transport", *kind, pick(s))));
        rows.collect::<Vec<_>>()
    };
    let open = stats.iter().map(|(kind, s)| ("transport", *kind, u64::from(s.is_ok())));
    page.family("kvtier_transport_open", "gauge", "1 for each configured transport that is open.", open);
    page.family("kvtier_transport_read_bytes_total", "counter", "Bytes read from peers.", column(|s| s.read_bytes));
    page.family("kvtier_transport_served_bytes_total", "counter", "Bytes peers read.", column(|s| s.served_bytes));
    page.family("kvtier_transport_failed_reads_total", "counter", "Reads that failed.", column(|s| s.failed_reads));
    page.family("kvtier_transport_links", "gauge", "Links to peers.", column(|s| s.links));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_follow_the_text_format() {
        let mut page = Page::default();
        page.family("a_total", "counter", "Things.", [("tier", "host", 3), ("tier", "disk", 0)]);
        page.family("b", "gauge", "One.", [("", "", 7)]);
        let want = "# HELP a_total Things.\n# TYPE a_total counter\na_total{tier=\"host\"} 3\na_total{tier=\"disk\"} 0\n\
                    # HELP b One.\n# TYPE b gauge\nb 7\n";
        assert_eq!(page.0, want);
    }
}
