//! Slots of a cluster: which slot a key lies in, and which server says it has it.

use redis::Value;

use super::place::{Address, MAX_SERVERS};

/// Slots of a cluster.
pub(super) const SLOTS: u16 = 16_384;

/// The slot of a key without a hash tag: CRC16/XMODEM modulo the slots (Redis cluster specification).
pub(super) fn slot_of(key: &[u8]) -> u16 {
    let fold = |crc: u16, byte: &u8| {
        (0..8).fold(
            crc ^ (u16::from(*byte) << 8),
            |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 },
        )
    };
    key.iter().fold(0, fold) % SLOTS
}

/// First and last slot of a range, and the master that has it.
pub(super) type Range = (u16, u16, Address);

/// Reads the answer to `CLUSTER SLOTS`; a server that does not know its own host is `asked`. `None` where it is no such
/// answer, or names no server.
pub(super) fn parse(answer: &Value, asked: &Address) -> Option<Vec<Range>> {
    let ranges = items(answer)?;
    if ranges.is_empty() || ranges.len() > usize::from(SLOTS) {
        return None;
    }
    let ranges: Vec<Range> = ranges.iter().map(|range| parse_range(range, asked)).collect::<Option<_>>()?;
    let mut masters: Vec<_> = ranges.iter().map(|(_, _, master)| master).collect();
    masters.sort_unstable();
    masters.dedup();
    (masters.len() <= MAX_SERVERS).then_some(ranges)
}

fn parse_range(range: &Value, asked: &Address) -> Option<Range> {
    let [first, last, master, ..] = items(range)? else { return None };
    let (first, last) = (number(first)?, number(last)?);
    let [host, port, ..] = items(master)? else { return None };
    let host = match text(host) {
        Some("" | "?") | None => asked.host.clone(),
        Some(host) => host.to_owned(),
    };
    let port = number(port)?;
    let master = Address::parse(&Address { host, port }.to_string())?;
    (first <= last && last < SLOTS).then_some((first, last, master))
}

fn items(value: &Value) -> Option<&[Value]> {
    if let Value::Array(items) = value { Some(items) } else { None }
}

fn number(value: &Value) -> Option<u16> {
    if let Value::Int(number) = value { u16::try_from(*number).ok() } else { None }
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use redis::Value;

    use super::{Address, parse, slot_of};

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(slot_of(b"123456789"), 0x31c3);
        assert_eq!(slot_of(b"foo"), 12182);
    }

    #[test]
    fn ranges_are_read_and_nonsense_is_not() {
        let asked = Address { host: "h".into(), port: 1 };
        let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let range = |first, last, host: &str| {
            let master = Value::Array(vec![bulk(host), Value::Int(7000), bulk("id")]);
            Value::Array(vec![Value::Array(vec![Value::Int(first), Value::Int(last), master])])
        };
        let of = |host: &str| Address { host: host.into(), port: 7000 };
        assert_eq!(parse(&range(0, 9, "::1"), &asked), Some(vec![(0, 9, of("::1"))]));
        assert_eq!(parse(&range(0, 9, ""), &asked), Some(vec![(0, 9, of("h"))]));
        for bad in [range(9, 0, "a"), range(0, 16_384, "a"), range(-1, 1, "a"), range(0, 1, "a b"), Value::Nil] {
            assert_eq!(parse(&bad, &asked), None, "{bad:?}");
        }
    }
}
