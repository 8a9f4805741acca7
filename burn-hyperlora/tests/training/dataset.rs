//! Shards to batches: pairs, order, the bounded cache, and samples that depend only on their draw.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use burn_hyperlora::data::Reference;
use burn_hyperlora::data::batch::{Batch, DrawConfig, Draws};
use burn_hyperlora::data::dataset::Dataset;
use burn_hyperlora::data::loader::{Loader, LoaderConfig};
use burn_hyperlora::data::rank::Rank;
use burn_hyperlora::data::sample::{SampleMaker, SampleShape};
use burn_hyperlora::data::scenario::Scenarios;
use burn_hyperlora::status::Status;
use data_prep::shard::{INDEX_FILE, Manifest, ShardConfig, ShardFolder, ShardWriter};

use hyperlora_sdxl::planes::Planes;
use hyperlora_testing::world::World;

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
        transform: Arc::new(|image| Planes::new(image, |_, level| level.into())),
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
    let world = World::small();
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
    let world = World::small();
    // Every square is 33 pixels wide, in photos of 44.
    let made = |flip: &str| {
        let crop = "crop: {smallest: 1.5, largest: 1.5}\n  size_conditioning: crop";
        let experiment =
            world.experiment(&[("crop: {smallest: 1.2, largest: 1.8}", crop), ("flip: true", flip)]).unwrap();
        let shape = SampleShape {
            latent_len: 4,
            timesteps: 1000,
            transform: Arc::new(|image| Planes::new(image, |_, _| 0.0)),
            with_id: false,
        };
        let maker = SampleMaker::new(dataset(&world, 64), &experiment.data, 3, shape);
        let mut draws = draws(&maker.dataset, Reference::Target);
        (0..40).map(|draw| maker.make(draws.request(draw)).unwrap()).collect::<Vec<_>>()
    };
    let (plain, turned) = (made("flip: false"), made("flip: true"));
    let flipped: Vec<_> = plain.iter().zip(&turned).filter(|(plain, turned)| plain.pixels != turned.pixels).collect();
    assert!((10..=30).contains(&flipped.len()), "{} of 40 are flipped", flipped.len());
    for (plain, turned) in flipped {
        // The margins left and right of the square add up to 44 - 33 pixels, each rounded in target pixels.
        let beside = plain.time_ids[3] + turned.time_ids[3];
        assert!((beside - 11.0 * 32.0 / 33.0).abs() <= 1.0, "{:?} {:?}", plain.time_ids, turned.time_ids);
        assert_eq!(plain.time_ids[..3], turned.time_ids[..3]);
    }
}

#[test]
fn an_epoch_holds_every_training_photo_once_and_no_other() {
    let world = World::small();
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
    let world = World::small();
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
    let world = World::small();
    let dataset = dataset(&world, 64);
    // Each known person has one held-out photo.
    let error = dataset.pairs("held_out", "held_out", Reference::SameIdentity).unwrap_err();
    assert!(error.to_string().contains("reference: self"), "{error}");
    assert_eq!(dataset.pairs("held_out", "train", Reference::SameIdentity).unwrap().as_slice().len(), 4);
    let error = dataset.pairs("validation", "train", Reference::Target).unwrap_err();
    assert!(error.to_string().contains("held_out") && error.exit_code() == 2, "{error}");
}

#[test]
fn a_row_that_the_index_has_under_another_name_is_told() {
    let world = World::small();
    let shards = ShardFolder::open(&world.path("shards")).unwrap();
    for (name, row) in [("identity", 7), ("split", 11)] {
        let folder = world.path(name);
        fs::create_dir(&folder).unwrap();
        let mut writer = ShardWriter::new(&folder, &ShardConfig { rows_per_group: 5, rows_per_shard: 20 }, []);
        for (number, mut record) in shards.row_groups().iter().flat_map(|group| shards.read(group).unwrap()).enumerate()
        {
            match name {
                "identity" if number == row => record.identity = Some("somebody else".into()),
                "split" if number == row => record.split = None,
                _ => {}
            }
            writer.push(record).unwrap();
        }
        // Current shards with an outdated index.
        let manifest = Manifest { shards: writer.finish().unwrap().shards, ..shards.manifest().clone() };
        manifest.write(&folder).unwrap();
        fs::copy(world.path("shards").join(INDEX_FILE), folder.join(INDEX_FILE)).unwrap();
        let dataset = Dataset::open(ShardFolder::open(&folder).unwrap(), 64).unwrap();
        assert!(dataset.record(0).is_ok());
        let error = dataset.record(row).map(|_| ()).unwrap_err();
        let place = format!("row group {} is damaged: row {}, `", row / 5, row % 5);
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(&place) && error.to_string().contains("index.parquet"), "{error}");
    }
}

#[test]
fn a_trigger_that_leaves_no_room_is_refused_and_captions_that_it_cuts_are_counted() {
    let world = World::small();
    // Every `x` is one token.
    let trigger = |words: usize| format!("recompute: false\n  trigger: \"{}\"", "x ".repeat(words));
    let error = world.train(&world.experiment(&[("recompute: false", &trigger(75))]).unwrap(), "full", Some(1));
    let error = error.unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("train.yaml: train.trigger: fills the 75 tokens"), "{error}");
    let share = |run: &str| Status::read(&world.path(run)).unwrap().cut_captions;
    world.train(&world.experiment(&[("recompute: false", &trigger(72))]).unwrap(), "long", None).unwrap();
    assert!(share("long").is_some_and(|share| share > 0.5), "{:?}", share("long"));
    world.train(&world.experiment(&[]).unwrap(), "short", Some(2)).unwrap();
    assert_eq!(share("short"), None);
}
