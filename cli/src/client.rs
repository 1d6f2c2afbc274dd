//! The connection to the daemon: every call has the deadline of `--timeout`, every failure says what to do.

mod verbs;

use std::error::Error;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use kvtier_proto::v1::admin_client::AdminClient;
use kvtier_proto::v1::kv_cache_client::KvCacheClient;
use kvtier_proto::v1::programs_client::ProgramsClient;
use kvtier_proto::{MAX_MESSAGE_BYTES, v1};
use kvtier_types::BlockKey;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};

use crate::address::Address;
use crate::error::CliError;
use crate::table::printable;

/// Blocks asked for in one page of a list, and keys sent in one call: the daemon's bound.
pub const PAGE_BLOCKS: u32 = 1_000;

/// How often a stream that says nothing is looked after, and how soon it must be heard then: hosts vanish without a word.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A daemon that answers.
#[derive(Debug, Clone)]
pub struct Client {
    address: Address,
    timeout: Duration,
    cache: KvCacheClient<Channel>,
    admin: AdminClient<Channel>,
    programs: ProgramsClient<Channel>,
}

impl Client {
    /// Connects within `timeout`.
    ///
    /// # Errors
    /// [`CliError::Unreachable`] and [`CliError::Late`].
    pub async fn connect(address: &Address, timeout: Duration) -> Result<Self, CliError> {
        let late = || CliError::Late { address: address.clone(), timeout };
        let endpoint = Endpoint::from_shared(address.to_string())
            .map_err(|error| unreachable_at(address, &error))?
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE);
        let channel = tokio::time::timeout(timeout, endpoint.connect())
            .await
            .map_err(|_| late())?
            .map_err(|error| unreachable_at(address, &error))?;
        Ok(Self {
            address: address.clone(),
            timeout,
            cache: KvCacheClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            admin: AdminClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            programs: ProgramsClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES),
        })
    }

    /// Tiers, attachments, the ledger.
    ///
    /// # Errors
    /// What [`Client`] calls can fail with.
    pub async fn status(&mut self) -> Result<v1::StatusReply, CliError> {
        let answer = self.admin.status(self.request(v1::StatusRequest {})).await;
        self.settle("status", answer)
    }

    /// Where blocks lie; more keys than fit one call go in several, `targets` with the first.
    ///
    /// # Errors
    /// What [`Client`] calls can fail with.
    pub async fn locate(&mut self, keys: &[BlockKey], targets: &[v1::Target]) -> Result<v1::LocateReply, CliError> {
        let mut all = v1::LocateReply::default();
        let mut rest = keys;
        let mut targets = targets.to_vec();
        while !rest.is_empty() || !targets.is_empty() {
            let (chunk, later) = rest.split_at(rest.len().min(PAGE_BLOCKS as usize));
            rest = later;
            let message = v1::LocateRequest {
                keys: wire_keys(chunk),
                targets: std::mem::take(&mut targets),
                ..v1::LocateRequest::default()
            };
            let answer = self.cache.locate(self.request(message)).await;
            let reply = self.settle("locate", answer)?;
            all.node_id = reply.node_id;
            all.blocks.extend(reply.blocks);
        }
        Ok(all)
    }

    /// The nodes of the cluster.
    ///
    /// # Errors
    /// What [`Client`] calls can fail with.
    pub async fn nodes(&mut self) -> Result<v1::NodesReply, CliError> {
        let answer = self.admin.nodes(self.request(v1::NodesRequest {})).await;
        self.settle("nodes", answer)
    }

    /// Drains a node; `progress` hears what was done so far. Answers with the last word.
    ///
    /// # Errors
    /// What [`Client`] calls can fail with, and [`CliError::BadAnswer`] when the daemon went away before it was done.
    pub async fn drain(
        &mut self,
        node_id: &str,
        deadline: Duration,
        mut progress: impl FnMut(&v1::DrainEvent),
    ) -> Result<v1::DrainEvent, CliError> {
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        let mut request = Request::new(v1::DrainRequest { node_id: node_id.to_owned(), deadline_ms });
        request.set_timeout(deadline + self.timeout);
        let answer = self.admin.drain(request).await;
        let mut events = self.settle("drain", answer)?;
        loop {
            let next = events.message().await;
            match self.settle("drain", next.map(tonic::Response::new))? {
                Some(event) if event.done => return Ok(event),
                Some(event) => progress(&event),
                None => {
                    let what = "it ended before the drain did".to_owned();
                    return Err(CliError::BadAnswer { verb: "drain", what });
                }
            }
        }
    }

    /// A walk through the blocks that match `request`, page by page.
    #[must_use]
    pub fn pages(&self, mut request: v1::ListRequest) -> Pages {
        if request.page_size == 0 {
            request.page_size = PAGE_BLOCKS;
        }
        Pages { request: Some(request) }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        self.request_within(message, Duration::ZERO)
    }

    /// A request whose answer may take `longer` than others'.
    fn request_within<T>(&self, message: T, longer: Duration) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout.saturating_add(longer));
        request
    }

    fn settle<T>(&self, verb: &'static str, answer: Result<tonic::Response<T>, tonic::Status>) -> Result<T, CliError> {
        let status = match answer {
            Ok(response) => return Ok(response.into_inner()),
            Err(status) => status,
        };
        Err(match status.code() {
            // tonic reports its own expired timeout as Cancelled.
            Code::DeadlineExceeded => CliError::Late { address: self.address.clone(), timeout: self.timeout },
            Code::Cancelled if status.message() == "Timeout expired" => {
                CliError::Late { address: self.address.clone(), timeout: self.timeout }
            }
            // A connection that broke has a cause; what the daemon itself calls unavailable has not.
            Code::Unavailable if status.source().is_some() => unreachable_at(&self.address, &status),
            Code::Unimplemented => CliError::Unknown { verb, words: unknown_words(&status) },
            _ => CliError::Refused { verb, status: Box::new(status) },
        })
    }
}

