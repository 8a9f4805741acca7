//! Data of one run at changing world sizes: all ranks together get the same samples as one process.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;

use burn::tensor::Device;
use burn_hyperlora::data::Reference;
use burn_hyperlora::data::batch::{DrawConfig, Draws};
use burn_hyperlora::data::dataset::Dataset;
use burn_hyperlora::data::loader::{Loader, LoaderConfig};
use burn_hyperlora::data::quarantine::{QUARANTINE_FILE, Quarantine};
use burn_hyperlora::data::rank::Rank;
use burn_hyperlora::data::sample::{Sample, SampleMaker, SampleShape};
use burn_hyperlora::data::scenario::Scenarios;
use burn_hyperlora::experiment::Experiment;
use burn_hyperlora::train::Outcome;
use data_prep::shard::{Manifest, ShardFolder};
use hyperlora_core::Result;
use image::RgbImage;

use crate::runs::{RUINOUS, skipped};
use hyperlora_sdxl::planes::Planes;
use hyperlora_testing::world::World;

const STREAMS: usize = 12;
const GLOBAL_BATCH: u64 = 12;
const MICRO_BATCH: usize = 1;
/// Training photos of the world, so that an epoch ends within a step.
const EPOCH: usize = 20;

/// Returns one rank's samples of `steps` steps from draw `from`, and the next draw.
fn steps_of(
    world: &World,
    dataset: Dataset,
    rank: Rank,
    ranks: usize,
    from: u64,
    steps: u64,
) -> Result<Vec<Vec<Sample>>> {
    let experiment = world.experiment(&[]).unwrap();
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
    let transform = Arc::new(|image: &RgbImage| Planes::new(image, |_, level| level.into()));
    let shape = SampleShape { latent_len: 4 * 8 * 8, timesteps: 1000, transform, with_id: true };
    let maker = SampleMaker::new(Arc::new(dataset), &experiment.data, 3, shape);
    rank.check("train.yaml", STREAMS, MICRO_BATCH, GLOBAL_BATCH as usize).unwrap();
    let config = LoaderConfig { batch_size: MICRO_BATCH, workers: 2, prefetch_bytes: 1 << 16, rank };
    let mut loader = Loader::start(maker, draws, from..10 * GLOBAL_BATCH, config).unwrap();
    let passes = GLOBAL_BATCH as usize / MICRO_BATCH / ranks;
    let mut by_step = Vec::new();
    for step in 1..=steps {
        let mut samples = Vec::new();
        for pass in 1..=passes {
            let batch = loader.next_batch()?.unwrap();
            assert_eq!(batch.samples.len(), MICRO_BATCH);
            assert_eq!(pass == passes, batch.next_draw == from + step * GLOBAL_BATCH);
            samples.extend(batch.samples);
        }
        by_step.push(samples);
    }
    Ok(by_step)
}

/// Returns the samples of `steps` steps from draw `from`; each step holds the samples of all `ranks`.
fn steps(world: &World, ranks: usize, from: u64, steps: u64) -> Vec<Vec<Sample>> {
    let mut by_step: Vec<Vec<Sample>> = (0..steps).map(|_| Vec::new()).collect();
    for number in 0..ranks {
        let shards = ShardFolder::open(&world.path("shards")).unwrap();
        let quarantine = Quarantine::open(&world.path(""), 1, shards.checksum()).unwrap();
        let dataset = Dataset::open(shards, 64).unwrap().with_quarantine(quarantine);
        let rank = Rank::new(number, ranks).unwrap();
        let own = steps_of(world, dataset, rank, ranks, from, steps).unwrap();
        by_step.iter_mut().zip(own).for_each(|(step, samples)| step.extend(samples));
    }
    by_step.iter_mut().for_each(|step| step.sort_by_key(|sample| sample.request.draw));
    by_step
}

fn spelled(steps: &[Vec<Sample>]) -> Vec<String> {
    steps.iter().flatten().map(|sample| format!("{sample:?}")).collect()
}

/// Damages some row groups of five photos by flipping a bit in each, like a bad disk.
fn damage(world: &World, groups: &[usize]) {
    let shards = world.path("shards");
    let manifest = Manifest::read(&shards).unwrap();
    for group in groups {
        let shard = &manifest.shards[group / 4];
        let place = &shard.row_groups[group % 4];
        let path = shards.join(&shard.file);
        let mut bytes = fs::read(&path).unwrap();
        bytes[(place.offset + place.bytes / 2) as usize] ^= 4;
        fs::write(path, bytes).unwrap();
    }
}

