//! Keeps the session attached: connects, attaches, heartbeats, tells namespace switches, and starts over when the daemon
//! goes away, with a pause of 50 ms that doubles up to 2 s.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use kvtier_proto::v1::attach_event::Event;
use kvtier_proto::v1::engine_client::EngineClient;
use kvtier_proto::{MAX_MESSAGE_BYTES, PROTOCOL_VERSION, v1};
use kvtier_types::{DeviceId, NamespaceId};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, timeout};
use tonic::transport::Endpoint;
use tonic::{Code, Status, Streaming};

use crate::keys::KeySpace;
use crate::link::{ATTACHMENT_BYTES, Attachment, LinkState};
use crate::shared::Shared;
use crate::spec::Role;

/// First pause between attempts.
const MIN_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause between attempts.
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// What is accepted as a heartbeat interval, whatever the daemon says.
const HEARTBEAT_RANGE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(60));
/// Heartbeats in a row that may get no answer before the attachment counts as lost.
const MISSED_HEARTBEATS: u32 = 2;

/// Why there is no attachment.
struct Ended {
    state: LinkState,
    reason: String,
}

impl Ended {
    fn absent(reason: impl Into<String>) -> Self {
        Self { state: LinkState::Absent, reason: reason.into() }
    }

    /// A refusal is an answer that trying again does not change by itself; the attempts go on all the same, since a new
    /// daemon may answer otherwise.
    fn of(status: &Status) -> Self {
        let refused = matches!(
            status.code(),
            Code::InvalidArgument
                | Code::FailedPrecondition
                | Code::PermissionDenied
                | Code::Unauthenticated
                | Code::Unimplemented
                | Code::AlreadyExists
                | Code::OutOfRange
        );
        let state = if refused { LinkState::Refused } else { LinkState::Absent };
        Self { state, reason: format!("{:?}: {}", status.code(), status.message()) }
    }
}

