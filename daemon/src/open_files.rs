//! Open files: every log segment and every extent keeps its own, and a system's default limit is lower than what they need.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::Config;

/// Files beside those of segments and extents: sockets of engines, peers and stores, logs.
const OTHERS: u64 = 1024;
/// Files of one extent: its memory and its table of generations.
const OF_EXTENT: u64 = 2;

/// Raises the limit of open files to what the system allows this process, and says so in the log if it may not be enough.
pub fn raise(config: &Config) {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, raised)
    {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let (wanted, allowed) = (wanted(config), getrlimit(Resource::Nofile).current);
    if let Some(allowed) = allowed.filter(|allowed| *allowed < wanted) {
        tracing::warn!(
            wanted,
            allowed,
            "open files may run out, and then tiers stop growing: set LimitNOFILE in the unit, or a larger disk.segment \
             or host.extent"
        );
    }
}

/// Most files that a configuration needs at once.
fn wanted(config: &Config) -> u64 {
    let segments = if config.disk.enabled { config.disk.capacity.0.div_ceil(config.disk.segment.0.max(1)) } else { 0 };
    let extents = config.host.capacity.0.div_ceil(config.host.extent.0.max(1));
    segments + OF_EXTENT * extents + OTHERS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ByteSize;

    #[test]
    fn segments_and_extents_are_counted() {
        let mut config = Config::default();
        config.host.capacity = ByteSize(64 << 30);
        config.disk.enabled = true;
        config.disk.capacity = ByteSize(1 << 40);
        assert_eq!(wanted(&config), 4096 + 2 * 256 + OTHERS);
        config.disk.enabled = false;
        assert_eq!(wanted(&config), 2 * 256 + OTHERS);
    }

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        raise(&Config::default());
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
