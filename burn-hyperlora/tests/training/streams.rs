//! One run's data at changing world sizes: what the ranks get together is what one process gets.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use burn_hyperlora::data::Reference;
use burn_hyperlora::data::batch::{DrawConfig, Draws};
use burn_hyperlora::data::dataset::Dataset;
use burn_hyperlora::data::loader::{Loader, LoaderConfig};
use burn_hyperlora::data::rank::Rank;
use burn_hyperlora::data::sample::{Sample, SampleMaker, SampleShape};
use burn_hyperlora::data::scenario::Scenarios;

use crate::world::World;

const STREAMS: usize = 12;
const GLOBAL_BATCH: u64 = 12;
const MICRO_BATCH: usize = 1;
/// Training photos of the world: an epoch ends within a step.
const EPOCH: usize = 20;

/// The samples of `steps` from draw `from`, each step as what all `ranks` got in it, and the draw that comes next.
fn steps(world: &World, ranks: usize, from: u64, steps: u64) -> (Vec<Vec<Sample>>, u64) {
    let experiment = world.experiment(&[]).unwrap();
    let mut by_step: Vec<Vec<Sample>> = (0..steps).map(|_| Vec::new()).collect();
    let mut next_draw = from;
    for rank in 0..ranks {
        let dataset = Arc::new(Dataset::open(&world.path().join("shards"), 64).unwrap());
        let draws = DrawConfig {
            seed: 3,
            stage: 1,
            split: "train",
            reference: Reference::SameIdentity,
            scenarios: Scenarios::ID,
            streams: STREAMS,
            shuffle_window: 1,
        };
        let draws = Draws::new(&dataset, &draws).unwrap();
        let transform = Arc::new(|image: &_| pixels(image));
        let shape = SampleShape { latent_len: 4 * 8 * 8, timesteps: 1000, transform, with_id: true };
        let maker = SampleMaker::new(dataset, &experiment.data, 3, shape);
        let rank = Rank::new(rank, ranks).unwrap();
        rank.check("train.yaml", STREAMS, MICRO_BATCH, GLOBAL_BATCH as usize).unwrap();
        let config = LoaderConfig { batch_size: MICRO_BATCH, workers: 2, prefetch_bytes: 1 << 16, rank };
        let mut loader = Loader::start(maker, draws, from..10 * GLOBAL_BATCH, config).unwrap();
        let passes = GLOBAL_BATCH as usize / MICRO_BATCH / ranks;
        for step in &mut by_step {
            for _ in 0..passes {
                let batch = loader.next_batch().unwrap().unwrap();
                assert_eq!(batch.samples.len(), MICRO_BATCH);
                next_draw = batch.next_draw;
                step.extend(batch.samples);
            }
        }
        assert_eq!(next_draw, from + steps * GLOBAL_BATCH);
    }
    by_step.iter_mut().for_each(|step| step.sort_by_key(|sample| sample.request.draw));
    (by_step, next_draw)
}

fn pixels(image: &image::RgbImage) -> Vec<f32> {
    image.as_raw().iter().map(|&byte| f32::from(byte)).collect()
}

#[test]
fn a_resume_on_other_ranks_in_the_middle_of_an_epoch_shows_every_photo_once() {
    let world = World::new();
    let (whole, _) = steps(&world, 1, 0, 10);
    let mut resumed = Vec::new();
    let mut next_draw: u64 = 0;
    // 10 steps of 12 draws are 6 epochs of 20: every change falls into one.
    for (ranks, count) in [(4, 4), (2, 3), (3, 3)] {
        assert!(next_draw == 0 || !next_draw.is_multiple_of(EPOCH as u64));
        let (part, next) = steps(&world, ranks, next_draw, count);
        resumed.extend(part);
        next_draw = next;
    }
    // Step by step the same samples, down to crops and noise.
    for (step, (one, many)) in whole.iter().zip(&resumed).enumerate() {
        let spelled = |samples: &[Sample]| samples.iter().map(|sample| format!("{sample:?}")).collect::<Vec<_>>();
        assert_eq!(spelled(one), spelled(many), "step {step}");
    }
    let keys: Vec<&str> = resumed.iter().flatten().map(|sample| sample.key.as_str()).collect();
    assert_eq!(keys.len(), 6 * EPOCH);
    for epoch in keys.chunks(EPOCH) {
        assert_eq!(epoch.iter().collect::<BTreeSet<_>>().len(), EPOCH);
    }
}

#[test]
fn a_rank_serves_whole_streams() {
    for ranks in [2, 3, 4, 6, 12] {
        let mut rank_of: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        for rank in 0..ranks {
            for draw in Rank::new(rank, ranks).unwrap().draws(0..10 * GLOBAL_BATCH) {
                let (epoch, place) = (draw / EPOCH as u64, draw % EPOCH as u64);
                let known = rank_of.insert((epoch, place % STREAMS as u64), rank as u64);
                assert!(known.is_none_or(|known| known == rank as u64), "{ranks} ranks, draw {draw}");
            }
        }
        assert_eq!(rank_of.len(), 6 * STREAMS);
    }
}
