//! The formula for the UNet's activations against an allocator that counts.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use burn_hyperlora::lora::{AttentionLora, AttentionSite, LoraPair, LoraWeights};
use burn_hyperlora::sdxl::memory::{TOLERANCE, activation_bytes};
use burn_hyperlora::sdxl::unet::{UNet2DConditionModel, UnetInput};
use burn_hyperlora::weights::save;
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// SDXL's topology at a tenth of its width.
fn unet(dtype: FloatDType) -> UNet2DConditionModel {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/unet_140");
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixture.join("config.json"), folder.path().join("config.json")).unwrap();
    let keys = fs::read_to_string(fixture.join("keys.json")).unwrap();
    let shapes: BTreeMap<String, Vec<usize>> = serde_json::from_str(&keys).unwrap();
    let zeros = shapes.into_iter().map(|(name, shape)| (name, TensorData::zeros::<f32, _>(shape)));
    save(&folder.path().join("diffusion_pytorch_model.safetensors"), zeros).unwrap();
    UNet2DConditionModel::load_as(folder.path(), dtype, &Device::flex()).unwrap()
}

fn ones<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::ones(shape, &Device::flex())
}

fn input(unet: &UNet2DConditionModel, batch: usize, [height, width]: [usize; 2]) -> UnetInput {
    let config = unet.config();
    UnetInput {
        latents: ones([batch, config.in_channels, height, width]),
        timesteps: ones([batch]),
        prompt_embeds: ones([batch, 77, config.cross_attention_dim.get(0)]),
        pooled: ones([batch, config.pooled_dim()]),
        time_ids: ones([batch, 6]),
    }
}

fn lora(sites: &[AttentionSite], batch: usize) -> LoraWeights {
    let module = |site: &AttentionSite| {
        let width = site.hidden_size;
        let pair = |input| LoraPair { down: ones([batch, input, 1]), up: ones([batch, 1, width]) };
        let context = site.cross_attention_dim.unwrap_or(width);
        AttentionLora { q: pair(width), k: pair(context), v: pair(context), out: pair(width) }
    };
    LoraWeights { modules: sites.iter().map(module).collect() }
}

/// One test alone in its process: others would allocate meanwhile.
#[test]
fn the_formula_tells_the_peak_of_the_activations() {
    for dtype in [FloatDType::F32, FloatDType::BF16] {
        let unet = unet(dtype);
        for (batch, size) in [(1, [48, 48]), (2, [40, 24])] {
            for recompute in [false, true] {
                let (input, lora) = (input(&unet, batch, size), lora(unet.attention_sites(), batch));
                ALLOCATOR.reset_peak_usage();
                let before = ALLOCATOR.current_usage();
                let result = unet.loss_and_lora_gradients(&input, lora, recompute, |x| x.square().mean());
                let measured = ALLOCATOR.peak_usage() - before;
                drop(result);
                let formula = activation_bytes(unet.config(), size, batch, dtype, recompute);
                let ratio = formula as f64 / measured as f64;
                println!(
                    "{dtype:?} {batch} x {size:?}, recompute {recompute}: {measured} measured, formula {ratio:.3} of it"
                );
                assert!((ratio - 1.0).abs() < TOLERANCE, "{ratio}");
            }
        }
    }
}
