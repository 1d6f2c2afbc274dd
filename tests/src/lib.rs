//! Harness of the end-to-end tests: real `kvtierd` processes, engines that drive the connector's sessions in-process,
//! and ways to hurt both.
//!
//! Every engine checks what it loads: a block whose bytes differ from what was put under its key fails the test, wherever
//! it happens. Waiting is polling with a deadline ([`wait::until`]); sockets and directories are each test's own.
#![forbid(unsafe_code)]

pub mod daemon;
pub mod disk;
pub mod engine;
pub mod kv;
pub mod rpc;
pub mod shape;
pub mod valkey;
pub mod wait;

pub use daemon::{Daemon, Setup};
pub use engine::{Engine, Got, Put};
pub use shape::{Prompt, Shape};

/// Starts a [`Daemon`] of this test run's own build. A macro, because only test targets know where their binaries lie.
#[macro_export]
macro_rules! daemon {
    ($setup:expr) => {
        $crate::Daemon::start(env!("CARGO_BIN_EXE_kvtierd-under-test"), $setup)
    };
}
