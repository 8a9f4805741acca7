//! Inputs of a plan, read from an experiment, and the sizes of its models.

use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::AttentionSite;
use serde::Serialize;

use crate::experiment::Experiment;
use crate::hypernet::{HyperLoraConfig, ParameterGroup};
use crate::plan::architecture::Architecture;
use crate::plan::hardware::{Gpu, Hops, Link};
use crate::plan::{encoders, hypernet, unet};
use crate::train::config::TrainConfig;

/// Upper limit of the image side in a plan.
const LARGEST_IMAGE: usize = 1 << 14;

/// Hardware of the training.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cluster {
    /// Model of all GPUs.
    pub gpu: Gpu,
    /// Number of GPUs.
    pub gpus: u64,
    /// Memory of each GPU in bytes.
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
    /// Sizes of the hypernetwork.
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
    pub(super) fn accumulation(&self) -> u64 {
        self.train.global_batch as u64 / (self.train.micro_batch as u64 * self.cluster.gpus)
    }

    pub(super) fn latents(&self) -> [usize; 2] {
        [self.architecture.latent_side(self.image_size); 2]
    }

    pub(super) fn sites(&self) -> Vec<AttentionSite> {
        unet::sites(&self.architecture.unet)
    }

    pub(super) fn sizes<'a>(&'a self, sites: &'a [AttentionSite]) -> hypernet::HypernetSizes<'a> {
        hypernet::HypernetSizes { config: &self.hyper_lora, sites, image_tokens: self.architecture.vision.tokens() }
    }

    pub(super) fn frozen(&self) -> Vec<ModelPart> {
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

    pub(super) fn trainable(&self) -> Vec<ModelPart> {
        let sites = self.sites();
        let sizes = self.sizes(&sites);
        let part =
            |group: ParameterGroup| ModelPart { name: group.name(), parameters: sizes.parameters(group), left_out: 0 };
        ParameterGroup::ALL.into_iter().map(part).filter(|part| part.parameters > 0).collect()
    }
}
