//! Face pipeline on one photo of `launch/assets.sh`, by its steps:
//!
//! ```text
//! cargo bench --bench faces
//! ```
//!
//! Does nothing, with a message, if the photo or a model is not there.
#![expect(clippy::unwrap_used, reason = "a bench fails by panicking")]

use std::path::Path;

use data_prep::crop::CropConfig;
use data_prep::face::{Detection, FaceAnalyser, FaceConfig};
use data_prep::filter::FilterConfig;
use divan::Bencher;
use hyperlora_core::{Error, Result};
use image::RgbImage;

const PHOTO: &str = "photos/portraits/astronaut.png";

fn main() {
    match Bench::open() {
        Ok(_) => divan::main(),
        Err(error) => eprintln!("skipped: {error}"),
    }
}

#[divan::bench]
fn detect(bencher: Bencher<'_, '_>) {
    run(bencher, |Bench { analyser, photo, .. }| analyser.detect(photo).map(drop));
}

/// Landmarks and ID embedding.
#[divan::bench]
fn describe(bencher: Bencher<'_, '_>) {
    run(bencher, |Bench { analyser, photo, face }| analyser.describe(photo, face).map(drop));
}

/// Sharpness and crop.
#[divan::bench]
fn filter_and_crop(bencher: Bencher<'_, '_>) {
    let (filter, crop) = (FilterConfig::default(), CropConfig::default());
    run(bencher, |Bench { photo, face, .. }| {
        let selected = filter.select(photo, std::slice::from_ref(face));
        let (face, _) = selected.map_err(|rejection| Error::Fault(rejection.reason.name().into()))?;
        divan::black_box(crop.cut(photo, face.face_box));
        Ok(())
    });
}

fn run(bencher: Bencher<'_, '_>, work: impl Fn(&mut Bench) -> Result<()>) {
    let mut bench = Bench::open().unwrap();
    bencher.bench_local(|| work(&mut bench).unwrap());
}

struct Bench {
    analyser: FaceAnalyser,
    photo: RgbImage,
    face: Detection,
}

impl Bench {
    fn open() -> Result<Self> {
        let path = hyperlora_testing::asset(PHOTO);
        let photo =
            image::open(&path).map_err(|problem| Error::file(&path, problem, "run launch/assets.sh"))?.to_rgb8();
        let mut analyser = FaceAnalyser::load(&FaceConfig::default(), Path::new(""))?;
        let face = analyser.detect(&photo)?.into_iter().next();
        let face = face.ok_or_else(|| Error::file(&path, "shows no face", "run launch/assets.sh"))?;
        Ok(Self { analyser, photo, face })
    }
}
