//! Tests of the transport over what UCX offers on one machine: copies between processes, and TCP.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::{UcxConfig, UcxTransport};
use crate::TransportError;
use crate::conformance::{Fixture, Pair, suite};

const MAX_EXPOSURES: usize = 1000;

fn config(tls: &str) -> UcxConfig {
    UcxConfig {
        tls: Some(tls.to_owned()),
        max_exposures: MAX_EXPOSURES,
        registration_linger: Duration::ZERO,
        ..UcxConfig::default()
    }
}

/// A transport, or `None` said loudly where there is no UCX.
fn start(config: UcxConfig) -> Option<UcxTransport> {
    match UcxTransport::start(config) {
        Ok(transport) => Some(transport),
        Err(TransportError::Unavailable { reason, .. }) => {
            eprintln!("SKIPPED: {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

struct Ucx(&'static str);

#[async_trait]
impl Fixture for Ucx {
    async fn pair(&self) -> Pair {
        let fresh = || Arc::new(UcxTransport::start(config(self.0)).expect("UCX started before"));
        Pair { owner: fresh(), reader: fresh() }
    }

    fn max_exposures(&self) -> usize {
        MAX_EXPOSURES
    }

    fn knows_gone(&self) -> bool {
        false
    }
}

async fn conforms(tls: &'static str) {
    if start(config(tls)).is_some() {
        suite(&Ucx(tls)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms_over_copies_between_processes() {
    conforms("posix,cma,self").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms_over_tcp() {
    conforms("tcp,self").await;
}
