//! Loads samples on demand, for `ci/bench/loader.py` to compare with PyTorch's loader:
//!
//! ```text
//! cargo bench --bench loader -- EXPERIMENT FOLDER
//! ```
//!
//! Writes the inputs of the PyTorch side into FOLDER: `plan.json` (settings, and the content of some draws) and
//! `check.safetensors` (the samples of these draws). Then answers every line `{"workers", "epochs"}` on stdin with the
//! samples and the seconds of that many epochs of the experiment's last stage, from unopened shards to tensors.

mod common;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;
use burn_hyperlora::conditioning::FrozenModels;
use burn_hyperlora::data::batch::{DrawConfig, Draws};
use burn_hyperlora::data::crop::Square;
use burn_hyperlora::data::dataset::Dataset;
use burn_hyperlora::data::loader::{Loader, LoaderConfig};
use burn_hyperlora::data::rank::Rank;
use burn_hyperlora::data::sample::{Request, Sample, SampleMaker, SampleShape};
use burn_hyperlora::experiment::Experiment;
use data_prep::shard::ShardFolder;
use hyperlora_core::files::write_whole;
use hyperlora_core::random::{Purpose, below, for_sample};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::weights;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::common::{BatchSizes, arguments, serve};

/// Number of draws whose samples the PyTorch side must reproduce.
const CHECKED: u64 = 16;

/// Epochs to load, as a line on stdin.
#[derive(Deserialize)]
struct Order {
    workers: usize,
    epochs: u64,
}

fn main() -> Result<()> {
    let [experiment, folder] = &arguments()[..] else {
        eprintln!("this bench is the Rust side of ci/bench/loader.sh: run that");
        return Ok(());
    };
    let bench = Bench::new(Path::new(experiment))?;
    bench.write(Path::new(folder))?;
    serve(r#"{"workers": 2, "epochs": 8}"#, |order| bench.run(order))
}

/// Inputs of sample making.
struct Bench {
    experiment: Experiment,
    shards: PathBuf,
    preprocessing: PathBuf,
    sizes: BatchSizes,
    shape: SampleShape,
}

impl Bench {
    fn new(path: &Path) -> Result<Self> {
        let experiment = Experiment::load(path)?;
        let shards = experiment.data.shards.resolve(experiment.folder())?;
        let preprocessing = experiment.base.feature_extractor_folder(experiment.folder())?;
        let base = FrozenModels::load(&experiment.base, experiment.folder(), &Device::flex())?;
        let sizes = BatchSizes::of(&experiment, &base)?;
        let shape = base.sample_shape(sizes.image, true)?;
        Ok(Self { experiment, shards, preprocessing, sizes, shape })
    }

    /// Opens the shards again, with nothing of them in memory.
    fn open(&self) -> Result<(SampleMaker, Draws)> {
        let Experiment { data, train, seed, .. } = &self.experiment;
        let dataset = Arc::new(Dataset::open(ShardFolder::open(&self.shards)?, data.cache_mib)?);
        let last = train.stages.iter().enumerate().next_back();
        let (stage, entry) = last.ok_or_else(|| Error::input("train.stages", "is empty", "name one stage"))?;
        let draws = Draws::new(
            &dataset,
            &DrawConfig {
                seed: *seed,
                stage: stage as u64,
                split: &data.split,
                reference: entry.config().reference,
                scenarios: entry.scenarios(),
                streams: data.streams,
                shuffle_window: data.shuffle_window,
            },
        )?;
        Ok((SampleMaker::new(dataset, data, *seed, self.shape.clone()), draws))
    }

    /// Writes the plan of the PyTorch side and the samples that it must reproduce.
    fn write(&self, folder: &Path) -> Result<()> {
        let Experiment { data, train, .. } = &self.experiment;
        let (maker, mut draws) = self.open()?;
        let requests: Vec<Request> = (0..CHECKED).map(|draw| draws.request(draw)).collect();
        let samples = requests.iter().map(|request| maker.make(*request)).collect::<Result<Vec<Sample>>>()?;
        let checked = requests.iter().map(|request| self.describe(&maker, *request)).collect::<Result<Vec<Value>>>()?;
        let plan = json!({
            "shards": self.shards,
            "split": data.split,
            "image_size": data.image_size,
            "crop": data.crop,
            "flip": data.flip,
            "mask_size": data.mask.size,
            "preprocessing": self.preprocessing.join("preprocessor_config.json"),
            "latent": self.sizes.latent,
            "timesteps": self.shape.timesteps,
            "batch": train.micro_batch,
            "samples": draws.epoch_len(),
            "checked": checked,
        });
        weights::save(&folder.join("check.safetensors"), self.sizes.tensors(&samples))?;
        write_whole(&folder.join("plan.json"), plan.to_string().as_bytes())
    }

    /// Describes the photos of a request and the crop drawn for it.
    fn describe(&self, maker: &SampleMaker, request: Request) -> Result<Value> {
        let data = &self.experiment.data;
        let record = maker.dataset.record(request.target)?;
        let mut augmentation = for_sample(maker.seed(), request.stage, request.draw, Purpose::Augmentation);
        let photo = (record.width, record.height);
        let Square { x, y, side } = Square::draw(photo, record.face_box, &data.crop, &mut augmentation);
        Ok(json!({
            "target": record.key,
            "reference": maker.dataset.record(request.reference)?.key,
            "square": [x, y, side],
            "flip": data.flip && below(&mut augmentation, 2) == 1,
        }))
    }

    fn run(&self, order: &Order) -> Result<Value> {
        let Experiment { data, train, .. } = &self.experiment;
        let clock = Instant::now();
        let (maker, draws) = self.open()?;
        let range = 0..draws.epoch_len() as u64 * order.epochs;
        let config = LoaderConfig {
            batch_size: train.micro_batch,
            workers: order.workers,
            prefetch_bytes: data.prefetch_mib << 20,
            rank: Rank::ALONE,
        };
        let mut loader = Loader::start(maker, draws, range, config)?;
        let mut samples = 0;
        while let Some(batch) = loader.next_batch()? {
            samples += batch.samples.len();
            black_box(self.sizes.tensors(&batch.samples));
        }
        Ok(json!({ "samples": samples, "seconds": clock.elapsed().as_secs_f64() }))
    }
}
