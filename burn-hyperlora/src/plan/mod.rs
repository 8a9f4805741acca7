//! Cost of a training, from its configs alone: parameters, memory, traffic, operations, days.
//!
//! docs/design/planning.md states every formula. Counts of parameters, bytes and operations are exact; memory and time
//! depend on the assumptions listed with them.

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

pub use crate::plan::memory::MemoryPlan;
pub use crate::plan::stage::{Flops, StagePlan};

/// Hardware of the training.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cluster {
    /// Model of all GPUs.
    pub gpu: Gpu,
    /// Number of GPUs.
    pub gpus: u64,
    /// MemoryPlan of each GPU in bytes.
    pub memory: u64,
    /// Bandwidth per GPU of rings through all of them.
    pub link: Link,
    /// Latency of a message between neighbouring GPUs.
    pub hops: Hops,
    /// Share of the peak that a step is assumed to reach, above 0, at most 1.
    pub utilisation: f64,
}

/// Inputs of a plan.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Path of the YAML, for messages.
    pub place: String,
    /// Configs of the frozen models.
    pub architecture: Architecture,
    /// HypernetSizes of the hypernetwork.
    pub hyper_lora: HyperLoraConfig,
    /// Settings of batches and stages.
    pub train: TrainConfig,
    /// Side of the target images in pixels.
    pub image_size: usize,
    /// Number of images in an epoch, if known.
    pub images: Option<u64>,
    /// Hardware.
    pub cluster: Cluster,
}

/// Size of a component or parameter group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelPart {
    /// Folder name of the component, or name of the parameter group.
    pub name: &'static str,
    /// Number of parameters in memory.
    pub parameters: u64,
    /// Number of parameters in its file that are not read.
    pub left_out: u64,
}

/// Cost of a training.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Path of the YAML.
    pub experiment: String,
    /// Assumptions about models that are not on disk.
    pub assumed: Vec<String>,
    /// Hardware.
    pub cluster: Cluster,
    /// Side of the target images in pixels.
    pub image_size: usize,
    /// Float type of the UNet's weights.
    pub unet_dtype: &'static str,
    /// The backward pass recomputes the UNet's layers.
    pub recompute: bool,
    /// K, the number of matrices per basis.
    pub basis: usize,
    /// Number of samples per pass and GPU (micro-batch).
    pub micro_batch: u64,
    /// Number of samples per optimiser step (global batch).
    pub global_batch: u64,
    /// Number of passes per GPU and optimiser step.
    pub accumulation: u64,
    /// Number of images in an epoch, if known.
    pub images: Option<u64>,
    /// Number of attention modules that LoRAs are generated for.
    pub attention_modules: usize,
    /// HypernetSizes of the frozen models.
    pub frozen: Vec<ModelPart>,
    /// HypernetSizes of the hypernetwork's parameter groups.
    pub trainable: Vec<ModelPart>,
    /// Plans of the stages.
    pub stages: Vec<StagePlan>,
    /// Duration of all stages in days.
    pub days: f64,
    /// All stages fit into the GPUs' memory.
    pub fits: bool,
    /// Advice on settings to change if a stage does not fit.
    pub advice: Vec<String>,
}

/// Operations per image of each stage of an experiment, and their time at the peak of `gpu`. Empty if the experiment's
/// configs are insufficient.
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

/// Upper limit of the image side in a plan.
const LARGEST_IMAGE: usize = 1 << 14;

impl Setup {
    /// Reads the configs that an experiment names.
    ///
    /// # Errors
    /// Input: a config is broken, the models cannot process the image size, or the GPUs cannot share the global batch.
    pub fn read(experiment: &Experiment, cluster: Cluster, images: Option<u64>) -> Result<Self> {
        let setup = Self {
            place: experiment.origin(),
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
                format!("{image_size} is not a multiple of {step} up to {LARGEST_IMAGE}"),
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

    /// Number of passes per GPU and step. [`check`](Self::check) ensures that there is no remainder.
    fn accumulation(&self) -> u64 {
        self.train.global_batch as u64 / (self.train.micro_batch as u64 * self.cluster.gpus)
    }

    fn latents(&self) -> [usize; 2] {
        [self.architecture.latent_side(self.image_size); 2]
    }

    fn sites(&self) -> Vec<AttentionSite> {
        unet::sites(&self.architecture.unet)
    }

    fn sizes<'a>(&'a self, sites: &'a [AttentionSite]) -> hypernet::HypernetSizes<'a> {
        hypernet::HypernetSizes { config: &self.hyper_lora, sites, image_tokens: self.architecture.vision.tokens() }
    }

    fn frozen(&self) -> Vec<ModelPart> {
        let Architecture { unet, vae, text, vision, .. } = &self.architecture;
        let encoder =
            |name, encoder: encoders::Encoder| ModelPart { name, parameters: encoder.held, left_out: encoder.left_out };
        vec![
            ModelPart { name: "unet", parameters: unet::parameters(unet), left_out: 0 },
            encoder("vae", encoders::autoencoder(vae, self.image_size)),
            encoder("text_encoder", encoders::text(&text[0], false)),
            encoder("text_encoder_2", encoders::text(&text[1], true)),
            encoder("image_encoder", encoders::vision(vision)),
        ]
    }

    fn trainable(&self) -> Vec<ModelPart> {
        let sites = self.sites();
        let sizes = self.sizes(&sites);
        let part =
            |group: ParameterGroup| ModelPart { name: group.name(), parameters: sizes.parameters(group), left_out: 0 };
        ParameterGroup::ALL.into_iter().map(part).filter(|part| part.parameters > 0).collect()
    }

    /// Computes the plan.
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
