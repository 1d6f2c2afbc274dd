//! The engine's registered memory, by group.

use kvtier_memory::plan::{Region, block_bytes};
use kvtier_types::Layout;

use crate::error::Error;

/// Most regions of a session: keys and values of thousands of layers.
pub const MAX_REGIONS: usize = 16_384;

/// Checked regions of every group. Immutable: registering anew makes another one, and running jobs keep theirs.
#[derive(Debug, Default)]
pub struct Regions {
    groups: Vec<Vec<Region>>,
}

impl Regions {
    /// Sorts `(group, region)` pairs into groups, keeping their order.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when a region is malformed or a group's runs do not add up to its block size.
    pub fn new(layout: &Layout, regions: &[(u32, Region)]) -> Result<Self, Error> {
        let mut groups = vec![Vec::new(); layout.groups.len()];
        for (index, (group, region)) in regions.iter().enumerate() {
            region.check(index).map_err(|e| Error::invalid(e.to_string()))?;
            groups
                .get_mut(*group as usize)
                .ok_or_else(|| Error::invalid(format!("region {index} is of unknown group {group}")))?
                .push(*region);
        }
        for (group, (regions, &want)) in groups.iter().zip(&layout.block_bytes).enumerate() {
            let have = block_bytes(regions);
            if !regions.is_empty() && have != Some(want) {
                return Err(Error::invalid(format!(
                    "the runs of group {group} have {} bytes, its blocks {want}",
                    have.unwrap_or(u64::MAX)
                )));
            }
        }
        Ok(Self { groups })
    }

    /// Regions of a group, in the order in which their runs lie in a frame; empty when none were registered.
    #[must_use]
    pub fn of(&self, group: u32) -> &[Region] {
        self.groups.get(group as usize).map_or(&[], Vec::as_slice)
    }

    /// Bytes of the shortest run; `None` when none was registered.
    #[must_use]
    pub fn shortest_run(&self) -> Option<u64> {
        self.groups.iter().flatten().map(|region| region.run_bytes).min()
    }

    /// Whether every region of the group has this block.
    #[must_use]
    pub fn has_block(&self, group: u32, block: u32) -> bool {
        let regions = self.of(group);
        !regions.is_empty() && regions.iter().all(|region| u64::from(block) < region.block_count)
    }
}

#[cfg(test)]
mod tests {
    use super::Regions;
    use crate::spec::Spec;
    use crate::spec::tests::sample;
    use kvtier_memory::plan::Region;

    fn region(run_bytes: u64) -> Region {
        Region { base: 4096, block_count: 4, block_stride: 8192, run_bytes, span: 4 * 8192 }
    }

    #[test]
    fn runs_must_add_up_to_the_block() {
        let layout = Spec::parse(&sample().to_string()).unwrap().layout;
        let regions = Regions::new(&layout, &[(0, region(4096)), (0, region(4096))]).unwrap();
        assert!(regions.has_block(0, 3));
        assert!(!regions.has_block(0, 4));
        assert!(!regions.has_block(1, 0));
        assert!(Regions::new(&layout, &[(0, region(4096))]).is_err(), "half a block");
        assert!(Regions::new(&layout, &[(1, region(8192))]).is_err(), "unknown group");
        assert!(Regions::new(&layout, &[(0, Region { span: 10, ..region(8192) })]).is_err(), "span too short");
    }
}
