//! Targets and their possible reference photos.

use std::sync::Arc;

use hyperlora_core::random::below;
use rand_core::RngCore;

/// Targets with the possible reference photos of their people.
#[derive(Debug)]
pub struct Pairs {
    pub(super) pairs: Vec<Pair>,
    /// Number of targets without a reference photo.
    pub left_out: usize,
}

/// One target with its possible references.
#[derive(Debug)]
pub struct Pair {
    /// Row of the target.
    pub target: usize,
    /// Rows of possible reference photos, ascending; one list is shared by all targets of a person.
    photos: Arc<[u32]>,
    /// Index of the target in that list.
    own_place: Option<usize>,
}

impl Pairs {
    /// All pairs in disk order, at least one.
    pub fn as_slice(&self) -> &[Pair] {
        &self.pairs
    }
}

impl Pair {
    /// Creates a pair whose reference is any other of `photos`, rows in ascending order, or the target if there is
    /// none.
    pub(super) fn new(target: usize, photos: Arc<[u32]>) -> Self {
        let own_place = photos.binary_search(&(target as u32)).ok();
        Self { target, photos, own_place }
    }

    /// Number of possible reference photos.
    pub fn references(&self) -> usize {
        self.photos.len() - usize::from(self.own_place.is_some())
    }

    /// Draws the reference photo, or returns the target if there is no other.
    pub fn reference(&self, generator: &mut impl RngCore) -> usize {
        self.nth(below(generator, self.references() as u64) as usize)
    }

    /// Iterates over all possible references: first the one that [`reference`](Self::reference) draws, then its
    /// replacements if it is unreadable.
    pub fn references_from(&self, generator: &mut impl RngCore) -> impl Iterator<Item = usize> + '_ {
        let drawn = below(generator, self.references() as u64) as usize;
        let count = self.references().max(1);
        (0..count).map(move |after| self.nth((drawn + after) % count))
    }

    fn nth(&self, place: usize) -> usize {
        let skipped = usize::from(self.own_place.is_some_and(|own| own <= place));
        self.photos.get(place + skipped).map_or(self.target, |&row| row as usize)
    }
}

#[cfg(test)]
mod tests {
    use hyperlora_core::random::{Purpose, for_sample};

    use super::*;

    #[test]
    fn a_reference_is_any_other_photo_and_each_stands_in_once() {
        let pair = Pair::new(5, Arc::from([2, 5, 9, 11]));
        for draw in 0..30 {
            let generator = || for_sample(1, 0, draw, Purpose::Reference);
            let mut all: Vec<usize> = pair.references_from(&mut generator()).collect();
            assert_eq!(all[0], pair.reference(&mut generator()));
            all.sort_unstable();
            assert_eq!(all, [2, 9, 11]);
        }
        let alone = Pair::new(5, Arc::default());
        let generator = || for_sample(1, 0, 0, Purpose::Reference);
        assert_eq!(alone.reference(&mut generator()), 5);
        assert_eq!(alone.references_from(&mut generator()).collect::<Vec<_>>(), [5]);
    }
}
