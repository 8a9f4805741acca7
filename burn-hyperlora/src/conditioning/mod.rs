//! Frozen base model, and encoding of a batch to the conditions of the UNet and the hypernetwork.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{Device, Tensor, TensorData};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::models::clip_vision::{ClipVisionModel, ImageProcessor};
use hyperlora_sdxl::models::unet::config::{TIME_IDS, UNet2DConditionConfig};
use hyperlora_sdxl::models::unet::{UNet2DConditionModel, UnetInput};
use hyperlora_sdxl::models::vae::AutoencoderKl;
use hyperlora_sdxl::planes::Planes;
use hyperlora_sdxl::scheduler::NoiseSchedule;
use hyperlora_sdxl::source::{BaseSource, Component};
use hyperlora_sdxl::text::{PromptStates, TextEncoders};
use hyperlora_sdxl::tokenizer::TEXT_TOKENS;

use crate::data::sample::{ImageTransform, Sample, SampleShape};

mod base_config;

pub use base_config::{BaseConfig, UnetDtype};

/// Number of cached prompt states. A run meets few prompts with caption templates, and hardly any prompt twice with
/// real captions.
const PROMPT_CACHE: usize = 256;

/// Frozen models on one plain device.
pub struct FrozenModels {
    /// Denoiser that the LoRAs act on.
    pub unet: UNet2DConditionModel,
    /// Autoencoder: images to latents and back.
    pub vae: AutoencoderKl,
    /// Noise schedule of training.
    pub schedule: NoiseSchedule,
    /// Text encoders: prompts to states.
    pub text: TextEncoders,
    vision: Option<Vision>,
    prompts: Mutex<HashMap<String, Prompt>>,
    /// Number of samples whose captions exceeded the text encoders' limit.
    cut_captions: AtomicU64,
    device: Device,
}

/// A prompt encoded by the text encoders.
#[derive(Clone)]
struct Prompt {
    states: PromptStates,
    /// Number of tokens cut off at its end.
    surplus: usize,
}

/// Image encoder and preprocessing of condition images.
pub struct Vision {
    /// Image encoder.
    pub encoder: ClipVisionModel,
    /// Preprocessing of the encoder's input.
    pub processor: ImageProcessor,
}

impl Vision {
    /// Loads the image encoder and its preprocessing.
    ///
    /// # Errors
    /// Input: a model is missing, corrupt or unsuitable.
    pub fn load(config: &BaseConfig, yaml_folder: &Path, device: &Device) -> Result<Self> {
        let preprocessing = config.feature_extractor_folder(yaml_folder)?;
        let this = Self {
            encoder: ClipVisionModel::load(&config.image_encoder_folder(yaml_folder)?, device)?,
            processor: ImageProcessor::load(&preprocessing)?,
        };
        let (cut, side) = (this.processor.side() as usize, this.encoder.config().image_size);
        if cut != side {
            return Err(Error::file(
                &preprocessing.join("preprocessor_config.json"),
                format!("cuts images of {cut} pixels, the image encoder takes {side}"),
                "name the `base.feature_extractor` that belongs to the image encoder",
            ));
        }
        Ok(this)
    }
}

/// Conditions of a batch for the UNet and the hypernetwork, one entry per sample; on the plain device until
/// [`autodiff`](Self::autodiff).
pub struct Conditions {
    /// UNet input: noisy latents, timesteps, prompt, size.
    pub input: UnetInput,
    /// Prediction target of the UNet, `[B, C, h, w]`.
    pub target: Tensor<4>,
    /// Conditions of the hypernetwork.
    pub portraits: Portraits,
}

impl Conditions {
    /// Moves input and target to the autodiff device, without a graph. The portraits stay on the plain device.
    #[must_use]
    pub fn autodiff(&self) -> Self {
        let UnetInput { latents, timesteps, prompt_embeds, pooled, time_ids } = self.input.clone();
        Self {
            input: UnetInput {
                latents: Tensor::from_inner(latents),
                timesteps: Tensor::from_inner(timesteps),
                prompt_embeds: Tensor::from_inner(prompt_embeds),
                pooled: Tensor::from_inner(pooled),
                time_ids: Tensor::from_inner(time_ids),
            },
            target: Tensor::from_inner(self.target.clone()),
            portraits: self.portraits.clone(),
        }
    }
}

