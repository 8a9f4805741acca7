//! Sampling parity with diffusers' `StableDiffusionXLPipeline`, on the tiny random base of
//! `ci/parity/encoder_fixtures.py`.

use std::fs;
use std::path::PathBuf;

use burn::tensor::{Device, Distribution, Tensor, TensorData, Tolerance};
use hyperlora_sdxl::lora::{AttentionLora, AttentionSite, LoraPair, LoraWeights};
use hyperlora_sdxl::models::unet::UNet2DConditionModel;
use hyperlora_sdxl::models::vae::AutoencoderKl;
use hyperlora_sdxl::sample::{SampleConfig, Sampler};
use hyperlora_sdxl::scheduler::NoiseSchedule;
use hyperlora_sdxl::text::{PromptStates, TextEncoders};
use safetensors::SafeTensors;

/// Sampling settings of the fixture.
fn config() -> SampleConfig {
    SampleConfig { steps: 12, guidance: 4.0, height: 40, width: 56, seed: 7, ..SampleConfig::default() }
}

fn fixtures() -> PathBuf {
    hyperlora_testing::fixture("encoders")
}

fn device() -> Device {
    Device::flex()
}

struct Base {
    unet: UNet2DConditionModel,
    vae: AutoencoderKl,
    schedule: NoiseSchedule,
    text: TextEncoders,
}

impl Base {
    fn load() -> Self {
        let part = |name: &str| fixtures().join(name);
        Self {
            unet: UNet2DConditionModel::load(&part("unet"), &device()).unwrap(),
            vae: AutoencoderKl::load(&part("vae"), &device()).unwrap(),
            schedule: NoiseSchedule::load(&part("scheduler")).unwrap(),
            text: TextEncoders::load(&fixtures(), &device()).unwrap(),
        }
    }

    fn sampler(&self) -> Sampler<'_> {
        Sampler { unet: &self.unet, vae: &self.vae, schedule: &self.schedule }
    }

    /// Prompts of the fixture, and as many negative ones.
    fn prompts(&self) -> [PromptStates; 2] {
        let prompts = ["a photo of a person", "fcsks fxhks fhyks, a portrait of a woman with red hair"];
        [self.text.encode(&prompts).unwrap(), self.text.encode(&["blurred"; 2]).unwrap()]
    }
}

/// LoRA for `rows` pictures, strong enough to be visible.
fn lora(sites: &[AttentionSite], rows: usize) -> LoraWeights {
    device().seed(3);
    let pair = |input: usize, output: usize| {
        let random = |shape| Tensor::<3>::random(shape, Distribution::Normal(0.0, 0.3), &device());
        LoraPair { down: random([rows, input, 2]), up: random([rows, 2, output]) }
    };
    let module = |site: &AttentionSite| {
        let (width, context) = (site.hidden_size, site.cross_attention_dim.unwrap_or(site.hidden_size));
        AttentionLora {
            q: pair(width, width),
            k: pair(context, width),
            v: pair(context, width),
            out: pair(width, width),
        }
    };
    LoraWeights { modules: sites.iter().map(module).collect() }
}

fn values<const D: usize>(tensor: Tensor<D>) -> TensorData {
    tensor.into_data()
}

#[test]
fn pictures_agree_with_diffusers() {
    let base = Base::load();
    let bytes = fs::read(fixtures().join("pipeline.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| {
        let view = file.tensor(name).unwrap();
        let floats = view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        TensorData::new(floats.collect::<Vec<f32>>(), view.shape().to_vec())
    };
    let [prompt, negative] = base.prompts();
    let initial = Tensor::from_data(floats("initial"), &device());

    let mut heard = Vec::new();
    let drawing = base.sampler().draw(&config(), initial, &prompt, &negative, None, |step| heard.push(step)).unwrap();
    assert_eq!(heard, (1..=12).collect::<Vec<_>>());

    let expected = floats("latents");
    let largest = expected.iter::<f32>().fold(0.0, |largest: f32, value| largest.max(value.abs()));
    values(drawing.latents).assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-3 * largest));

    let expected = file.tensor("images").unwrap();
    let pixels: Vec<u8> = drawing.images.iter().flat_map(|image| image.as_raw().iter().copied()).collect();
    assert_eq!(expected.shape(), [2, 40, 56, 3]);
    let worst = pixels.iter().zip(expected.data()).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(worst <= Some(2), "pixels differ by {worst:?} levels");
}

#[test]
fn one_lora_for_all_and_one_for_each_draw_the_same() {
    let base = Base::load();
    let sampler = base.sampler();
    let [prompt, negative] = base.prompts();
    let config = SampleConfig { steps: 2, ..config() };
    let initial = sampler.initial_latents(&config, 2, &device()).unwrap();
    let draw = |lora: Option<&LoraWeights>| {
        values(sampler.draw(&config, initial.clone(), &prompt, &negative, lora, |_| {}).unwrap().latents)
    };
    let one = lora(base.unet.attention_sites(), 1);
    let each = one.clone().map(|tensor| tensor.repeat_dim(0, 2));
    assert_eq!(draw(Some(&one)), draw(Some(&each)));
    assert_ne!(draw(Some(&one)), draw(None));
}

#[test]
fn a_picture_starts_from_the_same_noise_in_any_company() {
    let base = Base::load();
    let sampler = base.sampler();
    let noise = |count| sampler.initial_latents(&config(), count, &device()).unwrap();
    assert_eq!(noise(1).dims(), [1, 4, 10, 14]);
    assert_eq!(values(noise(3).narrow(0, 0, 1)), values(noise(1)));
    assert_ne!(values(noise(3).narrow(0, 1, 1)), values(noise(1)));
    let mean = noise(64).mean().into_scalar::<f32>();
    assert!(mean.abs() < 0.02, "mean {mean}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let base = Base::load();
    let sampler = base.sampler();
    let [prompt, negative] = base.prompts();
    let initial = sampler.initial_latents(&config(), 2, &device()).unwrap();
    let lora = lora(base.unet.attention_sites(), 3);
    let refused = |config: &SampleConfig, initial: &Tensor<4>, lora: Option<&LoraWeights>| {
        let error = sampler.draw(config, initial.clone(), &prompt, &negative, lora, |_| {}).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    assert!(refused(&SampleConfig { height: 42, ..config() }, &initial, None).contains("42"));
    assert!(refused(&SampleConfig { height: 48, ..config() }, &initial, None).contains("[2, 4, 12, 14]"));
    assert!(refused(&SampleConfig { steps: 0, ..config() }, &initial, None).contains("steps"));
    assert!(refused(&config(), &initial.clone().narrow(0, 0, 1), None).contains("2 prompts for 1 pictures"));
    assert!(refused(&config(), &initial, Some(&lora)).contains("3 LoRAs for 2 pictures"));
}
