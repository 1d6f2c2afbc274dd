//! The daemon's extents in this process, for the baseline: fetched as another worker of the same engine would.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail};
use kvtier::Spec;
use kvtier::ffi::types::Frame;
use kvtier_memory::MappedExtent;
use kvtier_memory::fdpass::{Access, FdClient, Request};
use kvtier_proto::v1::attach_event::Event;
use kvtier_proto::v1::engine_client::EngineClient;
use kvtier_proto::{PROTOCOL_VERSION, v1};
use tokio::runtime::Runtime;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

const TIMEOUT: Duration = Duration::from_secs(5);

/// Mapped extents by number. Keeps its attachment's stream open; extents stay mapped even if the daemon takes it for dead,
/// since it sends no heartbeats.
#[derive(Debug)]
pub(crate) struct Extents {
    client: FdClient,
    attachment: [u8; 16],
    mapped: BTreeMap<u32, MappedExtent>,
    _kept: (Runtime, EngineClient<Channel>, Streaming<v1::AttachEvent>),
}

impl Extents {
    /// Attaches.
    ///
    /// # Errors
    /// The daemon's.
    pub(crate) fn attach(spec: &Spec) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let request = v1::AttachRequest {
            protocol_version: PROTOCOL_VERSION,
            build_version: env!("CARGO_PKG_VERSION").into(),
            engine_id: spec.engine_id.clone(),
            role: v1::Role::Worker.into(),
            rank: 1,
            shard: 0,
            namespace: Some(v1::Namespace::from(&spec.namespace)),
            layout: Some(v1::Layout::from(&spec.layout)),
            pid: i32::try_from(std::process::id())?,
            devices: Vec::new(),
        };
        let endpoint = Endpoint::new(format!("unix://{}", spec.socket.display()))?;
        let (client, mut events) = runtime.block_on(async {
            let mut client = EngineClient::new(endpoint.connect().await?);
            let events = client.attach(request).await?.into_inner();
            anyhow::Ok((client, events))
        })?;
        let first = runtime.block_on(events.message())?.and_then(|event| event.event);
        let Some(Event::Attached(attached)) = first else { bail!("not attached: {first:?}") };
        Ok(Self {
            client: FdClient::new(attached.fd_socket.as_ref()),
            attachment: attached.attachment[..].try_into()?,
            mapped: BTreeMap::new(),
            _kept: (runtime, client, events),
        })
    }

    /// Maps the extent of a frame that the engine has reserved, unless it is mapped.
    ///
    /// # Errors
    /// The daemon's.
    pub(crate) fn map(&mut self, frame: &Frame) -> anyhow::Result<()> {
        if !self.mapped.contains_key(&frame.extent) {
            let request = Request { attachment: self.attachment, extent: frame.extent, access: Access::Writable };
            let extent = self.client.map(&request, TIMEOUT)?;
            extent.populate()?;
            self.mapped.insert(frame.extent, extent);
        }
        Ok(())
    }

    /// Where a frame lies.
    ///
    /// # Errors
    /// When its extent is not mapped.
    pub(crate) fn frame(&self, frame: &Frame) -> anyhow::Result<*mut u8> {
        let extent = self.mapped.get(&frame.extent).context("the extent is not mapped")?;
        Ok(extent.range_mut(frame.offset, frame.bytes)?)
    }
}
