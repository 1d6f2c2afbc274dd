//! The transports this node has, and which of them it uses with whom.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::v1;
use kvtier_transport::devices;
use kvtier_transport::tcp::{TcpConfig, TcpTransport};
use kvtier_transport::ucx::{UcxConfig, UcxTransport};
use kvtier_transport::{Link, MAX_ADDRESS_BYTES, Transport, TransportError};

use crate::config::Config;

/// A transport that is there, or why it is not.
#[derive(Debug)]
struct Slot {
    kind: &'static str,
    transport: Result<Arc<dyn Transport>, String>,
}

/// The transports of the configuration, best first.
#[derive(Debug)]
pub struct Transports(Vec<Slot>);

impl Transports {
    /// Opens what the configuration names. One that cannot be had is said loudly; none at all is an error, unless the
    /// node is alone.
    ///
    /// # Errors
    /// When no transport can be had.
    pub async fn open(config: &Config) -> anyhow::Result<Self> {
        if config.cluster.is_embedded() {
            return Ok(Self(Vec::new()));
        }
        let mut slots = Vec::new();
        for kind in &config.transport.order {
            let (kind, opened): (&'static str, Result<Arc<dyn Transport>, String>) = match kind.as_str() {
                "tcp" => ("tcp", open_tcp(config).await.map(|t| Arc::new(t) as Arc<dyn Transport>)),
                _ => ("ucx", open_ucx(config).map(|t| Arc::new(t) as Arc<dyn Transport>)),
            };
            match &opened {
                Ok(_) => tracing::info!(kind, "transport open"),
                Err(reason) => tracing::warn!(kind, reason, "transport not used"),
            }
            slots.push(Slot { kind, transport: opened });
        }
        anyhow::ensure!(slots.iter().any(|s| s.transport.is_ok()), "no transport can be had: see transport.order");
        Ok(Self(slots))
    }

    /// What peers are offered.
    #[must_use]
    pub fn offers(&self) -> Vec<v1::TransportOffer> {
        let offer = |slot: &Slot| {
            let transport = slot.transport.as_ref().ok()?;
            Some(v1::TransportOffer { kind: slot.kind.to_owned(), address: transport.address() })
        };
        self.0.iter().filter_map(offer).collect()
    }

    /// The transport of a name.
    #[must_use]
    pub fn get(&self, kind: &str) -> Option<&Arc<dyn Transport>> {
        self.0.iter().find(|s| s.kind == kind).and_then(|s| s.transport.as_ref().ok())
    }

    /// Every transport, and what became of it.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, Result<&Arc<dyn Transport>, &str>)> {
        self.0.iter().map(|s| (s.kind, s.transport.as_ref().map_err(String::as_str)))
    }

    /// Connects by the first transport that both have and that works; says so when it is not the first they have.
    ///
    /// # Errors
    /// The last transport's error.
    pub async fn connect(
        &self,
        peer: &str,
        offers: &[v1::TransportOffer],
        limit: Duration,
    ) -> Result<(&'static str, Box<dyn Link>), TransportError> {
        let none = TransportError::Unavailable {
            kind: "any",
            reason: format!("{peer} offers no transport that this node has: compare transport.order on both"),
        };
        let mut failure = none;
        for slot in &self.0 {
            let offer = offers.iter().find(|o| o.kind == slot.kind && o.address.len() <= MAX_ADDRESS_BYTES);
            let (Some(offer), Ok(transport)) = (offer, &slot.transport) else { continue };
            match transport.connect(&offer.address, limit).await {
                Ok(link) => return Ok((slot.kind, link)),
                Err(error) => {
                    tracing::warn!(peer, kind = slot.kind, %error, "no link by this transport; trying the next one");
                    failure = error;
                }
            }
        }
        Err(failure)
    }

    /// Closes all.
    pub async fn close(&self, limit: Duration) {
        for transport in self.0.iter().filter_map(|s| s.transport.as_ref().ok()) {
            transport.close(limit).await;
        }
    }
}

async fn open_tcp(config: &Config) -> Result<TcpTransport, String> {
    let mut tcp = TcpConfig::new(config.transport.tcp_listen);
    tcp.advertise = config.cluster.advertise.clone().or_else(|| {
        let listen = config.transport.tcp_listen.ip();
        listen.is_unspecified().then(|| config.advertised_host())
    });
    tcp.streams_per_link = config.transport.tcp_streams;
    TcpTransport::start(tcp).await.map_err(|e| e.to_string())
}

/// UCX pays where there is RDMA; over plain TCP our own framing is faster.
fn open_ucx(config: &Config) -> Result<UcxTransport, String> {
    // An empty text is how templates say that nothing was chosen.
    let chosen = |text: &Option<String>| text.clone().filter(|t| !t.is_empty());
    let rdma = devices::discover(Path::new("/sys"));
    let tls = chosen(&config.transport.ucx_tls);
    if rdma.usable_ports().next().is_none() && tls.is_none() {
        return Err("no RDMA port is active here; set transport.ucx_tls to use UCX over something else".into());
    }
    let ucx = UcxConfig {
        library: config.transport.ucx_library.clone().filter(|path| !path.as_os_str().is_empty()),
        tls,
        net_devices: chosen(&config.transport.ucx_net_devices),
        ..UcxConfig::default()
    };
    UcxTransport::start(ucx).map_err(|e| e.to_string())
}
