//! Takes training steps on demand, for `ci/bench/train_step.py` to compare with PyTorch:
//!
//! ```text
//! cargo bench --bench train_step -- FOLDER
//! ```
//!
//! Writes the inputs of the PyTorch side into FOLDER: `plan.json` (sizes, trained parameters, optimiser, prompts),
//! `hyper_lora/` (weights) and `batch-N.safetensors`. Then answers every line `{"steps", "recompute"}` on stdin with
//! the losses and the seconds by phase of that many steps from these weights. The step is stage 3 of the quickstart.
//! Pictures and weights are random, because their content does not change the computation.

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::module::Param;
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use burn_hyperlora::conditioning::FrozenModels;
use burn_hyperlora::data::batch::Batch;
use burn_hyperlora::data::sample::{Request, Sample};
use burn_hyperlora::data::scenario::Scenarios;
use burn_hyperlora::experiment::Experiment;
use burn_hyperlora::hypernet::{HyperLora, Stage};
use burn_hyperlora::objective::Denoising;
use burn_hyperlora::optim::{Optimizer, Sharding};
use burn_hyperlora::parameters::ParameterMapper;
use burn_hyperlora::train::config::StageEntry;
use burn_hyperlora::train::step::{self, Learner, StepConfig};
use hyperlora_core::files::write_whole;
use hyperlora_core::random::{Purpose, below, for_sample, normal};
use hyperlora_core::{Error, Result};
use hyperlora_ranks::Ranks;
use hyperlora_sdxl::planes::Planes;
use hyperlora_sdxl::weights;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::common::{BatchSizes, arguments, serve};

const EXPERIMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../experiments/quickstart/train.yaml");
const CAPTION: &str = "a photo of a person";

/// Steps to take, as a line on stdin.
#[derive(Deserialize)]
struct Order {
    steps: usize,
    recompute: bool,
}

