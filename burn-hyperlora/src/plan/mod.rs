//! What a training costs, from its configs alone: parameters, memory, traffic, operations, days.
//!
//! docs/design/planning.md states every formula. Counts of parameters, bytes and operations are exact; memory and time rest on
//! the assumptions that stand beside them.

mod advice;
pub mod architecture;
mod encoders;
pub mod hardware;
mod hypernet;
mod memory;
mod report;
mod stage;
#[cfg(test)]
mod tests;
mod unet;

use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::AttentionSite;
use serde::Serialize;

use crate::experiment::Experiment;
use crate::hypernet::{HyperLoraConfig, ParameterGroup};
use crate::plan::architecture::Architecture;
use crate::plan::hardware::{Gpu, Hops, Link};
use crate::train::StageWork;
use crate::train::config::TrainConfig;

pub use crate::plan::memory::Memory;
pub use crate::plan::stage::{Flops, StagePlan};

/// What the training would run on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cluster {
    /// The kind of all GPUs.
    pub gpu: Gpu,
    /// How many.
    pub gpus: u64,
    /// Memory of each in bytes.
    pub memory: u64,
    /// What each passes on around the rings through all of them.
    pub link: Link,
    /// What a message takes from one to the next besides.
    pub hops: Hops,
    /// The share of the peak that a step is assumed to reach, above 0, at most 1.
    pub utilisation: f64,
}

/// All that a plan is made from.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The YAML, for messages.
    pub place: String,
    /// The frozen models.
    pub architecture: Architecture,
    /// The hypernetwork.
    pub hyper_lora: HyperLoraConfig,
    /// Batches and stages.
    pub train: TrainConfig,
    /// Side of the target images in pixels.
    pub image_size: usize,
    /// Images of an epoch, where known.
    pub images: Option<u64>,
    /// The machines.
    pub cluster: Cluster,
}

/// A part of the model and its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Its name: that of a folder of the base, or of a parameter group.
    pub name: &'static str,
    /// Parameters that are kept in memory.
    pub parameters: u64,
    /// Parameters of its file that nothing here reads.
    pub left_out: u64,
}

/// The costs of a training.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The YAML.
    pub experiment: String,
    /// What was assumed because it is not on disk.
    pub assumed: Vec<String>,
    /// The machines.
    pub cluster: Cluster,
    /// Side of the target images in pixels.
    pub image_size: usize,
    /// Float type of the UNet's weights.
    pub unet_dtype: &'static str,
    /// Whether the UNet's layers run again in the backward pass.
    pub recompute: bool,
    /// K, matrices per basis.
    pub basis: usize,
    /// Samples per pass and GPU.
    pub micro_batch: u64,
    /// Samples per optimiser step.
    pub global_batch: u64,
    /// Passes per GPU and step.
    pub accumulation: u64,
    /// Images of an epoch, where known.
    pub images: Option<u64>,
    /// Attention modules that LoRAs are written for.
    pub attention_modules: usize,
    /// The frozen models.
    pub frozen: Vec<Part>,
    /// The hypernetwork, by parameter group.
    pub trainable: Vec<Part>,
    /// One entry per stage.
    pub stages: Vec<StagePlan>,
    /// Days of all stages together.
    pub days: f64,
    /// Whether every stage fits into the GPUs' memory.
    pub fits: bool,
    /// What to turn where one does not fit.
    pub advice: Vec<String>,
}

/// What each stage of an experiment computes per image, and in what time at the peak of `gpu`; nothing for an experiment whose
/// configs tell too little.
pub fn work(experiment: &Experiment, gpu: Option<Gpu>) -> Vec<StageWork> {
    let peak = gpu.unwrap_or(hardware::GPUS[0]);
    let link = Link { name: "none".into(), bytes_per_second: 1.0 };
    let hops = Hops::of_nccl(&peak);
    let cluster = Cluster { gpu: peak, gpus: 1, memory: peak.memory_mib << 20, link, hops, utilisation: 1.0 };
    match Setup::read(experiment, cluster, None) {
        Ok(setup) => setup.work(gpu.is_some()),
        Err(problem) => {
            tracing::debug!("no operations per image in the curves: {problem}");
            Vec::new()
        }
    }
}

/// The largest image side that a plan is made for.
const LARGEST_IMAGE: usize = 1 << 14;

