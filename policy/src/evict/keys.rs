//! The latest keys, in order, with a value each. Bounded; O(1) per operation, amortized.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

/// Remembers the last `capacity` keys.
#[derive(Debug, Default)]
pub struct RecentKeys<V> {
    capacity: usize,
    values: FxHashMap<u64, (V, u64)>,
    /// Keys with the stamp they were put in with: one of another stamp was taken out since.
    order: VecDeque<(u64, u64)>,
    stamp: u64,
}

impl<V: Copy + Default> RecentKeys<V> {
    /// An empty memory of so many keys.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    /// Puts a key in. Returns the value it replaces, and what had to be forgotten for it.
    pub fn put(&mut self, key: u64, value: V) -> (Option<V>, Option<V>) {
        self.stamp += 1;
        let replaced = self.values.insert(key, (value, self.stamp)).map(|(value, _)| value);
        self.order.push_back((key, self.stamp));
        let forgotten = if self.values.len() > self.capacity { self.forget_oldest() } else { None };
        // Taken keys leave their place in line behind: it goes when half the line is such.
        if self.order.len() > 2 * self.values.len() + 64 {
            let values = &self.values;
            self.order.retain(|(key, stamp)| values.get(key).is_some_and(|(_, s)| s == stamp));
        }
        (replaced, forgotten)
    }

    /// Takes a key out.
    pub fn take(&mut self, key: u64) -> Option<V> {
        self.values.remove(&key).map(|(value, _)| value)
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: u64) -> Option<V> {
        self.values.get(&key).map(|(value, _)| *value)
    }

    /// Forgets the oldest key and returns its value.
    pub fn forget_oldest(&mut self) -> Option<V> {
        while let Some((key, stamp)) = self.order.pop_front() {
            if self.values.get(&key).is_some_and(|(_, s)| *s == stamp) {
                return self.take(key);
            }
        }
        None
    }

    /// Keys remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_latest_and_forgets_the_oldest() {
        let mut keys = RecentKeys::new(2);
        assert_eq!(keys.put(1, 10_u32), (None, None));
        assert_eq!(keys.put(2, 20), (None, None));
        assert_eq!(keys.put(1, 11), (Some(10), None), "a key put again is young again");
        assert_eq!(keys.put(3, 30), (None, Some(20)));
        assert_eq!(keys.take(1), Some(11));
        assert_eq!((keys.get(1), keys.get(3), keys.len()), (None, Some(30), 1));
    }

    #[test]
    fn keys_taken_out_leave_no_memory_behind() {
        let mut keys = RecentKeys::new(4);
        for key in 0..10_000 {
            keys.put(key, 0_u32);
            keys.take(key);
        }
        assert!(keys.order.len() <= 64 + 8);
    }
}