/// Conditions of the hypernetwork for a batch.
#[derive(Debug, Clone)]
pub struct Portraits {
    /// Conditions from the reference photos; `None` without an ID-LoRA.
    pub id: Option<IdPortraits>,
    /// Image encoder states of the crops with blurred faces, `[B, T, D]`.
    pub base_states: Tensor<3>,
    /// 1 if the ID-LoRA is on, else 0: `[B]`.
    pub id_weight: Tensor<1>,
    /// 1 if the Base-LoRA is on, else 0: `[B]`.
    pub base_weight: Tensor<1>,
}

/// ID conditions.
#[derive(Debug, Clone)]
pub struct IdPortraits {
    /// Image encoder states of the masked faces, `[B, T, D]`.
    pub states: Tensor<3>,
    /// ID embeddings, L2-normalised, `[B, 512]`.
    pub embedding: Tensor<2>,
}

impl Portraits {
    /// Moves all tensors to the autodiff device.
    #[must_use]
    pub fn autodiff(self) -> Self {
        Self {
            id: self.id.map(|id| IdPortraits {
                states: Tensor::from_inner(id.states),
                embedding: Tensor::from_inner(id.embedding),
            }),
            base_states: Tensor::from_inner(self.base_states),
            id_weight: Tensor::from_inner(self.id_weight),
            base_weight: Tensor::from_inner(self.base_weight),
        }
    }
}

impl FrozenModels {
    /// Loads all models onto `device`.
    ///
    /// # Errors
    /// Input: a model is missing, corrupt or unsuitable.
    pub fn load(config: &BaseConfig, yaml_folder: &Path, device: &Device) -> Result<Self> {
        let source = config.source(yaml_folder)?;
        // Loads the image encoder before the UNet, so that its errors do not cost reading gigabytes.
        let vision = Vision::load(config, yaml_folder, device)?;
        Ok(Self { vision: Some(vision), ..Self::from_source(&source, config.dtype, device)? })
    }

    /// Loads the components for generating pictures: all except the image encoder.
    ///
    /// # Errors
    /// Same as [`load`](Self::load).
    pub fn load_for_drawing(config: &BaseConfig, yaml_folder: &Path, device: &Device) -> Result<Self> {
        Self::from_source(&config.source(yaml_folder)?, config.dtype, device)
    }

    /// Loads like [`load_for_drawing`](Self::load_for_drawing) from an opened base; `dtype` is the UNet's.
    ///
    /// # Errors
    /// Same as [`load`](Self::load).
    pub fn from_source(source: &BaseSource, dtype: UnetDtype, device: &Device) -> Result<Self> {
        let unet = source.config(Component::Unet)?;
        let weights = source.weights(Component::Unet, device)?.with_dtype(dtype.into());
        let base = Self {
            unet: UNet2DConditionModel::new(UNet2DConditionConfig::parse(&unet)?, weights)?,
            vae: source.vae(device)?,
            schedule: source.schedule()?,
            text: TextEncoders::open(source, device)?,
            vision: None,
            prompts: Mutex::default(),
            cut_captions: AtomicU64::default(),
            device: device.clone(),
        };
        base.check_parts(unet.origin())?;
        Ok(base)
    }

    /// Image encoder and preprocessing.
    ///
    /// # Errors
    /// Fault: the base was loaded for generating pictures only.
    pub fn vision(&self) -> Result<&Vision> {
        self.vision.as_ref().ok_or_else(|| Error::Fault("the base was loaded without an image encoder".into()))
    }

    /// Checks that the models of a base fit each other.
    fn check_parts(&self, unet_config: &Path) -> Result<()> {
        let unet = self.unet.config();
        let (context, pooled) = self.text.widths();
        let added = pooled + TIME_IDS * unet.addition_time_embed_dim;
        let latent = self.vae.config().latent_channels;
        let blocks = 0..unet.block_out_channels.len();
        let attended = blocks.map(|block| unet.cross_attention_dim.get(block)).find(|width| *width != context);
        for (key, has, needed, of) in [
            ("cross_attention_dim", attended.unwrap_or(context), context, "both text encoders' hidden_size together"),
            (
                "projection_class_embeddings_input_dim",
                unet.projection_class_embeddings_input_dim,
                added,
                "text_encoder_2's projection_dim and 6 addition_time_embed_dim",
            ),
            ("in_channels", unet.in_channels, latent, "the autoencoder's latent_channels"),
            ("out_channels", unet.out_channels, latent, "the autoencoder's latent_channels"),
        ] {
            if has != needed {
                return Err(Error::input(
                    format!("{}: {key}", unet_config.display()),
                    format!("is {has}, {of} make {needed}"),
                    "take unet, vae and text encoders from the same base",
                ));
            }
        }
        Ok(())
    }

