//! Shard rows with untrusted values, converted to training samples.

use hyperlora_testing::repository;
use std::path::Path;
use std::sync::Arc;

use burn_hyperlora::data::DataConfig;
use burn_hyperlora::data::dataset::Dataset;
use burn_hyperlora::data::sample::{Request, SampleMaker, SampleShape};
use burn_hyperlora::data::scenario::Scenario;
use data_prep::shard::{EMBEDDING_DIM, FaceRecord, Manifest, SCHEMA_VERSION, ShardConfig, ShardFolder, ShardWriter};
use hyperlora_core::config;

use hyperlora_sdxl::planes::Planes;
use hyperlora_testing::fuzz::{Case, fuzz, scratch};
use hyperlora_testing::mutate::Random;

/// Returns a coordinate in a photo of 17 x 13; in a `wild` row sometimes an invalid one.
fn number(random: &mut Random, wild: bool) -> f32 {
    match random.below(if wild { 40 } else { 100_000 }) {
        0 => f32::from_bits(random.next() as u32),
        1 => *random.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e30, -1e9, 0.0]),
        2 => random.below(4000) as f32 - 2000.0,
        _ => random.below(120) as f32 / 10.0,
    }
}

fn record(case: &mut Case, photo: &[u8]) -> FaceRecord {
    let changed = !case.unchanged;
    let wild = case.random.one_in(3);
    let place = |case: &mut Case| [(); 2].map(|()| number(&mut case.random, wild));
    let size = |case: &mut Case, true_one: u32| match changed && case.random.one_in(10) {
        true => *case.random.pick(&[0, 1, 12, 4096, 20_000, u32::MAX]),
        false => true_one,
    };
    let count = if changed { *case.random.pick(&[68, 68, 68, 106, 0, 1, 2, 67]) } else { 68 };
    let text = |case: &mut Case, text: &str| match changed && case.random.one_in(10) {
        true => String::from_utf8_lossy(&case.text(text.as_bytes(), &["\u{1b}[2J", "\0", "é"])).into_owned(),
        false => text.to_owned(),
    };
    FaceRecord {
        key: text(case, "a/1.png"),
        image: if changed && case.random.one_in(3) { case.binary(photo) } else { photo.to_vec() },
        width: size(case, 17),
        height: size(case, 13),
        face_box: match changed.then(|| [place(case), place(case)]) {
            // Mostly a valid box: the second corner lies behind the first.
            Some([[x0, y0], [width, height]]) => [x0, y0, x0 + width, y0 + height],
            None => [2.0, 2.0, 9.0, 9.0],
        },
        points: if changed { [(); 5].map(|()| place(case)) } else { [[3.0, 4.0]; 5] },
        landmarks: (0..count)
            .map(|index| if changed { place(case) } else { [index as f32 / 9.0, (index % 7) as f32] })
            .collect(),
        score: if changed && wild { number(&mut case.random, wild) } else { 0.9 },
        id_embedding: match changed && case.random.one_in(8) {
            true => (0..EMBEDDING_DIM).map(|_| number(&mut case.random, wild)).collect(),
            false => (0..EMBEDDING_DIM).map(|place| if place == 0 { 1.0 } else { 0.0 }).collect(),
        },
        caption: text(case, "a photo of a person"),
        sha256: "0".repeat(64),
        identity: Some("a".into()),
        split: Some("train".into()),
    }
}

#[test]
fn samples() {
    let seeds = ["rgb.png", "baseline.jpg", "progressive.jpg", "palette.png"]
        .map(|file| std::fs::read(repository().join("data-prep/tests/fuzz/seeds").join(file)).unwrap());
    let yaml = "shards: x\nimage_size: 8\nflip: true\nmask: {size: 8}\ncrop: {smallest: 1.2, largest: 2.0}\n";
    let config: DataConfig = config::parse(yaml, Path::new("data.yaml")).unwrap();
    let folder = scratch();
    let named = folder.path().display().to_string();
    fuzz("samples", 500, 32 << 20, &named, |case| {
        let photo = &seeds[case.choose(seeds.len())];
        let mut writer = ShardWriter::new(folder.path(), &ShardConfig { rows_per_group: 1, rows_per_shard: 1 }, []);
        writer.push(record(case, photo))?;
        let written = writer.finish()?;
        let manifest = Manifest {
            schema_version: SCHEMA_VERSION,
            photos: 1,
            kept: 1,
            splits: Default::default(),
            rejected: Default::default(),
            notes: Default::default(),
            models: Default::default(),
            shards: written.shards,
            index: written.index,
            config: serde_json::json!({}),
        };
        std::fs::write(folder.path().join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
        let dataset = Dataset::open(ShardFolder::open(folder.path())?, 1)?;
        let shape = SampleShape {
            latent_len: 16,
            timesteps: 1000,
            transform: Arc::new(|image| Planes::new(image, |_, level| level.into())),
            with_id: true,
        };
        let maker = SampleMaker::new(Arc::new(dataset), &config, 3, shape);
        let draw = case.random.next() % 1000;
        let sample = maker.make(Request { target: 0, reference: 0, scenario: Scenario::Full, stage: 0, draw })?;
        let pictures = [Some(sample.pixels), sample.id_pixels, Some(sample.base_pixels)];
        let pictures = pictures.into_iter().flatten().map(|picture| picture.data);
        let mut numbers = pictures.chain([sample.id_embedding, sample.posterior_noise]);
        assert!(numbers.all(|numbers| numbers.iter().all(|number| number.is_finite())), "no number is trained on");
        Ok(())
    });
}
