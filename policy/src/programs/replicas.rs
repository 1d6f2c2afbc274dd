//! How many nodes should have a copy of what many programs share.

/// Copies of a prefix that is used so many times a second, of which `nodes` nodes use any, and that a fork of `fan_out`
/// branches is about to use: about the square root of its uses in a minute, at least what the fork needs where its
/// branches go to nodes of their own, at most one a node.
#[must_use]
pub fn replicas(uses_per_second: f64, fan_out: u32, nodes: u32) -> u32 {
    let by_rate = (uses_per_second.max(0.0) * 60.0).sqrt().clamp(1.0, f64::from(nodes.max(1)));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between one and the nodes")]
    let by_rate = by_rate as u32;
    // Branches share nodes as long as these keep up: half of them on their own suffices.
    by_rate.max(fan_out.div_ceil(2)).clamp(1, nodes.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_rate_and_fan_out_within_the_nodes() {
        assert_eq!(replicas(0.0, 0, 8), 1);
        assert_eq!(replicas(0.15, 0, 8), 3);
        assert_eq!(replicas(0.0, 6, 8), 3);
        assert_eq!(replicas(100.0, 6, 8), 8);
        assert_eq!(replicas(1.0, 1, 0), 1);
    }
}