    /// Plain device of the models.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Image side in pixels that the UNet was trained with.
    pub fn image_size(&self) -> usize {
        self.unet.config().sample_size * self.vae.config().factor()
    }

    /// Latent channels, height and width of an image of `image_size` pixels.
    pub fn latent_shape(&self, image_size: usize) -> [usize; 3] {
        let side = image_size / self.vae.config().factor();
        [self.vae.config().latent_channels, side, side]
    }

    /// Sample sizes and preprocessing that the models require.
    ///
    /// # Errors
    /// Same as [`vision`](Self::vision).
    pub fn sample_shape(&self, image_size: usize, with_id: bool) -> Result<SampleShape> {
        let processor = self.vision()?.processor.clone();
        let transform: ImageTransform = Arc::new(move |image| processor.pixel_values(image));
        Ok(SampleShape {
            latent_len: self.latent_shape(image_size).iter().product(),
            timesteps: self.schedule.config().num_train_timesteps as u32,
            transform,
            with_id,
        })
    }

    /// Checks that the autoencoder and UNet accept images of `image_size`, and that ID conditions have the width
    /// `clip_dim`.
    ///
    /// # Errors
    /// Input, naming the key of the experiment; `place` names its file.
    pub fn check(&self, place: &str, image_size: usize, clip_dim: usize) -> Result<()> {
        let levels = self.unet.config().block_out_channels.len();
        let step = self.vae.config().factor() << levels.saturating_sub(1);
        if image_size == 0 || !image_size.is_multiple_of(step) {
            return Err(Error::input(
                format!("{place}: data.image_size"),
                format!(
                    "{image_size} is not a multiple of {step}, the factor by which autoencoder and UNet reduce a side"
                ),
                format!("give {} or {}", (image_size / step).max(1) * step, (image_size / step + 1) * step),
            ));
        }
        let width = self.vision()?.encoder.config().encoder.hidden_size;
        if width != clip_dim {
            return Err(Error::input(
                format!("{place}: hyper_lora.clip_dim"),
                format!("is {clip_dim}, the image encoder's states are {width} wide"),
                format!("give {width}, or name another `base.image_encoder`"),
            ));
        }
        Ok(())
    }

    /// Encodes a batch, without a graph. `trigger` precedes the captions of samples whose ID-LoRA is on.
    ///
    /// # Errors
    /// Fault: a caption cannot be tokenised.
    pub fn encode(&self, samples: &[Sample], trigger: &str) -> Result<Conditions> {
        let (input, target) = self.noisy(samples, trigger)?;
        Ok(Conditions { input, target, portraits: self.portraits(samples)? })
    }

    /// Computes the UNet's input for a batch, and its prediction target `[B, C, h, w]`.
    ///
    /// # Errors
    /// Fault: a caption cannot be tokenised.
    pub fn noisy(&self, samples: &[Sample], trigger: &str) -> Result<(UnetInput, Tensor<4>)> {
        let prompts = self.prompts_of(samples, trigger)?;
        for (sample, Prompt { surplus, .. }) in samples.iter().zip(&prompts).filter(|(_, prompt)| prompt.surplus > 0) {
            if self.cut_captions.fetch_add(1, Ordering::Relaxed) == 0 {
                let key = &sample.key;
                tracing::warn!(
                    "{key}: the last {surplus} tokens of its caption, which may follow the trigger words, are left out: the text encoders take {TEXT_TOKENS}; others like it are counted"
                );
            }
        }
        let PromptStates { prompt_embeds, pooled } = side_by_side(prompts);
        let (count, device) = (samples.len(), &self.device);
        let images: Vec<&Planes> = samples.iter().map(|sample| &sample.pixels).collect();
        let posterior = self.latents_of(samples, |sample| &sample.posterior_noise);
        let latents = self.vae.encode(Planes::stack(&images, device), posterior);

        let noise = self.noise(samples);
        let timesteps: Vec<usize> = samples.iter().map(|sample| sample.timestep as usize).collect();
        let target = self.schedule.target(latents.clone(), noise.clone(), &timesteps);
        let input = UnetInput {
            latents: self.schedule.add_noise(latents, noise, &timesteps),
            timesteps: per_sample(samples, |sample| sample.timestep as f32, device),
            prompt_embeds,
            pooled,
            time_ids: stack(samples, |sample| &sample.time_ids, [count, 6], device),
        };
        Ok((input, target))
    }

