//! The keeper: one thread that does a disk tier's blocking file operations, a few per segment: allocate and open a new
//! life, write footers, make durable.

use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use parking_lot::Mutex;

use crate::disk::index::{Command, Index};
use crate::disk::medium::Medium;
use crate::disk::segment::{SegmentHeader, encode_tail, fresh_epoch};
use crate::io::is_no_space;
use crate::store::{StorageError, io_error};

/// Whether writes are still allowed.
#[derive(Debug, Default)]
pub(crate) struct Poison(Mutex<Option<String>>);

impl Poison {
    /// # Errors
    /// [`StorageError::Poisoned`] with the first reason.
    pub(crate) fn check(&self) -> Result<(), StorageError> {
        match &*self.0.lock() {
            None => Ok(()),
            Some(reason) => Err(StorageError::Poisoned { reason: reason.clone() }),
        }
    }

    /// Turns writes off; the first reason stays.
    pub(crate) fn set(&self, reason: String) {
        let mut current = self.0.lock();
        if current.is_none() {
            tracing::error!(%reason, "disk tier: writes are off until the daemon restarts");
            *current = Some(reason);
        }
    }
}

/// State of the keeper's thread.
#[derive(Debug)]
pub(crate) struct Keeper {
    pub(crate) index: Arc<Index>,
    pub(crate) medium: Medium,
    pub(crate) poison: Arc<Poison>,
}

impl Keeper {
    /// Works until told to stop.
    pub(crate) fn work(&self, commands: &Receiver<Command>) {
        while let Ok(command) = commands.recv() {
            match command {
                Command::Prepare(segment) => self.prepare(segment),
                Command::Seal(segment) => self.seal(segment),
                Command::Sync(reply) => {
                    // Whoever asked may have gone.
                    let _unclaimed = reply.send(self.sync());
                }
                Command::Stop => return,
            }
        }
    }

    fn prepare(&self, segment: u32) {
        let old = self.index.file_of(segment);
        match self.new_life(segment, old.clone()) {
            Ok((epoch, file)) => self.index.prepared(segment, epoch, file),
            Err(error) => {
                if no_space(&error) {
                    tracing::warn!(%error, "disk tier: there is no room for another log segment");
                } else {
                    self.poison.set(error.to_string());
                }
                self.index.prepare_failed(segment, old);
            }
        }
    }

    fn new_life(&self, segment: u32, old: Option<Arc<File>>) -> Result<(u64, Arc<File>), StorageError> {
        let file = match old {
            Some(file) => file,
            None => self.medium.create(segment)?,
        };
        let path = self.medium.path(segment);
        let epoch = fresh_epoch().map_err(|e| io_error("draw an epoch for", &path, e))?;
        let header = SegmentHeader { epoch, segment, bytes: self.medium.segment_bytes() };
        let written = self.medium.write_pages(&file, 0, &*header.encode());
        written.map_err(|e| io_error("write the header of", &path, e))?;
        Ok((epoch, file))
    }

    fn seal(&self, segment: u32) {
        let (header, file, entries) = self.index.footer_of(segment);
        if let (Some(file), false) = (file, entries.is_empty()) {
            let tail = encode_tail(&header, &entries);
            let offset = header.bytes - tail.len() as u64;
            if let Err(error) = self.medium.write_pages(&file, offset, &tail) {
                let error = io_error("write the footer of", &self.medium.path(segment), error);
                if no_space(&error) {
                    tracing::warn!(%error, "disk tier: a segment stays without its footer");
                } else {
                    self.poison.set(error.to_string());
                }
            }
        }
        self.index.sealed(segment);
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.poison.check()?;
        for file in self.index.unsealed_files() {
            if let Err(error) = file.sync_data() {
                let error = io_error("sync a segment in", self.medium.dir(), error);
                self.poison.set(error.to_string());
                return Err(error);
            }
        }
        Ok(())
    }
}

fn no_space(error: &StorageError) -> bool {
    matches!(error, StorageError::Io { source, .. } if is_no_space(source))
}
