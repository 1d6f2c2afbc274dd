//! Starting the transport: opens the library, makes the thread, learns the address.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use kvtier_memory::IoBuf;
use kvtier_ucx_sys::bindings::{UCP_API_MAJOR, UCP_API_MINOR, Ucp};
use kvtier_ucx_sys::{open, version};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::UcxTransport;
use super::config::UcxConfig;
use super::inbox::Inbox;
use super::raw::{Backing, Memory, Worker};
use super::registry::Registry;
use super::stats::Counters;
use super::wire::{Address, Token};
use super::worker::{Engine, Shared};
use crate::{Kind, TransportError};

/// Longest wait for UCX to find the machine's devices.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Bytes of a greeting.
pub(super) const GREETING_BYTES: usize = 32;

/// What a peer reads when it connects: who answers here.
pub(super) fn greeting(token: Token) -> [u8; GREETING_BYTES] {
    let mut greeting = *b"kvtier ucx here.................";
    greeting[GREETING_BYTES - token.len()..].copy_from_slice(&token);
    greeting
}

impl UcxTransport {
    /// Opens UCX and starts its thread. Blocks while UCX looks for devices, which can take a second.
    ///
    /// # Errors
    /// [`TransportError::Unavailable`] when there is no UCX, it is too old, or it cannot do what `config` asks for.
    pub fn start(config: UcxConfig) -> Result<Self, TransportError> {
        let ucp = open(config.library.as_deref()).map_err(|error| {
            unavailable(format!(
                "{error}; install UCX {UCP_API_MAJOR}.{UCP_API_MINOR} or later (package libucx0 or ucx, or libucx-cu12 from \
                 PyPI) or say where its libucp.so.0 is"
            ))
        })?;
        let version = supported(version(ucp))?;
        let mut token = Token::default();
        rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| unavailable(format!("no random numbers: {error}")))?;
        let inbox = Inbox::new().map_err(|error| unavailable(format!("no descriptor to wake its thread: {error}")))?;
        let shared = Shared {
            inbox: Arc::new(inbox),
            registry: Arc::new(Registry::default()),
            counters: Arc::new(Counters::default()),
        };
        let max_exposures = config.max_exposures;
        let (reply, answer) = sync_channel(1);
        let (end, ended) = watch::channel(false);
        let birth = Birth { ucp, version, token, config, shared: shared.clone(), reply, end };
        let thread = thread::Builder::new()
            .name("kvtier-ucx".to_owned())
            .spawn(move || birth.live())
            .map_err(|error| unavailable(format!("no thread: {error}")))?;
        let address = match answer.recv_timeout(START_LIMIT) {
            Ok(address) => address?,
            Err(_) => return Err(unavailable("UCX did not start in time".to_owned())),
        };
        Ok(Self { shared, version, token, max_exposures, address, thread: Mutex::new(Some(thread)), ended })
    }
}

fn unavailable(reason: String) -> TransportError {
    TransportError::Unavailable { kind: Kind::Ucx.name(), reason }
}

/// The version, if the bindings can use it.
fn supported((major, minor): (u32, u32)) -> Result<(u16, u16), TransportError> {
    let fits = u16::try_from(major).ok().zip(u16::try_from(minor).ok());
    match fits {
        Some(version) if major == UCP_API_MAJOR && minor >= UCP_API_MINOR => Ok(version),
        _ => Err(unavailable(format!(
            "UCX {major}.{minor} was found; install {UCP_API_MAJOR}.{UCP_API_MINOR} or a later {UCP_API_MAJOR}.x"
        ))),
    }
}

/// What the thread starts with.
struct Birth {
    ucp: &'static Ucp,
    version: (u16, u16),
    token: Token,
    config: UcxConfig,
    shared: Shared,
    reply: SyncSender<Result<Bytes, TransportError>>,
    end: watch::Sender<bool>,
}

impl Birth {
    /// The thread.
    fn live(self) {
        let Self { shared, end, reply, .. } = &self;
        // Even if the thread panics, nobody waits for it.
        let _closing = Closing(Arc::clone(&shared.inbox));
        match self.prepare() {
            Ok((worker, greeting, address)) => {
                if reply.send(Ok(address)).is_ok() {
                    Engine::new(worker, greeting, shared.clone(), self.config.clone()).run();
                }
            }
            // Nobody listens when it came too late.
            Err(error) => drop(reply.send(Err(error))),
        }
        end.send_replace(true);
    }

    /// The worker, the memory with its greeting, and its address.
    fn prepare(&self) -> Result<(Worker, Memory, Bytes), TransportError> {
        let failed = |failure| unavailable(format!("UCX does not start: {failure}"));
        let worker = Worker::new(self.ucp, &self.config.settings(self.version)).map_err(failed)?;
        worker.event_fd().map_err(failed)?;
        let mut page = IoBuf::heap(GREETING_BYTES);
        page.copy_in(&greeting(self.token));
        let memory = Memory::register(&worker, Backing::Buffer(page)).map_err(failed)?;
        let address = Address {
            version: self.version,
            token: self.token,
            worker: worker.address().map_err(failed)?.into(),
            greeting: memory.address(),
            key: memory.pack().map_err(failed)?.into(),
        };
        let too_long = || unavailable("its address is too long: name fewer devices in net_devices".to_owned());
        Ok((worker, memory, address.encode().ok_or_else(too_long)?))
    }
}

/// Refuses commands once the thread has ended, however it ended.
struct Closing(Arc<Inbox>);

impl Drop for Closing {
    fn drop(&mut self) {
        drop(self.0.close());
    }
}
