//! What can be seen of CUDA without a GPU, and the whole suite where there is one.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use super::*;
use crate::conformance::{self, Bench, HeldStream, noise};
use crate::cuda::held::HeldUp;
use crate::fold::{SPAN_BYTES, Tables, finish};
use kvtier_memory::checksum::checksum;

struct CudaBench(Arc<CudaDevice>);

impl Bench for CudaBench {
    fn device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.0) as Arc<dyn Device>
    }

    fn held_stream(&self) -> Box<dyn HeldStream> {
        Box::new(HeldUp::new(&self.0.context).expect("a stream can be held up"))
    }
}

#[test]
fn a_gpu_keeps_every_promise_of_a_device() {
    match CudaDevice::open(0) {
        Ok(device) => {
            println!("running on {:?}", device.facts());
            conformance::run(&CudaBench(Arc::new(device)));
        }
        Err(error) => println!("SKIPPED: not run on hardware: {error}"),
    }
}

#[test]
fn without_a_driver_there_is_an_error_that_says_so() {
    let absent = find_in("libkvtier-no-such-driver.so.1").unwrap_err();
    assert!(
        matches!(&absent, DeviceError::Absent { why } if why.contains("libkvtier-no-such-driver.so.1")),
        "{absent}"
    );
    assert!(CudaDevice::open_in("libkvtier-no-such-driver.so.1", 0).is_err());
    // Either answer is right here: it depends on the machine.
    match find() {
        Ok(found) => assert!(found.devices > 0 && found.driver >= 11_000, "{found:?}"),
        Err(error) => {
            assert!(matches!(error, DeviceError::Absent { .. } | DeviceError::MissingSymbol { .. }), "{error}")
        }
    }
}

#[test]
fn a_library_that_is_no_driver_is_an_error_that_names_what_it_lacks() {
    // The C library is there on every machine, and is no CUDA driver.
    let error = find_in("libc.so.6").unwrap_err();
    assert_eq!(error, DeviceError::MissingSymbol { name: "cuInit" });
}

#[test]
fn the_built_kernels_are_those_of_the_source() {
    let source = include_bytes!("../../kernels/kernels.cu");
    let digest = sha256(source);
    let first = kernels::PTX.lines().next().unwrap();
    assert_eq!(
        first,
        format!("// kernels.cu sha256 {digest}"),
        "run device/kernels/build.py after changing kernels.cu"
    );
    assert!(kernels::PTX.contains(".target sm_80") && kernels::PTX.ends_with('\0'));
}

fn sha256(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}

#[test]
fn the_kernels_source_computes_the_checksum() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let program = std::env::temp_dir().join(format!("kvtier-kernels-{}", std::process::id()));
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let built = Command::new(compiler)
        .args(["-std=c++20", "-O1", "-pthread", "-o"])
        .arg(&program)
        .arg(kernels.join("host.cpp"))
        .status()
        .expect("a C++ compiler: scripts/install-deps.sh installs one");
    assert!(built.success(), "kernels.cu compiles for the host");
    let whole = usize::try_from(SPAN_BYTES).unwrap();
    let bytes = noise(whole + 40_000, 2);
    let tables = Tables::new();
    let len = [bytes.len() as u64];
    let words = tables.fold.iter().chain(&tables.tail).chain(&len);
    let mut input: Vec<u8> = words.flat_map(|w| w.to_le_bytes()).collect();
    input.extend_from_slice(&bytes);
    let mut child = Command::new(&program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&input).unwrap();
    let output = child.wait_with_output().unwrap();
    std::fs::remove_file(program).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("ok"));
    for (line, span) in lines.by_ref().zip(bytes.chunks(whole)) {
        let raw = u64::from_str_radix(line, 16).unwrap();
        assert_eq!(finish(raw, span.len() as u64), checksum(span));
    }
    assert_eq!(text.lines().count(), 3);
}
