//! What this node exposes: frames by capability.
//!
//! *Bounds*: at most `max` at a time. *Lock order*: the table's lock is a leaf; pins end outside of it.

use std::collections::HashMap;
use std::sync::Arc;

use kvtier_memory::FramePin;
use parking_lot::RwLock;

use super::address::Exposed;
use super::wire::{Token, token};
use crate::{Descriptor, Exposure, TransportError};

/// The table.
#[derive(Debug)]
pub(super) struct Exposures {
    instance: Token,
    max: usize,
    frames: RwLock<HashMap<Token, Arc<FramePin>>>,
}

impl Exposures {
    pub(super) fn new(instance: Token, max: usize) -> Arc<Self> {
        Arc::new(Self { instance, max, frames: RwLock::default() })
    }

    pub(super) fn instance(&self) -> Token {
        self.instance
    }

    pub(super) fn len(&self) -> usize {
        self.frames.read().len()
    }

    pub(super) fn find(&self, capability: &Token) -> Option<Arc<FramePin>> {
        self.frames.read().get(capability).cloned()
    }

    pub(super) fn add(self: &Arc<Self>, frame: FramePin) -> Result<TcpExposure, TransportError> {
        let capability = token();
        let exposed = Exposed { instance: self.instance, capability, bytes: frame.len() as u64 };
        let descriptor = exposed.encode()?;
        let mut frames = self.frames.write();
        if frames.len() >= self.max {
            return Err(TransportError::Limit { what: "exposed frames", max: self.max });
        }
        frames.insert(capability, Arc::new(frame));
        Ok(TcpExposure { table: Arc::clone(self), capability, descriptor })
    }
}

/// A frame in the table.
#[derive(Debug)]
pub(super) struct TcpExposure {
    table: Arc<Exposures>,
    capability: Token,
    descriptor: Descriptor,
}

impl Exposure for TcpExposure {
    fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }
}

impl Drop for TcpExposure {
    fn drop(&mut self) {
        let frame = self.table.frames.write().remove(&self.capability);
        drop(frame);
    }
}
