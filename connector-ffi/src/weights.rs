//! Digest of a checkpoint's weights: what tells two models apart that have the same name.
//!
//! A hub snapshot is named by its commit. Otherwise BLAKE3 over, for each file in the order of names: name, size, and
//! - up to 64 MiB: all of it;
//! - a larger safetensors file: its header, the first, middle and last 4 KiB of each tensor, and 64 KiB every 64 MiB;
//! - another larger file: 64 KiB every 64 MiB, and the last 64 KiB.
//!
//! Fine-tuning changes every tensor almost everywhere, so samples find it; a change of a few chosen bytes of a large file
//! they do not. `config.json` counts too.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use kvtier_types::FieldHasher;

use crate::error::Error;

/// Files up to this size are hashed whole.
const WHOLE_BYTES: u64 = 64 << 20;
/// Sample at the start, middle and end of a tensor.
const TENSOR_SAMPLE_BYTES: u64 = 4 << 10;
/// Sample of a large file, and the distance from one to the next.
const FILE_SAMPLE_BYTES: u64 = 64 << 10;
const FILE_SAMPLE_STRIDE: u64 = 64 << 20;
/// Longest safetensors header: the format's own bound.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most files of a checkpoint.
const MAX_FILES: usize = 16_384;
/// Endings of weight files.
const WEIGHTS: [&str; 5] = ["safetensors", "bin", "pt", "pth", "gguf"];
/// Read at a time.
const PIECE_BYTES: usize = 1 << 20;

/// The digest of the checkpoint at `path`, a directory or a single file: `hub:<commit>` or `blake3:<hex>`.
///
/// # Errors
/// [`Error::Io`] when there are no weight files, or one cannot be read.
pub fn digest(path: &Path) -> Result<String, Error> {
    let found = |e: std::io::Error| Error::io(path.display().to_string(), &e);
    let absolute = std::path::absolute(path).map_err(found)?;
    let metadata = std::fs::metadata(&absolute).map_err(found)?;
    if let Some(hub) = hub_commit(&absolute) {
        return Ok(hub);
    }
    // A link to a snapshot's directory, or out of one.
    if let Some(hub) = absolute.canonicalize().ok().and_then(|real| hub_commit(&real)) {
        return Ok(hub);
    }
    let files = if metadata.is_dir() { files_of(&absolute)? } else { vec![absolute.clone()] };
    if !files.iter().any(|file| is_weights(file)) {
        return Err(Error::Io { what: path.display().to_string(), reason: "there are no weight files".to_owned() });
    }
    let mut hasher = FieldHasher::new("kvtier weights v1");
    for file in &files {
        add_file(&mut hasher, file).map_err(|e| Error::io(file.display().to_string(), &e))?;
    }
    let hex: String = hasher.finish().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("blake3:{hex}"))
}

/// `hub:<commit>` for `.../snapshots/<commit>`, with what follows the commit: a snapshot may hold several models.
fn hub_commit(path: &Path) -> Option<String> {
    let names: Vec<&str> = path
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_str().unwrap_or_default()),
            _ => None,
        })
        .collect();
    let is_commit =
        |name: &str| name.len() == 40 && name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let at = names.windows(2).rposition(|pair| pair[0] == "snapshots" && is_commit(pair[1]))?;
    Some(format!("hub:{}", names[at + 1..].join("/")))
}

fn is_weights(path: &Path) -> bool {
    path.extension().and_then(|e| e.to_str()).is_some_and(|ending| WEIGHTS.contains(&ending))
}

/// Weight files and `config.json` of a directory, sorted by name.
fn files_of(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |e: std::io::Error| Error::io(directory.display().to_string(), &e);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let wanted = is_weights(&path) || path.file_name().is_some_and(|name| name == "config.json");
        if wanted && path.is_file() {
            files.push(path);
        }
        if files.len() > MAX_FILES {
            return Err(Error::Limit("weight files"));
        }
    }
    files.sort();
    Ok(files)
}

fn add_file(hasher: &mut FieldHasher, path: &Path) -> std::io::Result<()> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    hasher.bytes(path.file_name().unwrap_or_default().as_encoded_bytes()).number(size);
    if size <= WHOLE_BYTES {
        return add_range(hasher, &file, 0, size);
    }
    if path.extension().is_some_and(|ending| ending == "safetensors") {
        add_tensors(hasher, &file, size)?;
    }
    for at in (0..size).step_by(usize::try_from(FILE_SAMPLE_STRIDE).unwrap_or(usize::MAX)) {
        add_range(hasher, &file, at, FILE_SAMPLE_BYTES.min(size - at))?;
    }
    add_range(hasher, &file, size - FILE_SAMPLE_BYTES, FILE_SAMPLE_BYTES)
}

/// The header of a safetensors file (u64 length, then JSON), and samples of each tensor.
fn add_tensors(hasher: &mut FieldHasher, file: &File, size: u64) -> std::io::Result<()> {
    let bad = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_owned());
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES.min(size - 8) {
        return Err(bad("the safetensors header is longer than the file or the format allow"));
    }
    let mut header = vec![0; usize::try_from(header_bytes).map_err(|_| bad("header too long"))?];
    file.read_exact_at(&mut header, 8)?;
    hasher.bytes(&header);
    let data = 8 + header_bytes;
    for (start, end) in tensor_ranges(&header).ok_or_else(|| bad("the safetensors header is malformed"))? {
        let (from, to) = (data.saturating_add(start), data.saturating_add(end));
        if from > to || to > size {
            return Err(bad("a tensor lies outside its file"));
        }
        let len = TENSOR_SAMPLE_BYTES.min(to - from);
        for at in [from, from + (to - from - len) / 2, to - len] {
            add_range(hasher, file, at, len)?;
        }
    }
    Ok(())
}

/// `data_offsets` of every tensor, in the order of their names.
fn tensor_ranges(header: &[u8]) -> Option<Vec<(u64, u64)>> {
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    let mut tensors: Vec<_> = header.into_iter().filter(|(name, _)| name != "__metadata__").collect();
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    let range = |tensor: &serde_json::Value| {
        let offsets = tensor.get("data_offsets")?;
        Some((offsets.get(0)?.as_u64()?, offsets.get(1)?.as_u64()?))
    };
    tensors.iter().map(|(_, tensor)| range(tensor)).collect()
}

/// Adds a range, piece by piece.
fn add_range(hasher: &mut FieldHasher, file: &File, offset: u64, bytes: u64) -> std::io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES.min(usize::try_from(bytes).unwrap_or(PIECE_BYTES))];
    let mut done = 0;
    while done < bytes {
        let len = usize::try_from(bytes - done).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        file.read_exact_at(&mut piece[..len], offset + done)?;
        hasher.bytes(&piece[..len]);
        done += len as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
