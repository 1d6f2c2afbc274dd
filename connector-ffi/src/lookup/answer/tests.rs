use super::{Answer, BadReply, Hit, RangeKeys};
use crate::spec::Spec;
use crate::spec::tests::{sample, sample_with};
use kvtier_proto::v1;
use kvtier_types::{BlockKey, Layout};
use serde_json::json;

const BYTES: u64 = 8192;

fn layout() -> Layout {
    Spec::parse(&sample_with("/layout/shards", json!(2))).unwrap().layout
}

/// Full attention beside a window of 20 tokens, one shard.
fn hybrid() -> Layout {
    let mut spec = sample();
    spec["layout"]["groups"] = json!([
        {"kind": "full", "block_tokens": 16, "layers": ["a"]},
        {"kind": "sliding_window", "window_tokens": 20, "block_tokens": 16, "layers": ["b"]},
    ]);
    spec["layout"]["block_bytes"] = json!([BYTES, BYTES]);
    Spec::parse(&spec.to_string()).unwrap().layout
}

fn asked(first_block: u32, blocks: u8) -> RangeKeys {
    RangeKeys { first_block, keys: (0..blocks).map(|i| BlockKey::new([i + 1; 32])).collect() }
}

/// Frames are numbered by their offset.
fn range(found: &'static [u8], frames: u64) -> v1::RangeFrames {
    let frame = |offset| v1::Frame { offset, bytes: BYTES, generation: 7, ..v1::Frame::default() };
    v1::RangeFrames { found: found.into(), frames: (0..frames).map(frame).collect() }
}

fn check(asked: Vec<RangeKeys>, ranges: Vec<v1::RangeFrames>, layout: &Layout) -> Result<Answer, BadReply> {
    Answer::check(asked, v1::LookupReply { ranges }, layout)
}

#[test]
fn frames_belong_to_found_blocks_shard_by_shard() {
    let answer = check(vec![asked(3, 4)], vec![range(&[2, 0, 3, 2], 6)], &layout()).unwrap();
    let offset = |shard, block| answer.frame(0, shard, block).map(|frame| (frame.key.as_bytes()[0], frame.offset));
    assert_eq!(offset(0, 3), Some((1, 0)));
    assert_eq!(offset(1, 3), Some((1, 1)));
    assert_eq!(offset(0, 4), None, "not found");
    assert_eq!(offset(1, 5), Some((3, 3)));
    assert_eq!(offset(1, 6), Some((4, 5)));
    for (group, shard, block) in [(0, 0, 2), (0, 0, 7), (0, 2, 3), (1, 0, 3), (u32::MAX, u32::MAX, u32::MAX)] {
        assert_eq!(answer.frame(group, shard, block), None, "{group} {shard} {block}");
    }
}

#[test]
fn replies_that_contradict_the_request_are_refused() {
    let one = || vec![asked(0, 2)];
    assert!(check(one(), vec![], &layout()).is_err(), "a range is missing");
    assert!(check(one(), vec![range(&[2], 2)], &layout()).is_err(), "a block is missing");
    assert!(check(one(), vec![range(&[2, 2], 3)], &layout()).is_err(), "a frame is missing");
    assert!(check(one(), vec![range(&[2, 0], 4)], &layout()).is_err(), "a frame too many");
    let mut other_size = range(&[2, 0], 2);
    other_size.frames[1].bytes = BYTES - 1;
    assert!(check(one(), vec![other_size], &layout()).is_err(), "a frame of another size");
}

#[test]
fn tokens_are_attributed_to_the_slowest_tier_beyond_what_is_computed() {
    let layout = layout();
    let answer = check(vec![asked(0, 6)], vec![range(&[1, 2, 3, 4, 5, 0], 10)], &layout).unwrap();
    let hit = answer.hit(&layout.groups, 0, 1000);
    assert_eq!(
        hit,
        Hit { tokens: 80, device_tokens: 16, host_tokens: 16, disk_tokens: 16, object_tokens: 16, peer_tokens: 16 }
    );
    let hit = answer.hit(&layout.groups, 32, 63);
    assert_eq!(hit, Hit { tokens: 48, disk_tokens: 16, ..Hit::default() });
    assert_eq!(answer.hit(&layout.groups, 80, 1000), Hit::default(), "nothing beyond what is computed");
    assert_eq!(answer.hit(&layout.groups, 0, 0), Hit::default());
}

#[test]
fn windows_count_only_where_they_are_needed() {
    let layout = hybrid();
    let full = range(&[2, 2, 2, 2], 4);
    let answer = check(vec![asked(0, 4), asked(0, 4)], vec![full, range(&[0, 0, 3, 2], 2)], &layout).unwrap();
    let hit = answer.hit(&layout.groups, 0, 1000);
    assert_eq!(hit, Hit { tokens: 64, host_tokens: 48, disk_tokens: 16, ..Hit::default() });
}

#[test]
fn a_prefix_never_exceeds_what_was_looked_up() {
    let mut spec = sample();
    spec["layout"]["groups"][0] = json!({"kind": "state", "block_tokens": 16, "layers": ["s"]});
    let layout = Spec::parse(&spec.to_string()).unwrap().layout;
    let answer = check(vec![asked(0, 3)], vec![range(&[0, 2, 0], 1)], &layout).unwrap();
    assert_eq!(
        answer.hit(&layout.groups, 0, u32::MAX).tokens,
        32,
        "and finding it takes three steps, not four billion"
    );
}
