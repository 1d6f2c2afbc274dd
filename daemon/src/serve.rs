//! Starts the listeners and the background tasks, and stops them again.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use kvtier_proto::v1::admin_server::AdminServer;
use kvtier_proto::v1::engine_server::EngineServer;
use kvtier_proto::v1::kv_cache_server::KvCacheServer;
use kvtier_proto::v1::peer_server::PeerServer;
use kvtier_proto::v1::programs_server::ProgramsServer;
use kvtier_proto::{FILE_DESCRIPTOR_SET, MAX_MESSAGE_BYTES};
use kvtier_storage::BlockStore;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::time::{Instant, interval, timeout};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpIncoming};

use crate::node::Node;
use crate::services::{AdminService, EngineService, KvCacheService, PeerService, ProgramsService};
use crate::{claims, cluster, descriptors, device, marks, metrics};

/// How often what has outlived its time is looked for.
const EXPIRE_EVERY: Duration = Duration::from_millis(500);
/// How often a stopping node looks whether its movements have ended.
const DRAIN_POLL: Duration = Duration::from_millis(20);
/// Longest a connection may take to close once the node stops.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest that giving host memory back may take: some gigabytes; of what is left, engines let go when they see it retired.
const GIVE_BACK_TIMEOUT: Duration = Duration::from_secs(2);

/// Serves until `stop` resolves, then drains and closes.
///
/// # Errors
/// When a socket cannot be had; the message says which.
pub async fn run(node: Arc<Node>, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let mode = node.config.socket_mode()?;
    let grpc = bind_unix(&node.config.grpc_socket(), mode).await?;
    let fds = bind_unix(&node.config.fd_socket(), mode).await?.into_std()?;
    fds.set_nonblocking(false)?;
    if let Some(address) = node.config.listen.http {
        let bound = metrics::serve(Arc::clone(&node), address).await;
        let bound = bound.with_context(|| format!("cannot listen on listen.http = {address}"))?;
        tracing::info!(%bound, "metrics and health over HTTP");
    }
    let growing = start_growth(&node)?;
    start_expiry(&node);
    device::start(&node);
    node.tasks.spawn(crate::programs::run(Arc::clone(&node)));
    node.tasks.spawn(crate::graphs::run(Arc::clone(&node)));
    node.tasks.spawn(crate::guard::run(Arc::clone(&node)));
    node.tasks.spawn(crate::ahead::run(Arc::clone(&node)));
    node.tasks.spawn(crate::turns::run(Arc::clone(&node)));
    let of_fds = Arc::clone(&node);
    std::thread::Builder::new().name("kvtier-fds".into()).spawn(move || descriptors::serve(of_fds, fds))?;

    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<EngineServer<EngineService>>().await;
    health.set_serving::<KvCacheServer<KvCacheService>>().await;
    health.set_serving::<AdminServer<AdminService>>().await;
    let engine = EngineServer::new(EngineService(Arc::clone(&node)))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let unix = control(&node, health_service.clone())?.add_service(engine);
    let stopping = node.stopping.clone();
    let unix = unix.serve_with_incoming_shutdown(UnixListenerStream::new(grpc), stopping.clone().cancelled_owned());
    let mut servers = tokio::task::JoinSet::new();
    servers.spawn(unix);
    if let Some(address) = node.config.listen.grpc {
        let tcp = TcpListener::bind(address).await;
        let tcp = tcp.with_context(|| format!("cannot listen on listen.grpc = {address}"))?;
        tracing::info!(bound = %tcp.local_addr()?, "control plane over TCP");
        let router = control(&node, health_service)?;
        servers.spawn(router.serve_with_incoming_shutdown(incoming(tcp), stopping.cancelled_owned()));
    }
    serve_peers(&node, &mut servers).await?;
    tracing::info!(
        socket = %node.config.grpc_socket().display(),
        incarnation = node.incarnation,
        startup_ms = u64::try_from(node.uptime().as_millis()).unwrap_or(u64::MAX),
        "serving"
    );
    tokio::select! {
        () = stop => {}
        Some(ended) = servers.join_next() => ended?.context("a gRPC listener failed")?,
    }
    health.set_not_serving::<EngineServer<EngineService>>().await;
    health.set_not_serving::<KvCacheServer<KvCacheService>>().await;
    shut_down(&node, servers).await;
    let grown = growing.join();
    give_memory_back(&node).await;
    grown.map_err(|_| anyhow::anyhow!("the growth thread died"))
}

