use super::{FrameSpan, Region, plan};
use crate::MemoryError;
use crate::copy::{Direction, Run};
use proptest::{collection::vec, prop_assert, prop_assert_eq, proptest};

const FRAME: usize = 0x10_0000;

fn region(base: usize, block_count: u64, block_stride: u64, run_bytes: u64) -> Region {
    Region { base, block_count, block_stride, run_bytes, span: (block_count - 1) * block_stride + run_bytes }
}

fn addresses(runs: &[Run]) -> Vec<(usize, usize, usize)> {
    runs.iter().map(|run| (run.src.addr(), run.dst.addr(), run.len)).collect()
}

#[test]
fn runs_follow_the_regions_and_merge_where_adjacent() {
    let frame = FrameSpan { base: FRAME, bytes: 300 };
    let cases = [
        (
            "apart",
            [region(0x1000, 8, 100, 100), region(0x2000, 8, 100, 100), region(0x3000, 8, 100, 100)],
            2,
            vec![(0x10c8, FRAME, 100), (0x20c8, FRAME + 100, 100), (0x30c8, FRAME + 200, 100)],
        ),
        (
            "the parts of a block lie side by side",
            [region(0x1000, 8, 300, 100), region(0x1064, 8, 300, 100), region(0x10c8, 8, 300, 100)],
            1,
            vec![(0x112c, FRAME, 300)],
        ),
        (
            "two side by side",
            [region(0x5000, 8, 200, 100), region(0x5064, 8, 200, 100), region(0x3000, 8, 100, 100)],
            0,
            vec![(0x5000, FRAME, 200), (0x3000, FRAME + 200, 100)],
        ),
    ];
    for (name, regions, block, expected) in cases {
        let saved = plan(&regions, block, frame, Direction::IntoFrame).expect(name);
        assert_eq!(addresses(&saved), expected, "{name}");
        let loaded = plan(&regions, block, frame, Direction::FromFrame).expect(name);
        let swapped: Vec<_> = expected.iter().map(|&(engine, frame, len)| (frame, engine, len)).collect();
        assert_eq!(addresses(&loaded), swapped, "{name}, loading");
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let good = region(0x1000, 8, 100, 100);
    let frame = FrameSpan { base: FRAME, bytes: 100 };
    let no_such = plan(&[good], 8, frame, Direction::IntoFrame).unwrap_err();
    assert!(matches!(no_such, MemoryError::NoSuchBlock { region: 0, block: 8, block_count: 8 }), "{no_such}");
    let mismatch = plan(&[good, good], 0, frame, Direction::IntoFrame).unwrap_err();
    assert!(matches!(mismatch, MemoryError::FrameMismatch { block_bytes: 200, frame_bytes: 100 }), "{mismatch}");
    let huge = Region { run_bytes: u64::MAX, ..good };
    assert!(matches!(plan(&[good, huge], 0, frame, Direction::IntoFrame), Err(MemoryError::FrameMismatch { .. })));
    let beyond = FrameSpan { base: usize::MAX - 10, bytes: 100 };
    assert!(matches!(plan(&[good], 0, beyond, Direction::IntoFrame), Err(MemoryError::OutOfBounds { .. })));
    for bad in [
        Region { base: 0, ..good },
        Region { run_bytes: 0, ..good },
        Region { block_count: 0, ..good },
        Region { block_stride: 99, ..good },
        Region { span: 799, ..good },
        Region { block_count: u64::MAX, block_stride: u64::MAX, ..good },
        Region { base: usize::MAX - 100, ..good },
    ] {
        assert!(matches!(bad.check(3), Err(MemoryError::BadRegion { region: 3, .. })), "{bad:?}");
    }
}

proptest! {
    #[test]
    fn runs_fill_the_frame_and_stay_inside_their_regions(
        shapes in vec((1_u64..500, 0_u64..300, 1_u64..20, 0_usize..2000), 1..8),
        block in 0_u64..25,
    ) {
        let mut base = 0x1000;
        let regions: Vec<Region> = shapes.iter().map(|&(run_bytes, gap, block_count, skip)| {
            let region = region(base + skip, block_count, run_bytes + gap, run_bytes);
            base = region.base + usize::try_from(region.span).unwrap();
            region
        }).collect();
        let bytes = super::block_bytes(&regions).unwrap();
        let planned = plan(&regions, block, FrameSpan { base: FRAME << 20, bytes }, Direction::IntoFrame);
        prop_assert_eq!(planned.is_ok(), regions.iter().all(|region| block < region.block_count));
        let mut filled = FRAME << 20;
        for run in planned.unwrap_or_default() {
            prop_assert_eq!(run.dst.addr(), filled);
            filled += run.len;
            // Merged runs may cross into the next region: every byte is still in some region's span.
            let inside = |at: usize| regions.iter().any(|r| at >= r.base && ((at - r.base) as u64) < r.span);
            prop_assert!(inside(run.src.addr()) && inside(run.src.addr() + run.len - 1));
        }
    }
}
