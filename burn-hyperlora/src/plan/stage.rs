//! The costs of one stage.

use burn::tensor::FloatDType;
use hyperlora_sdxl::memory::activation_bytes;
use serde::Serialize;

use crate::optim::{Wire, bucket_bytes};
use crate::plan::memory::{F32, Memory, WORKSPACE};
use crate::plan::{Setup, encoders, unet};
use crate::train::StageWork;
use crate::train::config::StageEntry;

/// One stage of a training.
#[derive(Debug, Clone, Serialize)]
pub struct StagePlan {
    /// Its name in the YAML.
    pub name: &'static str,
    /// Optimiser steps.
    pub steps: u64,
    /// Parameters that train.
    pub trainable: u64,
    /// Memory of one GPU.
    pub memory: Memory,
    /// Whether it fits into a GPU.
    pub fits: bool,
    /// Bytes of the gradients: what is all-reduced per optimiser step.
    pub gradient_bytes: u64,
    /// Bytes that each GPU sends for it in a ring: `(n - 1) / n` times the gradients, as `train.wire` has them, and the
    /// parameters in f32.
    pub sent_bytes: f64,
    /// Seconds of it, hops and bytes, not overlapped with computing.
    pub all_reduce_seconds: f64,
    /// Operations per image.
    pub flops: Flops,
    /// Seconds of an optimiser step.
    pub step_seconds: f64,
    /// Images per second, of all GPUs.
    pub images_per_second: f64,
    /// Days.
    pub days: f64,
    /// Samples that the stage draws.
    pub samples: u64,
    /// How often it sees every image, where their number is known.
    pub epochs: Option<f64>,
    /// Bytes of one of its checkpoints, headers not counted.
    pub checkpoint_bytes: u64,
    /// Bytes that its checkpoints take while one more than it keeps is written.
    pub disk_bytes: u64,
}

/// Floating-point operations per image; a multiplication and an addition count as two.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Flops {
    /// The UNet's forward pass with its LoRA.
    pub unet_forward: f64,
    /// The second one, layer by layer, in the backward pass.
    pub unet_recompute: f64,
    /// Gradients with respect to activations and LoRA, attention apart.
    pub unet_backward: f64,
    /// Gradients of the UNet's attention, which are computed in f32.
    pub unet_attention_backward: f64,
    /// The autoencoder's encoder.
    pub vae_encoder: f64,
    /// Both text encoders.
    pub text_encoders: f64,
    /// The image encoder, on one or two condition images.
    pub image_encoder: f64,
    /// The hypernetwork, forward and backward.
    pub hypernetwork: f64,
}

impl Flops {
    /// What runs in the UNet's float type.
    pub fn unet(&self) -> f64 {
        self.unet_forward + self.unet_recompute + self.unet_backward
    }

    /// What an ideal step needs: nothing twice.
    fn of_the_model(self) -> Self {
        Self { unet_recompute: 0.0, ..self }
    }

    /// What runs in f32.
    pub fn in_f32(&self) -> f64 {
        self.unet_attention_backward + self.vae_encoder + self.text_encoders + self.image_encoder + self.hypernetwork
    }
}

/// Its name in the YAML.
pub(super) fn dtype_name(dtype: FloatDType) -> &'static str {
    match dtype {
        FloatDType::BF16 => "bf16",
        _ => "f32",
    }
}

/// Bytes of an element.
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

    /// The model's operations per image, stage by stage; their time at the GPU's peak where it `is_known`.
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

    /// Operations divided by what the GPU is assumed to reach in each float type.
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
        // The Base stage looks at the crop with the face blurred; the ID stages at the masked face as well.
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

    fn memory(&self, entry: &StageEntry, trainable: u64) -> Memory {
        let sites = self.sites();
        let sizes = self.sizes(&sites);
        let kind = entry.kind();
        let micro_batch = self.train.micro_batch as u128;
        let gradients = trainable * F32;
        let bytes = |elements: u128| u64::try_from(elements * u128::from(F32)).unwrap_or(u64::MAX);
        let frozen = self.frozen();
        let (unet, encoders): (Vec<_>, Vec<_>) = frozen.iter().partition(|part| part.name == "unet");
        let count = |parts: Vec<&super::Part>| parts.into_iter().map(|part| part.parameters).sum::<u64>();

        let unet_activations = activation_bytes(
            &self.architecture.unet,
            self.latents(),
            self.train.micro_batch,
            self.architecture.unet_dtype,
            self.train.recompute,
        );
        // The LoRA as it was made, and its gradients.
        let lora = bytes(2 * micro_batch * sizes.lora_elements(kind));
        let graph = bytes(micro_batch * sizes.graph_elements(kind));
        // Around the widest layer of the encoder: its input, the normalised and activated input, the output, the shortcut.
        let encoding = bytes(4 * micro_batch * encoders::largest_map(&self.architecture.vae, self.image_size));
        Memory {
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
