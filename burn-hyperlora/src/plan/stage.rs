//! Cost of one stage.

use burn::tensor::FloatDType;
use hyperlora_sdxl::memory::activation_bytes;
use serde::Serialize;

use crate::optim::{Wire, bucket_bytes};
use crate::plan::memory::{F32, MemoryPlan, WORKSPACE};
use crate::plan::setup::{ModelPart, Setup};
use crate::plan::{encoders, unet};
use crate::train::StageWork;
use crate::train::config::StageEntry;

/// Plan of one stage.
#[derive(Debug, Clone, Serialize)]
pub struct StagePlan {
    /// Name of the stage in YAML.
    pub name: &'static str,
    /// Number of optimiser steps.
    pub steps: u64,
    /// Number of trained parameters.
    pub trainable: u64,
    /// MemoryPlan of one GPU.
    pub memory: MemoryPlan,
    /// The stage fits into the memory of a GPU.
    pub fits: bool,
    /// Size of the gradients in bytes, which are all-reduced in every optimiser step.
    pub gradient_bytes: u64,
    /// Bytes that each GPU sends for the all-reduce in a ring: `(n - 1) / n` times the gradients in the type of
    /// `train.wire`, plus the parameters in f32.
    pub sent_bytes: f64,
    /// Seconds of the all-reduce, latency and bandwidth, without overlap with computation.
    pub all_reduce_seconds: f64,
    /// Operations per image.
    pub flops: Flops,
    /// Seconds per optimiser step.
    pub step_seconds: f64,
    /// Images per second on all GPUs.
    pub images_per_second: f64,
    /// Duration in days.
    pub days: f64,
    /// Number of samples that the stage draws.
    pub samples: u64,
    /// Number of passes over all images, if their number is known.
    pub epochs: Option<f64>,
    /// Size of a checkpoint in bytes, without headers.
    pub checkpoint_bytes: u64,
    /// Peak disk usage of the stage's checkpoints in bytes, including one that is being written.
    pub disk_bytes: u64,
}

/// Floating-point operations per image; a multiplication and an addition count as two.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Flops {
    /// UNet forward pass with its LoRA.
    pub unet_forward: f64,
    /// Second UNet forward pass, layer by layer, in the backward pass.
    pub unet_recompute: f64,
    /// Gradients with respect to activations and LoRA, except attention.
    pub unet_backward: f64,
    /// Gradients of the UNet's attention, computed in f32.
    pub unet_attention_backward: f64,
    /// Encoder of the autoencoder.
    pub vae_encoder: f64,
    /// Both text encoders.
    pub text_encoders: f64,
    /// Image encoder, on one or two condition images.
    pub image_encoder: f64,
    /// Hypernetwork, forward and backward.
    pub hypernetwork: f64,
}

impl Flops {
    /// Operations in the UNet's float type.
    pub fn unet(&self) -> f64 {
        self.unet_forward + self.unet_recompute + self.unet_backward
    }

    /// Operations of an ideal step, without recomputation.
    fn of_the_model(self) -> Self {
        Self { unet_recompute: 0.0, ..self }
    }

    /// Operations in f32.
    pub fn in_f32(&self) -> f64 {
        self.unet_attention_backward + self.vae_encoder + self.text_encoders + self.image_encoder + self.hypernetwork
    }
}

/// Name of a float type in YAML.
pub(super) fn dtype_name(dtype: FloatDType) -> &'static str {
    match dtype {
        FloatDType::BF16 => "bf16",
        _ => "f32",
    }
}

/// Size of an element in bytes.
fn dtype_bytes(dtype: FloatDType) -> u64 {
    match dtype {
        FloatDType::BF16 => 2,
        _ => F32,
    }
}

const SECONDS_PER_DAY: f64 = 86_400.0;

impl Setup {
    pub(super) fn stages(&self) -> Vec<StagePlan> {
        self.train.stages.iter().map(|entry| self.stage(entry)).collect()
    }

    /// Operations per image of each stage, and their time at the GPU's peak if it `is_known`.
    pub(super) fn work(&self, is_known: bool) -> Vec<StageWork> {
        let of = |entry: &StageEntry| {
            let flops = self.flops(entry).of_the_model();
            StageWork {
                flops_per_image: flops.unet() + flops.in_f32(),
                ideal_seconds_per_image: is_known.then(|| self.seconds_per_image(&flops)),
            }
        };
        self.train.stages.iter().map(of).collect()
    }

