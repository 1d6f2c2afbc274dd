use std::fs::{File, create_dir_all, write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use super::{WHOLE_BYTES, digest};
use crate::error::Error;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn checkpoint(dir: &Path) {
    write(dir.join("config.json"), "{}").unwrap();
    write(dir.join("model.safetensors"), "weights").unwrap();
    write(dir.join("README.md"), "text").unwrap();
}

/// A sparse safetensors file of `bytes` of data in two tensors.
fn large(path: &Path, bytes: u64) -> u64 {
    let half = bytes / 2;
    let header = format!(
        r#"{{"__metadata__":{{"format":"pt"}},"a":{{"dtype":"U8","shape":[{half}],"data_offsets":[0,{half}]}},"b":{{"dtype":"U8","shape":[{half}],"data_offsets":[{half},{bytes}]}}}}"#
    );
    let file = File::create(path).unwrap();
    file.write_all_at(&(header.len() as u64).to_le_bytes(), 0).unwrap();
    file.write_all_at(header.as_bytes(), 8).unwrap();
    let data = 8 + header.len() as u64;
    file.set_len(data + bytes).unwrap();
    data
}

#[test]
fn a_hub_snapshot_is_named_by_its_commit() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("models--a--b/snapshots").join(COMMIT);
    create_dir_all(snapshot.join("part")).unwrap();
    assert_eq!(digest(&snapshot).unwrap(), format!("hub:{COMMIT}"));
    assert_eq!(digest(&snapshot.join("part")).unwrap(), format!("hub:{COMMIT}/part"), "another model of the snapshot");
    let link = dir.path().join("link");
    symlink(&snapshot, &link).unwrap();
    assert_eq!(digest(&link).unwrap(), format!("hub:{COMMIT}"));
    let branch = dir.path().join("snapshots/main");
    create_dir_all(&branch).unwrap();
    assert!(digest(&branch).is_err(), "a branch is no commit");
}

#[test]
fn what_cannot_be_digested_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(digest(&dir.path().join("absent")), Err(Error::Io { .. })));
    write(dir.path().join("config.json"), "{}").unwrap();
    assert!(matches!(digest(dir.path()), Err(Error::Io { .. })), "no weights");
    let broken = dir.path().join("model.safetensors");
    let file = File::create(&broken).unwrap();
    file.set_len(WHOLE_BYTES + 1).unwrap();
    file.write_all_at(&u64::MAX.to_le_bytes(), 0).unwrap();
    assert!(matches!(digest(dir.path()), Err(Error::Io { .. })), "a header longer than its file");
}

#[test]
fn the_same_files_elsewhere_have_the_same_digest_and_any_change_another() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    checkpoint(one.path());
    checkpoint(two.path());
    let base = digest(one.path()).unwrap();
    assert_eq!(digest(two.path()).unwrap(), base);
    write(two.path().join("README.md"), "other text").unwrap();
    assert_eq!(digest(two.path()).unwrap(), base, "a file that is no part of the model");
    for (name, content) in [("config.json", "{ }"), ("model.safetensors", "weightz"), ("extra.bin", "")] {
        let dir = tempfile::tempdir().unwrap();
        checkpoint(dir.path());
        write(dir.path().join(name), content).unwrap();
        assert_ne!(digest(dir.path()).unwrap(), base, "{name}");
    }
}

#[test]
fn large_files_are_sampled_in_every_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let bytes = 3 * WHOLE_BYTES;
    let data = large(&path, bytes);
    let base = digest(dir.path()).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    // First, middle and last byte of the second tensor, and the file's last sample.
    for at in [bytes / 2, bytes / 4 * 3, bytes - 1] {
        file.write_all_at(&[1], data + at).unwrap();
        assert_ne!(digest(dir.path()).unwrap(), base, "{at}");
        file.write_all_at(&[0], data + at).unwrap();
    }
    assert_eq!(digest(dir.path()).unwrap(), base);
}

#[test]
fn large_files_of_other_formats_are_sampled_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let file = File::create(&path).unwrap();
    file.set_len(2 * WHOLE_BYTES).unwrap();
    let base = digest(dir.path()).unwrap();
    assert_eq!(digest(&path).unwrap(), base, "a single file is a checkpoint too");
    for at in [0, WHOLE_BYTES, 2 * WHOLE_BYTES - 1] {
        file.write_all_at(&[1], at).unwrap();
        assert_ne!(digest(dir.path()).unwrap(), base, "{at}");
        file.write_all_at(&[0], at).unwrap();
    }
}
