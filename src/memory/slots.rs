use std::collections::BTreeMap;

/// Cuts a region into aligned ranges, lowest address first.
///
/// Lowest first keeps the memory in use small and warm: a page that was never touched costs more than the copy
/// into it, so the ranges used before are used again.
#[derive(Debug, Clone)]
pub struct SlotAllocator {
    alignment: u64,
    size: u64,
    /// Free ranges, start to length; never adjacent, never empty.
    free: BTreeMap<u64, u64>,
    /// Ranges handed out, start to length.
    used: BTreeMap<u64, u64>,
}

impl SlotAllocator {
    /// An empty region of `size` bytes whose ranges start and end at multiples of `alignment`.
    #[must_use]
    pub fn new(size: u64, alignment: u64) -> Self {
        let alignment = alignment.max(1);
        let size = size - size % alignment;
        let free = if size > 0 { BTreeMap::from([(0, size)]) } else { BTreeMap::new() };
        Self { alignment, size, free, used: BTreeMap::new() }
    }

    /// Bytes in the region.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes handed out.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.values().sum()
    }

    /// The lowest free range of at least `length` bytes, as offset and length; `None` where there is none.
    pub fn allocate(&mut self, length: u64) -> Option<(u64, u64)> {
        let length = length.max(1).checked_next_multiple_of(self.alignment)?;
        let (start, free) = self.free.iter().find(|(_, free)| **free >= length).map(|(s, f)| (*s, *f))?;
        self.free.remove(&start);
        if free > length {
            self.free.insert(start + length, free - length);
        }
        self.used.insert(start, length);
        Some((start, length))
    }

    /// Takes back the range that starts at `offset`; whether there was one.
    pub fn free(&mut self, offset: u64) -> bool {
        let Some(mut length) = self.used.remove(&offset) else { return false };
        let mut start = offset;
        if let Some((&before, &before_length)) = self.free.range(..start).next_back()
            && before + before_length == start
        {
            self.free.remove(&before);
            start = before;
            length += before_length;
        }
        if let Some(after_length) = self.free.remove(&(start + length)) {
            length += after_length;
        }
        self.free.insert(start, length);
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The obvious allocator: one flag per unit.
    struct Naive(Vec<bool>);

    impl Naive {
        fn allocate(&mut self, units: usize) -> Option<usize> {
            let start =
                (0..self.0.len()).find(|&at| at + units <= self.0.len() && !self.0[at..at + units].contains(&true))?;
            self.0[start..start + units].fill(true);
            Some(start)
        }
    }

    proptest! {
        #[test]
        fn ranges_are_those_of_the_naive_allocator(
            steps in prop::collection::vec((any::<bool>(), 1u64..1500, any::<prop::sample::Index>()), 1..200),
        ) {
            const UNIT: u64 = 64;
            let mut slots = SlotAllocator::new(64 * UNIT + 7, UNIT);
            let mut naive = Naive(vec![false; 64]);
            let mut held: Vec<(u64, u64)> = Vec::new();
            for (take, length, which) in steps {
                if take || held.is_empty() {
                    let units = length.div_ceil(UNIT);
                    let expected = naive.allocate(units as usize).map(|at| (at as u64 * UNIT, units * UNIT));
                    let got = slots.allocate(length);
                    prop_assert_eq!(got, expected);
                    held.extend(got);
                } else {
                    let (offset, length) = held.swap_remove(which.index(held.len()));
                    prop_assert!(slots.free(offset));
                    prop_assert!(!slots.free(offset), "a range is taken back once");
                    naive.0[(offset / UNIT) as usize..((offset + length) / UNIT) as usize].fill(false);
                }
                prop_assert_eq!(slots.used(), held.iter().map(|(_, length)| length).sum::<u64>());
            }
            for (offset, _) in held {
                slots.free(offset);
            }
            prop_assert_eq!(slots.allocate(64 * UNIT), Some((0, 64 * UNIT)), "free ranges grow together again");
        }
    }

    #[test]
    fn a_length_near_the_end_of_the_number_range_does_not_wrap() {
        assert_eq!(SlotAllocator::new(4096, 512).allocate(u64::MAX), None);
    }
}