    /// Computes the conditions of the hypernetwork for a batch.
    ///
    /// # Errors
    /// Same as [`vision`](Self::vision).
    pub fn portraits(&self, samples: &[Sample]) -> Result<Portraits> {
        let (count, device) = (samples.len(), &self.device);
        let vision = self.vision()?;
        let states = |images: Vec<&Planes>| vision.encoder.penultimate(Planes::stack(&images, device));
        let faces: Option<Vec<&Planes>> = samples.iter().map(|sample| sample.id_pixels.as_ref()).collect();
        let embedding = samples.first().map_or(0, |sample| sample.id_embedding.len());
        Ok(Portraits {
            id: faces.map(|faces| IdPortraits {
                states: states(faces),
                embedding: stack(samples, |sample| &sample.id_embedding, [count, embedding], device),
            }),
            base_states: states(samples.iter().map(|sample| &sample.base_pixels).collect()),
            id_weight: per_sample(samples, |sample| f32::from(sample.request.scenario.id_lora()), device),
            base_weight: per_sample(samples, |sample| f32::from(sample.request.scenario.base_lora()), device),
        })
    }

    /// Noise of the samples, `[B, C, h, w]`.
    pub fn noise(&self, samples: &[Sample]) -> Tensor<4> {
        self.latents_of(samples, |sample| &sample.noise)
    }

    /// Stacks a field of the latents' size, `[B, C, h, w]`.
    fn latents_of(&self, samples: &[Sample], of: fn(&Sample) -> &[f32]) -> Tensor<4> {
        let side = samples.first().map_or(0, |sample| sample.pixels.side);
        let [channels, height, width] = self.latent_shape(side);
        stack(samples, of, [samples.len(), channels, height, width], &self.device)
    }

    /// Encodes the samples' captions. `trigger` precedes those of samples whose ID-LoRA is on.
    ///
    /// # Errors
    /// Fault: a caption cannot be tokenised.
    pub fn prompts(&self, samples: &[Sample], trigger: &str) -> Result<PromptStates> {
        Ok(side_by_side(self.prompts_of(samples, trigger)?))
    }

    fn prompts_of(&self, samples: &[Sample], trigger: &str) -> Result<Vec<Prompt>> {
        let prompt = |sample: &Sample| {
            let trigger = if sample.request.scenario.trigger() { trigger } else { "" };
            self.prompt(&format!("{trigger}{}", sample.caption))
        };
        samples.iter().map(prompt).collect()
    }

    /// Number of [encoded](Self::encode) samples so far whose captions were cut off.
    pub fn cut_captions(&self) -> u64 {
        self.cut_captions.load(Ordering::Relaxed)
    }

    /// Encodes one prompt by itself, so that its bits do not depend on its neighbours in a batch.
    fn prompt(&self, prompt: &str) -> Result<Prompt> {
        // A thread that panicked cannot leave the map inconsistent, because entries are inserted and removed whole.
        let mut prompts = self.prompts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = prompts.get(prompt) {
            return Ok(known.clone());
        }
        let new = Prompt { states: self.text.encode(&[prompt])?, surplus: self.text.surplus(prompt)? };
        if prompts.len() == PROMPT_CACHE {
            prompts.clear();
        }
        prompts.insert(prompt.into(), new.clone());
        Ok(new)
    }
}

/// Concatenates prompt states, one row per prompt.
fn side_by_side(prompts: Vec<Prompt>) -> PromptStates {
    let parts = |Prompt { states, .. }: Prompt| (states.prompt_embeds, states.pooled);
    let (prompt_embeds, pooled): (Vec<_>, Vec<_>) = prompts.into_iter().map(parts).unzip();
    PromptStates { prompt_embeds: Tensor::cat(prompt_embeds, 0), pooled: Tensor::cat(pooled, 0) }
}

/// Stacks a flat field of the samples into one tensor, in sample order.
fn stack<const D: usize>(
    samples: &[Sample],
    of: fn(&Sample) -> &[f32],
    shape: [usize; D],
    device: &Device,
) -> Tensor<D> {
    let values = samples.iter().map(of).collect::<Vec<_>>().concat();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Stacks one number per sample, `[B]`.
fn per_sample(samples: &[Sample], of: fn(&Sample) -> f32, device: &Device) -> Tensor<1> {
    let values: Vec<f32> = samples.iter().map(of).collect();
    Tensor::from_data(TensorData::new(values, [samples.len()]), device)
}
