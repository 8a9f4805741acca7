//! Sample order of an epoch: canonical streams, interleaved.

use hyperlora_core::random::{Purpose, for_sample, permutation};

/// Settings of the sample order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrderConfig {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the stage.
    pub stage: u64,
    /// Number of canonical streams, see [`epoch_order`].
    pub streams: usize,
    /// Number of a stream's row groups whose samples are shuffled together.
    pub window: usize,
}

/// Returns the order of one epoch over samples in row groups: a function of (seed, stage, epoch) alone.
///
/// `groups` holds the row group of every sample, with equal ones adjacent. Row groups are put in random order, and the
/// samples of each are shuffled. The result is cut into `streams` pieces whose lengths differ by one sample at most,
/// and in each piece the samples of `window` groups at a time are shuffled together. Position `p` of the epoch is the
/// next sample of stream `p % streams`. A world size that divides the number of streams can therefore deal positions in
/// turn: each rank gets whole streams and reads only their row groups.
///
/// A cut may split a row group, which then belongs to both adjacent streams. Every other stream runs backward, so that
/// both reach that group at the same time.
pub fn epoch_order(config: &OrderConfig, epoch: u64, groups: &[u32]) -> Vec<u32> {
    let mut generator = for_sample(config.seed, config.stage, epoch, Purpose::Order);
    let mut start = 0;
    let spans: Vec<(u32, usize)> = groups
        .chunk_by(|a, b| a == b)
        .map(|span| {
            let from = start;
            start += span.len() as u32;
            (from, span.len())
        })
        .collect();
    let mut samples = Vec::with_capacity(groups.len());
    for span in permutation(&mut generator, spans.len()) {
        let (from, len) = spans[span];
        samples.extend(permutation(&mut generator, len).into_iter().map(|place| from + place as u32));
    }
    let count = config.streams.max(1);
    let mut streams: Vec<&mut [u32]> = Vec::with_capacity(count);
    let mut rest = samples.as_mut_slice();
    for stream in 0..count {
        // The first streams take the remainder, because the last round reaches only them.
        let (piece, others) = rest.split_at_mut(groups.len() / count + usize::from(stream < groups.len() % count));
        if stream % 2 == 1 {
            piece.reverse();
        }
        shuffle_windows(&mut generator, piece, groups, config.window.max(1));
        streams.push(piece);
        rest = others;
    }
    (0..groups.len()).map(|place| streams[place % count][place / count]).collect()
}

/// Shuffles the samples of `window` row groups at a time.
fn shuffle_windows(generator: &mut impl rand_core::RngCore, stream: &mut [u32], groups: &[u32], window: usize) {
    let mut lengths = stream.chunk_by(|&a, &b| groups[a as usize] == groups[b as usize]).map(<[u32]>::len);
    let windows: Vec<usize> =
        std::iter::from_fn(|| Some(lengths.by_ref().take(window).sum()).filter(|&length| length > 0)).collect();
    let mut rest = stream;
    for length in windows {
        let (samples, others) = rest.split_at_mut(length);
        let ordered = samples.to_vec();
        for (sample, place) in samples.iter_mut().zip(permutation(generator, length)) {
            *sample = ordered[place];
        }
        rest = others;
    }
}

/// Walks through epochs by draw index, keeping the order of the current epoch.
#[derive(Debug)]
pub struct Walk {
    config: OrderConfig,
    groups: Vec<u32>,
    epoch: Option<u64>,
    order: Vec<u32>,
}

impl Walk {
    /// Creates a walk over the samples of `groups`, at least one; see [`epoch_order`].
    pub fn new(config: OrderConfig, groups: Vec<u32>) -> Self {
        Self { config, groups, epoch: None, order: Vec::new() }
    }

    /// Returns the sample of draw `draw`. Batches may cross epoch ends.
    pub fn sample(&mut self, draw: u64) -> usize {
        let len = self.groups.len().max(1) as u64;
        let epoch = draw / len;
        if self.epoch != Some(epoch) {
            self.order = epoch_order(&self.config, epoch, &self.groups);
            self.epoch = Some(epoch);
        }
        self.order.get((draw % len) as usize).map_or(0, |&sample| sample as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPS: [u32; 10] = [0, 0, 0, 1, 1, 4, 4, 4, 4, 5];

    fn config(streams: usize, window: usize) -> OrderConfig {
        OrderConfig { seed: 7, stage: 1, streams, window }
    }

    #[test]
    fn an_epoch_holds_every_sample_once_and_differs_from_the_next() {
        for (epoch, streams) in (0..20).flat_map(|epoch| [1, 2, 3, 7, 10, 48].map(|streams| (epoch, streams))) {
            let config = config(streams, 2);
            let mut order = epoch_order(&config, epoch, &GROUPS);
            assert_eq!(order, epoch_order(&config, epoch, &GROUPS));
            assert_ne!(order, epoch_order(&config, epoch + 1, &GROUPS));
            assert_ne!(order, epoch_order(&OrderConfig { stage: 2, ..config }, epoch, &GROUPS));
            order.sort_unstable();
            assert_eq!(order, (0..10).collect::<Vec<u32>>());
        }
    }

    #[test]
    fn a_window_keeps_the_samples_of_its_groups_together() {
        for epoch in 0..20 {
            let order = epoch_order(&config(1, 1), epoch, &GROUPS);
            let changes = order.windows(2).filter(|pair| GROUPS[pair[0] as usize] != GROUPS[pair[1] as usize]).count();
            assert_eq!(changes, 3, "{order:?}");
        }
        // Each window holds two groups of four, mixed.
        let groups: Vec<u32> = (0..16).map(|sample| sample / 4).collect();
        let mixed = |order: &[u32]| order[..8].chunk_by(|&a, &b| groups[a as usize] == groups[b as usize]).count() > 2;
        assert!((0..20).any(|epoch| mixed(&epoch_order(&config(1, 2), epoch, &groups))));
        for epoch in 0..20 {
            let mut first: Vec<u32> =
                epoch_order(&config(1, 2), epoch, &groups)[..8].iter().map(|row| row / 4).collect();
            first.sort_unstable();
            first.dedup();
            assert_eq!(first.len(), 2);
        }
    }

    #[test]
    fn only_groups_at_a_cut_belong_to_two_streams() {
        let groups: Vec<u32> = (0..1000).map(|sample| sample / 8).collect();
        for epoch in 0..5 {
            let order = epoch_order(&config(12, 2), epoch, &groups);
            let mut streams_of = vec![Vec::new(); 125];
            for (place, &sample) in order.iter().enumerate() {
                streams_of[groups[sample as usize] as usize].push(place % 12);
            }
            let shared = streams_of.iter_mut().filter_map(|streams| {
                streams.sort_unstable();
                streams.dedup();
                (streams.len() > 1).then_some(streams)
            });
            let shared: Vec<_> = shared.collect();
            assert!(shared.len() <= 11, "{} row groups are shared", shared.len());
            assert!(shared.iter().all(|streams| streams.len() == 2), "{shared:?}");
        }
    }

    #[test]
    fn a_walk_goes_on_anywhere() {
        let whole: Vec<usize> = {
            let mut walk = Walk::new(config(3, 2), GROUPS.to_vec());
            (0..35).map(|draw| walk.sample(draw)).collect()
        };
        let mut resumed = Walk::new(config(3, 2), GROUPS.to_vec());
        assert_eq!((17..35).map(|draw| resumed.sample(draw)).collect::<Vec<_>>(), whole[17..]);
    }
}
