//! Small numbers for values that many entries share, counted so that unused ones go.

use std::hash::Hash;

use rustc_hash::FxHashMap;

/// A table of shared values. Number 0 is the default value: it is never given back, and its users are not counted.
#[derive(Debug)]
pub(crate) struct Interner<T> {
    values: Vec<Slot<T>>,
    numbers: FxHashMap<T, u32>,
    free: Vec<u32>,
    next_stamp: u64,
}

#[derive(Debug)]
struct Slot<T> {
    value: T,
    users: u64,
    /// Which of all values that ever had this number it is.
    stamp: u64,
}

impl<T: Clone + Eq + Hash + Default> Default for Interner<T> {
    fn default() -> Self {
        let mut numbers = FxHashMap::default();
        numbers.insert(T::default(), 0);
        Self {
            values: vec![Slot { value: T::default(), users: 1, stamp: 0 }],
            numbers,
            free: Vec::new(),
            next_stamp: 1,
        }
    }
}

impl<T: Clone + Eq + Hash + Default> Interner<T> {
    /// The number of `value`, with one more user.
    pub(crate) fn acquire(&mut self, value: &T) -> u32 {
        if let Some(&number) = self.numbers.get(value) {
            return self.share(number);
        }
        let slot = Slot { value: value.clone(), users: 1, stamp: self.next_stamp };
        self.next_stamp += 1;
        let number = if let Some(number) = self.free.pop() {
            self.values[number as usize] = slot;
            number
        } else {
            self.values.push(slot);
            u32::try_from(self.values.len() - 1).expect("fewer interned values than block ids")
        };
        self.numbers.insert(value.clone(), number);
        number
    }

    /// Gives one use back.
    pub(crate) fn release(&mut self, number: u32) {
        if number == 0 {
            return;
        }
        let slot = &mut self.values[number as usize];
        slot.users -= 1;
        if slot.users == 0 {
            self.numbers.remove(&slot.value);
            slot.value = T::default();
            self.free.push(number);
        }
    }

    /// One more user of a value that has some.
    pub(crate) fn share(&mut self, number: u32) -> u32 {
        if number > 0 {
            self.values[number as usize].users += 1;
        }
        number
    }

    /// Names the value behind a number, among all that ever had that number.
    pub(crate) fn stamp(&self, number: u32) -> u64 {
        self.values[number as usize].stamp
    }

    pub(crate) fn get(&self, number: u32) -> &T {
        &self.values[number as usize].value
    }

    pub(crate) fn len(&self) -> usize {
        self.numbers.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_goes_with_its_last_user_and_its_number_is_reused() {
        let mut names = Interner::<String>::default();
        let a = names.acquire(&"a".into());
        assert_eq!(names.acquire(&"a".into()), a);
        names.release(a);
        assert_eq!(names.get(a), "a");
        names.release(a);
        assert_eq!(names.acquire(&"b".into()), a);
        assert_eq!(names.get(a), "b");
        assert_eq!(names.acquire(&String::new()), 0);
        assert_eq!(names.len(), 2);
    }
}
