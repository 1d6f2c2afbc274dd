//! The disk tier's directory: space, and whether it takes direct I/O.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open, statvfs, unlink};
use rustix::io::{Errno, pwrite};

use super::Finding;
use super::root::Root;
use crate::units::bytes_text;

/// Alignment and size of the trial write; a multiple of every disk's sector.
const TRIAL_BYTES: usize = 4_096;

pub(super) fn examine(root: &Root, data_dir: &Path) -> Vec<Finding> {
    let wanted = root.path(data_dir);
    let Some(dir) = existing(&wanted) else {
        let advice = format!("create {}", data_dir.display());
        return vec![Finding::absent("data directory", "no such directory", ("no disk tier", &advice))];
    };
    vec![space(&wanted, &dir), direct_io(&dir)]
}

/// The directory itself, or the nearest above it that exists: it says which file system the directory would be on.
fn existing(wanted: &Path) -> Option<PathBuf> {
    wanted.ancestors().find(|dir| dir.is_dir()).map(Path::to_owned)
}

fn space(wanted: &Path, dir: &Path) -> Finding {
    let fs = match statvfs(dir) {
        Ok(fs) => fs,
        Err(error) => {
            let found = format!("{}: {}", dir.display(), io::Error::from(error));
            return Finding::warn("data directory", found, ("its space is unknown", "check its rights"));
        }
    };
    let free = bytes_text(fs.f_bavail.saturating_mul(fs.f_frsize));
    if dir == wanted {
        return Finding::ok("data directory", format!("{}: {free} free", dir.display()));
    }
    let found = format!("{} does not exist; {} has {free} free", wanted.display(), dir.display());
    let advice = format!("mkdir -p {}, or name another with --data-dir", wanted.display());
    Finding::absent("data directory", found, ("the disk tier's directory is to be made", &advice))
}

fn direct_io(dir: &Path) -> Finding {
    let place = dir.display();
    match try_direct_write(dir) {
        Ok(()) => Finding::ok("O_DIRECT", format!("works on {place}")),
        Err(Errno::ACCESS | Errno::PERM | Errno::ROFS) => Finding::warn(
            "O_DIRECT",
            format!("could not be tried on {place}: not writable"),
            ("unknown", "run the doctor as kvtierd's user"),
        ),
        Err(error) => Finding::absent(
            "O_DIRECT",
            format!("refused on {place}: {}", io::Error::from(error)),
            (
                "the disk tier goes through the page cache: reads are slower and take memory from the arena",
                "put the data directory on ext4 or xfs on a local disk",
            ),
        ),
    }
}

/// Writes one aligned block to a file without a name; where the file system has none such, to one that is unlinked at once.
fn try_direct_write(dir: &Path) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let file = match open(dir, flags | OFlags::TMPFILE, mode) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => {
            let path = dir.join(format!(".kvtier-doctor-{}", std::process::id()));
            let file = open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode);
            // A file system that refuses O_DIRECT may have made the file before it said so.
            let gone = unlink(&path);
            let file = file?;
            gone?;
            file
        }
        opened => opened?,
    };
    // Direct I/O wants an aligned address: take the aligned part of a buffer twice the size.
    let buffer = vec![0u8; 2 * TRIAL_BYTES];
    let start = buffer.as_ptr().align_offset(TRIAL_BYTES);
    let block = buffer.get(start..start.saturating_add(TRIAL_BYTES)).ok_or(Errno::INVAL)?;
    pwrite(&file, block, 0).map(|_| ())
}
