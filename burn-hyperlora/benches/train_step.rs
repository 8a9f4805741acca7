//! Takes training steps on demand, for `ci/bench/train_step.py` to compare with PyTorch:
//!
//! ```text
//! cargo bench --bench train_step -- FOLDER
//! ```
//!
//! Writes into FOLDER what the other side needs: `plan.json` (sizes, trained parameters, optimiser, prompts), `hyper_lora/`
//! (weights) and `batch-N.safetensors`; then answers every line `{"steps", "recompute"}` on stdin with the losses and the
//! seconds by phase of so many steps from these weights. The step is stage 3 of the quickstart; pictures and weights are
//! random, because what they hold does not change what is computed.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::Param;
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use burn_hyperlora::collective::WorldOfOne;
use burn_hyperlora::conditioning::Base;
use burn_hyperlora::data::batch::Batch;
use burn_hyperlora::data::sample::{Request, Sample};
use burn_hyperlora::data::scenario::Scenarios;
use burn_hyperlora::error::{Error, Result};
use burn_hyperlora::experiment::Experiment;
use burn_hyperlora::hypernet::{HyperLora, ParameterMapper, Stage};
use burn_hyperlora::optim::{Optimizer, Share};
use burn_hyperlora::random::{Purpose, below, for_sample, normal};
use burn_hyperlora::train::config::StageEntry;
use burn_hyperlora::train::step::{Learner, StepConfig, StepTerms, step};
use burn_hyperlora::weights;
use data_prep::files::write_whole;
use serde::Deserialize;
use serde_json::{Value, json};

const EXPERIMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../experiments/quickstart/train.yaml");
const STDIN: &str = "stdin";
const CAPTION: &str = "a photo of a person";

/// Steps to take, as a line on stdin.
#[derive(Deserialize)]
struct Order {
    steps: usize,
    recompute: bool,
}

fn main() -> Result<()> {
    let Some(folder) = std::env::args().skip(1).find(|argument| !argument.starts_with("--")) else {
        eprintln!("this bench is the Rust side of ci/bench/train_step.sh: run that");
        return Ok(());
    };
    let folder = PathBuf::from(folder);
    let mut bench = Bench::new()?;
    bench.write(&folder)?;
    answer(&json!({ "ready": true }))?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|source| Error::read(Path::new(STDIN), source))?;
        let order: Order = serde_json::from_str(&line)
            .map_err(|problem| Error::input(STDIN, problem, r#"give {"steps": 6, "recompute": false}"#))?;
        answer(&bench.run(&order)?)?;
    }
    Ok(())
}

fn answer(line: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|source| Error::write(Path::new("stdout"), source))
}

/// Everything that a step needs, at the same start every time.
struct Bench {
    experiment: Experiment,
    base: Base,
    /// Side of the condition images, in pixels.
    condition_side: usize,
    start: HyperLora,
    batches: Vec<Batch>,
}

impl Bench {
    fn new() -> Result<Self> {
        let device = Device::flex();
        let experiment = Experiment::load(Path::new(EXPERIMENT))?;
        let base = Base::load(&experiment.base, experiment.folder(), &device)?;
        let sites = base.unet.attention_sites();
        let start = HyperLora::new(&experiment.hyper_lora, sites, experiment.seed, &device.autodiff())
            .map_parameters(&mut RaiseUpBases(experiment.seed));
        let condition_side = base.vision()?.processor.side() as usize;
        let mut bench = Self { experiment, base, condition_side, start, batches: vec![] };
        bench.start = bench.start.clone().trainable(&bench.stage()?.config().groups);
        bench.batches = bench.batches();
        Ok(bench)
    }

