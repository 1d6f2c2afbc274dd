//! Frames that peers may read at the moment, by the lease that allows it.

use std::collections::BTreeMap;

use kvtier_policy::{Core, LeaseId};
use kvtier_transport::Exposure;
use parking_lot::Mutex;

/// Exposures by lease. What is in here is bounded by the core's leases.
#[derive(Debug, Default)]
pub(crate) struct Exposures(Mutex<BTreeMap<LeaseId, Vec<Box<dyn Exposure>>>>);

impl Exposures {
    /// Keeps a lease's exposures.
    pub(crate) fn keep(&self, lease: LeaseId, exposures: Vec<Box<dyn Exposure>>) {
        self.0.lock().insert(lease, exposures);
    }

    /// Ends a lease's exposures.
    pub(crate) fn end(&self, lease: LeaseId) {
        let ended = self.0.lock().remove(&lease);
        drop(ended);
    }

    /// Ends those whose lease the core does not know any more.
    pub(crate) fn sweep(&self, core: &Core) {
        self.0.lock().retain(|lease, _| core.has_export(*lease));
    }

    /// Ends all.
    pub(crate) fn clear(&self) {
        self.0.lock().clear();
    }
}