/// The Peer service, and then the tasks of the cluster: what is published must be reachable.
async fn serve_peers(node: &Arc<Node>, servers: &mut Servers) -> anyhow::Result<()> {
    let Some(cluster) = &node.cluster else { return Ok(()) };
    if !node.config.cluster.is_embedded() {
        let listen = node.config.cluster.listen;
        let tcp = TcpListener::bind(listen).await;
        let tcp = tcp.with_context(|| format!("cannot listen on cluster.listen = {listen}"))?;
        let bound = tcp.local_addr()?;
        let host = node.config.advertised_host();
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        node.set_peer_address(format!("{host}:{}", bound.port()));
        tracing::info!(%bound, advertised = node.peer_address(), "Peer service");
        let service = PeerServer::new(PeerService { node: Arc::clone(node), cluster: Arc::clone(cluster) })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let router = Server::builder().add_service(service);
        let stopping = node.stopping.clone().cancelled_owned();
        servers.spawn(router.serve_with_incoming_shutdown(incoming(tcp), stopping));
        cluster.start(node);
    }
    Ok(())
}

/// A listener's connections, without Nagle's delay: with it an answer waits for the peer's acknowledgement of the one before,
/// some 40 ms. The server's own setting of that name does not reach listeners that it did not bind.
fn incoming(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

/// The servers under way.
type Servers = tokio::task::JoinSet<Result<(), tonic::transport::Error>>;

/// Everything but the Engine service.
fn control<H>(node: &Arc<Node>, health: tonic_health::pb::health_server::HealthServer<H>) -> anyhow::Result<Router>
where
    H: tonic_health::pb::health_server::Health,
{
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    Ok(Server::builder()
        .add_service(health)
        .add_service(reflection)
        .add_service(KvCacheServer::new(KvCacheService(Arc::clone(node))))
        .add_service(ProgramsServer::new(ProgramsService(Arc::clone(node))))
        .add_service(AdminServer::new(AdminService(Arc::clone(node)))))
}

/// Binds a Unix socket with permissions, in place of one whose daemon is gone.
async fn bind_unix(path: &Path, mode: u32) -> anyhow::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create run_dir {}", dir.display()))?;
    }
    if path.exists() {
        if UnixStream::connect(path).await.is_ok() {
            anyhow::bail!("another kvtierd serves {}: stop it, or set another run_dir", path.display());
        }
        std::fs::remove_file(path).with_context(|| format!("cannot remove the stale socket {}", path.display()))?;
    }
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Makes extents ready before they are granted, on a thread of its own: touching memory takes a while.
fn start_growth(node: &Arc<Node>) -> anyhow::Result<std::thread::JoinHandle<()>> {
    let node = Arc::clone(node);
    let runtime = tokio::runtime::Handle::current();
    let grow = move || {
        while !node.stopping.is_cancelled() {
            if node.arena.needs_growth() {
                match node.arena.grow() {
                    Ok(_) => {
                        node.with_core_on(&runtime, |core, _| core.frames_grew());
                        node.grown.notify_waiters();
                    }
                    Err(error) => {
                        tracing::error!(%error, "no more host memory; serving with what there is");
                        runtime.block_on(pause(&node));
                    }
                }
            } else {
                runtime.block_on(async {
                    tokio::select! {
                        () = node.growth.notified() => {}
                        () = node.stopping.cancelled() => {}
                    }
                });
            }
        }
    };
    Ok(std::thread::Builder::new().name("kvtier-grow".into()).spawn(grow)?)
}