    /// Stage 3.
    fn stage(&self) -> Result<&StageEntry> {
        let mut stages = self.experiment.train.stages.iter();
        stages
            .find(|stage| stage.kind() == Stage::IdEmbed)
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

    /// A sample of noise in the sizes of the quickstart's.
    fn sample(&self, draw: u64) -> Sample {
        let (seed, stage) = (self.experiment.seed, 2);
        let image_size = self.experiment.data.image_size;
        let side = self.condition_side;
        let latent_len = self.base.latent_shape(image_size).iter().product();
        let rng = |purpose| for_sample(seed, stage, draw, purpose);
        let mut pictures = rng(Purpose::Augmentation);
        let mut picture = |side: usize| normal(&mut pictures, 3 * side * side);
        let id_embedding = normal(&mut rng(Purpose::Reference), self.experiment.hyper_lora.id_embedding_dim);
        let length = id_embedding.iter().map(|value| value * value).sum::<f32>().sqrt();
        let size = image_size as f32;
        Sample {
            request: Request { target: 0, reference: 0, scenario: Scenarios::ID.draw(seed, stage, draw), stage, draw },
            key: draw.to_string(),
            pixels: picture(image_size).into_iter().map(|value| value.clamp(-1.0, 1.0)).collect(),
            time_ids: [size, size, 0.0, 0.0, size, size],
            caption: CAPTION.into(),
            id_pixels: picture(side),
            base_pixels: picture(side),
            id_embedding: id_embedding.into_iter().map(|value| value / length).collect(),
            posterior_noise: normal(&mut rng(Purpose::Posterior), latent_len),
            noise: normal(&mut rng(Purpose::Noise), latent_len),
            timestep: below(&mut rng(Purpose::Timestep), 1000) as u32,
        }
    }

    /// What the other side computes with.
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
            weights::save(&folder.join(format!("batch-{index}.safetensors")), self.tensors(&batch.samples))?;
        }
        write_whole(&folder.join("plan.json"), plan.to_string().as_bytes())
    }

    /// A batch as its tensors by name.
    fn tensors(&self, samples: &[Sample]) -> BTreeMap<String, TensorData> {
        let image_size = self.experiment.data.image_size;
        let side = self.condition_side;
        let [channels, height, width] = self.base.latent_shape(image_size);
        let embedding = self.experiment.hyper_lora.id_embedding_dim;
        let count = samples.len();
        let stack = |of: fn(&Sample) -> &[f32], shape: &[usize]| {
            let values = samples.iter().map(of).collect::<Vec<_>>().concat();
            TensorData::new(values, [&[count], shape].concat())
        };
        let weight = |of: fn(&Sample) -> bool| {
            TensorData::new(samples.iter().map(|sample| f32::from(of(sample))).collect::<Vec<_>>(), [count])
        };
        let timesteps: Vec<i64> = samples.iter().map(|sample| sample.timestep.into()).collect();
        [
            ("pixels", stack(|sample| &sample.pixels, &[3, image_size, image_size])),
            ("id_pixels", stack(|sample| &sample.id_pixels, &[3, side, side])),
            ("base_pixels", stack(|sample| &sample.base_pixels, &[3, side, side])),
            ("id_embedding", stack(|sample| &sample.id_embedding, &[embedding])),
            ("posterior_noise", stack(|sample| &sample.posterior_noise, &[channels, height, width])),
            ("noise", stack(|sample| &sample.noise, &[channels, height, width])),
            ("time_ids", stack(|sample| &sample.time_ids, &[6])),
            ("timesteps", TensorData::new(timesteps, [count])),
            ("id_weight", weight(|sample| sample.request.scenario.id_lora())),
            ("base_weight", weight(|sample| sample.request.scenario.base_lora())),
        ]
        .map(|(name, data)| (name.to_string(), data))
        .into()
    }

    /// Takes steps from the start; losses and seconds by phase, one entry per step.
    fn run(&mut self, order: &Order) -> Result<Value> {
        let stage = self.stage()?.clone();
        let train = &self.experiment.train;
        let config = StepConfig {
            kind: stage.kind(),
            accumulation: train.accumulation(),
            lanes: rayon::current_num_threads(),
            recompute: order.recompute,
            trigger: &train.trigger,
            optim: &stage.config().optim,
        };
        let optimizer = Optimizer::new(config.optim, &self.start, Share::WHOLE);
        let mut learner = Learner { hyper_lora: self.start.clone(), optimizer };
        let terms = StepTerms { learning_rate: config.optim.learning_rate, loss_limit: f64::INFINITY };
        let (mut losses, mut laps) = (vec![], vec![]);
        for _ in 0..order.steps {
            let mut batches = self.batches.iter().cloned();
            let clock = Instant::now();
            let report = step(&self.base, &mut learner, &config, &WorldOfOne::new(), terms, || {
                batches.next().ok_or_else(|| Error::Fault("the step took more batches than planned".into()))
            })?;
            let total = clock.elapsed();
            let phases = report.phases.named().chain([("total", total)]);
            laps.push(phases.map(|(name, time)| (name, time.as_secs_f64())).collect::<BTreeMap<_, _>>());
            losses.push(report.mean_loss());
        }
        Ok(json!({ "losses": losses, "laps": laps }))
    }
}

/// Gives the up bases values as after some training: at zero the LoRA would do nothing, and half of the gradients be zero.
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
