//! Peak memory, measured by a counting allocator: the UNet's activations, and the weights during an optimiser step.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use burn_hyperlora::optim::{GradientMap, OptimConfig, Optimizer, Sharding, Wire};
use flate2::read::GzDecoder;
use hyperlora_core::Result;
use hyperlora_ranks::{Collective, Pending};
use hyperlora_sdxl::lora::{AttentionLora, AttentionSite, LoraPair, LoraWeights};
use hyperlora_sdxl::memory::{TOLERANCE, activation_bytes};
use hyperlora_sdxl::models::unet::{UNet2DConditionModel, UnetInput};
use hyperlora_sdxl::source::configs;
use hyperlora_sdxl::weights::{TensorEntry, save, save_lazily};
use hyperlora_testing::ALLOCATOR;
use safetensors::Dtype;
use serde::Deserialize;

/// Held by one test at a time, because others would allocate meanwhile.
static ALONE: Mutex<()> = Mutex::new(());

/// Builds SDXL's topology at a tenth of its width.
fn unet(dtype: FloatDType) -> UNet2DConditionModel {
    let fixture = hyperlora_testing::fixture("unet_140");
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

/// Returns the formula's estimate divided by the measured growth: bytes at the peak of a pass minus those before.
fn measure(unet: &UNet2DConditionModel, batch: usize, size: [usize; 2], dtype: FloatDType, recompute: bool) -> f64 {
    let (input, lora) = (input(unet, batch, size), lora(unet.attention_sites(), batch));
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    let result = unet.loss_and_lora_gradients(&input, lora, recompute, |x| x.square().mean());
    let measured = ALLOCATOR.peak_usage() - before;
    drop(result);
    let formula = activation_bytes(unet.config(), size, batch, dtype, recompute);
    let ratio = formula as f64 / measured as f64;
    println!(
        "{dtype:?} {batch} x {size:?}, recompute {recompute}: {measured} measured, formula {formula} ({ratio:.3})"
    );
    ratio
}

#[test]
fn the_formula_tells_the_peak_of_the_activations() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for dtype in [FloatDType::F32, FloatDType::BF16] {
        let unet = unet(dtype);
        for (batch, size) in [(1, [48, 48]), (2, [40, 24])] {
            for recompute in [false, true] {
                let ratio = measure(&unet, batch, size, dtype, recompute);
                assert!((ratio - 1.0).abs() < TOLERANCE, "{ratio}");
            }
        }
    }
}

/// Ranks that all do the same as this one.
struct Echo([String; 4]);

impl Collective for Echo {
    fn hosts(&self) -> &[String] {
        &self.0
    }

    fn world_size(&self) -> usize {
        self.0.len()
    }

    fn all_reduce_mean<'a>(&'a self, _what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>> {
        Ok(Box::new(|| Ok(bucket)))
    }

    fn reduce_scatter_mean<'a>(&'a self, _what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>> {
        Ok(Box::new(|| Ok(bucket)))
    }

    fn all_gather<'a>(&'a self, _what: &'a str, part: Tensor<1>) -> Result<Pending<'a>> {
        Ok(Box::new(|| Ok(Tensor::cat(vec![part; self.world_size()], 0))))
    }

    fn broadcast<'a>(&'a self, _what: &'a str, tensor: Tensor<1>) -> Result<Pending<'a>> {
        Ok(Box::new(|| Ok(tensor)))
    }

    fn exchange(&self, _what: &str, note: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![note.to_vec(); self.world_size()])
    }

    fn barrier(&self, _what: &str, _deadline: Duration) -> Result<()> {
        Ok(())
    }
}

#[test]
fn gradients_are_reduced_in_their_place_and_new_weights_take_that_of_the_old_ones() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    const SIDE: usize = 2048;
    const BUCKET: usize = SIDE * SIDE * size_of::<f32>();
    const WEIGHTS: usize = 8 * BUCKET;
    let device = Device::flex().autodiff();
    // Each parameter is its own bucket.
    let mut module: Vec<Linear> =
        (0..8).map(|_| LinearConfig::new(SIDE, SIDE).with_bias(false).init(&device)).collect();
    let gradients = |parameters: usize| {
        let mut gradients = GradientMap::default();
        for index in 0..parameters {
            let ones = TensorData::new(vec![1.0_f32; SIDE * SIDE], [SIDE * SIDE]);
            gradients.insert(format!("{index}.weight"), Tensor::from_data(ones, &Device::flex()));
        }
        gradients
    };
    let world = Echo(["a", "b", "c", "d"].map(String::from));
    let mut optimizer = Optimizer::new(&OptimConfig::default(), &module, Sharding::of(&world, true, Wire::F32));
    // The first step allocates the moments.
    for first in [true, false] {
        let micro_batches = [gradients(module.len()), gradients(module.len())];
        ALLOCATOR.reset_peak_usage();
        let before = ALLOCATOR.current_usage();
        for gradients in micro_batches {
            optimizer.accumulate(gradients).unwrap();
        }
        let reduced = optimizer.reduce(&world).unwrap();
        let more = ALLOCATOR.peak_usage() - before;
        println!("reduced with {} MiB more", more >> 20);
        assert!(first || more < BUCKET / 2, "{more} bytes, a bucket has {BUCKET}");

        ALLOCATOR.reset_peak_usage();
        let before = ALLOCATOR.current_usage();
        optimizer.step(&mut module, reduced, 1e-3, &world).unwrap();
        let more = ALLOCATOR.peak_usage() - before;
        println!("{} MiB beside {} MiB of weights", more >> 20, WEIGHTS >> 20);
        assert!(first || more < WEIGHTS / 2, "{more} bytes beside weights of {WEIGHTS}");
    }
}

#[derive(Deserialize)]
struct Lists {
    /// Component -> name -> shape.
    diffusers: BTreeMap<String, BTreeMap<String, Vec<usize>>>,
}

/// Builds the full SDXL UNet, with every weight zero.
fn full_unet(dtype: FloatDType) -> UNet2DConditionModel {
    let lists = hyperlora_testing::fixture("key_lists.json.gz");
    let lists: Lists = serde_json::from_reader(GzDecoder::new(File::open(lists).unwrap())).unwrap();
    let entry = |(name, shape): (&String, &Vec<usize>)| TensorEntry {
        name: name.clone(),
        dtype: Dtype::BF16,
        shape: shape.clone(),
    };
    let entries: Vec<_> = lists.diffusers["unet"].iter().map(entry).collect();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), configs::UNET).unwrap();
    let file = folder.path().join("diffusion_pytorch_model.safetensors");
    let zeros = |entry: &TensorEntry| Ok(vec![0; 2 * entry.shape.iter().product::<usize>()]);
    save_lazily(&file, BTreeMap::new(), entries, zeros).unwrap();
    UNet2DConditionModel::load_as(folder.path(), dtype, &Device::flex()).unwrap()
}

#[test]
#[ignore = "takes 18 GB of memory and minutes, in a release build"]
fn the_formula_tells_the_peak_of_the_full_sdxl() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut ratios = vec![];
    for dtype in [FloatDType::BF16, FloatDType::F32] {
        let unet = full_unet(dtype);
        for side in [32, 64] {
            ratios.extend([true, false].map(|recompute| measure(&unet, 1, [side; 2], dtype, recompute)));
        }
    }
    assert!(ratios.iter().all(|ratio| (ratio - 1.0).abs() < TOLERANCE), "{ratios:?}");
}