    fn stage(&self, entry: &StageEntry) -> StagePlan {
        let sites = self.sites();
        let sizes = self.sizes(&sites);
        let steps = entry.config().steps;
        let trainable = sizes.parameters_in(&entry.config().groups);
        let gradient_bytes = trainable * F32;
        let moments = 2 * gradient_bytes;
        let memory = self.memory(entry, trainable);
        let flops = self.flops(entry);

        let gpus = self.cluster.gpus as f64;
        let wire_bytes = match self.train.wire {
            Wire::F32 => gradient_bytes,
            Wire::Bf16 => gradient_bytes / 2,
        };
        let sent_bytes = (gpus - 1.0) / gpus * (wire_bytes + gradient_bytes) as f64;
        let buckets = gradient_bytes.div_ceil(bucket_bytes(self.cluster.gpus)) as f64;
        let hops = buckets * self.cluster.hops.seconds(self.cluster.gpus);
        let all_reduce_seconds = hops + sent_bytes / self.cluster.link.bytes_per_second;
        let per_gpu = self.train.global_batch as f64 / gpus;
        let step_seconds = per_gpu * self.seconds_per_image(&flops) + all_reduce_seconds;
        let seconds = steps as f64 * step_seconds;
        let samples = steps * self.train.global_batch as u64;
        let checkpoint_bytes = memory.hypernetwork + moments;
        StagePlan {
            name: entry.name(),
            steps,
            trainable,
            memory,
            fits: memory.peak() <= self.cluster.memory,
            gradient_bytes,
            sent_bytes,
            all_reduce_seconds,
            flops,
            step_seconds,
            images_per_second: self.train.global_batch as f64 / step_seconds,
            days: seconds / SECONDS_PER_DAY,
            samples,
            epochs: self.images.map(|images| samples as f64 / images as f64),
            checkpoint_bytes,
            disk_bytes: checkpoint_bytes.saturating_mul(self.train.checkpoints.most(steps)),
        }
    }

    /// Time in seconds: operations divided by the assumed throughput of the GPU in each float type.
    fn seconds_per_image(&self, flops: &Flops) -> f64 {
        let reached = |tflops: f64| tflops * 1e12 * self.cluster.utilisation;
        let unet = match self.architecture.unet_dtype {
            FloatDType::BF16 => self.cluster.gpu.bf16_tflops,
            _ => self.cluster.gpu.tf32_tflops,
        };
        flops.unet() / reached(unet) + flops.in_f32() / reached(self.cluster.gpu.tf32_tflops)
    }

    fn flops(&self, entry: &StageEntry) -> Flops {
        let architecture = &self.architecture;
        let sites = self.sites();
        let sizes = self.sizes(&sites);
        let kind = entry.kind();
        let unet = unet::training(&architecture.unet, self.latents(), sizes.rank(kind), self.train.recompute);
        let [first, second] = &architecture.text;
        // The Base stage uses the crop with a blurred face; the ID stages also use the masked face.
        let condition_images = if kind == crate::hypernet::Stage::Base { 1.0 } else { 2.0 };
        Flops {
            unet_forward: unet.forward as f64,
            unet_recompute: unet.recompute as f64,
            unet_backward: unet.backward as f64,
            unet_attention_backward: unet.attention_backward as f64,
            vae_encoder: encoders::autoencoder(&architecture.vae, self.image_size).flops as f64,
            text_encoders: (encoders::text(first, false).flops + encoders::text(second, true).flops) as f64,
            image_encoder: condition_images * encoders::vision(&architecture.vision).flops as f64,
            hypernetwork: sizes.flops(kind).total() as f64,
        }
    }

    fn memory(&self, entry: &StageEntry, trainable: u64) -> MemoryPlan {
        let sites = self.sites();
        let sizes = self.sizes(&sites);
        let kind = entry.kind();
        let micro_batch = self.train.micro_batch as u128;
        let gradients = trainable * F32;
        let bytes = |elements: u128| u64::try_from(elements * u128::from(F32)).unwrap_or(u64::MAX);
        let frozen = self.frozen();
        let (unet, encoders): (Vec<_>, Vec<_>) = frozen.iter().partition(|part| part.name == "unet");
        let count = |parts: Vec<&ModelPart>| parts.into_iter().map(|part| part.parameters).sum::<u64>();

        let unet_activations = activation_bytes(
            &self.architecture.unet,
            self.latents(),
            self.train.micro_batch,
            self.architecture.unet_dtype,
            self.train.recompute,
        );
        // The generated LoRA and its gradients.
        let lora = bytes(2 * micro_batch * sizes.lora_elements(kind));
        let graph = bytes(micro_batch * sizes.graph_elements(kind));
        // Tensors around the encoder's widest layer: input, normalised and activated input, output, shortcut.
        let encoding = bytes(4 * micro_batch * encoders::largest_map(&self.architecture.vae, self.image_size));
        MemoryPlan {
            unet: count(unet) * dtype_bytes(self.architecture.unet_dtype),
            encoders: count(encoders) * F32,
            hypernetwork: sizes.all_parameters() * F32,
            moments: 2 * gradients,
            moments_sharded: (2 * gradients).div_ceil(self.cluster.gpus),
            window: if self.accumulation() > 1 || self.cluster.gpus > 1 { gradients } else { 0 },
            encoding,
            unet_pass: unet_activations + lora + graph,
            unet_activations,
            hypernetwork_backward: graph + lora + gradients,
            workspace: WORKSPACE,
        }
    }
}
