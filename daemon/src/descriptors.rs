//! The descriptor socket: attached engines fetch extents here.
//!
//! *Bounds*: at most [`MAX_CONNECTIONS`] connections, one thread each; an idle one is closed after [`IDLE`].

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kvtier_memory::fdpass::{FdStatus, Grant, Request, Served, serve_one};
use kvtier_types::DeviceNumber;

use crate::node::Node;

/// Connections at once: one a process of an engine, and some to spare.
const MAX_CONNECTIONS: usize = 256;
/// Silence after which a connection is closed; clients open another when they need one.
const IDLE: Duration = Duration::from_secs(300);
/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Longest an answer may take to leave.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves the socket on threads of its own until the node stops. The threads end with the process: what they keep of the
/// node's memory is given back for them.
pub fn serve(node: Arc<Node>, listener: UnixListener) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if node.stopping.is_cancelled() {
            return;
        }
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "descriptor socket: cannot accept a connection");
                // Usually open files ran out, which takes a while to pass.
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        if open.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
            open.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!("descriptor socket: more than {MAX_CONNECTIONS} connections; one was refused");
            continue;
        }
        let (node, of_thread) = (Arc::clone(&node), Arc::clone(&open));
        let started = std::thread::Builder::new().name("kvtier-fd".into()).spawn(move || {
            serve_connection(&node, &stream);
            of_thread.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = started {
            open.fetch_sub(1, Ordering::AcqRel);
            tracing::error!(%error, "descriptor socket: no thread for a connection");
        }
    }
}

fn serve_connection(node: &Arc<Node>, stream: &UnixStream) {
    let timeouts = stream.set_read_timeout(Some(IDLE)).and_then(|()| stream.set_write_timeout(Some(SEND_TIMEOUT)));
    if timeouts.is_err() {
        return;
    }
    loop {
        match serve_one(stream, |request| decide(node, request)) {
            Ok(Served::Granted(_)) => {}
            Ok(Served::Refused(request, status)) => {
                tracing::debug!(extent = request.extent, ?status, "descriptor refused");
            }
            Ok(Served::HungUp | Served::Hostile) | Err(_) => return,
        }
    }
}

fn decide(node: &Arc<Node>, request: &Request) -> Result<Grant, FdStatus> {
    let attachment = node.attachment(&request.attachment).ok_or(FdStatus::UnknownAttachment)?;
    if let Some(device) = DeviceNumber::of_extent(request.extent) {
        let reads = node.read_core(|core| core.reads_device(attachment, device));
        // What the daemon filled is nobody else's to write.
        if request.access == kvtier_memory::fdpass::Access::Writable || !reads {
            return Err(FdStatus::Denied);
        }
        return node.devices.grant(device, request.extent);
    }
    let writable = request.access == kvtier_memory::fdpass::Access::Writable;
    if writable && !node.read_core(|core| core.reserves_in(attachment, request.extent)) {
        return Err(FdStatus::Denied);
    }
    node.arena.extent(request.extent).map(Grant::Host).ok_or(FdStatus::UnknownExtent)
}