/// Runs until `stop` is set. Owned by the session's runtime.
pub async fn run(shared: Arc<Shared>, mut stop: watch::Receiver<bool>) {
    let mut pause = MIN_PAUSE;
    while !*stop.borrow() {
        let ended = tokio::select! {
            ended = attach_and_serve(&shared, &mut pause) => ended,
            _ = stop.wait_for(|stop| *stop) => Ended::absent("the session is closed"),
        };
        if shared.link.lost(ended.state, ended.reason) {
            shared.counters.detached.one();
        } else {
            shared.counters.attach_failed.one();
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

async fn attach_and_serve(shared: &Arc<Shared>, pause: &mut Duration) -> Ended {
    let keys = shared.keys();
    let (mut client, mut events) = match connect(shared, &keys).await {
        Ok(connected) => connected,
        Err(ended) => return ended,
    };
    let attached = match timeout(shared.spec.call_timeout, first_event(&mut events)).await {
        Ok(Ok(attached)) => attached,
        Ok(Err(ended)) => return ended,
        Err(_) => return Ended::absent("the daemon did not answer the attach in time"),
    };
    let (attachment, heartbeat) = match checked(shared, &keys, &attached, client.clone()) {
        Ok(checked) => checked,
        Err(ended) => return ended,
    };
    let attachment = Arc::new(attachment);
    shared.link.attached(Arc::clone(&attachment), attached.notes.join("\n"));
    shared.counters.attached.one();
    *pause = MIN_PAUSE;
    // The namespace may have been switched since the attach request was made.
    shared.namespace_changed.notify_one();
    let mut ticks = tokio::time::interval(heartbeat);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut missed = 0;
    loop {
        let ended = tokio::select! {
            event = events.message() => ended_by(event),
            () = shared.namespace_changed.notified() => tell_namespace(shared, &attachment).await,
            _ = ticks.tick() => beat(shared, &attachment, &mut client, &mut missed).await,
        };
        if let Some(ended) = ended {
            return ended;
        }
    }
}

type Connected = (EngineClient<tonic::transport::Channel>, Streaming<v1::AttachEvent>);

async fn connect(shared: &Shared, keys: &KeySpace) -> Result<Connected, Ended> {
    let spec = &shared.spec;
    let endpoint = Endpoint::new(format!("unix://{}", spec.socket.display()))
        .map_err(|e| Ended { state: LinkState::Refused, reason: format!("bad socket path: {e}") })?;
    let channel = match timeout(spec.call_timeout, endpoint.connect()).await {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => return Err(Ended::absent(format!("no daemon at {}: {error}", spec.socket.display()))),
        Err(_) => return Err(Ended::absent(format!("no answer from {}", spec.socket.display()))),
    };
    let mut client = EngineClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    match timeout(spec.call_timeout, client.attach(request(shared, keys))).await {
        Ok(Ok(reply)) => Ok((client, reply.into_inner())),
        Ok(Err(status)) => Err(Ended::of(&status)),
        Err(_) => Err(Ended::absent("the daemon did not answer the attach in time")),
    }
}

fn request(shared: &Shared, keys: &KeySpace) -> v1::AttachRequest {
    let spec = &shared.spec;
    let role = match spec.role {
        Role::Scheduler => v1::Role::Scheduler,
        Role::Worker => v1::Role::Worker,
    };
    v1::AttachRequest {
        protocol_version: PROTOCOL_VERSION,
        build_version: env!("CARGO_PKG_VERSION").to_owned(),
        engine_id: spec.engine_id.clone(),
        role: role.into(),
        rank: spec.rank,
        shard: spec.shard.into(),
        namespace: Some(v1::Namespace::from(keys.namespace())),
        layout: Some(v1::Layout::from(&spec.layout)),
        pid: i32::try_from(std::process::id()).unwrap_or(0),
        devices: shared.device.iter().flat_map(|side| side.readable()).map(device_bytes).collect(),
    }
}

fn device_bytes(id: DeviceId) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(id.as_bytes())
}

async fn first_event(events: &mut Streaming<v1::AttachEvent>) -> Result<v1::Attached, Ended> {
    match events.message().await {
        Ok(Some(v1::AttachEvent { event: Some(Event::Attached(attached)) })) => Ok(attached),
        Ok(Some(v1::AttachEvent { event: Some(Event::Detach(detach)) })) => {
            Err(Ended { state: LinkState::Refused, reason: detach.reason })
        }
        Ok(Some(v1::AttachEvent { event: None }) | None) => Err(Ended::absent("the daemon ended the attach at once")),
        Err(status) => Err(Ended::of(&status)),
    }
}

/// Both sides must compute the same identities, or they would exchange each other's bytes wrongly.
fn checked(
    shared: &Shared,
    keys: &KeySpace,
    attached: &v1::Attached,
    client: EngineClient<tonic::transport::Channel>,
) -> Result<(Attachment, Duration), Ended> {
    let refused = |reason: &str| Ended { state: LinkState::Refused, reason: reason.to_owned() };
    let token: [u8; ATTACHMENT_BYTES] =
        attached.attachment[..].try_into().map_err(|_| refused("the daemon's attachment token has a wrong length"))?;
    if attached.namespace_id[..] != keys.id().as_bytes()[..] {
        return Err(refused("the daemon computes another namespace id: its version differs from this library's"));
    }
    if attached.layout_id[..] != shared.spec.layout.id().as_bytes()[..] {
        return Err(refused("the daemon computes another layout id: its version differs from this library's"));
    }
    let attachment = Attachment {
        epoch: shared.link.next_epoch(),
        token,
        client,
        fd_socket: PathBuf::from(&attached.fd_socket),
        told: Mutex::new(*keys.id()),
        silent: AtomicBool::new(false),
    };
    let (shortest, longest) = HEARTBEAT_RANGE;
    let heartbeat = Duration::from_millis(attached.heartbeat_ms.into()).clamp(shortest, longest);
    Ok((attachment, heartbeat))
}

fn ended_by(event: Result<Option<v1::AttachEvent>, Status>) -> Option<Ended> {
    match event {
        Ok(Some(v1::AttachEvent { event: Some(Event::Detach(detach)) })) => {
            Some(Ended::absent(format!("the daemon detached us: {}", detach.reason)))
        }
        // Events of a newer daemon.
        Ok(Some(_)) => None,
        Ok(None) => Some(Ended::absent("the daemon closed the attachment")),
        Err(status) => Some(Ended::absent(format!("the daemon is gone: {}", status.message()))),
    }
}

async fn beat(
    shared: &Shared,
    attachment: &Attachment,
    client: &mut EngineClient<tonic::transport::Channel>,
    missed: &mut u32,
) -> Option<Ended> {
    let request = v1::HeartbeatRequest { attachment: attachment.token_bytes() };
    match timeout(shared.spec.call_timeout, client.heartbeat(request)).await {
        Ok(Ok(_)) => {
            attachment.heard(true);
            *missed = 0;
        }
        Ok(Err(status)) if status.code() != Code::DeadlineExceeded => {
            return Some(Ended::absent(format!("heartbeat: {}", status.message())));
        }
        Ok(Err(_)) | Err(_) => {
            attachment.heard(false);
            *missed += 1;
        }
    }
    (*missed > MISSED_HEARTBEATS).then(|| Ended::absent("the daemon does not answer heartbeats"))
}

/// Tells the daemon the current namespace, unless it knows. A failure ends the attachment: attaching anew tells it too.
async fn tell_namespace(shared: &Shared, attachment: &Attachment) -> Option<Ended> {
    let keys = shared.keys();
    if *attachment.told.lock() == *keys.id() {
        return None;
    }
    let request = v1::SwitchNamespaceRequest {
        attachment: attachment.token_bytes(),
        namespace: Some(v1::Namespace::from(keys.namespace())),
    };
    let reply = timeout(shared.spec.call_timeout, attachment.client.clone().switch_namespace(request)).await;
    let told = match reply {
        Ok(Ok(reply)) => NamespaceId::from_slice(&reply.into_inner().namespace_id).ok(),
        Ok(Err(status)) => return Some(Ended::of(&status)),
        Err(_) => return Some(Ended::absent("the daemon did not answer the namespace switch in time")),
    };
    match told {
        Some(told) if told == *keys.id() => {
            *attachment.told.lock() = told;
            None
        }
        _ => Some(Ended { state: LinkState::Refused, reason: "the daemon computes another namespace id".to_owned() }),
    }
}
