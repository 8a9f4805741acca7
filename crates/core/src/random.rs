//! Random numbers keyed by sample, not by process: every draw has its own generator, named by its purpose. A run
//! therefore draws the same numbers at any thread count and world size, and so does a resumed run.

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use rand_distr::{Distribution, StandardNormal};

/// Purpose of a generator: two purposes of one sample never share numbers.
///
/// Resuming relies on these numbers: add new ones, never renumber.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Order of samples in an epoch.
    Order = 0,
    /// Crop and flip of the photo.
    Augmentation = 1,
    /// Choice of the photo that represents the person.
    Reference = 2,
    /// Draw from the autoencoder's posterior.
    Posterior = 3,
    /// Diffusion noise.
    Noise = 4,
    /// Diffusion timestep.
    Timestep = 5,
    /// Training scenario.
    Scenario = 6,
    /// Initial values of parameters.
    Initialisation = 7,
    /// Noise and timesteps of evaluation sets.
    Evaluation = 8,
    /// Initial latents of a generated picture.
    Sampling = 9,
    /// Replacement of a photo that cannot be read.
    StandIn = 10,
}

/// Returns the generator of one draw.
///
/// The ChaCha key is the four numbers themselves, little-endian, concatenated. There is no hash, so different arguments
/// never share a stream. `stage` is the training stage or the epoch, whichever the purpose counts by.
///
/// # Examples
/// ```
/// use hyperlora_core::random::{Purpose, below, for_sample, normal};
///
/// let (seed, stage, draw) = (42, 0, 7);
/// let timestep = below(&mut for_sample(seed, stage, draw, Purpose::Timestep), 1000);
/// let noise = normal(&mut for_sample(seed, stage, draw, Purpose::Noise), 4);
/// // The same arguments give the same numbers, in any thread and on any rank.
/// assert_eq!(timestep, below(&mut for_sample(seed, stage, draw, Purpose::Timestep), 1000));
/// assert_eq!(noise, normal(&mut for_sample(seed, stage, draw, Purpose::Noise), 4));
/// ```
pub fn for_sample(seed: u64, stage: u64, draw_index: u64, purpose: Purpose) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (field, number) in key.chunks_exact_mut(8).zip([seed, stage, draw_index, purpose as u64]) {
        field.copy_from_slice(&number.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// Draws `len` standard normal numbers.
pub fn normal(rng: &mut impl RngCore, len: usize) -> Vec<f32> {
    (0..len).map(|_| StandardNormal.sample(rng)).collect()
}

/// Draws a number in `[0, 1)`, a multiple of 2^-53.
pub fn unit(rng: &mut impl RngCore) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

/// Draws a whole number in `0..bound`, uniformly. Returns 0 for a bound of 0.
pub fn below(rng: &mut impl RngCore, bound: u64) -> u64 {
    if bound == 0 {
        return 0;
    }
    // Numbers above the last whole multiple of the bound would favour small remainders: draw again.
    let excess = (u64::MAX % bound + 1) % bound;
    loop {
        let drawn = rng.next_u64();
        if drawn <= u64::MAX - excess {
            return drawn % bound;
        }
    }
}

/// Draws an index into `weights` in proportion to them; they need not sum to one. Returns 0 if no weight is positive.
pub fn weighted(rng: &mut impl RngCore, weights: &[f64]) -> usize {
    let mut left = unit(rng) * weights.iter().sum::<f64>();
    let mut last = 0;
    for (index, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        if left < weight {
            return index;
        }
        left -= weight;
        last = index;
    }
    // Rounding can leave a remainder after the last weight.
    last
}

/// Returns the numbers `0..len` in random order (Fisher-Yates).
///
/// # Examples
/// ```
/// use hyperlora_core::random::{Purpose, for_sample, permutation};
///
/// let epoch = 3;
/// let mut order = permutation(&mut for_sample(42, epoch, 0, Purpose::Order), 100);
/// assert_eq!(order.len(), 100);
/// order.sort();
/// assert_eq!(order, (0..100).collect::<Vec<_>>());
/// ```
pub fn permutation(rng: &mut impl RngCore, len: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    for last in (1..len).rev() {
        order.swap(last, below(rng, last as u64 + 1) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(seed: u64, stage: u64, draw: u64, purpose: Purpose) -> u64 {
        for_sample(seed, stage, draw, purpose).next_u64()
    }

    #[test]
    fn every_argument_names_another_stream() {
        let base = first(1, 2, 3, Purpose::Noise);
        assert_eq!(base, first(1, 2, 3, Purpose::Noise));
        for other in [
            first(0, 2, 3, Purpose::Noise),
            first(1, 0, 3, Purpose::Noise),
            first(1, 2, 0, Purpose::Noise),
            first(1, 2, 3, Purpose::Order),
            first(2, 1, 3, Purpose::Noise),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn streams_are_the_same_on_every_machine() {
        // ChaCha8 with the key 7, 0, 1, 4 as four little-endian u64, counter and nonce zero.
        let mut rng = for_sample(7, 0, 1, Purpose::Noise);
        assert_eq!(rng.next_u64(), PINNED_WORD);
        let normals = normal(&mut rng, 3);
        for (drawn, pinned) in normals.iter().zip(PINNED_NORMALS) {
            assert!((drawn - pinned).abs() < 1e-6, "{normals:?}");
        }
    }

    const PINNED_WORD: u64 = 15_238_320_608_056_628_794;
    const PINNED_NORMALS: [f32; 3] = [-1.726_616_1, 0.015_042_198, 2.042_766_8];

    #[test]
    fn draws_follow_their_distributions() {
        let mut rng = for_sample(1, 0, 0, Purpose::Evaluation);
        let drawn = normal(&mut rng, 20_000);
        let mean = drawn.iter().map(|&x| f64::from(x)).sum::<f64>() / 20_000.0;
        let square = drawn.iter().map(|&x| f64::from(x * x)).sum::<f64>() / 20_000.0;
        assert!(mean.abs() < 0.03 && (square - 1.0).abs() < 0.05, "mean {mean}, variance {square}");

        let mut counts = [0_u32; 3];
        (0..20_000).for_each(|_| counts[below(&mut rng, 3) as usize] += 1);
        assert!(counts.iter().all(|&count| count.abs_diff(6_667) < 300), "{counts:?}");

        let mut counts = [0_u32; 4];
        (0..20_000).for_each(|_| counts[weighted(&mut rng, &[0.9, 0.0, 0.05, 0.05])] += 1);
        assert!(counts[0].abs_diff(18_000) < 200 && counts[1] == 0 && counts[2].abs_diff(1_000) < 150, "{counts:?}");
    }

    #[test]
    fn a_permutation_holds_every_number_once() {
        let mut order = permutation(&mut for_sample(1, 0, 0, Purpose::Order), 100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