fn main() -> Result<()> {
    let [folder] = &arguments()[..] else {
        eprintln!("this bench is the Rust side of ci/bench/train_step.sh: run that");
        return Ok(());
    };
    let mut bench = Bench::new()?;
    bench.write(Path::new(folder))?;
    serve(r#"{"steps": 6, "recompute": false}"#, |order| bench.run(order))
}

/// Inputs of a step, always from the same start.
struct Bench {
    experiment: Experiment,
    base: FrozenModels,
    sizes: BatchSizes,
    start: HyperLora,
    batches: Vec<Batch>,
}

impl Bench {
    fn new() -> Result<Self> {
        let device = Device::flex();
        let experiment = Experiment::load(Path::new(EXPERIMENT))?;
        let base = FrozenModels::load(&experiment.base, experiment.folder(), &device)?;
        let sites = base.unet.attention_sites();
        let start = HyperLora::new(&experiment.hyper_lora, sites, experiment.seed, &device.autodiff())
            .map_parameters(&mut RaiseUpBases(experiment.seed));
        let sizes = BatchSizes::of(&experiment, &base)?;
        let mut bench = Self { experiment, base, sizes, start, batches: vec![] };
        bench.start = bench.start.clone().trainable(&bench.stage()?.config().groups);
        bench.batches = bench.batches();
        Ok(bench)
    }

    /// Returns stage 3.
    fn stage(&self) -> Result<&StageEntry> {
        let mut stages = self.experiment.train.stages.iter();
        stages
            .find(|stage| stage.kind() == Stage::IdEmbedding)
            .ok_or_else(|| Error::input(EXPERIMENT, "has no stage id_embedding", "add it to train.stages"))
    }

    fn batches(&self) -> Vec<Batch> {
        let train = &self.experiment.train;
        let sample = |draw: usize| self.sample(draw as u64);
        let batch = |index: usize| {
            let draws = index * train.micro_batch..(index + 1) * train.micro_batch;
            Batch { next_draw: draws.end as u64, samples: draws.map(sample).collect() }
        };
        (0..train.accumulation()).map(batch).collect()
    }

    /// Makes a sample of noise in the quickstart's sizes.
    fn sample(&self, draw: u64) -> Sample {
        let (seed, stage) = (self.experiment.seed, 2);
        let &BatchSizes { image, condition, ref latent, id_embedding } = &self.sizes;
        let latent_len = latent.iter().product();
        let rng = |purpose| for_sample(seed, stage, draw, purpose);
        let mut pictures = rng(Purpose::Augmentation);
        let mut picture = |side: usize| Planes { side, data: normal(&mut pictures, 3 * side * side) };
        let mut pixels = picture(image);
        pixels.data.iter_mut().for_each(|value| *value = value.clamp(-1.0, 1.0));
        let id_pixels = Some(picture(condition));
        let id_embedding = normal(&mut rng(Purpose::Reference), id_embedding);
        let length = id_embedding.iter().map(|value| value * value).sum::<f32>().sqrt();
        let size = image as f32;
        Sample {
            request: Request { target: 0, reference: 0, scenario: Scenarios::ID.draw(seed, stage, draw), stage, draw },
            key: draw.to_string(),
            pixels,
            time_ids: [size, size, 0.0, 0.0, size, size],
            caption: CAPTION.into(),
            id_pixels,
            base_pixels: picture(condition),
            id_embedding: id_embedding.into_iter().map(|value| value / length).collect(),
            posterior_noise: normal(&mut rng(Purpose::Posterior), latent_len),
            noise: normal(&mut rng(Purpose::Noise), latent_len),
            timestep: below(&mut rng(Purpose::Timestep), 1000) as u32,
        }
    }

    /// Writes the inputs of the PyTorch side.
    fn write(&self, folder: &Path) -> Result<()> {
        let Experiment { hyper_lora, train, base, .. } = &self.experiment;
        let config = self.stage()?.config();
        let prompt = |sample: &Sample| {
            let trigger = if sample.request.scenario.trigger() { train.trigger.as_str() } else { "" };
            format!("{trigger}{}", sample.caption)
        };
        let prompts: Vec<Vec<String>> =
            self.batches.iter().map(|batch| batch.samples.iter().map(prompt).collect()).collect();
        let plan = json!({
            "base": base.path.resolve(self.experiment.folder())?,
            "hyper_lora": hyper_lora,
            "trainable": self.start.names_in(&config.groups),
            "optim": config.optim,
            "prompts": prompts,
            "threads": rayon::current_num_threads(),
            "describe": format!("quickstart, stage 3, {} x {} samples per step", self.batches.len(), train.micro_batch),
        });
        self.start.save(&folder.join("hyper_lora"), FloatDType::F32)?;
        for (index, batch) in self.batches.iter().enumerate() {
            weights::save(&folder.join(format!("batch-{index}.safetensors")), self.sizes.tensors(&batch.samples))?;
        }
        write_whole(&folder.join("plan.json"), plan.to_string().as_bytes())
    }

    /// Takes steps from the start; returns losses and seconds by phase, one entry per step.
    fn run(&mut self, order: &Order) -> Result<Value> {
        let stage = self.stage()?.clone();
        let train = &self.experiment.train;
        let config = StepConfig {
            kind: stage.kind(),
            accumulation: train.accumulation(),
            lanes: rayon::current_num_threads(),
            recompute: order.recompute,
            trigger: &train.trigger,
        };
        let (optim, ranks) = (&stage.config().optim, Ranks::alone());
        let optimizer = Optimizer::new(optim, &self.start, Sharding::WHOLE);
        let mut learner = Learner { hyper_lora: self.start.clone(), optimizer };
        let (mut losses, mut laps) = (vec![], vec![]);
        for _ in 0..order.steps {
            let mut batches = self.batches.iter().cloned();
            let next_batch = || {
                let batch = batches.next().map(ControlFlow::Continue);
                batch.ok_or_else(|| Error::Fault("the step took more batches than planned".into()))
            };
            let clock = Instant::now();
            let gradients =
                step::gradients(&self.base, &mut learner, &config, &Denoising, &ranks, f64::INFINITY, next_batch)?;
            let ControlFlow::Continue(gradients) = gradients else {
                return Err(Error::Fault("the step was interrupted".into()));
            };
            let report = step::apply(&mut learner, gradients, optim.clip_norm, optim.learning_rate, &*ranks)?;
            let total = clock.elapsed();
            let phases = report.phases.named().chain([("total", total)]);
            laps.push(phases.map(|(name, time)| (name, time.as_secs_f64())).collect::<BTreeMap<_, _>>());
            losses.push(report.mean_loss());
        }
        Ok(json!({ "losses": losses, "laps": laps }))
    }
}

/// Gives the up bases values as if trained: at zero the LoRA has no effect, and half of the gradients are zero.
struct RaiseUpBases(u64);

impl ParameterMapper for RaiseUpBases {
    fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !name.ends_with("_up_basis") {
            return parameter;
        }
        self.0 += 1;
        let shape = parameter.dims();
        let mut rng = for_sample(self.0, 0, 0, Purpose::Initialisation);
        let values: Vec<f32> = normal(&mut rng, shape.iter().product()).into_iter().map(|value| 0.1 * value).collect();
        let device = parameter.device();
        parameter.map(|_| Tensor::from_data(TensorData::new(values, shape), &device).require_grad())
    }
}
