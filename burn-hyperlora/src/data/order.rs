//! In which order an epoch goes through its samples.

use crate::random::{Purpose, for_sample, permutation};

/// The order of one epoch over samples that lie in row groups: a function of seed and epoch alone.
///
/// `groups` names the row group of every sample, neighbours together. Row groups come in random order; the samples of
/// `window` groups at a time are shuffled among each other, so that a large set is read group by group.
pub fn epoch_order(seed: u64, epoch: u64, groups: &[u32], window: usize) -> Vec<u32> {
    let mut generator = for_sample(seed, 0, epoch, Purpose::Order);
    let mut start = 0;
    let spans: Vec<(usize, usize)> = groups
        .chunk_by(|a, b| a == b)
        .map(|span| {
            let from = start;
            start += span.len();
            (from, start)
        })
        .collect();
    let mut order = Vec::with_capacity(groups.len());
    for chunk in permutation(&mut generator, spans.len()).chunks(window.max(1)) {
        let samples: Vec<u32> = chunk.iter().flat_map(|&span| spans[span].0 as u32..spans[span].1 as u32).collect();
        order.extend(permutation(&mut generator, samples.len()).into_iter().map(|place| samples[place]));
    }
    order
}

/// Walks through epochs by draw index; the order of the current epoch is kept.
#[derive(Debug)]
pub struct Walk {
    seed: u64,
    groups: Vec<u32>,
    window: usize,
    epoch: Option<u64>,
    order: Vec<u32>,
}

impl Walk {
    /// Over the samples of `groups`, at least one; see [`epoch_order`].
    pub fn new(seed: u64, groups: Vec<u32>, window: usize) -> Self {
        Self { seed, groups, window, epoch: None, order: Vec::new() }
    }

    /// The sample of draw `draw`; batches run across epoch ends.
    pub fn sample(&mut self, draw: u64) -> usize {
        let len = self.groups.len().max(1) as u64;
        let epoch = draw / len;
        if self.epoch != Some(epoch) {
            self.order = epoch_order(self.seed, epoch, &self.groups, self.window);
            self.epoch = Some(epoch);
        }
        self.order.get((draw % len) as usize).map_or(0, |&sample| sample as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPS: [u32; 10] = [0, 0, 0, 1, 1, 4, 4, 4, 4, 5];

    #[test]
    fn an_epoch_holds_every_sample_once_and_differs_from_the_next() {
        for epoch in 0..20 {
            let mut order = epoch_order(7, epoch, &GROUPS, 2);
            assert_eq!(order, epoch_order(7, epoch, &GROUPS, 2));
            assert_ne!(order, epoch_order(7, epoch + 1, &GROUPS, 2));
            order.sort_unstable();
            assert_eq!(order, (0..10).collect::<Vec<u32>>());
        }
    }

    #[test]
    fn a_window_keeps_the_samples_of_its_groups_together() {
        for epoch in 0..20 {
            let order = epoch_order(7, epoch, &GROUPS, 1);
            let changes = order.windows(2).filter(|pair| GROUPS[pair[0] as usize] != GROUPS[pair[1] as usize]).count();
            assert_eq!(changes, 3, "{order:?}");
        }
    }

    #[test]
    fn a_walk_goes_on_anywhere() {
        let whole: Vec<usize> = {
            let mut walk = Walk::new(7, GROUPS.to_vec(), 2);
            (0..35).map(|draw| walk.sample(draw)).collect()
        };
        let mut resumed = Walk::new(7, GROUPS.to_vec(), 2);
        assert_eq!((17..35).map(|draw| resumed.sample(draw)).collect::<Vec<_>>(), whole[17..]);
    }
}
