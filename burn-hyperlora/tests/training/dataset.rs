//! Shards to batches: pairs, order, the bounded cache, and samples that hang on nothing but their draw.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn_hyperlora::data::Reference;
use burn_hyperlora::data::batch::{Batch, DrawConfig, Draws};
use burn_hyperlora::data::dataset::Dataset;
use burn_hyperlora::data::loader::{Loader, LoaderConfig};
use burn_hyperlora::data::rank::Rank;
use burn_hyperlora::data::sample::{SampleMaker, SampleShape};
use burn_hyperlora::data::scenario::Scenarios;

use data_prep::shard::ShardFolder;

use crate::world::World;

fn dataset(world: &World, cache_mib: usize) -> Arc<Dataset> {
    Arc::new(Dataset::open(ShardFolder::open(&world.path("shards")).unwrap(), cache_mib).unwrap())
}

fn draws(dataset: &Dataset, reference: Reference) -> Draws {
    let scenarios = Scenarios::ID;
    let config = DrawConfig { seed: 3, stage: 1, split: "train", reference, scenarios, streams: 12, shuffle_window: 2 };
    Draws::new(dataset, &config).unwrap()
}

fn batches(world: &World, cache_mib: usize, from: u64, batch_size: usize, workers: usize) -> Vec<Batch> {
    let dataset = dataset(world, cache_mib);
    let experiment = world.experiment(&[]).unwrap();
    let shape = SampleShape {
        latent_len: 4 * 8 * 8,
        timesteps: 1000,
        transform: Arc::new(|image| image.as_raw().iter().map(|&byte| f32::from(byte)).collect()),
        with_id: true,
    };
    let maker = SampleMaker::new(Arc::clone(&dataset), &experiment.data, 3, shape);
    let config = LoaderConfig { batch_size, workers, prefetch_bytes: 1 << 20, rank: Rank::ALONE };
    let mut loader = Loader::start(maker, draws(&dataset, Reference::SameIdentity), from..48, config).unwrap();
    let mut batches = Vec::new();
    while let Some(batch) = loader.next_batch().unwrap() {
        batches.push(batch);
    }
    batches
}

#[test]
fn batches_do_not_depend_on_their_size_the_threads_the_cache_or_where_one_goes_on() {
    let world = World::new();
    let flat = |batches: Vec<Batch>| -> Vec<String> {
        batches.into_iter().flat_map(|batch| batch.samples).map(|sample| format!("{sample:?}")).collect()
    };
    let whole = flat(batches(&world, 64, 0, 4, 2));
    assert_eq!(whole.len(), 48);
    assert_eq!(flat(batches(&world, 64, 0, 1, 1)), whole);
    assert_eq!(flat(batches(&world, 0, 0, 5, 3)), whole);
    let resumed = batches(&world, 64, 20, 4, 2);
    assert_eq!((resumed[0].next_draw, resumed.last().unwrap().next_draw), (24, 48));
    assert_eq!(flat(resumed), whole[20..]);
}

#[test]
fn a_flipped_sample_is_told_the_corner_of_the_mirrored_photo() {
    let world = World::new();
    // Every square is 33 pixels wide, in photos of 44.
    let made = |flip: &str| {
        let crop = "crop: {smallest: 1.5, largest: 1.5}\n  size_conditioning: crop";
        let experiment =
            world.experiment(&[("crop: {smallest: 1.2, largest: 1.8}", crop), ("flip: true", flip)]).unwrap();
        let shape = SampleShape { latent_len: 4, timesteps: 1000, transform: Arc::new(|_| Vec::new()), with_id: false };
        let maker = SampleMaker::new(dataset(&world, 64), &experiment.data, 3, shape);
        let mut draws = draws(&maker.dataset, Reference::Target);
        (0..40).map(|draw| maker.make(draws.request(draw)).unwrap()).collect::<Vec<_>>()
    };
    let (plain, turned) = (made("flip: false"), made("flip: true"));
    let flipped: Vec<_> = plain.iter().zip(&turned).filter(|(plain, turned)| plain.pixels != turned.pixels).collect();
    assert!((10..=30).contains(&flipped.len()), "{} of 40 are flipped", flipped.len());
    for (plain, turned) in flipped {
        // Left and right of the square lie 44 - 33 pixels, each rounded in target pixels.
        let beside = plain.time_ids[3] + turned.time_ids[3];
        assert!((beside - 11.0 * 32.0 / 33.0).abs() <= 1.0, "{:?} {:?}", plain.time_ids, turned.time_ids);
        assert_eq!(plain.time_ids[..3], turned.time_ids[..3]);
    }
}

#[test]
fn an_epoch_holds_every_training_photo_once_and_no_other() {
    let world = World::new();
    let dataset = dataset(&world, 64);
    let mut draws = draws(&dataset, Reference::Target);
    assert_eq!((draws.epoch_len(), draws.left_out()), (20, 0));
    for epoch in 0..3 {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for draw in 0..20 {
            let request = draws.request(epoch * 20 + draw);
            assert_eq!(request.target, request.reference);
            *counts.entry(dataset.record(request.target).unwrap().key.clone()).or_default() += 1;
        }
        assert_eq!(counts.len(), 20);
        assert!(counts.keys().all(|key| !key.ends_with("/5.png") && !key.starts_with("p4") && !key.starts_with("p5")));
    }
}

#[test]
fn a_reference_is_another_photo_of_the_same_person_in_the_same_split() {
    let world = World::new();
    let dataset = dataset(&world, 64);
    let mut draws = draws(&dataset, Reference::SameIdentity);
    let mut pairs = BTreeMap::<usize, Vec<usize>>::new();
    for draw in 0..400 {
        let request = draws.request(draw);
        assert_ne!(request.target, request.reference);
        assert_eq!(dataset.identity(request.target), dataset.identity(request.reference));
        assert!(!dataset.record(request.reference).unwrap().key.ends_with("/5.png"));
        pairs.entry(request.target).or_default().push(request.reference);
    }
    // Every target meets several references over the epochs.
    assert!(pairs.values_mut().all(|references| {
        references.sort_unstable();
        references.dedup();
        references.len() >= 3
    }));
}

#[test]
fn people_with_a_single_photo_are_left_out_and_an_empty_split_is_refused() {
    let world = World::new();
    let dataset = dataset(&world, 64);
    // Each known person has one held-out photo.
    let error = dataset.pairs("held_out", "held_out", Reference::SameIdentity).unwrap_err();
    assert!(error.to_string().contains("reference: self"), "{error}");
    assert_eq!(dataset.pairs("held_out", "train", Reference::SameIdentity).unwrap().as_slice().len(), 4);
    let error = dataset.pairs("validation", "train", Reference::Target).unwrap_err();
    assert!(error.to_string().contains("held_out") && error.exit_code() == 2, "{error}");
}
