//! How requests end: leases given up, tokens settled in the ledger, loads reported.

use kvtier_types::{BlockKey, Origin, Tier};

use super::{Core, CoreError};
use crate::attachment::AttachmentId;
use crate::entry::Flags;
use crate::events::EventKind;
use crate::lease::{LeaseId, Run};
use crate::ledger::{Fate, MissReason};

/// How a request ended.
#[derive(Debug, Clone, Copy)]
pub struct ReleaseReport {
    /// Tokens the engine held itself when it took the answer.
    pub local_tokens: u32,
    /// Tokens it took.
    pub claimed_tokens: u32,
    /// Of those, tokens whose load failed.
    pub lost_tokens: u32,
}

/// What became of loading one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadResult {
    /// Loaded and verified.
    Loaded,
    /// The bytes did not match.
    Corrupt,
    /// Not loaded for another reason.
    Lost,
}

/// The report of one shard's load.
#[derive(Debug, Clone, Copy)]
pub struct LoadReport {
    /// The block.
    pub key: BlockKey,
    /// Its shard.
    pub shard: u16,
    /// Where it came from.
    pub source: Origin,
    /// Generation of the frame it was loaded from.
    pub generation: u64,
    /// What became of it.
    pub result: LoadResult,
}

impl Core {
    /// Ends a request's lease and settles its tokens.
    pub fn release(&mut self, attachment: AttachmentId, request_id: &str, report: ReleaseReport) {
        let Some(lease) = self.attachments.get_mut(&attachment).and_then(|a| a.leases.remove(request_id)) else {
            return;
        };
        let Some(held) = self.leases.get(&lease) else { return };
        let lost_as = if held.corrupt { MissReason::Corrupt } else { MissReason::Late };
        let runs = held.runs.clone();
        let skipped = report.local_tokens.saturating_sub(held.local_tokens);
        self.settle(&runs, skipped, report, lost_as);
        self.drop_lease(lease);
        self.pump();
    }

    /// Counts fates: tokens the engine turned out to hold itself are not looked up at all.
    fn settle(&mut self, runs: &[Run], skipped: u32, report: ReleaseReport, lost_as: MissReason) {
        let (mut skip, mut claimed) = (skipped, report.claimed_tokens);
        let mut lost = report.lost_tokens.min(report.claimed_tokens);
        for run in runs {
            let skipped = skip.min(run.tokens);
            skip -= skipped;
            let tokens = run.tokens - skipped;
            let Fate::Served(_) = run.fate else {
                self.ledger.count(run.fate, u64::from(tokens));
                continue;
            };
            let taken = claimed.min(tokens);
            claimed -= taken;
            let failed = lost.min(taken);
            lost -= failed;
            self.ledger.count(run.fate, u64::from(taken - failed));
            self.ledger.count(Fate::Missed(lost_as), u64::from(failed));
            self.ledger.count(Fate::Missed(MissReason::Declined), u64::from(tokens - taken));
        }
    }

    /// Ends a lease whose holder did not say how it went: what it was offered counts under `reason`.
    pub(super) fn end_lease(&mut self, lease: LeaseId, reason: MissReason) {
        if let Some(held) = self.leases.get(&lease) {
            let (attachment, request_id) = (held.attachment, held.request_id.clone());
            for run in held.runs.clone() {
                let fate = if matches!(run.fate, Fate::Served(_)) { Fate::Missed(reason) } else { run.fate };
                self.ledger.count(fate, u64::from(run.tokens));
            }
            if let Some(attachment) = self.attachments.get_mut(&attachment) {
                attachment.leases.remove(&request_id);
            }
        }
        self.drop_lease(lease);
    }

    pub(super) fn release_request(&mut self, attachment: AttachmentId, request_id: &str) {
        let lease = self.attachments.get(&attachment).and_then(|a| a.leases.get(request_id)).copied();
        if let Some(lease) = lease {
            self.end_lease(lease, MissReason::Declined);
        }
    }

    fn drop_lease(&mut self, lease: LeaseId) {
        let Some(held) = self.leases.remove(&lease) else { return };
        for leased in held.blocks {
            self.stop_waiting(leased.id, lease);
            if self.catalog.touch(leased.id, |e| e.leases -= 1) {
                self.finish_doomed(leased.id);
            }
            self.forget_unwanted_one(leased.id);
        }
        // No lookup comes to say who reads what came.
        self.begun_came(&held.begun.unwrap_or_default());
    }

    /// Takes an engine's word on its loads: counts them, and quarantines copies whose bytes were wrong.
    ///
    /// # Errors
    /// [`CoreError::UnknownAttachment`].
    pub fn report_loads(
        &mut self,
        attachment: AttachmentId,
        request_id: &str,
        reports: &[LoadReport],
    ) -> Result<(), CoreError> {
        let reporter = self.attached(attachment)?;
        let (layout, engine) = (reporter.layout_number, reporter.engine);
        for report in reports {
            match report.result {
                LoadResult::Loaded => {
                    self.counts.loaded[report.source.index()] += 1;
                    if report.source == Origin::Tier(Tier::Device) {
                        self.note_device_load((engine, layout), report);
                    }
                    if let Some(id) = self.catalog.find(&report.key, layout, report.shard) {
                        self.note_read(id);
                    }
                }
                LoadResult::Lost => {
                    self.counts.lost += 1;
                    if report.source == Origin::Tier(Tier::Device) {
                        self.note_device_load((engine, layout), report);
                    }
                }
                LoadResult::Corrupt => {
                    self.counts.corrupt += 1;
                    self.quarantine(report, layout);
                    self.mark_corrupt(engine, request_id);
                }
            }
        }
        Ok(())
    }

    /// Drops the copy a reader found damaged, in host memory or on a device, unless its frame was reused since. Lower copies
    /// are verified when they are read, so they may stay.
    fn quarantine(&mut self, report: &LoadReport, layout: u16) {
        let Some(id) = self.catalog.find(&report.key, layout, report.shard) else { return };
        let same_frame = self.catalog.get(id).host.is_some_and(|f| f.generation == report.generation);
        if same_frame && !self.catalog.get(id).flags.has(Flags::RESERVED) {
            self.ghost.insert(&report.key, MissReason::Corrupt);
            self.catalog.note_event(id, EventKind::Corrupt, Some(Tier::Host));
            let former = self.catalog.events.because("corrupt");
            self.drop_host(id);
            self.catalog.events.because(former);
        }
        // What host memory lost may have been the block's last copy.
        if self.catalog.try_get(id).is_none_or(|e| e.key != report.key) {
            return;
        }
        if let Some(frame) = self.catalog.device_frame(id).filter(|f| f.generation == report.generation) {
            self.lose_device_copy(id, frame, true);
        }
    }

    fn mark_corrupt(&mut self, engine: u32, request_id: &str) {
        let of_engine = self.attachments.values().filter(|a| a.engine == engine);
        let leases: Vec<LeaseId> = of_engine.filter_map(|a| a.leases.get(request_id)).copied().collect();
        for lease in leases {
            if let Some(lease) = self.leases.get_mut(&lease) {
                lease.corrupt = true;
            }
        }
    }
}
