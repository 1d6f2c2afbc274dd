use super::{AlignedBuf, IoBuf};
use crate::{Arena, ArenaConfig, PageKind};

fn frame(bytes: u64) -> (Arena, IoBuf) {
    let config =
        ArenaConfig { capacity_bytes: 65_536, extent_bytes: 65_536, page_kind: PageKind::Plain, first_generation: 1 };
    let arena = Arena::new(config).unwrap();
    assert!(arena.grow().unwrap());
    let frame = arena.alloc(bytes).granted().unwrap();
    let pin = arena.pin(frame).unwrap();
    (arena, pin.into())
}

#[test]
fn frames_and_heap_memory_behave_alike() {
    let bytes: Vec<u8> = (0..10_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let (_arena, in_frame) = frame(10_000);
    for (name, mut buf) in [("frame", in_frame), ("heap", IoBuf::heap(10_000))] {
        assert_eq!((buf.len(), buf.capacity(), buf.as_ptr().addr() % 4096), (10_000, 12_288, 0), "{name}");
        assert_eq!(buf.as_ptr(), buf.as_mut_ptr().cast_const(), "{name}");
        let crc = buf.copy_in(&bytes);
        assert_eq!(crc, crate::checksum::checksum(&bytes), "{name}");
        assert_eq!(buf.checksum(), crc, "{name}");
        assert_eq!(buf.checksum_at(5, 700), crate::checksum::checksum(&bytes[5..705]), "{name}");
        let mut back = vec![0; 10_000];
        assert_eq!(buf.copy_out(&mut back), crc, "{name}");
        assert_eq!(back, bytes, "{name}");
        let mut part = [0; 9];
        buf.copy_out_at(9_991, &mut part);
        assert_eq!(part, bytes[9_991..], "{name}");
        buf.copy_in_at(1, b"abc");
        let mut start = [0; 5];
        buf.copy_out(&mut start);
        assert_eq!(start, [bytes[0], b'a', b'b', b'c', bytes[4]], "{name}");
        let mut other = IoBuf::heap(10_000);
        assert_eq!(other.copy_from(&buf), buf.checksum(), "{name}");
        assert_eq!(other.checksum(), buf.checksum(), "{name}");
        buf.fill(7);
        assert_eq!(buf.checksum(), crate::checksum::checksum(&[7; 10_000]), "{name}");
        other.copy_from_unchecked(&buf);
        assert_eq!(other.checksum(), buf.checksum(), "{name}");
    }
}

#[test]
fn padding_is_zeroed_on_demand() {
    let mut heap = AlignedBuf::from_slice(&[9; 4096]);
    heap.set_len(100);
    let mut buf = IoBuf::from(heap);
    buf.zero_padding();
    let IoBuf::Heap(mut heap) = buf else { panic!("it was heap memory") };
    heap.set_len(4096);
    assert_eq!(heap.as_slice()[..100], [9; 100]);
    assert_eq!(heap.as_slice()[100..], [0; 3996]);
}

#[test]
#[should_panic(expected = "101 bytes at 0 of a buffer of 100")]
fn more_than_fits_is_refused_loudly() {
    IoBuf::heap(100).copy_in(&[0; 101]);
}

#[test]
#[should_panic(expected = "copying a frame onto itself")]
fn a_frame_is_not_copied_onto_itself() {
    let (_arena, buf) = frame(4096);
    let IoBuf::Frame(pin) = &buf else { panic!("it was a frame") };
    let mut same = IoBuf::Frame(pin.clone());
    same.copy_from(&buf);
}

#[test]
fn buffers_can_be_sent() {
    fn sendable<T: Send + Sync + 'static>(value: T) -> T {
        value
    }
    let (_arena, buf) = frame(1);
    assert_eq!(sendable(buf).len(), 1);
}
