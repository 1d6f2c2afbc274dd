//! One process per directory, by an exclusive `flock` on a file in it.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::store::{StorageError, io_error};

/// Held as long as anything may still write to the directory.
#[derive(Debug)]
pub(crate) struct DirLock(#[expect(dead_code, reason = "the lock ends when the file is closed")] File);

/// Creates `dir` (mode 0700, parents included) and takes the exclusive lock on the file `name` in it.
///
/// # Errors
/// [`StorageError::Open`] when another process holds it, [`StorageError::Io`].
pub(crate) fn lock_dir(dir: &Path, name: &str) -> Result<DirLock, StorageError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| io_error("create directory", dir, e))?;
    if let Some(parent) = dir.parent() {
        // So that a directory just made survives a crash; a parent that cannot be read was not made by us.
        let _unreadable = File::open(parent).and_then(|parent| parent.sync_all());
    }
    let path = dir.join(name);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(&path).map_err(|e| io_error("open", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(DirLock(file)),
        Err(TryLockError::WouldBlock) => Err(StorageError::Open {
            what: dir.display().to_string(),
            reason: "another process holds its lock; give every daemon a directory of its own".into(),
        }),
        Err(TryLockError::Error(error)) => Err(io_error("lock", &path, error)),
    }
}
