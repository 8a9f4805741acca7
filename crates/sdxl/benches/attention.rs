//! Attention of the UNet, forward and backward, in f32 on the CPU:
//!
//! ```text
//! cargo bench --bench attention
//! ```
//!
//! `backward` includes its forward pass, and keeps the scores of all queries, as training with `recompute: false` does.
#![expect(clippy::unwrap_used, reason = "a bench fails by panicking")]

use burn::tensor::{Device, Distribution, Tensor};
use divan::Bencher;
use divan::counter::ItemsCount;
use hyperlora_sdxl::lora::{AttentionLora, LoraPair};
use hyperlora_sdxl::models::attention::Attention;
use hyperlora_sdxl::weights::{Weights, save};

/// Tokens and width. SDXL at 256^2 pixels has 64 tokens of width 1280 and 256 of 640, at 512^2 pixels 1024 of 640.
const SIZES: [[usize; 2]; 3] = [[64, 1280], [256, 640], [1024, 640]];

/// Width of a head in SDXL.
const HEAD: usize = 64;

/// LoRA rank of the ID-LoRA.
const RANK: usize = 8;

fn main() {
    divan::main();
}

#[divan::bench(args = SIZES)]
fn forward(bencher: Bencher<'_, '_>, [tokens, width]: [usize; 2]) {
    let (attention, lora, x) = parts(tokens, width);
    bencher.counter(ItemsCount::new(tokens)).bench_local(|| {
        attention.forward(x.clone(), x.clone(), Some(&lora)).into_data() // read, because a device may be lazy
    });
}

#[divan::bench(args = SIZES)]
fn backward(bencher: Bencher<'_, '_>, [tokens, width]: [usize; 2]) {
    let (attention, lora, x) = parts(tokens, width);
    bencher.counter(ItemsCount::new(tokens)).bench_local(|| {
        let leaf = |tensor: &Tensor<3>| Tensor::from_inner(tensor.clone()).require_grad();
        let pair = |pair: &LoraPair| LoraPair { down: leaf(&pair.down), up: leaf(&pair.up) };
        let lora = AttentionLora { q: pair(&lora.q), k: pair(&lora.k), v: pair(&lora.v), out: pair(&lora.out) };
        let x = leaf(&x);
        let y = attention.forward(x.clone(), x.clone(), Some(&lora));
        let mut gradients = y.square().mean().backward();
        x.grad_remove(&mut gradients).map(Tensor::into_data)
    });
}

/// Self-attention, a LoRA and tokens, all random.
fn parts(tokens: usize, width: usize) -> (Attention, AttentionLora, Tensor<3>) {
    let device = Device::flex();
    let random = |shape: [usize; 3]| Tensor::<3>::random(shape, Distribution::Normal(0.0, 0.1), &device);
    let weight = |name: &str| (format!("{name}.weight"), random([1, width, width]).reshape([width, width]).into_data());
    let bias = ("to_out.0.bias".to_string(), random([1, 1, width]).reshape([width]).into_data());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("attention.safetensors");
    save(&path, ["to_q", "to_k", "to_v", "to_out.0"].map(weight).into_iter().chain([bias])).unwrap();
    let weights = Weights::open(&path, &device).unwrap();
    let attention = Attention::load(&weights.at(""), width, width, width / HEAD);
    weights.finish().unwrap();
    let pair = || LoraPair { down: random([1, width, RANK]), up: random([1, RANK, width]) };
    (attention, AttentionLora { q: pair(), k: pair(), v: pair(), out: pair() }, random([1, tokens, width]))
}