/// A position in a list of blocks.
#[derive(Debug)]
pub struct Pages {
    request: Option<v1::ListRequest>,
}

impl Pages {
    /// The next page, or `None` after the last.
    ///
    /// # Errors
    /// What [`Client`] calls can fail with; [`CliError::BadAnswer`] when the daemon sends the same position twice.
    pub async fn next(&mut self, client: &mut Client) -> Result<Option<Vec<v1::BlockInfo>>, CliError> {
        let Some(request) = self.request.take() else { return Ok(None) };
        let answer = client.cache.list(client.request(request.clone())).await;
        let reply = client.settle("ls", answer)?;
        if !reply.next_page_token.is_empty() {
            if reply.next_page_token == request.page_token {
                let what = "it sent one page token twice".to_owned();
                return Err(CliError::BadAnswer { verb: "ls", what });
            }
            self.request = Some(v1::ListRequest { page_token: reply.next_page_token, ..request });
        }
        Ok(Some(reply.blocks))
    }

    /// True when there is another page.
    #[must_use]
    pub const fn more(&self) -> bool {
        self.request.is_some()
    }
}

/// What the daemon itself says of a verb that it does not know; nothing when that is only its library's stub.
fn unknown_words(status: &tonic::Status) -> String {
    match status.message() {
        "" | "Not yet implemented" => String::new(),
        words => format!(" ({})", printable(words)),
    }
}

fn wire_keys(keys: &[BlockKey]) -> Vec<Bytes> {
    keys.iter().map(|key| Bytes::copy_from_slice(key.as_bytes())).collect()
}

/// The error for a connection that failed with `error`: its root says what is wrong, and that says what to do.
fn unreachable_at(address: &Address, error: &(dyn Error + 'static)) -> CliError {
    let mut root = error;
    while let Some(source) = root.source() {
        root = source;
    }
    let kind = root.downcast_ref::<io::Error>().map(io::Error::kind);
    let (reason, advice) = match (address, kind) {
        (Address::Unix(_), Some(io::ErrorKind::NotFound)) => (
            "the socket does not exist".to_owned(),
            "Start the daemon (`kvtierd --config /etc/kvtier/kvtier.toml`), or name its socket with --address or KVTIER_ADDRESS.",
        ),
        (Address::Unix(_), Some(io::ErrorKind::ConnectionRefused)) => (
            "the socket exists but nobody listens: the daemon has ended".to_owned(),
            "Start it again (`kvtierd --config /etc/kvtier/kvtier.toml`) and see the end of its log.",
        ),
        (Address::Unix(_), Some(io::ErrorKind::PermissionDenied)) => {
            ("permission denied".to_owned(), "Run this as the daemon's user or group, or as root.")
        }
        (Address::Http(_), _) => (
            root.to_string(),
            "Check that kvtierd runs there and that its config opens a TCP address for control; on the node itself use its Unix socket.",
        ),
        (Address::Unix(_), _) => (root.to_string(), "See the daemon's log."),
    };
    CliError::Unreachable { address: address.clone(), reason, advice: advice.to_owned() }
}
