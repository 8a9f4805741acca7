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
mod setup;
mod stage;
#[cfg(test)]
mod tests;
mod unet;

use serde::Serialize;

use crate::experiment::Experiment;
use crate::plan::hardware::{Gpu, Hops, Link};
use crate::train::StageWork;

pub use crate::plan::memory::MemoryPlan;
pub use crate::plan::setup::{Cluster, ModelPart, Setup};
pub use crate::plan::stage::{Flops, StagePlan};

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

impl Setup {
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