async fn pause(node: &Node) {
    drop(timeout(Duration::from_secs(5), node.stopping.cancelled()).await);
}

fn start_expiry(node: &Arc<Node>) {
    let of_task = Arc::clone(node);
    node.tasks.spawn(async move {
        let mut ticks = interval(EXPIRE_EVERY);
        loop {
            tokio::select! {
                () = of_task.stopping.cancelled() => return,
                _ = ticks.tick() => {
                    // Held until all that ended is durable: whoever gets a turn after this finds it so.
                    let turn = of_task.claims_turn.lock().await;
                    let reaped = of_task.with_core(kvtier_policy::Core::expire);
                    claims::journal_expired(&of_task).await;
                    marks::journal_changes(&of_task).await;
                    drop(turn);
                    if let Some(cluster) = &of_task.cluster {
                        of_task.read_core(|core| cluster.exposures.sweep(core));
                    }
                    // Whoever waits for what was given up shall look again.
                    of_task.movement.notify_waiters();
                    if !reaped.is_empty() {
                        tracing::warn!(count = reaped.len(), "attachments fell silent and were reaped");
                        of_task.tell_detached(&reaped, "no heartbeat: attach again");
                    }
                }
            }
        }
    });
}

async fn shut_down(node: &Arc<Node>, mut servers: Servers) {
    let deadline = Instant::now() + node.config.limits.drain.0;
    tracing::info!("stopping: finishing what is under way");
    node.start_draining();
    node.tell_all("the daemon is stopping");
    if !node.config.cluster.is_embedded() && node.config.cluster.drain_on_stop {
        let report = cluster::drain(node, deadline.saturating_duration_since(Instant::now()), |_| ()).await;
        tracing::info!(?report, "drained");
    }
    while node.read_core(kvtier_policy::Core::pending_offloads) > 0 && Instant::now() < deadline {
        tokio::time::sleep(DRAIN_POLL).await;
    }
    let left = node.read_core(kvtier_policy::Core::pending_offloads);
    if left > 0 {
        tracing::warn!(left, "the drain deadline passed; these blocks were in host memory only and are lost");
    }
    node.stopping.cancel();
    node.growth.notify_waiters();
    let closed = timeout(CLOSE_TIMEOUT, async { while servers.join_next().await.is_some() {} }).await;
    if closed.is_err() {
        servers.abort_all();
    }
    node.tasks.close();
    let rest = deadline.saturating_duration_since(Instant::now()).max(CLOSE_TIMEOUT);
    if timeout(rest, node.tasks.wait()).await.is_err() {
        tracing::warn!("background tasks did not end in time");
    }
    if let Some(cluster) = &node.cluster {
        cluster.close(rest).await;
    }
    close_stores(node, rest).await;
    for path in [node.config.grpc_socket(), node.config.fd_socket()] {
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::debug!(%error, path = %path.display(), "socket not removed");
        }
    }
    tracing::info!("stopped");
}

/// Gives host memory back while engines still map it: one that hangs would keep it from the next daemon. The arena is not
/// dropped for that, since threads that wait for engines have the node to the process's end.
async fn give_memory_back(node: &Node) {
    let extents = node.arena.extents();
    let deadline = Instant::now() + GIVE_BACK_TIMEOUT;
    let give = move || {
        extents.iter().for_each(|(_, extent)| extent.retire());
        extents.iter().take_while(|_| Instant::now() < deadline).for_each(|(_, extent)| extent.give_back());
    };
    if timeout(GIVE_BACK_TIMEOUT, tokio::task::spawn_blocking(give)).await.is_err() {
        tracing::warn!("some host memory stays with engines until they let go of it");
    }
}

async fn close_stores(node: &Node, deadline: Duration) {
    if let Some(disk) = &node.stores.disk
        && let Err(error) = disk.close(deadline).await
    {
        tracing::warn!(%error, "disk tier did not close cleanly");
    }
    if let Some(object) = &node.stores.object
        && let Err(error) = object.close(deadline).await
    {
        tracing::warn!(%error, "object tier did not close cleanly");
    }
}