#[test]
fn a_resume_on_other_ranks_in_the_middle_of_an_epoch_shows_every_photo_once() {
    let world = World::small();
    let whole = steps(&world, 1, 0, 10);
    let mut resumed = Vec::new();
    // 10 steps of 12 draws are 6 epochs of 20, so every change of the world size falls inside an epoch.
    for (ranks, count) in [(4, 4), (2, 3), (3, 3)] {
        let from = resumed.len() as u64 * GLOBAL_BATCH;
        assert!(from == 0 || !from.is_multiple_of(EPOCH as u64));
        resumed.extend(steps(&world, ranks, from, count));
    }
    // Each draw gives the same sample, down to crops and noise.
    assert_eq!(spelled(&whole), spelled(&resumed));
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

#[test]
fn a_row_group_is_read_once_where_memory_allows() {
    let world = World::small();
    let read = |cache_mib| {
        let dataset = Dataset::open(ShardFolder::open(&world.path("shards")).unwrap(), cache_mib).unwrap();
        let config = DrawConfig {
            seed: 3,
            stage: 1,
            split: "train",
            reference: Reference::Target,
            scenarios: Scenarios::BASE,
            streams: STREAMS,
            shuffle_window: 1,
        };
        let mut draws = Draws::new(&dataset, &config).unwrap();
        for draw in 0..EPOCH as u64 {
            dataset.record(draws.request(draw).target).unwrap();
        }
        dataset.groups_read()
    };
    // The first five row groups hold the 20 training photos.
    assert_eq!(read(64), 5);
    assert!(read(0) > 5, "without memory a row group is read again");
}

#[test]
fn a_damaged_row_group_is_left_out_and_its_places_are_filled_alike_at_any_world_size() {
    let worlds: Vec<(World, usize)> = [1, 2, 4].map(|ranks| (World::small(), ranks)).into();
    let sound = steps(&worlds[0].0, 1, 0, 10);
    let mut filled = Vec::new();
    for (world, ranks) in &worlds {
        damage(world, &[1]);
        filled.push(spelled(&steps(world, *ranks, 0, 10)));
        let text = fs::read_to_string(world.path(QUARANTINE_FILE)).unwrap();
        let bad: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
        assert_eq!((&bad["file"], &bad["row_group"]), (&"shard-00000.parquet".into(), &1.into()));
        assert_eq!((&bad["first_row"], bad["ids"].as_array().unwrap().len()), (&5.into(), 5));
    }
    assert!(filled[0] == filled[1] && filled[1] == filled[2]);

    let folder = ShardFolder::open(&worlds[0].0.path("shards")).unwrap();
    let lost: BTreeSet<String> = folder.keys(5..10).unwrap().into_iter().collect();
    // All other training photos of the next photo's person are lost, so it has no reference.
    let lonely = folder.keys(10..11).unwrap().remove(0);
    let again = steps(&worlds[0].0, 1, 0, 10);
    assert_eq!(spelled(&again), filled[0], "what is known to be damaged is not read again");
    for (sound, filled) in sound.iter().flatten().zip(again.iter().flatten()) {
        assert!(!lost.contains(&filled.key));
        let replaced = lost.contains(&sound.key) || sound.key == lonely;
        assert_eq!(replaced, sound.key != filled.key, "draw {}", sound.request.draw);
        assert_eq!((sound.timestep, &sound.noise), (filled.timestep, &filled.noise));
    }
}

#[test]
fn more_damage_than_the_budget_stops_the_run() {
    let world = World::small();
    damage(&world, &[0, 2]);
    let shards = ShardFolder::open(&world.path("shards")).unwrap();
    let quarantine = Quarantine::open(&world.path(""), 1, shards.checksum()).unwrap();
    let dataset = Dataset::open(shards, 64).unwrap().with_quarantine(quarantine);
    let error = steps_of(&world, dataset, Rank::ALONE, 1, 0, 10).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("2 row groups are damaged") && message.contains("bad_row_groups allows 1"), "{message}");
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn skipped_steps_name_the_photos_that_stood_in_for_damaged_ones() {
    let world = World::small();
    damage(&world, &[1]);
    // The first step of the second stage ruins the weights; the other three are skipped.
    let outcome = world.train(&world.experiment(&[RUINOUS]).unwrap(), "run", None).unwrap();
    assert!(matches!(outcome, Outcome::Finished { step: 9, .. }), "{outcome:?}");
    let lines = skipped(&world.path("run"));
    assert_eq!(lines.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [4, 5, 6]);
    let named: Vec<&str> =
        lines.iter().flat_map(|line| line["photos"].as_array().unwrap()).map(|key| key.as_str().unwrap()).collect();
    let lost = ShardFolder::open(&world.path("shards")).unwrap().keys(5..10).unwrap();
    assert!(named.len() == 12 && named.iter().all(|key| !lost.iter().any(|lost| lost == key)), "{named:?}");
}

#[test]
fn a_training_goes_on_without_a_damaged_row_group_and_the_gap_is_measured() {
    let world = World::small();
    damage(&world, &[1]);
    let outcome = world.train(&world.experiment(&[]).unwrap(), "run", None).unwrap();
    assert!(matches!(outcome, Outcome::Finished { step: 9, .. }), "{outcome:?}");
    let gap = Experiment::identity_gap(&world.path("run"), &Device::flex()).unwrap();
    assert!(gap.known.n > 0 && gap.known.n < 4, "{} photos", gap.known.n);
    let strict = world.experiment(&[("shuffle_window: 2", "bad_row_groups: 0")]).unwrap();
    let error = world.train(&strict, "strict", None).unwrap_err();
    assert!(error.to_string().contains("shard-00000.parquet (1)"), "{error}");
}
