//! Compiles `tests/c/abi.c` against the checked-in header and the built library, and runs it.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The directory of `libkvtier.so`: that of this test, or its parent.
fn library_dir() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let dirs = test.ancestors().skip(1).take(2);
    dirs.map(Path::to_path_buf).find(|dir| dir.join("libkvtier.so").exists()).expect("cargo built libkvtier.so")
}

#[test]
fn a_c_program_can_use_the_library() {
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    if Command::new(&compiler).arg("--version").output().is_err() {
        println!("SKIPPED: no C compiler ({compiler}): the header and the C interface were not tried from C");
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let program = out.path().join("abi");
    let libraries = library_dir();
    let compiled = Command::new(&compiler)
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-o"])
        .arg(&program)
        .arg(root.join("tests/c/abi.c"))
        .arg("-I")
        .arg(root.join("include"))
        .arg("-L")
        .arg(&libraries)
        .arg("-lkvtier")
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let run = Command::new(&program).env("LD_LIBRARY_PATH", &libraries).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{:?}\n{stdout}\n{stderr}", run.status);
}
