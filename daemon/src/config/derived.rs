//! What each part of the daemon needs of the configuration.

use kvtier_memory::PageKind;
use kvtier_policy::{CoreConfig, FetchConfig, WriteBehind};
use kvtier_storage::disk::{MAX_SEGMENT_BYTES, MAX_SEGMENTS, MIN_SEGMENT_BYTES};
use kvtier_storage::object::{FloorConfig, ObjectConfig, ObjectPlace, S3CredentialNames};
use kvtier_storage::{DiskConfig, IoEngine};
use kvtier_types::NodeId;

use super::{Config, ConfigError};
use crate::units::ByteSize;

/// What log segments are multiples of.
const PAGE_BYTES: u64 = 4096;

impl Config {
    /// Best pages to try for.
    ///
    /// # Errors
    /// [`ConfigError::Field`] for an unknown kind.
    pub fn page_kind(&self) -> Result<PageKind, ConfigError> {
        let bad = |_| ConfigError::Field {
            field: "host.pages",
            reason: format!("{:?} is not huge, transparent or plain", self.host.pages),
        };
        self.host.pages.parse().map_err(bad)
    }

    pub(super) fn eager(&self) -> Result<bool, ConfigError> {
        match self.offload.mode.as_str() {
            "eager" => Ok(true),
            "watermark" => Ok(false),
            other => {
                let reason = format!("{other:?} is not eager or watermark");
                Err(ConfigError::Field { field: "offload.mode", reason })
            }
        }
    }

    pub(super) fn write_behind(&self) -> Result<WriteBehind, ConfigError> {
        match self.object.write.as_str() {
            "read" => Ok(WriteBehind::Read),
            "all" => Ok(WriteBehind::All),
            "none" => Ok(WriteBehind::Nothing),
            other => {
                let reason = format!("{other:?} is not read, all or none");
                Err(ConfigError::Field { field: "object.write", reason })
            }
        }
    }

    /// The core's part.
    ///
    /// # Errors
    /// [`ConfigError::Field`].
    pub fn core_config(&self) -> Result<CoreConfig, ConfigError> {
        Ok(CoreConfig {
            disk: self.disk.enabled,
            object: self.object.enabled,
            eager_offload: self.eager()?,
            high_watermark_percent: self.offload.high_watermark_percent,
            max_offloads: self.offload.max_in_flight,
            max_onboards: self.offload.max_onboards_in_flight,
            max_device_copies: self.offload.max_in_flight,
            lease_ttl: self.limits.lease_ttl.0,
            reserve_ttl: self.limits.reserve_ttl.0,
            attachment_ttl: self.limits.attachment_ttl.0,
            write_behind: self.write_behind()?,
            fetch: FetchConfig {
                patience: self.transport.patience.0,
                deadline: self.transport.deadline.0,
                max_bytes: self.transport.max_in_flight.0,
                ..FetchConfig::default()
            },
            claims: self.claims_config(),
            eviction: self.eviction_config()?,
            disk_write_rate: self.disk.write_rate.map(|rate| rate.0),
        })
    }

    /// The disk tier's part.
    ///
    /// # Errors
    /// [`ConfigError::Field`].
    pub fn disk_config(&self) -> Result<DiskConfig, ConfigError> {
        let io = match self.disk.io.as_str() {
            "auto" => IoEngine::Auto,
            "uring" => IoEngine::Uring,
            "threads" => IoEngine::Threads,
            other => {
                let reason = format!("{other:?} is not auto, uring or threads");
                return Err(ConfigError::Field { field: "disk.io", reason });
            }
        };
        let dir = self.disk.dir.clone().unwrap_or_else(|| self.data_dir.join("disk"));
        let mut config = DiskConfig::new(dir, self.disk.capacity.0);
        config.segment_bytes = self.disk.segment.0;
        config.io = io;
        config.depth = self.disk.depth;
        config.direct = self.disk.direct;
        self.check_segments()?;
        Ok(config)
    }

    fn check_segments(&self) -> Result<(), ConfigError> {
        let field = |field, reason| Err(ConfigError::Field { field, reason });
        let (capacity, segment) = (self.disk.capacity, self.disk.segment);
        let (least, most) = (ByteSize(MIN_SEGMENT_BYTES), ByteSize(MAX_SEGMENT_BYTES));
        if !segment.0.is_multiple_of(PAGE_BYTES) || segment.0 < least.0 || segment.0 > most.0 {
            return field("disk.segment", format!("{segment} is not a multiple of 4 KiB between {least} and {most}"));
        }
        if capacity.0 < segment.0 * 2 {
            return field("disk.capacity", format!("{capacity} is less than two log segments of {segment}"));
        }
        let segments = capacity.0 / segment.0;
        if segments > MAX_SEGMENTS {
            let enough = ByteSize(capacity.0.div_ceil(MAX_SEGMENTS).next_power_of_two());
            let reason = format!(
                "{capacity} makes {segments} log segments of {segment}, and there can be {MAX_SEGMENTS}: set disk.segment to \
                 {enough} or more"
            );
            return field("disk.capacity", reason);
        }
        Ok(())
    }

    /// What other nodes wrote: the same place, below the prefix that all share.
    ///
    /// # Errors
    /// [`ConfigError::Field`].
    pub fn floor_config(&self) -> Result<FloorConfig, ConfigError> {
        let own =
            NodeId::new(&self.node_id).map_err(|e| ConfigError::Field { field: "node_id", reason: e.to_string() })?;
        let mut floor = FloorConfig::new(self.object_config()?.place, own);
        self.object.prefix.trim_matches('/').clone_into(&mut floor.prefix);
        floor.list_every = self.object.list_every.0;
        Ok(floor)
    }

    /// The object tier's part.
    ///
    /// # Errors
    /// [`ConfigError::Field`].
    pub fn object_config(&self) -> Result<ObjectConfig, ConfigError> {
        let place = match &self.object.url {
            None => ObjectPlace::Local(self.data_dir.join("object")),
            Some(url) => url.parse().map_err(|e| ConfigError::Field { field: "object.url", reason: format!("{e}") })?,
        };
        let place = match place {
            ObjectPlace::S3(mut s3) => {
                s3.endpoint.clone_from(&self.object.endpoint);
                s3.region.clone_from(&self.object.region);
                s3.allow_http = self.object.allow_http;
                s3.credentials = self
                    .object
                    .credentials_env
                    .clone()
                    .map(|[access_key, secret_key]| S3CredentialNames { access_key, secret_key });
                ObjectPlace::S3(s3)
            }
            local => local,
        };
        let mut config = ObjectConfig::new(place, self.object.capacity.0);
        // One writer a prefix: packs die by their writer's own account.
        config.prefix = format!("{}/{}", self.object.prefix.trim_matches('/'), self.node_id);
        config.check().map_err(|e| ConfigError::Field { field: "object.capacity", reason: e.to_string() })?;
        Ok(config)
    }
}