impl Setup {
    /// Reads the configs that an experiment names.
    ///
    /// # Errors
    /// Input for a broken config, for an image size that the models cannot take, and for a global batch that the GPUs
    /// cannot share.
    pub fn read(experiment: &Experiment, cluster: Cluster, images: Option<u64>) -> Result<Self> {
        let setup = Self {
            place: experiment.place(),
            architecture: Architecture::read(&experiment.base, experiment.folder())?,
            hyper_lora: experiment.hyper_lora.clone(),
            train: experiment.train.clone(),
            image_size: experiment.data.image_size,
            images,
            cluster,
        };
        setup.check()?;
        Ok(setup)
    }

    fn check(&self) -> Result<()> {
        let Self { place, architecture, image_size, .. } = self;
        let step = architecture.vae.factor() << (architecture.unet.block_out_channels.len() - 1);
        if *image_size == 0 || !image_size.is_multiple_of(step) || *image_size > LARGEST_IMAGE {
            return Err(Error::input(
                format!("{place}: data.image_size"),
                format!("{image_size} is no multiple of {step} up to {LARGEST_IMAGE}"),
                format!("give {}", (image_size / step).clamp(1, LARGEST_IMAGE / step) * step),
            ));
        }
        let share = self.train.micro_batch as u64 * self.cluster.gpus;
        let global = self.train.global_batch as u64;
        if !global.is_multiple_of(share) {
            return Err(Error::input(
                format!("{place}: train.global_batch"),
                format!(
                    "{global} samples cannot be made by {} GPUs in micro-batches of {}",
                    self.cluster.gpus, self.train.micro_batch
                ),
                format!("give a multiple of {share}, or other --gpus"),
            ));
        }
        Ok(())
    }

    /// Passes per GPU and step; [`check`](Self::check) saw that there is no remainder.
    fn accumulation(&self) -> u64 {
        self.train.global_batch as u64 / (self.train.micro_batch as u64 * self.cluster.gpus)
    }

    fn latents(&self) -> [usize; 2] {
        [self.architecture.latent_side(self.image_size); 2]
    }

    fn sites(&self) -> Vec<AttentionSite> {
        unet::sites(&self.architecture.unet)
    }

    fn sizes<'a>(&'a self, sites: &'a [AttentionSite]) -> hypernet::Sizes<'a> {
        hypernet::Sizes { config: &self.hyper_lora, sites, image_tokens: self.architecture.vision.tokens() }
    }

    fn frozen(&self) -> Vec<Part> {
        let Architecture { unet, vae, text, vision, .. } = &self.architecture;
        let encoder =
            |name, encoder: encoders::Encoder| Part { name, parameters: encoder.held, left_out: encoder.left_out };
        vec![
            Part { name: "unet", parameters: unet::parameters(unet), left_out: 0 },
            encoder("vae", encoders::autoencoder(vae, self.image_size)),
            encoder("text_encoder", encoders::text(&text[0], false)),
            encoder("text_encoder_2", encoders::text(&text[1], true)),
            encoder("image_encoder", encoders::vision(vision)),
        ]
    }

    fn trainable(&self) -> Vec<Part> {
        let sites = self.sites();
        let sizes = self.sizes(&sites);
        let part =
            |group: ParameterGroup| Part { name: group.name(), parameters: sizes.parameters(group), left_out: 0 };
        ParameterGroup::ALL.into_iter().map(part).filter(|part| part.parameters > 0).collect()
    }

    /// Makes the plan.
    pub fn plan(&self) -> Plan {
        let stages = self.stages();
        let fits = stages.iter().all(|stage| stage.fits);
        Plan {
            experiment: self.place.clone(),
            assumed: self.architecture.assumed.clone(),
            cluster: self.cluster.clone(),
            image_size: self.image_size,
            unet_dtype: stage::dtype_name(self.architecture.unet_dtype),
            recompute: self.train.recompute,
            basis: self.hyper_lora.basis,
            micro_batch: self.train.micro_batch as u64,
            global_batch: self.train.global_batch as u64,
            accumulation: self.accumulation(),
            images: self.images,
            attention_modules: self.sites().len(),
            frozen: self.frozen(),
            trainable: self.trainable(),
            days: stages.iter().map(|stage| stage.days).sum(),
            fits,
            advice: if fits { Vec::new() } else { advice::advice(self) },
            stages,
        }
    }
}
